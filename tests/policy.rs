//! The decisions of a policy, compared with a slow and obvious model, and the messages about a faulty file.

// The lint's exception for tests does not cover their helpers.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;

use peergate::ids::{Gid, OVERFLOW_ID, Uid};
use peergate::policy::{self, Accounts, Group, Kind, Name, Policy, Rule, SubordinateRange, User, Verdict};
use peergate::policy_file::{self, Account, Fault, Loaded, Names, Source};
use peergate::unit::Units;
use peergate::{Login, Subject};

/// A subject that counts how often its units are read.
#[derive(Debug)]
struct TestSubject {
    uid: u32,
    gids: Vec<Gid>,
    complete: bool,
    units: Option<Units>,
    login: Login,
    asked: Cell<u32>,
}

impl TestSubject {
    fn new(uid: u32, gids: &[u32], unit: Option<&str>) -> Self {
        let gids = gids.iter().copied().map(Gid::new).collect();
        let units = unit.map(|path| Units::from_path(path).unwrap());
        Self { uid, gids, complete: true, units, login: Login::Unknown, asked: Cell::new(0) }
    }
}

impl Subject for TestSubject {
    fn uid(&self) -> Uid {
        Uid::new(self.uid)
    }

    fn gids(&self) -> &[Gid] {
        &self.gids
    }

    fn gids_complete(&self) -> bool {
        self.complete
    }

    fn units(&self) -> Option<&Units> {
        self.asked.set(self.asked.get() + 1);
        self.units.as_ref()
    }

    fn login(&self) -> Login {
        self.login
    }
}

/// The name of the deciding rule, or `default`.
fn decide<T>(policy: &Policy<T>, subject: &TestSubject) -> String {
    policy.decide(subject).rule().map_or("default".to_owned(), |rule| rule.name().to_string())
}

/// The model: the sentences of the contract, one by one, rule by rule.
mod model {
    use super::*;

    #[derive(Clone, Debug)]
    pub struct Entry {
        pub kind: Kind,
        pub name: String,
        /// Inclusive ranges.
        pub users: Option<Vec<(u32, u32)>>,
        pub groups: Option<Vec<(u32, u32)>>,
        pub units: Option<Vec<String>>,
        /// Only beside `users`.
        pub user_units: Option<Vec<String>>,
        pub logins: Option<Vec<(u32, u32)>>,
    }

    /// What the system says of its users.
    #[derive(Clone, Debug, Default)]
    pub struct World {
        pub users: Vec<u32>,
        /// Owner, first and last, as listed.
        pub subordinate: Vec<(u32, u32, u32)>,
        /// Group and user.
        pub members: Vec<(u32, u32)>,
    }

    impl World {
        fn is_users_own(&self, uid: u32) -> bool {
            self.users.contains(&uid) || self.subordinate.iter().any(|(owner, ..)| *owner == uid)
        }

        /// The users to whom this uid is subordinate, as listed.
        fn owners(&self, uid: u32) -> Vec<u32> {
            let covers = |(_, low, high): &&(u32, u32, u32)| (*low..=*high).contains(&uid);
            let theirs = self.subordinate.iter().filter(covers).map(|(owner, ..)| *owner);
            if known(uid) && !self.is_users_own(uid) { theirs.collect() } else { Vec::new() }
        }

        pub fn owner_of(&self, uid: u32) -> u32 {
            self.owners(uid).first().copied().unwrap_or(uid)
        }
    }

    fn known(id: u32) -> bool {
        id != OVERFLOW_ID && id != u32::MAX
    }

    fn within(ranges: &[(u32, u32)], id: u32) -> bool {
        known(id) && ranges.iter().any(|(low, high)| (*low..=*high).contains(&id))
    }

    fn fits(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, _) => name.is_empty(),
            (Some((b'*', rest)), _) => (0..=name.len()).any(|taken| fits(rest, &name[taken..])),
            (Some((byte, rest)), Some((first, tail))) => (*byte == b'?' || byte == first) && fits(rest, tail),
            (Some(_), None) => false,
        }
    }

    /// Some(true): holds; Some(false): does not hold; None: unknown.
    fn user(entry: &Entry, world: &World, subject: &TestSubject) -> Option<bool> {
        let Some(users) = &entry.users else {
            // An unmapped user is admitted by no rule, whatever its keys.
            return if entry.kind == Kind::Allow && !known(subject.uid) { None } else { Some(true) };
        };
        let owns = || entry.kind == Kind::Deny && world.owners(subject.uid).iter().any(|owner| within(users, *owner));
        if known(subject.uid) { Some(within(users, subject.uid) || owns()) } else { None }
    }

    fn group(entry: &Entry, world: &World, subject: &TestSubject) -> Option<bool> {
        let Some(groups) = &entry.groups else { return Some(true) };
        let listed = world.members.iter().filter(|(gid, user)| within(groups, *gid) && known(*user));
        let members: Vec<u32> = listed.filter(|_| entry.kind == Kind::Deny).map(|(_, user)| *user).collect();
        let owns = || world.owners(subject.uid).iter().any(|owner| members.contains(owner));
        if subject.gids.iter().any(|gid| within(groups, gid.raw())) || members.contains(&subject.uid) || owns() {
            Some(true)
        } else if !members.is_empty() && !known(subject.uid)
            || !subject.complete
            || subject.gids.iter().any(|gid| !known(gid.raw()))
        {
            None
        } else {
            Some(false)
        }
    }

    fn any_fits(patterns: &[String], names: &[String]) -> bool {
        names.iter().any(|name| patterns.iter().any(|pattern| fits(pattern.as_bytes(), name.as_bytes())))
    }

    fn login(entry: &Entry, subject: &TestSubject) -> Option<bool> {
        let Some(logins) = &entry.logins else { return Some(true) };
        match subject.login {
            Login::Unknown => None,
            Login::None => Some(false),
            Login::User(uid) => Some(within(logins, uid.raw())),
        }
    }

    /// The system manager's units, whatever other keys there are.
    fn unit(entry: &Entry, subject: &TestSubject) -> Option<bool> {
        let Some(patterns) = &entry.units else { return Some(true) };
        subject.units.as_ref().map(|units| any_fits(patterns, units.system()))
    }

    /// The units of the user's own manager.
    fn user_unit(entry: &Entry, subject: &TestSubject) -> Option<bool> {
        let Some(patterns) = &entry.user_units else { return Some(true) };
        let Some((owner, names)) = subject.units.as_ref()?.user() else { return Some(false) };
        if !any_fits(patterns, names) {
            Some(false)
        } else if known(subject.uid) {
            Some(owner.raw() == subject.uid)
        } else {
            None
        }
    }

    /// Whether the rule decides, given the answers of its keys.
    fn decides(entry: &Entry, keys: &[Option<bool>]) -> bool {
        match entry.kind {
            Kind::Allow => keys.iter().all(|key| *key == Some(true)),
            Kind::Deny => !keys.contains(&Some(false)),
        }
    }

    /// The name of the deciding rule, and whether the units were needed.
    pub fn decide(entries: &[Entry], world: &World, subject: &TestSubject) -> (String, bool) {
        let mut asked = false;
        for kind in [Kind::Deny, Kind::Allow] {
            for entry in entries.iter().filter(|entry| entry.kind == kind) {
                let cheap = [user(entry, world, subject), group(entry, world, subject), login(entry, subject)];
                if !decides(entry, &cheap) {
                    continue;
                }
                asked |= entry.units.is_some() || entry.user_units.is_some();
                if decides(entry, &[unit(entry, subject), user_unit(entry, subject)]) {
                    return (format!("{}.{}", kind.as_str(), entry.name), asked);
                }
            }
        }
        ("default".to_owned(), asked)
    }
}

