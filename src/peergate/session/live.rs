//! The live connections of a service. A reload judges them all again.
//!
//! A connection that was admitted by the old policy may be registered when the new one is in force already. Each admission
//! tells the generation of the policy that admitted it, and the list knows the newest one. Both are compared under the lock
//! under which a connection is entered: one that is entered before a reload is judged by the reload, and one that is entered
//! after it, with an earlier generation, is judged then.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Link, Opened, Session, Socket, lock};
use crate::audit::{Audit, Reason};
use crate::fd_passing::Stream;
use crate::gate::{Admission, Closer, Judge};
use crate::permits::Terms;
use crate::policy::Policy;

/// How long a revoked connection may take for an answer that is under way.
const GRACE: Duration = Duration::from_secs(5);

/// The live connections, by their numbers.
pub(crate) struct Live<T: Terms> {
    list: Mutex<List<T>>,
    /// The service stops, and leaves its connections to the next process: readable from then on.
    leaving: EventFd,
    is_leaving: AtomicBool,
    /// The service stops: what has come is read, then comes the end.
    is_ending: AtomicBool,
    audit: Audit,
    pub(crate) judge: Judge,
    closer: Closer,
    nothing: Arc<[u8]>,
}

struct List<T: Terms> {
    links: HashMap<u64, Weak<Link<T>>>,
    /// The newest policy and its generation; `None` before the first reload.
    policy: Option<(Arc<Policy<T>>, u64)>,
    /// Revoked connections, and when they are cut off.
    condemned: Vec<(Instant, Weak<Link<T>>)>,
}

impl<T: Terms> Live<T> {
    pub(crate) fn new(audit: &Audit, judge: Judge, closer: Closer) -> io::Result<Self> {
        Ok(Self {
            list: Mutex::new(List { links: HashMap::new(), policy: None, condemned: Vec::new() }),
            leaving: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            is_leaving: AtomicBool::new(false),
            is_ending: AtomicBool::new(false),
            audit: audit.clone(),
            judge,
            closer,
            nothing: Arc::from(&b""[..]),
        })
    }

    /// Enters a connection that the gate admitted. `None` where a reload has put a policy in force meanwhile that denies it:
    /// it is revoked. `socket` makes of the descriptor what its reader waits for.
    ///
    /// # Errors
    /// What `socket` says; the connection is closed then.
    pub(crate) fn enter(
        self: &Arc<Self>,
        admission: Admission<T>,
        is_shared: bool,
        socket: impl FnOnce(OwnedFd) -> io::Result<Socket>,
    ) -> io::Result<Option<Arc<Link<T>>>> {
        let Admission { socket: stream, peer, rule, permit, connection: number, listener, generation, .. } = admission;
        let session = Session::new(Opened { peer, rule, number, listener }, &self.audit);
        let (fd, guard) = stream.into_parts();
        let link = Arc::new(Link::new((socket(fd)?, guard), session, permit, self, is_shared));
        let newer = {
            let mut list = lock(&self.list);
            list.links.insert(number, Arc::downgrade(&link));
            list.policy.as_ref().filter(|(_, newest)| *newest > generation).map(|(policy, _)| Arc::clone(policy))
        };
        if newer.is_some_and(|policy| !self.judge(&link, &policy)) {
            return Ok(None);
        }
        // Either `end_all` has found the connection in the list, or its flag is seen here.
        if self.is_ending() {
            link.end_reading();
        }
        Ok(Some(link))
    }

    /// Judges every connection by a policy that is in force from this generation on. Returns how many it revoked.
    pub(crate) fn put_in_force(&self, policy: &Arc<Policy<T>>, generation: u64) -> usize {
        let links: Vec<_> = {
            let mut list = lock(&self.list);
            list.policy = Some((Arc::clone(policy), generation));
            list.links.values().cloned().collect()
        };
        // Without the lock: the last holder of a link takes it to close the connection.
        links.iter().filter_map(Weak::upgrade).filter(|link| !self.judge(link, policy)).count()
    }

    /// Whether the policy admits the peer. If not, the connection is revoked.
    fn judge(&self, link: &Arc<Link<T>>, policy: &Policy<T>) -> bool {
        let session = link.session();
        let judged = self.judge.judge_again(&mut lock(&session.0.peer), link.socket(), policy);
        match judged {
            Ok(rule) => {
                *lock(&session.0.rule) = rule;
                true
            }
            Err(denial) => {
                if session.revoke(Reason::Policy, denial.rule(), denial.to_string()) {
                    link.end_reading();
                    lock(&self.list).condemned.push((Instant::now() + GRACE, Arc::downgrade(link)));
                }
                false
            }
        }
    }

    /// Cuts off revoked connections that have not ended in time. Returns when the next one is due.
    pub(crate) fn cut_condemned(&self, now: Instant) -> Option<Instant> {
        let (due, next) = {
            let mut list = lock(&self.list);
            let (due, later) =
                std::mem::take(&mut list.condemned).into_iter().partition::<Vec<_>, _>(|(at, _)| *at <= now);
            list.condemned = later;
            (due, list.condemned.iter().map(|(at, _)| *at).min())
        };
        due.iter().filter_map(|(_, link)| link.upgrade()).for_each(|link| link.cut());
        next
    }

