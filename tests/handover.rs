//! Restarts: connections in every state are left to the next process, and every byte is compared. Then stops, which leave
//! none. The service manager is the test's own; some clients are other users. What can go wrong: handover_faults.rs.

mod common;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{
    Client, DENIED, DENY_ALL, Echod, End, Journald, OWNER, Start, TOO_LONG, answer, change_left, needs_root, show,
};
use nix::sys::signal::Signal;

fn serve(config: &str) -> Echod {
    Start::serving(config).with_store()
}

fn restart(echod: Echod) -> Echod {
    echod.restart(|start, _| start)
}

#[test]
fn a_live_connection_continues_over_a_restart() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = restart(echod);
    client.echo("after");
    let echod = restart(echod);
    client.echo("and again");
    client.half_close();
    client.expect_end(b"");
    echod.stop();
}

#[test]
fn half_a_line_before_a_restart_and_half_after_it_make_one_line() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.send("whole\nhal");
    client.expect("> whole\n");
    let echod = restart(echod);
    client.send("f and h");
    let echod = restart(echod);
    client.send("alf\nend");
    client.expect("> half and half\n");
    client.half_close();
    client.expect_end("> end");
    drop(echod);
}

#[test]
fn a_client_that_does_not_read_gets_every_byte_after_a_restart() {
    let echod = serve(OWNER);
    let client = echod.connect();
    let sent = client.clog(&[vec![b'a'; 5000], b"\n".to_vec(), vec![b'b'; 77], b"\n".to_vec()].concat());
    let echod = restart(echod);
    let echod = restart(echod);
    client.half_close();
    let (output, end) = client.rest();
    assert_eq!((show(&output), end), (show(&answer(&sent)), common::End::Eof));
    drop(echod);
}

#[test]
fn a_half_closed_client_that_does_not_read_gets_every_byte() {
    let echod = serve(OWNER);
    let client = echod.connect();
    let mut sent = client.clog(&[vec![b'a'; 5000], b"\n".to_vec()].concat());
    client.half_close();
    let echod = restart(echod);
    let (output, end) = client.rest();
    assert_eq!((show(&output), end), (show(&answer(&std::mem::take(&mut sent))), common::End::Eof));
    drop(echod);
}

#[test]
fn data_sent_between_two_processes_is_answered_by_the_next() {
    let echod = serve(OWNER);
    let (sends, half_closes, connects) = (echod.connect(), echod.connect(), echod.socket());
    let (sends_much, reads_nothing) = (echod.connect(), echod.connect());
    [&sends, &half_closes, &sends_much, &reads_nothing].iter().for_each(|client| client.echo("before"));
    let much = [vec![b'x'; 60 * 1024], b"\n".to_vec()].concat();
    let (mut late, mut filled) = (None, Vec::new());
    let echod = echod.restart(|start, _| {
        sends.send("meanwhile\n");
        half_closes.send("last words");
        half_closes.half_close();
        sends_much.send(&much);
        filled = reads_nothing.clog(b"a line of no great length\n");
        let client = Client::connect(&connects);
        client.send("new\n");
        late = Some(client);
        start
    });
    sends.expect("> meanwhile\n");
    half_closes.expect_end("> last words");
    sends_much.expect(answer(&much));
    reads_nothing.half_close();
    reads_nothing.expect_end(answer(&filled));
    late.unwrap().expect("> new\n");
    drop(echod);
}

#[test]
fn a_client_that_closes_between_two_processes_disturbs_no_other() {
    let echod = serve(OWNER);
    let (leaves, stays) = (echod.connect(), echod.connect());
    leaves.echo("bye");
    leaves.send("never re");
    stays.echo("hello");
    let echod = echod.restart(|start, _| {
        drop(leaves);
        start
    });
    stays.echo("still here");
    drop(echod);
}

#[test]
fn a_line_too_long_over_a_restart_is_refused() {
    let echod = serve(&format!("[limits]\nline-length = 10\n{OWNER}"));
    let client = echod.connect();
    client.send("a\n123456");
    client.expect("> a\n");
    let echod = restart(echod);
    client.send("7890");
    // Ten bytes without a newline are within the limit.
    let echod = restart(echod);
    client.send("1");
    client.expect_end(TOO_LONG);
    drop(echod);
}

