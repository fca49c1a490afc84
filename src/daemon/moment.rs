//! Points in time that outlive the process: CLOCK_MONOTONIC (clock_gettime(2)) is the same for the next one.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Microseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment(u64);

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        Self(micros(clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)))
    }

    /// How long ago it was; zero for one to come.
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    /// The time from `earlier` to this; zero where `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// `None` for a moment that no clock can tell.
    pub fn checked_add(self, span: Duration) -> Option<Self> {
        self.0.checked_add(u64::try_from(span.as_micros()).ok()?).map(Self)
    }

    /// `None` for a moment before the clock began.
    pub fn checked_sub(self, span: Duration) -> Option<Self> {
        self.0.checked_sub(u64::try_from(span.as_micros()).ok()?).map(Self)
    }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_ordered_and_never_overflow() {
        let (early, late) = (Moment(1_000_000), Moment(3_000_000));
        assert!(early < late);
        assert_eq!(late.since(early), Duration::from_secs(2));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(early.checked_add(Duration::from_secs(2)), Some(late));
        assert_eq!(late.checked_add(Duration::MAX), None);
        assert_eq!(early.checked_sub(Duration::from_secs(2)), None);
        assert!(Moment::now() <= Moment::now());
    }
}
