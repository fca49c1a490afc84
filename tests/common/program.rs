//! The program: how it is started, asked to reload, stopped and restarted.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Client, Journald, Manager, Place, Received, Shared, eventually, peer_program, send_fds};

/// The program of the package whose test this is.
pub const PROGRAM: &str = match (option_env!("CARGO_BIN_EXE_echod"), option_env!("CARGO_BIN_EXE_peergate")) {
    (Some(program), _) | (None, Some(program)) => program,
    (None, None) => panic!("the package has no program"),
};

/// How to start the program. Of the environment only PATH is inherited.
pub struct Start {
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    sockets: Vec<(String, OwnedFd)>,
    wrapper: Vec<String>,
    options: Vec<String>,
    stderr: Option<OwnedFd>,
    place: Arc<Place>,
}

impl Start {
    /// With no argument, no socket, no environment.
    pub fn bare() -> Self {
        Self {
            program: PROGRAM.into(),
            args: Vec::new(),
            env: Vec::new(),
            sockets: Vec::new(),
            wrapper: Vec::new(),
            options: Vec::new(),
            stderr: None,
            place: Arc::new(Place::new()),
        }
    }

    /// With this configuration, one listening socket and a manager.
    pub fn serving(config: &str) -> Self {
        let start = Self::bare().config(config);
        let listener = start.place.listener("socket");
        start.socket("echo.socket", listener)
    }

