//! The proxy beside others that forward a local socket: a bare forwarder (one epoll, no policy) that copies and one that uses
//! splice(2), systemd-socket-proxyd, HAProxy, socat, s6. Every forwarder stands in front of the same echo. Each line that comes
//! back is compared.
//!
//! ```console
//! $ cargo build --release --locked --example forward --bin peergate
//! $ target/release/examples/forward target/release/peergate
//! ```
//!
//! Only the ratios within one run mean anything. A server that is not installed is left out.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen};
use nix::unistd::Pid;
use peergate::pipe::{Pipe, Spliced};

type Outcome<T> = Result<T, Box<dyn Error>>;

const LINE: &[u8] = b"a line of thirty-two bytes, LF in\n";
const MANY: usize = 64;
const LARGE: usize = 60 * 1024;
const ROUNDS: usize = 5;
const SPAN: Duration = Duration::from_millis(500);

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--echo", at] => echo(Path::new(at)),
        ["--bare", at, to] => bare(Path::new(at), Path::new(to), &mut Copying::default()),
        ["--splice", at, to] => bare(Path::new(at), Path::new(to), &mut Splicing::new()?),
        [proxy, ref only @ ..] => compare(Path::new(proxy), only),
        _ => Err("expected the path of peergate, and perhaps the beginnings of workloads".into()),
    }
}

fn bind(at: &Path) -> Outcome<UnixListener> {
    let listener = UnixListener::bind(at)?;
    listen(&listener, Backlog::new(4096)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Sends back what comes, one epoll. A slow reader is waited for.
fn echo(at: &Path) -> Outcome<()> {
    let listener = bind(at)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut connections: BTreeMap<u64, UnixStream> = BTreeMap::new();
    let mut room = vec![0; 64 * 1024];
    let mut events = [EpollEvent::empty(); 256];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..count] {
            if event.data() == u64::MAX {
                while let Ok((stream, _)) = listener.accept() {
                    let token = stream.as_raw_fd() as u64;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
                    connections.insert(token, stream);
                }
                continue;
            }
            let Some(stream) = connections.get_mut(&event.data()) else { continue };
            match stream.read(&mut room) {
                Ok(count @ 1..) if stream.write_all(&room[..count]).is_ok() => {}
                _ => drop(connections.remove(&event.data())),
            }
        }
    }
}

/// How bytes get from one end to the other.
trait Passes {
    /// Passes on what one read gives. What was not taken; an error: an end is gone, or nothing has come.
    fn pass(&mut self, from: &UnixStream, to: &UnixStream) -> io::Result<Vec<u8>>;
}

/// Reads and writes.
struct Copying(Vec<u8>);

impl Default for Copying {
    fn default() -> Self {
        Self(vec![0; 64 * 1024])
    }
}

