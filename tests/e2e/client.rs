//! A client for the end-to-end tests: talks over many connections at once for as long as it is told to, and checks
//! every byte that comes back. What it prints at the end is the proof that a restart lost nothing.
//!
//! ```text
//! stream SOCKET CONNECTIONS [pace=MILLISECONDS] [deaf=N] [torrents=N] < PIPE
//! ```
//!
//! Every connection sends numbered lines in pieces that rarely end where a line ends, so that most connections are
//! mid-line at any moment. It waits for the echo of the complete lines before it continues, `pace` (20) later. Two
//! other kinds are used on request: `deaf` connections send and read nothing until the end, so that soon they cannot
//! send either; `torrents` send without a pause and read meanwhile. The client prints `ready` once each connection has
//! had its first echo, or could send no more. At the end of its standard input it completes the lines, half-closes, and
//! expects the rest and a clean end of file. The last line of output is for a script to compare:
//!
//! ```text
//! connections=64 cut=0 lost=0 doubled=0 wrong=0 lines=53211 bytes=6012843 longest-pause-ms=143
//! ```
//!
//! `cut` counts connections; `lost`, `doubled` and `wrong` count bytes. The pause is the time from a send to its echo;
//! with a torrent, that between two reads. Waits that began before `ready` do not count: then thousands of connections
//! wait for their admission.
//!
//! The package's tests (debian/tests) compile this file by itself, with Debian 12's rustc or a newer one: it uses only
//! std, and nothing newer than Rust 1.63.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// Many connections share a thread: with a thread for each of thousands, the client itself would be measured.
const MOST_THREADS: usize = 64;
/// The longest piece. A line has some 20 to 120 bytes.
const PIECE: u64 = 300;
/// The number of bytes a torrent sends at once.
const GULP: usize = 4096;
/// The longest wait for an echo. After it the connection counts as cut.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether each connection has had its first echo.
static ALL_UNDER_WAY: AtomicBool = AtomicBool::new(false);

/// The state that all connections share.
struct Run {
    pace: Duration,
    over: AtomicBool,
}

impl Run {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Reports once that a connection is under way.
struct Started(Option<Sender<()>>);

impl Started {
    fn say(&mut self) {
        if let Some(to) = self.0.take() {
            let _ = to.send(());
        }
    }
}

/// The arguments parsed, or `None` if they are not understood.
struct Arguments {
    path: String,
    count: usize,
    pace: Duration,
    deaf: usize,
    torrents: usize,
}

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> Option<Self> {
        let (path, count) = (words.next()?, words.next()?.parse().ok()?);
        let mut read = Self { path, count, pace: Duration::from_millis(20), deaf: 0, torrents: 0 };
        for word in words {
            let (name, value) = word.split_once('=')?;
            match name {
                "pace" => read.pace = Duration::from_millis(value.parse().ok()?),
                "deaf" => read.deaf = value.parse().ok()?,
                "torrents" => read.torrents = value.parse().ok()?,
                _ => return None,
            }
        }
        (read.deaf + read.torrents <= read.count).then_some(read)
    }
}

