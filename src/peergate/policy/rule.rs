//! What one rule says. Used by [`policy`](super), which makes these names public.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::Name;
use super::condition::{Condition, KEYS, Key, Value, sufficient_keys};
use crate::ids::Uid;

/// What a rule does to the peers that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Denies them. Consulted before every allow rule.
    Deny,
    /// Admits them.
    Allow,
}

impl Kind {
    /// `deny` or `allow`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Allow => "allow",
        }
    }
}

/// A rule's full name: `allow.owner`, `deny.contractors`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RuleName {
    kind: Kind,
    full: Box<str>,
}

impl RuleName {
    pub(crate) fn new(kind: Kind, name: &str) -> Self {
        Self { kind, full: format!("{}.{name}", kind.as_str()).into() }
    }

    /// What the rule does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The full name, as the record has it: `allow.owner`.
    pub fn as_str(&self) -> &str {
        &self.full
    }

    /// The name without the kind: `owner`.
    pub fn name(&self) -> &str {
        &self.full[self.kind.as_str().len() + 1..]
    }

    /// Names go into records and onto terminals, so they are kept to what needs no quoting there.
    pub(crate) fn check(&self) -> Result<(), String> {
        let name = self.name();
        let fits = name.len() <= 64
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        fits.then_some(()).ok_or_else(|| {
            format!(
                "the rule's name {name:?}; expected at most 64 letters, digits, `_`, `.` or `-`, \
                 of which the first is a letter or a digit"
            )
        })
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.full)
    }
}

/// Where a rule is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<Path>,
    /// The line in it, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// One rule: a name, the keys that say which peers it is for, and the terms on which an allow rule admits.
///
/// Built step by step; [`Policy::new`](super::Policy::new) checks it.
///
/// ```
/// use peergate::ids::Uid;
/// use peergate::policy::{Policy, Rule, User};
///
/// let rules = || [Rule::allow("backup", 200).users([User::Named("backup".into(), Some(Uid::new(34)))])];
/// assert!(Policy::new(rules(), Uid::new(0)).is_ok());
/// assert!(Policy::new(rules().map(|rule| rule.units(["backup.service"])), Uid::new(0)).is_ok());
///
/// // A rule without a key is an error: it would say nothing about which peers it is for.
/// let error = Policy::new([Rule::allow("all", 200)], Uid::new(0)).unwrap_err();
/// assert!(error.to_string().starts_with("allow.all: "));
/// ```
#[derive(Clone, Debug)]
pub struct Rule<T> {
    name: RuleName,
    terms: T,
    /// Each key once, in the order of [`KEYS`].
    conditions: Vec<Condition>,
    place: Option<Place>,
}

impl<T> Rule<T> {
    /// A rule that admits, on these terms. The name goes into records; [`Policy::new`](super::Policy::new) refuses
    /// one that is not 1 to 64 letters, digits, `_`, `.` or `-`, beginning with a letter or digit.
    pub fn allow(name: &str, terms: T) -> Self {
        Self::new(Kind::Allow, name, terms)
    }

    /// A rule that denies. Its terms are the type's default.
    pub fn deny(name: &str) -> Self
    where
        T: Default,
    {
        Self::new(Kind::Deny, name, T::default())
    }

    fn new(kind: Kind, name: &str, terms: T) -> Self {
        let name = RuleName::new(kind, name);
        Self { name, terms, conditions: Vec::new(), place: None }
    }

    /// Adds values to a key.
    pub(super) fn with(mut self, key: &'static Key, values: impl Iterator<Item = Value>) -> Self {
        self.add(Condition { key, values: values.collect() });
        self
    }

    /// Adds a key. If the rule has it already, the values are added to it.
    pub(crate) fn add(&mut self, condition: Condition) {
        let place = |condition: &Condition| KEYS.iter().position(|key| key.name == condition.key.name);
        let at = self.conditions.partition_point(|other| place(other) < place(&condition));
        match self.conditions.get_mut(at) {
            Some(same) if same.key.name == condition.key.name => same.values.extend(condition.values),
            _ => self.conditions.insert(at, condition),
        }
    }

    /// Whether the keys say which peers the rule is for. The error says what was found and what was expected.
    pub(super) fn check_keys(&self) -> Result<(), String> {
        if self.conditions.is_empty() {
            return Err(format!("the rule does not say which peers it is for; expected {}", sufficient_keys()));
        }
        let has = |name: &str| self.conditions.iter().any(|condition| condition.key.name == name);
        let companions = self.conditions.iter().filter_map(|condition| condition.key.companion);
        match companions.into_iter().find(|(companion, _)| !has(companion)) {
            Some((_, problem)) => Err(problem.to_owned()),
            None => Ok(()),
        }
    }

    pub(super) fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    /// The rule's keys, each with its values as a file has them; a name is followed by its id, as in `adm (4)`, and
    /// `self` by `me`.
    pub fn keys(&self, me: Uid) -> impl Iterator<Item = (&'static str, Vec<String>)> {
        self.conditions.iter().map(move |condition| (condition.key.name, condition.shown(me)))
    }

    /// The number of users that the rule can match at most: those that its key `users` lists. `None`: any number. A user's
    /// subordinate ids count as the user.
    pub fn most_users(&self) -> Option<u64> {
        let users = self.conditions.iter().find(|condition| condition.key.name == "users")?;
        users.values.iter().try_fold(0_u64, |sum, value| match value {
            Value::Me | Value::Id(_) | Value::Named(..) => Some(sum.saturating_add(1)),
            Value::Range(low, high) => Some(sum.saturating_add(u64::from(high.saturating_sub(*low)) + 1)),
            Value::Any | Value::Pattern(_) | Value::Refused(..) => None,
        })
    }

    /// Notes where the rule is written.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// The same rule, in which these ids go with names that have none.
    pub(super) fn with_ids(&self, ids: &HashMap<&Name, u32>) -> Self
    where
        T: Clone,
    {
        let mut rule = self.clone();
        rule.conditions.iter_mut().for_each(|condition| condition.set_ids(ids));
        rule
    }

    /// Kind and name.
    pub fn name(&self) -> &RuleName {
        &self.name
    }

    /// What the application attached to the rule. A deny rule has the type's default.
    pub fn terms(&self) -> &T {
        &self.terms
    }

    /// Where the rule is written, if it comes from a file.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }
}
