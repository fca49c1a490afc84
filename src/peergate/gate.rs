//! The gate: accepts connections, asks the kernel about each peer, decides by the policy, keeps the limits, turns away with a
//! message, and hands out what it admits.
//!
//! A [`Gate`] is a value, not a thread. It owns one epoll; [`Gate::turn`] does what is due and returns. A service with a
//! loop of its own waits for the gate's descriptor ([`AsFd`]) or lets `turn` wait. A simple service
//! uses a [`Door`], which is a thread around a gate.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::os::unix::net::UnixStream;
//! use peergate::gate::{Gate, Setup};
//! use peergate::{Audit, Policy, Rule, Uid, User, activation};
//!
//! let path = std::env::temp_dir().join(format!("gate-{}.sock", std::process::id()));
//! let listener = activation::bind(&path)?;
//! let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
//! let mut gate = Gate::new(Setup::new(vec![listener], policy, Audit::default())?)?;
//!
//! let mut client = UnixStream::connect(&path)?;
//! let mut admitted = Vec::new();
//! gate.turn(None, &mut admitted);
//! for mut admission in admitted.drain(..) {
//!     writeln!(admission.socket, "Come in, user {}", admission.peer.uid())?;
//! }
//! let mut answer = String::new();
//! client.read_to_string(&mut answer)?;
//! assert_eq!(answer, format!("Come in, user {}\n", Uid::effective()));
//!
//! // The next connection meets another policy.
//! gate.set_policy(Policy::new([], Uid::effective())?);
//! let mut client = UnixStream::connect(&path)?;
//! gate.turn(None, &mut admitted);
//! assert!(admitted.is_empty());
//! answer.clear();
//! client.read_to_string(&mut answer)?;
//! assert_eq!(answer, "Unauthorized access\n");
//!
//! // With the listeners go the sockets that we bound ourselves.
//! drop(gate.finish());
//! assert!(!path.exists());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod accept;
mod arrivals;
mod closing;
mod config;
mod decision;
mod door;
#[cfg(feature = "tokio")]
mod outside;
mod over_limit;
mod own;
mod replies;
mod reserve;
mod thread;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{setsockopt, sockopt};

use self::accept::Refusal;
use self::arrivals::Arrivals;
use self::closing::{Closings, Outgoing};
use self::decision::{Decision, TurnedAway, ask};
use self::over_limit::{OverLimit, Waiting};
use self::reserve::Reserve;
use crate::audit::{At, Audit, Record, Severity};
use crate::clock::{later, poll_timeout};
use crate::deferred_close;
use crate::fd_passing::{self, Stream};
use crate::peer::Peer;
use crate::permits::{Permit, Permits, Terms};
use crate::policy::{Policy, Rule, Verdict};
use crate::systemd::activation::Listener;

pub use self::closing::Closer;
pub use self::config::{GateConfig, Replies, Setup};
pub use self::decision::{Denial, Judge};
pub use self::door::Door;
#[cfg(feature = "tokio")]
pub(crate) use self::outside::Ready;
pub use self::thread::{Driver, GateThread};

/// Admissions handed out by one turn: each holds a place in the limits, and waits until the caller has served the others.
const ADMISSIONS_PER_TURN: usize = 16;
/// How long the same complaint is not recorded again.
const BETWEEN_COMPLAINTS: Duration = Duration::from_secs(60);
/// How many different complaints are recorded in that time.
const MOST_COMPLAINTS: usize = 64;

const TOKEN_WAKE: u64 = u64::MAX;
/// Tokens below are listeners'.
const TOKEN_CLOSING: u64 = 1 << 32;

/// A connection that the gate admitted.
#[derive(Debug)]
#[non_exhaustive]
pub struct Admission<T> {
    /// The connection; non-blocking, close-on-exec. Reading from it and dropping it never wait, whatever the peer sent.
    pub socket: Stream,
    /// The peer, as the kernel told of it.
    pub peer: Peer,
    /// The rule that admitted it; its terms are the application's.
    pub rule: Arc<Rule<T>>,
    /// Keep it as long as the connection lives.
    pub permit: Permit,
    /// GATE_CONNECTION: unique in this run.
    pub connection: u64,
    /// The address of the listening socket.
    pub listener: Arc<str>,
    /// Which configuration admitted it: what [`Gate::set_config`] returned, 0 before the first.
    pub generation: u64,
    /// Whether the kernel attaches the sender's credentials to everything that comes after the first
    /// [`unattested`](Self::unattested) bytes.
    pub pass_credentials: bool,
    /// Within how many bytes, from the first on, some may lack credentials because they came before the kernel was asked
    /// to attach them. 0, unless the peer connected before the configuration that asked for them (Linux 6.16 and later).
    pub unattested: usize,
}

