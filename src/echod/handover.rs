//! Live connections over a restart: what one process leaves in the service manager's store, and the next
//! one takes back.
//!
//! The sockets are stored as they are; beside them one sealed memfd says of each, by its cookie (SO_COOKIE: the
//! kernel's own number for that socket), how far its echo has come. Who the peer is is not believed from there: the
//! kernel tells it again, fixed at connect, from the socket itself. Two names tell the sockets in the middle of a line
//! from the others, for a program that cannot read their state: what comes next on the latter is the beginning of a
//! line, and may be echoed.
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
//!           unattested u64, idle since in µs of CLOCK_MONOTONIC u64, each only with its flag: so that those without it
//!           can be read by programs that know none
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
use nix::time::{ClockId, clock_gettime};

use peergate::handover::cookie_of;
use peergate::peer::Peer;
use peergate::systemd::Store;
use peergate::unit::Units;

use crate::connection::Carried;

/// How the FDNAME of everything begins that a program of this name, of whatever version, has stored.
const OURS: &str = "echod-";
/// FDNAME of the sockets on which a line begins next. Short: the names of all descriptors share one environment
/// variable.
const SOCKETS: &str = "echod-c";
/// FDNAME of the sockets in the middle of something.
const MIDLINE: &str = "echod-m";
/// FDNAME of the state.
const STATE: &str = "echod-s";
/// FDNAME of what is stored only to see whether there was room.
const PROBE: &str = "echod-p";

/// Names systemd gives to stored descriptors that were stored without one.
const NAMELESS: &str = "stored";

/// What `LISTEN_FDNAMES=` may hold: execve(2) takes no string longer than 128 KiB, its closing NUL included.
const LONGEST_NAMES: usize = 128 * 1024 - "LISTEN_FDNAMES=".len() - 1;
/// What of it is left to the listeners, and to what else systemd passes.
const NAMES_OF_OTHERS: usize = 8 * 1024;

const MAGIC: &[u8; 14] = b"echod at rest\n";
const VERSION: u32 = 1;
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

const FLAG_ENDED: u8 = 1;
const FLAG_PASS_CREDENTIALS: u8 = 2;
const FLAG_UNATTESTED: u8 = 4;
const FLAG_IDLE: u8 = 8;

/// How many connections may be left to the next process where the store holds so many descriptors: the state needs a
/// place, so does the look whether everything found one, and the next process has to be told all their names.
pub fn most_left(capacity: usize) -> usize {
    let names = (LONGEST_NAMES - NAMES_OF_OTHERS) / (SOCKETS.len() + 1);
    capacity.saturating_sub(2).min(names)
}

/// Whether a passed descriptor of this name comes from the store, not from a socket unit.
pub fn is_kept(name: &str) -> bool {
    name.starts_with(OURS) || name == NAMELESS
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
    /// Connections without usable state on which a line begins next: what comes is echoed, and that is the end.
    pub stateless: Vec<Carried>,
    /// Connections without usable state in the middle of something: only their end would not be a lie.
    pub midline: Vec<Carried>,
    /// Why not, where there are any of these.
    pub unusable: Option<Unusable>,
    /// The names of stored descriptors that are not ours, or are of a kind that this program does not know.
    pub foreign: Vec<String>,
    /// The number for the next connection.
    pub next_connection: u64,
}

impl Inheritance {
    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.connections.len() + self.stateless.len() + self.midline.len()
    }
}

