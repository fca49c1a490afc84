//! Connections on their way into sockets: the sender's side.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair, sockopt,
};

use super::message::{self, Shape};
use super::{MOST_FDS, MOST_HEADER, MOST_INLINE, MOST_PAIRS, Parcel};
use crate::systemd::InFlight;

/// States of more bytes together go into several messages, each with a file of its own.
const MOST_STATES: usize = 512 * 1024;
/// Held in flight until all connections are, so that what stores them can still be sent.
const BALLAST: usize = 16;
/// Asked for; the kernel gives no more than net.core.wmem_max (socket(7)).
pub(super) const SEND_BUFFER: usize = 4 * 1024 * 1024;

/// Sockets filled one after the other. The first message in each holds the reading end of the one before, so that at the
/// end one descriptor stands for them all, and no more than four are open at a time: the socket's two, and the ballast and a
/// file of states, or the next socket's two.
pub(super) struct Queue<'h> {
    pub(super) writer: OwnedFd,
    pub(super) reader: OwnedFd,
    header: &'h [u8],
    send_buffer: usize,
    pub(super) pairs: usize,
    /// Something besides the opening is in the last pair.
    has_some: bool,
    ballast: Option<OwnedFd>,
    in_flight: usize,
    fd_limit: usize,
    /// Until descriptors of other processes are no longer in flight.
    patience: InFlight,
}

/// Connections that go into one message.
#[derive(Default)]
pub(super) struct Batch<'f> {
    shapes: Vec<Shape>,
    states: Vec<u8>,
    fds: Vec<BorrowedFd<'f>>,
}

impl<'f> Batch<'f> {
    pub(super) fn len(&self) -> usize {
        self.shapes.len()
    }

    pub(super) fn has_room_for(&self, parcel: &Parcel<BorrowedFd<'f>>, most_fds: usize) -> bool {
        let states = self.states.len() + parcel.state.len();
        self.shapes.is_empty() || (self.fds.len() + parcel.fds() <= most_fds && states <= MOST_STATES)
    }

    pub(super) fn push(&mut self, parcel: Parcel<BorrowedFd<'f>>) {
        self.shapes.push(Shape { fds: parcel.fds(), state: parcel.state.len() });
        self.states.extend(parcel.state);
        self.fds.push(parcel.socket);
        self.fds.extend(parcel.further);
    }

    pub(super) fn clear(&mut self) {
        self.shapes.clear();
        self.fds.clear();
        // What one large state took is not kept for the small ones after it.
        self.states = Vec::new();
    }
}

impl<'h> Queue<'h> {
    pub(super) fn new(header: &'h [u8], send_buffer: usize) -> io::Result<Self> {
        if header.len() > MOST_HEADER {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut patience = InFlight::default();
        let ballast = Some(new_ballast(&mut patience)?);
        let (writer, reader) = pair(send_buffer)?;
        send(&writer, &message::opening(header, false), &[])?;
        let (fd_limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let fd_limit = usize::try_from(fd_limit).unwrap_or(usize::MAX);
        let (pairs, has_some, in_flight) = (1, false, BALLAST);
        Ok(Self { writer, reader, header, send_buffer, pairs, has_some, ballast, in_flight, fd_limit, patience })
    }

    /// How many descriptors the next message may have.
    ///
    /// The kernel bounds what a user has in flight by RLIMIT_NOFILE (unix(7), ETOOMANYREFS). It looks at the number before
    /// it adds a message's, so that a large last message would leave no room for what stores the whole. Near the limit
    /// the connections go one by one; the ballast makes up for the last of them.
    pub(super) fn most_fds(&self) -> usize {
        self.fd_limit.saturating_sub(self.in_flight).clamp(1, MOST_FDS)
    }

    /// Sends a message, and opens the next pair where this one is full.
    pub(super) fn send(&mut self, batch: &Batch<'_>) -> io::Result<()> {
        if batch.fds.len() > MOST_FDS {
            return Err(Errno::EINVAL.into());
        }
        let bytes = message::connections(&batch.shapes, &batch.states).ok_or(Errno::EINVAL)?;
        match self.send_bytes(&bytes, &batch.fds) {
            Err(Errno::EAGAIN) if self.has_some => {
                self.open_next()?;
                self.send_bytes(&bytes, &batch.fds)?;
            }
            other => other?,
        }
        self.has_some = true;
        self.in_flight += batch.fds.len();
        Ok(())
    }

    fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        if bytes.len() <= MOST_INLINE {
            match self.send_patiently(bytes, fds) {
                // Longer than the send buffer.
                Err(Errno::EMSGSIZE) => {}
                other => return other,
            }
        }
        let file = sealed(bytes).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        let fds: Vec<_> = std::iter::once(file.as_fd()).chain(fds.iter().copied()).collect();
        self.send_patiently(&message::elsewhere(), &fds)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Other processes of the user may have descriptors in flight too. Where our own are fewer than the limit, it may be a
    /// matter of moments.
    fn send_patiently(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let Self { writer, patience, .. } = self;
        if self.in_flight > self.fd_limit {
            return send(writer, bytes, fds);
        }
        patience.wait_while_full(|| send(writer, bytes, fds))
    }

    fn open_next(&mut self) -> io::Result<()> {
        if self.pairs >= MOST_PAIRS {
            return Err(io::ErrorKind::StorageFull.into());
        }
        // Makes room for a descriptor: the pair before must stay open until the next one stands.
        self.ballast = None;
        let (writer, reader) = pair(self.send_buffer)?;
        let (opening, before) = (message::opening(self.header, true), [self.reader.as_fd()]);
        self.patience.wait_while_full(|| send(&writer, &opening, &before))?;
        (self.writer, self.reader, self.has_some) = (writer, reader, false);
        self.pairs += 1;
        self.in_flight += 1;
        self.ballast = Some(new_ballast(&mut self.patience)?);
        Ok(())
    }

    /// Both ends of the last pair, writing end first, when all connections are in flight.
    pub(super) fn finish(self) -> (OwnedFd, OwnedFd) {
        drop(self.ballast);
        (self.writer, self.reader)
    }
}

/// Closing it takes [`BALLAST`] descriptors out of flight.
fn new_ballast(patience: &mut InFlight) -> io::Result<OwnedFd> {
    let (writer, reader) = pair(SEND_BUFFER)?;
    patience.wait_while_full(|| send(&writer, b"", &[writer.as_fd(); BALLAST]))?;
    Ok(reader)
}

fn pair(send_buffer: usize) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (writer, reader) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    // With the buffer that it has, the connections take more pairs.
    let _ = setsockopt(&writer, sockopt::SndBuf, &send_buffer);
    Ok((writer, reader))
}

fn send(writer: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(writer.as_raw_fd(), &[IoSlice::new(bytes)], rights, flags, None) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

fn sealed(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"handover", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(super::seals() | SealFlag::F_SEAL_SEAL))?;
    Ok(file)
}
