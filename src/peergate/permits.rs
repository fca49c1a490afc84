//! How many connections each user holds. A [`Permit`] gives its place back when it is dropped, on any thread. So the count
//! is always the number of permits alive.
//!
//! ```
//! use peergate::permits::LimitExceeded;
//! use peergate::{Limits, Permits, Uid};
//!
//! let (permits, alice, bob) = (Permits::new(), Uid::new(1000), Uid::new(1001));
//! let limits = Limits::new(10, 1);
//! let first = permits.acquire(alice, &limits, &())?;
//! assert_eq!(permits.acquire(alice, &limits, &()).unwrap_err(), LimitExceeded::User);
//! assert_eq!(permits.acquire(bob, &Limits::new(1, 1), &()).unwrap_err(), LimitExceeded::Total);
//! drop(first);
//! assert!(permits.acquire(bob, &limits, &()).is_ok());
//! # Ok::<(), LimitExceeded>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ids::Uid;

/// The terms of a rule that the gate needs to know. Implement it for your own type of terms. By default the general
/// [`Limits`] hold.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not the terms of a rule",
    label = "`Terms` is not implemented for it",
    note = "write `impl peergate::Terms for {Self} {{}}`; `()` is there where a rule only admits"
)]
pub trait Terms: Send + Sync + 'static {
    /// How many connections each user admitted by the rule may hold, if the rule says so.
    fn connections_per_user(&self) -> Option<u32> {
        None
    }
}

impl Terms for () {}

/// How many connections may be admitted at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Of all users together.
    pub connections: usize,
    /// Of each user id, unless the rule that admits it says otherwise.
    pub connections_per_user: u32,
    /// How many accepted connections of each user may wait to be judged while the gate is busy, at least one. The user's next
    /// one is turned away: denied if the policy denies it, else refused. Of all users together at most 1,024 wait, and at most one
    /// for every eight descriptors that the process may open; that bound turns none away, so that a higher number has no effect.
    pub waiting_per_user: u32,
}

impl Limits {
    /// A limit for all users together and one for each user. No connection is turned away because others of its user wait.
    pub const fn new(connections: usize, connections_per_user: u32) -> Self {
        Self { connections, connections_per_user, waiting_per_user: 1024 }
    }
}

/// 1,024 of all users together, 64 of each user.
impl Default for Limits {
    fn default() -> Self {
        Self::new(1024, 64)
    }
}

/// The limit that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitExceeded {
    /// That for this user.
    User,
    /// That for all users together.
    Total,
}

impl fmt::Display for LimitExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "too many connections of this user",
            Self::Total => "too many connections in all",
        })
    }
}

impl std::error::Error for LimitExceeded {}

/// Counts the permits alive. Clones share one count.
#[derive(Clone, Default)]
pub struct Permits {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    total: usize,
    by_user: HashMap<Uid, u32>,
}

impl Permits {
    /// No permit is alive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A permit for `uid` within `limits`. Of a subordinate id, ask for its owner's
    /// ([`Policy::owner_of`](crate::Policy::owner_of)). The terms of the rule that admits it ([`Rule::terms`](crate::Rule::terms)) may
    /// set another limit for the user.
    ///
    /// # Errors
    /// The limit that is reached; that for the user, if both are.
    pub fn acquire(&self, uid: Uid, limits: &Limits, terms: &impl Terms) -> Result<Permit, LimitExceeded> {
        let per_user = terms.connections_per_user().unwrap_or(limits.connections_per_user);
        let mut counts = self.lock();
        let held = counts.by_user.get(&uid).copied().unwrap_or(0);
        if held >= per_user {
            return Err(LimitExceeded::User);
        }
        if counts.total >= limits.connections {
            return Err(LimitExceeded::Total);
        }
        Ok(self.grant(&mut counts, uid))
    }

    /// A permit without limits, for a connection that an earlier process has admitted.
    pub fn resume(&self, uid: Uid) -> Permit {
        let mut counts = self.lock();
        self.grant(&mut counts, uid)
    }

    /// How many permits are alive.
    pub fn total(&self) -> usize {
        self.lock().total
    }

    fn grant(&self, counts: &mut Counts, uid: Uid) -> Permit {
        counts.total += 1;
        *counts.by_user.entry(uid).or_insert(0) += 1;
        Permit { counts: Arc::clone(&self.counts), uid }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // No code that holds the lock can panic half-way: a poisoned count is still right.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permits({} held)", self.total())
    }
}

/// The right to one connection, given back when it is dropped.
#[must_use = "a permit that is dropped does not count"]
pub struct Permit {
    counts: Arc<Mutex<Counts>>,
    uid: Uid,
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit(uid {})", self.uid)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total -= 1;
        if let Some(held) = counts.by_user.get_mut(&self.uid) {
            *held -= 1;
            if *held == 0 {
                counts.by_user.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Uid = Uid::new(1000);
    const BOB: Uid = Uid::new(1001);

    #[test]
    fn the_limit_is_reached_but_never_passed() {
        let permits = Permits::new();
        let limits = Limits::new(10, 3);
        let held: Vec<_> = (0..3).map(|_| permits.acquire(ALICE, &limits, &()).unwrap()).collect();
        assert_eq!(permits.acquire(ALICE, &limits, &()).unwrap_err(), LimitExceeded::User);
        assert_eq!(permits.acquire(BOB, &Limits::new(3, 3), &()).unwrap_err(), LimitExceeded::Total);
        let bob = permits.acquire(BOB, &Limits::new(4, 3), &()).unwrap();
        assert_eq!(permits.total(), 4);
        drop((held, bob));
        assert_eq!(permits.total(), 0);
        assert!(permits.lock().by_user.is_empty(), "a user without connections costs nothing");
    }

    #[test]
    fn a_rule_has_the_last_word_on_how_many_each_user_may_hold() {
        struct Own(Option<u32>);
        impl Terms for Own {
            fn connections_per_user(&self) -> Option<u32> {
                self.0
            }
        }
        let (permits, limits) = (Permits::new(), Limits::new(10, 1));
        let _held = [1, 2].map(|_| permits.acquire(ALICE, &limits, &Own(Some(2))).unwrap());
        assert_eq!(permits.acquire(ALICE, &limits, &Own(Some(2))).unwrap_err(), LimitExceeded::User);
        assert_eq!(permits.acquire(ALICE, &limits, &Own(None)).unwrap_err(), LimitExceeded::User);
        assert_eq!(permits.acquire(BOB, &limits, &Own(Some(0))).unwrap_err(), LimitExceeded::User);
    }

    #[test]
    fn a_place_given_back_can_be_taken_again() {
        let (permits, limits) = (Permits::new(), Limits::new(1, 1));
        for _ in 0..100 {
            let permit = permits.acquire(ALICE, &limits, &()).unwrap();
            assert!(permits.acquire(ALICE, &limits, &()).is_err());
            drop(permit);
        }
    }
}
