//! The policy: named rules, and the decision about one subject.
//!
//! Pure: no sockets, no clock, no log, no files, no user database. It imports only [`ids`](crate::ids),
//! [`unit`](crate::unit) and [`Subject`]. [`policy_file`](crate::policy_file) reads a policy from a file.
//!
//! Deny rules are consulted first, then allow rules, each in the order given; the first that matches decides.
//! A subject that no rule matches is denied. Inside a rule every key must hold; inside a key any value may.
//!
//! ```
//! use peergate::ids::{Gid, Uid};
//! use peergate::Subject;
//! use peergate::policy::{Policy, Rule, User, Verdict};
//! use peergate::unit::Units;
//!
//! struct Process(Uid, Vec<Gid>);
//!
//! impl Subject for Process {
//!     fn uid(&self) -> Uid {
//!         self.0
//!     }
//!     fn gids(&self) -> &[Gid] {
//!         &self.1
//!     }
//!     fn gids_complete(&self) -> bool {
//!         true
//!     }
//!     fn units(&self) -> Option<&Units> {
//!         None
//!     }
//! }
//!
//! /// What a rule lets its peers do: the application's own type.
//! #[derive(Default, Debug, PartialEq)]
//! enum Access {
//!     #[default]
//!     View,
//!     Update,
//! }
//!
//! let me = Uid::new(1000);
//! let policy = Policy::new(
//!     [
//!         Rule::deny("contractors").users([2000..=2999]),
//!         Rule::allow("owner", Access::Update).users([User::Me]),
//!         Rule::allow("staff", Access::View).groups([Gid::new(50)]),
//!     ],
//!     me,
//! )?;
//!
//! let owner = Process(me, vec![Gid::new(1000)]);
//! assert!(matches!(policy.decide(&owner), Verdict::Admitted(rule) if *rule.terms() == Access::Update));
//!
//! let staff = Process(Uid::new(1001), vec![Gid::new(1001), Gid::new(50)]);
//! assert!(matches!(policy.decide(&staff), Verdict::Admitted(rule) if rule.name().as_str() == "allow.staff"));
//!
//! let contractor = Process(Uid::new(2001), vec![Gid::new(50)]);
//! let Verdict::Denied(Some(rule)) = policy.decide(&contractor) else { panic!() };
//! assert_eq!(rule.name().as_str(), "deny.contractors");
//!
//! let root = Process(Uid::new(0), vec![Gid::new(0)]);
//! assert!(matches!(policy.decide(&root), Verdict::Denied(None)));
//! # Ok::<(), peergate::policy::PolicyError>(())
//! ```
//!
//! # What is not known
//!
//! The policy decides on what the kernel vouches for and on nothing else. Each key of a rule holds, does not hold, or
//! cannot be told:
//!
//! - `users`, where the uid is unmapped ([`Uid::is_known`]). That includes "any".
//! - `groups`, where no known group matches, and one of the groups is unmapped or the list is incomplete.
//! - `logins`, `units` and `user-units`, where they cannot be tied to the very process that connected.
//!
//! An allow rule matches only if all of its keys hold, and never for an unmapped uid. A deny rule matches
//! unless one of its keys does not hold.
//!
//! # Names of units
//!
//! A pattern is held against the name of each unit around the peer, one at a time: `*` stands for any run of
//! characters, `?` for one.
//!
//! `units` is held against the names that the *system's* manager gave, and against no other names. The names that a *user's* manager
//! gave were chosen by that user at will: any user may call a unit of their own `backup.service`. `user-units` is held
//! against these, for processes of that same user only, and only in a rule that has a `users` key too (`users =
//! ["any"]` is one: it accepts every user's word).
//!
//! So `units = ["backup.service"]` means the system's `backup.service`, whatever other keys the rule has, and
//! `users = ["alice"], user-units = ["mail.service"]` means that unit of alice's own.

mod accounts;
mod condition;
mod explain;
mod glob;
mod index;
mod matcher;
mod names;
mod rule;
mod set;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use crate::Subject;
use crate::ids::Uid;
use condition::{Ids, Known};
use index::{Candidates, Index, NONE};
use matcher::{Asked, Matcher};

