//! The watchdog: every thread has a heartbeat, and the service manager gets WATCHDOG=1 while all of them beat.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::notify::{Notifier, watchdog_enabled};

/// The heartbeat of one thread. The thread calls [`answer`](Heartbeat::answer) in each turn of its loop, and the
/// [`Watchdog`] sees whether it has since the last question.
#[derive(Debug, Default)]
pub struct Heartbeat {
    asked: AtomicU64,
    answered: AtomicU64,
    suspended: AtomicBool,
}

impl Heartbeat {
    /// Called by the thread in each turn of its loop.
    pub fn answer(&self) {
        let asked = self.asked.load(Ordering::Acquire);
        // Without a question nothing is written: the busiest loop of the service comes here.
        if self.answered.load(Ordering::Relaxed) != asked {
            self.answered.store(asked, Ordering::Release);
        }
    }

    /// Calls `outside`, which may wait for another process. This counts as alive: the other process would not answer
    /// sooner if this one were ended and started again.
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

/// A monitored thread: its heartbeat, and how to wake it.
pub struct Monitored {
    /// The name in messages.
    pub name: String,
    /// Shared with the thread.
    pub heartbeat: Arc<Heartbeat>,
    /// Wakes the thread, so that it answers.
    pub nudge: Box<dyn Fn() + Send>,
}

impl Monitored {
    /// A thread of this name.
    pub fn new(name: impl Into<String>, heartbeat: &Arc<Heartbeat>, nudge: impl Fn() + Send + 'static) -> Self {
        Self { name: name.into(), heartbeat: Arc::clone(heartbeat), nudge: Box::new(nudge) }
    }
}

impl fmt::Debug for Monitored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitored")
            .field("name", &self.name)
            .field("heartbeat", &self.heartbeat)
            .finish_non_exhaustive()
    }
}

/// Sends `WATCHDOG=1` while every thread makes progress. When a thread hangs no message is sent, and the service manager
/// restarts the service (WatchdogSec= in systemd.service(5)).
#[derive(Debug)]
pub struct Watchdog {
    threads: Vec<Monitored>,
    pause: Duration,
    due: Instant,
    asked: bool,
}

impl Watchdog {
    /// Reads WATCHDOG_USEC and WATCHDOG_PID; `None` if the manager has set no watchdog for this process.
    pub fn from_env(threads: Vec<Monitored>) -> Option<Self> {
        let timeout = watchdog_enabled().filter(|timeout| !timeout.is_zero())?;
        // A question at one tick is answered by the next one: with a fifth of the timeout between them a message has time
        // to spare. A timeout that the clock cannot represent counts as a day.
        let pause = (timeout / 5).clamp(Duration::from_millis(1), Duration::from_secs(86_400));
        Some(Self { threads, pause, due: Instant::now(), asked: false })
    }

    /// When [`tick`](Self::tick) is to be called next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Sends `WATCHDOG=1` if all threads have answered, and asks again. Returns the names of the threads that have not.
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
