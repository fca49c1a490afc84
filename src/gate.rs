//! The door: accept, ask, admit or turn away politely. One thread of its own, so that a flood of
//! strangers costs those inside nothing.
//!
//! What happens behind the door is not known here: an [`Admission`] goes to a function that the service
//! gave, and the gate turns to the next in line. It never waits: not for a peer, not for the journal.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::os::unix::net::UnixStream;
//! use peergate::{Admission, Audit, Door, Policy, Rule, Setup, Uid, User, activation};
//!
//! let path = std::env::temp_dir().join(format!("door-{}.sock", std::process::id()));
//! let listener = activation::bind(&path)?;
//! let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
//! let setup = Setup::new(vec![listener], policy, Audit::default())?;
//! let mut door = Door::open(setup, |guest: Admission<()>| {
//!     let _ = writeln!(&guest.socket, "Come in, user {}", guest.peer.uid());
//! })?;
//!
//! let mut answer = String::new();
//! UnixStream::connect(&path)?.read_to_string(&mut answer)?;
//! assert_eq!(answer, format!("Come in, user {}\n", Uid::effective()));
//!
//! // Nobody any more, from the very next connection on.
//! door.set_policy(Policy::new([], Uid::effective())?);
//! answer.clear();
//! UnixStream::connect(&path)?.read_to_string(&mut answer)?;
//! assert_eq!(answer, "Unauthorized access\n");
//!
//! // With the listeners go the sockets that we bound ourselves.
//! drop(door.shut());
//! assert!(!path.exists());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod farewell;

use std::fmt;
use std::io;
use std::mem::take;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};

use self::farewell::{Farewell, Guest};
use crate::activation::Listener;
use crate::audit::{At, Audit, Record, Severity};
use crate::baggage::Stream;
use crate::ids::Uid;
use crate::limits::{Caps, Excess, Limits, Permit, Terms};
use crate::peer::Peer;
use crate::policy::{Policy, Rule, Verdict};
use crate::service::{Activity, Beat, Watched};
use crate::sys;

/// Connections accepted from one listener before anything else gets a turn.
const ACCEPTS_PER_TURN: usize = 64;
/// How long one over a limit may wait in case a place comes free: whoever closes a connection and
/// opens the next must not be refused because the first end has not been noticed yet.
const SECOND_LOOK: Duration = Duration::from_millis(20);
/// How often it is looked.
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);
/// How many may wait so at once. When all places are taken, whoever has most of them makes room.
const MOST_WAITING: usize = 64;
/// How long nothing is accepted after the system was out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(10);
/// Descriptors held in reserve: what it takes to accept somebody and to ask who they are (the socket, the handle on the
/// process, one file below /proc at a time), and once nobody is accepted any more, to leave connections to the next
/// process (their state, a pipe to hear that the manager has it, a socket to tell it by).
const RESERVE: usize = 4;
/// And what it takes to ask again who somebody is that is in already: the handle on the process, a file below /proc.
const RESERVE_INSIDE: usize = 2;
/// How often that is tried: others have descriptors for moments that are no connections.
const TRIES_INSIDE: usize = 100;
/// How long nothing is said again that was said already.
const SAID_FOR: Duration = Duration::from_secs(60);
/// How many different things are said in that time.
const MOST_COMPLAINTS: usize = 64;

const TOKEN_WAKE: u64 = u64::MAX;
/// Tokens below are listeners'.
const TOKEN_LEAVING: u64 = 1 << 32;

/// What is in force: replaced as a whole by [`Door::rule`], or only the policy by [`Door::set_policy`].
#[non_exhaustive]
pub struct Ruling<T> {
    /// Who may in.
    pub policy: Arc<Policy<T>>,
    /// How many.
    pub caps: Caps,
    /// Whether the kernel shall attach the sender's credentials to all data (SO_PASSCRED, unix(7)) on
    /// connections admitted from now on.
    pub pass_credentials: bool,
}

impl<T> Ruling<T> {
    /// This policy, the default [`Caps`], no credentials attached to data.
    pub fn new(policy: impl Into<Arc<Policy<T>>>) -> Self {
        Self { policy: policy.into(), caps: Caps::default(), pass_credentials: false }
    }
}

impl<T: fmt::Debug> fmt::Debug for Ruling<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, caps, pass_credentials } = self;
        let mut shown = f.debug_struct("Ruling");
        shown.field("policy", policy).field("caps", caps).field("pass_credentials", pass_credentials).finish()
    }
}

impl<T> Clone for Ruling<T> {
    fn clone(&self) -> Self {
        Self { policy: Arc::clone(&self.policy), caps: self.caps, pass_credentials: self.pass_credentials }
    }
}

/// What those hear who are turned away. May be empty.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Replies {
    /// Denied by the policy.
    pub denied: Arc<[u8]>,
    /// Admitted by the policy, but over a limit.
    pub busy: Arc<[u8]>,
}

impl Default for Replies {
    fn default() -> Self {
        Self { denied: Arc::from(&b"Unauthorized access\n"[..]), busy: Arc::from(&b"Too many connections\n"[..]) }
    }
}

/// Somebody who is in.
#[derive(Debug)]
#[non_exhaustive]
pub struct Admission<T> {
    /// The connection; non-blocking, close-on-exec. Reading from it and dropping it never wait, whatever the peer sent.
    pub socket: Stream,
    /// Who it is.
    pub peer: Peer,
    /// The rule that admitted them; its terms are the application's.
    pub rule: Arc<Rule<T>>,
    /// Keep it as long as the connection lives.
    pub permit: Permit,
    /// GATE_CONNECTION: unique in this run.
    pub connection: u64,
    /// The address of the listening socket.
    pub listener: Arc<str>,
    /// Which ruling admitted them: what [`Door::rule`] returned, 0 before the first.
    pub generation: u64,
    /// Whether the kernel attaches the sender's credentials to everything that comes after the first
    /// [`unattested`](Self::unattested) bytes.
    pub pass_credentials: bool,
    /// Within how many bytes, from the first on, some may lack credentials because they came before the kernel was asked
    /// to attach them. 0, unless the peer connected before the ruling that asked for them (Linux 6.16 and later).
    pub unattested: usize,
}

