//! peergate
pub mod ids;
pub mod policy;
pub mod unit;
