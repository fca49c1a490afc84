//! What other threads leave for a worker: commands, and connections. A command wakes it. A connection does so only where the
//! worker would not notice by itself: by then it has had its first turn, on the gate's thread, and is in the worker's epoll.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use peergate::systemd::Heartbeat;

use crate::connection::{Connection, Watched, WorkerConfig};
use crate::protocol::Protocol;

/// The token of the wake-up; every other token is the place of a connection.
pub const TOKEN_WAKE: u64 = u64::MAX;
/// In the token of a connection's second descriptor.
pub const SECOND: u64 = 1 << 62;

/// How many connections may wait here for something to happen on one of them.
pub const MOST_UNREAD: usize = 64;

pub enum Message<P: Protocol> {
    /// A connection that already is in the worker's epoll, as the event of place `slot`.
    Admit {
        connection: Box<Connection<P>>,
        slot: usize,
    },
    /// A connection of an earlier process.
    Resume(Box<Connection<P>>),
    Configure(WorkerConfig<P>, mpsc::Sender<()>),
    /// Bring up to `carry` connections to rest and hand them back; end the rest in order by `until`.
    End {
        carry: usize,
        until: Instant,
        reply: mpsc::Sender<Vec<Box<Connection<P>>>>,
    },
}

/// The connections and commands for one worker, and what wakes it.
pub struct Mailbox<P: Protocol> {
    mail: Mutex<Mail<P>>,
    waiting: AtomicBool,
    asleep: AtomicBool,
    wake: EventFd,
    pub epoll: Epoll,
    /// How many connections it serves, including connections in its mailbox.
    pub connections: AtomicUsize,
    pub heartbeat: Arc<Heartbeat>,
}

struct Mail<P: Protocol> {
    messages: VecDeque<Message<P>>,
    /// Places that are free again, and the first that was never taken.
    free: Vec<usize>,
    unused: usize,
    /// Whether connections end when nothing moves: then the worker has to know of each at once.
    timed: bool,
}

impl<P: Protocol> Mailbox<P> {
    /// # Errors
    /// What epoll and eventfd say.
    pub fn new(config: &WorkerConfig<P>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        // Edge-triggered, it never needs to be read: each write makes a new edge.
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_WAKE))?;
        let mail = Mail { messages: VecDeque::new(), free: Vec::new(), unused: 0, timed: config.is_timed() };
        Ok(Self {
            mail: Mutex::new(mail),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake,
            epoll,
            connections: AtomicUsize::new(0),
            heartbeat: Arc::new(Heartbeat::default()),
        })
    }

    /// Leaves a message and wakes the worker.
    pub fn post(&self, message: Message<P>) {
        {
            let mut mail = self.lock();
            if let Message::Configure(config, ..) = &message {
                // Under the lock: a connection posted before this is timed by the message, one after it wakes.
                mail.timed = config.is_timed();
            }
            mail.messages.push_back(message);
            self.waiting.store(true, Ordering::SeqCst);
        }
        self.wake_if_asleep();
    }

    /// Leaves a connection that the worker need not know of before something happens on it; unless there are many by now:
    /// they take more room here than with it.
    pub fn post_quietly(&self, message: Message<P>) {
        let wakes = {
            let mut mail = self.lock();
            mail.messages.push_back(message);
            self.waiting.store(true, Ordering::SeqCst);
            mail.timed || mail.messages.len() >= MOST_UNREAD
        };
        if wakes {
            self.wake_if_asleep();
        }
    }

    fn wake_if_asleep(&self) {
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    pub fn wake(&self) {
        // EAGAIN: it is awake already.
        let _ = self.wake.write(1);
    }

    /// Tells posters whether the worker is about to sleep; the answer: whether it may. Said before the last look at the
    /// mail, so that a post after that look wakes it.
    pub fn sleeps(&self, asleep: bool) -> bool {
        self.asleep.store(asleep, Ordering::SeqCst);
        !self.has_mail()
    }

    pub fn has_mail(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// All messages, in the order in which they were left.
    pub fn open(&self) -> VecDeque<Message<P>> {
        let mut mail = self.lock();
        self.waiting.store(false, Ordering::SeqCst);
        std::mem::take(&mut mail.messages)
    }

    /// Has the worker hear of what happens on a connection, as the event of place `slot`.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn watch(&self, connection: &mut Connection<P>, slot: usize) -> io::Result<()> {
        let watched = connection.watched();
        connection.heard = Some(watched);
        self.epoll.add(&connection.socket, EpollEvent::new(watched.peer.flags(), slot as u64))?;
        self.watch_second(connection, slot, None, watched)
    }

    /// Has the worker hear of what happens on the second descriptor, after it was opened or what it is waited for has changed.
    pub fn watch_second(
        &self,
        connection: &Connection<P>,
        slot: usize,
        before: Option<Watched>,
        now: Watched,
    ) -> io::Result<()> {
        let Some((second, interest)) = (if P::HAS_SECOND { connection.protocol.second() } else { None }) else {
            return Ok(());
        };
        let mut event = EpollEvent::new(interest.flags(), slot as u64 | SECOND);
        match before.map(|before| before.second) {
            Some(before) if before == now.second => Ok(()),
            Some(Some(_)) => Ok(self.epoll.modify(second, &mut event)?),
            Some(None) | None => Ok(self.epoll.add(second, event)?),
        }
    }

    /// Lets the worker hear no more of a connection.
    pub fn unwatch(&self, connection: &Connection<P>) {
        let _ = self.epoll.delete(&connection.socket);
        if P::HAS_SECOND {
            connection.protocol.second().map(|(second, _)| self.epoll.delete(second));
        }
    }

    /// A place for one more connection.
    pub fn take_slot(&self) -> usize {
        let mut mail = self.lock();
        mail.free.pop().unwrap_or_else(|| {
            mail.unused += 1;
            mail.unused - 1
        })
    }

    pub fn free_slot(&self, slot: usize) {
        self.lock().free.push(slot);
    }

    fn lock(&self) -> MutexGuard<'_, Mail<P>> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
