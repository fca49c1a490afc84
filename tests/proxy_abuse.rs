//! What goes wrong on either side of the proxy: a service that is silent, away, restarted or broken off, clients that leave or
//! never read, too few descriptors, and a reload in the middle of a transfer.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use common::behind::{Behind, Pattern, await_failure, leave_free, pair, serve, start, start_traced};
use common::records::{get, with_verdict};
use common::{Client, End, Journald, OWNER, PATIENCE, descriptors, eventually, expect_descriptors, memory, setting};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::shutdown;

#[test]
fn a_silent_service_holds_up_no_other_connection() {
    let (proxy, behind) = serve(OWNER, "");
    let (waits, silent) = pair(&proxy, &behind);
    waits.send("question");
    for _ in 0..50 {
        let (client, service) = pair(&proxy, &behind);
        client.send("ping");
        service.expect("ping");
        service.send("pong");
        client.expect("pong");
    }
    // The client is the one to give up.
    drop(waits);
    silent.expect_end("question");
}

#[test]
fn an_idle_timeout_ends_what_a_silent_service_leaves_open() {
    let (proxy, behind) = serve(&format!("{OWNER}[limits]\nidle-timeout = \"100ms\"\n"), "");
    let (client, service) = pair(&proxy, &behind);
    client.send("question");
    client.expect_end("");
    service.expect_end("question");
}

#[test]
fn a_service_that_restarts_gets_what_clients_sent_meanwhile() {
    let (start, trace) = start_traced(OWNER, "connect-timeout = \"1h\"\n");
    let behind = Behind::at(start.place());
    let proxy = start.ready();
    let (before, service) = pair(&proxy, &behind);
    let path = behind.path.clone();
    // A process that another test starts may hold a copy of the listener for a moment.
    shutdown(behind.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
    drop((service, behind));
    before.expect_end("");
    // Its socket is still there, and no process listens on it.
    let early = proxy.connect();
    early.send("early");
    await_failure(&trace, "ECONNREFUSED");
    std::fs::remove_file(&path).unwrap();
    let late = proxy.connect();
    late.send("later");
    let behind = Behind { listener: UnixListener::bind(&path).unwrap(), path };
    let mut heard: Vec<_> = [behind.accept(), behind.accept()].iter().map(|service| service.read(5)).collect();
    heard.sort();
    assert_eq!(heard, [b"early", b"later"]);
}

/// Waits until something to read has come.
fn await_bytes(end: &Client) {
    assert_eq!(nix::sys::socket::recv(fd_of(end), &mut [0], nix::sys::socket::MsgFlags::MSG_PEEK), Ok(1));
}

fn fd_of(end: &Client) -> std::os::fd::RawFd {
    std::os::fd::AsRawFd::as_raw_fd(&end.0)
}

#[test]
fn an_end_that_breaks_the_connection_off_ends_the_other_one() {
    let (proxy, behind) = serve(OWNER, "");
    let before = descriptors(&proxy);
    for _ in 0..20 {
        // What is unread as a socket is closed makes the kernel tell the other end of a reset.
        let (client, service) = pair(&proxy, &behind);
        service.send("unread");
        await_bytes(&client);
        drop(client);
        assert_eq!(service.rest().0, b"");
        let (client, service) = pair(&proxy, &behind);
        client.send("unread");
        await_bytes(&service);
        drop(service);
        assert_eq!(client.rest().0, b"");
    }
    expect_descriptors(&proxy, before);
}

#[test]
fn a_client_that_never_reads_holds_up_its_own_connection_only() {
    let (proxy, behind) = serve(OWNER, "");
    let (deaf, service) = pair(&proxy, &behind);
    let poured = service.clog(b"for deaf ears ");
    assert!(poured.len() < 1 << 20, "{} bytes were taken", poured.len());
    let (client, other) = pair(&proxy, &behind);
    client.send("ping");
    other.expect("ping");
    drop(deaf);
    eventually("the service gets EPIPE", || (&service.0).write(b"more").is_err().then_some(()));
}

#[test]
fn an_end_that_half_closes_and_then_goes_ends_the_connection() {
    let (proxy, behind) = serve(OWNER, "");
    let before = descriptors(&proxy);
    for is_up in [true, false] {
        let (client, service) = pair(&proxy, &behind);
        let (stays, goes) = if is_up { (service, client) } else { (client, service) };
        goes.half_close();
        stays.expect_end("");
        drop(goes);
        // Nothing can be delivered any more: the one that is left hears that without writing.
        let mut question = [PollFd::new(stays.0.as_fd(), PollFlags::empty())];
        assert_eq!(poll(&mut question, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1));
        expect_descriptors(&proxy, before);
    }
}

#[test]
fn a_client_that_has_sent_and_gone_is_looked_at_with_each_attempt_only() {
    const ATTEMPTS: usize = 12;
    let (start, _) = start(OWNER, "connect-timeout = \"1h\"\n");
    let trace = start.place().path("trace");
    let proxy = start.traced(&trace, &["trace=connect,epoll_wait"]).ready();
    let client = proxy.connect();
    client.send("for later");
    drop(client);
    let told = eventually("attempts", || {
        let told = std::fs::read_to_string(&trace).ok()?;
        (told.matches("/behind\"").count() >= ATTEMPTS).then_some(told)
    });
    let waits = told.matches("epoll_wait(").count();
    figure!("{ATTEMPTS} attempts, {waits} waits");
    assert!(waits < 10 * ATTEMPTS, "{waits} waits");
}

#[test]
fn an_end_that_waits_for_room_hears_that_the_other_one_is_gone() {
    for is_up in [true, false] {
        let (proxy, behind) = serve(OWNER, "");
        let (client, service) = pair(&proxy, &behind);
        let (stays, goes) = if is_up { (service, client) } else { (client, service) };
        let sent = goes.clog(b"never heard ");
        stays.clog(b"nor this ");
        drop(goes);
        let mut question = [PollFd::new(stays.0.as_fd(), PollFlags::POLLOUT)];
        assert_eq!(poll(&mut question, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1), "it waits for room");
        assert_eq!((&stays.0).write(b"more").unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert!(stays.rest().0 == sent, "what was sent before arrives");
    }
}

#[test]
fn a_stream_waits_for_its_reader_and_takes_no_memory_meanwhile() {
    let length = setting("PEERGATE_TEST_STREAM", 1 << 30);
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    let before = memory(&proxy, "VmRSS");
    let pattern = Pattern::new();
    for (from, into) in [(&client, &service), (&service, &client)] {
        let stalled = from.clog(&pattern.0[..Pattern::PERIOD]).len();
        assert!(stalled < 1 << 20, "{stalled} bytes were taken without a reader");
        let heard = thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(pattern.write(&from.0, stalled, length), length);
                from.half_close();
            });
            pattern.read(&into.0, 0)
        });
        assert_eq!(heard, length);
    }
    let grown = memory(&proxy, "VmHWM").saturating_sub(before);
    assert!(grown < 1024, "grown by {grown} KiB");
}