impl<T> Admission<T> {
    /// As a [`Door`] makes them, for what is to be tested without one: the first of this run, from nowhere. Change the
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

/// The application's side of the door, on the gate's thread: nothing here may block, nor call what waits for that thread
/// ([`Door::rule`], [`Door::set_policy`], [`Door::stop_accepting`], [`Door::shut`], [`Door::shut_if_quiet`]): it would
/// wait for itself. Where it panics, that is recorded, whom it was just given is gone, and the gate goes on.
pub trait Reception<T>: Send + 'static {
    /// Takes over whoever is let in.
    fn admit(&mut self, guest: Admission<T>);

    /// Asked whenever the gate would wait for somebody to come: whether to look again at once instead, because something
    /// is bound to happen soon. For a service that does some of its work here. The default never does.
    fn linger(&mut self) -> bool {
        false
    }

    /// Everybody is to be handed over for good now: another ruling is in force, or the gate is about to shut.
    fn settle(&mut self) {}
}

/// A function that takes admissions over, and nothing else.
struct Takes<F>(F);

impl<T, F: FnMut(Admission<T>) + Send + 'static> Reception<T> for Takes<F> {
    fn admit(&mut self, guest: Admission<T>) {
        self.0(guest);
    }
}

/// What a gate is made of.
#[derive(Debug)]
#[non_exhaustive]
pub struct Setup<T> {
    /// What to accept from.
    pub listeners: Vec<Listener>,
    /// What is in force at first.
    pub ruling: Ruling<T>,
    /// Who holds how many connections.
    pub limits: Limits,
    /// Where every verdict is recorded.
    pub audit: Audit,
    /// What those hear who are turned away.
    pub replies: Replies,
    /// Stirred whenever somebody was judged.
    pub activity: Arc<Activity>,
    /// The first connection's number.
    pub first_connection: u64,
}

impl<T> Setup<T> {
    /// A gate before `listeners` that rules by `policy` and records in `audit`; everything else as most services
    /// want it. Change the fields to have it otherwise.
    ///
    /// # Errors
    /// InvalidInput where there is no listener, so that nobody could ever come; what eventfd(2) says.
    pub fn new(listeners: Vec<Listener>, policy: impl Into<Arc<Policy<T>>>, audit: Audit) -> io::Result<Self> {
        if listeners.is_empty() {
            let message =
                "no listening socket: nothing was passed (systemd-socket-activate -l PATH PROGRAM passes one)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self { listeners, ..Self::without_listeners(policy, audit)? })
    }

    /// As [`new`](Self::new) where nobody is to come any more: for seeing off whom others have let in.
    ///
    /// # Errors
    /// What eventfd(2) says.
    pub fn without_listeners(policy: impl Into<Arc<Policy<T>>>, audit: Audit) -> io::Result<Self> {
        Ok(Self {
            listeners: Vec::new(),
            ruling: Ruling::new(policy),
            limits: Limits::new(),
            audit,
            replies: Replies::default(),
            activity: Arc::new(Activity::new()?),
            first_connection: 1,
        })
    }
}

/// What a running gate can be asked, from any thread. Dropped, it is [shut](Self::shut).
pub struct Door<T> {
    shared: Arc<Shared<T>>,
    thread: Option<thread::JoinHandle<Closed>>,
}

/// What is left when the gate is shut.
struct Closed {
    listeners: Vec<Listener>,
}

struct Shared<T> {
    orders: Mutex<Orders<T>>,
    generation: AtomicU64,
    next_connection: AtomicU64,
    wake: EventFd,
    beat: Arc<Beat>,
    replies: Replies,
    /// Held open for those who are in already. While this is locked nobody is accepted, who would have what was freed.
    reserve_inside: Mutex<Vec<OwnedFd>>,
}

struct Orders<T> {
    ruling: Ruling<T>,
    to_see_off: Vec<(Stream, Arc<[u8]>)>,
    /// Want to hear that the ruling is in force.
    ruled: Vec<mpsc::Sender<()>>,
    stops: Vec<Stop>,
    /// Nobody obeys any more: the gate's thread has ended.
    gone: bool,
}

impl<T> Orders<T> {
    /// Leaves an order to stop; to a gate that is gone, it is lost, and its answer's sender with it.
    fn stop(&mut self, stop: Stop) {
        if !self.gone {
            self.stops.push(stop);
        }
    }
}

/// Held by the gate's thread. Whoever waits for an answer of it hears that there will be none, however it ends.
struct Presence<T>(Arc<Shared<T>>);

impl<T> Drop for Presence<T> {
    fn drop(&mut self) {
        let mut orders = self.0.lock();
        orders.gone = true;
        orders.ruled.clear();
        orders.stops.clear();
    }
}

/// How to stop.
enum Stop {
    /// Accept nobody else, but go on seeing off; the answer says that it is so.
    Accepting(mpsc::Sender<bool>),
    /// Whatever the state; those on their way out are seen off first.
    Now,
    /// Only if nobody is connected, on their way out or waiting; the answer says whether.
    IfQuiet(mpsc::Sender<bool>),
}

impl<T: Terms> Door<T> {
    /// Starts the gate's thread. There `admit` takes over whoever is let in; it must not block, and is a
    /// [`Reception`] else: what is said there is said of it too.
    ///
    /// # Errors
    /// What epoll, eventfd or starting a thread say.
    pub fn open(setup: Setup<T>, admit: impl FnMut(Admission<T>) + Send + 'static) -> io::Result<Self> {
        Self::open_with(setup, Takes(admit))
    }

