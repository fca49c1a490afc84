//! What one rule says. Used by [`policy`](super), which makes these names public.

use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use super::Name;
use super::set::HIGHEST;
use crate::ids::{Gid, Uid};

/// What a rule does to those it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Turns them away. Consulted before every allow rule.
    Deny,
    /// Lets them in.
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

/// A value of the key `users`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum User {
    /// `self`: the user that the service runs as.
    Me,
    /// `any`: every user whom the kernel can name.
    Any,
    /// The user with this id.
    Id(Uid),
    /// The users from the first to the last of these ids.
    Range(Uid, Uid),
    /// A user by name, with the id that the user database gave when it was asked. `None`: it knows no such user, so
    /// this value matches nobody.
    Named(String, Option<Uid>),
}

/// A value of the key `groups`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Group {
    /// `any`: every group that the kernel can name.
    Any,
    /// The group with this id.
    Id(Gid),
    /// The groups from the first to the last of these ids.
    Range(Gid, Gid),
    /// A group by name, with the id that the user database gave when it was asked. `None`: it knows no such group,
    /// so this value matches nobody.
    Named(String, Option<Gid>),
}

/// `u32::MAX` is no id, and a range must not run backwards.
fn check_range(low: u32, high: u32) -> Result<(), String> {
    if low > high {
        Err(format!("the range {low}-{high}; expected the lower id first, as in \"{high}-{low}\""))
    } else if high > HIGHEST {
        Err(format!("the id {high}; expected at most {HIGHEST}"))
    } else {
        Ok(())
    }
}

impl User {
    pub(super) fn check(&self) -> Result<(), String> {
        self.range(Uid::new(0)).map_or(Ok(()), |(low, high)| check_range(low, high))
    }

    pub(super) fn range(&self, me: Uid) -> Option<(u32, u32)> {
        match *self {
            Self::Me => Some((me.raw(), me.raw())),
            Self::Any => Some((0, HIGHEST)),
            Self::Id(uid) => Some((uid.raw(), uid.raw())),
            Self::Range(low, high) => Some((low.raw(), high.raw())),
            Self::Named(_, uid) => uid.map(|uid| (uid.raw(), uid.raw())),
        }
    }
}

impl Group {
    pub(super) fn check(&self) -> Result<(), String> {
        self.range().map_or(Ok(()), |(low, high)| check_range(low, high))
    }

    pub(super) fn range(&self) -> Option<(u32, u32)> {
        match *self {
            Self::Any => Some((0, HIGHEST)),
            Self::Id(gid) => Some((gid.raw(), gid.raw())),
            Self::Range(low, high) => Some((low.raw(), high.raw())),
            Self::Named(_, gid) => gid.map(|gid| (gid.raw(), gid.raw())),
        }
    }
}

impl From<Uid> for User {
    fn from(uid: Uid) -> Self {
        Self::Id(uid)
    }
}

impl From<RangeInclusive<u32>> for User {
    fn from(range: RangeInclusive<u32>) -> Self {
        Self::Range(Uid::new(*range.start()), Uid::new(*range.end()))
    }
}

impl From<Gid> for Group {
    fn from(gid: Gid) -> Self {
        Self::Id(gid)
    }
}

impl From<RangeInclusive<u32>> for Group {
    fn from(range: RangeInclusive<u32>) -> Self {
        Self::Range(Gid::new(*range.start()), Gid::new(*range.end()))
    }
}

/// As a file has it; a name is followed by its number: `adm (4)`.
impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Me => f.write_str("self"),
            Self::Any => f.write_str("any"),
            Self::Id(uid) => write!(f, "{uid}"),
            Self::Range(low, high) => write!(f, "{low}-{high}"),
            Self::Named(name, Some(uid)) => write!(f, "{name} ({uid})"),
            Self::Named(name, None) => write!(f, "{name} (unknown)"),
        }
    }
}

