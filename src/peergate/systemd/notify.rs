//! Messages to the service manager: readiness, status, reload, stop. Sole user of sd-notify.

use std::time::Duration;

pub(super) use sd_notify::{NotifyState, watchdog_enabled};

use super::outlet::Outlet;

/// Sends the state of the service to the service manager. Without NOTIFY_SOCKET, and when its owner is gone, every call
/// does nothing and is no error. No call waits for a manager that does not read: a status or sign of life is dropped, and
/// any other message is sent when the manager reads again.
#[derive(Clone, Debug)]
pub struct Notifier {
    pub(super) outlet: Option<Outlet>,
}

impl Notifier {
    /// Reads the environment once.
    pub fn from_env() -> Self {
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        Self { outlet: address.and_then(|address| Outlet::to(&address)) }
    }

    /// Whether NOTIFY_SOCKET names a service manager.
    pub fn is_present(&self) -> bool {
        self.outlet.is_some()
    }

    /// `READY=1`: the service accepts connections.
    pub fn ready(&self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
    }

    /// `RELOADING=1` and the clock, in one datagram, as Type=notify-reload wants it too.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(_) => self.send(&[NotifyState::Reloading]),
        }
    }

    /// `STOPPING=1`.
    pub fn stopping(&self, status: &str) {
        self.send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
    }

    /// `STATUS=`, one line. False if the manager does not read at the moment; the status is not sent later.
    pub fn status(&self, status: &str) -> bool {
        self.try_send(&[NotifyState::Status(&one_line(status))])
    }

    /// `EXTEND_TIMEOUT_USEC=`: the current start, reload or stop takes this much longer.
    pub fn extend_timeout(&self, by: Duration) {
        self.send(&[NotifyState::ExtendTimeoutUsec(u32::try_from(by.as_micros()).unwrap_or(u32::MAX))]);
    }

    pub(super) fn watchdog(&self) {
        self.try_send(&[NotifyState::Watchdog]);
    }

    fn send(&self, state: &[NotifyState<'_>]) {
        let (Some(outlet), Some(first)) = (&self.outlet, state.first()) else { return };
        let kind = first.to_string().split('=').next().unwrap_or_default().to_owned();
        outlet.send(kind, message(state));
    }

    fn try_send(&self, state: &[NotifyState<'_>]) -> bool {
        self.outlet.as_ref().is_some_and(|outlet| outlet.try_send(&message(state)))
    }
}

/// The text of a datagram: one field in each line.
pub(super) fn message(state: &[NotifyState<'_>]) -> String {
    state.iter().map(|field| format!("{field}\n")).collect()
}

/// A newline would begin a field of its own.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}