    /// As [`open`](Self::open), for a service that does some of its work on the gate's thread.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(setup: Setup<T>, reception: impl Reception<T>) -> io::Result<Self> {
        let mut gate = Gate::new(setup, Box::new(reception))?;
        gate.prepare()?;
        let shared = Arc::clone(&gate.shared);
        let presence = Presence(Arc::clone(&shared));
        let thread = thread::Builder::new().name("gate".to_owned()).spawn(move || {
            let _presence = presence;
            gate.run()
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Puts a new ruling in force for the very next connection, all of it: what [`Ruling::new`] does not set is as most
    /// services want it, not as it was. Returns its generation: an [`Admission`] of an earlier one was judged by an
    /// earlier ruling. When this returns, the last of those has been handed over.
    ///
    /// Called by the [`Reception`], it would wait for ever.
    pub fn rule(&self, ruling: Ruling<T>) -> u64 {
        self.change(|in_force| *in_force = ruling)
    }

    /// As [`rule`](Self::rule), but only the policy changes: how many may in stays as it was.
    pub fn set_policy(&self, policy: impl Into<Arc<Policy<T>>>) -> u64 {
        let policy = policy.into();
        self.change(|in_force| in_force.policy = policy)
    }

    fn change(&self, change: impl FnOnce(&mut Ruling<T>)) -> u64 {
        let (answer, answered) = mpsc::channel();
        let mut orders = self.shared.lock();
        change(&mut orders.ruling);
        // Under the lock, so that no admission can carry the new number and the old verdict.
        let generation = self.shared.generation.fetch_add(1, Ordering::AcqRel) + 1;
        if orders.gone {
            return generation;
        }
        orders.ruled.push(answer);
        drop(orders);
        self.shared.wake();
        // No answer means that the thread is gone, which hands nobody over.
        let _ = answered.recv();
        generation
    }

    /// A way to see peers off that can be handed to other threads.
    pub fn usher(&self) -> Usher<T> {
        Usher { shared: Arc::clone(&self.shared) }
    }

    /// For the watchdog.
    pub fn watched(&self) -> Watched {
        let shared = Arc::clone(&self.shared);
        Watched { name: "gate".to_owned(), beat: Arc::clone(&self.shared.beat), nudge: Box::new(move || shared.wake()) }
    }

    /// The number that the next connection will have.
    pub fn next_connection(&self) -> u64 {
        self.shared.next_connection.load(Ordering::Relaxed)
    }

    /// Shuts the gate if nobody is inside, on their way out, or being judged. Whoever connects later
    /// stays in the listener's queue for the next process. Called by the [`Reception`], it would wait for ever.
    pub fn shut_if_quiet(&mut self) -> bool {
        let (answer, answered) = mpsc::channel();
        self.shared.lock().stop(Stop::IfQuiet(answer));
        self.shared.wake();
        // No answer: the thread is gone, and with it everyone it cared for.
        let quiet = answered.recv().unwrap_or(true);
        if quiet {
            self.join();
        }
        quiet
    }

    /// Accepts nobody from now on: whoever connects stays in the listener's queue for the next process.
    /// Peers are still seen off, until [`shut`](Self::shut). Called by the [`Reception`], it would wait for ever.
    pub fn stop_accepting(&self) {
        let (answer, answered) = mpsc::channel();
        self.shared.lock().stop(Stop::Accepting(answer));
        self.shared.wake();
        // No answer means that the thread is gone, which accepts nobody either.
        let _ = answered.recv();
    }

    /// Stops accepting, sees off those on their way out (a second at most), and hands the listeners back; none, where it
    /// was shut before. Whoever was admitted stays. Called by the [`Reception`], it would wait for ever.
    pub fn shut(&mut self) -> Vec<Listener> {
        self.shared.lock().stop(Stop::Now);
        self.shared.wake();
        let listeners = self.join();
        self.shared.see_off_the_late();
        listeners
    }

    fn join(&mut self) -> Vec<Listener> {
        let closed = self.thread.take().and_then(|thread| thread.join().ok());
        closed.map(|closed| closed.listeners).unwrap_or_default()
    }
}

impl<T> Drop for Door<T> {
    /// As [`Door::shut`]; dropped by the [`Reception`], it cannot wait for its own thread, which ends a little later.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.lock().stop(Stop::Now);
        self.shared.wake();
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
            self.shared.see_off_the_late();
        }
    }
}

impl<T> fmt::Debug for Door<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_open = !self.shared.lock().gone;
        f.debug_struct("Door").field("is_open", &is_open).finish_non_exhaustive()
    }
}

/// Sees peers off on behalf of threads that serve them.
pub struct Usher<T> {
    shared: Arc<Shared<T>>,
}

impl<T> fmt::Debug for Usher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Usher").finish_non_exhaustive()
    }
}

impl<T> Clone for Usher<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Usher<T> {
    /// Sends `message` to an admitted peer, and a clean end of file after it.
    pub fn see_off(&self, socket: impl Into<Stream>, message: &Arc<[u8]>) {
        let socket = socket.into();
        self.shared.lock().to_see_off.push((socket, Arc::clone(message)));
        self.shared.wake();
    }

    /// The verdict of another policy on somebody who is in already, after [`learn`]ing what it depends on. Where no
    /// descriptor is left to ask with, there are some in reserve for this.
    pub fn judge_again<'p>(&self, peer: &mut Peer, socket: &impl AsFd, policy: &'p Policy<T>) -> Verdict<'p, T> {
        let mut decide = || {
            learn(peer, socket, policy);
            let verdict = policy.decide(&*peer);
            peer.release_process();
            peer.forget_groups();
            let is_lacking = matches!(verdict, Verdict::Denied(_)) && peer.lacked_descriptors();
            (verdict, is_lacking)
        };
        let (mut verdict, mut is_lacking) = decide();
        if is_lacking {
            let mut reserve = self.shared.reserve_inside.lock().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..TRIES_INSIDE {
                reserve.clear();
                (verdict, is_lacking) = decide();
                // Else the gate does it, or the next try.
                let _ = fill(&mut reserve, RESERVE_INSIDE);
                if !is_lacking {
                    break;
                }
                thread::yield_now();
            }
        }
        verdict
    }

    /// As [`see_off`](Self::see_off), with what the denied hear.
    pub fn revoke(&self, socket: impl Into<Stream>) {
        let denied = Arc::clone(&self.shared.replies.denied);
        self.see_off(socket, &denied);
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Orders<T>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // EAGAIN means it is awake 2^64 times over already.
        let _ = self.wake.write(1);
    }

    /// The next in line; `None` while descriptors are set free for other purposes.
    fn accept(&self, listener: &Listener) -> Option<io::Result<OwnedFd>> {
        let _held = match self.reserve_inside.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(held)) => held.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(sys::accept(listener.as_fd()))
    }

    /// Whoever was handed over when the gate's thread had looked for the last time.
    fn see_off_the_late(&self) {
        if !self.lock().to_see_off.is_empty() {
            if let Ok(epoll) = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC) {
                self.see_off_all(&epoll, &mut Farewell::new(TOKEN_LEAVING));
            }
        }
    }

    /// Goes on until nobody is on their way out or about to be.
    fn see_off_all(&self, epoll: &Epoll, farewell: &mut Farewell) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let late = take(&mut self.lock().to_see_off);
            late.into_iter().for_each(|(socket, message)| farewell.begin(epoll, known(socket), &message));
            let Some(due) = farewell.due() else { return };
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            let timeout = EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX);
            let count = epoll.wait(&mut events, timeout).unwrap_or(0);
            for event in &events[..count] {
                if event.data() != TOKEN_WAKE && event.data() >= TOKEN_LEAVING {
                    farewell.ready(epoll, event.data());
                }
            }
            farewell.expire(epoll, Instant::now());
        }
    }
}

