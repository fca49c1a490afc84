//! Connections that were accepted and not yet judged, in a queue for each user.
//!
//! The kernel keeps one queue for each listener, in the order of arrival. A user that connects without end would make every
//! other user wait behind its connections. So the gate empties the kernel's queue first, which costs less than to judge, and
//! judges one connection of each user in turn. What a user has waiting then delays only that user.
//!
//! How many wait is bounded for each user and in all. A connection beyond its user's bound is turned away at once: it is not
//! admitted, whatever the policy says. Where too many wait in all, the oldest of the user with the most is judged out of turn,
//! and nothing is turned away: a restart must lose no connection, and its backlog can hold thousands.

use std::collections::VecDeque;

use crate::ids::Uid;

/// How many connections wait at most, of all users together.
pub(super) const MOST_WAITING: usize = 1024;

/// The connections that wait. Generic, so that a test can count them without sockets.
pub(super) struct Arrivals<A> {
    /// The users with waiting connections. The next turn is that of the user in front.
    users: VecDeque<OfUser<A>>,
    waiting: usize,
    most: usize,
}

struct OfUser<A> {
    uid: Uid,
    /// Never empty.
    queue: VecDeque<A>,
}

/// What may not wait, where a bound is reached.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Excess<A> {
    /// The connection that just came: as many of its user wait as may.
    OfUser(A),
    /// The oldest of the user with the most, because too many wait in all.
    OfAll(A),
}

impl<A> Arrivals<A> {
    /// No connection waits, and never more than `most`.
    pub(super) fn new(most: usize) -> Self {
        Self { users: VecDeque::new(), waiting: 0, most }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Lets a connection of `uid` wait for its turn, as one of at most `per_user` (at least one). Returns what may not wait.
    /// A bound for the user that is not below the one for all has no effect.
    pub(super) fn push(&mut self, uid: Uid, arrival: A, per_user: usize) -> Option<Excess<A>> {
        let place = self.users.iter().position(|user| user.uid == uid).unwrap_or_else(|| {
            self.users.push_back(OfUser { uid, queue: VecDeque::new() });
            self.users.len() - 1
        });
        let user = &mut self.users[place];
        if per_user < self.most && user.queue.len() >= per_user.max(1) {
            return Some(Excess::OfUser(arrival));
        }
        user.queue.push_back(arrival);
        self.waiting += 1;
        if self.waiting <= self.most {
            return None;
        }
        let place = (0..self.users.len()).max_by_key(|place| self.users[*place].queue.len())?;
        self.take_oldest(place).map(Excess::OfAll)
    }

    /// Takes out the next connection to be judged. The next one of its user comes after one of each other user.
    pub(super) fn next(&mut self) -> Option<A> {
        let mut user = self.users.pop_front()?;
        let next = user.queue.pop_front()?;
        self.waiting -= 1;
        if !user.queue.is_empty() {
            self.users.push_back(user);
        }
        Some(next)
    }

    /// The oldest connection of one user.
    fn take_oldest(&mut self, place: usize) -> Option<A> {
        let user = self.users.get_mut(place)?;
        let oldest = user.queue.pop_front()?;
        self.waiting -= 1;
        if user.queue.is_empty() {
            self.users.remove(place);
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Uid = Uid::new(1000);
    const BOB: Uid = Uid::new(1001);

    /// Everything that waits, in the order in which it is judged.
    fn order<A>(arrivals: &mut Arrivals<A>) -> Vec<A> {
        std::iter::from_fn(|| arrivals.next()).collect()
    }

    #[test]
    fn users_take_turns_however_many_connections_each_has_waiting() {
        let mut arrivals = Arrivals::new(1000);
        let flood = (0..100).map(|number| (ALICE, number));
        for (uid, number) in flood.chain([(BOB, 100), (BOB, 101), (Uid::new(1002), 102)]) {
            assert_eq!(arrivals.push(uid, number, 100), None);
        }
        let order = order(&mut arrivals);
        assert_eq!(order[..6], [0, 100, 102, 1, 101, 2]);
        assert_eq!(order[6..], (3..100).collect::<Vec<_>>(), "and each user's own in the order in which they came");
        assert!(arrivals.is_empty() && arrivals.users.is_empty());
    }

    #[test]
    fn a_newcomer_waits_for_one_connection_of_each_user_at_most() {
        let mut arrivals = Arrivals::new(1000);
        let attackers = (0..16).map(Uid::new);
        for number in 0..10 {
            attackers.clone().for_each(|uid| assert_eq!(arrivals.push(uid, (uid, number), 100), None));
        }
        (0..23).for_each(|_| _ = arrivals.next());
        arrivals.push(BOB, (BOB, 0), 100);
        let before = std::iter::from_fn(|| arrivals.next()).position(|(uid, _)| uid == BOB);
        assert_eq!(before, Some(16));
    }

    #[test]
    fn beyond_a_users_bound_its_next_connection_may_not_wait() {
        let mut arrivals = Arrivals::new(1000);
        arrivals.push(BOB, 0, 3);
        let excess: Vec<_> = (1..=5).map(|number| arrivals.push(ALICE, number, 3)).collect();
        assert_eq!(excess, [None, None, None, Some(Excess::OfUser(4)), Some(Excess::OfUser(5))]);
        assert_eq!(order(&mut arrivals), [0, 1, 2, 3]);
        assert_eq!(arrivals.push(ALICE, 6, 0), None, "one may always wait");
        assert_eq!(arrivals.push(ALICE, 7, 0), Some(Excess::OfUser(7)));
        assert_eq!(order(&mut arrivals), [6]);
        assert!(arrivals.is_empty() && arrivals.users.is_empty());
    }

    #[test]
    fn beyond_the_bound_for_all_the_user_with_the_most_makes_room() {
        let mut arrivals = Arrivals::new(4);
        (0..4).for_each(|number| assert_eq!(arrivals.push(ALICE, number, 100), None));
        assert_eq!(arrivals.push(BOB, 10, 100), Some(Excess::OfAll(0)));
        assert_eq!(arrivals.push(BOB, 11, 100), Some(Excess::OfAll(1)));
        assert_eq!(arrivals.push(BOB, 12, 100), Some(Excess::OfAll(10)), "now its own");
        assert_eq!(arrivals.push(ALICE, 4, 100), Some(Excess::OfAll(2)));
        assert_eq!((arrivals.waiting, arrivals.users.len()), (4, 2));
    }

    #[test]
    fn a_users_bound_as_high_as_that_for_all_turns_nothing_away() {
        let mut arrivals = Arrivals::new(4);
        (0..4).for_each(|number| assert_eq!(arrivals.push(ALICE, number, 4), None));
        assert_eq!(arrivals.push(ALICE, 4, 4), Some(Excess::OfAll(0)));
        assert_eq!(arrivals.push(ALICE, 5, 3), Some(Excess::OfUser(5)));
        assert_eq!(order(&mut arrivals), [1, 2, 3, 4]);
    }
}
