//! Live connections of a service over a restart. On tokio: `tokio/restart.rs`.
//!
//! A connection's bytes are the version of this format, the length of what serde has written, that, and what was received
//! and not consumed. What serde writes is JSON: a state of another version of the program is read by the names of its
//! fields, or not at all, and never taken for something else.

use std::io;
use std::marker::PhantomData;
use std::mem::take;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::threads::{Serve, Threads};
use super::{Attendant, Core, Error, Opened, Service};
use crate::activation::address_of;
use crate::audit::{At, Event, Reason, Severity};
use crate::connection::Connection;
use crate::fd_passing::Stream;
use crate::gate::Admission;
use crate::handover::{self, Found, Left, Parcel};
use crate::peer::{Peer, Remembered};
use crate::permits::Terms;
use crate::policy::Policy;
use crate::session::{Link, record};

const VERSION: u8 = 1;
/// How long the service manager may take to store the connections.
const PATIENCE: Duration = Duration::from_secs(20);

/// A service whose live connections go to the next process: [`Service::hand_over`].
#[must_use = "a service does nothing until it serves"]
pub struct HandOver<T, W> {
    service: Service<T>,
    work: PhantomData<fn() -> W>,
}

impl<T: Terms> Service<T> {
    /// Leaves live connections to the next process when the service is restarted, each with its state, a `W`.
    ///
    /// The connections are served by [`HandOver::serve_threads`], or on tokio by `HandOver::block_on`.
    ///
    /// The units decide what is a restart: `KillSignal=SIGINT` and `RestartKillSignal=SIGTERM`, and
    /// `FileDescriptorStoreMax=1` for room ([`handover`]). Otherwise connections end, as without this.
    ///
    /// ```no_run
    /// use std::io::{BufRead, Write};
    ///
    /// use peergate::{Error, Service};
    ///
    /// /// What a connection is in the middle of.
    /// #[derive(Default, serde::Serialize, serde::Deserialize)]
    /// struct Work {
    ///     line: Vec<u8>,
    /// }
    ///
    /// fn main() -> Result<(), Error> {
    ///     let service = Service::<()>::from_systemd("shout").policy_file("/etc/shout.toml").hand_over::<Work>();
    ///     service.serve_threads(|connection, Work { line }| {
    ///         // A line that has no end yet stays in `line`, for the next process.
    ///         while connection.read_until(b'\n', line)? > 0 && line.ends_with(b"\n") {
    ///             connection.write_all(&line.to_ascii_uppercase())?;
    ///             line.clear();
    ///         }
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn hand_over<W>(self) -> HandOver<T, W>
    where
        W: Serialize + DeserializeOwned + Default + Send + 'static,
    {
        HandOver { service: self, work: PhantomData }
    }
}

impl<T, W> std::fmt::Debug for HandOver<T, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HandOver").field(&self.service).finish()
    }
}

impl<T: Terms, W: Serialize + DeserializeOwned + Default + Send + 'static> HandOver<T, W> {
    /// As [`Service::serve_threads`]. At a restart a read returns 0, as at the end of file, before all that came is read.
    /// `serve` returns then, with everything in `work` that the next process needs to go on; what is received and not consumed
    /// is kept beside it. The connection is not closed: the next process calls `serve` with that work.
    ///
    /// A connection whose `serve` fails, panics, or does not return within five seconds is closed.
    ///
    /// # Errors
    /// What keeps the service from starting, as a sentence.
    pub fn serve_threads(
        self,
        serve: impl Fn(&mut Connection<T>, &mut W) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let mut opened = self.service.open()?;
        let inherited = Inheritance::take_back(&mut opened);
        let (core, journal, plan) = Core::open(opened)?;
        let mut attendant = Attendant::new(&core, plan, journal);
        let left = Arc::new(Mutex::default());
        let threads = Threads::new(&core, Carrying { serve, left: Arc::clone(&left), work: PhantomData });
        inherited.go_on(&core, |admission, start| threads.begin(admission, true, start));
        threads.start()?;
        let ending = attendant.attend(|| false);
        attendant.begin_end();
        threads.stop_accepting();
        attendant.leave_or_end_all(ending);
        attendant.wait_until(|| core.live.is_empty());
        leave(&attendant, &left);
        attendant.end();
        Ok(())
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn into_service(self) -> Service<T> {
        self.service
    }
}

/// Connections on their way to another process, each with its bytes.
pub(crate) type Leaving = Mutex<Vec<(OwnedFd, Vec<u8>)>>;

/// What serving begins with: the state, and what was received and not consumed.
pub(crate) type Start<W> = (W, Vec<u8>);