/// Sorts what came out of the store, and takes it out of there: from now on closing a connection ends it.
pub fn take_back(kept: Vec<(String, OwnedFd)>, store: &Store) -> Inheritance {
    let mut inheritance = Inheritance { next_connection: 1, ..Inheritance::default() };
    let names: BTreeSet<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    names.into_iter().for_each(|name| store.forget(name));
    let (mut sockets, mut states) = (Vec::new(), Vec::new());
    for (name, fd) in kept {
        match name.as_str() {
            SOCKETS | MIDLINE => sockets.push((name, fd)),
            STATE => states.push(File::from(fd)),
            // Left over where a process was killed in the middle of its look.
            PROBE => {}
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
    for (name, socket) in sockets {
        // Whoever else has held it may have changed that.
        let _ = set_nonblocking(&socket);
        let (Ok(cookie), Ok(mut peer)) = (cookie_of(&socket), Peer::credentials_of(&socket)) else {
            inheritance.foreign.push(name);
            continue;
        };
        // Judging asks for them again, one connection at a time.
        peer.forget_groups();
        match by_cookie.remove(&cookie) {
            Some(state) if state.uid == peer.uid().raw() => inheritance.connections.push(state.carried(socket, peer)),
            _ => {
                inheritance.unusable.get_or_insert(Unusable::Missing);
                let of_its_kind = if name == MIDLINE { &mut inheritance.midline } else { &mut inheritance.stateless };
                of_its_kind.extend(Carried::without_state(socket, inheritance.next_connection));
                inheritance.next_connection += 1;
            }
        }
    }
    inheritance
}

/// How many of the descriptors in the store are connections.
pub fn count(kept: &[(String, OwnedFd)]) -> usize {
    kept.iter().filter(|(name, _)| [SOCKETS, MIDLINE].contains(&name.as_str())).count()
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
pub fn leave(connections: &[Carried], next_connection: u64, store: &Store, takes_time: impl Fn()) -> io::Result<()> {
    let state = write_state(connections, next_connection)?;
    takes_time();
    // The state first: without it the sockets are worth little, and it must find room.
    store.put(STATE, &[state.as_fd()])?;
    // What follows may need the last descriptors there are.
    drop(state);
    let (between, midline): (Vec<_>, Vec<_>) = connections.iter().partition(|connection| connection.is_between_lines());
    for (name, connections) in [(SOCKETS, between), (MIDLINE, midline)] {
        let sockets: Vec<_> = connections.iter().map(|connection| connection.socket.as_fd()).collect();
        for batch in sockets.chunks(BATCH) {
            takes_time();
            store.put(name, batch)?;
            store.settle(PATIENCE)?;
        }
    }
    takes_time();
    if !store.holds_all(PROBE, PATIENCE)? {
        let message = "its store (FileDescriptorStoreMax=) is smaller than it was said to be";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}

/// Takes back what [`leave`] stored, where it failed half-way.
pub fn retract(store: &Store) {
    [SOCKETS, MIDLINE, STATE, PROBE].into_iter().for_each(|name| store.forget(name));
    // This process ends next, and with it what has not been taken from it.
    let _ = store.settle(RETRACTED_WITHIN);
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
    idle: Option<Duration>,
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
            idle: self.idle,
            held: self.held,
            sent: self.sent,
            ended: self.flags & FLAG_ENDED != 0,
            pass_credentials: self.flags & FLAG_PASS_CREDENTIALS != 0,
            unattested: self.unattested,
        }
    }
}

/// Piece by piece: whatever is held for connections is not to be in memory once more than the file makes necessary.
fn write_state(connections: &[Carried], next_connection: u64) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"echod-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
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

fn write_connection(connection: &Carried, body: &mut impl Write) -> io::Result<()> {
    let flags = u8::from(connection.ended) * FLAG_ENDED
        + u8::from(connection.pass_credentials) * FLAG_PASS_CREDENTIALS
        + u8::from(connection.unattested > 0) * FLAG_UNATTESTED
        + u8::from(connection.idle.is_some()) * FLAG_IDLE;
    let units = connection.peer.remembered_units().map(Units::to_path).unwrap_or_default();
    body.write_all(&cookie_of(&connection.socket)?.to_le_bytes())?;
    body.write_all(&connection.connection.to_le_bytes())?;
    body.write_all(&connection.peer.uid().raw().to_le_bytes())?;
    body.write_all(&connection.lines.to_le_bytes())?;
    body.write_all(&connection.bytes.to_le_bytes())?;
    body.write_all(&micros(connection.age))?;
    body.write_all(&[flags])?;
    body.write_all(&counted(connection.sent)?)?;
    body.write_all(&counted(units.len())?)?;
    body.write_all(units.as_bytes())?;
    body.write_all(&counted(connection.held.len())?)?;
    body.write_all(&connection.held)?;
    if connection.unattested > 0 {
        body.write_all(&(connection.unattested as u64).to_le_bytes())?;
    }
    if let Some(idle) = connection.idle {
        // What passes until the next process serves counts too, and the clock is the same there.
        body.write_all(&micros(monotonic().saturating_sub(idle)))?;
    }
    Ok(())
}

fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

fn micros(span: Duration) -> [u8; 8] {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX).to_le_bytes()
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
        let (cookie, number, uid) = (body.u64()?, body.u64()?, body.u32()?);
        let (lines, bytes, age) = (body.u64()?, body.u64()?, Duration::from_micros(body.u64()?));
        let [flags] = body.array()?;
        let sent = body.u32()? as usize;
        let units = body.counted()?;
        let units = std::str::from_utf8(&units).ok().and_then(Units::from_path);
        let held = body.counted()?;
        let unattested = if flags & FLAG_UNATTESTED != 0 { body.u64()? as usize } else { 0 };
        let since = if flags & FLAG_IDLE != 0 { Some(Duration::from_micros(body.u64()?)) } else { None };
        let idle = since.map(|since| monotonic().saturating_sub(since));
        let state = ConnectionState { uid, number, lines, bytes, age, idle, flags, sent, units, held, unattested };
        connections.insert(cookie, state);
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
            idle: (sent > 0).then_some(Duration::from_micros(890)),
            held: held.to_vec(),
            sent,
            ended: true,
            pass_credentials: true,
            unattested: sent,
        };
        (carried, theirs)
    }

    fn parse(bytes: &[u8]) -> Result<State, Unusable> {
        let (header, body) = bytes.split_first_chunk().ok_or(Unusable::Corrupt)?;
        parse_state(header, body, body.len() as u64)
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
        assert!(back.idle.is_some_and(|idle| idle >= Duration::from_micros(890)), "and what has passed since");
        assert_eq!(back.peer.remembered_units().map(Units::name), Some("a.service"));
    }

    #[test]
    fn a_state_cut_off_anywhere_or_changed_in_any_byte_is_never_believed() {
        let (left, _theirs) = at_rest(b"held", 0);
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
        let (left, _theirs) = at_rest(b"", 0);
        let mut bytes = bytes_of(std::slice::from_ref(&left));
        bytes[MAGIC.len()] = 9;
        assert_eq!(parse(&bytes).err(), Some(Unusable::Version(9)));
    }

    #[test]
    fn no_more_are_left_than_the_next_process_can_be_told_the_names_of() {
        for capacity in [0, 1, 2, 3, 4352, 16_000, 20_000, 1 << 20] {
            let left = most_left(capacity);
            assert!(left + 2 <= capacity || left == 0, "{left} of {capacity}");
            // As systemd writes them, with a listener of the longest name there is.
            let names = [vec![SOCKETS; left], vec![STATE], vec!["x"; 1]].concat().join(":").len() + 255;
            assert!("LISTEN_FDNAMES=".len() + names < 128 * 1024, "{names} bytes for {left}");
        }
        assert_eq!(most_left(4352), 4350);
        assert_eq!([SOCKETS.len(), STATE.len(), PROBE.len()], [MIDLINE.len(); 3]);
    }
}
