//! What the system says of its users beyond what the kernel tells of a peer: subordinate ids, and the members of groups.
//! Used by [`policy`](super), which makes these names public.
//!
//! A user to whom /etc/subuid gives subordinate ids can run processes under them, without any group, with the programs of
//! Debian's package uidmap (newuidmap(1)). So a deny rule that goes by the peer's own ids alone is no obstacle to such a user,
//! and a limit per user none either.

use std::collections::HashMap;

use super::set::{HIGHEST, IdSet, sweep};
use crate::ids::{Gid, Uid};

/// Uids that a user may take on besides their own: a line of /etc/subuid (subuid(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubordinateRange {
    /// The user.
    pub owner: Uid,
    /// The first of these uids.
    pub low: u32,
    /// The last of them.
    pub high: u32,
}

impl SubordinateRange {
    /// The uids from `low` to `high` may be taken on by `owner`.
    pub const fn new(owner: Uid, low: u32, high: u32) -> Self {
        Self { owner, low, high }
    }
}

/// Which users own subordinate ids, and which users are members of groups.
///
/// The uid of a user is never a subordinate id, whatever a range says.
///
/// ```
/// use peergate::policy::{Accounts, Policy, Rule, SubordinateRange, User, Verdict};
/// use peergate::{Peer, Uid};
///
/// let (alice, bob) = (Uid::new(1001), Uid::new(1002));
/// let accounts = Accounts::new([SubordinateRange::new(alice, 100_000, 165_535)], [alice, bob], []);
/// assert_eq!(accounts.owner_of(Uid::new(100_007)), alice);
/// assert_eq!(accounts.owner_of(bob), bob);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    /// Without the uids of users. Ranges of several owners may overlap.
    ranges: Vec<SubordinateRange>,
    /// The same, disjoint: of several owners the one that was listed first.
    owners: Vec<SubordinateRange>,
    members: HashMap<Gid, Vec<Uid>>,
}

impl Accounts {
    /// The subordinate ids, in the order of the file; the uids of all users that are known; the members of groups by the
    /// user database.
    pub fn new(
        subordinate: impl IntoIterator<Item = SubordinateRange>,
        users: impl IntoIterator<Item = Uid>,
        members: impl IntoIterator<Item = (Gid, Vec<Uid>)>,
    ) -> Self {
        let listed: Vec<SubordinateRange> = subordinate.into_iter().collect();
        let mut users: Vec<u32> =
            users.into_iter().chain(listed.iter().map(|range| range.owner)).map(Uid::raw).collect();
        users.sort_unstable();
        users.dedup();
        let ranges: Vec<SubordinateRange> = listed.iter().flat_map(|range| without(range, &users)).collect();
        let owners = first_listed(&ranges);
        Self { ranges, owners, members: members.into_iter().collect() }
    }

    /// The owner of a subordinate uid; of any other uid, itself.
    pub fn owner_of(&self, uid: Uid) -> Uid {
        let after = self.owners.partition_point(|range| range.low <= uid.raw());
        match after.checked_sub(1).map(|at| self.owners[at]) {
            Some(range) if uid.raw() <= range.high && uid.is_known() => range.owner,
            _ => uid,
        }
    }

    /// Whether there is neither a subordinate id nor a member.
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty() && self.members.is_empty()
    }

    /// How many uids are subordinate to some user.
    pub fn subordinate_ids(&self) -> u64 {
        self.owners.iter().map(|range| u64::from(range.high - range.low) + 1).sum()
    }

    /// The subordinate ids of these users.
    pub(super) fn subordinates_of(&self, users: &IdSet) -> IdSet {
        let theirs = self.ranges.iter().filter(|range| users.contains(range.owner.raw()));
        IdSet::new(theirs.map(|range| (range.low, range.high)))
    }

    /// The users that the user database lists in one of these groups.
    pub(super) fn members_of(&self, groups: &IdSet) -> IdSet {
        let theirs = self.members.iter().filter(|(gid, _)| groups.contains(gid.raw()));
        IdSet::new(theirs.flat_map(|(_, users)| users.iter().map(|uid| (uid.raw(), uid.raw()))))
    }

    /// The first of these groups in which the user database lists this user.
    pub(super) fn group_of(&self, uid: Uid, groups: &IdSet) -> Option<Gid> {
        let theirs = self.members.iter().filter(|(gid, users)| groups.contains(gid.raw()) && users.contains(&uid));
        theirs.map(|(gid, _)| *gid).min()
    }

    /// The user among these to whom this uid is subordinate.
    pub(super) fn owner_among(&self, uid: Uid, users: &IdSet) -> Option<Uid> {
        let theirs = self
            .ranges
            .iter()
            .find(|range| (range.low..=range.high).contains(&uid.raw()) && users.contains(range.owner.raw()));
        theirs.map(|range| range.owner)
    }
}

