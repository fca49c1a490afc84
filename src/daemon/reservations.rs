//! What an answer given outside of the service's environment cannot vouch for. For `check` and `explain`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use peergate::policy::Kind;
use peergate::policy_file::{Names as _, SystemNames};

use crate::config::Config;
use crate::protocol::Protocol;
use crate::report::unit_for_messages;

/// Sources of nsswitch.conf(5) that read files or ask a daemon over AF_UNIX, as the units' sandbox allows. Any other one
/// may ask over a network from within the process.
const LOCAL: [&str; 10] =
    ["files", "compat", "systemd", "sss", "db", "extrausers", "altfiles", "cache", "mymachines", "winbind"];

/// The databases of users and groups in nsswitch.conf(5).
const DATABASES: [&str; 3] = ["passwd", "group", "initgroups"];

/// What cannot be known, and what may come out differently where the service runs, a sentence each.
pub fn reservations<P: Protocol>(config: &Config<P>) -> Vec<String> {
    let denies_groups = config
        .policy
        .rules()
        .any(|rule| rule.name().kind() == Kind::Deny && rule.keys(config.policy.me()).any(|(key, _)| key == "groups"));
    let members = (denies_groups && !SystemNames.lists_all()).then(|| unlisted(&SystemNames::sources(&DATABASES)));
    let subordinate = unread(&SystemNames::sources(&["subid"]));
    members.into_iter().chain(subordinate).chain(elsewhere(config)).collect()
}

/// A directory that is asked for each group that a deny rule lists need not tell all its members.
fn unlisted(sources: &[String]) -> String {
    format!(
        "a deny rule has groups, and /etc/nsswitch.conf names {}: what a directory does not list, such as the users whose \
         own group it is, cannot be known as members, and they can shed the group (unshare(1)); an allow list is stronger",
        sources.join(", ")
    )
}

/// Subordinate ids are read from /etc/subuid alone.
fn unread(sources: &[String]) -> Option<String> {
    let others: Vec<&str> = sources.iter().map(String::as_str).filter(|source| *source != "files").collect();
    (!others.is_empty()).then(|| {
        format!(
            "subordinate ids come from {} (subid: in /etc/nsswitch.conf), which is not read: deny rules, \
             connections-per-user and burst do not count them as their owner; expected them in /etc/subuid",
            others.join(", ")
        )
    })
}

/// What may come out differently where the service runs.
///
/// The service manager sets `$CONFIGURATION_DIRECTORY` for the service, and for a check that runs as the service does.
fn elsewhere<P: Protocol>(config: &Config<P>) -> Vec<String> {
    if std::env::var_os("CONFIGURATION_DIRECTORY").is_some() {
        return Vec::new();
    }
    let distant = if has_names(config) { distant_sources(SystemNames::sources(&DATABASES)) } else { Vec::new() };
    let lookup = (!distant.is_empty()).then(|| {
        format!(
            "names were looked up outside of the service's sandbox, and /etc/nsswitch.conf names {}: if that is asked over \
             a network, it does not answer in the sandbox; a reload (systemctl reload {}) checks the file there",
            distant.join(", "),
            unit_for_messages(P::UNIT)
        )
    });
    lookup.into_iter().chain(unreadable(config)).collect()
}

fn has_names<P: Protocol>(config: &Config<P>) -> bool {
    !config.policy.known_names().is_empty() || !config.policy.unknown_names().is_empty()
}

/// The sources that are not known to be local.
fn distant_sources(mut sources: Vec<String>) -> Vec<String> {
    sources.retain(|source| !LOCAL.contains(&source.as_str()));
    sources
}

/// Root reads every file; the units' service is not root.
fn unreadable<P: Protocol>(config: &Config<P>) -> Option<String> {
    let path = config.source.as_deref().filter(|_| config.policy.me().raw() == 0)?;
    let mode = fs::metadata(path).ok()?.permissions().mode();
    (mode & 0o004 == 0).then(|| {
        format!(
            "{}: mode {:04o} was read as root; expected a file that every user may read, because {}.service runs as \
             another user",
            path.display(),
            mode & 0o7777,
            unit_for_messages(P::UNIT)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_that_may_ask_over_a_network_are_named() {
        let distant = |sources: &[&str]| distant_sources(sources.iter().map(ToString::to_string).collect());
        assert_eq!(distant(&["files", "systemd", "sss"]), [""; 0]);
        assert_eq!(distant(&["files", "hesiod", "nis"]), ["hesiod", "nis"]);
    }
}
