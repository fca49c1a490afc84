//! Lingering close: the peer gets a message and a clean end of file, also when it has already sent data, goes on sending,
//! or never reads.
//!
//! close(2) with unread data in the receive queue makes the kernel answer the peer's next read with ECONNRESET, and many
//! clients then drop a message that they have already received. So the order is: the message, shutdown(2) of our direction,
//! a bounded drain of what still comes, shutdown of the other direction, a drain of the rest, which can no longer grow,
//! close.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind};
use std::mem::take;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use crate::clock::poll_timeout;
use crate::fd_passing::Stream;

/// How long a peer that was turned away may keep its descriptor open on our side.
pub(super) const PATIENCE: Duration = Duration::from_millis(900);
/// How many bytes are drained before our receiving direction is shut too.
const MOST_BYTES: usize = 64 * 1024;
/// How many connections are closed at once; beyond that the oldest is closed without waiting.
const MOST_CLOSING: usize = 256;

/// The connections that are being closed. They live in the gate's epoll under tokens from `first_token` on.
pub(super) struct Closings {
    first_token: u64,
    closing: Vec<Option<Closing>>,
    free: Vec<usize>,
    /// Oldest first; an entry whose serial no longer fits is stale.
    order: VecDeque<(usize, u64)>,
    serial: u64,
    buffer: Box<[u8]>,
}

/// A connection to be closed.
pub(super) struct Outgoing {
    pub socket: Stream,
    /// Whether another process may hold the same socket: then closing ours neither ends the connection nor takes it out of an
    /// epoll.
    pub is_shared: bool,
}

struct Closing {
    outgoing: Outgoing,
    message: Arc<[u8]>,
    sent: usize,
    is_write_shut: bool,
    drained: usize,
    deadline: Instant,
    serial: u64,
}

/// How far a closing connection has come.
enum Progress {
    Closed,
    Waits(EpollFlags),
}

impl Outgoing {
    /// A connection that the gate has just accepted.
    pub(super) fn accepted(mut socket: Stream) -> Self {
        socket.attach_credentials(false);
        Self { socket, is_shared: false }
    }

    /// A connection that was served, and may have come from an earlier process.
    pub(super) fn served(mut socket: Stream) -> Self {
        socket.attach_credentials(false);
        Self { socket, is_shared: true }
    }
}

impl Closings {
    pub(super) fn new(first_token: u64) -> Self {
        Self {
            first_token,
            closing: Vec::new(),
            free: Vec::new(),
            order: VecDeque::new(),
            serial: 0,
            buffer: vec![0; 16 * 1024].into(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn len(&self) -> usize {
        self.closing.len() - self.free.len()
    }

    /// When the next connection runs out of time.
    pub(super) fn due(&self) -> Option<Instant> {
        self.order.iter().find_map(|&(slot, serial)| {
            let closing = self.closing.get(slot)?.as_ref()?;
            (closing.serial == serial).then_some(closing.deadline)
        })
    }

    /// Sends `message` and begins to close.
    pub(super) fn begin(&mut self, epoll: &Epoll, outgoing: Outgoing, message: &Arc<[u8]>) {
        self.serial += 1;
        let mut closing = Closing::new(outgoing, message, Instant::now() + PATIENCE, self.serial);
        let Progress::Waits(interest) = closing.advance(&mut self.buffer) else {
            return;
        };
        if self.len() >= MOST_CLOSING {
            self.finish_oldest(epoll);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.closing.push(None);
            self.closing.len() - 1
        });
        let event = EpollEvent::new(interest, self.first_token + slot as u64);
        if epoll.add(&closing.outgoing.socket, event).is_err() {
            closing.finish(&mut self.buffer);
            self.free.push(slot);
            return;
        }
        self.order.push_back((slot, closing.serial));
        if let Some(place) = self.closing.get_mut(slot) {
            *place = Some(closing);
        }
    }

    /// Sends `message` and closes without waiting for the peer: where there is no descriptor to spare.
    pub(super) fn at_once(&mut self, outgoing: Outgoing, message: &Arc<[u8]>) {
        let mut closing = Closing::new(outgoing, message, Instant::now(), 0);
        if let Progress::Waits(_) = closing.advance(&mut self.buffer) {
            closing.finish(&mut self.buffer);
        }
    }

    /// Something happened on the connection with this token.
    pub(super) fn ready(&mut self, epoll: &Epoll, token: u64) {
        let slot = (token - self.first_token) as usize;
        let Some(Some(closing)) = self.closing.get_mut(slot) else { return };
        match closing.advance(&mut self.buffer) {
            Progress::Closed => self.remove(epoll, slot),
            Progress::Waits(interest) => {
                let mut event = EpollEvent::new(interest, token);
                let _ = epoll.modify(&closing.outgoing.socket, &mut event);
            }
        }
    }

    /// Closes every connection that has run out of time.
    pub(super) fn expire(&mut self, epoll: &Epoll, now: Instant) {
        while let Some(&(slot, serial)) = self.order.front() {
            match self.closing.get(slot).and_then(Option::as_ref) {
                Some(closing) if closing.serial == serial && closing.deadline > now => return,
                Some(closing) if closing.serial == serial => {
                    self.finish_oldest(epoll);
                }
                _ => {
                    self.order.pop_front();
                }
            }
        }
    }

    /// Closes the connection that has been closing for longest. False where there is none.
    pub(super) fn finish_oldest(&mut self, epoll: &Epoll) -> bool {
        while let Some((slot, serial)) = self.order.pop_front() {
            let Some(Some(closing)) = self.closing.get_mut(slot) else { continue };
            if closing.serial == serial {
                closing.finish(&mut self.buffer);
                self.remove(epoll, slot);
                return true;
            }
        }
        false
    }

    /// Goes on until every connection is closed, those that come meanwhile by `more` included.
    pub(super) fn finish_all(&mut self, epoll: &Epoll, mut more: impl FnMut() -> Vec<(Stream, Arc<[u8]>)>) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            for (socket, message) in more() {
                self.begin(epoll, Outgoing::served(socket), &message);
            }
            let Some(due) = self.due() else { return };
            let count = epoll.wait(&mut events, poll_timeout(Some(due))).unwrap_or(0);
            for event in &events[..count] {
                if self.owns(event.data()) {
                    self.ready(epoll, event.data());
                }
            }
            self.expire(epoll, Instant::now());
        }
    }

