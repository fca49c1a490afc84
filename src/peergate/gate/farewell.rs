//! Seeing a peer off: it gets its message and a clean end of file, also when it has already sent data,
//! goes on sending, or never reads.
//!
//! close(2) with the peer's data unread makes the kernel answer the peer's next read with ECONNRESET,
//! and many clients then drop the message they have already received. So: message, shutdown of our
//! direction, read what still comes (bounded in bytes and time), shutdown of the other direction, read
//! the rest, which can no longer grow, close.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use crate::baggage::Stream;

/// How long a peer that was turned away may keep its descriptor open on our side.
const PATIENCE: Duration = Duration::from_millis(900);
/// How much of what it still sends is read before it is told to stop.
const MOST_BYTES: usize = 64 * 1024;
/// How many may be on their way out at once; beyond that the oldest goes.
const MOST_LEAVING: usize = 256;

/// Those on their way out. Lives in the gate's epoll under tokens from `first_token` on.
pub(super) struct Farewell {
    first_token: u64,
    leaving: Vec<Option<Leaving>>,
    free: Vec<usize>,
    /// Oldest first; an entry whose serial no longer fits is stale.
    order: VecDeque<(usize, u64)>,
    serial: u64,
    buffer: Box<[u8]>,
}

/// Somebody to be seen off.
pub(super) struct Guest {
    pub socket: Stream,
    /// Another process may hold the same socket, so that closing ours neither ends it nor takes it out of an epoll.
    pub is_shared: bool,
}

struct Leaving {
    guest: Guest,
    message: Arc<[u8]>,
    sent: usize,
    /// Our direction is.
    is_shut: bool,
    drained: usize,
    deadline: Instant,
    serial: u64,
}

/// How far one has come.
enum Progress {
    Gone,
    Waits(EpollFlags),
}

impl Farewell {
    pub(super) fn new(first_token: u64) -> Self {
        Self {
            first_token,
            leaving: Vec::new(),
            free: Vec::new(),
            order: VecDeque::new(),
            serial: 0,
            buffer: vec![0; 16 * 1024].into(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.leaving.len() == self.free.len()
    }

    /// When the next one runs out of time.
    pub(super) fn due(&self) -> Option<Instant> {
        self.order.iter().find_map(|&(slot, serial)| {
            let leaving = self.leaving.get(slot)?.as_ref()?;
            (leaving.serial == serial).then_some(leaving.deadline)
        })
    }

    /// Sends `message` and sees the peer off.
    pub(super) fn begin(&mut self, epoll: &Epoll, guest: Guest, message: &Arc<[u8]>) {
        self.serial += 1;
        let mut leaving = Leaving::new(guest, message, Instant::now() + PATIENCE, self.serial);
        let Progress::Waits(interest) = leaving.advance(&mut self.buffer) else {
            return;
        };
        if self.leaving.len() - self.free.len() >= MOST_LEAVING {
            self.hurry_oldest(epoll);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.leaving.push(None);
            self.leaving.len() - 1
        });
        let event = EpollEvent::new(interest, self.first_token + slot as u64);
        if epoll.add(&leaving.guest.socket, event).is_err() {
            leaving.finish(&mut self.buffer);
            self.free.push(slot);
            return;
        }
        self.order.push_back((slot, leaving.serial));
        if let Some(place) = self.leaving.get_mut(slot) {
            *place = Some(leaving);
        }
    }

    /// Sends `message` and closes without waiting for the peer: where there is no descriptor to spare.
    pub(super) fn at_once(&mut self, guest: Guest, message: &Arc<[u8]>) {
        let mut leaving = Leaving::new(guest, message, Instant::now(), 0);
        if let Progress::Waits(_) = leaving.advance(&mut self.buffer) {
            leaving.finish(&mut self.buffer);
        }
    }

    /// Something happened to the one with this token.
    pub(super) fn ready(&mut self, epoll: &Epoll, token: u64) {
        let slot = (token - self.first_token) as usize;
        let Some(Some(leaving)) = self.leaving.get_mut(slot) else { return };
        match leaving.advance(&mut self.buffer) {
            Progress::Gone => self.remove(epoll, slot),
            Progress::Waits(interest) => {
                let mut event = EpollEvent::new(interest, token);
                let _ = epoll.modify(&leaving.guest.socket, &mut event);
            }
        }
    }

    /// Lets go of everyone whose time is up.
    pub(super) fn expire(&mut self, epoll: &Epoll, now: Instant) {
        while let Some(&(slot, serial)) = self.order.front() {
            match self.leaving.get(slot).and_then(Option::as_ref) {
                Some(leaving) if leaving.serial == serial && leaving.deadline > now => return,
                Some(leaving) if leaving.serial == serial => {
                    self.hurry_oldest(epoll);
                }
                _ => {
                    self.order.pop_front();
                }
            }
        }
    }

    /// Lets go of the one who has been leaving for longest. False where nobody is.
    pub(super) fn hurry_oldest(&mut self, epoll: &Epoll) -> bool {
        while let Some((slot, serial)) = self.order.pop_front() {
            let Some(Some(leaving)) = self.leaving.get_mut(slot) else { continue };
            if leaving.serial == serial {
                leaving.finish(&mut self.buffer);
                self.remove(epoll, slot);
                return true;
            }
        }
        false
    }

    fn remove(&mut self, epoll: &Epoll, slot: usize) {
        if let Some(leaving) = self.leaving[slot].take() {
            // Where nobody else has it, closing does that, now or a little later.
            if leaving.guest.is_shared || leaving.guest.socket.may_linger() {
                let _ = epoll.delete(&leaving.guest.socket);
            }
        }
        self.free.push(slot);
        // Stale entries in front would keep `due` and `expire` looking at them for ever.
        while let Some(&(slot, serial)) = self.order.front() {
            if self.leaving[slot].as_ref().is_some_and(|leaving| leaving.serial == serial) {
                break;
            }
            self.order.pop_front();
        }
        if self.order.len() > 4 * MOST_LEAVING {
            let leaving = &self.leaving;
            self.order.retain(|&(slot, serial)| leaving[slot].as_ref().is_some_and(|one| one.serial == serial));
        }
    }
}

impl Leaving {
    fn new(guest: Guest, message: &Arc<[u8]>, deadline: Instant, serial: u64) -> Self {
        let message = Arc::clone(message);
        Self { guest, message, sent: 0, is_shut: false, drained: 0, deadline, serial }
    }

