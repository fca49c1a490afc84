//! The equation:
//!
//! > denials that clients saw = records of verdict *denied* + the counts of summaries
//!
//! while the journal reads, does not read, vanishes and comes back. Needs root, for a mount namespace in which the test's
//! own journal is the system's.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::records::{DENIALS, LONG, be_denied, denials, expect_flood, get, serve, with_verdict};
use common::{
    ALICE, BOB, BUSY, DENIED, Echod, Entry, Journald, PeerProcess, Start, TOO_LONG, flood, needs_root, stands_for,
};
use nix::sys::signal::Signal;

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
