//! The program from outside: started as a service manager starts it, talked to as clients talk to it.
//!
//! [`Echod`] is the real program with sockets passed at descriptors 3, 4, ...; [`Manager`] plays systemd's side of
//! sd_notify(3), its descriptor store included; [`Journald`] receives what the program sends to the journal;
//! [`Client`] tells exactly what came back and how it ended. Other users are real processes: `tests/support/peer.rs`.
//!
//! Nothing here waits for time to pass: every wait is for an event, and gives up loudly after [`PATIENCE`].

// Each test program uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// After this long what a test waits for will not come any more.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a denied peer gets, to the byte.
pub const DENIED: &[u8] = b"Unauthorized access\n";
/// What an admitted peer over a limit gets.
pub const BUSY: &[u8] = b"Too many connections\n";
/// What a peer gets whose line is too long, after the echo of the lines before.
pub const TOO_LONG: &[u8] = b"Line too long\n";

/// A policy that admits whoever runs the test, and nobody else.
pub const OWNER: &str = "[allow.owner]\nusers = [\"self\"]\n";
/// A policy that admits nobody who takes part in a test, the one who runs it included.
pub const NOBODY: &str = "[allow.somebody]\nusers = [64999]\n";

/// Users who exist in no user database, for peers of their own.
pub const ALICE: u32 = 64001;
pub const BOB: u32 = 64002;

/// Prints what a test has measured. Past the harness, which shows what a test prints only when it has failed.
#[macro_export]
macro_rules! figure {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "        {}", format_args!($($what)*));
    }};
}

/// For tests with other users, mounts or control groups. It fails rather than skips.
pub fn needs_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes other users' processes: run it as root");
}

/// A directory of this test's own, which others may enter; gone when dropped.
pub struct Place(PathBuf);

impl Place {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("echod-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file that only its owner may write.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        // By another name first: nobody reads half a file.
        let new = self.path(format!("{name}.new"));
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }

    /// A listening socket, as systemd makes one with SocketMode=0666.
    pub fn listener(&self, name: &str) -> UnixListener {
        let path = self.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        listener
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Something that threads fill and tests wait on.
pub struct Shared<T>(Arc<(Mutex<T>, Condvar)>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Shared<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new((Mutex::new(value), Condvar::new())))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.lock());
        self.0.1.notify_all();
        result
    }

    /// Waits until `question` has an answer; `None` when it will have none any more.
    pub fn try_wait<R>(&self, mut question: impl FnMut(&mut T) -> Option<R>) -> Option<R> {
        let until = Instant::now() + PATIENCE;
        let mut value = self.lock();
        loop {
            if let Some(answer) = question(&mut value) {
                return Some(answer);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            value = self.0.1.wait_timeout(value, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// Waits for what the system tells nobody about: looks again, with a breath in between.
pub fn eventually<R>(what: &str, mut question: impl FnMut() -> Option<R>) -> R {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < until, "{what}: not after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Sends descriptors over a socket, some at a time.
pub fn send_fds(socket: &impl AsRawFd, fds: &[RawFd]) {
    for some in fds.chunks(250) {
        let control = [ControlMessage::ScmRights(some)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b".")], &control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }
}

/// Sends bytes with descriptors along.
pub fn send_along(socket: &impl AsRawFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
    let control = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)
}

/// A TCP connection with data that its peer does not take: whoever closes it last waits for hours (SO_LINGER). And the
/// other end.
pub fn lingering() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut one = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    one.set_nonblocking(true).unwrap();
    while one.write(&[0; 65536]).is_ok() {}
    one.set_nonblocking(false).unwrap();
    let hours = nix::libc::linger { l_onoff: 1, l_linger: 10_000 };
    nix::sys::socket::setsockopt(&one, nix::sys::socket::sockopt::Linger, &hours).unwrap();
    (one, other)
}

/// Receives one message and the descriptors that came with it. `None` at the end of file.
pub fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for one in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = one {
            fds.extend(received);
        }
    }
    let end = message.bytes == 0 && fds.is_empty();
    Ok((!end).then_some((message.bytes, fds)))
}

/// The helper process of tests/support/peer.rs.
pub fn peer_program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let peer = tests.parent().and_then(Path::parent).unwrap().join("examples/peer");
    assert!(peer.is_file(), "{} is missing: run all of `cargo test`, or `cargo build --example peer`", peer.display());
    peer
}

