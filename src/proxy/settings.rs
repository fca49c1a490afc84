//! What the proxy may be told by its configuration.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use peergate::policy::{Kind, Rule};
use peergate::policy_file::{FromTable, Table, ValueKind};
use peergate_daemon::config::Config;
use peergate_daemon::config::values::{SPAN, show_span};
use peergate_daemon::{protocol, terms as daemon};

use crate::forward::Forward;
use crate::identity;
use crate::replies::{REPLIES, Replies};
use crate::upstream::Upstream;

/// The table `[forward]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where connections are passed on to, unless their rule says otherwise.
    pub to: Option<Arc<Upstream>>,
    /// How long a client waits for a service that cannot be reached.
    pub connect_timeout: Duration,
    /// As which user the service is connected to.
    pub identity: Identity,
    /// Whether file descriptors are passed on.
    pub descriptors: Descriptors,
    /// What a peer gets that is turned away.
    pub replies: Replies,
}

/// As which user the service is connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Identity {
    /// As the proxy's own.
    #[default]
    Own,
    /// With the ids of the peer.
    Peer,
}

/// What becomes of file descriptors in either direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Descriptors {
    /// They are refused.
    #[default]
    Refuse,
    /// They are passed on.
    Pass,
}

const UPSTREAM: ValueKind<Arc<Upstream>> = ValueKind {
    expected: "the absolute path of a socket, of 107 bytes at most, or \"@name\" in the abstract namespace",
    number: |_| None,
    text: |text| Upstream::parse(text).map(Arc::new),
};

const IDENTITY: ValueKind<Identity> = ValueKind {
    expected: "\"own\" or \"peer\"",
    number: |_| None,
    text: |text| [Identity::Own, Identity::Peer].into_iter().find(|identity| identity.as_str() == text),
};

const DESCRIPTORS: ValueKind<Descriptors> = ValueKind {
    expected: "\"refuse\" or \"pass\"",
    number: |_| None,
    text: |text| [Descriptors::Refuse, Descriptors::Pass].into_iter().find(|what| what.as_str() == text),
};

impl Identity {
    /// As the file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Peer => "peer",
        }
    }
}

impl Descriptors {
    /// As the file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Pass => "pass",
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            to: None,
            connect_timeout: Duration::from_secs(10),
            identity: Identity::Own,
            descriptors: Descriptors::Refuse,
            replies: Replies::None,
        }
    }
}

impl FromTable for Settings {
    fn from_table(table: &mut Table<'_>) -> Self {
        let default = Self::default();
        Self {
            to: table.take("to", &UPSTREAM),
            connect_timeout: table.take("connect-timeout", &SPAN).unwrap_or(default.connect_timeout),
            identity: table.take("identity", &IDENTITY).unwrap_or(default.identity),
            descriptors: table.take("descriptors", &DESCRIPTORS).unwrap_or(default.descriptors),
            replies: table.take("replies", &REPLIES).unwrap_or(default.replies),
        }
    }
}

impl protocol::Settings for Settings {
    fn take_tables(&mut self, file: &mut Table<'_>) {
        *self = file.take_table("forward");
    }

    fn show_tables(&self) -> String {
        let to = self.to.as_ref().map_or(String::new(), |to| format!("to = \"{}\"\n", to.text()));
        let timeout = show_span(self.connect_timeout);
        let [identity, descriptors, replies] =
            [self.identity.as_str(), self.descriptors.as_str(), self.replies.as_str()];
        format!(
            "\n[forward]\n{to}connect-timeout = \"{timeout}\"\nidentity = \"{identity}\"\ndescriptors = \"{descriptors}\"\n\
             replies = \"{replies}\"\n"
        )
    }
}

/// The proxy's own keys on an allow rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Where connections of these peers are passed on to.
    pub to: Option<Arc<Upstream>>,
    /// Whether the service may be connected to as root, where root is the peer and `identity` is "peer".
    pub root: bool,
}

impl protocol::RuleKeys for Terms {
    fn take(rule: &mut Table<'_>) -> Self {
        Self { to: rule.take("to", &UPSTREAM), root: rule.take_flag("root").unwrap_or(false) }
    }

    fn show(&self) -> Vec<String> {
        let to = self.to.as_ref().map(|to| format!("to {}", to.text()));
        let root = self.root.then(|| "root true".to_owned());
        to.into_iter().chain(root).collect()
    }
}

/// What is wrong with a configuration as a whole.
pub fn faults(config: &Config<Forward>) -> Vec<String> {
    let lacks_target =
        |rule: &&Arc<Rule<daemon::Terms<Terms>>>| rule.name().kind() == Kind::Allow && rule.terms().own.to.is_none();
    let missing = config.policy.rules().find(lacks_target).filter(|_| config.settings.to.is_none()).map(|rule| {
        format!(
            "`to` is missing in [forward]; expected the socket of the service behind the gate, because {} names none \
                 (or give it with --to)",
            rule.name()
        )
    });
    missing.into_iter().chain(upstreams(config).filter_map(not_a_socket)).collect()
}

/// What keeps this process from serving these sockets.
pub fn obstacles(config: &Config<Forward>, sockets: &[Arc<str>]) -> Vec<String> {
    let of_own = |to: &Arc<Upstream>| {
        let is_own = sockets.iter().any(|own| is_same(to, own));
        is_own.then(|| {
            format!("`to`: {} is a socket that peergate itself listens on; expected the service's own", to.text())
        })
    };
    let takes_ids = config.settings.identity == Identity::Peer;
    let identity = if takes_ids { identity::start() } else { Ok(()) };
    upstreams(config).filter_map(of_own).chain(identity.err()).collect()
}

fn upstreams(config: &Config<Forward>) -> impl Iterator<Item = &Arc<Upstream>> {
    config.settings.to.iter().chain(config.policy.rules().filter_map(|rule| rule.terms().own.to.as_ref()))
}

/// What is at a path that can never be connected to. A path at which nothing is, or that cannot be looked at, may become a
/// socket later.
fn not_a_socket(to: &Arc<Upstream>) -> Option<String> {
    let kind = fs::metadata(to.path()?).ok()?.file_type();
    let what = if kind.is_dir() { "a directory" } else { "no socket" };
    (!kind.is_socket())
        .then(|| format!("`to`: {} is {what}; expected the socket of a service, or nothing yet", to.text()))
}

/// Whether both lead to the same socket, by whatever path.
fn is_same(to: &Upstream, own: &str) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    **to.text() == *own || to.path().and_then(file).is_some_and(|found| file(Path::new(own)) == Some(found))
}
