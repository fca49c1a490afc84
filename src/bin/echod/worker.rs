//! The event loop behind the gate: one thread, one epoll, many connections. Workers share nothing.
//!
//! A worker reads what is there, frames it ([`line`]), writes it back. A peer that does not read is not read
//! from. In the steady state nothing is allocated, and a connection with nothing pending owns no buffer.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};

use peergate::activation::address_of;
use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::gate::{Admission, Usher, learn};
use peergate::ids::Uid;
use peergate::limits::Permit;
use peergate::peer::{self, Peer};
use peergate::policy::{Policy, Rule, Verdict};
use peergate::service::{Activity, Beat, Watched};

use crate::config::Terms;
use crate::line::{self, Cursor, End};
use crate::pacing::Pacing;

/// The most that is read from one connection before another gets its turn.
const READ: usize = 64 * 1024;
/// The most echo that is put together for one write: that of a whole read, even one of bare LFs.
const ROOM: usize = 4 * READ;
/// Buffers of each kind kept for the next connection that needs one.
const SPARE_BUFFERS: usize = 16;
/// What fits into a small buffer. Whoever leaves a line unfinished keeps a buffer for as long as they like: it must not
/// be one that grew for somebody else's long lines.
const SMALL: usize = 4 * 1024;
/// Reads from one connection when it is brought to rest: what it had sent by then, and an end to it.
const LAST_READS: usize = 32;

/// How often in a row one peer must have been heard before it is worth waiting for awake.
const ALONE: u32 = 2;

const TOKEN_WAKE: u64 = u64::MAX;

/// What all connections live by; replaced as a whole at a reload.
#[derive(Clone)]
pub struct Ruling {
    pub policy: Arc<Policy<Terms>>,
    pub line_length: usize,
    pub idle_timeout: Option<Duration>,
}

/// What a worker shares with the rest of the program.
#[derive(Clone)]
pub struct Surroundings {
    pub audit: Audit,
    pub usher: Usher<Terms>,
    pub activity: Arc<Activity>,
    pub busy_poll: Option<Duration>,
}

/// A connection with its whole state: at rest, on its way between two processes.
pub struct Carried {
    pub socket: OwnedFd,
    pub peer: Peer,
    pub connection: u64,
    pub lines: u64,
    pub bytes: u64,
    pub age: Duration,
    /// Received, not yet wholly echoed.
    pub held: Vec<u8>,
    /// How much of the first line's echo is out.
    pub sent: usize,
    /// The peer will send no more.
    pub ended: bool,
    pub pass_credentials: bool,
}

impl Carried {
    /// A connection of which nothing is known but who is on the other end. `None` where not even that is.
    pub fn without_state(socket: OwnedFd) -> Option<Self> {
        let peer = Peer::credentials_of(&socket).ok()?;
        Some(Self {
            socket,
            peer,
            connection: 0,
            lines: 0,
            bytes: 0,
            age: Duration::ZERO,
            held: Vec::new(),
            sent: 0,
            ended: false,
            pass_credentials: false,
        })
    }
}

enum Message {
    Admit(Box<Admission<Terms>>),
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
struct Mailbox {
    messages: Mutex<VecDeque<Message>>,
    waiting: AtomicBool,
    asleep: AtomicBool,
    wake: EventFd,
    connections: AtomicUsize,
    beat: Arc<Beat>,
}

impl Mailbox {
    fn post(&self, message: Message) {
        self.lock().push_back(message);
        self.waiting.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        // EAGAIN: it is awake already.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running worker, as the rest of the program sees it.
pub struct Worker {
    mailbox: Arc<Mailbox>,
    number: usize,
    thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts worker `number`.
    ///
    /// # Errors
    /// What epoll, eventfd or starting a thread say.
    pub fn start(number: usize, ruling: Ruling, surroundings: Surroundings) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let mailbox = Arc::new(Mailbox {
            messages: Mutex::new(VecDeque::new()),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake,
            connections: AtomicUsize::new(0),
            beat: Arc::new(Beat::default()),
        });
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // Edge-triggered, it never needs to be read: each write makes a new edge.
        epoll.add(mailbox.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_WAKE))?;
        let mut serving = Loop::new(Arc::clone(&mailbox), epoll, ruling, surroundings);
        let thread = thread::Builder::new().name(format!("worker-{number}")).spawn(move || serving.run())?;
        Ok(Self { mailbox, number, thread: Some(thread) })
    }