fn main() -> io::Result<()> {
    let arguments = match Arguments::read(std::env::args().skip(1)) {
        Some(arguments) => arguments,
        None => {
            eprintln!("usage: stream SOCKET CONNECTIONS [pace=MILLISECONDS] [deaf=N] [torrents=N]");
            std::process::exit(64);
        }
    };
    let run = Run { pace: arguments.pace, over: AtomicBool::new(false) };
    let (started, starts) = mpsc::channel();
    let mut connections = Vec::new();
    for number in 0..arguments.count {
        let socket = UnixStream::connect(&arguments.path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        connections.push(Connection::new(socket, number as u64, Started(Some(started.clone()))));
    }
    drop(started);
    let torrents = connections.split_off(arguments.count - arguments.torrents);
    let deaf = connections.split_off(connections.len() - arguments.deaf);
    let mut shares: Vec<Vec<Connection>> = Vec::new();
    shares.resize_with(MOST_THREADS.min(connections.len()), Vec::new);
    for (turn, connection) in connections.into_iter().enumerate() {
        shares[turn % MOST_THREADS].push(connection);
    }

    let sum = thread::scope(|scope| {
        let mut threads = Vec::new();
        let run = &run;
        let step = run.pace / shares.len().max(1) as u32;
        for (turn, share) in shares.into_iter().enumerate() {
            // The threads do not send at the same time: their clients would wait for each other, not for the service.
            let offset = step * turn as u32;
            threads.push(scope.spawn(move || converse(share, offset, run)));
        }
        for torrent in torrents {
            threads.push(scope.spawn(move || pour(torrent, run)));
        }
        threads.push(scope.spawn(move || ignore(deaf, run)));
        // A connection that was cut before it was under way reports so too, and is counted at the end.
        starts.iter().take(arguments.count).for_each(drop);
        ALL_UNDER_WAY.store(true, Ordering::Relaxed);
        println!("ready");
        let input = io::copy(&mut io::stdin(), &mut io::sink());
        run.over.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for one in threads.into_iter().flat_map(|thread| thread.join().expect("a thread panicked")) {
            sum.add(&one);
        }
        input.map(|_| sum)
    })?;
    let Tally { cut, lost, doubled, wrong, lines, bytes, pause } = sum;
    println!(
        "connections={} cut={cut} lost={lost} doubled={doubled} wrong={wrong} lines={lines} bytes={bytes} \
         longest-pause-ms={}",
        arguments.count,
        pause.as_millis()
    );
    Ok(())
}

/// The connections of one thread: all send, then all wait for their echo.
fn converse(mut share: Vec<Connection>, offset: Duration, run: &Run) -> Vec<Tally> {
    thread::sleep(offset);
    loop {
        let last = run.is_over();
        for connection in &mut share {
            connection.attempt(|connection| connection.send_piece(last));
        }
        for connection in &mut share {
            connection.attempt(Connection::await_echo);
        }
        if last {
            break;
        }
        thread::sleep(run.pace);
    }
    for connection in &mut share {
        connection.attempt(|connection| {
            connection.socket.shutdown(Shutdown::Write)?;
            connection.listen_to_the_end(|_| ())
        });
    }
    share.into_iter().map(Connection::sum).collect()
}

/// A connection that sends without a pause and reads meanwhile.
fn pour(mut torrent: Connection, run: &Run) -> Vec<Tally> {
    torrent.attempt(|torrent| {
        torrent.listen_while(|text, socket| {
            while !run.is_over() {
                socket.write_all(&text.next(GULP))?;
            }
            socket.write_all(&text.rest_of_line())
        })
    });
    vec![torrent.sum()]
}

/// Connections that send what fits, and read only at the end.
fn ignore(mut deaf: Vec<Connection>, run: &Run) -> Vec<Tally> {
    let mut unsent = vec![Vec::new(); deaf.len()];
    while !run.is_over() {
        for (connection, unsent) in deaf.iter_mut().zip(&mut unsent) {
            connection.attempt(|connection| connection.send_what_fits(unsent));
        }
        thread::sleep(run.pace);
    }
    for (connection, unsent) in deaf.iter_mut().zip(&unsent) {
        connection.attempt(|connection| {
            connection.socket.set_nonblocking(false)?;
            connection.listen_while(|text, socket| {
                socket.write_all(unsent)?;
                socket.write_all(&text.rest_of_line())
            })
        });
    }
    deaf.into_iter().map(Connection::sum).collect()
}

#[derive(Default)]
struct Tally {
    /// Connections that ended early.
    cut: u64,
    /// Bytes of the echo to complete lines that never came.
    lost: u64,
    /// Bytes of lines that came twice.
    doubled: u64,
    /// Bytes that are the echo to no line that was sent.
    wrong: u64,
    lines: u64,
    bytes: u64,
    pause: Duration,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.cut += other.cut;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.wrong += other.wrong;
        self.lines += other.lines;
        self.bytes += other.bytes;
        self.pause = self.pause.max(other.pause);
    }
}

/// A connection waits for bytes.
struct Wait {
    since: Instant,
    /// Whether it began when each connection was under way.
    counts: bool,
}

impl Wait {
    fn begin() -> Self {
        Self { since: Instant::now(), counts: ALL_UNDER_WAY.load(Ordering::Relaxed) }
    }
}

struct Connection {
    socket: UnixStream,
    text: Text,
    check: Check,
    /// The send that awaits its echo.
    asked: Wait,
    started: Started,
}

impl Connection {
    fn new(socket: UnixStream, number: u64, started: Started) -> Self {
        let check = Check { number, awaited: 0, received: Vec::new(), tally: Tally::default() };
        Self { socket, text: Text::new(number), check, asked: Wait::begin(), started }
    }

    /// Runs `what` unless the connection has been cut. A cut is counted and does not stop the other connections.
    fn attempt(&mut self, what: impl FnOnce(&mut Self) -> io::Result<()>) {
        if self.check.tally.cut == 0 && what(self).is_err() {
            self.check.tally.cut = 1;
            self.started.say();
        }
    }

    fn send_piece(&mut self, last: bool) -> io::Result<()> {
        let piece = if last { self.text.rest_of_line() } else { self.text.next_piece() };
        self.asked = Wait::begin();
        self.socket.write_all(&piece)
    }

    /// Waits for the echo of each complete line.
    fn await_echo(&mut self) -> io::Result<()> {
        let mut buffer = [0; GULP];
        while self.check.awaited < self.text.line {
            let got = self.socket.read(&mut buffer)?;
            self.check.pause(&self.asked);
            if got == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.check.take(&buffer[..got]);
            self.started.say();
        }
        Ok(())
    }