    /// Whether this is the token of a connection in here.
    pub(super) fn owns(&self, token: u64) -> bool {
        token.checked_sub(self.first_token).is_some_and(|slot| slot < self.closing.len() as u64)
    }

    fn remove(&mut self, epoll: &Epoll, slot: usize) {
        if let Some(closing) = self.closing[slot].take() {
            // Where no other holder is possible, closing takes it out of the epoll.
            if closing.outgoing.is_shared || closing.outgoing.socket.may_linger() {
                let _ = epoll.delete(&closing.outgoing.socket);
            }
        }
        self.free.push(slot);
        // Stale entries in front would keep `due` and `expire` looking at them for ever.
        while let Some(&(slot, serial)) = self.order.front() {
            if self.closing[slot].as_ref().is_some_and(|closing| closing.serial == serial) {
                break;
            }
            self.order.pop_front();
        }
        if self.order.len() > 4 * MOST_CLOSING {
            let closing = &self.closing;
            self.order.retain(|&(slot, serial)| closing[slot].as_ref().is_some_and(|one| one.serial == serial));
        }
    }
}

impl Closing {
    fn new(outgoing: Outgoing, message: &Arc<[u8]>, deadline: Instant, serial: u64) -> Self {
        let message = Arc::clone(message);
        Self { outgoing, message, sent: 0, is_write_shut: false, drained: 0, deadline, serial }
    }

    /// Goes as far as it goes without waiting.
    fn advance(&mut self, buffer: &mut [u8]) -> Progress {
        let fd = self.outgoing.socket.as_raw_fd();
        while self.sent < self.message.len() {
            match send(fd, &self.message[self.sent..], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                Ok(n) => self.sent += n,
                Err(Errno::EAGAIN) => return Progress::Waits(EpollFlags::EPOLLOUT),
                Err(Errno::EINTR) => {}
                Err(_) => return Progress::Closed,
            }
        }
        if !self.is_write_shut {
            if shutdown(fd, Shutdown::Write).is_err() {
                return Progress::Closed;
            }
            self.is_write_shut = true;
        }
        while self.drained < MOST_BYTES {
            match self.outgoing.socket.read_now(buffer) {
                Ok(0) => return Progress::Closed,
                Ok(n) => self.drained += n,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Progress::Waits(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                    ErrorKind::Interrupted => {}
                    // The next message carries descriptors, which are not taken, or the peer has closed.
                    _ => return Progress::Closed,
                },
            }
        }
        self.finish(buffer);
        Progress::Closed
    }