    /// From now on a connection reads what has come, and then its end.
    pub(crate) fn end_all(&self) {
        self.is_ending.store(true, Ordering::Release);
        self.for_each(|link| link.end_reading());
    }

    /// Ends both directions of every connection.
    pub(crate) fn cut_all(&self) {
        self.for_each(|link| link.cut());
    }

    fn for_each(&self, what: impl Fn(&Link<T>)) {
        let links: Vec<_> = lock(&self.list).links.values().cloned().collect();
        links.iter().filter_map(Weak::upgrade).for_each(|link| what(&link));
    }

    /// From now on each reader is told to leave its connection to the next process.
    #[cfg(any(feature = "restart", feature = "tokio"))]
    pub(crate) fn leave_all(&self) {
        self.is_leaving.store(true, Ordering::Release);
        let _ = self.leaving.write(1);
        self.for_each(|link| link.wake_reader());
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Acquire)
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Acquire)
    }

    /// Readable once connections are left.
    pub(crate) fn leaving(&self) -> BorrowedFd<'_> {
        self.leaving.as_fd()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.list).links.is_empty()
    }

    pub(super) fn forget(&self, number: u64) {
        lock(&self.list).links.remove(&number);
    }

    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Closes a connection when the peer has read what it was sent.
    pub(super) fn close_later(&self, stream: Stream) {
        self.closer.close_with(stream, &self.nothing);
    }
}

impl<T: Terms> fmt::Debug for Live<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Live({} connections)", lock(&self.list).links.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::audit::{Event, Next};
    use crate::gate::{Gate, Setup};
    use crate::ids::Uid;
    use crate::peer::Peer;
    use crate::permits::Permits;
    use crate::policy::Rule;

    fn admission(generation: u64, permits: &Permits) -> (Admission<()>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let peer = Peer::credentials_of(&ours).unwrap();
        let permit = permits.resume(peer.uid());
        let rule = Arc::new(Rule::allow("before", ()));
        let mut admission = Admission::new(Stream::accepted(ours), peer, rule, permit);
        admission.generation = generation;
        (admission, theirs)
    }

    /// A reload is over, and then comes a connection that the policy before admitted.
    #[test]
    fn a_connection_that_comes_too_late_for_a_reload_is_judged_by_it() {
        let (audit, permits, me) = (Audit::default(), Permits::new(), Uid::effective());
        let nothing = Policy::new([], me).unwrap();
        let mut gate = Gate::new(Setup::without_listeners(Policy::<()>::owner_only(me), audit.clone())).unwrap();
        let live = Arc::new(Live::new(&audit, gate.judge(), gate.closer()).unwrap());
        let enter = |admission| live.enter(admission, false, |fd| Ok(Socket::Plain(fd))).unwrap();

        let (early, mut its_peer) = admission(0, &permits);
        let early = enter(early).unwrap();
        assert_eq!(live.put_in_force(&Arc::new(Policy::owner_only(me)), 1), 0);
        assert_eq!(early.session().rule().name().as_str(), "allow.owner", "the rule is the new policy's");
        let reload = gate.set_policy(nothing);
        assert_eq!(live.put_in_force(&gate.config().policy.clone(), reload + 1), 1);
        drop(early);

        let (late, mut late_peer) = admission(reload, &permits);
        assert!(enter(late).is_none());
        // The gate closes in order what the list has revoked.
        gate.turn(Some(Duration::ZERO), &mut Vec::new());
        for peer in [&mut its_peer, &mut late_peer] {
            let mut answer = String::new();
            peer.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "Unauthorized access\n");
            let Next::Write(record) = audit.next() else { panic!("no record") };
            assert_eq!((record.event, record.rule.as_deref()), (Event::Revoked, Some("default")));
        }
        assert_eq!(permits.total(), 0);

        let (newer, _its_peer) = admission(reload + 1, &permits);
        assert!(enter(newer).is_some(), "the newest policy has judged it already");
        assert!(live.is_empty());
    }

    #[test]
    fn a_connection_that_comes_too_late_for_a_stop_reads_what_came_and_its_end() {
        let (audit, permits, me) = (Audit::default(), Permits::new(), Uid::effective());
        let gate = Gate::new(Setup::without_listeners(Policy::<()>::owner_only(me), audit.clone())).unwrap();
        let live = Arc::new(Live::new(&audit, gate.judge(), gate.closer()).unwrap());
        live.end_all();
        let (late, mut its_peer) = admission(0, &permits);
        its_peer.write_all(b"hi").unwrap();
        let late = live.enter(late, false, |fd| Ok(Socket::Plain(fd))).unwrap().unwrap();
        let mut buffer = [0; 8];
        assert_eq!((late.read_now(&mut buffer).unwrap(), &buffer[..2]), (2, &b"hi"[..]));
        assert_eq!(late.read_now(&mut buffer).unwrap(), 0);
    }
}
