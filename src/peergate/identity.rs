//! The identity of a peer: ids, what the kernel tells about a peer, systemd units, and what a policy may ask of a subject.

pub mod ids;
pub mod peer;
pub(crate) mod subject;
pub mod unit;