/// xorshift64*: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit
    }

    fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Few ids, so that rules and subjects meet; the ids at the edges are among them.
    fn id(&mut self) -> u32 {
        *self.pick(&[0, 1, 2, 3, 4, 5, 6, 1000, 65_533, 65_534, 65_535, u32::MAX - 2, u32::MAX - 1])
    }

    fn ranges(&mut self) -> Vec<(u32, u32)> {
        let count = 1 + self.below(3);
        let range = |random: &mut Self| {
            let (a, b) = (random.id(), random.id());
            match random.below(8) {
                0 => (0, u32::MAX - 1),
                1..=3 => (a.min(b), a.max(b)),
                _ => (a, a),
            }
        };
        (0..count).map(|_| range(self)).collect()
    }

    fn patterns(&mut self) -> Vec<String> {
        const PATTERNS: [&str; 8] =
            ["a.service", "b.service", "*.service", "?.slice", "user@*.service", "session-*.scope", "*", "mail*.s*"];
        (0..1 + self.below(2)).map(|_| (*self.pick(&PATTERNS)).to_owned()).collect()
    }

    fn entry(&mut self, number: usize) -> model::Entry {
        let kind = if self.one_in(3) { Kind::Deny } else { Kind::Allow };
        let name = format!("r{number}");
        let (users, groups, units, user_units, logins) = (None, None, None, None, None);
        let mut entry = model::Entry { kind, name, users, groups, units, user_units, logins };
        while [&entry.users, &entry.groups, &entry.logins].iter().all(|ids| ids.is_none()) && entry.units.is_none() {
            entry.users = self.one_in(2).then(|| self.ranges());
            entry.groups = self.one_in(3).then(|| self.ranges());
            entry.units = self.one_in(3).then(|| self.patterns());
            entry.logins = self.one_in(8).then(|| self.ranges());
            entry.user_units = (entry.users.is_some() && self.one_in(5)).then(|| self.patterns());
        }
        entry
    }

    fn subject(&mut self) -> TestSubject {
        const UNITS: [&str; 10] = [
            "a.service",
            "system.slice/a.service",
            "x.slice/b.service",
            "x.slice/system.slice/a.service",
            "user.slice/user-1.slice/session-3.scope",
            "user@1.service/app.slice/a.service",
            "user@1000.service/a.service",
            "user@2.service/mail.service",
            "user@65534.service/a.service",
            "init.scope",
        ];
        let uid = if self.one_in(12) { u32::MAX } else { self.id() };
        let gids: Vec<u32> = (0..1 + self.below(4)).map(|_| self.id()).collect();
        let unit = (!self.one_in(4)).then(|| *self.pick(&UNITS));
        let mut subject = TestSubject::new(uid, &gids, unit);
        subject.complete = !self.one_in(10);
        subject.login = match self.below(4) {
            0 => Login::Unknown,
            1 => Login::None,
            _ => Login::User(Uid::new(self.id())),
        };
        subject
    }

    fn world(&mut self) -> model::World {
        let users = (0..self.below(4)).map(|_| self.id()).collect();
        let subordinate = |random: &mut Self| {
            let (owner, a, b) = (random.id(), random.id(), random.id());
            (owner, a.min(b), a.max(b))
        };
        let subordinate = (0..self.below(4)).map(|_| subordinate(self)).collect();
        let members = (0..self.below(5)).map(|_| (self.id(), self.id())).collect();
        model::World { users, subordinate, members }
    }
}

fn rule(entry: &model::Entry) -> Rule<()> {
    let mut rule = match entry.kind {
        Kind::Allow => Rule::allow(&entry.name, ()),
        Kind::Deny => Rule::deny(&entry.name),
    };
    if let Some(users) = &entry.users {
        rule = rule.users(users.iter().map(|(low, high)| User::from(*low..=*high)));
    }
    if let Some(groups) = &entry.groups {
        rule = rule.groups(groups.iter().map(|(low, high)| Group::from(*low..=*high)));
    }
    if let Some(units) = &entry.units {
        rule = rule.units(units.clone());
    }
    if let Some(units) = &entry.user_units {
        rule = rule.user_units(units.clone());
    }
    if let Some(logins) = &entry.logins {
        rule = rule.logins(logins.iter().map(|(low, high)| User::from(*low..=*high)));
    }
    rule
}

fn toml(entries: &[model::Entry]) -> String {
    fn list<V>(key: &str, values: &Option<Vec<V>>, show: impl Fn(&V) -> String) -> String {
        let shown = values.as_ref().map(|values| values.iter().map(show).collect::<Vec<_>>().join(", "));
        shown.map_or(String::new(), |shown| format!("{key} = [{shown}]\n"))
    }
    let ids = |range: &(u32, u32)| match *range {
        (0, high) if high == u32::MAX - 1 => "\"any\"".to_owned(),
        (low, high) if low == high => low.to_string(),
        (low, high) => format!("\"{low}-{high}\""),
    };
    let rule = |entry: &model::Entry| {
        let head = format!("[{}.{}]\n", entry.kind.as_str(), entry.name);
        let units = |key, units| list(key, units, |unit| format!("'{unit}'"));
        let (units, user_units) = (units("units", &entry.units), units("user-units", &entry.user_units));
        let ids = |key, values| list(key, values, ids);
        head + &ids("users", &entry.users)
            + &ids("groups", &entry.groups)
            + &ids("logins", &entry.logins)
            + &units
            + &user_units
    };
    entries.iter().map(rule).collect()
}