#[test]
fn a_lower_line_limit_cuts_off_no_half_sent_echo_at_a_restart() {
    let config = |length: &str| format!("[limits]\nline-length = \"{length}\"\n{OWNER}");
    let echod = serve(&config("1M"));
    let (client, ended) = (echod.connect(), echod.connect());
    // More than a socket's buffer holds.
    let line = [vec![b'x'; 900_000], b"\n".to_vec()].concat();
    client.send(&line);
    client.expect("> xxx");
    // Without a newline it is a line only because of the half-close.
    ended.send(&line[..900_000]);
    ended.half_close();
    ended.expect("> xxx");
    echod.place.file("echod.toml", &config("10"));
    let echod = restart(echod);
    client.expect(&line[3..]);
    client.echo("123456789");
    client.send("1234567890\n");
    client.expect_end(TOO_LONG);
    ended.expect_end(&line[3..900_000]);
    drop(echod);
}

#[test]
fn hundreds_of_connections_in_every_state_survive_ten_restarts() {
    expect_to_survive(300, 10);
}

#[test]
fn four_thousand_connections_half_mid_line_survive_a_restart() {
    expect_to_survive(4000, 1);
}

/// Connections at rest, mid-line, with several lines at once and without any data, over so many restarts.
fn expect_to_survive(connections: usize, restarts: usize) {
    let config = format!("[limits]\nconnections = 4000\nconnections-per-user = 4000\n{OWNER}");
    let mut echod = serve(&config);
    let clients: Vec<Client> = (0..connections).map(|_| echod.connect()).collect();
    let mut expected = vec![Vec::new(); clients.len()];
    for round in 0..restarts {
        for (number, client) in clients.iter().enumerate() {
            let text = match (number + round) % 4 {
                0 => format!("{number}/{round}\n"),
                1 => format!("{number} half {round} "),
                2 => format!("the {round}th\nline of\n\n{number}"),
                _ => continue,
            };
            client.send(&text);
            expected[number].extend_from_slice(text.as_bytes());
        }
        echod = restart(echod);
    }
    for (number, (client, sent)) in clients.iter().zip(&expected).enumerate() {
        client.half_close();
        let (output, end) = client.rest();
        assert_eq!((show(&output), end), (show(&answer(sent)), common::End::Eof), "connection {number}");
    }
    echod.stop();
}

