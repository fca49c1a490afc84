//! Connections that were accepted and not yet judged, in a queue for each user.
//!
//! The kernel keeps one queue for each listener, in the order of arrival. A user that connects without end would make every
//! other user wait behind its connections. So the gate empties the kernel's queue first, which costs less than to judge, and
//! judges one connection of each user in turn. What a user has waiting then delays only that user.
//!
//! How many wait is bounded for each user and in all. Beyond a bound the oldest connection of the user with too many is
//! judged out of turn, before the next one is accepted.

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

impl<A> Arrivals<A> {
    /// No connection waits, and never more than `most`.
    pub(super) fn new(most: usize) -> Self {
        Self { users: VecDeque::new(), waiting: 0, most }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Lets a connection of `uid` wait for its turn. Returns the connection that may wait no longer: of a user with more than
    /// `per_user` its oldest, or of the user with the most where too many wait in all.
    pub(super) fn push(&mut self, uid: Uid, arrival: A, per_user: usize) -> Option<A> {
        let place = self.users.iter().position(|user| user.uid == uid).unwrap_or_else(|| {
            self.users.push_back(OfUser { uid, queue: VecDeque::new() });
            self.users.len() - 1
        });
        let user = &mut self.users[place];
        user.queue.push_back(arrival);
        self.waiting += 1;
        if user.queue.len() > per_user {
            return self.take_oldest(place);
        }
        if self.waiting <= self.most {
            return None;
        }
        let place = (0..self.users.len()).max_by_key(|place| self.users[*place].queue.len())?;
        self.take_oldest(place)
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
    fn beyond_the_bound_the_users_own_oldest_connection_makes_room() {
        let mut arrivals = Arrivals::new(1000);
        arrivals.push(BOB, 0, 3);
        let removed: Vec<_> = (1..=5).map(|number| arrivals.push(ALICE, number, 3)).collect();
        assert_eq!(removed, [None, None, None, Some(1), Some(2)]);
        assert_eq!(order(&mut arrivals), [0, 3, 4, 5]);
        assert_eq!(arrivals.push(ALICE, 6, 0), Some(6), "where none may wait, each is judged at once");
        assert!(arrivals.is_empty() && arrivals.users.is_empty());
    }

    #[test]
    fn beyond_the_bound_for_all_the_user_with_the_most_makes_room() {
        let mut arrivals = Arrivals::new(4);
        (0..4).for_each(|number| assert_eq!(arrivals.push(ALICE, number, 100), None));
        assert_eq!(arrivals.push(BOB, 10, 100), Some(0));
        assert_eq!(arrivals.push(BOB, 11, 100), Some(1));
        assert_eq!(arrivals.push(BOB, 12, 100), Some(10), "now its own");
        assert_eq!(arrivals.push(ALICE, 4, 100), Some(2));
        assert_eq!((arrivals.waiting, arrivals.users.len()), (4, 2));
    }
}
