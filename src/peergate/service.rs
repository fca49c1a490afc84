//! The service manager's side of a service: readiness, status, watchdog, signals, the descriptor store. Also what memory
//! goes back to the system ([`return_memory`]).
//!
//! Sole user of sd-notify. Where there is no service manager nobody is told anything, which is no error; the [`Store`]
//! alone has no room then, and says so. Signals, signs of life and [`request_reload`] do not depend on one.
//! The protocols are sd_notify(3)'s and systemd.service(5)'s; they work alike on systemd 252 and later.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

use crate::clock::later;
use crate::outlet::Outlet;
use crate::sys;

/// Marks a signal whose sender waits for an answer ([`request_reload`]), and the answer.
const ANSWER_WANTED: i32 = 0x6563_686f;
/// The signal of one who waits for an answer. Not SIGHUP: of several that arrive before the first is read, the kernel
/// keeps one, and nobody would answer the others. Real-time signals queue (signal(7)).
fn asking() -> i32 {
    libc::SIGRTMIN() + 1
}

/// The answers: taken, refused.
const TAKEN: Signal = Signal::SIGUSR1;
const REFUSED: Signal = Signal::SIGUSR2;

/// How long after SIGTERM the service manager's SIGCONT may take: it sends both in a row, but may lose the processor in
/// between.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(1);

/// Tells the service manager how we are. Where NOTIFY_SOCKET is unset, or its owner gone, nothing
/// happens: a service must not fail because nobody listens to its status. No call waits for a manager that does not
/// read: the status and the sign of life are dropped then, everything else is sent as soon as it reads again.
#[derive(Clone, Debug)]
pub struct Notifier {
    outlet: Option<Outlet>,
}

impl Notifier {
    /// Reads the environment once.
    pub fn from_env() -> Self {
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        Self { outlet: address.and_then(|address| Outlet::to(&address)) }
    }

    /// Whether somebody asked to be told.
    pub fn is_present(&self) -> bool {
        self.outlet.is_some()
    }

    /// `READY=1`: we accept.
    pub fn ready(&self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
    }

