//! echod: a line echo that answers only to the local users its policy names.
//!
//! The gate is [`peergate`], everything that makes a daemon is [`peergate_daemon`]. What remains is the echo: its framing
//! ([`mod@line`]), one connection's state and turns ([`echo`]), its [`settings`].

// The tests count allocations, and an allocator cannot be written without.
#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[cfg(test)]
#[path = "../../tests/support/counting.rs"]
mod counting;
pub mod echo;
pub mod line;
pub mod settings;
