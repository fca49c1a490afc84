//! Whether a rule's keys hold for a subject, in three-valued logic. Used by [`policy`](super) alone.

use std::cell::OnceCell;

use super::glob::Glob;
use super::set::IdSet;
use crate::ids::{Gid, Uid};
use crate::subject::Subject;
use crate::unit::Units;

/// Whether a condition holds. The order makes the minimum Kleene's "and".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Answer {
    /// It does not hold.
    No,
    /// It cannot be told: the kernel does not vouch for what it depends on.
    Unknown,
    /// It holds.
    Yes,
}

impl Answer {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// A rule's conditions, with everything resolved that can be before a subject is there.
#[derive(Debug)]
pub(super) struct Matcher {
    pub(super) deny: bool,
    pub(super) users: Option<IdSet>,
    pub(super) groups: Option<IdSet>,
    pub(super) units: Option<Vec<Glob>>,
}

/// A subject that is asked for its units at most once, and only when a rule depends on them.
pub(super) struct Asked<'s> {
    pub(super) who: &'s dyn Subject,
    units: OnceCell<Option<&'s Units>>,
}

impl<'s> Asked<'s> {
    pub(super) fn new(who: &'s dyn Subject) -> Self {
        Self { who, units: OnceCell::new() }
    }

    pub(super) fn units(&self) -> Option<&'s Units> {
        *self.units.get_or_init(|| self.who.units())
    }
}

impl Matcher {
    /// Whether a single key is all that the rule has.
    pub(super) fn is_one_key(&self) -> bool {
        usize::from(self.users.is_some()) + usize::from(self.groups.is_some()) + usize::from(self.units.is_some()) == 1
    }

    /// Whether the rule takes the decision: an allow rule if it holds, a deny rule also if that cannot be told.
    pub(super) fn matches(&self, asked: &Asked<'_>, me: Uid) -> bool {
        let ids = self.ids(asked.who);
        let answer = if self.depends_on_unit(ids) { ids.min(self.unit(asked, me).unwrap_or(Answer::Yes)) } else { ids };
        self.decides(answer)
    }

    pub(super) fn decides(&self, answer: Answer) -> bool {
        answer == Answer::Yes || self.deny && answer == Answer::Unknown
    }

    /// Whether the unit can still change what the rule does, when its other keys gave `ids`.
    pub(super) fn depends_on_unit(&self, ids: Answer) -> bool {
        self.units.is_some() && self.decides(ids)
    }

    /// What the keys `users` and `groups` say together. An allow rule without `users` admits every user, but nobody
    /// without a name: a uid that stands for all whom this namespace cannot tell apart.
    pub(super) fn ids(&self, who: &dyn Subject) -> Answer {
        let anyone = if self.deny || who.uid().is_known() { Answer::Yes } else { Answer::Unknown };
        let user = self.user(who).unwrap_or(anyone);
        if user == Answer::No { user } else { user.min(self.group(who).unwrap_or(Answer::Yes)) }
    }

    /// What the key `users` says; `None` where the rule has none.
    pub(super) fn user(&self, who: &dyn Subject) -> Option<Answer> {
        let users = self.users.as_ref()?;
        let uid = who.uid();
        Some(if uid.is_known() { Answer::from(users.contains(uid.raw())) } else { Answer::Unknown })
    }

    /// What the key `groups` says; `None` where the rule has none.
    pub(super) fn group(&self, who: &dyn Subject) -> Option<Answer> {
        let groups = self.groups.as_ref()?;
        Some(if who.gids().iter().any(|gid| groups.contains(gid.raw())) {
            Answer::Yes
        } else if groups_are_known(who) {
            Answer::No
        } else {
            Answer::Unknown
        })
    }

    /// What the key `units` says; `None` where the rule has none.
    pub(super) fn unit(&self, asked: &Asked<'_>, me: Uid) -> Option<Answer> {
        let patterns = self.units.as_ref()?;
        let Some(units) = asked.units() else { return Some(Answer::Unknown) };
        let mut names = units.system().iter().chain(self.counted(units, asked.who.uid(), me));
        Some(Answer::from(names.any(|name| patterns.iter().any(|pattern| pattern.matches(name)))))
    }

    /// The names of a user's own units, as far as they count for this rule. That user chose them, so they say
    /// something only about that user's own processes, and only in a rule that also says which users.
    pub(super) fn counted<'u>(&self, units: &'u Units, uid: Uid, me: Uid) -> &'u [String] {
        match units.user() {
            Some((owner, names)) if owner.is_known() && (owner == me || self.users.is_some() && owner == uid) => names,
            _ => &[],
        }
    }
}

/// Whether every group of the subject is there and names somebody.
pub(super) fn groups_are_known(who: &dyn Subject) -> bool {
    who.gids_complete() && who.gids().iter().copied().all(Gid::is_known)
}
