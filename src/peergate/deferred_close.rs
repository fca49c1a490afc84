//! Closes what may be slow to close, on threads that nobody waits for. For [`fd_passing`](crate::fd_passing).
//!
//! What lies unread on a socket is closed in the thread that reads it or closes the socket, and the peer that sent it
//! chooses how long that takes (SO_LINGER, socket(7)). To linger is over at a signal; so these threads interrupt themselves
//! all the time. They read before they close: a socket that is closed with data unread makes the peer's next call fail with
//! ECONNRESET (unix(7)), although everything it is owed has been sent.
//!
//! They must not be slower at it than somebody is at sending: each thing that lingers costs its sender about 100 µs to
//! make, and as long as it waits here it holds a descriptor of ours.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::sys;

/// How often a close that takes its time is interrupted. Once in a millisecond is ten times slower than sending; shorter
/// than this gains nothing.
const INTERRUPTED_EVERY: Duration = Duration::from_micros(50);
/// The most threads, and how many sockets wait for each when there is one more.
const MOST_THREADS: usize = 8;
const MOST_FOR_ONE: usize = 16;

/// One for the whole process, so that a connection need not know of it.
static WAITING: Mutex<Backlog> = Mutex::new(Backlog { sockets: VecDeque::new(), threads: 0 });
static MORE: Condvar = Condvar::new();

struct Backlog {
    sockets: VecDeque<OwnedFd>,
    /// The first one stays once it is there.
    threads: usize,
}

/// Takes the socket from whoever must not wait, reads what is left on it, and closes it. Shut down for reading before, so
/// that it is no more than a queue can hold.
pub(crate) fn close_later(socket: OwnedFd) {
    let mut waiting = lock();
    waiting.sockets.push_back(socket);
    let wanted = waiting.threads == 0 || waiting.sockets.len() > MOST_FOR_ONE * waiting.threads;
    if wanted && waiting.threads < MOST_THREADS {
        // No thread to be had: it waits for the next one who comes, rather than be closed here.
        let spawned = thread::Builder::new().name("deferred-close".to_owned()).spawn(close_all);
        waiting.threads += usize::from(spawned.is_ok());
    }
    drop(waiting);
    MORE.notify_one();
}

fn close_all() {
    // Without interruptions it takes as long as it takes.
    let interruptions = sys::Interruptions::of_this_thread().ok();
    let every = |period| interruptions.as_ref().map_or(Ok(()), |one| one.every(period));
    let mut unread = vec![0; 16 * 1024];
    while let Some(socket) = next(|| drop(every(Duration::ZERO))) {
        let _ = every(INTERRUPTED_EVERY);
        empty(&socket, &mut unread);
        drop(socket);
    }
}

/// Without room for them, the descriptors among what is read are closed here.
fn empty(socket: &OwnedFd, unread: &mut [u8]) {
    loop {
        match recv(socket.as_raw_fd(), unread, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(Errno::EINTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// The next one; `None` where there is none and others see to the next. `rest` is called before waiting.
fn next(rest: impl Fn()) -> Option<OwnedFd> {
    let mut waiting = lock();
    loop {
        if let Some(socket) = waiting.sockets.pop_front() {
            return Some(socket);
        }
        // A queue that was long once gives its memory back.
        waiting.sockets.shrink_to(MOST_FOR_ONE);
        if waiting.threads > 1 {
            waiting.threads -= 1;
            return None;
        }
        rest();
        waiting = MORE.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock() -> MutexGuard<'static, Backlog> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use crate::fd_passing::tests::{lingering, send_along};

    #[test]
    fn a_hundred_that_would_take_hours_to_close_are_closed_and_few_threads_are_left() {
        let mut ends = Vec::new();
        for _ in 0..100 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (bomb, other_end) = lingering();
            send_along(&theirs, &bomb).unwrap();
            drop(bomb);
            close_later(ours.into());
            assert!(lock().threads <= MOST_THREADS);
            ends.push((theirs, other_end));
        }
        for (mut theirs, mut other_end) in ends {
            other_end.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            // What was under way when it was closed still arrives; then the end, one way or the other.
            while matches!(other_end.read(&mut [0; 65_536]), Ok(1..)) {}
            assert_eq!(theirs.read(&mut [0]).unwrap_or(0), 0);
        }
        while lock().threads > 1 {
            thread::yield_now();
        }
    }
}
