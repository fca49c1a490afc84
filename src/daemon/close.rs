//! The end of a connection: what is recorded, its place in the limits, its socket. For every thread that serves.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use peergate::Wakeup;
use peergate::activation::address_of;
use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::gate::{Closer, Denial, Judge};
use peergate::ids::Uid;
use peergate::peer::Peer;

use crate::buffers::Buffers;
use crate::connection::{Connection, Progress};
use crate::mailbox::Mailbox;
use crate::protocol::{Counters, Protocol, Refusal, Turn};

const WITHOUT_CREDENTIALS: &str = "its data came without credentials";

/// What a thread that serves shares with the rest of the daemon.
#[derive(Clone)]
pub struct Context {
    pub audit: Audit,
    pub closer: Closer,
    pub judge: Judge,
    /// Hears of each connection that ends.
    pub wakeup: Arc<Wakeup>,
    pub busy_poll: Option<Duration>,
}

/// Why a connection ends.
pub enum End {
    /// The peer has closed it, or broken it off.
    Closed,
    /// The daemon ends it: nothing came for too long, or the service is stopping.
    Ended(Reason),
    /// The protocol refuses the peer: [`Protocol::refusal`].
    Refused,
    /// The policy admits the peer no more.
    Denied(Denial),
    /// It cannot go on under the configuration in force: [`Protocol::outdated`].
    Outdated(String),
    /// Data came from this user, or without credentials.
    SenderMismatch(Option<Uid>),
    /// The peer sent file descriptors.
    DescriptorsReceived,
}

impl End {
    /// The end that a turn reports; `None` where the connection goes on.
    pub fn of(turn: Turn) -> Option<Self> {
        Some(match turn {
            Turn::Idle | Turn::Progress => return None,
            Turn::Closed => Self::Closed,
            Turn::Refused => Self::Refused,
            Turn::SenderMismatch(uid) => Self::SenderMismatch(uid),
            Turn::DescriptorsReceived => Self::DescriptorsReceived,
        })
    }

    fn reason(&self, refusal: Option<&Refusal>) -> Option<Reason> {
        match self {
            Self::Closed => None,
            Self::Ended(reason) => Some(*reason),
            Self::Refused => refusal.map(|refusal| refusal.reason),
            Self::Denied(_) | Self::Outdated(_) => Some(Reason::Policy),
            Self::SenderMismatch(_) | Self::DescriptorsReceived => Some(Reason::Sender),
        }
    }
}

impl Context {
    /// Ends a connection of this mailbox's worker, which is in no place of the worker any more.
    pub fn close<P: Protocol>(
        &self,
        mut connection: Box<Connection<P>>,
        end: End,
        settings: &P::Settings,
        buffers: &mut Buffers,
        mailbox: &Mailbox<P>,
    ) {
        // A peer that is being refused is told that, whatever else ends the connection meanwhile.
        let is_refused = connection.protocol.will_end() == Some(Turn::Refused);
        let end = if is_refused { End::Refused } else { end };
        let refusal = connection.protocol.refusal(settings, &connection.rule.terms().own);
        self.record(&mut connection, &end, refusal.as_ref());
        let message = match &end {
            End::Refused => refusal.map(|refusal| refusal.message.to_vec()).unwrap_or_default(),
            End::Ended(_) | End::DescriptorsReceived => connection.protocol.owed(),
            _ => Vec::new(),
        };
        if P::HAS_SECOND && (connection.is_shared || connection.protocol.second_may_linger()) {
            end_second(&connection, mailbox);
        }
        let may_be_told = connection.protocol.may_be_told();
        let Connection { permit, socket, protocol, is_shared, .. } = *connection;
        protocol.release(buffers);
        // Given back before the peer can know that the connection is over, and connect again.
        drop(permit);
        mailbox.connections.fetch_sub(1, Ordering::Relaxed);
        match end {
            End::Closed => {
                if is_shared || socket.may_linger() {
                    // Closing ours would leave it in the epoll, and the peer waiting, until the other holder has let go
                    // too: the service manager, or the thread that closes what may take long.
                    let _ = mailbox.epoll.delete(&socket);
                    let _ = socket.shutdown(Shutdown::Both);
                }
                drop(socket);
            }
            End::Denied(_) | End::Outdated(_) | End::SenderMismatch(_) => {
                let _ = mailbox.epoll.delete(&socket);
                if may_be_told {
                    self.closer.close_denied(socket);
                } else {
                    self.closer.close_with(socket, &Arc::from(message));
                }
            }
            // The peer may still be sending: it is to see an end of file, not a reset.
            End::Refused | End::Ended(_) | End::DescriptorsReceived => {
                let _ = mailbox.epoll.delete(&socket);
                self.closer.close_with(socket, &Arc::from(message));
            }
        }
        self.wakeup.notify();
    }