/// Leaves connections to the next process. What cannot be left is closed in order.
pub(crate) fn leave<T: Terms>(attendant: &Attendant<T>, left: &Leaving) {
    let Attendant { core, plan, .. } = attendant;
    let mut left = take(&mut *left.lock().unwrap_or_else(PoisonError::into_inner));
    let Some((_, next_connection)) = core.state().filter(|_| !left.is_empty()) else { return };
    plan.notifier.extend_timeout(PATIENCE * 2);
    let parcels = left.iter().map(|(socket, state)| Parcel::new(socket.as_fd(), state.clone()));
    let header = next_connection.to_le_bytes();
    let (count, error) = match handover::leave(&plan.store, &plan.name, &header, parcels, PATIENCE) {
        Ok(Left { connections, stopped_by }) => (connections, stopped_by),
        Err(error) => (0, Some(error)),
    };
    let ending = left.split_off(count);
    let why = error.map(|error| format!(": {error}")).unwrap_or_default();
    let severity = if ending.is_empty() { Severity::Notice } else { Severity::Warning };
    core.note(severity, format!("{count} connections left to the next process, {} ended{why}", ending.len()));
    ending.into_iter().for_each(|(socket, _)| core.close_in_order(socket));
}

/// Keeps a connection that was served until now, with its state and what was received and not consumed, for the next
/// process. If the reader was not told to leave it, it is closed.
pub(crate) fn finish<T: Terms, W: Serialize>(
    core: &Core<T>,
    link: Link<T>,
    (work, received): Start<W>,
    left: &Leaving,
) {
    if !link.is_left() {
        return;
    }
    let (number, process) = (link.session().connection(), link.session().remembered());
    match state_of(&State { number, process, work }, &received) {
        Ok(state) => link.leave_socket(|socket| {
            left.lock().unwrap_or_else(PoisonError::into_inner).push((socket, state));
        }),
        Err(error) => core.note(Severity::Error, format!("the state of connection {number}: {error}")),
    }
}

/// The function that serves, and what it has left.
struct Carrying<F, W> {
    serve: F,
    left: Arc<Leaving>,
    work: PhantomData<fn() -> W>,
}

impl<T, F, W> Serve<T> for Carrying<F, W>
where
    T: Terms,
    F: Fn(&mut Connection<T>, &mut W) -> io::Result<()> + Send + Sync + 'static,
    W: Serialize + Default + Send + 'static,
{
    type Start = Start<W>;

    fn serve(&self, core: &Core<T>, link: Arc<Link<T>>, (mut work, received): Self::Start) {
        let mut connection = Connection::new(link, received);
        if (self.serve)(&mut connection, &mut work).is_err() {
            return;
        }
        let (mut link, received) = connection.into_parts();
        // The thread that ends connections holds one for a moment.
        let link = loop {
            match Arc::try_unwrap(link) {
                Ok(link) => break link,
                Err(held) => link = held,
            }
            thread::yield_now();
        };
        finish(core, link, (work, received), &self.left);
    }
}

/// What serde writes.
#[derive(Serialize, Deserialize)]
struct State<W> {
    number: u64,
    process: Remembered,
    work: W,
}

fn state_of<W: Serialize>(state: &State<W>, received: &[u8]) -> io::Result<Vec<u8>> {
    let written = serde_json::to_vec(state)?;
    let length = u32::try_from(written.len()).map_err(io::Error::other)?;
    Ok([&[VERSION], &length.to_le_bytes()[..], &written, received].concat())
}

/// `None` where the bytes are of another version, cut off, or not of this type.
fn restore<W: DeserializeOwned>(bytes: &[u8]) -> Option<(State<W>, Vec<u8>)> {
    let (length, rest) = bytes.strip_prefix(&[VERSION])?.split_first_chunk()?;
    let (written, received) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    Some((serde_json::from_slice(written).ok()?, received.to_vec()))
}

/// A connection of an earlier process, with the state that it left.
struct Restored<W> {
    socket: OwnedFd,
    peer: Peer,
    number: u64,
    start: Start<W>,
}

/// What an earlier process left.
pub(crate) struct Inheritance<W> {
    connections: Vec<Restored<W>>,
    /// Connections whose state cannot be used.
    ending: Vec<OwnedFd>,
}

impl<W: DeserializeOwned> Inheritance<W> {
    pub(crate) fn take_back<T: Terms>(opened: &mut Opened<T>) -> Self {
        let plan = &mut opened.plan;
        let mut left = handover::take_back(take(&mut plan.kept), &plan.name, &plan.store);
        let header = left.header().and_then(|bytes| bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)));
        let mut inheritance = Self { connections: Vec::new(), ending: Vec::new() };
        for found in &mut left {
            match found {
                Found::Connection(Parcel { socket, state, .. }) => inheritance.take(socket, &state),
                Found::Unusable { sockets, .. } => inheritance.ending.extend(sockets),
            }
        }
        let numbers = inheritance.connections.iter().map(|one| one.number.saturating_add(1));
        opened.setup.first_connection = numbers.fold(header.unwrap_or(1), u64::max);
        inheritance
    }

    fn take(&mut self, socket: OwnedFd, bytes: &[u8]) {
        let state = restore(bytes).filter(|_| handover::set_nonblocking(&socket).is_ok());
        match state.and_then(|state| Some((state, Peer::credentials_of(&socket).ok()?))) {
            Some(((state, received), peer)) => {
                peer.remember(state.process);
                let (number, start) = (state.number, (state.work, received));
                self.connections.push(Restored { socket, peer, number, start });
            }
            None => self.ending.push(socket),
        }
    }

    /// Judges the connections by the policy in force. What it admits goes on, each with a place in the limits.
    pub(crate) fn go_on<T: Terms>(self, core: &Core<T>, mut begin: impl FnMut(Admission<T>, Start<W>)) {
        let Some((policy, _)) = core.state() else { return };
        let (ended, all) = (self.ending.len(), self.ending.len() + self.connections.len());
        if all == 0 {
            return;
        }
        let mut revoked = 0;
        for Restored { socket, peer, number, start } in self.connections {
            match judge(core, &policy, peer, socket, number) {
                Some(admission) => begin(admission, start),
                None => revoked += 1,
            }
        }
        self.ending.into_iter().for_each(|socket| core.close_in_order(socket));
        let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
        let carried = all - ended - revoked;
        core.note(
            severity,
            format!("{carried} connections carried over the restart, {ended} ended, {revoked} revoked"),
        );
    }
}

