//! Live connections over a restart: one process leaves them with their bytes, and the next one takes them back in the same
//! order.
//!
//! [`leave`] sends the connections as messages into a socket and gives the socket to the service manager's store
//! (FDSTORE=1, sd_notify(3)). The messages, with the descriptors in them (SCM_RIGHTS, unix(7)), lie there while no process
//! runs. The store holds one descriptor, however many connections there are: FileDescriptorStoreMax=1 is enough.
//! [`take_back`] reads the messages. [`pack`] and [`unpack`] are the same without a service manager, for a process that
//! passes the socket to its successor itself.
//!
//! Up to 250 descriptors go with one message, and their states are its bytes: a state belongs to its connection by its
//! place. Where the send buffer of a socket is full, the next one is opened, and its first message holds the one before.
//! States that are too large for a message lie in a sealed file (memfd_create(2)) that goes with it.
//!
//! A message is in the socket as a whole or not at all. One that cannot be used (cut off, of a later version, with more
//! or fewer descriptors than it says) is found as [`Found::Unusable`]; nothing is guessed.
//!
//! The socket is stored only when all connections are in it. A process that is killed before leaves nothing behind.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::os::fd::{AsFd, OwnedFd};
//! use std::os::unix::net::UnixStream;
//!
//! use peergate::handover::{Found, Parcel, pack, unpack};
//!
//! // The process that stops: a client has sent half a line, which the service has read.
//! let (mut client, served) = UnixStream::pair()?;
//! let parcels = [Parcel { socket: served.as_fd(), further: Vec::new(), state: b"half a li".to_vec() }];
//! let packed = pack(b"next connection: 2", parcels)?;
//! assert_eq!(packed.left.connections, 1);
//! drop(served);
//! client.write_all(b"ne\n")?; // no process serves, nothing is lost
//!
//! // Its successor.
//! let mut inherited = unpack(packed.socket);
//! assert_eq!(inherited.header(), Some(&b"next connection: 2"[..]));
//! for found in inherited {
//!     match found {
//!         Found::Connection(Parcel { socket, mut state, .. }) => {
//!             let mut rest = [0; 3];
//!             UnixStream::from(socket).read_exact(&mut rest)?;
//!             state.extend(rest);
//!             assert_eq!(state, b"half a line\n");
//!         }
//!         Found::Unusable { fault, sockets } => eprintln!("{} sockets: {fault}", sockets.len()),
//!     }
//! }
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! A service under systemd calls [`leave`] at its stop and [`take_back`] at its start:
//!
//! ```no_run
//! use std::os::fd::AsFd;
//! use std::os::unix::net::UnixStream;
//! use std::time::Duration;
//!
//! use peergate::handover::{self, Found, Parcel};
//! use peergate::systemd::Store;
//! use peergate::activation;
//!
//! # fn serve(_: Vec<activation::Listener>, _: Vec<UnixStream>) -> Vec<UnixStream> { Vec::new() }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let passed = activation::adopt(|name| name == "hello")?;
//! let store = Store::from_env();
//! let inherited = handover::take_back(passed.kept, "hello", &store);
//! let connections = inherited.filter_map(|found| match found {
//!     Found::Connection(parcel) => Some(UnixStream::from(parcel.socket)),
//!     Found::Unusable { .. } => None,
//! });
//! let connections = serve(passed.listeners, connections.collect());
//! let parcels = connections.iter().map(|connection| Parcel::new(connection.as_fd(), Vec::new()));
//! handover::leave(&store, "hello", b"", parcels, Duration::from_secs(20))?;
//! # Ok(())
//! # }
//! ```

mod inherited;
mod message;
mod queue;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use crate::systemd::Store;
use queue::{Batch, Queue, SEND_BUFFER};

pub use inherited::{Found, Inherited};
pub use message::Fault;

/// The most descriptors in one message. SCM_MAX_FD is 253; the file with the states takes a place too.
pub const MOST_FDS: usize = 250;
/// Messages that are longer have a file.
const MOST_INLINE: usize = 32 * 1024;
/// The service's own bytes, which go with every socket.
const MOST_HEADER: usize = 4 * 1024;
/// Pairs of sockets that hold each other, at most: reading opens them all.
const MOST_PAIRS: usize = 1024;

/// Without these seals a file could change while it is read.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW
}

/// One connection on its way to the next process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel<F> {
    /// The connection.
    pub socket: F,
    /// Descriptors that belong to it: a proxy's connection to its upstream, say. No more than 249.
    pub further: Vec<F>,
    /// The service's own bytes about it.
    pub state: Vec<u8>,
}

impl<F> Parcel<F> {
    /// A connection without further descriptors.
    pub fn new(socket: F, state: Vec<u8>) -> Self {
        Self { socket, further: Vec::new(), state }
    }

    fn fds(&self) -> usize {
        1 + self.further.len()
    }
}

/// How many connections were left.
#[derive(Debug, Default)]
pub struct Left {
    /// So many, from the first on.
    pub connections: usize,
    /// Why the next one was not, if there is one: ETOOMANYREFS where the kernel takes no more descriptors in flight from
    /// this user (RLIMIT_NOFILE).
    pub stopped_by: Option<io::Error>,
}

