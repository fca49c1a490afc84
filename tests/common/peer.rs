//! Peers that are other processes, with other users, groups or control groups (tests/support/peer.rs).

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Client, PATIENCE, receive};

/// The path of the helper program (tests/support/peer.rs).
pub fn peer_program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let peer = tests.parent().and_then(Path::parent).unwrap().join("examples/peer");
    assert!(peer.is_file(), "{} is missing: run all of `cargo test`, or `cargo build --example peer`", peer.display());
    peer
}

/// A peer in a process of its own: the helper program, which has connected and passed its connections to the test.
pub struct PeerProcess {
    pub connections: Vec<Client>,
    process: Child,
    control: Option<UnixStream>,
}

impl PeerProcess {
    /// Connects once as this user, with a group of the same number.
    pub fn user(uid: u32, socket: &Path) -> Self {
        Self::with(&["--as", &format!("{uid}:{uid}")], socket)
    }

    /// Connects once, with these options of the helper program.
    pub fn with(options: &[&str], socket: &Path) -> Self {
        Self::wrapped(&[], options, 1, socket)
    }

    /// Makes `count` connections. The helper program is started by `wrapper`, such as unshare(1).
    pub fn wrapped(wrapper: &[&str], options: &[&str], count: usize, socket: &Path) -> Self {
        Self::of_program(&peer_program(), wrapper, options, count, socket)
    }

    /// As [`wrapped`](Self::wrapped), with a copy of the helper program that every user may run.
    pub fn of_program(program: &Path, wrapper: &[&str], options: &[&str], count: usize, socket: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let words: Vec<&OsStr> = wrapper.iter().map(OsStr::new).chain([program.as_os_str()]).collect();
        let process = Command::new(words[0])
            .args(&words[1..])
            .args(options)
            .args(["--times", &count.to_string(), "connect"])
            .arg(socket)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let mut connections = Vec::new();
        while connections.len() < count {
            let (_, fds) = receive(&ours, &mut [0]).unwrap().expect("the helper failed");
            connections.extend(fds.into_iter().map(|fd| Client::of(UnixStream::from(fd))));
        }
        Self { connections, process, control: Some(ours) }
    }

    pub fn client(&self) -> &Client {
        &self.connections[0]
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends the process and keeps its connections.
    pub fn end(mut self) -> Vec<Client> {
        self.control = None;
        self.process.wait().unwrap();
        std::mem::take(&mut self.connections)
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        self.control = None;
        let _ = self.process.wait();
    }
}

/// A process that connects `times` times as `uid`, and prints each answer and how often it came.
pub fn flood(uid: u32, times: usize, socket: &Path) -> Child {
    Command::new(peer_program())
        .args(["--as", &format!("{uid}:{uid}"), "flood"])
        .arg(socket)
        .arg(times.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A process that connects and closes, again and again, until dropped.
pub struct Rush(Child);

impl Rush {
    /// Returns when it has connected once.
    pub fn begin(options: &[&str], socket: &Path) -> Self {
        let mut command = Command::new(peer_program());
        command.args(options).arg("rush").arg(socket).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut rush = Self(command.spawn().unwrap());
        let begun = rush.0.stdout.as_mut().unwrap().read(&mut [0; 2]).unwrap();
        assert_eq!(begun, 2, "the helper failed");
        rush
    }

    /// Ends it. How many times it has connected.
    pub fn end(mut self) -> u64 {
        drop(self.0.stdin.take());
        let mut told = String::new();
        self.0.stdout.as_mut().unwrap().read_to_string(&mut told).unwrap();
        told.trim().parse().unwrap()
    }
}

impl Drop for Rush {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