    /// Something to hand connections over with, for the gate's thread.
    pub fn door(&self) -> Door {
        Door(Arc::clone(&self.mailbox))
    }

    /// How many connections it serves, those on their way to it included.
    pub fn connections(&self) -> usize {
        self.mailbox.connections.load(Ordering::Relaxed)
    }

    /// Takes over a connection from an earlier process.
    pub fn resume(&self, carried: Carried, rule: Arc<Rule<Terms>>, permit: Permit) {
        self.mailbox.connections.fetch_add(1, Ordering::Relaxed);
        self.mailbox.post(Message::Resume(Box::new(carried), rule, permit));
    }

    /// Puts a new ruling in force and judges every connection by it. `done` hears when that is finished.
    pub fn rule(&self, ruling: Ruling, generation: u64, done: mpsc::Sender<()>) {
        self.mailbox.post(Message::Rule(ruling, generation, done));
    }

    /// Ends the worker: up to `carry` connections come back through `reply` at rest, the others have been
    /// echoed everything they sent and see the end of file. After `until` nobody is waited for.
    pub fn end(&self, carry: usize, until: Instant, reply: mpsc::Sender<Vec<Carried>>) {
        self.mailbox.post(Message::End { carry, until, reply });
    }

    /// For the watchdog.
    pub fn watched(&self) -> Watched {
        let mailbox = Arc::clone(&self.mailbox);
        Watched {
            name: format!("worker {}", self.number),
            beat: Arc::clone(&self.mailbox.beat),
            nudge: Box::new(move || mailbox.wake()),
        }
    }

    /// Waits for the thread, once it was told to end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// See [`Worker::door`].
pub struct Door(Arc<Mailbox>);

impl Door {
    /// How many connections the worker serves, those on their way to it included.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Relaxed)
    }

    /// Hands one over.
    pub fn admit(&self, admission: Admission<Terms>) {
        self.0.connections.fetch_add(1, Ordering::Relaxed);
        self.0.post(Message::Admit(Box::new(admission)));
    }
}

/// One connection. Small, because an idle one is nothing else.
struct Connection {
    /// First, so that it is given back before the peer can see the end of file.
    permit: Permit,
    socket: OwnedFd,
    peer: Peer,
    rule: Arc<Rule<Terms>>,
    number: u64,
    lines: u64,
    bytes: u64,
    since: Instant,
    /// When something last came or went; kept only where a timeout asks for it.
    active: Instant,
    /// Received, not yet wholly echoed; empty most of the time.
    held: Vec<u8>,
    sent: usize,
    state: State,
    pass_credentials: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for the peer to send.
    Reading,
    /// Waits for the peer to take its echo.
    Writing,
    /// As before, and nothing more will come: when it is taken, the connection is over.
    Finishing,
}

/// How a turn ended.
enum Outcome {
    Goes,
    Over(Option<Reason>),
    TooLong,
    /// The data came from this user.
    Stranger(Option<Uid>),
    /// The policy admits the peer no more; the rule that denies it, if one does.
    Denied(Option<Arc<Rule<Terms>>>),
}

/// What one read gave.
enum Input {
    Bytes(usize),
    Nothing,
    End,
    Broken,
    Stranger(Option<Uid>),
}

struct Loop {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    around: Surroundings,
    ruling: Ruling,
    generation: u64,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    /// The earliest time a connection's timeout could run out; one entry for each that has one.
    timeouts: BinaryHeap<Reverse<(Instant, usize, u64)>>,
    buffers: Buffers,
    too_long: Arc<[u8]>,
    nothing: Arc<[u8]>,
    pacing: Pacing,
    /// Whom the last event came from, and how often in a row it came from nobody else.
    last_heard: u64,
    alone: u32,
    ending: Option<Ending>,
}

struct Ending {
    until: Instant,
    carried: Vec<Carried>,
    reply: mpsc::Sender<Vec<Carried>>,
}

/// What all connections of a worker use in turn.
struct Buffers {
    input: Box<[u8]>,
    output: Vec<u8>,
    spare: Vec<Vec<u8>>,
    spare_small: Vec<Vec<u8>>,
}

impl Loop {
    fn new(mailbox: Arc<Mailbox>, epoll: Epoll, ruling: Ruling, around: Surroundings) -> Self {
        let pacing = Pacing::new(around.busy_poll);
        Self {
            mailbox,
            epoll,
            around,
            ruling,
            generation: 0,
            connections: Vec::new(),
            free: Vec::new(),
            timeouts: BinaryHeap::new(),
            buffers: Buffers {
                input: vec![0; READ].into(),
                output: Vec::new(),
                spare: Vec::new(),
                spare_small: Vec::new(),
            },
            too_long: Arc::from(line::TOO_LONG),
            nothing: Arc::from(&b""[..]),
            pacing,
            last_heard: TOKEN_WAKE,
            alone: 0,
            ending: None,
        }
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 128];
        loop {
            self.mailbox.beat.answer();
            let count = self.wait(&mut events);
            for event in &events[..count] {
                match event.data() {
                    TOKEN_WAKE => {}
                    slot => self.turn(slot as usize),
                }
            }
            self.notice_who(&events[..count]);
            if self.mailbox.waiting.load(Ordering::SeqCst) {
                self.open_mail();
                self.alone = 0;
            }
            self.expire();
            if self.has_ended() {
                return;
            }
        }
    }

