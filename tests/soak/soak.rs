//! The soak test: one echod, many kinds of clients, and a journal that stops now and then. Started by tests/soak/run in
//! a mount namespace of its own, as root; the argument is the number of seconds. With a second argument, `peergate`, the
//! proxy is in between: the clients are its own, and in the first half of the time it is restarted now and then.
//!
//! It starts itself again for each kind of client (see [`ROLES`]), as the user of that kind. At the end it compares
//! what the clients saw with the records in the journal, and memory and descriptors of the last process early on with the
//! figures at the end.

// A program for testers: on a failure it stops and says so.
#![allow(clippy::unwrap_used)]

#[path = "../common/dir.rs"]
#[allow(dead_code)]
mod dir;
#[path = "../common/fds.rs"]
#[allow(dead_code)]
mod fds;
#[path = "../common/manager.rs"]
#[allow(dead_code)]
mod manager;
mod service;
#[path = "../common/wait.rs"]
#[allow(dead_code)]
mod wait;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use dir::Place;
use fds::receive;
use service::{Process, Service};
use wait::Shared;

const DIRECTORY: &str = "/run/soak";
const SOCKET: &str = "/run/soak/echo.sock";
const CONFIG: &str = "/run/soak/echod.toml";
/// Where the proxy's clients end up.
const BEHIND: &str = "/run/soak/behind.sock";
/// Says in a client's environment that there is a proxy.
const PROXIED: &str = "SOAK_PROXIED";
const JOURNAL: &str = "/run/systemd/journal/socket";

/// A client that gets no answer for so long gives up: the service has stalled.
const PATIENCE: Duration = Duration::from_secs(60);

/// A kind of client: its user, and what it does.
struct Role {
    name: &'static str,
    uid: u32,
    run: fn(&AtomicBool, &Figures),
}

/// Users that no system has.
const TALKER: u32 = 61_001;
const SLOW: u32 = 61_002;
const FLOODERS: [u32; 2] = [61_003, 61_004];
const VANISHER: u32 = 61_005;
const GREEDY: u32 = 61_006;

const ROLES: [Role; 8] = [
    Role { name: "talk", uid: TALKER, run: talk },
    Role { name: "mute", uid: SLOW, run: mute },
    Role { name: "loris", uid: SLOW, run: loris },
    Role { name: "nul", uid: SLOW, run: nul },
    Role { name: "flood", uid: FLOODERS[0], run: flood },
    Role { name: "flood-more", uid: FLOODERS[1], run: flood },
    Role { name: "vanish", uid: VANISHER, run: vanish },
    Role { name: "greed", uid: GREEDY, run: greed },
];

/// The policy. `n` makes the policy of each reload another one.
fn configuration(program: &str, n: u64) -> String {
    let forward =
        if program == PROXY { format!("[forward]\nto = \"{BEHIND}\"\nreplies = \"text\"\n") } else { String::new() };
    format!(
        "# Reload {n}\n\
         [deny.flood]\nusers = [\"{}\"]\n\
         [allow.talker]\nusers = [\"{TALKER}\"]\n\
         [allow.slow]\nusers = [\"{SLOW}\"]\nconnections-per-user = 512\n\
         [allow.greedy]\nusers = [\"{GREEDY}\"]\nconnections-per-user = 4\n\
         [allow.changing]\nusers = [\"{}\"]\n\
         [audit]\ninterval = \"1s\"\n{forward}",
        FLOODERS[0],
        62_000 + n % 1000,
    )
}

const PROXY: &str = "peergate";
/// So many seconds are between two restarts of the proxy, in the first half of the time. In a process of a few seconds no growth
/// can be seen: the last one serves for the other half.
const RESTARTS: u64 = 15;

fn main() -> ExitCode {
    let argument = std::env::args().nth(1).expect("started by tests/soak/run");
    match ROLES.iter().find(|role| role.name == argument) {
        Some(role) => be_client(role),
        None => {
            let program = if std::env::args().nth(2).is_some() { PROXY } else { "echod" };
            conduct(program, Duration::from_secs(argument.parse().expect("a number of seconds")))
        }
    }
}

