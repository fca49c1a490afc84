//! Connections on their way out of sockets: the receiver's side.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};

use super::message::{self, Fault, Message, Shape};
use super::{MOST_INLINE, MOST_PAIRS, Parcel};
use crate::sys::{self, Received};
use crate::systemd::Store;

/// More than the states of one message can have, and little enough to be read into memory.
const MOST_ELSEWHERE: u64 = 1 << 30;

/// What comes out of a handover.
#[derive(Debug)]
pub enum Found {
    /// A connection, as it was left.
    Connection(Parcel<OwnedFd>),
    /// Connections with a state that cannot be used. How far each had come is not known: the caller ends them in order.
    Unusable {
        /// Why.
        fault: Fault,
        /// The stream sockets that came with the message, of all its connections. Everything else is closed.
        sockets: Vec<OwnedFd>,
    },
}

/// What an earlier process left, one connection after the other in the order in which they were left. One message is
/// in memory at a time. When the last has been read, or this is dropped, the service manager is told to forget it.
pub struct Inherited {
    header: Option<Vec<u8>>,
    foreign: Vec<String>,
    /// The one to be read next comes last.
    pub(super) readers: Vec<OwnedFd>,
    found: VecDeque<Found>,
    buffer: Vec<u8>,
    stored: Option<(Store, Vec<String>)>,
}

impl fmt::Debug for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { header, foreign, readers, .. } = self;
        f.debug_struct("Inherited")
            .field("header", header)
            .field("foreign", foreign)
            .field("readers", readers)
            .finish_non_exhaustive()
    }
}

impl Inherited {
    /// Closes a passed descriptor of another name, or of another kind than a handover's socket, and keeps its name.
    pub(super) fn new(passed: Vec<(String, OwnedFd)>, name: &str, store: Option<Store>) -> Self {
        let mut names: Vec<_> = passed.iter().map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        let stored = store.map(|store| (store, names));
        let mut inherited = Self {
            header: None,
            foreign: Vec::new(),
            readers: Vec::new(),
            found: VecDeque::new(),
            buffer: vec![0; MOST_INLINE],
            stored,
        };
        for (its_name, fd) in passed {
            if its_name == name && is_of(SockType::SeqPacket, &fd) {
                inherited.follow(fd);
            } else {
                inherited.foreign.push(its_name);
            }
        }
        inherited
    }

    /// The service's own bytes. `None` where nothing was left, where it cannot be read, or where an earlier successor was
    /// killed after it had read them.
    pub fn header(&self) -> Option<&[u8]> {
        self.header.as_deref()
    }

    /// The names of passed descriptors that are not of a handover. They are closed.
    pub fn foreign(&self) -> &[String] {
        &self.foreign
    }

    /// Looks for the socket that was filled before this one, and before that. Messages stay in it until they are read
    /// in their turn: if this process is killed meanwhile, the next one finds what has not been read.
    fn follow(&mut self, mut reader: OwnedFd) {
        let already = self.readers.len();
        while self.readers.len() - already < MOST_PAIRS {
            // A message comes with credentials then, and the end of file with none: both may have no bytes.
            let _ = sys::set_option(reader.as_fd(), libc::SO_PASSCRED, 1);
            let first = sys::receive_descriptors(reader.as_fd(), &mut self.buffer, true);
            let before = first.ok().and_then(|Received { length, mut fds, .. }| {
                if let (None, Ok(Message::Opening { header, .. })) =
                    (&self.header, message::read(&self.buffer[..length]))
                {
                    self.header = Some(header.to_vec());
                }
                // By its kind: the opening of a version that we do not know, or a torn one, leads there too.
                fds.pop().filter(|fd| fds.is_empty() && is_of(SockType::SeqPacket, fd))
            });
            self.readers.push(reader);
            match before {
                Some(before) => reader = before,
                None => return,
            }
        }
    }

    /// Reads the next message that holds something. False where there is none.
    fn read_on(&mut self) -> bool {
        while self.found.is_empty() {
            let Some(reader) = self.readers.last() else { return false };
            match sys::receive_descriptors(reader.as_fd(), &mut self.buffer, false) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing has been written, or everything has been read.
                Err(_) => drop(self.readers.pop()),
                Ok(Received { length: 0, sender: None, .. }) => drop(self.readers.pop()),
                Ok(received) => self.take_in(received),
            }
        }
        true
    }

    fn take_in(&mut self, Received { length, mut fds, is_whole, .. }: Received) {
        let read = if is_whole { message::read(&self.buffer[..length]) } else { Err(Fault::Torn) };
        let result = match read {
            // The socket before this one has been followed, and read by now.
            Ok(Message::Opening { fds: said, .. }) if said == fds.len() => return,
            Ok(Message::Opening { fds: said, .. }) => Err(Fault::Descriptors { said, came: fds.len() }),
            Ok(Message::Connections { shapes, states }) => unpack(&shapes, states, &mut fds),
            Ok(Message::Elsewhere) => unpack_elsewhere(&mut fds),
            Err(fault) => Err(fault),
        };
        match result {
            Ok(found) => self.found = found,
            Err(fault) => {
                fds.retain(|fd| is_of(SockType::Stream, fd));
                self.found.push_back(Found::Unusable { fault, sockets: fds });
            }
        }
    }

    fn forget(&mut self) {
        if let Some((store, names)) = self.stored.take() {
            names.iter().for_each(|name| store.forget(name));
        }
    }
}

impl Iterator for Inherited {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        if !self.read_on() {
            self.forget();
            self.buffer = Vec::new();
        }
        self.found.pop_front()
    }

    /// At least what is left of the message that was read last. If that is 0, the next call reads a message, and takes up to
    /// [`MOST_FDS`](super::MOST_FDS) descriptors with it.
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.found.len(), None)
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Takes none of `fds` where it fails.
fn unpack(shapes: &[Shape], mut states: &[u8], fds: &mut Vec<OwnedFd>) -> Result<VecDeque<Found>, Fault> {
    let said = shapes.iter().map(|shape| shape.fds).sum();
    if said != fds.len() {
        return Err(Fault::Descriptors { said, came: fds.len() });
    }
    let mut fds = fds.drain(..);
    let parcel = |shape: &Shape| {
        let socket = fds.next()?;
        let further = fds.by_ref().take(shape.fds.saturating_sub(1)).collect();
        let (state, rest) = states.split_at_checked(shape.state)?;
        states = rest;
        Some(Found::Connection(Parcel { socket, further, state: state.to_vec() }))
    };
    Ok(shapes.iter().map_while(parcel).collect())
}

fn unpack_elsewhere(fds: &mut Vec<OwnedFd>) -> Result<VecDeque<Found>, Fault> {
    if fds.is_empty() {
        return Err(Fault::Descriptors { said: 1, came: 0 });
    }
    let bytes = contents(File::from(fds.remove(0))).ok_or(Fault::Torn)?;
    match message::read(&bytes)? {
        Message::Connections { shapes, states } => unpack(&shapes, states, fds),
        _ => Err(Fault::Torn),
    }
}

/// The bytes of a file, if its seals say that they cannot change.
fn contents(file: File) -> Option<Vec<u8>> {
    let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS).ok()?);
    let length = file.metadata().ok()?.len();
    if !seals.contains(super::seals()) || length > MOST_ELSEWHERE {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

fn is_of(kind: SockType, fd: &OwnedFd) -> bool {
    getsockopt(fd, sockopt::SockType).is_ok_and(|its| its == kind)
}
