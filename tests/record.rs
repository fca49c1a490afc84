//! The record: each field of each entry, as the journal receives it, and the equation
//!
//! > denials that clients saw = records of verdict *denied* + the counts of summaries
//!
//! while the journal reads, does not read, vanishes and comes back. Needs root, for a mount namespace in which the
//! test's own journal is the system's.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    ALICE, BOB, BUSY, DENIED, Echod, Entry, Journald, PeerProcess, Start, TOO_LONG, flood, needs_root, stands_for,
};
use nix::sys::signal::Signal;

const DENIED_ID: &str = "72261db9963c465c8c6121daadeb1cbc";
const REFUSED_ID: &str = "a45920b1da8c42cb8c4acbd02e5140bf";
const SUMMARY_ID: &str = "e00fb3280d1140dca1192a4f029b14b6";
const ADMITTED_ID: &str = "fb07ecd99a40415abb029457009dd51a";
const CLOSED_ID: &str = "9aa9a5f08d08409e9e656c48f20bf4f8";
const LOADED_ID: &str = "b07bc66e288e48eba96896e38dfe1144";
const REFUSED_CONFIG_ID: &str = "00e1479225c6488a9e2fed748c43c786";
const REVOKED_ID: &str = "765ab08f733d46e1a5b6850cc41b9003";

/// The reasons of summaries that count denials.
const DENIALS: &[&str] = &["policy", "no-credentials"];

/// An interval that does not end during a test: summaries are due only at a stop or a reload.
const LONG: &str = "[audit]\ninterval = \"1h\"\n";

fn get<'e>(entry: &'e Entry, field: &str) -> &'e str {
    entry.get(field).map_or("(absent)", String::as_str)
}

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

fn serve(journald: &Journald, config: &str) -> Echod {
    Start::serving(config).journal(journald).ready()
}

fn with_verdict(verdict: &str) -> impl Fn(&Entry) -> bool {
    move |entry| entry.get("GATE_VERDICT").is_some_and(|found| found == verdict)
}

fn denials(entries: &[Entry]) -> u64 {
    stands_for(entries, "denied", DENIALS)
}

/// Connects so many times and expects to be denied each time.
#[track_caller]
fn be_denied(echod: &Echod, times: usize) {
    for _ in 0..times {
        echod.connect().expect_end(DENIED);
    }
}

/// Expects that a process of [`flood`] got exactly the message of a denial each time.
#[track_caller]
fn expect_flood(process: std::process::Child, times: usize) {
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{times} Unauthorized access\\n\n"));
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
    let echod = serve(&journald, &format!("{LONG}burst = 5\n{}", common::DENY_ALL));
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

#[test]
fn each_interval_ends_with_a_summary_and_has_its_own_burst() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("[audit]\ninterval = \"200ms\"\nburst = 3\n{}", common::DENY_ALL));
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
    let echod = serve(&journald, &format!("{LONG}burst = 1\n{}", common::DENY_ALL));
    be_denied(&echod, 20);
    echod.reload_with(&format!("{LONG}burst = 100\n{}", common::DENY_ALL));
    journald.wait_for_sum("denied", DENIALS, 20);
    be_denied(&echod, 20);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 40);
}

#[test]
fn a_reload_to_a_shorter_interval_takes_effect_immediately() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 0\n{}", common::DENY_ALL));
    be_denied(&echod, 20);
    echod.reload_with(&format!("[audit]\ninterval = \"20ms\"\nburst = 0\n{}", common::DENY_ALL));
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
    let echod = serve(&journald, &format!("[audit]\ninterval = \"20ms\"\nburst = 0\n{}", common::DENY_ALL));
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
        let echod = serve(&journald, &format!("{LONG}burst = {burst}\n{}", common::DENY_ALL));
        be_denied(&echod, 300);
        echod.stop();
        let entries = journald.entries();
        assert_eq!(entries.iter().filter(|entry| with_verdict("denied")(entry)).count(), records);
        assert_eq!(denials(&entries), 300);
    }
}

