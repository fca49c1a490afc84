//! peergate: the gate in front of a local service that knows nothing of it.
//!
//! The gate is [`peergate`], everything that makes a daemon is [`peergate_daemon`]. What remains is to connect to the service
//! behind ([`upstream`]), to pass bytes both ways ([`forward`], [`direction`]), and what the configuration says of that
//! ([`settings`], [`options`], [`replies`]). [`identity`] connects as the peer.

#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod direction;
pub mod forward;
pub mod identity;
pub mod options;
pub mod replies;
pub mod settings;
pub mod upstream;
