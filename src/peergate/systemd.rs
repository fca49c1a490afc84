//! The service manager's side of a service: socket activation, readiness, status, watchdog, signals, the descriptor store.
//!
//! Without a service manager every message is left out, and that is no error. Only the [`Store`] reports it: it has no
//! room then. Signals, signs of life and [`request_reload`] do not depend on a service manager.
//! The protocols of sd_notify(3) and systemd.service(5) work alike on systemd 252 and later.

pub mod activation;
mod notify;
mod outlet;
mod signals;
mod store;
mod watchdog;

pub use notify::Notifier;
pub(crate) use outlet::InFlight;
pub use signals::{Request, Signals, answer_reload, request_reload};
pub use store::Store;
pub use watchdog::{Heartbeat, Monitored, Watchdog};