/// One whom somebody else has served.
fn known(mut socket: Stream) -> Guest {
    socket.attach_credentials(false);
    Guest { socket, is_shared: true }
}

/// Asks the kernel for what `policy` depends on in this peer's case, and nothing else.
pub fn learn<T>(peer: &mut Peer, socket: &impl AsFd, policy: &Policy<T>) {
    let needs = policy.needs_of(peer.uid());
    if needs.groups {
        peer.learn_groups(socket);
    }
    if needs.units {
        peer.hold_process(socket);
    }
}

/// Opens descriptors until there are `size`, only to be closed when there are no others.
fn fill(reserve: &mut Vec<OwnedFd>, size: usize) -> io::Result<()> {
    while reserve.len() < size {
        reserve.push(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?.into());
    }
    Ok(())
}

/// Which of those waiting goes when one more of `uid` comes: the first of the user who has most, so that nobody's flood
/// takes another's second look from them. `None` where that user would not be left with as many as `uid`.
fn who_makes_room(waiting: &[Uid], uid: Uid) -> Option<usize> {
    let places_of = |uid: Uid| waiting.iter().filter(|one| **one == uid).count();
    // The first one waiting of the greatest: max_by_key would give the last.
    let (place, most) =
        waiting.iter().map(|one| places_of(*one)).enumerate().rev().max_by_key(|(_, places)| *places)?;
    (most > places_of(uid) + 1).then_some(place)
}

struct Gate<T> {
    shared: Arc<Shared<T>>,
    epoll: Epoll,
    listeners: Vec<Listener>,
    limits: Limits,
    audit: Audit,
    reception: Box<dyn Reception<T>>,
    activity: Arc<Activity>,
    farewell: Farewell,
    /// Those over a limit who get a second look.
    waiting: Vec<Arrival>,
    looked_again: Instant,
    /// Held open only to be closed when descriptors run out: one can then still be accepted, judged and told.
    reserve: Vec<OwnedFd>,
    paused_until: Option<Instant>,
    pass_credentials: Option<bool>,
    /// How many to accept before looking for anything else: grows while more wait, so that one who comes
    /// alone costs no second accept(2) in vain.
    allowance: usize,
    /// What was said of late, and when.
    complaints: Vec<(String, Instant)>,
    accepting: bool,
}

/// Somebody at the door.
struct Arrival {
    socket: Stream,
    /// Which listener they came to.
    listener: usize,
    /// GATE_CONNECTION, whatever becomes of them.
    number: u64,
    /// Who was found over a limit, and when for the first time.
    over_limit: Option<(Uid, Instant)>,
}

impl Arrival {
    fn leaves(mut self) -> Guest {
        self.socket.attach_credentials(false);
        Guest { socket: self.socket, is_shared: false }
    }
}

