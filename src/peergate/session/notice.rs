//! Something that happens once, and that tasks of any runtime may wait for.
//!
//! Each future that waits has a place of its own for its waker. Wakers cannot be told apart by comparing them: two of one task
//! may be unlike (`Waker::will_wake`), and a list of all that were ever given would grow with each poll.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use super::lock;

/// Given once, for good.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    is_given: AtomicBool,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// [`Place::READER`]. Each connection has one, and most have no other.
    reader: Option<Waker>,
    others: HashMap<Place, Waker>,
}

/// Where the waker of one future is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place(u64);

impl Place {
    /// For the one reader of a connection.
    pub(crate) const READER: Self = Self(0);

    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Notice {
    /// Wakes every task that waits. False where it was given before.
    pub(crate) fn give(&self) -> bool {
        let is_first = !self.is_given.swap(true, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        waiting.reader.into_iter().chain(waiting.others.into_values()).for_each(Waker::wake);
        is_first
    }

    pub(crate) fn is_given(&self) -> bool {
        self.is_given.load(Ordering::Acquire)
    }

    /// Ready once it is given. Until then the task is woken by it.
    pub(crate) fn poll(&self, place: Place, context: &mut Context<'_>) -> Poll<()> {
        if !self.is_given() {
            let mut waiting = lock(&self.waiting);
            // Given meanwhile: no call after this one would wake the task.
            if !self.is_given.load(Ordering::SeqCst) {
                let waker = context.waker();
                if place == Place::READER {
                    waiting.reader = Some(waker.clone());
                } else {
                    waiting.others.entry(place).or_insert_with(|| waker.clone()).clone_from(waker);
                }
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// The future of this place waits no more.
    pub(crate) fn leave(&self, place: Place) {
        lock(&self.waiting).others.remove(&place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Wake;

    struct Idle;

    impl Wake for Idle {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn a_future_that_is_polled_often_is_kept_once_and_not_after_its_end() {
        let (notice, place) = (Notice::default(), Place::new());
        for _ in 0..100 {
            // Another waker each time.
            let waker = Waker::from(Arc::new(Idle));
            assert_eq!(notice.poll(place, &mut Context::from_waker(&waker)), Poll::Pending);
        }
        assert_eq!(lock(&notice.waiting).others.len(), 1);
        notice.leave(place);
        assert!(lock(&notice.waiting).others.is_empty());
    }
}