    /// `RELOADING=1` and the clock, in one datagram, as Type=notify-reload wants it too.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(_) => self.send(&[NotifyState::Reloading]),
        }
    }

    /// `STOPPING=1`.
    pub fn stopping(&self, status: &str) {
        self.send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
    }

    /// `STATUS=`, one line. Whether the manager took it: where it does not read at the moment, it is not told later.
    pub fn status(&self, status: &str) -> bool {
        self.try_send(&[NotifyState::Status(&one_line(status))])
    }

    /// `EXTEND_TIMEOUT_USEC=`: what we are doing needs this much longer.
    pub fn extend_timeout(&self, by: Duration) {
        self.send(&[NotifyState::ExtendTimeoutUsec(u32::try_from(by.as_micros()).unwrap_or(u32::MAX))]);
    }

    fn watchdog(&self) {
        self.try_send(&[NotifyState::Watchdog]);
    }

    fn send(&self, state: &[NotifyState<'_>]) {
        let (Some(outlet), Some(first)) = (&self.outlet, state.first()) else { return };
        let kind = first.to_string().split('=').next().unwrap_or_default().to_owned();
        outlet.send(kind, message(state));
    }

    fn try_send(&self, state: &[NotifyState<'_>]) -> bool {
        self.outlet.as_ref().is_some_and(|outlet| outlet.try_send(&message(state)))
    }
}

/// The text of a datagram: a field on each line.
fn message(state: &[NotifyState<'_>]) -> String {
    state.iter().map(|field| format!("{field}\n")).collect()
}

/// A newline would begin a field of its own.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

/// The service manager's store for descriptors that are to outlive this process (FDSTORE=1 in
/// sd_notify(3), FileDescriptorStoreMax= in systemd.service(5)).
#[derive(Clone, Debug)]
pub struct Store {
    capacity: usize,
    /// The manager has no store, or has said that it takes nothing.
    is_closed: bool,
    /// The manager has said how much it takes.
    says_capacity: bool,
    outlet: Option<Outlet>,
}

/// How long a manager that does not read may keep a message of the store waiting.
const TAKEN_WITHIN: Duration = Duration::from_secs(20);

/// How many milliseconds the manager may take to close what it has decided to close. It holds up every restart.
const CLOSED_WITHIN: u8 = 20;

/// What sendmsg(2) takes at once: SCM_MAX_FD is 253.
const MOST_AT_ONCE: usize = 250;

impl Store {
    /// How many descriptors the store takes: `$FDSTORE` (systemd 254), else the variable named by
    /// `fallback`, for older systemds. Zero where there is neither or no service manager.
    pub fn from_env(fallback: &str) -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        // No service manager with a store has its socket in the abstract namespace.
        let is_abstract =
            std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| path.as_encoded_bytes().starts_with(b"@"));
        let outlet = Notifier::from_env().outlet;
        let present = outlet.is_some() && !is_abstract;
        let capacity = number("FDSTORE").or_else(|| number(fallback)).filter(|_| present).unwrap_or(0);
        let said = number("FDSTORE");
        Self { capacity, is_closed: is_abstract || said == Some(0), says_capacity: said.is_some(), outlet }
    }

    /// Whether there is a service manager that may keep something.
    pub fn is_present(&self) -> bool {
        self.outlet.is_some() && !self.is_closed
    }

    /// How many descriptors it takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Puts `fds` into the store under one name. Returns before the manager has them: see [`settle`](Self::settle).
    ///
    /// # Errors
    /// NotConnected where there is no store; TimedOut where the manager does not read for 20 seconds; what sending says.
    /// Some of them may have been stored by then.
    pub fn put(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let message = message(&[NotifyState::FdStore, NotifyState::FdName(name)]);
        let outlet = self.outlet()?;
        fds.chunks(MOST_AT_ONCE).try_for_each(|batch| outlet.send_with(&message, batch, TAKEN_WITHIN))
    }

    /// Puts one descriptor into the store under `name`, and waits until the manager has dealt with that. The manager does not
    /// watch it: it keeps a socket whose other end is closed (`FDPOLL=0`, systemd 246). Tries it also where the manager does
    /// not say how much it takes (before systemd 254).
    ///
    /// # Errors
    /// NotConnected where there is no store; TimedOut where the manager has not dealt with it within `patience`; what sending
    /// says.
    pub(crate) fn put_unwatched(&self, name: &str, fd: BorrowedFd<'_>, patience: Duration) -> io::Result<()> {
        let until = later(Instant::now(), patience);
        let outlet = self.outlet.as_ref().filter(|_| !self.is_closed).ok_or(io::ErrorKind::NotConnected)?;
        let state = [NotifyState::FdStore, NotifyState::Custom("FDPOLL=0"), NotifyState::FdName(name)];
        outlet.send_with(&message(&state), &[fd], patience)?;
        barrier(outlet, until)
    }

    /// How many milliseconds after a barrier the manager may still be about to close what it does not keep. A manager that
    /// has said that it has room keeps it.
    pub(crate) fn closes_within(&self) -> u8 {
        if self.says_capacity { 0 } else { CLOSED_WITHIN }
    }

    #[cfg(test)]
    pub(crate) fn at(address: &std::path::Path) -> Self {
        Self { capacity: 0, is_closed: false, says_capacity: false, outlet: Outlet::to(address.as_os_str()) }
    }

    fn outlet(&self) -> io::Result<&Outlet> {
        self.outlet.as_ref().filter(|_| self.capacity > 0).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Takes everything stored under `name` out of the store again: also what an earlier process put there, whatever
    /// this one was told of the capacity. A manager that does not read at the moment is told later.
    pub fn forget(&self, name: &str) {
        if let Some(outlet) = &self.outlet {
            let message = message(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
            outlet.send(message.clone(), message);
        }
    }

    /// Whether the manager holds everything that was [`put`](Self::put) so far. It tells nobody what finds no room, and
    /// closes it: so one more descriptor is put, under `name`, whose other end tells whether it is still open, and is
    /// forgotten again. To be asked last; `name` is to be of no other use.
    ///
    /// # Errors
    /// TimedOut when the manager has not come to it within `patience`; what making a pipe or sending says.
    pub fn holds_all(&self, name: &str, patience: Duration) -> io::Result<bool> {
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        self.put(name, &[theirs.as_fd()])?;
        drop(theirs);
        self.settle(patience)?;
        // The manager leaves closing to a process of its own (systemd 254), which has been started by now.
        let mut question = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        let is_closed = poll(&mut question, PollTimeout::from(CLOSED_WITHIN))? > 0;
        self.forget(name);
        Ok(!is_closed)
    }

    /// Waits until the manager has dealt with everything sent so far (`BARRIER=1`, systemd 246): it
    /// closes its end of a pipe when it comes to it.
    ///
    /// # Errors
    /// TimedOut when it has not within `patience`; NotConnected where there is no store; what making the pipe or sending
    /// says.
    pub fn settle(&self, patience: Duration) -> io::Result<()> {
        barrier(self.outlet()?, later(Instant::now(), patience))
    }
}

fn barrier(outlet: &Outlet, until: Instant) -> io::Result<()> {
    let left = || until.saturating_duration_since(Instant::now());
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    outlet.send_with(&message(&[NotifyState::Custom("BARRIER=1")]), &[theirs.as_fd()], left())?;
    drop(theirs);
    let timeout = PollTimeout::try_from(left()).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], timeout)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// One thread's sign of life. The thread calls [`answer`](Beat::answer) whenever it comes round; the
/// [`Watchdog`] sees whether it did since it last asked.
#[derive(Debug, Default)]
pub struct Beat {
    asked: AtomicU64,
    answered: AtomicU64,
    excused: AtomicBool,
}

impl Beat {
    /// The thread came round.
    pub fn answer(&self) {
        let asked = self.asked.load(Ordering::Acquire);
        // Only when asked: this is on the busiest path there is.
        if self.answered.load(Ordering::Relaxed) != asked {
            self.answered.store(asked, Ordering::Release);
        }
    }

    /// Does what may have to wait for somebody outside of this process, and is no less alive for it: to be ended and
    /// started again would not make them answer.
    pub(crate) fn excused<R>(&self, outside: impl FnOnce() -> R) -> R {
        self.excused.store(true, Ordering::Release);
        let result = outside();
        self.excused.store(false, Ordering::Release);
        self.answer();
        result
    }

    fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Release);
    }

    fn is_answered(&self) -> bool {
        self.excused.load(Ordering::Acquire)
            || self.answered.load(Ordering::Acquire) == self.asked.load(Ordering::Acquire)
    }
}

