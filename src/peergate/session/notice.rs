//! Something that happens once, and that tasks of any runtime may wait for.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use super::lock;

/// Given once, for good.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    is_given: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Notice {
    /// Wakes every task that waits. False where it was given before.
    pub(crate) fn give(&self) -> bool {
        let is_first = !self.is_given.swap(true, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        waiting.into_iter().for_each(Waker::wake);
        is_first
    }

    pub(crate) fn is_given(&self) -> bool {
        self.is_given.load(Ordering::Acquire)
    }

    /// Ready once it is given. Until then the task is woken by it.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        if !self.is_given() {
            let mut waiting = lock(&self.waiting);
            // Given meanwhile: no call after this one would wake the task.
            if !self.is_given.load(Ordering::SeqCst) {
                if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                    waiting.push(context.waker().clone());
                }
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }
}