// --- Clients ---

/// The figures that a client reports at the end, as lines `NAME NUMBER`.
#[derive(Default)]
struct Figures(Mutex<BTreeMap<&'static str, u64>>);

impl Figures {
    fn add(&self, name: &'static str, number: u64) {
        *self.0.lock().unwrap().entry(name).or_default() += number;
    }

    fn most(&self, name: &'static str, number: u64) {
        let mut figures = self.0.lock().unwrap();
        let figure = figures.entry(name).or_default();
        *figure = number.max(*figure);
    }
}

/// Runs until standard input ends, then prints the figures.
fn be_client(role: &Role) -> ExitCode {
    // A failure of one thread ends the client, and so the soak test.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::exit(101);
    }));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    thread::spawn(move || {
        let _ = io::stdin().read(&mut [0]);
        stopped.store(true, Ordering::Relaxed);
    });
    let figures = Figures::default();
    (role.run)(&stop, &figures);
    for (name, number) in figures.0.into_inner().unwrap() {
        println!("{name} {number}");
    }
    ExitCode::SUCCESS
}

fn connect() -> UnixStream {
    let socket = UnixStream::connect(SOCKET).expect("the socket is always there");
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    /// Lines of any bytes, most of them short; the last one perhaps without its end.
    fn lines(&mut self, fragment: bool) -> Vec<u8> {
        let mut sent = Vec::new();
        for _ in 0..1 + self.below(20) {
            let longest = [8, 80, 4096, 65_536][self.below(4)];
            let length = self.below(longest);
            sent.extend((0..length).map(|_| self.below(256) as u8).map(|byte| if byte == b'\n' { 0 } else { byte }));
            sent.push(b'\n');
        }
        if fragment {
            sent.pop();
        }
        sent
    }
}

/// The echo by the contract.
fn echo_of(sent: &[u8]) -> Vec<u8> {
    sent.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [b"> ", line].concat()).collect()
}

/// Four threads, each with one connection after the other. Every byte is checked.
fn talk(stop: &AtomicBool, figures: &Figures) {
    let mut latencies: Vec<u32> = thread::scope(|threads| {
        let talk = |seed| {
            let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
            let mut latencies = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                conversation(&mut random, &mut latencies, figures);
            }
            latencies
        };
        let talking: Vec<_> = (1..=4).map(|seed| threads.spawn(move || talk(seed))).collect();
        talking.into_iter().flat_map(|one| one.join().unwrap()).collect()
    });
    latencies.sort_unstable();
    for (name, percent) in [("p50-usec", 50), ("p99-usec", 99)] {
        figures
            .most(name, latencies.get(latencies.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0).into());
    }
}