/// How a connection ended, as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A clean end of file.
    Eof,
    /// ECONNRESET.
    Reset,
}

/// A connection to the program.
#[derive(Debug)]
pub struct Client(pub UnixStream);

impl Client {
    pub fn connect(path: impl AsRef<Path>) -> Self {
        Self::of(UnixStream::connect(path).unwrap())
    }

    pub fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    pub fn send(&self, bytes: impl AsRef<[u8]>) {
        (&self.0).write_all(bytes.as_ref()).unwrap();
    }

    /// Sends, although the other side may have gone: as much as it takes.
    pub fn try_send(&self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        (&self.0).write_all(bytes.as_ref())
    }

    pub fn half_close(&self) {
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Reads just so many bytes.
    pub fn read(&self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        (&self.0).read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads one line's echo and compares it.
    #[track_caller]
    pub fn expect(&self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let mut got = vec![0; bytes.len()];
        let mut count = 0;
        while count < got.len() {
            match (&self.0).read(&mut got[count..]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) => panic!("after {:?}: {error}", show(&got[..count])),
            }
        }
        assert_eq!(show(&got[..count]), show(bytes));
    }

    /// Sends a line and reads its echo.
    #[track_caller]
    pub fn echo(&self, line: &str) {
        self.send(format!("{line}\n"));
        self.expect(format!("> {line}\n"));
    }

    /// Everything that comes, and how it ends.
    pub fn rest(&self) -> (Vec<u8>, End) {
        let mut all = Vec::new();
        match (&self.0).read_to_end(&mut all) {
            Ok(_) => (all, End::Eof),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (all, End::Reset),
            Err(error) => panic!("after {:?}: {error}", show(&all)),
        }
    }

    /// Everything that comes must be this, and then a clean end of file.
    #[track_caller]
    pub fn expect_end(&self, bytes: impl AsRef<[u8]>) {
        let (all, end) = self.rest();
        assert_eq!((show(&all), end), (show(bytes.as_ref()), End::Eof));
    }
}

/// Bytes for a message: text where it is text, cut where it is long.
pub fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() <= 2000 {
        return text;
    }
    // Unequal bytes must stay unequal.
    let sum = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{}...{} ({} bytes, hash {sum:x})", &text[..500], &text[text.len() - 500..], bytes.len())
}

/// Somebody else, connected: the helper process and its connections, which the test holds.
pub struct Other {
    pub connections: Vec<Client>,
    process: Child,
    control: Option<UnixStream>,
}

impl Other {
    /// `uid:gid:groups` connects once.
    pub fn user(uid: u32, socket: &Path) -> Self {
        Self::with(&["--as", &format!("{uid}:{uid}")], socket)
    }

    /// With options of the helper's own.
    pub fn with(options: &[&str], socket: &Path) -> Self {
        Self::wrapped(&[], options, 1, socket)
    }

    /// Started by another program, such as unshare(1); makes `count` connections.
    pub fn wrapped(wrapper: &[&str], options: &[&str], count: usize, socket: &Path) -> Self {
        Self::of_program(&peer_program(), wrapper, options, count, socket)
    }

    /// As [`wrapped`](Self::wrapped), with a copy of the helper that every user may run.
    pub fn of_program(program: &Path, wrapper: &[&str], options: &[&str], count: usize, socket: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let words: Vec<&OsStr> = wrapper.iter().map(OsStr::new).chain([program.as_os_str()]).collect();
        let process = Command::new(words[0])
            .args(&words[1..])
            .args(options)
            .args(["--times", &count.to_string(), "connect"])
            .arg(socket)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let mut connections = Vec::new();
        while connections.len() < count {
            let (_, fds) = receive(&ours, &mut [0]).unwrap().expect("the helper failed");
            connections.extend(fds.into_iter().map(|fd| Client::of(UnixStream::from(fd))));
        }
        Self { connections, process, control: Some(ours) }
    }