/// The user database and /etc/subuid of a world. A user is called by their number.
struct Listed<'w>(&'w model::World);

impl Listed<'_> {
    fn accounts(&self) -> Accounts {
        let ids = |ids: &[u32]| ids.iter().copied().map(Uid::new).collect::<Vec<_>>();
        let range = |(owner, low, high): (u32, u32, u32)| SubordinateRange::new(Uid::new(owner), low, high);
        let gids: BTreeSet<u32> = self.0.members.iter().map(|(gid, _)| *gid).collect();
        let of = |gid: u32| -> Vec<Uid> {
            self.0.members.iter().filter(|(other, _)| *other == gid).map(|(_, uid)| Uid::new(*uid)).collect()
        };
        let members = gids.into_iter().map(|gid| (Gid::new(gid), of(gid)));
        Accounts::new(self.0.subordinate.iter().copied().map(range), ids(&self.0.users), members)
    }
}

impl Names for Listed<'_> {
    fn users(&self) -> io::Result<Vec<Account>> {
        let account = |uid: &u32| Account::new(format!("u{uid}"), Uid::new(*uid), Gid::new(u32::MAX));
        Ok(self.0.users.iter().map(account).collect())
    }

    fn groups(&self) -> io::Result<Vec<(Gid, Vec<String>)>> {
        // A group may be listed twice, as where one source adds to another.
        Ok(self.0.members.iter().map(|(gid, uid)| (Gid::new(*gid), vec![format!("u{uid}")])).collect())
    }

    fn lists_all(&self) -> bool {
        false
    }

    fn subordinate_ids(&self) -> io::Result<Source> {
        let line = |(owner, low, high): &(u32, u32, u32)| format!("u{owner}:{low}:{}\n", u64::from(high - low) + 1);
        Ok(Source::new("subuid", self.0.subordinate.iter().map(line).collect::<String>()))
    }

    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        Ok(name.strip_prefix('u').and_then(|uid| uid.parse().ok()).map(Uid::new))
    }

    fn gid(&self, _: &str) -> io::Result<Option<Gid>> {
        Ok(None)
    }
}

#[test]
fn decisions_and_explanations_agree_with_the_model() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let (mut by_default, mut admitted, mut unknown, mut left_out, mut by_accounts) = (0, 0, 0, 0, 0);
    let mut keys = BTreeSet::new();
    for round in 0..3000 {
        let most = if round % 50 == 0 { 80 } else { 8 };
        let entries: Vec<_> = (0..random.below(most)).map(|number| random.entry(number)).collect();
        let me = *random.pick(&[1, 1000, 65_534]);
        let mut world = if round % 3 == 0 { model::World::default() } else { random.world() };
        world.users.push(me);
        let policy = Policy::new(entries.iter().map(rule), Uid::new(me)).unwrap();
        let policy = policy.with_accounts(Listed(&world).accounts()).unwrap();
        keys.extend(policy.rules().flat_map(|rule| rule.keys(ME)).map(|(key, _)| key));
        let text = toml(&entries);
        let read =
            policy_file::parse::<(), ()>(&Source::new("policy", text.as_str()), Uid::new(me), &Listed(&world)).unwrap();
        let text = format!("{text}\n{world:?}");
        for _ in 0..20 {
            let subject = random.subject();
            let (expected, needs_units) = model::decide(&entries, &world, &subject);
            let alone = model::decide(&entries, &model::World::default(), &subject).0;
            assert_eq!(
                policy.owner_of(Uid::new(subject.uid)).raw(),
                world.owner_of(subject.uid),
                "{subject:?}\n{text}"
            );
            assert_eq!(decide(&policy, &subject), expected, "{subject:?}\n{text}");
            // Rules with a login and rules with units are not held apart: either makes the process worth asking.
            let asked = (subject.asked.get(), u32::from(needs_units));
            assert!(asked.0 == asked.1 || asked == (1, 0) && policy.has_key("logins"), "{subject:?}\n{text}");
            assert_eq!(decide(&read.policy, &subject), expected, "read from a file\n{text}");

            let explanation = policy.explain(&subject);
            assert_eq!(explanation.rule().map_or("default", |rule| rule.as_str()), expected);
            assert_eq!(explanation.is_admitted(), expected.starts_with("allow."));
            let matched = explanation.to_string().lines().filter(|line| line.ends_with(" matches:")).count();
            assert_eq!(matched, usize::from(expected != "default"), "only the deciding rule matches");
            // Where the user database has decided, the words say so.
            let words = explanation.to_string();
            let says_so = words.contains("is a subordinate id of uid") || words.contains("by the user database");
            let is_told = says_so || !Uid::new(subject.uid).is_known();
            assert!(alone == expected || is_told, "{words}{subject:?}\n{text}");

            // With only the facts that the decision depends on, the decision is the same.
            let needs = policy.needs_of(Uid::new(subject.uid));
            let mut asked_for_less = TestSubject::new(subject.uid, &[], None);
            if needs.groups {
                (asked_for_less.gids, asked_for_less.complete) = (subject.gids, subject.complete);
            } else {
                asked_for_less.complete = false;
            }
            if needs.process {
                (asked_for_less.units, asked_for_less.login) = (subject.units, subject.login);
            }
            assert_eq!(decide(&policy, &asked_for_less), expected, "with {needs:?} alone\n{text}");

            left_out +=
                u32::from(["logins", "units", "user-units"].iter().any(|key| policy.has_key(key)) && !needs.process);
            by_accounts += u32::from(alone != expected);
            by_default += u32::from(expected == "default");
            admitted += u32::from(explanation.is_admitted());
            unknown += u32::from(!subject.complete || !Uid::new(subject.uid).is_known());
        }
    }
    assert_eq!(keys, policy::keys().collect(), "the keys that the model knows");
    // All kinds of cases occurred; otherwise the agreement would mean little.
    for (count, what, least) in [
        (by_default, "by default", 5000),
        (admitted, "admitted", 5000),
        (unknown, "with something unknown", 5000),
        (left_out, "not asked for all", 4000),
        (by_accounts, "decided by what the user database says", 500),
    ] {
        assert!(count > least, "{count} {what}");
    }
}

