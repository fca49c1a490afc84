//! A reload: a configuration is read whole, and only then put in force, for new connections and for live ones.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};
use peergate::audit::{Event, Record, Severity};
use peergate::policy::Policy;
use peergate::poll_timeout;
use peergate::systemd::{Request, Watchdog};

use crate::config::Config;
use crate::in_force::{describe, gate_config, record_configuration, worker_config};
use crate::loading::Loading;
use crate::names::Found;
use crate::protocol::Protocol;
use crate::service::Service;
use crate::terms::Terms;

/// The policy of such a daemon.
type Rules<P> = Policy<Terms<<P as Protocol>::Terms>>;

impl<P: Protocol> Service<P> {
    /// All or nothing: either the whole file is in force when this returns, or nothing has changed.
    pub(crate) fn reload(&mut self, answer_to: Option<i32>) {
        self.notifier.reloading();
        let taken = match self.read_configuration() {
            Ok(config) => {
                let config = self.keep_ids(config);
                self.put_in_force(config);
                record_configuration(&self.audit, &self.config, "reloaded");
                true
            }
            Err(error) => {
                let text = format!("The configuration was refused, the old one stays in force:\n{error}");
                self.audit.write(Record::note(Event::ConfigRefused, text));
                false
            }
        };
        self.status.said = self.status_line();
        self.notifier.ready(&self.status.said);
        if let Some(pid) = answer_to {
            self.signals.answer(pid, taken);
        }
    }

    /// Reads the configuration on a thread of its own. The user database may take long to answer, and a restart would not
    /// hasten it: so the watchdog is fed meanwhile, and a stop is heard.
    fn read_configuration(&mut self) -> Result<Config<P>, String> {
        let config = self.read_on_a_thread()?;
        config.may_serve(&self.sockets).map_err(|faults| faults.to_string())?;
        match &self.config.source {
            // The built-in policy would end every connection that the file admits. A restart puts it in force.
            Some(path) if config.source.is_none() => {
                Err(format!("{}: is gone; expected the file that what is in force was read from", path.display()))
            }
            _ => Ok(config),
        }
    }

    fn read_on_a_thread(&mut self) -> Result<Config<P>, String> {
        // Its wake-up is main's, not one of its own: there may be no descriptor left.
        let loading = Loading::begin(&self.choice, &self.wakeup);
        loop {
            self.wakeup.arm();
            if let Some(result) = loading.result() {
                return result.map_err(|error| error.to_string());
            }
            let timeout = poll_timeout(self.watchdog.as_ref().map(Watchdog::due));
            let mut events = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wakeup.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut events, timeout);
            self.wakeup.clear();
            self.feed_watchdog();
            while let Some(request) = self.next_request() {
                if request == Request::Stop {
                    // Before reloads that were asked for earlier: each would wait as this one does.
                    self.requests.push_front(request);
                    return Err("the service was told to stop while it was being read".to_owned());
                }
                self.requests.push_back(request);
            }
        }
    }

    fn put_in_force(&mut self, config: Config<P>) {
        let before = std::mem::replace(&mut self.config, config);
        self.apply();
        for (what, old, new) in [
            ("workers", format!("{:?}", before.service.workers), format!("{:?}", self.config.service.workers)),
            ("busy-poll", format!("{:?}", before.service.busy_poll), format!("{:?}", self.config.service.busy_poll)),
        ] {
            if old != new {
                self.note(
                    Severity::Warning,
                    format!("[service] {what} changes with the next restart, not with a reload"),
                );
            }
        }
    }

    /// Puts the main thread's configuration in force for all threads.
    fn apply(&mut self) {
        let config = &self.config;
        self.audit.set(config.audit);
        // First the gate, so that no further connection is admitted by the old policy; then the live connections.
        let (of_gate, settings) = (gate_config(config), config.settings.clone());
        self.gate.ask(move |gate| gate.configure(of_gate, settings));
        let (done, finished) = mpsc::channel();
        for worker in &self.workers {
            worker.configure(worker_config(config), done.clone());
        }
        drop(done);
        // One word from each; then the channel is closed.
        while finished.recv().is_ok() {}
        self.names.set_names(config.policy.unknown_names(), Instant::now());
    }

    /// A name for which the user database gives no answer just now keeps the id that the policy in force has for it: to
    /// lose it would cut off the peers that it admits.
    fn keep_ids(&self, config: Config<P>) -> Config<P> {
        if config.unanswered.is_empty() {
            return config;
        }
        let known = self.config.policy.known_names();
        let kept: Found = config.unanswered.iter().filter_map(|name| Some((name.clone(), *known.get(name)?))).collect();
        if kept.is_empty() {
            return config;
        }
        self.note(Severity::Warning, format!("the user database did not answer; as before: {}", listed(&kept)));
        match self.with_ids(&config.policy, &kept) {
            Some(policy) => Config { policy, ..config },
            None => config,
        }
    }

    /// Puts names into force that have been found since the configuration was read, as a reload would.
    pub(crate) fn look_for_names(&mut self, now: Instant) {
        let found = self.names.turn(now);
        if found.is_empty() {
            return;
        }
        let Some(policy) = self.with_ids(&self.config.policy, &found) else { return };
        self.config.policy = policy;
        self.apply();
        let text = format!("Names found and in force: {}; configuration: {}", listed(&found), describe(&self.config));
        self.audit.write(Record::note(Event::ConfigLoaded, text));
    }

    fn with_ids(&self, policy: &Rules<P>, ids: &Found) -> Option<Arc<Rules<P>>> {
        match policy.with_ids(ids) {
            Ok(policy) => Some(Arc::new(policy)),
            Err(error) => {
                self.note(Severity::Error, format!("names that were found cannot be used: {error}"));
                None
            }
        }
    }
}

/// `user "alice" (1001), group "adm" (4)`; not more than a message should hold.
fn listed(names: &Found) -> String {
    const MOST: usize = 20;
    let mut listed: Vec<_> = names.iter().take(MOST).map(|(name, id)| format!("{name} ({id})")).collect();
    if names.len() > MOST {
        listed.push(format!("and {} more", names.len() - MOST));
    }
    listed.join(", ")
}
