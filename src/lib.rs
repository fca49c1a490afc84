//! peergate
pub mod activation;
pub mod audit;
pub mod gate;
pub mod handover;
pub mod ids;
pub mod journal;
pub mod limits;
pub mod peer;
pub mod policy;
pub mod service;
mod sys;
pub mod unit;

pub use peer::Peer;
