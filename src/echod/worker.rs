//! The event loop behind the gate: one thread, one epoll, many connections. Workers share nothing.
//!
//! Each connection has its turns ([`connection`](crate::connection)). A peer that does not read is not read from. In
//! the steady state nothing is allocated, and a connection with nothing pending owns no buffer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollTimeout};

use peergate::Wakeup;
use peergate::audit::{Audit, Reason};
use peergate::gate::{Closer, Judge};
use peergate::permits::Permit;
use peergate::policy::{Rule, Verdict};
use peergate::systemd::Monitored;

use crate::config::Terms;
use crate::connection::{Buffers, Carried, Connection, Outcome, READ, Ruling, State};
use crate::exit::Exit;
use crate::mailbox::{Mailbox, Message, TOKEN_WAKE};
use crate::pacing::Pacing;

/// Reads from one connection when it is brought to rest: what it had sent by then, and an end to it.
const LAST_READS: usize = 32;

/// Entries of timeouts that are not worth sorting out, however few connections there are.
const TIMEOUTS_LEFT_OVER: usize = 64;

/// How often in a row one peer must have been heard before it is worth waiting for awake.
const ALONE: u32 = 2;
/// Turns in a row of the peer that is waited for awake, before everything else gets a look.
const TURNS_ALONE: u32 = 4;
/// Looks for that peer alone, before one for everybody.
const LOOKS_ALONE: u32 = 8;

/// What a worker shares with the rest of the program.
#[derive(Clone)]
pub struct Surroundings {
    pub audit: Audit,
    pub closer: Closer,
    pub judge: Judge,
    pub wakeup: Arc<Wakeup>,
    pub busy_poll: Option<Duration>,
}

impl Surroundings {
    /// What a thread that serves needs to let go of connections.
    pub fn exit(&self) -> Exit {
        Exit::new(self.audit.clone(), self.closer.clone(), Arc::clone(&self.wakeup))
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
        let mailbox = Arc::new(Mailbox::new(&ruling)?);
        let mut serving = Loop::new(Arc::clone(&mailbox), ruling, surroundings);
        let thread = thread::Builder::new().name(format!("worker-{number}")).spawn(move || serving.run())?;
        Ok(Self { mailbox, number, thread: Some(thread) })
    }

