//! What is asked of the servers, one server and one workload at a time, each on a freshly started server.
use crate::attacks::{denied, flood, unfair_connect, unfair_lines};
use crate::client::{self, PATIENCE, Run};
use crate::process::{Server, first_cpu, now_nanos, pin, unpin};
use crate::servers::{Denies, Setting, Spec};
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What the whole run shares.
pub struct Bench {
    pub work: PathBuf,
    pub span: Duration,
    pub cpus: usize,
    /// Whether this process may switch to other users.
    pub root: bool,
    /// Fewer connections, fewer starts: the run only shows that everything works.
    pub quick: bool,
}

/// The figures of one server under one workload in one round, by column.
pub type Figures = BTreeMap<Figure, f64>;

/// Columns, in the order of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Figure {
    /// Lines, or connections, per second.
    Rate,
    /// Microseconds of the server's CPU per line or connection.
    Cpu,
    P50,
    P99,
    P999,
    /// Lines per second of a user that streams, while no other user is there; nanoseconds of CPU for each.
    Streamed,
    StreamedCpu,
    /// Denials per second during the flood.
    Denials,
    /// Microseconds.
    QuietP50,
    QuietP99,
    /// Per cent of the connects that do not wait for which the listener's queue was full.
    TurnedDown,
    /// Connections per second of the attackers, while no other client is there.
    Alone,
    /// Milliseconds.
    FirstEcho,
    Ready,
    /// Bytes of the process's own memory per connection.
    PerConnection,
    /// How often per second a thread of the idle server wakes.
    Wakeups,
    /// KiB.
    Peak,
}

/// A workload.
pub struct Workload {
    pub name: &'static str,
    pub what: &'static str,
    /// How many connections the server has to hold.
    pub connections: u32,
    pub needs: Needs,
    run: fn(&Bench, &Spec) -> Result<Figures>,
}

/// What a server must have for the workload to make sense.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// It denies other users, and this process may switch to other users.
    Judgement,
    /// It denies other users and serves all its connections in one process.
    JudgementInOne,
    /// The same; and the denied clients do not look at the answer.
    JudgementInHaste,
    /// It serves all its connections in one process, and this process may switch to other users.
    OtherUsers,
    /// It is started by the connection.
    Activation,
}

/// A way to make the floor give wrong answers.
pub struct Lie {
    /// The floor's option.
    pub option: &'static str,
    /// Every how-many-th answer is wrong.
    pub nth: u32,
    /// How long the workload has to last.
    pub span: Duration,
}

const fn workload(
    name: &'static str,
    what: &'static str,
    connections: u32,
    needs: Needs,
    run: fn(&Bench, &Spec) -> Result<Figures>,
) -> Workload {
    Workload { name, what, connections, needs, run }
}

/// The client's pause between an answer and its next line. Longer than an echo takes, and shorter than a server is
/// likely to poll before it sleeps, so that the cost of polling shows.
const THINK: Duration = Duration::from_micros(15);

/// How long an idle server is measured at least. A server that wakes every second must show it.
const IDLE: Duration = Duration::from_secs(3);

/// How long it must have been quiet before that: longer than a server defers work that is not urgent.
const SETTLED: Duration = Duration::from_millis(1500);

/// How many connections `connect-*` finishes after the time.
const FINISHED: u32 = 16;

