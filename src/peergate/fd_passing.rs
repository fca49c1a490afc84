//! Descriptor passing (SCM_RIGHTS, unix(7)): descriptors from a peer are not accepted, and closing them must not delay the
//! service.
//!
//! When a message is read without room for its descriptors, the kernel closes them in the reading thread. If it is never
//! read, the kernel closes them in the thread that closes the socket. The peer decides how long that takes: close(2) of a
//! TCP socket with unsent data waits for the time in SO_LINGER (socket(7)), which may be hours. A [`Stream`] prevents
//! that:
//!
//! - From Linux 6.16 on the kernel refuses descriptors (SO_PASSRIGHTS, set on a listener when it is
//!   [adopted](crate::activation::adopt) or [bound](crate::activation::bind)). The sender gets EPERM.
//! - If the kernel cannot refuse them, or the peer may have sent some before the option was set (it connected before the
//!   service was started), each read peeks first, which takes nothing. Data before the descriptors is read, data after
//!   them is not.
//! - A socket that may hold unread descriptors is emptied and closed by threads of its own (`deferred_close`). A
//!   signal ends the waiting for SO_LINGER, and these threads send themselves one all the time.

use std::fmt;
use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    ControlMessage, MsgFlags, UnixAddr, getpeername, recv, send, sendmsg, setsockopt, shutdown, sockopt,
};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use crate::deferred_close::{close_later, drop_later};
use crate::ids::Uid;
use crate::peer;
use crate::sys;

/// Whether unread data on a connection may carry descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Passing {
    /// No: the kernel has refused them from the start, or nothing is unread and no more can come.
    Refused,
    /// As `Refused`, and SO_OOBINLINE is yet to be set: a connection that is never read from does without.
    RefusedUnread,
    /// The kernel refuses them now. Data sent earlier may carry some.
    MaybeQueued,
    /// The kernel cannot refuse them.
    Possible,
}

/// A connection that takes no descriptors from its peer. Dropping it never waits until descriptors sent by the peer are
/// closed.
///
/// It reads and writes like a [`UnixStream`], non-blocking if the socket is (the socket of an
/// [`Admission`](crate::Admission) is). When the next unread data carries descriptors, every read fails with
/// [`InvalidData`](io::ErrorKind::InvalidData): then drop it. Data before them is read first.
///
/// There is no `try_clone`: what may still come with descriptors is known to one reader. Several threads write through
/// `&Stream`.
///
/// Read only through this type, from one thread at a time. Use the descriptor ([`AsFd`]) to wait (poll(2), epoll(7), tokio's
/// `AsyncFd`), to write, and to get the credentials of the peer.
pub struct Stream {
    /// `None` only while it is dropped or converted.
    fd: Option<OwnedFd>,
    guard: Guard,
}

/// How a connection is read without taking descriptors. For a type that has the socket in another form than a [`Stream`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard {
    passing: Passing,
    /// Whether the socket is to have SO_PASSCRED.
    credentials: bool,
}

/// Makes the kernel refuse descriptors from now on, if it can: on a listener those of every connection made to it, on a socket
/// those that its peer sends. On a socket that is not connected yet, none can have come before: [`Stream::accepted`] sees that,
/// and its reads never peek.
pub fn refuse(socket: &impl AsFd) {
    set_on_listener(socket, false);
}

/// Lets descriptors through on connections to this listener from now on, or makes the kernel refuse them, if it can.
pub(crate) fn set_on_listener(listener: &impl AsFd, take: bool) {
    let _ = sys::set_option(listener.as_fd(), sys::SO_PASSRIGHTS, take.into());
}

/// Descriptors that a peer has sent. Dropping them never waits until they are closed.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Closes them, on another thread.
    pub fn clear(&mut self) {
        std::mem::take(&mut self.0).into_iter().for_each(drop_later);
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}

/// Of an earlier process, which had received them.
impl From<Vec<OwnedFd>> for Descriptors {
    fn from(fds: Vec<OwnedFd>) -> Self {
        Self(fds)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        self.clear();
    }
}