#[test]
fn a_reload_that_leads_elsewhere_in_the_middle_of_transfers_damages_none() {
    let (proxy, behind) = serve(OWNER, "");
    let pattern = Arc::new(Pattern::new());
    let pairs: Vec<_> = (0..4).map(|_| pair(&proxy, &behind)).map(Arc::new).collect();
    const BEGINNING: usize = 60_000;
    let (begun, has_begun) = channel();
    let mut threads = Vec::new();
    for both in &pairs {
        for is_up in [true, false] {
            let ends = |both: &Arc<(Client, Client)>| Arc::clone(both);
            let (pouring, hearing, of_one, of_other) = (ends(both), ends(both), pattern.clone(), pattern.clone());
            let sent = thread::spawn(move || {
                let from = if is_up { &pouring.0 } else { &pouring.1 };
                of_one.write(&from.0, 0, usize::MAX)
            });
            let begun = begun.clone();
            let heard = thread::spawn(move || {
                let into = if is_up { &hearing.1 } else { &hearing.0 };
                assert!(into.read(BEGINNING) == of_other.at(0, BEGINNING));
                begun.send(()).unwrap();
                of_other.read(&into.0, BEGINNING)
            });
            threads.push((sent, heard));
        }
    }
    // Each of them is in the middle by then.
    threads.iter().for_each(|_| has_begun.recv_timeout(PATIENCE).unwrap());
    let other = proxy.place.path("other");
    let elsewhere = Behind { listener: UnixListener::bind(&other).unwrap(), path: other.clone() };
    proxy.reload_with(&format!("{OWNER}[forward]\nto = \"{}\"\n", other.display()));
    for (sent, heard) in threads {
        let (sent, heard) = (sent.join().unwrap(), heard.join().unwrap());
        assert!((BEGINNING..=sent).contains(&heard), "{heard} of {sent} bytes");
    }
    assert!(elsewhere.is_left_alone(), "nothing of a transfer goes to another service");
    let (client, service) = pair(&proxy, &elsewhere);
    client.send("from the beginning");
    service.expect("from the beginning");
    drop((client, service));
    let told = proxy.stop();
    assert_eq!(told.matches("Revoked ").count(), pairs.len(), "{told}");
}

