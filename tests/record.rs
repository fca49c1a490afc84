//! The records: each field of each entry as the journal receives it, and what is summed up. Needs root, for a mount
//! namespace in which the test's own journal is the system's.

mod common;

use std::fs;
use std::thread;
use std::time::Duration;

use common::records::{DENIALS, LONG, be_denied, denials, expect_flood, get, serve, with_verdict};
use common::{ALICE, BOB, BUSY, DENIED, DENY_ALL, Entry, Journald, PeerProcess, Start, TOO_LONG, flood, needs_root};
use nix::sys::signal::Signal;

const DENIED_ID: &str = "72261db9963c465c8c6121daadeb1cbc";
const REFUSED_ID: &str = "a45920b1da8c42cb8c4acbd02e5140bf";
const SUMMARY_ID: &str = "e00fb3280d1140dca1192a4f029b14b6";
const ADMITTED_ID: &str = "fb07ecd99a40415abb029457009dd51a";
const CLOSED_ID: &str = "9aa9a5f08d08409e9e656c48f20bf4f8";
const LOADED_ID: &str = "b07bc66e288e48eba96896e38dfe1144";
const REFUSED_CONFIG_ID: &str = "00e1479225c6488a9e2fed748c43c786";
const LINE_ID: &str = "b4a1cf2d2f5c4b0f9d0f5ab96f3f1c27";
const LINES_ID: &str = "a32225cea0b74f40a0009c977477f105";
const REVOKED_ID: &str = "765ab08f733d46e1a5b6850cc41b9003";

/// Of the contract's fields the entry has exactly these, with these values.
#[track_caller]
fn expect_fields(entry: &Entry, expected: &[(&str, &str)]) {
    let ours = |name: &str| {
        name.starts_with("GATE_")
            || name.starts_with("PEER_")
            || ["MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER"].contains(&name)
    };
    let found: Vec<(&str, &str)> =
        entry.iter().filter(|(name, _)| ours(name)).map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut expected = expected.to_vec();
    expected.push(("SYSLOG_IDENTIFIER", "echod"));
    expected.sort_unstable();
    assert_eq!(found, expected, "in {entry:#?}");
}

#[test]
fn the_record_of_a_denial_names_peer_socket_and_reason() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, common::OWNER);
    let socket = echod.socket();
    assert!(!journald.entries().iter().any(with_verdict("denied")), "a denial is recorded already");
    let alice = PeerProcess::with(&["--comm", "stranger", "--as", "64001:64002:64003,64004"], &socket);
    alice.client().expect_end(DENIED);
    let entry = journald.wait_for("the denial", with_verdict("denied"));
    let pid = alice.pid().to_string();
    expect_fields(
        &entry,
        &[
            ("MESSAGE", &format!("Denied uid 64001 gid 64002 pid {pid} (stranger): no rule allows it")),
            ("MESSAGE_ID", DENIED_ID),
            ("PRIORITY", "4"),
            ("GATE_VERDICT", "denied"),
            ("GATE_CONNECTION", "1"),
            ("GATE_REASON", "policy"),
            ("GATE_RULE", "default"),
            ("GATE_SOCKET", socket.to_str().unwrap()),
            ("PEER_UID", "64001"),
            ("PEER_GID", "64002"),
            ("PEER_GROUPS", "64002,64003,64004"),
            ("PEER_PID", &pid),
            ("PEER_COMM", "stranger"),
        ],
    );
}

#[test]
fn a_denial_by_a_rule_names_the_rule_and_the_user() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, "[deny.contractors]\nusers = [\"backup\"]\n");
    let backup = PeerProcess::with(&["--comm", "tar", "--as", "34:34"], &echod.socket());
    backup.client().expect_end(DENIED);
    let entry = journald.wait_for("the denial", with_verdict("denied"));
    assert_eq!(get(&entry, "GATE_RULE"), "deny.contractors");
    assert_eq!(get(&entry, "PEER_USER"), "backup");
    assert_eq!(
        get(&entry, "MESSAGE"),
        format!("Denied backup (uid 34) gid 34 pid {} (tar): deny.contractors denies it", backup.pid())
    );
}

