//! The workloads in which peers are denied, or another user asks for more than its share, and the process of that user: this
//! program again.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::client::{self, PATIENCE, Run};
use crate::servers::{Denies, Setting, Spec};
use crate::workloads::{Bench, Figure, Figures, finish, metered, percentiles};

/// The uids of the flooding clients; they need no account.
const DENIED_UIDS: [u32; 2] = [60_001, 60_002];

fn message(spec: &Spec) -> &'static str {
    if spec.denies == Denies::WithMessage { "Unauthorized access\n" } else { "" }
}

pub fn denied(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting { judging: true, ..Setting::default() })?;
    finish(client::open(&socket, 1, 32, 1)?)?;
    metered(&server, || DeniedClient::start(DENIED_CLIENT, DENIED_UIDS[0], &socket, message(spec), bench.span)?.end())
}

pub fn flood(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting { judging: true, ..Setting::default() })?;
    let mut conns = client::open(&socket, 1, 32, 1)?;
    let mut quiet = Run::default();
    conns[0].ping(bench.span, Duration::ZERO, &mut quiet)?;
    // The flood lasts longer than the measurement, so that no part of it is quiet.
    let span = bench.span * 2;
    let mut flood = DENIED_UIDS
        .iter()
        .map(|&uid| DeniedClient::start(DENIED_CLIENT, uid, &socket, message(spec), span))
        .collect::<Result<Vec<_>>>()?;
    flood.iter_mut().try_for_each(DeniedClient::started)?;
    let mut figures = metered(&server, || {
        let mut run = Run::default();
        conns[0].ping(bench.span, Duration::ZERO, &mut run).map(|()| run)
    })?;
    // The server's time went to the denials; divided by the admitted client's lines it means nothing.
    figures.remove(&Figure::Cpu);
    figures.insert(Figure::QuietP99, percentiles(&mut quiet)[&Figure::P99]);
    let mut denials = 0;
    for client in flood {
        denials += client.end()?.lines;
    }
    figures.insert(Figure::Denials, denials as f64 / span.as_secs_f64());
    finish(conns)?;
    Ok(figures)
}

/// One user's client while another user's processes connect and close as fast as they can.
pub fn unfair_connect(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting { judging: true, ..Setting::default() })?;
    let attack = |span| {
        let start = |_| DeniedClient::start(ATTACKER, DENIED_UIDS[0], &socket, "", span);
        let mut attack = (0..2).map(start).collect::<Result<Vec<_>>>()?;
        attack.iter_mut().try_for_each(DeniedClient::started)?;
        Ok::<_, Error>(attack)
    };
    let per_second = |attack: Vec<DeniedClient>, span: Duration| -> Result<f64> {
        let counts: Result<Vec<u64>> = attack.into_iter().map(|client| Ok(client.end()?.lines)).collect();
        Ok(counts?.into_iter().sum::<u64>() as f64 / span.as_secs_f64())
    };
    let (mut quiet, _) = client::tries(&socket, bench.span)?;
    let alone = per_second(attack(bench.span)?, bench.span)?;
    // The attack lasts longer than the measurement, so that no part of it is quiet.
    let span = bench.span * 2;
    let attackers = attack(span)?;
    let mut turned_down = 0.0;
    let mut figures = metered(&server, || {
        let (run, eagain) = client::tries(&socket, bench.span)?;
        turned_down = 100.0 * eagain as f64 / run.lines.max(1) as f64;
        Ok(run)
    })?;
    // The server's time went to the attackers; divided by the client's lines it means nothing.
    figures.remove(&Figure::Cpu);
    let quiet_figures = percentiles(&mut quiet);
    figures.insert(Figure::QuietP50, quiet_figures[&Figure::P50]);
    figures.insert(Figure::QuietP99, quiet_figures[&Figure::P99]);
    figures.insert(Figure::TurnedDown, turned_down);
    figures.insert(Figure::Alone, alone);
    figures.insert(Figure::Denials, per_second(attackers, span)?);
    finish(client::open(&socket, 1, 32, 1)?)?;
    Ok(figures)
}

/// The uid of the streaming client, which echod's configuration admits; it needs no account.
const STREAMING_UID: u32 = 400;
/// Its connections: as many as echod's default limits allow one user.
const STREAMS: u32 = 64;
/// The command line by which this program starts itself as that client.
pub const STREAMER: &str = "streaming-client";

