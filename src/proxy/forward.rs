//! One connection's state and its turns: connects to the service behind, then passes bytes both ways.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use peergate::Stream;
use peergate::audit::Reason;
use peergate::fd_passing::{self, Passing};
use peergate::gate;
use peergate_daemon::buffers::Buffers;
use peergate_daemon::config::Config;
use peergate_daemon::memory::{Footprint, Unread};
use peergate_daemon::moment::Moment;
use peergate_daemon::protocol::{Counters, Interest, Io, PeerStream, Protocol, Ready, Received, Refusal, Turn};
use peergate_daemon::worker::READ;
use serde::{Deserialize, Serialize};

use crate::direction::{Direction, Moved};
use crate::identity;
use crate::options::Options;
use crate::settings::{self, Descriptors, Identity, Settings, Terms};
use crate::upstream::{self, Upstream, is_temporary};

/// The pause before the second attempt to connect. Each doubles it, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// What the state of a connection takes besides the bytes that are held.
const STATE: usize = 256;

/// One connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct Forward {
    /// Goes to the next process beside this.
    #[serde(skip)]
    upstream: Option<Stream>,
    /// Where that is, as the configuration had it.
    to: Option<Box<str>>,
    phase: Phase,
    /// Whose ids the service has seen.
    seen: Seen,
    /// Whether descriptors are passed on.
    passes: bool,
    /// Whether some may lie unread in what the service has sent. The next process goes by that.
    passing: Passing,
    /// From the peer to the service.
    up: Direction,
    /// From the service to the peer.
    down: Direction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// Nothing was tried yet.
    Started,
    /// The service could not be reached. At `due` it is tried again.
    Waiting { since: Moment, due: Moment, tries: u32 },
    /// Bytes go both ways.
    Open,
    /// The service was not reached.
    Refused(Why),
}

/// Whose ids the service sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// The proxy's own.
    Own,
    /// The peer's, which is not root.
    Peer,
    /// The peer's, which is root.
    Root,
}

/// Why a peer does not get to the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// It could not be connected to in time: errno(3).
    Error(i32),
    /// The peer is root, and its rule does not say that the service may be connected to as root.
    Root,
    /// An id of the peer is unknown in this user namespace.
    Unmapped,
    /// The peer has more groups than can be told.
    Groups,
}

impl Why {
    fn text(self, to: &str) -> String {
        match self {
            Self::Error(number) => format!("{to} could not be reached: {}", Errno::from_raw(number).desc()),
            Self::Root => format!("{to} is not connected to as root; expected root = true in its rule"),
            Self::Unmapped => format!("{to} cannot be connected to with an id that is unknown here"),
            Self::Groups => format!("{to} cannot be connected to with groups that cannot all be told"),
        }
    }
}

impl Protocol for Forward {
    type Settings = Settings;
    type Terms = Terms;
    type Options = Options;

    const NAME: &'static str = "peergate";
    const UNIT: &'static str = "peergate@";
    const ABOUT: &'static str = "A gate in front of any local service: admits only the users its policy names";
    const HAS_SECOND: bool = true;
    const STATE_VERSION: u8 = 2;

    fn start() -> Self {
        let (up, down) = (Direction::default(), Direction::default());
        let (phase, passing) = (Phase::Started, Passing::Possible);
        Self { upstream: None, to: None, phase, seen: Seen::Own, passes: false, passing, up, down }
    }

    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn {
        match self.phase {
            Phase::Open => self.pass(io),
            Phase::Started => self.connect(io, Moment::now()),
            Phase::Waiting { due, .. } => {
                let now = Moment::now();
                if due <= now { self.connect(io, now) } else { self.wait_on(io) }
            }
            Phase::Refused(_) => Turn::Refused,
        }
    }

    fn waits_for(&self) -> Interest {
        let is_open = self.phase == Phase::Open;
        interest(is_open && self.up.reads(), self.down.awaits_room())
    }

    fn second(&self) -> Option<(BorrowedFd<'_>, Interest)> {
        let interest = interest(self.down.reads(), self.up.awaits_room());
        self.upstream.as_ref().map(|upstream| (upstream.as_fd(), interest))
    }

