//! The key `groups`: the effective gid and the supplementary groups.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::super::explain::list;
use super::super::matcher::{Answer, Asked};
use super::super::set::IdSet;
use super::super::{Accounts, Rule};
use super::{Given, Ids, Key, LookUp, Name, Test, Value, id};
use crate::ids::{Gid, Uid};

pub(crate) static KEY: Key = Key {
    name: "groups",
    one: "group",
    expected: "expected a group's name, an id, a range such as \"2000-2999\", or \"any\"",
    example: "[\"adm\", 1001, \"2000-2999\"]",
    companion: None,
    alone: None,
    read: |given, look_up| match given {
        Given::Text("self") => Err(format!("\"self\" in `groups`, where it means nothing; {}", KEY.expected)),
        given => id::read(&KEY, given, Name::Group, look_up),
    },
    test: |values, known| Ok(Box::new(AnyOf::new(id::set(values, known.me)?).and_members(known.accounts))),
};

/// A value of the key `groups`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Group {
    /// `any`: every group with an id that [is known](Gid::is_known).
    Any,
    /// The group with this id.
    Id(Gid),
    /// The groups from the first to the last of these ids.
    Range(Gid, Gid),
    /// A group by name, with the id that the user database gave when it was asked. `None`: the name was unknown, and the
    /// value matches no peer.
    Named(String, Option<Gid>),
    /// A text that stands for no group, and what is wrong with it: [`Policy::new`](crate::Policy::new) refuses the rule.
    Refused(String, String),
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

impl From<Group> for Value {
    fn from(group: Group) -> Self {
        match group {
            Group::Any => Self::Any,
            Group::Id(gid) => Self::Id(gid.raw()),
            Group::Range(low, high) => Self::Range(low.raw(), high.raw()),
            Group::Named(name, gid) => Self::Named(Name::Group(name), gid.map(Gid::raw)),
            Group::Refused(text, problem) => Self::Refused(text, problem),
        }
    }
}

impl Group {
    /// A value as a file has it.
    pub(crate) fn read(text: &str, look_up: &mut LookUp<'_>) -> Self {
        match (KEY.read)(&Given::Text(text), look_up) {
            Ok(Value::Any) => Self::Any,
            Ok(Value::Id(id)) => Self::Id(Gid::new(id)),
            Ok(Value::Range(low, high)) => Self::Range(Gid::new(low), Gid::new(high)),
            Ok(Value::Named(name, id)) => Self::Named(name.as_str().to_owned(), id.map(Gid::new)),
            Ok(Value::Refused(text, problem)) => Self::Refused(text, problem),
            Ok(Value::Me | Value::Pattern(_)) => Self::Refused(text.to_owned(), KEY.expected.to_owned()),
            Err(problem) => Self::Refused(text.to_owned(), problem),
        }
    }
}

impl<T> Rule<T> {
    /// Only for members of one of these groups (the effective gid or a supplementary one). Called again, it adds.
    #[must_use]
    pub fn groups<G: Into<Group>>(self, groups: impl IntoIterator<Item = G>) -> Self {
        self.with(&KEY, groups.into_iter().map(|group| group.into().into()))
    }
}

/// Whether one of the gids is one of these; or in a deny rule, whether the user database lists the user, or the owner of
/// the subordinate id, in one of these groups. A peer can shed its groups, unshare(1) and setpriv(1) show how.
#[derive(Debug)]
pub(in super::super) struct AnyOf {
    listed: IdSet,
    members: Option<Members>,
}

/// Where the user database lists members of these groups.
#[derive(Debug)]
struct Members {
    users: IdSet,
    /// These users and their subordinate ids.
    all: IdSet,
    accounts: Arc<Accounts>,
}

impl AnyOf {
    pub(in super::super) fn new(listed: IdSet) -> Self {
        Self { listed, members: None }
    }

    fn and_members(mut self, accounts: Option<&Arc<Accounts>>) -> Self {
        let Some(accounts) = accounts else { return self };
        let users = accounts.members_of(&self.listed);
        if !users.is_empty() {
            let mut all = accounts.subordinates_of(&users);
            all.unite(&users);
            self.members = Some(Members { users, all, accounts: Arc::clone(accounts) });
        }
        self
    }
}

impl Test for AnyOf {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        let uid = asked.subject.uid();
        let is_member = self.members.as_ref().is_some_and(|members| members.all.contains(uid.raw()));
        if is_member || asked.subject.gids().iter().any(|gid| self.listed.contains(gid.raw())) {
            Answer::Yes
        } else if asked.groups_are_known() && (self.members.is_none() || uid.is_known()) {
            Answer::No
        } else {
            Answer::Unknown
        }
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        let gids = asked.subject.gids();
        let shown = gids.iter().find(|gid| self.listed.contains(gid.raw()));
        match (answer, shown) {
            (Answer::Yes, Some(gid)) => format!("gid {gid} is among {listed}"),
            (Answer::Yes, None) => self.why_member(asked.subject.uid(), listed),
            (Answer::Unknown, _) if !asked.subject.gids_complete() => "the list of groups cannot be told".to_owned(),
            (Answer::Unknown, _) if !asked.groups_are_known() => "one of the gids names no group here".to_owned(),
            (Answer::Unknown, _) => format!("uid {} names no user here", asked.subject.uid()),
            _ => {
                let gids: Vec<String> = gids.iter().map(Gid::to_string).collect();
                format!("no gid of {} is among {listed}", list(&gids))
            }
        }
    }

    fn ids(&self) -> Option<Ids<'_>> {
        Some(match &self.members {
            Some(members) => Ids::Either(&members.all, &self.listed),
            None => Ids::Gids(&self.listed),
        })
    }
}

impl AnyOf {
    /// Why a peer counts as a member that shows none of the groups.
    fn why_member(&self, uid: Uid, listed: &str) -> String {
        let Some(Members { users, accounts, .. }) = &self.members else { return String::new() };
        let owner = if users.contains(uid.raw()) { None } else { accounts.owner_among(uid, users) };
        let whose = match owner {
            Some(owner) => format!("uid {uid} is a subordinate id of uid {owner} (/etc/subuid), which"),
            None => format!("uid {uid}"),
        };
        let group = accounts.group_of(owner.unwrap_or(uid), &self.listed);
        let group = group.map_or_else(|| "a group".to_owned(), |gid| format!("group {gid}"));
        format!("{whose} is a member of {group} by the user database, among {listed}")
    }
}
