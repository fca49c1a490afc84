//! One connection and its turns: read what is there, frame it ([`line`]), write it back. Knows no other connection,
//! no epoll and no thread.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, setsockopt, sockopt};

use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::baggage::Baggage;
use peergate::gate::Admission;
use peergate::handover::attach_credentials;
use peergate::ids::Uid;
use peergate::limits::Permit;
use peergate::peer::{self, Peer};
use peergate::policy::{Policy, Rule};

use crate::config::Terms;
use crate::line::{self, Cursor, End};

/// The most that is read from one connection before another gets its turn.
pub const READ: usize = 64 * 1024;
/// The most echo that is put together for one write: that of a whole read, even one of bare LFs.
const ROOM: usize = 4 * READ;
/// Buffers of each kind kept for the next connection that needs one.
const SPARE_BUFFERS: usize = 16;
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
        let peer = Peer::credentials_of(&socket).ok()?;
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
    pub fn verify(&mut self, verify: bool) {
        switch_verifying(&self.socket, verify, &mut self.pass_credentials, &mut self.unattested);
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
    pub socket: OwnedFd,
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
    pub baggage: Baggage,
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
    /// The peer sent descriptors, which nobody takes.
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
            baggage: admission.baggage,
            is_shared: false,
        }
    }

    /// Taken over from an earlier process; its first turn is to [`flush`](Self::flush).
    pub fn resumed(carried: Carried, rule: Arc<Rule<Terms>>, permit: Permit) -> Self {
        let now = Instant::now();
        Self {
            permit,
            baggage: Baggage::of_known(&carried.socket, carried.pass_credentials),
            is_shared: true,
            socket: carried.socket,
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

    /// From now on each piece of data must come from the user who was judged, or need not any more. What has been read
    /// by now is not asked about.
    pub fn verify(&mut self, verify: bool) {
        switch_verifying(&self.socket, verify, &mut self.pass_credentials, &mut self.unattested);
    }

    /// The longest line allowed, where everybody's is `general`.
    pub fn line_length(&self, general: usize) -> usize {
        self.rule.terms().line_length.unwrap_or(general)
    }

    /// What its turn waits for.
    pub fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading => EpollFlags::EPOLLIN,
            State::Writing | State::Finishing => EpollFlags::EPOLLOUT,
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
            Input::Baggage => return Outcome::Baggage,
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
            self.held.extend_from_slice(new);
            // Nothing to echo yet, and the whole of it need not be looked at again.
            let is_due = ends || self.held.len() > limit;
            return if is_due { self.echo_held(limit, buffers, audit) } else { Outcome::Goes };
        }
        let Buffers { input, output, .. } = buffers;
        let input = &input[..count];
        let (at, outcome) = self.emit(input, Cursor::default(), limit, output, audit);
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
        self.echo_held(usize::MAX, buffers, audit)
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

    fn receive(&mut self, most: usize, buffers: &mut Buffers) -> Input {
        let socket = self.socket.as_raw_fd();
        let most = match self.baggage.look(&self.socket, &mut buffers.input[..most], self.pass_credentials) {
            Ok(Some(count)) => count,
            Ok(None) => return Input::Baggage,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Input::Nothing;
            }
            Err(_) => return Input::Broken,
        };
        let input = &mut buffers.input[..most];
        let received = if self.pass_credentials {
            match peer::receive(&self.socket, input) {
                Ok((count, sender)) => {
                    let came_before = sender.is_none() && count <= self.unattested;
                    if count > 0 && sender != Some(self.peer.uid()) && !came_before {
                        return Input::Stranger(sender);
                    }
                    self.unattested = self.unattested.saturating_sub(count);
                    Ok(count)
                }
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

    /// Whether closing could take as long as the peer likes: where descriptors may lie unread.
    pub fn needs_disposal(&self) -> bool {
        self.baggage.is_possible() && self.state != State::Finishing
    }

    /// To be taken over by the next process.
    pub fn at_rest(self) -> Carried {
        let age = self.since.elapsed();
        let Self { socket, peer, number, lines, bytes, held, sent, state, .. } = self;
        let (pass_credentials, unattested) = (self.pass_credentials, self.unattested);
        Carried {
            socket,
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

fn switch_verifying(socket: &OwnedFd, verify: bool, pass_credentials: &mut bool, unattested: &mut usize) {
    if verify == *pass_credentials {
        return;
    }
    *pass_credentials = verify;
    if verify {
        *unattested = attach_credentials(socket);
    } else {
        // Who looks for descriptors wants nothing else to come along.
        let _ = setsockopt(socket, sockopt::PassCred, &false);
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
        spare.unwrap_or_default()
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
                big.extend_from_slice(held);
                self.give_back(std::mem::replace(held, big));
            }
        }
    }

    /// Keeps an empty buffer for the next one who needs it, unless it has grown too big to keep.
    pub fn give_back(&mut self, mut buffer: Vec<u8>) {
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

    #[test]
    fn a_buffer_that_grew_for_long_lines_is_not_for_whoever_may_only_send_short_ones() {
        let mut buffers = Buffers::new(READ);
        for capacity in [2 * READ, 9000] {
            buffers.give_back(Vec::with_capacity(capacity));
        }
        let mut held = vec![b'x'; SMALL];
        buffers.make_room(&mut held, 1, 5000);
        assert_eq!((held.len(), held.capacity()), (SMALL, 9000));
        assert_eq!(buffers.take(SMALL + 1, 5000).capacity(), 0, "the other one is too big");
        assert_eq!(buffers.take(SMALL + 1, READ).capacity(), 2 * READ);
    }
}
