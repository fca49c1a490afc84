//! Descriptors that peers send along (SCM_RIGHTS, unix(7)): nobody wants them, and they must not even be thrown away
//! by a thread that others wait for.
//!
//! A message that is read without room for its descriptors has them closed by the kernel, in the thread that reads; one
//! that is never read, in the thread that closes the socket. Whoever sent them chooses how long that takes: a TCP
//! socket with unsent data and SO_LINGER (socket(7)) is closed for as long as it says, hours if need be. So:
//!
//! - From Linux 6.16 on the kernel is told to refuse them (SO_PASSRIGHTS). The sender gets EPERM.
//! - Where it could not be told, or was told only after the peer may have sent some, one looks before reading
//!   ([`Baggage::look`]): a peek takes nothing. A peer whose data carries descriptors is read from no more.
//! - Its socket goes to a thread that nobody waits for ([`Disposal`]), which interrupts itself every millisecond: to
//!   linger is over at a signal.
//!
//! For the gate, and for whoever reads from the connections that it admits.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::sys;

/// How often a close that takes its time is interrupted.
const INTERRUPTED_EVERY: Duration = Duration::from_millis(1);

/// Whether descriptors may lie among what is unread on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baggage {
    /// The kernel refused them before the peer could send anything.
    Never,
    /// The kernel refuses them by now. What was sent earlier may carry some.
    Earlier,
    /// The kernel cannot refuse them.
    Possible,
}

impl Baggage {
    /// Has the kernel refuse descriptors from those who connect to this listener from now on, where it can.
    pub fn refuse_from_all(listener: &impl AsFd) {
        let _ = sys::set_option(listener.as_fd(), sys::SO_PASSRIGHTS, 0);
    }

    /// Has the kernel refuse descriptors on a connection that was just accepted, and says what that leaves possible.
    /// Urgent data (MSG_OOB) becomes ordinary data: no peek would see what comes with it, and nothing is to be lost.
    /// Where descriptors are possible, other ancillary data than credentials, and without `credentials` these too, are
    /// turned off: a peek could not tell one from the other. With `credentials`, SO_PASSCRED is left to whoever asks
    /// for it.
    pub fn of_new(socket: &impl AsFd, credentials: bool) -> Self {
        let socket = socket.as_fd();
        let _ = sys::set_option(socket, libc::SO_OOBINLINE, 1);
        if let Ok(0) = sys::option(socket, sys::SO_PASSRIGHTS) {
            return Self::Never;
        }
        Self::only_credentials(socket, credentials)
    }

    /// As [`of_new`](Self::of_new) for a connection that somebody has had before: what the kernel refuses today it may
    /// not have refused when its peer sent what is still unread.
    pub fn of_known(socket: &impl AsFd, credentials: bool) -> Self {
        let socket = socket.as_fd();
        let _ = sys::set_option(socket, libc::SO_OOBINLINE, 1);
        let _ = sys::set_option(socket, libc::SO_PASSCRED, credentials.into());
        Self::only_credentials(socket, credentials)
    }

    fn only_credentials(socket: BorrowedFd<'_>, credentials: bool) -> Self {
        let refused = sys::set_option(socket, sys::SO_PASSRIGHTS, 0).is_ok();
        if !credentials {
            let _ = sys::set_option(socket, libc::SO_PASSCRED, 0);
        }
        let _ = sys::set_option(socket, libc::SO_PASSSEC, 0);
        let _ = sys::set_option(socket, libc::SO_PASSPIDFD, 0);
        if refused { Self::Earlier } else { Self::Possible }
    }

    /// Whether one has to look before reading, and may not simply close what has not been read to its end.
    pub fn is_possible(self) -> bool {
        self != Self::Never
    }

    /// How many bytes may be read now, at least one and at most `buffer` has room for, without taking descriptors; `None`
    /// where some lie among them, or anywhere behind them. Overwrites `buffer`. `credentials`: whether the socket has
    /// SO_PASSCRED.
    ///
    /// # Errors
    /// What recvmsg(2) says; EAGAIN where nothing is there. Never waits.
    pub fn look(&mut self, socket: &impl AsFd, buffer: &mut [u8], credentials: bool) -> io::Result<Option<usize>> {
        if *self == Self::Never {
            return Ok(Some(buffer.len()));
        }
        // Room that no credentials fill would be filled with descriptors.
        let credentials = credentials && matches!(sys::option(socket.as_fd(), libc::SO_PASSCRED), Ok(1));
        match sys::peek(socket.as_fd(), buffer, credentials) {
            Ok((_, true)) => Ok(None),
            // At the end of file there is nothing to take either.
            Ok((count, false)) => Ok(Some(count.max(1))),
            Err(error) => {
                if error.kind() == io::ErrorKind::WouldBlock && *self == Self::Earlier {
                    *self = Self::Never;
                }
                Err(error)
            }
        }
    }

