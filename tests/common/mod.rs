//! Runs the program as a service manager would, and connects to it as clients do.
//!
//! [`Echod`] is the real program, with its sockets passed at descriptors 3, 4, ... [`Manager`] implements systemd's side
//! of sd_notify(3) and the file descriptor store. [`Journald`] receives the records. [`Client`] compares what came back,
//! and how the connection ended. [`PeerProcess`] is a peer with another user or group: a real process.
//!
//! Every wait is for an event, and fails the test after [`PATIENCE`]. None is for a time to pass.

// Each test program uses some of the helpers.
#![allow(dead_code, unused_imports)]

pub mod behind;
mod client;
mod database;
mod dir;
mod fds;
mod journald;
mod left;
mod manager;
mod memory_group;
mod peer;
mod program;
pub mod records;
mod wait;

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use client::{Client, End, answer, clog_all, show};
pub use database::Database;
pub use dir::Place;
pub use fds::{duplicate, lingering, receive, send_along, send_fds};
pub use journald::{Entry, Journald, stands_for};
pub use left::{Message, change_left, left};
pub use manager::{Manager, Received};
pub use memory_group::MemoryGroup;
pub use peer::{PeerProcess, Rush, flood, peer_program};
pub use program::{
    Echod, PROGRAM, Start, copy_program, cpu, descriptors, expect_descriptors, hung_user_database, memory, summed,
};
pub use wait::{Shared, eventually};

/// The longest that a test waits for an event.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The message to a denied peer.
pub const DENIED: &[u8] = b"Unauthorized access\n";
/// The message to a peer over a limit.
pub const BUSY: &[u8] = b"Too many connections\n";
/// The message to a peer that sent too long a line. It follows the echo of the lines before.
pub const TOO_LONG: &[u8] = b"Line too long\n";

/// A policy that admits only the user that runs the test.
pub const OWNER: &str = "[allow.owner]\nusers = [\"self\"]\n";
/// A policy that denies every peer of a test: it admits only a user that no test uses.
pub const DENY_ALL: &str = "[allow.somebody]\nusers = [64999]\n";

/// Users for peers. No user database has them.
pub const ALICE: u32 = 64001;
pub const BOB: u32 = 64002;

/// Prints a figure that a test has measured, to standard error itself: the test harness hides what a passed test prints.
#[macro_export]
macro_rules! figure {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "        {}", format_args!($($what)*));
    }};
}

/// For tests that need other users, mounts or control groups. Without root they fail; none is skipped.
pub fn needs_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes other users' processes: run it as root");
}

/// A number that a run by hand may raise with an environment variable.
pub fn setting(name: &str, otherwise: usize) -> usize {
    std::env::var(name).map_or(otherwise, |number| number.parse().expect("a number"))
}

/// Raises the limit on open files of this process and of the processes it starts.
pub fn raise_descriptor_limit(needed: u64) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(
        hard >= needed,
        "this test needs {needed} file descriptors, and the hard limit is {hard}: ulimit -Hn {needed}"
    );
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
}
