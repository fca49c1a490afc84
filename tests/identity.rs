//! The identity of a peer: units, namespaces, connections passed to another process, processes that have exited. Needs
//! root, for users, control groups and namespaces.

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use common::{BUSY, Client, DENIED, Echod, End, Journald, OWNER, PeerProcess, Rush, Start, needs_root, show};

const ADMIT_ALL: &str = "[allow.any]\nusers = [\"any\"]\n";

fn verifying(policy: &str) -> String {
    format!("[service]\nverify = \"line\"\n{policy}")
}

/// A control group as systemd makes it, with a slice of the test's own at the root. Removed when dropped.
struct Groups {
    root: PathBuf,
    made: Vec<PathBuf>,
    slice: String,
}

impl Groups {
    fn new() -> Self {
        needs_root();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let v1 = own.lines().any(|line| line.contains(":name=systemd:"));
        let root = if v1 { "/sys/fs/cgroup/systemd" } else { "/sys/fs/cgroup" };
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let slice = format!("echodtest{}x{next}.slice", std::process::id());
        Self { root: root.into(), made: Vec::new(), slice }
    }

    /// The file that moves a process into the group; `path` is below the test's slice.
    fn group(&mut self, path: &str) -> String {
        let mut group = self.root.clone();
        for component in [self.slice.as_str()].into_iter().chain(path.split('/')) {
            group.push(component);
            if !group.exists() {
                fs::create_dir(&group).unwrap();
                self.made.push(group.clone());
            }
        }
        group.join("cgroup.procs").to_str().unwrap().to_owned()
    }