impl Passes for Copying {
    fn pass(&mut self, mut from: &UnixStream, mut to: &UnixStream) -> io::Result<Vec<u8>> {
        let count = from.read(&mut self.0)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        match to.write(&self.0[..count]) {
            Ok(written) => Ok(self.0[written..count].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(self.0[..count].to_vec()),
            Err(error) => Err(error),
        }
    }
}

/// Moves pages through a pipe, as the proxy does where messages are long.
struct Splicing {
    pipe: Pipe,
    room: Vec<u8>,
}

impl Splicing {
    fn new() -> Outcome<Self> {
        Ok(Self { pipe: Pipe::new()?, room: vec![0; 64 * 1024] })
    }
}

impl Passes for Splicing {
    fn pass(&mut self, from: &UnixStream, to: &UnixStream) -> io::Result<Vec<u8>> {
        let Spliced { read, written } = self.pipe.pass(from.as_fd(), to.as_fd(), &mut self.room)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(self.room[written?..read].to_vec())
    }
}

/// A connection through the bare forwarder: each end, and what is held for it.
struct Pair {
    ends: [UnixStream; 2],
    held: [Vec<u8>; 2],
}

/// What forwarding costs at least: no policy, no limits, no record.
fn bare(at: &Path, to: &Path, passes: &mut impl Passes) -> Outcome<()> {
    let listener = bind(at)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut pairs: Vec<Option<Box<Pair>>> = Vec::new();
    let mut events = [EpollEvent::empty(); 128];
    let interest = |pair: &Pair, side: usize| {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, pair.held[1 - side].is_empty());
        flags.set(EpollFlags::EPOLLOUT, !pair.held[side].is_empty());
        flags
    };
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..count] {
            if event.data() == u64::MAX {
                while let Ok((client, _)) = listener.accept() {
                    let upstream = UnixStream::connect(to)?;
                    client.set_nonblocking(true)?;
                    upstream.set_nonblocking(true)?;
                    let place = client.as_raw_fd() as usize;
                    epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLIN, 2 * place as u64))?;
                    epoll.add(&upstream, EpollEvent::new(EpollFlags::EPOLLIN, 2 * place as u64 + 1))?;
                    pairs.resize_with(pairs.len().max(place + 1), || None);
                    pairs[place] = Some(Box::new(Pair { ends: [client, upstream], held: [Vec::new(), Vec::new()] }));
                }
                continue;
            }
            let (place, side) = ((event.data() / 2) as usize, (event.data() % 2) as usize);
            let Some(pair) = pairs.get_mut(place).and_then(Option::as_mut) else { continue };
            // What is held for this end goes first.
            let before = [interest(pair, 0), interest(pair, 1)];
            let mut is_over = false;
            if !pair.held[side].is_empty() {
                match (&pair.ends[side]).write(&pair.held[side]) {
                    Ok(count) => drop(pair.held[side].drain(..count)),
                    Err(error) => is_over = error.kind() != ErrorKind::WouldBlock,
                }
            }
            if pair.held[1 - side].is_empty() {
                match passes.pass(&pair.ends[side], &pair.ends[1 - side]) {
                    Ok(held) => pair.held[1 - side] = held,
                    Err(error) => is_over |= error.kind() != ErrorKind::WouldBlock,
                }
            }
            if is_over {
                pairs[place] = None;
                continue;
            }
            for (end, before) in before.into_iter().enumerate() {
                let now = interest(pair, end);
                if now != before {
                    let mut event = EpollEvent::new(now, 2 * place as u64 + end as u64);
                    epoll.modify(&pair.ends[end], &mut event)?;
                }
            }
        }
    }
}

