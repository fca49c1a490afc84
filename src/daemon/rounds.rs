//! Whose turn it is: a worker gives its time in rounds by user, however many connections a user has.
//!
//! Connections that are ready wait in a queue of their user. Users take turns by deficit round robin: each may use
//! `QUANTUM` of work in a round, and pays for its turns when they are over. A user that had nothing ready comes before the
//! ones that always have (as in fq_codel, RFC 8290): its line waits for the turn that is under way, not for the round.
//!
//! Work is counted, not timed: bytes that were moved, lines that were answered, and the turn itself, in units of about a
//! nanosecond. While several users have something to do, turns are small and the worker looks for events after each
//! [`Bounds::work`]. A user that is alone gets large turns, so that it pays nothing for the fairness.

use std::collections::{HashMap, VecDeque};

use peergate::ids::Uid;

use crate::protocol::{Interest, Ready};

/// What a turn costs by itself: its system calls.
const TURN: u64 = 1500;
/// What one line costs.
const LINE: u64 = 12;
/// How many moved bytes cost one unit.
const BYTES: u64 = 8;

/// What a user may use in a round.
const QUANTUM: i64 = 32_000;
/// The most that a user owes for turns before. More would be a penalty for turns that nobody else waited for.
const MOST_OWED: i64 = 2 * QUANTUM;
/// How much work without a turn of another user makes the user alone.
const ALONE: u64 = 10_000_000;

/// While several users have something to do.
const SHARED: Bounds = Bounds { lines: 2048, work: 24_000 };
/// While one user has: as many short turns as a worker hears of at once.
const UNSHARED: Bounds = Bounds { lines: 16 * 1024, work: 195_000 };

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The most lines that one turn answers.
    pub lines: usize,
    /// After so much work the worker looks for new events.
    pub work: u64,
}

/// What one turn may do, and what it has done.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// What it is called for.
    pub ready: Ready,
    /// The most lines that it answers.
    pub lines: usize,
    /// Bytes from the peer.
    pub received: usize,
    /// Bytes that the peer took.
    pub sent: usize,
    /// Whether a read filled its buffer: there may be more.
    pub has_more: bool,
    /// Whether the peer did not take everything.
    pub is_blocked: bool,
}

impl Share {
    /// A turn that answers up to so many lines.
    pub fn of(ready: Ready, lines: usize) -> Self {
        Self { ready, lines, received: 0, sent: 0, has_more: false, is_blocked: false }
    }

    /// A turn that is bounded only by how much it reads.
    pub fn whole(ready: Ready) -> Self {
        Self::of(ready, usize::MAX)
    }

    /// Whether it ended at its bounds, where the connection waits for this now.
    pub fn goes_on(&self, waits_for: Interest) -> bool {
        if waits_for == Interest::Write { self.sent > 0 && !self.is_blocked } else { self.has_more }
    }

    /// What it has cost, with so many lines answered.
    fn work(&self, answered: u64) -> u64 {
        TURN + (self.received + self.sent) as u64 / BYTES + answered.saturating_mul(LINE)
    }
}

/// The ready connections of a worker, by user.
#[derive(Debug, Default)]
pub struct Rounds {
    /// By the connection's place.
    places: Vec<Option<Place>>,
    users: Vec<User>,
    by_uid: HashMap<Uid, usize>,
    free: Vec<usize>,
    /// How many users have connections here.
    present: usize,
    /// Users that had nothing ready before. They come first.
    fresh: VecDeque<usize>,
    /// Users that have had a turn since they became ready, in the order of the round.
    served: VecDeque<usize>,
    /// How many connections wait.
    waiting: usize,
    /// All work so far, what it was at the last change of users, and the user since then.
    work: u64,
    changed: u64,
    last: usize,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its place among the users. Small, because each idle connection has one of these.
    user: u32,
    /// For what it waits for its turn, if it does.
    waits: Option<Ready>,
    /// Whether its last turn ended at its bounds, so that the next one need not be asked for.
    has_more: bool,
}

#[derive(Debug, Default)]
struct User {
    uid: Option<Uid>,
    /// How many connections are present.
    present: usize,
    /// The places of the connections that are ready. It keeps its room, and so is small.
    ready: VecDeque<u32>,
    /// What is left to it in this round; below zero, what it owes.
    credit: i64,
    is_listed: bool,
}

impl Rounds {
    /// A connection of this user takes a place.
    pub fn put(&mut self, slot: usize, owner: Uid) {
        let user = match self.by_uid.get(&owner) {
            Some(user) => *user,
            None => self.new_user(owner),
        };
        self.present += usize::from(self.users[user].present == 0);
        self.users[user].present += 1;
        if self.places.len() <= slot {
            self.places.resize(slot + 1, None);
        }
        self.places[slot] = Some(Place { user: small(user), waits: None, has_more: false });
    }