/// All workloads in the order in which they run.
pub const ALL: &[Workload] = &[
    workload("ping-free", "1 connection, 32-byte lines, one at a time", 1, Needs::Nothing, |b, s| {
        ping(b, s, Duration::ZERO)
    }),
    workload("ping-think", "the same, the client busy for 15 µs before each line", 1, Needs::Nothing, |b, s| {
        ping(b, s, THINK)
    }),
    workload("ping-same", "as ping-free, client and server on one CPU", 1, Needs::Nothing, ping_same),
    workload("ping-64", "64 connections, one 32-byte line each at a time", 64, Needs::Nothing, |b, s| {
        many(b, s, 64, 32, 1)
    }),
    workload("ping-1000", "1,000 connections, one 32-byte line each at a time", 1_000, Needs::Nothing, |b, s| {
        many(b, s, 1_000, 32, 1)
    }),
    workload("pipelined", "16 connections, 256 lines of 64 bytes in flight each", 16, Needs::Nothing, |b, s| {
        many(b, s, 16, 64, 256)
    }),
    workload("long", "4 connections, one line of 60 KiB each at a time", 4, Needs::Nothing, |b, s| {
        many(b, s, 4, 60 * 1024, 1)
    }),
    workload("connect-1", "connect, one line, close; 1 client", 1, Needs::Nothing, |b, s| connect(b, s, 1)),
    workload("connect-16", "connect, one line, close; 16 clients", 16, Needs::Nothing, |b, s| connect(b, s, 16)),
    workload("denied", "connections that are denied; 1 client", 1, Needs::Judgement, denied),
    workload("flood", "1 admitted connection as ping-free while 2 other users flood", 3, Needs::JudgementInOne, flood),
    workload(
        "unfair-connect",
        "1 client connects, one line, closes while 2 processes of another user connect and close",
        3,
        Needs::JudgementInHaste,
        unfair_connect,
    ),
    workload(
        "unfair-lines",
        "1 connection as ping-free while another user streams bare LFs on 64",
        65,
        Needs::OtherUsers,
        unfair_lines,
    ),
    workload("flat-64", "64 active connections of 64", 64, Needs::Nothing, |b, s| flat(b, s, 64)),
    workload("flat-1000", "64 active connections of 1,000", 1_000, Needs::Nothing, |b, s| flat(b, s, 1_000)),
    workload("flat-10000", "64 active connections of 10,000", 10_000, Needs::Nothing, |b, s| flat(b, s, 10_000)),
    workload("idle", "10,000 connections that have had one echo", 10_000, Needs::Nothing, idle),
    workload("cold", "connect to the socket of a stopped service", 1, Needs::Activation, cold),
];

impl Workload {
    /// Why this workload is left out for this server; `None` where it is not.
    pub fn skips(&self, bench: &Bench, spec: &Spec) -> Option<&'static str> {
        if self.connections > spec.most {
            return Some("would need a process or thread per connection");
        }
        match self.needs {
            Needs::Nothing => None,
            Needs::Activation if !spec.activated => Some("is not started by a socket"),
            Needs::Activation => None,
            _ if !bench.root => Some("needs root, to connect as another user"),
            Needs::OtherUsers if spec.denies != Denies::NoPeer && !spec.notifies => Some("admits one user only"),
            Needs::OtherUsers if spec.most <= 100 => Some("starts a process for each connection"),
            Needs::OtherUsers => None,
            _ if spec.denies == Denies::NoPeer => Some("denies no peer"),
            Needs::JudgementInOne | Needs::JudgementInHaste if spec.most <= 100 => {
                Some("starts a process for each denial")
            }
            Needs::Judgement | Needs::JudgementInOne | Needs::JudgementInHaste => None,
        }
    }

    pub fn run(&self, bench: &Bench, spec: &Spec) -> Result<Figures> {
        (self.run)(bench, spec)
    }

    /// The floor's wrong answers that it has to notice.
    pub fn lies(&self, bench: &Bench) -> Vec<Lie> {
        // Time for many more answers than that, however busy the machine is; the first wrong one ends it.
        let patient = Duration::from_secs(30);
        // Not while the connections are opened, but in what follows: the metered exchanges, or the echo at the end.
        let echo = Lie { option: "--lie", nth: bench.many(self.connections) + 40, span: patient };
        let denial = Lie { option: "--lie-denial", nth: 1, span: patient };
        match self.needs {
            Needs::Nothing | Needs::JudgementInHaste | Needs::OtherUsers => vec![echo],
            Needs::Judgement => vec![denial],
            // The other users' clients report at the end.
            Needs::JudgementInOne => vec![echo, Lie { span: Duration::from_secs(1), ..denial }],
            // A server afresh for each connection.
            Needs::Activation => vec![Lie { nth: 1, ..echo }],
        }
    }
}

