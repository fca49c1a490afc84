//! The end of a connection, whoever had it last: what is recorded, its place in the limits, its socket.
//!
//! For the threads that serve: the workers, and the gate's own for those who are still on the threshold.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use peergate::Wakeup;
use peergate::activation::address_of;
use peergate::audit::{About, Audit, Event, Reason, Record};
use peergate::gate::Closer;
use peergate::peer::Peer;

use crate::connection::{Buffers, Connection, Outcome};
use crate::mailbox::Mailbox;

const WITHOUT_CREDENTIALS: &str = "its data came without credentials";

/// What it takes to let go of connections.
#[derive(Clone)]
pub struct Exit {
    audit: Audit,
    closer: Closer,
    wakeup: Arc<Wakeup>,
    nothing: Arc<[u8]>,
    /// Who leaves now leaves because everything ends.
    pub is_ending: bool,
}

impl Exit {
    pub fn new(audit: Audit, closer: Closer, wakeup: Arc<Wakeup>) -> Self {
        Self { audit, closer, wakeup, nothing: Arc::from(&b""[..]), is_ending: false }
    }

    /// The end of a connection of this mailbox's worker that is in no place any more. `line_length` is everybody's limit.
    pub fn part(
        &self,
        mut connection: Box<Connection>,
        outcome: Outcome,
        line_length: usize,
        buffers: &mut Buffers,
        mailbox: &Mailbox,
    ) {
        // Whatever it was that ended it then.
        let untold = connection.untold();
        let outcome = if untold.is_some() { Outcome::TooLong } else { outcome };
        self.record(&mut connection, &outcome, line_length);
        let owed = match outcome {
            Outcome::Over(Some(_)) | Outcome::Baggage => connection.owed(),
            _ => Vec::new(),
        };
        let Connection { permit, socket, held, is_shared, .. } = *connection;
        buffers.give_back(held);
        // Given back before the peer can know that it is over, and come again.
        drop(permit);
        mailbox.connections.fetch_sub(1, Ordering::Relaxed);
        match outcome {
            Outcome::TooLong => {
                let _ = mailbox.epoll.delete(&socket);
                let rest = untold.unwrap_or_default();
                self.closer
                    .close_with(socket, &if rest.is_empty() { Arc::clone(&self.nothing) } else { Arc::from(rest) });
            }
            Outcome::Stranger(_) | Outcome::Denied(_) => {
                let _ = mailbox.epoll.delete(&socket);
                self.closer.close_denied(socket);
            }
            // The peer may still be sending: it is to see an end of file, not a reset.
            Outcome::Over(Some(_)) | Outcome::Baggage => {
                let _ = mailbox.epoll.delete(&socket);
                self.closer
                    .close_with(socket, &if owed.is_empty() { Arc::clone(&self.nothing) } else { Arc::from(owed) });
            }
            Outcome::Over(None) | Outcome::Goes => {
                if is_shared || socket.may_linger() {
                    // Closing ours would leave it in the epoll, and the peer waiting, until the other holder has let go
                    // too: the manager, or the thread that closes what may take long.
                    let _ = mailbox.epoll.delete(&socket);
                    let _ = socket.shutdown(Shutdown::Both);
                }
                drop(socket);
            }
        }
        self.wakeup.notify();
    }

    fn record(&self, connection: &mut Connection, outcome: &Outcome, line_length: usize) {
        let reason = match outcome {
            Outcome::Over(None) if self.is_ending => Some(Reason::Stopping),
            Outcome::Over(reason) => *reason,
            Outcome::TooLong => Some(Reason::LineLength),
            Outcome::Stranger(_) => Some(Reason::Sender),
            Outcome::Denied(_) => Some(Reason::Policy),
            Outcome::Baggage => Some(Reason::Sender),
            Outcome::Goes => None,
        };
        match outcome {
            Outcome::TooLong => self.record_too_long(connection, line_length),
            Outcome::Stranger(Some(uid)) => {
                self.record_sender(connection, format!("its data came from another user (uid {uid})"));
            }
            Outcome::Stranger(None) => self.record_sender(connection, WITHOUT_CREDENTIALS.to_owned()),
            Outcome::Baggage => {
                self.record_sender(connection, "it sent file descriptors, which are not taken".to_owned());
            }
            Outcome::Denied(rule) => {
                let rule = rule.as_ref().map(|rule| rule.name().as_str());
                leaving(connection).record_denied(&self.audit, rule);
            }
            Outcome::Over(_) | Outcome::Goes => {}
        }
        let rule = Arc::clone(&connection.rule);
        leaving(connection).record_closed(&self.audit, reason, rule.name().as_str());
    }

    fn record_sender(&self, connection: &mut Connection, text: String) {
        let rule = Arc::clone(&connection.rule);
        leaving(connection).record_revoked(&self.audit, Reason::Sender, rule.name().as_str(), text);
    }

    fn record_too_long(&self, connection: &mut Connection, line_length: usize) {
        let limit = connection.line_length(line_length);
        let (peer, rule) = (&mut connection.peer, &connection.rule);
        let (socket, number) = (&connection.socket, connection.number);
        self.audit.turned_away(Event::Refused, Reason::LineLength, Some(peer.uid()), || {
            let mut record = Record::note(Event::Refused, format!("a line was longer than {limit} bytes"));
            record.reason = Some(Reason::LineLength);
            record.rule = Some(rule.name().as_str().into());
            record.socket = address_of(socket).ok();
            record.connection = Some(number);
            let details = peer.details(socket);
            record.about = Some(About::peer(peer, details));
            record
        });
    }
}

/// A connection that ends, for the record.
pub struct Leaving<'a> {
    pub socket: BorrowedFd<'a>,
    pub peer: &'a mut Peer,
    pub number: u64,
    pub lines: u64,
    pub bytes: u64,
    pub age: Duration,
}

fn leaving(connection: &mut Connection) -> Leaving<'_> {
    Leaving {
        socket: connection.socket.as_fd(),
        peer: &mut connection.peer,
        number: connection.number,
        lines: connection.lines,
        bytes: connection.bytes,
        age: connection.since.elapsed(),
    }
}

impl Leaving<'_> {
    /// The policy, which admitted it once, denies it now; by this rule, if one does.
    pub fn record_denied(&mut self, audit: &Audit, rule: Option<&str>) {
        let text = match rule {
            Some(rule) => format!("{rule} denies it now"),
            None => "no rule allows it any more".to_owned(),
        };
        self.record_revoked(audit, Reason::Policy, rule.unwrap_or("default"), text);
    }

    /// What is to be echoed came before it was asked who sends it.
    pub fn record_unattested(&mut self, audit: &Audit, rule: &str) {
        self.record_revoked(audit, Reason::Sender, rule, WITHOUT_CREDENTIALS.to_owned());
    }

    fn record_revoked(&mut self, audit: &Audit, reason: Reason, rule: &str, text: String) {
        let details = self.peer.details(&self.socket);
        self.peer.release_process();
        let mut record = self.record(Record::note(Event::Revoked, text), Some(reason), rule);
        record.about = Some(About::peer(self.peer, details));
        audit.write(record);
    }

    /// That it is over, where that is to be recorded.
    pub fn record_closed(&self, audit: &Audit, reason: Option<Reason>, rule: &str) {
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
        record.lines = Some(self.lines);
        record.bytes = Some(self.bytes);
        record
    }
}