#[test]
fn a_refusal_names_the_limit() {
    needs_root();
    let journald = Journald::new();
    let policy = "[limits]\nconnections = 3\nconnections-per-user = 2\n[allow.all]\nusers = [\"any\"]\n";
    let echod = serve(&journald, policy);
    let alice = PeerProcess::wrapped(&[], &["--as", "64001:64001"], 3, &echod.socket());
    alice.connections[2].expect_end(BUSY);
    let entry = journald.wait_for("the user's limit", with_verdict("refused"));
    let pid = alice.pid().to_string();
    let socket = echod.socket();
    let common_fields = [
        ("MESSAGE_ID", REFUSED_ID),
        ("PRIORITY", "4"),
        ("GATE_VERDICT", "refused"),
        ("GATE_RULE", "allow.all"),
        ("GATE_SOCKET", socket.to_str().unwrap()),
    ];
    let message = format!("Refused uid 64001 gid 64001 pid {pid} (peer): too many connections of this user");
    let own = [
        ("MESSAGE", message.as_str()),
        ("GATE_REASON", "user-limit"),
        ("GATE_CONNECTION", "3"),
        ("PEER_UID", "64001"),
        ("PEER_GID", "64001"),
        ("PEER_GROUPS", "64001"),
        ("PEER_PID", &pid),
        ("PEER_COMM", "peer"),
    ];
    expect_fields(&entry, &[&common_fields[..], &own].concat());

    let bob = PeerProcess::wrapped(&[], &["--as", "64002:64002"], 2, &echod.socket());
    bob.connections[1].expect_end(BUSY);
    let entry = journald.wait_for("the limit for all", |entry| get(entry, "GATE_REASON") == "total-limit");
    assert_eq!((get(&entry, "PEER_UID"), get(&entry, "GATE_VERDICT")), ("64002", "refused"));
}

#[test]
fn a_line_too_long_is_recorded_as_a_refusal() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("[limits]\nline-length = 10\n{}", common::OWNER));
    let client = echod.connect();
    client.send("12345678901");
    client.expect_end(TOO_LONG);
    let entry = journald.wait_for("the refusal", with_verdict("refused"));
    assert_eq!(get(&entry, "GATE_REASON"), "line-length");
    assert_eq!(get(&entry, "GATE_CONNECTION"), "1");
    assert_eq!(get(&entry, "MESSAGE_ID"), REFUSED_ID);
    assert_eq!(get(&entry, "PEER_UID"), "0");
}

#[test]
fn by_default_admitted_connections_leave_no_record() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, common::OWNER);
    let client = echod.connect();
    client.echo("nobody's business");
    client.half_close();
    client.expect_end(b"");
    echod.stop();
    for entry in journald.entries() {
        assert!(!entry.contains_key("GATE_VERDICT"), "{entry:#?}");
        assert!(!entry.values().any(|value| value.contains("nobody's business")));
    }
}