impl Bench {
    pub fn socket(&self) -> PathBuf {
        self.work.join("echo.sock")
    }

    /// `n` connections, or a tenth of a large number with `--quick`.
    fn many(&self, n: u32) -> u32 {
        if self.quick && n > 100 { n / 10 } else { n }
    }
}

fn figures(run: &mut Run, cpu: Duration, server: &Server) -> Result<Figures> {
    if run.lines == 0 || run.latencies.is_empty() {
        return Err(Error::other("no line came back in the time"));
    }
    let lines = run.lines as f64;
    let mut figures = percentiles(run);
    figures.insert(Figure::Rate, lines / run.elapsed.as_secs_f64());
    figures.insert(Figure::Cpu, cpu.as_secs_f64() * 1e6 / lines);
    figures.insert(Figure::Peak, server.peak_kib()? as f64);
    Ok(figures)
}

pub fn percentiles(run: &mut Run) -> Figures {
    run.latencies.sort_unstable();
    let last = run.latencies.len() - 1;
    let at = |share: f64| f64::from(run.latencies[(last as f64 * share).round() as usize]) / 1e3;
    BTreeMap::from([(Figure::P50, at(0.5)), (Figure::P99, at(0.99)), (Figure::P999, at(0.999))])
}

/// Runs `load` between two readings of the server's CPU clock.
pub fn metered(server: &Server, load: impl FnOnce() -> Result<Run>) -> Result<Figures> {
    let before = server.cpu()?;
    let mut run = load()?;
    figures(&mut run, server.cpu()?.saturating_sub(before), server)
}

fn ping(bench: &Bench, spec: &Spec, think: Duration) -> Result<Figures> {
    let server = spec.start(&bench.socket(), Setting::default())?;
    ping_at(bench, &server, think)
}

fn ping_same(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let cpu = first_cpu()?;
    let server = spec.start(&bench.socket(), Setting { cpu: Some(cpu), ..Setting::default() })?;
    let allowed = pin(cpu)?;
    let end = ping_at(bench, &server, Duration::ZERO);
    unpin(&allowed)?;
    end
}

fn ping_at(bench: &Bench, server: &Server, think: Duration) -> Result<Figures> {
    let mut conns = client::open(&bench.socket(), 1, 32, 1)?;
    let figures = metered(server, || {
        let mut run = Run::default();
        conns.iter_mut().try_for_each(|conn| conn.ping(bench.span, think, &mut run)).map(|()| run)
    })?;
    finish(conns)?;
    Ok(figures)
}

/// Outside what is metered: an echo on each connection, and its end.
pub fn finish(conns: impl IntoIterator<Item = client::Conn>) -> Result<()> {
    conns.into_iter().try_for_each(client::Conn::finish)
}

fn many(bench: &Bench, spec: &Spec, connections: u32, line: usize, lines: usize) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting::default())?;
    let mut conns = client::open(&socket, bench.many(connections), line, lines)?;
    let figures = metered(&server, || client::drive(&mut conns, bench.span))?;
    finish(conns)?;
    Ok(figures)
}

fn flat(bench: &Bench, spec: &Spec, connections: u32) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting::default())?;
    let mut conns = client::open(&socket, bench.many(connections), 32, 1)?;
    let figures = metered(&server, || client::drive(&mut conns[..64], bench.span))?;
    finish(conns)?;
    Ok(figures)
}

fn connect(bench: &Bench, spec: &Spec, clients: u32) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting::default())?;
    finish(client::open(&socket, 1, 32, 1)?)?;
    let figures =
        metered(&server, || server.within(bench.span + PATIENCE, || client::connects(&socket, clients, bench.span)))?;
    // The client just closes the measured connections. The server's work at an orderly end is measured here.
    finish(client::open(&socket, FINISHED, 32, 1)?)?;
    Ok(figures)
}

