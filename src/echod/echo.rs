//! The echo: one connection's state and its turns. Reads what is there, frames it ([`mod@line`]), writes it back.

use peergate::audit::Reason;
use peergate_daemon::buffers::{Buffers, SMALL, grow};
use peergate_daemon::memory::{Footprint, Unread};
use peergate_daemon::protocol::{Counters, Interest, Io, Protocol, Received, Refusal, Turn};
use serde::{Deserialize, Serialize};

use peergate_daemon::worker::READ;

use crate::line::{self, Cursor, End, Room};
use crate::settings::{Settings, Terms};

/// The most echo of one turn, however long a line is.
const ROOM: usize = 2 * READ;

/// What the state takes besides what is held.
const STATE: usize = 256;
/// Bounds of the send buffer: less costs throughput however short the lines are, more gains none (benches/README.md).
const LEAST_SEND_BUFFER: usize = 32 * 1024;
const MOST_SEND_BUFFER: usize = 208 * 1024;

/// One connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct Echo {
    /// Received, not yet wholly echoed; empty most of the time.
    held: Vec<u8>,
    /// How much of the first line's echo is out; while refusing, how much of that message.
    sent: usize,
    state: State,
    lines: u64,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    /// Waits for the peer to send.
    Reading,
    /// Waits for the peer to take its echo.
    Writing,
    /// As before, and nothing more will come: when it is taken, the connection is over.
    Finishing,
    /// As [`Finishing`](Self::Finishing): the peer has sent descriptors, and nothing from there on is read.
    AtDescriptors,
    /// A line was too long. Waits for the peer to take the message that says so.
    Refusing,
}

impl Protocol for Echo {
    type Settings = Settings;
    type Terms = Terms;
    type Options = ();

    const NAME: &'static str = "echod";
    const UNIT: &'static str = "echo";
    const ABOUT: &'static str = "A line echo that answers only to the local users its policy names";

    fn start() -> Self {
        Self { held: Vec::new(), sent: 0, state: State::Reading, lines: 0, bytes: 0 }
    }

    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn {
        match self.state {
            State::Reading => self.read(io),
            State::Refusing => self.tell_refusal(io),
            // No line of what is held is too long: what a read adds is no more than the limit, and the line that began
            // before it was held against the limit then. One that came into force since must not cut off what was accepted,
            // least of all in the middle of its echo.
            State::Writing | State::Finishing | State::AtDescriptors => self.echo_held(usize::MAX, io),
        }
    }

    fn waits_for(&self) -> Interest {
        match self.state {
            State::Reading => Interest::Read,
            State::Writing | State::Finishing | State::AtDescriptors | State::Refusing => Interest::Write,
        }
    }

    fn is_at_rest(&self) -> bool {
        self.state == State::Reading && self.held.is_empty()
    }

    fn holds_input(&self) -> bool {
        !self.held.is_empty()
    }

    fn owed(&self) -> Vec<u8> {
        let mut owed = Vec::new();
        if self.state != State::Refusing {
            line::echo(&self.held, Cursor { start: 0, sent: self.sent }, usize::MAX, true, Room::ENDLESS, &mut owed);
        }
        owed
    }

    fn will_end(&self) -> Option<Turn> {
        match self.state {
            State::Reading | State::Writing => None,
            State::Finishing => Some(Turn::Closed),
            State::AtDescriptors => Some(Turn::DescriptorsReceived),
            State::Refusing => Some(Turn::Refused),
        }
    }

    fn refusal(&self, settings: &Settings, terms: &Terms) -> Option<Refusal> {
        (self.state == State::Refusing).then(|| Refusal {
            reason: Reason::LineLength,
            text: format!("a line was longer than {} bytes", limit(settings, terms)),
            message: &line::TOO_LONG[self.sent..],
        })
    }

    fn counters(&self) -> Counters {
        Counters { lines: Some(self.lines), bytes: self.bytes, sent: None }
    }