impl<T: Terms> Gate<T> {
    fn new(setup: Setup<T>, reception: Box<dyn Reception<T>>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared {
            orders: Mutex::new(Orders {
                ruling: setup.ruling,
                to_see_off: Vec::new(),
                ruled: Vec::new(),
                stops: Vec::new(),
                gone: false,
            }),
            generation: AtomicU64::new(0),
            next_connection: AtomicU64::new(setup.first_connection),
            wake,
            beat: Arc::new(Beat::default()),
            replies: setup.replies,
            reserve_inside: Mutex::new(Vec::new()),
        });
        Ok(Self {
            farewell: Farewell::new(TOKEN_LEAVING),
            shared,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listeners: setup.listeners,
            limits: setup.limits,
            audit: setup.audit,
            reception,
            activity: setup.activity,
            waiting: Vec::new(),
            looked_again: Instant::now(),
            reserve: Vec::new(),
            paused_until: None,
            pass_credentials: None,
            allowance: 1,
            complaints: Vec::new(),
            accepting: true,
        })
    }

    fn prepare(&mut self) -> io::Result<()> {
        self.epoll
            .add(self.shared.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_WAKE))?;
        let pass_credentials = self.shared.lock().ruling.pass_credentials;
        self.pass_credentials(pass_credentials)?;
        self.fill_reserve()?;
        for (token, listener) in self.listeners.iter().enumerate() {
            self.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
        }
        Ok(())
    }

    /// Set on the listener it is inherited by each connection, before its first byte can be sent to us.
    fn pass_credentials(&mut self, wanted: bool) -> io::Result<()> {
        // Untouched until somebody asks for it: the unit may have set PassCredentials= itself.
        if self.pass_credentials.unwrap_or(false) != wanted {
            for listener in &self.listeners {
                setsockopt(listener, sockopt::PassCred, &wanted)?;
            }
        }
        self.pass_credentials = Some(wanted);
        Ok(())
    }

    fn run(mut self) -> Closed {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            self.shared.beat.answer();
            let count = self.wait(&mut events);
            let mut woken = false;
            for event in &events[..count] {
                match event.data() {
                    TOKEN_WAKE => woken = true,
                    token if token >= TOKEN_LEAVING => self.farewell.ready(&self.epoll, token),
                    listener => self.accept_some(listener as usize),
                }
            }
            let now = Instant::now();
            self.look_again(now);
            self.farewell.expire(&self.epoll, now);
            self.resume_accepting(now);
            if woken && self.obey() {
                break;
            }
        }
        self.wind_down();
        Closed { listeners: self.listeners }
    }

    /// Waits for something to do.
    fn wait(&mut self, events: &mut [EpollEvent]) -> usize {
        let due = [
            self.farewell.due(),
            self.paused_until,
            self.waiting.first().and_then(|one| Some(one.over_limit?.1 + SECOND_LOOK)),
        ];
        let timeout = match due.into_iter().flatten().min() {
            _ if self.application(|reception| reception.linger()) == Some(true) => EpollTimeout::ZERO,
            None => EpollTimeout::NONE,
            // While somebody waits for a second look a place may come free at any time.
            Some(_) if !self.waiting.is_empty() => EpollTimeout::from(1_u8),
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        };
        // EINTR is as good as a timeout: the loop looks at its clock anyway.
        self.epoll.wait(events, timeout).unwrap_or(0)
    }

    /// Does what other threads asked for. True when it is time to go.
    fn obey(&mut self) -> bool {
        let (wanted, to_see_off, ruled, stops) = {
            let mut orders = self.shared.lock();
            let Orders { ruling, to_see_off, ruled, stops, gone: _ } = &mut *orders;
            (ruling.pass_credentials, take(to_see_off), take(ruled), take(stops))
        };
        for (socket, message) in to_see_off {
            self.farewell.begin(&self.epoll, known(socket), &message);
        }
        if let Err(error) = self.pass_credentials(wanted) {
            self.complain(&format!("setting SO_PASSCRED: {error}"));
        }
        if !ruled.is_empty() {
            self.application(|reception| reception.settle());
        }
        for ruled in ruled {
            let _ = ruled.send(());
        }
        let mut over = false;
        for stop in stops {
            match stop {
                Stop::Now => over = true,
                Stop::Accepting(answer) => {
                    self.stop_accepting();
                    let _ = answer.send(true);
                }
                Stop::IfQuiet(answer) => {
                    let quiet = self.limits.total() == 0 && self.farewell.is_empty() && self.waiting.is_empty();
                    // Whoever asked and did not wait for the answer wants nothing any more.
                    over |= answer.send(quiet).is_ok() && quiet;
                }
            }
        }
        over
    }

    fn accept_some(&mut self, index: usize) {
        let allowance = self.allowance;
        self.allowance = (2 * allowance).min(ACCEPTS_PER_TURN);
        for _ in 0..allowance {
            let Some(listener) = self.listeners.get(index).filter(|_| self.accepting) else { return };
            // Out of descriptors somebody inside is being asked about, with what would go to whoever is let in now.
            let Some(accepted) = self.shared.accept(listener) else { return self.pause() };
            match accepted {
                Ok(socket) => {
                    let arrival = self.arrival(socket, index);
                    self.judge(arrival, Instant::now());
                    self.activity.stir();
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EAGAIN) => {
                        self.allowance = 1;
                        return;
                    }
                    // It left before we came to it, or a signal: the next one.
                    Some(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO) => {}
                    Some(Errno::EMFILE | Errno::ENFILE) => {
                        if !self.accept_with_reserve(index) {
                            return self.pause();
                        }
                    }
                    // Out of memory for a socket, or something new: neither spin nor give up.
                    _ => {
                        self.complain(&format!("accepting from {}: {error}", listener.address()));
                        return self.pause();
                    }
                },
            }
        }
    }

    /// Out of descriptors: those on their way out go first; when there are none, the reserve makes room
    /// for one peer, who is judged, recorded and told, but cannot stay.
    fn accept_with_reserve(&mut self, index: usize) -> bool {
        if self.farewell.hurry_oldest(&self.epoll) {
            return true;
        }
        if !self.open_reserve() {
            return false;
        }
        let accepted = self.listeners.get(index).map(|listener| sys::accept(listener.as_fd()));
        let told = match accepted {
            Some(Ok(socket)) => {
                let arrival = self.arrival(socket, index);
                self.judge_without_room(arrival);
                true
            }
            _ => false,
        };
        let filled = self.fill_reserve();
        told && filled.is_ok()
    }

    /// Makes room for one peer. False where none was left.
    fn open_reserve(&mut self) -> bool {
        self.complain("out of file descriptors: connections are refused (LimitNOFILE=, fs.file-max)");
        let some = !self.reserve.is_empty();
        self.reserve.clear();
        some
    }

    /// As far as there are descriptors again.
    fn fill_reserve(&mut self) -> io::Result<()> {
        if !self.accepting {
            return Ok(());
        }
        fill(&mut self.reserve, RESERVE)?;
        // Where a worker is asking just now, it fills that itself.
        if let Ok(mut inside) = self.shared.reserve_inside.try_lock() {
            // Else the next time: the gate can do without.
            let _ = fill(&mut inside, RESERVE_INSIDE);
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.paused_until = Some(Instant::now() + PAUSE);
        self.listen_for(EpollFlags::empty());
    }

    fn resume_accepting(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            // Else at the next pause.
            let _ = self.fill_reserve();
            if self.accepting {
                self.listen_for(EpollFlags::EPOLLIN);
            }
        }
    }

    fn listen_for(&self, interest: EpollFlags) {
        for (token, listener) in self.listeners.iter().enumerate() {
            let _ = self.epoll.modify(listener, &mut EpollEvent::new(interest, token as u64));
        }
    }

    /// Gives the application its turn. `None` where it panics: that must not end the gate, for whoever connects would
    /// then wait in the listener's queue for ever.
    fn application<R>(&mut self, turn: impl FnOnce(&mut dyn Reception<T>) -> R) -> Option<R> {
        let fault = match panic::catch_unwind(AssertUnwindSafe(|| turn(&mut *self.reception))) {
            Ok(result) => return Some(result),
            Err(fault) => fault,
        };
        let said = fault.downcast_ref::<&str>().copied().or(fault.downcast_ref::<String>().map(String::as_str));
        self.say_once(Severity::Error, &format!("the application panicked: {}", said.unwrap_or("no message")));
        None
    }

    /// Says what should not be; the same thing once in a while.
    fn complain(&mut self, what: &str) {
        self.say_once(Severity::Warning, what);
    }

    fn say_once(&mut self, severity: Severity, what: &str) {
        let now = Instant::now();
        self.complaints.retain(|(_, said)| now.saturating_duration_since(*said) < SAID_FOR);
        // What the application says when it panics may be another thing each time.
        let is_new = self.complaints.iter().all(|(said, _)| said != what);
        if is_new && self.complaints.len() < MOST_COMPLAINTS {
            self.complaints.push((what.to_owned(), now));
            self.audit.write(Record::note(severity, what));
        }
    }

    fn arrival(&self, socket: OwnedFd, listener: usize) -> Arrival {
        let number = self.shared.next_connection.fetch_add(1, Ordering::Relaxed);
        let socket = Stream::new(socket, self.pass_credentials == Some(true));
        Arrival { socket, listener, number, over_limit: None }
    }

    /// Those over a limit, once more: a place may have come free since. Not at every turn: in a flood there are many, and
    /// each look asks as much of the kernel as a new arrival.
    fn look_again(&mut self, now: Instant) {
        if self.waiting.is_empty() || now.saturating_duration_since(self.looked_again) < BETWEEN_LOOKS {
            return;
        }
        self.looked_again = now;
        for arrival in take(&mut self.waiting) {
            self.judge(arrival, now);
        }
    }

    /// Whether one more of this user may wait for a second look. Who makes room for them has their own last look now.
    fn has_place_to_wait(&mut self, uid: Uid, now: Instant) -> bool {
        if self.waiting.len() < MOST_WAITING {
            return true;
        }
        let users: Vec<Uid> = self.waiting.iter().filter_map(|one| Some(one.over_limit?.0)).collect();
        let Some(place) = who_makes_room(&users, uid) else { return false };
        let arrival = self.waiting.remove(place);
        // Late enough for the last look.
        self.judge(arrival, now + SECOND_LOOK);
        true
    }

    /// Who is it, may they in, is there a place?
    fn judge(&mut self, mut arrival: Arrival, now: Instant) {
        let (ruling, generation) = self.ruling();
        let judged = match self.identify(&arrival, &ruling) {
            Some(peer) => {
                let verdict = ruling.policy.decide(&peer);
                // Not a denial, but a question that found no descriptor: asked again with those in reserve.
                if matches!(verdict, Verdict::Denied(_)) && peer.lacked_descriptors() && self.open_reserve() {
                    drop(peer);
                    self.judge_without_room(arrival);
                    let _ = self.fill_reserve();
                    return;
                }
                self.apply(verdict, &arrival, &ruling, peer)
            }
            None => Err(None),
        };
        let (rule, permit, peer) = match judged {
            Ok(admitted) => admitted,
            Err(None) => return self.farewell.begin(&self.epoll, arrival.leaves(), &self.shared.replies.denied),
            Err(Some((excess, rule, peer))) => {
                let (uid, since) = *arrival.over_limit.get_or_insert((peer.uid(), now));
                if now.saturating_duration_since(since) < SECOND_LOOK && self.has_place_to_wait(uid, now) {
                    return self.waiting.push(arrival);
                }
                self.record_refusal(excess, &rule, peer, &arrival);
                return self.farewell.begin(&self.epoll, arrival.leaves(), &self.shared.replies.busy);
            }
        };
        self.let_in(arrival, rule, permit, peer, generation);
    }

    fn let_in(&mut self, mut arrival: Arrival, rule: Arc<Rule<T>>, permit: Permit, mut peer: Peer, generation: u64) {
        self.audit.admitted(&mut peer, &arrival.socket, self.at(&arrival), rule.name());
        peer.release_process();
        peer.forget_groups();
        // From Linux 6.16 on the option is inherited at connect, not at accept: whoever connected before
        // the listener had it has yet to get it. What waits for accept carries credentials in any case; what
        // comes between accept and this does not.
        let pass_credentials = self.pass_credentials == Some(true);
        // The ruling may also be another one than when they came.
        let unattested = arrival.socket.attach_credentials(pass_credentials);
        let admission = Admission {
            socket: arrival.socket,
            peer,
            rule,
            permit,
            connection: arrival.number,
            listener: Arc::clone(self.listeners[arrival.listener].address()),
            generation,
            pass_credentials,
            unattested,
        };
        self.application(|reception| reception.admit(admission));
    }

    /// As [`judge`](Self::judge) where there is no descriptor for anyone to stay.
    fn judge_without_room(&mut self, arrival: Arrival) {
        let (ruling, _) = self.ruling();
        let judged = match self.identify(&arrival, &ruling) {
            Some(peer) => self.apply(ruling.policy.decide(&peer), &arrival, &ruling, peer),
            None => Err(None),
        };
        let reply = match judged {
            Err(None) => &self.shared.replies.denied,
            Ok((rule, _, peer)) => {
                self.record_refusal(Excess::Total, &rule, peer, &arrival);
                &self.shared.replies.busy
            }
            Err(Some((excess, rule, peer))) => {
                self.record_refusal(excess, &rule, peer, &arrival);
                &self.shared.replies.busy
            }
        };
        self.farewell.at_once(arrival.leaves(), reply);
    }

    fn ruling(&self) -> (Ruling<T>, u64) {
        let orders = self.shared.lock();
        (orders.ruling.clone(), self.shared.generation.load(Ordering::Acquire))
    }

    /// Asks the kernel; records the denial where it does not answer.
    fn identify(&self, arrival: &Arrival, ruling: &Ruling<T>) -> Option<Peer> {
        let socket = &arrival.socket;
        // Each fact costs a call: only those that the policy needs.
        let asked = Peer::ids_of(socket).map(|mut peer| {
            learn(&mut peer, socket, &ruling.policy);
            peer
        });
        if asked.is_err() {
            self.audit.unidentified(self.at(arrival));
        }
        asked.ok()
    }

    /// The policy's verdict, then the limits. `Err(None)`: denied, and recorded. `Err(Some)`: no place, not yet
    /// recorded.
    #[allow(clippy::type_complexity)]
    fn apply(
        &self,
        verdict: Verdict<'_, T>,
        arrival: &Arrival,
        ruling: &Ruling<T>,
        mut peer: Peer,
    ) -> Result<(Arc<Rule<T>>, Permit, Peer), Option<(Excess, Arc<Rule<T>>, Peer)>> {
        match verdict {
            Verdict::Denied(rule) => {
                let rule = rule.map(|rule| rule.name());
                self.audit.denied(&mut peer, &arrival.socket, self.at(arrival), rule);
                Err(None)
            }
            Verdict::Admitted(rule) => {
                let rule = Arc::clone(rule);
                match self.limits.acquire(peer.uid(), &ruling.caps, rule.terms()) {
                    Ok(permit) => Ok((rule, permit, peer)),
                    Err(excess) => Err(Some((excess, rule, peer))),
                }
            }
        }
    }

    fn record_refusal(&self, excess: Excess, rule: &Rule<T>, mut peer: Peer, arrival: &Arrival) {
        self.audit.refused(&mut peer, &arrival.socket, self.at(arrival), rule.name(), excess);
    }

    fn at<'a>(&'a self, arrival: &Arrival) -> At<'a> {
        At { listener: self.listeners[arrival.listener].address(), connection: Some(arrival.number) }
    }

    /// Nobody else is accepted; those waiting for a place get their answer.
    fn stop_accepting(&mut self) {
        self.accepting = false;
        self.listen_for(EpollFlags::empty());
        // What is left to do, as to hand connections over, needs descriptors too.
        self.reserve.clear();
        // Late enough for the last look.
        self.look_again(Instant::now() + SECOND_LOOK);
        self.application(|reception| reception.settle());
    }

    /// Sees off whoever is on their way out.
    fn wind_down(&mut self) {
        self.stop_accepting();
        self.shared.see_off_all(&self.epoll, &mut self.farewell);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::audit::{Event, Next};
    use crate::{Uid, activation};

    #[test]
    fn a_ruling_returns_when_the_last_admission_of_the_old_one_is_handed_over() {
        let path = std::env::temp_dir().join(format!("gate-test-ruling-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let setup = Setup::new(vec![listener], owner(), Audit::default()).unwrap();
        let (arrived, arrivals) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let mut door = Door::open(setup, move |admission| {
            let _ = arrived.send(admission.generation);
            let _ = may_go_on.recv();
        })
        .unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(arrivals.recv(), Ok(0));
        thread::scope(|scope| {
            let (done, is_done) = mpsc::channel();
            let door = &door;
            scope.spawn(move || done.send(door.rule(Ruling::new(owner()))));
            // However slow this machine is, it is not over before the other is.
            assert!(is_done.recv_timeout(Duration::from_millis(50)).is_err());
            go_on.send(()).unwrap();
            assert_eq!(is_done.recv(), Ok(1));
        });
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(arrivals.recv(), Ok(1));
        drop(go_on);
        door.shut();
    }

    /// Keeps everybody until they are to be handed over.
    struct Keeper {
        kept: Vec<Admission<()>>,
        handed_over: mpsc::Sender<u64>,
        lingers: u32,
    }

    impl Reception<()> for Keeper {
        fn admit(&mut self, guest: Admission<()>) {
            self.kept.push(guest);
        }

        fn linger(&mut self) -> bool {
            // Once per admission it is asked for again, with nothing else to wake the gate.
            self.lingers += 1;
            if self.lingers == 100 {
                let _ = self.handed_over.send(u64::MAX);
            }
            self.lingers < 100
        }

        fn settle(&mut self) {
            self.kept.drain(..).for_each(|guest| self.handed_over.send(guest.generation).unwrap());
        }
    }

    #[test]
    fn whom_the_reception_keeps_is_handed_over_before_a_ruling_or_a_stop_is_answered() {
        let path = std::env::temp_dir().join(format!("gate-test-keeper-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let setup = Setup::new(vec![listener], owner(), Audit::default()).unwrap();
        let limits = setup.limits.clone();
        let (handed_over, kept) = mpsc::channel();
        let mut door = Door::open_with(setup, Keeper { kept: Vec::new(), handed_over, lingers: 0 }).unwrap();
        assert_eq!(kept.recv(), Ok(u64::MAX), "it is asked again as long as it lingers");
        let come = |total| {
            let client = UnixStream::connect(&path).unwrap();
            while limits.total() < total {
                thread::yield_now();
            }
            client
        };
        let _first = come(1);
        assert!(kept.try_recv().is_err());
        door.rule(Ruling::new(owner()));
        assert_eq!(kept.try_recv(), Ok(0));
        let _second = come(1);
        door.stop_accepting();
        assert_eq!(kept.try_recv(), Ok(1));
        door.shut();
    }

    /// A door with one client, handed over and in the hands of `admit`.
    fn door_with_one(name: &str, mut admit: impl FnMut() + Send + 'static) -> (Door<()>, UnixStream) {
        let path = std::env::temp_dir().join(format!("gate-test-{name}-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let setup = Setup::new(vec![listener], Policy::owner_only(Uid::effective()), Audit::default()).unwrap();
        let (arrived, arrival) = mpsc::channel();
        let door = Door::open(setup, move |_| {
            let _ = arrived.send(());
            admit();
        });
        let client = UnixStream::connect(&path).unwrap();
        arrival.recv().unwrap();
        (door.unwrap(), client)
    }

    fn waiting_for_answers(door: &Door<()>) -> usize {
        let orders = door.shared.lock();
        orders.ruled.len() + orders.stops.len()
    }

    fn owner() -> Policy<()> {
        Policy::owner_only(Uid::effective())
    }

    /// What waits for an answer of the gate's thread.
    const ASK: [fn(&mut Door<()>); 3] = [
        |door| assert!(door.rule(Ruling::new(owner())) > 0),
        |door| door.stop_accepting(),
        |door| assert!(door.shut_if_quiet(), "nobody is cared for any more"),
    ];

    /// Asked before the application panics and after.
    #[test]
    fn whoever_asks_a_gate_in_which_the_application_panics_is_answered() {
        for (number, ask) in ASK.into_iter().enumerate() {
            for before in [true, false] {
                let (panic, may_panic) = mpsc::channel::<()>();
                let (mut door, mut client) = door_with_one(&format!("panic-{number}-{before}"), move || {
                    let _ = may_panic.recv();
                    panic!("the application's fault");
                });
                let asked = Door { shared: Arc::clone(&door.shared), thread: None };
                let (answered, answer) = mpsc::channel();
                let asking = move || {
                    ask(&mut door);
                    answered.send(())
                };
                if before {
                    thread::spawn(asking);
                    while waiting_for_answers(&asked) == 0 {
                        thread::yield_now();
                    }
                    drop(panic);
                } else {
                    drop(panic);
                    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the connection goes with the panic");
                    thread::spawn(asking);
                }
                assert_eq!(answer.recv_timeout(Duration::from_secs(60)), Ok(()), "{number}, asked before: {before}");
            }
        }
    }

    #[test]
    fn whoever_asks_a_gate_that_is_shut_is_answered() {
        for ask in ASK {
            let (mut door, _client) = door_with_one("asked-late", || ());
            assert_eq!(door.shut().len(), 1);
            ask(&mut door);
            assert_eq!(door.shut().len(), 0);
        }
    }

    #[test]
    fn an_application_that_panics_is_on_record_and_the_next_guest_is_let_in() {
        let path = std::env::temp_dir().join(format!("gate-test-goes-on-{}.sock", std::process::id()));
        let audit = Audit::default();
        let setup = Setup::new(vec![activation::bind(&path).unwrap()], owner(), audit.clone()).unwrap();
        let mut door = Door::open(setup, |mut guest| {
            assert!(guest.connection > 2, "guest {} is one too many", guest.connection);
            guest.socket.write_all(b"welcome").unwrap();
        })
        .unwrap();
        for expected in ["", "", "welcome", "welcome"] {
            let mut answer = String::new();
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, expected);
        }
        door.shut();
        for guest in [1, 2] {
            let Next::Write(record) = audit.next() else { panic!("no record of guest {guest}") };
            assert_eq!(record.event, Event::Note(Severity::Error));
            let text = format!("the application panicked: guest {guest} is one too many");
            assert_eq!(record.message(None), text);
        }
    }

    #[test]
    fn a_door_that_is_dropped_is_shut_also_by_the_application_itself() {
        let path = std::env::temp_dir().join(format!("gate-test-dropped-{}.sock", std::process::id()));
        let open = |admit: Box<dyn FnMut() + Send>| {
            let setup = Setup::new(vec![activation::bind(&path).unwrap()], owner(), Audit::default()).unwrap();
            let mut admit = admit;
            Door::open(setup, move |_| admit()).unwrap()
        };
        drop(open(Box::new(|| ())));
        assert!(!path.exists(), "the listener went with the door");

        let (give, given) = mpsc::channel::<Door<()>>();
        give.send(open(Box::new(move || drop(given.recv())))).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        while path.exists() {
            thread::yield_now();
        }
    }

    #[test]
    fn another_policy_leaves_the_rest_of_the_ruling_as_it_was() {
        let path = std::env::temp_dir().join(format!("gate-test-policy-{}.sock", std::process::id()));
        let mut setup = Setup::new(vec![activation::bind(&path).unwrap()], owner(), Audit::default()).unwrap();
        setup.ruling.caps = Caps::new(7, 0);
        setup.ruling.pass_credentials = true;
        let door = Door::open(setup, |_| ()).unwrap();
        let everybody = Policy::new([Rule::allow("all", ()).users([crate::User::Any])], Uid::effective()).unwrap();
        assert_eq!(door.set_policy(everybody), 1);
        let ruling = door.shared.lock().ruling.clone();
        assert_eq!(ruling.policy.rules().next().unwrap().name().as_str(), "allow.all");
        assert_eq!((ruling.caps, ruling.pass_credentials), (Caps::new(7, 0), true));
        let mut answer = String::new();
        UnixStream::connect(&path).unwrap().read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "Too many connections\n", "the caps are still in force");
    }

    #[test]
    fn each_of_several_who_ask_at_once_is_answered_only_when_it_is_so() {
        let ask: [fn(&Door<()>); 2] =
            [|door| assert!(door.rule(Ruling::new(owner())) > 0), |door| door.stop_accepting()];
        for (number, ask) in ask.into_iter().enumerate() {
            let (go_on, may_go_on) = mpsc::channel::<()>();
            let (mut door, _client) = door_with_one(&format!("several-{number}"), move || {
                let _ = may_go_on.recv();
            });
            let (answered, answers) = mpsc::channel();
            thread::scope(|scope| {
                for asked in 1..=3 {
                    let (answered, door) = (answered.clone(), &door);
                    scope.spawn(move || {
                        ask(door);
                        answered.send(())
                    });
                    while waiting_for_answers(door) < asked {
                        assert!(answers.try_recv().is_err(), "an answer while the old order of things goes on");
                        thread::yield_now();
                    }
                }
                // However slow this machine is, it is not so before.
                assert!(answers.recv_timeout(Duration::from_millis(50)).is_err());
                drop(go_on);
                (0..3).for_each(|_| answers.recv_timeout(Duration::from_secs(60)).unwrap());
            });
            door.shut();
        }
    }

    /// A user's flood over their own limit, and others who only closed one connection and opened the next.
    #[test]
    fn nobody_loses_their_second_look_to_another_users_flood() {
        let (a, b) = (Uid::new(1000), Uid::new(1001));
        let mut waiting = vec![a; MOST_WAITING];
        assert_eq!(who_makes_room(&waiting, a), None, "not to themselves");
        // However many they are, each who comes finds a place, and those who have one keep it.
        for other in (2000..2000 + MOST_WAITING as u32 - 1).map(Uid::new) {
            let place = who_makes_room(&waiting, other).unwrap();
            assert_eq!(waiting.remove(place), a);
            waiting.push(other);
            let again = who_makes_room(&waiting, a);
            assert_eq!(again, None, "the flood goes on");
        }
        assert_eq!(who_makes_room(&waiting, b), None, "one place each is all there is");
        // The one who has waited longest has had the most of their look.
        assert_eq!(who_makes_room(&[b, a, a, b, a], b), None);
        assert_eq!(who_makes_room(&[b, a, a, a], b), Some(1));
    }

    /// The same at the door. Nobody comes or goes but in the test's own order, on the test's thread.
    #[test]
    fn one_over_a_limit_waits_although_others_have_taken_all_places() {
        let path = std::env::temp_dir().join(format!("gate-test-waiting-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let policy = Policy::<()>::owner_only(Uid::effective());
        let mut setup = Setup::new(vec![listener], policy, Audit::default()).unwrap();
        setup.ruling.caps.connections_per_user = 0;
        let mut gate = Gate::new(setup, Box::new(Takes(|_| {}))).unwrap();
        let now = Instant::now();
        let mut clients = Vec::new();
        // The kernel says it is always us: that some are another's is only noted.
        let mut arrive = |gate: &mut Gate<()>, uid| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            clients.push(theirs);
            let arrival = Arrival { over_limit: Some((uid, now)), ..gate.arrival(ours.into(), 0) };
            gate.judge(arrival, now);
            gate.waiting.iter().filter(|one| one.over_limit == Some((uid, now))).count()
        };
        let (a, b) = (Uid::new(1000), Uid::new(1001));
        (1..=MOST_WAITING).for_each(|count| assert_eq!(arrive(&mut gate, a), count));
        assert_eq!(arrive(&mut gate, b), 1);
        assert_eq!(arrive(&mut gate, a), MOST_WAITING - 1);
        let refused: Vec<usize> =
            (0..clients.len()).filter(|index| (&clients[*index]).read(&mut [0; 99]).is_ok()).collect();
        assert_eq!(refused, [0, MOST_WAITING + 1], "who has waited longest, and the last");
    }

    /// One whom a worker lets go of between the gate's last look and its own end.
    #[test]
    fn whoever_is_handed_over_after_the_gate_shut_still_gets_the_message_and_a_clean_end() {
        let path = std::env::temp_dir().join(format!("gate-test-{}.sock", std::process::id()));
        let listener = activation::bind(&path).unwrap();
        let policy = Policy::<()>::new([], Uid::effective()).unwrap();
        let setup = Setup::new(vec![listener], policy, Audit::default()).unwrap();
        let mut door = Door::open(setup, |_| {}).unwrap();
        assert!(door.shut_if_quiet());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        theirs.write_all(b"unread").unwrap();
        door.usher().revoke(OwnedFd::from(ours));
        let reading = thread::spawn(move || {
            let mut answer = String::new();
            theirs.read_to_string(&mut answer).map(|_| answer)
        });
        door.shut();
        assert_eq!(reading.join().unwrap().unwrap(), "Unauthorized access\n");
    }
}
