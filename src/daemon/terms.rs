//! What an allow rule may say besides the peers that it admits.

use std::fmt;
use std::time::Duration;

use peergate::policy_file::{FromTable, Table};

use crate::config::values;
use crate::protocol::{Protocol, RuleKeys};

/// What an allow rule may say in place of `[limits]`. `None`: the general limit holds.
pub struct Terms<P: Protocol> {
    /// Connections at once of one user.
    pub connections_per_user: Option<u32>,
    /// How long a connection may be silent; `Some(None)`: without end.
    pub idle_timeout: Option<Option<Duration>>,
    /// The protocol's own keys.
    pub own: P::Terms,
}

impl<P: Protocol> Clone for Terms<P> {
    fn clone(&self) -> Self {
        let Self { connections_per_user, idle_timeout, own } = self;
        Self { connections_per_user: *connections_per_user, idle_timeout: *idle_timeout, own: own.clone() }
    }
}

impl<P: Protocol> FromTable for Terms<P> {
    fn from_table(table: &mut Table<'_>) -> Self {
        let connections_per_user = table.take("connections-per-user", &values::CONNECTIONS);
        let own = P::Terms::take(table);
        Self {
            connections_per_user: connections_per_user.and_then(|number| u32::try_from(number).ok()),
            own,
            idle_timeout: table.take("idle-timeout", &values::SPAN_OR_OFF),
        }
    }
}

impl<P: Protocol> peergate::permits::Terms for Terms<P> {
    fn connections_per_user(&self) -> Option<u32> {
        self.connections_per_user
    }
}

impl<P: Protocol> fmt::Debug for Terms<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connections_per_user, idle_timeout, own } = self;
        let mut shown = f.debug_struct("Terms");
        shown.field("connections_per_user", connections_per_user).field("idle_timeout", idle_timeout);
        shown.field("own", own).finish()
    }
}

impl<P: Protocol> Default for Terms<P> {
    fn default() -> Self {
        Self { connections_per_user: None, idle_timeout: None, own: P::Terms::default() }
    }
}