    fn wait(&mut self, events: &mut [EpollEvent]) -> usize {
        let mailbox = &self.mailbox;
        let has_mail = || mailbox.waiting.load(Ordering::SeqCst);
        if self.alone >= ALONE {
            if let Some(count) = self.pacing.look(&self.epoll, events, has_mail) {
                return count;
            }
        }
        // Said before the last look into the mailbox, so that whoever posts after it wakes us.
        mailbox.asleep.store(true, Ordering::SeqCst);
        let timeout = if has_mail() { EpollTimeout::ZERO } else { self.timeout() };
        let count = self.pacing.sleep(&self.epoll, events, timeout);
        self.mailbox.asleep.store(false, Ordering::SeqCst);
        count
    }

    /// Looking again pays where one peer talks and nobody else: the events of several share the cost of one wake-up.
    fn notice_who(&mut self, events: &[EpollEvent]) {
        match events {
            [] => {}
            [event] if event.data() == self.last_heard => self.alone = self.alone.saturating_add(1),
            [.., event] => (self.alone, self.last_heard) = (0, event.data()),
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let due = self.timeouts.peek().map(|Reverse((due, ..))| *due);
        let due = due.into_iter().chain(self.ending.as_ref().map(|ending| ending.until)).min();
        due.map_or(EpollTimeout::NONE, |due| {
            // Rounded up, so as not to wake just before the time.
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
        })
    }

    fn open_mail(&mut self) {
        self.mailbox.waiting.store(false, Ordering::SeqCst);
        let mail = std::mem::take(&mut *self.mailbox.lock());
        for message in mail {
            match message {
                Message::Admit(admission) => self.admit(*admission),
                Message::Resume(carried, rule, permit) => self.resume(*carried, rule, permit),
                Message::Rule(ruling, generation, done) => {
                    self.rule(ruling, generation);
                    let _ = done.send(());
                }
                Message::End { carry, until, reply } => self.end(carry, until, reply),
            }
        }
    }

    fn admit(&mut self, admission: Admission<Terms>) {
        let since = Instant::now();
        let mut connection = Box::new(Connection {
            permit: admission.permit,
            socket: admission.socket,
            peer: admission.peer,
            rule: admission.rule,
            number: admission.connection,
            lines: 0,
            bytes: 0,
            since,
            active: since,
            held: Vec::new(),
            sent: 0,
            state: State::Reading,
            pass_credentials: admission.pass_credentials,
        });
        // Judged just before a reload that this worker has already been through.
        if admission.generation < self.generation {
            if let Err(rule) = self.judge_again(&mut connection) {
                return self.part(connection, Outcome::Denied(rule));
            }
        }
        self.settle_in(connection);
    }

    fn resume(&mut self, carried: Carried, rule: Arc<Rule<Terms>>, permit: Permit) {
        let now = Instant::now();
        let state = if carried.ended { State::Finishing } else { State::Reading };
        let mut connection = Box::new(Connection {
            permit,
            socket: carried.socket,
            peer: carried.peer,
            rule,
            number: carried.connection,
            lines: carried.lines,
            bytes: carried.bytes,
            since: now.checked_sub(carried.age).unwrap_or(now),
            active: now,
            held: carried.held,
            sent: carried.sent,
            state,
            pass_credentials: carried.pass_credentials,
        });
        let limit = self.limit_of(&connection);
        let outcome = connection.flush(limit, &mut self.buffers, &self.around.audit);
        match outcome {
            Outcome::Goes => self.settle_in(connection),
            other => self.part(connection, other),
        }
    }

    /// Gives a connection its place, and its first turn: most have sent something by now.
    fn settle_in(&mut self, connection: Box<Connection>) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let interest = connection.interest();
        if let Err(_error) = self.epoll.add(&connection.socket, EpollEvent::new(interest, slot as u64)) {
            // Out of memory or watches (fs.epoll.max_user_watches): this one cannot be served.
            self.free.push(slot);
            return self.part(connection, Outcome::Over(None));
        }
        if let Some(span) = self.idle_timeout_of(&connection) {
            self.timeouts.push(Reverse((connection.active + span, slot, connection.number)));
        }
        let reading = connection.state == State::Reading;
        self.connections[slot] = Some(connection);
        if reading {
            self.turn(slot);
        }
    }

