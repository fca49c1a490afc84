//! The proxy in front of a service that is the test's own.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Client, Echod, PATIENCE, Place, Start, eventually};

/// The service behind the gate.
pub struct Behind {
    pub listener: UnixListener,
    pub path: PathBuf,
}

impl Behind {
    pub fn at(place: &Arc<Place>) -> Self {
        let path = place.path("behind");
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    /// The next connection from the proxy.
    #[track_caller]
    pub fn accept(&self) -> Client {
        let mut question = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut question, PollTimeout::try_from(PATIENCE).unwrap());
        assert_eq!(count, Ok(1), "no connection from the proxy");
        let (stream, _) = self.listener.accept().unwrap();
        Client::of(stream)
    }

    pub fn is_left_alone(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let nobody = self.listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.listener.set_nonblocking(false).unwrap();
        nobody
    }
}

/// What the proxy is started with, and where the service is to be.
pub fn start(config: &str, more: &str) -> (Start, PathBuf) {
    let start = Start::bare();
    let path = start.place().path("behind");
    let listener = start.place().listener("socket");
    let text = format!("{config}\n[forward]\nto = \"{}\"\n{more}", path.display());
    (start.config(&text).socket("peergate@test.socket", listener), path)
}

/// As [`start`], with connect(2) traced into this file.
pub fn start_traced(config: &str, more: &str) -> (Start, PathBuf) {
    let (start, _) = start(config, more);
    let trace = start.place().path("trace");
    (start.traced(&trace, &["trace=connect"]), trace)
}

/// Waits until the proxy has tried to connect to the service and got this error.
#[track_caller]
pub fn await_failure(trace: &Path, error: &str) {
    let is_it = |line: &str| line.contains("/behind\"") && line.contains(error);
    eventually(error, || std::fs::read_to_string(trace).ok()?.lines().any(is_it).then_some(()));
}

pub fn serve(config: &str, more: &str) -> (Echod, Behind) {
    let (start, _) = start(config, more);
    let behind = Behind::at(start.place());
    (start.ready(), behind)
}

/// Leaves the program so many numbers for descriptors. Below which number that is.
pub fn leave_free(proxy: &Echod, free: usize) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", proxy.pid())).unwrap();
    let used: Vec<usize> = entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    let limit = (0..).filter(|number| !used.contains(number)).nth(free).unwrap();
    let (pid, option) = (proxy.pid().to_string(), format!("--nofile={limit}:"));
    assert!(Command::new("prlimit").args(["--pid", &pid, &option]).status().unwrap().success());
    limit
}

/// A connection through the proxy: both ends.
pub fn pair(proxy: &Echod, behind: &Behind) -> (Client, Client) {
    let client = proxy.connect();
    (client, behind.accept())
}

/// Bytes that differ from place to place, as many times as it takes.
pub struct Pattern(pub Vec<u8>);

impl Pattern {
    pub const PERIOD: usize = 8191;
    pub const MOST: usize = 64 * 1024;

    pub fn new() -> Self {
        let of = |at: usize| ((at % Self::PERIOD).wrapping_mul(2_654_435_761) >> 9) as u8;
        Self((0..Self::PERIOD + Self::MOST).map(of).collect())
    }

    pub fn at(&self, place: usize, length: usize) -> &[u8] {
        &self.0[place % Self::PERIOD..][..length]
    }

    /// Writes what follows after `from` until `to`, or as much as the other end takes.
    pub fn write(&self, mut end: &UnixStream, from: usize, to: usize) -> usize {
        let mut at = from;
        while at < to {
            match end.write(self.at(at, Self::MOST.min(to - at))) {
                Ok(count) => at += count,
                Err(_) => break,
            }
        }
        at
    }

    /// Reads and compares, from this place on, until the connection ends. At which place that was.
    pub fn read(&self, mut end: &UnixStream, from: usize) -> usize {
        let (mut at, mut room) = (from, vec![0; Self::MOST]);
        while let Ok(count @ 1..) = end.read(&mut room) {
            assert!(room[..count] == *self.at(at, count), "other bytes from {at} on");
            at += count;
        }
        at
    }
}
