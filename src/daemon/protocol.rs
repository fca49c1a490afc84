//! What a daemon does with the connections it admits: the one trait that it implements.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::epoll::EpollFlags;
use peergate::Stream;
use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::fd_passing::{Descriptors, Passing};
use peergate::gate::Replies;
use peergate::ids::Uid;
use peergate::peer::Peer;
use peergate::policy::RuleName;
use peergate::policy_file::Table;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::buffers::Buffers;
use crate::cli::Options;
use crate::config::Config;
use crate::connection::Progress;
use crate::memory::Footprint;
use crate::moment::Moment;
use crate::rounds::Share;

/// The most descriptors that a connection has besides the peer's.
pub const MOST_FURTHER: usize = 249;

/// The state of one connection as the daemon's protocol sees it, and its turns.
///
/// Connections are non-blocking. A turn does what can be done now and returns; the worker's epoll calls the next one. What a
/// turn leaves in the value is what the next process gets after a restart: it is written with serde.
pub trait Protocol: Sized + Send + Serialize + DeserializeOwned + 'static {
    /// The daemon's own settings. A reload replaces them.
    type Settings: Settings;
    /// The daemon's own keys on allow rules.
    type Terms: RuleKeys;

    /// What its command line may say besides.
    type Options: Options;

    /// The program's name: SYSLOG_IDENTIFIER, the first word of every message, and the name of its configuration file
    /// without `.toml` and of the file's directory.
    const NAME: &'static str;
    /// The name of its units, without `.socket` and `.service`; of a template with the `@`.
    const UNIT: &'static str;
    /// What it is, in one sentence, for `--help`.
    const ABOUT: &'static str;

    /// The version of the state. Raise it whenever the fields of the type that implements this change in number, order or
    /// type: the state is written field by field, without names (postcard), and the bytes of another version are not read.
    /// A connection left by another version is ended in order.
    const STATE_VERSION: u8 = 1;

    /// Puts what the command line says in place of what the file says.
    fn set_options(_settings: &mut Self::Settings, _options: &Self::Options) {}

    /// What is wrong with a configuration as a whole, a sentence each.
    fn faults(_config: &Config<Self>) -> Vec<String> {
        Vec::new()
    }

    /// What keeps this process from serving these sockets by this configuration, a sentence each. Asked at the start and at a
    /// reload, not by `check`.
    fn obstacles(_config: &Config<Self>, _sockets: &[Arc<str>]) -> Vec<String> {
        Vec::new()
    }

    /// What a peer gets that is turned away.
    fn replies(_settings: &Self::Settings) -> Replies {
        Replies::default()
    }

    /// Whether peers may send file descriptors.
    fn takes_descriptors(_settings: &Self::Settings) -> bool {
        false
    }

    /// Whether a connection may have a second descriptor besides the peer's: see [`second`](Self::second). Where it may not,
    /// it costs nothing.
    const HAS_SECOND: bool = false;

    /// The state of a connection that was just admitted.
    fn start() -> Self;

    /// One turn: a bounded piece of work, because other connections wait. It reads once, and answers no more than
    /// [`Io::most_lines`]. It is called when what
    /// [`waits_for`](Self::waits_for) says can be done, and also on suspicion: right after the admission (with 4 KiB in
    /// `io.buffers.input`, where a worker has 64 KiB), while a thread looks again before it sleeps, and a bounded number of
    /// times when the service stops. So it must say [`Turn::Idle`] exactly when nothing was done: anything else counts as a
    /// sign of life for the idle timeout.
    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn;

    /// What the next turn waits for.
    fn waits_for(&self) -> Interest {
        Interest::Read
    }

    /// A second descriptor of the connection, and what the next turn waits for on it. From the turn that opens it to the end of
    /// the connection it is the same one. Only with [`HAS_SECOND`](Self::HAS_SECOND).
    fn second(&self) -> Option<(BorrowedFd<'_>, Interest)> {
        None
    }

    /// Whether closing the second descriptor may be left to another thread: then it leaves the epoll before that.
    fn second_may_linger(&self) -> bool {
        false
    }

    /// All descriptors that go to the next process with the connection, [`MOST_FURTHER`] at most.
    fn further(&self) -> Vec<BorrowedFd<'_>> {
        self.second().map(|(second, _)| second).into_iter().collect()
    }

    /// Gives back what [`further`](Self::further) was in an earlier process.
    fn set_further(&mut self, _further: Vec<OwnedFd>) {}

    /// Only these descriptors: they are left to the next process, and closing these copies must not end anything.
    fn into_further(self) -> Vec<OwnedFd> {
        Vec::new()
    }

    /// When the next turn is due, whatever happens until then. Only with [`HAS_SECOND`](Self::HAS_SECOND).
    fn due(&self) -> Option<Moment> {
        None
    }

    /// These settings are in force now: after a reload, and for a connection of an earlier process.
    fn set_settings(&mut self, _settings: &Self::Settings) {}

    /// Why the connection cannot go on under settings and terms that a reload has put in force.
    fn outdated(&self, _settings: &Self::Settings, _terms: &Self::Terms) -> Option<String> {
        None
    }

    /// Whether the peer may be sent a message when the connection is revoked. Within a stream of another service's it would
    /// only damage the stream.
    fn may_be_told(&self) -> bool {
        true
    }

    /// Whether nothing is pending: all that was received is answered.
    fn is_at_rest(&self) -> bool {
        true
    }

    /// Whether bytes were received that are not wholly answered yet. Their sender cannot be told afterwards.
    fn holds_input(&self) -> bool {
        !self.is_at_rest()
    }

    /// What is owed to the peer where the connection is ended now (an idle timeout, a stop) and nothing more is read. Override
    /// it where the state holds output: the default drops that.
    fn owed(&self) -> Vec<u8> {
        Vec::new()
    }

    /// How the connection ends once the peer has taken what is pending, where that is settled.
    fn will_end(&self) -> Option<Turn> {
        None
    }

    /// Why the peer is refused, from the moment it is until it has been told.
    fn refusal(&self, _settings: &Self::Settings, _terms: &Self::Terms) -> Option<Refusal> {
        None
    }

    /// What the record of a closed connection counts.
    fn counters(&self) -> Counters;

    /// GATE_UPSTREAM: the service that the connection is passed on to.
    fn upstream(&self) -> Option<Arc<str>> {
        None
    }

    /// `settings` without a limit that could cut off what an earlier process has accepted. Used where a process that cannot
    /// serve ends the connections of an earlier one.
    fn unlimited(settings: Self::Settings) -> Self::Settings {
        settings
    }

    /// The most memory that a connection under these settings and terms takes. From it follow the bound of its send buffer,
    /// and what the limits of a configuration need. `None`: that is not known, and the send buffer has the system's size.
    fn footprint(_settings: &Self::Settings, _terms: &Self::Terms) -> Option<Footprint> {
        None
    }

    /// Gives the memory back that the connection held.
    fn release(self, _buffers: &mut Buffers) {}
}