    fn unlimited(_: Settings) -> Settings {
        Settings { line_length: usize::MAX }
    }

    fn footprint(settings: &Settings, terms: &Terms) -> Option<Footprint> {
        let limit = limit(settings, terms);
        // A line that has not ended, and one read more.
        let most = limit.saturating_add(limit.min(READ));
        let held = most.checked_next_power_of_two().unwrap_or(most).min(limit.saturating_mul(2));
        let send_buffer = limit.saturating_mul(2).clamp(LEAST_SEND_BUFFER, MOST_SEND_BUFFER);
        let to_peer = Unread { held, send_buffer: Some(send_buffer) };
        Some(Footprint { to_peer, to_second: None, state: most.saturating_add(STATE) })
    }

    fn release(self, buffers: &mut Buffers) {
        buffers.give_back(self.held);
    }
}

/// The longest line that this peer may send.
fn limit(settings: &Settings, terms: &Terms) -> usize {
    terms.line_length.unwrap_or(settings.line_length)
}

impl Echo {
    /// Reads once, and echoes every line that is complete.
    fn read(&mut self, io: &mut Io<'_, Self>) -> Turn {
        let limit = limit(io.settings, io.terms);
        let most = limit.clamp(1, io.buffers.input.len());
        let count = match io.peer.receive(&mut io.buffers.input[..most]) {
            Received::Bytes(count) => count,
            Received::Nothing => return Turn::Idle,
            Received::Broken => return Turn::Closed,
            Received::SenderMismatch(uid) => return Turn::SenderMismatch(uid),
            Received::Descriptors => return self.finish(State::AtDescriptors, io),
            Received::End => return self.finish(State::Finishing, io),
        };
        self.bytes += count as u64;
        if !self.held.is_empty() {
            io.buffers.make_room(&mut self.held, count, limit);
            let new = &io.buffers.input[..count];
            let ends = memchr::memchr(b'\n', new).is_some();
            grow(&mut self.held, count, limit);
            self.held.extend_from_slice(new);
            // Nothing to echo yet, and the whole of it need not be looked at again.
            let is_due = ends || self.held.len() > limit;
            return if is_due { self.echo_held(limit, io) } else { Turn::Progress };
        }
        let input = std::mem::take(&mut io.buffers.input);
        let emitted = self.emit(&input[..count], Cursor::default(), limit, io);
        if let Emitted::Echoed(at) = emitted {
            if at.start < count {
                self.sent = at.sent;
                let mut held = io.buffers.take(count - at.start, limit);
                held.extend_from_slice(&input[at.start..count]);
                self.held = held;
            }
        }
        io.buffers.input = input;
        match emitted {
            Emitted::Echoed(_) => Turn::Progress,
            Emitted::TooLong(_) => self.refuse(io),
            Emitted::Broken => Turn::Closed,
        }
    }

    /// Nothing more is read; what is held is echoed before the end.
    fn finish(&mut self, state: State, io: &mut Io<'_, Self>) -> Turn {
        self.state = state;
        self.echo_held(usize::MAX, io)
    }

    /// A line is too long, and every earlier one is echoed. The peer may have to take some of that first.
    fn refuse(&mut self, io: &mut Io<'_, Self>) -> Turn {
        self.state = State::Refusing;
        self.sent = 0;
        self.tell_refusal(io)
    }

    fn tell_refusal(&mut self, io: &mut Io<'_, Self>) -> Turn {
        match io.peer.send(&line::TOO_LONG[self.sent..]) {
            Ok(count) => self.sent += count,
            Err(_) => return Turn::Refused,
        }
        if self.sent == line::TOO_LONG.len() { Turn::Refused } else { Turn::Progress }
    }

