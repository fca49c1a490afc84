//! The policy: named rules, and the decision about one subject.
//!
//! Pure: no sockets, no clock, no log, no files, no user database. Everyone may import it; it imports only
//! [`ids`](crate::ids), [`unit`](crate::unit) and [`Subject`]. ([`policy_file`](crate::policy_file), which reads a policy
//! from a file, does touch files and the user database.)
//!
//! Deny rules are consulted first, then allow rules, each in the order given; the first that matches decides.
//! Whom no rule matches is denied. Inside a rule every key must hold; inside a key any value may.
//!
//! ```
//! use peergate::ids::{Gid, Uid};
//! use peergate::Subject;
//! use peergate::policy::{Policy, Rule, User, Verdict};
//! use peergate::unit::Units;
//!
//! struct Somebody(Uid, Vec<Gid>);
//!
//! impl Subject for Somebody {
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
//! let owner = Somebody(me, vec![Gid::new(1000)]);
//! assert!(matches!(policy.decide(&owner), Verdict::Admitted(rule) if *rule.terms() == Access::Update));
//!
//! let staff = Somebody(Uid::new(1001), vec![Gid::new(1001), Gid::new(50)]);
//! assert!(matches!(policy.decide(&staff), Verdict::Admitted(rule) if rule.name().as_str() == "allow.staff"));
//!
//! let contractor = Somebody(Uid::new(2001), vec![Gid::new(50)]);
//! let Verdict::Denied(Some(rule)) = policy.decide(&contractor) else { panic!() };
//! assert_eq!(rule.name().as_str(), "deny.contractors");
//!
//! let root = Somebody(Uid::new(0), vec![Gid::new(0)]);
//! assert!(matches!(policy.decide(&root), Verdict::Denied(None)));
//! # Ok::<(), peergate::policy::PolicyError>(())
//! ```
//!
//! # What is not known
//!
//! The policy decides on what the kernel vouches for, and no more. Each key of a rule holds, does not hold, or
//! cannot be told:
//!
//! - `users`, where the uid names nobody ([`Uid::is_known`]). That includes "any".
//! - `groups`, where no known group matches, and one of the groups names nobody or the list is incomplete.
//! - `units` and `user-units`, where the peer's units cannot be tied to the very process that connected.
//!
//! An allow rule matches only if all of its keys hold, and never for a uid that names nobody. A deny rule matches
//! unless one of its keys does not hold.
//!
//! # Names of units
//!
//! A pattern is held against the name of each unit around the peer, one at a time: `*` stands for any run of
//! characters, `?` for one.
//!
//! `units` is held against the names that the *system's* manager gave, and no others. The names that a *user's* manager
//! gave were chosen by that user at will: any user may call a unit of their own `backup.service`. `user-units` is held
//! against these, for processes of that same user only, and only in a rule that has a `users` key too (`users =
//! ["any"]` is one: it accepts every user's word).
//!
//! So `units = ["backup.service"]` means the system's `backup.service`, whatever other keys the rule has, and
//! `users = ["alice"], user-units = ["mail.service"]` means that unit of alice's own.

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
use index::{Candidates, Index, NONE};
use matcher::{Asked, Matcher, groups_are_known};
use set::IdSet;

pub use explain::Explanation;
pub(crate) use glob::Glob;
pub use names::Name;
pub use rule::{Group, Kind, Place, Rule, RuleName, User};
pub(crate) use set::HIGHEST;

/// Named rules, in the order of decision, and the tables to decide by.
#[derive(Debug)]
pub struct Policy<T> {
    rules: Vec<Arc<Rule<T>>>,
    matchers: Vec<Matcher>,
    index: Option<Index>,
    /// The number of the first rule with a `groups` key, and of the first with a key about units.
    first_with_groups: u32,
    first_with_units: u32,
    me: Uid,
}

/// What a decision depends on besides the uid: see [`Policy::needs_of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// The groups.
    pub groups: bool,
    /// The unit.
    pub units: bool,
}

/// What the policy says of a subject. [`Verdict::Denied`] names the rule that denies, or nobody's where no rule
/// matched.
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

    /// Whether the subject may in.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        matches!(self, Self::Admitted(_))
    }
}

// Derived, these would ask the same of `T`.
impl<T> Clone for Verdict<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Verdict<'_, T> {}

impl<T> Policy<T> {
    /// A policy of these rules. Deny rules are consulted before allow rules; among its like each keeps its place.
    /// `me` is whom [`User::Me`] stands for: the user that the service runs as.
    ///
    /// # Errors
    /// A rule without a key, a key without a value, a value that can match nobody by its form, a malformed name, or
    /// two rules of one name.
    pub fn new(rules: impl IntoIterator<Item = Rule<T>>, me: Uid) -> Result<Self, PolicyError> {
        let mut rules: Vec<Arc<Rule<T>>> = rules.into_iter().map(Arc::new).collect();
        rules.sort_by_key(|rule| rule.name().kind() == Kind::Allow);
        Self::of_rules(rules, me)
    }

