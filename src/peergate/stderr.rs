//! Standard error, written to by a thread of its own.
//!
//! Standard error is what the process was started with. It may be a pipe that is not read, a terminal stopped with
//! Ctrl-S, a socket, a file on a full disk or on a server that does not answer. write(2) then waits without a bound.
//! Of the ways around that, only the thread holds for all of these:
//!
//! - O_NONBLOCK is a flag of the open file description, and other processes share that: their writes would fail.
//! - poll(2) followed by a write of at most PIPE_BUF bytes waits all the same where another process fills the pipe in
//!   between, and always on a file.
//! - /proc/self/fd/2 cannot be opened where standard error is a socket, nor after the user has changed.
//! - RWF_NOWAIT (preadv2(2)) is not supported by terminals, and by pipes only from Linux 6.4 on.
//!
//! The thread writes one text at a time. A caller sees whether it has been written, and waits for as long as it likes.
//! The lock of [`std::io::stderr`] is not taken: a thread that panics needs it for its message.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};

/// A handle on the thread. Cheap to clone; the thread ends with the last handle, unless a write holds it up.
#[derive(Clone, Debug)]
pub(crate) struct Stderr(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<StderrThread>);

#[derive(Debug)]
struct StderrThread {
    state: Mutex<StderrState>,
    changed: Condvar,
}

#[derive(Debug)]
struct StderrState {
    job: Job,
    /// The journal's thread waits for the current text.
    is_awaited: bool,
    is_over: bool,
}

#[derive(Debug)]
enum Job {
    /// Whether the last text was written as a whole.
    Done(bool),
    New(String),
    Writing,
}

impl Stderr {
    /// Starts the thread.
    ///
    /// # Errors
    /// What starting a thread reports.
    pub(crate) fn start() -> io::Result<Self> {
        let state = StderrState { job: Job::Done(true), is_awaited: false, is_over: false };
        let shared = Arc::new(StderrThread { state: Mutex::new(state), changed: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name("stderr".to_owned()).spawn(move || of_thread.run())?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// Hands `text` over when the text before it is finished. False if that takes longer than `patience`; then `text` is
    /// not handed over.
    pub(crate) fn begin(&self, text: String, patience: Duration) -> bool {
        let mut state = self.wait(patience);
        if !matches!(state.job, Job::Done(_)) {
            return false;
        }
        state.job = Job::New(text);
        self.0.0.changed.notify_all();
        true
    }

    /// Whether the last text was written as a whole; `None` if it is not finished within `patience`.
    pub(crate) fn outcome(&self, patience: Duration) -> Option<bool> {
        match self.wait(patience).job {
            Job::Done(written) => Some(written),
            Job::New(_) | Job::Writing => None,
        }
    }

    /// Whether standard error takes a text at once.
    pub(crate) fn has_room(&self) -> bool {
        let stderr = io::stderr();
        let mut question = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        matches!(self.wait(Duration::ZERO).job, Job::Done(_)) && poll(&mut question, PollTimeout::ZERO) == Ok(1)
    }

    /// Notes whether the journal's thread waits for standard error.
    pub(crate) fn set_awaited(&self, is_awaited: bool) {
        self.0.0.lock().is_awaited = is_awaited;
    }

    pub(crate) fn is_awaited(&self) -> bool {
        self.0.0.lock().is_awaited
    }

    /// Waits until the thread has finished, for `patience` at most.
    fn wait(&self, patience: Duration) -> MutexGuard<'_, StderrState> {
        let is_busy = |state: &mut StderrState| !matches!(state.job, Job::Done(_));
        let shared = &self.0.0;
        let waited = shared.changed.wait_timeout_while(shared.lock(), patience, is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_all();
    }
}

impl StderrThread {
    fn run(&self) {
        // These signals would end or stop the process: SIGPIPE when the reader has gone, SIGXFSZ when a file has reached its
        // limit (setrlimit(2)), SIGTTOU when a terminal refuses output of background processes (tcsetattr(3)). While they
        // are blocked write(2) fails with EPIPE or EFBIG, and the terminal takes the output.
        let _ = [Signal::SIGPIPE, Signal::SIGXFSZ, Signal::SIGTTOU].into_iter().collect::<SigSet>().thread_block();
        let mut cut_off = false;
        let mut state = self.lock();
        while !state.is_over {
            if let Job::New(text) = &mut state.job {
                let mut text = std::mem::take(text);
                if cut_off {
                    text.insert(0, '\n');
                }
                state.job = Job::Writing;
                drop(state);
                let (count, written) = write(text.as_bytes());
                cut_off = if count == 0 { cut_off } else { !written };
                state = self.lock();
                state.job = Job::Done(written);
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait_while(state, |state| !state.is_over && !matches!(state.job, Job::New(_)))
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, StderrState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many bytes were written, and whether that was all.
fn write(bytes: &[u8]) -> (usize, bool) {
    let stderr = io::stderr();
    let mut count = 0;
    while count < bytes.len() {
        match nix::unistd::write(&stderr, &bytes[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(Errno::EINTR) => {}
            // Another process has made it non-blocking.
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => break,
        }
    }
    (count, count == bytes.len())
}
