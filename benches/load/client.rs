//! The client's side: connections that compare each byte with the expected one and report a difference.
//! Used by the workloads; knows the wire, not the servers.
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// An answer that takes longer fails the run.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What one connection sends at a time, and what must come back before it sends again.
///
/// Every line carries its connection and a running number, so that a line swapped, doubled or dropped differs from the
/// one that is due.
pub struct Exchange {
    request: Vec<u8>,
    due: Vec<u8>,
    line: usize,
    conn: u32,
    serial: u64,
}

/// Room for connection and number, in hexadecimal digits, at the start of each line.
const STAMP: usize = 16;

impl Exchange {
    /// `lines` lines of `line` bytes each, LF included.
    pub fn new(conn: u32, line: usize, lines: usize) -> Self {
        assert!(line > STAMP, "a line has a stamp and an end");
        let mut one: Vec<u8> = (0..line).map(|i| filler(i, conn)).collect();
        one[line - 1] = b'\n';
        let due = [b"> ".as_slice(), &one].concat();
        Self { request: one.repeat(lines), due: due.repeat(lines), line, conn, serial: 0 }
    }

    /// Numbers the lines anew.
    pub fn advance(&mut self) {
        let lines = self.request.chunks_exact_mut(self.line).zip(self.due.chunks_exact_mut(self.line + 2));
        for (sent, due) in lines {
            let stamp = stamp(self.conn, self.serial);
            self.serial += 1;
            sent[..STAMP].copy_from_slice(&stamp);
            due[2..2 + STAMP].copy_from_slice(&stamp);
        }
    }

    pub fn lines(&self) -> u64 {
        (self.request.len() / self.line) as u64
    }

    /// `bytes` came after the `got` that were right so far.
    pub fn check(&self, got: usize, bytes: &[u8]) -> Result<()> {
        if self.due.get(got..got + bytes.len()) == Some(bytes) {
            return Ok(());
        }
        let differs = bytes.iter().zip(self.due.iter().skip(got)).position(|(a, b)| a != b);
        let at = got + differs.unwrap_or(bytes.len().min(self.due.len().saturating_sub(got)));
        Err(Error::new(
            ErrorKind::InvalidData,
            format!("wrong byte {at} of {} due on connection {}: {:?}", self.due.len(), self.conn, excerpt(bytes)),
        ))
    }
}

/// Any byte but LF: NUL, CR and what is no UTF-8 must come back too.
fn filler(at: usize, conn: u32) -> u8 {
    let byte = (at.wrapping_mul(37).wrapping_add(conn as usize * 11) & 0xff) as u8;
    if byte == b'\n' { b'.' } else { byte }
}

fn stamp(conn: u32, serial: u64) -> [u8; STAMP] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut word = (u64::from(conn) << 40) | (serial & 0xff_ffff_ffff);
    let mut stamp = [0; STAMP];
    for digit in stamp.iter_mut().rev() {
        *digit = DIGITS[(word & 15) as usize];
        word >>= 4;
    }
    stamp
}

fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned()
}

/// The result of a run of exchanges.
#[derive(Default)]
pub struct Run {
    pub lines: u64,
    pub elapsed: Duration,
    /// One per exchange, in nanoseconds.
    pub latencies: Vec<u32>,
}

