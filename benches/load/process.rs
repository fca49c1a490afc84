//! A server as a process: started the way systemd starts it, measured from outside, ended with its whole group.
//! Used by the workloads; knows neither the protocol nor which server it is.
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill, killpg};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::io::{BufRead, BufReader, Error, Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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

/// The launcher: in the process that becomes the server, puts the listener (its standard input) in place, waits for a
/// connection where that is asked for, says the time, and executes the server. A shell could do all but the waiting;
/// LISTEN_PID has to name the very process.
pub fn launcher(args: &[String]) -> Result<std::convert::Infallible> {
    let at = args.iter().position(|a| a == "--").ok_or_else(|| Error::other("no command"))?;
    let (flags, command) = (&args[..at], &args[at + 1..]);
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    // A server must not outlive a benchmark that was interrupted.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
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

/// Binds the calling thread, and what it starts, to one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Lets the calling thread run on any of the first `cpus` CPUs again.
pub fn unpin(cpus: usize) -> Result<()> {
    let mut set = CpuSet::new();
    (0..cpus).try_for_each(|cpu| set.set(cpu))?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
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

    /// What the launcher says next: that it waits, or when it executed the server.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error where the server has ended.
    pub fn alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => Err(Error::other(format!("the server ended with {status}"))),
            None => Ok(()),
        }
    }

    /// CPU time of the server, all its threads (the ended ones too), and its children, reaped or alive.
    /// Its own part is exact; that of reaped children is in clock ticks.
    pub fn cpu(&self) -> Result<Duration> {
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

    /// The highest resident size so far, in KiB; for a process per connection the sum over those alive, in which pages
    /// they share count in each.
    pub fn peak_kib(&self) -> u64 {
        self.tree().into_iter().filter_map(|pid| status_field(pid, "VmHWM:")).sum()
    }

    /// Resident memory that is the process's own (no file, no shared page), in KiB.
    pub fn anonymous_kib(&self) -> u64 {
        status_field(self.pid(), "RssAnon:").unwrap_or(0)
    }

    /// How often its threads have gone to sleep, which is how often they had been awake.
    pub fn sleeps(&self) -> u64 {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else { return 0 };
        tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
            .filter_map(|status| field(&status, "voluntary_ctxt_switches:"))
            .sum()
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
    /// Asks it to end, so that whatever it runs under (`--wrap`) can tell its tale, and sees to it that it does.
    fn drop(&mut self) {
        let _ = kill(pid_of(self.child.id()), Signal::SIGTERM);
        for _ in 0..2000 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Its own process group, so this reaches the server's children and nobody else. It may have ended already.
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
