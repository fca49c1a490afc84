//! journald: receives records over its native protocol; can stop reading, vanish and come back.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::{Place, Shared, peer_program, receive};

/// One entry of the journal: field names and values.
pub type Entry = BTreeMap<String, String>;

/// journald's side of the native protocol, at a socket in a mount namespace of its own.
pub struct Journald {
    place: Place,
    state: Shared<Written>,
}

#[derive(Default)]
pub struct Written {
    pub entries: Vec<Entry>,
    stopped: bool,
    /// The epoch of a read that has not yet added its entry.
    reading: Option<usize>,
    /// The socket is to be closed as soon as its queue is empty.
    vanishing: bool,
    epoch: usize,
    /// The number of the last [`CATCH_UP`] entry sent, and of the last one received.
    asked: u64,
    caught_up: u64,
}

impl Written {
    fn take_in(&mut self, entry: Entry) {
        if let Some(number) = entry.get(CATCH_UP) {
            self.caught_up = number.parse().unwrap();
        }
        // Entries of other senders only fill the queue; keeping them would slow down each search.
        if entry.contains_key("SYSLOG_IDENTIFIER") {
            self.entries.push(entry);
        }
    }
}

/// The field of an entry that a test sends to know when all earlier entries have been received.
const CATCH_UP: &str = "TEST_CATCH_UP";

impl Journald {
    pub fn new() -> Self {
        let journald = Self::absent();
        journald.start();
        journald
    }

    /// A journal that does not run: the directory without the socket.
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

    /// As [`start`](Self::start), with the queue length that systemd sets: one sender cannot fill it.
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
                    // From here on sendmsg(2) fails; what was sent before is read below.
                    socket.shutdown(std::net::Shutdown::Read).unwrap();
                    socket.set_nonblocking(true).unwrap();
                }
                while let Ok(message) = receive(&socket, &mut buffer) {
                    let (count, fds) = message.unwrap_or_default();
                    let mut bytes = buffer[..count].to_vec();
                    for fd in fds {
                        // A large entry is passed in a memfd.
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

    /// Stops reading, as journald does at SIGSTOP.
    pub fn stop_reading(&self) {
        self.state.change(|state| state.stopped = true);
        // A read in progress may still receive one entry.
        self.state.try_wait(|state| state.reading.is_none().then_some(())).expect("a read lasts 20 ms at most");
    }

    pub fn go_on(&self) {
        self.state.change(|state| state.stopped = false);
    }

    /// Removes the socket's file and closes the socket, as `systemctl stop` does. Entries already sent are read first, so
    /// that none is lost without the test knowing.
    pub fn vanish(&self) {
        let _ = fs::remove_file(self.place.path("socket"));
        self.state.change(|state| state.vanishing = true);
        self.state.try_wait(|state| (!state.vanishing).then_some(())).expect("the reader comes to the end");
    }

    /// A socket of another sender.
    pub fn sender(&self) -> UnixDatagram {
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect(self.place.path("socket")).unwrap();
        sender
    }

    /// A wrapper that runs a program in a mount namespace where this journal is the system's.
    pub fn wrapper(&self) -> Vec<String> {
        let script = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
                      mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";
        let directory = self.place.path("").to_string_lossy().into_owned();
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script, &directory].map(str::to_owned).to_vec()
    }

    /// All entries sent so far; while the journal does not read, all entries read so far.
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

    /// Returns the first entry for which `question` is true, and waits for it.
    #[track_caller]
    pub fn wait_for(&self, what: &str, question: impl Fn(&Entry) -> bool) -> Entry {
        let found = self.state.try_wait(|state| state.entries.iter().find(|entry| question(entry)).cloned());
        found.unwrap_or_else(|| panic!("{what}: no such entry in {:#?}", self.entries()))
    }

    /// Waits until [`stands_for`] reaches `sum`.
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

/// The right side of the equation: the records of this verdict, plus the counts of the summaries for these reasons.
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