impl<T> Admission<T> {
    /// As a [`Gate`] makes them, for tests without one: the first connection of this run, from no listener. Change the
    /// fields to have it otherwise.
    pub fn new(socket: Stream, peer: Peer, rule: Arc<Rule<T>>, permit: Permit) -> Self {
        Self {
            socket,
            peer,
            rule,
            permit,
            connection: 1,
            listener: Arc::from("unnamed"),
            generation: 0,
            pass_credentials: false,
            unattested: 0,
        }
    }
}

/// A connection that was accepted and not yet judged.
struct Arrival {
    socket: Stream,
    /// Its ids, until it is judged for the first time.
    peer: Option<Peer>,
    /// Which listener it came to.
    listener: usize,
    /// GATE_CONNECTION, whatever is decided.
    number: u64,
    /// Within how many bytes some may lack credentials; `None` where the kernel was not asked for them.
    unattested: Option<usize>,
}

/// Listeners, policy, limits and the connections being closed: one value that is polled.
pub struct Gate<T> {
    config: GateConfig<T>,
    generation: u64,
    epoll: Epoll,
    listeners: Vec<Listener>,
    /// For each listener.
    refusal: Vec<Refusal>,
    permits: Permits,
    audit: Audit,
    closer: Closer,
    closings: Closings,
    arrivals: Arrivals<Arrival>,
    over_limit: OverLimit,
    reserve: Arc<Reserve>,
    next_connection: u64,
    paused_until: Option<Instant>,
    /// Whether the listeners have SO_PASSCRED by our doing.
    pass_credentials: bool,
    /// Whether the listeners let descriptors through by our doing.
    take_descriptors: bool,
    /// Whether the kernel's queue may hold a connection besides the one that an epoll event tells of.
    more_may_come: bool,
    /// Whether a runtime watches the listeners, in place of the epoll.
    is_watched_outside: bool,
    /// What was recorded of late, and when.
    complaints: Vec<(String, Instant)>,
    accepting: bool,
}