    pub fn client(&self) -> &Client {
        &self.connections[0]
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The process ends; its connections stay.
    pub fn end(mut self) -> Vec<Client> {
        self.control = None;
        self.process.wait().unwrap();
        std::mem::take(&mut self.connections)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.control = None;
        let _ = self.process.wait();
    }
}

/// Connects `times` times as `uid` from a process of its own: what came back, and how often.
pub fn flood(uid: u32, times: usize, socket: &Path) -> Child {
    Command::new(peer_program())
        .args(["--as", &format!("{uid}:{uid}"), "flood"])
        .arg(socket)
        .arg(times.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// systemd's side of sd_notify(3): what it was told, and what it holds in its store.
pub struct Manager {
    pub told: Shared<Told>,
    _place: Place,
    path: PathBuf,
}

/// What the service has told its manager.
#[derive(Default)]
pub struct Told {
    /// Each datagram's fields, in order.
    pub messages: Vec<Vec<String>>,
    /// The descriptor store, oldest first.
    pub store: Vec<(String, OwnedFd)>,
    /// FileDescriptorStoreMax=.
    pub capacity: usize,
    /// A manager that is too busy: descriptors of barriers, never closed.
    pub unsettled: Option<Vec<OwnedFd>>,
    /// How many processes have begun, and how many have ended: told everything they will ever tell.
    begun: usize,
    ended: usize,
    caught_up: usize,
}

impl Told {
    /// The service has ended, and all that it told is here.
    pub fn is_over(&self) -> bool {
        self.ended >= self.begun
    }

    pub fn has(&self, field: &str) -> bool {
        self.count(field) > 0
    }

    pub fn count(&self, field: &str) -> usize {
        self.messages.iter().filter(|message| message.iter().any(|one| one == field)).count()
    }

    fn take_in(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let fields: Vec<String> = text.lines().map(str::to_owned).collect();
        let has = |field: &str| fields.iter().any(|one| one == field);
        let name = fields.iter().find_map(|field| field.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if has("FDSTORE=1") {
            for fd in fds {
                // As PID 1: what finds no room is closed, and nobody told.
                if self.store.len() < self.capacity {
                    self.store.push((name.clone(), fd));
                }
            }
        } else if has("FDSTOREREMOVE=1") {
            self.store.retain(|(stored, _)| *stored != name);
        } else if has("BARRIER=1") {
            if let Some(unsettled) = &mut self.unsettled {
                unsettled.extend(fds);
            }
        }
        self.messages.push(fields);
    }
}

impl Manager {
    pub fn new() -> Self {
        let place = Place::new();
        let path = place.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let told = Shared::new(Told::default());
        let filled = told.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(message) = receive(&socket, &mut buffer) {
                let (count, fds) = message.unwrap_or_default();
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                match text.as_str() {
                    "END" => return,
                    // From the test itself, after the last word of the process that has ended.
                    "OVER" => filled.change(|told| told.ended += 1),
                    "CATCH UP" => filled.change(|told| told.caught_up += 1),
                    _ => filled.change(|told| told.take_in(&text, fds)),
                }
            }
        });
        Self { told, _place: place, path }
    }

    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// Waits until all that was sent by now has been taken in.
    pub fn catch_up(&self) {
        let before = self.told.lock().caught_up;
        // Fails where a test has removed the socket: then there is nothing to catch up with.
        if UnixDatagram::unbound().and_then(|socket| socket.send_to(b"CATCH UP", &self.path)).is_ok() {
            self.told.try_wait(|told| (told.caught_up > before).then_some(())).expect("messages are read");
        }
    }

    /// Waits until the service has told something.
    #[track_caller]
    pub fn wait<R>(&self, what: &str, mut question: impl FnMut(&mut Told) -> Option<R>) -> R {
        let mut over = false;
        let answer = self.told.try_wait(|told| match question(told) {
            Some(answer) => Some(Some(answer)),
            None if told.is_over() => {
                over = true;
                Some(None)
            }
            None => None,
        });
        match answer.flatten() {
            Some(answer) => answer,
            None if over => panic!("{what}: the service ended before"),
            None => panic!("{what}: never told, only {:?}", self.told.lock().messages),
        }
    }

    /// Waits for `count` messages with this field.
    #[track_caller]
    pub fn wait_for(&self, field: &str, count: usize) {
        self.wait(field, |told| (told.count(field) >= count).then_some(()));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"END", &self.path));
    }
}

/// One entry of the journal: field names and values.
pub type Entry = BTreeMap<String, String>;

/// journald's side of its native protocol, at a socket that only a program in the same mount namespace sees.
pub struct Journald {
    place: Place,
    state: Shared<Written>,
}

