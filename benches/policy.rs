//! What a decision costs. The claim: it does not grow with the number of rules that name neither the uid nor a gid of
//! the peer, so 100 and 10,000 rules cost the same. A single rule about a user is cheaper. As soon as one rule depends
//! on groups, each of the peer's groups is looked up, so this step grows with their number. Run by
//! `cargo bench --bench policy`.
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use divan::{Bencher, black_box};
use peergate::ids::{Gid, Uid};
use peergate::policy::{Accounts, Group, Policy, Rule, SubordinateRange, User};
use peergate::unit::Units;
use peergate::{Audit, Gate, Setup, Subject, activation};

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

/// As many owners of subordinate ids, of whom the policy denies every second one, and one group of which they are members.
fn with_subordinate_ids(owners: u32) -> Policy<()> {
    let ranges =
        (0..owners).map(|n| SubordinateRange::new(Uid::new(10_000 + n), 100_000 + n * 65_536, 165_535 + n * 65_536));
    let users = (0..owners).map(|n| Uid::new(10_000 + n));
    let members = users.clone().step_by(2).collect();
    let accounts = Accounts::new(ranges, users, [(Gid::new(50), members)]);
    let rules = [
        Rule::deny("group").groups([Group::Id(Gid::new(50))]),
        Rule::deny("user").users([User::Id(Uid::new(65_000))]),
        Rule::allow("owner", ()).users([User::Id(Uid::new(9_999))]),
    ];
    let policy = Policy::new(rules, Uid::new(0)).expect("the rules are well formed");
    policy.with_accounts(accounts).expect("the rules are well formed")
}

const OWNERS: [u32; 2] = [0, 10_000];

/// The decision about a peer of its own uid, and the question whose uid it is.
#[divan::bench(args = OWNERS)]
fn denied_among_owners_of_subordinate_ids(bencher: Bencher, owners: u32) {
    let (policy, peer) = (with_subordinate_ids(owners), peer(2000, [2000, 27, 44]));
    assert!(!policy.decide(&peer).is_admitted());
    bencher.bench_local(|| (policy.decide(black_box(&peer)).is_admitted(), policy.owner_of(black_box(peer.uid))));
}

/// A gate with so many owners of subordinate ids, which turns away whoever runs the bench, and its address.
struct Denying {
    gate: Gate<()>,
    path: PathBuf,
}

impl Denying {
    fn new(owners: u32) -> Self {
        let path = std::env::temp_dir().join(format!("policy-bench-{}-{owners}.sock", std::process::id()));
        let listener = activation::bind(&path).expect("a socket in the temporary directory");
        let audit = Audit::default();
        let setup = Setup::new(vec![listener], with_subordinate_ids(owners), audit).expect("there is a listener");
        Self { gate: Gate::new(setup).expect("there are descriptors left"), path }
    }

    /// So many denied connections, both ends on this thread: connect, judged by the gate, message read, closed.
    fn deny(&mut self, connections: u32) -> Duration {
        let begin = Instant::now();
        for _ in 0..connections {
            let mut client = UnixStream::connect(&self.path).expect("the gate listens");
            let mut admitted = Vec::new();
            self.gate.turn(Some(Duration::ZERO), &mut admitted);
            let length = client.read(&mut [0; 64]).expect("a message");
            assert!(admitted.is_empty() && length > 0, "denied");
            drop(client);
            self.gate.turn(Some(Duration::ZERO), &mut admitted);
        }
        begin.elapsed()
    }
}

/// What 10,000 ranges of subordinate ids cost a whole denied connection. The claim: nothing that shows. Two gates take turns of
/// a millisecond or so, so that what else the machine does touches both alike.
fn compare_denied_connections(rounds: usize) {
    const CONNECTIONS: u32 = 50;
    let [mut none, mut many] = OWNERS.map(Denying::new);
    let mut ratios: Vec<f64> = (0..rounds)
        .map(|round| {
            let (with, without);
            if round % 2 == 0 {
                (without, with) = (none.deny(CONNECTIONS), many.deny(CONNECTIONS));
            } else {
                (with, without) = (many.deny(CONNECTIONS), none.deny(CONNECTIONS));
            }
            with.as_secs_f64() / without.as_secs_f64()
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let at = |part: f64| ratios[(ratios.len() as f64 * part) as usize];
    println!(
        "a denied connection with 10,000 ranges of subordinate ids: {:.3} of one without (median of {rounds} pairs; \
         quartiles {:.3} and {:.3})",
        at(0.5),
        at(0.25),
        at(0.75)
    );
}

fn main() {
    divan::main();
    // Without this argument cargo runs a bench as a test: each part once.
    let is_measured = std::env::args().any(|argument| argument == "--bench");
    compare_denied_connections(if is_measured { 2000 } else { 2 });
}
