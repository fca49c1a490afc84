//! Connections that an earlier process left: judged by the policy in force before the gate opens, then served or ended in
//! order.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use peergate::Stream;
use peergate::Wakeup;
use peergate::audit::{Audit, Reason, Record, Severity};
use peergate::gate::{Closer, Gate, Judge, Setup};
use peergate::ids::Uid;
use peergate::journal::Writer;
use peergate::permits::Permits;
use peergate::systemd::Notifier;

use crate::close::{ClosingRecord, Context};
use crate::config::{Config, Verify};
use crate::connection::{Carried, Connection, Fate};
use crate::first_turn::FirstTurn;
use crate::gate_thread::{FirstTurns, GateThread};
use crate::in_force::worker_config;
use crate::protocol::Protocol;
use crate::service::Service;
use crate::stop::{DRAIN, end_workers, finish};
use crate::worker::Worker;

/// A connection of an earlier process after it was judged.
enum Judged<P: Protocol> {
    /// It may stay, and has a place in the limits.
    Admitted(Box<Connection<P>>, Fate),
    /// It may not. That is on record. Whether its peer may be told.
    Revoked(OwnedFd, bool),
}

/// What an earlier process left, judged.
pub struct Judgement<P: Protocol>(Vec<Judged<P>>);

impl<P: Protocol> Judgement<P> {
    /// Judges every connection by `config`.
    pub fn of(
        connections: Vec<Carried<P>>,
        judge: &Judge,
        config: &Config<P>,
        permits: &Permits,
        audit: &Audit,
    ) -> Self {
        Self(connections.into_iter().map(|one| self::judge(one, judge, config, permits, audit)).collect())
    }

    /// How many connections go on, end for want of a state, and may not stay.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |is: fn(&Judged<P>) -> bool| self.0.iter().filter(|one| is(one)).count();
        let goes_on = count(|one| matches!(one, Judged::Admitted(_, Fate::GoesOn)));
        let revoked = count(|one| matches!(one, Judged::Revoked(..)));
        (goes_on, self.0.len() - goes_on - revoked, revoked)
    }
}

fn judge<P: Protocol>(
    mut one: Carried<P>,
    judge: &Judge,
    config: &Config<P>,
    permits: &Permits,
    audit: &Audit,
) -> Judged<P> {
    // Where the state is not known, neither is what the peer has been sent.
    let may_be_told = one.fate != Fate::EndsAtOnce && one.protocol.may_be_told();
    let rule = match judge.judge_again(&mut one.peer, &one.socket, &config.policy) {
        Ok(rule) => rule,
        Err(denial) => {
            let mut record = one.closing_record();
            record.denied(audit, &denial);
            record.closed(audit, Some(Reason::Policy), denial.rule());
            return Judged::Revoked(one.socket, may_be_told);
        }
    };
    let permit = permits.resume(config.policy.owner_of(one.peer.uid()));
    let fate = one.fate;
    let mut connection = Connection::resumed(one, rule, permit, P::takes_descriptors(&config.settings));
    if connection.verify(config.service.verify == Verify::Line) {
        return Judged::Admitted(Box::new(connection), fate);
    }
    let rule = Arc::clone(&connection.rule);
    let mut record = ClosingRecord::of(&mut connection);
    record.sender_mismatch(audit, rule.name().as_str(), None);
    record.closed(audit, Some(Reason::Sender), rule.name().as_str());
    Judged::Revoked(connection.socket.into(), may_be_told)
}

impl<P: Protocol> Service<P> {
    /// Goes on with the connections of an earlier process, or ends them in order.
    pub(crate) fn take_over(&self, inherited: Judgement<P>) {
        let mut next = (0..self.workers.len()).cycle();
        let mut ending = Vec::new();
        for judged in inherited.0 {
            match judged {
                Judged::Admitted(connection, Fate::GoesOn) => {
                    self.workers[next.next().unwrap_or(0)].resume(connection);
                }
                Judged::Admitted(connection, Fate::EndsInOrder) => ending.push(connection),
                Judged::Admitted(mut connection, Fate::EndsAtOnce) => {
                    let rule = Arc::clone(&connection.rule);
                    let record = ClosingRecord::of(&mut connection);
                    record.closed(&self.audit, Some(Reason::Stopping), rule.name().as_str());
                    close_silently(&self.context.closer, connection.socket);
                }
                Judged::Revoked(socket, true) => self.context.closer.close_denied(socket),
                Judged::Revoked(socket, false) => close_silently(&self.context.closer, socket),
            }
        }
        self.end_in_order(ending);
    }
}

fn close_silently(closer: &Closer, socket: impl Into<Stream>) {
    closer.close_with(socket, &Arc::from(&b""[..]));
}

/// Records that connections of an earlier process stay in the store, where this one was told to make way for a next one
/// before it took them back.
pub fn leave_kept<P: Protocol>(is_any: bool, notifier: &Notifier) {
    if !is_any {
        return;
    }
    let audit = Audit::new(Config::<P>::without_file(Uid::effective()).audit);
    let Ok(journal) = Writer::start(&audit, P::NAME) else { return };
    audit.write(Record::note(Severity::Notice, "connections of an earlier process left to the next one"));
    finish(journal, notifier);
}

/// Ends the connections of an earlier process where this one does not serve: no peer is judged, each gets what it is owed,
/// and its end of file.
pub fn end_inherited<P: Protocol>(connections: Vec<Carried<P>>, notifier: &Notifier, why: &str) {
    let count = connections.len();
    if count == 0 {
        return;
    }
    let config = Config::without_file(Uid::effective());
    let audit = Audit::new(config.audit);
    let Ok(journal) = Writer::start(&audit, P::NAME) else { return };
    notifier.extend_timeout(DRAIN * 6);
    if let Err(error) = end_unjudged(connections, &config, &audit) {
        audit.write(Record::note(Severity::Error, format!("ending connections of an earlier process: {error}")));
    }
    let text = format!("{count} connections of an earlier process ended: {why}");
    audit.write(Record::note(Severity::Warning, text));
    finish(journal, notifier);
}

fn end_unjudged<P: Protocol>(connections: Vec<Carried<P>>, config: &Config<P>, audit: &Audit) -> io::Result<()> {
    let Some(rule) = config.policy.rules().next() else { return Ok(()) };
    let setup = Setup::without_listeners(Arc::clone(&config.policy), audit.clone());
    let permits = setup.permits.clone();
    let gate = Gate::new(setup)?;
    let context = Context {
        audit: audit.clone(),
        closer: gate.closer(),
        judge: gate.judge(),
        wakeup: Arc::new(Wakeup::new()?),
        busy_poll: None,
    };
    let mut settings = worker_config(config);
    settings.settings = P::unlimited(settings.settings);
    let of_new_connections = settings.settings.clone();
    let worker = Worker::start(0, settings, context.clone())?;
    let first_turn = FirstTurn::new(vec![worker.mailbox()], context.clone(), of_new_connections);
    // It closes in order what the worker has ended, while the worker still waits for other peers.
    let mut gate = GateThread::start(FirstTurns::new(gate, first_turn, Arc::clone(&context.wakeup)))?;
    for one in connections {
        if one.fate == Fate::EndsAtOnce {
            close_silently(&context.closer, one.socket);
            continue;
        }
        let permit = permits.resume(one.peer.uid());
        worker.resume(Box::new(Connection::resumed(one, Arc::clone(rule), permit, false)));
    }
    end_workers(vec![worker], 0);
    gate.shut();
    Ok(())
}
