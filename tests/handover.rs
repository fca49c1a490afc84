//! A restart that nobody notices: connections in every state of rest go through the manager's descriptor store to the
//! next process, and every byte is compared. And every way in which that can go wrong. The manager is the test's
//! own; some of the clients are other users.

mod common;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Client, DENIED, Echod, End, Journald, Manager, NOBODY, OWNER, Start, TOO_LONG, needs_root, show};
use nix::sys::signal::Signal;

/// A service whose manager has room for so many descriptors.
fn serve_with_room(config: &str, capacity: usize) -> Echod {
    let manager = Arc::new(Manager::new());
    manager.told.change(|told| told.capacity = capacity);
    Start::serving(config).env("FDSTORE", &capacity.to_string()).ready_with(manager)
}

fn serve(config: &str) -> Echod {
    serve_with_room(config, 10_000)
}

fn restart(echod: Echod) -> Echod {
    echod.restart(|start, _| start)
}

/// Sends as much as is taken while nothing is read: the connection's echo waits in every buffer there is.
/// Returns what was sent.
fn clog(client: &Client, line: &[u8]) -> Vec<u8> {
    client.0.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut stalls = 0;
    while stalls < 10 {
        match (&client.0).write(&line[sent % line.len()..]) {
            Ok(count) => {
                sent += count;
                stalls = 0;
            }
            Err(_) => {
                stalls += 1;
                thread::sleep(std::time::Duration::from_millis(3));
            }
        }
    }
    client.0.set_nonblocking(false).unwrap();
    line.iter().copied().cycle().take(sent).collect()
}

fn answer(input: &[u8]) -> Vec<u8> {
    input.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [b"> ", line].concat()).collect()
}