/// Memory, wake-ups, and CPU (in µs per second, here) of a server with nothing to do.
fn idle(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting::default())?;
    let first = client::open(&socket, 1, 32, 1)?;
    let before = server.anonymous_kib()?;
    let conns = client::open(&socket, bench.many(10_000), 32, 1)?;
    let more = server.anonymous_kib()?.saturating_sub(before) * 1024;
    // Work that a server defers for a moment belongs to the new connections, not to idle ones.
    let (quiet, span) = if bench.quick { (IDLE / 100, IDLE / 100) } else { (SETTLED, bench.span.max(IDLE)) };
    settle(&server, quiet)?;
    let (sleeps, cpu) = (server.sleeps()?, server.cpu()?);
    // This sleep awaits no event: the figure is how often the server wakes while nothing happens.
    std::thread::sleep(span);
    let wakeups = server.sleeps()?.saturating_sub(sleeps) as f64 / span.as_secs_f64();
    let spent = server.cpu()?.saturating_sub(cpu);
    let figures = BTreeMap::from([
        (Figure::PerConnection, more as f64 / conns.len() as f64),
        (Figure::Wakeups, wakeups),
        (Figure::Cpu, spent.as_secs_f64() * 1e6 / span.as_secs_f64()),
        (Figure::Peak, server.peak_kib()? as f64),
    ]);
    finish(first.into_iter().chain(conns))?;
    Ok(figures)
}

/// Returns when the server has stopped working on what came before: it has used no CPU time for `quiet`, or five times
/// that has passed.
fn settle(server: &Server, quiet: Duration) -> Result<()> {
    let start = Instant::now();
    let (mut before, mut since) = (server.cpu()?, start);
    while since.elapsed() < quiet && start.elapsed() < quiet * 5 {
        std::thread::sleep(Duration::from_millis(10));
        let now = server.cpu()?;
        if now != before {
            (before, since) = (now, Instant::now());
        }
    }
    Ok(())
}

fn cold(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let (mut echoes, mut readies) = (Vec::new(), Vec::new());
    let mut peak = 0;
    for _ in 0..if bench.quick { 1 } else { 10 } {
        let once = cold_once(bench, spec)?;
        echoes.push(once.0);
        readies.extend(once.1);
        peak = peak.max(once.2);
    }
    let mut figures =
        BTreeMap::from([(Figure::FirstEcho, crate::report::median(&mut echoes)), (Figure::Peak, peak as f64)]);
    if !readies.is_empty() {
        figures.insert(Figure::Ready, crate::report::median(&mut readies));
    }
    Ok(figures)
}

/// Milliseconds from connect to the first echo, and from exec to `READY=1`; the peak of memory.
fn cold_once(bench: &Bench, spec: &Spec) -> Result<(f64, Option<f64>, u64)> {
    let (socket, notify) = (bench.socket(), bench.work.join("notify"));
    let _ = std::fs::remove_file(&notify);
    let readiness = UnixDatagram::bind(&notify)?;
    readiness.set_read_timeout(Some(Duration::from_secs(10)))?;
    let setting =
        Setting { on_demand: true, notify: Some(notify.to_string_lossy().into_owned()), ..Setting::default() };
    let mut server = spec.start(&socket, setting)?;
    if server.line()? != "waiting" {
        return Err(Error::other("the launcher did not start"));
    }
    let ready = spec.notifies.then(|| {
        std::thread::spawn(move || -> Result<u64> {
            let mut message = [0; 4096];
            loop {
                let n = readiness.recv(&mut message)?;
                if message[..n].split(|&b| b == b'\n').any(|field| field == b"READY=1") {
                    return now_nanos();
                }
            }
        })
    });
    let before = now_nanos()?;
    let conns = client::open(&socket, 1, 32, 1)?;
    let echoed = now_nanos()?;
    let executed: u64 = server.line()?.parse().map_err(Error::other)?;
    let ready = match ready.map(std::thread::JoinHandle::join) {
        Some(Ok(at)) => Some(millis(executed, at?)),
        Some(Err(_)) => return Err(Error::other("the reader of READY=1 panicked")),
        None => None,
    };
    let peak = server.peak_kib()?;
    finish(conns)?;
    Ok((millis(before, echoed), ready, peak))
}

fn millis(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e6
}