#[test]
fn refusals_have_an_equation_of_their_own() {
    needs_root();
    let journald = Journald::new();
    let config = format!("{LONG}burst = 2\n[limits]\nconnections-per-user = 1\nline-length = 10\n{}", common::OWNER);
    let echod = serve(&journald, &config);
    let inside = echod.connect();
    inside.echo("in");
    for _ in 0..10 {
        echod.connect().expect_end(BUSY);
    }
    inside.half_close();
    inside.expect_end(b"");
    for _ in 0..7 {
        let client = echod.connect();
        client.send("12345678901");
        client.expect_end(TOO_LONG);
    }
    echod.stop();
    let entries = journald.entries();
    let counted = |reason: &str| -> u64 {
        let own: Vec<_> = entries.iter().filter(|entry| get(entry, "GATE_REASON") == reason).cloned().collect();
        stands_for(&own, "refused", &[reason])
    };
    assert_eq!((counted("user-limit"), counted("line-length")), (10, 7));
    assert_eq!(denials(&entries), 0, "a refusal is no denial");
}

/// Several users flood at once while `trouble` changes the journal; then the program stops. Returns all entries after
/// checking the equation.
#[track_caller]
fn flood_with_trouble(journald: &Journald, config: &str, trouble: impl FnOnce(&Echod)) -> Vec<Entry> {
    const TIMES: usize = 1500;
    let echod = serve(journald, config);
    let floods: Vec<_> = [ALICE, BOB, 64003].map(|uid| flood(uid, TIMES, &echod.socket())).into();
    trouble(&echod);
    for process in floods {
        expect_flood(process, TIMES);
    }
    be_denied(&echod, 10);
    echod.stop();
    let entries = journald.entries();
    assert_eq!(denials(&entries), 3 * TIMES as u64 + 10);
    entries
}

#[test]
fn the_equation_holds_in_a_flood_of_several_users() {
    needs_root();
    let journald = Journald::new();
    flood_with_trouble(&journald, &format!("{LONG}{}", common::DENY_ALL), |_| {});
}

#[test]
fn the_equation_holds_when_every_denial_is_written() {
    needs_root();
    let journald = Journald::new();
    flood_with_trouble(&journald, &format!("{LONG}burst = 1000000\n{}", common::DENY_ALL), |_| {});
}

#[test]
fn a_journal_that_does_not_read_stops_no_client_and_loses_nothing() {
    needs_root();
    let journald = Journald::new();
    let config = "[audit]\nburst = 1000000\ninterval = \"100ms\"\n[allow.root]\nusers = [0]\n\
                  [deny.x]\nusers = [\"64001-64010\"]\n";
    let echod = serve(&journald, config);
    journald.stop_reading();
    expect_flood(flood(ALICE, 6000, &echod.socket()), 6000);
    let client = echod.connect();
    client.echo("the journal sleeps, we do not");
    assert!(denials(&journald.entries()) < 6000, "the journal had read it all: nothing was tested");
    journald.go_on();
    journald.wait_for_sum("denied", DENIALS, 6000);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 6000);
}

#[test]
fn no_record_is_lost_when_the_journal_reads_again_during_the_stop() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 1000000\n{}", common::DENY_ALL));
    journald.stop_reading();
    expect_flood(flood(ALICE, 3000, &echod.socket()), 3000);
    echod.signal(Signal::SIGTERM);
    echod.manager.wait_for("STOPPING=1", 1);
    journald.go_on();
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    assert_eq!(denials(&journald.entries()), 3000, "{stderr}");
}

#[test]
fn no_record_is_lost_when_the_journal_restarts_in_a_flood() {
    needs_root();
    let journald = Journald::new();
    let config = format!("[audit]\nburst = 1000000\ninterval = \"50ms\"\n{}", common::DENY_ALL);
    flood_with_trouble(&journald, &config, |_| {
        for _ in 0..5 {
            journald.wait_for("some denial", with_verdict("denied"));
            journald.vanish();
            journald.start();
        }
    });
}

