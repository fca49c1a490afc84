//! The statuses that a daemon exits with, as sysexits.h has them.

/// The command line makes no sense.
pub const USAGE: u8 = 64;
/// A file that the command line names is missing or cannot be read.
pub const NO_INPUT: u8 = 66;
/// Something that is needed is not there.
pub const UNAVAILABLE: u8 = 69;
/// The system refused.
pub const OS_ERROR: u8 = 71;
/// Reading or writing failed.
pub const IO_ERROR: u8 = 74;
/// What the other side, systemd, did is against the protocol.
pub const PROTOCOL: u8 = 76;
/// The configuration is faulty.
pub const CONFIG: u8 = 78;
