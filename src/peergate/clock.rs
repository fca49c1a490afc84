//! Points in time that cannot overflow, and timeouts that do not end too early.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

/// `span` after `start`. A span that the clock cannot represent counts as a year: no span that a caller gives may make a
/// thread panic.
pub(crate) fn later(start: Instant, span: Duration) -> Instant {
    start.checked_add(span).unwrap_or_else(|| start + Duration::from_secs(365 * 86_400))
}

/// A timeout for poll(2) and epoll_wait(2) that ends at `due`, or never. Both count whole milliseconds: a fraction is
/// rounded up, because a thread that wakes before the time finds nothing to do and would wait for 0 ms until then.
pub fn poll_timeout(due: Option<Instant>) -> PollTimeout {
    const ALMOST_ONE_MILLISECOND: Duration = Duration::from_nanos(999_999);
    due.map_or(PollTimeout::NONE, |due| {
        let left = due.saturating_duration_since(Instant::now()).saturating_add(ALMOST_ONE_MILLISECOND);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_rounded_up_and_bounded() {
        let now = Instant::now();
        assert_eq!(poll_timeout(None), PollTimeout::NONE);
        assert_eq!(poll_timeout(Some(now)), PollTimeout::ZERO);
        assert_eq!(poll_timeout(Some(later(now, Duration::MAX))), PollTimeout::MAX);
        let due = now + Duration::from_secs(1000);
        let timeout = poll_timeout(Some(due)).duration().unwrap();
        assert!(Instant::now() + timeout >= due, "{timeout:?}");
    }
}