#[test]
fn a_journal_that_returns_gets_a_summary_of_what_it_missed() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 1000000\n{}", common::DENY_ALL));
    be_denied(&echod, 1);
    journald.wait_for("the first", with_verdict("denied"));
    journald.vanish();
    be_denied(&echod, 40);
    echod.wait_for_stderr("no rule allows it");
    // When the forty-first line is there, the last of them has been written as text.
    common::eventually("all of them as text", || (echod.stderr().matches("Denied root").count() >= 40).then_some(()));
    journald.start();
    be_denied(&echod, 1);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 42);
}

#[test]
fn a_record_goes_to_stderr_once_and_to_the_journal_once() {
    needs_root();
    for comes_back in [false, true] {
        let journald = Journald::new();
        let echod = serve(&journald, &format!("[audit]\ninterval = \"50ms\"\n{}", common::DENY_ALL));
        be_denied(&echod, 1);
        journald.wait_for("the first", with_verdict("denied"));
        journald.vanish();
        be_denied(&echod, 40);
        common::eventually("all of them as text", || (denials_in_text(&echod.stderr()) >= 40).then_some(()));
        if comes_back {
            journald.start();
            // The program looks for the journal also when no peer connects.
            journald.wait_for_sum("denied", DENIALS, 41);
        }
        let stderr = echod.stop();
        assert_eq!(denials_in_text(&stderr), 40, "{stderr}");
        assert_eq!(denials(&journald.entries()), if comes_back { 41 } else { 1 });
    }
}

/// The number of denials in the text.
fn denials_in_text(stderr: &str) -> usize {
    stderr.matches(": no rule allows it").count() + common::summed(stderr)
}

/// Waits until the process exits, which may take longer than other waits.
fn end_without_journal(echod: Echod) -> String {
    let manager = std::sync::Arc::clone(&echod.manager);
    echod.signal(Signal::SIGTERM);
    // It asks for more time every second, and gives up after a minute.
    manager.wait_for("EXTEND_TIMEOUT_USEC=10000000", 40);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{status}: {stderr}");
    stderr
}

#[test]
fn records_a_stuck_journal_refuses_go_to_stderr_at_the_stop() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 100\n{}", common::DENY_ALL));
    be_denied(&echod, 1);
    journald.wait_for("the first", with_verdict("denied"));
    journald.stop_reading();
    expect_flood(flood(ALICE, 300, &echod.socket()), 300);
    expect_flood(flood(BOB, 5, &echod.socket()), 5);
    let stderr = end_without_journal(echod);
    journald.go_on();
    let in_journal = common::eventually("what it had been sent before", || {
        let taken = denials(&journald.entries()) as usize;
        (taken + denials_in_text(&stderr) >= 306).then_some(taken)
    });
    figure!("306 denied, {in_journal} in the journal, {} on standard error", denials_in_text(&stderr));
    assert_eq!(in_journal + denials_in_text(&stderr), 306, "{stderr}");
    assert!(in_journal < 101, "the journal had taken it all: nothing was tested");
}

#[test]
fn a_user_database_that_never_answers_loses_no_record() {
    needs_root();
    let place = common::Place::new();
    let echod = Start::serving(&format!("{LONG}burst = 10\n{}", common::DENY_ALL))
        .wrapper(&common::hung_user_database(&place))
        .ready();
    be_denied(&echod, 30);
    let stderr = end_without_journal(echod);
    assert_eq!(denials_in_text(&stderr), 30, "{stderr}");
}

#[test]
fn an_idle_exit_does_not_wait_for_the_journal() {
    needs_root();
    let journald = Journald::new();
    let config = "[audit]\nburst = 1000\n[deny.alice]\nusers = [64001]\n[allow.root]\nusers = [0]\n\
                  [service]\nidle-exit = \"100ms\"\n";
    // At first it does not exit: a client is connected.
    let echod = serve(&journald, config);
    let stays = echod.connect();
    journald.stop_reading();
    expect_flood(flood(ALICE, 100, &echod.socket()), 100);
    drop(stays);
    // A few times as long as another service takes to become idle.
    for _ in 0..5 {
        assert!(Start::serving(config).ready().wait().0.success());
    }
    echod.connect().echo("still here");
    assert_eq!(echod.manager.received.lock().count("STOPPING=1"), 0);
    journald.go_on();
    assert!(echod.wait().0.success(), "it exits once everything is written");
    assert_eq!(denials(&journald.entries()), 100);
}