pub use accounts::{Accounts, SubordinateRange};
pub(crate) use condition::{Condition, Given, KEYS, Key, sufficient_keys};
pub use condition::{Group, User};
pub use explain::Explanation;
pub use names::Name;
pub use rule::{Kind, Place, Rule, RuleName};
pub(crate) use set::{HIGHEST, IdSet};

/// The keys that a rule may have, as a file has them.
pub fn keys() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|key| key.name)
}

/// Named rules, in the order of decision, and the tables to decide by.
#[derive(Debug)]
pub struct Policy<T> {
    rules: Vec<Arc<Rule<T>>>,
    matchers: Vec<Matcher>,
    index: Option<Index>,
    /// The number of the first rule with a key about groups, and of the first that depends on the process.
    first_with_groups: u32,
    first_with_process: u32,
    me: Uid,
    accounts: Arc<Accounts>,
}

/// What a decision depends on besides the uid: see [`Policy::needs_of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// The groups.
    pub groups: bool,
    /// The process, for its units and its login.
    pub process: bool,
}

/// What the policy says of a subject.
#[must_use]
#[derive(Debug)]
pub enum Verdict<'p, T> {
    /// Admitted by this allow rule, on its [terms](Rule::terms).
    Admitted(&'p Arc<Rule<T>>),
    /// Denied by this deny rule, or because no rule matched.
    Denied(Option<&'p Arc<Rule<T>>>),
}

impl<'p, T> Verdict<'p, T> {
    /// The rule that decided; `None` where none matched.
    pub fn rule(&self) -> Option<&'p Arc<Rule<T>>> {
        match *self {
            Self::Admitted(rule) => Some(rule),
            Self::Denied(rule) => rule,
        }
    }

    /// Whether the subject is admitted.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        matches!(self, Self::Admitted(_))
    }
}

// A derived implementation would ask the same of `T`.
impl<T> Clone for Verdict<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Verdict<'_, T> {}

impl<T> Policy<T> {
    /// A policy of these rules. Deny rules are consulted before allow rules; among its like each keeps its place.
    /// `me` is the user that the service runs as: [`User::Me`].
    ///
    /// # Errors
    /// A rule without a key, a key without a value, a value that no id can match, a malformed name, or
    /// two rules of one name.
    pub fn new(rules: impl IntoIterator<Item = Rule<T>>, me: Uid) -> Result<Self, PolicyError> {
        let mut rules: Vec<Arc<Rule<T>>> = rules.into_iter().map(Arc::new).collect();
        rules.sort_by_key(|rule| rule.name().kind() == Kind::Allow);
        Self::of_rules(rules, me, Arc::default())
    }

    /// A policy of rules that are in their order.
    fn of_rules(rules: Vec<Arc<Rule<T>>>, me: Uid, accounts: Arc<Accounts>) -> Result<Self, PolicyError> {
        let mut names = HashSet::new();
        let mut matchers = Vec::with_capacity(rules.len());
        for rule in &rules {
            if !names.insert(rule.name().as_str()) {
                return Err(PolicyError::new(rule.name(), "a second rule of this name; expected each name once"));
            }
            matchers.push(matcher(rule, me, &accounts).map_err(|problem| PolicyError::new(rule.name(), problem))?);
        }
        Ok(Self::of_matchers(rules, matchers, me, accounts))
    }

    fn of_matchers(rules: Vec<Arc<Rule<T>>>, matchers: Vec<Matcher>, me: Uid, accounts: Arc<Accounts>) -> Self {
        let first = |needs: fn(&Matcher) -> bool| {
            (0..NONE).zip(&matchers).find(|(_, matcher)| needs(matcher)).map_or(NONE, |(number, _)| number)
        };
        let (first_with_groups, first_with_process) = (first(Matcher::needs_groups), first(Matcher::needs_process));
        let index = Index::new(&matchers);
        Self { rules, matchers, index, first_with_groups, first_with_process, me, accounts }
    }

    /// The policy where there is no file: a single rule `allow.owner`, which admits `me`.
    pub fn owner_only(me: Uid) -> Self
    where
        T: Default,
    {
        let rule = Rule::allow("owner", T::default()).users([User::Me]);
        let users = condition::users::OneOf::new(IdSet::new([(me.raw(), me.raw())]));
        Self::of_matchers(vec![Arc::new(rule)], vec![Matcher::new(false, vec![Box::new(users)])], me, Arc::default())
    }

