mod limits;
mod store;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, SockType, sendmsg, socketpair};
use nix::sys::stat::fstat;

use super::*;
use crate::sys::{Received, receive_descriptors};

const NAME: &str = "hello";
const PATIENCE: Duration = Duration::from_secs(60);

/// systemd's side of the store.
struct Manager {
    address: String,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    store: Vec<(String, OwnedFd)>,
    capacity: usize,
    /// Barriers of a manager that does not answer.
    barriers: Option<Vec<OwnedFd>>,
    /// Whether it does not do what FDSTOREREMOVE asks for.
    keeps_all: bool,
    messages: Vec<String>,
}

impl Held {
    fn take_in(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        if text.contains("FDSTORE=1") {
            for fd in fds {
                if self.store.len() < self.capacity {
                    self.store.push((name.to_owned(), fd));
                }
            }
        } else if text.contains("FDSTOREREMOVE=1") {
            if !self.keeps_all {
                self.store.retain(|(stored, _)| stored != name);
            }
        } else if let Some(barriers) = &mut self.barriers {
            barriers.extend(fds);
        }
        self.messages.push(text.to_owned());
    }
}

impl Manager {
    fn new(capacity: usize) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("peergate-handover-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let held = Arc::new(Mutex::new(Held { capacity, ..Held::default() }));
        let filled = Arc::clone(&held);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let mut question = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut question, PollTimeout::NONE);
                let Ok(Received { length, fds, .. }) = receive_descriptors(socket.as_fd(), &mut buffer, false) else {
                    continue;
                };
                match std::str::from_utf8(&buffer[..length]).unwrap() {
                    "END" => return,
                    text => filled.lock().unwrap().take_in(text, fds),
                }
            }
        });
        Self { address: format!("@{name}"), held }
    }

    fn store(&self) -> Store {
        Store::at(Path::new(&self.address))
    }

    /// What a next process would be passed, once all that was sent has been read.
    fn passed(&self) -> Vec<(String, OwnedFd)> {
        self.catch_up();
        let copy = |(name, fd): &(String, OwnedFd)| (name.clone(), fd.try_clone().unwrap());
        self.held.lock().unwrap().store.iter().map(copy).collect()
    }

    fn catch_up(&self) {
        self.held.lock().unwrap().barriers.take();
        let any = fs::File::open("/dev/null").unwrap();
        self.store().put_unwatched("catch up", any.as_fd(), PATIENCE).unwrap();
        self.held.lock().unwrap().store.retain(|(name, _)| name != "catch up");
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let name = SocketAddr::from_abstract_name(&self.address[1..]).unwrap();
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to_addr(b"END", &name));
    }
}

/// Runs `body` in a process of its own, that of this test alone: `name` is the test's. What it says is returned.
fn alone(name: &str, address: &str, body: impl FnOnce(&str)) -> Option<String> {
    if let Ok(address) = env::var("HANDOVER_ALONE") {
        body(&address);
        return None;
    }
    let output = start_alone(name, address).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    Some(said)
}

fn start_alone(name: &str, address: &str) -> Child {
    Command::new(env::current_exe().unwrap())
        .args([&format!("handover::tests::{name}"), "--exact", "--nocapture"])
        .env("HANDOVER_ALONE", address)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn allow_descriptors(count: u64) {
    setrlimit(Resource::RLIMIT_NOFILE, count, count).unwrap();
}

fn pairs(count: usize) -> (Vec<UnixStream>, Vec<UnixStream>) {
    (0..count).map(|_| UnixStream::pair().unwrap()).unzip()
}

fn state_of(number: usize) -> Vec<u8> {
    format!("state of connection {number}").into_bytes()
}

fn parcels(served: &[UnixStream]) -> impl Iterator<Item = Parcel<BorrowedFd<'_>>> {
    served.iter().enumerate().map(|(number, socket)| Parcel::new(socket.as_fd(), state_of(number)))
}

fn connections(found: impl Iterator<Item = Found>) -> Vec<Parcel<OwnedFd>> {
    found
        .map(|found| match found {
            Found::Connection(parcel) => parcel,
            Found::Unusable { fault, sockets } => panic!("{fault}: {sockets:?}"),
        })
        .collect()
}