    /// Another program, an example of this tree, with these arguments and this policy's file, one listening socket and a
    /// manager.
    pub fn example(name: &str, args: &[&str], policy: &str) -> Self {
        let start = Self::bare();
        let program = peer_program().with_file_name(name);
        assert!(program.is_file(), "{} is missing: cargo build --example {name}", program.display());
        let path = start.place.file("policy.toml", policy);
        let listener = start.place.listener("socket");
        let start = Self { program, ..start }.args(args).args(&[path.to_str().unwrap()]);
        start.socket("example.socket", listener)
    }

    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// Uses the directory of an earlier process.
    pub fn at(mut self, place: &Arc<Place>) -> Self {
        self.place = Arc::clone(place);
        self
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub fn config(self, text: &str) -> Self {
        let path = self.place.file("echod.toml", text);
        self.args(&["--config", path.to_str().unwrap()])
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Passes a descriptor under this name.
    pub fn socket(mut self, name: &str, fd: impl Into<OwnedFd>) -> Self {
        self.sockets.push((name.to_owned(), fd.into()));
        self
    }

    pub fn wrapper(mut self, words: &[impl AsRef<str>]) -> Self {
        self.wrapper.extend(words.iter().map(|word| word.as_ref().to_owned()));
        self
    }

    pub fn journal(self, journald: &Journald) -> Self {
        self.wrapper(&journald.wrapper())
    }

    /// Under strace(1), which writes to `output` and gets each expression (`inject=…`, `trace=…`) as an option `-e`.
    pub fn traced(self, output: &Path, expressions: &[impl AsRef<str>]) -> Self {
        // For fuzz/sanitize: the leak sanitizer cannot work in a traced process.
        let start = self.env("LSAN_OPTIONS", "detect_leaks=0");
        let start = start.wrapper(&["strace", "-D", "-f", "--seccomp-bpf", "-qqq", "-e", "signal=none", "-o"]);
        let start = start.wrapper(&[output.to_string_lossy()]);
        expressions.iter().fold(start, |start, expression| start.wrapper(&["-e", expression.as_ref()]))
    }

    /// Stops the program (SIGSTOP) right after bind(2), and continues it when `swap` has replaced the file at `path`.
    pub fn swapped_after_bind(self, path: &Path, swap: impl FnOnce()) -> Echod {
        // With --seccomp-bpf, as in `traced`, strace injects no signal.
        let strace = ["strace", "-D", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=bind"];
        let start = self.env("LSAN_OPTIONS", "detect_leaks=0").wrapper(&strace);
        let echod = start.wrapper(&["-e", "inject=bind:signal=SIGSTOP"]).spawn();
        eventually("the socket exists", || fs::symlink_metadata(path).ok());
        swap();
        echod.signal(Signal::SIGCONT);
        echod.manager.wait_for("READY=1", 1);
        echod
    }

    /// Standard error is this descriptor, instead of a pipe that the test reads.
    pub fn stderr(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(fd.into());
        self
    }

    /// Runs the program as another user: `uid:gid:groups`.
    pub fn run_as(mut self, ids: &str) -> Self {
        self.options.extend(["--as".to_owned(), ids.to_owned()]);
        // Other users may not be able to enter the build directory.
        let copy = self.place.path("echod");
        copy_program(&self.program, &copy);
        self.program = copy;
        self
    }

    /// Starts the program without waiting.
    pub fn spawn(self) -> Echod {
        self.spawn_with(Arc::new(Manager::new()))
    }

    fn spawn_with(self, manager: Arc<Manager>) -> Echod {
        let (control, theirs) = UnixStream::pair().unwrap();
        let names: Vec<_> = self.sockets.iter().map(|(name, _)| name.as_str()).collect();
        let peer = peer_program();
        let words: Vec<&OsStr> = self.wrapper.iter().map(OsStr::new).chain([peer.as_os_str()]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(&self.options).args(["activate", &self.sockets.len().to_string()]);
        command.arg(&self.program).args(&self.args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("NOTIFY_SOCKET", manager.socket());
        if !self.sockets.is_empty() {
            command.env("LISTEN_FDS", self.sockets.len().to_string());
            command.env("LISTEN_PID", "self").env("LISTEN_FDNAMES", names.join(":"));
        }
        for (name, value) in &self.env {
            match value.as_str() {
                "(unset)" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        let stderr = self.stderr.map_or_else(Stdio::piped, Stdio::from);
        let mut process = command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        // The command holds a copy of the standard error descriptor.
        drop(command);
        manager.received.change(|received| received.begun += 1);
        let notify = manager.socket().to_owned();
        let at_end = move || {
            // Fails if the test has removed the socket, and then does not matter.
            let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"OVER", notify));
        };
        let stdout = process.stdout.take().unwrap();
        let (stdout, stderr) = match process.stderr.take() {
            Some(stderr) => (collect(stdout, || {}), collect(stderr, at_end)),
            // If the test provided standard error, the end of file on standard output marks the exit.
            None => {
                let stdout = collect(stdout, at_end);
                (stdout.clone(), stdout)
            }
        };
        let fds: Vec<RawFd> = self.sockets.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        send_fds(&control, &fds);
        // As PID 1: keep the listeners, but no copy of a stored descriptor.
        let mut sockets = self.sockets;
        sockets.retain(|(name, _)| {
            !["echod", "peergate", "stored"].contains(&name.as_str()) && !name.starts_with("echod-")
        });
        let (program, config) = (self.program, self.args);
        Echod { process, manager, stdout, stderr, sockets, place: self.place, program, config }
    }

    /// Starts the program and waits for READY=1.
    #[track_caller]
    pub fn ready(self) -> Echod {
        self.ready_with(Arc::new(Manager::new()))
    }

    /// As [`ready`](Self::ready), with the manager of an earlier process.
    #[track_caller]
    pub fn ready_with(self, manager: Arc<Manager>) -> Echod {
        let before = manager.received.lock().count("READY=1");
        let echod = self.spawn_with(manager);
        let ready = echod.manager.received.try_wait(|received| {
            (received.count("READY=1") > before).then_some(true).or_else(|| received.is_over().then_some(false))
        });
        assert!(ready == Some(true), "not ready: {}", echod.stderr());
        echod
    }

    /// As [`ready`](Self::ready), with a manager that stores as much as the units say.
    #[track_caller]
    pub fn with_store(self) -> Echod {
        const MAX: usize = 4;
        let manager = Arc::new(Manager::new());
        manager.received.change(|received| received.capacity = MAX);
        self.env("FDSTORE", &MAX.to_string()).ready_with(manager)
    }

    /// Runs the program until it exits: exit code, standard output, standard error.
    pub fn run(self) -> (i32, String, String) {
        let echod = self.spawn();
        let (status, stdout, stderr) = echod.wait();
        (status.code().unwrap_or(-status.signal().unwrap_or(0)), stdout, stderr)
    }
}

fn collect(mut from: impl Read + Send + 'static, at_end: impl FnOnce() + Send + 'static) -> Shared<(String, bool)> {
    let text = Shared::new((String::new(), false));
    let filled = text.clone();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            filled.change(|(text, _)| text.push_str(&String::from_utf8_lossy(&buffer[..count])));
        }
        filled.change(|(_, ended)| *ended = true);
        at_end();
    });
    text
}

/// The program, running. Killed when dropped.
pub struct Echod {
    process: Child,
    pub manager: Arc<Manager>,
    stdout: Shared<(String, bool)>,
    stderr: Shared<(String, bool)>,
    sockets: Vec<(String, OwnedFd)>,
    pub place: Arc<Place>,
    program: PathBuf,
    config: Vec<String>,
}

impl Echod {
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The path of the socket that [`Start::serving`] made.
    pub fn socket(&self) -> PathBuf {
        self.place.path("socket")
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.socket())
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().0.clone()
    }

    /// Waits for text on standard error.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str) {
        let found = self.stderr.try_wait(|(all, ended)| match all.contains(text) {
            true => Some(true),
            false => ended.then_some(false),
        });
        assert!(found == Some(true), "no {text:?} in {}", self.stderr());
    }

