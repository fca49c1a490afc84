//! What a service needs, beside the descriptor store ([`systemd::Store`](crate::systemd::Store)), to pass live connections
//! to its next process.

use std::io;
use std::os::fd::AsFd;

use crate::peer;
use crate::sys;

/// The kernel's number for a socket (SO_COOKIE, socket(7); Linux 4.12 for AF_UNIX). It is the same in every process, and no
/// other socket gets it until the system is rebooted. The next process uses it to find the state of each socket.
///
/// # Errors
/// What getsockopt(2) reports.
pub fn cookie_of(socket: &impl AsFd) -> io::Result<u64> {
    sys::socket_cookie(socket.as_fd())
}

/// Makes the kernel attach the sender's credentials to data that arrives on this connection from now on (SO_PASSCRED,
/// unix(7)), as [`GateConfig::pass_credentials`](crate::gate::GateConfig::pass_credentials) does from the start. Returns how
/// many bytes, counted from the next one read, may have arrived before and lack them; 0 if the option was set already.
pub fn attach_credentials(socket: &impl AsFd) -> usize {
    peer::attach_credentials(socket)
}