    /// As [`group`](Self::group), but below the root, where the units of users are.
    fn group_at_root(&mut self, path: &str) -> String {
        let slice = std::mem::take(&mut self.slice);
        let mut group = self.root.clone();
        for component in path.split('/') {
            group.push(component);
            if !group.exists() {
                fs::create_dir(&group).unwrap();
                self.made.push(group.clone());
            }
        }
        self.slice = slice;
        group.join("cgroup.procs").to_str().unwrap().to_owned()
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in self.made.iter().rev() {
            // The last process may still be exiting.
            for _ in 0..1000 {
                if fs::remove_dir(group).is_ok() || !group.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}

#[track_caller]
fn is_admitted(other: &PeerProcess) -> bool {
    let client = other.client();
    let _ = client.try_send("in?\n");
    let _ = client.0.shutdown(std::net::Shutdown::Write);
    match client.rest() {
        (answer, End::Eof) if answer == b"> in?\n" => true,
        (answer, End::Eof) if answer == DENIED => false,
        (answer, end) => panic!("{} {end:?}", show(&answer)),
    }
}

/// A process in this control group connects.
fn from_group(group: &str, ids: &str, echod: &Echod) -> PeerProcess {
    PeerProcess::with(&["--cgroup", group, "--as", ids], &echod.socket())
}

fn explain(echod: &Echod, pid: u32) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_echod"))
        .args(["explain", "--pid", &pid.to_string(), "--config"])
        .arg(echod.place.path("echod.toml"))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn of_two_units_of_one_user_only_the_named_one_is_admitted() {
    let mut groups = Groups::new();
    let slice = groups.slice.clone();
    for (units, good, bad) in [
        ("good.service".to_owned(), true, false),
        ("g?od.*".to_owned(), true, false),
        ("*.service".to_owned(), true, true),
        (slice, true, true),
        ("other.service".to_owned(), false, false),
    ] {
        let echod = Start::serving(&format!("[allow.u]\nusers = [64001]\nunits = [\"{units}\"]\n")).ready();
        for (name, admitted) in [("good.service", good), ("bad.service", bad)] {
            let group = groups.group(name);
            let other = from_group(&group, "64001:64001", &echod);
            let verdict = explain(&echod, other.pid());
            assert_eq!(is_admitted(&other), admitted, "{name} by units = [{units}]");
            assert_eq!(verdict, if admitted { "admitted by allow.u" } else { "denied by default" });
            // The unit alone does not match the rule.
            assert!(!is_admitted(&from_group(&group, "64002:64002", &echod)));
        }
        assert!(!is_admitted(&PeerProcess::user(64001, &echod.socket())), "from no unit at all");
    }
}

#[test]
fn out_of_descriptors_a_peer_of_an_allowed_unit_is_refused() {
    let mut groups = Groups::new();
    let good = groups.group("good.service");
    let stranger = groups.group("other.service");
    let config = "[limits]\nconnections-per-user = 100\n[audit]\nburst = 1000\ninterval = \"1h\"\n\
                  [allow.u]\nunits = [\"good.service\"]\n";
    let echod = Start::serving(config).wrapper(&["prlimit", "--nofile=30:30"]).ready();
    let (mut inside, mut refused) = (Vec::new(), 0);
    for _ in 0..40 {
        let other = from_group(&good, "64001:64001", &echod);
        let _ = other.client().try_send("in?\n");
        match other.client().read(1).as_slice() {
            b">" => inside.push(other),
            _ => {
                let (rest, end) = other.client().rest();
                assert_eq!((show(&rest), end), (show(&BUSY[1..]), End::Eof));
                refused += 1;
            }
        }
        // For another user the answer does not depend on the unit: denied.
        from_group(&stranger, "64002:64002", &echod).client().expect_end(DENIED);
    }
    figure!("{} got in, {refused} were refused", inside.len());
    assert!(inside.len() >= 10 && refused >= 10, "{} in, {refused} refused", inside.len());
    drop(inside);
    let stderr = echod.stop();
    let denied: Vec<_> = stderr.lines().filter(|line| line.contains("no rule allows it")).collect();
    assert_eq!(denied.len(), 40, "{stderr}");
    // Also at the limit the record has every field.
    assert!(denied.iter().all(|line| line.contains(" uid 64002 ") && line.contains("in other.service")), "{stderr}");
}

#[test]
fn out_of_descriptors_a_reload_to_units_revokes_no_allowed_peer() {
    let mut groups = Groups::new();
    let good = groups.group("good.service");
    let limits = "[limits]\nconnections-per-user = 100\n";
    for policy in
        ["[allow.u]\nunits = [\"good.service\"]\n".to_owned(), format!("[deny.u]\nunits = [\"bad.*\"]\n{ADMIT_ALL}")]
    {
        let few = ["prlimit", "--nofile=40:40"];
        let echod = Start::serving(&format!("{limits}{ADMIT_ALL}")).wrapper(&few).ready();
        let alice = PeerProcess::wrapped(&[], &["--cgroup", &good, "--as", "64001:64001"], 40, &echod.socket());
        alice.connections.iter().for_each(|client| drop(client.try_send("in?\n")));
        let mut inside: Vec<_> = alice.connections.iter().filter(|client| client.read(1) == b">").collect();
        assert!((5..38).contains(&inside.len()), "{} in", inside.len());
        inside.iter().for_each(|client| client.expect(" in?\n"));
        // Leaves one descriptor, for reading the control group.
        let leaves = inside.pop().unwrap();
        leaves.half_close();
        leaves.expect_end(b"");
        echod.reload_with(&format!("{limits}{policy}"));
        inside.iter().for_each(|client| client.echo("still in"));
        // The unit was read, not assumed.
        echod.reload_with(&format!("{limits}[allow.u]\nunits = [\"bad.service\"]\n"));
        inside.iter().for_each(|client| client.expect_end(DENIED));
    }
}

#[test]
fn a_nested_control_group_named_like_a_unit_is_not_that_unit() {
    let mut groups = Groups::new();
    let echod = Start::serving("[allow.u]\nunits = [\"good.service\"]\n").ready();
    for (path, admitted) in [
        ("good.service", true),
        ("good.service/below", true),
        ("bad.service/good.service", false),
        ("bad.scope/payload/good.service", false),
        ("no-unit/good.service", false),
    ] {
        let group = groups.group(path);
        assert_eq!(is_admitted(&from_group(&group, "64001:64001", &echod)), admitted, "{path}");
    }
}

#[test]
fn a_delegated_control_group_named_like_a_slice_holds_no_unit() {
    let mut groups = Groups::new();
    let stem = groups.slice.strip_suffix(".slice").unwrap().to_owned();
    let echod = Start::serving("[allow.u]\nunits = [\"good.service\"]\n").ready();
    let deny = Start::serving(&format!("[deny.u]\nunits = [\"good.service\"]\n{ADMIT_ALL}")).ready();
    for (path, is_systems) in [
        ("system.slice/good.service", false),
        ("user.slice/user-64001.slice/user@64001.service/good.service", false),
        ("other-b.slice/good.service", false),
        ("-.slice/good.service", false),
        (&format!("{stem}-b.slice/good.service"), true),
        (&format!("{stem}-b.slice/{stem}-b-c.slice/good.service"), true),
    ] {
        let group = groups.group(path);
        let other = from_group(&group, "64001:64001", &echod);
        let verdict = explain(&echod, other.pid());
        assert_eq!(is_admitted(&other), is_systems, "{path}");
        assert_eq!(verdict, if is_systems { "admitted by allow.u" } else { "denied by default" });
        assert_eq!(is_admitted(&from_group(&group, "64001:64001", &deny)), !is_systems, "{path}");
    }
}

#[test]
fn a_unit_of_a_user_manager_matches_user_units_of_that_user() {
    let mut groups = Groups::new();
    let mail = groups.group_at_root("user.slice/user-64001.slice/user@64001.service/app.slice/mail.service");
    let system = groups.group("mail.service");
    // Only the system's mail.service is meant, whatever users the rule names.
    for users in ["", "users = [64001]\n"] {
        let systems = Start::serving(&format!("[allow.u]\n{users}units = [\"mail.service\"]\n")).ready();
        assert!(!is_admitted(&from_group(&mail, "64001:64001", &systems)));
        assert!(is_admitted(&from_group(&system, "64001:64001", &systems)));
    }
    let own = Start::serving("[allow.u]\nusers = [\"64001-64002\"]\nuser-units = [\"mail.service\"]\n").ready();
    let other = from_group(&mail, "64001:64001", &own);
    assert_eq!(explain(&own, other.pid()), "admitted by allow.u");
    assert!(is_admitted(&other));
    // A process of another user, moved into that user's unit.
    assert!(!is_admitted(&from_group(&mail, "64002:64002", &own)));
    assert!(!is_admitted(&from_group(&system, "64001:64001", &own)));
}

const BY_GROUPS: &str = "[deny.d]\nusers = [64003]\ngroups = [7]\n[allow.g]\ngroups = [4, 64009]\n";

#[test]
fn more_than_1024_groups_match_no_allow_rule_and_are_counted() {
    needs_root();
    let journald = Journald::new();
    let echod = Start::serving(BY_GROUPS).journal(&journald).ready();
    for (ids, verdict, count) in [
        ("64001:64001:4x1024", "admitted by allow.g", None),
        ("64001:64001:4x1025", "denied by default", Some("1025")),
        ("64002:64002:4x65536", "denied by default", Some("65536")),
        // The effective group is known apart from the list.
        ("64002:64009:5x65536", "admitted by allow.g", None),
        ("64003:4:8x1024", "admitted by allow.g", None),
        ("64003:4:8x65535", "denied by deny.d", Some("65535")),
    ] {
        let other = PeerProcess::with(&["--as", ids], &echod.socket());
        assert_eq!(explain(&echod, other.pid()), verdict, "{ids}");
        assert_eq!(is_admitted(&other), verdict.starts_with("admitted"), "{ids}");
        let Some(count) = count else { continue };
        let said = format!(" ({count} supplementary groups, of which none can be told; at most 1024 can)");
        let entry = journald.wait_for("the denial", |entry| entry["MESSAGE"].ends_with(&said));
        assert_eq!(entry.get("PEER_GROUPS"), None, "{ids}");
    }
}

#[test]
fn an_admitted_peer_costs_no_memory_for_its_groups() {
    needs_root();
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1000\n{BY_GROUPS}")).ready();
    for ids in ["64001:64009:100000-165535", "64002:64009:100000-101023", "64004:4"] {
        let before = common::memory(&echod, "VmRSS");
        let other = PeerProcess::wrapped(&[], &["--as", ids, "--say", "x\\n"], 400, &echod.socket());
        other.connections.iter().for_each(|client| client.expect("> x\n"));
        let grown = common::memory(&echod, "VmRSS").saturating_sub(before);
        figure!("{grown} KiB for 400 connections of {ids}");
        assert!(grown < 1500, "{grown} KiB for 400 connections of {ids}");
    }
}

/// Measures a connection, a line and its echo while two such processes keep the backlog full. More rounds: make flood.
#[test]
fn a_flood_of_peers_with_many_groups_stops_no_other_client() {
    needs_root();
    const ROUNDS: usize = 3;
    let visits = common::setting("ECHOD_TEST_VISITS", 2);
    let echod = Start::serving(&format!("[allow.g]\ngroups = [64009]\n{OWNER}")).ready();
    let floods = [
        ("no flood", None),
        ("a flood without groups", Some("64002:64002")),
        ("a flood with 32 groups", Some("64002:64002:100000-100031")),
        ("a flood with 65,536 groups", Some("64002:64002:4x65536")),
    ];
    let mut times = floods.map(|_| Vec::new());
    // In turn, so that the load of the machine is the same for each.
    for _ in 0..ROUNDS {
        for ((_, ids), times) in floods.iter().zip(&mut times) {
            let _flood = ids.map(|ids| [(); 2].map(|()| Rush::begin(&["--as", ids], &echod.socket())));
            times.extend((0..visits).map(|_| {
                let begun = Instant::now();
                echod.connect().echo("hello");
                begun.elapsed()
            }));
        }
    }
    for ((flood, _), times) in floods.iter().zip(&mut times) {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        figure!("beside {flood}: connection, line and echo in {:?} (p50), {:?} (p99)", at(50), at(99));
    }
    echod.stop();
}

#[test]
fn a_deny_rule_by_unit_denies_that_unit_and_peers_without_one() {
    let mut groups = Groups::new();
    let echod = Start::serving(&format!("[deny.u]\nunits = [\"bad.service\"]\n{ADMIT_ALL}")).ready();
    let (good, bad) = (groups.group("good.service"), groups.group("bad.service"));
    assert!(is_admitted(&from_group(&good, "64001:64001", &echod)));
    assert!(!is_admitted(&from_group(&bad, "64001:64001", &echod)));
    assert!(!is_admitted(&PeerProcess::user(64001, &echod.socket())), "no unit can be told: it might be that one");
}

#[test]
fn the_record_of_a_denial_names_the_unit() {
    let mut groups = Groups::new();
    let journald = Journald::new();
    let echod = Start::serving(OWNER).journal(&journald).ready();
    let bad = groups.group("bad.service");
    let other = PeerProcess::with(&["--cgroup", &bad, "--comm", "nc", "--as", "64001:64001"], &echod.socket());
    other.client().expect_end(DENIED);
    let entry = journald.wait_for("the denial", |entry| entry.contains_key("PEER_UNIT"));
    assert_eq!(entry["PEER_UNIT"], "bad.service");
    assert_eq!(
        entry["MESSAGE"],
        format!("Denied uid 64001 gid 64001 pid {} (nc) in bad.service: no rule allows it", other.pid())
    );
}

#[test]
fn a_peer_that_moves_to_another_unit_keeps_its_unit_at_connect() {
    let mut groups = Groups::new();
    let policy = "[allow.u]\nunits = [\"good.service\"]\n";
    let echod = Start::serving(policy).ready();
    let (good, bad) = (groups.group("good.service"), groups.group("bad.service"));
    let other = from_group(&good, "64001:64001", &echod);
    other.client().echo("in");
    fs::write(&bad, other.pid().to_string()).unwrap();
    echod.reload_with(policy);
    other.client().echo("still in");
    echod.reload_with("[allow.u]\nunits = [\"bad.service\"]\n");
    other.client().expect_end(DENIED);
}

#[test]
fn a_peers_unit_survives_a_restart_after_its_process_ended() {
    let mut groups = Groups::new();
    let manager = std::sync::Arc::new(common::Manager::new());
    manager.received.change(|received| received.capacity = 10);
    let start = Start::serving("[allow.u]\nunits = [\"good.service\"]\n").env("FDSTORE", "10");
    let echod = start.ready_with(manager);
    let good = groups.group("good.service");
    let other = from_group(&good, "64001:64001", &echod);
    other.client().echo("in");
    let clients = other.end();
    let echod = echod.restart(|start, _| start);
    clients[0].echo("still in");
    drop(echod);
}

#[test]
fn a_peer_that_exited_before_accept_has_ids_and_no_unit() {
    needs_root();
    let mut groups = Groups::new();
    for (policy, admitted) in [
        ("[allow.a]\nusers = [64001]\n", true),
        ("[allow.a]\nusers = [64001]\nunits = [\"*\"]\n", false),
        ("[deny.d]\nunits = [\"other.service\"]\n[allow.a]\nusers = [64001]\n", false),
    ] {
        let start = Start::serving(policy);
        let good = groups.group("good.service");
        let socket = start.place().path("socket");
        let other = PeerProcess::with(&["--cgroup", &good, "--as", "64001:64001", "--gone"], &socket);
        let client = other.end().pop().unwrap();
        let _ = client.try_send("in?\n");
        let _ = client.0.shutdown(std::net::Shutdown::Write);
        let echod = start.ready();
        client.expect_end(if admitted { b"> in?\n" } else { DENIED });
        let stderr = echod.stop();
        assert!(!stderr.contains("(peer)"), "the name of a process that is gone: {stderr}");
    }
}

#[test]
fn a_connection_passed_to_another_user_is_cut_off_with_a_record() {
    needs_root();
    let journald = Journald::new();
    let echod = Start::serving(&verifying("[allow.alice]\nusers = [64001]\n")).journal(&journald).ready();
    let alice = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    alice.client().expect("> mine\n");
    // The test, which runs as root, has the connection now.
    alice.client().send("not hers\n");
    alice.client().expect_end(DENIED);
    let entry = journald.wait_for("revoked", |entry| entry.get("GATE_VERDICT").is_some_and(|it| it == "revoked"));
    let field = |name: &str| entry.get(name).map_or("(absent)", String::as_str);
    assert_eq!(field("MESSAGE_ID"), "765ab08f733d46e1a5b6850cc41b9003");
    assert_eq!((field("GATE_REASON"), field("GATE_RULE")), ("sender", "allow.alice"));
    assert_eq!((field("PEER_UID"), field("GATE_LINES"), field("GATE_BYTES")), ("64001", "1", "5"));
    assert!(field("MESSAGE").ends_with(": its data came from another user (uid 0)"), "{}", field("MESSAGE"));
}

#[test]
fn a_peer_that_changes_its_user_is_cut_off_at_the_first_byte() {
    needs_root();
    let echod = Start::serving(&verifying("[allow.root]\nusers = [0]\n")).ready();
    let other =
        PeerProcess::with(&["--say", "as root\\n", "--then", "64001", "--say-after", "as another\\n"], &echod.socket());
    other.client().expect_end([b"> as root\n", DENIED].concat());
    let stderr = echod.stop();
    assert!(stderr.contains("its data came from another user (uid 64001)"), "{stderr}");
}

#[test]
fn without_verify_a_passed_connection_keeps_its_peer() {
    needs_root();
    let echod = Start::serving("[allow.alice]\nusers = [64001]\n").ready();
    let alice = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    alice.client().expect("> mine\n");
    alice.client().echo("handed over");
}

#[test]
fn verify_cuts_off_no_peer_that_keeps_its_user() {
    needs_root();
    let echod = Start::serving(&verifying(ADMIT_ALL)).ready();
    let client = echod.connect();
    for number in 0..100 {
        client.echo(&format!("line {number}"));
    }
    client.send("a fragment");
    client.half_close();
    client.expect_end("> a fragment");
    let bob = PeerProcess::with(&["--as", "64002:64002", "--say", "one\\ntwo\\nfragment"], &echod.socket());
    bob.client().expect("> one\n> two\n");
    bob.client().half_close();
    bob.client().expect_end("> fragment");
}

#[test]
fn data_sent_before_accept_is_verified_too() {
    needs_root();
    let start = Start::serving(&verifying("[allow.alice]\nusers = [64001]\n"));
    let socket = start.place().path("socket");
    let alice = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &socket);
    let other = PeerProcess::with(&["--as", "64001:64001"], &socket);
    other.client().send("not hers\n");
    let echod = start.ready();
    alice.client().expect("> mine\n");
    other.client().expect_end(DENIED);
    drop(echod);
}

/// From Linux 6.16 on, a connection made before the listener had SO_PASSCRED gets it only after accept(2). strace(1)
/// delays that call, so that data arrives in between.
#[test]
fn data_without_credentials_is_not_taken_for_another_users() {
    needs_root();
    let start = Start::serving(&verifying(ADMIT_ALL));
    let socket = start.place().path("socket");
    let client = Client::connect(&socket);
    let delay = ["trace=setsockopt", "inject=setsockopt:delay_enter=400000"];
    let start = start.traced("/dev/null".as_ref(), &delay);
    let echod = std::thread::scope(|scope| {
        scope.spawn(|| {
            common::eventually("accepted", || is_accepted(&socket).then_some(()));
            client.send("between\n");
        });
        start.ready()
    });
    client.expect("> between\n");
    client.echo("after");
    let mut stranger = Command::new("echo");
    stranger.arg("not theirs").uid(64001).gid(64001).stdout(common::duplicate(&client.0));
    assert!(stranger.status().unwrap().success());
    client.expect_end(DENIED);
    let stderr = echod.stop();
    assert!(stderr.contains("its data came from another user (uid 64001)"), "{stderr}");
}

/// Whether a connection at this socket has been accepted: in /proc/net/unix one that waits in the backlog has no inode.
fn is_accepted(socket: &Path) -> bool {
    fs::read_to_string("/proc/net/unix").unwrap().lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields[..], [_, _, _, _, _, "03", inode, path] if inode != "0" && Path::new(path) == socket)
    })
}