    fn second_may_linger(&self) -> bool {
        self.upstream.as_ref().is_some_and(Stream::may_linger)
    }

    fn further(&self) -> Vec<BorrowedFd<'_>> {
        let upstream = self.upstream.as_ref().map(AsFd::as_fd);
        upstream.into_iter().chain(self.up.descriptors().iter()).chain(self.down.descriptors().iter()).collect()
    }

    fn set_further(&mut self, further: Vec<OwnedFd>) {
        let mut further = further.into_iter();
        if self.phase == Phase::Open {
            self.upstream = further.next().map(|fd| match self.passes {
                true => Stream::taking_descriptors(fd, false),
                false => Stream::resumed(fd, false, self.passing),
            });
        }
        self.up.put_descriptors(&mut further);
        self.down.put_descriptors(&mut further);
    }

    fn into_further(mut self) -> Vec<OwnedFd> {
        let mut further: Vec<OwnedFd> = self.upstream.map(OwnedFd::from).into_iter().collect();
        for direction in [&mut self.up, &mut self.down] {
            further.extend(direction.take_descriptors());
        }
        further
    }

    fn due(&self) -> Option<Moment> {
        match self.phase {
            Phase::Waiting { due, .. } => Some(due),
            _ => [self.up.retry(), self.down.retry()].into_iter().flatten().min(),
        }
    }

    fn set_settings(&mut self, settings: &Settings) {
        let passes = settings.descriptors == Descriptors::Pass;
        if let Some(upstream) = self.upstream.as_mut().filter(|_| self.passes != passes) {
            upstream.take_descriptors(passes);
            (self.passes, self.passing) = (passes, upstream.passing());
        }
    }

    fn outdated(&self, settings: &Settings, terms: &Terms) -> Option<String> {
        let before = self.to.as_deref()?;
        let now = target(settings, terms)?.text();
        if **now != *before {
            return Some(format!("its rule leads to {now} now"));
        }
        self.upstream.as_ref()?;
        let why = match (self.seen, settings.identity) {
            (Seen::Own, Identity::Peer) => "the service is to see the ids of its peers now",
            (Seen::Peer | Seen::Root, Identity::Own) => "the service is to see the ids of its peers no more",
            (Seen::Root, Identity::Peer) if !terms.root => "the service is not to see root any more",
            _ => return None,
        };
        Some(why.to_owned())
    }

    fn may_be_told(&self) -> bool {
        self.down.written() == 0
    }

    fn is_at_rest(&self) -> bool {
        self.phase == Phase::Open && !self.up.writes() && !self.down.writes()
    }

    fn holds_input(&self) -> bool {
        self.up.writes()
    }

    fn owed(&self) -> Vec<u8> {
        self.down.pending().to_vec()
    }

    fn will_end(&self) -> Option<Turn> {
        matches!(self.phase, Phase::Refused(_)).then_some(Turn::Refused)
    }

    fn refusal(&self, settings: &Settings, _: &Terms) -> Option<Refusal> {
        let Phase::Refused(why) = self.phase else { return None };
        let text = why.text(self.to.as_deref().unwrap_or_default());
        Some(Refusal { reason: Reason::Upstream, text, message: settings.replies.unreachable() })
    }

    fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        (counters.bytes, counters.sent) = (self.up.read(), Some(self.down.written()));
        counters
    }

    fn upstream(&self) -> Option<Arc<str>> {
        self.to.as_deref().map(Arc::from)
    }

    fn footprint(_: &Settings, _: &Terms) -> Option<Footprint> {
        // Either direction holds one read at most.
        let unread = Unread { held: READ, send_buffer: None };
        Some(Footprint { to_peer: unread, to_second: Some(unread), state: 2 * READ + STATE })
    }

    fn release(self, buffers: &mut Buffers) {
        self.up.release(buffers);
        self.down.release(buffers);
    }

    fn set_options(settings: &mut Settings, options: &Options) {
        if let Some(to) = &options.to {
            settings.to = Some(Arc::new(to.clone()));
        }
    }

    fn faults(config: &Config<Self>) -> Vec<String> {
        settings::faults(config)
    }

    fn obstacles(config: &Config<Self>, sockets: &[Arc<str>]) -> Vec<String> {
        settings::obstacles(config, sockets)
    }

    fn takes_descriptors(settings: &Settings) -> bool {
        settings.descriptors == Descriptors::Pass
    }

    fn replies(settings: &Settings) -> gate::Replies {
        settings.replies.of_gate()
    }
}

