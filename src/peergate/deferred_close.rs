//! Closes sockets whose close(2) may take long, on threads of its own. Used by [`fd_passing`](crate::fd_passing).
//!
//! Unread descriptors are closed in the thread that reads them or closes the socket, and the peer decides how long that
//! takes (SO_LINGER, socket(7)). A signal ends the waiting, so these threads interrupt themselves all the time. They read
//! before they close: when a socket is closed with unread data, the next call of the peer fails with ECONNRESET (unix(7)),
//! although it has been sent everything.
//!
//! The threads must be as fast as a peer that sends such descriptors. Each costs its sender about 100 µs, and holds a
//! descriptor of this process until it is closed.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::sys;

/// How often a close(2) is interrupted. Once in a millisecond would be ten times slower than sending; more often than this
/// gains nothing.
const INTERRUPTED_EVERY: Duration = Duration::from_micros(50);
/// The number of threads at most, and how many sockets wait for each before there is one more.
const MOST_THREADS: usize = 8;
const MOST_FOR_ONE: usize = 16;

/// One for the whole process, so that a connection need not refer to it.
static WAITING: Mutex<ToClose> = Mutex::new(ToClose { sockets: VecDeque::new(), threads: 0, under_way: 0 });
static MORE: Condvar = Condvar::new();
static NONE_LEFT: Condvar = Condvar::new();

struct ToClose {
    sockets: VecDeque<(OwnedFd, Data)>,
    /// The first thread does not end.
    threads: usize,
    /// How many are just being read and closed.
    under_way: usize,
}

/// What is done with unread data of a descriptor before it is closed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Data {
    /// It is read.
    Ours,
    /// It is left alone: another process may hold the same socket.
    AnothersPerhaps,
}

/// Reads the unread data of the socket and closes it, on another thread. Shut the socket down for reading before, so that
/// no more data arrives.
pub(crate) fn close_later(socket: OwnedFd) {
    put(socket, Data::Ours);
}

/// Closes a descriptor that a peer has sent, on another thread.
pub(crate) fn drop_later(fd: OwnedFd) {
    put(fd, Data::AnothersPerhaps);
}

/// Waits until all have been closed, so long at most. Before the process ends: the kernel closes what is left with its data
/// unread, and the peer gets ECONNRESET in place of its end of file.
pub(crate) fn wait_for_all(patience: Duration) {
    let is_any = |waiting: &mut ToClose| !waiting.sockets.is_empty() || waiting.under_way > 0;
    drop(NONE_LEFT.wait_timeout_while(lock(), patience, is_any));
}

fn put(fd: OwnedFd, data: Data) {
    let mut waiting = lock();
    waiting.sockets.push_back((fd, data));
    let wanted = waiting.threads == 0 || waiting.sockets.len() > MOST_FOR_ONE * waiting.threads;
    if wanted && waiting.threads < MOST_THREADS {
        // Without a thread the socket waits until the next call, rather than be closed here.
        let spawned = thread::Builder::new().name("deferred-close".to_owned()).spawn(close_all);
        waiting.threads += usize::from(spawned.is_ok());
    }
    drop(waiting);
    MORE.notify_one();
}

fn close_all() {
    // Without interruptions a close(2) may take long.
    let interruptions = sys::Interruptions::of_this_thread().ok();
    let every = |period| interruptions.as_ref().map_or(Ok(()), |one| one.every(period));
    let mut unread = vec![0; 16 * 1024];
    while let Some((socket, data)) = next(|| drop(every(Duration::ZERO))) {
        let _ = every(INTERRUPTED_EVERY);
        if data == Data::Ours {
            empty(&socket, &mut unread);
        }
        drop(socket);
        let mut waiting = lock();
        waiting.under_way -= 1;
        if waiting.under_way == 0 && waiting.sockets.is_empty() {
            NONE_LEFT.notify_all();
        }
    }
}

/// Reads all data. The descriptors that come with it are closed here.
fn empty(socket: &OwnedFd, unread: &mut [u8]) {
    loop {
        match recv(socket.as_raw_fd(), unread, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(Errno::EINTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// The next socket; `None` if there is none and another thread will take it. Calls `rest` before it waits.
fn next(rest: impl Fn()) -> Option<(OwnedFd, Data)> {
    let mut waiting = lock();
    loop {
        if let Some(socket) = waiting.sockets.pop_front() {
            waiting.under_way += 1;
            return Some(socket);
        }
        // A long queue gives its memory back.
        waiting.sockets.shrink_to(MOST_FOR_ONE);
        if waiting.threads > 1 {
            waiting.threads -= 1;
            return None;
        }
        rest();
        waiting = MORE.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock() -> MutexGuard<'static, ToClose> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use crate::fd_passing::tests::{lingering, send_along};

    #[test]
    fn a_hundred_lingering_sockets_are_closed_and_one_thread_is_left() {
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
            // Data on the way still arrives; then the end of file or a reset.
            while matches!(other_end.read(&mut [0; 65_536]), Ok(1..)) {}
            assert_eq!(theirs.read(&mut [0]).unwrap_or(0), 0);
        }
        while lock().threads > 1 {
            thread::yield_now();
        }
    }
}