    /// One connection's turn: a single read and what follows from it, or a single write of what waits.
    fn turn(&mut self, slot: usize) {
        let Some(place) = self.connections.get_mut(slot) else { return };
        let Some(connection) = place.as_mut() else { return };
        let limit = connection.rule.terms().line_length.unwrap_or(self.ruling.line_length);
        if !self.timeouts.is_empty() {
            connection.active = Instant::now();
        }
        let before = connection.state;
        let outcome = match before {
            State::Reading => connection.read(limit, &mut self.buffers, &self.around.audit),
            State::Writing | State::Finishing => connection.flush(limit, &mut self.buffers, &self.around.audit),
        };
        if let Outcome::Goes = outcome {
            if (connection.state == State::Reading) != (before == State::Reading) {
                let mut event = EpollEvent::new(connection.interest(), slot as u64);
                let _ = self.epoll.modify(&connection.socket, &mut event);
            }
            return;
        }
        if let Some(connection) = self.take(slot) {
            self.part(connection, outcome);
        }
    }

    fn take(&mut self, slot: usize) -> Option<Box<Connection>> {
        let connection = self.connections.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(connection)
    }

    /// The end of a connection that is in no place any more.
    fn part(&mut self, mut connection: Box<Connection>, outcome: Outcome) {
        let reason = match &outcome {
            Outcome::Over(None) if self.ending.is_some() => Some(Reason::Stopping),
            Outcome::Over(reason) => *reason,
            Outcome::TooLong => Some(Reason::LineLength),
            Outcome::Stranger(_) => Some(Reason::Sender),
            Outcome::Denied(_) => Some(Reason::Policy),
            Outcome::Goes => None,
        };
        match &outcome {
            Outcome::TooLong => {
                let (peer, rule) = (&mut connection.peer, &connection.rule);
                let socket = &connection.socket;
                let (number, limit) = (connection.number, rule.terms().line_length.unwrap_or(self.ruling.line_length));
                self.around.audit.turned_away(Event::Refused, Reason::LineLength, Some(peer.uid()), || Record {
                    reason: Some(Reason::LineLength),
                    rule: Some(rule.name().as_str().into()),
                    socket: address_of(socket).ok(),
                    connection: Some(number),
                    about: Some({
                        let details = peer.details(socket);
                        About::peer(peer, details)
                    }),
                    text: Some(format!("a line was longer than {limit} bytes")),
                    ..Record::new(Event::Refused)
                });
            }
            Outcome::Stranger(sender) => {
                let text = match sender {
                    Some(uid) => format!("its data came from another user (uid {uid})"),
                    None => "its data came without credentials".to_owned(),
                };
                let rule = Arc::clone(&connection.rule);
                self.record_revoked(&mut connection, Reason::Sender, rule.name().as_str(), text);
            }
            Outcome::Denied(rule) => {
                let (rule, text) = match rule {
                    Some(rule) => (rule.name().as_str(), format!("{} denies it now", rule.name())),
                    None => ("default", "no rule allows it any more".to_owned()),
                };
                self.record_revoked(&mut connection, Reason::Policy, rule, text);
            }
            Outcome::Over(_) | Outcome::Goes => {}
        }
        if self.around.audit.writes_connections() {
            self.around.audit.write(Record {
                reason,
                rule: Some(connection.rule.name().as_str().into()),
                socket: address_of(&connection.socket).ok(),
                connection: Some(connection.number),
                lines: Some(connection.lines),
                bytes: Some(connection.bytes),
                duration: Some(connection.since.elapsed()),
                about: Some(About::former(&connection.peer)),
                ..Record::new(Event::Closed)
            });
        }
        let Connection { permit, socket, held, .. } = *connection;
        self.buffers.give_back(held);
        // Given back before the peer can know that it is over, and come again.
        drop(permit);
        self.mailbox.connections.fetch_sub(1, Ordering::Relaxed);
        match outcome {
            Outcome::TooLong => {
                let _ = self.epoll.delete(&socket);
                self.around.usher.see_off(socket, &self.too_long);
            }
            Outcome::Stranger(_) | Outcome::Denied(_) => {
                let _ = self.epoll.delete(&socket);
                self.around.usher.revoke(socket);
            }
            // The peer may still be sending: it is to see an end of file, not a reset.
            Outcome::Over(Some(_)) => {
                let _ = self.epoll.delete(&socket);
                self.around.usher.see_off(socket, &self.nothing);
            }
            Outcome::Over(None) | Outcome::Goes => drop(socket),
        }
        self.around.activity.stir();
    }