#[test]
fn verify_continues_over_a_restart_and_begins_with_a_reload() {
    needs_root();
    let policy = "[allow.alice]\nusers = [64001]\n";
    let manager = std::sync::Arc::new(common::Manager::new());
    manager.received.change(|received| received.capacity = 10);
    let echod = Start::serving(policy).env("FDSTORE", "10").ready_with(manager);
    echod.reload_with(&verifying(policy));
    let alice = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    alice.client().expect("> mine\n");
    let echod = echod.restart(|start, _| start);
    alice.client().send("not hers\n");
    alice.client().expect_end(DENIED);
    drop(echod);
}

/// The number of unread bytes on this end.
fn unread(client: &Client) -> usize {
    rustix::io::ioctl_fionread(&client.0).unwrap() as usize
}

/// Sends lines until the socket takes no more, without reading. Returns what was sent.
fn pile_up(client: &Client) -> Vec<u8> {
    let line = b"not hers\n";
    client.0.set_nonblocking(true).unwrap();
    let (mut sent, mut stalls) = (0, 0);
    while stalls < 20 {
        match std::io::Write::write(&mut &client.0, &line[sent % line.len()..]) {
            Ok(count) => (sent, stalls) = (sent + count, 0),
            Err(_) => {
                stalls += 1;
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
        }
    }
    client.0.set_nonblocking(false).unwrap();
    line.iter().copied().cycle().take(sent).collect()
}

#[test]
fn a_reload_to_verify_echoes_no_byte_received_before_it() {
    needs_root();
    let policy = "[allow.alice]\nusers = [64001]\n";
    let journald = Journald::new();
    let echod = Start::serving(policy).journal(&journald).ready();
    let alice = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    alice.client().expect("> mine\n");
    pile_up(alice.client());
    echod.reload_with(&verifying(policy));
    let echoed_before = unread(alice.client());
    let (all, end) = alice.client().rest();
    assert_eq!(end, End::Eof);
    assert!(all.ends_with(DENIED), "{}", show(&all[all.len() - 40..]));
    assert!(all.len() <= echoed_before + DENIED.len(), "{} after {echoed_before}", all.len());
    let entry = journald.wait_for("revoked", |entry| entry.get("GATE_VERDICT").is_some_and(|it| it == "revoked"));
    assert_eq!((entry["GATE_REASON"].as_str(), entry["PEER_UID"].as_str()), ("sender", "64001"));
    assert!(entry["MESSAGE"].ends_with(": its data came without credentials"), "{}", entry["MESSAGE"]);
}

#[test]
fn a_reload_to_verify_cuts_off_a_line_begun_before_it() {
    needs_root();
    let policy = "[allow.alice]\nusers = [64001]\n";
    let echod = Start::serving(policy).ready();
    let alice = PeerProcess::with(&["--as", "64001:64001"], &echod.socket());
    alice.client().send("not hers\nnor th");
    alice.client().expect("> not hers\n");
    let idle = PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    idle.client().expect("> mine\n");
    echod.reload_with(&verifying(policy));
    alice.client().expect_end(DENIED);
    // No other connection was cut off yet; the next data on it is checked.
    idle.client().send("not hers\n");
    idle.client().expect_end(DENIED);
    let stderr = echod.stop();
    assert!(stderr.contains("its data came without credentials"), "{stderr}");
    assert!(stderr.contains("its data came from another user (uid 0)"), "{stderr}");
}

#[test]
fn a_restart_to_verify_cuts_off_bytes_without_credentials() {
    needs_root();
    let policy = "[allow.alice]\nusers = [64001]\n";
    let manager = std::sync::Arc::new(common::Manager::new());
    manager.received.change(|received| received.capacity = 10);
    let echod = Start::serving(policy).env("FDSTORE", "10").ready_with(manager);
    let [held, clogged, queued, idle] =
        [(); 4].map(|()| PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket()));
    for other in [&held, &clogged, &queued, &idle] {
        other.client().expect("> mine\n");
    }
    held.client().send("not hers\nnor th");
    held.client().expect("> not hers\n");
    pile_up(clogged.client());
    let echod = echod.restart(|start, _| {
        queued.client().send("not hers\n");
        start.place().file("echod.toml", &verifying(policy));
        start
    });
    held.client().expect_end(DENIED);
    queued.client().expect_end(DENIED);
    let echoed_before = unread(clogged.client());
    let (all, end) = clogged.client().rest();
    assert!(end == End::Eof && all.ends_with(DENIED) && all.len() <= echoed_before + DENIED.len(), "{end:?}");
    idle.client().send("not hers\n");
    idle.client().expect_end(DENIED);
    let stderr = echod.stop();
    assert_eq!(stderr.matches("its data came without credentials").count(), 3, "{stderr}");
}