    /// Whether descriptors lie anywhere in the queue of this socket, as far as /proc/self/fdinfo tells (Linux 5.10):
    /// looks at all of it, where [`look`](Self::look) sees what comes next.
    pub fn lies_with(self, socket: &impl AsFd) -> bool {
        self.is_possible()
            && fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.as_fd().as_raw_fd())).is_ok_and(|told| {
                let number = told.lines().find_map(|line| line.strip_prefix("scm_fds:"));
                number.is_some_and(|number| number.trim() != "0")
            })
    }
}

/// Closes what may be slow to close, on a thread of its own. That thread exists from the first time on that there is
/// something for it.
#[derive(Clone, Debug, Default)]
pub struct Disposal {
    way: Arc<Mutex<Option<Sender<OwnedFd>>>>,
}

impl Disposal {
    /// Takes the socket from whoever must not wait, and closes it.
    pub fn take(&self, socket: OwnedFd) {
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = match way.take() {
            Some(sender) => sender,
            None => {
                let (sender, receiver) = channel();
                // No thread for it: then its end of the channel is gone, and sending fails.
                let _ = thread::Builder::new().name("disposal".to_owned()).spawn(move || dispose(&receiver));
                sender
            }
        };
        // Without a thread there is nobody else to close it.
        if sender.send(socket).is_ok() {
            *way = Some(sender);
        }
    }
}

fn dispose(sockets: &Receiver<OwnedFd>) {
    // Without interruptions it takes as long as it takes.
    let interruptions = sys::Interruptions::of_this_thread().ok();
    let every = |period| interruptions.as_ref().map_or(Ok(()), |one| one.every(period));
    while let Ok(socket) = sockets.recv() {
        let _ = every(INTERRUPTED_EVERY);
        drop(socket);
        sockets.try_iter().for_each(drop);
        let _ = every(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

    /// A TCP connection with unsent data whose close lingers for hours, and its other end.
    fn lingering() -> (TcpStream, TcpStream) {
        use std::io::Write;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let other = listener.accept().unwrap().0;
        one.set_nonblocking(true).unwrap();
        while one.write(&[0; 65536]).is_ok() {}
        one.set_nonblocking(false).unwrap();
        setsockopt(&one, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 10_000 }).unwrap();
        (one, other)
    }

    fn send_along(through: &UnixStream, what: &impl AsRawFd) -> nix::Result<usize> {
        let fds = [what.as_raw_fd()];
        let part = [io::IoSlice::new(b"with it")];
        sendmsg::<()>(through.as_raw_fd(), &part, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)
    }

    #[test]
    fn descriptors_are_seen_before_they_are_taken() {
        use std::io::Write;
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        for credentials in [false, true] {
            sys::set_option(ours.as_fd(), libc::SO_PASSCRED, credentials.into()).unwrap();
            theirs.write_all(b"before ").unwrap();
            let mut baggage = Baggage::of_new(&ours, credentials);
            assert!(baggage.is_possible() && !baggage.lies_with(&ours));
            let mut buffer = [0; 64];
            assert_eq!(baggage.look(&ours, &mut buffer, credentials).unwrap(), Some(7));
            sys::set_option(ours.as_fd(), sys::SO_PASSRIGHTS, 1).unwrap();
        }
        std::io::Read::read_exact(&mut ours, &mut [0; 14]).unwrap();
        send_along(&theirs, &theirs).unwrap();
        for (credentials, attached) in [(false, false), (true, false), (true, true)] {
            sys::set_option(ours.as_fd(), libc::SO_PASSCRED, attached.into()).unwrap();
            let mut baggage = Baggage::of_new(&ours, credentials);
            assert!(baggage.lies_with(&ours));
            let mut buffer = [0; 64];
            assert_eq!(baggage.look(&ours, &mut buffer, credentials).unwrap(), None);
            sys::set_option(ours.as_fd(), sys::SO_PASSRIGHTS, 1).unwrap();
        }
    }

    #[test]
    fn where_the_kernel_refuses_them_looking_ends_when_nothing_is_left_from_before() {
        use std::io::{Read, Write};
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(b"x").unwrap();
        let mut baggage = Baggage::of_new(&ours, false);
        // Before Linux 6.16 it cannot.
        let afterwards = if baggage == Baggage::Earlier { Baggage::Never } else { Baggage::Possible };
        assert_eq!(send_along(&theirs, &theirs).is_err(), baggage == Baggage::Earlier);
        let mut buffer = [0; 64];
        if baggage == Baggage::Earlier {
            assert_eq!(baggage.look(&ours, &mut buffer, false).unwrap(), Some(1));
            assert_eq!(ours.read(&mut buffer).unwrap(), 1);
            assert_eq!(baggage.look(&ours, &mut buffer, false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert_eq!(baggage, afterwards);
        assert_eq!(Baggage::of_new(&ours, false), afterwards);
    }

    #[test]
    fn a_close_that_would_take_hours_keeps_nobody_waiting() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (bomb, other_end) = lingering();
        send_along(&theirs, &bomb).unwrap();
        drop(bomb);
        let disposal = Disposal::default();
        disposal.take(ours.into());
        // The next one's turn comes only when that is closed.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        disposal.take(ours.into());
        use std::io::Read;
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        drop(other_end);
    }
}