fn conversation(random: &mut Random, latencies: &mut Vec<u32>, figures: &Figures) {
    let mut socket = connect();
    for _ in 0..random.below(50) {
        let begun = Instant::now();
        socket.write_all(b"how long does this take\n").unwrap();
        let mut answer = [0; 26];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"> how long does this take\n");
        let took = begun.elapsed();
        figures.add("round-trips", 1);
        figures.add(if took < Duration::from_millis(10) { "under-10-ms" } else { "over-10-ms" }, 1);
        figures.most("longest-usec", took.as_micros() as u64);
        latencies.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }
    let sent = random.lines(random.0 % 2 == 0);
    let expected = echo_of(&sent);
    let (first, second) = sent.split_at(random.below(sent.len() + 1));
    let mut writing = socket.try_clone().unwrap();
    let answer = thread::scope(|threads| {
        threads.spawn(move || {
            writing.write_all(first).unwrap();
            writing.write_all(second).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::with_capacity(expected.len());
        socket.read_to_end(&mut answer).unwrap();
        answer
    });
    assert!(answer == expected, "{} bytes came back, {} were expected, or others", answer.len(), expected.len());
    figures.add("connections", 1);
    figures.add("bytes-checked", answer.len() as u64);
}

/// Thirty-two clients that send until the socket takes no more, never read, and close after a while.
fn mute(stop: &AtomicBool, figures: &Figures) {
    let burst = vec![b'\n'; 32 << 10];
    while !stop.load(Ordering::Relaxed) {
        let sockets: Vec<_> = (0..32).map(|_| connect()).collect();
        for socket in &sockets {
            socket.set_nonblocking(true).unwrap();
        }
        for _ in 0..20 {
            for mut socket in &sockets {
                while let Ok(n) = socket.write_vectored(&[IoSlice::new(&burst), IoSlice::new(b"unread")]) {
                    figures.add("bytes-unread", n as u64);
                }
            }
            pace(stop, Duration::from_millis(250));
        }
        figures.add("connections", sockets.len() as u64);
    }
}

/// Thirty-two clients that send a byte now and then, and never end their line.
fn loris(stop: &AtomicBool, figures: &Figures) {
    while !stop.load(Ordering::Relaxed) {
        let mut sockets: Vec<_> = (0..32).map(|_| connect()).collect();
        for _ in 0..50 {
            for socket in &mut sockets {
                socket.write_all(b"x").unwrap();
            }
            pace(stop, Duration::from_millis(100));
        }
        figures.add("connections", sockets.len() as u64);
    }
}

/// Sends zeros and never a newline, until it gets the message that the line is too long.
fn nul(stop: &AtomicBool, figures: &Figures) {
    while !stop.load(Ordering::Relaxed) {
        let mut socket = connect();
        let mut writing = socket.try_clone().unwrap();
        let answer = thread::scope(|threads| {
            // Until the service closes the connection.
            threads.spawn(move || while writing.write_all(&[0; 16 << 10]).is_ok() {});
            let mut answer = Vec::new();
            let end = socket.read_to_end(&mut answer);
            // What the service leaves unread the proxy cannot deliver, and the kernel tells its sender.
            let is_reset = end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            assert!(end.is_ok() || is_reset && std::env::var_os(PROXIED).is_some(), "{end:?}");
            answer
        });
        assert_eq!(answer, b"Line too long\n");
        figures.add("too-long", 1);
        pace(stop, Duration::from_millis(10));
    }
}

/// The pause of a slow client. It ends early when the client is to stop.
fn pace(stop: &AtomicBool, pause: Duration) {
    if !stop.load(Ordering::Relaxed) {
        thread::sleep(pause);
    }
}

/// Connects and is denied, again and again at full rate. Every other connection sends something first.
fn flood(stop: &AtomicBool, figures: &Figures) {
    while !stop.load(Ordering::Relaxed) {
        for eager in [false, true] {
            let mut socket = connect();
            if eager {
                // The service may have closed the connection before this arrives.
                let _ = socket.write_all(b"let me in\n");
            }
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, b"Unauthorized access\n");
            figures.add("denied", 1);
        }
    }
}

/// Is denied too, but closes before the message.
fn vanish(stop: &AtomicBool, figures: &Figures) {
    while !stop.load(Ordering::Relaxed) {
        drop(connect());
        figures.add("connections", 1);
        // Slowed down: otherwise this flood alone would fill the backlog.
        pace(stop, Duration::from_millis(1));
    }
}

/// Holds as many connections as the limit allows, and tries as many again.
fn greed(stop: &AtomicBool, figures: &Figures) {
    while !stop.load(Ordering::Relaxed) {
        let mut sockets: Vec<_> = (0..8).map(|_| connect()).collect();
        let (mut admitted, mut refused) = (0, 0);
        for socket in &mut sockets {
            let _ = socket.write_all(b"hello\n");
            let mut answer = [0; 21];
            let mut length = 0;
            // An admitted client gets "> hello" and nothing more.
            while length < 8 || (!answer.starts_with(b"> hello\n") && length < 21) {
                match socket.read(&mut answer[length..]) {
                    Ok(0) => break,
                    Ok(n) => length += n,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => panic!("after {length} bytes: {error}"),
                }
            }
            match &answer[..length] {
                b"> hello\n" => admitted += 1,
                b"Too many connections\n" => refused += 1,
                other => panic!("{:?}", String::from_utf8_lossy(other)),
            }
        }
        assert!(admitted <= 4, "{admitted} admitted where 4 may be");
        figures.add("admitted", admitted);
        figures.add("refused", refused);
    }
}

