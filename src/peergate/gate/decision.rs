//! Asking the kernel about a peer and deciding by the policy: once for a connection just accepted, after a reload and after a
//! restart.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use super::reserve::Reserve;
use crate::peer::Peer;
use crate::permits::{LimitExceeded, Permit};
use crate::policy::{Policy, Rule, Verdict};

/// How often a question is repeated with reserved descriptors: another thread may take what was freed for it.
const TRIES: usize = 100;

/// What the gate decided about a connection that it accepted.
#[derive(Debug)]
pub(super) enum Decision<T> {
    /// The kernel did not tell the peer's credentials.
    Unidentified,
    /// A deny rule matched, or no rule at all.
    Denied { peer: Peer, rule: Option<Arc<Rule<T>>> },
    /// A rule admits the peer, but a limit is reached.
    OverLimit { peer: Peer, rule: Arc<Rule<T>>, exceeded: LimitExceeded },
    /// A rule admits the peer, and a place is taken for it.
    Admitted { peer: Peer, rule: Arc<Rule<T>>, permit: Permit },
}

/// Judges a peer by a policy, from any thread. Cheap to clone; made by [`Gate::judge`](super::Gate::judge).
#[derive(Clone)]
pub struct Judge(Arc<Reserve>);

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
