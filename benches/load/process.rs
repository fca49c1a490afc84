//! A server as a process: started the way systemd starts it, measured from outside, ended with its whole group.
//! Used by the workloads; knows neither the protocol nor which server it is.
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::io::{BufRead, BufReader, Error, ErrorKind, Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How a server is started.
pub struct Launch {
    pub command: Vec<String>,
    /// Passed as descriptor 3; `None` for servers that bind by themselves.
    pub listener: Option<UnixListener>,
    /// The one CPU it may run on.
    pub cpu: Option<usize>,
    /// Where `READY=1` goes.
    pub notify: Option<String>,
    /// Exec only when the listener has a connection waiting, as a socket unit does.
    pub on_demand: bool,
}

/// The command line by which this program starts itself as the launcher of a server.
pub const LAUNCH: &str = "launch-server";

/// The launcher runs in the process that becomes the server. It puts the listener (its standard input) in place, waits
/// for a connection if it is told to, reports the time, and executes the server. LISTEN_PID has to name this very
/// process. A shell could do all of this except the waiting.
pub fn launcher(args: &[String]) -> Result<std::convert::Infallible> {
    let at = args.iter().position(|a| a == "--").ok_or_else(|| Error::other("no command"))?;
    let (flags, command) = (&args[..at], &args[at + 1..]);
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    // An interrupted benchmark must leave no server behind.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The benchmark blocks the signals that end it; a server that inherited that could not be asked to end.
    SigSet::empty().thread_set_mask()?;
    if let Some(cpu) = flags.iter().find_map(|f| f.strip_prefix("cpu=")) {
        pin(cpu.parse().map_err(Error::other)?)?;
    }
    let mut server = Command::new(&command[0]);
    server.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null());
    if has("listener") {
        let input = std::io::stdin();
        let fd = fcntl(input.as_fd(), FcntlArg::F_DUPFD(3))?;
        if fd != 3 {
            return Err(Error::other(format!("descriptor 3 is taken: got {fd}")));
        }
        server.env("LISTEN_FDS", "1").env("LISTEN_PID", std::process::id().to_string());
        server.env("LISTEN_FDNAMES", "echo.socket");
    }
    if has("on-demand") {
        println!("waiting");
        let input = std::io::stdin();
        let mut wait = [nix::poll::PollFd::new(input.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut wait, nix::poll::PollTimeout::NONE)?;
    }
    println!("{}", now_nanos()?);
    std::io::stdout().flush()?;
    Err(server.exec())
}

/// CLOCK_MONOTONIC in nanoseconds: the same for every process.
pub fn now_nanos() -> Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    u64::try_from(now.as_nanos()).map_err(Error::other)
}

/// The first CPU that the calling thread may run on.
pub fn first_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu) == Ok(true));
    first.ok_or_else(|| Error::other("no CPU is allowed"))
}

/// Binds the calling thread, and what it starts, to one CPU. Returns where it was allowed to run, for [`unpin`].
pub fn pin(cpu: usize) -> Result<CpuSet> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    Ok(allowed)
}

/// Lets the calling thread run again where it was allowed to before [`pin`].
pub fn unpin(allowed: &CpuSet) -> Result<()> {
    Ok(sched_setaffinity(Pid::from_raw(0), allowed)?)
}