// --- The journal ---

/// The journal's records about one user.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    records: u64,
    counted: u64,
}

/// A journald that receives records, and stops and continues reading on request.
struct Journal {
    socket: UnixDatagram,
    stopped: AtomicBool,
    ended: AtomicBool,
    /// By GATE_VERDICT (of a summary: the verdict its reason belongs to) and PEER_UID.
    told: Mutex<BTreeMap<(String, u32), Told>>,
    entries: AtomicU64,
}

impl Journal {
    fn start() -> (Arc<Self>, thread::JoinHandle<()>) {
        let socket = UnixDatagram::bind(JOURNAL).expect("tests/soak/run makes the directory");
        fs::set_permissions(JOURNAL, fs::Permissions::from_mode(0o666)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let journal = Arc::new(Self {
            socket,
            stopped: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            told: Mutex::default(),
            entries: AtomicU64::new(0),
        });
        let receiving = Arc::clone(&journal);
        (journal, thread::spawn(move || receiving.receive()))
    }

    fn receive(&self) {
        let mut datagram = vec![0; 1 << 20];
        loop {
            while self.stopped.load(Ordering::Relaxed) {
                thread::park();
            }
            match self.socket.recv(&mut datagram) {
                Ok(length) => self.take(&datagram[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    // The service has exited, and its last entry has been read.
                    if self.ended.load(Ordering::Relaxed) {
                        return;
                    }
                }
                Err(error) => panic!("the journal's socket: {error}"),
            }
        }
    }

    fn take(&self, entry: &[u8]) {
        self.entries.fetch_add(1, Ordering::Relaxed);
        let fields = fields(entry);
        let Some(verdict) = fields.get("GATE_VERDICT") else { return };
        let Some(uid) = fields.get("PEER_UID").and_then(|uid| uid.parse().ok()) else {
            panic!("a verdict on nobody: {fields:?}");
        };
        let (verdict, records, counted) = match (verdict.as_str(), fields.get("GATE_REASON").map(String::as_str)) {
            ("summary", Some("policy" | "no-credentials")) => ("denied", 0, fields["GATE_COUNT"].parse().unwrap()),
            ("summary", _) => ("refused", 0, fields["GATE_COUNT"].parse().unwrap()),
            (verdict, _) => (verdict, 1, 0),
        };
        let mut told = self.told.lock().unwrap();
        let told = told.entry((verdict.to_owned(), uid)).or_default();
        told.records += records;
        told.counted += counted;
    }

    fn of(&self, verdict: &str, uid: u32) -> Told {
        self.told.lock().unwrap().get(&(verdict.to_owned(), uid)).copied().unwrap_or_default()
    }
}

/// journald's native protocol: `NAME=value` and LF, or `NAME`, LF, the length as eight bytes (little-endian), the
/// value and LF.
fn fields(mut entry: &[u8]) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut fields = BTreeMap::new();
    while let Some(lf) = entry.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&entry[..lf], &entry[lf + 1..]);
        if let Some(equals) = line.iter().position(|byte| *byte == b'=') {
            fields.insert(text(&line[..equals]), text(&line[equals + 1..]));
            entry = rest;
        } else {
            let (length, rest) = rest.split_first_chunk::<8>().expect("a length");
            let (value, rest) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
            fields.insert(text(line), text(value));
            entry = &rest[1..];
        }
    }
    fields
}

// --- The conductor ---

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// KiB.
    memory: u64,
    descriptors: u64,
}

fn sample(pid: u32) -> Sample {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the service has ended");
    let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
    Sample { memory, descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64 }
}

