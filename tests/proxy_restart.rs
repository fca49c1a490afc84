//! The proxy restarts while connections are in every state. The service manager is the test's own; every byte is compared.

mod common;

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::behind::Pattern;
use common::{Client, DENY_ALL, Echod, OWNER, PATIENCE, Start, change_left, eventually, show};

const TRANSFERS: usize = 64;

const MORE: &str = "[limits]\nconnections-per-user = 1000\n";

fn serve(more: &str) -> (Echod, UnixListener) {
    let start = Start::bare();
    let path = start.place().path("behind");
    let behind = UnixListener::bind(&path).unwrap();
    let listener = start.place().listener("socket");
    let text = format!("{OWNER}{MORE}[forward]\nto = \"{}\"\n{more}", path.display());
    (start.config(&text).socket("peergate@test.socket", listener).with_store(), behind)
}

fn pair(proxy: &Echod, behind: &UnixListener) -> (Client, Client) {
    let client = proxy.connect();
    (client, Client::of(behind.accept().unwrap().0))
}

fn restart(proxy: Echod) -> Echod {
    proxy.restart(|start, _| start)
}

#[test]
fn a_connection_goes_on_over_a_restart_with_what_lies_in_between() {
    let (mut proxy, behind) = serve("");
    let (client, service) = pair(&proxy, &behind);
    let (half, other) = pair(&proxy, &behind);
    half.half_close();
    other.expect_end("");
    // Neither side reads: there are bytes in the proxy and in all queues.
    let (full, deaf) = pair(&proxy, &behind);
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for round in 0..3 {
        up.extend(full.clog(format!("up {round} ").as_bytes()));
        down.extend(deaf.clog(format!("down {round} ").as_bytes()));
        client.send("between");
        proxy = restart(proxy);
        service.expect("between");
        service.send("after");
        client.expect("after");
    }
    other.send("still");
    half.expect("still");
    other.half_close();
    half.expect_end("");
    full.half_close();
    deaf.half_close();
    deaf.expect_end(&up);
    full.expect_end(&down);
    drop((client, service));
    proxy.stop();
}

/// Where in the pattern the stream of this number begins: no two look alike.
fn beginning(number: usize) -> usize {
    number * 61
}

/// How many bytes were written.
fn pour(pattern: &Pattern, number: usize, to: &UnixStream, stop: &AtomicBool) -> usize {
    let begin = beginning(number);
    let mut at = begin;
    while !stop.load(Ordering::Relaxed) {
        at = pattern.write(to, at, at + 20_000);
    }
    to.shutdown(Shutdown::Write).unwrap();
    at - begin
}

#[test]
fn transfers_both_ways_lose_and_double_no_byte_over_restarts() {
    let (mut proxy, behind) = serve("");
    let (stop, pattern) = (Arc::new(AtomicBool::new(false)), Arc::new(Pattern::new()));
    let mut threads = Vec::new();
    for number in 0..TRANSFERS {
        let (client, service) = pair(&proxy, &behind);
        for (end, out, into) in [(client, number, TRANSFERS + number), (service, TRANSFERS + number, number)] {
            let end = Arc::new(end);
            let (pouring, stop) = (Arc::clone(&end), Arc::clone(&stop));
            let (one, other) = (Arc::clone(&pattern), Arc::clone(&pattern));
            threads.push((out, true, thread::spawn(move || pour(&one, out, &pouring.0, &stop))));
            let from = beginning(into);
            threads.push((into, false, thread::spawn(move || other.read(&end.0, from) - from)));
        }
    }
    for _ in 0..3 {
        proxy = restart(proxy);
    }
    stop.store(true, Ordering::Relaxed);
    let mut counts: Vec<(usize, bool, usize)> =
        threads.into_iter().map(|(number, sent, thread)| (number, sent, thread.join().unwrap())).collect();
    counts.sort_unstable();
    for of_one in counts.chunks(2) {
        assert_eq!(of_one[0].2, of_one[1].2, "stream {}", of_one[0].0);
        assert!(of_one[0].2 > 0);
    }
    proxy.stop();
}

#[test]
fn a_client_that_waits_for_the_service_waits_on_after_a_restart() {
    let start = Start::bare();
    let path = start.place().path("behind");
    let listener = start.place().listener("socket");
    let text = format!("{OWNER}[forward]\nto = \"{}\"\nconnect-timeout = \"1h\"\n", path.display());
    let proxy = start.config(&text).socket("peergate@test.socket", listener).with_store();
    let client = proxy.connect();
    client.send("patience");
    // The client is admitted by then: what comes later is.
    proxy.reload_with(&text);
    let proxy = restart(proxy);
    let behind = UnixListener::bind(&path).unwrap();
    let service = Client::of(behind.accept().unwrap().0);
    service.expect("patience");
    service.send("rewarded");
    client.expect("rewarded");
    drop((client, service));
    proxy.stop();
}