#[test]
fn admitted_and_closed_records_describe_the_whole_connection() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, "[audit]\nrecord = \"connections\"\n[allow.listed]\nusers = [64001]\n");
    let socket = echod.socket();
    let alice = PeerProcess::with(&["--comm", "talker", "--as", "64001:64001:64005"], &socket);
    let pid = alice.pid().to_string();
    alice.client().send("one\ntwo\nthr");
    alice.client().half_close();
    alice.client().expect_end("> one\n> two\n> thr");
    let entry = journald.wait_for("admitted", with_verdict("admitted"));
    expect_fields(
        &entry,
        &[
            ("MESSAGE", &format!("Admitted uid 64001 gid 64001 pid {pid} (talker) by allow.listed")),
            ("MESSAGE_ID", ADMITTED_ID),
            ("PRIORITY", "6"),
            ("GATE_VERDICT", "admitted"),
            ("GATE_RULE", "allow.listed"),
            ("GATE_SOCKET", socket.to_str().unwrap()),
            ("GATE_CONNECTION", "1"),
            ("PEER_UID", "64001"),
            ("PEER_GID", "64001"),
            ("PEER_GROUPS", "64001,64005"),
            ("PEER_PID", &pid),
            ("PEER_COMM", "talker"),
        ],
    );
    let entry = journald.wait_for("closed", with_verdict("closed"));
    let message = get(&entry, "MESSAGE").to_owned();
    let duration = get(&entry, "GATE_DURATION_USEC").to_owned();
    assert!(message.starts_with(&format!("Closed uid 64001 gid 64001 pid {pid}: 3 lines, 11 bytes in ")), "{message}");
    assert!(duration.parse::<u64>().is_ok(), "{duration}");
    expect_fields(
        &entry,
        &[
            ("MESSAGE", &message),
            ("MESSAGE_ID", CLOSED_ID),
            ("PRIORITY", "6"),
            ("GATE_VERDICT", "closed"),
            ("GATE_RULE", "allow.listed"),
            ("GATE_SOCKET", socket.to_str().unwrap()),
            ("GATE_CONNECTION", "1"),
            ("GATE_LINES", "3"),
            ("GATE_BYTES", "11"),
            ("GATE_DURATION_USEC", &duration),
            ("PEER_UID", "64001"),
            ("PEER_GID", "64001"),
            ("PEER_PID", &pid),
        ],
    );
}

#[test]
fn each_closed_record_gives_the_reason() {
    needs_root();
    let journald = Journald::new();
    let config = |more: &str| format!("[limits]\nline-length = 10\n[audit]\nrecord = \"connections\"\n{more}");
    let echod = serve(&journald, &config(common::OWNER));
    let long = echod.connect();
    long.send("12345678901");
    long.expect_end(TOO_LONG);
    let last = echod.connect();
    last.echo("stay");
    echod.stop();
    last.expect_end(b"");
    let reason = |connection: &str| {
        let entries = journald.entries();
        let entry = entries
            .iter()
            .find(|entry| get(entry, "GATE_VERDICT") == "closed" && get(entry, "GATE_CONNECTION") == connection);
        get(entry.expect("a closed record"), "GATE_REASON").to_owned()
    };
    assert_eq!(reason("1"), "line-length");
    assert_eq!(reason("2"), "stopping");
}

#[test]
fn a_line_is_recorded_by_its_length_and_never_its_content() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("[audit]\nrecord = \"lines\"\n{}", common::OWNER));
    let client = echod.connect();
    for line in ["secret one", "", "a longer secret three"] {
        client.echo(line);
    }
    client.send("secret end");
    client.half_close();
    client.expect_end("> secret end");
    journald.wait_for("closed", with_verdict("closed"));
    let entries = journald.entries();
    let lengths: Vec<&str> = entries
        .iter()
        .filter(|entry| get(entry, "MESSAGE").starts_with("Line of "))
        .map(|entry| {
            assert_eq!((get(entry, "GATE_CONNECTION"), get(entry, "PRIORITY")), ("1", "6"));
            get(entry, "GATE_BYTES")
        })
        .collect();
    assert_eq!(lengths, ["11", "1", "22", "10"]);
    assert!(!entries.iter().flat_map(Entry::values).any(|value| value.contains("secret")));
}

#[test]
fn beyond_the_burst_the_lines_of_a_user_are_counted_and_denials_are_not_among_them() {
    needs_root();
    let journald = Journald::new();
    let echod =
        serve(&journald, &format!("[audit]\nrecord = \"lines\"\nburst = 3\ninterval = \"1h\"\n{}", common::OWNER));
    let client = echod.connect();
    let stream = b"\n".repeat(60_000);
    std::thread::scope(|scope| {
        scope.spawn(|| client.send(&stream));
        client.expect(b"> \n".repeat(60_000));
    });
    expect_flood(flood(ALICE, 5, &echod.socket()), 5);
    drop(client);
    echod.stop();
    let entries = journald.entries();
    let of = |id| entries.iter().filter(|entry| get(entry, "MESSAGE_ID") == id).cloned().collect::<Vec<_>>();
    assert_eq!(of(LINE_ID).len(), 3);
    let [summary] = &of(LINES_ID)[..] else { panic!("not one summary in {entries:#?}") };
    let message = get(summary, "MESSAGE");
    assert!(message.starts_with("Lines of root (uid 0): 59997 more in "), "{message}");
    // Without GATE_VERDICT: it stands for no denial.
    expect_fields(
        summary,
        &[
            ("MESSAGE", message),
            ("MESSAGE_ID", LINES_ID),
            ("PRIORITY", "6"),
            ("GATE_REASON", "lines"),
            ("GATE_COUNT", "59997"),
            ("GATE_BYTES", "59997"),
            ("GATE_DURATION_USEC", get(summary, "GATE_DURATION_USEC")),
            ("PEER_UID", "0"),
            ("PEER_USER", "root"),
        ],
    );
    assert_eq!(denials(&entries), 5);
}