/// `None` where the policy denies the peer now: the connection is revoked.
fn judge<T: Terms>(
    core: &Core<T>,
    policy: &Policy<T>,
    mut peer: Peer,
    socket: OwnedFd,
    number: u64,
) -> Option<Admission<T>> {
    let stream = Stream::inherited(socket, false);
    let listener = address_of(&stream).unwrap_or_else(|_| "unnamed".into());
    match core.live.judge.judge_again(&mut peer, &stream, policy) {
        Ok(rule) => {
            let permit = core.permits.resume(policy.owner_of(peer.uid()));
            let mut admission = Admission::new(stream, peer, rule, permit);
            (admission.connection, admission.listener) = (number, listener);
            Some(admission)
        }
        Err(denial) => {
            let at = At::from((&listener, number));
            let mut record = record(Event::Revoked, Some(Reason::Policy), denial.rule(), at, &peer);
            record.text = Some(denial.to_string());
            core.audit.write(record);
            core.closer().close_denied(stream);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::identity::subject::Login;
    use crate::permits::LimitExceeded;
    use crate::policy::{Accounts, SubordinateRange};
    use crate::unit::Units;
    use crate::{Limits, Uid, activation};

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Work {
        line: Vec<u8>,
    }

    fn bytes() -> Vec<u8> {
        let work = Work { line: b"half a li".to_vec() };
        let units = Units::from_path("/system.slice/a.service");
        let process = Remembered::new(units.as_ref(), Login::User(Uid::new(1001)));
        state_of(&State { number: 7, process, work }, b"rest").unwrap()
    }

    #[test]
    fn a_state_comes_back_as_it_was_left() {
        let (state, received) = restore::<Work>(&bytes()).unwrap();
        assert_eq!((state.number, &state.work.line[..], &received[..]), (7, &b"half a li"[..], &b"rest"[..]));
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = Peer::credentials_of(&ours).unwrap();
        peer.remember(state.process);
        assert_eq!(peer.remembered_units().map(Units::name), Some("a.service"));
        assert_eq!(peer.login(), Login::User(Uid::new(1001)));
    }

    #[test]
    fn a_state_of_another_type_or_version_or_cut_off_is_not_used() {
        #[derive(Default, Deserialize)]
        struct Other {
            #[allow(dead_code)]
            count: u32,
        }
        assert!(restore::<Other>(&bytes()).is_none());
        let mut later = bytes();
        later[0] += 1;
        assert!(restore::<Work>(&later).is_none());
        let whole = bytes().len() - b"rest".len();
        for length in 0..whole {
            assert!(restore::<Work>(&bytes()[..length]).is_none(), "{length}");
        }
    }

    #[test]
    fn a_carried_connection_under_a_subordinate_id_counts_as_its_owners() {
        let path = std::env::temp_dir().join(format!("restart-test-{}.sock", std::process::id()));
        let (owner, me) = (Uid::new(64_021), Uid::effective());
        let service = Service::from_systemd("restart-test").listener(activation::bind(&path).unwrap());
        let mut opened = service.policy(Policy::<()>::owner_only(me)).open().unwrap();
        let accounts = Accounts::new([SubordinateRange::new(owner, me.raw(), me.raw())], [], []);
        opened.setup.config.policy = Arc::new(Policy::owner_only(me).with_accounts(accounts).unwrap());
        let (core, _journal, _plan) = Core::open(opened).unwrap();

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::credentials_of(&ours).unwrap();
        let carried = Restored { socket: ours.into(), peer, number: 7, start: ((), Vec::new()) };
        let mut admitted = Vec::new();
        Inheritance { connections: vec![carried], ending: Vec::new() }
            .go_on(&core, |admission, _| admitted.push(admission));
        assert_eq!(admitted.len(), 1);
        let one_each = Limits::new(10, 1);
        assert_eq!(core.permits.acquire(owner, &one_each, &()).unwrap_err(), LimitExceeded::User);
        assert!(core.permits.acquire(me, &one_each, &()).is_ok());
    }
}