#[test]
fn intervals_end_while_the_journal_does_not_read() {
    needs_root();
    let journald = Journald::new();
    let interval = "[audit]\ninterval = \"50ms\"\nburst = 2\n";
    let echod = serve(&journald, &format!("{interval}{}", common::DENY_ALL));
    be_denied(&echod, 1);
    journald.wait_for("the first", with_verdict("denied"));
    journald.stop_reading();
    let other = journald.sender();
    other.set_nonblocking(true).unwrap();
    while other.send(b"MESSAGE=somebody else\n").is_ok() {}
    const ROUNDS: usize = 8;
    for _ in 0..ROUNDS {
        be_denied(&echod, 5);
        // For longer than an interval.
        let clock = Start::serving(&format!("[service]\nidle-exit = \"100ms\"\n{}", common::OWNER));
        assert!(clock.ready().wait().0.success());
    }
    journald.go_on();
    echod.stop();
    let entries = journald.entries();
    assert_eq!(denials(&entries), 1 + 5 * ROUNDS as u64);
    let in_full = entries.iter().filter(|entry| with_verdict("denied")(entry)).count();
    // All except in the first interval, which may also hold earlier denials.
    assert!(in_full >= 2 * (ROUNDS - 1), "{in_full} in full, where there were {ROUNDS} intervals at least");
}

#[test]
fn out_of_descriptors_a_record_still_reaches_the_journal() {
    needs_root();
    let journald = Journald::new();
    let policy = format!("[limits]\nconnections-per-user = 100\n{}", common::OWNER);
    let echod = Start::serving(&format!("{LONG}burst = 1000000\n{policy}"))
        .journal(&journald)
        .wrapper(&["prlimit", "--nofile=30:30"])
        .ready();
    // One after the other, until no descriptor is left.
    let mut inside = Vec::new();
    for _ in 0..40 {
        let client = echod.connect();
        let _ = client.try_send("in?\n");
        if client.read(1) == b">" {
            inside.push(client);
        }
    }
    assert!((5..35).contains(&inside.len()), "{} got in", inside.len());
    // More than the queue of the journal's socket takes.
    expect_flood(flood(ALICE, 400, &echod.socket()), 400);
    let stderr = echod.stop();
    assert_eq!(denials(&journald.entries()), 400);
    assert!(!stderr.contains("no rule allows it"), "{stderr}");
}

#[test]
fn out_of_descriptors_a_record_that_needs_a_memfd_is_counted() {
    needs_root();
    let journald = Journald::new();
    let policy = format!("[limits]\nconnections-per-user = 100\n{}", common::OWNER);
    let echod = Start::serving(&format!("{LONG}burst = 1000000\n{policy}"))
        .journal(&journald)
        .wrapper(&["prlimit", "--nofile=30:30"])
        .ready();
    let inside: Vec<_> = (0..40).map(|_| echod.connect()).collect();
    let in_there = inside.iter().filter(|client| client.try_send("in?\n").is_ok() && client.read(1) == b">").count();
    assert!((5..35).contains(&in_there), "{in_there} got in");
    let rich = PeerProcess::wrapped(&[], &["--as", "64001:64001:100000-165535"], 10, &echod.socket());
    rich.connections.iter().for_each(|client| client.expect_end(DENIED));
    // When this record is there, the earlier ones have been tried; at the stop there are descriptors again.
    PeerProcess::user(BOB, &echod.socket()).client().expect_end(DENIED);
    journald.wait_for("the small one", |entry| get(entry, "PEER_UID") == "64002");
    echod.stop();
    assert_eq!(denials(&journald.entries()), 11);
}

#[test]
fn without_a_journal_the_equation_holds_on_standard_error() {
    let echod = Start::serving(&format!("{LONG}burst = 4\n{}", common::DENY_ALL)).ready();
    be_denied(&echod, 30);
    let stderr = echod.stop();
    let records = stderr.lines().filter(|line| line.contains(": no rule allows it")).count();
    assert_eq!(records, 4, "{stderr}");
    let summary = stderr.lines().find(|line| line.contains(" more times in ")).expect("a summary");
    assert!(summary.contains(" 26 more times in ") && summary.starts_with("echod: warning: Denied"), "{summary}");
}

