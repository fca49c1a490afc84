//! The program: the proxy as a daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use peergate_proxy::forward::Forward;

fn main() -> ExitCode {
    peergate_daemon::main::<Forward>()
}