    fn new_user(&mut self, owner: Uid) -> usize {
        let user = self.free.pop().unwrap_or_else(|| {
            self.users.push(User::default());
            self.users.len() - 1
        });
        self.users[user].uid = Some(owner);
        self.by_uid.insert(owner, user);
        user
    }

    /// A connection leaves its place.
    pub fn take(&mut self, slot: usize) {
        let Some(place) = self.places.get_mut(slot).and_then(Option::take) else { return };
        let (user, waits) = (place.user as usize, place.waits);
        if waits.is_some() {
            self.users[user].ready.retain(|other| *other != small(slot));
            self.waiting -= 1;
        }
        self.users[user].present -= 1;
        self.present -= usize::from(self.users[user].present == 0);
        self.forget_if_gone(user);
    }

    fn forget_if_gone(&mut self, user: usize) {
        let gone = &mut self.users[user];
        if gone.present > 0 || gone.is_listed {
            return;
        }
        if let Some(uid) = gone.uid.take() {
            *gone = User::default();
            self.by_uid.remove(&uid);
            self.free.push(user);
        }
    }

    /// Something has happened on the connection in this place. False where it need not be told that: the connection waits
    /// for its next turn because the last one ended at its bounds.
    pub fn add(&mut self, slot: usize, ready: Ready) -> bool {
        let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) else { return true };
        if let Some(before) = &mut place.waits {
            *before = if *before == ready { ready } else { Ready::Any };
            return !place.has_more;
        }
        (place.waits, place.has_more) = (Some(ready), false);
        self.enqueue(slot);
        true
    }

    /// The turn of the connection in this place ended at its bounds: it gets another one.
    pub fn add_again(&mut self, slot: usize) {
        let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) else { return };
        place.has_more = true;
        if place.waits.replace(Ready::Any).is_none() {
            self.enqueue(slot);
        }
    }

    fn enqueue(&mut self, slot: usize) {
        let Some(Some(place)) = self.places.get(slot) else { return };
        self.waiting += 1;
        let number = place.user as usize;
        let user = &mut self.users[number];
        user.ready.push_back(small(slot));
        if !user.is_listed {
            (user.is_listed, user.credit) = (true, QUANTUM);
            self.fresh.push_back(number);
        }
    }

    /// Whether no connection is ready.
    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// The place of the connection whose turn it is, and what the turn is called for.
    pub fn next_turn(&mut self) -> Option<(usize, Ready)> {
        loop {
            let is_fresh = !self.fresh.is_empty();
            let list = if is_fresh { &mut self.fresh } else { &mut self.served };
            let front = *list.front()?;
            let user = &mut self.users[front];
            let has_credit = user.credit > 0;
            if has_credit {
                if let Some(slot) = user.ready.pop_front() {
                    let slot = slot as usize;
                    self.waiting -= 1;
                    let ready = self.places[slot].as_mut().and_then(|place| place.waits.take());
                    return Some((slot, ready.unwrap_or(Ready::Any)));
                }
            } else {
                user.credit += QUANTUM;
            }
            list.pop_front();
            // A user that has used up what it had waits for its next round, also where it has nothing ready just now:
            // it does not come first again by that.
            if !has_credit || is_fresh && !self.served.is_empty() {
                self.served.push_back(front);
            } else {
                self.users[front].is_listed = false;
                self.forget_if_gone(front);
            }
        }
    }

    /// How much may be done at once now.
    pub fn bounds(&self) -> Bounds {
        let is_shared = self.present > 1 && self.changed > 0 && self.work - self.changed < ALONE;
        if is_shared { SHARED } else { UNSHARED }
    }

    /// The connection in this place has had this share, and answered so many lines.
    pub fn charge(&mut self, slot: usize, share: &Share, answered: u64) {
        let Some(Some(place)) = self.places.get(slot) else { return };
        let work = share.work(answered);
        self.work += work;
        let number = place.user as usize;
        if number != self.last {
            (self.last, self.changed) = (number, self.work);
        }
        let user = &mut self.users[number];
        let work = i64::try_from(work).unwrap_or(i64::MAX);
        user.credit = user.credit.saturating_sub(work).max(-MOST_OWED);
    }

    /// All work so far.
    pub fn work(&self) -> u64 {
        self.work
    }
}