#[test]
fn configurations_loaded_reloaded_and_refused_are_recorded() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, common::OWNER);
    let path = echod.place.path("echod.toml");
    let entry = journald.wait_for("loaded", |entry| get(entry, "MESSAGE_ID") == LOADED_ID);
    expect_fields(
        &entry,
        &[
            ("MESSAGE", &format!("Configuration in force: {}, 1 rule", path.display())),
            ("MESSAGE_ID", LOADED_ID),
            ("PRIORITY", "5"),
        ],
    );
    echod.place.file("echod.toml", "[allow.x]\nuser = [0]\n");
    assert_eq!(echod.reload().0, 78);
    let entry = journald.wait_for("refused", |entry| get(entry, "MESSAGE_ID") == REFUSED_CONFIG_ID);
    let message = get(&entry, "MESSAGE").to_owned();
    assert!(message.contains(&format!("{}:2:", path.display())), "{message}");
    expect_fields(&entry, &[("MESSAGE", &message), ("MESSAGE_ID", REFUSED_CONFIG_ID), ("PRIORITY", "3")]);

    echod.reload_with("[allow.x]\nusers = [0]\n[deny.y]\nusers = [1]\n");
    let message = format!("Configuration reloaded: {}, 2 rules", path.display());
    journald.wait_for("reloaded", |entry| get(entry, "MESSAGE") == message);
}

#[test]
fn a_revoked_connection_is_recorded_with_the_denying_rule() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, "[allow.all]\nusers = [\"any\"]\n");
    let socket = echod.socket();
    let alice = PeerProcess::with(&["--comm", "talker", "--as", "64001:64001"], &socket);
    let bob = PeerProcess::with(&["--comm", "other", "--as", "64002:64002"], &socket);
    alice.client().echo("hello");
    bob.client().echo("hello");
    echod.reload_with("[deny.alice]\nusers = [64001]\n[allow.all]\nusers = [64001]\n");
    alice.client().expect_end(DENIED);
    bob.client().expect_end(DENIED);
    let of = |uid: u32| {
        let uid = uid.to_string();
        journald
            .wait_for("revoked", move |entry| get(entry, "GATE_VERDICT") == "revoked" && get(entry, "PEER_UID") == uid)
    };
    let pid = alice.pid().to_string();
    expect_fields(
        &of(ALICE),
        &[
            ("MESSAGE", &format!("Revoked uid 64001 gid 64001 pid {pid} (talker): deny.alice denies it now")),
            ("MESSAGE_ID", REVOKED_ID),
            ("PRIORITY", "4"),
            ("GATE_VERDICT", "revoked"),
            ("GATE_REASON", "policy"),
            ("GATE_RULE", "deny.alice"),
            ("GATE_SOCKET", socket.to_str().unwrap()),
            ("GATE_CONNECTION", "1"),
            ("GATE_LINES", "1"),
            ("GATE_BYTES", "6"),
            ("PEER_UID", "64001"),
            ("PEER_GID", "64001"),
            ("PEER_GROUPS", "64001"),
            ("PEER_PID", &pid),
            ("PEER_COMM", "talker"),
        ],
    );
    assert_eq!(get(&of(BOB), "GATE_RULE"), "default");
}

