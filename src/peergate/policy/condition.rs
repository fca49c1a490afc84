//! The keys of a rule. Used by [`policy`](super) and [`policy_file`](crate::policy_file).
//!
//! A key has one module: what it is called, how its values are read, whether they match a subject, and why. Index, policy file,
//! `explain`, `check` and the look-up of names go by that. They name a key only to say something that is true of it alone: the
//! column for units in `check`, an id that names no user, the reservations about members of groups, the options of `explain` that
//! stand for a fact. To add one:
//!
//! - write its module with a [`Key`] and the method of [`Rule`](super::Rule) that sets it, and list it in [`KEYS`];
//! - where it depends on a new fact: let [`Subject`](crate::Subject) tell it (with a default of "not known"), let
//!   [`Peer`](crate::Peer) ask the kernel for it and remember it, over a restart too (`Remembered` in peer.rs), and let
//!   `explain` be told it (the daemon's cli.rs and explain.rs).
//!
//! Tests fail until the manual page, the shipped configuration, an example for `check` and `explain`, and the slow model of
//! tests/policy.rs know the key.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::matcher::{Answer, Asked};
use super::set::IdSet;
use super::{Accounts, Name};
use crate::ids::{OVERFLOW_ID, Uid};

pub(super) mod groups;
mod id;
mod logins;
mod units;
pub(super) mod users;

pub use groups::Group;
pub use users::User;

/// Every key, in the order in which they are asked. The keys that need the process come last.
pub(crate) static KEYS: [&Key; 5] = [&users::KEY, &groups::KEY, &logins::KEY, &units::SYSTEM, &units::USER];

/// A key that a rule may have.
#[derive(Debug)]
pub(crate) struct Key {
    /// As a file has it.
    pub(crate) name: &'static str,
    /// What one value names.
    one: &'static str,
    /// A value, in words.
    expected: &'static str,
    /// An array of values as a file has it.
    pub(crate) example: &'static str,
    /// The key that a rule must have beside this one, and what is wrong with a rule that has not.
    pub(crate) companion: Option<(&'static str, &'static str)>,
    /// What is to be warned of where an allow rule has no other key.
    pub(crate) alone: Option<&'static str>,
    /// Reads a value. The error says what was found and, after a semicolon, what was expected.
    read: fn(&Given<'_>, &mut LookUp<'_>) -> Result<Value, String>,
    /// Makes the test of a subject by values.
    test: MakeTest,
}

type MakeTest = fn(&[Value], &Known<'_>) -> Result<Box<dyn Test>, String>;

/// What is known when tests are made.
#[derive(Debug)]
pub(super) struct Known<'k> {
    /// The id of `self`.
    pub(super) me: Uid,
    /// In a deny rule: what a user can shed or take on. An allow rule goes by what a peer shows alone.
    pub(super) accounts: Option<&'k Arc<Accounts>>,
}

/// The id of a name, or `None` where the name is unknown.
pub(crate) type LookUp<'l> = dyn FnMut(&Name) -> Result<Option<u32>, String> + 'l;

/// A value in a file.
#[derive(Debug)]
pub(crate) enum Given<'v> {
    Text(&'v str),
    /// As it is written, and the number if it fits.
    Integer(String, Option<u32>),
    /// A value of another type, such as "a boolean".
    Other(String),
}

/// A value of a key.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Me,
    Any,
    Id(u32),
    Range(u32, u32),
    /// With the id that the user database gave when it was asked.
    Named(Name, Option<u32>),
    Pattern(String),
    /// A text that is no value, and what is wrong with it.
    Refused(String, String),
}

/// As a file has it; a name is followed by its id: `adm (4)`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Me => f.write_str("self"),
            Self::Any => f.write_str("any"),
            Self::Id(id) => write!(f, "{id}"),
            Self::Range(low, high) => write!(f, "{low}-{high}"),
            Self::Named(name, Some(id)) => write!(f, "{} ({id})", name.as_str()),
            Self::Named(name, None) => write!(f, "{} (unknown)", name.as_str()),
            Self::Pattern(text) | Self::Refused(text, _) => f.write_str(text),
        }
    }
}

