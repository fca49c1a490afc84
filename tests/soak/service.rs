//! The program under load as its service manager has it: started with its socket, restarted with what it has stored, stopped.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fds::send_fds;
use crate::manager::{Manager, Received};
use crate::{CONFIG, DIRECTORY, SOCKET};

/// A process, killed when this is dropped, also when a claim has failed.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The service.
pub struct Service {
    program: &'static str,
    manager: Arc<Manager>,
    listener: OwnedFd,
    process: Process,
    /// What each process has written to standard error.
    complaints: Vec<thread::JoinHandle<String>>,
}

impl Service {
    /// Binds the socket, starts the first process and waits until it is ready.
    pub fn start(program: &'static str) -> Self {
        let listener = UnixListener::bind(SOCKET).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
        std::fs::set_permissions(SOCKET, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let manager = Arc::new(Manager::new());
        manager.received.change(|received| received.capacity = 4);
        let listener = OwnedFd::from(listener);
        let (process, complaints) = spawn(program, &manager, &listener);
        Self { program, manager, listener, process, complaints: vec![complaints] }
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.pid()).unwrap()), signal).unwrap();
    }

    /// As systemd restarts it.
    pub fn restart(&mut self) {
        let status = self.end();
        assert!(status.success(), "{status}");
        let (process, complaints) = spawn(self.program, &self.manager, &self.listener);
        self.process = process;
        self.complaints.push(complaints);
    }

    /// SIGCONT follows (systemd.kill(5)).
    fn end(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.signal(Signal::SIGCONT);
        self.process.0.wait().unwrap()
    }

    /// How it has ended, and what its processes have written to standard error.
    pub fn stop(mut self) -> (ExitStatus, String) {
        let status = self.end();
        (status, self.complaints.into_iter().map(|one| one.join().unwrap()).collect())
    }
}

fn spawn(program: &str, manager: &Arc<Manager>, listener: &OwnedFd) -> (Process, thread::JoinHandle<String>) {
    // All that the process before has said.
    manager.catch_up();
    let mut stored = manager.received.change(Received::passed);
    stored.push(("service.socket".to_owned(), listener.try_clone().unwrap()));
    let names: Vec<_> = stored.iter().map(|(name, _)| name.as_str()).collect();
    let (control, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(format!("{DIRECTORY}/peer"));
    command.args(["activate", &stored.len().to_string(), &format!("{DIRECTORY}/{program}"), "--config", CONFIG]);
    command.env("NOTIFY_SOCKET", manager.socket()).env("FDSTORE", "4").env("LISTEN_PID", "self");
    command.env("LISTEN_FDS", stored.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    command.stdin(OwnedFd::from(theirs)).stderr(Stdio::piped());
    let ready = manager.received.lock().count("READY=1");
    manager.received.change(|received| received.begun += 1);
    let mut process = Process(command.spawn().unwrap());
    drop(command);
    let fds: Vec<RawFd> = stored.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    send_fds(&control, &fds);
    let mut complaints = process.0.stderr.take().unwrap();
    let complaints = thread::spawn(move || {
        let mut text = String::new();
        let _ = complaints.read_to_string(&mut text);
        text
    });
    manager.wait_for("READY=1", ready + 1);
    (process, complaints)
}