/// The settings of a protocol.
pub trait Settings: Clone + fmt::Debug + Default + Send + Sync + 'static {
    /// Takes its keys out of `[limits]`.
    fn take_limits(&mut self, _limits: &mut Table<'_>) {}

    /// Takes its own tables out of the file.
    fn take_tables(&mut self, _file: &mut Table<'_>) {}

    /// Its keys of `[limits]` as a file has them, a line each, for `check`.
    fn show_limits(&self) -> Vec<String> {
        Vec::new()
    }

    /// Its own tables as a file has them.
    fn show_tables(&self) -> String {
        String::new()
    }
}

impl Settings for () {}

/// What a protocol lets an allow rule say.
pub trait RuleKeys: Clone + fmt::Debug + Default + Send + Sync + 'static {
    /// Takes its keys out of a rule.
    fn take(rule: &mut Table<'_>) -> Self;

    /// Each key that the rule has, as `check` shows it: `line-length 4K`.
    fn show(&self) -> Vec<String>;
}

impl RuleKeys for () {
    fn take(_: &mut Table<'_>) -> Self {}

    fn show(&self) -> Vec<String> {
        Vec::new()
    }
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There was nothing to do.
    Idle,
    /// Something was done; the connection goes on.
    Progress,
    /// The connection is over: the peer has closed it, or broken it off.
    Closed,
    /// The peer is refused: see [`Protocol::refusal`]. What the peer has not been told yet is sent as the connection closes.
    Refused,
    /// Data came from this user, which is not the one that was judged; `None`: without credentials.
    SenderMismatch(Option<Uid>),
    /// The peer sent file descriptors, which are not taken. What came before them is answered.
    DescriptorsReceived,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// The other end sends.
    Read,
    /// The other end takes what is written.
    Write,
    /// Both.
    ReadWrite,
    /// Neither.
    Nothing,
}

impl Interest {
    /// What an epoll is to look for.
    pub fn flags(self) -> EpollFlags {
        match self {
            Self::Read => EpollFlags::EPOLLIN,
            Self::Write => EpollFlags::EPOLLOUT,
            Self::ReadWrite => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
            // The kernel tells of a hang-up whether it is asked or not. Edge-triggered it does so once, not all the time.
            Self::Nothing => EpollFlags::EPOLLET,
        }
    }
}

/// What a turn is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Something has happened on the connection to the peer.
    Peer,
    /// Something has happened on the second descriptor.
    Second,
    /// On either, perhaps, or the time has come.
    Any,
}

/// Why a peer is refused by the protocol.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// GATE_REASON.
    pub reason: Reason,
    /// What MESSAGE says.
    pub text: String,
    /// What of the message is left to send.
    pub message: &'static [u8],
}

