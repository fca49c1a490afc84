//! Waiting for events.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A value that a thread changes and a test waits on.
pub struct Shared<T>(Arc<(Mutex<T>, Condvar)>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Shared<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new((Mutex::new(value), Condvar::new())))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.lock());
        self.0.1.notify_all();
        result
    }

    /// Waits until `question` has an answer. `None` after [`PATIENCE`].
    pub fn try_wait<R>(&self, mut question: impl FnMut(&mut T) -> Option<R>) -> Option<R> {
        let until = Instant::now() + PATIENCE;
        let mut value = self.lock();
        loop {
            if let Some(answer) = question(&mut value) {
                return Some(answer);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            value = self.0.1.wait_timeout(value, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// Waits for a state of the system that no event announces: asks every two milliseconds.
pub fn eventually<R>(what: &str, mut question: impl FnMut() -> Option<R>) -> R {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < until, "{what}: not after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}
