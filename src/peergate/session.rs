//! A connection that the gate admitted, from its admission to its end: the peer, the rule in force, whether a reload has
//! revoked it.
//!
//! A [`Session`] is what the service's code asks about the peer that it talks to. Clones stand for the same connection, and
//! may outlive it. The service keeps every live session ([`Service`](crate::Service)): a reload judges them all.

mod link;
mod live;
mod notice;

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use crate::audit::{About, At, Audit, Event, Reason, Record};
use crate::ids::{Gid, Uid};
use crate::peer::Peer;
use crate::permits::Terms;
use crate::policy::Rule;

pub(crate) use link::{Link, Socket};
pub(crate) use live::Live;
pub(crate) use notice::{Notice, Place};

/// A live connection, as the gate knows it: the peer, the rule that admits it, its number. Cheap to clone.
pub struct Session<T>(Arc<Inner<T>>);

struct Inner<T> {
    uid: Uid,
    gid: Gid,
    pid: Option<i32>,
    /// For the next judgement.
    peer: Mutex<Peer>,
    rule: Mutex<Arc<Rule<T>>>,
    number: u64,
    listener: Arc<str>,
    began: Instant,
    revoked: Notice,
    /// Nothing more is read: the session is revoked, or the service stops.
    ended: Notice,
    audit: Audit,
}

impl<T> Session<T> {
    /// The effective user id of the process that connected.
    pub fn uid(&self) -> Uid {
        self.0.uid
    }

    /// Its effective group id.
    pub fn gid(&self) -> Gid {
        self.0.gid
    }

    /// Its process id as this pid namespace numbers it. Another process may have the number by now.
    pub fn pid(&self) -> Option<i32> {
        self.0.pid
    }

    /// The rule that admits the peer: by the policy in force, so another one after a reload.
    pub fn rule(&self) -> Arc<Rule<T>> {
        Arc::clone(&lock(&self.0.rule))
    }

    /// The terms of the rule in force. They stay the same for as long as the returned value is kept: do not keep it.
    pub fn terms(&self) -> TermsInForce<T> {
        TermsInForce(self.rule())
    }

    /// GATE_CONNECTION: unique in this run.
    pub fn connection(&self) -> u64 {
        self.0.number
    }

    /// The address of the listening socket.
    pub fn listener(&self) -> &Arc<str> {
        &self.0.listener
    }

    /// Whether a reload has revoked the connection: the policy in force denies the peer.
    pub fn is_revoked(&self) -> bool {
        self.0.revoked.is_given()
    }

    /// Waits until the connection is revoked, under any runtime. It never ends if the connection ends otherwise.
    ///
    /// Most services need not wait: a revoked connection reads as at its end.
    pub fn revoked(&self) -> Revoked<T> {
        Revoked { session: self.clone(), place: Place::new() }
    }

    /// Whether the terms in force allow what the peer asks for. If not, that is recorded as a denial by the rule: tell the
    /// peer that it is denied, once.
    ///
    /// ```
    /// # struct Access { may_update: bool }
    /// # fn answer(session: &peergate::Session<Access>) -> &'static str {
    /// if !session.require(|access| access.may_update) {
    ///     return "Unauthorized access\n";
    /// }
    /// # "updated\n"
    /// # }
    /// ```
    #[must_use]
    pub fn require(&self, allows: impl FnOnce(&T) -> bool) -> bool {
        let rule = self.rule();
        let is_allowed = allows(rule.terms());
        if !is_allowed {
            let record = || {
                let mut record = self.record(Event::Denied, Some(Reason::Policy), rule.name().as_str());
                record.text = Some(format!("{} does not allow what it asked for", rule.name()));
                record
            };
            self.0.audit.turned_away(Event::Denied, Reason::Policy, Some(self.uid()), record);
        }
        is_allowed
    }

    /// Ready once nothing more is read: the session is revoked, or the service stops.
    #[cfg(feature = "tokio")]
    pub(crate) fn poll_ended(&self, context: &mut Context<'_>) -> Poll<()> {
        self.0.ended.poll(Place::READER, context)
    }

    /// For a reader that [`poll_ended`](Self::poll_ended) will wake.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_ended(&self) -> bool {
        self.0.ended.is_given()
    }

    /// What cannot be asked again once the peer's process has ended.
    #[cfg(feature = "restart")]
    pub(crate) fn remembered(&self) -> crate::peer::Remembered {
        lock(&self.0.peer).remembered()
    }

    fn record(&self, event: Event, reason: Option<Reason>, rule: &str) -> Record {
        let at = At::from((&self.0.listener, self.0.number));
        record(event, reason, rule, at, &lock(&self.0.peer))
    }

    /// Records why the connection is revoked. False where it was revoked before.
    fn revoke(&self, reason: Reason, rule: &str, text: String) -> bool {
        if !self.0.revoked.give() {
            return false;
        }
        let mut record = self.record(Event::Revoked, Some(reason), rule);
        record.text = Some(text);
        self.0.audit.write(record);
        self.0.ended.give();
        true
    }
}

/// A record about a connection that lives.
pub(crate) fn record(event: Event, reason: Option<Reason>, rule: &str, at: At<'_>, peer: &Peer) -> Record {
    let mut record = Record::new(event);
    record.reason = reason;
    record.rule = Some(rule.into());
    record.socket = Some(Arc::clone(at.listener));
    record.connection = at.connection;
    record.about = Some(About::former(peer));
    record
}

impl<T> Clone for Session<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for Session<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { uid, gid, pid, number, listener, .. } = &*self.0;
        let mut shown = f.debug_struct("Session");
        shown.field("uid", uid).field("gid", gid).field("pid", pid).field("connection", number);
        shown.field("listener", listener).field("rule", self.rule().name()).field("is_revoked", &self.is_revoked());
        shown.finish_non_exhaustive()
    }
}

/// The terms of a session's rule, as they were when they were asked for.
pub struct TermsInForce<T>(Arc<Rule<T>>);

impl<T> Deref for TermsInForce<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.terms()
    }
}

impl<T: fmt::Debug> fmt::Debug for TermsInForce<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.terms().fmt(f)
    }
}

/// Ready when the session is revoked: [`Session::revoked`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Revoked<T> {
    session: Session<T>,
    place: Place,
}

impl<T> Future for Revoked<T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.session.0.revoked.poll(self.place, context)
    }
}

impl<T> Drop for Revoked<T> {
    fn drop(&mut self) {
        self.session.0.revoked.leave(self.place);
    }
}

impl<T> fmt::Debug for Revoked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Revoked").field(&self.session).finish()
    }
}

/// The data behind these locks is whole at every moment: a panic in another thread has changed nothing half-way.
fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For the terms that the gate hands out.
impl<T: Terms> Session<T> {
    fn new(admission: Opened<T>, audit: &Audit) -> Self {
        let Opened { peer, rule, number, listener } = admission;
        Self(Arc::new(Inner {
            uid: peer.uid(),
            gid: peer.gid(),
            pid: peer.pid(),
            peer: Mutex::new(peer),
            rule: Mutex::new(rule),
            number,
            listener,
            began: Instant::now(),
            revoked: Notice::default(),
            ended: Notice::default(),
            audit: audit.clone(),
        }))
    }
}

/// What a session is made of.
struct Opened<T> {
    peer: Peer,
    rule: Arc<Rule<T>>,
    number: u64,
    listener: Arc<str>,
}