/// The same for every descriptor of a socket, in every process.
fn number_of(socket: &impl AsFd) -> u64 {
    fstat(socket).unwrap().st_ino
}

fn numbers(sockets: &[impl AsFd]) -> Vec<u64> {
    sockets.iter().map(|socket| number_of(socket)).collect()
}

/// The same sockets in the same order, each with its state.
#[track_caller]
fn assert_are(taken: &[Parcel<OwnedFd>], left: &[u64]) {
    assert_eq!(taken.iter().map(|parcel| number_of(&parcel.socket)).collect::<Vec<_>>(), left);
    let numbered = taken.iter().enumerate();
    assert!(numbered.into_iter().all(|(number, parcel)| parcel.state == state_of(number)));
}

/// The client's end is closed: no copy of the connection is anywhere.
#[track_caller]
fn assert_ended(clients: &mut [UnixStream]) {
    for client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.read(&mut [0; 9]).unwrap(), 0);
    }
}

fn raw_pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

fn send_raw(writer: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(writer.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::empty(), None).unwrap();
}

/// The messages that leaving these connections makes, the opening among them.
fn messages(served: &[UnixStream]) -> Vec<Vec<u8>> {
    let packed = pack(b"header", parcels(served)).unwrap();
    let mut buffer = vec![0; MOST_INLINE];
    std::iter::from_fn(|| {
        let received = receive_descriptors(packed.socket.as_fd(), &mut buffer, false).unwrap();
        (received.length > 0).then(|| buffer[..received.length].to_vec())
    })
    .collect()
}

