//! Live connections over a restart: what one process leaves in the service manager's store, and the next one takes back.
//!
//! The sockets are stored as they are. Beside them one sealed memfd says of each, by its cookie (SO_COOKIE: the kernel's own
//! number for that socket), how far it has come. Who the peer is, is not believed from there: the kernel tells it again, fixed
//! at connect, from the socket itself. Two names tell the sockets on which something is pending from the others, for a program
//! that cannot read their state: what comes next on the latter begins a message, and may be answered.
//!
//! ```text
//! magic                     14 bytes
//! version                   u32
//! length of what follows    u64
//! checksum of it (FNV-1a)   u64
//! next connection number    u64
//! connections               u32
//! for each: cookie u64, uid u32, length u32, and so many bytes of postcard: the units, the progress, the protocol's state
//! ```
//!
//! All numbers are little-endian.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use peergate::handover::cookie_of;
use peergate::peer::Peer;
use peergate::systemd::Store;
use peergate::unit::Units;
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, Fate, Inherited, Progress};
use crate::protocol::Protocol;

/// What follows the program's name in an FDNAME: the sockets on which nothing is pending. Short: the names of all descriptors
/// share one environment variable.
const SOCKETS: &str = "-c";
/// The sockets on which something is pending.
const MIDLINE: &str = "-m";
/// The state.
const STATE: &str = "-s";
/// A descriptor that is stored only to see whether there was room.
const PROBE: &str = "-p";

fn name_of<P: Protocol>(what: &str) -> String {
    format!("{}{what}", P::NAME)
}

/// Names systemd gives to stored descriptors that were stored without one.
const NAMELESS: &str = "stored";

/// What `LISTEN_FDNAMES=` may hold: execve(2) takes no string longer than 128 KiB, its closing NUL included.
const LONGEST_NAMES: usize = 128 * 1024 - "LISTEN_FDNAMES=".len() - 1;
/// What of it is left to the listeners, and to what else systemd passes.
const NAMES_OF_OTHERS: usize = 8 * 1024;

const MAGIC: &[u8; 14] = b"peers at rest\n";
const VERSION: u32 = 2;
const HEADER: usize = MAGIC.len() + 4 + 8 + 8;
/// More state than any limit on connections makes plausible.
const MOST_STATE: u64 = 1 << 32;

/// How long the manager may take to store one batch. It holds each socket against all that it has already, and on a
/// machine with other things to do thousands take it minutes: what counts is that it gets on with it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the manager may take to hear that it is to forget what it was given.
const RETRACTED_WITHIN: Duration = Duration::from_secs(5);
/// Sockets to a batch: what one message can carry.
const BATCH: usize = 250;

/// How many connections may be left to the next process where the store holds so many descriptors: the state needs a
/// place, so does the look whether everything found one, and the next process has to be told all their names.
pub fn most_left<P: Protocol>(capacity: usize) -> usize {
    let names = (LONGEST_NAMES - NAMES_OF_OTHERS) / (P::NAME.len() + SOCKETS.len() + 1);
    capacity.saturating_sub(2).min(names)
}

/// Whether a passed descriptor of this name comes from the store, not from a socket unit.
pub fn is_kept<P: Protocol>(name: &str) -> bool {
    name.strip_prefix(P::NAME).is_some_and(|rest| rest.starts_with('-')) || name == NAMELESS
}

/// Why the state of an earlier process cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum Unusable {
    Missing,
    Version(u32),
    Corrupt,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(f, "no state came with them"),
            Self::Version(version) => write!(f, "their state is of version {version}, this program knows {VERSION}"),
            Self::Corrupt => write!(f, "their state is cut off or corrupted"),
        }
    }
}

/// What an earlier process left.
pub struct Inheritance<P: Protocol> {
    /// Its connections.
    pub connections: Vec<Inherited<P>>,
    /// Why the state of some cannot be used.
    pub unusable: Option<Unusable>,
    /// The names of stored descriptors that are not ours, or are of a kind that this program does not know.
    pub foreign: Vec<String>,
    /// The number for the next connection.
    pub next_connection: u64,
}

