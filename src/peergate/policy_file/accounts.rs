//! What the system says of its users beyond the names in a policy: subordinate ids (/etc/subuid) and the members of groups.
//! Read when the policy is read. Used by [`policy_file`](super), which makes these names public.
//!
//! Lines of /etc/subuid are read as newuidmap(1) reads them, or a user would have ids that the policy does not know of: a
//! number may be octal or hexadecimal (strtoul(3) with base 0), and a line that newuidmap(1) passes over gives no user an id.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::io;

use super::{Fault, Faults, Names, Source};
use crate::ids::{Gid, Uid};
use crate::policy::{Accounts, HIGHEST, IdSet, Name, Policy, SubordinateRange};

/// The longest line that newuidmap(1) reads.
const LONGEST_LINE: usize = 1023;

/// How many names are asked for one by one, because the database does not list its users.
const MOST_QUESTIONS: usize = 65_536;

/// The largest range of groups in which each is asked for, because the database does not list its groups.
const LARGEST_RANGE: u32 = 1024;

/// How many warnings about one file are spelled out.
const MOST_WARNINGS: usize = 10;

/// The policy with what the system says of its users: the owners of subordinate ids, and the members of the groups that
/// deny rules list. [`load`](super::load) and [`parse`](super::parse) do it themselves; a program that writes its rules
/// itself calls this. It takes as long as the user database does, so call it on a thread that may wait. Returns warnings too.
///
/// # Errors
/// What a deny rule depends on could not be read: the denial would be lost.
///
/// ```
/// use peergate::policy_file::{self, SystemNames};
/// use peergate::{Policy, Rule, Uid, User};
///
/// let rules = [Rule::<()>::deny("guest").users([Uid::new(1001)]), Rule::allow("all", ()).users([User::Any])];
/// let (policy, _warnings) = policy_file::with_accounts(Policy::new(rules, Uid::effective())?, &SystemNames)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn with_accounts<T>(policy: Policy<T>, names: &dyn Names) -> Result<(Policy<T>, Vec<Fault>), Faults> {
    let mut reader =
        Reader { names, policy: &policy, users: Users::default(), warnings: Vec::new(), faults: Vec::new() };
    let accounts = reader.accounts();
    let (warnings, faults) = (reader.warnings, reader.faults);
    if !faults.is_empty() {
        return Err(Faults(faults));
    }
    if accounts.is_empty() {
        return Ok((policy, warnings));
    }
    match policy.with_accounts(accounts) {
        Ok(policy) => Ok((policy, warnings)),
        // It has taken these rules before.
        Err(error) => Err(Faults(vec![Fault::of_file("policy", error.to_string())])),
    }
}

struct Reader<'r, T> {
    names: &'r dyn Names,
    policy: &'r Policy<T>,
    users: Users,
    warnings: Vec<Fault>,
    faults: Vec<Fault>,
}

/// The users that the database has told of.
#[derive(Default)]
struct Users {
    by_name: HashMap<String, Option<Uid>>,
    /// The users and their own groups.
    listed: Vec<(Uid, Gid)>,
    questions: usize,
}

