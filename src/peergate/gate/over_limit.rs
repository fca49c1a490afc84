//! Connections over a limit, which wait a moment for a place.
//!
//! A client that closes one connection and opens the next must not be refused because the gate has seen the second event
//! before a worker has seen the first. So a connection over a limit is judged again each millisecond for 20 ms, and refused
//! only then.

use std::time::{Duration, Instant};

use super::Arrival;
use crate::ids::Uid;

/// How long a connection waits at most.
pub(super) const PATIENCE: Duration = Duration::from_millis(20);
/// How often the limits are checked again. Not at every turn: each check asks as much of the kernel as a new arrival.
const BETWEEN_CHECKS: Duration = Duration::from_millis(1);
/// How many connections wait at once. When all places are taken, the user with the most waiting connections makes room.
pub(super) const MOST_WAITING: usize = 64;

/// The connections that wait, in the order in which they came.
pub(super) struct OverLimit {
    waiting: Vec<Waiting>,
    checked: Instant,
}

pub(super) struct Waiting {
    pub arrival: Arrival,
    /// The user, by whom places are shared out: the owner of a subordinate id.
    pub uid: Uid,
    pub since: Instant,
}

impl Waiting {
    pub(super) fn may_go_on_waiting(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < PATIENCE
    }
}

impl OverLimit {
    pub(super) fn new() -> Self {
        Self { waiting: Vec::new(), checked: Instant::now() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// When the limits are to be checked next.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.is_empty()).then(|| self.checked + BETWEEN_CHECKS)
    }

    /// All that wait, if it is time to check the limits again.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Waiting> {
        if self.due().is_none_or(|due| due > now) {
            return Vec::new();
        }
        self.checked = now;
        std::mem::take(&mut self.waiting)
    }

    /// Lets a connection wait. Returns the one that makes room for it, which may be itself.
    pub(super) fn push(&mut self, one: Waiting) -> Option<Waiting> {
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push(one);
            return None;
        }
        let users: Vec<Uid> = self.waiting.iter().map(|one| one.uid).collect();
        let Some(place) = place_to_free(&users, one.uid) else { return Some(one) };
        let removed = self.waiting.remove(place);
        self.waiting.push(one);
        Some(removed)
    }

    pub(super) fn take_all(&mut self) -> Vec<Waiting> {
        std::mem::take(&mut self.waiting)
    }
}

/// Which of the waiting connections goes when one more of `uid` comes: the oldest of the user with the most, so that one
/// user's flood takes no place from another's connection. `None` where that user would not be left with as many as `uid`.
fn place_to_free(waiting: &[Uid], uid: Uid) -> Option<usize> {
    let places_of = |uid: Uid| waiting.iter().filter(|one| **one == uid).count();
    // The oldest of several equals: max_by_key alone would give the youngest.
    let (place, most) =
        waiting.iter().map(|one| places_of(*one)).enumerate().rev().max_by_key(|(_, places)| *places)?;
    (most > places_of(uid) + 1).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_users_flood_takes_no_waiting_place_from_another_user() {
        let (a, b) = (Uid::new(1000), Uid::new(1001));
        let mut waiting = vec![a; MOST_WAITING];
        assert_eq!(place_to_free(&waiting, a), None, "not for itself");
        // Each other user finds a place and keeps it.
        for other in (2000..2000 + MOST_WAITING as u32 - 1).map(Uid::new) {
            let place = place_to_free(&waiting, other).unwrap();
            assert_eq!(waiting.remove(place), a);
            waiting.push(other);
            let again = place_to_free(&waiting, a);
            assert_eq!(again, None, "the flood goes on");
        }
        assert_eq!(place_to_free(&waiting, b), None, "one place for each user is all there is");
        // The connection that has waited longest goes.
        assert_eq!(place_to_free(&[b, a, a, b, a], b), None);
        assert_eq!(place_to_free(&[b, a, a, a], b), Some(1));
    }
}
