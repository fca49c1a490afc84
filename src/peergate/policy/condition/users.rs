//! The key `users`: the effective uid.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::super::matcher::{Answer, Asked};
use super::super::set::IdSet;
use super::super::{Accounts, Rule};
use super::{Given, Ids, Key, LookUp, Name, Test, Value, id};
use crate::ids::Uid;

pub(crate) static KEY: Key = Key {
    name: "users",
    one: "user",
    expected: "expected a user's name, an id, a range such as \"2000-2999\", \"self\" or \"any\"",
    example: "[\"self\", \"alice\", 1001, \"2000-2999\"]",
    companion: None,
    alone: None,
    read: |given, look_up| match given {
        Given::Text("self") => Ok(Value::Me),
        given => id::read(&KEY, given, Name::User, look_up),
    },
    test: |values, known| Ok(Box::new(OneOf::new(id::set(values, known.me)?).and_subordinates(known.accounts))),
};

/// A value of the key `users`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum User {
    /// `self`: the user that the service runs as.
    Me,
    /// `any`: every user with an id that [is known](Uid::is_known).
    Any,
    /// The user with this id.
    Id(Uid),
    /// The users from the first to the last of these ids.
    Range(Uid, Uid),
    /// A user by name, with the id that the user database gave when it was asked. `None`: the name was unknown, and the
    /// value matches no peer.
    Named(String, Option<Uid>),
    /// A text that stands for no user, and what is wrong with it: [`Policy::new`](crate::Policy::new) refuses the rule.
    Refused(String, String),
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

impl From<User> for Value {
    fn from(user: User) -> Self {
        match user {
            User::Me => Self::Me,
            User::Any => Self::Any,
            User::Id(uid) => Self::Id(uid.raw()),
            User::Range(low, high) => Self::Range(low.raw(), high.raw()),
            User::Named(name, uid) => Self::Named(Name::User(name), uid.map(Uid::raw)),
            User::Refused(text, problem) => Self::Refused(text, problem),
        }
    }
}

impl User {
    /// A value as a file has it.
    pub(crate) fn read(text: &str, look_up: &mut LookUp<'_>) -> Self {
        match (KEY.read)(&Given::Text(text), look_up) {
            Ok(Value::Me) => Self::Me,
            Ok(Value::Any) => Self::Any,
            Ok(Value::Id(id)) => Self::Id(Uid::new(id)),
            Ok(Value::Range(low, high)) => Self::Range(Uid::new(low), Uid::new(high)),
            Ok(Value::Named(name, id)) => Self::Named(name.as_str().to_owned(), id.map(Uid::new)),
            Ok(Value::Refused(text, problem)) => Self::Refused(text, problem),
            Ok(Value::Pattern(_)) => Self::Refused(text.to_owned(), KEY.expected.to_owned()),
            Err(problem) => Self::Refused(text.to_owned(), problem),
        }
    }
}

impl<T> Rule<T> {
    /// Only for these users (the effective uid). Called again, it adds.
    #[must_use]
    pub fn users<U: Into<User>>(self, users: impl IntoIterator<Item = U>) -> Self {
        self.with(&KEY, users.into_iter().map(|user| user.into().into()))
    }
}

/// Whether the uid is one of these, or in a deny rule subordinate to one of them.
#[derive(Debug)]
pub(in super::super) struct OneOf {
    listed: IdSet,
    subordinates: Option<Subordinates>,
}

/// Where some of the listed users have subordinate ids.
#[derive(Debug)]
struct Subordinates {
    /// The listed uids and these ids.
    all: IdSet,
    accounts: Arc<Accounts>,
}

impl OneOf {
    pub(in super::super) fn new(listed: IdSet) -> Self {
        Self { listed, subordinates: None }
    }

    fn and_subordinates(mut self, accounts: Option<&Arc<Accounts>>) -> Self {
        let Some(accounts) = accounts else { return self };
        let mut all = accounts.subordinates_of(&self.listed);
        if !all.is_empty() {
            all.unite(&self.listed);
            self.subordinates = Some(Subordinates { all, accounts: Arc::clone(accounts) });
        }
        self
    }

    fn all(&self) -> &IdSet {
        self.subordinates.as_ref().map_or(&self.listed, |subordinates| &subordinates.all)
    }
}

impl Test for OneOf {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        let uid = asked.subject.uid();
        if uid.is_known() { Answer::from(self.all().contains(uid.raw())) } else { Answer::Unknown }
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        let uid = asked.subject.uid();
        let by_itself = self.listed.contains(uid.raw());
        let accounts = self.subordinates.as_ref().filter(|_| !by_itself).map(|subordinates| &subordinates.accounts);
        let owner = accounts.and_then(|accounts| accounts.owner_among(uid, &self.listed));
        match (answer, owner) {
            (Answer::Yes, Some(owner)) => {
                format!("uid {uid} is a subordinate id of uid {owner} (/etc/subuid), which is among {listed}")
            }
            (Answer::Yes, None) => format!("uid {uid} is among {listed}"),
            (Answer::No, _) => format!("uid {uid} is not among {listed}"),
            (Answer::Unknown, _) => format!("uid {uid} names no user here"),
        }
    }

    fn ids(&self) -> Option<Ids<'_>> {
        Some(Ids::Uids(self.all()))
    }
}