/// What remains of a range without these uids, which ascend.
fn without(range: &SubordinateRange, uids: &[u32]) -> Vec<SubordinateRange> {
    let high = range.high.min(HIGHEST);
    let inside = uids.partition_point(|&uid| uid < range.low)..uids.partition_point(|&uid| uid <= high);
    let mut pieces = Vec::new();
    let mut low = Some(range.low);
    for &uid in uids.get(inside).unwrap_or_default() {
        if let (Some(low), Some(before)) = (low, uid.checked_sub(1)) {
            pieces.push(SubordinateRange::new(range.owner, low, before));
        }
        low = uid.checked_add(1);
    }
    pieces.extend(low.map(|low| SubordinateRange::new(range.owner, low, high)));
    pieces.retain(|piece| piece.low <= piece.high);
    pieces
}

/// Cuts ranges that may overlap into disjoint ones, ascending. Where several cover a uid, the first one has it.
fn first_listed(ranges: &[SubordinateRange]) -> Vec<SubordinateRange> {
    let mut disjoint: Vec<SubordinateRange> = Vec::new();
    let mut begun: Option<(u32, Uid)> = None;
    let places = ranges.iter().enumerate().map(|(place, range)| (place, range.low, range.high));
    sweep(places, |at, active| {
        let owner = active.first().map(|&place| ranges[place].owner);
        if begun.map(|(_, owner)| owner) != owner {
            disjoint.extend(begun.map(|(low, owner)| SubordinateRange::new(owner, low, at - 1)));
            begun = owner.map(|owner| (at, owner));
        }
        Some(())
    });
    disjoint
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Uid = Uid::new(1001);
    const BOB: Uid = Uid::new(1002);

    fn owners(ranges: &[(Uid, u32, u32)], users: &[u32]) -> Accounts {
        let ranges = ranges.iter().map(|&(owner, low, high)| SubordinateRange::new(owner, low, high));
        Accounts::new(ranges, users.iter().copied().map(Uid::new), [])
    }

    fn owner(accounts: &Accounts, uid: u32) -> u32 {
        accounts.owner_of(Uid::new(uid)).raw()
    }

    #[test]
    fn a_subordinate_uid_has_its_owner_and_any_other_uid_itself() {
        let accounts = owners(&[(BOB, 165_536, 231_071), (ALICE, 100_000, 165_535)], &[]);
        for (uid, expected) in
            [(99_999, 99_999), (100_000, 1001), (165_535, 1001), (165_536, 1002), (231_071, 1002), (231_072, 231_072)]
        {
            assert_eq!(owner(&accounts, uid), expected, "{uid}");
        }
        assert_eq!(accounts.subordinate_ids(), 131_072);
        assert_eq!(owner(&Accounts::default(), 100_000), 100_000);
    }

    #[test]
    fn where_ranges_overlap_the_first_one_names_the_owner() {
        let accounts = owners(&[(ALICE, 10, 20), (BOB, 0, 100), (ALICE, 90, 110)], &[]);
        for (uid, expected) in [(5, 1002), (10, 1001), (20, 1001), (21, 1002), (95, 1002), (101, 1001), (111, 111)] {
            assert_eq!(owner(&accounts, uid), expected, "{uid}");
        }
        // Either user can take it on, so a rule about either one matches it.
        for user in [ALICE, BOB] {
            assert!(accounts.subordinates_of(&IdSet::new([(user.raw(), user.raw())])).contains(15));
        }
    }

    #[test]
    fn a_users_own_uid_is_no_subordinate_id() {
        let accounts = owners(&[(ALICE, 0, u32::MAX)], &[0, 5, 6, 65_534, u32::MAX - 1]);
        for (uid, expected) in
            [(0, 0), (1, 1001), (5, 5), (6, 6), (7, 1001), (1001, 1001), (65_534, 65_534), (u32::MAX - 2, 1001)]
        {
            assert_eq!(owner(&accounts, uid), expected, "{uid}");
        }
        assert_eq!((owner(&accounts, u32::MAX - 1), owner(&accounts, u32::MAX)), (u32::MAX - 1, u32::MAX));
        let subordinates = accounts.subordinates_of(&IdSet::new([(1001, 1001)]));
        assert!(!subordinates.contains(0) && !subordinates.contains(1001) && subordinates.contains(1));
    }

    #[test]
    fn a_range_without_a_uid_is_none() {
        let accounts = owners(&[(ALICE, 20, 10), (BOB, 7, 7)], &[7]);
        assert_eq!((accounts.subordinate_ids(), owner(&accounts, 7), owner(&accounts, 15)), (0, 7, 15));
    }
}
