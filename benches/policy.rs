//! What a decision costs. The claim: it does not grow with the number of rules that name neither the uid nor a gid of
//! the peer, so 100 and 10,000 rules cost the same. A single rule about a user is cheaper. As soon as one rule depends
//! on groups, each of the peer's groups is looked up, so this step grows with their number. Run by
//! `cargo bench --bench policy`.
use divan::{Bencher, black_box};
use peergate::Subject;
use peergate::ids::{Gid, Uid};
use peergate::policy::{Group, Policy, Rule, User};
use peergate::unit::Units;

const SIZES: [u32; 3] = [1, 100, 10_000];

/// A uid and its groups, far from what [`policy`] fills up with.
struct Peer {
    uid: Uid,
    gids: Vec<Gid>,
}

impl Subject for Peer {
    fn uid(&self) -> Uid {
        self.uid
    }
    fn gids(&self) -> &[Gid] {
        &self.gids
    }
    fn gids_complete(&self) -> bool {
        true
    }
    fn units(&self) -> Option<&Units> {
        None
    }
}

fn peer(uid: u32, gids: impl IntoIterator<Item = u32>) -> Peer {
    Peer { uid: Uid::new(uid), gids: gids.into_iter().map(Gid::new).collect() }
}

/// `rules` rules. The last one admits uid 1000. Each rule before it names one user or one group, in turn allow and
/// deny.
fn policy(rules: u32) -> Policy<()> {
    let others = (1..rules).map(|n| {
        let id = 100_000 + n;
        let rule = if n % 2 == 0 { Rule::allow(&format!("r{n}"), ()) } else { Rule::deny(&format!("r{n}")) };
        if n % 3 == 0 { rule.groups([Group::Id(Gid::new(id))]) } else { rule.users([User::Id(Uid::new(id))]) }
    });
    let owner = Rule::allow("owner", ()).users([User::Id(Uid::new(1000))]);
    Policy::new(others.chain([owner]), Uid::new(0)).expect("the rules are well formed")
}

#[divan::bench(args = SIZES)]
fn admitted_by_the_last_rule(bencher: Bencher, rules: u32) {
    let (policy, peer) = (policy(rules), peer(1000, [1000, 27, 44]));
    assert!(policy.decide(&peer).is_admitted());
    bencher.bench_local(|| policy.decide(black_box(&peer)).is_admitted());
}

#[divan::bench(args = SIZES)]
fn denied_by_default(bencher: Bencher, rules: u32) {
    let (policy, peer) = (policy(rules), peer(2000, [2000, 27, 44]));
    assert!(!policy.decide(&peer).is_admitted());
    bencher.bench_local(|| policy.decide(black_box(&peer)).is_admitted());
}

/// A member of as many groups as a directory service may hand out.
#[divan::bench(args = SIZES)]
fn denied_by_default_in_200_groups(bencher: Bencher, rules: u32) {
    let (policy, peer) = (policy(rules), peer(2000, 50_000..50_200));
    assert!(!policy.decide(&peer).is_admitted());
    bencher.bench_local(|| policy.decide(black_box(&peer)).is_admitted());
}

fn main() {
    divan::main();
}