/// They are the caller's to close.
impl From<Descriptors> for Vec<OwnedFd> {
    fn from(mut descriptors: Descriptors) -> Self {
        std::mem::take(&mut descriptors.0)
    }
}

/// Whether the kernel refuses descriptors on every connection that is made to this listener from now on.
///
/// A connection has the listener's option from connect(2) on, which copies it and fills the listener's queue under one lock
/// of the listener. getpeername(2) takes that lock too. So when this returns, each connection with an earlier value of the
/// option is in the queue.
pub(crate) fn refuses_from_all(listener: &impl AsFd) -> bool {
    let fd = listener.as_fd();
    let is_refusing = sys::option(fd, sys::SO_PASSRIGHTS).is_ok_and(|allowed| allowed == 0);
    let _ = getpeername::<UnixAddr>(fd.as_raw_fd());
    is_refusing
}

impl Stream {
    /// A connection that was just accepted, also by other code. [`Listener::accept`](crate::Listener::accept) gives one too.
    ///
    /// Urgent data (MSG_OOB) becomes ordinary data, because a peek does not see descriptors that come with it. If
    /// descriptors are possible, other ancillary data is turned off, because a peek cannot tell the two apart.
    pub fn accepted(socket: impl Into<OwnedFd>) -> Self {
        Self::new(socket.into(), false)
    }

    /// As [`accepted`](Self::accepted); with `credentials`, SO_PASSCRED is left as it is.
    pub(crate) fn new(fd: OwnedFd, credentials: bool) -> Self {
        if sys::option(fd.as_fd(), sys::SO_PASSRIGHTS).is_ok_and(|allowed| allowed == 0) {
            return Self::refusing(fd, credentials);
        }
        let _ = sys::set_option(fd.as_fd(), libc::SO_OOBINLINE, 1);
        let passing = only_credentials(fd.as_fd(), credentials);
        Self::from_parts(fd, Guard { passing, credentials })
    }

    pub(crate) fn from_parts(fd: OwnedFd, guard: Guard) -> Self {
        Self { fd: Some(fd), guard }
    }

    pub(crate) fn into_parts(mut self) -> (OwnedFd, Guard) {
        self.inline_urgent_data();
        let guard = self.guard;
        (self.into(), guard)
    }

    /// As [`accepted`](Self::accepted), but descriptors are let through, and read with
    /// [`receive_with_descriptors`](Self::receive_with_descriptors). With `credentials`, SO_PASSCRED is left as it is.
    pub fn taking_descriptors(socket: impl Into<OwnedFd>, credentials: bool) -> Self {
        let fd = socket.into();
        let _ = sys::set_option(fd.as_fd(), libc::SO_OOBINLINE, 1);
        without_other_data(fd.as_fd(), credentials);
        set_on_listener(&fd, true);
        Self::from_parts(fd, Guard { passing: Passing::Possible, credentials })
    }

    /// From now on descriptors are let through, or refused again.
    pub fn take_descriptors(&mut self, take: bool) {
        self.inline_urgent_data();
        let credentials = self.guard.credentials;
        if !take {
            self.guard.passing = only_credentials(self.as_fd(), credentials);
            return;
        }
        without_other_data(self.as_fd(), credentials);
        set_on_listener(self, true);
        self.guard.passing = Passing::Possible;
    }