#[derive(Default)]
pub struct Written {
    pub entries: Vec<Entry>,
    stopped: bool,
    /// A read is under way, or what it brought is not yet among the entries. Of which epoch.
    reading: Option<usize>,
    /// The socket is to be closed, once nothing is unread.
    vanishing: bool,
    epoch: usize,
    /// How often somebody wanted to have seen all that was sent, and the last of these times that they had.
    asked: u64,
    caught_up: u64,
}

impl Written {
    fn take_in(&mut self, entry: Entry) {
        if let Some(number) = entry.get(CATCH_UP) {
            self.caught_up = number.parse().unwrap();
        }
        // What others send takes places in the queue; to keep it would only slow down those who look.
        if entry.contains_key("SYSLOG_IDENTIFIER") {
            self.entries.push(entry);
        }
    }
}

/// The field by which a test asks whether it has seen everything.
const CATCH_UP: &str = "TEST_CATCH_UP";

impl Journald {
    pub fn new() -> Self {
        let journald = Self::absent();
        journald.start();
        journald
    }

    /// The directory without the socket.
    pub fn absent() -> Self {
        Self { place: Place::new(), state: Shared::new(Written::default()) }
    }

    /// Binds the socket and reads from it.
    pub fn start(&self) {
        let path = self.place.path("socket");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).unwrap();
        self.read_from(socket);
    }

    /// As [`start`](Self::start), with a queue as long as systemd makes it, longer than what one sender may fill.
    pub fn start_with_long_queue(&self) {
        let path = self.place.path("socket");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut helper = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo 512 >/proc/sys/net/unix/max_dgram_qlen; exec \"$0\" listen \"$1\""])
            .arg(peer_program())
            .arg(&path)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let (_, mut fds) = receive(&ours, &mut [0]).unwrap().expect("the helper failed");
        assert!(helper.wait().unwrap().success());
        self.read_from(UnixDatagram::from(fds.pop().unwrap()));
    }

    fn read_from(&self, socket: UnixDatagram) {
        fs::set_permissions(self.place.path("socket"), fs::Permissions::from_mode(0o666)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let epoch = self.state.change(|state| {
            state.epoch += 1;
            state.epoch
        });
        let state = self.state.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            loop {
                let go_on = state.try_wait(|state| match (state.epoch == epoch, state.vanishing, state.stopped) {
                    (false, ..) => Some(false),
                    (true, false, true) => None,
                    (true, ..) => {
                        state.reading = Some(epoch);
                        Some(true)
                    }
                });
                match go_on {
                    None => continue,
                    Some(false) => return,
                    Some(true) => {}
                }
                let vanishes = state.lock().vanishing;
                if vanishes {
                    // From now on who sends hears that nobody is there; until now it was taken in.
                    socket.shutdown(std::net::Shutdown::Read).unwrap();
                    socket.set_nonblocking(true).unwrap();
                }
                while let Ok(message) = receive(&socket, &mut buffer) {
                    let (count, fds) = message.unwrap_or_default();
                    let mut bytes = buffer[..count].to_vec();
                    for fd in fds {
                        // A large entry comes in a memfd.
                        use std::io::Seek;
                        let mut file = fs::File::from(fd);
                        file.rewind().unwrap();
                        file.read_to_end(&mut bytes).unwrap();
                    }
                    let entry = parse_entry(&bytes);
                    state.change(|state| state.take_in(entry));
                    if !vanishes {
                        break;
                    }
                }
                state.change(|state| {
                    state.reading = state.reading.filter(|&of| of != epoch);
                    if vanishes {
                        (state.vanishing, state.epoch) = (false, epoch + 1);
                    }
                });
            }
        });
    }

    /// As SIGSTOP does: nothing is read from now on.
    pub fn stop_reading(&self) {
        self.state.change(|state| state.stopped = true);
        // The read that is under way may take one entry more.
        self.state.try_wait(|state| state.reading.is_none().then_some(())).expect("a read lasts 20 ms at most");
    }

    pub fn go_on(&self) {
        self.state.change(|state| state.stopped = false);
    }

    /// The socket's file is removed and the socket closed, as `systemctl stop` does, but what was sent before is read:
    /// none is lost unseen.
    pub fn vanish(&self) {
        let _ = fs::remove_file(self.place.path("socket"));
        self.state.change(|state| state.vanishing = true);
        self.state.try_wait(|state| (!state.vanishing).then_some(())).expect("the reader comes to the end");
    }

    /// Somebody else's way to write to it.
    pub fn sender(&self) -> UnixDatagram {
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect(self.place.path("socket")).unwrap();
        sender
    }

    /// A command that runs `program` in a mount namespace where this journal is the system's.
    pub fn wrapper(&self) -> Vec<String> {
        let script = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
                      mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";
        let directory = self.place.path("").to_string_lossy().into_owned();
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script, &directory].map(str::to_owned).to_vec()
    }

    /// All entries sent so far; while it does not read, those read so far.
    pub fn entries(&self) -> Vec<Entry> {
        self.catch_up();
        self.state.lock().entries.clone()
    }

    fn catch_up(&self) {
        let (number, stopped) = self.state.change(|state| {
            state.asked += 1;
            (state.asked, state.stopped)
        });
        let ask =
            || UnixDatagram::unbound()?.send_to(format!("{CATCH_UP}={number}\n").as_bytes(), self.place.path("socket"));
        if !stopped && ask().is_ok() {
            self.state.try_wait(|state| (state.caught_up >= number).then_some(())).expect("the queue is read");
        }
    }

    /// Waits for the first entry of which `question` is true.
    #[track_caller]
    pub fn wait_for(&self, what: &str, question: impl Fn(&Entry) -> bool) -> Entry {
        let found = self.state.try_wait(|state| state.entries.iter().find(|entry| question(entry)).cloned());
        found.unwrap_or_else(|| panic!("{what}: no such entry in {:#?}", self.entries()))
    }

    /// Waits until the entries of the equation's right side stand for so many.
    #[track_caller]
    pub fn wait_for_sum(&self, verdict: &str, reasons: &[&str], sum: u64) {
        let found = self.state.try_wait(|state| (stands_for(&state.entries, verdict, reasons) >= sum).then_some(()));
        assert!(found.is_some(), "records stand for {} of {sum}", stands_for(&self.entries(), verdict, reasons));
    }
}

