//! A gate for local services: it asks the kernel which process connected, decides by a policy whether to admit the
//! connection, and records every denial.
//!
//! For services on AF_UNIX stream sockets. The gate judges each connection by a [policy], keeps [limits](permits), and
//! writes records to the systemd [journal]. It knows no protocol: an admitted connection is handed to the service.
//!
//! # The path of one connection
//!
//! 1. [`activation`] takes over the listening sockets that systemd passed.
//! 2. [`peer`] asks the kernel for the credentials of the process that connected: [`Peer`].
//! 3. [`policy`] gives a [`Verdict`]: admitted by a rule, or denied.
//! 4. [`permits`] gives a [`Permit`], or the limit that is reached.
//! 5. [`audit`] counts the verdict and keeps the record. [`journal`] writes it.
//! 6. [`gate`] does all of this, and closes in order the connections that it turns away. It is a value that a service polls
//!    ([`Gate`]), or a thread ([`Door`]). A service with another runtime can also call the parts itself.
//!
//! An admitted connection is a [`Stream`]. A peer may send file descriptors with its data, and with an ordinary socket it
//! could make a read or a close last for hours ([`fd_passing`]).
//!
//! [`systemd`] is for the service manager: readiness, watchdog, signals, reload, the file descriptor store.
//!
//! The names that most services need are at the root of the crate.
//!
//! # A service behind the gate
//!
//! A whole service, which admits its own user and alice:
//!
//! ```no_run
//! use std::io::Write;
//!
//! use peergate::{Policy, Rule, Uid, User};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let rules = [Rule::allow("owner", ()).users([User::Me]), Rule::allow("friends", ()).users([User::named("alice")?])];
//!     peergate::serve("hello", Policy::new(rules, Uid::effective())?, |mut admission| {
//!         let _ = writeln!(admission.socket, "Hello, uid {}, by {}", admission.peer.uid(), admission.rule.name());
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! [`serve`] consists of calls that a service can make itself. This one puts a changed policy into force on a reload, and
//! has a thread for each connection:
//!
//! ```no_run
//! use std::io::{self, Read, Write};
//! use std::time::Duration;
//! use std::thread;
//!
//! use peergate::{Admission, Audit, Door, Notifier, Policy, Request, Setup, Signals, Uid, Writer, activation};
//! use peergate::policy_file;
//!
//! fn read_policy() -> Result<Policy<()>, policy_file::Faults> {
//!     policy_file::load::<(), ()>("/etc/hello.toml", Uid::effective()).map(|loaded| loaded.policy)
//! }
//!
//! fn talk(mut admission: Admission<()>) -> io::Result<()> {
//!     admission.socket.set_nonblocking(false)?; // this thread may wait
//!     let mut word = [0; 64];
//!     let length = admission.socket.read(&mut word)?;
//!     admission.socket.write_all(&word[..length]) // the connection counts until admission.permit is dropped
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let passed = activation::adopt(|_| false)?; // before there is a second thread
//!     let signals = Signals::catch()?;
//!     let audit = Audit::default();
//!     let setup = Setup::new(passed.listeners, read_policy()?, audit.clone())?;
//!     let journal = Writer::start(&audit, "hello")?;
//!     let mut door = Door::open(setup, |admission| _ = thread::spawn(|| talk(admission)))?;
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
//! # The gate's parts in another runtime
//!
//! A function that takes a socket takes [`AsFd`](std::os::fd::AsFd): a socket of tokio serves as well as one of the
//! standard library (`examples/tokio_echo.rs`).
//!
//! # Requirements
//!
//! Linux 5.3 or later; [`peer`] says which fact needs which kernel. Units need Linux 6.5: before it an allow rule with
//! units matches no peer, and a deny rule with units matches as if it had none. Activation, the journal and the file
//! descriptor store need systemd 252 or later. Without systemd [`activation::bind`] makes a listener, records go to
//! standard error, messages to the service manager are left out, and signals work as with it.
//!
//! No public function panics.

#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
// These macros panic when a write fails.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
#![warn(missing_debug_implementations)]

pub mod audit;
mod clock;
mod deferred_close;
pub mod escape;
pub mod fd_passing;
pub mod gate;
pub mod handover;
pub mod identity;
pub mod journal;
mod memory;
pub mod permits;
pub mod policy;
pub mod policy_file;
mod serve;
mod stderr;
mod sys;
pub mod systemd;
mod wakeup;

pub use audit::Audit;
#[doc(hidden)]
pub use clock::poll_timeout;
pub use fd_passing::Stream;
pub use gate::{Admission, Door, Gate, GateConfig, Setup};
pub use identity::subject::{Login, Subject};
pub use identity::{ids, peer, unit};
pub use ids::{Gid, Uid};
pub use journal::Writer;
pub use memory::return_memory;
pub use peer::Peer;
pub use permits::{Limits, Permit, Permits, Terms};
pub use policy::{Group, Policy, Rule, User, Verdict};
pub use serve::serve;
pub use systemd::activation::{self, Listener};
pub use systemd::{Notifier, Request, Signals};
pub use wakeup::Wakeup;