#[test]
fn ten_thousand_rules_decide_as_the_model_does() {
    let mut random = Random(7);
    let entry = |number: u32| model::Entry {
        kind: if number % 3 == 0 { Kind::Deny } else { Kind::Allow },
        name: format!("r{number}"),
        users: (number % 2 == 0).then(|| vec![(number, number + number % 7)]),
        groups: (number % 2 == 1).then(|| vec![(number, number)]),
        units: None,
        user_units: None,
        logins: None,
    };
    let entries: Vec<_> = (0..10_000).map(entry).collect();
    let policy = Policy::new(entries.iter().map(rule), Uid::new(1)).unwrap();
    for _ in 0..500 {
        let ids = [random.below(12_000) as u32, random.below(12_000) as u32, random.below(12_000) as u32];
        let subject = TestSubject::new(ids[0], &ids[1..], None);
        assert_eq!(decide(&policy, &subject), model::decide(&entries, &model::World::default(), &subject).0, "{ids:?}");
    }
}

/// A user database with alice, nobody and the group adm. Looking up one name fails.
struct Database;

impl Names for Database {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        match name {
            "alice" => Ok(Some(Uid::new(1001))),
            "nobody" => Ok(Some(Uid::new(OVERFLOW_ID))),
            "ldap" => Err(io::Error::from(io::ErrorKind::TimedOut)),
            "broken" => Ok(Some(Uid::new(u32::MAX))),
            _ => Ok(None),
        }
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        Ok((name == "adm").then_some(Gid::new(4)))
    }
}

const ME: Uid = Uid::new(1000);
const OWNER: &str = "[allow.owner]\nusers = ['self']\n";

fn load(text: &str) -> Result<Loaded<(), ()>, String> {
    policy_file::parse(&Source::new("f", text), ME, &Database).map_err(|faults| faults.to_string())
}

/// The faults of a file, or its warnings.
fn messages_of(text: &str) -> Vec<String> {
    match load(text) {
        Ok(loaded) => loaded.warnings.iter().map(Fault::to_string).collect(),
        Err(faults) => faults.lines().map(str::to_owned).collect(),
    }
}

#[test]
fn a_policy_without_rules_admits_the_owner_and_not_root() {
    let policy: Policy<()> = Policy::owner_only(ME);
    assert_eq!(decide(&policy, &TestSubject::new(1000, &[1000], None)), "allow.owner");
    assert_eq!(decide(&policy, &TestSubject::new(0, &[0], None)), "default");
}

#[test]
fn a_deny_rule_precedes_every_allow_rule() {
    let loaded = load("[allow.all]\nusers = ['any']\n[deny.alice]\nusers = ['alice']\n").unwrap();
    assert_eq!(decide(&loaded.policy, &TestSubject::new(1001, &[1001], None)), "deny.alice");
    assert_eq!(decide(&loaded.policy, &TestSubject::new(1002, &[1001], None)), "allow.all");
}

#[test]
fn allow_rules_apply_in_the_order_of_the_file() {
    let loaded = load("[allow.z]\nusers = ['1-9']\n[allow.a]\nusers = ['1-99']\n").unwrap();
    assert_eq!(decide(&loaded.policy, &TestSubject::new(5, &[5], None)), "allow.z");
    assert_eq!(decide(&loaded.policy, &TestSubject::new(50, &[5], None)), "allow.a");
    let places: Vec<_> = loaded.policy.rules().map(|rule| rule.place().unwrap().to_string()).collect();
    assert_eq!(places, ["f:1", "f:3"]);
}

#[test]
fn the_overflow_uid_matches_no_allow_rule_and_each_deny_rule() {
    let unmapped = TestSubject::new(OVERFLOW_ID, &[OVERFLOW_ID], None);
    let any = load("[allow.any]\nusers = ['any', '0-4294967294', 65534]\n").unwrap();
    assert_eq!(decide(&any.policy, &unmapped), "default");
    let denied = load("[deny.alice]\nusers = ['alice']\n[allow.any]\nusers = ['any']\n").unwrap();
    assert_eq!(decide(&denied.policy, &unmapped), "deny.alice");
    let groups = load("[deny.adm]\ngroups = ['adm']\n[allow.any]\nusers = ['any']\n").unwrap();
    assert_eq!(decide(&groups.policy, &TestSubject::new(5, &[5, OVERFLOW_ID], None)), "deny.adm");
    assert_eq!(decide(&groups.policy, &TestSubject::new(5, &[5], None)), "allow.any");
}

#[test]
fn an_unknown_unit_matches_no_allow_rule_and_each_deny_rule() {
    let loaded = load(concat!(
        "[deny.scopes]\nusers = [5]\nunits = ['session-*.scope']\n",
        "[allow.backup]\nusers = [6]\nunits = ['backup.service']\n",
        "[allow.rest]\nusers = [5]\n",
    ))
    .unwrap();
    let verdict = |uid, unit| decide(&loaded.policy, &TestSubject::new(uid, &[uid], unit));
    assert_eq!(verdict(5, None), "deny.scopes");
    assert_eq!(verdict(5, Some("session-1.scope")), "deny.scopes");
    assert_eq!(verdict(5, Some("system.slice/a.service")), "allow.rest");
    assert_eq!(verdict(6, None), "default");
    assert_eq!(verdict(6, Some("system.slice/backup.service")), "allow.backup");
}

const OWN: &str = "user@1001.service/app.slice/backup.service";

#[test]
fn units_means_system_units_whatever_other_keys_a_rule_has() {
    const SYSTEMS: &str = "system.slice/backup.service";
    for users in ["", "users = ['any']\n", "users = ['alice', 1000, 0]\n", "users = ['self', 'alice']\n"] {
        let allow = load(&format!("[allow.backup]\n{users}units = ['backup.service']\n")).unwrap().policy;
        let deny = load(&format!("[deny.backup]\n{users}units = ['backup.service']\n[allow.any]\nusers=['any']\n"));
        let deny = deny.unwrap().policy;
        for (uid, unit, is_meant) in [
            (1001, SYSTEMS, true),
            (1001, OWN, false),
            (0, OWN, false),
            // The owner of the service is no exception.
            (1000, SYSTEMS, true),
            (1000, "user@1000.service/app.slice/backup.service", false),
        ] {
            let subject = TestSubject::new(uid, &[uid], Some(unit));
            assert_eq!(decide(&allow, &subject) == "allow.backup", is_meant, "{users} {uid} {unit}");
            assert_eq!(decide(&deny, &subject) == "deny.backup", is_meant, "{users} {uid} {unit}");
        }
    }
}

