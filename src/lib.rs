//! The gate in front of a local service: who is on the other end, may they in, and a record of who was
//! turned away.
//!
//! A service on an AF_UNIX stream socket can ask the kernel who connected. This library asks, judges the
//! answer by a [policy], keeps [limits], and records every verdict in the systemd [journal]. It does not
//! know what happens behind the gate; `echod`, the echo service in this package, is only its first user.
//!
//! # The path of one connection
//!
//! 1. [`activation`] adopts the listening sockets that systemd passed.
//! 2. [`peer`] asks the kernel who connected: [`Peer`].
//! 3. [`policy`] gives a [`Verdict`](policy::Verdict): admitted by a rule, or denied.
//! 4. [`limits`] hands out a [`Permit`](limits::Permit), or says which limit is in the way.
//! 5. [`audit`] counts every verdict and keeps the record, [`journal`] writes it.
//! 6. [`gate`] does all that on a thread of its own, and sees off whoever is turned away. A service with
//!    another runtime leaves it out and calls the others itself.
//!
//! [`service`] is the service manager's side: readiness, watchdog, signals, reload, the descriptor store.
//!
//! # A service behind the gate
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use peergate::ids::Uid;
//! use peergate::policy::{Policy, Rule, User, Verdict};
//! use peergate::Peer;
//!
//! let me = Uid::new(nix::unistd::geteuid().as_raw());
//! let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], me)?;
//!
//! let (ours, _theirs) = UnixStream::pair()?;
//! match policy.decide(&Peer::of(&ours)?) {
//!     Verdict::Admitted(rule) => println!("welcome, by {}", rule.name()),
//!     Verdict::Denied(_) => println!("no"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod activation;
pub mod audit;
pub mod gate;
pub mod handover;
pub mod ids;
pub mod journal;
pub mod limits;
pub mod pacing;
pub mod peer;
pub mod policy;
pub mod service;
mod sys;
pub mod unit;

pub use peer::Peer;
