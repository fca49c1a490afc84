//! What other threads leave for a worker: orders, and connections. An order wakes it. A connection does so only where
//! the worker would not notice by itself: by then it has had its first turn, at the door, and is in the worker's epoll.
//!
//! Most who come have sent their line by the time they are admitted, and many want no more than its echo. They get it
//! without a second thread having to wake up first.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use peergate::audit::Audit;
use peergate::gate::Admission;
use peergate::limits::Permit;
use peergate::policy::Rule;
use peergate::service::Beat;

use crate::config::Terms;
use crate::connection::{Buffers, Carried, Connection, Outcome, Ruling};

/// The most that is read from a connection at the door: a line or a few. The rest is the worker's.
const FIRST_READ: usize = 4096;

/// The token of the wake-up; all others are places of connections.
pub const TOKEN_WAKE: u64 = u64::MAX;

pub enum Message {
    /// A connection that already is in the worker's epoll, as the event of place `slot`, if its first turn left it
    /// open.
    Admit {
        connection: Box<Connection>,
        slot: usize,
        /// Of the ruling that admitted it.
        generation: u64,
        first_turn: Outcome,
    },
    /// A connection of an earlier process.
    Resume(Box<Carried>, Arc<Rule<Terms>>, Permit),
    Rule(Ruling, u64, mpsc::Sender<()>),
    /// Bring up to `carry` connections to rest and hand them back; end the others in order by `until`.
    End {
        carry: usize,
        until: Instant,
        reply: mpsc::Sender<Vec<Carried>>,
    },
}

/// A worker's end of the line for other threads.
pub struct Mailbox {
    mail: Mutex<Mail>,
    waiting: AtomicBool,
    asleep: AtomicBool,
    wake: EventFd,
    pub epoll: Epoll,
    /// How many connections it serves, those on their way to it included.
    pub connections: AtomicUsize,
    line_length: AtomicUsize,
    pub beat: Arc<Beat>,
}

struct Mail {
    messages: VecDeque<Message>,
    /// Places of connections that nobody has any more, and the first that nobody ever had.
    free: Vec<usize>,
    unused: usize,
    /// Whether connections end when nothing moves: then the worker has to know of each at once.
    timed: bool,
}

impl Mailbox {
    /// # Errors
    /// What epoll and eventfd say.
    pub fn new(ruling: &Ruling) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        // Edge-triggered, it never needs to be read: each write makes a new edge.
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_WAKE))?;
        let mail = Mail { messages: VecDeque::new(), free: Vec::new(), unused: 0, timed: ruling.is_timed() };
        Ok(Self {
            mail: Mutex::new(mail),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake,
            epoll,
            connections: AtomicUsize::new(0),
            line_length: AtomicUsize::new(ruling.line_length),
            beat: Arc::new(Beat::default()),
        })
    }

    /// Leaves a message and wakes the worker.
    pub fn post(&self, message: Message) {
        {
            let mut mail = self.lock();
            if let Message::Rule(ruling, ..) = &message {
                self.line_length.store(ruling.line_length, Ordering::Relaxed);
                // Under the lock: a connection posted before this is timed by the message, one after it wakes.
                mail.timed = ruling.is_timed();
            }
            mail.messages.push_back(message);
            self.waiting.store(true, Ordering::SeqCst);
        }
        self.wake_if_asleep();
    }

    /// Leaves a connection that the worker need not know of before something happens on it.
    fn post_quietly(&self, message: Message) {
        let timed = {
            let mut mail = self.lock();
            mail.messages.push_back(message);
            self.waiting.store(true, Ordering::SeqCst);
            mail.timed
        };
        if timed {
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
    /// mail, so that whoever posts after that look wakes it.
    pub fn sleeps(&self, asleep: bool) -> bool {
        self.asleep.store(asleep, Ordering::SeqCst);
        !self.has_mail()
    }

    pub fn has_mail(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// All messages, in the order in which they were left.
    pub fn open(&self) -> VecDeque<Message> {
        let mut mail = self.lock();
        self.waiting.store(false, Ordering::SeqCst);
        std::mem::take(&mut mail.messages)
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

    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the workers, for the gate's thread.
pub struct Doors {
    mailboxes: Vec<Arc<Mailbox>>,
    buffers: Buffers,
    audit: Audit,
}

impl Doors {
    pub fn new(mailboxes: Vec<Arc<Mailbox>>, audit: Audit) -> Self {
        Self { mailboxes, buffers: Buffers::new(FIRST_READ), audit }
    }

    /// Gives a connection its first turn, and then to the worker with the fewest.
    pub fn admit(&mut self, admission: Admission<Terms>) {
        let Some(mailbox) = self.mailboxes.iter().min_by_key(|one| one.connections.load(Ordering::Relaxed)) else {
            return;
        };
        mailbox.connections.fetch_add(1, Ordering::Relaxed);
        let generation = admission.generation;
        let mut connection = Box::new(Connection::admitted(admission));
        let limit = connection.line_length(mailbox.line_length.load(Ordering::Relaxed));
        let mut first_turn = connection.read(limit, &mut self.buffers, &self.audit);
        let slot = mailbox.take_slot();
        if let Outcome::Goes = first_turn {
            let event = EpollEvent::new(connection.interest(), slot as u64);
            // Before the worker has the connection: from then on it may close it at any time.
            if mailbox.epoll.add(&connection.socket, event).is_err() {
                // Out of memory or watches (fs.epoll.max_user_watches): this one cannot be served.
                first_turn = Outcome::Over(None);
            }
        }
        let goes = matches!(first_turn, Outcome::Goes);
        let message = Message::Admit { connection, slot, generation, first_turn };
        if goes {
            mailbox.post_quietly(message);
        } else {
            mailbox.post(message);
        }
    }
}