    /// As systemd sends the signal that stops a service: SIGCONT follows (systemd.kill(5)).
    pub fn signal(&self, signal: Signal) {
        self.kill(signal);
        if signal == Signal::SIGTERM || signal == Signal::SIGINT {
            let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGCONT);
        }
    }

    /// As kill(1) sends it.
    pub fn kill(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Stops the program (SIGSTOP) until it gets SIGCONT. When this returns, none of its threads runs.
    pub fn freeze(&self) {
        self.kill(Signal::SIGSTOP);
        let state = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap();
        eventually("stopped", || {
            let mut tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
            let is_stopped = |stat: String| stat.rsplit(')').next().unwrap().trim().starts_with(['T', 't']);
            tasks.all(|task| is_stopped(state(task.unwrap()))).then_some(())
        });
    }

    /// `echod reload PID`: its exit code and its standard error.
    pub fn reload(&self) -> (i32, String) {
        let asked = Command::new(PROGRAM).args(["reload", &self.pid().to_string()]).output().unwrap();
        self.manager.catch_up();
        (asked.status.code().unwrap(), String::from_utf8(asked.stderr).unwrap())
    }

    /// Replaces the configuration file and reloads it.
    #[track_caller]
    pub fn reload_with(&self, config: &str) {
        self.place.file("echod.toml", config);
        assert_eq!(self.reload(), (0, String::new()), "{}", self.stderr());
    }

    /// Waits until the program exits: exit status, standard output, standard error.
    pub fn wait(mut self) -> (ExitStatus, String, String) {
        let status = self.wait_for_exit();
        let all =
            |output: &Shared<(String, bool)>| output.try_wait(|(text, ended)| ended.then(|| text.clone())).unwrap();
        (status, all(&self.stdout), all(&self.stderr))
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        // Standard error ends with the process. A process that does not exit fails the test instead of hanging it.
        let ended = self.stderr.try_wait(|(_, ended)| ended.then_some(()));
        if ended.is_none() {
            let _ = self.process.kill();
            panic!("the program does not end: {}", self.stderr());
        }
        let status = self.process.wait().unwrap();
        self.manager.catch_up();
        status
    }

    /// Sends SIGTERM and waits for exit status 0. Returns standard error.
    #[track_caller]
    pub fn stop(self) -> String {
        self.signal(Signal::SIGTERM);
        let (status, _, stderr) = self.wait();
        assert!(status.success(), "{status}: {stderr}");
        stderr
    }

    /// As systemd restarts the service: SIGTERM and SIGCONT, then, when the process has exited, the next process with
    /// the same listeners and the stored descriptors. `change` may change the next start and the store.
    #[track_caller]
    pub fn restart(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        self.signal(Signal::SIGTERM);
        self.start_again(change)
    }

    /// As [`restart`](Self::restart), for a process that is stopping or has exited.
    #[track_caller]
    pub fn start_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        let (start, manager) = self.successor(change);
        start.ready_with(manager)
    }

    /// As [`start_again`](Self::start_again), where the next process is expected to fail: its exit code and its
    /// standard error.
    #[track_caller]
    pub fn fail_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> (i32, String) {
        let (start, manager) = self.successor(change);
        let (status, _, stderr) = start.spawn_with(manager).wait();
        (status.code().unwrap_or(-1), stderr)
    }

    /// As [`start_again`](Self::start_again), without waiting until the next process is ready.
    #[track_caller]
    pub fn begin_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        let (start, manager) = self.successor(change);
        start.spawn_with(manager)
    }

    /// Waits until the process has exited. Returns how to start the next one, and its manager.
    #[track_caller]
    fn successor(mut self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> (Start, Arc<Manager>) {
        let status = self.wait_for_exit();
        assert!(status.success() || status.signal() == Some(9), "{status}: {}", self.stderr());
        let manager = Arc::clone(&self.manager);
        let mut stored = manager.received.change(Received::passed);
        let mut start = Start::bare().at(&self.place);
        start.args = self.config.clone();
        start.program.clone_from(&self.program);
        for (name, fd) in std::mem::take(&mut self.sockets) {
            start = start.socket(&name, fd);
        }
        let capacity = manager.received.lock().capacity;
        if capacity > 0 {
            start = start.env("FDSTORE", &capacity.to_string());
        }
        start = change(start, &mut stored);
        for (name, fd) in stored {
            start = start.socket(&name, fd);
        }
        (start, manager)
    }
}