/// One forwarder, running.
struct Running {
    name: &'static str,
    process: Child,
    socket: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Running {
    /// Its threads, and its children's.
    fn tasks(&self) -> Vec<PathBuf> {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let processes = children.split_whitespace().map(str::to_owned).chain([pid.to_string()]);
        let of = |pid: String| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        processes.flat_map(of).map(|task| task.path()).collect()
    }

    /// Processor time of the process and its children so far.
    fn cpu(&self) -> Duration {
        let spent = self.tasks().into_iter().filter_map(|task| fs::read_to_string(task.join("schedstat")).ok());
        spent.filter_map(|text| text.split(' ').next()?.parse().ok()).map(Duration::from_nanos).sum()
    }

    /// Has it run on these processors only.
    fn pin(&self, to: &CpuSet) {
        for task in self.tasks() {
            let number = task.file_name().and_then(|name| name.to_str()?.parse().ok());
            let _ = number.map(|number| sched_setaffinity(Pid::from_raw(number), to));
        }
    }
}

fn wait_for(socket: &Path) -> Outcome<()> {
    let until = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(socket).is_err() {
        if Instant::now() > until {
            return Err(format!("{}: nothing listens", socket.display()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn start(name: &'static str, socket: &Path, mut command: Command) -> Outcome<Running> {
    let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let running = Running { name, process, socket: socket.to_path_buf() };
    wait_for(socket)?;
    Ok(running)
}

fn installed(program: &str) -> Option<PathBuf> {
    let lib = PathBuf::from("/usr/lib/systemd");
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).chain([lib, "/usr/sbin".into()]).map(|at| at.join(program)).find(|at| at.is_file())
}

fn forwarders(proxy: &Path, work: &Path, behind: &Path) -> Outcome<Vec<Running>> {
    let me = std::env::current_exe()?;
    let at = |name: &str| work.join(name);
    let mut all = Vec::new();
    let mut command = Command::new(&me);
    command.arg("--bare").arg(at("bare")).arg(behind);
    all.push(start("bare", &at("bare"), command)?);

    let mut command = Command::new(&me);
    command.arg("--splice").arg(at("splice")).arg(behind);
    all.push(start("splice", &at("splice"), command)?);

    let config = at("bench.toml");
    let text =
        "[allow.owner]\nusers = [\"self\"]\n[limits]\nconnections = 20000\nconnections-per-user = 20000\n[forward]\n";
    fs::write(&config, format!("{text}to = \"{}\"\n", behind.display()))?;
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
    let mut command = Command::new(proxy);
    command.arg("--config").arg(&config).arg("--listen").arg(at("peergate"));
    all.push(start("peergate", &at("peergate"), command)?);

    if let (Some(proxyd), Some(activate)) = (installed("systemd-socket-proxyd"), installed("systemd-socket-activate")) {
        // As in a unit (IgnoreSIGPIPE=): a client that closes early would end it.
        let mut command = Command::new("env");
        command
            .arg("--ignore-signal=PIPE")
            .arg(activate)
            .arg("-l")
            .arg(at("proxyd"))
            .arg(proxyd)
            .arg("--connections-max=20000")
            .arg(behind);
        all.push(start("socket-proxyd", &at("proxyd"), command)?);
    }
    if let Some(haproxy) = installed("haproxy") {
        let file = at("haproxy.cfg");
        let (socket, to) = (at("haproxy").display().to_string(), behind.display());
        let text = format!(
            "global\n nbthread 1\n maxconn 2000\ndefaults\n mode tcp\n timeout connect 10s\n timeout client 1h\n timeout server 1h\n\
             listen l\n bind unix@{socket}\n server s unix@{to}\n"
        );
        fs::write(&file, text)?;
        let mut command = Command::new(haproxy);
        command.arg("-db").arg("-f").arg(file);
        all.push(start("HAProxy", &at("haproxy"), command)?);
    }
    if let Some(socat) = installed("socat") {
        let mut command = Command::new(socat);
        command.arg(format!("UNIX-LISTEN:{},fork,backlog=4096", at("socat").display()));
        command.arg(format!("UNIX-CONNECT:{}", behind.display()));
        all.push(start("socat", &at("socat"), command)?);
    }
    if let Some(server) = installed("s6-ipcserver") {
        let mut command = Command::new(server);
        command.args(["-c", "2000", "-C", "2000", "-b", "4096"]).arg(at("s6"));
        command.arg("s6-ipcclient").arg(behind).arg("s6-ioconnect");
        all.push(start("s6", &at("s6"), command)?);
    }
    Ok(all)
}

/// What one measurement gave.
#[derive(Clone, Copy, Default)]
struct Figure {
    rate: f64,
    /// Processor time of the forwarder for each operation.
    cpu: f64,
    /// The median time of an operation, where there is one at a time.
    p50: f64,
}

/// Has the forwarder run on one processor, and clients and the service on the other: then the forwarder is what limits.
fn apart<T>(forwarder: &Running, echo: &Running, run: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let processors = std::thread::available_parallelism()?.get();
    let of = |numbers: std::ops::Range<usize>| {
        let mut set = CpuSet::new();
        numbers.into_iter().try_for_each(|number| set.set(number)).map(|()| set)
    };
    let all = of(0..processors)?;
    forwarder.pin(&of(0..1)?);
    let others = of(1.min(processors - 1)..processors)?;
    echo.pin(&others);
    sched_setaffinity(Pid::from_raw(0), &others)?;
    let outcome = run();
    sched_setaffinity(Pid::from_raw(0), &all)?;
    echo.pin(&all);
    forwarder.pin(&all);
    outcome
}

/// So many connections, each with one message of this length under way.
fn exchange(forwarder: &Running, connections: usize, message: &[u8]) -> Outcome<Figure> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut streams = Vec::new();
    for number in 0..connections {
        let stream = UnixStream::connect(&forwarder.socket)?;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        streams.push((stream, 0, Instant::now()));
    }
    let mut room = vec![0; message.len()];
    for (stream, _, _) in &mut streams {
        stream.write_all(message)?;
        stream.read_exact(&mut room)?;
    }
    let (begin, cpu) = (Instant::now(), forwarder.cpu());
    let mut times = Vec::new();
    for (stream, got, since) in &mut streams {
        (*got, *since) = (0, Instant::now());
        stream.write_all(message)?;
    }
    let mut count = 0_u64;
    let mut events = [EpollEvent::empty(); 128];
    while begin.elapsed() < SPAN {
        let ready = epoll.wait(&mut events, EpollTimeout::from(1000_u16))?;
        for event in &events[..ready] {
            let (stream, got, since) = &mut streams[event.data() as usize];
            match stream.read(&mut room)? {
                0 => return Err("the forwarder has closed".into()),
                some => {
                    assert!(room[..some] == message[*got..*got + some], "other bytes came back");
                    *got += some;
                }
            }
            if *got == message.len() {
                count += 1;
                if connections == 1 {
                    times.push(since.elapsed());
                }
                (*got, *since) = (0, Instant::now());
                stream.write_all(message)?;
            }
        }
    }
    let (span, cpu) = (begin.elapsed(), forwarder.cpu() - cpu);
    times.sort_unstable();
    let p50 = times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64);
    Ok(Figure { rate: count as f64 / span.as_secs_f64(), cpu: cpu.as_secs_f64() / count as f64, p50 })
}

/// Connect, a line, its echo, close; one after the other.
fn visit(forwarder: &Running) -> Outcome<Figure> {
    let (begin, cpu) = (Instant::now(), forwarder.cpu());
    let mut count = 0_u64;
    let mut room = [0; LINE.len()];
    while begin.elapsed() < SPAN {
        let mut stream = UnixStream::connect(&forwarder.socket)?;
        stream.write_all(LINE)?;
        stream.read_exact(&mut room)?;
        assert!(room == LINE, "other bytes came back");
        count += 1;
    }
    let (span, cpu) = (begin.elapsed(), forwarder.cpu() - cpu);
    Ok(Figure { rate: count as f64 / span.as_secs_f64(), cpu: cpu.as_secs_f64() / count as f64, p50: 0.0 })
}

fn compare(proxy: &Path, only: &[&str]) -> Outcome<()> {
    let work = std::env::temp_dir().join(format!("forward-{}", std::process::id()));
    fs::create_dir(&work)?;
    let outcome = compare_in(proxy, &work, only);
    fs::remove_dir_all(&work)?;
    outcome
}

fn compare_in(proxy: &Path, work: &Path, only: &[&str]) -> Outcome<()> {
    let behind = work.join("behind");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--echo").arg(&behind);
    let echo = start("echo", &behind, command)?;
    let all = forwarders(proxy, work, &behind)?;
    let large = vec![b'x'; LARGE];
    type Workload<'w> = (&'static str, Box<dyn Fn(&Running) -> Outcome<Figure> + 'w>);
    let workloads: [Workload<'_>; 6] = [
        ("64 connections, lines", Box::new(|one| exchange(one, MANY, LINE))),
        ("64, a CPU of its own", Box::new(|one| apart(one, &echo, || exchange(one, MANY, LINE)))),
        ("1 connection, lines", Box::new(|one| exchange(one, 1, LINE))),
        ("8 connections, 60 KiB", Box::new(|one| exchange(one, 8, &large))),
        ("8 of 60 KiB, a CPU of its own", Box::new(|one| apart(one, &echo, || exchange(one, 8, &large)))),
        ("connect, line, close", Box::new(visit)),
    ];
    println!("| workload | forwarder | per second | × bare | CPU µs each | × bare | p50 µs | × bare |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, run) in
        workloads.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|it| name.starts_with(it)))
    {
        let mut figures: Vec<Vec<Figure>> = vec![Vec::new(); all.len()];
        for _ in 0..ROUNDS {
            for (figures, one) in figures.iter_mut().zip(&all) {
                figures.push(run(one).map_err(|error| format!("{}: {error}", one.name))?);
            }
        }
        for (one, own) in all.iter().zip(&figures) {
            // Of each round, so that what slows down the machine for a while slows down both.
            let of = |what: fn(&Figure) -> f64| {
                let ratios = own.iter().zip(&figures[0]).map(|(own, bare)| what(own) / what(bare)).collect();
                (median(own.iter().map(what).collect()), median(ratios))
            };
            let (rate, cpu, p50) = (of(|f| f.rate), of(|f| f.cpu * 1e6), of(|f| f.p50 * 1e6));
            print!("| {name} | {} | {:.0} | {:.2} | {:.1} | {:.2} |", one.name, rate.0, rate.1, cpu.0, cpu.1);
            if p50.0 > 0.0 { println!(" {:.1} | {:.2} |", p50.0, p50.1) } else { println!(" | |") }
        }
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
