//! Live connections over a restart: what one process leaves in the service manager's store, and the next
//! one takes back.
//!
//! The sockets are stored as they are, all under one name; beside them one sealed memfd says of each, by its
//! cookie (SO_COOKIE: the kernel's own number for that socket), how far its echo has come. Who the peer is
//! is not believed from there: the kernel tells it again, fixed at connect, from the socket itself.
//!
//! ```text
//! magic "echod at rest\n"   14 bytes
//! version                   u32
//! length of what follows    u64
//! checksum of it (FNV-1a)   u64
//! next connection number    u64
//! connections               u32
//! for each: cookie u64, number u64, uid u32, lines u64, bytes u64, age in µs u64,
//!           flags u8, echo sent u32, units u32 + text, bytes held u32 + bytes,
//!           unattested u64, only with its flag: so that those without it can be read by programs that know none
//! ```
//!
//! All numbers are little-endian.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use peergate::handover::cookie_of;
use peergate::peer::Peer;
use peergate::service::Store;
use peergate::unit::Units;

use crate::connection::Carried;

/// FDNAME of the sockets. Short: the names of all descriptors share one environment variable.
const SOCKETS: &str = "echod-c";
/// FDNAME of the state.
const STATE: &str = "echod-s";

/// Names systemd gives to stored descriptors that were stored without one.
const NAMELESS: &str = "stored";

const MAGIC: &[u8; 14] = b"echod at rest\n";
const VERSION: u32 = 1;
const HEADER: usize = MAGIC.len() + 4 + 8 + 8;
/// More state than any limit on connections makes plausible.
const MOST_STATE: u64 = 1 << 32;

/// How long the manager may take to store one batch. It holds each socket against all that it has already, and on a
/// machine with other things to do thousands take it minutes: what counts is that it gets on with it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Sockets to a batch: what one message can carry.
const BATCH: usize = 250;

const FLAG_ENDED: u8 = 1;
const FLAG_PASS_CREDENTIALS: u8 = 2;
const FLAG_UNATTESTED: u8 = 4;