/// Connections in a socket.
#[derive(Debug)]
pub struct Packed {
    /// Holds the connections. Closing its last copy closes them.
    pub socket: OwnedFd,
    /// How many there are.
    pub left: Left,
}

/// Leaves connections to the next process, under `name` in the store, and the service's own bytes (`header`, no more than
/// 4 KiB) with them. Where not all can be left, the first ones are; where there is none, the store is not touched.
///
/// The sockets must stay open until it returns. The caller ends the connections that were not left, all of them where it
/// fails. The others it only closes: it must not read from or write to them any more.
///
/// It needs four descriptors. Where other processes of this user have so many descriptors in flight that the kernel takes no
/// more, it waits for up to two seconds. The manager may take as long as `patience`; that should be asked of it before
/// ([`Notifier::extend_timeout`](crate::Notifier::extend_timeout)).
///
/// # Errors
/// Then nothing was left. NotConnected where there is no store, StorageFull where the manager has not kept the socket
/// (FileDescriptorStoreMax=), TimedOut where it has not answered; what sending the first connection says.
pub fn leave<'f>(
    store: &Store,
    name: &str,
    header: &[u8],
    parcels: impl IntoIterator<Item = Parcel<BorrowedFd<'f>>>,
    patience: Duration,
) -> io::Result<Left> {
    let (queue, left) = fill(header, parcels, SEND_BUFFER)?;
    match (left.connections, left.stopped_by) {
        (0, Some(error)) => Err(error),
        (0, None) => Ok(Left::default()),
        (connections, stopped_by) => {
            keep(store, name, queue, patience)?;
            Ok(Left { connections, stopped_by })
        }
    }
}

/// Gives the socket to the manager. It must hold it when this returns, or nothing must be left in it.
///
/// The manager does not say that it did not keep a descriptor. It closes it, which hangs up the writing end: before systemd
/// 254 by the time it has dealt with the barrier, later in a process of its own. If the manager does not answer, it may hold
/// the socket now or later. So all messages are taken out of it.
fn keep(store: &Store, name: &str, queue: Queue<'_>, patience: Duration) -> io::Result<()> {
    let (writer, reader) = queue.finish();
    if let Err(error) = store.put_unwatched(name, reader.as_fd(), patience) {
        drain(&reader);
        store.forget(name);
        return Err(error);
    }
    drop(reader);
    let mut question = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    if poll(&mut question, PollTimeout::from(store.closes_within()))? > 0 {
        let message = "the service manager did not keep it; expected room for one descriptor (FileDescriptorStoreMax=)";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}

/// Takes all messages out and lets their descriptors go: recvmsg(2) without room for them.
fn drain(reader: &OwnedFd) {
    while recv(reader.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT).is_ok_and(|length| length > 0) {}
}

/// Sends connections into a socket, for a process that passes it to its successor by itself. As [`leave`] otherwise.
///
/// # Errors
/// What making the socket says.
pub fn pack<'f>(header: &[u8], parcels: impl IntoIterator<Item = Parcel<BorrowedFd<'f>>>) -> io::Result<Packed> {
    let (queue, left) = fill(header, parcels, SEND_BUFFER)?;
    let (_, socket) = queue.finish();
    Ok(Packed { socket, left })
}

fn fill<'f, 'h>(
    header: &'h [u8],
    parcels: impl IntoIterator<Item = Parcel<BorrowedFd<'f>>>,
    send_buffer: usize,
) -> io::Result<(Queue<'h>, Left)> {
    let mut queue = Queue::new(header, send_buffer)?;
    let (mut batch, mut connections) = (Batch::default(), 0);
    for parcel in parcels {
        if !batch.has_room_for(&parcel, queue.most_fds()) {
            if let Err(error) = queue.send(&batch) {
                return Ok((queue, Left { connections, stopped_by: Some(error) }));
            }
            connections += batch.len();
            batch.clear();
        }
        batch.push(parcel);
    }
    let stopped_by = if batch.len() > 0 { queue.send(&batch).err() } else { None };
    if stopped_by.is_none() {
        connections += batch.len();
    }
    Ok((queue, Left { connections, stopped_by }))
}

/// Takes back what an earlier process left under `name`. `passed` is everything that the manager passed from its store.
/// What is of another name is closed, forgotten by the manager, and named ([`Inherited::foreign`]).
pub fn take_back(passed: Vec<(String, OwnedFd)>, name: &str, store: &Store) -> Inherited {
    Inherited::new(passed, name, Some(store.clone()))
}

/// Makes a connection non-blocking, for a service that needs it so: another process that held it may have changed that.
///
/// # Errors
/// What fcntl(2) says.
pub fn set_nonblocking(socket: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

/// Reads what [`pack`] has sent.
pub fn unpack(socket: OwnedFd) -> Inherited {
    Inherited::new(vec![(String::new(), socket)], "", None)
}

#[cfg(test)]
mod tests;
