//! The end of the service: live connections are left to the next process or ended in order, and the record is written.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use peergate::audit::Severity;
use peergate::handover::Left;
use peergate::journal::Writer;
use peergate::systemd::{Notifier, Request};

use crate::connection::Connection;
use crate::handover;
use crate::in_force::worker_config;
use crate::protocol::Protocol;
use crate::service::Service;
use crate::worker::Worker;

/// How long connections that are not left to the next process may take to get what they are owed.
pub const DRAIN: Duration = Duration::from_secs(5);
/// How long the end may wait for a journal that takes nothing. TimeoutStopSec= of the unit is shorter: it is extended.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(60);
/// The same for one that takes what is left, but slowly.
const JOURNAL_AT_MOST: Duration = Duration::from_secs(300);

impl<P: Protocol> Service<P> {
    /// Accepts no further connection, leaves the live ones to the next process or ends them in order, and writes what is left
    /// of the record.
    pub(crate) fn stop(mut self, journal: Writer) {
        // Counted before a peer can notice: a connection that its peer closes then has ended too.
        let total = self.permits.total();
        self.notifier.stopping("stopping");
        // The watchdog is not fed any more. It holds the workers' mailboxes, and with them their epolls.
        self.watchdog = None;
        let next_connection = self.gate.stop_accepting();
        let total = total.max(self.permits.total());
        // A process that waits for the answer to a reload will get no other.
        let waiting = self.requests.drain(..).chain(std::iter::from_fn(|| self.signals.next()));
        let waiting: Vec<_> = waiting.collect();
        for request in waiting {
            if let Request::Reload { answer_to: Some(pid) } = request {
                self.signals.answer(pid, false);
            }
        }
        let none_follows = self.signals.stop_is_final() || !self.store.is_present();
        let carry = if total == 0 || none_follows { 0 } else { usize::MAX };
        self.notifier.extend_timeout(DRAIN * 6);
        let carried = end_workers(std::mem::take(&mut self.workers), carry);
        let carried = if carried.is_empty() { Vec::new() } else { self.leave(carried, next_connection) };
        if total > 0 {
            let ended = total - carried.len().min(total);
            let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
            let text = format!("{} connections left to the next process, {ended} ended", carried.len());
            self.note(severity, text);
        }
        // Closed only now that the service manager holds its own copies.
        drop(carried);
        let listeners = self.gate.shut();
        finish(journal, &self.notifier);
        drop(listeners);
    }

    /// Leaves connections to the next process. A connection that cannot be left is ended in order. Returns our copies of the sockets that were left.
    fn leave(&mut self, mut carried: Vec<Box<Connection<P>>>, next_connection: u64) -> Vec<(OwnedFd, Vec<OwnedFd>)> {
        self.notifier.extend_timeout(handover::PATIENCE + DRAIN * 2);
        let (left, error) = match handover::leave(&carried, next_connection, &self.store) {
            Ok(Left { connections, stopped_by, .. }) => (connections, stopped_by),
            Err(error) => (0, Some(error)),
        };
        let ending = carried.split_off(left);
        if let Some(error) = error {
            let text = format!("{} connections cannot be left to the next process: {error}", ending.len());
            self.note(Severity::Warning, text);
        }
        self.end_in_order(ending);
        carried.into_iter().map(|connection| connection.into_descriptors()).collect()
    }

    /// Gives connections in no worker's hands what they are owed and their end of file, from a worker of their own.
    pub(crate) fn end_in_order(&self, connections: Vec<Box<Connection<P>>>) {
        if connections.is_empty() {
            return;
        }
        let worker = match Worker::start(self.workers.len(), worker_config(&self.config), self.context.clone()) {
            Ok(worker) => worker,
            Err(error) => {
                let count = connections.len();
                return self.note(Severity::Warning, format!("{count} connections cannot be ended in order: {error}"));
            }
        };
        connections.into_iter().for_each(|connection| worker.resume(connection));
        end_workers(vec![worker], 0);
    }
}

/// Ends all workers; what comes back are up to `carry` connections at rest. The threads may still be closing their epolls
/// then, which takes long after thousands of connections.
pub fn end_workers<P: Protocol>(workers: Vec<Worker<P>>, carry: usize) -> Vec<Box<Connection<P>>> {
    let (reply, replies) = mpsc::channel();
    let until = Instant::now() + DRAIN;
    let mut left = carry;
    for worker in &workers {
        // A connection that the gate is just giving to a worker is counted already.
        let share = worker.connections().min(left);
        left -= share;
        worker.end(share, until, reply.clone());
    }
    drop((reply, workers));
    replies.iter().flatten().collect()
}

/// Writes the last records, for which the service manager is asked to wait.
pub fn finish(journal: Writer, notifier: &Notifier) {
    let until = Instant::now() + JOURNAL_AT_MOST;
    journal.finish_while(|stalled| {
        notifier.extend_timeout(Duration::from_secs(10));
        stalled < JOURNAL_PATIENCE && Instant::now() < until
    });
}