/// A key of one rule, with its values.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    pub(crate) key: &'static Key,
    pub(super) values: Vec<Value>,
}

impl Condition {
    pub(crate) fn new(key: &'static Key) -> Self {
        Self { key, values: Vec::new() }
    }

    /// Reads one more value. Returns a warning if there is one.
    pub(crate) fn read(&mut self, given: &Given<'_>, look_up: &mut LookUp<'_>) -> Result<Option<String>, String> {
        let value = (self.key.read)(given, look_up)?;
        let is_unmapped = matches!(value, Value::Id(OVERFLOW_ID) | Value::Named(_, Some(OVERFLOW_ID)));
        self.values.push(value);
        Ok(is_unmapped.then(|| {
            format!(
                "the id {OVERFLOW_ID} stands for every {} that cannot be told apart here, so it matches no peer; \
                 expected another id",
                self.key.one
            )
        }))
    }

    /// The values as a file has them, for a person to read. `me` is the id of `self`.
    pub(super) fn shown(&self, me: Uid) -> Vec<String> {
        let shown = self.values.iter().map(|value| match value {
            Value::Me => format!("self ({me})"),
            other => other.to_string(),
        });
        shown.collect()
    }

    /// The test of a subject by these values.
    pub(super) fn test(&self, known: &Known<'_>) -> Result<Box<dyn Test>, String> {
        if self.values.is_empty() {
            return Err(format!("`{}` is empty; expected at least one value", self.key.name));
        }
        (self.key.test)(&self.values, known)
    }

    /// The names among the values, with their ids.
    pub(super) fn names(&self) -> impl Iterator<Item = (&Name, Option<u32>)> {
        self.values.iter().filter_map(|value| if let Value::Named(name, id) = value { Some((name, *id)) } else { None })
    }

    /// Sets the ids of names that have none.
    pub(super) fn set_ids(&mut self, ids: &HashMap<&Name, u32>) {
        for value in &mut self.values {
            if let Value::Named(name, id @ None) = value {
                *id = ids.get(name).copied();
            }
        }
    }
}

/// The keys that say enough alone, in words: "`users`, `groups` or `units`".
pub(crate) fn sufficient_keys() -> String {
    let names = KEYS.iter().filter(|key| key.companion.is_none()).map(|key| format!("`{}`", key.name));
    match names.collect::<Vec<_>>().as_slice() {
        [others @ .., last] => format!("{} or {last}", others.join(", ")),
        [] => String::new(),
    }
}

/// The values of one key, ready to be held against a subject.
pub(super) trait Test: fmt::Debug + Send + Sync {
    /// Whether the key holds.
    fn answer(&self, asked: &Asked<'_>) -> Answer;

    /// Why, as a phrase: `uid 1001 is not among self (1000)`.
    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String;

    /// The ids of the subject itself (its own uid, its own groups) without which the key does not hold: the index looks rules
    /// up by them. Ids of any other kind do not belong here.
    fn ids(&self) -> Option<Ids<'_>> {
        None
    }

    /// Whether the answer depends on the process of the subject, which costs several system calls.
    fn needs_process(&self) -> bool {
        false
    }
}

/// The ids that a key lists: a subject needs one of them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ids<'t> {
    Uids(&'t IdSet),
    Gids(&'t IdSet),
    /// One of these uids or one of these gids.
    Either(&'t IdSet, &'t IdSet),
}

impl<'t> Ids<'t> {
    pub(super) fn uids(self) -> Option<&'t IdSet> {
        let (Self::Uids(uids) | Self::Either(uids, _)) = self else { return None };
        Some(uids)
    }

    pub(super) fn gids(self) -> Option<&'t IdSet> {
        let (Self::Gids(gids) | Self::Either(_, gids)) = self else { return None };
        Some(gids)
    }

    /// How many ids these are.
    pub(super) fn size(self) -> u64 {
        [self.uids(), self.gids()].into_iter().flatten().map(IdSet::size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_need_the_process_are_asked_last() {
        let needs =
            KEYS.map(|key| (key.test)(&[], &Known { me: Uid::new(0), accounts: None }).unwrap().needs_process());
        assert!(needs.is_sorted(), "{needs:?}");
    }
}