#[test]
fn beyond_the_burst_denials_are_summed_up_at_the_stop() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 5\n{}", DENY_ALL));
    be_denied(&echod, 100);
    let flood = flood(ALICE, 50, &echod.socket());
    expect_flood(flood, 50);
    echod.stop();
    let entries = journald.entries();
    let of = |uid: &str| entries.iter().filter(|entry| get(entry, "PEER_UID") == uid).cloned().collect::<Vec<_>>();
    assert_eq!(of("0").iter().filter(|entry| with_verdict("denied")(entry)).count(), 5);
    assert_eq!(of("64001").iter().filter(|entry| with_verdict("denied")(entry)).count(), 5);
    assert_eq!((denials(&of("0")), denials(&of("64001"))), (100, 50));
    let summaries: Vec<_> = entries.iter().filter(|entry| with_verdict("summary")(entry)).collect();
    assert_eq!(summaries.len(), 2);
    let root = summaries.iter().find(|entry| get(entry, "PEER_UID") == "0").unwrap();
    let (message, duration) = (get(root, "MESSAGE").to_owned(), get(root, "GATE_DURATION_USEC").to_owned());
    assert!(message.starts_with("Denied root (uid 0) 95 more times in "), "{message}");
    expect_fields(
        root,
        &[
            ("MESSAGE", &message),
            ("MESSAGE_ID", SUMMARY_ID),
            ("PRIORITY", "4"),
            ("GATE_VERDICT", "summary"),
            ("GATE_REASON", "policy"),
            ("GATE_COUNT", "95"),
            ("GATE_DURATION_USEC", &duration),
            ("PEER_UID", "0"),
            ("PEER_USER", "root"),
        ],
    );
}

/// When journald reads a record, it looks up the unit and the program of the process that sent it.
#[test]
fn a_process_does_not_end_before_the_journal_has_read_its_records() {
    let journald = Journald::new();
    let echod = Start::serving(DENY_ALL).journal(&journald).ready();
    journald.stop_reading();
    echod.connect().expect_end(DENIED);
    echod.signal(Signal::SIGTERM);
    echod.manager.wait_for("STOPPING=1", 1);
    let program = format!("/proc/{}/exe", echod.pid());
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(10));
        assert!(fs::read_link(&program).is_ok(), "it has ended, and its last records are unread");
    }
    journald.go_on();
    echod.stop();
    assert_eq!(denials(&journald.entries()), 1);
}

#[test]
fn each_interval_ends_with_a_summary_and_has_its_own_burst() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("[audit]\ninterval = \"200ms\"\nburst = 3\n{}", DENY_ALL));
    be_denied(&echod, 50);
    journald.wait_for_sum("denied", DENIALS, 50);
    assert_eq!(denials(&journald.entries()), 50);
    // An interval has ended by now; wait until the next one has begun.
    let mut more = 50;
    common::eventually("a record in full again", || {
        let before = journald.entries().iter().filter(|entry| with_verdict("denied")(entry)).count();
        be_denied(&echod, 1);
        more += 1;
        journald.wait_for_sum("denied", DENIALS, more);
        let after = journald.entries().iter().filter(|entry| with_verdict("denied")(entry)).count();
        (after > before).then_some(())
    });
    echod.stop();
    assert_eq!(denials(&journald.entries()), more);
}

#[test]
fn a_reload_writes_the_summaries_of_the_old_settings() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 1\n{}", DENY_ALL));
    be_denied(&echod, 20);
    echod.reload_with(&format!("{LONG}burst = 100\n{}", DENY_ALL));
    journald.wait_for_sum("denied", DENIALS, 20);
    be_denied(&echod, 20);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 40);
}

#[test]
fn a_reload_to_a_shorter_interval_takes_effect_immediately() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 0\n{}", DENY_ALL));
    be_denied(&echod, 20);
    echod.reload_with(&format!("[audit]\ninterval = \"20ms\"\nburst = 0\n{}", DENY_ALL));
    be_denied(&echod, 20);
    // Before a stop.
    journald.wait_for_sum("denied", DENIALS, 40);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 40);
}