impl<T> Reader<'_, T> {
    fn accounts(&mut self) -> Accounts {
        let subuid = self.names.subordinate_ids().unwrap_or_else(|error| {
            let message = format!("cannot be read ({error}), so no subordinate ids are known");
            self.trouble("/etc/subuid", message, self.policy.denies_any());
            Source::new("/etc/subuid", "")
        });
        let denied = self.policy.denied_groups();
        if subuid.text().is_empty() && denied.is_empty() {
            return Accounts::default();
        }
        match self.names.users() {
            Ok(users) => {
                self.users.listed = users.iter().map(|user| (user.uid, user.gid)).collect();
                self.users.by_name = users.into_iter().map(|user| (user.name, Some(user.uid))).collect();
            }
            Err(error) => {
                let message = format!("the users could not be listed ({error})");
                self.trouble("user database", message, !denied.is_empty());
            }
        }
        let known = self.policy.known_names();
        let known = known.iter().filter(|(name, _)| matches!(name, Name::User(_))).map(|(_, id)| Uid::new(*id));
        let mut users: Vec<Uid> = self.users.listed.iter().map(|(uid, _)| *uid).chain(known).collect();
        users.push(self.policy.me());
        let ranges = self.subordinate_ranges(&subuid, &users);
        let members = self.members(&denied);
        if self.users.questions >= MOST_QUESTIONS {
            let message = format!("more than {MOST_QUESTIONS} names to ask for one by one; the rest count as unknown");
            self.warnings.push(Fault::of_file("user database", message));
        }
        Accounts::new(ranges, users, members)
    }

    /// A warning, or a fault where a denial would be lost.
    fn trouble(&mut self, file: &str, message: String, loses_denial: bool) {
        if loses_denial {
            self.faults.push(Fault::of_file(file, message + ", and a denial must not be lost; expected an answer"));
        } else {
            self.warnings.push(Fault::of_file(file, message));
        }
    }

    fn uid_of(&mut self, name: &str) -> io::Result<Option<Uid>> {
        if let Some(uid) = self.users.by_name.get(name) {
            return Ok(*uid);
        }
        let uid = if self.names.lists_all() || self.users.questions >= MOST_QUESTIONS {
            None
        } else {
            self.users.questions += 1;
            self.names.uid(name)?
        };
        self.users.by_name.insert(name.to_owned(), uid);
        Ok(uid)
    }

    fn subordinate_ranges(&mut self, source: &Source, users: &[Uid]) -> Vec<SubordinateRange> {
        let own: HashSet<Uid> = users.iter().copied().collect();
        let mut own: Vec<u32> = own.into_iter().map(Uid::raw).collect();
        own.sort_unstable();
        let (mut ranges, mut spots, mut at) = (Vec::new(), Vec::new(), 0);
        for line in source.text().split_inclusive('\n') {
            let place = at;
            at += line.len();
            let line = line.trim_end_matches('\n');
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match self.subordinate_range(line) {
                Ok(range) => {
                    let first = own.partition_point(|&uid| uid < range.low);
                    let inside = own[first..].iter().take_while(|&&uid| uid <= range.high);
                    let mut others = inside.filter(|&&uid| uid != range.owner.raw() && uid != crate::ids::OVERFLOW_ID);
                    if let Some(uid) = others.next() {
                        let message = format!("the range covers the uid {uid} of a user, who keeps it");
                        spots.push((place, message + "; expected ids that no user has"));
                    }
                    ranges.push(range);
                }
                Err(message) => spots.push((place, message)),
            }
        }
        let more = spots.len().saturating_sub(MOST_WARNINGS);
        spots.truncate(MOST_WARNINGS);
        self.warnings.extend(source.faults(spots));
        if more > 0 {
            self.warnings.push(Fault::of_file(source.path(), format!("{more} more lines like these")));
        }
        ranges
    }

    fn subordinate_range(&mut self, line: &str) -> Result<SubordinateRange, String> {
        let malformed = || {
            let shown = line.chars().take(80).collect::<String>();
            format!("{shown:?} gives no user an id; expected OWNER:FIRST:COUNT such as alice:100000:65536")
        };
        let mut fields = line.splitn(4, ':');
        let (Some(owner), Some(first), Some(count)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(malformed());
        };
        let (first, count) = (number(first).ok_or_else(malformed)?, number(count).ok_or_else(malformed)?);
        let last = first.saturating_add(count).saturating_sub(1).min(u64::from(HIGHEST));
        if owner.is_empty() || line.len() > LONGEST_LINE || count == 0 || first > last {
            return Err(malformed());
        }
        let by_number = owner.bytes().all(|byte| byte.is_ascii_digit()).then(|| owner.parse().ok().map(Uid::new));
        let owner = match by_number {
            Some(owner) => owner,
            None => {
                self.uid_of(owner).map_err(|error| format!("the user {owner:?} could not be looked up ({error})"))?
            }
        };
        let owner = owner.ok_or_else(|| format!("{line:?} gives no user an id; expected a user that exists"))?;
        // Both are at most HIGHEST.
        Ok(SubordinateRange::new(owner, first as u32, last as u32))
    }

    /// The members of the groups that deny rules list.
    fn members(&mut self, denied: &[(u32, u32)]) -> Vec<(Gid, Vec<Uid>)> {
        if denied.is_empty() {
            return Vec::new();
        }
        let ids = IdSet::new(denied.iter().copied());
        let is_denied = |gid: Gid| ids.contains(gid.raw());
        let mut members: HashMap<Gid, HashSet<Uid>> = HashMap::new();
        for (uid, gid) in self.users.listed.iter().filter(|(_, gid)| is_denied(*gid)) {
            members.entry(*gid).or_default().insert(*uid);
        }
        let listed = self.names.groups();
        let mut listed = self.answered(listed, "the groups").unwrap_or_default();
        listed.retain(|(gid, _)| is_denied(*gid));
        if !self.names.lists_all() {
            listed.extend(self.asked_for(denied));
        }
        for (gid, names) in listed {
            for name in names {
                let uid = self.uid_of(&name);
                let uid = self.answered(uid, format!("the user {name:?}, a member of group {gid},")).flatten();
                members.entry(gid).or_default().extend(uid);
            }
        }
        members.into_iter().map(|(gid, users)| (gid, users.into_iter().collect())).collect()
    }

    /// The groups that deny rules list, each asked for by its id.
    fn asked_for(&mut self, denied: &[(u32, u32)]) -> Vec<(Gid, Vec<String>)> {
        let ranges: HashSet<(u32, u32)> = denied.iter().copied().collect();
        let small = ranges.into_iter().filter(|(low, high)| high - low < LARGEST_RANGE);
        let gids = small.flat_map(|(low, high)| low..=high).take(MOST_QUESTIONS);
        gids.filter_map(|gid| {
            let names = self.names.members(Gid::new(gid));
            Some((Gid::new(gid), self.answered(names, format!("the members of group {gid}"))?))
        })
        .collect()
    }

    fn answered<V>(&mut self, answer: io::Result<V>, what: impl Display) -> Option<V> {
        answer
            .map_err(|error| self.trouble("user database", format!("{what} could not be looked up ({error})"), true))
            .ok()
    }
}