#[test]
fn a_set_uid_peer_connects_as_effective_and_sends_as_real_user() {
    needs_root();
    let root_only = "[allow.root]\nusers = [0]\n";
    for (config, answer) in [(root_only.to_owned(), &b"> hello\n"[..]), (verifying(root_only), DENIED)] {
        let echod = Start::serving(&config).ready();
        let other = PeerProcess::with(&["--real", "64001", "--say", "hello\\n"], &echod.socket());
        other.client().half_close();
        other.client().expect_end(answer);
    }
}

/// A copy of the helper program that every user may run.
fn helper_for_all(place: &Path) -> PathBuf {
    let copy = place.join("peer");
    common::copy_program(common::peer_program(), &copy);
    copy
}

#[test]
fn root_of_a_user_namespace_is_the_user_outside() {
    needs_root();
    let echod = Start::serving("[allow.root]\nusers = [0]\n[allow.bob]\nusers = [64002]\n").ready();
    let helper = helper_for_all(&echod.place.path(""));
    for (uid, admitted) in [("64001", false), ("64002", true)] {
        // Inside the namespace both are uid 0.
        let wrapper = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "unshare", "-U", "-r"];
        let other = PeerProcess::of_program(&helper, &wrapper, &[], 1, &echod.socket());
        assert_eq!(is_admitted(&other), admitted, "{uid}");
    }
}