/// What the record of a closed connection counts. A line is one message of the protocol, whatever that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// GATE_LINES, where the protocol has lines.
    pub lines: Option<u64>,
    /// GATE_BYTES: received from the peer.
    pub bytes: u64,
    /// GATE_BYTES_SENT: to the peer, where the protocol counts them.
    pub sent: Option<u64>,
}

/// What a turn works with.
#[derive(Debug)]
pub struct Io<'a, P: Protocol> {
    /// What the turn is called for.
    pub ready: Ready,
    /// Receives from the peer and sends to it.
    pub peer: PeerStream<'a>,
    /// How many lines (messages of the protocol) the turn answers at most. It is smaller while several users have something
    /// to do. The rest is answered in later turns: [`Protocol::waits_for`] says [`Interest::Write`] meanwhile.
    pub most_lines: usize,
    /// Memory of this thread.
    pub buffers: &'a mut Buffers,
    /// The settings in force.
    pub settings: &'a P::Settings,
    /// The terms of the rule that admitted the peer.
    pub terms: &'a P::Terms,
    /// For `record = "lines"`.
    pub lines: LineRecords<'a>,
}

/// The connection to the peer. Where the senders of data are verified, each piece of it must come from the user that was
/// judged.
#[derive(Debug)]
pub struct PeerStream<'a> {
    pub(crate) socket: &'a mut Stream,
    pub(crate) judged: Uid,
    pub(crate) progress: &'a mut Progress,
    pub(crate) share: &'a mut Share,
}

/// What one read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing has come yet.
    Nothing,
    /// The peer sends no more.
    End,
    /// The connection is broken.
    Broken,
    /// The data came from this user, or without credentials.
    SenderMismatch(Option<Uid>),
    /// File descriptors come next. They are not taken, and nothing can be read past them.
    Descriptors,
}

impl Received {
    fn of(result: io::Result<(usize, Option<Option<Uid>>)>) -> Self {
        match result {
            Ok((_, Some(sender))) => Self::SenderMismatch(sender),
            Ok((0, None)) => Self::End,
            Ok((count, None)) => Self::Bytes(count),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Self::Nothing,
                ErrorKind::InvalidData => Self::Descriptors,
                _ => Self::Broken,
            },
        }
    }
}