#[test]
fn the_equation_is_exact_after_sigterm_during_a_flood() {
    needs_root();
    for _ in 0..5 {
        let journald = Journald::new();
        let echod = serve(&journald, &format!("{LONG}burst = 7\n{}", common::DENY_ALL));
        let place = echod.place.clone();
        let floods: Vec<_> = [ALICE, BOB].map(|uid| flood(uid, 800, &echod.socket())).into();
        journald.wait_for("the flood", with_verdict("denied"));
        // The manager keeps the listener, as systemd does: the next process answers the connections in the backlog.
        let next = echod.restart(|start, _| start.journal(&journald));
        for process in floods {
            expect_flood(process, 800);
        }
        next.stop();
        assert_eq!(denials(&journald.entries()), 1600);
        drop(place);
    }
}

#[test]
fn thousands_of_denials_at_full_speed_are_all_recorded() {
    needs_root();
    // With a million: make flood
    let each = common::setting("ECHOD_TEST_DENIALS", 20_000) / 4;
    let journald = Journald::new();
    let echod = serve(&journald, "[audit]\ninterval = \"1s\"\n[allow.root]\nusers = [0]\n");
    let client = echod.connect();
    let ask = || {
        let asked = Instant::now();
        client.echo("how long does this take?");
        asked.elapsed()
    };
    let mut quiet: Vec<Duration> = (0..2000).map(|_| ask()).collect();

    let begun = Instant::now();
    let floods = [ALICE, BOB, 64003, 64004].map(|uid| flood(uid, each, &echod.socket()));
    let (mut flooded, ended) = thread::scope(|scope| {
        let floods = scope.spawn(|| floods.map(|process| expect_flood(process, each)));
        let mut flooded = Vec::new();
        while !floods.is_finished() {
            flooded.push(ask());
        }
        floods.join().unwrap();
        (flooded, begun.elapsed())
    });
    let peak = common::memory(&echod, "VmHWM");
    echod.stop();

    let (entries, tried) = (journald.entries(), 4 * each as u64);
    let count = |verdict: &str| entries.iter().filter(|entry| with_verdict(verdict)(entry)).count();
    let told = denials(&entries);
    figure!(
        "tried {tried}, denied {tried}, in {ended:.1?}; records {}, in {} summaries {}; difference {}",
        count("denied"),
        count("summary"),
        told - count("denied") as u64,
        i128::from(tried) - i128::from(told),
    );
    figure!(
        "peak memory {peak} KiB; an admitted client's p50 and p99: quiet {:?} and {:?}, in the flood {:?} and {:?} of {}",
        percentile(&mut quiet, 50),
        percentile(&mut quiet, 99),
        percentile(&mut flooded, 50),
        percentile(&mut flooded, 99),
        flooded.len(),
    );
    assert_eq!(told, tried);
    assert!(peak < 32 * 1024, "{peak} KiB");
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

#[test]
fn the_equation_holds_with_every_trouble_at_once() {
    needs_root();
    // With a million: make flood
    let each = common::setting("ECHOD_TEST_DENIALS", 20_000) / 4;
    let journald = Journald::new();
    let config = format!("[audit]\ninterval = \"50ms\"\nburst = 100\n{}", common::DENY_ALL);
    let echod = serve(&journald, &config);
    let socket = echod.socket();
    let floods = [ALICE, BOB, 64003].map(|uid| flood(uid, each, &socket));
    let next = thread::scope(|scope| {
        // These clients close before the message, and are denied all the same.
        scope.spawn(|| (0..each).for_each(|_| drop(common::Client::connect(&socket))));
        journald.wait_for("the flood", with_verdict("denied"));
        journald.stop_reading();
        expect_flood(flood(64004, 500, &socket), 500);
        journald.go_on();
        journald.wait_for("a denial meanwhile", |entry| get(entry, "PEER_UID") == "64004");
        journald.vanish();
        expect_flood(flood(64005, 500, &socket), 500);
        journald.start();
        echod.reload_with(&config.replace("50ms", "20ms"));
        journald.wait_for("a denial without a journal", |entry| get(entry, "PEER_UID") == "64005");
        // The journal stops reading once more, and now the service is stopped.
        journald.stop_reading();
        expect_flood(flood(64006, 500, &socket), 500);
        echod.signal(Signal::SIGTERM);
        echod.manager.wait_for("STOPPING=1", 1);
        journald.go_on();
        let next = echod.start_again(|start, _| start.journal(&journald));
        for process in floods {
            expect_flood(process, each);
        }
        next
    });
    // In the same backlog, behind the clients that have closed.
    be_denied(&next, 10);
    next.stop();
    let entries = journald.entries();
    let count = |verdict: &str| entries.iter().filter(|entry| with_verdict(verdict)(entry)).count();
    let (tried, told) = (4 * each as u64 + 3 * 500 + 10, denials(&entries));
    figure!(
        "tried {tried}, of which {each} closed at once; records {}, in {} summaries {}; difference {}",
        count("denied"),
        count("summary"),
        told - count("denied") as u64,
        i128::from(tried) - i128::from(told),
    );
    assert_eq!(told, tried);
}

#[test]
fn beyond_a_number_of_users_summaries_name_no_user() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}burst = 0\n{}", common::DENY_ALL));
    const USERS: u32 = 1100;
    for uid in 0..USERS {
        // Each user is a process, so only some at a time.
        let uid = 70_000 + uid;
        expect_flood(flood(uid, 2, &echod.socket()), 2);
    }
    echod.stop();
    let entries = journald.entries();
    assert_eq!(denials(&entries), u64::from(USERS) * 2);
    let nameless: Vec<_> =
        entries.iter().filter(|e| with_verdict("summary")(e) && !e.contains_key("PEER_UID")).collect();
    assert_eq!(nameless.len(), 1, "users beyond the number kept apart share one summary");
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