    /// Where connections are handed over, for the [`Threshold`](crate::threshold::Threshold).
    pub fn mailbox(&self) -> Arc<Mailbox> {
        Arc::clone(&self.mailbox)
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
    pub fn monitored(&self) -> Monitored {
        let mailbox = Arc::clone(&self.mailbox);
        Monitored::new(format!("worker {}", self.number), &self.mailbox.heartbeat, move || mailbox.wake())
    }

    /// Waits for the thread, once it was told to end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    mailbox: Arc<Mailbox>,
    around: Surroundings,
    ruling: Ruling,
    generation: u64,
    /// Each in its place, which is the token of its events.
    connections: Vec<Option<Box<Connection>>>,
    /// How many places are taken.
    present: usize,
    /// The earliest time a connection's timeout could run out; one entry for each that has one, and some of connections
    /// that are over.
    timeouts: BinaryHeap<Reverse<(Instant, usize, u64)>>,
    buffers: Buffers,
    exit: Exit,
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

impl Loop {
    fn new(mailbox: Arc<Mailbox>, ruling: Ruling, around: Surroundings) -> Self {
        let pacing = Pacing::new(around.busy_poll);
        let exit = around.exit();
        Self {
            mailbox,
            around,
            ruling,
            generation: 0,
            connections: Vec::new(),
            present: 0,
            timeouts: BinaryHeap::new(),
            buffers: Buffers::new(READ),
            exit,
            pacing,
            last_heard: TOKEN_WAKE,
            alone: 0,
            ending: None,
        }
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 128];
        loop {
            self.mailbox.heartbeat.answer();
            let count = self.wait(&mut events);
            for event in &events[..count] {
                match event.data() {
                    TOKEN_WAKE => {}
                    slot => self.serve(slot as usize),
                }
            }
            self.notice_who(&events[..count]);
            if self.mailbox.has_mail() {
                self.open_mail();
                self.alone = 0;
            }
            self.expire();
            if self.has_ended() {
                return;
            }
        }
    }

    /// Something has happened on a connection.
    fn serve(&mut self, slot: usize) {
        if self.connections.get(slot).is_none_or(Option::is_none) {
            // It came quietly. Where it is not even in the mail yet, the gate's thread is about to put it there.
            self.open_mail();
            if self.connections.get(slot).is_none_or(Option::is_none) {
                return thread::yield_now();
            }
        }
        self.turn(slot);
    }

    fn wait(&mut self, events: &mut [EpollEvent]) -> usize {
        if self.alone >= ALONE {
            if let Some(count) = self.look(events) {
                return count;
            }
        }
        let timeout = if self.mailbox.sleeps(true) { self.timeout() } else { EpollTimeout::ZERO };
        // EINTR is as good as a timeout: the loop looks at its clock anyway.
        let count = self.pacing.sleep(|| self.mailbox.epoll.wait(events, timeout).unwrap_or(0));
        self.mailbox.sleeps(false);
        count
    }

    /// Serves the one peer that talks without sleeping in between, as long as that pays. It is its socket that is
    /// looked at, not the epoll: one system call less for each line. `Some`: how many events there are for others.
    /// `None`: time to sleep.
    fn look(&mut self, events: &mut [EpollEvent]) -> Option<usize> {
        let slot = usize::try_from(self.last_heard).ok()?;
        let (mut turns, mut looks) = (0, 0);
        while self.pacing.goes_on_looking() {
            if self.mailbox.has_mail() {
                return Some(0);
            }
            let place = self.connections.get(slot).and_then(Option::as_ref);
            if place.is_none_or(|connection| connection.state != State::Reading) {
                return None;
            }
            if self.turn(slot) {
                self.pacing.found();
                turns += 1;
                if turns < TURNS_ALONE {
                    continue;
                }
                return self.mailbox.epoll.wait(events, EpollTimeout::ZERO).ok();
            }
            looks += 1;
            if looks % LOOKS_ALONE == 0 {
                if let Ok(count @ 1..) = self.mailbox.epoll.wait(events, EpollTimeout::ZERO) {
                    return Some(count);
                }
            }
            // Where the peer runs on this very processor, it is waiting for us to let it.
            if !self.pacing.gives_way() {
                return None;
            }
        }
        None
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
        for message in self.mailbox.open() {
            match message {
                Message::Admit { connection, slot, generation } => self.admit(connection, slot, generation),
                Message::Resume(carried, rule, permit) => self.resume(*carried, rule, permit),
                Message::Rule(ruling, generation, done) => {
                    self.rule(ruling, generation);
                    let _ = done.send(());
                }
                Message::End { carry, until, reply } => self.end(carry, until, reply),
            }
        }
    }

    /// Takes over a connection that has had its first turn at the door, and is watched already.
    fn admit(&mut self, mut connection: Box<Connection>, slot: usize, generation: u64) {
        // Judged just before a reload that this worker has already been through.
        if generation < self.generation {
            let outcome = self.judge_again(&mut connection);
            if !matches!(outcome, Outcome::Goes) {
                self.mailbox.free_slot(slot);
                return self.part(connection, outcome);
            }
            self.renew_interest(slot, &connection);
        }
        self.put(slot, connection);
    }

    fn resume(&mut self, carried: Carried, rule: Arc<Rule<Terms>>, permit: Permit) {
        let mut connection = Box::new(Connection::resumed(carried, rule, permit));
        let outcome = connection.flush(&mut self.buffers, &self.around.audit);
        let Outcome::Goes = outcome else { return self.part(connection, outcome) };
        let slot = self.mailbox.take_slot();
        if self.mailbox.watch(&connection, slot).is_err() {
            // Out of memory or watches (fs.epoll.max_user_watches): this one cannot be served.
            self.mailbox.free_slot(slot);
            return self.part(connection, Outcome::Over(None));
        }
        self.put(slot, connection);
    }

    fn put(&mut self, slot: usize, connection: Box<Connection>) {
        if let Some(due) = runs_out(&connection, &self.ruling) {
            self.timeouts.push(Reverse((due, slot, connection.number)));
        }
        if self.connections.len() <= slot {
            self.connections.resize_with(slot + 1, || None);
        }
        self.connections[slot] = Some(connection);
        self.present += 1;
        // Entries of those who have left stay until they are due, which may be days: more of them than of those who
        // are here pay for a look at all.
        if self.timeouts.len() > 2 * self.present + TIMEOUTS_LEFT_OVER {
            let connections = &self.connections;
            self.timeouts.retain(|Reverse((_, slot, number))| {
                connections[*slot].as_ref().is_some_and(|connection| connection.number == *number)
            });
        }
    }

    /// One connection's turn: a single read and what follows from it, or a single write of what waits. Says whether
    /// anything happened.
    fn turn(&mut self, slot: usize) -> bool {
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else { return false };
        let limit = connection.line_length(self.ruling.line_length);
        let (state, bytes) = (connection.state, connection.bytes);
        let outcome = match state {
            State::Reading => connection.read(limit, &mut self.buffers, &self.around.audit),
            State::Writing | State::Finishing | State::AtDescriptors | State::Refusing => {
                connection.flush(&mut self.buffers, &self.around.audit)
            }
        };
        if let Outcome::Goes = outcome {
            if connection.state == state && state == State::Reading && connection.bytes == bytes {
                return false;
            }
            if !self.timeouts.is_empty() {
                connection.active = Instant::now();
            }
            if (connection.state == State::Reading) != (state == State::Reading) {
                let mut event = EpollEvent::new(connection.interest(), slot as u64);
                let _ = self.mailbox.epoll.modify(&connection.socket, &mut event);
            }
            return true;
        }
        self.end_of(slot, outcome);
        true
    }

    /// Takes a connection out of its place, which stays reserved.
    fn take(&mut self, slot: usize) -> Option<Box<Connection>> {
        let connection = self.connections.get_mut(slot)?.take()?;
        self.present -= 1;
        Some(connection)
    }

    fn end_of(&mut self, slot: usize, outcome: Outcome) {
        if let Some(connection) = self.take(slot) {
            self.mailbox.free_slot(slot);
            self.part(connection, outcome);
        }
    }

    /// The end of a connection that is in no place any more.
    fn part(&mut self, connection: Box<Connection>, outcome: Outcome) {
        self.exit.part(connection, outcome, self.ruling.line_length, &mut self.buffers, &self.mailbox);
    }

    /// A new ruling: every connection is judged again, with the credentials it had at connect.
    fn rule(&mut self, ruling: Ruling, generation: u64) {
        let before = std::mem::replace(&mut self.ruling, ruling);
        self.generation = generation;
        self.timeouts.clear();
        for slot in 0..self.connections.len() {
            let Some(mut connection) = self.take(slot) else { continue };
            // Where no timeout was in force the last activity is not known: it counts from now.
            if runs_out(&connection, &before).is_none() {
                connection.active = Instant::now();
            }
            let state = connection.state;
            let outcome = self.judge_again(&mut connection);
            if !matches!(outcome, Outcome::Goes) {
                self.mailbox.free_slot(slot);
                self.part(connection, outcome);
                continue;
            }
            if connection.state != state {
                self.renew_interest(slot, &connection);
            }
            self.put(slot, connection);
        }
    }

    /// [`Outcome::Goes`] where the peer may stay.
    fn judge_again(&mut self, connection: &mut Connection) -> Outcome {
        let verdict = self.around.judge.judge(&mut connection.peer, &connection.socket, &self.ruling.policy);
        connection.peer.release_process();
        connection.peer.forget_groups();
        match verdict {
            Verdict::Admitted(rule) => connection.rule = Arc::clone(rule),
            Verdict::Denied(rule) => return Outcome::Denied(rule.map(Arc::clone)),
        }
        if connection.verifies_more(self.ruling.verify) {
            // What has come by now is echoed while it still may be: a peer that reads its echo, and is not in the middle of
            // a line, stays.
            let outcome = self.last_turns(connection);
            if !matches!(outcome, Outcome::Goes) {
                return outcome;
            }
            if !connection.verify(true) {
                return Outcome::Stranger(None);
            }
            // What came too late for that ends the connection now.
            return self.last_turns(connection);
        }
        if connection.verify(self.ruling.verify) { Outcome::Goes } else { Outcome::Stranger(None) }
    }

    /// After turns that were not its own.
    fn renew_interest(&self, slot: usize, connection: &Connection) {
        let mut event = EpollEvent::new(connection.interest(), slot as u64);
        let _ = self.mailbox.epoll.modify(&connection.socket, &mut event);
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
            let Some(due) = runs_out(connection, &self.ruling).filter(|_| connection.number == number) else {
                continue;
            };
            if due > now {
                self.timeouts.push(Reverse((due, slot, number)));
            } else {
                self.end_of(slot, Outcome::Over(Some(Reason::Idle)));
            }
        }
    }

