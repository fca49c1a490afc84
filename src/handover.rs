//! What a service needs to hand its live connections to its successor through the service manager's
//! store ([`service::Store`](crate::service::Store)), besides a way to write down their state.

use std::io;
use std::os::fd::AsFd;

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