impl Drop for Journald {
    fn drop(&mut self) {
        self.state.change(|state| {
            state.epoch += 1;
            state.stopped = false;
        });
    }
}

/// The right side of the equation: records of this verdict, and the counts of the summaries for these reasons.
pub fn stands_for(entries: &[Entry], verdict: &str, reasons: &[&str]) -> u64 {
    let value = |entry: &Entry, field: &str| entry.get(field).cloned().unwrap_or_default();
    entries
        .iter()
        .map(|entry| match value(entry, "GATE_VERDICT").as_str() {
            own if own == verdict => 1,
            "summary" if reasons.contains(&value(entry, "GATE_REASON").as_str()) => {
                value(entry, "GATE_COUNT").parse().unwrap()
            }
            _ => 0,
        })
        .sum()
}

/// systemd's native journal protocol: `NAME=value\n`, or `NAME\n`, a length and the bytes.
fn parse_entry(mut bytes: &[u8]) -> Entry {
    let mut entry = Entry::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n').expect("a field ends with a newline");
        let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
        let (name, value) = match line.iter().position(|byte| *byte == b'=') {
            Some(equals) => {
                bytes = rest;
                (&line[..equals], &line[equals + 1..])
            }
            None => {
                let (length, rest) = rest.split_first_chunk::<8>().expect("a length");
                let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
                bytes = rest.strip_prefix(b"\n").expect("a newline after the value");
                (line, value)
            }
        };
        let (name, value) = (String::from_utf8(name.to_vec()).unwrap(), String::from_utf8_lossy(value).into_owned());
        assert!(entry.insert(name.clone(), value).is_none(), "{name} twice in one entry");
    }
    entry
}

/// How to start the program. Nothing of the environment is inherited but the path.
pub struct Start {
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    sockets: Vec<(String, OwnedFd)>,
    wrapper: Vec<String>,
    options: Vec<String>,
    stderr: Option<OwnedFd>,
    place: Arc<Place>,
}

impl Start {
    /// With no argument, no socket, no environment.
    pub fn bare() -> Self {
        Self {
            program: env!("CARGO_BIN_EXE_echod").into(),
            args: Vec::new(),
            env: Vec::new(),
            sockets: Vec::new(),
            wrapper: Vec::new(),
            options: Vec::new(),
            stderr: None,
            place: Arc::new(Place::new()),
        }
    }