    /// As [`receive`](Self::receive), with the descriptors that came with the bytes, which replace what is in `descriptors`;
    /// they are close-on-exec. The bytes of a message with descriptors are never joined with bytes that came before or after
    /// it.
    ///
    /// # Errors
    /// What recvmsg(2) reports; EAGAIN if there is no data; EMFILE if the process has no numbers left for the descriptors, which
    /// are closed then.
    pub fn receive_with_descriptors(
        &mut self,
        buffer: &mut [u8],
        descriptors: &mut Descriptors,
    ) -> io::Result<(usize, Option<Uid>)> {
        descriptors.clear();
        let Self { fd: Some(fd), guard } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        let most = match guard.peek_first(fd.as_fd(), buffer, false) {
            Ok(most) => most,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => buffer.len(),
            Err(error) => return Err(error),
        };
        let sys::Received { length, fds, sender, lacks_descriptors, .. } =
            sys::receive_descriptors(fd.as_fd(), &mut buffer[..most], false)?;
        guard.note_end(length, most);
        let sender = sender.filter(|_| guard.credentials).and_then(|sender| peer::sender(&sender));
        descriptors.0 = fds;
        if lacks_descriptors {
            descriptors.clear();
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok((length, sender))
    }

    /// As [`Write::write`], and sends these descriptors with the first byte.
    ///
    /// # Errors
    /// What sendmsg(2) reports; ETOOMANYREFS if too many descriptors of this user are in flight (RLIMIT_NOFILE).
    pub fn send_with_descriptors(&self, bytes: &[u8], descriptors: &Descriptors) -> io::Result<usize> {
        let fds: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None)?)
    }

    /// As [`new`](Self::new), for a connection that was made when its listener refused descriptors already (see
    /// [`refuses_from_all`]). Makes no system call.
    pub(crate) fn refusing(fd: OwnedFd, credentials: bool) -> Self {
        Self::from_parts(fd, Guard { passing: Passing::RefusedUnread, credentials })
    }

    /// A connection that was used by another process or other code. Unread data may have been sent before the kernel
    /// refused descriptors. `credentials`: whether the kernel attaches the sender's credentials to arriving data
    /// (SO_PASSCRED), as for [`receive`](Self::receive).
    pub fn inherited(socket: impl Into<OwnedFd>, credentials: bool) -> Self {
        let fd = socket.into();
        let _ = sys::set_option(fd.as_fd(), libc::SO_OOBINLINE, 1);
        let _ = sys::set_option(fd.as_fd(), libc::SO_PASSCRED, credentials.into());
        let passing = only_credentials(fd.as_fd(), credentials);
        Self::from_parts(fd, Guard { passing, credentials })
    }

    /// A connection of an earlier process, which had it as a stream too and says what [`passing`](Self::passing) and
    /// `credentials` were. The socket still has the options that the stream has set: [`inherited`](Self::inherited), which
    /// sets them anew, takes six system calls.
    pub fn resumed(socket: impl Into<OwnedFd>, credentials: bool, passing: Passing) -> Self {
        let fd = socket.into();
        let passing = match passing {
            // The process before may have let them through.
            Passing::Possible if sys::set_option(fd.as_fd(), sys::SO_PASSRIGHTS, 0).is_ok() => Passing::MaybeQueued,
            known => known,
        };
        Self::from_parts(fd, Guard { passing, credentials })
    }

    /// For [`resumed`](Self::resumed) in the next process.
    pub fn passing(&self) -> Passing {
        self.guard.passing
    }

    /// As on kernels before 6.16. For tests.
    #[doc(hidden)]
    pub fn unrefused(socket: impl Into<OwnedFd>) -> Self {
        let fd = socket.into();
        let _ = sys::set_option(fd.as_fd(), sys::SO_PASSRIGHTS, 1);
        Self::from_parts(fd, Guard { passing: Passing::Possible, credentials: false })
    }

    /// Sets or clears SO_PASSCRED (unix(7)): the kernel attaches the sender's credentials to data that arrives from now on,
    /// as [`GateConfig::pass_credentials`](crate::gate::GateConfig::pass_credentials) makes it from the start. Returns how many
    /// bytes, counted from the next one read, may have arrived before and lack them; 0 if the option was set already.
    pub fn attach_credentials(&mut self, wanted: bool) -> usize {
        self.guard.credentials = wanted;
        if wanted {
            return peer::attach_credentials(self);
        }
        if self.may_linger() {
            // A peek would mistake credentials for descriptors.
            let _ = sys::set_option(self.as_fd(), libc::SO_PASSCRED, 0);
        }
        0
    }

    /// Reads from a socket with SO_PASSCRED (unix(7); [`GateConfig::pass_credentials`](crate::gate::GateConfig)). Returns the
    /// number of bytes and the real uid of the process that sent them; `None` if the kernel gives no uid. One call never
    /// joins data of different users. Never waits.
    ///
    /// # Errors
    /// What recvmsg(2) reports; EAGAIN if there is no data; InvalidData if descriptors come next.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Option<Uid>)> {
        let Self { fd: Some(fd), guard } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        let most = guard.peek_first(fd.as_fd(), buffer, false)?;
        let received = peer::receive(fd, &mut buffer[..most])?;
        guard.note_end(received.0, most);
        Ok(received)
    }

    /// As [`Read::read`], but never waits.
    pub(crate) fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self { fd: Some(fd), guard } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        guard.read_now(fd.as_fd(), buffer)
    }

    fn inline_urgent_data(&mut self) {
        if let Some(fd) = &self.fd {
            self.guard.inline_urgent_data(fd.as_fd());
        }
    }

    /// Whether dropping this shuts the connection down and lets another thread close the descriptor a little later. Remove
    /// it from an epoll(7) first.
    pub fn may_linger(&self) -> bool {
        self.guard.may_linger()
    }

    /// Whether any unread data of this socket carries descriptors, by /proc/self/fdinfo (Linux 5.10). A read checks only the
    /// data that comes next.
    pub fn holds_descriptors(&self) -> bool {
        // Descriptors come with at least one byte (unix(7)).
        self.may_linger()
            && sys::unread(self.as_fd()).unwrap_or(1) > 0
            && fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_raw_fd())).is_ok_and(|told| {
                let number = told.lines().find_map(|line| line.strip_prefix("scm_fds:"));
                number.is_some_and(|number| number.trim() != "0")
            })
    }

    /// Whether reads and writes return at once instead of waiting. This changes every copy of the descriptor.
    ///
    /// # Errors
    /// What fcntl(2) reports.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        let mut flags = OFlag::from_bits_truncate(fcntl(self, FcntlArg::F_GETFL)?);
        flags.set(OFlag::O_NONBLOCK, nonblocking);
        fcntl(self, FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// How long a read on a blocking socket may wait; `None`: without end. As [`UnixStream::set_read_timeout`].
    ///
    /// # Errors
    /// What setsockopt(2) reports.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(setsockopt(self, sockopt::ReceiveTimeout, &time_value(timeout))?)
    }

    /// How long a write on a blocking socket may wait; `None`: without end. As [`UnixStream::set_write_timeout`].
    ///
    /// # Errors
    /// What setsockopt(2) reports.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(setsockopt(self, sockopt::SendTimeout, &time_value(timeout))?)
    }

    /// Ends one direction or both, as [`UnixStream::shutdown`].
    ///
    /// # Errors
    /// What shutdown(2) reports.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        Ok(shutdown(self.as_raw_fd(), as_nix(how))?)
    }

    /// The standard library's type, blocking. **Only for a thread that serves one connection:** if the peer could send
    /// descriptors, it decides how long a read or the drop takes (see the [module](self)).
    ///
    /// # Errors
    /// What fcntl(2) reports.
    pub fn into_std(self) -> io::Result<UnixStream> {
        self.set_nonblocking(false)?;
        Ok(UnixStream::from(OwnedFd::from(self)))
    }
}