#[test]
fn a_peer_in_an_unmapped_user_namespace_keeps_its_user() {
    needs_root();
    let echod = Start::serving("[allow.bob]\nusers = [64002]\n").ready();
    let helper = helper_for_all(&echod.place.path(""));
    for (uid, admitted) in [("64001", false), ("64002", true)] {
        // Inside the namespace both are uid 65534.
        let wrapper = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "unshare", "-U"];
        let other = PeerProcess::of_program(&helper, &wrapper, &[], 1, &echod.socket());
        assert_eq!(is_admitted(&other), admitted, "{uid}");
    }
}

#[test]
fn in_a_namespace_that_maps_only_root_other_peers_are_denied() {
    needs_root();
    let policy = "[allow.any]\nusers = [\"any\"]\n[allow.groups]\ngroups = [\"any\"]\n[allow.range]\nusers = [\"0-4294967294\"]\n";
    let echod = Start::serving(policy).wrapper(&["unshare", "-U", "-r"]).ready();
    echod.connect().echo("root is mapped");
    for ids in ["64001:64001", "64002:0", "64003:0:64003"] {
        assert!(!is_admitted(&PeerProcess::with(&["--as", ids], &echod.socket())), "{ids}");
    }
    // Root with an unmapped group: the uid is known and decides.
    assert!(is_admitted(&PeerProcess::with(&["--as", "0:64001:64002"], &echod.socket())));
    let stderr = echod.stop();
    assert!(stderr.contains("this user namespace maps 1 user ids and 1 group ids"), "{stderr}");
    assert!(stderr.contains("Denied unmapped (uid 65534)"), "{stderr}");
}

