//! Live connections over a restart: what [`peergate::handover`] carries for a daemon.
//!
//! The service's own bytes are the number of the next connection. A connection's bytes begin with the versions of this
//! format and of the protocol's state and with whether nothing is pending (1), which a program of another version can read
//! too; then comes, written by postcard:
//! what is known of its peer's process, whether unread data may carry descriptors, its progress, the protocol's state. The
//! peer's credentials are not among them: the
//! kernel tells them again, fixed at connect, from the socket itself.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use peergate::fd_passing::Passing;
use peergate::handover::{self, Fault, Found, Parcel};
use peergate::peer::{Peer, Remembered};
use peergate::systemd::Store;
use serde::{Deserialize, Serialize};

use crate::connection::{Carried, Connection, Fate, Progress};
use crate::protocol::Protocol;

/// The version of what follows in a connection's bytes, up to the protocol's state, which has a version of its own
/// ([`Protocol::STATE_VERSION`]). Raise it with any change of [`Content`] or [`Progress`]: connections left by another version
/// are ended in order.
const VERSION: u8 = 2;
/// The name that systemd gives to descriptors that were stored without one.
const NAMELESS: &str = "stored";
/// Stands for the number of a connection that came without a state.
const UNKNOWN: u64 = 0;
/// Descriptors that a process needs besides those of its connections.
const SPARE: usize = 64;
/// How long the service manager may take to store one descriptor.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a passed descriptor of this name comes from the store, not from a socket unit. A program of this name, of
/// whatever version, stores under its name or names that begin with it.
pub fn is_kept<P: Protocol>(name: &str) -> bool {
    name.strip_prefix(P::NAME).is_some_and(|rest| rest.is_empty() || rest.starts_with('-')) || name == NAMELESS
}

/// What an earlier process left.
pub struct Inheritance<P: Protocol> {
    /// Its connections, in the order in which they were left.
    pub connections: Vec<Carried<P>>,
    /// How many descriptors of connections have not come: the kernel has closed them.
    pub lost: usize,
    /// Why the state of some cannot be used: the first reason found.
    pub unusable: Option<Unusable>,
    /// The names of stored descriptors that are not ours, or are of a kind that this program does not know.
    pub foreign: Vec<String>,
    /// The number for the next connection.
    pub next_connection: u64,
}

/// Why the state of a connection cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It was left by another version of the program: the version of this format, and of the protocol's state.
    Version(u8, u8),
    /// It is cut off or corrupted.
    Corrupt,
    /// The message that it was in cannot be used.
    Message(Fault),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version, state) => {
                write!(f, "their state is of version {version}.{state}, which this program does not know")
            }
            Self::Corrupt => write!(f, "their state is cut off or corrupted"),
            Self::Message(fault) => fault.fmt(f),
        }
    }
}

/// Takes back what an earlier process left, and has the service manager forget it: from now on closing a connection ends it.
///
/// The limit of descriptors may be lower than that of the earlier process. Connections for which it leaves no room go to
/// `end`, before more are read: the kernel would close what it finds no number for.
pub fn take_back<P: Protocol>(
    kept: Vec<(String, OwnedFd)>,
    store: &Store,
    mut end: impl FnMut(Vec<Carried<P>>),
) -> Inheritance<P> {
    let room = room_for_connections();
    let mut left = handover::take_back(kept, P::NAME, store);
    let next_connection = left.header().and_then(|bytes| postcard::from_bytes(bytes).ok()).unwrap_or(1);
    let foreign = left.foreign().to_vec();
    let mut inheritance = Inheritance { connections: Vec::new(), lost: 0, unusable: None, foreign, next_connection };
    let (mut held, mut excess) = (0, Vec::new());
    while let Some(found) = left.next() {
        let before = inheritance.connections.len();
        let fds = match found {
            Found::Connection(Parcel { socket, further, state }) => {
                let fds = 1 + further.len();
                inheritance.take(socket, further, &state);
                fds
            }
            Found::Unusable { fault, sockets } => {
                let fds = sockets.len();
                if let Fault::Descriptors { said, came } = fault {
                    inheritance.lost += said.saturating_sub(came);
                }
                inheritance.unusable.get_or_insert(Unusable::Message(fault));
                sockets.into_iter().for_each(|socket| inheritance.take_without_state(socket, Fate::EndsAtOnce));
                fds
            }
        };
        if held + fds > room {
            excess.extend(inheritance.connections.drain(before..));
        } else {
            held += fds;
        }
        // The next message is still to be read.
        if left.size_hint().0 == 0 && !excess.is_empty() {
            end(std::mem::take(&mut excess));
        }
    }
    inheritance.number_the_rest();
    inheritance
}

/// How many descriptors of connections may be held, so that there is room for a message's and for everything else.
fn room_for_connections() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(open + handover::MOST_FDS + SPARE)
}

impl<P: Protocol> Inheritance<P> {
    fn take(&mut self, socket: OwnedFd, further: Vec<OwnedFd>, bytes: &[u8]) {
        // Another process that held it may have changed that.
        let _ = handover::set_nonblocking(&socket);
        // Judging asks for the groups where the policy depends on them.
        let Ok(peer) = Peer::ids_of(&socket) else {
            self.unusable.get_or_insert(Unusable::Corrupt);
            return;
        };
        match restore::<P>(bytes, &peer) {
            Ok((passing, progress, mut protocol)) => {
                protocol.set_further(further);
                let passing = Some(passing);
                self.connections.push(Carried { socket, peer, progress, protocol, passing, fate: Fate::GoesOn });
            }
            Err((why, fate)) => {
                self.unusable.get_or_insert(why);
                self.take_without_state(socket, fate);
            }
        }
    }