    /// The same policy, in which deny rules also match what these accounts say, and [`owner_of`](Self::owner_of) goes by
    /// them.
    ///
    /// # Errors
    /// As [`new`](Self::new): none for rules that it has taken before.
    pub fn with_accounts(&self, accounts: Accounts) -> Result<Self, PolicyError> {
        Self::of_rules(self.rules.clone(), self.me, Arc::new(accounts))
    }

    /// What the policy knows of users besides its rules.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    pub(crate) fn shared_accounts(&self) -> Arc<Accounts> {
        Arc::clone(&self.accounts)
    }

    /// The user to whom this uid is subordinate (/etc/subuid); of any other uid, itself. What counts by user goes by this:
    /// a user with subordinate ids is otherwise many.
    pub fn owner_of(&self, uid: Uid) -> Uid {
        self.accounts.owner_of(uid)
    }

    /// The verdict on a subject.
    ///
    /// The cost does not depend on the rules that neither the uid nor a gid of the subject touches. Allocates
    /// nothing. Asks [`Subject::units`] at most once, and only if a rule that could still decide depends on the process.
    pub fn decide(&self, subject: &dyn Subject) -> Verdict<'_, T> {
        match self.deciding(subject).map(|number| &self.rules[number]) {
            Some(rule) if rule.name().kind() == Kind::Allow => Verdict::Admitted(rule),
            rule => Verdict::Denied(rule),
        }
    }

    /// All rules in the order in which they are consulted: deny rules, then allow rules.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<Rule<T>>> {
        self.rules.iter()
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there are no rules: then every subject is denied.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What a decision about this user depends on. The kernel need not be asked for anything else: without it the
    /// subject gets the same verdict.
    pub fn needs_of(&self, uid: Uid) -> Needs {
        let sure = match &self.index {
            Some(index) if uid.is_known() => index.of_uid(uid.raw()).sure,
            _ => NONE,
        };
        Needs { groups: self.first_with_groups < sure, process: self.first_with_process < sure }
    }

    /// Whether any rule has this key, such as `units`.
    pub fn has_key(&self, key: &str) -> bool {
        self.rules.iter().any(|rule| rule.conditions().iter().any(|condition| condition.key.name == key))
    }

    /// The user that [`User::Me`] means.
    pub fn me(&self) -> Uid {
        self.me
    }

    /// The verdict on a subject, as [`decide`](Self::decide) gives it, and how each rule up to the deciding one came
    /// out, key by key.
    pub fn explain(&self, subject: &dyn Subject) -> Explanation {
        explain::explain(self, subject)
    }

    /// The number of the rule that decides.
    fn deciding(&self, subject: &dyn Subject) -> Option<usize> {
        let asked = Asked::new(subject);
        match &self.index {
            Some(index)
                if subject.uid().is_known()
                    && (self.first_with_groups == NONE
                        || asked.groups_are_known()
                        || !self.needs_of(subject.uid()).groups) =>
            {
                self.look_up(index, &asked)
            }
            _ => self.matchers.iter().position(|matcher| matcher.matches(&asked)),
        }
    }

    /// The first rule that matches, as a scan over all rules would find it. Every id of the subject must be known.
    fn look_up(&self, index: &Index, asked: &Asked<'_>) -> Option<usize> {
        let gids = asked.subject.gids();
        let lists = || {
            let of_gids = gids.iter().filter(|gid| index.lists_gid(gid.raw())).map(|gid| index.of_gid(gid.raw()));
            std::iter::once(index.of_uid(asked.subject.uid().raw())).chain(of_gids)
        };
        let first_of = |list: &[u32], best: u32| {
            let before = list.iter().copied().take_while(|&number| number < best);
            before.into_iter().find(|&number| self.matchers[number as usize].matches(asked)).unwrap_or(best)
        };

        let mut best = lists().map(|Candidates { sure, .. }| sure).min().unwrap_or(NONE);
        // The uid's list comes first. The lists of the gids are searched only if there is something in one of them.
        let conditional = || lists().take(if index.has_conditions_on_gids() { usize::MAX } else { 1 });
        for candidates in conditional() {
            best = first_of(candidates.by_ids, best);
        }
        // The process is asked only for rules before the best so far.
        for candidates in conditional() {
            best = first_of(candidates.by_process, best);
        }
        best = first_of(index.of_any(), best);
        (best != NONE).then_some(best as usize)
    }
}