/// Whether a passed descriptor of this name comes from the store, not from a socket unit.
pub fn is_kept(name: &str) -> bool {
    name == SOCKETS || name == STATE || name == NAMELESS
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
#[derive(Default)]
pub struct Inheritance {
    /// Connections that go on where they were.
    pub connections: Vec<Carried>,
    /// Connections without usable state, to be ended in order.
    pub stateless: Vec<OwnedFd>,
    /// Why not, where there are any.
    pub unusable: Option<Unusable>,
    /// Stored descriptors that are not ours.
    pub foreign: usize,
    /// The number for the next connection.
    pub next_connection: u64,
}

/// Sorts what came out of the store, and takes it out of there: from now on closing a connection ends it.
pub fn take_back(kept: Vec<(String, OwnedFd)>, store: &Store) -> Inheritance {
    let mut inheritance = Inheritance { next_connection: 1, ..Inheritance::default() };
    if kept.is_empty() {
        return inheritance;
    }
    for name in [SOCKETS, STATE, NAMELESS] {
        store.forget(name);
    }
    let (mut sockets, mut states) = (Vec::new(), Vec::new());
    for (name, fd) in kept {
        match name.as_str() {
            SOCKETS => sockets.push(fd),
            STATE => states.push(fd),
            _ => inheritance.foreign += 1,
        }
    }
    let state = match states.pop() {
        Some(fd) => read_state(fd),
        None => Err(Unusable::Missing),
    };
    let mut by_cookie = match state {
        Ok(state) => {
            inheritance.next_connection = state.next_connection;
            state.connections
        }
        Err(why) => {
            inheritance.unusable = (!sockets.is_empty()).then_some(why);
            HashMap::new()
        }
    };
    for socket in sockets {
        let state = cookie_of(&socket).ok().and_then(|cookie| by_cookie.remove(&cookie));
        let peer = Peer::credentials_of(&socket).ok();
        match (state, peer) {
            (Some(state), Some(peer)) if state.uid == peer.uid().raw() => {
                inheritance.connections.push(state.carried(socket, peer));
            }
            _ => {
                inheritance.unusable.get_or_insert(Unusable::Missing);
                inheritance.stateless.push(socket);
            }
        }
    }
    inheritance
}

/// Leaves `connections` to the next process. Returns when the service manager holds them all. Before each part of it
/// that may take as long as [`PATIENCE`], `takes_time` is called.
///
/// # Errors
/// What making the memfd, sending to or waiting for the manager says: then none is sure to be kept.
pub fn leave(connections: &[Carried], next_connection: u64, store: &Store, takes_time: impl Fn()) -> io::Result<()> {
    let state = write_state(connections, next_connection)?;
    takes_time();
    // The state first: without it the sockets are worth nothing, and it must find room.
    store.put(STATE, &[state.as_fd()])?;
    let sockets: Vec<_> = connections.iter().map(|connection| connection.socket.as_fd()).collect();
    for batch in sockets.chunks(BATCH) {
        takes_time();
        store.put(SOCKETS, batch)?;
        store.settle(PATIENCE)?;
    }
    Ok(())
}

/// Takes back what [`leave`] stored, where it failed half-way.
pub fn retract(store: &Store) {
    store.forget(SOCKETS);
    store.forget(STATE);
}

struct State {
    next_connection: u64,
    connections: HashMap<u64, ConnectionState>,
}

struct ConnectionState {
    uid: u32,
    number: u64,
    lines: u64,
    bytes: u64,
    age: Duration,
    flags: u8,
    sent: usize,
    units: Option<Units>,
    held: Vec<u8>,
    unattested: usize,
}

impl ConnectionState {
    fn carried(self, socket: OwnedFd, peer: Peer) -> Carried {
        if let Some(units) = self.units {
            peer.remember_units(Some(units));
        }
        Carried {
            socket,
            peer,
            connection: self.number,
            lines: self.lines,
            bytes: self.bytes,
            age: self.age,
            held: self.held,
            sent: self.sent,
            ended: self.flags & FLAG_ENDED != 0,
            pass_credentials: self.flags & FLAG_PASS_CREDENTIALS != 0,
            unattested: self.unattested,
        }
    }
}

fn write_state(connections: &[Carried], next_connection: u64) -> io::Result<File> {
    let mut body = Vec::new();
    body.extend_from_slice(&next_connection.to_le_bytes());
    body.extend_from_slice(&length(connections.len())?);
    for connection in connections {
        let flags = u8::from(connection.ended) * FLAG_ENDED
            + u8::from(connection.pass_credentials) * FLAG_PASS_CREDENTIALS
            + u8::from(connection.unattested > 0) * FLAG_UNATTESTED;
        let units = connection.peer.remembered_units().map(Units::to_path).unwrap_or_default();
        body.extend_from_slice(&cookie_of(&connection.socket)?.to_le_bytes());
        body.extend_from_slice(&connection.connection.to_le_bytes());
        body.extend_from_slice(&connection.peer.uid().raw().to_le_bytes());
        body.extend_from_slice(&connection.lines.to_le_bytes());
        body.extend_from_slice(&connection.bytes.to_le_bytes());
        let age = u64::try_from(connection.age.as_micros()).unwrap_or(u64::MAX);
        body.extend_from_slice(&age.to_le_bytes());
        body.push(flags);
        body.extend_from_slice(&length(connection.sent)?);
        body.extend_from_slice(&length(units.len())?);
        body.extend_from_slice(units.as_bytes());
        body.extend_from_slice(&length(connection.held.len())?);
        body.extend_from_slice(&connection.held);
        if connection.unattested > 0 {
            body.extend_from_slice(&(connection.unattested as u64).to_le_bytes());
        }
    }
    let mut file = File::from(memfd_create(c"echod-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(MAGIC)?;
    file.write_all(&VERSION.to_le_bytes())?;
    file.write_all(&(body.len() as u64).to_le_bytes())?;
    file.write_all(&checksum(&body).to_le_bytes())?;
    file.write_all(&body)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn length(count: usize) -> io::Result<[u8; 4]> {
    u32::try_from(count).map(u32::to_le_bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn read_state(fd: OwnedFd) -> Result<State, Unusable> {
    let mut file = File::from(fd);
    // Whoever stored it has written it from the start; we share its offset.
    file.rewind().map_err(|_| Unusable::Corrupt)?;
    let mut bytes = Vec::new();
    file.take(MOST_STATE).read_to_end(&mut bytes).map_err(|_| Unusable::Corrupt)?;
    parse_state(&bytes)
}

fn parse_state(bytes: &[u8]) -> Result<State, Unusable> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or(Unusable::Corrupt)?;
    let version = u32::from_le_bytes(take(&mut rest)?);
    if version != VERSION {
        return Err(Unusable::Version(version));
    }
    let length = u64::from_le_bytes(take(&mut rest)?);
    let sum = u64::from_le_bytes(take(&mut rest)?);
    if rest.len() as u64 != length || bytes.len() - rest.len() != HEADER || checksum(rest) != sum {
        return Err(Unusable::Corrupt);
    }
    let next_connection = u64::from_le_bytes(take(&mut rest)?);
    let count = u32::from_le_bytes(take(&mut rest)?);
    let mut connections = HashMap::new();
    for _ in 0..count {
        let cookie = u64::from_le_bytes(take(&mut rest)?);
        let number = u64::from_le_bytes(take(&mut rest)?);
        let uid = u32::from_le_bytes(take(&mut rest)?);
        let lines = u64::from_le_bytes(take(&mut rest)?);
        let bytes = u64::from_le_bytes(take(&mut rest)?);
        let age = Duration::from_micros(u64::from_le_bytes(take(&mut rest)?));
        let [flags] = take(&mut rest)?;
        let sent = u32::from_le_bytes(take(&mut rest)?) as usize;
        let units = take_counted(&mut rest)?;
        let units = std::str::from_utf8(units).ok().and_then(Units::from_path);
        let held = take_counted(&mut rest)?.to_vec();
        let unattested = if flags & FLAG_UNATTESTED != 0 { u64::from_le_bytes(take(&mut rest)?) as usize } else { 0 };
        let state = ConnectionState { uid, number, lines, bytes, age, flags, sent, units, held, unattested };
        connections.insert(cookie, state);
    }
    if rest.is_empty() { Ok(State { next_connection, connections }) } else { Err(Unusable::Corrupt) }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Unusable> {
    let (taken, after) = rest.split_first_chunk::<N>().ok_or(Unusable::Corrupt)?;
    *rest = after;
    Ok(*taken)
}

fn take_counted<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Unusable> {
    let count = u32::from_le_bytes(take(rest)?) as usize;
    let (taken, after) = rest.split_at_checked(count).ok_or(Unusable::Corrupt)?;
    *rest = after;
    Ok(taken)
}

/// FNV-1a: enough to tell that bytes were cut off or changed by accident; nobody else can write them.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn at_rest(held: &[u8], sent: usize) -> (Carried, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = OwnedFd::from(ours);
        let peer = Peer::credentials_of(&socket).unwrap();
        peer.remember_units(Units::from_path("/system.slice/a.service"));
        let carried = Carried {
            socket,
            peer,
            connection: 7,
            lines: 3,
            bytes: 99,
            age: Duration::from_micros(1_234_567),
            held: held.to_vec(),
            sent,
            ended: true,
            pass_credentials: true,
            unattested: sent,
        };
        (carried, theirs)
    }

    fn bytes_of(carried: &[Carried]) -> Vec<u8> {
        let mut file = write_state(carried, 42).unwrap();
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_connection_comes_back_as_it_was_left() {
        let (left, _theirs) = at_rest(b"half a li", 4);
        let state = write_state(std::slice::from_ref(&left), 42).unwrap();
        let kept = vec![(SOCKETS.to_owned(), left.socket), (STATE.to_owned(), state.into())];
        let mut found = take_back(kept, &Store::from_env("NO_SUCH_VARIABLE"));
        assert_eq!(found.next_connection, 42);
        assert_eq!((found.stateless.len(), found.unusable), (0, None));
        let back = found.connections.pop().unwrap();
        assert_eq!((back.connection, back.lines, back.bytes, back.age), (7, 3, 99, Duration::from_micros(1_234_567)));
        assert_eq!((&back.held[..], back.sent, back.ended, back.pass_credentials), (&b"half a li"[..], 4, true, true));
        assert_eq!(back.unattested, 4);
        assert_eq!(back.peer.remembered_units().map(Units::name), Some("a.service"));
    }

    #[test]
    fn a_state_cut_off_anywhere_or_changed_in_any_byte_is_never_believed() {
        let (left, _theirs) = at_rest(b"held", 0);
        let bytes = bytes_of(std::slice::from_ref(&left));
        assert!(parse_state(&bytes).is_ok());
        for end in 0..bytes.len() {
            assert!(parse_state(&bytes[..end]).is_err(), "cut off after {end} bytes");
        }
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 0x10;
            assert!(parse_state(&changed).is_err(), "byte {place} changed");
        }
    }

    #[test]
    fn a_state_of_another_version_is_named_as_such() {
        let (left, _theirs) = at_rest(b"", 0);
        let mut bytes = bytes_of(std::slice::from_ref(&left));
        bytes[MAGIC.len()] = 9;
        assert_eq!(parse_state(&bytes).err(), Some(Unusable::Version(9)));
    }
}