/// A number of KiB from /proc/PID/status.
fn memory(echod: &Echod, field: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", echod.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

#[test]
fn ten_thousand_connections_at_rest_take_no_two_mebibytes_more_for_a_restart() {
    const MOST: usize = 2048;
    common::raise_descriptor_limit(20_000);
    let echod = serve(&format!("[limits]\nconnections = 10000\nconnections-per-user = 10000\n{OWNER}"));
    let clients: Vec<_> = (0..9_500).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    let before = memory(&echod, "VmRSS:");
    let manager = Arc::clone(&echod.manager);
    // All have been sent, and it waits for the manager.
    manager.received.change(|received| received.unsettled = Some(Vec::new()));
    echod.signal(Signal::SIGTERM);
    manager.wait_for("FDSTORE=1", 1);
    let at_the_stop = memory(&echod, "VmHWM:");
    manager.received.change(|received| received.unsettled = None);
    let echod = echod.start_again(|start, _| start);
    clients.iter().for_each(|client| client.echo("after"));
    let after = memory(&echod, "VmHWM:");
    println!("{before} KiB before, at most {at_the_stop} KiB at the stop, at most {after} KiB in the next process");
    assert!(at_the_stop <= before + MOST && after <= before + MOST, "{before} {at_the_stop} {after}");
    echod.stop();
}

/// More than the gate accepts in one turn: it could accept some of them before all carried connections are taken over.
#[test]
fn a_waiting_connection_gets_no_permit_of_a_carried_one() {
    let limit = 100;
    let mut echod = serve(&format!("[limits]\nconnections-per-user = {limit}\n{OWNER}"));
    let inside: Vec<Client> = (0..limit).map(|_| echod.connect()).collect();
    inside.iter().for_each(|client| client.echo("inside"));
    for _ in 0..3 {
        let socket = echod.socket();
        let mut waiting = Vec::new();
        echod = echod.restart(|start, _| {
            waiting.extend((0..limit).map(|_| Client::connect(&socket)));
            start
        });
        waiting.iter().for_each(|client| client.expect_end(common::BUSY));
        inside.iter().for_each(|client| client.echo("still inside"));
    }
    drop(inside);
    echod.stop();
}

#[test]
fn many_restarts_lose_and_double_no_line_of_a_stream() {
    let mut echod = serve(OWNER);
    let stop = AtomicBool::new(false);
    let streams: Vec<Client> = (0..4).map(|_| echod.connect()).collect();
    let echod = thread::scope(|scope| {
        let mut checks = Vec::new();
        for client in &streams {
            let stop = &stop;
            let sender = scope.spawn(move || {
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    client.send(format!("line {number}\n"));
                    number += 1;
                }
                client.half_close();
                number
            });
            let receiver = scope.spawn(move || {
                let mut number = 0_u64;
                let mut text = std::io::BufReader::new(&client.0);
                let mut line = String::new();
                while std::io::BufRead::read_line(&mut text, &mut line).unwrap() > 0 {
                    assert_eq!(line, format!("> line {number}\n"));
                    line.clear();
                    number += 1;
                }
                number
            });
            checks.push((sender, receiver));
        }
        for _ in 0..20 {
            echod = echod.restart(|start, _| start);
        }
        stop.store(true, Ordering::Relaxed);
        for (sender, receiver) in checks {
            let (sent, received) = (sender.join().unwrap(), receiver.join().unwrap());
            assert_eq!(sent, received);
            assert!(sent > 100, "only {sent} lines in 20 restarts");
        }
        echod
    });
    echod.stop();
}

#[test]
fn the_store_is_empty_once_the_next_process_serves() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("hello");
    let echod = restart(echod);
    assert_eq!(echod.manager.received.lock().store.len(), 0, "what was taken back is forgotten");
    // The client sees an end of file, so no copy of the connection is left anywhere.
    client.half_close();
    client.expect_end(b"");
    drop(echod);
}

#[test]
fn without_connections_nothing_is_stored() {
    let echod = serve(OWNER);
    echod.connect().echo("gone before the stop");
    let manager = Arc::clone(&echod.manager);
    common::eventually("the connection has ended", || {
        manager
            .received
            .lock()
            .messages
            .iter()
            .flatten()
            .any(|field| field.starts_with("STATUS=0 connected, 1 "))
            .then_some(())
    });
    echod.stop();
    assert!(!manager.received.lock().has("FDSTORE=1"));
}

#[test]
fn without_a_store_all_received_lines_are_echoed_before_the_end() {
    for fdstore in ["(unset)", "0", "nonsense"] {
        let echod = Start::serving(OWNER).env("FDSTORE", fdstore).ready();
        let client = echod.connect();
        client.send("whole\nand a fragment");
        client.expect("> whole\n");
        let clogged = echod.connect();
        let sent = clogged.clog(b"a line of no great length\n");
        let manager = Arc::clone(&echod.manager);
        let (stderr, (output, end)) = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                manager.wait_for("STOPPING=1", 1);
                clogged.half_close();
                clogged.rest()
            });
            (echod.stop(), reader.join().unwrap())
        });
        client.expect_end("> and a fragment");
        assert_eq!((show(&output), end), (show(&answer(&sent)), common::End::Eof), "FDSTORE={fdstore}");
        assert!(stderr.contains("0 connections left to the next process, 2 ended"), "{stderr}");
        // Where the manager does not say how much it stores, only trying tells.
        assert_eq!(manager.received.lock().has("FDSTORE=1"), fdstore != "0");
    }
}