    /// Shuts both directions and drains the queue, so that closing resets nothing.
    fn finish(&mut self, buffer: &mut [u8]) {
        let _ = shutdown(self.outgoing.socket.as_raw_fd(), Shutdown::Both);
        loop {
            match self.outgoing.socket.read_now(buffer) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

/// Closes connections in order on behalf of the threads that serve them, which need not wait. Cheap to clone; made by
/// [`Gate::closer`](super::Gate::closer).
#[derive(Clone)]
pub struct Closer(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    wake: EventFd,
}

#[derive(Default)]
struct Queue {
    /// What a denied peer gets.
    denied: Arc<[u8]>,
    waiting: Vec<(Stream, Arc<[u8]>)>,
    /// The gate is gone: the calling thread closes by itself.
    is_orphaned: bool,
}

impl Closer {
    pub(super) fn new(denied: Arc<[u8]>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let queue = Mutex::new(Queue { denied, ..Queue::default() });
        Ok(Self(Arc::new(Shared { queue, wake })))
    }

    /// Sends `message` to an admitted peer, and a clean end of file after it. The gate does the waiting; where it has
    /// ended, this call does, for a second at most.
    pub fn close_with(&self, socket: impl Into<Stream>, message: &Arc<[u8]>) {
        let one = (socket.into(), Arc::clone(message));
        {
            let mut queue = self.lock();
            if !queue.is_orphaned {
                queue.waiting.push(one);
                drop(queue);
                return self.wake();
            }
        }
        let mut closings = Closings::new(0);
        match Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC) {
            Ok(epoll) => {
                let mut one = vec![one];
                closings.finish_all(&epoll, || take(&mut one));
            }
            // No descriptor is left to wait with.
            Err(_) => closings.at_once(Outgoing::served(one.0), &one.1),
        }
    }

    /// As [`close_with`](Self::close_with), with the message for a denied peer: for a connection that a new policy denies.
    pub fn close_denied(&self, socket: impl Into<Stream>) {
        let denied = Arc::clone(&self.lock().denied);
        self.close_with(socket, &denied);
    }

    /// Makes [`Gate::turn`](super::Gate::turn) return, now or, where no thread is in it, as soon as one is.
    pub fn wake(&self) {
        // EAGAIN: the event is pending already.
        let _ = self.0.wake.write(1);
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    pub(super) fn set_denied(&self, denied: &Arc<[u8]>) {
        self.lock().denied = Arc::clone(denied);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    pub(super) fn take_waiting(&self) -> Vec<(Stream, Arc<[u8]>)> {
        take(&mut self.lock().waiting)
    }

    /// From now on each caller closes by itself. What was left here before is returned.
    pub(super) fn orphan(&self) -> Vec<(Stream, Arc<[u8]>)> {
        let mut queue = self.lock();
        queue.is_orphaned = true;
        take(&mut queue.waiting)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closer")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn outgoing(socket: UnixStream) -> Outgoing {
        Outgoing { socket: Stream::accepted(socket), is_shared: false }
    }

    #[test]
    fn without_a_message_the_end_comes_at_once_and_later_data_is_refused() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut closings = Closings::new(0);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        theirs.write_all(b"unread").unwrap();
        closings.begin(&epoll, outgoing(ours), &Arc::from(&b""[..]));
        assert_eq!(theirs.read(&mut [0; 64]).unwrap(), 0);
        closings.finish_oldest(&epoll);
        assert_eq!(theirs.write(b"later").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    /// A peer that neither reads nor closes.
    fn holding_on(closings: &mut Closings, epoll: &Epoll) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        closings.begin(epoll, outgoing(ours), &Arc::from(&b"no"[..]));
        theirs
    }

    #[test]
    fn a_peer_that_is_turned_away_holds_a_descriptor_for_a_second_at_most() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut closings = Closings::new(0);
        let before = Instant::now();
        let mut client = holding_on(&mut closings, &epoll);
        closings.expire(&epoll, before);
        assert!(!closings.is_empty(), "there is some time to read the message and close");
        closings.expire(&epoll, Instant::now() + Duration::from_secs(1));
        assert!(closings.is_empty());
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "no");
    }

    #[test]
    fn the_number_of_closing_connections_is_bounded_and_the_oldest_goes_first() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut closings = Closings::new(0);
        let mut clients: Vec<_> = (0..MOST_CLOSING).map(|_| holding_on(&mut closings, &epoll)).collect();
        let has_gone = |client: &mut UnixStream| client.write(b"?").is_err();
        assert!(!has_gone(&mut clients[0]));
        clients.push(holding_on(&mut closings, &epoll));
        assert!(has_gone(&mut clients[0]) && !has_gone(&mut clients[1]));
        assert_eq!(closings.len(), MOST_CLOSING);
    }
}