    /// A policy of rules that are in their order.
    fn of_rules(rules: Vec<Arc<Rule<T>>>, me: Uid) -> Result<Self, PolicyError> {
        let mut names = HashSet::new();
        let mut matchers = Vec::with_capacity(rules.len());
        for rule in &rules {
            if !names.insert(rule.name().as_str()) {
                return Err(PolicyError::new(rule.name(), "a second rule of this name; expected each name once"));
            }
            matchers.push(matcher(rule, me).map_err(|problem| PolicyError::new(rule.name(), problem))?);
        }
        let index = Index::new(&matchers);
        let first = |has: fn(&Matcher) -> bool| {
            (0..NONE).zip(&matchers).find(|(_, matcher)| has(matcher)).map_or(NONE, |(number, _)| number)
        };
        let first_with_groups = first(|matcher| matcher.groups.is_some());
        let first_with_units = first(Matcher::has_units);
        Ok(Self { rules, matchers, index, first_with_groups, first_with_units, me })
    }

    /// The policy where there is no file: a single rule `allow.owner`, which admits `me`.
    pub fn owner_only(me: Uid) -> Self
    where
        T: Default,
    {
        let rule = Rule::allow("owner", T::default()).users([User::Me]);
        let users = Some(IdSet::new([User::Me.range(me)].into_iter().flatten()));
        let matchers = vec![Matcher { deny: false, users, groups: None, units: None, user_units: None }];
        let index = Index::new(&matchers);
        let (first_with_groups, first_with_units) = (NONE, NONE);
        Self { rules: vec![Arc::new(rule)], matchers, index, first_with_groups, first_with_units, me }
    }

