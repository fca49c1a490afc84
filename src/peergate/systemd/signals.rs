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

/// Marks a signal that asks for an answer ([`request_reload`]), and the answer.
const WITH_ANSWER: i32 = 0x6563_686f;
/// The signal that asks for an answer. It is not SIGHUP, because the kernel keeps only one of several pending SIGHUPs and
/// the remaining requests would get no answer. Real-time signals queue (signal(7)).
fn request_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

/// The answers: taken, refused.
const TAKEN: Signal = Signal::SIGUSR1;
const REFUSED: Signal = Signal::SIGUSR2;

/// How long after SIGTERM the service manager's SIGCONT may arrive. The manager sends both in a row, but may lose the
/// processor in between.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(1);

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP, or [`request_reload`]; `answer_to` is the process that waits for the outcome.
    Reload {
        /// See [`Signals::answer`].
        answer_to: Option<i32>,
    },
}

/// The signals that the service acts on, as a descriptor to poll.
#[derive(Debug)]
pub struct Signals {
    signals: SignalFd,
    is_final: AtomicBool,
    is_terminated: AtomicBool,
    /// SIGTERM and SIGCONT after it: the service manager stops the unit.
    is_restarted: AtomicBool,
    /// The processes that wait for an answer, each with its start time: the number may belong to another process when the
    /// answer is given. A pidfd for each would take the descriptor that reading the configuration may need.
    askers: Mutex<Vec<(i32, Option<u64>)>>,
}

impl Signals {
    /// Blocks SIGTERM, SIGINT, SIGHUP, SIGCONT and the signal of [`request_reload`] for this thread and all that it
    /// starts from now on, and receives them here. SIGCONT still continues a stopped process.
    ///
    /// # Errors
    /// What sigprocmask(2) or signalfd(2) reports.
    pub fn catch() -> io::Result<Self> {
        let ours = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCONT].map(|signal| signal as i32);
        let signals = sys::signal_set(&[ours.as_slice(), &[request_signal()]].concat());
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

    /// Whether the stop is not part of a restart, so that nothing is to be kept for a next process.
    ///
    /// The unit has `KillSignal=SIGINT` and `RestartKillSignal=SIGTERM`: SIGINT is a stop. SIGTERM is a restart only if
    /// the service manager sent it; kill(1) and `systemctl kill` just end the unit. The manager always sends SIGCONT right
    /// after it (systemd.kill(5)), and the commands do not. So this waits up to a second for SIGCONT. A request to
    /// reload that comes meanwhile is refused.
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

    /// Sends the outcome to the process that waits in [`request_reload`], if it still exists.
    pub fn answer(&self, pid: i32, taken: bool) {
        let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = askers.iter().position(|(asker, _)| *asker == pid) else { return };
        let (_, began) = askers.swap_remove(place);
        drop(askers);
        let process = sys::pidfd_open(pid);
        // The start time tells whether the pidfd stands for the process that asked. If the time is not known, the process
        // must at least handle the signal, so that the answer does not end it.
        let is_another = began.zip(start_time_of(pid)).is_some_and(|(then, now)| then != now);
        if is_another || !handles(pid, TAKEN as i32) {
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

    /// Waits for the next request.
    ///
    /// # Errors
    /// What poll(2) reports.
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

    /// The next request that has arrived.
    pub fn next(&self) -> Option<Request> {
        let signal = loop {
            let signal = self.signals.read_signal().ok()??;
            if signal.ssi_signo != Signal::SIGCONT as u32 {
                break signal;
            }
            // Of several pending signals the lowest number is read first, and SIGTERM is lower than SIGCONT. A SIGCONT that
            // is read before SIGTERM was sent before it and does not belong to it.
            let is_terminated = self.is_terminated.load(Ordering::Relaxed);
            self.is_restarted.fetch_or(is_terminated, Ordering::Relaxed);
        };
        for (stop, flag) in [(Signal::SIGTERM, &self.is_terminated), (Signal::SIGINT, &self.is_final)] {
            if signal.ssi_signo == stop as u32 {
                flag.store(true, Ordering::Relaxed);
                return Some(Request::Stop);
            }
        }
        let wants_answer = signal.ssi_signo == request_signal() as u32
            && signal.ssi_code == libc::SI_QUEUE
            && signal.ssi_int == WITH_ANSWER;
        let asker = wants_answer.then_some(signal.ssi_pid as i32);
        if let Some(pid) = asker {
            self.askers.lock().unwrap_or_else(PoisonError::into_inner).push((pid, start_time_of(pid)));
        }
        Some(Request::Reload { answer_to: asker })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

/// Sends the outcome to a process that waits in [`request_reload`], by its number alone. [`Signals::answer`] also makes
/// sure that it is still the same process.
pub fn answer_reload(pid: i32, taken: bool) {
    let signal = if taken { TAKEN } else { REFUSED };
    let _ = sys::queue_signal(pid, signal as i32, WITH_ANSWER);
}

/// Asks the service `pid` to reload and waits for its answer: whether the new configuration is in force.
/// Made for ExecReload=, which must not return before the reload is done. The answer is a signal: SIGUSR1 and SIGUSR2 stay
/// blocked in the calling thread.
///
/// # Errors
/// ESRCH if there is no such process or it ended before it answered; EPERM if it may not be signalled; PermissionDenied
/// with the reason if it could not answer; InvalidInput if it has not called [`Signals::catch`] and the signal would
/// end it; TimedOut after `patience`.
pub fn request_reload(pid: i32, patience: Duration) -> io::Result<bool> {
    if pid <= 1 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let process: OwnedFd = sys::pidfd_open(pid)?;
    if !handles(pid, request_signal()) {
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
    sys::queue_signal(pid, request_signal(), WITH_ANSWER)?;
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
            // The process has ended. An answer sent before that would have been read.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
}

/// The start time of the process, in clock ticks since boot: proc_pid_stat(5).
fn start_time_of(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything. After it comes the third field; the start time is the 22nd.
    let after_name = stat.rsplit_once(") ")?.1;
    after_name.split(' ').nth(19)?.parse().ok()
}

/// The user of a process that may not send a signal to this one, by kill(2) and proc_pid_status(5). Without /proc it
/// counts as allowed.
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

/// Whether the process blocks, ignores or catches this signal, by proc_pid_status(5): else the signal would end it.
/// Without /proc it counts as handled.
fn handles(pid: i32, signal: i32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let sets = ["SigBlk:", "SigIgn:", "SigCgt:"];
    let mut masks = status.lines().filter_map(|line| sets.iter().find_map(|name| line.strip_prefix(name)));
    masks.any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & (1 << (signal - 1)) != 0))
}