    /// Echoes what is held, as far as the peer takes it.
    fn echo_held(&mut self, limit: usize, io: &mut Io<'_, Self>) -> Turn {
        let held = std::mem::take(&mut self.held);
        let emitted = self.emit(&held, Cursor { start: 0, sent: self.sent }, limit, io);
        self.held = held;
        let (Emitted::Echoed(at) | Emitted::TooLong(at)) = emitted else { return Turn::Closed };
        self.sent = at.sent;
        self.held.drain(..at.start);
        if matches!(emitted, Emitted::TooLong(_)) {
            io.buffers.give_back(std::mem::take(&mut self.held));
            return self.refuse(io);
        }
        if self.held.is_empty() {
            io.buffers.give_back(std::mem::take(&mut self.held));
            return self.will_end().unwrap_or(Turn::Progress);
        }
        if self.held.len() <= SMALL && self.held.capacity() > SMALL {
            let mut small = io.buffers.take(self.held.len(), SMALL);
            small.extend_from_slice(&self.held);
            io.buffers.give_back(std::mem::replace(&mut self.held, small));
        }
        Turn::Progress
    }

    /// Writes the echo of `input` from `from` on, as much as one turn may and the peer takes. Sets whether the connection
    /// waits to write or to read.
    fn emit(&mut self, input: &[u8], from: Cursor, limit: usize, io: &mut Io<'_, Self>) -> Emitted {
        let output = &mut io.buffers.output;
        output.clear();
        let is_last = matches!(self.state, State::Finishing | State::AtDescriptors);
        let room = Room { bytes: ROOM, lines: io.most_lines as u64 };
        let echoed = line::echo(input, from, limit, is_last, room, output);
        let Ok(written) = io.peer.send(output) else { return Emitted::Broken };
        let all = written == output.len();
        let (at, lines) = if all { (echoed.next, echoed.lines) } else { line::advance(input, from, written) };
        if io.lines.are_recorded() {
            let answered = &input[from.start..at.start];
            io.lines.record_all(
                lines,
                answered.len(),
                answered.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::len),
            );
        }
        self.lines += lines;
        match echoed.end {
            End::TooLong if all => return Emitted::TooLong(at),
            End::Complete if all && self.state == State::Writing => self.state = State::Reading,
            End::Complete if all => {}
            // Where the peer would take more, there is another turn as soon as other connections have had theirs.
            _ if self.state == State::Reading => self.state = State::Writing,
            _ => {}
        }
        Emitted::Echoed(at)
    }
}

/// How far the echo has come.
#[derive(Clone, Copy)]
enum Emitted {
    /// Up to here, and the connection goes on.
    Echoed(Cursor),
    /// Up to here, and a line that is too long comes next.
    TooLong(Cursor),
    /// The connection is broken.
    Broken,
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use nix::sys::socket::{setsockopt, sockopt};
    use peergate::audit::Audit;
    use peergate::gate::Admission;
    use peergate::ids::Uid;
    use peergate::peer::Peer;
    use peergate::permits::Permits;
    use peergate::policy::Policy;
    use peergate::{Stream, audit};
    use peergate_daemon::connection::Connection;
    use peergate_daemon::protocol::Ready;
    use peergate_daemon::rounds::Share;
    use peergate_daemon::worker::READ;

    use super::*;
    use crate::counting::allocations_of;

    /// An admitted connection, and its other end.
    fn connection() -> (Connection<Echo>, UnixStream) {
        let policy = Policy::owner_only(Uid::effective());
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let socket = Stream::accepted(ours);
        let (peer, rule) = (Peer::credentials_of(&socket).unwrap(), policy.rules().next().unwrap());
        let admission = Admission::new(socket, peer, Arc::clone(rule), Permits::new().resume(policy.me()));
        (Connection::admitted(admission), theirs)
    }