#[test]
fn user_units_means_units_of_the_peers_own_user_manager() {
    let verdict = |text: &str, uid, unit| decide(&load(text).unwrap().policy, &TestSubject::new(uid, &[uid], unit));
    let rule = "[allow.x]\nusers = [0, 1001, 1002]\nuser-units = ['backup.*']\n";
    assert_eq!(verdict(rule, 1001, Some(OWN)), "allow.x");
    assert_eq!(verdict(rule, 1002, Some(OWN)), "default", "another user's process in alice's unit");
    assert_eq!(verdict(rule, 0, Some(OWN)), "default", "a set-uid program that alice starts");
    assert_eq!(verdict(rule, 1001, Some("system.slice/backup.service")), "default");
    assert_eq!(verdict(rule, 1001, Some("user@1001.service/init.scope")), "default");
    assert_eq!(verdict(rule, 1001, None), "default");

    // In a service of the user's own, user-units is a key of its own too.
    let mine = "[allow.x]\nusers = ['self']\nuser-units = ['mail.service']\n";
    assert_eq!(verdict(mine, 1000, Some("user@1000.service/app.slice/mail.service")), "allow.x");
    assert_eq!(verdict(mine, 1001, Some("user@1001.service/app.slice/mail.service")), "default");

    // An unknown unit counts as matched by a deny rule; a known other unit does not.
    let deny = "[deny.x]\nusers = [1001]\nuser-units = ['backup.service']\n[allow.any]\nusers = ['any']\n";
    assert_eq!(verdict(deny, 1001, Some(OWN)), "deny.x");
    assert_eq!(verdict(deny, 1001, None), "deny.x");
    assert_eq!(verdict(deny, 1002, None), "allow.any");
    assert_eq!(verdict(deny, 1001, Some("system.slice/backup.service")), "allow.any");
    assert_eq!(verdict(deny, OVERFLOW_ID, Some(OWN)), "deny.x");

    // Beside `units` both keys must match.
    let both = "[allow.x]\nusers = ['any']\nunits = ['user.slice']\nuser-units = ['backup.service']\n";
    assert_eq!(verdict(both, 1001, Some(OWN)), "allow.x");
    let both = both.replace("user.slice", "a.slice");
    assert_eq!(verdict(&both, 1001, Some(OWN)), "default");
}

#[test]
fn user_units_without_users_is_a_fault() {
    const WHY: &str = "`user-units` without `users`, where any user can call a unit of their own by that name; \
                       expected `users` beside it, to say whose units are meant";
    for (others, line) in [("", 2), ("groups = ['adm']\n", 3), ("units = ['a.service']\n", 3)] {
        for kind in ["allow", "deny"] {
            let text = format!("[{kind}.x]\n{others}user-units = ['mail.service']\n");
            assert_eq!(messages_of(&text), [format!("f:{line}:1: {WHY}")]);
        }
    }
    let rule = Rule::allow("x", ()).groups([Gid::new(4)]).user_units(["mail.service"]);
    assert_eq!(Policy::new([rule], ME).unwrap_err().to_string(), format!("allow.x: {WHY}"));
    let empty = Rule::allow("x", ()).users([User::Me]).user_units(Vec::<String>::new());
    assert!(Policy::new([empty], ME).unwrap_err().to_string().contains("`user-units` is empty"));
    let wrong = messages_of(
        "[allow.x]\nusers = ['self']\nuser-units = ['', 5]\n[allow.y]\nusers = ['self']\nuser-units = 'a'\n",
    );
    assert!(wrong[0].starts_with("f:3:15: an empty unit name; expected"), "{wrong:#?}");
    assert_eq!(wrong[1], "f:3:19: an integer in `user-units`; expected a unit's name such as \"backup.service\"");
    assert!(wrong[2].starts_with("f:6:14: `user-units` is a string; expected an array"), "{wrong:#?}");
}

#[test]
fn a_further_key_never_widens_an_allow_rule() {
    let mut random = Random(11);
    let mut narrowed = 0;
    for _ in 0..3000 {
        let whole = model::Entry { kind: Kind::Allow, ..random.entry(0) };
        let policy = |entry: &model::Entry| Policy::new([rule(entry)], ME).ok();
        let Some(narrow) = policy(&whole) else { continue };
        let without = [
            model::Entry { user_units: None, ..whole.clone() },
            model::Entry { units: None, ..whole.clone() },
            model::Entry { groups: None, ..whole.clone() },
            model::Entry { logins: None, ..whole.clone() },
            model::Entry { users: None, ..whole.clone() },
        ];
        for wide in without.iter().filter_map(policy) {
            for _ in 0..10 {
                let subject = random.subject();
                let (narrow, wide) = (narrow.decide(&subject), wide.decide(&subject));
                assert!(
                    wide.is_admitted() || !narrow.is_admitted(),
                    "{subject:?}\n{}",
                    toml(std::slice::from_ref(&whole))
                );
                narrowed += u32::from(wide.is_admitted() && !narrow.is_admitted());
            }
        }
    }
    assert!(narrowed > 1000, "{narrowed}");
}

#[test]
fn units_are_read_only_where_a_rule_depends_on_them() {
    let loaded = load(concat!(
        "[deny.first]\nusers = [7]\n",
        "[allow.alice]\nusers = ['alice']\nunits = ['a.service']\n",
        "[allow.six]\nusers = [6]\n",
        "[allow.late]\nusers = [6]\nunits = ['a.service']\n",
    ))
    .unwrap();
    for (uid, times) in [(7, 0), (6, 0), (8, 0), (1001, 1), (OVERFLOW_ID, 0)] {
        let subject = TestSubject::new(uid, &[uid], Some("b.service"));
        let _ = loaded.policy.decide(&subject);
        assert_eq!(subject.asked.get(), times, "uid {uid}");
    }
    assert!(loaded.policy.has_key("units") && !loaded.policy.has_key("user-units"));
}

