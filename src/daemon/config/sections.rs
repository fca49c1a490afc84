//! The sections of a configuration that every daemon has.

use std::num::NonZeroUsize;
use std::time::Duration;

use peergate::audit::Settings;
use peergate::policy_file::{FromTable, Table};

use super::values;
use crate::protocol;

/// `[limits]`: what one connection, one user, and all of them may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Admitted connections at once.
    pub connections: usize,
    /// Admitted connections at once of one user.
    pub connections_per_user: usize,
    /// Accepted connections of one user that wait to be judged while the gate is busy.
    pub waiting_per_user: usize,
    /// How long a connection may be silent; `None`: without end.
    pub idle_timeout: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, connections_per_user: 64, waiting_per_user: 1024, idle_timeout: None }
    }
}

/// `[audit]`: what is recorded.
#[derive(Default)]
pub(super) struct Audit(pub Settings);

impl FromTable for Audit {
    fn from_table(table: &mut Table<'_>) -> Self {
        let mut settings = Settings::default();
        settings.scope = table.take("record", &values::RECORD).unwrap_or(settings.scope);
        settings.burst = table.take("burst", &values::BURST).unwrap_or(settings.burst);
        settings.interval = table.take("interval", &values::SPAN).unwrap_or(settings.interval);
        Self(settings)
    }
}

/// `[service]`: how the service works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// How many worker threads; `None`: one for every two processors that we may use.
    pub workers: Option<NonZeroUsize>,
    /// How long to look again before sleeping; `None`: not at all.
    pub busy_poll: Option<Duration>,
    /// How often to make sure that the sender is the user that was judged.
    pub verify: Verify,
    /// How long without a connection until the process exits, for systemd to start it again; `None`: never.
    pub idle_exit: Option<Duration>,
}

impl Default for Service {
    fn default() -> Self {
        let busy_poll = Some(Duration::from_micros(50));
        Self { workers: None, busy_poll, verify: Verify::Connection, idle_exit: None }
    }
}

impl FromTable for Service {
    fn from_table(table: &mut Table<'_>) -> Self {
        let default = Self::default();
        Self {
            workers: table.take("workers", &values::WORKERS).unwrap_or(default.workers),
            busy_poll: table.take("busy-poll", &values::BUSY_POLL).unwrap_or(default.busy_poll),
            verify: table.take("verify", &values::VERIFY).unwrap_or(default.verify),
            idle_exit: table.take("idle-exit", &values::SPAN_OR_OFF).unwrap_or(default.idle_exit),
        }
    }
}

/// How often to make sure that the sender is the user that was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Once, when it connects.
    Connection,
    /// For each piece of data, by the credentials that the kernel attaches to it.
    Line,
}

impl Verify {
    /// As the file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Line => "line",
        }
    }
}

/// The tables besides the policy.
#[derive(Default)]
pub(super) struct Sections<S> {
    pub limits: Limits,
    pub audit: Audit,
    pub service: Service,
    pub settings: S,
}

impl<S: protocol::Settings> FromTable for Sections<S> {
    fn from_table(table: &mut Table<'_>) -> Self {
        let LimitsSection::<S> { limits, mut settings } = table.take_table("limits");
        let (audit, service) = (table.take_table("audit"), table.take_table("service"));
        settings.take_tables(table);
        Self { limits, audit, service, settings }
    }
}

/// `[limits]`, with the protocol's own keys in it.
#[derive(Default)]
struct LimitsSection<S> {
    limits: Limits,
    settings: S,
}

impl<S: protocol::Settings> FromTable for LimitsSection<S> {
    fn from_table(table: &mut Table<'_>) -> Self {
        let default = Limits::default();
        let mut settings = S::default();
        let connections = table.take("connections", &values::CONNECTIONS).unwrap_or(default.connections);
        let per_user = table.take("connections-per-user", &values::CONNECTIONS);
        let waiting = table.take("waiting-per-user", &values::CONNECTIONS);
        settings.take_limits(table);
        let limits = Limits {
            connections,
            connections_per_user: per_user.unwrap_or(default.connections_per_user),
            waiting_per_user: waiting.unwrap_or(default.waiting_per_user),
            idle_timeout: table.take("idle-timeout", &values::SPAN_OR_OFF).unwrap_or(default.idle_timeout),
        };
        Self { limits, settings }
    }
}
