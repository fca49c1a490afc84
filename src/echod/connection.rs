//! One connection and its turns: read what is there, frame it ([`line`]), write it back. Knows no other connection,
//! no epoll and no thread.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{getsockopt, sockopt};

use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::fd_passing::Stream;
use peergate::gate::Admission;
use peergate::handover::attach_credentials;
use peergate::ids::Uid;
use peergate::peer::Peer;
use peergate::permits::Permit;
use peergate::policy::{Policy, Rule};

use crate::config::Terms;
use crate::line::{self, Cursor, End};

/// The most that is read from one connection before another gets its turn.
pub const READ: usize = 64 * 1024;
/// The most echo of one turn: that of a whole read, even one of bare LFs, and no more, however long a line is.
const ROOM: usize = 4 * READ;
/// Buffers kept for the next connection that needs one: so many big ones, so many small ones.
const SPARE: usize = 4;
const SPARE_SMALL: usize = 16;
/// What fits into a small buffer. Whoever leaves a line unfinished keeps a buffer for as long as they like: it must not
/// be one that grew for somebody else's long lines.
const SMALL: usize = 4 * 1024;

/// What all connections live by; replaced as a whole at a reload.
#[derive(Clone)]
pub struct Ruling {
    pub policy: Arc<Policy<Terms>>,
    pub line_length: usize,
    pub idle_timeout: Option<Duration>,
    /// Whether the sender of every piece of data must be the user who was judged.
    pub verify: bool,
}

impl Ruling {
    /// Whether there are connections that end when nothing moves on them.
    pub fn is_timed(&self) -> bool {
        self.idle_timeout.is_some()
            || self.policy.rules().any(|rule| matches!(rule.terms().idle_timeout, Some(Some(_))))
    }
}

/// A connection with its whole state: at rest, on its way between two processes.
pub struct Carried {
    pub socket: OwnedFd,
    pub peer: Peer,
    pub connection: u64,
    pub lines: u64,
    pub bytes: u64,
    pub age: Duration,
    /// For how long nothing had come or gone; `None` where no timeout asked for it.
    pub idle: Option<Duration>,
    /// Received, not yet wholly echoed.
    pub held: Vec<u8>,
    /// How much of the first line's echo is out.
    pub sent: usize,
    /// The peer will send no more.
    pub ended: bool,
    pub pass_credentials: bool,
    pub unattested: usize,
}

impl Carried {
    /// A connection of which nothing is known but who is on the other end. `None` where not even that is.
    pub fn without_state(socket: OwnedFd, connection: u64) -> Option<Self> {
        let mut peer = Peer::credentials_of(&socket).ok()?;
        peer.forget_groups();
        Some(Self {
            // What came may have been sent before the kernel was asked by whom. That it was, the socket still knows.
            pass_credentials: getsockopt(&socket, sockopt::PassCred).unwrap_or(false),
            socket,
            peer,
            connection,
            lines: 0,
            bytes: 0,
            age: Duration::ZERO,
            idle: None,
            held: Vec::new(),
            sent: 0,
            ended: false,
            unattested: 0,
        })
    }

    /// As [`Connection::verify`].
    #[must_use]
    pub fn verify(&mut self, verify: bool) -> bool {
        if verify == self.pass_credentials {
            return true;
        }
        self.pass_credentials = verify;
        self.unattested = 0;
        // Where it is not wanted any more, taking the socket over turns it off.
        if verify {
            attach_credentials(&self.socket);
        }
        !verify || self.held.is_empty()
    }

    /// Whether it is in the middle of nothing: all that came has been echoed, and more may come.
    pub fn is_between_lines(&self) -> bool {
        self.held.is_empty() && self.sent == 0 && !self.ended
    }
}

/// One connection. Small, because an idle one is nothing else.
pub struct Connection {
    /// First, so that it is given back before the peer can see the end of file.
    pub permit: Permit,
    pub socket: Stream,
    pub peer: Peer,
    pub rule: Arc<Rule<Terms>>,
    pub number: u64,
    pub lines: u64,
    pub bytes: u64,
    pub since: Instant,
    /// When something last came or went; kept only where a timeout asks for it.
    pub active: Instant,
    /// Received, not yet wholly echoed; empty most of the time.
    pub held: Vec<u8>,
    sent: usize,
    pub state: State,
    pass_credentials: bool,
    /// Of the bytes yet to be read, how many of the first may lack credentials.
    unattested: usize,
    /// It came from an earlier process, and the service manager may not have let go of its copy yet.
    pub is_shared: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for the peer to send.
    Reading,
    /// Waits for the peer to take its echo.
    Writing,
    /// As before, and nothing more will come: when it is taken, the connection is over.
    Finishing,
    /// As [`Finishing`](Self::Finishing): the peer has sent descriptors, and nothing from there on is read.
    AtDescriptors,
    /// A line was too long. Waits for the peer to take what it is told about that; `sent` counts in that.
    Refusing,
}