impl Guard {
    /// Whether unread data may carry descriptors.
    pub(crate) fn may_linger(self) -> bool {
        !matches!(self.passing, Passing::Refused | Passing::RefusedUnread)
    }

    /// Before anything else is done with the connection than to write and to close it.
    fn inline_urgent_data(&mut self, fd: BorrowedFd<'_>) {
        if self.passing == Passing::RefusedUnread {
            let _ = sys::set_option(fd, libc::SO_OOBINLINE, 1);
            self.passing = Passing::Refused;
        }
    }

    /// Reads without waiting.
    pub(crate) fn read_now(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.peek_first(fd, buffer, false)?;
        self.take(fd, &mut buffer[..most], MsgFlags::MSG_DONTWAIT)
    }

    fn take(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        let count = recv(fd.as_raw_fd(), buffer, flags)?;
        self.note_end(count, buffer.len());
        Ok(count)
    }

    /// After the end of file no descriptors can come.
    fn note_end(&mut self, count: usize, room: usize) {
        if count == 0 && room > 0 {
            self.passing = Passing::Refused;
        }
    }

    /// How many bytes may be read now without taking descriptors: at least one, and at most the length of `buffer`.
    /// Overwrites `buffer`. With `may_wait` it waits on a blocking socket.
    fn peek_first(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8], may_wait: bool) -> io::Result<usize> {
        self.inline_urgent_data(fd);
        if self.passing == Passing::Refused || buffer.is_empty() {
            return Ok(buffer.len());
        }
        // Room for ancillary data that credentials do not fill would be filled with descriptors.
        let credentials = self.credentials && matches!(sys::option(fd, libc::SO_PASSCRED), Ok(1));
        // With `MaybeQueued` an empty queue ends the peeking, so it must not wait for data.
        let waits = may_wait && self.passing == Passing::Possible;
        match sys::peek(fd, buffer, credentials, waits) {
            Ok((_, true)) => match before_descriptors(fd, credentials)? {
                0 => {
                    let message = "the peer sent file descriptors, which are not taken";
                    Err(io::Error::new(io::ErrorKind::InvalidData, message))
                }
                before => Ok(before.min(buffer.len())),
            },
            // At the end of file a read takes no descriptors either.
            Ok((count, false)) => Ok(count.max(1)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.passing == Passing::MaybeQueued => {
                self.passing = Passing::Refused;
                if may_wait { Ok(buffer.len()) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }
}

/// How many bytes come before the first unread descriptors.
///
/// One peek is not enough: it continues to the next message even when its buffer is full, so it finds descriptors anywhere
/// and counts the bytes of their message. So the first peek tells where the message with the descriptors ends. The second
/// has room for all but the last byte of that message, and stops before it.
fn before_descriptors(socket: BorrowedFd<'_>, credentials: bool) -> io::Result<usize> {
    match sys::peek_messages(socket, sys::unread(socket)?, credentials)? {
        (count, false) => Ok(count),
        (end, true) => Ok(sys::peek_messages(socket, end.saturating_sub(1), credentials)?.0),
    }
}

fn only_credentials(socket: BorrowedFd<'_>, credentials: bool) -> Passing {
    let refused = sys::set_option(socket, sys::SO_PASSRIGHTS, 0).is_ok();
    without_other_data(socket, credentials);
    if refused { Passing::MaybeQueued } else { Passing::Possible }
}

/// Turns other ancillary data off than descriptors and, if asked for, credentials.
fn without_other_data(socket: BorrowedFd<'_>, credentials: bool) {
    if !credentials {
        let _ = sys::set_option(socket, libc::SO_PASSCRED, 0);
    }
    let _ = sys::set_option(socket, libc::SO_PASSSEC, 0);
    let _ = sys::set_option(socket, libc::SO_PASSPIDFD, 0);
}

/// Zero would mean that nothing ends the wait.
fn time_value(timeout: Option<Duration>) -> TimeVal {
    let shortest = Duration::from_micros(1);
    let span = timeout.map_or(Duration::ZERO, |span| span.max(shortest));
    TimeVal::new(span.as_secs().try_into().unwrap_or(i64::MAX), span.subsec_micros().into())
}

fn as_nix(how: Shutdown) -> nix::sys::socket::Shutdown {
    match how {
        Shutdown::Read => nix::sys::socket::Shutdown::Read,
        Shutdown::Write => nix::sys::socket::Shutdown::Write,
        Shutdown::Both => nix::sys::socket::Shutdown::Both,
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self { fd: Some(fd), guard } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        let most = guard.peek_first(fd.as_fd(), buffer, true)?;
        // The data that the peek has seen is there: no read needs to wait.
        let flags = if guard.may_linger() { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
        guard.take(fd.as_fd(), &mut buffer[..most], flags)
    }
}

/// Without SIGPIPE: if the peer has gone, the error is BrokenPipe.
impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Several threads may write at a time.
impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("only `drop` and conversion take it, and the stream ends with these"),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// As [`Stream::inherited`], without credentials.
impl From<OwnedFd> for Stream {
    fn from(socket: OwnedFd) -> Self {
        Self::inherited(socket, false)
    }
}

/// The descriptor alone. Reading and closing it may take long: see the [module](self).
impl From<Stream> for OwnedFd {
    fn from(mut stream: Stream) -> Self {
        stream.inline_urgent_data();
        match stream.fd.take() {
            Some(fd) => fd,
            None => unreachable!("taken once"),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?}, descriptors: {:?})", self.fd, self.guard.passing)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (true, Some(fd)) = (self.may_linger(), self.fd.take()) {
            // The peer gets the end of file at once.
            let _ = shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            close_later(fd);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use nix::sys::socket::{ControlMessage, sendmsg, setsockopt, sockopt};

    /// A TCP connection with unsent data, whose close(2) takes hours, and its other end.
    pub(crate) fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let other = listener.accept().unwrap().0;
        one.set_nonblocking(true).unwrap();
        while one.write(&[0; 65536]).is_ok() {}
        one.set_nonblocking(false).unwrap();
        setsockopt(&one, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 10_000 }).unwrap();
        (one, other)
    }

    pub(crate) fn send_along(through: &UnixStream, what: &impl AsRawFd) -> nix::Result<usize> {
        let fds = [what.as_raw_fd()];
        let part = [io::IoSlice::new(b"with it")];
        sendmsg::<()>(through.as_raw_fd(), &part, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (ours, theirs)
    }

    fn kind<T: fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
        result.unwrap_err().kind()
    }

    #[test]
    fn urgent_data_is_ordinary_data_also_where_the_first_read_asks_for_it() {
        for make in [Stream::new, Stream::refusing] {
            let (ours, theirs) = pair();
            send(theirs.as_raw_fd(), b"ab!", MsgFlags::MSG_OOB).unwrap();
            (&theirs).write_all(b"cd").unwrap();
            let (mut stream, mut got) = (make(ours.into(), false), Vec::new());
            drop(theirs);
            stream.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"ab!cd");
        }
    }

    #[test]
    fn descriptors_are_seen_before_they_are_taken() {
        for attached in [false, true] {
            let (ours, mut theirs) = pair();
            let mut stream = Stream::unrefused(ours);
            sys::set_option(stream.as_fd(), libc::SO_PASSCRED, attached.into()).unwrap();
            assert_eq!(stream.attach_credentials(attached), 0);
            theirs.write_all(b"before").unwrap();
            assert!(!stream.holds_descriptors());
            let mut buffer = [0; 64];
            assert_eq!(stream.read(&mut buffer).unwrap(), 6);
            theirs.write_all(b"before").unwrap();
            send_along(&theirs, &theirs).unwrap();
            assert_eq!(stream.read(&mut []).unwrap(), 0, "no room, nothing to look at");
            // Data before the descriptors is read, whatever the size of the buffer.
            assert_eq!(stream.read(&mut buffer[..2]).unwrap(), 2);
            assert_eq!(stream.read(&mut buffer).unwrap(), 4);
            for _ in 0..2 {
                assert_eq!(kind(stream.read(&mut buffer)), io::ErrorKind::InvalidData);
                assert_eq!(kind(stream.read_now(&mut buffer)), io::ErrorKind::InvalidData);
                assert_eq!(kind(stream.receive(&mut buffer)), io::ErrorKind::InvalidData);
            }
            assert!(stream.holds_descriptors());
        }
    }

    #[test]
    fn data_before_descriptors_is_read_to_the_byte() {
        let long = vec![b'x'; 70_000];
        for attached in [false, true] {
            for before in [vec![&b"a"[..], b"bc"], vec![&long], vec![&long, b"y", &long], vec![b"x"; 100]] {
                let (ours, mut theirs) = pair();
                theirs.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
                let mut stream = Stream::unrefused(ours);
                sys::set_option(stream.as_fd(), libc::SO_PASSCRED, attached.into()).unwrap();
                stream.attach_credentials(attached);
                before.iter().for_each(|part| theirs.write_all(part).unwrap());
                send_along(&theirs, &theirs).unwrap();
                theirs.write_all(b"after").unwrap();
                send_along(&theirs, &theirs).unwrap();
                let (mut buffer, mut got) = (vec![0; 4096], Vec::new());
                while let Ok(count) = stream.read_now(&mut buffer) {
                    got.extend_from_slice(&buffer[..count]);
                }
                assert!(got == before.concat(), "{} of {}", got.len(), before.concat().len());
                assert_eq!(kind(stream.read(&mut buffer)), io::ErrorKind::InvalidData);
            }
        }
    }

    #[test]
    fn a_resumed_connection_takes_no_descriptors_and_needs_no_option_set_again() {
        let (ours, theirs) = pair();
        let stream = Stream::unrefused(ours);
        send_along(&theirs, &theirs).unwrap();
        let passing = stream.passing();
        let mut stream = Stream::resumed(stream, false, passing);
        assert_eq!(kind(stream.read(&mut [0; 64])), io::ErrorKind::InvalidData);
        // From the next process on the kernel refuses them, if it can, and it need not be asked again.
        assert_ne!(stream.passing(), Passing::Refused);
        let passing = stream.passing();
        let stream = Stream::resumed(stream, false, passing);
        assert_eq!(send_along(&theirs, &theirs).is_err(), stream.passing() == Passing::MaybeQueued);
    }

    #[test]
    fn peeking_ends_with_the_queue_where_the_kernel_refuses_descriptors() {
        let (ours, mut theirs) = pair();
        theirs.write_all(b"x").unwrap();
        let mut stream = Stream::accepted(ours);
        // Before Linux 6.16 it cannot.
        let is_refused = stream.guard.passing == Passing::MaybeQueued;
        let afterwards = if is_refused { Passing::Refused } else { Passing::Possible };
        assert!(stream.may_linger());
        let mut buffer = [0; 64];
        assert_eq!(stream.read(&mut buffer).unwrap(), 1);
        assert_eq!(kind(stream.read(&mut buffer)), io::ErrorKind::WouldBlock);
        assert_eq!(stream.guard.passing, afterwards);
        assert_eq!(send_along(&theirs, &theirs).is_err(), is_refused);
        drop(theirs);
    }

    #[test]
    fn at_the_end_of_file_peeking_ends() {
        let (ours, theirs) = pair();
        let mut stream = Stream::unrefused(ours);
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert!(!stream.may_linger());
    }

    #[test]
    fn a_blocking_stream_waits_for_data_on_every_kernel() {
        for made in [|ours: UnixStream| Stream::accepted(ours), |ours| Stream::unrefused(ours)] {
            let (ours, mut theirs) = pair();
            let mut stream = made(ours);
            stream.set_nonblocking(false).unwrap();
            let (asked, is_asked) = channel();
            let reading = thread::spawn(move || {
                asked.send(()).unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).map(|_| text)
            });
            is_asked.recv().unwrap();
            for word in ["one ", "two"] {
                theirs.write_all(word.as_bytes()).unwrap();
                thread::sleep(Duration::from_millis(2));
            }
            drop(theirs);
            assert_eq!(reading.join().unwrap().unwrap(), "one two");
        }
    }

    #[test]
    fn dropping_a_stream_that_lingers_is_quick_and_the_peer_gets_the_end() {
        for read in [false, true] {
            let (ours, mut theirs) = pair();
            let (bomb, _other_end) = lingering();
            send_along(&theirs, &bomb).unwrap();
            drop(bomb);
            let mut stream = Stream::accepted(ours);
            assert!(!read || stream.read(&mut [0; 64]).is_err());
            drop(stream);
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "no reset");
        }
        // This one is closed after the ones before it.
        let (ours, mut theirs) = pair();
        let also_ours = ours.try_clone().unwrap();
        drop(Stream::unrefused(ours));
        drop(also_ours);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_stream_turned_into_a_descriptor_stays_open() {
        let (ours, mut theirs) = pair();
        let mut std = Stream::unrefused(ours).into_std().unwrap();
        theirs.write_all(b"x").unwrap();
        std.read_exact(&mut [0]).unwrap();
        let fd = OwnedFd::from(Stream::from(OwnedFd::from(std)));
        theirs.write_all(b"y").unwrap();
        UnixStream::from(fd).read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_stream_takes_eight_bytes() {
        assert!(size_of::<Stream>() <= 8, "each idle connection has one");
    }
}