#[test]
fn a_long_queue_that_is_not_read_stops_no_service_or_watchdog() {
    needs_root();
    let journald = Journald::absent();
    journald.start_with_long_queue();
    let echod = Start::serving(&format!("{LONG}burst = 1000000\n{}", common::DENY_ALL))
        .journal(&journald)
        .env("WATCHDOG_USEC", "500000")
        .ready();
    be_denied(&echod, 1);
    journald.wait_for("the first", with_verdict("denied"));
    journald.stop_reading();
    expect_flood(flood(ALICE, 3000, &echod.socket()), 3000);
    // The journal's thread waits, and still reports progress.
    let seen = echod.manager.received.lock().count("WATCHDOG=1");
    echod.manager.wait_for("WATCHDOG=1", seen + 10);
    journald.go_on();
    journald.wait_for_sum("denied", DENIALS, 3001);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 3001);
}

#[test]
fn a_journal_queue_filled_by_others_stops_no_watchdog_message() {
    needs_root();
    let journald = Journald::absent();
    journald.start_with_long_queue();
    let echod = Start::serving(&format!("{LONG}burst = 1000000\n{}", common::DENY_ALL))
        .journal(&journald)
        .env("WATCHDOG_USEC", "500000")
        .ready();
    be_denied(&echod, 1);
    journald.wait_for("the first", with_verdict("denied"));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Each waits for room in the queue, and takes the room that the program has just seen free.
        for _ in 0..3 {
            scope.spawn(|| {
                let other = journald.sender();
                while !stop.load(Ordering::Relaxed) {
                    other.send(b"MESSAGE=somebody else\n").unwrap();
                }
            });
        }
        expect_flood(flood(ALICE, 3000, &echod.socket()), 3000);
        for _ in 0..3 {
            journald.stop_reading();
            let seen = echod.manager.received.lock().count("WATCHDOG=1");
            echod.manager.wait_for("WATCHDOG=1", seen + 5);
            let told = denials(&journald.entries());
            journald.go_on();
            journald.wait_for_sum("denied", DENIALS, (told + 1).min(3001));
        }
        stop.store(true, Ordering::Relaxed);
    });
    journald.wait_for_sum("denied", DENIALS, 3001);
    echod.stop();
    assert_eq!(denials(&journald.entries()), 3001);
}
