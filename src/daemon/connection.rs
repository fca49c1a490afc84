//! A connection that is served: what the gate knows of it, how far it has come, and the protocol's own state.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use peergate::Stream;
use peergate::audit::Audit;
use peergate::fd_passing::Passing;
use peergate::gate::Admission;
use peergate::peer::Peer;
use peergate::permits::Permit;
use peergate::policy::{Policy, Rule};
use serde::{Deserialize, Serialize};

use crate::buffers::Buffers;
use crate::close::ClosingRecord;
use crate::moment::Moment;
use crate::protocol::{Interest, Io, LineRecords, PeerStream, Protocol, Turn};
use crate::rounds::Share;
use crate::terms::Terms;

/// The settings of all connections of a worker, replaced as a whole at a reload.
pub struct WorkerConfig<P: Protocol> {
    /// Judges them anew at a reload.
    pub policy: Arc<Policy<Terms<P::Terms>>>,
    /// How long a connection may be silent, unless its rule says otherwise; `None`: without end.
    pub idle_timeout: Option<Duration>,
    /// Whether every piece of data must come from the user that was judged.
    pub verify: bool,
    /// The protocol's own.
    pub settings: P::Settings,
}

impl<P: Protocol> WorkerConfig<P> {
    /// Whether there are connections that end when nothing moves on them.
    pub fn is_timed(&self) -> bool {
        self.idle_timeout.is_some()
            || self.policy.rules().any(|rule| matches!(rule.terms().idle_timeout, Some(Some(_))))
    }
}

/// How far a connection has come. It moves as a whole from one state of the connection to the next, and to the next process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// GATE_CONNECTION.
    pub number: u64,
    /// When it was admitted.
    pub since: Moment,
    /// When something last came or went; kept up only where a timeout asks for it.
    pub active: Moment,
    /// Whether the kernel attaches the sender's credentials to what comes (SO_PASSCRED).
    pub pass_credentials: bool,
    /// Of the bytes yet to be read, how many of the first may lack credentials: no more than a socket's queue holds.
    pub unattested: u32,
}

impl Progress {
    /// Of a connection that begins now.
    pub fn new(number: u64) -> Self {
        let now = Moment::now();
        Self { number, since: now, active: now, pass_credentials: false, unattested: 0 }
    }
}

/// A connection that an earlier process left, not yet judged.
pub struct Carried<P: Protocol> {
    /// Its socket, which is connected to the peer.
    pub socket: OwnedFd,
    /// As the kernel tells of it now.
    pub peer: Peer,
    /// How far it had come.
    pub progress: Progress,
    /// The protocol's own state.
    pub protocol: P,
    /// As its stream said in the earlier process. `None`: not known.
    pub passing: Option<Passing>,
    /// What is to become of it, if the policy admits it.
    pub fate: Fate,
}

/// What becomes of a connection that an earlier process left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its state is known.
    GoesOn,
    /// Its state is not known, but nothing was pending: what comes next is answered, and that is the end.
    EndsInOrder,
    /// Its state is not known, and something was pending: it is only closed.
    EndsAtOnce,
}

impl<P: Protocol> Carried<P> {
    /// A connection without a state that can be used. `None` where not even the peer can be told.
    pub fn without_state(socket: OwnedFd, number: u64, fate: Fate) -> Option<Self> {
        let peer = Peer::ids_of(&socket).ok()?;
        // The socket still knows whether the kernel was asked to attach credentials.
        let pass_credentials = getsockopt(&socket, sockopt::PassCred).unwrap_or(false);
        let progress = Progress { pass_credentials, ..Progress::new(number) };
        Some(Self { socket, peer, progress, protocol: P::start(), passing: None, fate })
    }

    /// For the record, where it ends now.
    pub fn closing_record(&mut self) -> ClosingRecord<'_> {
        let Self { socket, peer, progress, protocol, .. } = self;
        ClosingRecord::new(socket, peer, progress, protocol)
    }
}

/// One connection. Small, because an idle one is nothing else.
pub struct Connection<P: Protocol> {
    /// First, so that its place is free before the peer can see the end of file.
    pub permit: Permit,
    /// Its socket, which is connected to the peer.
    pub socket: Stream,
    /// As the gate judged it.
    pub peer: Peer,
    /// The rule that admits it.
    pub rule: Arc<Rule<Terms<P::Terms>>>,
    /// How far it has come.
    pub progress: Progress,
    /// The protocol's own state.
    pub protocol: P,
    /// What its worker's epoll looks for; `None`: for nothing, because another turn is due anyway.
    pub heard: Option<Watched>,
    /// What its send buffer is bounded by; 0: it has the system's size.
    send_buffer: u32,
    /// Whether it came from an earlier process, so that the service manager may hold the same socket for a moment.
    pub is_shared: bool,
}

