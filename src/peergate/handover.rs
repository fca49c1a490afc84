//! What a service needs to hand its live connections to its successor through the service manager's
//! store ([`systemd::Store`](crate::systemd::Store)), besides a way to write down their state.

use std::io;
use std::os::fd::AsFd;

use crate::peer;
use crate::sys;

/// The kernel's own number for a socket: the same in every process that holds it, and given to no other
/// socket until the system goes down (SO_COOKIE, socket(7); Linux 4.12 for AF_UNIX). By it a successor tells which
/// state belongs to which of the sockets it got.
///
/// # Errors
/// What getsockopt(2) says.
pub fn cookie_of(socket: &impl AsFd) -> io::Result<u64> {
    sys::socket_cookie(socket.as_fd())
}

/// Has the kernel attach the sender's credentials to what comes on this connection from now on (SO_PASSCRED, unix(7)),
/// as [`GateConfig::pass_credentials`](crate::gate::GateConfig::pass_credentials) does from the start. Returns within how many
/// bytes, from the next to be read on, some may lack them because they came before; 0 where it was asked already.
pub fn attach_credentials(socket: &impl AsFd) -> usize {
    peer::attach_credentials(socket)
}