    /// Brings everyone to rest: some to be carried over, the others to their end.
    fn end(&mut self, carry: usize, until: Instant, reply: mpsc::Sender<Vec<Carried>>) {
        let mut carried = Vec::new();
        // Whoever stays for now is put back, with an entry of their own.
        self.timeouts.clear();
        for slot in 0..self.connections.len() {
            let Some(mut connection) = self.take(slot) else { continue };
            match self.last_turns(&mut connection) {
                // The manager would have to close them in the end, and PID 1 must not wait for anybody.
                Outcome::Goes if connection.state == State::AtDescriptors || connection.socket.holds_descriptors() => {
                    self.mailbox.free_slot(slot);
                    self.part(connection, Outcome::Baggage);
                }
                Outcome::Goes if connection.state == State::Refusing => {
                    self.mailbox.free_slot(slot);
                    self.part(connection, Outcome::TooLong);
                }
                Outcome::Goes if carried.len() < carry => {
                    let _ = self.mailbox.epoll.delete(&connection.socket);
                    self.mailbox.free_slot(slot);
                    let idle = runs_out(&connection, &self.ruling).map(|_| connection.active.elapsed());
                    carried.push(Carried { idle, ..(*connection).at_rest() });
                }
                Outcome::Goes => {
                    // Everything received by now is echoed, a fragment too; then the end. On our side what is in the
                    // queue can still be read, and after it comes the end of file; the peer can add nothing to it.
                    let _ = connection.socket.shutdown(Shutdown::Read);
                    let mut event = EpollEvent::new(connection.interest(), slot as u64);
                    let _ = self.mailbox.epoll.modify(&connection.socket, &mut event);
                    self.put(slot, connection);
                }
                over => {
                    self.mailbox.free_slot(slot);
                    self.part(connection, over);
                }
            }
        }
        self.exit.is_ending = true;
        self.ending = Some(Ending { until, carried, reply });
    }