/// Sorts what came out of the store, and takes it out of there: from now on closing a connection ends it.
pub fn take_back<P: Protocol>(kept: Vec<(String, OwnedFd)>, store: &Store) -> Inheritance<P> {
    let mut inheritance =
        Inheritance { connections: Vec::new(), unusable: None, foreign: Vec::new(), next_connection: 1 };
    let names: BTreeSet<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    names.into_iter().for_each(|name| store.forget(name));
    let (mut sockets, mut states) = (Vec::new(), Vec::new());
    for (name, fd) in kept {
        match name.strip_prefix(P::NAME) {
            Some(kind @ (SOCKETS | MIDLINE)) => sockets.push((kind == MIDLINE, fd)),
            Some(STATE) => states.push(File::from(fd)),
            // Left over where a process was killed in the middle of its look.
            Some(PROBE) => {}
            _ => inheritance.foreign.push(name),
        }
    }
    // Systemd passes the newest first, or last after a daemon-reload: the files themselves know.
    let newest = states.into_iter().max_by_key(|state| state.metadata().and_then(|about| about.modified()).ok());
    let mut by_cookie = match newest.map_or(Err(Unusable::Missing), read_state) {
        Ok(state) => {
            inheritance.next_connection = state.next_connection;
            state.connections
        }
        Err(why) => {
            inheritance.unusable = (!sockets.is_empty()).then_some(why);
            HashMap::new()
        }
    };
    for (is_midline, socket) in sockets {
        // Another process that held it may have changed that.
        let _ = set_nonblocking(&socket);
        let (Ok(cookie), Ok(mut peer)) = (cookie_of(&socket), Peer::credentials_of(&socket)) else {
            inheritance.foreign.push(name_of::<P>(if is_midline { MIDLINE } else { SOCKETS }));
            continue;
        };
        // Judging asks for them again, one connection at a time.
        peer.forget_groups();
        let saved = by_cookie.remove(&cookie).filter(|saved| saved.uid == peer.uid().raw());
        let connection = match saved.map(|saved| saved.restore(&peer)) {
            Some(Some((progress, protocol))) => {
                Some(Inherited { socket, peer, progress, protocol, fate: Fate::GoesOn })
            }
            unusable => {
                let why = if unusable.is_some() { Unusable::Corrupt } else { Unusable::Missing };
                inheritance.unusable.get_or_insert(why);
                let fate = if is_midline { Fate::EndsAtOnce } else { Fate::EndsInOrder };
                inheritance.next_connection += 1;
                Inherited::without_state(socket, inheritance.next_connection - 1, fate)
            }
        };
        inheritance.connections.extend(connection);
    }
    inheritance
}

/// How many of the stored descriptors are connections.
pub fn count<P: Protocol>(kept: &[(String, OwnedFd)]) -> usize {
    let is_connection = |name: &str| matches!(name.strip_prefix(P::NAME), Some(SOCKETS | MIDLINE));
    kept.iter().filter(|(name, _)| is_connection(name)).count()
}