    /// The verdict on a subject.
    ///
    /// The cost does not depend on the rules that neither the uid nor a gid of the subject touches. Allocates
    /// nothing. Asks [`Subject::units`] at most once, and only if a rule that could still decide depends on it.
    pub fn decide(&self, who: &dyn Subject) -> Verdict<'_, T> {
        match self.deciding(who).map(|number| &self.rules[number]) {
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

    /// Whether there are no rules, so that nobody is admitted.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What a decision about this user depends on: what no rule asks for that could still decide need not be asked of
    /// the kernel. A subject whose other facts are left out gets the same verdict.
    pub fn needs_of(&self, uid: Uid) -> Needs {
        let sure = match &self.index {
            Some(index) if uid.is_known() => index.of_uid(uid.raw()).sure,
            _ => NONE,
        };
        Needs { groups: self.first_with_groups < sure, units: self.first_with_units < sure }
    }

    /// Whether any rule has a key `units` or `user-units`.
    pub fn depends_on_units(&self) -> bool {
        self.first_with_units != NONE
    }

    /// Whom [`User::Me`] stands for.
    pub fn me(&self) -> Uid {
        self.me
    }

    /// The verdict on a subject, as [`decide`](Self::decide) gives it, and how each rule up to the deciding one came
    /// out, key by key.
    pub fn explain(&self, who: &dyn Subject) -> Explanation {
        explain::explain(self, who)
    }

    /// The number of the rule that decides.
    fn deciding(&self, who: &dyn Subject) -> Option<usize> {
        let asked = Asked::new(who);
        match &self.index {
            Some(index)
                if who.uid().is_known()
                    && (self.first_with_groups == NONE
                        || groups_are_known(who)
                        || !self.needs_of(who.uid()).groups) =>
            {
                self.look_up(index, &asked)
            }
            _ => self.matchers.iter().position(|matcher| matcher.matches(&asked)),
        }
    }

    /// As a scan over all rules would, for a subject of whom every id is known.
    fn look_up(&self, index: &Index, asked: &Asked<'_>) -> Option<usize> {
        let gids = asked.who.gids();
        let lists = || {
            let of_gids = gids.iter().filter(|gid| index.lists_gid(gid.raw())).map(|gid| index.of_gid(gid.raw()));
            std::iter::once(index.of_uid(asked.who.uid().raw())).chain(of_gids)
        };
        let first_of = |list: &[u32], best: u32| {
            let before = list.iter().copied().take_while(|&number| number < best);
            before.into_iter().find(|&number| self.matchers[number as usize].matches(asked)).unwrap_or(best)
        };

        let mut best = lists().map(|Candidates { sure, .. }| sure).min().unwrap_or(NONE);
        // The uid's list comes first; those of the gids are looked through only if there is something in one of them.
        let conditional = || lists().take(if index.has_conditions_on_gids() { usize::MAX } else { 1 });
        for candidates in conditional() {
            best = first_of(candidates.by_ids, best);
        }
        // Only now those that depend on the unit: of these, only the ones before the best so far are worth asking.
        for candidates in conditional() {
            best = first_of(candidates.by_unit, best);
        }
        best = first_of(index.anyone(), best);
        (best != NONE).then_some(best as usize)
    }
}

/// Checks a rule and resolves what can be before a subject is there.
fn matcher<T>(rule: &Rule<T>, me: Uid) -> Result<Matcher, String> {
    const EMPTY: &str = "is empty; expected at least one value";
    rule.name().check()?;
    let users = rule.listed_users().map(|users| {
        let ranges: Result<Vec<_>, _> = users.iter().map(|user| user.check().map(|()| user.range(me))).collect();
        if users.is_empty() { Err(format!("`users` {EMPTY}")) } else { Ok(IdSet::new(ranges?.into_iter().flatten())) }
    });
    let groups = rule.listed_groups().map(|groups| {
        let ranges: Result<Vec<_>, _> = groups.iter().map(|group| group.check().map(|()| group.range())).collect();
        if groups.is_empty() { Err(format!("`groups` {EMPTY}")) } else { Ok(IdSet::new(ranges?.into_iter().flatten())) }
    });
    let globs = |key: &str, patterns: Option<&[String]>| {
        let Some(patterns) = patterns else { return Ok(None) };
        let globs: Result<Vec<_>, _> = patterns.iter().map(|pattern| Glob::new(pattern)).collect();
        if patterns.is_empty() { Err(format!("`{key}` {EMPTY}")) } else { globs.map(Some) }
    };
    let deny = rule.name().kind() == Kind::Deny;
    let (users, groups) = (users.transpose()?, groups.transpose()?);
    let units = globs("units", rule.listed_units())?;
    let user_units = globs("user-units", rule.listed_user_units())?;
    if user_units.is_some() && users.is_none() {
        return Err(format!("{}; expected {}", USER_UNITS_ALONE.0, USER_UNITS_ALONE.1));
    }
    if users.is_none() && groups.is_none() && units.is_none() {
        return Err("the rule says nothing about whom it is for; expected `users`, `groups` or `units`".into());
    }
    Ok(Matcher { deny, users, groups, units, user_units })
}

/// What is wrong with a rule that has `user-units` and no `users`, and what was expected.
pub(crate) const USER_UNITS_ALONE: (&str, &str) = (
    "`user-units` without `users`, where any user can call a unit of their own by that name",
    "`users` beside it, to say whose units are meant",
);

impl<T> Policy<T> {
    /// Rules that no known subject can reach, because earlier rules decide about everyone they are for; each with
    /// the earlier rule, or the first of the several, that does.
    pub(crate) fn hidden(&self) -> Vec<Hidden<'_, T>> {
        let mut hidden = Vec::new();
        let mut decided_uids = IdSet::default();
        let mut decided_gids = IdSet::default();
        let everyone = IdSet::new([(0, set::HIGHEST)]);
        for (number, matcher) in self.matchers.iter().enumerate() {
            let users = matcher.users.as_ref();
            let by_uid = users.unwrap_or(&everyone).is_subset(&decided_uids);
            let by_gid = matcher.groups.as_ref().is_some_and(|groups| groups.is_subset(&decided_gids));
            let empty = users.is_some_and(IdSet::is_empty) || matcher.groups.as_ref().is_some_and(IdSet::is_empty);
            if (by_uid || by_gid) && !empty {
                let earlier = self.matchers[..number].iter().position(|earlier| match (by_uid, earlier.one_set()) {
                    (true, Some((true, set))) => users.unwrap_or(&everyone).overlaps(set),
                    (false, Some((false, set))) => matcher.groups.as_ref().is_some_and(|groups| groups.overlaps(set)),
                    _ => false,
                });
                hidden.extend(earlier.map(|earlier| Hidden { rule: &self.rules[number], by: &self.rules[earlier] }));
            }
            match matcher.one_set() {
                Some((true, set)) => decided_uids.unite(set),
                Some((false, set)) => decided_gids.unite(set),
                None => {}
            }
        }
        hidden
    }

    /// Rules with a key none of whose values names anybody.
    pub(crate) fn for_nobody(&self) -> impl Iterator<Item = &Arc<Rule<T>>> {
        let nobody = |set: &Option<IdSet>| set.as_ref().is_some_and(IdSet::is_empty);
        self.rules
            .iter()
            .zip(&self.matchers)
            .filter(move |(_, m)| nobody(&m.users) || nobody(&m.groups))
            .map(|(r, _)| r)
    }
}

/// A rule that no known subject can reach, and an earlier rule that decides in its place.
pub(crate) struct Hidden<'p, T> {
    pub(crate) rule: &'p Arc<Rule<T>>,
    pub(crate) by: &'p Arc<Rule<T>>,
}

impl Matcher {
    /// The set of uids (`true`) or gids (`false`) that is all the rule depends on.
    fn one_set(&self) -> Option<(bool, &IdSet)> {
        let set = self.users.as_ref().map(|set| (true, set)).or(self.groups.as_ref().map(|set| (false, set)));
        set.filter(|_| self.is_one_key())
    }
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
