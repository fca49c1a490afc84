//! All of a small service in one call. For a service that reloads, or has a runtime of its own: the calls in here are
//! public too.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::audit::{Audit, Record, Severity};
use crate::clock::poll_timeout;
use crate::gate::{Admission, Door, Setup};
use crate::journal::Writer;
use crate::peer::unmapped_ids;
use crate::permits::Terms;
use crate::policy::Policy;
use crate::systemd::{Notifier, Request, Signals, Watchdog, activation};

/// How long the end waits for a journal that takes nothing.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(1);

/// Serves on the sockets that the service manager passed, until SIGTERM or SIGINT: whoever `policy` admits, within the
/// default [`Limits`](crate::Limits), goes to `admit`; every denial goes into the journal, under the identifier `name`. The
/// service manager hears that it is ready (Type=notify), and feeds its watchdog where it set one. A request to reload
/// finds nothing to do.
///
/// `admit` runs on the gate's thread and must not block ([`Door::open`]): what takes longer than a short answer belongs on
/// another thread. Call this before the process has a second thread, as the first thing in `main`.
///
/// # Errors
/// InvalidInput where no socket was passed, or one that cannot be served; else what the system says to a thread, an epoll
/// or signals.
///
/// ```no_run
/// use std::io::Write;
/// use peergate::{Policy, Rule, Uid, User};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
///     peergate::serve("hello", policy, |mut guest| {
///         let _ = writeln!(guest.socket, "Hello, uid {}", guest.peer.uid());
///     })?;
///     Ok(())
/// }
/// ```
pub fn serve<T: Terms>(
    name: &str,
    policy: Policy<T>,
    admit: impl FnMut(Admission<T>) + Send + 'static,
) -> io::Result<()> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
    let passed = activation::adopt(|_| false).map_err(|refused| invalid(refused.to_string()))?;
    if let Some(why) = passed.ignored {
        return Err(invalid(why));
    }
    let audit = Audit::default();
    let setup = Setup::new(passed.listeners, policy, audit.clone())?;
    let signals = Signals::catch()?;
    let journal = Writer::start(&audit, name)?;
    if let Some(partial) = unmapped_ids() {
        audit.write(Record::note(Severity::Warning, partial));
    }
    let outcome = Door::open(setup, admit).and_then(|mut door| {
        let notifier = Notifier::from_env();
        let mut watchdog = Watchdog::from_env(vec![door.monitored(), journal.monitored()]);
        notifier.ready("serving");
        let outcome = attend(&signals, &notifier, watchdog.as_mut(), &audit);
        notifier.stopping("stopping");
        door.shut();
        outcome
    });
    journal.finish(JOURNAL_PATIENCE);
    outcome
}

/// Until it is time to stop.
fn attend(
    signals: &Signals,
    notifier: &Notifier,
    mut watchdog: Option<&mut Watchdog>,
    audit: &Audit,
) -> io::Result<()> {
    loop {
        while let Some(request) = signals.next() {
            match request {
                Request::Stop => return Ok(()),
                Request::Reload { answer_to } => {
                    notifier.reloading();
                    notifier.ready("serving");
                    if let Some(pid) = answer_to {
                        signals.answer(pid, true);
                    }
                }
            }
        }
        let mut due = None;
        if let Some(watchdog) = &mut watchdog {
            let silent = watchdog.tick(notifier).join(", ");
            if !silent.is_empty() {
                audit.write(Record::note(Severity::Error, format!("no sign of life from: {silent}")));
            }
            due = Some(watchdog.due());
        }
        match poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], poll_timeout(due)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