#[test]
fn a_deny_rule_matches_an_unmapped_user() {
    needs_root();
    let policy = "[deny.x]\nusers = [64001]\n[allow.root]\nusers = [0]\n[allow.g]\ngroups = [0]\n";
    let echod = Start::serving(policy).wrapper(&["unshare", "-U", "-r"]).ready();
    assert!(!is_admitted(&PeerProcess::with(&["--as", "64002:0"], &echod.socket())));
    echod.connect().echo("root is known not to be");
    let stderr = echod.stop();
    assert!(stderr.contains("deny.x denies it"), "{stderr}");
}

#[test]
fn check_warns_when_this_namespace_leaves_users_unmapped() {
    needs_root();
    let place = common::Place::new();
    let config = place.file("echod.toml", ADMIT_ALL);
    let output = Command::new("unshare")
        .args(["-U", "-r", env!("CARGO_BIN_EXE_echod"), "check", "--config"])
        .arg(config)
        .output()
        .unwrap();
    let all = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(all.contains("this user namespace maps 1 user ids"), "{all}");
}

#[test]
fn in_another_pid_namespace_a_peer_has_no_pid_and_no_unit() {
    let mut groups = Groups::new();
    let inner = ["unshare", "--pid", "--fork", "--kill-child"];
    let by_uid = Start::serving("[allow.a]\nusers = [64001]\n").wrapper(&inner).ready();
    assert!(is_admitted(&PeerProcess::user(64001, &by_uid.socket())));
    PeerProcess::user(64002, &by_uid.socket()).client().expect_end(DENIED);
    by_uid.wait_for_stderr("Denied uid 64002 gid 64002: no rule allows it\n");

    let by_unit = Start::serving("[allow.a]\nusers = [64001]\nunits = [\"*\"]\n").wrapper(&inner).ready();
    let good = groups.group("good.service");
    assert!(!is_admitted(&from_group(&good, "64001:64001", &by_unit)));
}