impl<T: Terms> Gate<T> {
    /// A gate that accepts as soon as it is polled. Starts no thread.
    ///
    /// # Errors
    /// What epoll(7), eventfd(2) or setsockopt(2) say.
    pub fn new(setup: Setup<T>) -> io::Result<Self> {
        let mut gate = Self {
            closer: Closer::new(Arc::clone(&setup.config.replies.denied))?,
            config: setup.config,
            generation: 0,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            refusal: setup.listeners.iter().map(Refusal::of).collect(),
            listeners: setup.listeners,
            permits: setup.permits,
            audit: setup.audit,
            closings: Closings::new(TOKEN_CLOSING),
            arrivals: Arrivals::new(accept::most_waiting()),
            over_limit: OverLimit::new(),
            reserve: Arc::new(Reserve::new()?),
            next_connection: setup.first_connection,
            paused_until: None,
            pass_credentials: false,
            take_descriptors: false,
            more_may_come: false,
            is_watched_outside: false,
            complaints: Vec::new(),
            accepting: true,
        };
        gate.apply_pass_credentials()?;
        gate.audit.count_by_owner(&gate.config.policy);
        let wake = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_WAKE);
        gate.epoll.add(gate.closer.event(), wake)?;
        for (token, listener) in gate.listeners.iter().enumerate() {
            gate.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
        }
        Ok(gate)
    }

    /// Closes connections in order for other threads, and wakes the thread that waits in [`turn`](Self::turn).
    pub fn closer(&self) -> Closer {
        self.closer.clone()
    }

    /// Judges peers by other policies, with the gate's reserved descriptors where there are no others.
    pub fn judge(&self) -> Judge {
        Judge::new(Arc::clone(&self.reserve))
    }

    /// Puts a configuration in force, from the very next connection on. Returns its generation: an [`Admission`] of an
    /// earlier one was judged by an earlier policy.
    pub fn set_config(&mut self, config: GateConfig<T>) -> u64 {
        self.closer.set_denied(&config.replies.denied);
        self.audit.count_by_owner(&config.policy);
        self.config = config;
        if let Err(error) = self.apply_pass_credentials() {
            self.record_once(Severity::Warning, &format!("setting SO_PASSCRED: {error}"));
        }
        self.generation += 1;
        self.generation
    }

    /// As [`set_config`](Self::set_config), but only the policy changes.
    pub fn set_policy(&mut self, policy: impl Into<Arc<Policy<T>>>) -> u64 {
        self.set_config(GateConfig { policy: policy.into(), ..self.config.clone() })
    }

    /// What is in force.
    pub fn config(&self) -> &GateConfig<T> {
        &self.config
    }

    /// The number that the next connection will have.
    pub fn next_connection(&self) -> u64 {
        self.next_connection
    }

    /// When [`turn`](Self::turn) is to be called next, whether or not the gate's descriptor is readable. `None`: no
    /// earlier than that.
    pub fn deadline(&self) -> Option<Instant> {
        if !self.arrivals.is_empty() {
            return Some(Instant::now());
        }
        [self.closings.due(), self.paused_until, self.over_limit.due()].into_iter().flatten().min()
    }

    /// Waits until there is something to do, `timeout` at most (`None`: without end), does it, and appends what was
    /// admitted to `admitted`. Says whether any connection was judged.
    pub fn turn(&mut self, timeout: Option<Duration>, admitted: &mut Vec<Admission<T>>) -> bool {
        let first = self.next_connection;
        self.take_events(timeout, admitted);
        self.do_what_is_due(admitted) || self.next_connection != first
    }

    /// Waits for events in the epoll and deals with them. Whether there may be more.
    fn take_events(&mut self, timeout: Option<Duration>, admitted: &mut Vec<Admission<T>>) -> bool {
        let mut events = [EpollEvent::empty(); 64];
        let count = self.wait(timeout, &mut events);
        for event in &events[..count] {
            match event.data() {
                TOKEN_WAKE => {
                    for (socket, message) in self.closer.take_waiting() {
                        self.closings.begin(&self.epoll, Outgoing::served(socket), &message);
                    }
                }
                token if token >= TOKEN_CLOSING => self.closings.ready(&self.epoll, token),
                listener => _ = self.accept_from(listener as usize, admitted),
            }
        }
        count == events.len()
    }

    /// Judges connections that wait and ends what has run out of time. Says whether any connection was judged in its turn.
    fn do_what_is_due(&mut self, admitted: &mut Vec<Admission<T>>) -> bool {
        let any_in_turn = self.judge_in_turn(admitted);
        let now = Instant::now();
        for one in self.over_limit.take_due(now) {
            self.judge_arrival(one.arrival, Some((one.since, now)), admitted);
        }
        self.closings.expire(&self.epoll, now);
        self.resume_accepting(now);
        any_in_turn
    }

    fn wait(&self, timeout: Option<Duration>, events: &mut [EpollEvent]) -> usize {
        let until = timeout.map(|timeout| later(Instant::now(), timeout));
        let due = self.deadline().into_iter().chain(until).min();
        // EINTR is as good as a timeout: the caller polls again.
        self.epoll.wait(events, poll_timeout(due)).unwrap_or(0)
    }

    /// Accepts no more connections: a client that connects from now on stays in the listener's queue, for the next process.
    /// Connections that wait for their turn or for a place are admitted or turned away now. Closing goes on in [`turn`](Self::turn).
    pub fn stop_accepting(&mut self, admitted: &mut Vec<Admission<T>>) {
        self.accepting = false;
        self.set_interest(EpollFlags::empty());
        // What follows, such as leaving connections to the next process, needs descriptors too.
        self.reserve.hold().give_up();
        while let Some(arrival) = self.arrivals.next() {
            self.judge_arrival(arrival, None, admitted);
        }
        let now = Instant::now();
        for one in self.over_limit.take_all() {
            // So late that it does not wait again.
            self.judge_arrival(one.arrival, Some((one.since, now + over_limit::PATIENCE)), admitted);
        }
    }

    /// Whether no connection is admitted, waits or is being closed.
    pub fn is_quiet(&self) -> bool {
        let waits = !self.arrivals.is_empty() || !self.over_limit.is_empty();
        !waits && self.permits.total() == 0 && self.closings.is_empty() && self.closer.is_idle()
    }

    /// Ends the gate: stops accepting, closes in order what is being closed (two seconds at most), and hands the listeners
    /// back. Admitted connections live on.
    pub fn finish(mut self) -> Vec<Listener> {
        let mut admitted = Vec::new();
        self.stop_accepting(&mut admitted);
        let closer = self.closer.clone();
        // A place may have come free for one that waited; but no caller is left to serve it.
        let nothing = Arc::from(&b""[..]);
        for admission in admitted {
            self.closings.begin(&self.epoll, Outgoing::accepted(admission.socket), &nothing);
        }
        let mut late = Some(closer.orphan());
        self.closings.finish_all(&self.epoll, || late.take().unwrap_or_default());
        deferred_close::wait_for_all(closing::PATIENCE);
        self.listeners
    }

    /// SO_PASSCRED on a listener is inherited by each connection, before its first byte can be sent.
    fn apply_pass_credentials(&mut self) -> io::Result<()> {
        let wanted = self.config.pass_credentials;
        // Untouched until it is asked for: the unit may have set PassCredentials= itself.
        if self.pass_credentials != wanted {
            for listener in &self.listeners {
                setsockopt(listener, sockopt::PassCred, &wanted)?;
            }
        }
        self.pass_credentials = wanted;
        let take = self.config.take_descriptors;
        if self.take_descriptors != take {
            self.listeners.iter().for_each(|listener| fd_passing::set_on_listener(listener, take));
            self.refusal = self.listeners.iter().map(Refusal::of).collect();
        }
        self.take_descriptors = take;
        Ok(())
    }

    /// Judges a connection, and admits it, lets it wait for a place or turns it away. `waited`: since when it has been
    /// waiting for a place, and the time now.
    fn judge_arrival(
        &mut self,
        mut arrival: Arrival,
        waited: Option<(Instant, Instant)>,
        admitted: &mut Vec<Admission<T>>,
    ) {
        match self.decide(&mut arrival, Some(&self.judge())) {
            Decision::Admitted { peer, rule, permit } => self.admit(arrival, peer, rule, permit, admitted),
            Decision::TurnedAway(TurnedAway::OverLimit { peer, rule, exceeded }) => {
                let (since, now) = waited.unwrap_or_else(|| (Instant::now(), Instant::now()));
                let waiting = Waiting { arrival, uid: self.config.policy.owner_of(peer.uid()), since };
                if !self.accepting || !waiting.may_go_on_waiting(now) {
                    return self.turn_away(waiting.arrival, TurnedAway::OverLimit { peer, rule, exceeded });
                }
                drop(peer);
                if let Some(one) = self.over_limit.push(waiting) {
                    // It made room, and is judged for the last time.
                    self.judge_arrival(one.arrival, Some((one.since, one.since + over_limit::PATIENCE)), admitted);
                }
            }
            Decision::TurnedAway(why) => self.turn_away(arrival, why),
        }
    }

    /// Asks the kernel, decides by the policy and takes a place. Without a `judge`, reserved descriptors are free already.
    fn decide(&self, arrival: &mut Arrival, judge: Option<&Judge>) -> Decision<T> {
        let socket = &arrival.socket;
        let known = arrival.peer.take();
        let Ok(mut peer) = known.map_or_else(|| Peer::ids_of(socket), Ok) else {
            return Decision::TurnedAway(TurnedAway::Unidentified);
        };
        let policy = &self.config.policy;
        let verdict = match judge {
            Some(judge) => judge.judge(&mut peer, socket, policy),
            None => ask(&mut peer, socket, policy),
        };
        match verdict {
            Verdict::Denied(rule) => Decision::TurnedAway(TurnedAway::Denied { rule: rule.map(Arc::clone), peer }),
            Verdict::Admitted(rule) => {
                let rule = Arc::clone(rule);
                match self.permits.acquire(policy.owner_of(peer.uid()), &self.config.limits, rule.terms()) {
                    Ok(permit) => Decision::Admitted { peer, rule, permit },
                    Err(exceeded) => Decision::TurnedAway(TurnedAway::OverLimit { peer, rule, exceeded }),
                }
            }
        }
    }

    fn admit(
        &mut self,
        mut arrival: Arrival,
        mut peer: Peer,
        rule: Arc<Rule<T>>,
        permit: Permit,
        admitted: &mut Vec<Admission<T>>,
    ) {
        self.audit.admitted(&mut peer, &arrival.socket, self.at(&arrival), rule.name());
        peer.close_pidfd();
        peer.forget_groups();
        let pass_credentials = self.pass_credentials;
        let unattested = match arrival.unattested {
            Some(unattested) if pass_credentials => unattested,
            // The configuration is another one than when the peer connected: nothing that it sent by now is excused.
            _ => {
                let _ = arrival.socket.attach_credentials(pass_credentials);
                0
            }
        };
        admitted.push(Admission {
            socket: arrival.socket,
            peer,
            rule,
            permit,
            connection: arrival.number,
            listener: Arc::clone(self.listeners[arrival.listener].address()),
            generation: self.generation,
            pass_credentials,
            unattested,
        });
    }

    /// Records that a connection does not stay, tells its peer and closes it.
    fn turn_away(&mut self, arrival: Arrival, why: TurnedAway<T>) {
        let reply = self.record_turned_away(&arrival, why);
        self.closings.begin(&self.epoll, Outgoing::accepted(arrival.socket), &reply);
    }

    /// As [`turn_away`](Self::turn_away), without waiting for the peer: where there is no descriptor to spare.
    fn turn_away_at_once(&mut self, arrival: Arrival, why: TurnedAway<T>) {
        let reply = self.record_turned_away(&arrival, why);
        self.closings.at_once(Outgoing::accepted(arrival.socket), &reply);
    }

    /// What the peer is to be told.
    fn record_turned_away(&self, arrival: &Arrival, why: TurnedAway<T>) -> Arc<[u8]> {
        let (at, replies) = (self.at(arrival), &self.config.replies);
        let reply = match why {
            TurnedAway::Unidentified => {
                self.audit.unidentified(at);
                &replies.denied
            }
            TurnedAway::Denied { mut peer, rule } => {
                self.audit.denied(&mut peer, &arrival.socket, at, rule.as_deref().map(Rule::name));
                &replies.denied
            }
            TurnedAway::OverLimit { mut peer, rule, exceeded } => {
                self.audit.refused(&mut peer, &arrival.socket, at, rule.name(), exceeded);
                &replies.busy
            }
        };
        Arc::clone(reply)
    }

    fn at<'a>(&'a self, arrival: &Arrival) -> At<'a> {
        At { listener: self.listeners[arrival.listener].address(), connection: Some(arrival.number) }
    }

    /// Records what should not be; the same thing once in a while.
    fn record_once(&mut self, severity: Severity, text: &str) {
        let now = Instant::now();
        self.complaints.retain(|(_, at)| now.saturating_duration_since(*at) < BETWEEN_COMPLAINTS);
        let is_new = self.complaints.iter().all(|(known, _)| known != text);
        // An application that panics may give another message each time.
        if is_new && self.complaints.len() < MOST_COMPLAINTS {
            self.complaints.push((text.to_owned(), now));
            self.audit.write(Record::note(severity, text));
        }
    }
}