    /// However much echo the peer has yet to take, and however long it takes.
    #[test]
    fn a_peer_that_reads_late_still_gets_line_too_long() {
        let (mut buffers, audit, settings) = (Buffers::new(READ), Audit::default(), Settings { line_length: 99 });
        for ends in ["", "\n"] {
            let (mut connection, mut client) = connection();
            // There is room for a part of the message.
            while connection.socket.write(b"an echo\n").is_ok() {}
            client.set_nonblocking(true).unwrap();
            client.write_all(&[&[b'x'; 100][..], ends.as_bytes()].concat()).unwrap();
            assert_eq!(
                connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit),
                Turn::Progress
            );
            if connection.protocol.state == State::Reading {
                // No more than the limit is read at once.
                assert_eq!(
                    connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit),
                    Turn::Progress
                );
            }
            assert_eq!((connection.protocol.state, connection.watched().peer), (State::Refusing, Interest::Write));
            assert_eq!(
                connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit),
                Turn::Progress
            );
            let mut heard = Vec::new();
            let mut part = [0; 4096];
            while let Ok(count) = client.read(&mut part) {
                heard.extend_from_slice(&part[..count]);
            }
            assert_eq!(connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit), Turn::Refused);
            let refusal = connection.protocol.refusal(&settings, &Terms::default()).unwrap();
            assert_eq!((refusal.message, &*refusal.text), (&b""[..], "a line was longer than 99 bytes"));
            let count = client.read(&mut part).unwrap();
            heard.extend_from_slice(&part[..count]);
            assert!(heard.ends_with(b"an echo\nLine too long\n"), "{:?}", heard.utf8_chunks().last());
        }
    }

    /// However fast the peer takes it.
    #[test]
    fn a_turn_is_bounded_however_long_a_line_may_be() {
        const LENGTH: usize = 16 * ROOM;
        let (mut buffers, audit, settings) = (Buffers::new(READ), Audit::default(), Settings::default());
        let (mut connection, mut client) = connection();
        // Takes more than a turn's worth at once, whether the peer reads meanwhile or not.
        setsockopt(&connection.socket, sockopt::SndBuf, &(2 * ROOM)).unwrap();
        connection.protocol.held = vec![b'x'; LENGTH - 1];
        connection.protocol.held.push(b'\n');
        connection.protocol.state = State::Writing;
        let heard = std::thread::spawn(move || {
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).map(|_| heard)
        });
        let (mut out, mut turns) = (0, 0);
        while !connection.protocol.held.is_empty() {
            assert_eq!(
                connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit),
                Turn::Progress
            );
            let echo = &connection.protocol;
            let now = if echo.held.is_empty() { LENGTH + 2 } else { echo.sent };
            assert!(now - out <= ROOM, "{} bytes in a turn", now - out);
            (out, turns) = (now, turns + 1);
        }
        assert!(turns > LENGTH / ROOM && connection.protocol.state == State::Reading && connection.protocol.lines == 1);
        drop(connection);
        let heard = heard.join().unwrap().unwrap();
        assert!(heard.starts_with(b"> x") && heard.ends_with(b"x\n") && heard.len() == LENGTH + 2);
    }

    #[test]
    fn echoing_allocates_nothing_once_it_is_under_way() {
        let audit = Audit::new(audit::Settings::default());
        let (mut buffers, settings) = (Buffers::new(READ), Settings::default());
        let (mut connection, mut client) = connection();
        let long = [&[b'y'; 60_000][..], b"\n"].concat();
        let mut answer = vec![0; 2 * long.len()];
        let many = b"x\n".repeat(500);
        let mut round = || {
            for part in [&b"a line of thirty-two bytes, LF in\n"[..], &many, &long, b"half ", b"a line\n"] {
                client.write_all(part).unwrap();
                while connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit) != Turn::Idle {}
                client.set_nonblocking(true).unwrap();
                while client.read(&mut answer).is_ok() {}
                client.set_nonblocking(false).unwrap();
                while connection.protocol.waits_for() == Interest::Write {
                    connection.turn(&mut Share::whole(Ready::Peer), &settings, &mut buffers, &audit);
                }
            }
        };
        // A buffer grows with the most that a line has needed so far.
        (0..50).for_each(|_| round());
        let thread = nix::unistd::gettid().as_raw();
        assert_eq!(allocations_of(thread, || (0..200).for_each(|_| round())), 0);
    }
}