#[test]
fn a_live_connection_goes_on_as_if_nothing_had_happened() {
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
fn half_a_line_before_the_restart_and_half_after_it_make_one_line() {
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
fn a_client_that_does_not_read_gets_every_byte_after_the_restart() {
    let echod = serve(OWNER);
    let client = echod.connect();
    let sent = clog(&client, &[vec![b'a'; 5000], b"\n".to_vec(), vec![b'b'; 77], b"\n".to_vec()].concat());
    let echod = restart(echod);
    let echod = restart(echod);
    client.half_close();
    let (output, end) = client.rest();
    assert_eq!((show(&output), end), (show(&answer(&sent)), common::End::Eof));
    drop(echod);
}

#[test]
fn a_client_that_has_half_closed_and_does_not_read_gets_every_byte_and_its_end() {
    let echod = serve(OWNER);
    let client = echod.connect();
    let mut sent = clog(&client, &[vec![b'a'; 5000], b"\n".to_vec()].concat());
    client.half_close();
    let echod = restart(echod);
    let (output, end) = client.rest();
    assert_eq!((show(&output), end), (show(&answer(&std::mem::take(&mut sent))), common::End::Eof));
    drop(echod);
}

#[test]
fn what_is_sent_while_nobody_serves_is_answered_by_the_next() {
    let echod = serve(OWNER);
    let (sends, half_closes, connects) = (echod.connect(), echod.connect(), echod.socket());
    sends.echo("before");
    half_closes.echo("before");
    let mut late = None;
    let echod = echod.restart(|start, _| {
        sends.send("meanwhile\n");
        half_closes.send("last words");
        half_closes.half_close();
        let client = Client::connect(&connects);
        client.send("new\n");
        late = Some(client);
        start
    });
    sends.expect("> meanwhile\n");
    half_closes.expect_end("> last words");
    late.unwrap().expect("> new\n");
    drop(echod);
}

#[test]
fn a_client_that_leaves_while_nobody_serves_disturbs_nobody() {
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
fn too_long_a_line_is_too_long_over_a_restart() {
    let echod = serve(&format!("[limits]\nline-length = 10\n{OWNER}"));
    let client = echod.connect();
    client.send("a\n123456");
    client.expect("> a\n");
    let echod = restart(echod);
    client.send("7890");
    // Ten bytes without a newline are no line yet, and not too long.
    let echod = restart(echod);
    client.send("1");
    client.expect_end(TOO_LONG);
    drop(echod);
}

#[test]
fn a_lower_limit_after_a_restart_does_not_cut_off_a_line_whose_echo_is_half_out() {
    let config = |length: &str| format!("[limits]\nline-length = \"{length}\"\n{OWNER}");
    let echod = serve(&config("1M"));
    let (client, ended) = (echod.connect(), echod.connect());
    // More than fits into the socket.
    let line = [vec![b'x'; 900_000], b"\n".to_vec()].concat();
    client.send(&line);
    client.expect("> xxx");
    // Without a newline it is a line only because nothing follows.
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
fn hundreds_of_connections_in_every_state_come_through_ten_restarts() {
    come_through(300, 10);
}

#[test]
fn four_thousand_connections_half_of_them_mid_line_come_through_a_restart() {
    come_through(4000, 1);
}

/// Connections at rest, mid-line, with several lines at once and with nothing to say, over so many restarts.
fn come_through(connections: usize, restarts: usize) {
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

/// More of them than the door accepts in one turn, so that it would be at it before they are all taken over.
#[test]
fn who_waits_over_a_restart_gets_no_place_of_those_who_live_through_it() {
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
fn a_stream_of_numbered_lines_loses_and_doubles_nothing_over_a_restart_storm() {
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
fn the_store_is_empty_again_once_the_next_process_serves() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("hello");
    let echod = restart(echod);
    assert_eq!(echod.manager.told.lock().store.len(), 0, "what was taken back is forgotten");
    // So the end of a connection is its end: no copy is left anywhere.
    client.half_close();
    client.expect_end(b"");
    drop(echod);
}

#[test]
fn nothing_is_stored_where_nobody_is_connected() {
    let echod = serve(OWNER);
    echod.connect().echo("gone before the stop");
    let manager = Arc::clone(&echod.manager);
    common::eventually("the connection has ended", || {
        manager
            .told
            .lock()
            .messages
            .iter()
            .flatten()
            .any(|field| field.starts_with("STATUS=0 connected, 1 "))
            .then_some(())
    });
    echod.stop();
    assert!(!manager.told.lock().has("FDSTORE=1"));
}

#[test]
fn without_a_store_everything_received_is_echoed_and_then_comes_the_end() {
    for fdstore in ["(unset)", "0", "nonsense"] {
        let echod = Start::serving(OWNER).env("FDSTORE", fdstore).ready();
        let client = echod.connect();
        client.send("whole\nand a fragment");
        client.expect("> whole\n");
        let clogged = echod.connect();
        let sent = clog(&clogged, b"a line of no great length\n");
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
        assert!(!manager.told.lock().has("FDSTORE=1"));
    }
}

#[test]
fn without_a_store_whoever_does_not_read_cannot_hold_up_the_end_and_still_sees_a_clean_one() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let sent = clog(&client, b"a line of no great length\n");
    echod.stop();
    let (output, end) = client.rest();
    assert_eq!(end, common::End::Eof);
    assert!(answer(&sent).starts_with(&output), "not one byte that is wrong: {}", show(&output));
}

#[test]
fn the_capacity_may_come_from_the_units_own_variable_on_an_older_systemd() {
    let manager = Arc::new(Manager::new());
    manager.told.change(|told| told.capacity = 100);
    let echod = Start::serving(OWNER).env("ECHOD_FDSTORE_MAX", "100").ready_with(manager);
    let client = echod.connect();
    client.echo("before");
    let echod = restart(echod);
    client.echo("after");
    drop(echod);
}

#[test]
fn what_finds_no_room_in_the_store_ends_in_order_and_the_rest_goes_on() {
    let capacity = 4;
    let echod = serve_with_room(OWNER, capacity);
    let clients: Vec<Client> = (0..6).map(|_| echod.connect()).collect();
    for client in &clients {
        client.echo("in");
        client.send("half");
    }
    let echod = restart(echod);
    // One place is the state's, one is for the look whether everything found one.
    let mut carried = 0;
    for client in &clients {
        let _ = client.try_send(" line\n");
        client.0.shutdown(std::net::Shutdown::Write).ok();
        let (output, end) = client.rest();
        assert_eq!(end, common::End::Eof);
        match output.as_slice() {
            b"> half line\n" => carried += 1,
            b"> half" => {}
            other => panic!("neither carried nor ended: {}", show(other)),
        }
    }
    assert_eq!(carried, capacity - 2);
    drop(echod);
}

#[test]
fn a_manager_that_holds_fewer_than_it_said_gets_none_and_all_end_in_order() {
    let manager = Arc::new(Manager::new());
    manager.told.change(|told| told.capacity = 3);
    let echod = Start::serving(OWNER).env("FDSTORE", "100").ready_with(Arc::clone(&manager));
    let clients: Vec<Client> = (0..6).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    echod.signal(Signal::SIGTERM);
    echod.wait_for_stderr("0 connections left to the next process, 6 ended");
    let echod = echod.start_again(|start, stored| {
        assert_eq!(stored.len(), 0, "what was stored is taken out again");
        start
    });
    // It would not say which it has: none is left to it, and each sees a clean end.
    clients.iter().for_each(|client| client.expect_end(""));
    echod.stop();
}

/// Restarts with the stored descriptors changed by `change`; the connection that was live must end in order, with
/// everything it had been owed by the next process, and the next process must serve and say why.
#[track_caller]
fn expect_ended_in_order(why: &str, change: impl FnOnce(&mut Vec<(String, OwnedFd)>)) {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, stored| {
        // On its way while nobody serves: received, so echoed.
        client.send("meanwhile\nfrag");
        change(stored);
        start
    });
    client.expect_end("> meanwhile\n> frag");
    echod.connect().echo("a new one is served");
    let stderr = echod.stop();
    assert!(stderr.contains("0 connections carried over the restart, 1 ended") && stderr.contains(why), "{stderr}");
}

fn state_of(stored: &mut [(String, OwnedFd)]) -> &mut OwnedFd {
    &mut stored.iter_mut().find(|(name, _)| name == "echod-s").expect("a state was stored").1
}

/// A memfd is sealed: what is to be changed goes into another.
fn rewrite(stored: &mut [(String, OwnedFd)], change: impl FnOnce(&mut Vec<u8>)) {
    let state = state_of(stored);
    let mut file = File::from(state.try_clone().unwrap());
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    change(&mut bytes);
    let place = common::Place::new();
    std::fs::write(place.path("state"), bytes).unwrap();
    *state = File::open(place.path("state")).unwrap().into();
}

#[test]
fn without_their_state_connections_end_in_order() {
    expect_ended_in_order("no state came with them", |stored| stored.retain(|(name, _)| name != "echod-s"));
}

#[test]
fn a_state_cut_off_ends_connections_in_order() {
    for keep in [0, 1, 14, 33, 34, 60] {
        expect_ended_in_order("cut off or corrupted", |stored| rewrite(stored, |bytes| bytes.truncate(keep)));
    }
}

#[test]
fn a_corrupted_state_ends_connections_in_order() {
    for place in [0, 20, 30, 40, 50, 60, 70] {
        expect_ended_in_order("cut off or corrupted", |stored| rewrite(stored, |bytes| bytes[place] ^= 0x40));
    }
    expect_ended_in_order("cut off or corrupted", |stored| rewrite(stored, |bytes| bytes.push(0)));
}

#[test]
fn a_state_of_a_future_version_ends_connections_in_order_and_names_the_version() {
    expect_ended_in_order("version 7, this program knows 2", |stored| rewrite(stored, |bytes| bytes[14] = 7));
}

#[test]
fn a_state_that_is_no_file_ends_connections_in_order() {
    expect_ended_in_order("cut off or corrupted", |stored| {
        *state_of(stored) = UnixStream::pair().unwrap().0.into();
    });
    expect_ended_in_order("cut off or corrupted", |stored| {
        *state_of(stored) = File::open("/").unwrap().into();
    });
}

#[test]
fn the_state_is_sealed_so_that_nobody_can_change_it() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, stored| {
        let state = state_of(stored);
        let seals = nix::fcntl::fcntl(&*state, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap();
        assert_eq!(seals & 0xf, 0xf, "seal, shrink, grow, write");
        assert!(nix::unistd::write(&*state, b"x").is_err());
        start
    });
    client.echo("after");
    drop(echod);
}

#[test]
fn descriptors_in_the_store_that_are_not_ours_are_closed_and_counted() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let echod = echod.restart(|start, stored| {
        stored.push(("stored".to_owned(), theirs.into()));
        stored.push(("stored".to_owned(), File::open("/dev/null").unwrap().into()));
        start
    });
    client.echo("after");
    Client::of(ours).expect_end(b"");
    let stderr = echod.stop();
    assert!(stderr.contains("2 stored file descriptors that are not ours were closed"), "{stderr}");
}

#[test]
fn a_stored_socket_that_the_state_does_not_know_is_ended_and_the_others_go_on() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(false).unwrap();
    let stranger = Client::of(ours);
    stranger.send("who am I\n");
    let echod = echod.restart(|start, stored| {
        theirs.set_nonblocking(true).unwrap();
        stored.push(("echod-c".to_owned(), theirs.into()));
        start
    });
    client.echo("after");
    stranger.expect_end("> who am I\n");
    let stderr = echod.stop();
    assert!(stderr.contains("1 connections carried over the restart, 1 ended"), "{stderr}");
}

#[test]
fn stored_things_that_are_no_sockets_do_no_harm() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, stored| {
        stored.push(("echod-c".to_owned(), File::open("/dev/null").unwrap().into()));
        stored.push(("echod-c".to_owned(), File::open("/").unwrap().into()));
        stored.push(("echod-c".to_owned(), std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()));
        start
    });
    client.echo("after");
    echod.stop();
}

