//! A gate for local services: it asks the kernel which process connected, decides by a policy whether to admit the
//! connection, and records every denial.
//!
//! For services on AF_UNIX stream sockets. The gate judges each connection by a [policy], keeps [limits](permits), and
//! writes records to the systemd [journal]. It knows no protocol: an admitted connection is handed to the service.
//!
//! # A service in a few lines
//!
//! A filter with a thread for each connection. Its policy is a file, which a reload (SIGHUP) puts in force for live
//! connections too:
//!
//! ```no_run
//! use std::io::{BufRead, Write};
//!
//! use peergate::{Error, Service};
//!
//! fn main() -> Result<(), Error> {
//!     Service::<()>::from_systemd("shout").policy_file("/etc/shout.toml").serve_threads(|connection| {
//!         let mut line = String::new();
//!         while connection.read_line(&mut line)? > 0 {
//!             connection.write_all(line.to_uppercase().as_bytes())?;
//!             line.clear();
//!         }
//!         Ok(())
//!     })
//! }
//! ```
//!
//! ```toml
//! # /etc/shout.toml
//! [allow.operators]
//! groups = ["adm"]
//! ```
//!
//! To try it, `systemd-socket-activate -l /tmp/shout.sock target/debug/shout` plays the service manager, and
//! `nc -U /tmp/shout.sock` is a client. The socket has the mode 0644: without a `chmod 666 /tmp/shout.sock` other users are
//! refused by connect(2), before the policy is asked. The program takes over the process with the first connection: from then on
//! `kill -HUP` to it is a reload (before, that ends `systemd-socket-activate`), and a fault in the policy's file shows only then.
//! Without a journal, records go to standard error. [`service`] has the units for a system.
//!
//! The same on tokio, with axum (feature `axum`); a rule with `may-write = true` lets its peers write:
//!
//! ```toml
//! # Cargo.toml
//! [dependencies]
//! axum = "0.8"
//! peergate = { version = "0.1", features = ["axum"] }
//! serde = { version = "1", features = ["derive"] }
//! ```
//!
//! ```no_run
//! # #[cfg(feature = "axum")] mod shown {
//! use axum::{Router, routing::{get, post}};
//! use peergate::{Error, Service, Session, Terms, axum::require, gate::Replies};
//!
//! #[derive(Default, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
//! struct Access {
//!     may_write: bool,
//! }
//!
//! impl Terms for Access {}
//!
//! async fn whoami(session: Session<Access>) -> String {
//!     format!("uid {}\n", session.uid())
//! }
//!
//! fn main() -> Result<(), Error> {
//!     let write = post(|| async { "taken\n" }).layer(require(|access: &Access| access.may_write));
//!     let app = Router::new().route("/whoami", get(whoami)).route("/note", write);
//!     let service = Service::<Access>::from_systemd("note").policy_file("/etc/note.toml").replies(Replies::http());
//!     service.block_on(|gate| async move {
//!         axum::serve(gate.listener(), app.into_make_service_with_connect_info::<Session<Access>>())
//!             .with_graceful_shutdown(gate.stopping())
//!             .await
//!     })
//! }
//! # }
//! ```
//!
//! # Which entry point
//!
//! | a service with | takes | feature |
//! | --- | --- | --- |
//! | a thread for each connection | [`Service::serve_threads`], [`Connection`] | |
//! | an answer that is known at once | [`Service::serve_inline`] | |
//! | tokio | [`Service::block_on`](service/struct.Service.html#method.block_on), [`tokio`](tokio/index.html) | `tokio` |
//! | axum, tonic, hyper | [`axum`](axum/index.html) | `axum` |
//! | restarts that lose no live connection, with threads or on tokio | [`Service::hand_over`](service/struct.Service.html#method.hand_over) | `restart` |
//! | an event loop of its own | [`Gate`], a value that is polled | |
//! | a main loop of its own | [`Door`], a thread around a gate; [`Signals`], [`Notifier`], [`Writer`] | |
//! | an accept loop of its own | [`Peer`], [`Policy`], [`Permits`], [`Audit`] | |
//!
//! A whole daemon with a configuration file, `check`, `explain` and `report` is another crate's affair, `peergate-daemon`.
//! Without features nothing of tokio is compiled. All features work with Rust 1.85.
//!
//! # The path of one connection
//!
//! 1. [`activation`] takes over the listening sockets that systemd passed.
//! 2. [`peer`] asks the kernel for the credentials of the process that connected: [`Peer`].
//! 3. [`policy`] gives a [`Verdict`]: admitted by a rule, or denied.
//! 4. [`permits`] gives a [`Permit`], or the limit that is reached.
//! 5. [`audit`] counts the verdict and keeps the record. [`journal`] writes it.
//! 6. [`gate`] does all of this, and closes in order the connections that it turns away.
//! 7. [`session`] is an admitted connection from then on, for as long as it lives. [`service`] keeps them all.
//!
//! An admitted connection is a [`Stream`]. A peer may send file descriptors with its data, and with an ordinary socket it
//! could make a read or a close last for hours ([`fd_passing`]).
//!
//! [`systemd`] is for the service manager: readiness, watchdog, signals, reload, the file descriptor store. [`handover`] leaves
//! live connections to the next process.
//!
//! The names that most services need are at the root of the crate.
//!
//! A function that takes a socket takes [`AsFd`](std::os::fd::AsFd): a socket of another runtime serves as well as one of the
//! standard library.
//!
//! # Requirements
//!
//! Linux 5.3 or later; [`peer`] says which fact needs which kernel. Units need Linux 6.5: before it an allow rule with
//! units matches no peer, and a deny rule with units matches as if it had none. Activation, the journal and the file
//! descriptor store need systemd 252 or later. Without systemd [`activation::bind`] makes a listener, records go to
//! standard error, messages to the service manager are left out, and signals work as with it.
//!
//! No public function panics.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
// These macros panic when a write fails.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
#![warn(missing_debug_implementations)]

pub mod audit;
#[cfg(feature = "axum")]
pub mod axum;
mod clock;
pub mod connect_as;
mod connection;
mod deferred_close;
pub mod escape;
pub mod fd_passing;
pub mod gate;
pub mod handover;
pub mod identity;
pub mod journal;
mod memory;
pub mod permits;
#[doc(hidden)]
pub mod pipe;
pub mod policy;
pub mod policy_file;
pub mod service;
pub mod session;
mod stderr;
mod sys;
pub mod systemd;
#[cfg(feature = "tokio")]
pub mod tokio;
mod wakeup;

pub use audit::Audit;
#[doc(hidden)]
pub use clock::poll_timeout;
pub use connection::Connection;
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
pub use service::{Error, Service};
pub use session::Session;
pub use systemd::activation::{self, Listener};
pub use systemd::{Notifier, Request, Signals};
pub use wakeup::Wakeup;