fn interest(reads: bool, writes: bool) -> Interest {
    match (reads, writes) {
        (true, true) => Interest::ReadWrite,
        (true, false) => Interest::Read,
        (false, true) => Interest::Write,
        (false, false) => Interest::Nothing,
    }
}

/// The pause after so many attempts and another one.
fn pause_after(tries: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << tries.min(10)).min(LONGEST_PAUSE)
}

/// Where a connection under these terms is passed on to.
fn target<'s>(settings: &'s Settings, terms: &'s Terms) -> Option<&'s Arc<Upstream>> {
    terms.to.as_ref().or(settings.to.as_ref())
}

impl Forward {
    /// Tries to reach the service, and passes on what is there.
    fn connect(&mut self, io: &mut Io<'_, Self>, now: Moment) -> Turn {
        let Some(target) = target(io.settings, io.terms) else {
            return self.refuse(Why::Error(Errno::EDESTADDRREQ as i32));
        };
        if self.to.is_none() {
            self.to = Some((**target.text()).into());
        }
        self.passes = io.settings.descriptors == Descriptors::Pass;
        let failed = |error| Why::Error(error as i32);
        let connected =
            upstream::new_socket(self.passes).map_err(failed).and_then(|socket| match io.settings.identity {
                Identity::Own => target.connect(socket).map(|fd| (fd, Seen::Own)).map_err(failed),
                Identity::Peer => identity::connect(socket, target, &io.peer, io.terms.root),
            });
        match connected {
            Ok((fd, seen)) => {
                self.seen = seen;
                let upstream = match self.passes {
                    true => Stream::taking_descriptors(fd, false),
                    false => Stream::accepted(fd),
                };
                self.passing = upstream.passing();
                self.upstream = Some(upstream);
                self.phase = Phase::Open;
                match self.pass_any(io) {
                    Ok(_) => self.ended().unwrap_or(Turn::Progress),
                    Err(turn) => turn,
                }
            }
            Err(Why::Error(error)) if is_temporary(Errno::from_raw(error)) => self.wait(io, now, Why::Error(error)),
            Err(why) => self.refuse(why),
        }
    }

    fn refuse(&mut self, why: Why) -> Turn {
        self.phase = Phase::Refused(why);
        Turn::Refused
    }

    /// Tries again a little later, unless the time is up.
    fn wait(&mut self, io: &Io<'_, Self>, now: Moment, why: Why) -> Turn {
        let (since, tries) = match self.phase {
            Phase::Waiting { since, tries, .. } => (since, tries),
            _ => (now, 0),
        };
        let end = since.checked_add(io.settings.connect_timeout);
        if end.is_some_and(|end| end <= now) {
            return self.refuse(why);
        }
        let next = now.checked_add(pause_after(tries)).unwrap_or(now);
        let due = end.map_or(next, |end| end.min(next));
        self.phase = Phase::Waiting { since, due, tries: tries.saturating_add(1) };
        self.wait_on(io)
    }

    /// A peer that has gone and has sent nothing waits no longer.
    fn wait_on(&self, io: &Io<'_, Self>) -> Turn {
        if has_hung_up(io.peer.as_fd()) && is_empty(io.peer.as_fd()) { Turn::Closed } else { Turn::Idle }
    }

    fn pass(&mut self, io: &mut Io<'_, Self>) -> Turn {
        let moved = match io.ready {
            Ready::Peer => self.pass_from_peer(io),
            Ready::Second => self.pass_from_upstream(io),
            Ready::Any => self.pass_any(io),
        };
        match moved {
            Ok(true) => self.ended().unwrap_or(Turn::Progress),
            Ok(false) => self.look_for_hang_up(io),
            Err(turn) => turn,
        }
    }
}

/// Either way.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

impl Forward {
    fn pass_any(&mut self, io: &mut Io<'_, Self>) -> Result<bool, Turn> {
        Ok(self.pass_from_peer(io)? | self.pass_from_upstream(io)?)
    }