impl<P: Protocol> Connection<P> {
    /// A connection that the gate has just admitted.
    pub fn admitted(admission: Admission<Terms<P::Terms>>) -> Self {
        let progress = Progress {
            pass_credentials: admission.pass_credentials,
            unattested: u32::try_from(admission.unattested).unwrap_or(u32::MAX),
            ..Progress::new(admission.connection)
        };
        Self {
            permit: admission.permit,
            socket: admission.socket,
            peer: admission.peer,
            rule: admission.rule,
            progress,
            protocol: P::start(),
            heard: None,
            send_buffer: 0,
            is_shared: false,
        }
    }

    /// A connection of an earlier process, admitted again. Whether it takes descriptors.
    pub fn resumed(carried: Carried<P>, rule: Arc<Rule<Terms<P::Terms>>>, permit: Permit, takes: bool) -> Self {
        let Carried { socket, peer, progress, protocol, passing, fate: _ } = carried;
        let socket = match passing {
            _ if takes => Stream::taking_descriptors(socket, progress.pass_credentials),
            Some(passing) => Stream::resumed(socket, progress.pass_credentials, passing),
            None => Stream::inherited(socket, progress.pass_credentials),
        };
        let (heard, send_buffer) = (None, 0);
        Self { permit, socket, peer, rule, progress, protocol, heard, send_buffer, is_shared: true }
    }

    /// Only its descriptors. Closing these does not end the connection while the service manager holds them too; dropping the
    /// stream may shut it down.
    pub fn into_descriptors(self) -> (OwnedFd, Vec<OwnedFd>) {
        (self.socket.into(), self.protocol.into_further())
    }

    /// One turn.
    pub fn turn(&mut self, share: &mut Share, settings: &P::Settings, buffers: &mut Buffers, audit: &Audit) -> Turn {
        let Self { socket, peer, rule, progress, protocol, .. } = self;
        let connection = progress.number;
        let lines = LineRecords { audit, peer, rule: rule.name(), connection };
        let mut io = Io {
            ready: share.ready,
            most_lines: share.lines,
            peer: PeerStream { socket, judged: peer.uid(), progress, share },
            buffers,
            settings,
            terms: &rule.terms().own,
            lines,
        };
        protocol.turn(&mut io)
    }

    /// From now on each piece of data must come from the user that was judged, or need not any more. What was sent before
    /// cannot be attested afterwards: false where some of it is read and not yet answered, and the connection must end.
    /// What is still in the queue shows when it is read.
    #[must_use]
    pub fn verify(&mut self, verify: bool) -> bool {
        if verify == self.progress.pass_credentials {
            return true;
        }
        self.progress.pass_credentials = verify;
        let _ = self.socket.attach_credentials(verify);
        self.progress.unattested = 0;
        !verify || !self.protocol.holds_input()
    }

    /// Whether [`verify`](Self::verify) with this would ask for more than before.
    pub fn verifies_more(&self, verify: bool) -> bool {
        verify && !self.progress.pass_credentials
    }

    /// When the connection ends if nothing moves on it. `None`: never, or at a moment that no clock can tell; then
    /// [`Progress::active`] is not kept up.
    pub fn times_out(&self, config: &WorkerConfig<P>) -> Option<Moment> {
        let span = self.rule.terms().idle_timeout.unwrap_or(config.idle_timeout)?;
        self.progress.active.checked_add(span)
    }

    /// Bounds what the kernel takes for the peer before the peer has read it, where the protocol says by what.
    pub fn bound_send_buffer(&mut self, settings: &P::Settings) {
        let footprint = P::footprint(settings, &self.rule.terms().own);
        let Some(send_buffer) = footprint.and_then(|footprint| footprint.to_peer.send_buffer) else { return };
        let wanted = u32::try_from(send_buffer).unwrap_or(u32::MAX);
        if wanted != self.send_buffer {
            self.send_buffer = wanted;
            // The kernel doubles the number (socket(7)).
            let _ = setsockopt(&self.socket, sockopt::SndBuf, &(send_buffer / 2));
        }
    }

    /// What an epoll is to look for.
    pub fn watched(&self) -> Watched {
        let second = if P::HAS_SECOND { self.protocol.second() } else { None };
        Watched { peer: self.protocol.waits_for(), second: second.map(|(_, interest)| interest) }
    }
}

/// What a connection waits for: on the peer's socket, and on the second descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// On the peer's socket.
    pub peer: Interest,
    /// On the second descriptor, once it is open: then it stays the same one.
    pub second: Option<Interest>,
}

impl Watched {
    /// Whether the epoll tells of a hang-up only once: see [`Interest::Nothing`].
    pub fn is_told_once(self) -> bool {
        self.peer == Interest::Nothing || self.second == Some(Interest::Nothing)
    }
}

impl<P: Protocol> fmt::Debug for Connection<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, progress, .. } = self;
        let socket = self.socket.as_fd();
        f.debug_struct("Connection").field("socket", &socket).field("peer", peer).field("progress", progress).finish()
    }
}
