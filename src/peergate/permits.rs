//! Who holds how many connections. A [`Permit`] gives its place back when it is dropped, on whichever
//! thread and for whatever reason, so the count is the number of permits alive and never drifts.
//!
//! ```
//! use peergate::permits::LimitExceeded;
//! use peergate::{Limits, Permits, Uid};
//!
//! let (limits, alice, bob) = (Permits::new(), Uid::new(1000), Uid::new(1001));
//! let caps = Limits::new(10, 1);
//! let first = limits.acquire(alice, &caps, &())?;
//! assert_eq!(limits.acquire(alice, &caps, &()).unwrap_err(), LimitExceeded::User);
//! assert_eq!(limits.acquire(bob, &Limits::new(1, 1), &()).unwrap_err(), LimitExceeded::Total);
//! drop(first);
//! assert!(limits.acquire(bob, &caps, &()).is_ok());
//! # Ok::<(), LimitExceeded>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ids::Uid;

/// The terms of a rule that the gate itself needs to know. Implement it for your own type of terms;
/// the default answers leave every limit to the general [`Limits`].
pub trait Terms: Send + Sync + 'static {
    /// How many connections each user admitted by the rule may hold at once, where the rule says so.
    fn connections_per_user(&self) -> Option<u32> {
        None
    }
}

impl Terms for () {}

/// How many connections may be admitted at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// In all.
    pub connections: usize,
    /// For each user id, unless the rule that admits them says otherwise.
    pub connections_per_user: u32,
}

impl Limits {
    /// So many in all, so many for each user.
    pub const fn new(connections: usize, connections_per_user: u32) -> Self {
        Self { connections, connections_per_user }
    }
}

/// 1,024 in all, 64 for each user.
impl Default for Limits {
    fn default() -> Self {
        Self::new(1024, 64)
    }
}

/// Which limit stood in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitExceeded {
    /// This user holds as many as allowed.
    User,
    /// All users together do.
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

/// Counts the permits alive. Cheap to clone; all clones count together.
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
    /// No permit given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A permit for `uid`, if that leaves no more than `caps` allow, or the terms of the rule that admits them
    /// ([`Rule::terms`](crate::Rule::terms)) where these say otherwise.
    ///
    /// # Errors
    /// [`LimitExceeded`]: which of the limits would be exceeded; the user's own is named first.
    pub fn acquire(&self, uid: Uid, caps: &Limits, terms: &impl Terms) -> Result<Permit, LimitExceeded> {
        let per_user = terms.connections_per_user().unwrap_or(caps.connections_per_user);
        let mut counts = self.lock();
        let held = counts.by_user.get(&uid).copied().unwrap_or(0);
        if held >= per_user {
            return Err(LimitExceeded::User);
        }
        if counts.total >= caps.connections {
            return Err(LimitExceeded::Total);
        }
        Ok(self.grant(&mut counts, uid))
    }

    /// A permit for a connection that was admitted before this process began, over any limit.
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
        // Nothing below can panic half-way, so a poisoned count is still a true one.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permits({} held)", self.total())
    }
}

/// The right to one connection, given back when dropped.
#[must_use = "a permit that is dropped admits nobody"]
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
        let limits = Permits::new();
        let caps = Limits::new(10, 3);
        let held: Vec<_> = (0..3).map(|_| limits.acquire(ALICE, &caps, &()).unwrap()).collect();
        assert_eq!(limits.acquire(ALICE, &caps, &()).unwrap_err(), LimitExceeded::User);
        assert_eq!(limits.acquire(BOB, &Limits::new(3, 3), &()).unwrap_err(), LimitExceeded::Total);
        let bob = limits.acquire(BOB, &Limits::new(4, 3), &()).unwrap();
        assert_eq!(limits.total(), 4);
        drop((held, bob));
        assert_eq!(limits.total(), 0);
        assert!(limits.lock().by_user.is_empty(), "a user without connections costs nothing");
    }

    #[test]
    fn a_rule_has_the_last_word_on_how_many_each_user_may_hold() {
        struct Own(Option<u32>);
        impl Terms for Own {
            fn connections_per_user(&self) -> Option<u32> {
                self.0
            }
        }
        let (limits, caps) = (Permits::new(), Limits::new(10, 1));
        let _held = [1, 2].map(|_| limits.acquire(ALICE, &caps, &Own(Some(2))).unwrap());
        assert_eq!(limits.acquire(ALICE, &caps, &Own(Some(2))).unwrap_err(), LimitExceeded::User);
        assert_eq!(limits.acquire(ALICE, &caps, &Own(None)).unwrap_err(), LimitExceeded::User);
        assert_eq!(limits.acquire(BOB, &caps, &Own(Some(0))).unwrap_err(), LimitExceeded::User);
    }

    #[test]
    fn a_place_given_back_can_be_taken_again() {
        let (limits, caps) = (Permits::new(), Limits::new(1, 1));
        for _ in 0..100 {
            let permit = limits.acquire(ALICE, &caps, &()).unwrap();
            assert!(limits.acquire(ALICE, &caps, &()).is_err());
            drop(permit);
        }
    }
}