/// A thread under watch: its sign of life, and how to make it look around.
pub struct Watched {
    /// For messages.
    pub name: String,
    /// Shared with the thread.
    pub beat: Arc<Beat>,
    /// Makes the thread come round once.
    pub nudge: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("name", &self.name).field("beat", &self.beat).finish_non_exhaustive()
    }
}

/// `WATCHDOG=1`, but only while every thread makes progress. A thread that hangs keeps the message
/// back, and the service manager ends and restarts us (WatchdogSec= in systemd.service(5)).
#[derive(Debug)]
pub struct Watchdog {
    threads: Vec<Watched>,
    pause: Duration,
    due: Instant,
    asked: bool,
}

impl Watchdog {
    /// Reads WATCHDOG_USEC and WATCHDOG_PID; `None` where the manager set no watchdog for us, or one
    /// of no length.
    pub fn from_env(threads: Vec<Watched>) -> Option<Self> {
        let timeout = sd_notify::watchdog_enabled().filter(|timeout| !timeout.is_zero())?;
        // Asked at one tick, told at the next: two ticks and a half fit into the timeout. A timeout
        // beyond all reason is as good as a day.
        let pause = (timeout / 5).clamp(Duration::from_millis(1), Duration::from_secs(86_400));
        Some(Self { threads, pause, due: Instant::now(), asked: false })
    }

    /// When [`tick`](Self::tick) wants to be called next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Tells the manager if all answered, and asks anew. Returns the names of those that did not.
    pub fn tick(&mut self, notifier: &Notifier) -> Vec<&str> {
        let now = Instant::now();
        if now < self.due {
            return Vec::new();
        }
        self.due = now + self.pause;
        let silent: Vec<_> = self.threads.iter().filter(|thread| !thread.beat.is_answered()).collect();
        if silent.is_empty() {
            if self.asked {
                notifier.watchdog();
            }
            self.asked = true;
            for thread in &self.threads {
                thread.beat.ask();
                (thread.nudge)();
            }
        }
        silent.into_iter().map(|thread| thread.name.as_str()).collect()
    }
}

/// Tells one thread that others have done something worth a look, at most once until it has looked:
/// threads that are busy pay for one atomic read, and a service that is idle wakes nobody.
#[derive(Debug)]
pub struct Activity {
    awaited: AtomicBool,
    event: EventFd,
}

impl Activity {
    /// Nothing has happened yet, and nobody waits.
    ///
    /// # Errors
    /// What eventfd(2) says.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { awaited: AtomicBool::new(false), event })
    }

    /// Something happened.
    pub fn stir(&self) {
        if self.awaited.load(Ordering::SeqCst) && self.awaited.swap(false, Ordering::SeqCst) {
            let _ = self.event.write(1);
        }
    }

    /// Asks for the next stir to make the descriptor readable. Look once more after this call: what
    /// happened before it does not.
    pub fn watch(&self) {
        self.awaited.store(true, Ordering::SeqCst);
    }

    /// Makes the descriptor unreadable again, until the first stir after the next [`watch`](Self::watch).
    pub fn calm(&self) {
        let _ = self.event.read();
    }
}

