//! A small service in one call. A service that reloads, or has its own runtime, makes the calls in here itself.

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
use crate::policy_file::{self, Fault, SystemNames};
use crate::systemd::{Notifier, Request, Signals, Watchdog, activation};

/// How long the end waits for a journal that takes nothing.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(1);

/// Serves on the sockets that the service manager passed, until SIGTERM or SIGINT. `admit` gets each connection that
/// `policy` admits within the default [`Limits`](crate::Limits). Every denial becomes a record in the journal, under the
/// identifier `name`. The service manager is notified of readiness (Type=notify), and its watchdog is fed if it has set
/// one. A reload changes nothing. Deny rules and the limit per user know subordinate ids and the members of groups
/// ([`policy_file::with_accounts`]).
///
/// `admit` runs on the gate's thread and must not block ([`Door::open`]): a longer conversation needs a thread of its own.
/// Call this at the beginning of `main`, before there is a second thread.
///
/// # Errors
/// InvalidInput if no socket was passed, or one that cannot be served, or if a deny rule depends on something that the
/// user database does not tell; else what starting a thread, epoll(7) or
/// signalfd(2) reports.
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
    let (policy, warnings) =
        policy_file::with_accounts(policy, &SystemNames).map_err(|faults| invalid(faults.to_string()))?;
    let audit = Audit::default();
    let setup = Setup::new(passed.listeners, policy, audit.clone())?;
    let signals = Signals::catch()?;
    let journal = Writer::start(&audit, name)?;
    for warning in unmapped_ids().into_iter().chain(warnings.iter().map(Fault::to_string)) {
        audit.write(Record::note(Severity::Warning, warning));
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

/// Waits until the service is to stop.
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