    /// Sends until the socket takes no more.
    fn send_what_fits(&mut self, unsent: &mut Vec<u8>) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        loop {
            if unsent.is_empty() {
                *unsent = self.text.next_piece();
            }
            match self.socket.write(unsent) {
                Ok(sent) => drop(unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.started.say();
        Ok(())
    }

    /// Reads to the end of file, while another thread sends and then half-closes.
    fn listen_while(
        &mut self,
        send: impl FnOnce(&mut Text, &mut UnixStream) -> io::Result<()> + Send,
    ) -> io::Result<()> {
        let mut sending = self.socket.try_clone()?;
        let mut text = Text::new(self.text.number);
        std::mem::swap(&mut text, &mut self.text);
        let mut started = Started(self.started.0.take());
        let (sent, listened, text) = thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let sent = send(&mut text, &mut sending).and_then(|()| sending.shutdown(Shutdown::Write));
                (sent, text)
            });
            let listened = self.listen_to_the_end(|_| started.say());
            // After a cut the sender must not go on.
            let _ = self.socket.shutdown(Shutdown::Both);
            let (sent, text) = sender.join().expect("a sender panicked");
            (sent, listened, text)
        });
        self.text = text;
        started.say();
        sent.and(listened)
    }

    fn listen_to_the_end(&mut self, mut heard: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = [0; 16 * GULP];
        let mut since = Wait::begin();
        loop {
            let got = self.socket.read(&mut buffer)?;
            self.check.pause(&since);
            since = Wait::begin();
            if got == 0 {
                return Ok(());
            }
            self.check.take(&buffer[..got]);
            heard(&buffer[..got]);
        }
    }

    fn sum(self) -> Tally {
        self.check.sum(self.text.line)
    }
}

/// The endless text of a connection, and how far it has been sent.
struct Text {
    number: u64,
    /// The line being sent, and how much of it has been.
    line: u64,
    written: usize,
    random: u64,
}

impl Text {
    fn new(number: u64) -> Self {
        // xorshift takes any odd number: a different one for each connection, the same in every run.
        let random = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { number, line: 0, written: 0, random }
    }

    fn next_piece(&mut self) -> Vec<u8> {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.next((self.random % PIECE) as usize + 1)
    }

    fn next(&mut self, wanted: usize) -> Vec<u8> {
        let mut piece = Vec::with_capacity(wanted);
        while piece.len() < wanted {
            let line = line(self.number, self.line);
            let rest = &line.as_bytes()[self.written..];
            let part = rest.len().min(wanted - piece.len());
            piece.extend_from_slice(&rest[..part]);
            self.written += part;
            if part == rest.len() {
                self.line += 1;
                self.written = 0;
            }
        }
        piece
    }

    fn rest_of_line(&mut self) -> Vec<u8> {
        let left = line(self.number, self.line).len() - self.written;
        self.next(left)
    }
}

/// Compares what comes back with what was sent.
struct Check {
    number: u64,
    /// The number of the line that is expected next.
    awaited: u64,
    /// The beginning of a line.
    received: Vec<u8>,
    tally: Tally,
}

impl Check {
    fn pause(&mut self, wait: &Wait) {
        if wait.counts {
            self.tally.pause = self.tally.pause.max(wait.since.elapsed());
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.tally.bytes += bytes.len() as u64;
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.received.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.received);
                self.judge(&line);
            }
        }
    }

    fn judge(&mut self, found: &[u8]) {
        self.tally.lines += 1;
        if found == self.echo(self.awaited) {
            self.awaited += 1;
            return;
        }
        // Which line is it, if it is one at all?
        let which = std::str::from_utf8(found).ok().and_then(|found| found.split(' ').nth(2)?.parse::<u64>().ok());
        match which {
            Some(which) if found == self.echo(which) => {
                if which < self.awaited {
                    self.tally.doubled += found.len() as u64;
                } else {
                    self.lose(which);
                    self.awaited = which + 1;
                }
            }
            _ => {
                self.tally.wrong += found.len() as u64;
                self.awaited += 1;
            }
        }
    }

    fn echo(&self, line_number: u64) -> Vec<u8> {
        format!("> {}", line(self.number, line_number)).into_bytes()
    }

    /// The lines awaited before this one did not come.
    fn lose(&mut self, before: u64) {
        self.tally.lost += (self.awaited..before).map(|line| self.echo(line).len() as u64).sum::<u64>();
    }

    fn sum(mut self, sent: u64) -> Tally {
        self.lose(sent);
        self.tally.wrong += self.received.len() as u64;
        self.tally
    }
}

/// A line of a connection: two words that a script can find, then filling of varying length.
fn line(number: u64, line: u64) -> String {
    let filling = "=".repeat((line % 97) as usize);
    format!("connection-{number} {line} {filling}\n")
}
