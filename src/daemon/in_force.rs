//! What a configuration means for the gate, the workers and the record; and what it needs of the system.

use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use peergate::audit::{Audit, Event, Record, Severity};
use peergate::gate::GateConfig;
use peergate::permits::Limits;

use crate::config::{Config, Verify};
use crate::connection::WorkerConfig;
use crate::memory;
use crate::protocol::Protocol;
use crate::terms::Terms;

/// What the gate goes by.
pub fn gate_config<P: Protocol>(config: &Config<P>) -> GateConfig<Terms<P::Terms>> {
    let mut gate = GateConfig::new(Arc::clone(&config.policy));
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    gate.limits = Limits::new(config.limits.connections, number(config.limits.connections_per_user));
    gate.limits.waiting_per_user = number(config.limits.waiting_per_user);
    gate.pass_credentials = config.service.verify == Verify::Line;
    gate.take_descriptors = P::takes_descriptors(&config.settings);
    gate.replies = P::replies(&config.settings);
    gate
}

/// What the workers go by.
pub fn worker_config<P: Protocol>(config: &Config<P>) -> WorkerConfig<P> {
    WorkerConfig {
        policy: Arc::clone(&config.policy),
        idle_timeout: config.limits.idle_timeout,
        verify: config.service.verify == Verify::Line,
        settings: config.settings.clone(),
    }
}

/// Records the warnings of a configuration, and that it is in force.
pub fn record_configuration<P: Protocol>(audit: &Audit, config: &Config<P>, what: &str) {
    for warning in &config.warnings {
        audit.write(Record::note(Severity::Warning, warning.to_string()));
    }
    if let Some(shortage) = memory::shortage(config, memory::own_limit()) {
        audit.write(Record::note(Severity::Warning, shortage));
    }
    audit.write(Record::note(Event::ConfigLoaded, format!("Configuration {what}: {}", describe(config))));
}

/// `/etc/echod/echod.toml, 3 rules`.
pub fn describe<P: Protocol>(config: &Config<P>) -> String {
    let source = config.source.as_deref().map_or("built-in policy (no file)".into(), Path::to_string_lossy);
    let (rules, plural) = (config.policy.len(), if config.policy.len() == 1 { "" } else { "s" });
    format!("{source}, {rules} rule{plural}")
}

/// Raises the soft limit on descriptors to the hard one: each connection is a descriptor. The soft limit is 1024 by default
/// for the sake of select(2), which nothing here uses. Connections of an earlier process need it too: the kernel closes
/// descriptors of a message for which there is no room.
pub fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Records a hard limit below what the configuration needs.
pub fn record_descriptor_limit<P: Protocol>(config: &Config<P>, audit: &Audit) {
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let connections = config.limits.connections;
    let wanted = connections as u64 * (1 + u64::from(P::HAS_SECOND)) + 512;
    if hard < wanted {
        let text = format!(
            "[limits] connections = {connections} needs about {wanted} file descriptors, the hard limit is {hard} \
             (LimitNOFILE=)"
        );
        audit.write(Record::note(Severity::Warning, text));
    }
}
