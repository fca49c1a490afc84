//! What the echo may be told by its configuration.

use peergate::policy_file::Table;
use peergate_daemon::config::values::{SIZE, show_size};
use peergate_daemon::protocol;

/// The echo's own key of `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The longest line in bytes, its LF included.
    pub line_length: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { line_length: 64 << 10 }
    }
}

impl protocol::Settings for Settings {
    fn take_limits(&mut self, limits: &mut Table<'_>) {
        self.line_length = limits.take("line-length", &SIZE).unwrap_or(self.line_length);
    }

    fn show_limits(&self) -> Vec<String> {
        vec![format!("line-length = \"{}\"", show_size(self.line_length))]
    }
}

/// The echo's own key on an allow rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The longest line in bytes, its LF included, in place of the general limit.
    pub line_length: Option<usize>,
}

impl protocol::RuleKeys for Terms {
    fn take(rule: &mut Table<'_>) -> Self {
        Self { line_length: rule.take("line-length", &SIZE) }
    }

    fn show(&self) -> Vec<String> {
        self.line_length.map(|bytes| format!("line-length {}", show_size(bytes))).into_iter().collect()
    }
}
