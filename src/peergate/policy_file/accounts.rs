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
use crate::policy::{Accounts, HIGHEST, Name, Policy, SubordinateRange};

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
        let disjoint = disjoint(denied);
        let is_denied = |gid: Gid| {
            let after = disjoint.partition_point(|(low, _)| *low <= gid.raw());
            after > 0 && gid.raw() <= disjoint[after - 1].1
        };
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

/// The same ids in ranges that do not overlap, ascending.
fn disjoint(ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut disjoint: Vec<(u32, u32)> = Vec::with_capacity(sorted.len());
    for (low, high) in sorted {
        match disjoint.last_mut() {
            Some(last) if low <= last.1 => last.1 = last.1.max(high),
            _ => disjoint.push((low, high)),
        }
    }
    disjoint
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
    use super::*;

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
