//! For unit tests: a protocol that sends each line back as it came, and what it takes to serve it without a program.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use peergate::Stream;
use peergate::Wakeup;
use peergate::audit::{Audit, Settings as AuditSettings};
use peergate::gate::{Admission, Gate, Setup};
use peergate::ids::Uid;
use peergate::peer::Peer;
use peergate::permits::Permits;
use peergate::policy::Policy;
use peergate::policy_file::Table;
use serde::{Deserialize, Serialize};

use crate::buffers::Buffers;
use crate::close::Context;
use crate::config::values::{SIZE, show_size};
use crate::connection::WorkerConfig;
use crate::memory::{Footprint, Unread};
use crate::protocol::{Counters, Interest, Io, Protocol, Received, RuleKeys, Settings, Turn};
use crate::terms::Terms;

/// Each line comes back; what is held is the beginning of one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lines {
    pub held: Vec<u8>,
    pub bytes: u64,
    is_ending: bool,
}

impl Protocol for Lines {
    type Settings = LineSettings;
    type Terms = LineTerms;
    type Options = ();

    const NAME: &'static str = "echod";
    const UNIT: &'static str = "echo";
    const ABOUT: &'static str = "For tests";

    fn start() -> Self {
        Self { held: Vec::new(), bytes: 0, is_ending: false }
    }

    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn {
        if self.waits_for() == Interest::Read {
            match io.peer.receive(&mut io.buffers.input) {
                Received::Bytes(count) => {
                    self.bytes += count as u64;
                    if self.held.is_empty() {
                        self.held = io.buffers.take(count, count);
                    }
                    self.held.extend_from_slice(&io.buffers.input[..count]);
                }
                Received::Nothing => return Turn::Idle,
                Received::End | Received::Broken => return Turn::Closed,
                Received::SenderMismatch(sender) => return Turn::SenderMismatch(sender),
                Received::Descriptors => return Turn::DescriptorsReceived,
            }
        }
        let end = self.held.iter().rposition(|byte| *byte == b'\n').map_or(0, |lf| lf + 1);
        let Ok(sent) = io.peer.send(&self.held[..end]) else { return Turn::Closed };
        self.held.drain(..sent);
        if self.held.is_empty() {
            io.buffers.give_back(std::mem::take(&mut self.held));
        }
        Turn::Progress
    }

    fn waits_for(&self) -> Interest {
        if self.held.contains(&b'\n') { Interest::Write } else { Interest::Read }
    }

    fn is_at_rest(&self) -> bool {
        self.held.is_empty()
    }

    fn holds_input(&self) -> bool {
        !self.held.is_empty()
    }

    fn owed(&self) -> Vec<u8> {
        self.held.clone()
    }

    fn will_end(&self) -> Option<Turn> {
        self.is_ending.then_some(Turn::Closed)
    }

    fn counters(&self) -> Counters {
        Counters { bytes: self.bytes, ..Counters::default() }
    }

    fn footprint(settings: &LineSettings, terms: &LineTerms) -> Option<Footprint> {
        let held = terms.line_length.unwrap_or(settings.line_length);
        let to_peer = Unread { held, send_buffer: Some(0) };
        Some(Footprint { to_peer, to_second: None, state: 0 })
    }

    fn release(self, buffers: &mut Buffers) {
        buffers.give_back(self.held);
    }
}

/// A key of the protocol's own in `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineSettings {
    pub line_length: usize,
}

impl Default for LineSettings {
    fn default() -> Self {
        Self { line_length: 64 << 10 }
    }
}

impl Settings for LineSettings {
    fn take_limits(&mut self, limits: &mut Table<'_>) {
        self.line_length = limits.take("line-length", &SIZE).unwrap_or(self.line_length);
    }

    fn show_limits(&self) -> Vec<String> {
        vec![format!("line-length = \"{}\"", show_size(self.line_length))]
    }
}

/// A key of the protocol's own on a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineTerms {
    pub line_length: Option<usize>,
}

impl RuleKeys for LineTerms {
    fn take(rule: &mut Table<'_>) -> Self {
        Self { line_length: rule.take("line-length", &SIZE) }
    }

    fn show(&self) -> Vec<String> {
        self.line_length.map(|bytes| format!("line-length {}", show_size(bytes))).into_iter().collect()
    }
}

/// A policy that admits this user alone.
pub fn owner() -> Arc<Policy<Terms<LineTerms>>> {
    Arc::new(Policy::owner_only(Uid::effective()))
}

pub fn config(policy: &Arc<Policy<Terms<LineTerms>>>) -> WorkerConfig<Lines> {
    WorkerConfig { policy: Arc::clone(policy), idle_timeout: None, verify: false, settings: LineSettings::default() }
}

/// What a worker needs, and a gate without listeners.
pub fn context(policy: &Arc<Policy<Terms<LineTerms>>>) -> (Context, Gate<Terms<LineTerms>>) {
    let audit = Audit::new(AuditSettings::default());
    let gate = Gate::new(Setup::without_listeners(Arc::clone(policy), audit.clone())).unwrap();
    let wakeup = Arc::new(Wakeup::new().unwrap());
    (Context { audit, closer: gate.closer(), judge: gate.judge(), wakeup, busy_poll: None }, gate)
}

/// A connection as the gate admits it, and its other end.
pub fn admission(policy: &Policy<Terms<LineTerms>>, connection: u64) -> (Admission<Terms<LineTerms>>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let socket = Stream::accepted(ours);
    let (peer, rule) = (Peer::credentials_of(&socket).unwrap(), policy.rules().next().unwrap());
    let mut admission = Admission::new(socket, peer, Arc::clone(rule), Permits::new().resume(policy.me()));
    admission.connection = connection;
    (admission, theirs)
}
