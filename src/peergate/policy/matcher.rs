//! Whether a rule's keys hold for a subject, in three-valued logic. Used by [`policy`](super) alone.

use std::cell::OnceCell;

use super::glob::Glob;
use super::set::IdSet;
use crate::Subject;
use crate::ids::Gid;
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
    /// Never without `users`.
    pub(super) user_units: Option<Vec<Glob>>,
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
        let (units, user_units) = (self.units.is_some(), self.user_units.is_some());
        [self.users.is_some(), self.groups.is_some(), units, user_units].into_iter().filter(|has| *has).count() == 1
    }

    /// Whether the rule takes the decision: an allow rule if it holds, a deny rule also if that cannot be told.
    pub(super) fn matches(&self, asked: &Asked<'_>) -> bool {
        let ids = self.ids(asked.who);
        let answer = if self.depends_on_unit(ids) {
            let units = self.unit(asked).unwrap_or(Answer::Yes);
            ids.min(units).min(self.user_unit(asked).unwrap_or(Answer::Yes))
        } else {
            ids
        };
        self.decides(answer)
    }

    pub(super) fn decides(&self, answer: Answer) -> bool {
        answer == Answer::Yes || self.deny && answer == Answer::Unknown
    }

    /// Whether the rule has a key about units.
    pub(super) fn has_units(&self) -> bool {
        self.units.is_some() || self.user_units.is_some()
    }

    /// Whether the unit can still change what the rule does, when its other keys gave `ids`.
    pub(super) fn depends_on_unit(&self, ids: Answer) -> bool {
        self.has_units() && self.decides(ids)
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
    pub(super) fn unit(&self, asked: &Asked<'_>) -> Option<Answer> {
        let patterns = self.units.as_ref()?;
        let Some(units) = asked.units() else { return Some(Answer::Unknown) };
        Some(Answer::from(any_fits(patterns, units.system())))
    }

    /// What the key `user-units` says; `None` where the rule has none. A user chooses the names of their own units, so
    /// these say something only about that user's own processes.
    pub(super) fn user_unit(&self, asked: &Asked<'_>) -> Option<Answer> {
        let patterns = self.user_units.as_ref()?;
        let Some(units) = asked.units() else { return Some(Answer::Unknown) };
        let uid = asked.who.uid();
        Some(match units.user() {
            Some((_, names)) if !any_fits(patterns, names) => Answer::No,
            Some(_) if !uid.is_known() => Answer::Unknown,
            Some((owner, _)) => Answer::from(owner == uid),
            None => Answer::No,
        })
    }
}

/// Whether one of the patterns fits one of the names.
pub(super) fn any_fits(patterns: &[Glob], names: &[String]) -> bool {
    names.iter().any(|name| patterns.iter().any(|pattern| pattern.matches(name)))
}

/// Whether every group of the subject is there and names somebody.
pub(super) fn groups_are_known(who: &dyn Subject) -> bool {
    who.gids_complete() && who.gids().iter().copied().all(Gid::is_known)
}
