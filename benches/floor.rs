//! The floor: what an echo with the `> ` prefix costs at least. No policy, no record, no limits, no bound on a
//! line. Only the benchmark uses it: every other server's figures are divided by the floor's.
//!
//! `floor` is one thread and one epoll. `--busy-poll USEC` polls for that long before it sleeps; `--threads` is a
//! blocking thread per connection instead. `--only-uid UID` denies every other user with the message, which is the
//! least that a denial can cost. `--lie N` spoils one byte of every N-th answer, `--lie-denial N` of every N-th denial,
//! for the load generator's own check.
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Shutdown, SockFlag, accept4, getsockopt, shutdown, sockopt};
use nix::unistd::{read, write};
use std::io::{BufRead, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const LISTENER: RawFd = 3;

#[derive(Default)]
struct Options {
    busy_poll: Duration,
    threads: bool,
    only_uid: Option<u32>,
    lie: u64,
    lie_denial: u64,
}

fn main() -> ExitCode {
    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        match arg.as_str() {
            "--busy-poll" => options.busy_poll = Duration::from_micros(number()),
            "--threads" => options.threads = true,
            "--only-uid" => options.only_uid = u32::try_from(number()).ok(),
            "--lie" => options.lie = number(),
            "--lie-denial" => options.lie_denial = number(),
            other => {
                eprintln!("floor: unknown option {other}");
                return ExitCode::from(64);
            }
        }
    }
    if std::env::var("LISTEN_PID").ok() != Some(std::process::id().to_string()) {
        eprintln!("floor: one listening socket is expected as descriptor 3 (LISTEN_FDS, LISTEN_PID)");
        return ExitCode::from(64);
    }
    // SAFETY: descriptor 3 is the listener that LISTEN_FDS announces, and nothing else in this process owns it.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    let end = if options.threads { thread_each(&listener) } else { Floor::new(listener, options).and_then(Floor::run) };
    if let Err(error) = end {
        eprintln!("floor: {error}");
    }
    ExitCode::FAILURE
}

/// `READY=1`, as a service of `Type=notify` sends it: for the time from exec to readiness.
fn ready() {
    if let Ok(path) = std::env::var("NOTIFY_SOCKET") {
        if let Err(error) = UnixDatagram::unbound().and_then(|s| s.send_to(b"READY=1", path)) {
            eprintln!("floor: READY=1: {error}");
        }
    }
}

fn accept(listener: &OwnedFd, flags: SockFlag) -> nix::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), flags | SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made this descriptor for us; this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts `> ` before every line of `input`; `at_start` says whether the next byte begins a line.
fn answer(mut input: &[u8], at_start: &mut bool, output: &mut Vec<u8>) {
    while !input.is_empty() {
        if *at_start {
            output.extend_from_slice(b"> ");
        }
        // Cannot fail on a slice; finds the end as fast as the standard library can.
        let _ = input.read_until(b'\n', output);
        *at_start = output.ends_with(b"\n");
    }
}

fn thread_each(listener: &OwnedFd) -> nix::Result<()> {
    ready();
    loop {
        let mut stream = UnixStream::from(accept(listener, SockFlag::empty())?);
        std::thread::spawn(move || {
            let (mut chunk, mut out, mut at_start) = (vec![0; 64 * 1024], Vec::new(), true);
            while let Ok(n @ 1..) = stream.read(&mut chunk) {
                out.clear();
                answer(&chunk[..n], &mut at_start, &mut out);
                if stream.write_all(&out).is_err() {
                    break;
                }
            }
        });
    }
}

struct Conn {
    fd: OwnedFd,
    at_start: bool,
    /// Output that the peer has not taken yet. While there is any, nothing is read from the peer.
    pending: Vec<u8>,
}

struct Floor {
    options: Options,
    epoll: Epoll,
    listener: OwnedFd,
    /// Indexed by descriptor: the kernel gives out the lowest free one, so this stays dense.
    conns: Vec<Option<Conn>>,
    chunk: Vec<u8>,
    out: Vec<u8>,
    answers: u64,
    denials: u64,
}

impl Floor {
    fn new(listener: OwnedFd, options: Options) -> nix::Result<Self> {
        let mut flags =
            nix::fcntl::OFlag::from_bits_retain(nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_GETFL)?);
        flags.insert(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        ready();
        let (chunk, out) = (vec![0; 64 * 1024], Vec::with_capacity(3 * 64 * 1024));
        Ok(Self { options, epoll, listener, conns: Vec::new(), chunk, out, answers: 0, denials: 0 })
    }