fn start_client(program: &str, role: &Role) -> Child {
    let mut command = Command::new(format!("{DIRECTORY}/soak"));
    if program == PROXY {
        command.env(PROXIED, "1");
    }
    command.arg(role.name).uid(role.uid).gid(role.uid).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until the service is ready. Its standard error must stay empty, since there is a journal all the time.
fn start_service(program: &'static str, journal: &Journal) -> Service {
    fs::write(CONFIG, configuration(program, 0)).unwrap();
    let service = Service::start(program);
    // With its first record the service has opened all that it writes to.
    await_entries(journal, 1);
    service
}

fn await_entries(journal: &Journal, count: u64) {
    let patience = Instant::now() + PATIENCE;
    while journal.entries.load(Ordering::Relaxed) < count {
        assert!(Instant::now() < patience, "the service writes nothing");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The echo behind the proxy, which admits only that.
fn start_behind() -> Process {
    let config = format!("{DIRECTORY}/behind.toml");
    fs::write(&config, "[allow.gate]\nusers = [\"self\"]\n[limits]\nconnections = 4000\nconnections-per-user = 4000\n")
        .unwrap();
    let mut command = Command::new(format!("{DIRECTORY}/echod"));
    let behind = Process(command.args(["--listen", BEHIND, "--config", &config]).spawn().unwrap());
    let patience = Instant::now() + PATIENCE;
    while UnixStream::connect(BEHIND).is_err() {
        assert!(Instant::now() < patience, "the service behind does not start");
        thread::sleep(Duration::from_millis(20));
    }
    behind
}

fn conduct(program: &'static str, length: Duration) -> ExitCode {
    let (journal, receiving) = Journal::start();
    let behind = (program == PROXY).then(start_behind);
    let mut service = start_service(program, &journal);
    let idle = sample(service.pid());
    let mut clients: Vec<_> = ROLES.iter().map(|role| (role, start_client(program, role))).collect();

    let begun = Instant::now();
    let mut samples = Vec::new();
    for second in 1_u64.. {
        thread::sleep((begun + Duration::from_secs(second)).saturating_duration_since(Instant::now()));
        if begun.elapsed() >= length {
            break;
        }
        samples.push(sample(service.pid()));
        // For three seconds in ten the journal does not read.
        journal.stopped.store(matches!(second % 10, 5..=7), Ordering::Relaxed);
        receiving.thread().unpark();
        if second % 2 == 0 {
            fs::write(format!("{CONFIG}.new"), configuration(program, second)).unwrap();
            fs::rename(format!("{CONFIG}.new"), CONFIG).unwrap();
            service.signal(Signal::SIGHUP);
        }
        if program == PROXY && second % RESTARTS == 0 && begun.elapsed() < length / 2 {
            service.restart();
            samples.clear();
        }
        if let Some((role, _)) = clients.iter_mut().find_map(|(role, client)| Some((role, client.try_wait().unwrap()?)))
        {
            panic!("the client {} has ended before its time", role.name);
        }
    }
    journal.stopped.store(false, Ordering::Relaxed);
    receiving.thread().unpark();

    // First the clients end, then the service, which writes its summaries, then the journal.
    let mut seen: BTreeMap<(&str, String), u64> = BTreeMap::new();
    for (_, client) in &mut clients {
        drop(client.stdin.take());
    }
    let mut failed = false;
    for (role, client) in clients {
        let output = client.wait_with_output().unwrap();
        failed |= !output.status.success();
        for (name, number) in String::from_utf8(output.stdout).unwrap().lines().filter_map(|line| line.split_once(' '))
        {
            seen.insert((role.name, name.to_owned()), number.parse().unwrap());
        }
    }
    // No client is connected any more: a descriptor that stays open now is lost.
    let patience = Instant::now() + PATIENCE;
    let mut left = sample(service.pid());
    // A worker of the proxy keeps a pipe.
    let pipes = if program == PROXY { 2 * thread::available_parallelism().unwrap().get() as u64 } else { 0 };
    while left.descriptors > idle.descriptors + pipes && Instant::now() < patience {
        thread::sleep(Duration::from_millis(100));
        left = sample(service.pid());
    }
    let (status, complaints) = service.stop();
    if let Some(mut behind) = behind {
        kill(Pid::from_raw(behind.0.id() as i32), Signal::SIGTERM).unwrap();
        assert!(behind.0.wait().unwrap().success());
    }
    journal.ended.store(true, Ordering::Relaxed);
    receiving.join().unwrap();

    println!("{:22}{:>14}", "CLIENTS", "");
    for ((role, name), number) in &seen {
        println!("  {:20}{number:>14}", format!("{role} {name}"));
    }
    println!("JOURNAL {} entries", journal.entries.load(Ordering::Relaxed));
    let mut verdict = Verdict { failed };
    let figure = |role: &'static str, name: &str| seen.get(&(role, name.to_owned())).copied().unwrap_or(0);
    verdict.equal("denied, uid 61003", figure("flood", "denied"), journal.of("denied", FLOODERS[0]));
    verdict.equal("denied, uid 61004", figure("flood-more", "denied"), journal.of("denied", FLOODERS[1]));
    verdict.equal("vanished, uid 61005", figure("vanish", "connections"), journal.of("denied", VANISHER));
    verdict.equal("refused, uid 61006", figure("greed", "refused"), journal.of("refused", GREEDY));
    // Through the proxy it is the echo's record, and root the echo's peer.
    let (uid, whose) = if program == PROXY { (0, "0, behind") } else { (SLOW, "61002") };
    verdict.equal(&format!("line too long, uid {whose}"), figure("nul", "too-long"), journal.of("refused", uid));
    verdict.growth(&samples);
    let claim = format!("descriptors without clients: {} at first, {} in the end", idle.descriptors, left.descriptors);
    verdict.holds(&claim, left.descriptors <= idle.descriptors + pipes);
    println!("       RssAnon without clients: {} KiB at first, {} KiB in the end", idle.memory, left.memory);
    verdict.holds("clients that did their work", figure("talk", "connections") > 0 && figure("greed", "refused") > 0);
    verdict.holds("service ended as asked", status.success());
    verdict.holds("nothing on standard error", complaints.is_empty());
    if !complaints.is_empty() {
        println!("{complaints}");
    }
    println!("{}", if verdict.failed { "FAILED" } else { "everything is accounted for" });
    ExitCode::from(u8::from(verdict.failed))
}

/// In a shorter run, buffers and tables may still be growing to their usual size.
const SHORTEST_TO_JUDGE: usize = 120;

struct Verdict {
    failed: bool,
}

impl Verdict {
    fn holds(&mut self, claim: &str, holds: bool) {
        println!("{} {claim}", if holds { "ok    " } else { "NOT OK" });
        self.failed |= !holds;
    }

    fn equal(&mut self, what: &str, seen: u64, told: Told) {
        let Told { records, counted } = told;
        let difference = i128::from(seen) - i128::from(records + counted);
        let claim =
            format!("{what}: clients saw {seen} = {records} records + {counted} counted; difference {difference}");
        self.holds(&claim, difference == 0 && seen > 0);
    }

    /// Compares the second minute of the last process with its last one; where it served for less than ten, its second tenth
    /// with the last.
    fn growth(&mut self, samples: &[Sample]) {
        let part = 60.min(samples.len() / 10).max(1);
        let early = samples.get(part..2 * part).unwrap_or(samples);
        let late = &samples[samples.len().saturating_sub(part)..];
        let peak = samples.iter().map(|sample| sample.memory).max().unwrap_or(0);
        println!("MEMORY AND DESCRIPTORS, seconds {}-{} against the last {part}", part + 1, 2 * part);
        for (name, allowance, of) in [
            ("RssAnon in KiB", 0, (|sample: &Sample| sample.memory) as fn(&Sample) -> u64),
            ("descriptors", 32, |sample| sample.descriptors),
        ] {
            let (early, late) = (median(early.iter().map(of)), median(late.iter().map(of)));
            let claim = format!("{name}: median {early}, then {late}");
            if samples.len() < SHORTEST_TO_JUDGE {
                println!("-      {claim} (too short a run to judge)");
            } else {
                // Connections come and go, so neither figure is constant; a leak grows with time.
                self.holds(&claim, late <= early + early / 10 + allowance);
            }
        }
        // The tenths in between show whether it rises or has settled.
        let tenths = samples.chunks(samples.len().div_ceil(10).max(1));
        let tenths: Vec<_> = tenths.map(|some| median(some.iter().map(|one| one.memory)).to_string()).collect();
        println!("       RssAnon in KiB, tenth by tenth: {}; peak {peak}", tenths.join(" "));
    }
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}