/// A running server. Dropping it ends its process group.
pub struct Server {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Server {
    pub fn start(launch: Launch, errors: Stdio) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(LAUNCH).process_group(0).stdout(Stdio::piped()).stderr(errors);
        for name in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"] {
            command.env_remove(name);
        }
        match launch.listener {
            Some(listener) => command.arg("listener").stdin(OwnedFd::from(listener)),
            None => command.stdin(Stdio::null()),
        };
        if let Some(cpu) = launch.cpu {
            command.arg(format!("cpu={cpu}"));
        }
        if launch.on_demand {
            command.arg("on-demand");
        }
        if let Some(path) = launch.notify {
            command.env("NOTIFY_SOCKET", path);
        }
        let mut child = command.arg("--").args(launch.command).spawn()?;
        let said = child.stdout.take().ok_or_else(|| Error::other("no pipe from the launcher"))?;
        Ok(Self { child, said: BufReader::new(said) })
    }

    /// The launcher's next line: that it waits, or the time when it executed the server.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error where the server has ended.
    pub fn alive(&self) -> Result<()> {
        // The status is not taken: until it is, no other process gets this pid.
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(pid_of(self.pid())), look)? {
            WaitStatus::StillAlive => Ok(()),
            WaitStatus::Exited(_, code) => Err(Error::other(format!("the server has ended with status {code}"))),
            other => Err(Error::other(format!("the server has ended: {other:?}"))),
        }
    }

    /// Runs `load`. If this takes longer than `limit`, kills the server, which ends every wait for it, and fails.
    ///
    /// A time limit on each socket would be a further system call for each connection that is measured.
    pub fn within<T>(&self, limit: Duration, load: impl FnOnce() -> Result<T>) -> Result<T> {
        let group = pid_of(self.pid());
        let (done, ended) = channel::<()>();
        std::thread::scope(|scope| {
            let watch = scope.spawn(move || {
                let late = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
                late.then(|| killpg(group, Signal::SIGKILL))
            });
            let end = load();
            drop(done);
            match watch.join() {
                Ok(None) => end,
                _ => Err(Error::new(ErrorKind::TimedOut, format!("not done within {limit:?}: an answer is missing"))),
            }
        })
    }

    /// CPU time of the server, all its threads (the ended ones too), and its children, reaped or alive.
    /// Its own part is exact; that of reaped children is in clock ticks.
    pub fn cpu(&self) -> Result<Duration> {
        self.alive()?;
        let ticks = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
        let tick = Duration::from_secs(1) / u32::try_from(ticks).map_err(Error::other)?;
        let mut sum = Duration::ZERO;
        for pid in self.tree() {
            // A child that ends between the listing and here shows up in its parent's reaped time next time.
            let Ok(clock) = clock_getcpuclockid(pid_of(pid)) else { continue };
            let Ok(time) = clock_gettime(clock) else { continue };
            sum += Duration::from(time);
            if let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) {
                let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
                let reaped = after_name.split_whitespace().skip(13).take(2).filter_map(|f| f.parse::<u32>().ok());
                sum += tick * reaped.sum::<u32>();
            }
        }
        Ok(sum)
    }

    /// The highest resident size so far, in KiB. For a process per connection, the sum over the processes alive; a
    /// shared page counts in each of them.
    pub fn peak_kib(&self) -> Result<u64> {
        let own = self.status("VmHWM:")?;
        // A child may have ended since it was listed.
        let children = self.tree().into_iter().skip(1).filter_map(|pid| status_field(pid, "VmHWM:"));
        Ok(own + children.sum::<u64>())
    }

    /// Anonymous resident memory of the process (no file, no shared page), in KiB.
    pub fn anonymous_kib(&self) -> Result<u64> {
        self.status("RssAnon:")
    }

    /// How often its threads have gone to sleep: the number of their wake-ups.
    pub fn sleeps(&self) -> Result<u64> {
        self.alive()?;
        let mut sum = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            // A thread may have ended since it was listed.
            let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
            sum += field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
        }
        Ok(sum)
    }

    /// A field of the server's own status. An exited process has no memory, and no such field.
    fn status(&self, name: &str) -> Result<u64> {
        self.alive()?;
        status_field(self.pid(), name).ok_or_else(|| Error::other(format!("the server's status has no {name}")))
    }

    fn tree(&self) -> Vec<u32> {
        let mut tree = vec![self.pid()];
        let mut next = 0;
        while let Some(&pid) = tree.get(next) {
            next += 1;
            let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten() {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                tree.extend(children.split_whitespace().filter_map(|c| c.parse::<u32>().ok()));
            }
        }
        tree
    }
}

impl Drop for Server {
    /// Stops the server with a signal, so that the command it runs under (`--wrap`) can write its result; kills it if
    /// that does not end it.
    fn drop(&mut self) {
        let _ = kill(pid_of(self.child.id()), Signal::SIGTERM);
        for _ in 0..2000 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // The server has its own process group, so this reaches only it and its children. It may have exited already.
        let _ = killpg(pid_of(self.child.id()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

fn status_field(pid: u32, name: &str) -> Option<u64> {
    field(&std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).ok()?, name)
}

fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find(|l| l.starts_with(name))?;
    line[name.len()..].split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(program: &str) -> Result<Server> {
        let mut command = Command::new(program);
        let mut child = command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = child.stdout.take().ok_or_else(|| Error::other("no pipe"))?;
        Ok(Server { child, said: BufReader::new(said) })
    }

    #[test]
    fn a_server_that_has_ended_has_no_figures() -> Result<()> {
        let server = server("true")?;
        waitid(Id::Pid(pid_of(server.pid())), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
        assert!(server.alive().is_err());
        assert!(server.cpu().is_err());
        assert!(server.peak_kib().is_err());
        assert!(server.anonymous_kib().is_err());
        assert!(server.sleeps().is_err());
        Ok(())
    }

    #[test]
    fn a_server_that_waits_has_figures() -> Result<()> {
        let server = server("cat")?;
        server.alive()?;
        server.cpu()?;
        server.sleeps()?;
        assert!(server.peak_kib()? > 0);
        Ok(())
    }

    #[test]
    fn waiting_for_a_server_that_does_nothing_ends_and_is_an_error() -> Result<()> {
        let server = server("cat")?;
        assert_eq!(server.within(Duration::from_secs(60), || Ok(7))?, 7);
        let its_end = || Ok(waitid(Id::Pid(pid_of(server.pid())), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?);
        let end = server.within(Duration::from_millis(1), its_end);
        assert_eq!(end.map_err(|e| e.kind()), Err(ErrorKind::TimedOut));
        Ok(())
    }

    #[test]
    fn who_is_pinned_and_freed_may_run_where_it_could_before() -> Result<()> {
        let mut allowed = sched_getaffinity(Pid::from_raw(0))?;
        let first = first_cpu()?;
        if (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true)).count() > 1 {
            // This process may not use the machine's first CPU now.
            allowed.unset(first)?;
            sched_setaffinity(Pid::from_raw(0), &allowed)?;
        }
        let before = pin(first_cpu()?)?;
        assert_eq!(before, allowed);
        assert_ne!(sched_getaffinity(Pid::from_raw(0))?.is_set(first_cpu()?), Ok(false));
        unpin(&before)?;
        assert_eq!(sched_getaffinity(Pid::from_raw(0))?, allowed);
        Ok(())
    }
}
