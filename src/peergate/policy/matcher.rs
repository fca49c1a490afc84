//! Whether a rule's keys hold for a subject, in three-valued logic. Used by [`policy`](super) alone.

use std::cell::OnceCell;

use super::condition::{Ids, Test};
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
    pub(super) fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// A rule's conditions, with everything resolved that can be before a subject is there.
#[derive(Debug)]
pub(super) struct Matcher {
    deny: bool,
    /// One for each key; the tests that need the process come last.
    tests: Vec<Box<dyn Test>>,
}

/// A subject that is asked for its units at most once, and only when a rule depends on them.
pub(super) struct Asked<'s> {
    pub(super) subject: &'s dyn Subject,
    units: OnceCell<Option<&'s Units>>,
}

impl<'s> Asked<'s> {
    pub(super) fn new(subject: &'s dyn Subject) -> Self {
        Self { subject, units: OnceCell::new() }
    }

    pub(super) fn units(&self) -> Option<&'s Units> {
        *self.units.get_or_init(|| self.subject.units())
    }

    /// Whether every group of the subject is listed and has a known id.
    pub(super) fn groups_are_known(&self) -> bool {
        self.subject.gids_complete() && self.subject.gids().iter().copied().all(Gid::is_known)
    }
}

impl Matcher {
    pub(super) fn new(deny: bool, tests: Vec<Box<dyn Test>>) -> Self {
        Self { deny, tests }
    }

    /// Whether the rule takes the decision: an allow rule if it holds, a deny rule also if that cannot be told.
    pub(super) fn matches(&self, asked: &Asked<'_>) -> bool {
        self.decides(self.answer(&self.tests, asked))
    }

    /// Whether the tests that need the process can still change what the rule does.
    pub(super) fn asks_process(&self, asked: &Asked<'_>) -> bool {
        let first = self.tests.partition_point(|test| !test.needs_process());
        self.decides(self.answer(&self.tests[..first], asked))
    }

    /// What these tests say together. Once the rule cannot match any more, the rest are not asked.
    fn answer(&self, tests: &[Box<dyn Test>], asked: &Asked<'_>) -> Answer {
        let mut answer = self.of_any(asked);
        for test in tests {
            if !self.decides(answer) {
                break;
            }
            answer = answer.min(test.answer(asked));
        }
        answer
    }

    /// The answer without any key. An allow rule admits no uid that is unknown, whatever its keys are.
    pub(super) fn of_any(&self, asked: &Asked<'_>) -> Answer {
        if self.deny || asked.subject.uid().is_known() { Answer::Yes } else { Answer::Unknown }
    }

    fn decides(&self, answer: Answer) -> bool {
        answer == Answer::Yes || self.deny && answer == Answer::Unknown
    }

    pub(super) fn tests(&self) -> &[Box<dyn Test>] {
        &self.tests
    }

    /// Whether a single key is all that the rule has.
    pub(super) fn is_one_key(&self) -> bool {
        self.tests.len() == 1
    }

    pub(super) fn needs_process(&self) -> bool {
        self.tests.last().is_some_and(|test| test.needs_process())
    }

    pub(super) fn needs_groups(&self) -> bool {
        self.gids().is_some()
    }

    /// For each key that lists ids: the ids of which a subject must have one.
    pub(super) fn ids(&self) -> impl Iterator<Item = Ids<'_>> {
        self.tests.iter().filter_map(|test| test.ids())
    }

    /// The ids of which one is all that the rule depends on.
    pub(super) fn only_ids(&self) -> Option<Ids<'_>> {
        self.ids().next().filter(|_| self.is_one_key())
    }

    /// Whether a key lists no id at all.
    pub(super) fn is_empty(&self) -> bool {
        self.ids().any(|ids| ids.size() == 0)
    }

    /// The groups of which one is enough for a key.
    pub(super) fn gids(&self) -> Option<&IdSet> {
        self.ids().find_map(Ids::gids)
    }
}