    fn record<P: Protocol>(&self, connection: &mut Connection<P>, end: &End, refusal: Option<&Refusal>) {
        let rule = Arc::clone(&connection.rule);
        let rule = rule.name().as_str();
        if let (End::Refused, Some(refusal)) = (end, refusal) {
            self.record_refusal(connection, refusal);
        }
        let mut closing = ClosingRecord::of(connection);
        match end {
            End::SenderMismatch(sender) => closing.sender_mismatch(&self.audit, rule, *sender),
            End::DescriptorsReceived => {
                let text = "it sent file descriptors, which are not taken".to_owned();
                closing.revoked(&self.audit, Reason::Sender, rule, text);
            }
            End::Denied(denial) => closing.denied(&self.audit, denial),
            End::Outdated(text) => closing.revoked(&self.audit, Reason::Policy, rule, text.clone()),
            End::Closed | End::Ended(_) | End::Refused => {}
        }
        closing.closed(&self.audit, end.reason(refusal), rule);
    }

    fn record_refusal<P: Protocol>(&self, connection: &mut Connection<P>, refusal: &Refusal) {
        let Connection { peer, rule, socket, progress, protocol, .. } = connection;
        self.audit.turned_away(Event::Refused, refusal.reason, Some(peer.uid()), || {
            let mut record = Record::note(Event::Refused, refusal.text.clone());
            record.reason = Some(refusal.reason);
            record.rule = Some(rule.name().as_str().into());
            record.socket = address_of(socket).ok();
            record.connection = Some(progress.number);
            record.upstream = protocol.upstream();
            let details = peer.details(socket);
            record.about = Some(About::peer(peer, details));
            record
        });
    }
}

/// A connection that ends, for the record.
pub struct ClosingRecord<'a> {
    pub socket: BorrowedFd<'a>,
    pub peer: &'a mut Peer,
    pub number: u64,
    pub counters: Counters,
    pub upstream: Option<Arc<str>>,
    pub age: Duration,
}

/// The service manager may hold the second descriptor of a connection for a moment, or another thread of ours, so that closing it
/// here neither ends it nor takes it out of the epoll.
fn end_second<P: Protocol>(connection: &Connection<P>, mailbox: &Mailbox<P>) {
    if let Some((second, _)) = connection.protocol.second() {
        let _ = mailbox.epoll.delete(second);
        let _ = nix::sys::socket::shutdown(second.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

impl<'a> ClosingRecord<'a> {
    pub fn of<P: Protocol>(connection: &'a mut Connection<P>) -> Self {
        let Connection { socket, peer, progress, protocol, .. } = connection;
        Self::new(socket, peer, progress, protocol)
    }

    pub fn new(socket: &'a impl AsFd, peer: &'a mut Peer, progress: &Progress, protocol: &impl Protocol) -> Self {
        Self {
            socket: socket.as_fd(),
            peer,
            number: progress.number,
            counters: protocol.counters(),
            upstream: protocol.upstream(),
            age: progress.since.elapsed(),
        }
    }

    /// The policy, which admitted the peer once, denies it now.
    pub fn denied(&mut self, audit: &Audit, denial: &Denial) {
        self.revoked(audit, Reason::Policy, denial.rule(), denial.to_string());
    }

    /// Data came from this user, or without credentials.
    pub fn sender_mismatch(&mut self, audit: &Audit, rule: &str, sender: Option<Uid>) {
        let text = match sender {
            Some(uid) => format!("its data came from another user (uid {uid})"),
            None => WITHOUT_CREDENTIALS.to_owned(),
        };
        self.revoked(audit, Reason::Sender, rule, text);
    }

    fn revoked(&mut self, audit: &Audit, reason: Reason, rule: &str, text: String) {
        let details = self.peer.details(&self.socket);
        self.peer.close_pidfd();
        let mut record = self.record(Record::note(Event::Revoked, text), Some(reason), rule);
        record.about = Some(About::peer(self.peer, details));
        audit.write(record);
    }

    /// The connection is over, where that is to be recorded.
    pub fn closed(&self, audit: &Audit, reason: Option<Reason>, rule: &str) {
        if audit.writes_connections() {
            let mut record = self.record(Record::new(Event::Closed), reason, rule);
            record.duration = Some(self.age);
            record.about = Some(About::former(self.peer));
            audit.write(record);
        }
    }

    fn record(&self, mut record: Record, reason: Option<Reason>, rule: &str) -> Record {
        record.reason = reason;
        record.rule = Some(rule.into());
        record.socket = address_of(&self.socket).ok();
        record.connection = Some(self.number);
        record.lines = self.counters.lines;
        record.bytes = Some(self.counters.bytes);
        record.bytes_sent = self.counters.sent;
        record.upstream = self.upstream.clone();
        record
    }
}