impl Drop for Echod {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A field of /proc/PID/status in KiB, such as VmHWM (the peak of VmRSS).
pub fn memory(echod: &Echod, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", echod.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time used so far, in ticks of 10 ms.
pub fn cpu(echod: &Echod) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", echod.pid())).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// The number of open descriptors.
pub fn descriptors(echod: &Echod) -> usize {
    fs::read_dir(format!("/proc/{}/fd", echod.pid())).unwrap().count()
}

/// Waits until no more descriptors are open than `before`. Fewer may be: what only the start needs is open for a moment
/// after READY=1.
#[track_caller]
pub fn expect_descriptors(echod: &Echod, before: usize) {
    eventually("all descriptors are given back", || (descriptors(echod) <= before).then_some(()));
}

/// The sum of the counts in the summaries on standard error.
pub fn summed(stderr: &str) -> usize {
    let count = |line: &str| line.split_once(" more times in ")?.0.rsplit_once(' ')?.1.parse::<usize>().ok();
    stderr.lines().filter_map(count).sum()
}

/// A wrapper with a mount namespace in which /etc/passwd is a pipe: a lookup in the user database blocks until the test writes
/// to `passwd` in this directory.
pub fn hung_user_database(place: &Place) -> [String; 8] {
    let passwd = place.path("passwd");
    nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
    let script = "mount --bind \"$0\" /etc/passwd && exec \"$@\"";
    ["unshare", "-m", "--propagation", "private", "sh", "-c", script, passwd.to_str().unwrap()].map(str::to_owned)
}

/// Copies a program that is to be run at once. A process of its own writes it: a child that another test forks meanwhile
/// would hold the file open (ETXTBSY).
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    assert!(Command::new("cp").arg(from.as_ref()).arg(to.as_ref()).status().unwrap().success());
}
