//! Seeing a peer off: it gets its message and a clean end of file, also when it has already sent data,
//! goes on sending, or never reads.
//!
//! close(2) with the peer's data unread makes the kernel answer the peer's next read with ECONNRESET,
//! and many clients then drop the message they have already received. So: message, shutdown of our
//! direction, read what still comes (bounded in bytes and time), shutdown of the other direction, read
//! the rest, which can no longer grow, close.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};

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

struct Leaving {
    socket: OwnedFd,
    message: Arc<[u8]>,
    sent: usize,
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
    pub(super) fn begin(&mut self, epoll: &Epoll, socket: OwnedFd, message: &Arc<[u8]>) {
        self.serial += 1;
        let mut leaving = Leaving {
            socket,
            message: Arc::clone(message),
            sent: 0,
            drained: 0,
            deadline: Instant::now() + PATIENCE,
            serial: self.serial,
        };
        let Progress::Waits(interest) = leaving.advance(&mut self.buffer) else { return };
        if self.leaving.len() - self.free.len() >= MOST_LEAVING {
            self.hurry_oldest();
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.leaving.push(None);
            self.leaving.len() - 1
        });
        let event = EpollEvent::new(interest, self.first_token + slot as u64);
        if epoll.add(&leaving.socket, event).is_err() {
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
    pub(super) fn at_once(&mut self, socket: OwnedFd, message: &Arc<[u8]>) {
        let mut leaving =
            Leaving { socket, message: Arc::clone(message), sent: 0, drained: 0, deadline: Instant::now(), serial: 0 };
        if let Progress::Waits(_) = leaving.advance(&mut self.buffer) {
            leaving.finish(&mut self.buffer);
        }
    }

    /// Something happened to the one with this token.
    pub(super) fn ready(&mut self, epoll: &Epoll, token: u64) {
        let slot = (token - self.first_token) as usize;
        let Some(Some(leaving)) = self.leaving.get_mut(slot) else { return };
        match leaving.advance(&mut self.buffer) {
            Progress::Gone => self.remove(slot),
            Progress::Waits(interest) => {
                let mut event = EpollEvent::new(interest, token);
                let _ = epoll.modify(&leaving.socket, &mut event);
            }
        }
    }

    /// Lets go of everyone whose time is up.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(&(slot, serial)) = self.order.front() {
            match self.leaving.get(slot).and_then(Option::as_ref) {
                Some(leaving) if leaving.serial == serial && leaving.deadline > now => return,
                Some(leaving) if leaving.serial == serial => {
                    self.hurry_oldest();
                }
                _ => {
                    self.order.pop_front();
                }
            }
        }
    }

    /// Lets go of the one who has been leaving for longest. False where nobody is.
    pub(super) fn hurry_oldest(&mut self) -> bool {
        while let Some((slot, serial)) = self.order.pop_front() {
            let Some(Some(leaving)) = self.leaving.get_mut(slot) else { continue };
            if leaving.serial == serial {
                leaving.finish(&mut self.buffer);
                self.remove(slot);
                return true;
            }
        }
        false
    }

    fn remove(&mut self, slot: usize) {
        // Closing takes it out of the epoll set: nobody else has a copy of the descriptor.
        self.leaving[slot] = None;
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
    /// Goes as far as it goes without waiting.
    fn advance(&mut self, buffer: &mut [u8]) -> Progress {
        let fd = self.socket.as_raw_fd();
        if self.sent < self.message.len() {
            while self.sent < self.message.len() {
                match send(fd, &self.message[self.sent..], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                    Ok(n) => self.sent += n,
                    Err(Errno::EAGAIN) => return Progress::Waits(EpollFlags::EPOLLOUT),
                    Err(Errno::EINTR) => {}
                    Err(_) => return Progress::Gone,
                }
            }
            if shutdown(fd, Shutdown::Write).is_err() {
                return Progress::Gone;
            }
        }
        while self.drained < MOST_BYTES {
            match recv(fd, buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Progress::Gone,
                Ok(n) => self.drained += n,
                Err(Errno::EAGAIN) => return Progress::Waits(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                Err(Errno::EINTR) => {}
                Err(_) => return Progress::Gone,
            }
        }
        self.finish(buffer);
        Progress::Gone
    }

    /// No more from either side: what is in the queue is read, so that closing resets nothing.
    fn finish(&mut self, buffer: &mut [u8]) {
        let fd = self.socket.as_fd().as_raw_fd();
        let _ = shutdown(fd, Shutdown::Both);
        while let Ok(1..) | Err(Errno::EINTR) = recv(fd, buffer, MsgFlags::MSG_DONTWAIT) {}
    }
}