    fn record_revoked(&self, connection: &mut Connection, reason: Reason, rule: &str, text: String) {
        let details = connection.peer.details(&connection.socket);
        connection.peer.release_process();
        self.around.audit.write(Record {
            reason: Some(reason),
            rule: Some(rule.into()),
            socket: address_of(&connection.socket).ok(),
            connection: Some(connection.number),
            lines: Some(connection.lines),
            bytes: Some(connection.bytes),
            about: Some(About::peer(&connection.peer, details)),
            text: Some(text),
            ..Record::new(Event::Revoked)
        });
    }

    /// A new ruling: every connection is judged again, with the credentials it had at connect.
    fn rule(&mut self, ruling: Ruling, generation: u64) {
        self.ruling = ruling;
        self.generation = generation;
        self.timeouts.clear();
        for slot in 0..self.connections.len() {
            let Some(mut connection) = self.connections[slot].take() else { continue };
            if let Err(rule) = self.judge_again(&mut connection) {
                self.free.push(slot);
                self.part(connection, Outcome::Denied(rule));
                continue;
            }
            if let Some(span) = self.idle_timeout_of(&connection) {
                // Where no timeout was in force the last activity is not known: it counts from now.
                connection.active = connection.active.max(Instant::now());
                self.timeouts.push(Reverse((connection.active + span, slot, connection.number)));
            }
            self.connections[slot] = Some(connection);
        }
    }

    /// Whether the peer may stay, and by which rule; else the rule that denies it, if one does.
    fn judge_again(&self, connection: &mut Connection) -> Result<(), Option<Arc<Rule<Terms>>>> {
        let policy = &self.ruling.policy;
        learn(&mut connection.peer, &connection.socket, policy);
        let verdict = policy.decide(&connection.peer);
        connection.peer.release_process();
        match verdict {
            Verdict::Admitted(rule) => {
                connection.rule = Arc::clone(rule);
                Ok(())
            }
            Verdict::Denied(rule) => Err(rule.map(Arc::clone)),
        }
    }

    fn limit_of(&self, connection: &Connection) -> usize {
        connection.rule.terms().line_length.unwrap_or(self.ruling.line_length)
    }

    fn idle_timeout_of(&self, connection: &Connection) -> Option<Duration> {
        connection.rule.terms().idle_timeout.unwrap_or(self.ruling.idle_timeout)
    }

    /// Ends connections on which nothing moved for too long.
    fn expire(&mut self) {
        while let Some(&Reverse((due, slot, number))) = self.timeouts.peek() {
            let now = Instant::now();
            if due > now {
                return;
            }
            self.timeouts.pop();
            let Some(connection) = self.connections.get(slot).and_then(Option::as_ref) else { continue };
            // The place may belong to somebody else by now.
            let Some(span) = self.idle_timeout_of(connection).filter(|_| connection.number == number) else { continue };
            let due = connection.active + span;
            if due > now {
                self.timeouts.push(Reverse((due, slot, number)));
            } else if let Some(connection) = self.take(slot) {
                self.part(connection, Outcome::Over(Some(Reason::Idle)));
            }
        }
    }