#[test]
fn a_peer_in_a_pid_namespace_has_its_pid_in_our_namespace() {
    needs_root();
    let echod = Start::serving(OWNER).ready();
    // In its own namespace it is process 1.
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child"];
    let other = PeerProcess::wrapped(&wrapper, &["--as", "64001:64001"], 1, &echod.socket());
    other.client().expect_end(DENIED);
    let children = format!("/proc/{0}/task/{0}/children", other.pid());
    let pid = fs::read_to_string(children).unwrap();
    echod.wait_for_stderr(&format!("Denied uid 64001 gid 64001 pid {} (peer): no rule allows it\n", pid.trim()));
}

#[test]
fn a_reused_pid_gives_a_peer_neither_unit_nor_name() {
    let mut groups = Groups::new();
    let (good, bad) = (groups.group("good.service"), groups.group("bad.service"));
    let start = Start::serving("[allow.u]\nunits = [\"good.service\"]\n");
    let socket = start.place().path("socket");
    // In a pid namespace where no other process takes numbers: a process connects from bad.service and exits, and the
    // next process with the same pid runs in good.service. Only then the service starts and accepts.
    let script = "mount -t proc proc /proc
        \"$0\" --cgroup \"$2\" --as 64001:64001 connect \"$3\" </dev/null 2>/dev/null &
        pid=$!
        wait $pid
        echo $((pid - 1)) >/proc/sys/kernel/ns_last_pid
        sh -c 'echo 0 >\"$0\"; exec sleep 1000' \"$1\" </dev/null >/dev/null 2>&1 &
        test $! = $pid || { echo \"no luck with the numbers\" >&2; exit 99; }
        until grep -q good.service /proc/$pid/cgroup && grep -q sleep /proc/$pid/comm; do :; done
        shift 3
        exec \"$@\"";
    let peer = common::peer_program();
    let words =
        ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private", "sh", "-c", script];
    let given = [peer.to_str().unwrap(), &good, &bad, socket.to_str().unwrap()];
    let echod = start.wrapper(&words).wrapper(&given).ready();
    echod.wait_for_stderr("Denied uid 64001 ");
    let stderr = echod.stderr();
    let line = stderr.lines().find(|line| line.contains("Denied uid 64001")).unwrap();
    assert!(!line.contains("good.service") && !line.contains("sleep"), "{line}");
}

#[test]
fn with_hidepid_units_and_names_are_unknown_and_it_fails_closed() {
    let mut groups = Groups::new();
    let good = groups.group("good.service");
    let script = "mount -t proc -o hidepid=2 proc /proc && exec \"$@\"";
    let hidden = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"];
    let policy = "[allow.unit]\nusers = [64002]\nunits = [\"good.service\"]\n[allow.alice]\nusers = [64003]\n";
    let echod = Start::serving(policy).wrapper(&hidden).run_as("64001:64001").ready();
    assert!(!is_admitted(&from_group(&good, "64002:64002", &echod)));
    assert!(is_admitted(&from_group(&good, "64003:64003", &echod)), "ids need no /proc");
    let stderr = echod.stop();
    assert!(stderr.contains("Denied uid 64002 gid 64002 pid "), "{stderr}");
    assert!(!stderr.contains("good.service"), "{stderr}");
}

#[test]
fn explain_of_a_missing_process_says_so() {
    needs_root();
    let place = common::Place::new();
    let config = place.file("echod.toml", OWNER);
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    for pid in [gone.id().to_string(), "0".into(), "-5".into()] {
        let output = Command::new(env!("CARGO_BIN_EXE_echod"))
            .args(["explain", &format!("--pid={pid}"), "--config"])
            .arg(&config)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(71), "{pid}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout.is_empty());
    }
}