#[test]
fn the_next_process_judges_by_its_own_policy() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    client.send("half a li");
    let echod = echod.restart(|start, _| {
        start.place().file("echod.toml", NOBODY);
        start
    });
    client.expect_end(DENIED);
    let stderr = echod.stop();
    assert!(stderr.contains("Revoked root (uid 0)") || stderr.contains("Revoked "), "{stderr}");
    assert!(stderr.contains("no rule allows it any more"), "{stderr}");
}

#[test]
fn connections_carried_count_against_the_limits_of_the_next_process() {
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
fn the_manager_has_time_for_each_batch_however_many_there_are() {
    let config = format!("[limits]\nconnections-per-user = 600\n{OWNER}");
    let echod = serve(&config);
    let clients: Vec<Client> = (0..600).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    let before = echod.manager.told.lock().messages.len();
    let echod = restart(echod);
    let said = echod.manager.told.lock().messages[before..].to_vec();
    let batches: Vec<usize> = (0..said.len())
        .filter(|&at| said[at].iter().any(|field| field == "FDNAME=echod-c"))
        .filter(|&at| said[at].iter().any(|field| field == "FDSTORE=1"))
        .collect();
    assert_eq!(batches.len(), 3, "{said:?}");
    for at in batches {
        assert!(said[at - 1][0].starts_with("EXTEND_TIMEOUT_USEC="), "before a batch: {:?}", said[at - 1]);
        assert_eq!(said[at + 1], ["BARRIER=1"], "after a batch");
    }
}

#[test]
fn a_manager_that_never_answers_costs_no_client_a_byte() {
    let echod = serve(OWNER);
    echod.manager.told.change(|told| told.unsettled = Some(Vec::new()));
    let client = echod.connect();
    client.echo("before");
    client.send("half");
    echod.signal(Signal::SIGTERM);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    client.expect_end("> half");
    assert!(stderr.contains("did not take the connections"), "{stderr}");
}

#[test]
fn after_a_crash_those_who_wait_are_served_and_nothing_is_left_over() {
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
fn a_crash_after_a_restart_ends_the_connections_that_were_carried() {
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
fn connection_numbers_and_counts_go_on_over_a_restart() {
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
fn the_names_in_the_store_are_short_so_that_thousands_fit_into_the_environment() {
    let echod = serve(OWNER);
    let clients: Vec<Client> = (0..20).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    let echod = echod.restart(|start, stored| {
        let names: usize = stored.iter().map(|(name, _)| name.len() + 1).sum();
        // 128 KiB is the longest string that execve(2) takes; the unit's store holds at most 16384.
        assert!(names * 16_384 / stored.len() <= 128 * 1024, "{names} bytes for {} descriptors", stored.len());
        assert_eq!(stored.len(), 21);
        assert!(stored.iter().all(|(_, fd)| fd.as_raw_fd() > 2));
        start
    });
    clients.iter().for_each(|client| client.echo("still in"));
    drop(echod);
}

#[test]
fn a_carried_connection_ends_also_where_the_manager_has_not_let_go_of_its_copy() {
    let echod = serve(OWNER);
    let (leaving, ended) = (echod.connect(), echod.connect());
    leaving.echo("hello");
    ended.echo("hello");
    let mut copies = Vec::new();
    let echod = echod.restart(|start, store| {
        copies = store.iter().map(|(_, fd)| fd.try_clone().unwrap()).collect();
        start
    });
    assert!(copies.len() >= 2);
    leaving.half_close();
    leaving.expect_end("");
    echod.reload_with(common::NOBODY);
    ended.expect_end(DENIED);
    echod.stop();
}

#[test]
fn sigint_ends_for_good_with_all_that_everybody_is_owed() {
    let echod = serve(OWNER);
    let (idle, midline, clogged, streams) = (echod.connect(), echod.connect(), echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("half");
    streams.echo("first");
    let sent = clog(&clogged, b"a line of no great length\n");
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
    assert!(!manager.told.lock().has("FDSTORE=1"), "nothing is kept");
}

#[test]
fn a_sigterm_by_kill_leaves_nothing_to_a_process_that_never_comes() {
    let echod = serve(OWNER);
    let (idle, midline) = (echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("half");
    // Sent and read before: it says nothing of the SIGTERM after it.
    echod.kill(Signal::SIGCONT);
    echod.reload_with(OWNER);
    let manager = Arc::clone(&echod.manager);
    echod.kill(Signal::SIGTERM);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    idle.expect_end("");
    midline.expect_end("> half");
    assert!(stderr.contains("0 connections left to the next process, 2 ended"), "{stderr}");
    assert!(!manager.told.lock().has("FDSTORE=1"), "nothing is kept");
}

/// A next process that reads its configuration until the user database answers: never. Returns once it is asked.
fn begin_slowly(echod: Echod, place: &common::Place) -> Echod {
    let wrapper = common::hung_user_database(place);
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    let echod = echod.begin_again(|start, _| start.wrapper(&wrapper));
    // The thread waits in openat(2), as no file but the user database makes it do.
    let opening = format!("{} ", nix::libc::SYS_openat);
    common::eventually("the look-up has begun", || {
        let mut tasks = std::fs::read_dir(format!("/proc/{}/task", echod.pid())).ok()?.flatten();
        let says = |task: &std::fs::DirEntry, what: &str| std::fs::read_to_string(task.path().join(what)).ok();
        tasks.find(|task| {
            says(task, "comm").is_some_and(|name| name == "start\n")
                && says(task, "syscall").is_some_and(|call| call.starts_with(&opening))
        })
    });
    echod
}

#[test]
fn a_stop_while_the_next_process_reads_its_configuration_is_in_order() {
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
    assert!(manager.told.lock().store.is_empty(), "the manager was told to forget them");
}

#[test]
fn a_restart_while_the_next_process_reads_its_configuration_loses_nothing() {
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
fn a_restart_onto_a_faulty_configuration_ends_everybody_in_order_and_says_how_many() {
    let echod = serve(OWNER);
    let (idle, midline, clogged) = (echod.connect(), echod.connect(), echod.connect());
    idle.echo("hello");
    midline.send("ha");
    let sent = clog(&clogged, b"a line of no great length\n");
    let manager = Arc::clone(&echod.manager);
    let (code, stderr) = thread::scope(|scope| {
        echod.signal(Signal::SIGTERM);
        let (read, may_read) = std::sync::mpsc::channel::<()>();
        let clogged = scope.spawn(move || {
            let _ = may_read.recv();
            clogged.half_close();
            clogged.rest()
        });
        let failed = echod.fail_again(|start, _| {
            start.place().file("echod.toml", "[allow.x]\nuser = [0]\n");
            midline.send("lf");
            drop(read);
            start
        });
        let (output, end) = clogged.join().unwrap();
        assert_eq!((show(&output), end), (show(&answer(&sent)), End::Eof));
        failed
    });
    assert_eq!(code, 78, "{stderr}");
    idle.expect_end("");
    midline.expect_end("> half");
    assert!(stderr.contains("3 connections of an earlier process ended"), "{stderr}");
    assert_eq!(manager.told.lock().store.len(), 0, "nothing is left in the store");
}

#[test]
fn a_store_that_is_not_there_is_noticed_and_everybody_ends_in_order() {
    let echod = Start::serving(OWNER).env("FDSTORE", "100").ready();
    let clients: Vec<Client> = (0..3).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    clients.iter().for_each(|client| client.send("ha"));
    let stderr = echod.stop();
    clients.iter().for_each(|client| client.expect_end("> ha"));
    assert!(stderr.contains("0 connections left to the next process, 3 ended"), "{stderr}");
    assert!(stderr.contains("did not take the connections"), "{stderr}");
}

#[test]
fn without_state_whoever_was_in_the_middle_of_a_line_is_echoed_nothing_wrong() {
    let echod = serve(OWNER);
    let (midline, at_rest, owed) = (echod.connect(), echod.connect(), echod.connect());
    midline.echo("before");
    midline.send("hal");
    at_rest.echo("before");
    let sent = clog(&owed, b"a line of no great length\n");
    let echod = echod.restart(|start, stored| {
        midline.send("f a line\nmore");
        at_rest.send("a line\nfrag");
        stored.retain(|(name, _)| name != "echod-s");
        start
    });
    midline.expect_end("");
    at_rest.expect_end("> a line\n> frag");
    let (output, end) = owed.rest();
    assert!(end == End::Eof && answer(&sent).starts_with(&output), "{}", show(&output));
    let stderr = echod.stop();
    assert!(stderr.contains("0 connections carried over the restart, 3 ended"), "{stderr}");
}

#[test]
fn stored_under_a_name_of_ours_that_this_program_does_not_know_it_is_closed_forgotten_and_named() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let echod = echod.restart(|start, stored| {
        stored.push(("echod-future".to_owned(), theirs.into()));
        start
    });
    assert!(echod.manager.told.lock().has("FDNAME=echod-future"), "it is taken out of the store");
    client.echo("after");
    Client::of(ours).expect_end("");
    let stderr = echod.stop();
    assert!(stderr.contains("1 stored file descriptors that are not ours were closed: echod-future"), "{stderr}");
}

#[test]
fn a_listener_is_served_whatever_it_is_called() {
    let start = Start::bare().config(OWNER);
    let listener = start.place().listener("socket");
    let echod = start.socket("echod-c", listener).ready();
    echod.connect().echo("hello");
}

#[test]
fn what_is_taken_back_is_taken_out_of_the_store_also_where_no_capacity_is_told() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, _| start.env("FDSTORE", "(unset)"));
    client.echo("after");
    assert_eq!(echod.manager.told.lock().store.len(), 0);
}

/// An older state may be left over where a process has failed in between.
#[test]
fn of_several_states_the_newest_is_believed_in_whatever_order_they_come() {
    for oldest_first in [false, true] {
        let echod = serve(OWNER);
        let client = echod.connect();
        client.echo("before");
        let mut older = None;
        let echod = echod.restart(|start, stored| {
            older = Some(state_of(stored).try_clone().unwrap());
            start
        });
        client.send("half ");
        let echod = echod.restart(|start, stored| {
            let older = ("echod-s".to_owned(), older.take().unwrap());
            stored.insert(if oldest_first { 0 } else { stored.len() }, older);
            start
        });
        client.send("a line\n");
        client.expect("> half a line\n");
        drop(echod);
    }
}

#[test]
fn a_state_of_absurd_size_is_not_read_to_the_end() {
    let echod = serve(OWNER);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, stored| {
        rewrite(stored, |bytes| bytes[0] ^= 1);
        let place = common::Place::new();
        let file = File::options().read(true).write(true).create_new(true).open(place.path("state")).unwrap();
        let mut old = File::from(state_of(stored).try_clone().unwrap());
        let mut bytes = Vec::new();
        old.rewind().unwrap();
        old.read_to_end(&mut bytes).unwrap();
        (&file).write_all(&bytes).unwrap();
        file.set_len(2 << 30).unwrap();
        *state_of(stored) = file.into();
        start
    });
    client.expect_end("");
    assert!(common::memory(&echod, "VmHWM") < 100 * 1024, "{} KiB", common::memory(&echod, "VmHWM"));
    echod.stop();
}

#[test]
fn a_connection_that_was_made_blocking_meanwhile_holds_nobody_up() {
    let echod = serve(OWNER);
    let (client, other) = (echod.connect(), echod.connect());
    client.echo("before");
    other.echo("before");
    let echod = echod.restart(|start, stored| {
        for (_, fd) in stored.iter().filter(|(name, _)| name == "echod-c") {
            let flags = nix::fcntl::OFlag::empty();
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        }
        start
    });
    // More than fits: a blocking socket would stop the worker until this is read.
    client.0.set_nonblocking(true).unwrap();
    while (&client.0).write(&[b'\n'; 4096]).is_ok() {}
    other.echo("after");
    echod.stop();
}

#[test]
fn who_is_revoked_at_a_restart_is_not_counted_as_carried_and_has_both_records() {
    needs_root();
    let journald = Journald::new();
    let config = |rules: &str| format!("{rules}[audit]\nrecord = \"connections\"\n");
    let manager = Arc::new(Manager::new());
    manager.told.change(|told| told.capacity = 100);
    let echod = Start::serving(&config("[allow.any]\nusers = [\"any\"]\n"))
        .env("FDSTORE", "100")
        .journal(&journald)
        .ready_with(manager);
    let (client, other) = (echod.connect(), common::Other::user(common::ALICE, &echod.socket()));
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
fn a_connections_number_is_its_own_over_restarts_and_without_state_too() {
    needs_root();
    let journald = Journald::new();
    let config = format!("[audit]\nrecord = \"connections\"\n{OWNER}");
    let manager = Arc::new(Manager::new());
    manager.told.change(|told| told.capacity = 100);
    let echod = Start::serving(&config).env("FDSTORE", "100").journal(&journald).ready_with(manager);
    let (first, second, third) = (echod.connect(), echod.connect(), echod.connect());
    [&first, &second, &third].iter().for_each(|client| client.echo("in"));
    let echod = echod.restart(|start, _| start.journal(&journald));
    let fourth = echod.connect();
    fourth.echo("in");
    second.half_close();
    second.expect_end("");
    let closed = |number: &'static str| {
        journald.wait_for(number, |entry| {
            let is = |field: &str, value: &str| entry.get(field).is_some_and(|it| it == value);
            is("GATE_VERDICT", "closed") && is("GATE_CONNECTION", number)
        })
    };
    closed("2");
    let admitted = |entry: &common::Entry| {
        entry.get("GATE_VERDICT").is_some_and(|it| it == "admitted").then(|| entry["GATE_CONNECTION"].clone())
    };
    let numbers: Vec<String> = journald.entries().iter().filter_map(admitted).collect();
    assert_eq!(numbers, ["1", "2", "3", "4"], "admitted once each, and the numbers go on");
    // Three without a state: nothing says which they were, and still each has a number.
    let echod = echod.restart(|start, stored| {
        stored.retain(|(name, _)| name != "echod-s");
        start.journal(&journald)
    });
    [first, third, fourth].iter().for_each(|client| client.expect_end(""));
    let fifth = echod.connect();
    fifth.echo("in");
    echod.signal(Signal::SIGINT);
    fifth.expect_end("");
    assert!(echod.wait().0.success());
    let entries = journald.entries();
    let closed = entries.iter().filter(|entry| entry.get("GATE_VERDICT").is_some_and(|it| it == "closed"));
    let mut numbers: Vec<_> = closed.skip(1).map(|entry| entry["GATE_CONNECTION"].clone()).collect();
    numbers.sort();
    assert_eq!(numbers, ["1", "2", "3", "4"]);
}

#[test]
fn an_idle_timeout_goes_on_over_restarts() {
    let config = format!("[limits]\nidle-timeout = \"500ms\"\n{OWNER}");
    let mut echod = serve(&config);
    let client = echod.connect();
    client.echo("hello");
    client.0.set_nonblocking(true).unwrap();
    // Far more restarts than half a second has room for, each of them sooner than it.
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
