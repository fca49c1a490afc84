//! A client for the end-to-end tests: talks over many connections at once for as long as it is told to, and checks
//! every byte that comes back. What it prints at the end is the proof that a restart lost nothing.
//!
//! ```text
//! stream SOCKET CONNECTIONS < PIPE
//! ```
//!
//! Every connection sends numbered lines in pieces that rarely end where a line ends, so that at any moment about all
//! of them are in the middle of one, and waits for the echo of the complete ones before it goes on. It says `ready`
//! once each has had its first echo. At the end of its standard input it completes the lines, half-closes, and expects
//! the rest and a clean end of file. The last line printed is for a script to compare:
//!
//! ```text
//! connections=64 cut=0 lost=0 doubled=0 wrong=0 lines=53211 longest-pause-ms=143
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Between two pieces of one connection: many connections are to share two processors with what they test.
const PACE: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Tally {
    /// Connections that ended before their time.
    cut: u64,
    /// Lines sent in full that never came back.
    lost: u64,
    /// Lines that came back once more.
    doubled: u64,
    /// Lines that came back as something else.
    wrong: u64,
    lines: u64,
    pause: Duration,
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(Ok(count))) = (arguments.next(), arguments.next().map(|n| n.parse::<u64>())) else {
        eprintln!("usage: stream SOCKET CONNECTIONS");
        std::process::exit(64);
    };
    let over = Arc::new(AtomicBool::new(false));
    let (started, starts) = mpsc::channel();
    let mut threads = Vec::new();
    for number in 0..count {
        let socket = UnixStream::connect(&path)?;
        let (over, started) = (Arc::clone(&over), started.clone());
        let talk = move || Connection::new(socket, number).talk(&over, &started);
        threads.push(std::thread::Builder::new().stack_size(128 * 1024).spawn(talk)?);
    }
    drop(started);
    // A connection that was cut before its first echo starts no more, and its end is counted below.
    for () in starts.iter().take(threads.len()) {}
    println!("ready");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    over.store(true, Ordering::Relaxed);

    let mut sum = Tally::default();
    for thread in threads {
        let one = thread.join().map_err(|_| io::Error::other("a connection's thread panicked"))?;
        sum.cut += one.cut;
        sum.lost += one.lost;
        sum.doubled += one.doubled;
        sum.wrong += one.wrong;
        sum.lines += one.lines;
        sum.pause = sum.pause.max(one.pause);
    }
    let Tally { cut, lost, doubled, wrong, lines, pause } = sum;
    println!(
        "connections={count} cut={cut} lost={lost} doubled={doubled} wrong={wrong} lines={lines} longest-pause-ms={}",
        pause.as_millis()
    );
    Ok(())
}

struct Connection {
    socket: UnixStream,
    number: u64,
    /// The number of the line that is being written, and how much of it is.
    writing: (u64, usize),
    /// The number of the line whose echo comes next.
    awaited: u64,
    received: Vec<u8>,
    random: u64,
    tally: Tally,
}

impl Connection {
    fn new(socket: UnixStream, number: u64) -> Self {
        // Any odd number will do for xorshift; a different one for each connection, the same in every run.
        let random = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { socket, number, writing: (0, 0), awaited: 0, received: Vec::new(), random, tally: Tally::default() }
    }

    fn talk(mut self, over: &AtomicBool, started: &mpsc::Sender<()>) -> Tally {
        if self.exchange(over, started).is_err() {
            self.tally.cut = 1;
        }
        // Complete lines whose echo did not come.
        self.tally.lost += self.writing.0.saturating_sub(self.awaited);
        self.tally
    }

    fn exchange(&mut self, over: &AtomicBool, started: &mpsc::Sender<()>) -> io::Result<()> {
        let mut has_started = false;
        loop {
            let last = over.load(Ordering::Relaxed);
            let piece = self.piece(last);
            self.socket.write_all(&piece)?;
            while self.awaited < self.writing.0 {
                self.receive()?;
            }
            if !has_started && self.tally.lines > 0 {
                has_started = true;
                let _ = started.send(());
            }
            if last {
                break;
            }
            std::thread::sleep(PACE);
        }
        self.socket.shutdown(Shutdown::Write)?;
        let mut rest = std::mem::take(&mut self.received);
        self.socket.read_to_end(&mut rest)?;
        // Everything awaited has come: what is left was said twice.
        self.tally.doubled += u64::from(!rest.is_empty());
        Ok(())
    }

    /// The next bytes of the endless text: up to 300 of them, or to the end of the present line.
    fn piece(&mut self, to_the_end: bool) -> Vec<u8> {
        let mut piece = Vec::new();
        let wanted = if to_the_end { usize::MAX } else { self.random_below(300) + 1 };
        loop {
            let (line, written) = self.writing;
            let text = text(self.number, line);
            let part = (text.len() - written).min(wanted - piece.len());
            piece.extend_from_slice(&text.as_bytes()[written..written + part]);
            self.writing = if written + part == text.len() { (line + 1, 0) } else { (line, written + part) };
            if piece.len() == wanted || to_the_end {
                return piece;
            }
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let asked = Instant::now();
        let mut buffer = [0; 4096];
        let got = self.socket.read(&mut buffer)?;
        self.tally.pause = self.tally.pause.max(asked.elapsed());
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.received.extend_from_slice(&buffer[..got]);
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            self.judge(&line);
        }
        Ok(())
    }

    fn judge(&mut self, line: &[u8]) {
        self.tally.lines += 1;
        if line == format!("> {}", text(self.number, self.awaited)).as_bytes() {
            self.awaited += 1;
            return;
        }
        // Which one is it, if it is one of ours at all?
        let which = std::str::from_utf8(line).ok().and_then(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
        match which {
            Some(which) if line == format!("> {}", text(self.number, which)).as_bytes() => {
                if which < self.awaited {
                    self.tally.doubled += 1;
                } else {
                    self.tally.lost += which - self.awaited;
                    self.awaited = which + 1;
                }
            }
            _ => {
                self.tally.wrong += 1;
                self.awaited += 1;
            }
        }
    }

    fn random_below(&mut self, bound: u64) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % bound) as usize
    }
}

/// Line `line` of connection `number`: both in words a script can find, then filling of a length of its own.
fn text(number: u64, line: u64) -> String {
    let filling = "=".repeat((line % 97) as usize);
    format!("connection-{number} {line} {filling}\n")
}