    /// With this configuration, one listening socket and a manager.
    pub fn serving(config: &str) -> Self {
        let start = Self::bare().config(config);
        let listener = start.place.listener("socket");
        start.socket("echo.socket", listener)
    }

    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// In the directory of an earlier process.
    pub fn at(mut self, place: &Arc<Place>) -> Self {
        self.place = Arc::clone(place);
        self
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub fn config(self, text: &str) -> Self {
        let path = self.place.file("echod.toml", text);
        self.args(&["--config", path.to_str().unwrap()])
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Passes a descriptor under this name.
    pub fn socket(mut self, name: &str, fd: impl Into<OwnedFd>) -> Self {
        self.sockets.push((name.to_owned(), fd.into()));
        self
    }

    pub fn wrapper(mut self, words: &[impl AsRef<str>]) -> Self {
        self.wrapper.extend(words.iter().map(|word| word.as_ref().to_owned()));
        self
    }

    pub fn journal(self, journald: &Journald) -> Self {
        self.wrapper(&journald.wrapper())
    }

    /// Under strace(1), which writes to `output` and obeys each of these expressions (`inject=…`, `trace=…`).
    pub fn traced(self, output: &Path, expressions: &[impl AsRef<str>]) -> Self {
        // Where fuzz/sanitize runs this: what is traced can't be searched for leaks.
        let start = self.env("LSAN_OPTIONS", "detect_leaks=0");
        let start = start.wrapper(&["strace", "-D", "-f", "--seccomp-bpf", "-qqq", "-e", "signal=none", "-o"]);
        let start = start.wrapper(&[output.to_string_lossy()]);
        expressions.iter().fold(start, |start, expression| start.wrapper(&["-e", expression.as_ref()]))
    }

    /// The program stops as soon as its socket at `path` exists, and goes on when `swap` has put something else there.
    pub fn swapped_after_bind(self, path: &Path, swap: impl FnOnce()) -> Echod {
        // With --seccomp-bpf, as in `traced`, strace injects no signal.
        let strace = ["strace", "-D", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=bind"];
        let start = self.env("LSAN_OPTIONS", "detect_leaks=0").wrapper(&strace);
        let echod = start.wrapper(&["-e", "inject=bind:signal=SIGSTOP"]).spawn();
        eventually("the socket exists", || fs::symlink_metadata(path).ok());
        swap();
        echod.signal(Signal::SIGCONT);
        echod.manager.wait_for("READY=1", 1);
        echod
    }

    /// Standard error is this, and not a pipe that is read.
    pub fn stderr(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(fd.into());
        self
    }

    /// Runs the program as another user: `uid:gid:groups`.
    pub fn run_as(mut self, who: &str) -> Self {
        self.options.extend(["--as".to_owned(), who.to_owned()]);
        // The build directory may be closed to others.
        let copy = self.place.path("echod");
        fs::copy(&self.program, &copy).unwrap();
        self.program = copy;
        self
    }

    /// Starts it without waiting for anything.
    pub fn spawn(self) -> Echod {
        self.spawn_with(Arc::new(Manager::new()))
    }

    fn spawn_with(self, manager: Arc<Manager>) -> Echod {
        let (control, theirs) = UnixStream::pair().unwrap();
        let names: Vec<_> = self.sockets.iter().map(|(name, _)| name.as_str()).collect();
        let peer = peer_program();
        let words: Vec<&OsStr> = self.wrapper.iter().map(OsStr::new).chain([peer.as_os_str()]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(&self.options).args(["activate", &self.sockets.len().to_string()]);
        command.arg(&self.program).args(&self.args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("NOTIFY_SOCKET", manager.socket());
        if !self.sockets.is_empty() {
            command.env("LISTEN_FDS", self.sockets.len().to_string());
            command.env("LISTEN_PID", "self").env("LISTEN_FDNAMES", names.join(":"));
        }
        for (name, value) in &self.env {
            match value.as_str() {
                "(unset)" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        let stderr = self.stderr.map_or_else(Stdio::piped, Stdio::from);
        let mut process = command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        // The command holds the other end of what standard error is.
        drop(command);
        manager.told.change(|told| told.begun += 1);
        let notify = manager.socket().to_owned();
        let at_end = move || {
            // Fails where a test has removed the socket: then nobody asks.
            let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"OVER", notify));
        };
        let stdout = process.stdout.take().unwrap();
        let (stdout, stderr) = match process.stderr.take() {
            Some(stderr) => (collect(stdout, || {}), collect(stderr, at_end)),
            // Where standard error is the test's own, the end of standard output tells of the end.
            None => {
                let stdout = collect(stdout, at_end);
                (stdout.clone(), stdout)
            }
        };
        let fds: Vec<RawFd> = self.sockets.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        send_fds(&control, &fds);
        // As PID 1, keep the listeners; of what comes from the store the program has the only copy.
        let mut sockets = self.sockets;
        sockets.retain(|(name, _)| !name.starts_with("echod-") && name != "stored");
        Echod { process, manager, stdout, stderr, sockets, place: self.place, config: self.args.clone() }
    }

    /// Starts it and waits until it says that it is ready.
    #[track_caller]
    pub fn ready(self) -> Echod {
        self.ready_with(Arc::new(Manager::new()))
    }

    /// As [`ready`](Self::ready), under a manager that an earlier process told things to.
    #[track_caller]
    pub fn ready_with(self, manager: Arc<Manager>) -> Echod {
        let before = manager.told.lock().count("READY=1");
        let echod = self.spawn_with(manager);
        let ready = echod.manager.told.try_wait(|told| {
            (told.count("READY=1") > before).then_some(true).or_else(|| told.is_over().then_some(false))
        });
        assert!(ready == Some(true), "not ready: {}", echod.stderr());
        echod
    }

    /// Runs it to its end: exit code, standard output, standard error.
    pub fn run(self) -> (i32, String, String) {
        let echod = self.spawn();
        let (status, stdout, stderr) = echod.wait();
        (status.code().unwrap_or(-status.signal().unwrap_or(0)), stdout, stderr)
    }
}

fn collect(mut from: impl Read + Send + 'static, at_end: impl FnOnce() + Send + 'static) -> Shared<(String, bool)> {
    let text = Shared::new((String::new(), false));
    let filled = text.clone();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            filled.change(|(text, _)| text.push_str(&String::from_utf8_lossy(&buffer[..count])));
        }
        filled.change(|(_, ended)| *ended = true);
        at_end();
    });
    text
}

/// The program, running. Killed when dropped.
pub struct Echod {
    process: Child,
    pub manager: Arc<Manager>,
    stdout: Shared<(String, bool)>,
    stderr: Shared<(String, bool)>,
    sockets: Vec<(String, OwnedFd)>,
    pub place: Arc<Place>,
    config: Vec<String>,
}

impl Echod {
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The path of the socket that [`Start::serving`] made.
    pub fn socket(&self) -> PathBuf {
        self.place.path("socket")
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.socket())
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().0.clone()
    }

    /// Waits for text on standard error.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str) {
        let found = self.stderr.try_wait(|(all, ended)| match all.contains(text) {
            true => Some(true),
            false => ended.then_some(false),
        });
        assert!(found == Some(true), "no {text:?} in {}", self.stderr());
    }