/// What is found where only this message was sent.
fn found_in(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Vec<Found> {
    let (writer, reader) = raw_pair();
    send_raw(&writer, bytes, fds);
    drop(writer);
    unpack(reader).collect()
}

/// Nothing is believed, and the stream sockets come back.
#[track_caller]
fn assert_unusable(found: &[Found], expected: &Fault, count: usize) {
    match found {
        [Found::Unusable { fault, sockets }] => assert_eq!((fault, sockets.len()), (expected, count)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn connections_come_back_in_order_with_their_bytes() {
    let manager = Manager::new(1);
    let (mut clients, mut served) = pairs(600);
    clients[599].write_all(b"sent before").unwrap();
    let left = leave(&manager.store(), NAME, b"next: 601", parcels(&served), PATIENCE).unwrap();
    assert_eq!((left.connections, left.stopped_by.is_none()), (600, true));
    assert!(manager.held.lock().unwrap().messages[0].contains("FDPOLL=0"));
    let numbers = numbers(&served);
    served.clear();
    clients[599].write_all(b", sent meanwhile").unwrap();

    let mut inherited = take_back(manager.passed(), NAME, &manager.store());
    assert_eq!(inherited.header(), Some(&b"next: 601"[..]));
    let mut taken = connections(inherited.by_ref());
    assert!(inherited.foreign().is_empty());
    assert_are(&taken, &numbers);
    for parcel in &taken {
        let flags = FdFlag::from_bits_retain(fcntl(&parcel.socket, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
    let mut arrived = [0; 27];
    UnixStream::from(taken.pop().unwrap().socket).read_exact(&mut arrived).unwrap();
    assert_eq!(&arrived, b"sent before, sent meanwhile");
    assert!(manager.passed().is_empty(), "the manager was not told to forget");
    drop(taken);
    assert_ended(&mut clients);
}

#[test]
fn further_descriptors_belong_to_their_connection() {
    let (_clients, served) = pairs(700);
    let (_upstreams, further) = pairs(700);
    let both = served.iter().zip(&further).enumerate().map(|(number, (socket, further))| Parcel {
        socket: socket.as_fd(),
        further: vec![further.as_fd(); number % 4],
        state: state_of(number),
    });
    let packed = pack(b"", both).unwrap();
    let taken = connections(unpack(packed.socket));
    assert_are(&taken, &numbers(&served));
    for (number, (parcel, further)) in taken.iter().zip(&further).enumerate() {
        assert_eq!(numbers(&parcel.further), vec![number_of(further); number % 4]);
    }
}

#[test]
fn states_larger_than_a_message_ride_in_a_sealed_file() {
    let (_clients, served) = pairs(40);
    let state = |number: usize| vec![number as u8; number * 5_000];
    let parcels = served.iter().enumerate().map(|(number, socket)| Parcel::new(socket.as_fd(), state(number)));
    let packed = pack(b"", parcels).unwrap();
    assert_eq!(packed.left.connections, 40);
    let taken = connections(unpack(packed.socket));
    assert_eq!(taken.iter().map(|parcel| number_of(&parcel.socket)).collect::<Vec<_>>(), numbers(&served));
    assert!(taken.iter().enumerate().all(|(number, parcel)| parcel.state == state(number)));
}

#[test]
fn a_file_that_can_still_change_or_says_otherwise_is_torn() {
    let (_clients, served) = pairs(2);
    let fds: Vec<_> = served.iter().map(AsFd::as_fd).collect();
    let message = messages(&served).remove(1);
    let file = |bytes: &[u8], seals: SealFlag| {
        let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
        let mut file = fs::File::from(nix::sys::memfd::memfd_create(c"test", flags).unwrap());
        file.write_all(bytes).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    };
    let found = |file: &fs::File| found_in(&message::elsewhere(), &[&[file.as_fd()], &fds[..]].concat());
    assert_eq!(connections(found(&file(&message, seals())).into_iter()).len(), 2);
    for missing in [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_SHRINK] {
        assert_unusable(&found(&file(&message, seals() - missing)), &Fault::Torn, 2);
    }
    assert_unusable(&found(&file(&message[..message.len() - 1], seals())), &Fault::Torn, 2);
    assert_unusable(&found(&file(&message::elsewhere(), seals())), &Fault::Torn, 2);
    assert_unusable(&found(&file(&[], seals())), &Fault::Foreign, 2);
    assert_unusable(&found_in(&message::elsewhere(), &fds), &Fault::Torn, 1);
    assert_unusable(&found_in(&message::elsewhere(), &[]), &Fault::Descriptors { said: 1, came: 0 }, 0);
}

#[test]
fn a_message_with_any_byte_changed_or_cut_off_is_not_believed() {
    let (_clients, served) = pairs(3);
    let fds: Vec<_> = served.iter().map(AsFd::as_fd).collect();
    let message = messages(&served).remove(1);
    for at in 0..message.len() {
        let mut changed = message.clone();
        changed[at] ^= 0xff;
        for bytes in [&changed[..], &message[..at]].into_iter().filter(|bytes| !bytes.is_empty()) {
            let found = found_in(bytes, &fds);
            assert!(matches!(&found[..], [Found::Unusable { sockets, .. }] if sockets.len() == 3), "{at}: {found:?}");
        }
    }
}

#[test]
fn messages_of_other_programs_and_later_versions_are_told_apart() {
    let (_clients, served) = pairs(3);
    let fds: Vec<_> = served.iter().map(AsFd::as_fd).collect();
    assert_unusable(&found_in(b"x", &fds), &Fault::Foreign, 3);
    assert_unusable(&found_in(&[0x5a; 60_000], &fds), &Fault::Torn, 3);
    let mut later = messages(&served).remove(1);
    later[8] = 2;
    assert_unusable(&found_in(&later, &fds), &Fault::Version(2), 3);
    // What is no stream socket is not a connection.
    let file = fs::File::open("/dev/null").unwrap();
    assert_unusable(&found_in(b"x", &[fds[0], file.as_fd()]), &Fault::Foreign, 1);
}

#[test]
fn fewer_or_more_descriptors_than_states_are_not_matched() {
    let (_clients, served) = pairs(3);
    let fds: Vec<_> = served.iter().map(AsFd::as_fd).collect();
    let message = messages(&served).remove(1);
    assert_unusable(&found_in(&message, &fds[..2]), &Fault::Descriptors { said: 3, came: 2 }, 2);
    assert_unusable(&found_in(&message, &[]), &Fault::Descriptors { said: 3, came: 0 }, 0);
    let more = [&fds[..], &fds[..1]].concat();
    assert_unusable(&found_in(&message, &more), &Fault::Descriptors { said: 3, came: 4 }, 4);
}

#[test]
fn one_unusable_message_does_not_take_the_others_along() {
    let (_clients, served) = pairs(500);
    let fds: Vec<_> = served.iter().map(AsFd::as_fd).collect();
    let mut sent = messages(&served);
    assert_eq!(sent.len(), 3);
    *sent[1].last_mut().unwrap() ^= 1;
    let (writer, reader) = raw_pair();
    for (message, fds) in sent.iter().zip([&[], &fds[..250], &fds[250..]]) {
        send_raw(&writer, message, fds);
    }
    let mut inherited = unpack(reader);
    assert_unusable(&[inherited.next().unwrap()], &Fault::Torn, 250);
    let rest = connections(inherited);
    assert_eq!(rest.iter().map(|parcel| &parcel.socket).map(number_of).collect::<Vec<_>>(), {
        numbers(&served[250..])
    });
    assert_eq!((rest[0].state.clone(), rest.len()), (state_of(250), 250));
}

#[test]
fn a_small_send_buffer_takes_more_sockets_and_loses_no_order() {
    let (_clients, served) = pairs(300);
    let large = |parcel: Parcel<_>| Parcel { state: [parcel.state, vec![7; 30_000]].concat(), ..parcel };
    let (queue, left) = fill(b"small", parcels(&served).map(large), 1).unwrap();
    assert_eq!((left.connections, left.stopped_by.is_none()), (300, true));
    let (_, socket) = queue.finish();
    let inherited = unpack(socket);
    assert!(inherited.readers.len() > 2, "{} sockets", inherited.readers.len());
    assert_eq!(inherited.header(), Some(&b"small"[..]));
    let mut taken = connections(inherited);
    taken.iter_mut().for_each(|parcel| parcel.state.truncate(parcel.state.len() - 30_000));
    assert_are(&taken, &numbers(&served));
}

#[test]
fn an_opening_of_another_version_still_leads_to_the_socket_before() {
    let (_clients, served) = pairs(3);
    let before = pack(b"before", parcels(&served)).unwrap().socket;
    let (writer, reader) = raw_pair();
    let mut opening = message::opening(b"after", true);
    opening[8] = 9;
    send_raw(&writer, &opening, &[before.as_fd()]);
    let mut inherited = unpack(reader);
    assert_eq!(inherited.header(), Some(&b"before"[..]));
    let first: Vec<_> = inherited.by_ref().take(3).collect();
    assert_are(&connections(first.into_iter()), &numbers(&served));
    assert_unusable(&inherited.collect::<Vec<_>>(), &Fault::Version(9), 0);
}

#[test]
fn a_lost_socket_before_is_a_fault() {
    assert_unusable(&found_in(&message::opening(b"", true), &[]), &Fault::Descriptors { said: 1, came: 0 }, 0);
}

#[test]
fn a_socket_that_holds_itself_is_read_once() {
    let (writer, reader) = raw_pair();
    send_raw(&writer, &message::opening(b"", true), &[reader.as_fd()]);
    assert!(unpack(reader).next().is_none());
}

#[test]
fn a_socket_that_nothing_was_written_to_holds_nothing() {
    let (writer, reader) = raw_pair();
    let mut inherited = unpack(reader.try_clone().unwrap());
    assert!(inherited.next().is_none() && inherited.header().is_none());
    drop(writer);
    assert!(unpack(reader).next().is_none());
}

#[test]
fn what_cannot_be_sent_is_refused_or_ends_the_row() {
    assert_eq!(pack(&[0; MOST_HEADER + 1], []).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let (_clients, served) = pairs(3);
    let further = |number| if number == 1 { vec![served[0].as_fd(); 250] } else { Vec::new() };
    let parcels = parcels(&served).enumerate().map(|(number, parcel)| Parcel { further: further(number), ..parcel });
    let Packed { socket, left } = pack(&[0; MOST_HEADER], parcels).unwrap();
    assert_eq!((left.connections, left.stopped_by.unwrap().raw_os_error()), (1, Some(Errno::EINVAL as i32)));
    assert_are(&connections(unpack(socket)), &numbers(&served[..1]));
}