impl AsFd for Activity {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP, or [`request_reload`]; `answer_to` is the process that waits to hear how it went.
    Reload {
        /// See [`Signals::answer`].
        answer_to: Option<i32>,
    },
}

/// The signals we act on, as something to poll.
#[derive(Debug)]
pub struct Signals {
    signals: SignalFd,
    is_final: AtomicBool,
    is_terminated: AtomicBool,
    /// By the service manager: SIGTERM, and SIGCONT after it.
    is_restarted: AtomicBool,
    /// Those who wait for an answer, and when they began: by the time it is given the number may be another's. To hold
    /// them open would take the descriptor that reading the new configuration may need.
    askers: Mutex<Vec<(i32, Option<u64>)>>,
}

impl Signals {
    /// Blocks SIGTERM, SIGINT, SIGHUP, SIGCONT and the signal of [`request_reload`] for this thread and all that it
    /// starts from now on, and receives them here instead. SIGCONT still makes a stopped process go on.
    ///
    /// # Errors
    /// What sigprocmask(2) or signalfd(2) says.
    pub fn catch() -> io::Result<Self> {
        let ours = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCONT].map(|signal| signal as i32);
        let signals = sys::signal_set(&[ours.as_slice(), &[asking()]].concat());
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self {
            signals,
            is_final: AtomicBool::new(false),
            is_terminated: AtomicBool::new(false),
            is_restarted: AtomicBool::new(false),
            askers: Mutex::default(),
        })
    }

    /// Whether no next process follows, once a stop has been asked for: then nothing is to be kept for one.
    ///
    /// SIGINT says so. SIGTERM says that one follows, but only from the service manager's own stopping of the unit (with
    /// `KillSignal=SIGINT` and `RestartKillSignal=SIGTERM`, a restart): by kill(1) or `systemctl kill` the unit just ends.
    /// systemd.kill(5): right after the signal, systemd will always send SIGCONT, which neither of these does. This is
    /// awaited for up to a second. A request to reload that comes meanwhile is refused.
    pub fn stop_is_final(&self) -> bool {
        let until = later(Instant::now(), FOLLOWED_WITHIN);
        loop {
            while let Some(request) = self.next() {
                if let Request::Reload { answer_to: Some(pid) } = request {
                    self.answer(pid, false);
                }
            }
            if self.is_final.load(Ordering::Relaxed) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if self.is_restarted.load(Ordering::Relaxed) || left.is_zero() {
                return !self.is_restarted.load(Ordering::Relaxed);
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }

    /// Tells the process that waits in [`request_reload`] how it went; nobody, where it is gone.
    pub fn answer(&self, pid: i32, taken: bool) {
        let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = askers.iter().position(|(asker, _)| *asker == pid) else { return };
        let (_, began) = askers.swap_remove(place);
        drop(askers);
        let process = sys::pidfd_open(pid);
        // What is held now is the process that asked, if that began when this one did; without a descriptor to see that
        // by, one that at least the answer would not end.
        let is_another = began.zip(began_at(pid)).is_some_and(|(then, now)| then != now);
        if is_another || !heeds(pid, TAKEN as i32) {
            return;
        }
        match process {
            Ok(process) => {
                let signal = if taken { TAKEN } else { REFUSED };
                let _ = sys::signal_process(process.as_fd(), signal as i32);
            }
            Err(_) => answer_reload(pid, taken),
        }
    }

    /// Waits for the next one.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait(&self) -> io::Result<Request> {
        loop {
            if let Some(request) = self.next() {
                return Ok(request);
            }
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next one that has arrived.
    pub fn next(&self) -> Option<Request> {
        let signal = loop {
            let signal = self.signals.read_signal().ok()??;
            if signal.ssi_signo != Signal::SIGCONT as u32 {
                break signal;
            }
            // Of several signals the lowest number is read first, and SIGTERM has a lower one: what comes before it
            // was sent before it, and means something else.
            let is_terminated = self.is_terminated.load(Ordering::Relaxed);
            self.is_restarted.fetch_or(is_terminated, Ordering::Relaxed);
        };
        for (stop, flag) in [(Signal::SIGTERM, &self.is_terminated), (Signal::SIGINT, &self.is_final)] {
            if signal.ssi_signo == stop as u32 {
                flag.store(true, Ordering::Relaxed);
                return Some(Request::Stop);
            }
        }
        let wants_answer =
            signal.ssi_signo == asking() as u32 && signal.ssi_code == libc::SI_QUEUE && signal.ssi_int == ANSWER_WANTED;
        let asker = wants_answer.then_some(signal.ssi_pid as i32);
        if let Some(pid) = asker {
            self.askers.lock().unwrap_or_else(PoisonError::into_inner).push((pid, began_at(pid)));
        }
        Some(Request::Reload { answer_to: asker })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

/// Tells the process that waits in [`request_reload`] how it went, by its number alone: [`Signals::answer`] makes sure
/// that it is still the same process.
pub fn answer_reload(pid: i32, taken: bool) {
    let signal = if taken { TAKEN } else { REFUSED };
    let _ = sys::queue_signal(pid, signal as i32, ANSWER_WANTED);
}

/// Asks the service `pid` to reload and waits for its answer: whether the new configuration is in force.
/// Made for ExecReload=, which is to return when the reload is done, not when it was asked for. The answer is a signal:
/// SIGUSR1 and SIGUSR2 stay blocked in the calling thread.
///
/// # Errors
/// ESRCH where there is no such process or it ended before it answered, EPERM where it is not ours, PermissionDenied
/// with the reason where it could not answer us, InvalidInput where it has not called [`Signals::catch`], so that the
/// signal would end it, TimedOut where `patience` ran out.
pub fn request_reload(pid: i32, patience: Duration) -> io::Result<bool> {
    if pid <= 1 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let process: OwnedFd = sys::pidfd_open(pid)?;
    if !heeds(pid, asking()) {
        let message = "it does not wait to be asked; expected the process of a service that reloads";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    if let Some(uid) = cannot_answer(pid) {
        let me = nix::unistd::Uid::current();
        let message = format!(
            "it runs as uid {uid} and could not answer uid {me}; expected to be asked by its own user, as by ExecReload="
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    let answers: SigSet = [TAKEN, REFUSED].into_iter().collect();
    answers.thread_block()?;
    let answer = SignalFd::with_flags(&answers, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    sys::queue_signal(pid, asking(), ANSWER_WANTED)?;
    let until = later(Instant::now(), patience);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut question =
            [PollFd::new(answer.as_fd(), PollFlags::POLLIN), PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if poll(&mut question, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if let Some(signal) = answer.read_signal()? {
            if signal.ssi_pid == pid as u32 {
                return Ok(signal.ssi_signo == TAKEN as u32);
            }
        } else {
            // It may have answered and ended, but then the answer was there to read.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
}

/// When the process began, in ticks since the system did: proc_pid_stat(5).
fn began_at(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in parentheses, may hold anything; what comes after it is the third field, and this the 22nd.
    let after_name = stat.rsplit_once(") ")?.1;
    after_name.split(' ').nth(19)?.parse().ok()
}

/// The user of a process that may not send us a signal, by kill(2) and proc_pid_status(5). Where /proc does not tell,
/// we take it that it may.
fn cannot_answer(pid: i32) -> Option<u32> {
    const CAP_KILL: u64 = 1 << 5;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let mut theirs = field("Uid")?.split_whitespace().map_while(|uid| uid.parse::<u32>().ok());
    let (real, effective) = (theirs.next()?, theirs.next()?);
    let capabilities = u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?;
    let us = nix::unistd::getresuid().ok()?;
    let ours = [us.real.as_raw(), us.saved.as_raw()];
    let may = capabilities & CAP_KILL != 0 || [real, effective].iter().any(|uid| ours.contains(uid));
    (!may).then_some(effective)
}

/// Whether the process has made arrangements for this signal, by proc_pid_status(5): else it would end by it. Where
/// /proc does not tell, we take it that whoever asks knows whom.
fn heeds(pid: i32, signal: i32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let sets = ["SigBlk:", "SigIgn:", "SigCgt:"];
    let mut masks = status.lines().filter_map(|line| sets.iter().find_map(|name| line.strip_prefix(name)));
    masks.any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & (1 << (signal - 1)) != 0))
}

/// Has the C library give memory back to the system as soon as it is freed, where `bytes` or more were allocated at once.
///
/// For a service that runs for months and whose connections hold buffers now and then. glibc takes what is allocated in
/// such sizes once for a hint to keep them (mallopt(3), M_MMAP_THRESHOLD), so that what the busiest moment needed stays
/// with the process, and the gaps between what is in use grow with time. The price is a few microseconds for each such
/// allocation. To be called before there is a second thread; has no effect with another C library.
pub fn return_memory(bytes: usize) {
    sys::map_allocations_from(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_stored_where_there_is_no_store() {
        let (store, (ours, _theirs)) = (
            Store { capacity: 0, is_closed: false, says_capacity: false, outlet: None },
            std::os::unix::net::UnixDatagram::pair().unwrap(),
        );
        assert_eq!(store.put("x", &[ours.as_fd()]).unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(store.settle(Duration::ZERO).unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