/// The number of a place in four bytes. There are not more places, and not more users, than descriptors.
fn small(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Ready = Ready::Peer;
    const SHARE: Share = Share { ready: PEER, lines: 0, received: 0, sent: 0, has_more: false, is_blocked: false };

    fn next(rounds: &mut Rounds) -> Option<usize> {
        rounds.next_turn().map(|(slot, _)| slot)
    }

    /// Gives turns until so much work is done. Each turn answers as many lines as it may, and its connection stays ready.
    fn stream(rounds: &mut Rounds, work: u64, turns: &mut HashMap<usize, u64>) {
        let until = rounds.work() + work;
        while rounds.work() < until {
            let (slot, _) = rounds.next_turn().unwrap();
            let lines = rounds.bounds().lines as u64;
            let before = rounds.work();
            rounds.charge(slot, &Share { received: 65_536, ..SHARE }, lines);
            *turns.entry(slot).or_default() += rounds.work() - before;
            rounds.add_again(slot);
        }
    }

    fn rounds(connections: &[(u32, usize)]) -> Rounds {
        let mut rounds = Rounds::default();
        let mut slot = 0;
        for (uid, number) in connections {
            for _ in 0..*number {
                rounds.put(slot, Uid::new(*uid));
                slot += 1;
            }
        }
        rounds
    }

    #[test]
    fn users_share_the_work_however_many_connections_each_has() {
        let mut rounds = rounds(&[(1, 64), (2, 1), (3, 5)]);
        (0..70).for_each(|slot| assert!(rounds.add(slot, PEER)));
        let mut turns = HashMap::new();
        stream(&mut rounds, 100_000_000, &mut turns);
        let of = |slots: std::ops::Range<usize>| slots.map(|slot| turns[&slot]).sum::<u64>();
        for share in [of(0..64), of(64..65), of(65..70)] {
            assert!(share.abs_diff(100_000_000 / 3) < 1_000_000, "{share}");
        }
        let (most, least) = ((0..64).map(|slot| turns[&slot]).max(), (0..64).map(|slot| turns[&slot]).min());
        assert!(most.unwrap() - least.unwrap() < 400_000, "connections of one user take turns too");
    }

    #[test]
    fn a_user_that_was_silent_waits_for_one_turn_and_not_for_the_round() {
        let mut rounds = rounds(&[(1, 64), (2, 64), (3, 64), (9, 1)]);
        (0..192).for_each(|slot| assert!(rounds.add(slot, PEER)));
        stream(&mut rounds, 10_000_000, &mut HashMap::new());
        for _ in 0..1000 {
            rounds.add(192, PEER);
            let first = next(&mut rounds);
            assert_eq!(first, Some(192));
            rounds.charge(192, &Share { received: 32, sent: 34, ..SHARE }, 1);
            stream(&mut rounds, 200_000, &mut HashMap::new());
        }
    }

    #[test]
    fn a_user_cannot_come_first_again_by_having_nothing_ready_for_a_moment() {
        let mut rounds = rounds(&[(1, 1), (2, 1)]);
        let mut turns = [0_u64; 2];
        for _ in 0..10_000 {
            // Each is ready again only after its turn, and the first always a little sooner.
            rounds.add(0, PEER);
            rounds.add(1, PEER);
            let (slot, _) = rounds.next_turn().unwrap();
            let before = rounds.work();
            rounds.charge(slot, &Share { received: 65_536, ..SHARE }, [2048, 200][slot]);
            turns[slot] += rounds.work() - before;
        }
        assert!(turns[0].abs_diff(turns[1]) < turns[0] / 50, "{turns:?}");
    }

    #[test]
    fn a_user_alone_has_large_turns_and_small_ones_while_another_is_heard() {
        let mut rounds = rounds(&[(1, 2), (2, 1)]);
        rounds.add(0, PEER);
        assert_eq!(rounds.bounds(), UNSHARED);
        stream(&mut rounds, 1_000_000, &mut HashMap::new());
        assert_eq!(rounds.bounds(), UNSHARED, "the other has said nothing");
        rounds.add(2, PEER);
        assert_eq!(next(&mut rounds), Some(2));
        rounds.charge(2, &SHARE, 1);
        assert_eq!(rounds.bounds(), SHARED);
        stream(&mut rounds, ALONE - QUANTUM as u64, &mut HashMap::new());
        assert_eq!(rounds.bounds(), SHARED);
        stream(&mut rounds, 2 * QUANTUM as u64, &mut HashMap::new());
        assert_eq!(rounds.bounds(), UNSHARED);
        rounds.add(2, PEER);
        assert_eq!(next(&mut rounds), Some(2));
        rounds.charge(2, &SHARE, 1);
        rounds.take(2);
        assert_eq!(rounds.bounds(), UNSHARED, "there is no other");
    }

    #[test]
    fn what_leaves_its_place_gets_no_turn_and_leaves_nothing_behind() {
        let mut rounds = rounds(&[(1, 3), (2, 1)]);
        (0..4).for_each(|slot| assert!(rounds.add(slot, PEER)));
        rounds.add(1, PEER);
        rounds.take(1);
        rounds.take(3);
        assert_eq!([0; 3].map(|_| next(&mut rounds)), [Some(0), Some(2), None]);
        assert!(rounds.is_empty());
        rounds.put(1, Uid::new(3));
        rounds.add(1, PEER);
        assert_eq!([0; 2].map(|_| next(&mut rounds)), [Some(1), None]);
        (0..3).for_each(|slot| rounds.take(slot));
        assert!(rounds.by_uid.is_empty() && rounds.users.len() <= 3 && rounds.free.len() == rounds.users.len());
    }
}