/// How a turn ended.
pub enum Outcome {
    Goes,
    Over(Option<Reason>),
    TooLong,
    /// The data came from this user.
    Stranger(Option<Uid>),
    /// The policy admits the peer no more; the rule that denies it, if one does.
    Denied(Option<Arc<Rule<Terms>>>),
    /// The peer sent descriptors, which are not taken. What came before them is echoed.
    Baggage,
}

/// What one read gave.
enum Input {
    Bytes(usize),
    Nothing,
    End,
    Broken,
    Stranger(Option<Uid>),
    Baggage,
}

/// What all connections of a thread use in turn.
pub struct Buffers {
    input: Box<[u8]>,
    output: Vec<u8>,
    spare: Vec<Vec<u8>>,
    spare_small: Vec<Vec<u8>>,
}

impl Connection {
    /// Just admitted; its first turn is to read.
    pub fn admitted(admission: Admission<Terms>) -> Self {
        let now = Instant::now();
        Self {
            permit: admission.permit,
            socket: admission.socket,
            peer: admission.peer,
            rule: admission.rule,
            number: admission.connection,
            lines: 0,
            bytes: 0,
            since: now,
            active: now,
            held: Vec::new(),
            sent: 0,
            state: State::Reading,
            pass_credentials: admission.pass_credentials,
            unattested: admission.unattested,
            is_shared: false,
        }
    }

    /// Taken over from an earlier process; its first turn is to [`flush`](Self::flush).
    pub fn resumed(carried: Carried, rule: Arc<Rule<Terms>>, permit: Permit) -> Self {
        let now = Instant::now();
        Self {
            permit,
            is_shared: true,
            socket: Stream::inherited(carried.socket, carried.pass_credentials),
            peer: carried.peer,
            rule,
            number: carried.connection,
            lines: carried.lines,
            bytes: carried.bytes,
            since: now.checked_sub(carried.age).unwrap_or(now),
            active: carried.idle.and_then(|idle| now.checked_sub(idle)).unwrap_or(now),
            held: carried.held,
            sent: carried.sent,
            state: if carried.ended { State::Finishing } else { State::Reading },
            pass_credentials: carried.pass_credentials,
            unattested: carried.unattested,
        }
    }

    /// From now on each piece of data must come from the user who was judged, or need not any more. What was sent before
    /// can be attested by nothing: false where some of it is read and not yet echoed, and the connection must end. What is
    /// still in the queue is found out when it is read.
    #[must_use]
    pub fn verify(&mut self, verify: bool) -> bool {
        if verify == self.pass_credentials {
            return true;
        }
        self.pass_credentials = verify;
        let _ = self.socket.attach_credentials(verify);
        self.unattested = 0;
        !verify || self.held.is_empty()
    }

    /// Whether [`verify`](Self::verify) with this would ask for more than before.
    pub fn verifies_more(&self, verify: bool) -> bool {
        verify && !self.pass_credentials
    }

    /// The longest line allowed, where everybody's is `general`.
    pub fn line_length(&self, general: usize) -> usize {
        self.rule.terms().line_length.unwrap_or(general)
    }

