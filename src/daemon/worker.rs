//! The event loop behind the gate: one thread, one epoll, many connections. Workers share nothing.
//!
//! Each connection has its turns ([`Protocol::turn`]), and each user its part of them ([`Rounds`]). In the steady state nothing is allocated, and a connection with nothing
//! pending owns no buffer.

use std::io;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use peergate::audit::Reason;
use peergate::poll_timeout;
use peergate::systemd::Monitored;

use crate::buffers::Buffers;
use crate::close::{Context, End};
use crate::connection::{Connection, WorkerConfig};
use crate::mailbox::{Mailbox, Message, SECOND, TOKEN_WAKE};
use crate::moment::Moment;
use crate::pacing::Pacing;
use crate::protocol::{Interest, Protocol, Ready, Turn};
use crate::rounds::{Rounds, Share};
use crate::timeouts::Timeouts;

/// The most that is read from one connection before another gets its turn.
pub const READ: usize = 64 * 1024;
/// Turns of a connection that is brought to rest: what it had sent by then, and an end to it.
const LAST_TURNS: usize = 32;

/// How often in a row one peer must have been heard before it is worth waiting for awake.
const ALONE: u32 = 2;
/// The same where a connection has two descriptors: one message makes several events then.
const ALONE_IN_A_PAIR: u32 = 8;
/// Turns in a row of the peer that is waited for awake, before everything else gets a look.
const TURNS_ALONE: u32 = 4;
/// Looks for that peer alone, before one for all connections.
const LOOKS_ALONE: u32 = 8;

/// A running worker, as the rest of the daemon sees it.
pub struct Worker<P: Protocol> {
    mailbox: Arc<Mailbox<P>>,
    number: usize,
}

impl<P: Protocol> Worker<P> {
    /// Starts worker `number`.
    ///
    /// # Errors
    /// What epoll, eventfd or starting a thread say.
    pub fn start(number: usize, config: WorkerConfig<P>, context: Context) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new(&config)?);
        let mut running = WorkerLoop::new(Arc::clone(&mailbox), config, context);
        thread::Builder::new().name(format!("worker-{number}")).spawn(move || running.run())?;
        Ok(Self { mailbox, number })
    }

    /// Where the first turn gives connections to it.
    pub fn mailbox(&self) -> Arc<Mailbox<P>> {
        Arc::clone(&self.mailbox)
    }

    /// How many connections it serves, including connections in its mailbox.
    pub fn connections(&self) -> usize {
        self.mailbox.connections.load(Ordering::Relaxed)
    }

    /// Takes over a connection from an earlier process.
    pub fn resume(&self, connection: Box<Connection<P>>) {
        self.mailbox.connections.fetch_add(1, Ordering::Relaxed);
        self.mailbox.post(Message::Resume(connection));
    }

    /// Puts a configuration in force and judges every connection by it. `done` hears when that is finished.
    pub fn configure(&self, config: WorkerConfig<P>, done: mpsc::Sender<()>) {
        self.mailbox.post(Message::Configure(config, done));
    }

    /// Ends the worker: up to `carry` connections come back through `reply` at rest, the rest get what they are owed and
    /// an end of file. After `until` no peer is waited for.
    pub fn end(&self, carry: usize, until: Instant, reply: mpsc::Sender<Vec<Box<Connection<P>>>>) {
        self.mailbox.post(Message::End { carry, until, reply });
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        let mailbox = Arc::clone(&self.mailbox);
        Monitored::new(format!("worker {}", self.number), &self.mailbox.heartbeat, move || mailbox.wake())
    }
}

struct WorkerLoop<P: Protocol> {
    mailbox: Arc<Mailbox<P>>,
    context: Context,
    config: WorkerConfig<P>,
    /// Each in its place, which is the token of its events.
    connections: Vec<Option<Box<Connection<P>>>>,
    /// How many places are taken.
    present: usize,
    /// Whose turn it is.
    rounds: Rounds,
    timeouts: Timeouts,
    /// When turns are due that nothing else calls for: [`Protocol::due`].
    due_turns: Timeouts,
    buffers: Buffers,
    pacing: Pacing,
    /// The token of the last event, and how often in a row no other came.
    last_heard: u64,
    alone: u32,
    ending: Option<Ending<P>>,
}

