//! A service whose code runs on the gate's thread.

use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, poll};

use super::threads::said;
use super::{Attendant, Core, Error, Service};
use crate::audit::Severity;
use crate::clock::poll_timeout;
use crate::gate::Admission;
use crate::permits::Terms;

impl<T: Terms> Service<T> {
    /// Serves until it is told to stop. `admit` takes each admitted connection on the gate's thread: the socket is
    /// non-blocking, and **no connection is accepted while `admit` runs**. For an answer that is known at once, or for a
    /// service that hands the connection to a loop of its own. A reload is for new connections only; what becomes of live ones
    /// is the affair of `admit`.
    ///
    /// # Errors
    /// What keeps the service from starting, as a sentence.
    pub fn serve_inline(self, admit: impl FnMut(Admission<T>) + Send + 'static) -> Result<(), Error> {
        let (core, journal, plan) = Core::open(self.open()?)?;
        let mut attendant = Attendant::new(&core, plan, journal);
        let stops = Arc::new(AtomicBool::new(false));
        let of_thread = (Arc::clone(&core), Arc::clone(&stops));
        let spawned =
            thread::Builder::new().name("gate".to_owned()).spawn(move || run(&of_thread.0, &of_thread.1, admit));
        let thread = spawned.map_err(|error| Error::new("starting the gate's thread", error))?;
        attendant.attend(|| false);
        attendant.begin_end();
        // What the gate has accepted by now is for `admit` too, on its thread.
        stops.store(true, Ordering::Release);
        core.closer().wake();
        let _ = thread.join();
        attendant.end();
        Ok(())
    }
}

fn run<T: Terms>(core: &Core<T>, stops: &AtomicBool, mut admit: impl FnMut(Admission<T>)) {
    let mut serve = |admitted: &mut Vec<Admission<T>>| {
        for admission in admitted.drain(..) {
            let number = admission.connection;
            if let Err(fault) = panic::catch_unwind(AssertUnwindSafe(|| admit(admission))) {
                core.note(Severity::Error, format!("the service panicked: connection {number}: {}", said(&*fault)));
            }
        }
    };
    let mut admitted = Vec::new();
    while let Some(due) = core.turn(&mut admitted, |_| ()) {
        // After the turn: it may have taken the notice that came with this.
        if stops.load(Ordering::Acquire) {
            core.stop_accepting(&mut admitted);
            return serve(&mut admitted);
        }
        if admitted.is_empty() {
            // EINTR or an event: the next turn looks at everything anyway.
            let _ = poll(&mut [PollFd::new(core.epoll().as_fd(), PollFlags::POLLIN)], poll_timeout(due));
        }
        serve(&mut admitted);
    }
}
