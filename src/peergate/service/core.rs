//! The gate and the live connections of a service, for every thread that has to do with them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Error, Opened, Plan};
use crate::Wakeup;
use crate::audit::{Audit, Record, Severity};
#[cfg(any(feature = "restart", feature = "tokio"))]
use crate::fd_passing::Stream;
#[cfg(feature = "tokio")]
use crate::gate::Ready;
use crate::gate::{Admission, Closer, Gate};
use crate::journal::Writer;
use crate::permits::{Permits, Terms};
use crate::policy::Policy;
use crate::session::Live;
#[cfg(feature = "tokio")]
use crate::session::Notice;
use crate::systemd::activation::Listener;
use crate::systemd::{Heartbeat, Monitored};

/// One thread or task gives the gate its turns ([`turn`](Self::turn)); the attendant changes the policy and ends it.
pub(crate) struct Core<T: Terms> {
    /// `None` once it has ended.
    gate: Mutex<Option<Gate<T>>>,
    /// The gate's epoll, to wait for.
    epoll: OwnedFd,
    pub(crate) live: Arc<Live<T>>,
    pub(crate) permits: Permits,
    pub(crate) audit: Audit,
    pub(crate) heartbeat: Arc<Heartbeat>,
    closer: Closer,
    /// Given when no connection is accepted any more.
    #[cfg(feature = "tokio")]
    pub(crate) stopping: Notice,
    /// Wakes the attendant.
    pub(crate) wakeup: Wakeup,
}

impl<T: Terms> Core<T> {
    pub(crate) fn open(opened: Opened<T>) -> Result<(Arc<Self>, Writer, Plan<T>), Error> {
        let Opened { setup, permits, audit, journal, plan } = opened;
        match Self::new(setup, permits, audit) {
            Ok(core) => Ok((Arc::new(core), journal, plan)),
            Err(error) => {
                journal.finish(Duration::from_secs(1));
                Err(Error::new("opening the gate", error))
            }
        }
    }

    fn new(setup: crate::gate::Setup<T>, permits: Permits, audit: Audit) -> io::Result<Self> {
        let gate = Gate::new(setup)?;
        let closer = gate.closer();
        Ok(Self {
            epoll: gate.as_fd().try_clone_to_owned()?,
            live: Arc::new(Live::new(&audit, gate.judge(), closer.clone())?),
            gate: Mutex::new(Some(gate)),
            permits,
            audit,
            heartbeat: Arc::default(),
            closer,
            #[cfg(feature = "tokio")]
            stopping: Notice::default(),
            wakeup: Wakeup::new()?,
        })
    }

    /// Readable when the gate has something to do.
    pub(crate) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Does what is due without waiting. When the next turn is due in any case; `None` where the gate has ended.
    ///
    /// `take` gets what was admitted while the gate is still held. A stop asks the gate for its last connections
    /// ([`stop_accepting`](Self::stop_accepting)) and then looks whether any lives: it would overlook one that has left the gate
    /// and is not entered yet.
    pub(crate) fn turn(
        &self,
        admitted: &mut Vec<Admission<T>>,
        take: impl FnOnce(&mut Vec<Admission<T>>),
    ) -> Option<Option<Instant>> {
        self.heartbeat.answer();
        let mut gate = self.gate();
        let gate = gate.as_mut()?;
        gate.turn(Some(Duration::ZERO), admitted);
        take(admitted);
        Some(gate.deadline())
    }

    /// As [`turn`](Self::turn), for a runtime that watches the listeners itself. When the next turn is due at the latest;
    /// `None` where the gate has ended.
    #[cfg(feature = "tokio")]
    pub(crate) fn turn_with(
        &self,
        ready: &mut Ready,
        admitted: &mut Vec<Admission<T>>,
        take: impl FnOnce(&mut Vec<Admission<T>>),
    ) -> Option<Option<Instant>> {
        self.heartbeat.answer();
        let mut gate = self.gate();
        let due = gate.as_mut()?.turn_with(ready, admitted);
        take(admitted);
        Some(due)
    }

    /// Copies of the listeners, for a runtime that watches them from now on.
    #[cfg(feature = "tokio")]
    pub(crate) fn watch_outside(&self) -> io::Result<(Vec<OwnedFd>, Ready)> {
        match self.gate().as_mut() {
            Some(gate) => gate.watch_outside(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Puts a policy in force for the next connection and for the live ones. Returns how many it revoked.
    pub(super) fn put_in_force(&self, policy: Arc<Policy<T>>) -> usize {
        let Some(generation) = self.gate().as_mut().map(|gate| gate.set_policy(Arc::clone(&policy))) else { return 0 };
        self.live.put_in_force(&policy, generation)
    }

    /// Accepts no further connection. What waits for a place is admitted or refused.
    pub(crate) fn stop_accepting(&self, admitted: &mut Vec<Admission<T>>) {
        if let Some(gate) = self.gate().as_mut() {
            gate.accept_from_own(admitted);
            gate.stop_accepting(admitted);
        }
    }

    /// Ends the gate if no connection is admitted, waits for a place or is being closed.
    pub(super) fn end_if_quiet(&self) -> bool {
        let mut gate = self.gate();
        if !gate.as_ref().is_none_or(Gate::is_quiet) {
            return false;
        }
        let ended = gate.take();
        drop(gate);
        ended.map(Gate::finish);
        self.closer.wake();
        true
    }

    /// Ends the gate: what is being closed gets a second at most.
    pub(crate) fn end(&self) -> Vec<Listener> {
        let ended = self.gate().take();
        self.closer.wake();
        ended.map(Gate::finish).unwrap_or_default()
    }

    /// The policy in force and the number that the next connection will have.
    #[cfg(feature = "restart")]
    pub(super) fn state(&self) -> Option<(Arc<Policy<T>>, u64)> {
        self.gate().as_ref().map(|gate| (Arc::clone(&gate.config().policy), gate.next_connection()))
    }

    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Closes a connection that nothing serves.
    #[cfg(any(feature = "restart", feature = "tokio"))]
    pub(crate) fn close_in_order(&self, socket: impl Into<Stream>) {
        self.closer.close_with(socket, &Arc::from(&b""[..]));
    }

    pub(crate) fn monitored(&self) -> Monitored {
        let closer = self.closer.clone();
        Monitored::new("gate", &self.heartbeat, move || closer.wake())
    }

    pub(crate) fn note(&self, severity: Severity, text: impl Into<String>) {
        self.audit.write(Record::note(severity, text));
    }

    fn gate(&self) -> MutexGuard<'_, Option<Gate<T>>> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{Service, Uid, activation};

    #[test]
    fn a_connection_that_waits_in_our_own_listener_is_admitted_before_the_stop() {
        let path = std::env::temp_dir().join(format!("core-test-{}.sock", std::process::id()));
        for is_watched_outside in [false, true] {
            let service = Service::from_systemd("core-test").listener(activation::bind(&path).unwrap());
            let opened = service.policy(Policy::<()>::owner_only(Uid::effective())).open().unwrap();
            let (core, _journal, _plan) = Core::open(opened).unwrap();
            #[cfg(feature = "tokio")]
            let _watched = is_watched_outside.then(|| core.watch_outside().unwrap());
            let _clients = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
            let mut admitted = Vec::new();
            core.stop_accepting(&mut admitted);
            assert_eq!(admitted.len(), 3, "{is_watched_outside}");
        }
    }
}