    /// Brings everyone to rest: some to be carried over, the others to their end.
    fn end(&mut self, carry: usize, until: Instant, reply: mpsc::Sender<Vec<Carried>>) {
        let mut carried = Vec::new();
        for slot in 0..self.connections.len() {
            let Some(mut connection) = self.connections[slot].take() else { continue };
            let outcome = self.last_turns(&mut connection);
            match outcome {
                Outcome::Goes if carried.len() < carry => {
                    let _ = self.epoll.delete(&connection.socket);
                    self.free.push(slot);
                    carried.push((*connection).at_rest());
                }
                Outcome::Goes => {
                    // Everything received by now is echoed, a fragment too; then the end. On our side what is in the
                    // queue can still be read, and after it comes the end of file; the peer can add nothing to it.
                    let _ = shutdown(connection.socket.as_raw_fd(), Shutdown::Read);
                    let mut event = EpollEvent::new(connection.interest(), slot as u64);
                    let _ = self.epoll.modify(&connection.socket, &mut event);
                    self.connections[slot] = Some(connection);
                }
                over => {
                    self.free.push(slot);
                    self.part(connection, over);
                }
            }
        }
        self.ending = Some(Ending { until, carried, reply });
    }

    /// Reads and echoes what a connection had sent by now.
    fn last_turns(&mut self, connection: &mut Connection) -> Outcome {
        let limit = self.limit_of(connection);
        for _ in 0..LAST_READS {
            if connection.state != State::Reading {
                return connection.flush(limit, &mut self.buffers, &self.around.audit);
            }
            let before = connection.bytes;
            match connection.read(limit, &mut self.buffers, &self.around.audit) {
                Outcome::Goes if connection.bytes == before => return Outcome::Goes,
                Outcome::Goes => {}
                over => return over,
            }
        }
        Outcome::Goes
    }

    /// Whether the worker was told to end, and nobody is left or time is up.
    fn has_ended(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        let is_over = ending.until <= Instant::now();
        if self.connections.len() > self.free.len() && !is_over {
            return false;
        }
        for slot in 0..self.connections.len() {
            if let Some(connection) = self.take(slot) {
                self.part(connection, Outcome::Over(Some(Reason::Stopping)));
            }
        }
        if let Some(ending) = self.ending.take() {
            let _ = ending.reply.send(ending.carried);
        }
        true
    }
}