    /// Goes as far as it goes without waiting.
    fn advance(&mut self, buffer: &mut [u8]) -> Progress {
        let fd = self.guest.socket.as_raw_fd();
        while self.sent < self.message.len() {
            match send(fd, &self.message[self.sent..], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                Ok(n) => self.sent += n,
                Err(Errno::EAGAIN) => return Progress::Waits(EpollFlags::EPOLLOUT),
                Err(Errno::EINTR) => {}
                Err(_) => return Progress::Gone,
            }
        }
        if !self.is_shut {
            if shutdown(fd, Shutdown::Write).is_err() {
                return Progress::Gone;
            }
            self.is_shut = true;
        }
        while self.drained < MOST_BYTES {
            match self.guest.socket.read_now(buffer) {
                Ok(0) => return Progress::Gone,
                Ok(n) => self.drained += n,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Progress::Waits(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                    ErrorKind::Interrupted => {}
                    // Descriptors come next, which are not for us to take, or the peer is gone.
                    _ => return Progress::Gone,
                },
            }
        }
        self.finish(buffer);
        Progress::Gone
    }

    /// No more from either side: what is in the queue is read, so that closing resets nothing.
    fn finish(&mut self, buffer: &mut [u8]) {
        let _ = shutdown(self.guest.socket.as_raw_fd(), Shutdown::Both);
        loop {
            match self.guest.socket.read_now(buffer) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::epoll::EpollCreateFlags;

    use super::*;

    #[test]
    fn without_a_message_the_end_comes_at_once_and_later_data_is_refused() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut farewell = Farewell::new(0);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        theirs.write_all(b"unread").unwrap();
        let guest = Guest { socket: Stream::accepted(ours), is_shared: false };
        farewell.begin(&epoll, guest, &Arc::from(&b""[..]));
        assert_eq!(theirs.read(&mut [0; 64]).unwrap(), 0);
        farewell.hurry_oldest(&epoll);
        assert_eq!(theirs.write(b"later").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    /// Who holds on: does not read, does not close.
    fn holding_on(farewell: &mut Farewell, epoll: &Epoll) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        farewell.begin(epoll, Guest { socket: Stream::accepted(ours), is_shared: false }, &Arc::from(&b"no"[..]));
        theirs
    }

    #[test]
    fn nobody_keeps_a_descriptor_for_longer_than_a_second_by_being_turned_away() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut farewell = Farewell::new(0);
        let before = Instant::now();
        let mut client = holding_on(&mut farewell, &epoll);
        farewell.expire(&epoll, before);
        assert!(!farewell.is_empty(), "there is some time to read the message and close");
        farewell.expire(&epoll, Instant::now() + Duration::from_secs(1));
        assert!(farewell.is_empty());
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "no");
    }

    #[test]
    fn no_more_than_so_many_are_on_their_way_out_at_once_and_the_oldest_goes_first() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut farewell = Farewell::new(0);
        let mut clients: Vec<_> = (0..MOST_LEAVING).map(|_| holding_on(&mut farewell, &epoll)).collect();
        let has_gone = |client: &mut UnixStream| client.write(b"?").is_err();
        assert!(!has_gone(&mut clients[0]));
        clients.push(holding_on(&mut farewell, &epoll));
        assert!(has_gone(&mut clients[0]) && !has_gone(&mut clients[1]));
        assert_eq!(farewell.leaving.len() - farewell.free.len(), MOST_LEAVING);
    }
}