impl Run {
    fn record(&mut self, lines: u64, since: Instant) {
        self.lines += lines;
        self.latencies.push(u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
}

pub struct Conn {
    stream: UnixStream,
    exchange: Exchange,
    sent: usize,
    got: usize,
    since: Instant,
}

impl Conn {
    pub fn open(path: &Path, exchange: Exchange) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream, exchange, sent: 0, got: 0, since: Instant::now() })
    }

    /// One exchange, blocking.
    pub fn echo(&mut self, chunk: &mut [u8]) -> Result<()> {
        self.exchange.advance();
        self.since = Instant::now();
        self.stream.write_all(&self.exchange.request)?;
        let mut got = 0;
        while got < self.exchange.due.len() {
            let n = self.stream.read(chunk)?;
            if n == 0 {
                return Err(closed(got, &self.exchange));
            }
            self.exchange.check(got, &chunk[..n])?;
            got += n;
        }
        Ok(())
    }

    /// Exchanges one after the other for `span`, blocking; between an answer and the next line the client is busy for
    /// `think`. It spins: a timer's lateness, above all on a virtual machine, is longer than `think`.
    pub fn ping(&mut self, span: Duration, think: Duration, run: &mut Run) -> Result<()> {
        let mut chunk = vec![0; 64 * 1024];
        let start = Instant::now();
        while start.elapsed() < span {
            self.echo(&mut chunk)?;
            run.record(self.exchange.lines(), self.since);
            if !think.is_zero() {
                let answered = Instant::now();
                while answered.elapsed() < think {
                    std::hint::spin_loop();
                }
            }
        }
        run.elapsed += start.elapsed();
        Ok(())
    }

    /// Makes one more exchange, which shows that the server has kept the connection until now. Then shuts down its
    /// sending side and expects the end of file without a further byte.
    pub fn finish(mut self) -> Result<()> {
        self.stream.set_nonblocking(false)?;
        self.echo_gently(&mut vec![0; 64 * 1024])?;
        self.stream.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest)?;
        if rest.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidData, format!("unexpected bytes: {:?}", excerpt(&rest))))
    }

    fn send(&mut self) -> Result<bool> {
        match self.stream.write(&self.exchange.request[self.sent..]) {
            Ok(n) => self.sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        Ok(self.sent == self.exchange.request.len())
    }
}

fn closed(got: usize, exchange: &Exchange) -> Error {
    Error::new(ErrorKind::UnexpectedEof, format!("closed after {got} of {} bytes due", exchange.due.len()))
}

/// Opens `count` connections; each has had one echo when this returns, so that starting the server is not measured.
pub fn open(path: &Path, count: u32, line: usize, lines: usize) -> Result<Vec<Conn>> {
    let mut chunk = vec![0; 64 * 1024];
    (0..count)
        .map(|conn| {
            let mut conn = Conn::open(path, Exchange::new(conn, line, lines))?;
            conn.echo_gently(&mut chunk)?;
            Ok(conn)
        })
        .collect()
}

impl Conn {
    /// One exchange of any size without a deadlock: the batch may be larger than what both buffers hold.
    fn echo_gently(&mut self, chunk: &mut [u8]) -> Result<()> {
        if self.exchange.request.len() <= 16 * 1024 {
            return self.echo(chunk);
        }
        drive(std::slice::from_mut(self), Duration::ZERO)?;
        self.stream.set_nonblocking(false)
    }
}

/// Every connection exchanges, each as soon as its last answer is complete, for `span`; one thread, one epoll.
pub fn drive(conns: &mut [Conn], span: Duration) -> Result<Run> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut run = Run::default();
    let start = Instant::now();
    let mut busy = conns.len();
    for (index, conn) in conns.iter_mut().enumerate() {
        conn.stream.set_nonblocking(true)?;
        epoll.add(&conn.stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
        begin(&epoll, conn, index)?;
    }
    let mut events = [EpollEvent::empty(); 256];
    let mut chunk = vec![0; 256 * 1024];
    let patience = EpollTimeout::try_from(PATIENCE).map_err(Error::other)?;
    while busy > 0 {
        let n = epoll.wait(&mut events, patience)?;
        if n == 0 {
            return Err(Error::new(ErrorKind::TimedOut, format!("{busy} connections without an answer")));
        }
        for event in &events[..n] {
            let index = usize::try_from(event.data()).map_err(Error::other)?;
            let conn = &mut conns[index];
            if event.events().contains(EpollFlags::EPOLLOUT) && conn.send()? {
                epoll.modify(&conn.stream, &mut EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            }
            if !event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP) {
                continue;
            }
            let n = match conn.stream.read(&mut chunk) {
                Ok(0) => return Err(closed(conn.got, &conn.exchange)),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e),
            };
            conn.exchange.check(conn.got, &chunk[..n])?;
            conn.got += n;
            if conn.got < conn.exchange.due.len() {
                continue;
            }
            run.record(conn.exchange.lines(), conn.since);
            if start.elapsed() < span {
                begin(&epoll, conn, index)?;
            } else {
                busy -= 1;
            }
        }
    }
    run.elapsed = start.elapsed();
    Ok(run)
}

