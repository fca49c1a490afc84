//! The program: the echo as a daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use echod::echo::Echo;

fn main() -> ExitCode {
    peergate_daemon::main::<Echo>()
}
