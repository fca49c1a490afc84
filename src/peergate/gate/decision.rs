//! Asking the kernel about a peer and deciding by the policy: once for a connection just accepted, after a reload and after a
//! restart.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use super::reserve::Reserve;
use crate::peer::Peer;
use crate::permits::{LimitExceeded, Permit};
use crate::policy::{Policy, Rule, RuleName, Verdict};

/// How often a question is repeated with reserved descriptors: another thread may take what was freed for it.
const TRIES: usize = 100;

/// What the gate decided about a connection that it accepted.
#[derive(Debug)]
pub(super) enum Decision<T> {
    /// A rule admits the peer, and a place is taken for it.
    Admitted { peer: Peer, rule: Arc<Rule<T>>, permit: Permit },
    /// The connection does not stay.
    TurnedAway(TurnedAway<T>),
}

/// Why a connection does not stay.
#[derive(Debug)]
pub(super) enum TurnedAway<T> {
    /// The kernel did not tell the peer's credentials.
    Unidentified,
    /// A deny rule matched, or no rule at all.
    Denied { peer: Peer, rule: Option<Arc<Rule<T>>> },
    /// A rule admits the peer, but a limit is reached.
    OverLimit { peer: Peer, rule: Arc<Rule<T>>, exceeded: LimitExceeded },
}

impl<T> Decision<T> {
    /// Where the connection cannot stay, whatever the policy says: a peer that a rule admits is refused for `exceeded`.
    pub(super) fn without_place(self, exceeded: LimitExceeded) -> TurnedAway<T> {
        match self {
            Self::Admitted { peer, rule, .. } => TurnedAway::OverLimit { peer, rule, exceeded },
            Self::TurnedAway(why) => why,
        }
    }
}

/// Judges a peer by a policy, from any thread. Cheap to clone; made by [`Gate::judge`](super::Gate::judge).
#[derive(Clone)]
pub struct Judge(Arc<Reserve>);

impl fmt::Debug for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Judge")
    }
}

impl Judge {
    pub(super) fn new(reserve: Arc<Reserve>) -> Self {
        Self(reserve)
    }

    /// Asks the kernel for what `policy` depends on in this peer's case, and decides. Where the process has no descriptor
    /// left to ask with, reserved ones are used.
    ///
    /// The peer may hold a pidfd afterwards, until [`Peer::close_pidfd`].
    pub fn judge<'p, T>(&self, peer: &mut Peer, socket: &impl AsFd, policy: &'p Policy<T>) -> Verdict<'p, T> {
        let mut verdict = ask(peer, socket, policy);
        if !lacks_descriptors(&verdict, peer) {
            return verdict;
        }
        let mut reserve = self.0.hold();
        for _ in 0..TRIES {
            reserve.free();
            verdict = ask(peer, socket, policy);
            let is_lacking = lacks_descriptors(&verdict, peer);
            peer.close_pidfd();
            // If this fails, the gate refills the reserve at the next accept.
            let _ = reserve.refill();
            if !is_lacking {
                break;
            }
            thread::yield_now();
        }
        verdict
    }

    /// Judges the peer of a live connection by a policy that came into force after it was admitted. Returns the rule that
    /// admits it now. The peer holds no pidfd and no list of groups afterwards.
    ///
    /// # Errors
    /// Why the policy denies it: the connection is to be revoked.
    pub fn judge_again<T>(
        &self,
        peer: &mut Peer,
        socket: &impl AsFd,
        policy: &Policy<T>,
    ) -> Result<Arc<Rule<T>>, Denial> {
        let verdict = self.judge(peer, socket, policy);
        peer.close_pidfd();
        peer.forget_groups();
        match verdict {
            Verdict::Admitted(rule) => Ok(Arc::clone(rule)),
            Verdict::Denied(rule) => Err(Denial(rule.map(|rule| rule.name().clone()))),
        }
    }
}

/// Why the policy in force denies a peer that an earlier one admitted.
#[derive(Clone, Debug)]
pub struct Denial(Option<RuleName>);

impl Denial {
    /// GATE_RULE.
    pub fn rule(&self) -> &str {
        self.0.as_ref().map_or("default", RuleName::as_str)
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(rule) => write!(f, "{rule} denies it now"),
            None => f.write_str("no rule allows it any more"),
        }
    }
}

/// Asks the kernel for what `policy` depends on in this peer's case, and nothing else: each fact costs a system call.
pub(super) fn ask<'p, T>(peer: &mut Peer, socket: &impl AsFd, policy: &'p Policy<T>) -> Verdict<'p, T> {
    let needs = policy.needs_of(peer.uid());
    if needs.groups {
        peer.load_groups(socket);
    }
    if needs.process {
        peer.open_pidfd(socket);
    }
    policy.decide(&*peer)
}

/// Whether a denial only means that there was no descriptor to ask with.
fn lacks_descriptors<T>(verdict: &Verdict<'_, T>, peer: &Peer) -> bool {
    matches!(verdict, Verdict::Denied(_)) && peer.lacked_descriptors()
}