/// Readable when [`Gate::turn`] has something to do.
impl<T> AsFd for Gate<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl<T> fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::over_limit::MOST_WAITING;
    use super::*;
    use crate::policy::{Accounts, SubordinateRange};
    use crate::{Limits, Uid, activation, sys};

    fn gate(name: &str, limits: Limits) -> (Gate<()>, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("gate-test-{name}-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let mut setup = Setup::new(vec![listener], Policy::owner_only(Uid::effective()), Audit::default()).unwrap();
        setup.config.limits = limits;
        (Gate::new(setup).unwrap(), path)
    }

    /// A flood over one user's limit. No connection comes or goes but in the test's own order, on the test's thread.
    #[test]
    fn a_connection_over_a_limit_waits_although_another_user_has_taken_all_places() {
        let (mut gate, _) = gate("waiting", Limits::new(1024, 0));
        let now = Instant::now();
        let mut clients = Vec::new();
        // The kernel says that each is ours: that some are another user's is only noted.
        let mut arrive = |gate: &mut Gate<()>, uid| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            clients.push(theirs);
            let arrival = gate.arrival(ours.into(), 0);
            let removed = gate.over_limit.push(Waiting { arrival, uid, since: now });
            removed.into_iter().for_each(|one| {
                gate.judge_arrival(one.arrival, Some((one.since, now + over_limit::PATIENCE)), &mut Vec::new());
            });
        };
        let (a, b) = (Uid::new(1000), Uid::new(1001));
        (0..MOST_WAITING).for_each(|_| arrive(&mut gate, a));
        arrive(&mut gate, b);
        arrive(&mut gate, a);
        let refused: Vec<usize> =
            (0..clients.len()).filter(|index| (&clients[*index]).read(&mut [0; 99]).is_ok()).collect();
        assert_eq!(refused, [0, MOST_WAITING + 1], "the one that has waited longest, and the last");
    }

    #[test]
    fn a_place_that_comes_free_admits_a_waiting_connection() {
        let (mut gate, path) = gate("place", Limits::new(1, 1));
        let mut admitted = Vec::new();
        let _first = UnixStream::connect(&path).unwrap();
        assert!(gate.turn(None, &mut admitted));
        let _second = UnixStream::connect(&path).unwrap();
        assert!(gate.turn(Some(Duration::ZERO), &mut admitted));
        assert_eq!(admitted.len(), 1);
        assert!(gate.deadline().is_some() && !gate.over_limit.is_empty());
        admitted.clear();
        gate.stop_accepting(&mut admitted);
        assert_eq!(admitted.len(), 1);
    }

    #[test]
    fn a_connection_under_a_subordinate_id_waits_for_a_place_as_its_owner() {
        let (mut gate, path) = gate("owner", Limits::new(1, 1));
        let (owner, me) = (Uid::new(64_021), Uid::effective());
        let accounts = Accounts::new([SubordinateRange::new(owner, me.raw(), me.raw())], [], []);
        gate.config.policy = Arc::new(gate.config.policy.with_accounts(accounts).unwrap());
        let _clients = [UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap()];
        let mut admitted = Vec::new();
        while gate.over_limit.is_empty() {
            gate.turn(Some(Duration::ZERO), &mut admitted);
        }
        let waiting: Vec<Uid> = gate.over_limit.take_all().iter().map(|one| one.uid).collect();
        assert_eq!((admitted.len(), waiting), (1, vec![owner]));
    }

    #[test]
    fn what_is_sent_while_a_connection_waits_for_a_place_is_attested() {
        let (mut gate, _) = gate("attested", Limits::default());
        for (asked_before, unattested) in [(true, 6), (false, 0)] {
            // Connected before the listener had the option, as a pair is.
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(b"before").unwrap();
            gate.pass_credentials = asked_before;
            let arrival = gate.arrival(ours.into(), 0);
            theirs.write_all(b", while it waits").unwrap();
            gate.pass_credentials = true;
            let mut admitted = Vec::new();
            gate.judge_arrival(arrival, None, &mut admitted);
            assert_eq!(admitted[0].unattested, unattested, "asked before: {asked_before}");
        }
    }

    #[test]
    fn a_turn_without_events_returns_at_once_where_it_may_not_wait() {
        let (mut gate, _) = gate("idle", Limits::default());
        assert_eq!(gate.deadline(), None);
        assert!(!gate.turn(Some(Duration::ZERO), &mut Vec::new()));
        assert!(gate.is_quiet());
        let closer = gate.closer();
        closer.wake();
        assert!(!gate.turn(None, &mut Vec::new()), "the wake-up ends the wait");
    }

    /// Lets connections wait, each as if it were of this user. The kernel says that all are ours.
    fn wait(gate: &mut Gate<()>, uid: u32, count: usize) -> Vec<UnixStream> {
        let mut wait = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let arrival = gate.arrival(ours.into(), 0);
            assert!(gate.arrivals.push(Uid::new(uid), arrival, 1000).is_none());
            theirs
        };
        (0..count).map(|_| wait()).collect()
    }

    fn numbers(admitted: &[Admission<()>]) -> Vec<u64> {
        admitted.iter().map(|admission| admission.connection).collect()
    }

    #[test]
    fn a_turn_judges_one_connection_of_each_user_before_a_second_of_any() {
        let (mut gate, _) = gate("turns", Limits::default());
        let _clients = [wait(&mut gate, 1000, 200), wait(&mut gate, 1001, 2), wait(&mut gate, 1002, 1)];
        let mut admitted = Vec::new();
        assert!(gate.deadline().is_some_and(|due| due <= Instant::now()), "a turn is due without an event");
        assert!(gate.turn(None, &mut admitted));
        assert_eq!(numbers(&admitted)[..6], [1, 201, 203, 2, 202, 3]);
        assert_eq!(admitted.len(), ADMISSIONS_PER_TURN);
        assert!(!gate.is_quiet());
    }

    /// The option of each connection is asked for until the queue has been empty, and then no longer.
    #[test]
    fn a_connection_made_before_its_listener_refused_descriptors_is_known() {
        let path = std::env::temp_dir().join(format!("gate-test-refusal-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let can_refuse = sys::set_option(listener.as_fd(), sys::SO_PASSRIGHTS, 1).is_ok();
        let _earlier = UnixStream::connect(&path).unwrap();
        let _ = sys::set_option(listener.as_fd(), sys::SO_PASSRIGHTS, 0);
        let setup = Setup::<()>::new(vec![listener], Policy::owner_only(Uid::effective()), Audit::default()).unwrap();
        let mut gate = Gate::new(setup).unwrap();
        let (mut admitted, mut clients) = (Vec::new(), Vec::new());
        for count in 1..=4 {
            while admitted.len() < count {
                gate.turn(Some(Duration::ZERO), &mut admitted);
            }
            clients.push(UnixStream::connect(&path).unwrap());
        }
        let may_bring: Vec<_> = admitted.iter().map(|admission| admission.socket.may_linger()).collect();
        assert_eq!(may_bring, [true, !can_refuse, !can_refuse, !can_refuse]);
        assert_eq!(can_refuse, matches!(gate.refusal[..], [Refusal::OfAll]));
    }

    #[test]
    fn connections_that_wait_are_judged_by_the_policy_in_force_at_their_turn() {
        let (mut gate, _) = gate("reload", Limits::new(1024, 1024));
        let clients = wait(&mut gate, 1000, 20);
        let mut admitted = Vec::new();
        gate.turn(None, &mut admitted);
        gate.set_policy(Policy::new([], Uid::effective()).unwrap());
        gate.stop_accepting(&mut admitted);
        assert_eq!(numbers(&admitted), (1..=16).collect::<Vec<_>>());
        for mut client in clients.into_iter().skip(16) {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "Unauthorized access\n");
        }
    }

    #[test]
    fn a_stop_judges_every_connection_that_waits() {
        let (mut gate, _) = gate("stop", Limits::new(1024, 50));
        let clients = wait(&mut gate, 1000, 60);
        let mut admitted = Vec::new();
        gate.stop_accepting(&mut admitted);
        assert_eq!(numbers(&admitted), (1..=50).collect::<Vec<_>>());
        for mut client in clients.into_iter().skip(50) {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "Too many connections\n");
        }
        assert!(gate.arrivals.is_empty() && gate.over_limit.is_empty());
    }

    #[test]
    fn beyond_its_users_bound_a_connection_is_turned_away_and_then_those_that_wait_get_their_turn() {
        let mut limits = Limits::new(1024, 1024);
        limits.waiting_per_user = 4;
        let (mut gate, path) = gate("bound", limits);
        let mut clients: Vec<_> = (0..101).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut admitted = Vec::new();
        // The first connection comes alone: the gate does not know that there are more.
        gate.turn(None, &mut admitted);
        assert_eq!(numbers(&admitted), [1]);
        for turn in 0..20 {
            admitted.clear();
            gate.turn(None, &mut admitted);
            let first = 2 + turn * 5;
            assert_eq!(numbers(&admitted), (first..first + 4).collect::<Vec<_>>());
        }
        let refused = clients.iter_mut().skip(5).step_by(5).map(|client| {
            let mut answer = String::new();
            client.read_to_string(&mut answer).map(|_| answer)
        });
        assert_eq!(refused.map(Result::unwrap).collect::<Vec<_>>(), ["Too many connections\n"; 20]);
        admitted.clear();
        assert_eq!(gate.permits.total(), 0, "one that was turned away keeps no place");
    }

    #[test]
    fn one_turn_hands_out_a_bounded_number_and_leaves_the_rest_in_the_queue() {
        let (mut gate, path) = gate("bounded", Limits::new(1000, 1000));
        let clients: Vec<_> = (0..3 * ADMISSIONS_PER_TURN).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut admitted = Vec::new();
        let mut total = 0;
        while total < clients.len() {
            gate.turn(Some(Duration::from_secs(60)), &mut admitted);
            assert!(admitted.len() <= ADMISSIONS_PER_TURN);
            total += admitted.drain(..).count();
        }
    }
}