pub fn unfair_lines(bench: &Bench, spec: &Spec) -> Result<Figures> {
    let socket = bench.socket();
    let server = spec.start(&socket, Setting::default())?;
    let mut conns = client::open(&socket, 1, 32, 1)?;
    let mut quiet = Run::default();
    conns[0].ping(bench.span, Duration::ZERO, &mut quiet)?;
    let quiet = percentiles(&mut quiet);
    // With no other user connected: that is what is compared with a server that gives no user its part.
    finish(conns)?;
    let before = server.cpu()?;
    let stream = |span| DeniedClient::start(STREAMER, STREAMING_UID, &socket, "", span);
    let alone = stream(bench.span)?.end()?;
    let cpu = server.cpu()?.saturating_sub(before);
    let mut conns = client::open(&socket, 1, 32, 1)?;
    // It streams for longer than the measurement lasts, so that no part of that is quiet.
    let mut streaming = stream(bench.span * 2)?;
    streaming.started()?;
    let mut figures = metered(&server, || {
        let mut run = Run::default();
        conns[0].ping(bench.span, Duration::ZERO, &mut run).map(|()| run)
    })?;
    streaming.end()?;
    figures.remove(&Figure::Cpu);
    figures.insert(Figure::QuietP50, quiet[&Figure::P50]);
    figures.insert(Figure::Streamed, alone.lines as f64 / alone.elapsed.as_secs_f64());
    figures.insert(Figure::StreamedCpu, cpu.as_secs_f64() * 1e9 / alone.lines as f64);
    finish(conns)?;
    Ok(figures)
}

/// A process of another user that connects and is denied.
struct DeniedClient {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

/// The command line by which this program starts itself as a denied client.
pub const DENIED_CLIENT: &str = "denied-client";
/// The same as one that does not look at the answer.
pub const ATTACKER: &str = "attacker";

impl DeniedClient {
    fn start(role: &str, uid: u32, socket: &Path, message: &str, span: Duration) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(role).arg(uid.to_string()).arg(socket).arg(message).arg(span.as_millis().to_string());
        let mut child = command.arg(std::process::id().to_string()).stdout(Stdio::piped()).spawn()?;
        let said = child.stdout.take().ok_or_else(|| Error::other("no pipe from another user's client"))?;
        Ok(Self { child, said: BufReader::new(said) })
    }

    /// Returns when the client is about to connect, or has exited.
    fn started(&mut self) -> Result<()> {
        let mut said = String::new();
        self.said.read_line(&mut said)?;
        if said == "started\n" { Ok(()) } else { Err(Error::other(format!("a denied client said {said:?}"))) }
    }

    fn end(mut self) -> Result<Run> {
        let mut said = String::new();
        self.said.read_to_string(&mut said)?;
        let status = self.child.wait()?;
        if status.signal() == Some(Signal::SIGALRM as i32) {
            return Err(Error::new(ErrorKind::TimedOut, "a denied client got no answer in time"));
        }
        if !status.success() {
            return Err(Error::other(format!("a denied client ended with {status}")));
        }
        if let Some(wrong) = said.lines().find_map(|l| l.strip_prefix(WRONG)) {
            return Err(Error::new(ErrorKind::InvalidData, wrong));
        }
        let mut numbers = said.lines().filter_map(|l| l.parse::<u64>().ok());
        let elapsed = Duration::from_nanos(numbers.next().unwrap_or_default());
        let lines = numbers.next().unwrap_or_default();
        let latencies: Vec<u32> = numbers.filter_map(|n| u32::try_from(n).ok()).collect();
        Ok(Run { lines, elapsed, latencies })
    }
}

impl Drop for DeniedClient {
    /// For a run that has failed before its end. If the client has exited, this does nothing.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a denied client begins the line that tells of a wrong answer.
const WRONG: &str = "wrong: ";

/// The denied client's own side: switches to the user, connects for the time given, and reports the result.
pub fn denied_client(role: &str, args: &[String]) -> Result<()> {
    let [uid, socket, message, millis, parent] = args else {
        return Err(Error::other("uid socket message milliseconds parent"));
    };
    let number = |text: &String| text.parse::<u32>().map_err(Error::other);
    let id = number(uid)?;
    nix::unistd::setgroups(&[])?;
    nix::unistd::setgid(id.into())?;
    nix::unistd::setuid(id.into())?;
    let span = Duration::from_millis(number(millis)?.into());
    // A server that does not answer must not delay the benchmark: the alarm ends this process in time. A denied client must
    // not outlive the benchmark: its parent's death ends it. Both are set after the switch of user, which would clear
    // the second.
    SigSet::empty().thread_set_mask()?;
    nix::unistd::alarm::set(u32::try_from((span + PATIENCE).as_secs()).map_err(Error::other)?.saturating_add(1));
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if std::os::unix::process::parent_id() != number(parent)? {
        return Err(Error::other("the benchmark has ended"));
    }
    if role == ATTACKER {
        // Another user's processes are a session of their own, and the kernel may share processors out by session.
        nix::unistd::setsid()?;
    }
    if role != STREAMER {
        println!("started");
    }
    let end = match role {
        // Its connections take a moment.
        STREAMER => client::stream(Path::new(socket), STREAMS, span, || println!("started")),
        ATTACKER => client::attack(Path::new(socket), span),
        _ => client::denials(Path::new(socket), message.as_bytes(), span),
    };
    match end {
        Ok(run) => {
            let mut said = format!("{}\n{}\n", run.elapsed.as_nanos(), run.lines);
            run.latencies.iter().for_each(|n| said.push_str(&format!("{n}\n")));
            print!("{said}");
        }
        Err(error) if error.kind() == ErrorKind::InvalidData => println!("{WRONG}{error}"),
        Err(error) => return Err(error),
    }
    Ok(())
}