#[test]
fn without_a_store_a_client_that_does_not_read_delays_no_stop() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let sent = client.clog(b"a line of no great length\n");
    echod.stop();
    let (output, end) = client.rest();
    assert_eq!(end, common::End::Eof);
    assert!(answer(&sent).starts_with(&output), "not one byte that is wrong: {}", show(&output));
}

#[test]
fn the_next_process_decides_by_its_own_policy() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    client.send("half a li");
    let echod = echod.restart(|start, _| {
        start.place().file("echod.toml", DENY_ALL);
        start
    });
    client.expect_end(DENIED);
    let stderr = echod.stop();
    assert!(stderr.contains("Revoked root (uid 0)") || stderr.contains("Revoked "), "{stderr}");
    assert!(stderr.contains("no rule allows it any more"), "{stderr}");
}

#[test]
fn carried_connections_count_against_the_limits() {
    let config = |limit: usize| format!("[limits]\nconnections-per-user = {limit}\n{OWNER}");
    let echod = serve(&config(5));
    let clients: Vec<Client> = (0..5).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    let echod = echod.restart(|start, _| {
        start.place().file("echod.toml", &config(3));
        start
    });
    clients.iter().for_each(|client| client.echo("nobody is thrown out by a limit"));
    echod.connect().expect_end(common::BUSY);
    for client in &clients[..3] {
        client.half_close();
        client.expect_end(b"");
    }
    let next = echod.connect();
    next.echo("the third place");
    echod.connect().expect_end(common::BUSY);
}

#[test]
fn after_a_crash_waiting_connections_are_served() {
    let echod = serve(OWNER);
    let live = echod.connect();
    live.echo("before");
    let socket = echod.socket();
    echod.signal(Signal::SIGKILL);
    let waiting = std::cell::RefCell::new(None);
    let echod = echod.start_again(|start, stored| {
        assert!(stored.is_empty(), "a crash leaves nothing in the store");
        let client = Client::connect(&socket);
        client.send("I waited\n");
        waiting.replace(Some(client));
        start
    });
    waiting.take().unwrap().expect("> I waited\n");
    let (output, _) = live.rest();
    assert!(output.is_empty());
    echod.stop();
}

#[test]
fn a_crash_after_a_restart_ends_the_carried_connections() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = restart(echod);
    client.echo("after");
    echod.signal(Signal::SIGKILL);
    let echod = echod.start_again(|start, stored| {
        assert!(stored.is_empty());
        start
    });
    assert!(client.rest().0.is_empty());
    echod.stop();
}

#[test]
fn connection_numbers_and_counts_continue_over_a_restart() {
    let config = format!("[audit]\nrecord = \"connections\"\n{OWNER}");
    let echod = serve(&config);
    let first = echod.connect();
    first.echo("one");
    first.send("tw");
    let echod = restart(echod);
    first.send("o\n");
    first.expect("> two\n");
    first.half_close();
    first.expect_end(b"");
    let stderr = echod.stop();
    assert!(stderr.contains(": 2 lines, 8 bytes in "), "{stderr}");
}

#[test]
fn a_carried_connection_ends_though_the_manager_keeps_a_copy() {
    let echod = serve(OWNER);
    let (leaving, ended) = (echod.connect(), echod.connect());
    leaving.echo("hello");
    ended.echo("hello");
    let mut copies = Vec::new();
    let echod = echod.restart(|start, stored| {
        change_left(stored, |messages| copies.extend(messages[1].fds.iter().map(common::duplicate)));
        start
    });
    assert_eq!(copies.len(), 2);
    leaving.half_close();
    leaving.expect_end("");
    echod.reload_with(common::DENY_ALL);
    ended.expect_end(DENIED);
    echod.stop();
}