    /// As systemd sends the signal that stops a service: SIGCONT follows (systemd.kill(5)).
    pub fn signal(&self, signal: Signal) {
        self.kill(signal);
        if signal == Signal::SIGTERM || signal == Signal::SIGINT {
            let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGCONT);
        }
    }

    /// As kill(1) sends it.
    pub fn kill(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// `echod reload PID`: its exit code and what it said.
    pub fn reload(&self) -> (i32, String) {
        let asked =
            Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &self.pid().to_string()]).output().unwrap();
        self.manager.catch_up();
        (asked.status.code().unwrap(), String::from_utf8(asked.stderr).unwrap())
    }

    /// Puts this configuration in its place and reloads it.
    #[track_caller]
    pub fn reload_with(&self, config: &str) {
        self.place.file("echod.toml", config);
        assert_eq!(self.reload(), (0, String::new()), "{}", self.stderr());
    }

    /// Waits for the end: exit status, standard output, standard error.
    pub fn wait(mut self) -> (ExitStatus, String, String) {
        let status = self.wait_for_exit();
        let all =
            |output: &Shared<(String, bool)>| output.try_wait(|(text, ended)| ended.then(|| text.clone())).unwrap();
        (status, all(&self.stdout), all(&self.stderr))
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        // Its standard error ends with it; a process that does not end is a failure, not a hang.
        let ended = self.stderr.try_wait(|(_, ended)| ended.then_some(()));
        if ended.is_none() {
            let _ = self.process.kill();
            panic!("the program does not end: {}", self.stderr());
        }
        let status = self.process.wait().unwrap();
        self.manager.catch_up();
        status
    }

    /// Sends SIGTERM and waits for a good end. Returns standard error.
    #[track_caller]
    pub fn stop(self) -> String {
        self.signal(Signal::SIGTERM);
        let (status, _, stderr) = self.wait();
        assert!(status.success(), "{status}: {stderr}");
        stderr
    }

    /// As systemd restarts it: SIGTERM and SIGCONT, and when it has ended, the next one with the same listeners and whatever is
    /// in the store. `change` may change what the next one is started with, and what is stored.
    #[track_caller]
    pub fn restart(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        self.signal(Signal::SIGTERM);
        self.start_again(change)
    }

    /// As [`restart`](Self::restart), for one that is ending or has ended already.
    #[track_caller]
    pub fn start_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        let (start, manager) = self.successor(change);
        start.ready_with(manager)
    }

    /// As [`start_again`](Self::start_again), for a next one that is not expected to become ready: exit code and what
    /// it said.
    #[track_caller]
    pub fn fail_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> (i32, String) {
        let (start, manager) = self.successor(change);
        let (status, _, stderr) = start.spawn_with(manager).wait();
        (status.code().unwrap_or(-1), stderr)
    }

    /// As [`start_again`](Self::start_again), for a next one that is not awaited to become ready.
    #[track_caller]
    pub fn begin_again(self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> Self {
        let (start, manager) = self.successor(change);
        start.spawn_with(manager)
    }

    /// Waits for the end; then the next one, ready to be started, and its manager.
    #[track_caller]
    fn successor(mut self, change: impl FnOnce(Start, &mut Vec<(String, OwnedFd)>) -> Start) -> (Start, Arc<Manager>) {
        let status = self.wait_for_exit();
        assert!(status.success() || status.signal() == Some(9), "{status}: {}", self.stderr());
        let manager = Arc::clone(&self.manager);
        let mut stored: Vec<_> =
            manager.told.lock().store.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect();
        // As PID 1 passes them: the newest first.
        stored.reverse();
        let mut start = Start::bare().at(&self.place);
        start.args = self.config.clone();
        for (name, fd) in std::mem::take(&mut self.sockets) {
            start = start.socket(&name, fd);
        }
        let capacity = manager.told.lock().capacity;
        if capacity > 0 {
            start = start.env("FDSTORE", &capacity.to_string());
        }
        start = change(start, &mut stored);
        for (name, fd) in stored {
            start = start.socket(&name, fd);
        }
        (start, manager)
    }
}

