//! Signals that stop or reload the service, and the request that waits until the service has reloaded.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::clock::{later, poll_timeout};
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
            if self.is_restarted.load(Ordering::Relaxed) || until <= Instant::now() {
                return !self.is_restarted.load(Ordering::Relaxed);
            }
            let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], poll_timeout(Some(until)));
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
        let mut question =
            [PollFd::new(answer.as_fd(), PollFlags::POLLIN), PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if poll(&mut question, poll_timeout(Some(until)))? == 0 {
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
