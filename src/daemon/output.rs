//! What the program prints, other than records. Standard output and standard error may be full, closed, or not read:
//! that changes no exit code. No `println!` nor `eprintln!`: these panic where writing fails.
//!
//! Each text is written by a thread of its own, because write(2) waits without a bound where the other end does not read.
//! Once a descriptor has taken nothing for [`PATIENCE`], nothing more is written to it. (The library's stderr.rs says
//! why it is a thread, and no flag or system call.)

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};

/// How long a descriptor may take nothing.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The same for a report, which a pager may read.
const LEISURE: Duration = Duration::from_secs(30);
/// How much is written at once: a reader that takes as much within [`PATIENCE`] is no reader that has stopped.
const PIECE: usize = 4096;

/// The program's name.
static NAME: OnceLock<&str> = OnceLock::new();

/// To be called first, with the program's name. A file that has reached its limit (RLIMIT_FSIZE) is then an error of write(2),
/// not the end of the process.
pub fn begin(name: &'static str) {
    let _ = NAME.set(name);
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
}

/// A message on standard error: each line with the program's name.
pub fn complain(message: &str) {
    let name = NAME.get().copied().unwrap_or_default();
    let text: String = message.lines().map(|line| format!("{name}: {line}\n")).collect();
    let _ = write(Sink::Error, text.into(), Some(PATIENCE));
}

/// Lines on standard error as they are.
pub fn say(text: &str) {
    let _ = write(Sink::Error, format!("{text}\n").into(), Some(PATIENCE));
}

/// An answer of which the exit status is the gist, on standard output. A reader that has gone has seen enough.
pub fn answer(text: impl Into<Vec<u8>>) {
    tell_of(write(Sink::Output, text.into(), Some(PATIENCE)));
}

/// An answer to be read page by page. A terminal may take it as slowly as it likes.
pub fn answer_at_leisure(text: impl Into<Vec<u8>>) {
    let patience = (!io::stdout().is_terminal()).then_some(LEISURE);
    tell_of(write(Sink::Output, text.into(), patience));
}

/// Prints what clap has to say, in its own way. Returns the status to exit with.
pub fn of_clap(error: clap::Error) -> u8 {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let _ = within(Some(PATIENCE), move |_| {
        let _ = error.print();
    });
    code
}

fn tell_of(written: io::Result<()>) {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => complain(&format!("writing to standard output: {error}")),
        Ok(()) => {}
    }
}

#[derive(Clone, Copy)]
enum Sink {
    Output,
    Error,
}

impl Sink {
    fn fd(self) -> BorrowedFd<'static> {
        static OUTPUT: OnceLock<io::Stdout> = OnceLock::new();
        static ERROR: OnceLock<io::Stderr> = OnceLock::new();
        match self {
            Self::Output => OUTPUT.get_or_init(io::stdout).as_fd(),
            Self::Error => ERROR.get_or_init(io::stderr).as_fd(),
        }
    }

    /// Whether it has been given up.
    fn is_stalled(self) -> &'static AtomicBool {
        static STALLED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
        &STALLED[self as usize]
    }
}

/// Writes it all, unless nothing is taken for as long as `patience`.
fn write(sink: Sink, bytes: Vec<u8>, patience: Option<Duration>) -> io::Result<()> {
    if sink.is_stalled().load(Ordering::Relaxed) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (result, results) = mpsc::channel();
    let ended = within(patience, move |progress| {
        let _ = result.send(write_all(sink.fd(), &bytes, progress));
    });
    if !ended {
        sink.is_stalled().store(true, Ordering::Relaxed);
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it is not read"));
    }
    results.recv().unwrap_or(Ok(()))
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8], progress: &AtomicUsize) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(fd, &bytes[..bytes.len().min(PIECE)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                progress.fetch_add(count, Ordering::Relaxed);
            }
            Err(Errno::EINTR) => {}
            // Another process has made it non-blocking.
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Runs it on a thread, and stops waiting for it once it makes no progress for as long as `patience`. Whether it ended.
fn within(patience: Option<Duration>, run: impl FnOnce(&AtomicUsize) + Send + 'static) -> bool {
    let Some(patience) = patience else {
        run(&AtomicUsize::new(0));
        return true;
    };
    let (progress, run) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Some(run))));
    let take = |run: &Mutex<Option<_>>| run.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (ending, ended) = mpsc::channel::<()>();
    let of_thread = (Arc::clone(&progress), Arc::clone(&run));
    let thread = thread::Builder::new().name("output".to_owned()).spawn(move || {
        let (progress, run) = of_thread;
        take(&run).into_iter().for_each(|run| run(&progress));
        drop(ending);
    });
    if thread.is_err() {
        // The message is worth more than the bound.
        take(&run).into_iter().for_each(|run| run(&progress));
        return true;
    }
    let mut before = 0;
    while ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
        let now = progress.load(Ordering::Relaxed);
        if now == before {
            return false;
        }
        before = now;
    }
    true
}
