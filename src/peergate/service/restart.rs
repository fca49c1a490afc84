//! Live connections of a service with threads, over a restart.
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

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::attend::Ending;
use super::threads::{Serve, Threads};
use super::{Attendant, Core, Error, Opened, Plan, Service};
use crate::activation::address_of;
use crate::audit::{At, Event, Reason, Severity};
use crate::connection::Connection;
use crate::fd_passing::Stream;
use crate::gate::Admission;
use crate::handover::{self, Found, Left, Parcel};
use crate::peer::{Peer, Remembered};
use crate::permits::Terms;
use crate::policy::{Policy, Verdict};
use crate::session::{Link, record, why_denied};

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
        inherited.go_on(&core, &threads);
        threads.start()?;
        let ending = attendant.attend(|| false);
        attendant.begin_end();
        threads.stop_accepting();
        let plan = &attendant.plan;
        let follows = ending == Ending::Stop && plan.store.is_present() && !plan.signals.stop_is_final();
        if follows && !core.live.is_empty() {
            core.live.leave_all()
        } else {
            core.live.end_all()
        }
        attendant.wait_until(|| core.live.is_empty());
        let left = take(&mut *left.lock().unwrap_or_else(PoisonError::into_inner));
        leave(&core, &attendant.plan, left);
        attendant.end();
        Ok(())
    }
}

/// A connection on its way to another process, and its bytes.
type Leaving = (OwnedFd, Vec<u8>);

/// Leaves connections to the next process. What cannot be left is closed in order.
fn leave<T: Terms>(core: &Core<T>, plan: &Plan<T>, mut left: Vec<Leaving>) {
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
    close_in_order(core, ending.into_iter().map(|(socket, _)| socket));
}

fn close_in_order<T: Terms>(core: &Core<T>, sockets: impl IntoIterator<Item = OwnedFd>) {
    let nothing = Arc::from(&b""[..]);
    sockets.into_iter().for_each(|socket| core.closer().close_with(socket, &nothing));
}

/// The function that serves, and what it has left.
struct Carrying<F, W> {
    serve: F,
    left: Arc<Mutex<Vec<Leaving>>>,
    work: PhantomData<fn() -> W>,
}

impl<T, F, W> Serve<T> for Carrying<F, W>
where
    T: Terms,
    F: Fn(&mut Connection<T>, &mut W) -> io::Result<()> + Send + Sync + 'static,
    W: Serialize + Default + Send + 'static,
{
    /// The state, and what was received and not consumed.
    type Start = (W, Vec<u8>);

    fn serve(&self, core: &Core<T>, link: Arc<Link<T>>, (mut work, received): Self::Start) {
        let mut connection = Connection::new(link, received);
        if (self.serve)(&mut connection, &mut work).is_err() {
            return;
        }
        let (number, process) = (connection.session().connection(), connection.session().remembered());
        let (mut link, received) = connection.into_parts();
        if !link.is_left() {
            return;
        }
        // The thread that ends connections holds one for a moment.
        let link = loop {
            match Arc::try_unwrap(link) {
                Ok(link) => break link,
                Err(held) => link = held,
            }
            thread::yield_now();
        };
        match state_of(&State { number, process, work }, &received) {
            Ok(state) => link.leave_socket(|socket| {
                self.left.lock().unwrap_or_else(PoisonError::into_inner).push((socket, state));
            }),
            Err(error) => core.note(Severity::Error, format!("the state of connection {number}: {error}")),
        }
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

/// A connection of an earlier process.
struct Inherited<W> {
    socket: OwnedFd,
    peer: Peer,
    number: u64,
    /// What serving begins with.
    start: (W, Vec<u8>),
}

/// What an earlier process left.
struct Inheritance<W> {
    connections: Vec<Inherited<W>>,
    /// Connections whose state cannot be used.
    ending: Vec<OwnedFd>,
}

impl<W: DeserializeOwned> Inheritance<W> {
    fn take_back<T: Terms>(opened: &mut Opened<T>) -> Self {
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
        let state = restore(bytes).filter(|_| set_nonblocking(&socket).is_ok());
        match state.and_then(|state| Some((state, Peer::credentials_of(&socket).ok()?))) {
            Some(((state, received), peer)) => {
                peer.remember(state.process);
                let (number, start) = (state.number, (state.work, received));
                self.connections.push(Inherited { socket, peer, number, start });
            }
            None => self.ending.push(socket),
        }
    }

    /// Judges the connections by the policy in force. What it admits goes on, each with a place in the limits.
    fn go_on<T: Terms, S: Serve<T, Start = (W, Vec<u8>)>>(self, core: &Core<T>, threads: &Threads<T, S>) {
        let Some((policy, _)) = core.state() else { return };
        let (ended, all) = (self.ending.len(), self.ending.len() + self.connections.len());
        if all == 0 {
            return;
        }
        let mut revoked = 0;
        for Inherited { socket, peer, number, start } in self.connections {
            match judge(core, &policy, peer, socket, number) {
                Some(admission) => threads.begin(admission, true, start),
                None => revoked += 1,
            }
        }
        close_in_order(core, self.ending);
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
    let verdict = core.live.judge_peer(&mut peer, &stream, policy);
    match verdict {
        Verdict::Admitted(rule) => {
            let permit = core.permits.resume(peer.uid());
            let mut admission = Admission::new(stream, peer, Arc::clone(rule), permit);
            (admission.connection, admission.listener) = (number, listener);
            Some(admission)
        }
        Verdict::Denied(rule) => {
            let (rule, text) = why_denied(rule.map(|rule| rule.name()));
            let at = At::from((&listener, number));
            let mut record = record(Event::Revoked, Some(Reason::Policy), rule, at, &peer);
            record.text = Some(text);
            core.audit.write(record);
            core.closer().close_denied(stream);
            None
        }
    }
}

/// Another process that held the socket may have changed that.
fn set_nonblocking(socket: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Uid;
    use crate::identity::subject::Login;
    use crate::unit::Units;

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
}