#[test]
fn a_restart_with_another_upstream_ends_what_leads_to_the_old_one() {
    let (proxy, behind) = serve("");
    let (client, service) = pair(&proxy, &behind);
    client.send("seen");
    service.expect("seen");
    let other = proxy.place.path("other");
    proxy.place.file("echod.toml", &format!("{OWNER}[forward]\nto = \"{}\"\n", other.display()));
    let proxy = restart(proxy);
    client.expect_end("");
    service.expect_end("");
    drop((client, service));
    let told = proxy.stop();
    assert!(told.contains("Revoked "), "{}", show(told.as_bytes()));
}

#[test]
fn a_restart_puts_no_message_into_a_stream_that_it_denies() {
    let (proxy, behind) = serve("replies = \"text\"\n");
    let (client, service) = pair(&proxy, &behind);
    service.send("half an ans");
    client.expect("half an ans");
    let (silent, its_service) = pair(&proxy, &behind);
    let to = proxy.place.path("behind").display().to_string();
    proxy.place.file("echod.toml", &format!("{DENY_ALL}[forward]\nto = \"{to}\"\nreplies = \"text\"\n"));
    let proxy = restart(proxy);
    client.expect_end("");
    service.expect_end("");
    silent.expect_end("Unauthorized access\n");
    its_service.expect_end("");
    drop((client, service, silent, its_service));
    assert_eq!(proxy.stop().matches("Revoked ").count(), 2);
}

#[test]
fn a_connection_without_a_state_that_a_restart_denies_gets_no_message() {
    let (proxy, behind) = serve("replies = \"text\"\n");
    let (client, service) = pair(&proxy, &behind);
    service.send("half an ans");
    client.expect("half an ans");
    let to = proxy.place.path("behind").display().to_string();
    proxy.place.file("echod.toml", &format!("{DENY_ALL}[forward]\nto = \"{to}\"\nreplies = \"text\"\n"));
    let proxy = proxy.restart(|start, stored| {
        change_left(stored, |messages| messages[1].change_states(|state| state.truncate(3)));
        start
    });
    client.expect_end("");
    service.expect_end("");
    drop((client, service));
    assert!(proxy.stop().contains("Revoked "));
}

#[test]
fn a_restart_that_verifies_senders_ends_what_holds_bytes_without_a_message() {
    let (proxy, behind) = serve("");
    let (client, service) = pair(&proxy, &behind);
    service.send("half an ans");
    client.expect("half an ans");
    // The service does not read: in the end the proxy holds bytes whose sender cannot be told.
    eventually("held", || (0..5).all(|_| client.clog(b"unattested ").is_empty()).then_some(()));
    let text = format!("{OWNER}{MORE}[forward]\nto = \"{}\"\n", proxy.place.path("behind").display());
    proxy.place.file("echod.toml", &format!("{text}replies = \"text\"\n[service]\nverify = \"line\"\n"));
    let proxy = restart(proxy);
    client.expect_end("");
    drop((client, service));
    let told = proxy.stop();
    assert!(told.contains("Revoked ") && told.contains("its data came without credentials"), "{told}");
}

#[test]
fn a_connection_that_lost_its_service_over_a_restart_ends() {
    let (proxy, behind) = serve("");
    let (client, service) = pair(&proxy, &behind);
    service.send("all of it");
    client.send("unanswered");
    service.0.set_read_timeout(Some(PATIENCE)).unwrap();
    service.expect("unanswered");
    let proxy = proxy.restart(move |start, _| {
        drop(service);
        start
    });
    client.expect_end("all of it");
    drop(client);
    proxy.stop();
}

#[test]
fn a_connection_without_its_second_descriptor_ends_at_a_restart() {
    let (proxy, behind) = serve("");
    let (client, service) = pair(&proxy, &behind);
    client.send("seen");
    service.expect("seen");
    let proxy = proxy.restart(|start, stored| {
        change_left(stored, |messages| messages[1].lose_descriptor());
        start
    });
    let _ = client.try_send("to no service");
    assert_eq!(client.rest().0, b"");
    service.expect_end("");
    drop(client);
    proxy.stop();
}