impl Connection {
    fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading => EpollFlags::EPOLLIN,
            State::Writing | State::Finishing => EpollFlags::EPOLLOUT,
        }
    }

    /// Reads once, and echoes every line that is complete.
    fn read(&mut self, limit: usize, buffers: &mut Buffers, audit: &Audit) -> Outcome {
        let most = limit.clamp(1, READ);
        let count = match self.receive(most, buffers) {
            Input::Bytes(count) => count,
            Input::Nothing => return Outcome::Goes,
            Input::Broken => return Outcome::Over(None),
            Input::Stranger(uid) => return Outcome::Stranger(uid),
            Input::End => {
                self.state = State::Finishing;
                return self.flush(limit, buffers, audit);
            }
        };
        self.bytes += count as u64;
        if !self.held.is_empty() {
            buffers.make_room(&mut self.held, count);
            let new = &buffers.input[..count];
            let ends = memchr::memchr(b'\n', new).is_some();
            self.held.extend_from_slice(new);
            // Nothing to echo yet, and the whole of it need not be looked at again.
            return if ends || self.held.len() > limit { self.flush(limit, buffers, audit) } else { Outcome::Goes };
        }
        let Buffers { input, output, .. } = buffers;
        let input = &input[..count];
        let (at, outcome) = self.emit(input, Cursor::default(), limit, output, audit);
        if at.start < count && matches!(outcome, Outcome::Goes) {
            self.sent = at.sent;
            let mut held = buffers.take(count - at.start);
            held.extend_from_slice(&buffers.input[at.start..count]);
            self.held = held;
        }
        outcome
    }

    /// Echoes what is held, as far as the peer takes it.
    fn flush(&mut self, limit: usize, buffers: &mut Buffers, audit: &Audit) -> Outcome {
        let held = std::mem::take(&mut self.held);
        let from = Cursor { start: 0, sent: self.sent };
        let (at, outcome) = self.emit(&held, from, limit, &mut buffers.output, audit);
        self.held = held;
        self.sent = at.sent;
        self.held.drain(..at.start);
        if self.held.is_empty() {
            buffers.give_back(std::mem::take(&mut self.held));
        } else if self.held.len() <= SMALL && self.held.capacity() > SMALL {
            let mut small = buffers.take(self.held.len());
            small.extend_from_slice(&self.held);
            buffers.give_back(std::mem::replace(&mut self.held, small));
        }
        match (outcome, self.state) {
            (Outcome::Goes, State::Finishing) if self.held.is_empty() => Outcome::Over(None),
            (outcome, _) => outcome,
        }
    }

    /// Writes the echo of `input` from `from` on. Sets whether the connection waits to write or to read.
    fn emit(
        &mut self,
        input: &[u8],
        from: Cursor,
        limit: usize,
        output: &mut Vec<u8>,
        audit: &Audit,
    ) -> (Cursor, Outcome) {
        let mut at = from;
        let ended = self.state == State::Finishing;
        loop {
            output.clear();
            let echoed = line::echo(input, at, limit, ended, ROOM, output);
            let written = match self.send(output) {
                Ok(written) => written,
                Err(_) => return (at, Outcome::Over(None)),
            };
            let all = written == output.len();
            let (next, lines) = if all { (echoed.next, echoed.lines) } else { line::advance(input, at, written) };
            if audit.writes_lines() {
                self.record_lines(&input[at.start..next.start], audit);
            }
            self.lines += lines;
            at = next;
            if !all {
                if self.state == State::Reading {
                    self.state = State::Writing;
                }
                return (at, Outcome::Goes);
            }
            match echoed.end {
                End::Full => {}
                End::TooLong => return (at, Outcome::TooLong),
                End::Complete => {
                    if self.state == State::Writing {
                        self.state = State::Reading;
                    }
                    return (at, Outcome::Goes);
                }
            }
        }
    }

    /// As much as the peer takes now.
    fn send(&self, output: &[u8]) -> Result<usize, Errno> {
        let mut written = 0;
        while written < output.len() {
            match send(self.socket.as_raw_fd(), &output[written..], MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => written += count,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    fn receive(&self, most: usize, buffers: &mut Buffers) -> Input {
        let socket = self.socket.as_raw_fd();
        let input = &mut buffers.input[..most];
        let received = if self.pass_credentials {
            match peer::receive(&self.socket, input) {
                Ok((1.., sender)) if sender != Some(self.peer.uid()) => return Input::Stranger(sender),
                Ok((count, _)) => Ok(count),
                Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
            }
        } else {
            recv(socket, input, MsgFlags::empty())
        };
        match received {
            Ok(0) => Input::End,
            Ok(count) => Input::Bytes(count),
            Err(Errno::EAGAIN | Errno::EINTR) => Input::Nothing,
            Err(_) => Input::Broken,
        }
    }

    fn record_lines(&self, echoed: &[u8], audit: &Audit) {
        for line in echoed.split_inclusive(|byte| *byte == b'\n') {
            audit.write(Record {
                rule: Some(self.rule.name().as_str().into()),
                connection: Some(self.number),
                bytes: Some(line.len() as u64),
                about: Some(About::former(&self.peer)),
                ..Record::new(Event::Line)
            });
        }
    }

    fn at_rest(self) -> Carried {
        let age = self.since.elapsed();
        let Self { socket, peer, number, lines, bytes, held, sent, state, pass_credentials, .. } = self;
        Carried {
            socket,
            peer,
            connection: number,
            lines,
            bytes,
            age,
            held,
            sent,
            ended: state == State::Finishing,
            pass_credentials,
        }
    }
}

impl Buffers {
    /// An empty one for so many bytes, for now.
    fn take(&mut self, length: usize) -> Vec<u8> {
        let spare = if length <= SMALL { &mut self.spare_small } else { &mut self.spare };
        spare.pop().unwrap_or_default()
    }

    /// Before `more` bytes are added: a big one, where there is one, instead of making a small one grow.
    fn make_room(&mut self, held: &mut Vec<u8>, more: usize) {
        if held.capacity() <= SMALL && held.len() + more > SMALL {
            if let Some(mut big) = self.spare.pop() {
                big.extend_from_slice(held);
                self.give_back(std::mem::replace(held, big));
            }
        }
    }

    /// Keeps an empty buffer for the next one who needs it, unless it has grown too big to keep.
    fn give_back(&mut self, mut buffer: Vec<u8>) {
        let spare = match buffer.capacity() {
            0 => return,
            1..=SMALL => &mut self.spare_small,
            _ => &mut self.spare,
        };
        if buffer.capacity() <= 2 * READ && spare.len() < SPARE_BUFFERS {
            buffer.clear();
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use peergate::audit::Settings;
    use peergate::gate::{self, Replies, Setup};
    use peergate::limits::{Caps, Limits};

    use crate::counting::allocations_of;

    /// A worker with one connection, and the other end of that.
    fn serve_one(number: usize) -> (Worker, UnixStream, gate::Door<Terms>) {
        let me = Uid::new(nix::unistd::geteuid().as_raw());
        let policy = Arc::new(Policy::<Terms>::owner_only(me));
        let audit = Audit::new(Settings::default());
        let activity = Arc::new(Activity::new().unwrap());
        let caps = Caps { connections: 10, connections_per_user: 10 };
        let setup = Setup {
            listeners: Vec::new(),
            ruling: gate::Ruling { policy: Arc::clone(&policy), caps, pass_credentials: false },
            limits: Limits::new(),
            audit: audit.clone(),
            replies: Replies::default(),
            activity: Arc::clone(&activity),
            first_connection: 1,
        };
        let door = gate::Door::open(setup, |_| {}).unwrap();
        let ruling = Ruling { policy: Arc::clone(&policy), line_length: READ, idle_timeout: None };
        let around = Surroundings { audit, usher: door.usher(), activity, busy_poll: None };
        let worker = Worker::start(number, ruling, around).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let socket = OwnedFd::from(ours);
        let rule = Arc::clone(policy.rules().next().unwrap());
        worker.door().admit(Admission {
            peer: Peer::credentials_of(&socket).unwrap(),
            socket,
            rule,
            permit: Limits::new().resume(me),
            connection: 1,
            listener: "nowhere".into(),
            generation: 0,
            pass_credentials: false,
        });
        (worker, theirs, door)
    }

    fn thread_named(name: &str) -> i32 {
        let of = |entry: fs::DirEntry| {
            let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
            (comm.trim_end() == name).then(|| entry.file_name().to_string_lossy().parse().ok())?
        };
        fs::read_dir("/proc/self/task").unwrap().flatten().find_map(of).unwrap()
    }

    fn ask(client: &mut UnixStream, sent: &[u8], expected: &[u8], times: usize) {
        let mut answer = vec![0; expected.len()];
        for _ in 0..times {
            client.write_all(sent).unwrap();
            client.read_exact(&mut answer).unwrap();
            assert!(answer == expected, "not the echo");
        }
    }

    #[test]
    fn echoing_allocates_nothing_once_it_is_under_way() {
        let (_worker, mut client, _door) = serve_one(77);
        let one: (&[u8], &[u8]) = (b"a line of thirty-two bytes, LF in\n", b"> a line of thirty-two bytes, LF in\n");
        let many = (b"x\n".repeat(500), b"> x\n".repeat(500));
        let long = ([&[b'y'; 60_000][..], b"\n"].concat(), [b"> ", &[b'y'; 60_000][..], b"\n"].concat());
        let mut round = |times| {
            ask(&mut client, one.0, one.1, times);
            ask(&mut client, &many.0, &many.1, times);
            ask(&mut client, &long.0, &long.1, times);
            // A line in two parts: held in between.
            for _ in 0..times {
                client.write_all(b"half ").unwrap();
                ask(&mut client, b"a line\n", b"> half a line\n", 1);
            }
        };
        round(20);
        let worker = thread_named("worker-77");
        // A buffer grows when a line comes in more parts than any before it, until it has seen the most: so what is
        // claimed is that allocating ends. What allocates for each line, or each thousandth, never gets there.
        let mut free_of_it = 0;
        let batches = (0..200).take_while(|_| {
            free_of_it = if allocations_of(worker, || round(50)) == 0 { free_of_it + 1 } else { 0 };
            free_of_it < 20
        });
        let batches = batches.count();
        assert_eq!(free_of_it, 20, "still allocating after {batches} batches");
    }
}
