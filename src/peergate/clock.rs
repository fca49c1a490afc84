//! Arithmetic on instants that cannot overflow. For the library's own modules.

use std::time::{Duration, Instant};

/// `span` after `start`. A span beyond what the clock can tell is as good as a year: no span that a caller
/// gives may make a thread panic.
pub(crate) fn later(start: Instant, span: Duration) -> Instant {
    start.checked_add(span).unwrap_or_else(|| start + Duration::from_secs(365 * 86_400))
}
