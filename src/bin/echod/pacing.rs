//! Looking again before sleeping: to be woken costs more than to look, as long as events come close together.
//!
//! Waking a sleeping thread costs tens of microseconds on a virtual processor, on both sides. A loop that
//! polls for a while after the last event before it blocks saves that, at no cost where it matters: it
//! stops looking as soon as it looked in vain, and begins again only when a sleep turned out to be shorter
//! than a look, so that an idle or slow service never spins.

use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};

/// When a loop over an epoll looks again, and when it sleeps.
#[derive(Debug)]
pub struct Pacing {
    span: Option<Duration>,
    last_event: Option<Instant>,
}

impl Pacing {
    /// Looks again for as long as `span`; `None`: never.
    pub fn new(span: Option<Duration>) -> Self {
        Self { span, last_event: None }
    }

    /// Looks for events without sleeping, if they came close together of late. `Some`: how many there are; 0 if
    /// `interrupted` said that there is something else to do. `None`: time to [`sleep`](Self::sleep).
    pub fn look(&mut self, epoll: &Epoll, events: &mut [EpollEvent], interrupted: impl Fn() -> bool) -> Option<usize> {
        let (span, last) = (self.span?, self.last_event?);
        loop {
            if let Ok(count @ 1..) = epoll.wait(events, EpollTimeout::ZERO) {
                self.last_event = Some(Instant::now());
                return Some(count);
            }
            if interrupted() {
                return Some(0);
            }
            if last.elapsed() >= span {
                self.last_event = None;
                return None;
            }
            std::hint::spin_loop();
        }
    }

    /// Sleeps until there are events or `timeout` is over, and remembers whether looking would have been worth it.
    pub fn sleep(&mut self, epoll: &Epoll, events: &mut [EpollEvent], timeout: EpollTimeout) -> usize {
        let since = self.span.map(|_| Instant::now());
        // EINTR is as good as a timeout: every caller looks at its clock afterwards.
        let count = epoll.wait(events, timeout).unwrap_or(0);
        if let (Some(span), Some(since)) = (self.span, since) {
            let now = Instant::now();
            self.last_event = (count > 0 && now.duration_since(since) < span).then_some(now);
        }
        count
    }
}
