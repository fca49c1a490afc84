//! What an allow rule may say besides the peers that it admits.

use std::time::Duration;

use peergate::policy_file::{FromTable, Table};

use crate::config::values;
use crate::protocol::RuleKeys;

/// What an allow rule may say in place of `[limits]`. `None`: the general limit holds.
#[derive(Clone, Debug, Default)]
pub struct Terms<K> {
    /// Connections at once of one user.
    pub connections_per_user: Option<u32>,
    /// How long a connection may be silent; `Some(None)`: without end.
    pub idle_timeout: Option<Option<Duration>>,
    /// The protocol's own keys.
    pub own: K,
}

impl<K: RuleKeys> FromTable for Terms<K> {
    fn from_table(table: &mut Table<'_>) -> Self {
        let connections_per_user = table.take("connections-per-user", &values::CONNECTIONS);
        let own = K::take(table);
        Self {
            connections_per_user: connections_per_user.and_then(|number| u32::try_from(number).ok()),
            own,
            idle_timeout: table.take("idle-timeout", &values::SPAN_OR_OFF),
        }
    }
}

impl<K: RuleKeys> peergate::permits::Terms for Terms<K> {
    fn connections_per_user(&self) -> Option<u32> {
        self.connections_per_user
    }
}
