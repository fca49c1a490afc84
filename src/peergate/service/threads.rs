//! A service with a thread for each connection.

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread;

use nix::poll::{PollFd, PollFlags, poll};

use super::{Attendant, Core, Error, Service};
use crate::audit::Severity;
use crate::clock::poll_timeout;
use crate::connection::Connection;
use crate::gate::Admission;
use crate::permits::Terms;
use crate::session::{Link, Socket};

/// What serves one connection, on its thread.
pub(super) trait Serve<T: Terms>: Send + Sync + 'static {
    /// What serving begins with.
    type Start: Default + Send + 'static;

    fn serve(&self, core: &Core<T>, link: Arc<Link<T>>, start: Self::Start);
}

impl<T: Terms> Service<T> {
    /// Serves until it is told to stop, or idle for long enough: each admitted connection on a thread of its own, which may
    /// wait. The connection is closed when `serve` returns. An error is the peer's affair (it has gone, or is revoked) and is
    /// not recorded; a panic is.
    ///
    /// # Errors
    /// What keeps the service from starting, as a sentence.
    pub fn serve_threads(
        self,
        serve: impl Fn(&mut Connection<T>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let (core, journal, plan) = Core::open(self.open()?)?;
        let mut attendant = Attendant::new(&core, plan, journal);
        let threads = Threads::new(&core, Plain(serve));
        threads.start()?;
        attendant.attend(|| false);
        attendant.begin_end();
        threads.stop_accepting();
        core.live.end_all();
        attendant.wait_until(|| core.live.is_empty());
        attendant.end();
        Ok(())
    }
}

struct Plain<F>(F);

impl<T: Terms, F: Fn(&mut Connection<T>) -> io::Result<()> + Send + Sync + 'static> Serve<T> for Plain<F> {
    type Start = ();

    fn serve(&self, _: &Core<T>, link: Arc<Link<T>>, (): ()) {
        let _ = (self.0)(&mut Connection::new(link, Vec::new()));
    }
}

/// The thread that gives the gate its turns, and a thread for each connection.
pub(super) struct Threads<T: Terms, S> {
    core: Arc<Core<T>>,
    serve: Arc<S>,
}

impl<T: Terms, S: Serve<T>> Threads<T, S> {
    pub(super) fn new(core: &Arc<Core<T>>, serve: S) -> Self {
        Self { core: Arc::clone(core), serve: Arc::new(serve) }
    }

    /// From here on connections are accepted.
    pub(super) fn start(&self) -> Result<(), Error> {
        let gate = Self { core: Arc::clone(&self.core), serve: Arc::clone(&self.serve) };
        let spawned = thread::Builder::new().name("gate".to_owned()).spawn(move || gate.run());
        spawned.map(drop).map_err(|error| Error::new("starting the gate's thread", error))
    }

    fn run(&self) {
        let mut admitted = Vec::new();
        let begin = |admitted: &mut Vec<_>| {
            admitted.drain(..).for_each(|admission| self.begin(admission, false, S::Start::default()));
        };
        while let Some(due) = self.core.turn(&mut admitted, begin) {
            // EINTR or an event: the next turn looks at everything anyway.
            let _ = poll(&mut [PollFd::new(self.core.epoll().as_fd(), PollFlags::POLLIN)], poll_timeout(due));
        }
    }

    pub(super) fn stop_accepting(&self) {
        let mut admitted = Vec::new();
        self.core.stop_accepting(&mut admitted);
        admitted.into_iter().for_each(|admission| self.begin(admission, false, S::Start::default()));
    }

    /// Serves a connection on a thread of its own. Without a thread it is closed.
    pub(super) fn begin(&self, admission: Admission<T>, is_shared: bool, start: S::Start) {
        // A plain socket is always entered.
        let Ok(Some(link)) = self.core.live.enter(admission, is_shared, |fd| Ok(Socket::Plain(fd))) else { return };
        let (core, serve) = (Arc::clone(&self.core), Arc::clone(&self.serve));
        let number = link.session().connection();
        let run = move || {
            if let Err(fault) = panic::catch_unwind(AssertUnwindSafe(|| serve.serve(&core, link, start))) {
                core.note(Severity::Error, format!("the service panicked: connection {number}: {}", said(&*fault)));
            }
            core.wakeup.notify();
        };
        if let Err(error) = thread::Builder::new().name(format!("peer {number}")).spawn(run) {
            self.core.note(Severity::Error, format!("connection {number} gets no thread: {error}"));
        }
    }
}

/// What a panic said.
pub(crate) fn said(fault: &(dyn Any + Send)) -> &str {
    let text = fault.downcast_ref::<&str>().copied().or(fault.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message")
}