fn begin(epoll: &Epoll, conn: &mut Conn, index: usize) -> Result<()> {
    conn.exchange.advance();
    (conn.sent, conn.got, conn.since) = (0, 0, Instant::now());
    if !conn.send()? {
        let both = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
        epoll.modify(&conn.stream, &mut EpollEvent::new(both, index as u64))?;
    }
    Ok(())
}

/// Each of `clients` threads repeats for `span`: connect, one line, close. Nothing here limits the time that an answer
/// takes.
pub fn connects(path: &Path, clients: u32, span: Duration) -> Result<Run> {
    let start = Instant::now();
    let runs: Vec<Result<Run>> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..clients).map(|id| scope.spawn(move || connect_again(path, id, start, span))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(Error::other("a client panicked")))).collect()
    });
    let mut all = Run::default();
    for run in runs {
        let run = run?;
        all.lines += run.lines;
        all.latencies.extend(run.latencies);
    }
    all.elapsed = start.elapsed();
    Ok(all)
}

fn connect_again(path: &Path, id: u32, start: Instant, span: Duration) -> Result<Run> {
    let mut run = Run::default();
    let mut chunk = [0; 256];
    let mut exchange = Exchange::new(id, 32, 1);
    while start.elapsed() < span {
        let since = Instant::now();
        let mut conn = Conn { stream: UnixStream::connect(path)?, exchange, sent: 0, got: 0, since };
        conn.echo(&mut chunk)?;
        run.record(1, since);
        exchange = conn.exchange;
    }
    Ok(run)
}

/// Connects for `span` and closes at once, without a look at the answer. Returns how often.
pub fn attack(path: &Path, span: Duration) -> Result<Run> {
    let mut run = Run::default();
    let start = Instant::now();
    while start.elapsed() < span {
        drop(UnixStream::connect(path)?);
        run.lines += 1;
    }
    run.elapsed = start.elapsed();
    Ok(run)
}

/// For `span`: connect, one line, close, as [`connects`] with one client; but each attempt connects without waiting first.
/// Returns how many of these attempts the kernel turned down (EAGAIN: the queue is full), too. Such a client waits then,
/// and its time counts.
pub fn tries(path: &Path, span: Duration) -> Result<(Run, u64)> {
    let address = UnixAddr::new(path)?;
    let (mut run, mut turned_down) = (Run::default(), 0);
    let (mut chunk, mut exchange) = ([0; 256], Exchange::new(0, 32, 1));
    let start = Instant::now();
    while start.elapsed() < span {
        let since = Instant::now();
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let stream = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
        let first = nix::sys::socket::connect(stream.as_raw_fd(), &address);
        stream.set_nonblocking(false)?;
        match first {
            Err(Errno::EAGAIN) => {
                turned_down += 1;
                nix::sys::socket::connect(stream.as_raw_fd(), &address)?;
            }
            end => end?,
        }
        let mut conn = Conn { stream, exchange, sent: 0, got: 0, since };
        conn.echo(&mut chunk)?;
        run.record(1, since);
        exchange = conn.exchange;
    }
    run.elapsed = start.elapsed();
    Ok((run, turned_down))
}

/// Connects that must be denied, for `span`: exactly `message`, then a clean end of file. Nothing here limits the time
/// that this takes.
pub fn denials(path: &Path, message: &[u8], span: Duration) -> Result<Run> {
    let mut run = Run::default();
    let mut reply = Vec::with_capacity(64);
    let start = Instant::now();
    while start.elapsed() < span {
        let since = Instant::now();
        let mut stream = UnixStream::connect(path)?;
        reply.clear();
        stream.read_to_end(&mut reply)?;
        if reply != message {
            return Err(Error::new(ErrorKind::InvalidData, format!("denied with {:?}", excerpt(&reply))));
        }
        run.record(1, since);
    }
    run.elapsed = start.elapsed();
    Ok(run)
}

