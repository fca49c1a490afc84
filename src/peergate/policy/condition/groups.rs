//! The key `groups`: the effective gid and the supplementary groups.

use std::ops::RangeInclusive;

use super::super::Rule;
use super::super::explain::list;
use super::super::matcher::{Answer, Asked};
use super::super::set::IdSet;
use super::{Given, Ids, Key, Name, Test, Value, id};
use crate::ids::Gid;

pub(crate) static KEY: Key = Key {
    name: "groups",
    one: "group",
    expected: "expected a group's name, an id, a range such as \"2000-2999\", or \"any\"",
    example: "[\"adm\", 1001, \"2000-2999\"]",
    companion: None,
    read: |given, look_up| match given {
        Given::Text("self") => Err(format!("\"self\" in `groups`, where it means nothing; {}", KEY.expected)),
        given => id::read(&KEY, given, Name::Group, look_up),
    },
    test: |values, me| Ok(Box::new(AnyOf(id::set(values, me)?))),
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

/// Whether one of the gids is one of these.
#[derive(Debug)]
pub(in super::super) struct AnyOf(pub(in super::super) IdSet);

impl Test for AnyOf {
    fn answer(&self, asked: &Asked<'_>) -> Answer {
        if asked.subject.gids().iter().any(|gid| self.0.contains(gid.raw())) {
            Answer::Yes
        } else if asked.groups_are_known() {
            Answer::No
        } else {
            Answer::Unknown
        }
    }

    fn why(&self, answer: Answer, asked: &Asked<'_>, listed: &str) -> String {
        let gids = asked.subject.gids();
        let member = gids.iter().find(|gid| self.0.contains(gid.raw()));
        match (answer, member) {
            (Answer::Yes, Some(gid)) => format!("gid {gid} is among {listed}"),
            (Answer::Unknown, _) if !asked.subject.gids_complete() => "the list of groups cannot be told".to_owned(),
            (Answer::Unknown, _) => "one of the gids names no group here".to_owned(),
            _ => {
                let gids: Vec<String> = gids.iter().map(Gid::to_string).collect();
                format!("no gid of {} is among {listed}", list(&gids))
            }
        }
    }

    fn ids(&self) -> Option<Ids<'_>> {
        Some(Ids::Gids(&self.0))
    }
}