/// strtoul(3) with base 0 over the whole text. A number that is negative or beyond 64 bits is no id in any case.
fn number(text: &str) -> Option<u64> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\u{b}');
    let text = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (&text[2..], 16),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    // from_str_radix takes a sign of its own.
    if digits.starts_with(['+', '-']) { None } else { u64::from_str_radix(digits, radix).ok() }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::policy::{Group, Rule, Verdict};
    use crate::policy_file::Account;

    /// A user database of users u0, u1, … and one group, and what is asked of it one by one.
    #[derive(Default)]
    struct Database {
        subuid: String,
        users: u32,
        members: Vec<String>,
        lists_all: bool,
        fails: bool,
        asked: Cell<usize>,
    }

    const GROUP: Gid = Gid::new(50);

    impl Database {
        fn answer<V>(&self, value: V) -> io::Result<V> {
            if self.fails { Err(io::ErrorKind::TimedOut.into()) } else { Ok(value) }
        }
    }

    impl Names for Database {
        fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
            self.asked.set(self.asked.get() + 1);
            self.answer(name.strip_prefix('u').and_then(|uid| uid.parse().ok()).map(Uid::new))
        }

        fn gid(&self, _: &str) -> io::Result<Option<Gid>> {
            Ok(Some(GROUP))
        }

        fn users(&self) -> io::Result<Vec<Account>> {
            let listed = if self.lists_all { self.users } else { 0 };
            self.answer((0..listed).map(|uid| Account::new(format!("u{uid}"), Uid::new(uid), Gid::new(100))).collect())
        }

        fn groups(&self) -> io::Result<Vec<(Gid, Vec<String>)>> {
            self.answer(if self.lists_all { vec![(GROUP, self.members.clone())] } else { Vec::new() })
        }

        fn members(&self, gid: Gid) -> io::Result<Vec<String>> {
            self.answer(if gid == GROUP { self.members.clone() } else { Vec::new() })
        }

        fn lists_all(&self) -> bool {
            self.lists_all
        }

        fn subordinate_ids(&self) -> io::Result<Source> {
            self.answer(Source::new("/etc/subuid", self.subuid.clone()))
        }
    }

    fn deny() -> Policy<()> {
        let groups = [Group::Id(GROUP), Group::Range(Gid::new(1000), Gid::new(3000))];
        Policy::new([Rule::deny("group").groups(groups)], Uid::new(0)).unwrap()
    }

    fn denies(policy: &Policy<()>, uid: u32) -> bool {
        struct Peer(Uid);
        impl crate::Subject for Peer {
            fn uid(&self) -> Uid {
                self.0
            }
            fn gids(&self) -> &[Gid] {
                &[]
            }
            fn gids_complete(&self) -> bool {
                true
            }
            fn units(&self) -> Option<&crate::unit::Units> {
                None
            }
        }
        matches!(policy.decide(&Peer(Uid::new(uid))), Verdict::Denied(Some(_)))
    }

    #[test]
    fn a_group_of_fifty_thousand_listed_members_asks_for_none_of_them() {
        let members = (0..50_000).map(|uid| format!("u{uid}")).chain(["gone".to_owned()]).collect();
        let database = Database { users: 50_000, members, lists_all: true, ..Database::default() };
        let (policy, warnings) = with_accounts(deny(), &database).unwrap();
        assert_eq!((database.asked.get(), warnings), (0, vec![]));
        assert!(denies(&policy, 0) && denies(&policy, 49_999) && !denies(&policy, 50_000));
    }

    #[test]
    fn members_that_a_directory_does_not_list_are_asked_for_once_each_and_in_bounds() {
        let members: Vec<String> = (0..70_000).flat_map(|uid| [format!("u{uid}"), "u1".to_owned()]).collect();
        let database = Database { members, ..Database::default() };
        let (policy, warnings) = with_accounts(deny(), &database).unwrap();
        assert_eq!((database.asked.get(), warnings.len()), (MOST_QUESTIONS, 1), "{warnings:?}");
        assert!(denies(&policy, 0) && denies(&policy, MOST_QUESTIONS as u32 - 1));
    }

    #[test]
    fn ten_thousand_lines_of_subordinate_ids_are_ten_thousand_owners() {
        let line = |uid: u32| format!("u{uid}:{}:65536\n", 100_000 + 65_536 * uid);
        let database =
            Database { subuid: (0..10_000).map(line).collect(), users: 10_000, lists_all: true, ..Database::default() };
        let (policy, warnings) = with_accounts(deny(), &database).unwrap();
        assert_eq!((database.asked.get(), warnings.len()), (0, 0));
        for uid in [0, 1, 4_711, 9_999] {
            assert_eq!(policy.owner_of(Uid::new(100_000 + 65_536 * uid + 7)), Uid::new(uid));
        }
        assert_eq!(policy.accounts().subordinate_ids(), 655_360_000);
    }

    #[test]
    fn lines_that_newuidmap_passes_over_give_no_id_and_a_warning_each_up_to_ten() {
        let read = |text: &str| {
            let database = Database { subuid: text.to_owned(), users: 10, lists_all: true, ..Database::default() };
            let (policy, warnings) = with_accounts(deny(), &database).unwrap();
            (policy.accounts().subordinate_ids(), warnings.iter().map(Fault::to_string).collect::<Vec<_>>())
        };
        let long = format!("u1:{}100000:1", "0".repeat(1100));
        let bad = [
            "u1",
            "u1:1",
            ":100000:1",
            "u1::1",
            "u1:100000:",
            "u1:100000:0",
            "u1:200000:-65536",
            "u1:5000000000:1",
            &long,
        ];
        for line in bad.into_iter().chain(["gone:100000:1", "\u{1b}[2J:1:1"]) {
            let (ids, warnings) = read(&format!("{line}\nu2:100000:3\n"));
            assert_eq!((ids, warnings.len()), (3, 1), "{line:?} {warnings:?}");
            assert!(warnings[0].starts_with("/etc/subuid:1:1: ") && !warnings[0].contains('\u{1b}'), "{warnings:?}");
        }
        // More than there are, a field too many, ids that no process can have, a comment, two ranges of one owner.
        let good = "u1:100000:1:x\nu1:200000:18446744073709551615\n#u1:1:1\n\n";
        assert_eq!(read(good), (1 + u64::from(HIGHEST) - 199_999, vec![]));
        let (_, warnings) = read(&"nonsense\n".repeat(1000));
        assert_eq!(warnings.len(), MOST_WARNINGS + 1);
        assert_eq!(warnings[MOST_WARNINGS], "/etc/subuid: 990 more lines like these");
    }

    #[test]
    fn a_denial_that_would_be_lost_is_a_fault_and_a_limit_only_a_warning() {
        let database = Database { fails: true, ..Database::default() };
        let faults = with_accounts(deny(), &database).unwrap_err();
        assert!(
            faults.0.len() >= 2 && faults.0.iter().all(|fault| fault.message().contains("must not be lost")),
            "{faults}"
        );
        let (_, warnings) = with_accounts(Policy::<()>::owner_only(Uid::new(5)), &database).unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }

    #[test]
    fn the_services_own_uid_is_no_subordinate_id_although_no_database_lists_it() {
        let database = Database { subuid: "u1:100000:10\n".to_owned(), ..Database::default() };
        let (policy, warnings) = with_accounts(Policy::<()>::owner_only(Uid::new(100_005)), &database).unwrap();
        let owners = [100_004, 100_005, 100_006].map(|uid| policy.owner_of(Uid::new(uid)).raw());
        assert_eq!((owners, warnings.len()), ([1, 100_005, 1], 1), "{warnings:?}");
    }

    #[test]
    fn numbers_are_read_as_strtoul_reads_them() {
        for (text, expected) in [
            ("100000", Some(100_000)),
            (" +100000", Some(100_000)),
            ("0x186A0", Some(100_000)),
            ("0303240", Some(100_000)),
            ("0", Some(0)),
            ("0x", None),
            ("08", None),
            ("", None),
            ("-1", None),
            ("+-1", None),
            ("1 ", None),
            ("1e5", None),
            ("18446744073709551616", None),
        ] {
            assert_eq!(number(text), expected, "{text:?}");
        }
    }
}