    fn run(mut self) -> nix::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let mut last = Instant::now();
        loop {
            let n = match self.epoll.wait(&mut events, patience(last, self.options.busy_poll)) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error),
            };
            if n > 0 && !self.options.busy_poll.is_zero() {
                last = Instant::now();
            }
            for event in &events[..n] {
                match usize::try_from(event.data()) {
                    Ok(0) => self.accept_all()?,
                    Ok(index) => self.serve(index, event.events()),
                    Err(_) => {}
                }
            }
        }
    }

    fn accept_all(&mut self) -> nix::Result<()> {
        loop {
            let fd = match accept(&self.listener, SockFlag::SOCK_NONBLOCK) {
                Ok(fd) => fd,
                Err(Errno::EAGAIN | Errno::ECONNABORTED) => return Ok(()),
                Err(error) => return Err(error),
            };
            if let Some(uid) = self.options.only_uid {
                if getsockopt(&fd, sockopt::PeerCredentials)?.uid() != uid {
                    self.denials += 1;
                    let message: &[u8] = match self.options.lie_denial {
                        n if n != 0 && self.denials % n == 0 => b"unauthorized access\n",
                        _ => b"Unauthorized access\n",
                    };
                    // The peer sends nothing in this benchmark, so a plain close loses no byte. The peer may have
                    // closed.
                    let _ = write(&fd, message);
                    continue;
                }
            }
            let index = usize::try_from(fd.as_raw_fd()).unwrap_or_default();
            self.epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, index as u64))?;
            if self.conns.len() <= index {
                self.conns.resize_with(index + 1, || None);
            }
            self.conns[index] = Some(Conn { fd, at_start: true, pending: Vec::new() });
        }
    }

    fn serve(&mut self, index: usize, ready: EpollFlags) {
        let Some(conn) = self.conns.get_mut(index).and_then(Option::as_mut) else { return };
        if ready.contains(EpollFlags::EPOLLOUT) && !flush(&self.epoll, conn, index) {
            self.conns[index] = None;
            return;
        }
        if !conn.pending.is_empty() {
            return;
        }
        match read(&conn.fd, &mut self.chunk) {
            Ok(0) => {
                let _ = shutdown(conn.fd.as_raw_fd(), Shutdown::Write);
                self.conns[index] = None;
            }
            Ok(n) => {
                self.out.clear();
                answer(&self.chunk[..n], &mut conn.at_start, &mut self.out);
                self.answers += 1;
                if self.options.lie != 0 && self.answers % self.options.lie == 0 {
                    self.out[0] ^= 1;
                }
                let sent = match write(&conn.fd, &self.out) {
                    Ok(sent) => sent,
                    Err(Errno::EAGAIN) => 0,
                    Err(_) => {
                        self.conns[index] = None;
                        return;
                    }
                };
                if sent < self.out.len() {
                    conn.pending.extend_from_slice(&self.out[sent..]);
                    let wanted = EpollFlags::EPOLLOUT;
                    if self.epoll.modify(&conn.fd, &mut EpollEvent::new(wanted, index as u64)).is_err() {
                        self.conns[index] = None;
                    }
                }
            }
            Err(Errno::EAGAIN) => {}
            Err(_) => self.conns[index] = None,
        }
    }
}

/// Sends pending output. False where the connection is lost.
fn flush(epoll: &Epoll, conn: &mut Conn, index: usize) -> bool {
    match write(&conn.fd, &conn.pending) {
        Ok(sent) => {
            conn.pending.drain(..sent);
        }
        Err(Errno::EAGAIN) => {}
        Err(_) => return false,
    }
    if !conn.pending.is_empty() {
        return true;
    }
    conn.pending = Vec::new();
    epoll.modify(&conn.fd, &mut EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, index as u64)).is_ok()
}

/// How long epoll may sleep: not at all while the last event is younger than `busy`, else until something comes.
fn patience(last: Instant, busy: Duration) -> EpollTimeout {
    if !busy.is_zero() && last.elapsed() < busy { EpollTimeout::ZERO } else { EpollTimeout::NONE }
}