struct Ending<P: Protocol> {
    until: Instant,
    carried: Vec<Box<Connection<P>>>,
    reply: mpsc::Sender<Vec<Box<Connection<P>>>>,
}

impl<P: Protocol> WorkerLoop<P> {
    fn new(mailbox: Arc<Mailbox<P>>, config: WorkerConfig<P>, context: Context) -> Self {
        let pacing = Pacing::new(context.busy_poll);
        Self {
            mailbox,
            context,
            config,
            connections: Vec::new(),
            present: 0,
            rounds: Rounds::default(),
            timeouts: Timeouts::default(),
            due_turns: Timeouts::default(),
            buffers: Buffers::new(READ),
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
                    token if P::HAS_SECOND && token & SECOND != 0 => {
                        self.note_ready((token & !SECOND) as usize, Ready::Second);
                    }
                    slot => self.note_ready(slot as usize, Ready::Peer),
                }
            }
            self.note_last_heard(&events[..count]);
            self.give_turns();
            if self.mailbox.has_mail() {
                self.open_mail();
                self.alone = 0;
            }
            self.expire();
            if P::HAS_SECOND {
                self.take_due_turns();
            }
            if self.has_ended() {
                return;
            }
        }
    }

    /// Something has happened on a connection.
    fn note_ready(&mut self, slot: usize, ready: Ready) {
        if self.connections.get(slot).is_none_or(Option::is_none) {
            // It came quietly. Where it is not even in the mail yet, the gate's thread is about to put it there.
            self.open_mail();
            if self.connections.get(slot).is_none_or(Option::is_none) {
                return thread::yield_now();
            }
        }
        if !self.rounds.add(slot, ready) {
            // Heard of once more, and then not any more until the epoll is asked again: each look would find it.
            if let Some(connection) = self.connections[slot].as_mut().filter(|connection| connection.heard.is_some()) {
                connection.heard = None;
                let once =
                    EpollEvent::new(connection.protocol.waits_for().flags() | EpollFlags::EPOLLONESHOT, slot as u64);
                let _ = self.mailbox.epoll.modify(&connection.socket, &mut { once });
            }
        }
    }

    /// Gives turns until nothing is ready, or it is time to look for what has happened meanwhile.
    fn give_turns(&mut self) {
        let until = self.rounds.work() + self.rounds.bounds().work;
        while self.rounds.work() < until {
            let Some((slot, ready)) = self.rounds.next_turn() else { return };
            self.turn(slot, ready);
        }
    }

    fn wait(&mut self, events: &mut [EpollEvent]) -> usize {
        if !self.rounds.is_empty() {
            return self.mailbox.epoll.wait(events, EpollTimeout::ZERO).unwrap_or(0);
        }
        if self.alone >= if P::HAS_SECOND { ALONE_IN_A_PAIR } else { ALONE } {
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

    /// Serves the one peer that talks without sleeping in between, as long as that pays. Its socket is looked at, not the
    /// epoll: one system call less for each message. `Some`: how many events there are for other connections. `None`: time to sleep.
    fn look(&mut self, events: &mut [EpollEvent]) -> Option<usize> {
        let slot = usize::try_from(self.last_heard).ok()?;
        let (mut turns, mut looks) = (0, 0);
        while self.pacing.goes_on_looking() {
            if self.mailbox.has_mail() {
                return Some(0);
            }
            let place = self.connections.get(slot).and_then(Option::as_ref);
            if place.is_none_or(|connection| connection.protocol.waits_for() != Interest::Read) {
                return None;
            }
            if self.turn(slot, Ready::Any) {
                self.pacing.found();
                turns += 1;
                if turns < TURNS_ALONE && self.rounds.is_empty() {
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
            // A peer that runs on this very processor waits for it.
            if !self.pacing.gives_way() {
                return None;
            }
        }
        None
    }

    /// Looking again pays where one peer talks alone: the events of several share the cost of one wake-up.
    fn note_last_heard(&mut self, events: &[EpollEvent]) {
        // Both descriptors of a connection are one peer's.
        let place = |event: &EpollEvent| match event.data() {
            TOKEN_WAKE => TOKEN_WAKE,
            token => token & !SECOND,
        };
        match events {
            [] => {}
            [event] if place(event) == self.last_heard => self.alone = self.alone.saturating_add(1),
            [.., event] => (self.alone, self.last_heard) = (0, place(event)),
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let due = self.timeouts.due().into_iter().chain(self.due_turns.due()).min();
        let idle = due.map(|due| Instant::now() + due.since(Moment::now()));
        let end = self.ending.as_ref().map(|ending| ending.until);
        poll_timeout(idle.into_iter().chain(end).min())
    }

    fn open_mail(&mut self) {
        for message in self.mailbox.open() {
            match message {
                Message::Admit { connection, slot } => {
                    let is_told_once = P::HAS_SECOND && connection.watched().is_told_once();
                    self.put(slot, connection);
                    // An event of it may have come before this message, and will not come again.
                    if is_told_once {
                        self.rounds.add(slot, Ready::Any);
                    }
                }
                Message::Resume(connection) => self.resume(connection),
                Message::Configure(config, done) => {
                    self.configure(config);
                    let _ = done.send(());
                }
                Message::End { carry, until, reply } => self.end(carry, until, reply),
            }
        }
    }

    fn resume(&mut self, mut connection: Box<Connection<P>>) {
        if let Some(text) = connection.protocol.outdated(&self.config.settings, &connection.rule.terms().own) {
            return self.close(connection, End::Outdated(text));
        }
        connection.protocol.set_settings(&self.config.settings);
        connection.bound_send_buffer(&self.config.settings);
        let slot = self.mailbox.take_slot();
        if self.mailbox.watch(&mut connection, slot).is_err() {
            // Out of memory or watches (fs.epoll.max_user_watches): this connection cannot be served.
            self.mailbox.free_slot(slot);
            return self.close(connection, End::Closed);
        }
        self.put(slot, connection);
    }

    fn put(&mut self, slot: usize, connection: Box<Connection<P>>) {
        if let Some(due) = connection.times_out(&self.config) {
            self.timeouts.push(due, slot, connection.progress.number);
        }
        if let Some(due) = connection.protocol.due() {
            self.due_turns.push(due, slot, connection.progress.number);
        }
        if self.connections.len() <= slot {
            self.connections.resize_with(slot + 1, || None);
        }
        self.rounds.put(slot, self.config.policy.owner_of(connection.peer.uid()));
        self.connections[slot] = Some(connection);
        self.present += 1;
        let connections = &self.connections;
        self.timeouts.sort_out(self.present, |slot, number| {
            connections[slot].as_ref().is_some_and(|connection| connection.progress.number == number)
        });
    }

    /// One connection's turn. Says whether anything happened.
    fn turn(&mut self, slot: usize, ready: Ready) -> bool {
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else { return false };
        let (due, lines) = (connection.protocol.due(), connection.protocol.counters().lines);
        let mut share = Share::of(ready, self.rounds.bounds().lines);
        let turn = connection.turn(&mut share, &self.config.settings, &mut self.buffers, &self.context.audit);
        let answered = connection.protocol.counters().lines.unwrap_or(0) - lines.unwrap_or(0);
        self.rounds.charge(slot, &share, answered);
        match turn {
            Turn::Idle | Turn::Progress => {
                if turn == Turn::Progress && !self.timeouts.is_empty() {
                    connection.progress.active = Moment::now();
                }
                // A turn that ended at its bounds: the next one need not be asked for.
                if !P::HAS_SECOND && turn == Turn::Progress && share.goes_on(connection.protocol.waits_for()) {
                    self.rounds.add_again(slot);
                } else if !renew_interest(&self.mailbox, slot, connection) {
                    self.end_of(slot, End::Closed);
                    return true;
                }
                if connection.protocol.due() != due {
                    self.note_due_turn_of(slot);
                }
                return turn == Turn::Progress;
            }
            over => {
                if let Some(end) = End::of(over) {
                    self.end_of(slot, end);
                }
            }
        }
        true
    }

    /// Takes a connection out of its place, which stays reserved.
    fn take(&mut self, slot: usize) -> Option<Box<Connection<P>>> {
        let connection = self.connections.get_mut(slot)?.take()?;
        self.rounds.take(slot);
        self.present -= 1;
        Some(connection)
    }

    fn end_of(&mut self, slot: usize, end: End) {
        if let Some(connection) = self.take(slot) {
            self.mailbox.free_slot(slot);
            self.close(connection, end);
        }
    }

    /// Ends a connection that is in no place any more.
    fn close(&mut self, connection: Box<Connection<P>>, end: End) {
        // While everything ends, a connection with nothing left to send ends because of that.
        let is_last = matches!(end, End::Closed) && self.ending.is_some();
        let end = if is_last { End::Ended(Reason::Stopping) } else { end };
        self.context.close(connection, end, &self.config.settings, &mut self.buffers, &self.mailbox);
    }

    /// A new configuration: every connection is judged again, by its ids at connect and its units as first read.
    fn configure(&mut self, config: WorkerConfig<P>) {
        let before = std::mem::replace(&mut self.config, config);
        self.timeouts.clear();
        for slot in 0..self.connections.len() {
            let Some(mut connection) = self.take(slot) else { continue };
            // Where no timeout was in force, the last activity is not known: it counts from now.
            if connection.times_out(&before).is_none() {
                connection.progress.active = Moment::now();
            }
            let takes = P::takes_descriptors(&self.config.settings);
            if takes != P::takes_descriptors(&before.settings) {
                connection.socket.take_descriptors(takes);
            }
            connection.protocol.set_settings(&self.config.settings);
            if let Some(end) = self.judge_again(&mut connection) {
                self.mailbox.free_slot(slot);
                self.close(connection, end);
                continue;
            }
            connection.bound_send_buffer(&self.config.settings);
            renew_interest(&self.mailbox, slot, &mut connection);
            self.put(slot, connection);
        }
    }

    /// Judges a connection by the policy in force. `None`: it stays.
    fn judge_again(&mut self, connection: &mut Connection<P>) -> Option<End> {
        match self.context.judge.judge_again(&mut connection.peer, &connection.socket, &self.config.policy) {
            Ok(rule) => connection.rule = rule,
            Err(denial) => return Some(End::Denied(denial)),
        }
        if let Some(text) = connection.protocol.outdated(&self.config.settings, &connection.rule.terms().own) {
            return Some(End::Outdated(text));
        }
        if !connection.verifies_more(self.config.verify) {
            return if connection.verify(self.config.verify) { None } else { Some(End::SenderMismatch(None)) };
        }
        // What has come by now is answered while it still may be: a peer that reads its answers, and is not in the middle of
        // a message, stays.
        if let Some(end) = self.last_turns(connection) {
            return Some(end);
        }
        if !connection.verify(true) {
            return Some(End::SenderMismatch(None));
        }
        // What came too late for that ends the connection now.
        self.last_turns(connection)
    }

    fn note_due_turn_of(&mut self, slot: usize) {
        let Some(connection) = self.connections.get(slot).and_then(Option::as_ref) else { return };
        if let Some(due) = connection.protocol.due() {
            self.due_turns.push(due, slot, connection.progress.number);
        }
    }

    /// Gives each connection its turn for which the time has come.
    fn take_due_turns(&mut self) {
        if self.due_turns.is_empty() {
            return;
        }
        let now = Moment::now();
        while let Some((slot, number)) = self.due_turns.take_due(now) {
            let Some(connection) = self.connections.get(slot).and_then(Option::as_ref) else { continue };
            if connection.progress.number == number && connection.protocol.due().is_some_and(|due| due <= now) {
                self.turn(slot, Ready::Any);
            }
        }
    }

    /// Ends connections on which nothing moved for too long.
    fn expire(&mut self) {
        if self.timeouts.is_empty() {
            return;
        }
        let now = Moment::now();
        while let Some((slot, number)) = self.timeouts.take_due(now) {
            let Some(connection) = self.connections.get(slot).and_then(Option::as_ref) else { continue };
            // The place may be another connection's by now.
            if connection.progress.number != number {
                continue;
            }
            match connection.times_out(&self.config) {
                Some(due) if due > now => self.timeouts.push(due, slot, number),
                Some(_) => self.end_of(slot, End::Ended(Reason::Idle)),
                None => {}
            }
        }
    }

    /// Brings every connection to rest: some to be carried over, the rest to their end.
    fn end(&mut self, carry: usize, until: Instant, reply: mpsc::Sender<Vec<Box<Connection<P>>>>) {
        let mut carried = Vec::new();
        // A connection that stays for now is put back, with an entry of its own.
        self.timeouts.clear();
        let ready = self.all_ready();
        for (slot, is_ready) in ready.into_iter().enumerate() {
            let Some(mut connection) = self.take(slot) else { continue };
            if let Some(end) = self.end_before_rest(&mut connection, is_ready) {
                self.mailbox.free_slot(slot);
                self.close(connection, end);
            } else if carried.len() < carry {
                self.mailbox.free_slot(slot);
                if connection.times_out(&self.config).is_none() {
                    // The last activity is not known; where the next process has a timeout, it counts from now.
                    connection.progress.active = Moment::now();
                }
                carried.push(connection);
            } else {
                // Everything received by now is answered, a fragment too; then the end. On our side what is in the queue
                // can still be read, and after it comes the end of file; the peer can add nothing to it.
                let _ = connection.socket.shutdown(Shutdown::Read);
                renew_interest(&self.mailbox, slot, &mut connection);
                self.put(slot, connection);
            }
        }
        // Where the worker goes on. Where it does not, the epoll ends with it.
        if self.present > 0 {
            for connection in &carried {
                self.mailbox.unwatch(connection);
            }
        }
        self.ending = Some(Ending { until, carried, reply });
    }

    /// By place, whether something has happened on a connection that it has had no turn for yet. A look at each of thousands
    /// would take as long as leaving them to the next process.
    fn all_ready(&mut self) -> Vec<bool> {
        let mut ready = vec![false; self.connections.len()];
        while let Some((slot, _)) = self.rounds.next_turn() {
            ready[slot] = true;
        }
        // The epoll tells of so many at a time, and of those again only after all others (epoll_wait(2)).
        let mut events = [EpollEvent::empty(); 128];
        loop {
            let count = self.mailbox.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            let mut is_news = false;
            for event in &events[..count] {
                // The wake-up has no place.
                if let Some(ready) = ready.get_mut((event.data() & !SECOND) as usize) {
                    is_news |= !std::mem::replace(ready, true);
                }
            }
            if !is_news {
                return ready;
            }
        }
    }

    /// Gives a connection its last turns, if it is ready for them. `Some`: how it ends, because it cannot be brought to rest.
    fn end_before_rest(&mut self, connection: &mut Connection<P>, is_ready: bool) -> Option<End> {
        if let Some(end) = if is_ready { self.last_turns(connection) } else { None } {
            return Some(end);
        }
        match connection.protocol.will_end() {
            Some(turn @ (Turn::Refused | Turn::DescriptorsReceived)) => End::of(turn),
            // The service manager would have to close the descriptors in the end, and PID 1 must not wait for a peer.
            _ if P::takes_descriptors(&self.config.settings) => None,
            _ => connection.socket.holds_descriptors().then_some(End::DescriptorsReceived),
        }
    }

    /// Reads and answers what a connection had sent by now. `Some`: how it ends.
    fn last_turns(&mut self, connection: &mut Connection<P>) -> Option<End> {
        for _ in 0..LAST_TURNS {
            let waits_for_room = connection.protocol.waits_for() == Interest::Write;
            let mut share = Share::whole(Ready::Any);
            let turn = connection.turn(&mut share, &self.config.settings, &mut self.buffers, &self.context.audit);
            match turn {
                Turn::Idle => return None,
                Turn::Progress if waits_for_room && connection.protocol.waits_for() == Interest::Write => return None,
                Turn::Progress => connection.progress.active = Moment::now(),
                over => return End::of(over),
            }
        }
        None
    }

    /// Whether the worker was told to end, and no connection is left or time is up.
    fn has_ended(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        let is_over = ending.until <= Instant::now();
        if self.present > 0 && !is_over {
            return false;
        }
        for slot in 0..self.connections.len() {
            self.end_of(slot, End::Ended(Reason::Stopping));
        }
        if let Some(ending) = self.ending.take() {
            let _ = ending.reply.send(ending.carried);
        }
        true
    }
}

/// Has the epoll look for what a connection waits for now. False where it cannot: the connection cannot be served.
fn renew_interest<P: Protocol>(mailbox: &Mailbox<P>, slot: usize, connection: &mut Connection<P>) -> bool {
    let now = connection.watched();
    let before = connection.heard.replace(now);
    if before == Some(now) {
        return true;
    }
    if before.is_none_or(|before| before.peer != now.peer) {
        let mut event = EpollEvent::new(now.peer.flags(), slot as u64);
        let _ = mailbox.epoll.modify(&connection.socket, &mut event);
    }
    mailbox.watch_second(connection, slot, before, now).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{ErrorKind, IoSlice, Read, Write};
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use peergate::Stream;
    use peergate::gate::Gate;

    use crate::counting::allocations_of;
    use crate::first_turn::FirstTurn;
    use crate::terms::Terms;
    use crate::testing::{LineSettings, LineTerms, Lines, admission, config, context, owner};
    use crate::timeouts::LEFT_OVER;

    /// A worker with one connection, and the other end of that.
    fn serve_one(number: usize, take_in: fn(OwnedFd) -> Stream) -> (Worker<Lines>, UnixStream, Gate<Terms<LineTerms>>) {
        let policy = owner();
        let (context, gate) = context(&policy);
        let worker = Worker::start(number, config(&policy), context.clone()).unwrap();
        let (mut admission, theirs) = admission(&policy, 1);
        admission.socket = take_in(admission.socket.into());
        FirstTurn::new(vec![worker.mailbox()], context, LineSettings::default()).admit(admission);
        (worker, theirs, gate)
    }

    #[test]
    fn connections_that_are_over_leave_nothing_behind_however_far_off_their_timeout_was() {
        let policy = owner();
        let (context, _gate) = context(&policy);
        let config = WorkerConfig { idle_timeout: Some(Duration::from_secs(86_400)), ..config(&policy) };
        let mut serving = WorkerLoop::new(Arc::new(Mailbox::new(&config).unwrap()), config, context);
        let mut clients = Vec::new();
        for connection in 0..2000 {
            let slot = serving.mailbox.take_slot();
            let (admission, client) = admission(&policy, connection);
            serving.put(slot, Box::new(Connection::admitted(admission)));
            // Each tenth of the first hundred stays.
            if connection < 100 && connection % 10 == 0 {
                clients.push(client);
            } else {
                serving.end_of(slot, End::Closed);
            }
            let bound = 2 * serving.present + LEFT_OVER + 2;
            assert!(serving.timeouts.len() <= bound, "{} after {connection}", serving.timeouts.len());
        }
        let mut stay = (0..100).step_by(10);
        assert!(stay.all(|number| serving.timeouts.entries_of(number) == 1), "each live connection has one entry");
        let (reply, _replies) = mpsc::channel();
        serving.end(0, Instant::now(), reply);
        assert_eq!(serving.timeouts.len(), clients.len());
    }

    #[test]
    fn a_reload_counts_from_the_last_that_moved_where_a_timeout_had_it_noted_and_from_now_elsewhere() {
        let hour = Duration::from_secs(3600);
        for (before, is_noted) in [(Some(hour), true), (None, false), (Some(Duration::MAX), false)] {
            let policy = owner();
            let (context, _gate) = context(&policy);
            let config = |idle_timeout| WorkerConfig { idle_timeout, ..config(&policy) };
            let mailbox = Arc::new(Mailbox::new(&config(before)).unwrap());
            let mut serving = WorkerLoop::new(mailbox, config(before), context);
            let slot = serving.mailbox.take_slot();
            let (admission, _client) = admission(&policy, 1);
            let mut connection = Connection::admitted(admission);
            connection.progress.active = Moment::now().checked_sub(hour / 2).unwrap();
            serving.put(slot, Box::new(connection));
            serving.configure(config(Some(hour / 4)));
            serving.expire();
            assert_eq!(serving.present, usize::from(!is_noted), "{before:?}");
        }
    }

    #[test]
    fn what_each_of_many_connections_had_sent_is_answered_before_they_are_left() {
        let policy = owner();
        let (context, _gate) = context(&policy);
        let config = config(&policy);
        let mut serving = WorkerLoop::new(Arc::new(Mailbox::new(&config).unwrap()), config, context);
        // More than the epoll tells of at once. In between are some that have sent nothing.
        let mut clients: Vec<_> = (0..300)
            .map(|number| {
                let (admission, client) = admission(&policy, number);
                serving.resume(Box::new(Connection::admitted(admission)));
                client
            })
            .collect();
        for client in clients.iter_mut().step_by(2) {
            client.write_all(b"a line\nand half").unwrap();
        }
        // As after a turn that ended at its bounds: heard of once more, and then not any more.
        serving.rounds.add_again(0);
        serving.note_ready(0, Ready::Peer);
        let _ = serving.mailbox.epoll.wait(&mut [EpollEvent::empty(); 300], EpollTimeout::ZERO).unwrap();
        let (reply, replies) = mpsc::channel();
        serving.end(usize::MAX, Instant::now(), reply);
        assert!(serving.has_ended());
        let carried = replies.recv().unwrap();
        assert_eq!(carried.len(), clients.len());
        for (client, connection) in clients.iter_mut().zip(&carried).step_by(2) {
            client.set_nonblocking(true).unwrap();
            let mut answer = [0; 20];
            assert_eq!(client.read(&mut answer).unwrap(), b"a line\n".len());
            assert_eq!(connection.protocol.held, b"and half");
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
        let (_worker, mut client, _gate) = serve_one(77, Stream::accepted);
        let one: (&[u8], &[u8]) = (b"a line of thirty-two bytes, LF in\n", b"a line of thirty-two bytes, LF in\n");
        let many = (b"x\n".repeat(500), b"x\n".repeat(500));
        let long = ([&[b'y'; 60_000][..], b"\n"].concat(), [&[b'y'; 60_000][..], b"\n"].concat());
        let mut round = |times| {
            ask(&mut client, one.0, one.1, times);
            ask(&mut client, &many.0, &many.1, times);
            ask(&mut client, &long.0, &long.1, times);
            // A line in two parts: held in between.
            for _ in 0..times {
                client.write_all(b"half ").unwrap();
                ask(&mut client, b"a line\n", b"half a line\n", 1);
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
        let (_worker, mut client, gate) = serve_one(78, Stream::unrefused);
        // Without a gate, the worker closes by itself.
        gate.finish();
        ask(&mut client, b"hello\n", b"hello\n", 3);
        send_a_descriptor(&client).unwrap();
        let end = client.read(&mut [0; 64]);
        assert!(
            matches!(&end, Ok(0)) || end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "{end:?}"
        );
    }

    #[test]
    fn a_connection_with_descriptors_unread_is_not_left_to_the_manager_to_close() {
        let (worker, mut client, _gate) = serve_one(79, Stream::unrefused);
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