    /// The peer may take more, or may have sent something.
    fn pass_from_peer(&mut self, io: &mut Io<'_, Self>) -> Result<bool, Turn> {
        let (mut flushed, mut passed) = (Moved::Nothing, Moved::Nothing);
        let Self { upstream: Some(upstream), passes, up, down, .. } = self else { return Err(Turn::Closed) };
        if down.writes() {
            flushed = down.flush(io.buffers, |bytes, with| send_to_peer(&mut io.peer, bytes, with));
        }
        if up.reads() {
            let spliced = if *passes || !io.peer.is_plain() { None } else { splice(Way::Up, up, upstream, io) };
            passed = spliced.unwrap_or_else(|| {
                up.pass(
                    io.buffers,
                    |room, with| {
                        if *passes { io.peer.receive_with_descriptors(room, with) } else { io.peer.receive(room) }
                    },
                    |bytes, with| send(upstream, bytes, with),
                )
            });
        }
        Ok(self.settle(Way::Down, flushed, io)? | self.settle(Way::Up, passed, io)?)
    }

    /// The service may take more, or may have sent something.
    fn pass_from_upstream(&mut self, io: &mut Io<'_, Self>) -> Result<bool, Turn> {
        let (mut flushed, mut passed) = (Moved::Nothing, Moved::Nothing);
        let Self { upstream: Some(upstream), passes, up, down, .. } = self else { return Err(Turn::Closed) };
        if up.writes() {
            flushed = up.flush(io.buffers, |bytes, with| send(upstream, bytes, with));
        }
        if down.reads() {
            let is_plain = upstream.passing() == Passing::Refused;
            let spliced = if *passes || !is_plain { None } else { splice(Way::Down, down, upstream, io) };
            passed = spliced.unwrap_or_else(|| {
                down.pass(
                    io.buffers,
                    |room, with| receive(upstream, room, with, *passes),
                    |bytes, with| send_to_peer(&mut io.peer, bytes, with),
                )
            });
            self.passing = upstream.passing();
        }
        Ok(self.settle(Way::Up, flushed, io)? | self.settle(Way::Down, passed, io)?)
    }

    /// What follows from what one direction did. Whether it did anything; `Err`: how the connection ends.
    fn settle(&mut self, way: Way, moved: Moved, io: &mut Io<'_, Self>) -> Result<bool, Turn> {
        let Self { upstream: Some(upstream), passes, up, down, .. } = self else { return Err(Turn::Closed) };
        match (moved, way) {
            (Moved::Nothing, _) => return Ok(false),
            (Moved::Some, _) => {}
            (Moved::End, Way::Up) => _ = upstream.shutdown(Shutdown::Write),
            (Moved::End, Way::Down) => io.peer.shutdown(Shutdown::Write),
            // Nothing is held when it is read, so that all it has sent is passed on by now.
            (Moved::SenderGone, _) => return Err(Turn::Closed),
            // As it would see it without a proxy, the end that sends gets EPIPE.
            (Moved::ReceiverGone, Way::Up) => {
                up.stop(io.buffers);
                io.peer.shutdown(Shutdown::Read);
                let (mut none, peer) = (fd_passing::Descriptors::default(), &mut io.peer);
                discard(&mut io.buffers.input, |room| match passes {
                    true => peer.receive_with_descriptors(room, &mut none),
                    false => peer.receive(room),
                });
            }
            (Moved::ReceiverGone, Way::Down) => {
                down.stop(io.buffers);
                let _ = upstream.shutdown(Shutdown::Read);
                let mut none = fd_passing::Descriptors::default();
                discard(&mut io.buffers.input, |room| receive(upstream, room, &mut none, *passes));
            }
            (Moved::Stopped(Received::SenderMismatch(sender)), _) => return Err(Turn::SenderMismatch(sender)),
            (Moved::Stopped(Received::Descriptors), Way::Up) => return Err(Turn::DescriptorsReceived),
            (Moved::Stopped(_), _) => return Err(Turn::Closed),
        }
        Ok(true)
    }

    fn ended(&self) -> Option<Turn> {
        (self.up.is_over() && self.down.is_over()).then_some(Turn::Closed)
    }