    /// Reads and echoes what a connection had sent by now.
    fn last_turns(&mut self, connection: &mut Connection) -> Outcome {
        let limit = connection.line_length(self.ruling.line_length);
        for _ in 0..LAST_READS {
            if connection.state != State::Reading {
                match connection.flush(&mut self.buffers, &self.around.audit) {
                    Outcome::Goes if connection.state == State::Reading => continue,
                    outcome => return outcome,
                }
            }
            let before = connection.bytes;
            match connection.read(limit, &mut self.buffers, &self.around.audit) {
                Outcome::Goes if connection.bytes == before => return Outcome::Goes,
                Outcome::Goes => connection.active = Instant::now(),
                over => return over,
            }
        }
        Outcome::Goes
    }

    /// Whether the worker was told to end, and nobody is left or time is up.
    fn has_ended(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        let is_over = ending.until <= Instant::now();
        if self.present > 0 && !is_over {
            return false;
        }
        for slot in 0..self.connections.len() {
            self.end_of(slot, Outcome::Over(Some(Reason::Stopping)));
        }
        if let Some(ending) = self.ending.take() {
            let _ = ending.reply.send(ending.carried);
        }
        true
    }
}

/// When a connection ends if nothing moves on it. `None`: never, or at a time that no clock can tell; then nobody keeps
/// up when something last moved.
fn runs_out(connection: &Connection, ruling: &Ruling) -> Option<Instant> {
    let span = connection.rule.terms().idle_timeout.unwrap_or(ruling.idle_timeout)?;
    connection.active.checked_add(span)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs;
    use std::io::{ErrorKind, IoSlice, Read, Write};
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use peergate::audit::Settings;
    use peergate::fd_passing::Stream;
    use peergate::gate::{Admission, Gate, Setup};
    use peergate::ids::Uid;
    use peergate::peer::Peer;
    use peergate::permits::Permits;
    use peergate::policy::Policy;

    use crate::counting::allocations_of;
    use crate::threshold::Threshold;

    /// What a worker needs, and a gate without listeners.
    pub fn surroundings(policy: &Arc<Policy<Terms>>) -> (Surroundings, Gate<Terms>) {
        let audit = Audit::new(Settings::default());
        let gate = Gate::new(Setup::without_listeners(Arc::clone(policy), audit.clone())).unwrap();
        let wakeup = Arc::new(Wakeup::new().unwrap());
        (Surroundings { audit, closer: gate.closer(), judge: gate.judge(), wakeup, busy_poll: None }, gate)
    }

    /// Somebody who was let in, and their end of the connection.
    pub fn admission(policy: &Policy<Terms>, connection: u64) -> (Admission<Terms>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let socket = Stream::accepted(ours);
        let (peer, rule) = (Peer::credentials_of(&socket).unwrap(), policy.rules().next().unwrap());
        let mut admission = Admission::new(socket, peer, Arc::clone(rule), Permits::new().resume(policy.me()));
        admission.connection = connection;
        (admission, theirs)
    }

    /// A worker with one connection, and the other end of that.
    fn serve_one(number: usize, take_in: fn(OwnedFd) -> Stream) -> (Worker, UnixStream, Gate<Terms>) {
        let policy = Arc::new(Policy::<Terms>::owner_only(Uid::effective()));
        let (around, door) = surroundings(&policy);
        let ruling = Ruling { policy: Arc::clone(&policy), line_length: READ, idle_timeout: None, verify: false };
        let (audit, exit) = (around.audit.clone(), around.exit());
        let worker = Worker::start(number, ruling, around).unwrap();
        let (mut admission, theirs) = admission(&policy, 1);
        admission.socket = take_in(admission.socket.into());
        Threshold::new(vec![worker.mailbox()], audit, exit, Pacing::new(None)).admit(admission);
        (worker, theirs, door)
    }

    #[test]
    fn connections_that_are_over_leave_nothing_behind_however_far_off_their_timeout_was() {
        let policy = Arc::new(Policy::<Terms>::owner_only(Uid::effective()));
        let (around, _door) = surroundings(&policy);
        let idle_timeout = Some(Duration::from_secs(86_400));
        let ruling = Ruling { policy: Arc::clone(&policy), line_length: READ, idle_timeout, verify: false };
        let mut serving = Loop::new(Arc::new(Mailbox::new(&ruling).unwrap()), ruling, around);
        let mut clients = Vec::new();
        for connection in 0..2000 {
            let slot = serving.mailbox.take_slot();
            let (admission, client) = admission(&policy, connection);
            serving.put(slot, Box::new(Connection::admitted(admission)));
            // Each tenth of the first hundred stays.
            if connection < 100 && connection % 10 == 0 {
                clients.push(client);
            } else {
                serving.end_of(slot, Outcome::Over(None));
            }
            let bound = 2 * serving.present + TIMEOUTS_LEFT_OVER + 2;
            assert!(serving.timeouts.len() <= bound, "{} after {connection}", serving.timeouts.len());
        }
        let mut stay = (0..100).step_by(10);
        let entries = |number| serving.timeouts.iter().filter(|Reverse((.., of))| *of == number).count();
        assert!(stay.all(|number| entries(number) == 1), "whoever is here has one entry");
        let (reply, _replies) = mpsc::channel();
        serving.end(0, Instant::now(), reply);
        assert_eq!(serving.timeouts.len(), clients.len());
    }

    #[test]
    fn a_reload_counts_from_the_last_that_moved_where_a_timeout_had_it_noted_and_from_now_elsewhere() {
        let hour = Duration::from_secs(3600);
        for (before, is_noted) in [(Some(hour), true), (None, false), (Some(Duration::MAX), false)] {
            let policy = Arc::new(Policy::<Terms>::owner_only(Uid::effective()));
            let (around, _door) = surroundings(&policy);
            let ruling = Ruling { policy: Arc::clone(&policy), line_length: READ, idle_timeout: before, verify: false };
            let mut serving = Loop::new(Arc::new(Mailbox::new(&ruling).unwrap()), ruling.clone(), around);
            let slot = serving.mailbox.take_slot();
            let (admission, _client) = admission(&policy, 1);
            let mut connection = Connection::admitted(admission);
            connection.active = Instant::now().checked_sub(hour / 2).unwrap();
            serving.put(slot, Box::new(connection));
            serving.rule(Ruling { idle_timeout: Some(hour / 4), ..ruling }, 1);
            serving.expire();
            assert_eq!(serving.present, usize::from(!is_noted), "{before:?}");
        }
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
        let (_worker, mut client, _door) = serve_one(77, Stream::accepted);
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

    fn send_a_descriptor(client: &UnixStream) -> nix::Result<usize> {
        let fds = [client.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(b"with it\n")], &control, MsgFlags::empty(), None)
    }

    // As on a kernel that cannot refuse descriptors: a pair of sockets lets them through.

    #[test]
    fn a_peer_that_sends_descriptors_is_served_until_then() {
        let (_worker, mut client, _door) = serve_one(78, Stream::unrefused);
        ask(&mut client, b"hello\n", b"> hello\n", 3);
        send_a_descriptor(&client).unwrap();
        let end = client.read(&mut [0; 64]);
        assert!(
            matches!(&end, Ok(0)) || end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "{end:?}"
        );
    }

    #[test]
    fn a_connection_with_descriptors_unread_is_not_left_to_the_manager_to_close() {
        let (worker, mut client, _door) = serve_one(79, Stream::unrefused);
        client.set_nonblocking(true).unwrap();
        // Until it waits for us to read, and reads no more itself.
        let mut full = 0;
        while full < 50 {
            full = if client.write(&[b'\n'; 1024]).is_ok() { 0 } else { full + 1 };
            thread::yield_now();
        }
        // Room for one more message, while the worker still waits for more room than that: nothing is taken from it any
        // more once the message is out.
        let mut buffer = vec![0; 1024];
        while let Err(error) = send_a_descriptor(&client) {
            assert_eq!(error, nix::errno::Errno::EAGAIN);
            let _ = client.read(&mut buffer);
        }
        let (reply, carried) = mpsc::channel();
        worker.end(10, Instant::now() + Duration::from_secs(60), reply);
        assert_eq!(carried.recv().unwrap().len(), 0);
    }
}
