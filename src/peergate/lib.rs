//! The gate in front of a local service: who is on the other end, may they in, and a record of who was
//! turned away.
//!
//! A service on an AF_UNIX stream socket can ask the kernel who connected. This library asks, judges the
//! answer by a [policy], keeps [limits](permits), and records every verdict in the systemd [journal]. It does not
//! know what happens behind the gate; `echod`, the echo service in this package, is only its first user.
//!
//! # The path of one connection
//!
//! 1. [`activation`] adopts the listening sockets that systemd passed.
//! 2. [`peer`] asks the kernel who connected: [`Peer`].
//! 3. [`policy`] gives a [`Verdict`]: admitted by a rule, or denied.
//! 4. [`permits`] hands out a [`Permit`], or says which limit is in the way.
//! 5. [`audit`] counts every verdict and keeps the record, [`journal`] writes it.
//! 6. [`gate`] does all that on a thread of its own, and sees off whoever is turned away. A service with
//!    another runtime leaves it out and calls the others itself.
//!
//! In either case the connection is a [`Stream`]: strangers may send file descriptors along with their data, and with a
//! bare socket it could take hours to read from it or to close it ([`fd_passing`]).
//!
//! [`systemd`] is the service manager's side: readiness, watchdog, signals, reload, the descriptor store.
//!
//! The names that most services need are here at the root; the modules hold the rest.
//!
//! # A service behind the gate
//!
//! The whole of it; who may in are its own user and alice:
//!
//! ```no_run
//! use std::io::Write;
//!
//! use peergate::{Policy, Rule, Uid, User};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let rules = [Rule::allow("owner", ()).users([User::Me]), Rule::allow("friends", ()).users([User::named("alice")?])];
//!     peergate::serve("hello", Policy::new(rules, Uid::effective())?, |mut guest| {
//!         let _ = writeln!(guest.socket, "Hello, uid {}, by {}", guest.peer.uid(), guest.rule.name());
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! [`serve`] is made of calls that a service can make itself, to do something else in between: to put a changed policy
//! into force, say, and to give each guest a thread.
//!
//! ```no_run
//! use std::io::{self, Read, Write};
//! use std::time::Duration;
//! use std::thread;
//!
//! use peergate::{Admission, Audit, Door, Notifier, Policy, Request, Setup, Signals, Uid, Writer, activation};
//! use peergate::policy::file;
//!
//! fn read_policy() -> Result<Policy<()>, file::Faults> {
//!     file::load::<(), ()>("/etc/hello.toml", Uid::effective()).map(|loaded| loaded.policy)
//! }
//!
//! fn talk(mut guest: Admission<()>) -> io::Result<()> {
//!     guest.socket.set_nonblocking(false)?; // on a thread of its own it may wait
//!     let mut word = [0; 64];
//!     let length = guest.socket.read(&mut word)?;
//!     guest.socket.write_all(&word[..length]) // guest.permit, its place in the limits, is taken until it returns
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let passed = activation::adopt(|_| false)?; // before there is a second thread
//!     let signals = Signals::catch()?;
//!     let audit = Audit::default();
//!     let setup = Setup::new(passed.listeners, read_policy()?, audit.clone())?;
//!     let journal = Writer::start(&audit, "hello")?;
//!     let mut door = Door::open(setup, |guest| _ = thread::spawn(|| talk(guest)))?;
//!     let notifier = Notifier::from_env();
//!     notifier.ready("serving");
//!     while let Request::Reload { .. } = signals.wait()? {
//!         notifier.reloading();
//!         match read_policy() {
//!             Ok(policy) => _ = door.set_policy(policy), // for the very next connection
//!             Err(faults) => eprintln!("{faults}"),
//!         }
//!         notifier.ready("serving");
//!     }
//!     door.shut();
//!     journal.finish(Duration::from_secs(1));
//!     Ok(())
//! }
//! ```
//!
//! # The gate's parts, under another runtime
//!
//! Everything that takes a socket takes [`AsFd`](std::os::fd::AsFd), so it may be tokio's as well as the standard
//! library's (`examples/tokio_echo.rs`):
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use peergate::{Peer, Policy, Rule, Uid, User, Verdict};
//!
//! let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
//!
//! let (ours, _theirs) = UnixStream::pair()?;
//! match policy.decide(&Peer::of(&ours)?) {
//!     Verdict::Admitted(rule) => assert_eq!(rule.name().as_str(), "allow.owner"),
//!     Verdict::Denied(_) => unreachable!("we are the owner"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it rests on
//!
//! Linux 5.3 or later ([`peer`] says which fact needs which kernel) and, for activation, the journal and the
//! descriptor store, systemd 252 or later. Units need Linux 6.5: on an older one an allow rule with units matches
//! nobody, and a deny rule with units everybody whom its other keys match. Where there is no systemd,
//! [`activation::bind`] makes a listener, records go to standard error, and nobody hears of readiness; signals are caught
//! all the same. No public function panics.

#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
// They panic where writing fails.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
#![warn(missing_debug_implementations)]

pub mod audit;
mod clock;
mod deferred_close;
pub mod escape;
pub mod fd_passing;
pub mod gate;
pub mod handover;
pub mod ids;
pub mod journal;
mod memory;
pub mod peer;
pub mod permits;
pub mod policy;
mod serve;
mod stderr;
mod subject;
mod sys;
pub mod systemd;
pub mod unit;
mod wakeup;

pub use audit::Audit;
#[doc(hidden)]
pub use clock::poll_timeout;
pub use fd_passing::Stream;
pub use gate::{Admission, Door, Gate, GateConfig, Setup};
pub use ids::{Gid, Uid};
pub use journal::Writer;
pub use memory::return_memory;
pub use peer::Peer;
pub use permits::{Limits, Permit, Permits, Terms};
pub use policy::{Group, Policy, Rule, User, Verdict};
pub use serve::serve;
pub use subject::Subject;
pub use systemd::activation::{self, Listener};
pub use systemd::{Notifier, Request, Signals};
pub use wakeup::Wakeup;