    /// An end that has sent its end of file may close altogether later. Then nothing can be delivered to it any more.
    fn look_for_hang_up(&self, io: &Io<'_, Self>) -> Turn {
        let concerns = |end| io.ready == end || io.ready == Ready::Any;
        let is_gone = concerns(Ready::Peer) && self.up.is_over() && has_hung_up(io.peer.as_fd())
            || concerns(Ready::Second)
                && self.down.is_over()
                && self.upstream.as_ref().is_some_and(|upstream| has_hung_up(upstream.as_fd()));
        if is_gone { Turn::Closed } else { Turn::Idle }
    }
}

/// Passes on what comes one way without copying it, where that is worth it.
fn splice(way: Way, direction: &mut Direction, upstream: &Stream, io: &mut Io<'_, Forward>) -> Option<Moved> {
    let before = [direction.read(), direction.written()];
    let (peer, service) = (io.peer.as_fd(), upstream.as_fd());
    let moved = match way {
        Way::Up => direction.splice(io.buffers, peer, service),
        Way::Down => direction.splice(io.buffers, service, peer),
    };
    let since = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(usize::MAX);
    match way {
        Way::Up => io.peer.note_passed(since(direction.read(), before[0]), 0),
        Way::Down => io.peer.note_passed(0, since(direction.written(), before[1])),
    }
    moved
}

/// Empties the queue of an end that may send no more. While its queue is full, that end waits for room, and poll(2) does not
/// tell it that a write would fail.
fn discard(room: &mut [u8], mut receive: impl FnMut(&mut [u8]) -> Received) {
    while matches!(receive(room), Received::Bytes(_)) {}
}

/// Reads once from the service.
fn receive(upstream: &mut Stream, room: &mut [u8], with: &mut fd_passing::Descriptors, passes: bool) -> Received {
    let read = match passes {
        true => upstream.receive_with_descriptors(room, with).map(|(count, _)| count),
        false => upstream.read(room),
    };
    match read {
        Ok(0) => Received::End,
        Ok(count) => Received::Bytes(count),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Received::Nothing,
            ErrorKind::InvalidData => Received::Descriptors,
            _ => Received::Broken,
        },
    }
}

fn send_to_peer(peer: &mut PeerStream<'_>, bytes: &[u8], with: &fd_passing::Descriptors) -> io::Result<usize> {
    if with.is_empty() { peer.send(bytes) } else { peer.send_with_descriptors(bytes, with) }
}

/// Writes as much as the service takes now.
fn send(upstream: &mut Stream, bytes: &[u8], with: &fd_passing::Descriptors) -> io::Result<usize> {
    if !with.is_empty() {
        return match upstream.send_with_descriptors(bytes, with) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            result => result,
        };
    }
    let mut written = 0;
    while written < bytes.len() {
        match upstream.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Whether the other end is closed in both directions.
fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut question = [PollFd::new(socket, PollFlags::empty())];
    let answer = poll(&mut question, PollTimeout::ZERO);
    answer.is_ok_and(|count| count > 0)
        && question[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// Whether nothing that was sent is unread.
fn is_empty(socket: BorrowedFd<'_>) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    !recv(socket.as_raw_fd(), &mut [0], flags).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_counts_as_input_one_way_and_is_owed_the_other_way() {
        let mut buffers = Buffers::new(64);
        let read = |room: &mut [u8], _: &mut fd_passing::Descriptors| {
            room[..5].copy_from_slice(b"bytes");
            Received::Bytes(5)
        };
        let mut up = Forward::start();
        up.up.pass(&mut buffers, read, |_, _| Ok(2));
        assert!(up.holds_input() && up.owed().is_empty() && up.may_be_told());
        let mut down = Forward::start();
        down.down.pass(&mut buffers, read, |_, _| Ok(2));
        assert!(!down.holds_input() && down.owed() == b"tes" && !down.may_be_told());
    }

    #[test]
    fn the_pause_before_an_attempt_to_connect_grows_to_a_bound() {
        let pauses: Vec<u128> = (0..8).map(|tries| pause_after(tries).as_millis()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 50, 50]);
        assert_eq!(pause_after(u32::MAX), LONGEST_PAUSE);
    }
}