#[test]
fn with_a_burst_of_0_a_denial_is_summed_up_at_the_intervals_end() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("[audit]\ninterval = \"20ms\"\nburst = 0\n{}", DENY_ALL));
    for times in 1..=3 {
        be_denied(&echod, 1);
        // Before a stop, whether or not the writer has just been awake.
        journald.wait_for_sum("denied", DENIALS, times);
    }
    echod.stop();
    assert_eq!(denials(&journald.entries()), 3);
}

#[test]
fn a_burst_of_0_leaves_only_summaries_and_a_huge_one_none() {
    needs_root();
    for (burst, records) in [(0, 0), (1_000_000, 300)] {
        let journald = Journald::new();
        let echod = serve(&journald, &format!("{LONG}burst = {burst}\n{}", DENY_ALL));
        be_denied(&echod, 300);
        echod.stop();
        let entries = journald.entries();
        assert_eq!(entries.iter().filter(|entry| with_verdict("denied")(entry)).count(), records);
        assert_eq!(denials(&entries), 300);
    }
}

#[test]
fn a_record_lists_64_groups_and_their_number() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, "[allow.listed]\ngroups = [1023]\n[audit]\nrecord = \"connections\"\n");
    let said = |count: u32| format!(" (the first 64 of {count} supplementary groups are in the record)");
    for (groups, count, last, is_in) in
        [("1-64", 64, 64, false), ("1-65", 65, 64, false), ("1-1022,5", 1023, 64, false), ("1-1023", 1023, 64, true)]
    {
        let other = PeerProcess::with(&["--as", &format!("64001:64001:{groups}")], &echod.socket());
        if is_in {
            other.client().echo("I am in");
        } else {
            other.client().expect_end(DENIED);
        }
        let pid = other.pid().to_string();
        let entry = journald.wait_for("the record", |entry| entry.get("PEER_PID") == Some(&pid));
        // The effective group first.
        let expected: Vec<String> = std::iter::once(64_001).chain(1..=last).map(|gid| gid.to_string()).collect();
        assert_eq!(get(&entry, "PEER_GROUPS"), expected.join(","));
        assert_eq!(get(&entry, "MESSAGE").ends_with(&said(count)), count > 64, "{}", get(&entry, "MESSAGE"));
    }
}

#[test]
fn a_name_with_newline_or_escape_forges_no_field_and_no_line() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, common::OWNER);
    let comm = "a\\n\\e[2JGATE=b";
    let forger = PeerProcess::with(&["--comm", comm, "--as", "64001:64001"], &echod.socket());
    forger.client().expect_end(DENIED);
    let entry = journald.wait_for("the denial", with_verdict("denied"));
    assert_eq!(get(&entry, "PEER_COMM"), "a\\n\\u{1b}[2JGATE=b");
    assert!(!entry.contains_key("GATE"));
    let message = get(&entry, "MESSAGE");
    assert!(!message.contains(['\n', '\u{1b}']) && message.contains("(a\\n\\u{1b}[2JGATE=b)"), "{message:?}");
    drop(echod);

    // The same on standard error.
    let echod = Start::serving(common::OWNER).ready();
    let forger = PeerProcess::with(&["--comm", comm, "--as", "64001:64001"], &echod.socket());
    forger.client().expect_end(DENIED);
    let stderr = echod.stop();
    assert!(!stderr.contains('\u{1b}') && stderr.contains("(a\\n\\u{1b}[2JGATE=b)"), "{stderr:?}");
}

#[test]
fn connection_numbers_are_unique_over_sockets_and_workers() {
    needs_root();
    let journald = Journald::new();
    let config = format!("[audit]\nrecord = \"connections\"\n[service]\nworkers = 3\n{}", common::OWNER);
    let echod = serve(&journald, &config);
    for _ in 0..30 {
        let client = echod.connect();
        client.half_close();
        client.expect_end(b"");
    }
    echod.stop();
    let entries = journald.entries();
    let mut numbers: Vec<u64> = entries
        .iter()
        .filter(|entry| with_verdict("closed")(entry))
        .map(|entry| get(entry, "GATE_CONNECTION").parse().unwrap())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=30).collect::<Vec<u64>>());
}