impl PeerStream<'_> {
    /// Reads once.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Received {
        let received = if self.progress.pass_credentials {
            self.socket.receive(buffer).map(|(count, sender)| (count, self.mismatch(count, sender)))
        } else {
            self.socket.read(buffer).map(|count| (count, None))
        };
        self.note(Received::of(received), buffer.len())
    }

    /// What one read gave, with room for so many bytes, counts in the peer's share.
    fn note(&mut self, received: Received, room: usize) -> Received {
        if let Received::Bytes(count) = received {
            self.share.received += count;
            self.share.has_more |= count == room;
        }
        received
    }

    /// The sender of data, where it is not the user that was judged.
    fn mismatch(&mut self, count: usize, sender: Option<Uid>) -> Option<Option<Uid>> {
        let came_before = sender.is_none() && count <= self.progress.unattested as usize;
        let is_mismatch = count > 0 && sender != Some(self.judged) && !came_before;
        if !is_mismatch {
            self.progress.unattested =
                self.progress.unattested.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        }
        is_mismatch.then_some(sender)
    }

    /// Reads once, with the descriptors that came with the bytes.
    pub fn receive_with_descriptors(&mut self, buffer: &mut [u8], descriptors: &mut Descriptors) -> Received {
        let verify = self.progress.pass_credentials;
        let received = self.socket.receive_with_descriptors(buffer, descriptors);
        let received =
            received.map(|(count, sender)| (count, if verify { self.mismatch(count, sender) } else { None }));
        self.note(Received::of(received), buffer.len())
    }

    /// As [`send`](Self::send), with these descriptors, which go with the first byte.
    ///
    /// # Errors
    /// What sendmsg(2) says, where the connection is broken; ETOOMANYREFS while too many descriptors of this process's user are in
    /// flight (unix(7)).
    pub fn send_with_descriptors(&mut self, output: &[u8], descriptors: &Descriptors) -> io::Result<usize> {
        match self.socket.send_with_descriptors(output, descriptors) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            result => result.inspect(|written| self.share.sent += written),
        }
    }

    /// Whether what comes may be passed on unseen: it carries no descriptors, and its senders are not verified.
    pub fn is_plain(&self) -> bool {
        !self.progress.pass_credentials && self.socket.passing() == Passing::Refused
    }

    /// Counts in the peer's share what was passed on unseen.
    pub fn note_passed(&mut self, received: usize, sent: usize) {
        self.share.received += received;
        self.share.sent += sent;
    }

    /// Ends one direction.
    pub fn shutdown(&self, how: Shutdown) {
        // It fails where the connection is broken; then a read or a write says so too.
        let _ = self.socket.shutdown(how);
    }

    /// Writes as much as the peer takes now.
    ///
    /// # Errors
    /// What send(2) says, where the connection is broken.
    pub fn send(&mut self, output: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < output.len() {
            match self.socket.write(&output[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.share.is_blocked = true;
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.share.sent += written;
        Ok(written)
    }
}

/// To ask the kernel about the connection.
impl AsFd for PeerStream<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Records of single lines (messages of the protocol): their length, never their content.
#[derive(Clone, Copy, Debug)]
pub struct LineRecords<'a> {
    pub(crate) audit: &'a Audit,
    pub(crate) peer: &'a Peer,
    pub(crate) rule: &'a RuleName,
    pub(crate) connection: u64,
}

impl LineRecords<'_> {
    /// Whether lines are recorded. Ask before taking the trouble to find them.
    pub fn are_recorded(&self) -> bool {
        self.audit.writes_lines()
    }

    /// Records a line of so many bytes.
    pub fn record(&self, length: usize) {
        self.record_all(1, length, [length]);
    }

    /// Records so many lines, of so many bytes in all: the first ones, with their `lengths`, one by one, the rest as counts.
    pub fn record_all(&self, count: u64, bytes: usize, lengths: impl IntoIterator<Item = usize>) {
        if !self.are_recorded() || count == 0 {
            return;
        }
        self.audit.lines(self.peer.uid(), (count, bytes as u64), lengths, |length| {
            let mut record = Record::new(Event::Line);
            record.rule = Some(self.rule.as_str().into());
            record.connection = Some(self.connection);
            record.bytes = Some(length as u64);
            record.about = Some(About::former(self.peer));
            record
        });
    }
}