/// Checks a rule and resolves what can be before a subject is there.
fn matcher<T>(rule: &Rule<T>, me: Uid, accounts: &Arc<Accounts>) -> Result<Matcher, String> {
    rule.name().check()?;
    rule.check_keys()?;
    let is_deny = rule.name().kind() == Kind::Deny;
    let known = Known { me, accounts: is_deny.then_some(accounts) };
    let tests: Result<Vec<_>, String> = rule.conditions().iter().map(|condition| condition.test(&known)).collect();
    Ok(Matcher::new(is_deny, tests?))
}

impl<T> Policy<T> {
    /// Rules that no known subject can reach, because earlier rules decide about every subject that they match. Each
    /// comes with the first of these earlier rules.
    pub(crate) fn hidden(&self) -> Vec<Hidden<'_, T>> {
        let mut hidden = Vec::new();
        // The ids that earlier rules decide about alone.
        let (mut decided_uids, mut decided_gids) = (IdSet::default(), IdSet::default());
        let all = IdSet::new([(0, set::HIGHEST)]);
        for (number, matcher) in self.matchers.iter().enumerate() {
            let is_decided = |ids: &Ids<'_>| {
                ids.uids().is_none_or(|uids| uids.is_subset(&decided_uids))
                    && ids.gids().is_none_or(|gids| gids.is_subset(&decided_gids))
            };
            let of_any = [Ids::Uids(&all)];
            let decided = matcher.ids().chain(of_any).find(is_decided).filter(|_| !matcher.is_empty());
            if let Some(ids) = decided {
                let overlap = |a: Option<&IdSet>, b: Option<&IdSet>| a.zip(b).is_some_and(|(a, b)| a.overlaps(b));
                let earlier = self.matchers[..number].iter().position(|earlier| {
                    let only = earlier.only_ids();
                    only.is_some_and(|only| overlap(ids.uids(), only.uids()) || overlap(ids.gids(), only.gids()))
                });
                hidden.extend(earlier.map(|earlier| Hidden { rule: &self.rules[number], by: &self.rules[earlier] }));
            }
            if let Some(only) = matcher.only_ids() {
                only.uids().into_iter().for_each(|uids| decided_uids.unite(uids));
                only.gids().into_iter().for_each(|gids| decided_gids.unite(gids));
            }
        }
        hidden
    }

    /// The groups that deny rules list, as ranges, which may overlap.
    pub(crate) fn denied_groups(&self) -> Vec<(u32, u32)> {
        let denying = self.rules.iter().zip(&self.matchers).filter(|(rule, _)| rule.name().kind() == Kind::Deny);
        denying.flat_map(|(_, matcher)| matcher.gids()).flat_map(|gids| gids.ranges().iter().copied()).collect()
    }

    /// Whether there is a deny rule.
    pub(crate) fn denies_any(&self) -> bool {
        self.rules.first().is_some_and(|rule| rule.name().kind() == Kind::Deny)
    }

    /// Rules with a key that lists no id at all.
    pub(crate) fn without_ids(&self) -> impl Iterator<Item = &Arc<Rule<T>>> {
        self.rules.iter().zip(&self.matchers).filter(|(_, matcher)| matcher.is_empty()).map(|(rule, _)| rule)
    }
}

/// A rule that no known subject can reach, and an earlier rule that decides in its place.
pub(crate) struct Hidden<'p, T> {
    pub(crate) rule: &'p Arc<Rule<T>>,
    pub(crate) by: &'p Arc<Rule<T>>,
}

/// Why rules do not make a policy: which rule, what was found, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    rule: String,
    problem: String,
}

impl PolicyError {
    fn new(rule: &RuleName, problem: impl Into<String>) -> Self {
        Self { rule: rule.to_string(), problem: problem.into() }
    }

    /// The rule at fault, such as `allow.owner`.
    pub fn rule(&self) -> &str {
        &self.rule
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.problem)
    }
}

impl std::error::Error for PolicyError {}
