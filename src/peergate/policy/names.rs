//! Names that a policy's rules mention, and the ids that go with them. Used by [`policy`](super), which makes these
//! names public.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use super::set::HIGHEST;
use super::{Policy, PolicyError, Rule};

/// The name of a user or of a group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// A user's.
    User(String),
    /// A group's.
    Group(String),
}

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        let (Self::User(name) | Self::Group(name)) = self;
        name
    }

    /// What has this name: "user" or "group".
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Group(_) => "group",
        }
    }
}

/// `user "alice"`.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.kind(), self.as_str())
    }
}

impl<T> Rule<T> {
    /// The names that the rule mentions, each with its id where that is known.
    fn names(&self) -> impl Iterator<Item = (&Name, Option<u32>)> {
        self.conditions().iter().flat_map(|condition| condition.names())
    }
}

impl<T> Policy<T> {
    /// The names in its rules that have no id, because the user database did not know them, each once. They match no peer.
    pub fn unknown_names(&self) -> Vec<Name> {
        let mut seen = HashSet::new();
        let unknown = self.rules().flat_map(|rule| rule.names()).filter(|(_, id)| id.is_none());
        unknown.map(|(name, _)| name).filter(|name| seen.insert(*name)).cloned().collect()
    }

    /// The names in its rules that have an id, with it.
    pub fn known_names(&self) -> HashMap<Name, u32> {
        self.rules().flat_map(|rule| rule.names()).filter_map(|(name, id)| Some((name.clone(), id?))).collect()
    }

    /// The same policy, in which these ids go with its [unknown names](Self::unknown_names). A name that has an id keeps
    /// it. `u32::MAX` is no id and is ignored.
    ///
    /// # Errors
    /// As [`Policy::new`]: none for rules that it has taken before.
    ///
    /// ```
    /// use peergate::ids::Uid;
    /// use peergate::policy::{Name, Policy, Rule, User};
    ///
    /// let rule = Rule::allow("new", ()).users([User::Named("alice".into(), None)]);
    /// let policy = Policy::new([rule], Uid::new(0))?;
    /// assert_eq!(policy.unknown_names(), [Name::User("alice".into())]);
    ///
    /// let policy = policy.with_ids(&[(Name::User("alice".into()), 1001)])?;
    /// assert_eq!(policy.unknown_names(), []);
    /// # Ok::<(), peergate::policy::PolicyError>(())
    /// ```
    pub fn with_ids(&self, ids: &[(Name, u32)]) -> Result<Self, PolicyError>
    where
        T: Clone,
    {
        let ids: HashMap<&Name, u32> =
            ids.iter().filter(|(_, id)| *id <= HIGHEST).map(|(name, id)| (name, *id)).collect();
        let rules = self.rules().map(|rule| {
            let changes = rule.names().any(|(name, id)| id.is_none() && ids.contains_key(name));
            if changes { Arc::new(rule.with_ids(&ids)) } else { Arc::clone(rule) }
        });
        Self::of_rules(rules.collect(), self.me(), Arc::clone(&self.accounts))
    }
}