impl Drop for Echod {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A field of /proc/PID/status in KiB, such as VmHWM, the most memory it ever held.
pub fn memory(echod: &Echod, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", echod.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time spent so far, in ticks of 10 ms.
pub fn cpu(echod: &Echod) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", echod.pid())).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// How many it has open.
pub fn descriptors(echod: &Echod) -> usize {
    fs::read_dir(format!("/proc/{}/fd", echod.pid())).unwrap().count()
}

/// How many denials or refusals the summaries on standard error stand for.
pub fn summed(stderr: &str) -> usize {
    let count = |line: &str| line.split_once(" more times in ")?.0.rsplit_once(' ')?.1.parse::<usize>().ok();
    stderr.lines().filter_map(count).sum()
}

/// A command that runs a program where the user database never answers: until somebody writes to the pipe `passwd` in
/// this place.
pub fn hung_user_database(place: &Place) -> [String; 8] {
    let passwd = place.path("passwd");
    nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
    let script = "mount --bind \"$0\" /etc/passwd && exec \"$@\"";
    ["unshare", "-m", "--propagation", "private", "sh", "-c", script, passwd.to_str().unwrap()].map(str::to_owned)
}

/// How many of something a test makes: as many as the environment says, in a longer run by hand.
pub fn setting(name: &str, otherwise: usize) -> usize {
    std::env::var(name).map_or(otherwise, |number| number.parse().expect("a number"))
}

/// Lets this process, and what it starts from now on, open so many files.
pub fn raise_descriptor_limit(needed: u64) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(
        hard >= needed,
        "this test needs {needed} file descriptors, and the hard limit is {hard}: ulimit -Hn {needed}"
    );
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
}

/// A duplicate, for whoever wants to keep one.
pub fn duplicate(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}
