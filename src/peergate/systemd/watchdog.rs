//! Signs of life of the service's threads, and the watchdog that they feed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::notify::{Notifier, watchdog_enabled};

/// One thread's sign of life. The thread calls [`answer`](Heartbeat::answer) whenever it comes round; the
/// [`Watchdog`] sees whether it did since it last asked.
#[derive(Debug, Default)]
pub struct Heartbeat {
    asked: AtomicU64,
    answered: AtomicU64,
    suspended: AtomicBool,
}

impl Heartbeat {
    /// The thread came round.
    pub fn answer(&self) {
        let asked = self.asked.load(Ordering::Acquire);
        // Only when asked: this is on the busiest path there is.
        if self.answered.load(Ordering::Relaxed) != asked {
            self.answered.store(asked, Ordering::Release);
        }
    }

    /// Does what may have to wait for somebody outside of this process, and is no less alive for it: to be ended and
    /// started again would not make them answer.
    pub(crate) fn suspended<R>(&self, outside: impl FnOnce() -> R) -> R {
        self.suspended.store(true, Ordering::Release);
        let result = outside();
        self.suspended.store(false, Ordering::Release);
        self.answer();
        result
    }

    fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Release);
    }

    fn is_answered(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
            || self.answered.load(Ordering::Acquire) == self.asked.load(Ordering::Acquire)
    }
}

/// A thread under watch: its sign of life, and how to make it look around.
pub struct Monitored {
    /// For messages.
    pub name: String,
    /// Shared with the thread.
    pub heartbeat: Arc<Heartbeat>,
    /// Makes the thread come round once.
    pub nudge: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Monitored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitored")
            .field("name", &self.name)
            .field("heartbeat", &self.heartbeat)
            .finish_non_exhaustive()
    }
}

/// `WATCHDOG=1`, but only while every thread makes progress. A thread that hangs keeps the message
/// back, and the service manager ends and restarts us (WatchdogSec= in systemd.service(5)).
#[derive(Debug)]
pub struct Watchdog {
    threads: Vec<Monitored>,
    pause: Duration,
    due: Instant,
    asked: bool,
}

impl Watchdog {
    /// Reads WATCHDOG_USEC and WATCHDOG_PID; `None` where the manager set no watchdog for us, or one
    /// of no length.
    pub fn from_env(threads: Vec<Monitored>) -> Option<Self> {
        let timeout = watchdog_enabled().filter(|timeout| !timeout.is_zero())?;
        // Asked at one tick, told at the next: two ticks and a half fit into the timeout. A timeout
        // beyond all reason is as good as a day.
        let pause = (timeout / 5).clamp(Duration::from_millis(1), Duration::from_secs(86_400));
        Some(Self { threads, pause, due: Instant::now(), asked: false })
    }

    /// When [`tick`](Self::tick) wants to be called next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Tells the manager if all answered, and asks anew. Returns the names of those that did not.
    pub fn tick(&mut self, notifier: &Notifier) -> Vec<&str> {
        let now = Instant::now();
        if now < self.due {
            return Vec::new();
        }
        self.due = now + self.pause;
        let silent: Vec<_> = self.threads.iter().filter(|thread| !thread.heartbeat.is_answered()).collect();
        if silent.is_empty() {
            if self.asked {
                notifier.watchdog();
            }
            self.asked = true;
            for thread in &self.threads {
                thread.heartbeat.ask();
                (thread.nudge)();
            }
        }
        silent.into_iter().map(|thread| thread.name.as_str()).collect()
    }
}