    /// What its turn waits for.
    pub fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading => EpollFlags::EPOLLIN,
            State::Writing | State::Finishing | State::AtDescriptors | State::Refusing => EpollFlags::EPOLLOUT,
        }
    }

    /// Reads once, and echoes every line that is complete.
    pub fn read(&mut self, limit: usize, buffers: &mut Buffers, audit: &Audit) -> Outcome {
        let most = limit.clamp(1, buffers.input.len());
        let count = match self.receive(most, buffers) {
            Input::Bytes(count) => count,
            Input::Nothing => return Outcome::Goes,
            Input::Broken => return Outcome::Over(None),
            Input::Stranger(uid) => return Outcome::Stranger(uid),
            Input::Baggage => {
                self.state = State::AtDescriptors;
                return self.flush(buffers, audit);
            }
            Input::End => {
                self.state = State::Finishing;
                return self.flush(buffers, audit);
            }
        };
        self.bytes += count as u64;
        if !self.held.is_empty() {
            buffers.make_room(&mut self.held, count, limit);
            let new = &buffers.input[..count];
            let ends = memchr::memchr(b'\n', new).is_some();
            grow(&mut self.held, count, limit);
            self.held.extend_from_slice(new);
            // Nothing to echo yet, and the whole of it need not be looked at again.
            let is_due = ends || self.held.len() > limit;
            return if is_due { self.echo_held(limit, buffers, audit) } else { Outcome::Goes };
        }
        let Buffers { input, output, .. } = buffers;
        let input = &input[..count];
        let (at, outcome) = self.emit(input, Cursor::default(), limit, output, audit);
        if let Outcome::TooLong = outcome {
            return self.refuse();
        }
        if at.start < count && matches!(outcome, Outcome::Goes) {
            self.sent = at.sent;
            let mut held = buffers.take(count - at.start, limit);
            held.extend_from_slice(&buffers.input[at.start..count]);
            self.held = held;
        }
        outcome
    }

    /// Echoes what is held, as far as the peer takes it. No line of it is too long: what a read adds is no more than
    /// the limit, and the line that began before it was held against the limit then. One that came into force since
    /// must not cut off what was accepted, least of all in the middle of its echo.
    pub fn flush(&mut self, buffers: &mut Buffers, audit: &Audit) -> Outcome {
        match self.state {
            State::Refusing => self.tell_refusal(),
            _ => self.echo_held(usize::MAX, buffers, audit),
        }
    }

    /// A line is too long, and every earlier one is echoed. The peer may have to take some of that first.
    fn refuse(&mut self) -> Outcome {
        self.state = State::Refusing;
        self.sent = 0;
        self.tell_refusal()
    }

    fn tell_refusal(&mut self) -> Outcome {
        match self.send(&line::TOO_LONG[self.sent..]) {
            Ok(count) => self.sent += count,
            Err(_) => return Outcome::TooLong,
        }
        if self.sent == line::TOO_LONG.len() { Outcome::TooLong } else { Outcome::Goes }
    }

    /// The echo of everything received that is not out yet, where nothing more will come.
    pub fn owed(&self) -> Vec<u8> {
        let mut owed = Vec::new();
        if self.state != State::Refusing {
            line::echo(&self.held, Cursor { start: 0, sent: self.sent }, usize::MAX, true, usize::MAX, &mut owed);
        }
        owed
    }

    /// What a peer whose line was too long has yet to be told of that.
    pub fn untold(&self) -> Option<&'static [u8]> {
        (self.state == State::Refusing).then(|| &line::TOO_LONG[self.sent..])
    }

    fn echo_held(&mut self, limit: usize, buffers: &mut Buffers, audit: &Audit) -> Outcome {
        let held = std::mem::take(&mut self.held);
        let from = Cursor { start: 0, sent: self.sent };
        let (at, outcome) = self.emit(&held, from, limit, &mut buffers.output, audit);
        self.held = held;
        self.sent = at.sent;
        self.held.drain(..at.start);
        if self.held.is_empty() {
            buffers.give_back(std::mem::take(&mut self.held));
        } else if self.held.len() <= SMALL && self.held.capacity() > SMALL {
            let mut small = buffers.take(self.held.len(), SMALL);
            small.extend_from_slice(&self.held);
            buffers.give_back(std::mem::replace(&mut self.held, small));
        }
        match (outcome, self.state) {
            (Outcome::TooLong, _) => {
                buffers.give_back(std::mem::take(&mut self.held));
                self.refuse()
            }
            (Outcome::Goes, State::Finishing) if self.held.is_empty() => Outcome::Over(None),
            (Outcome::Goes, State::AtDescriptors) if self.held.is_empty() => Outcome::Baggage,
            (outcome, _) => outcome,
        }
    }

    /// Writes the echo of `input` from `from` on, as much as one turn may and the peer takes. Sets whether the connection
    /// waits to write or to read.
    fn emit(
        &mut self,
        input: &[u8],
        from: Cursor,
        limit: usize,
        output: &mut Vec<u8>,
        audit: &Audit,
    ) -> (Cursor, Outcome) {
        output.clear();
        let ended = matches!(self.state, State::Finishing | State::AtDescriptors);
        let echoed = line::echo(input, from, limit, ended, ROOM, output);
        let Ok(written) = self.send(output) else { return (from, Outcome::Over(None)) };
        let all = written == output.len();
        let (at, lines) = if all { (echoed.next, echoed.lines) } else { line::advance(input, from, written) };
        if audit.writes_lines() {
            self.record_lines(&input[from.start..at.start], audit);
        }
        self.lines += lines;
        match echoed.end {
            End::TooLong if all => return (at, Outcome::TooLong),
            End::Complete if all && self.state == State::Writing => self.state = State::Reading,
            End::Complete if all => {}
            // Where the peer would take more, there is another turn as soon as others have had theirs.
            _ if self.state == State::Reading => self.state = State::Writing,
            _ => {}
        }
        (at, Outcome::Goes)
    }

    /// As much as the peer takes now.
    fn send(&mut self, output: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < output.len() {
            match self.socket.write(&output[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    fn receive(&mut self, most: usize, buffers: &mut Buffers) -> Input {
        let input = &mut buffers.input[..most];
        let received = if self.pass_credentials {
            self.socket.receive(input).map(|(count, sender)| {
                let came_before = sender.is_none() && count <= self.unattested;
                let is_strange = count > 0 && sender != Some(self.peer.uid()) && !came_before;
                if !is_strange {
                    self.unattested = self.unattested.saturating_sub(count);
                }
                (count, is_strange.then_some(sender))
            })
        } else {
            self.socket.read(input).map(|count| (count, None))
        };
        match received {
            Ok((_, Some(sender))) => Input::Stranger(sender),
            Ok((0, None)) => Input::End,
            Ok((count, None)) => Input::Bytes(count),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Input::Nothing,
                ErrorKind::InvalidData => Input::Baggage,
                _ => Input::Broken,
            },
        }
    }

    fn record_lines(&self, echoed: &[u8], audit: &Audit) {
        for line in echoed.split_inclusive(|byte| *byte == b'\n') {
            let mut record = Record::new(Event::Line);
            record.rule = Some(self.rule.name().as_str().into());
            record.connection = Some(self.number);
            record.bytes = Some(line.len() as u64);
            record.about = Some(About::former(&self.peer));
            audit.write(record);
        }
    }

    /// To be taken over by the next process.
    pub fn at_rest(self) -> Carried {
        let age = self.since.elapsed();
        let Self { socket, peer, number, lines, bytes, held, sent, state, .. } = self;
        let (pass_credentials, unattested) = (self.pass_credentials, self.unattested);
        Carried {
            socket: socket.into(),
            peer,
            connection: number,
            lines,
            bytes,
            age,
            idle: None,
            held,
            sent,
            ended: state == State::Finishing,
            pass_credentials,
            unattested,
        }
    }
}

/// Makes room for so many more bytes, where lines have this limit. In powers of two: buffers of any size that many
/// connections take and give back in any order would leave gaps that nothing else fits into, more of them every hour.
fn grow(buffer: &mut Vec<u8>, more: usize, limit: usize) {
    let needed = buffer.len() + more;
    if needed > buffer.capacity() {
        let most = needed.max(limit.saturating_mul(2));
        buffer.reserve_exact(needed.next_power_of_two().min(most) - buffer.len());
    }
}

impl Buffers {
    /// For reads of up to `read` bytes.
    pub fn new(read: usize) -> Self {
        Self { input: vec![0; read].into(), output: Vec::new(), spare: Vec::new(), spare_small: Vec::new() }
    }

    /// An empty one for so many bytes, for now, of one whose lines have this limit.
    fn take(&mut self, length: usize, limit: usize) -> Vec<u8> {
        let spare = if length <= SMALL { self.spare_small.pop() } else { self.take_big(limit) };
        let mut buffer = spare.unwrap_or_default();
        grow(&mut buffer, length, limit);
        buffer
    }

    /// Not one that grew for somebody whose lines may be longer: what is held for one connection follows from its own
    /// limit.
    fn take_big(&mut self, limit: usize) -> Option<Vec<u8>> {
        let fits = self.spare.iter().rposition(|buffer| buffer.capacity() / 2 <= limit)?;
        Some(self.spare.swap_remove(fits))
    }

    /// Before `more` bytes are added: a big one, where there is one, instead of making a small one grow.
    fn make_room(&mut self, held: &mut Vec<u8>, more: usize, limit: usize) {
        if held.capacity() <= SMALL && held.len() + more > SMALL {
            if let Some(mut big) = self.take_big(limit) {
                grow(&mut big, held.len(), limit);
                big.extend_from_slice(held);
                self.give_back(std::mem::replace(held, big));
            }
        }
    }

    /// Keeps an empty buffer for the next one who needs it, unless it has grown too big to keep.
    pub fn give_back(&mut self, mut buffer: Vec<u8>) {
        let (spare, most) = match buffer.capacity() {
            0 => return,
            1..=SMALL => (&mut self.spare_small, SPARE_SMALL),
            _ => (&mut self.spare, SPARE),
        };
        if buffer.capacity() <= 2 * READ && spare.len() < most {
            buffer.clear();
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::tests::admission;

    use std::io::Read;

    use nix::sys::socket::setsockopt;

    /// However much echo the peer has yet to take, and however long it takes.
    #[test]
    fn who_reads_late_that_a_line_was_too_long_reads_it_all_the_same() {
        let policy = Policy::<Terms>::owner_only(Uid::effective());
        let (mut buffers, audit) = (Buffers::new(READ), Audit::default());
        for ends in ["", "\n"] {
            let (admission, mut client) = admission(&policy, 1);
            let mut connection = Connection::admitted(admission);
            // There is room for a part of the message.
            while connection.socket.write(b"an echo\n").is_ok() {}
            client.set_nonblocking(true).unwrap();
            client.write_all(&[&[b'x'; 100][..], ends.as_bytes()].concat()).unwrap();
            assert!(matches!(connection.read(99, &mut buffers, &audit), Outcome::Goes));
            if connection.state == State::Reading {
                // No more than the limit is read at once.
                assert!(matches!(connection.read(99, &mut buffers, &audit), Outcome::Goes));
            }
            assert_eq!((connection.state, connection.interest()), (State::Refusing, EpollFlags::EPOLLOUT));
            assert!(matches!(connection.flush(&mut buffers, &audit), Outcome::Goes));
            let mut heard = Vec::new();
            let mut part = [0; 4096];
            while let Ok(count) = client.read(&mut part) {
                heard.extend_from_slice(&part[..count]);
            }
            assert!(matches!(connection.flush(&mut buffers, &audit), Outcome::TooLong));
            assert_eq!(connection.untold(), Some(&b""[..]), "nothing is left to tell");
            let count = client.read(&mut part).unwrap();
            heard.extend_from_slice(&part[..count]);
            assert!(heard.ends_with(b"an echo\nLine too long\n"), "{:?}", heard.utf8_chunks().last());
        }
    }

    #[test]
    fn a_buffer_that_grew_for_long_lines_is_not_for_whoever_may_only_send_short_ones() {
        let mut buffers = Buffers::new(READ);
        for capacity in [2 * READ, 9000] {
            buffers.give_back(Vec::with_capacity(capacity));
        }
        let mut held = vec![b'x'; SMALL];
        buffers.make_room(&mut held, 1, 5000);
        assert_eq!((held.len(), held.capacity()), (SMALL, 9000));
        assert_eq!(buffers.take(SMALL + 1, 5000).capacity(), 2 * SMALL, "the other one is too big");
        assert_eq!(buffers.take(SMALL + 1, READ).capacity(), 2 * READ);
    }

    /// However fast the peer takes it.
    #[test]
    fn a_turn_is_bounded_however_long_a_line_may_be() {
        const LENGTH: usize = 16 * ROOM;
        let policy = Policy::<Terms>::owner_only(Uid::effective());
        let (mut buffers, audit) = (Buffers::new(READ), Audit::default());
        let (admission, mut client) = admission(&policy, 1);
        let mut connection = Connection::admitted(admission);
        // Takes more than a turn's worth at once, whether the peer reads meanwhile or not.
        setsockopt(&connection.socket, sockopt::SndBuf, &(2 * ROOM)).unwrap();
        connection.held = vec![b'x'; LENGTH - 1];
        connection.held.push(b'\n');
        let heard = std::thread::spawn(move || {
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).map(|_| heard)
        });
        let (mut out, mut turns) = (0, 0);
        while !connection.held.is_empty() {
            assert!(matches!(connection.flush(&mut buffers, &audit), Outcome::Goes));
            let now = if connection.held.is_empty() { LENGTH + 2 } else { connection.sent };
            assert!(now - out <= ROOM, "{} bytes in a turn", now - out);
            (out, turns) = (now, turns + 1);
        }
        assert!(turns > LENGTH / ROOM && connection.state == State::Reading && connection.lines == 1);
        drop(connection);
        let heard = heard.join().unwrap().unwrap();
        assert!(heard.starts_with(b"> x") && heard.ends_with(b"x\n") && heard.len() == LENGTH + 2);
    }

    #[test]
    fn a_buffer_grows_to_powers_of_two_and_to_no_more_than_twice_the_longest_line() {
        for (more, limit, capacity) in [(5000, READ, 8192), (9000, 5000, 10_000), (9000, usize::MAX, 16_384)] {
            let mut held = vec![b'x'; 10];
            grow(&mut held, more - 10, limit);
            assert_eq!(held.capacity(), capacity);
            grow(&mut held, more - 10, limit);
            assert_eq!((held.len(), held.capacity()), (10, capacity), "there is room already");
        }
    }
}