    fn take_without_state(&mut self, socket: OwnedFd, fate: Fate) {
        let _ = handover::set_nonblocking(&socket);
        self.connections.extend(Carried::without_state(socket, UNKNOWN, fate));
    }

    /// Gives each connection without a state a number above the known ones. Where the opening message is lost, so is the
    /// number for the next connection.
    fn number_the_rest(&mut self) {
        let numbers = self.connections.iter().map(|one| one.progress.number);
        self.next_connection = numbers.map(|number| number.saturating_add(1)).fold(self.next_connection, u64::max);
        for one in self.connections.iter_mut().filter(|one| one.progress.number == UNKNOWN) {
            one.progress.number = self.next_connection;
            self.next_connection = self.next_connection.saturating_add(1);
        }
    }
}

/// Leaves `connections` to the next process, and returns how many of them, from the first on, and why not the rest.
///
/// # Errors
/// See [`handover::leave`]: then none was left.
pub fn leave<P: Protocol>(
    connections: &[Box<Connection<P>>],
    next_connection: u64,
    store: &Store,
) -> io::Result<handover::Left> {
    let header = postcard::to_allocvec(&next_connection).map_err(io::Error::other)?;
    let parcels = connections.iter().map(|connection| Parcel {
        socket: connection.socket.as_fd(),
        further: connection.protocol.further(),
        state: state_of(connection),
    });
    handover::leave(store, P::NAME, &header, parcels, PATIENCE)
}

/// What postcard writes.
#[derive(Serialize, Deserialize)]
struct Content<R, S> {
    process: Remembered,
    passing: Passing,
    progress: R,
    protocol: S,
}

fn state_of<P: Protocol>(connection: &Connection<P>) -> Vec<u8> {
    let Connection { socket, peer, progress, protocol, .. } = connection;
    let content = Content { process: peer.remembered(), passing: socket.passing(), progress, protocol };
    let bytes = vec![VERSION, P::STATE_VERSION, protocol.is_at_rest().into()];
    // What cannot be written is ended in order by the next process.
    postcard::to_extend(&content, bytes).unwrap_or_default()
}

fn restore<P: Protocol>(bytes: &[u8], peer: &Peer) -> Result<(Passing, Progress, P), (Unusable, Fate)> {
    let [version, state_version, is_at_rest, content @ ..] = bytes else {
        return Err((Unusable::Corrupt, Fate::EndsAtOnce));
    };
    // What comes next belongs to what the other end of a second descriptor has got by now, and that is not known.
    let fate = if *is_at_rest == 1 && !P::HAS_SECOND { Fate::EndsInOrder } else { Fate::EndsAtOnce };
    if (*version, *state_version) != (VERSION, P::STATE_VERSION) {
        return Err((Unusable::Version(*version, *state_version), fate));
    }
    let content: Content<Progress, P> = match postcard::take_from_bytes(content) {
        Ok((content, [])) => content,
        _ => return Err((Unusable::Corrupt, fate)),
    };
    peer.remember(content.process);
    Ok((content.passing, content.progress, content.protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Lines, admission, owner};
    use peergate::unit::Units;
    use peergate::{Login, Uid};
    use std::os::unix::net::UnixStream;

    /// A connection in the middle of a line, and its other end.
    fn at_rest(held: &[u8]) -> (Box<Connection<Lines>>, UnixStream) {
        let (admission, theirs) = admission(&owner(), 7);
        let units = Units::from_path("/system.slice/a.service");
        admission.peer.remember(Remembered::new(units.as_ref(), Login::User(Uid::new(1001))));
        let mut connection: Connection<Lines> = Connection::admitted(admission);
        connection.protocol.held = held.to_vec();
        connection.protocol.bytes = 99;
        connection.progress.pass_credentials = true;
        connection.progress.unattested = 4;
        (Box::new(connection), theirs)
    }

    fn restored(bytes: &[u8]) -> Result<(Peer, Progress, Lines), (Unusable, Fate)> {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::credentials_of(&ours).unwrap();
        restore(bytes, &peer).map(|(_, progress, protocol)| (peer, progress, protocol))
    }

    #[test]
    fn a_connection_comes_back_as_it_was_left() {
        let (left, _theirs) = at_rest(b"half a li");
        let (peer, progress, protocol) = restored(&state_of(&left)).unwrap();
        assert_eq!(protocol, left.protocol);
        assert_eq!(format!("{progress:?}"), format!("{:?}", left.progress));
        assert_eq!(peer.remembered_units().map(Units::name), Some("a.service"));
        assert_eq!(peer.login(), Login::User(Uid::new(1001)));
    }

    #[test]
    fn a_state_cut_off_or_of_another_version_is_never_used() {
        for (held, fate) in [(&b""[..], Fate::EndsInOrder), (b"half", Fate::EndsAtOnce)] {
            let (left, _theirs) = at_rest(held);
            let bytes = state_of(&left);
            for end in 3..bytes.len() {
                assert_eq!(restored(&bytes[..end]).unwrap_err(), (Unusable::Corrupt, fate), "{end} bytes");
            }
            let longer = [&bytes[..], &[0]].concat();
            assert_eq!(restored(&longer).unwrap_err(), (Unusable::Corrupt, fate));
            let later = [&[9], &bytes[1..]].concat();
            assert_eq!(restored(&later).unwrap_err(), (Unusable::Version(9, 1), fate));
            let later_state = [&bytes[..1], &[7], &bytes[2..]].concat();
            assert_eq!(restored(&later_state).unwrap_err(), (Unusable::Version(VERSION, 7), fate));
        }
        assert_eq!(restored(b"").unwrap_err(), (Unusable::Corrupt, Fate::EndsAtOnce));
    }
}