#[test]
fn an_explanation_gives_the_verdict_and_then_each_key() {
    let loaded = load(concat!(
        "[deny.contractors]\nusers = ['2000-2999']\n",
        "[allow.owner]\nusers = ['self']\n",
        "[allow.backup]\nusers = ['alice']\ngroups = ['adm', 'any']\nunits = ['backup.service']\n",
        "[allow.mail]\nusers = ['alice', 5]\nuser-units = ['backup.service']\n",
    ))
    .unwrap();
    let explain = |uid, gids: &[u32], unit| loaded.policy.explain(&TestSubject::new(uid, gids, unit)).to_string();
    assert_eq!(
        explain(1001, &[1001, 4], Some("system.slice/backup.service")),
        "admitted by allow.backup\n\
         \x20 deny.contractors (f:1) does not match:\n\
         \x20   users: no, uid 1001 is not among 2000-2999\n\
         \x20 allow.owner (f:3) does not match:\n\
         \x20   users: no, uid 1001 is not among self (1000)\n\
         \x20 allow.backup (f:5) matches:\n\
         \x20   users: yes, uid 1001 is among alice (1001)\n\
         \x20   groups: yes, gid 1001 is among adm (4), any\n\
         \x20   units: yes, /system.slice/backup.service is in backup.service\n"
    );
    let text = explain(2001, &[2001], None);
    assert!(text.starts_with("denied by deny.contractors\n") && !text.contains("allow."), "{text}");
    let text = explain(1001, &[1001], None);
    assert!(text.starts_with("denied by default\n"), "{text}");
    assert!(text.contains("units: not known, the unit cannot be told"), "{text}");
    let text = explain(1001, &[1001], Some("user@1001.service/backup.service"));
    assert!(text.starts_with("admitted by allow.mail\n"), "{text}");
    assert!(
        text.contains("is not in backup.service of the system's manager (a name that a user chose counts"),
        "{text}"
    );
    assert!(
        text.contains("user-units: yes, /user.slice/user-1001.slice/user@1001.service/backup.service is in"),
        "{text}"
    );
    let text = explain(5, &[5], Some("user@1001.service/backup.service"));
    assert!(text.contains("user-units: no, ") && text.contains(" of the process's own user"), "{text}");
    let text = explain(5, &[OVERFLOW_ID], None);
    assert!(text.contains("groups: not known, one of the gids names no group here"), "{text}");
    assert!(text.contains("units: not asked, the other keys settle it"), "{text}");
}

#[test]
fn a_unit_name_that_could_forge_an_explanation_is_ignored() {
    for name in ["x\nadmitted by allow.a\u{1b}[2J.service", "a b.service", "a;b.service", "\u{202e}a.service"] {
        assert!(Units::from_path(name).is_none(), "{name:?}");
        assert!(Units::from_path(&format!("user@1.service/{name}")).unwrap().user().is_none(), "{name:?}");
    }
}

#[test]
fn a_rule_built_in_code_is_checked_like_one_from_a_file() {
    let error = |rule: Rule<()>| Policy::new([rule], ME).unwrap_err().to_string();
    let owner = || Rule::allow("owner", ());
    assert!(error(owner()).starts_with("allow.owner: the rule does not say which peers it is for; expected"));
    assert!(error(owner().users(Vec::<User>::new())).contains("`users` is empty"));
    assert!(error(owner().groups(Vec::<Group>::new())).contains("`groups` is empty"));
    assert!(error(owner().units(Vec::<String>::new())).contains("`units` is empty"));
    assert!(error(owner().users([User::Range(Uid::new(9), Uid::new(8))])).contains("the range 9-8"));
    assert!(error(owner().users([Uid::new(u32::MAX)])).contains("the id 4294967295"));
    assert!(error(owner().units(["a/b.service"])).contains("expected a unit's name"));
    for name in ["", ".a", "-a", "a b", "ö", "a\n", &"a".repeat(65)] {
        assert!(error(Rule::allow(name, ()).users([User::Any])).contains("the rule's name"), "{name:?}");
    }
    let twice = [owner().users([User::Me]), owner().users([User::Any])];
    assert!(Policy::new(twice, ME).unwrap_err().to_string().contains("a second rule of this name"));
    // A deny rule and an allow rule may have the same name: their full names differ.
    assert!(Policy::new([owner().users([User::Me]), Rule::deny("owner").users([User::Any])], ME).is_ok());
}

#[test]
fn all_faults_of_a_file_are_reported_with_place_and_expectation() {
    const USERS: &str = "expected a user's name, an id, a range such as \"2000-2999\", \"self\" or \"any\"";
    const GROUPS: &str = "expected a group's name, an id, a range such as \"2000-2999\", or \"any\"";
    const UNIT: &str = "expected a unit's name such as \"backup.service\", or a pattern such as \"backup@*.service\"";
    const IN_NAMES: &str = "where a unit's name has letters, digits, and any of : - _ . \\ @";
    const ID: &str = "expected a whole number from 0 to 4294967294, without leading zeros";
    let text = concat!(
        "[deny.gone]\nusers = ['mallory', 'ldap']\nline-length = 5\n",
        "[deny.empty]\n",
        "[allow.ranges]\nusers = ['2999-2000', 4294967295, '1-4294967295', '', '1,2', '007', -3, true, 'a:b']\n",
        "[allow.groups]\ngroups = ['self', ' adm', '5-']\nusers = []\nunits = 'a.service'\n",
        "[allow.units]\nunits = ['', 'a/b.service', \"a\\n.service\", 'backup', 5]\n",
        "[allow.'a b']\nusers = ['self']\n",
        "[allow]\nwrong = 5\n",
        "[limits]\n",
    );
    let expected = [
        "f:2:10: the user \"mallory\" does not exist, and a denial must not be lost; expected a user the system knows",
        "f:2:21: the user \"ldap\" could not be looked up (timed out), and a denial must not be lost; expected the user \
         database to answer",
        "f:3:1: unknown key `line-length`; expected one of `users`, `groups`, `logins`, `units`, `user-units` \
         (a deny rule has no terms)",
        "f:4:7: `deny.empty` does not say which peers it is for; expected `users`, `groups`, `logins` or `units` in it",
        &format!("f:6:10: the range \"2999-2000\", which runs backwards; {USERS}"),
        &format!("f:6:23: `4294967295` is no id; {ID}"),
        &format!("f:6:35: \"4294967295\" in \"1-4294967295\", which is no id from 0 to 4294967294; {USERS}"),
        &format!("f:6:51: \"\", which is no user's name; {USERS}"),
        &format!("f:6:55: \"1,2\" in \"1,2\", which is no id from 0 to 4294967294; {USERS}"),
        &format!("f:6:62: \"007\" in \"007\", which has leading zeros; {USERS}"),
        &format!("f:6:69: `-3` is no id; {ID}"),
        &format!("f:6:73: a boolean in `users`; {USERS}"),
        &format!("f:6:79: \"a:b\", which is no user's name; {USERS}"),
        &format!("f:8:11: \"self\" in `groups`, where it means nothing; {GROUPS}"),
        &format!("f:8:19: \" adm\", which is no group's name; {GROUPS}"),
        &format!("f:8:27: \"\" in \"5-\", which is no id from 0 to 4294967294; {GROUPS}"),
        "f:9:9: `users` is empty; expected an array such as [\"self\", \"alice\", 1001, \"2000-2999\"]",
        "f:10:9: `units` is a string; expected an array such as [\"backup.service\", \"session-*.scope\"]",
        &format!("f:12:10: an empty unit name; {UNIT}"),
        &format!("f:12:14: '/' in \"a/b.service\", {IN_NAMES}; {UNIT}"),
        &format!("f:12:29: '\\n' in \"a\\n.service\", {IN_NAMES}; {UNIT}"),
        &format!("f:12:44: \"backup\" is not the name of a unit that can hold processes; {UNIT}"),
        "f:12:54: an integer in `units`; expected a unit's name such as \"backup.service\"",
        "f:13:8: the rule's name \"a b\"; expected at most 64 letters, digits, `_`, `.` or `-`, of which the first is \
         a letter or a digit",
        "f:16:1: `allow.wrong` is not a table; expected a rule under a header such as [allow.NAME]",
        "f:17:2: unknown key `limits`; expected one of `deny`, `allow`",
    ];
    assert_eq!(messages_of(text), expected);
}