fn set_nonblocking(socket: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// Leaves `connections` to the next process. Returns when the service manager holds them all. Before each part of it
/// that may take as long as [`PATIENCE`], `takes_time` is called.
///
/// # Errors
/// What making the memfd, sending to or waiting for the manager says, StorageFull where it has not taken them all: then
/// none is sure to be kept.
pub fn leave<P: Protocol>(
    connections: &[Box<Connection<P>>],
    next_connection: u64,
    store: &Store,
    takes_time: impl Fn(),
) -> io::Result<()> {
    let state = write_state(connections, next_connection)?;
    takes_time();
    // The state first: without it the sockets are worth little, and it must find room.
    store.put(&name_of::<P>(STATE), &[state.as_fd()])?;
    // What follows may need the last descriptors there are.
    drop(state);
    let (between, midline): (Vec<_>, Vec<_>) =
        connections.iter().partition(|connection| connection.protocol.is_at_rest());
    for (name, connections) in [(SOCKETS, between), (MIDLINE, midline)] {
        let sockets: Vec<_> = connections.iter().map(|connection| connection.socket.as_fd()).collect();
        for batch in sockets.chunks(BATCH) {
            takes_time();
            store.put(&name_of::<P>(name), batch)?;
            store.settle(PATIENCE)?;
        }
    }
    takes_time();
    if !store.holds_all(&name_of::<P>(PROBE), PATIENCE)? {
        let message = "its store (FileDescriptorStoreMax=) is smaller than it was said to be";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}

/// Takes back what [`leave`] stored, where it failed half-way.
pub fn retract<P: Protocol>(store: &Store) {
    [SOCKETS, MIDLINE, STATE, PROBE].into_iter().for_each(|what| store.forget(&name_of::<P>(what)));
    // This process ends next, and with it what has not been taken from it.
    let _ = store.settle(RETRACTED_WITHIN);
}

struct State {
    next_connection: u64,
    connections: HashMap<u64, Saved>,
}

/// What is saved of one connection.
struct Saved {
    uid: u32,
    /// [`Content`].
    bytes: Vec<u8>,
}

/// Written by postcard.
#[derive(Serialize, Deserialize)]
struct Content<U, R, S> {
    units: U,
    progress: R,
    protocol: S,
}

impl Saved {
    /// `None` for bytes that are none of this program's.
    fn restore<P: Protocol>(&self, peer: &Peer) -> Option<(Progress, P)> {
        let content: Content<Option<String>, Progress, P> = postcard::from_bytes(&self.bytes).ok()?;
        if let Some(units) = content.units.as_deref().and_then(Units::from_path) {
            peer.remember_units(Some(units));
        }
        Some((content.progress, content.protocol))
    }
}

/// Piece by piece: whatever is held for connections is not to be in memory once more than the file makes necessary.
fn write_state<P: Protocol>(connections: &[Box<Connection<P>>], next_connection: u64) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"connections", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(&[0; HEADER])?;
    let mut body = Body { inner: BufWriter::new(&file), length: 0, sum: EMPTY_SUM };
    body.write_all(&next_connection.to_le_bytes())?;
    body.write_all(&counted(connections.len())?)?;
    for connection in connections {
        write_connection(connection, &mut body)?;
    }
    body.flush()?;
    let (length, sum) = (body.length.to_le_bytes(), body.sum.to_le_bytes());
    drop(body);
    file.write_all_at(&[MAGIC.as_slice(), &VERSION.to_le_bytes(), &length, &sum].concat(), 0)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn write_connection<P: Protocol>(connection: &Connection<P>, body: &mut impl Write) -> io::Result<()> {
    let Connection { socket, peer, progress, protocol, .. } = connection;
    let content = Content { units: peer.remembered_units().map(Units::to_path), progress, protocol };
    let bytes = postcard::to_allocvec(&content).map_err(io::Error::other)?;
    body.write_all(&cookie_of(socket)?.to_le_bytes())?;
    body.write_all(&peer.uid().raw().to_le_bytes())?;
    body.write_all(&counted(bytes.len())?)?;
    body.write_all(&bytes)
}

fn counted(count: usize) -> io::Result<[u8; 4]> {
    u32::try_from(count).map(u32::to_le_bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn read_state(mut file: File) -> Result<State, Unusable> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).map_err(|_| Unusable::Corrupt)?;
    let size = file.metadata().map_err(|_| Unusable::Corrupt)?.len();
    // Whoever stored it has written it from the start; we share its offset.
    file.seek(SeekFrom::Start(HEADER as u64)).map_err(|_| Unusable::Corrupt)?;
    parse_state(&header, BufReader::new(file), size.saturating_sub(HEADER as u64))
}

/// What is behind the header is `size` bytes long: that it should be is checked before any of it is read.
fn parse_state(header: &[u8; HEADER], body: impl Read, size: u64) -> Result<State, Unusable> {
    let mut rest = header.strip_prefix(MAGIC).ok_or(Unusable::Corrupt)?;
    let rest = &mut rest;
    let mut body = Body { inner: body, length: size, sum: EMPTY_SUM };
    let version = u32::from_le_bytes(take(rest)?);
    if version != VERSION {
        return Err(Unusable::Version(version));
    }
    let (length, sum) = (u64::from_le_bytes(take(rest)?), u64::from_le_bytes(take(rest)?));
    if length != size || size > MOST_STATE {
        return Err(Unusable::Corrupt);
    }
    let next_connection = body.u64()?;
    let count = body.u32()?;
    let mut connections = HashMap::new();
    for _ in 0..count {
        let (cookie, uid) = (body.u64()?, body.u32()?);
        connections.insert(cookie, Saved { uid, bytes: body.counted()? });
    }
    if body.length == 0 && body.sum == sum {
        Ok(State { next_connection, connections })
    } else {
        Err(Unusable::Corrupt)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Unusable> {
    let (taken, after) = rest.split_first_chunk::<N>().ok_or(Unusable::Corrupt)?;
    *rest = after;
    Ok(*taken)
}

/// What is behind the header, on its way in or out. FNV-1a is enough to tell that bytes were cut off or changed by
/// accident; nobody else can write them.
struct Body<I> {
    inner: I,
    /// Bytes written so far, or yet to be read.
    length: u64,
    sum: u64,
}

const EMPTY_SUM: u64 = 0xcbf2_9ce4_8422_2325;

fn sum_on(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl<W: Write> Write for Body<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.length += count as u64;
        self.sum = sum_on(self.sum, &bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Body<R> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Unusable> {
        self.length = self.length.checked_sub(bytes.len() as u64).ok_or(Unusable::Corrupt)?;
        self.inner.read_exact(bytes).map_err(|_| Unusable::Corrupt)?;
        self.sum = sum_on(self.sum, bytes);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Unusable> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Unusable> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Unusable> {
        self.array().map(u64::from_le_bytes)
    }

    fn counted(&mut self) -> Result<Vec<u8>, Unusable> {
        let count = self.u32()?;
        // Before there is memory for it.
        if u64::from(count) > self.length {
            return Err(Unusable::Corrupt);
        }
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Lines, admission, owner};
    use std::os::unix::net::UnixStream;

    /// A connection in the middle of a line, and its other end.
    fn at_rest(held: &[u8]) -> (Box<Connection<Lines>>, UnixStream) {
        let (admission, theirs) = admission(&owner(), 7);
        admission.peer.remember_units(Units::from_path("/system.slice/a.service"));
        let mut connection = Connection::admitted(admission);
        connection.protocol.held = held.to_vec();
        connection.protocol.bytes = 99;
        connection.progress.pass_credentials = true;
        connection.progress.unattested = 4;
        (Box::new(connection), theirs)
    }

    fn parse(bytes: &[u8]) -> Result<State, Unusable> {
        let (header, body) = bytes.split_first_chunk().ok_or(Unusable::Corrupt)?;
        parse_state(header, body, body.len() as u64)
    }

    fn bytes_of(carried: &[Box<Connection<Lines>>]) -> Vec<u8> {
        let mut file = write_state(carried, 42).unwrap();
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_connection_comes_back_as_it_was_left() {
        let (left, _theirs) = at_rest(b"half a li");
        let progress = left.progress.clone();
        let state = write_state(std::slice::from_ref(&left), 42).unwrap();
        let kept = vec![("echod-m".to_owned(), left.socket.into()), ("echod-s".to_owned(), state.into())];
        let mut found: Inheritance<Lines> = take_back(kept, &Store::from_env("NO_SUCH_VARIABLE"));
        assert_eq!((found.next_connection, found.unusable), (42, None));
        let back = found.connections.pop().unwrap();
        assert_eq!(back.fate, Fate::GoesOn);
        assert_eq!((&back.protocol.held[..], back.protocol.bytes), (&b"half a li"[..], 99));
        assert_eq!(format!("{:?}", back.progress), format!("{progress:?}"));
        assert_eq!(back.peer.remembered_units().map(Units::name), Some("a.service"));
    }

    #[test]
    fn a_state_cut_off_anywhere_or_changed_in_any_byte_is_never_believed() {
        let (left, _theirs) = at_rest(b"held");
        let bytes = bytes_of(std::slice::from_ref(&left));
        assert!(parse(&bytes).is_ok());
        for end in 0..bytes.len() {
            assert!(parse(&bytes[..end]).is_err(), "cut off after {end} bytes");
        }
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 0x10;
            assert!(parse(&changed).is_err(), "byte {place} changed");
        }
    }

    #[test]
    fn a_state_of_another_version_is_named_as_such() {
        let (left, _theirs) = at_rest(b"");
        let mut bytes = bytes_of(std::slice::from_ref(&left));
        bytes[MAGIC.len()] = 9;
        assert_eq!(parse(&bytes).err(), Some(Unusable::Version(9)));
    }

    #[test]
    fn no_more_are_left_than_the_next_process_can_be_told_the_names_of() {
        for capacity in [0, 1, 2, 3, 4352, 16_000, 20_000, 1 << 20] {
            let left = most_left::<Lines>(capacity);
            assert!(left + 2 <= capacity || left == 0, "{left} of {capacity}");
            // As systemd writes them, with a listener of the longest name there is.
            let names = [vec!["echod-c"; left], vec!["echod-s"], vec!["x"; 1]].concat().join(":").len() + 255;
            assert!("LISTEN_FDNAMES=".len() + names < 128 * 1024, "{names} bytes for {left}");
        }
        assert_eq!(most_left::<Lines>(4352), 4350);
        assert_eq!([SOCKETS.len(), STATE.len(), PROBE.len()], [MIDLINE.len(); 3]);
    }
}