#[test]
fn sigint_sends_every_owed_byte_and_stores_nothing() {
    let echod = serve(OWNER);
    let (idle, midline, clogged, streams) = (echod.connect(), echod.connect(), echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("half");
    streams.echo("first");
    let sent = clogged.clog(b"a line of no great length\n");
    clogged.half_close();
    let manager = Arc::clone(&echod.manager);
    let stderr = thread::scope(|scope| {
        let clogged = scope.spawn(|| {
            manager.wait_for("STOPPING=1", 1);
            clogged.rest()
        });
        scope.spawn(|| while streams.try_send("line\n").is_ok() {});
        let streamed = scope.spawn(|| streams.rest());
        echod.signal(Signal::SIGINT);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{stderr}");
        let (output, end) = clogged.join().unwrap();
        assert_eq!((show(&output), end), (show(&answer(&sent)), End::Eof));
        let (output, end) = streamed.join().unwrap();
        assert_eq!((end, output.len() % b"> line\n".len()), (End::Eof, 0), "a clean end after a whole line");
        stderr
    });
    idle.expect_end("");
    midline.expect_end("> half");
    assert!(stderr.contains("0 connections left to the next process, 4 ended"), "{stderr}");
    assert!(!manager.received.lock().has("FDSTORE=1"), "nothing is kept");
}

#[test]
fn sigterm_without_sigcont_stores_no_connection() {
    let echod = serve(OWNER);
    let (idle, midline) = (echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("half");
    // This SIGCONT has been handled before the SIGTERM, so it must not count for it.
    echod.kill(Signal::SIGCONT);
    echod.reload_with(OWNER);
    let manager = Arc::clone(&echod.manager);
    echod.kill(Signal::SIGTERM);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    idle.expect_end("");
    midline.expect_end("> half");
    assert!(stderr.contains("0 connections left to the next process, 2 ended"), "{stderr}");
    assert!(!manager.received.lock().has("FDSTORE=1"), "nothing is kept");
}

/// Starts a next process that waits for the user database, which never answers. Returns when the lookup has begun.
fn begin_slowly(echod: Echod, place: &common::Place) -> Echod {
    let wrapper = common::hung_user_database(place);
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    let echod = echod.begin_again(|start, _| start.wrapper(&wrapper));
    // The thread blocks in openat(2); only the file of the user database makes it do so.
    let opening = format!("{} ", nix::libc::SYS_openat);
    common::eventually("the look-up has begun", || {
        let mut tasks = std::fs::read_dir(format!("/proc/{}/task", echod.pid())).ok()?.flatten();
        let says = |task: &std::fs::DirEntry, what: &str| std::fs::read_to_string(task.path().join(what)).ok();
        tasks.find(|task| {
            says(task, "comm").is_some_and(|name| name == "configuration\n")
                && says(task, "syscall").is_some_and(|call| call.starts_with(&opening))
        })
    });
    echod
}

#[test]
fn a_stop_during_a_slow_start_closes_connections_in_order() {
    common::needs_root();
    let echod = serve(OWNER);
    let (idle, midline) = (echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("whole\nhalf");
    midline.expect("> whole\n");
    echod.signal(Signal::SIGTERM);
    let place = common::Place::new();
    let echod = begin_slowly(echod, &place);
    midline.send(" and more");
    echod.signal(Signal::SIGINT);
    let manager = Arc::clone(&echod.manager);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    idle.expect_end("");
    midline.expect_end("> half and more");
    assert!(stderr.contains("2 connections of an earlier process ended: this one was told to stop"), "{stderr}");
    assert!(manager.received.lock().store.is_empty(), "the manager was told to forget them");
}

#[test]
fn a_restart_during_a_slow_start_loses_no_byte() {
    common::needs_root();
    let echod = serve(OWNER);
    let client = echod.connect();
    client.send("whole\nhalf");
    client.expect("> whole\n");
    echod.signal(Signal::SIGTERM);
    let place = common::Place::new();
    let echod = begin_slowly(echod, &place);
    client.send(" and");
    echod.signal(Signal::SIGTERM);
    echod.place.file("echod.toml", OWNER);
    let echod = echod.start_again(|start, _| start);
    client.send(" half\n");
    client.expect("> half and half\n");
    echod.stop();
}

#[test]
fn a_restart_with_a_faulty_configuration_closes_all_in_order() {
    let echod = serve(OWNER);
    let (idle, midline, clogged) = (echod.connect(), echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("ha");
    let sent = clogged.clog(b"a line of no great length\n");
    let manager = Arc::clone(&echod.manager);
    let (code, stderr) = thread::scope(|scope| {
        echod.signal(Signal::SIGTERM);
        // The two that are owed nothing more do not wait for the one that does not read.
        let clogged = scope.spawn(|| {
            idle.expect_end("");
            midline.expect_end("> half");
            clogged.half_close();
            clogged.rest()
        });
        let failed = echod.fail_again(|start, _| {
            start.place().file("echod.toml", "[allow.x]\nuser = [0]\n");
            midline.send("lf");
            start
        });
        let (output, end) = clogged.join().unwrap();
        assert_eq!((show(&output), end), (show(&answer(&sent)), End::Eof));
        failed
    });
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("3 connections of an earlier process ended"), "{stderr}");
    assert_eq!(manager.received.lock().store.len(), 0, "nothing is left in the store");
}

#[test]
fn a_listener_is_served_under_any_name() {
    let start = Start::bare().config(OWNER);
    let listener = start.place().listener("socket");
    let echod = start.socket("echod-c", listener).ready();
    echod.connect().echo("hello");
}

#[test]
fn received_descriptors_leave_the_store_without_a_capacity_too() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, _| start.env("FDSTORE", "(unset)"));
    client.echo("after");
    assert_eq!(echod.manager.received.lock().store.len(), 0);
}

#[test]
fn a_connection_revoked_at_a_restart_is_not_counted_as_carried() {
    needs_root();
    let journald = Journald::new();
    let config = |rules: &str| format!("{rules}[audit]\nrecord = \"connections\"\n");
    let echod = Start::serving(&config("[allow.any]\nusers = [\"any\"]\n")).journal(&journald).with_store();
    let (client, other) = (echod.connect(), common::PeerProcess::user(common::ALICE, &echod.socket()));
    client.echo("one");
    other.client().echo("one");
    let echod = echod.restart(|start, _| {
        start.place().file("echod.toml", &config("[deny.alice]\nusers = [64001]\n[allow.any]\nusers = [\"any\"]\n"));
        start.journal(&journald)
    });
    other.client().expect_end(DENIED);
    client.echo("two");
    let verdict = |verdict: &'static str| {
        journald.wait_for(verdict, |entry| entry.get("GATE_VERDICT").is_some_and(|it| it == verdict))
    };
    let revoked = verdict("revoked");
    let closed = verdict("closed");
    let socket = echod.socket();
    for (record, rule) in [(&revoked, "deny.alice"), (&closed, "deny.alice")] {
        let field = |name: &str| record.get(name).map_or("(absent)", String::as_str);
        assert_eq!((field("GATE_RULE"), field("GATE_REASON"), field("PEER_UID")), (rule, "policy", "64001"));
        assert_eq!((field("GATE_SOCKET"), field("GATE_CONNECTION")), (socket.to_str().unwrap(), "2"));
        assert_eq!((field("GATE_LINES"), field("GATE_BYTES")), ("1", "4"));
    }
    let note = journald.wait_for("the note", |entry| entry["MESSAGE"].contains("carried over the restart"));
    assert_eq!(note["MESSAGE"], "1 connections carried over the restart, 0 ended, 1 revoked");
    echod.stop();
}

#[test]
fn an_idle_timeout_continues_over_restarts() {
    let config = format!("[limits]\nidle-timeout = \"500ms\"\n{OWNER}");
    let mut echod = serve(&config);
    let client = echod.connect();
    client.echo("hello");
    client.0.set_nonblocking(true).unwrap();
    // The restarts follow each other faster than the timeout, and together take far longer.
    let restarts = (0..500).take_while(|_| match (&client.0).read(&mut [0]) {
        Ok(0) => false,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
        other => panic!("{other:?}"),
    });
    for _ in restarts {
        echod = restart(echod);
    }
    assert_eq!((&client.0).read(&mut [0]).unwrap(), 0, "each restart began the time anew");
    echod.stop();
}