#[test]
fn rules_that_are_no_tables_are_faults() {
    let fault = |text| messages_of(text).join("\n");
    let expected = "f:1:9: `allow` is not a table; expected rules, each under a header such as [allow.NAME]";
    assert_eq!(fault("allow = 5\n"), expected);
    assert!(fault("[[deny]]\nusers = ['self']\n").contains("`deny` is not a table; expected rules"));
}

#[test]
fn a_toml_error_has_its_place_and_hides_no_other_fault() {
    let told = messages_of(concat!(
        "[allow.owner\nusers = ['self']\n",
        "[deny.x]\nusers = [alice]\n",
        "[deny.y]\nuser = ['alice']\na = 1\na = 2\n",
    ));
    assert!(told[0].starts_with("f:1:13: ") && told[0].contains("; expected"), "{told:#?}");
    assert!(told.iter().any(|line| line.starts_with("f:4:10: ")), "{told:#?}");
    assert!(told.iter().any(|line| line.starts_with("f:6:1: unknown key `user`")), "{told:#?}");
    assert!(told.iter().any(|line| line == "f:8:1: duplicate key `a`; expected each key once"), "{told:#?}");
    assert!(!told.iter().any(|line| line.starts_with("f:2:")), "what follows a broken header is not judged: {told:#?}");
}

#[test]
fn an_allow_rule_for_a_missing_account_is_a_warning() {
    let text = "[allow.staff]\nusers = ['mallory', 'alice']\ngroups = ['gone', 'adm']\n";
    assert_eq!(
        messages_of(text),
        [
            "f:2:10: the user \"mallory\" does not exist, so this value matches no peer until it is found; expected a user the system knows",
            "f:3:11: the group \"gone\" does not exist, so this value matches no peer until it is found; expected a group the system knows",
        ]
    );
    assert_eq!(decide(&load(text).unwrap().policy, &TestSubject::new(1001, &[4], None)), "allow.staff");
    assert_eq!(
        messages_of("[allow.old]\nusers = ['mallory']\n")[0],
        "f:1:8: allow.old can match no peer as it stands; expected a user or group that exists here"
    );
}

#[test]
fn a_failed_lookup_is_a_warning_in_allow_and_a_fault_in_deny() {
    let allow = "[allow.staff]\nusers = ['ldap', 'alice']\n";
    assert_eq!(
        messages_of(allow),
        [
            "f:2:10: the user \"ldap\" could not be looked up (timed out), so this value matches no peer until it is found; \
          expected the user database to answer"
        ]
    );
    let loaded = load(allow).unwrap();
    assert_eq!(decide(&loaded.policy, &TestSubject::new(1001, &[1001], None)), "allow.staff");
    assert_eq!(loaded.unknown, [Name::User("ldap".into())]);
    assert_eq!(loaded.unanswered, [Name::User("ldap".into())]);
    let deny = messages_of(&format!("{OWNER}[deny.x]\nusers = ['ldap']\n"));
    assert!(deny[0].contains("could not be looked up (timed out), and a denial must not be lost"), "{deny:?}");
}

#[test]
fn a_name_with_the_overflow_id_stays_unknown() {
    let loaded = load("[allow.staff]\nusers = ['broken', 'alice']\n").unwrap();
    assert_eq!(loaded.unknown, [Name::User("broken".into())]);
    assert_eq!(decide(&loaded.policy, &TestSubject::new(1001, &[1001], None)), "allow.staff");
    assert_eq!(policy_file::look_up(&loaded.unknown, &Database), []);
}

/// What [`Database`] answers later.
struct Later;

impl Names for Later {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        Ok((name == "mallory" || name == "alice").then_some(Uid::new(7)))
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        if name == "late" { Ok(Some(Gid::new(70))) } else { Err(io::Error::from(io::ErrorKind::TimedOut)) }
    }
}

#[test]
fn names_found_later_take_effect_and_nothing_else_changes() {
    let text = concat!(
        "[allow.a]\nusers = ['mallory', 'alice', 'gone']\n",
        "[allow.b]\ngroups = ['late', 'later']\nunits = ['a.service']\n",
        "[allow.c]\nusers = ['mallory']\ngroups = ['adm']\n",
    );
    let Loaded { policy, unknown, unanswered, .. } = load(text).unwrap();
    let names = [
        Name::User("mallory".into()),
        Name::User("gone".into()),
        Name::Group("late".into()),
        Name::Group("later".into()),
    ];
    assert_eq!((&unknown[..], unanswered), (&names[..], Vec::new()));
    assert_eq!(decide(&policy, &TestSubject::new(7, &[7], None)), "default");

    let found = policy_file::look_up(&unknown, &Later);
    assert_eq!(found, [(names[0].clone(), 7), (names[2].clone(), 70)]);
    let later = policy.with_ids(&found).unwrap();
    assert_eq!(later.unknown_names(), [names[1].clone(), names[3].clone()]);
    assert_eq!(later.known_names().get(&names[0]), Some(&7));
    assert_eq!(decide(&later, &TestSubject::new(7, &[7], None)), "allow.a");
    assert_eq!(decide(&later, &TestSubject::new(8, &[70], Some("a.service"))), "allow.b");
    assert_eq!(decide(&later, &TestSubject::new(8, &[70], None)), "default");
    // A known id stays, and the rules keep their names, places and order.
    assert_eq!(later.known_names().get(&Name::User("alice".into())), Some(&1001));
    let rules = |policy: &Policy<()>| -> Vec<_> {
        policy.rules().map(|rule| (rule.name().clone(), rule.place().cloned())).collect()
    };
    assert_eq!(rules(&later), rules(&policy));
    // The policy from which the new one was made is unchanged.
    assert_eq!(decide(&policy, &TestSubject::new(7, &[7], None)), "default");
}

