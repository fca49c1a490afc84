//! The gate's turns, in a task of the runtime, which watches the listeners.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout_at;

use super::Queue;
use crate::audit::Severity;
use crate::gate::Ready;
use crate::permits::Terms;
use crate::service::Core;

/// Gives the gate its turns.
pub(super) async fn turn<T: Terms>(core: Arc<Core<T>>, queue: Arc<Queue<T>>) {
    let (watched, mut ready) = match Watched::new(&core) {
        Ok(watched) => watched,
        Err(error) => return core.note(Severity::Error, format!("the runtime does not take the gate: {error}")),
    };
    let mut admitted = Vec::new();
    while let Some(due) = core.turn_with(&mut ready, &mut admitted, |admitted| queue.push(admitted.drain(..))) {
        match due {
            // A turn is bounded: there is more to do.
            Some(due) if due <= Instant::now() => {
                tokio::task::yield_now().await;
                poll_fn(|context| Poll::Ready(watched.poll(&mut ready, context).is_ready())).await;
            }
            Some(due) => drop(timeout_at(due.into(), poll_fn(|context| watched.poll(&mut ready, context))).await),
            None => poll_fn(|context| watched.poll(&mut ready, context)).await,
        }
    }
}

/// What the runtime watches for the gate.
struct Watched {
    epoll: AsyncFd<OwnedFd>,
    listeners: Vec<AsyncFd<OwnedFd>>,
}

impl Watched {
    fn new<T: Terms>(core: &Core<T>) -> io::Result<(Self, Ready)> {
        let epoll = watched(core.epoll().try_clone()?)?;
        let (listeners, ready) = core.watch_outside()?;
        let listeners = listeners.into_iter().map(watched).collect::<io::Result<_>>()?;
        Ok((Self { epoll, listeners }, ready))
    }

    /// Ready once the runtime has told of anything, which is added to `ready`.
    fn poll(&self, ready: &mut Ready, context: &mut Context<'_>) -> Poll<()> {
        let mut is_told = false;
        let flags = std::iter::once(&mut ready.epoll).chain(&mut ready.listeners);
        for (fd, flag) in std::iter::once(&self.epoll).chain(&self.listeners).zip(flags) {
            // An error means that the runtime ends, and this task with it.
            if let Poll::Ready(Ok(mut guard)) = fd.poll_read_ready(context) {
                // Noted here, until the gate has seen to it. What changes from now on is told again.
                guard.clear_ready();
                (*flag, is_told) = (true, true);
            }
        }
        if is_told { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// tokio asks for a promise, which only unsafe code can give, that the descriptor stays the same for as long as its owner
/// lives. That is so for `OwnedFd`. This is the call from before that promise.
#[allow(deprecated)]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}