/// As a file has it; a name is followed by its number: `adm (4)`.
impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Id(gid) => write!(f, "{gid}"),
            Self::Range(low, high) => write!(f, "{low}-{high}"),
            Self::Named(name, Some(gid)) => write!(f, "{name} ({gid})"),
            Self::Named(name, None) => write!(f, "{name} (unknown)"),
        }
    }
}

/// One rule: a name, whom it is for, and the terms on which an allow rule admits.
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
/// // A rule that says nothing about whom it is for admits nobody and is an error.
/// let error = Policy::new([Rule::allow("all", 200)], Uid::new(0)).unwrap_err();
/// assert!(error.to_string().starts_with("allow.all: "));
/// ```
#[derive(Clone, Debug)]
pub struct Rule<T> {
    name: RuleName,
    terms: T,
    users: Option<Vec<User>>,
    groups: Option<Vec<Group>>,
    units: Option<Vec<String>>,
    user_units: Option<Vec<String>>,
    place: Option<Place>,
}

impl<T> Rule<T> {
    /// A rule that admits, on these terms. The name goes into records; [`Policy::new`](super::Policy::new) refuses
    /// one that is not 1 to 64 letters, digits, `_`, `.` or `-`, beginning with a letter or digit.
    pub fn allow(name: &str, terms: T) -> Self {
        Self::new(Kind::Allow, name, terms)
    }

    /// A rule that denies. It has no terms to speak of.
    pub fn deny(name: &str) -> Self
    where
        T: Default,
    {
        Self::new(Kind::Deny, name, T::default())
    }

    fn new(kind: Kind, name: &str, terms: T) -> Self {
        let name = RuleName::new(kind, name);
        Self { name, terms, users: None, groups: None, units: None, user_units: None, place: None }
    }

    /// Only for these users (the effective uid). Called again, it adds.
    #[must_use]
    pub fn users<U: Into<User>>(mut self, users: impl IntoIterator<Item = U>) -> Self {
        self.users.get_or_insert_default().extend(users.into_iter().map(Into::into));
        self
    }

    /// Only for members of one of these groups (the effective gid or a supplementary one). Called again, it adds.
    #[must_use]
    pub fn groups<G: Into<Group>>(mut self, groups: impl IntoIterator<Item = G>) -> Self {
        self.groups.get_or_insert_default().extend(groups.into_iter().map(Into::into));
        self
    }

    /// Only for processes in a unit of the system's manager whose name fits one of these
    /// [patterns](super#names-of-units). Called again, it adds.
    #[must_use]
    pub fn units<P: Into<String>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.units.get_or_insert_default().extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Only for processes in a unit of the user's own manager whose name fits one of these
    /// [patterns](super#names-of-units). Called again, it adds. Any user can call a unit of their own as they like, so
    /// [`Policy::new`](super::Policy::new) refuses a rule that does not also say which [users](Self::users).
    #[must_use]
    pub fn user_units<P: Into<String>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.user_units.get_or_insert_default().extend(patterns.into_iter().map(Into::into));
        self
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
        for user in rule.users.iter_mut().flatten() {
            if let User::Named(name, uid @ None) = user {
                *uid = ids.get(&Name::User(name.clone())).copied().map(Uid::new);
            }
        }
        for group in rule.groups.iter_mut().flatten() {
            if let Group::Named(name, gid @ None) = group {
                *gid = ids.get(&Name::Group(name.clone())).copied().map(Gid::new);
            }
        }
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

    /// The values of the key `users`; `None` where the rule has no such key.
    pub fn listed_users(&self) -> Option<&[User]> {
        self.users.as_deref()
    }

    /// The values of the key `groups`; `None` where the rule has no such key.
    pub fn listed_groups(&self) -> Option<&[Group]> {
        self.groups.as_deref()
    }

    /// The patterns of the key `units`; `None` where the rule has no such key.
    pub fn listed_units(&self) -> Option<&[String]> {
        self.units.as_deref()
    }

    /// The patterns of the key `user-units`; `None` where the rule has no such key.
    pub fn listed_user_units(&self) -> Option<&[String]> {
        self.user_units.as_deref()
    }
}