#[test]
fn a_client_waits_while_there_is_no_descriptor_for_the_service() {
    let (proxy, behind) = serve(OWNER, "connect-timeout = \"1h\"\n");
    // With a connection served, the start holds nothing open any more.
    let (first, its_service) = pair(&proxy, &behind);
    first.send("ping");
    its_service.expect("ping");
    // What the program has open for a moment, to tell the manager its status, may leave one more.
    let lacks_another = || {
        let limit = leave_free(&proxy, 1);
        let client = proxy.connect();
        client.send("patience");
        eventually("the client has the last descriptor", || (descriptors(&proxy) >= limit).then_some(()));
        behind.is_left_alone().then_some(client)
    };
    let client = (0..20).find_map(|_| lacks_another()).expect("there was a descriptor for the service each time");
    leave_free(&proxy, 100);
    let service = behind.accept();
    service.expect("patience");
    service.send("rewarded");
    client.expect("rewarded");
}

#[test]
fn out_of_descriptors_clients_are_served_or_refused_and_there_is_room_again() {
    let limit = 41;
    const CLIENTS: usize = 60;
    let config = format!("{OWNER}[limits]\nconnections = 100\nconnections-per-user = 100\n");
    let (start, _) = start(&config, "connect-timeout = \"300ms\"\n");
    let behind = Behind::at(start.place());
    let proxy = start.wrapper(&["prlimit", &format!("--nofile={limit}:{limit}")]).ready();
    let before = descriptors(&proxy);
    let echo = |service: Client| {
        let mut word = [0; 64];
        while let Ok(count @ 1..) = (&service.0).read(&mut word) {
            service.send(&word[..count]);
        }
    };
    let listener = behind.listener.try_clone().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || echo(Client::of(stream.unwrap())));
        }
    });
    let clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
    let is_served = |(number, client): (usize, &Client)| {
        let word = format!("client {number:2}");
        let _ = client.try_send(&word);
        let mut heard = vec![0; word.len()];
        let is_answered = (&client.0).read_exact(&mut heard).is_ok();
        assert!(!is_answered || heard == word.as_bytes());
        is_answered
    };
    let served = clients.iter().enumerate().filter(|client| is_served(*client)).count();
    assert!(served > 5 && served < CLIENTS, "{served} were served");
    drop(clients);
    expect_descriptors(&proxy, before);
    assert!(is_served((0, &proxy.connect())), "there is room again");
    proxy.stop();
}

#[test]
fn idle_pairs_take_little_memory() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    common::raise_descriptor_limit(most);
    // Two descriptors each, in this process as in the proxy.
    let pairs = setting("PEERGATE_TEST_PAIRS", 10_000).min((most as usize - 1500) / 2);
    let config = format!("{OWNER}[limits]\nconnections = 20000\nconnections-per-user = 20000\n");
    let (proxy, behind) = serve(&config, "");
    let talk = |(client, service): &(Client, Client)| {
        client.send("question");
        service.expect("question");
        service.send("answer");
        client.expect("answer");
    };
    // What the first of them cost: buffers, stacks, tables.
    let first: Vec<_> = (0..500).map(|_| pair(&proxy, &behind)).inspect(talk).collect();
    let before = memory(&proxy, "RssAnon");
    let idle: Vec<_> = (first.len()..pairs).map(|_| pair(&proxy, &behind)).inspect(talk).collect();
    let each = (memory(&proxy, "RssAnon") - before) * 1024 / idle.len() as u64;
    figure!("{pairs} idle pairs: {each} bytes each");
    assert!(each <= 600, "{each} bytes for each idle pair");
    idle.iter().chain(&first).for_each(talk);
}

#[test]
fn records_tell_the_service_and_what_was_passed_on() {
    let journald = Journald::new();
    let (start, path) = start(&format!("{OWNER}[audit]\nrecord = \"connections\"\n"), "connect-timeout = \"1ms\"\n");
    let behind = Behind::at(start.place());
    let proxy = start.journal(&journald).ready();
    let (client, service) = pair(&proxy, &behind);
    client.send("question");
    service.expect("question");
    service.send("an answer");
    client.expect("an answer");
    drop((client, service, behind));
    let closed = journald.wait_for("the end of the first", with_verdict("closed"));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(proxy.connect().rest(), (Vec::new(), End::Eof));
    let to = path.to_str().unwrap();
    let fields = ["GATE_UPSTREAM", "GATE_BYTES", "GATE_BYTES_SENT", "GATE_LINES"].map(|field| get(&closed, field));
    assert_eq!(fields, [to, "8", "9", "(absent)"]);
    let refused = journald.wait_for("the refusal", with_verdict("refused"));
    let fields = ["GATE_UPSTREAM", "GATE_REASON", "GATE_RULE"].map(|field| get(&refused, field));
    assert_eq!(fields, [to, "upstream", "allow.owner"]);
}