#[test]
fn naming_the_overflow_id_is_a_warning() {
    for value in ["65534", "'65534'", "'nobody'"] {
        let told = messages_of(&format!("{OWNER}[allow.x]\nusers = [{value}]\n"));
        assert!(told[1].starts_with("f:4:10: the id 65534 stands for every user"), "{value}: {told:#?}");
    }
}

#[test]
fn a_file_that_admits_no_peer_is_a_warning() {
    for text in ["", "# nothing\n", "[deny.x]\nusers = ['alice']\n"] {
        assert_eq!(
            messages_of(text),
            ["f:1:1: no allow rule, so every peer is denied; expected one such as [allow.owner]"]
        );
    }
}

#[test]
fn a_rule_that_an_earlier_one_hides_is_a_warning() {
    let hidden = |text: &str| -> Vec<String> {
        let found = |warning: &String| warning.split(';').next().unwrap().to_owned();
        messages_of(text).iter().filter(|warning| warning.contains("never decides")).map(found).collect()
    };
    assert_eq!(
        hidden("[allow.range]\nusers = ['2100-2199']\n[deny.contractors]\nusers = ['2000-2999']\n"),
        ["f:1:8: allow.range never decides: deny.contractors (line 3) comes first for every peer it is for"]
    );
    assert_eq!(
        hidden("[allow.any]\nusers = ['any']\n[allow.adm]\ngroups = ['adm']\n"),
        ["f:3:8: allow.adm never decides: allow.any (line 1) comes first for every peer it is for"]
    );
    // Two rules together may hide a third. A rule with another condition hides none.
    assert_eq!(hidden("[allow.a]\nusers = ['1-5']\n[allow.b]\nusers = ['6-9']\n[allow.c]\nusers = ['4-8']\n").len(), 1);
    assert_eq!(hidden("[allow.a]\nusers = ['any']\nunits = ['a.service']\n[allow.b]\nusers = ['4-8']\n").len(), 0);
    assert_eq!(hidden("[allow.a]\ngroups = [1, 2]\n[allow.b]\ngroups = [2]\nusers = [5]\n").len(), 1);
    assert_eq!(hidden("[allow.a]\nusers = ['1-5']\n[allow.b]\nusers = ['5-6']\n").len(), 0);
}

#[test]
fn a_rule_reported_as_hidden_never_decides() {
    let mut random = Random(42);
    let mut hidden = 0;
    for _ in 0..2000 {
        let entries: Vec<_> = (0..random.below(10)).map(|number| random.entry(number)).collect();
        let loaded =
            policy_file::parse::<(), ()>(&Source::new("f", toml(&entries)), ME, &Listed(&model::World::default()))
                .unwrap();
        let told = loaded.warnings.iter().filter(|warning| warning.message().contains("never decides"));
        let names: Vec<_> = told.map(|warning| warning.message().split(' ').next().unwrap()).collect();
        hidden += names.len();
        for _ in 0..50 {
            let mut subject = random.subject();
            subject.complete = true;
            if Uid::new(subject.uid).is_known() && subject.gids.iter().all(|gid| gid.is_known()) {
                let decided = decide(&loaded.policy, &subject);
                assert!(!names.contains(&decided.as_str()), "{decided}\n{}", toml(&entries));
            }
        }
    }
    assert!(hidden > 500, "{hidden}");
}

/// Parses any text, and checks that the result is sound.
fn check_any(text: &str) {
    match policy_file::parse::<(), ()>(&Source::new("f", text), ME, &Database) {
        Ok(loaded) => {
            // Whatever the rules on users say, they do not admit an unmapped user.
            let by_users = loaded.policy.rules().all(|rule| rule.keys(ME).any(|(key, _)| key == "users"));
            let unmapped = TestSubject::new(OVERFLOW_ID, &[OVERFLOW_ID], None);
            assert!(!by_users || matches!(loaded.policy.decide(&unmapped), Verdict::Denied(_)), "{text:?}");
        }
        Err(faults) => {
            assert!(!faults.0.is_empty(), "{text:?}");
            let lines: Vec<&str> = text.split('\n').collect();
            for fault in &faults.0 {
                let (line, column) = fault.place().unwrap();
                assert!(line <= lines.len() && column <= lines[line - 1].chars().count() + 1, "{fault}\n{text:?}");
                assert!(!fault.to_string().chars().any(char::is_control), "{fault:?}");
            }
        }
    }
}

#[test]
fn no_text_makes_the_reader_panic() {
    const WHOLE: &str = concat!(
        "[deny.x]\nusers = ['2000-2999', 0x1F, \"a\\u00e9\"]\n[allow.'b.c']\ngroups = [\"adm\", 4]\nusers=['self']\n",
        "units = ['a@*.service']\n[[t]]\na.b = { c = [1, 2.5, 1979-05-27T07:32:00Z] } # é\n\"\"\"x\ny\"\"\" = '''z'''\n",
    );
    const ODD: [char; 18] =
        ['[', ']', '"', '\'', '\n', '\r', '=', '.', '{', '}', ',', '#', 'é', '\0', '-', '0', '\u{1b}', '\u{10ffff}'];
    let mut random = Random(3);
    for _ in 0..5_000 {
        let mut text: Vec<char> = WHOLE.chars().collect();
        for _ in 0..1 + random.below(6) {
            let at = random.below(text.len());
            match random.below(4) {
                0 => drop(text.drain(at..(at + 1 + random.below(20)).min(text.len()))),
                1 => text.insert(at, *random.pick(&ODD)),
                2 => text[at] = *random.pick(&ODD),
                _ => text.truncate(at.max(1)),
            }
            if text.is_empty() {
                text.push('[');
            }
        }
        check_any(&text.into_iter().collect::<String>());
    }
}

#[test]
fn deep_nesting_is_not_followed_down_the_stack() {
    for open in ["[", "{a=", "a."] {
        check_any(&format!("x = {}", open.repeat(50_000)));
    }
    check_any(&("a.".repeat(50_000) + "b = 1"));
    check_any(&format!("[{}b]\n", "a.".repeat(50_000)));
    check_any(&format!("[allow.{}b]\n", "a.".repeat(50_000)));
}