/// Streams bare LFs on so many connections for `span`, as fast as the server takes them, and reads what comes back. `started`
/// is called when each connection has had an echo.
pub fn stream(path: &Path, count: u32, span: Duration, started: impl FnOnce()) -> Result<Run> {
    const ECHO: &[u8] = b"> \n";
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut conns = open(path, count, 32, 1)?;
    started();
    for (index, conn) in conns.iter_mut().enumerate() {
        conn.stream.set_nonblocking(true)?;
        conn.got = 0;
        epoll.add(&conn.stream, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT, index as u64))?;
    }
    let due = ECHO.repeat(128 * 1024);
    let (lines, mut chunk) = (vec![b'\n'; 64 * 1024], vec![0; 256 * 1024]);
    let mut events = [EpollEvent::empty(); 64];
    let patience = EpollTimeout::try_from(PATIENCE).map_err(Error::other)?;
    let (start, mut echoed) = (Instant::now(), 0_u64);
    // A server that is slow to begin has answered nothing within a short span.
    while start.elapsed() < span || echoed < ECHO.len() as u64 {
        let n = epoll.wait(&mut events, patience)?;
        if n == 0 {
            return Err(Error::new(ErrorKind::TimedOut, "no line came back"));
        }
        for event in &events[..n] {
            let conn = &mut conns[usize::try_from(event.data()).map_err(Error::other)?];
            let none_or = |result: Result<usize>| match result {
                Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
                other => other.map(Some),
            };
            none_or(conn.stream.write(&lines))?;
            let n = match none_or(conn.stream.read(&mut chunk))? {
                Some(0) => return Err(Error::new(ErrorKind::UnexpectedEof, "closed while lines were streamed")),
                Some(n) => n,
                None => continue,
            };
            // How far it is within an echo says which bytes are due.
            if chunk[..n] != due[conn.got % ECHO.len()..][..n] {
                return Err(Error::new(ErrorKind::InvalidData, format!("wrong bytes: {:?}", excerpt(&chunk[..n]))));
            }
            conn.got += n;
            echoed += n as u64;
        }
    }
    Ok(Run { lines: echoed / ECHO.len() as u64, elapsed: start.elapsed(), latencies: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the client reports about a server whose first answer is wrong and that closes after `answers` answers.
    fn answered_by(answers: usize, lie: impl FnOnce(&mut Vec<u8>) + Send + 'static) -> Result<()> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let exchange = Exchange::new(7, 32, 2);
        let server = std::thread::spawn(move || {
            let (mut request, mut lie) = ([0; 64], Some(lie));
            for _ in 0..answers {
                if theirs.read_exact(&mut request).is_err() {
                    break;
                }
                let mut answer: Vec<u8> = request.chunks(32).flat_map(|l| [b"> ".as_slice(), l].concat()).collect();
                lie.take().into_iter().for_each(|lie| lie(&mut answer));
                if theirs.write_all(&answer).is_err() {
                    break;
                }
            }
        });
        let mut conn = Conn { stream: ours, exchange, sent: 0, got: 0, since: Instant::now() };
        let end = conn.echo(&mut [0; 256]).and_then(|()| conn.finish());
        server.join().map_err(|_| Error::other("the server panicked"))?;
        end
    }

    #[test]
    fn a_true_echo_is_accepted() -> Result<()> {
        answered_by(usize::MAX, |_| {})
    }

    #[test]
    fn a_connection_that_was_closed_before_its_end_is_noticed() {
        assert!(answered_by(1, |_| {}).is_err());
    }

    #[test]
    fn bytes_that_nobody_sent_are_noticed_at_the_end() {
        assert!(answered_by(usize::MAX, |answer| answer.extend_from_slice(b"more")).is_err());
    }

    #[test]
    fn every_single_wrong_byte_is_noticed() {
        for at in 0..2 * (2 + 32) {
            assert!(answered_by(usize::MAX, move |answer| answer[at] ^= 1).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_dropped_a_doubled_and_a_swapped_line_are_noticed() {
        assert!(answered_by(1, |answer| answer.truncate(34)).is_err(), "dropped");
        assert!(answered_by(usize::MAX, |answer| answer.extend_from_within(34..)).is_err(), "doubled");
        assert!(answered_by(usize::MAX, |answer| answer.rotate_left(34)).is_err(), "swapped");
    }
}
