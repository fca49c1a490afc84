//! Services written with the library, as their peers, their service manager and the journal see them: the examples, and a
//! service that does what a careless author might (tests/support/service.rs), with threads and on tokio's runtime. Needs
//! root, for peers of other users and a journal of the test's own.

mod common;

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::records::{DENIALS, denials, expect_flood, get, with_verdict};
use common::{
    ALICE, BOB, BUSY, Client, DENIED, Echod, End, Entry, Journald, PeerProcess, Start, eventually, flood, lingering,
    needs_root, raise_descriptor_limit, send_along, stands_for,
};
use nix::sys::signal::Signal;

/// The users of a test's policy.
const ALL: &str = "[allow.all]\nusers = [\"any\"]\n";
const ONLY_ROOT: &str = "[allow.root]\nusers = [0]\n";

/// Restarts of these lose no connection.
const FILTERS: [&str; 2] = ["shout", "tokio_shout"];

const RUNTIMES: [&str; 3] = ["threads", "tokio", "tokio-one"];

/// The service of tests/support on this runtime.
fn service(journald: &Journald, runtime: &str, policy: &str) -> Echod {
    needs_root();
    Start::example("service", &[runtime], policy).journal(journald).ready()
}

fn reload_with(service: &Echod, policy: &str) {
    service.place.file("policy.toml", policy);
    assert_eq!(service.reload(), (0, String::new()), "{}", service.stderr());
}

#[track_caller]
fn answers(client: &Client, word: &str) {
    client.send(format!("say {word}\n"));
    client.expect(format!("{word}\n"));
}

#[test]
fn an_example_is_a_whole_service_in_forty_lines_and_a_daemon_in_under_eighty() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    for name in ["axum_note", "hyper_whoami", "shout", "tokio_echo", "tokio_shout"] {
        let text = fs::read_to_string(examples.join(name).with_extension("rs")).unwrap();
        let is_code = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
        let lines = text.lines().filter(is_code).count();
        figure!("{name}: {lines} lines of its own");
        assert!(lines <= 40, "{name} has {lines} lines");
    }
    let daemon = fs::read_to_string(examples.join("length_daemon.rs")).unwrap().lines().count();
    assert!(daemon < 80, "a daemon of one's own has {daemon} lines");
}

/// curl(1) as another user: status and body.
fn curl(socket: &Path, uid: u32, arguments: &[&str]) -> (String, String) {
    let ids = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()];
    let output = Command::new("setpriv")
        .args(ids)
        .args(["curl", "--silent", "--max-time", "60", "--write-out", "\n%{http_code}", "--unix-socket"])
        .arg(socket)
        .args(arguments)
        .arg("http://localhost/note")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap_or_else(|| panic!("{:?}", output.status));
    (status.to_owned(), body.to_owned())
}

#[test]
fn the_axum_example_gives_each_user_the_terms_of_its_rule() {
    needs_root();
    let journald = Journald::new();
    let policy = format!("[allow.editor]\nusers = [{ALICE}]\nmay-write = true\n[allow.reader]\nusers = [{BOB}]\n");
    let example = Start::example("axum_note", &[], &policy).journal(&journald).ready();
    let written = format!("written by uid {ALICE}\n");
    assert_eq!(curl(&example.socket(), ALICE, &["--data", "at one"]), ("200".to_owned(), written));
    assert_eq!(curl(&example.socket(), BOB, &[]), ("200".to_owned(), "at one".to_owned()));
    let denied = ("403".to_owned(), "{\"message\":\"Unauthorized access\"}\n".to_owned());
    assert_eq!(curl(&example.socket(), BOB, &["--data", "at two"]), denied);
    let entry = journald.wait_for("the terms deny it", with_verdict("denied"));
    assert_eq!((get(&entry, "GATE_RULE"), get(&entry, "PEER_UID")), ("allow.reader", BOB.to_string().as_str()));
    assert_eq!(curl(&example.socket(), 0, &[]), denied, "no rule admits root");
    example.stop();
    assert_eq!(denials(&journald.entries()), 2);
}

#[test]
fn the_hyper_example_tells_each_user_its_rule_until_it_is_denied() {
    needs_root();
    let policy = format!("[allow.first]\nusers = [{ALICE}]\n[allow.second]\nusers = [{BOB}]\n");
    let example = Start::example("hyper_whoami", &[], &policy).ready();
    for (uid, rule) in [(ALICE, "first"), (BOB, "second")] {
        assert_eq!(curl(&example.socket(), uid, &[]), ("200".to_owned(), format!("uid {uid}, by allow.{rule}\n")));
    }
    let denied = ("403".to_owned(), "{\"message\":\"Unauthorized access\"}\n".to_owned());
    assert_eq!(curl(&example.socket(), 0, &[]), denied);
    let peer = PeerProcess::user(ALICE, &example.socket());
    peer.client().send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    peer.client().until(b"by allow.first\n");
    reload_with(&example, ONLY_ROOT);
    let (rest, end) = peer.client().rest();
    assert!(rest.starts_with(b"HTTP/1.1 403 "), "{}", common::show(&rest));
    assert_eq!(end, End::Eof);
    example.stop();
}

#[test]
fn a_reload_gives_a_live_http_connection_its_new_terms_or_ends_it() {
    needs_root();
    let journald = Journald::new();
    let may = |may: bool| format!("[allow.one]\nusers = [{ALICE}]\nmay-write = {may}\n");
    let example = Start::example("axum_note", &[], &may(false)).journal(&journald).ready();
    let peer = PeerProcess::user(ALICE, &example.socket());
    let status_of = |request: &str| {
        peer.client().send(request);
        let answer = peer.client().until(b"\n");
        let head = String::from_utf8(answer).unwrap();
        head.split(' ').nth(1).unwrap().to_owned()
    };
    let post = "POST /note HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi";
    assert_eq!(status_of(post), "403");
    peer.client().until(b"access\"}\n");
    reload_with(&example, &may(true));
    assert_eq!(status_of(post), "200");
    peer.client().until(format!("uid {ALICE}\n").as_bytes());
    reload_with(&example, ONLY_ROOT);
    let (rest, end) = peer.client().rest();
    assert!(rest.starts_with(b"HTTP/1.1 403 "), "{}", common::show(&rest));
    assert_eq!(end, common::End::Eof);
    let entry = journald.wait_for("it is revoked", with_verdict("revoked"));
    assert_eq!((get(&entry, "GATE_RULE"), get(&entry, "GATE_REASON")), ("default", "policy"));
    example.stop();
}

#[test]
fn a_restart_of_the_filter_loses_no_byte_of_a_live_connection() {
    needs_root();
    for name in FILTERS {
        let example = Start::example(name, &[], &format!("[allow.some]\nusers = [{ALICE}, {BOB}]\n"));
        let example = example.with_store();
        let [alice, bob] = [ALICE, BOB].map(|uid| PeerProcess::user(uid, &example.socket()));
        alice.client().send("one\nhal");
        alice.client().expect("ONE\n");
        bob.client().send("two\n");
        bob.client().expect("TWO\n");
        let example = example.restart(|start, stored| {
            assert_eq!(stored.len(), 1, "one descriptor, however many connections there are");
            // No process serves now.
            alice.client().send("f\nlast");
            start
        });
        alice.client().expect("HALF\n");
        // The next process reloads as the one before, also for connections that it inherited.
        reload_with(&example, &format!("[allow.alice]\nusers = [{ALICE}]\n"));
        bob.client().expect_end(DENIED);
        alice.client().half_close();
        alice.client().expect_end("LAST");
        example.stop();
    }
}

#[test]
fn a_connection_that_the_policy_denies_after_a_restart_is_revoked() {
    needs_root();
    for name in FILTERS {
        let journald = Journald::new();
        let example = Start::example(name, &[], ALL).journal(&journald).with_store();
        let peer = PeerProcess::user(ALICE, &example.socket());
        peer.client().send("one\n");
        peer.client().expect("ONE\n");
        let example = example.restart(|start, _| {
            start.place().file("policy.toml", ONLY_ROOT);
            start.journal(&journald)
        });
        peer.client().expect_end(DENIED);
        journald.wait_for("it is revoked", with_verdict("revoked"));
        example.stop();
    }
}

/// Most are not served yet when the process that has inherited them is to stop.
#[test]
fn restarts_in_quick_succession_lose_no_connection_of_a_filter() {
    needs_root();
    raise_descriptor_limit(4096);
    for name in FILTERS {
        let mut example = Start::example(name, &[], ALL).with_store();
        let clients = PeerProcess::wrapped(&[], &["--ids", "70000"], 500, &example.socket()).end();
        clients.iter().for_each(|client| client.send("one\nhal"));
        clients.iter().for_each(|client| client.expect("ONE\n"));
        for _ in 0..3 {
            example = example.restart(|start, _| start);
        }
        for client in &clients {
            client.send("f\n");
            client.expect("HALF\n");
        }
        example.stop();
    }
}

/// Not at a restart: no other process follows.
#[test]
fn a_final_stop_of_the_filter_ends_its_connections_in_order() {
    needs_root();
    for name in FILTERS {
        let example = Start::example(name, &[], ALL).with_store();
        let client = example.connect();
        client.send("one\nrest");
        client.expect("ONE\n");
        example.signal(Signal::SIGINT);
        client.expect_end("REST");
        let (status, _, stderr) = example.wait();
        assert!(status.success(), "{name}: {stderr}");
    }
}

#[test]
fn a_service_exits_when_it_is_idle_and_not_before() {
    needs_root();
    for runtime in RUNTIMES {
        let start = Start::example("service", &[runtime], ALL);
        // The milliseconds come after the policy's file.
        let service = start.args(&["50"]).ready();
        let client = service.connect();
        answers(&client, "one");
        client.half_close();
        client.expect_end("");
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {status}: {stderr}");
    }
}

/// Connections that the gate has admitted, and that the service's own code does not accept before the stop comes.
fn admitted_only(service: &Echod, journald: &Journald) -> (Client, Vec<Client>) {
    let holder = service.connect();
    holder.send("hold\n");
    holder.expect("held\n");
    let waiting: Vec<_> = (0..20).map(|_| service.connect()).collect();
    waiting.iter().for_each(|client| client.send("say hi\n"));
    eventually("all are admitted", || (count(journald, "admitted") == 21).then_some(()));
    (holder, waiting)
}

fn count(journald: &Journald, verdict: &str) -> usize {
    journald.entries().iter().filter(|entry| with_verdict(verdict)(entry)).count()
}

#[test]
fn a_stop_waits_until_admitted_connections_are_accepted() {
    for runtime in ["tokio", "tokio-one"] {
        let journald = Journald::new();
        let service = service(&journald, runtime, ALL);
        let (holder, waiting) = admitted_only(&service, &journald);
        service.signal(Signal::SIGTERM);
        service.manager.wait_for("STOPPING=1", 1);
        holder.half_close();
        // The runtime may end before a task has answered.
        waiting.iter().for_each(|client| assert_eq!(client.rest().1, End::Eof, "{runtime}"));
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {stderr}");
        // The end of a connection is recorded where it was accepted.
        assert_eq!(count(&journald, "closed"), 21, "{runtime}");
    }
}

/// The service of this test ends its direction of a connection when it reads the end, as much code does.
#[test]
fn a_restart_carries_connections_that_were_not_accepted_yet() {
    let journald = Journald::new();
    let start = Start::example("service", &["tokio-carry"], ALL).journal(&journald);
    let service = start.with_store();
    let (holder, waiting) = admitted_only(&service, &journald);
    let service = service.restart(|start, stored| {
        assert_eq!(stored.len(), 1);
        start
    });
    for client in &waiting {
        client.expect("hi\n");
        answers(client, "again");
    }
    answers(&holder, "as well");
    service.stop();
}

/// Each connection that comes at that moment is served by one process or the other.
#[test]
fn a_restart_loses_no_connection_that_comes_meanwhile() {
    needs_root();
    let filters = FILTERS.map(|name| (name, &[][..], "one\n"));
    for (name, arguments, line) in filters.into_iter().chain([("service", &["tokio-carry-apart"][..], "say ONE\n")]) {
        let mut example = Start::example(name, arguments, ALL).with_store();
        let (socket, is_over) = (example.socket(), AtomicBool::new(false));
        let example = thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    // Fewer than a user may have.
                    let mut clients = VecDeque::new();
                    while !is_over.load(Ordering::Relaxed) {
                        let client = Client::connect(&socket);
                        client.send(line);
                        client.expect("ONE\n");
                        clients.push_back(client);
                        if clients.len() > 10 {
                            clients.pop_front();
                        }
                    }
                    for client in clients {
                        client.send(line);
                        client.half_close();
                        client.expect_end("ONE\n");
                    }
                });
            }
            for _ in 0..5 {
                example = example.restart(|start, _| start);
            }
            is_over.store(true, Ordering::Relaxed);
            example
        });
        example.stop();
    }
}

#[test]
fn a_reload_revokes_live_connections_on_every_runtime() {
    let journald = Journald::new();
    // The last one reads its policy by a function of its own.
    for runtime in RUNTIMES.into_iter().chain(["threads-read"]) {
        let service = service(&journald, runtime, ALL);
        let [stays, goes] = [0, ALICE].map(|uid| PeerProcess::user(uid, &service.socket()));
        let waits = PeerProcess::user(ALICE, &service.socket());
        let also_goes = PeerProcess::user(ALICE, &service.socket());
        answers(stays.client(), "one");
        answers(goes.client(), "two");
        waits.client().send("await\n");
        waits.client().expect("waiting\n");
        answers(also_goes.client(), "three");
        reload_with(&service, ONLY_ROOT);
        goes.client().expect_end(DENIED);
        // What the service still has to say comes first.
        waits.client().expect_end([b"told\n", DENIED].concat());
        also_goes.client().expect_end(DENIED);
        answers(stays.client(), "four");
        // A request is half there when a policy comes that goes on admitting its peer.
        stays.client().send("say whole");
        reload_with(&service, ALL);
        stays.client().send(" line\n");
        stays.client().expect("whole line\n");
        // A file with a fault changes nothing.
        service.place.file("policy.toml", "[allow.x]\nusers = [\n");
        assert_eq!(service.reload().0, 78, "{runtime}");
        answers(stays.client(), "five");
        service.stop();
    }
    assert_eq!(journald.entries().iter().filter(|entry| with_verdict("revoked")(entry)).count(), 12);
}

/// An answer that is under way has five seconds.
#[test]
fn a_revoked_connection_whose_peer_never_reads_is_cut_off() {
    let journald = Journald::new();
    let services = RUNTIMES.map(|runtime| service(&journald, runtime, ALL));
    let deaf = services.each_ref().map(|service| {
        let peer = PeerProcess::user(ALICE, &service.socket());
        peer.client().send("pour\n");
        peer.client().expect("pouring\n");
        peer
    });
    services.iter().for_each(|service| reload_with(service, ONLY_ROOT));
    eventually("all are over", || (count(&journald, "closed") == RUNTIMES.len()).then_some(()));
    drop(deaf);
    services.into_iter().for_each(|service| drop(service.stop()));
}

#[test]
fn a_connection_dropped_with_bytes_unread_ends_without_a_reset() {
    let journald = Journald::new();
    for runtime in RUNTIMES {
        let service = service(&journald, runtime, ALL);
        let client = service.connect();
        // More than the service reads ahead.
        client.send([b"leave\n".to_vec(), vec![b'x'; 60_000]].concat());
        client.expect_end("bye\n");
        let client = service.connect();
        client.send("shut\nrest\n");
        client.expect_end("half\n");
        service.stop();
    }
}

#[test]
fn a_panic_is_on_record_and_ends_one_connection() {
    for runtime in RUNTIMES {
        let journald = Journald::new();
        let service = service(&journald, runtime, ALL);
        let client = service.connect();
        client.send("panic\n");
        client.expect_end("");
        answers(&service.connect(), "still here");
        service.stop();
        let panicked = |text: &str| text.starts_with("the service panicked: connection 1");
        assert!(journald.entries().iter().any(|entry| panicked(get(entry, "MESSAGE"))), "{runtime}");
    }
}

#[test]
fn descriptors_of_a_peer_delay_no_other_and_are_on_record() {
    let journald = Journald::new();
    for runtime in RUNTIMES {
        needs_root();
        let start = Start::example("service", &[runtime], ALL).journal(&journald);
        // It connects before the service starts, so that the kernel takes the descriptor.
        let early = Client::connect(start.place().path("socket"));
        let (bomb, _other_end) = lingering();
        send_along(&early.0, b"say hi\n", &[bomb.as_raw_fd()]).unwrap();
        drop(bomb);
        let service = start.ready();
        answers(&service.connect(), "hello");
        let entry = journald.wait_for("the bomb", with_verdict("revoked"));
        assert_eq!(get(&entry, "GATE_REASON"), "sender");
        drop(early);
        service.stop();
        let revoked = journald.entries().iter().filter(|entry| with_verdict("revoked")(entry)).count();
        assert_eq!(revoked, 1 + RUNTIMES.iter().position(|one| *one == runtime).unwrap());
    }
}

#[test]
fn descriptors_sent_to_a_running_service_are_refused_or_end_the_connection() {
    let journald = Journald::new();
    for runtime in RUNTIMES {
        let service = service(&journald, runtime, ALL);
        let (client, other) = (service.connect(), service.connect());
        answers(&client, "first");
        let (ours, theirs) = UnixStream::pair().unwrap();
        match send_along(&client.0, b"say it\n", &[theirs.as_raw_fd()]) {
            // From Linux 6.16 on sendmsg(2) fails, and the connection stays open.
            Err(nix::errno::Errno::EPERM) => answers(&client, "still here"),
            sent => {
                sent.unwrap();
                client.expect_end(DENIED);
            }
        }
        drop(theirs);
        // The descriptor was refused, or closed by the service.
        Client::of(ours).expect_end("");
        answers(&other, "meanwhile");
        service.stop();
    }
}

#[test]
fn peers_that_never_read_or_send_half_a_request_stop_no_other() {
    let journald = Journald::new();
    for runtime in RUNTIMES {
        let service = service(&journald, runtime, ALL);
        let deaf = service.connect();
        deaf.send("pour\n");
        deaf.expect("pouring\n");
        let half = service.connect();
        half.send("say hal");
        answers(&service.connect(), "meanwhile");
        half.send("f\n");
        half.expect("half\n");
        // The peer closes, and with that ends what is poured.
        drop(deaf);
        let of_first = |entry: &Entry| with_verdict("closed")(entry) && get(entry, "GATE_CONNECTION") == "1";
        let all = 1 + RUNTIMES.iter().position(|one| *one == runtime).unwrap();
        eventually("it ends", || {
            (journald.entries().iter().filter(|entry| of_first(entry)).count() == all).then_some(())
        });
        half.send("say unfin");
        service.signal(Signal::SIGTERM);
        // With threads what has begun is the last line.
        assert_eq!(half.rest().1, End::Eof, "{runtime}");
        assert!(service.wait().0.success(), "{runtime}");
    }
}

#[test]
fn a_peer_over_a_limit_is_told_and_on_record_on_every_runtime() {
    const MOST: usize = 64;
    for runtime in RUNTIMES {
        let journald = Journald::new();
        let service = service(&journald, runtime, ALL);
        let inside: Vec<Client> = (0..MOST).map(|_| service.connect()).collect();
        inside.iter().for_each(|client| answers(client, "in"));
        (0..3).for_each(|_| service.connect().expect_end(BUSY));
        let left = inside.into_iter().next_back().unwrap();
        left.half_close();
        left.expect_end("");
        answers(&service.connect(), "there is room again");
        service.stop();
        assert_eq!(stands_for(&journald.entries(), "refused", &["user-limit"]), 3, "{runtime}");
    }
}

#[test]
fn a_connection_without_a_thread_ends_on_record_and_others_are_served() {
    // No other process has this user: the limit counts all of its threads.
    let start =
        Start::example("service", &["threads"], ALL).run_as("64077:64077").wrapper(&["prlimit", "--nproc=10:10"]);
    let service = start.ready();
    let is_served = |client: &Client| (&client.0).read(&mut [0]).is_ok_and(|count| count > 0);
    let clients: Vec<Client> = (0..20).map(|_| service.connect()).collect();
    clients.iter().for_each(|client| drop(client.try_send("say in\n")));
    let (served, ended): (Vec<_>, Vec<_>) = clients.iter().partition(|client| is_served(client));
    ended.iter().for_each(|client| client.expect_end(""));
    assert!(served.len() >= 3 && ended.len() >= 8, "{} served, {} ended", served.len(), ended.len());
    served.iter().for_each(|client| client.expect("n\n"));
    served.iter().for_each(|client| answers(client, "still in"));
    let ended = ended.len();
    drop(clients);
    eventually("there is room again", || {
        let client = service.connect();
        let _ = client.try_send("say again\n");
        is_served(&client).then_some(())
    });
    let stderr = service.stop();
    let told = stderr.lines().filter(|line| line.contains(" gets no thread: ")).count();
    assert!(told >= ended, "{told} of {ended}: {stderr}");
}

#[test]
fn out_of_descriptors_a_service_refuses_goes_on_and_recovers() {
    for runtime in RUNTIMES {
        needs_root();
        let start = Start::example("service", &[runtime], ALL).wrapper(&["prlimit", "--nofile=40:40"]);
        let service = start.env("WATCHDOG_USEC", "1000000").ready();
        let clients: Vec<Client> = (0..50).map(|_| service.connect()).collect();
        clients.iter().for_each(|client| drop(client.try_send("say in\n")));
        let (inside, refused): (Vec<_>, Vec<_>) = clients.into_iter().partition(|client| client.read(1) == b"i");
        refused.iter().for_each(|client| client.expect_end(&BUSY[1..]));
        assert!(inside.len() >= 5 && refused.len() >= 10, "{runtime}: {} in, {} refused", inside.len(), refused.len());
        inside.iter().for_each(|client| client.expect("n\n"));
        inside.iter().for_each(|client| answers(client, "still in"));
        drop(inside);
        // Closing takes a moment: a connection that comes before it is refused.
        eventually("there is room again", || {
            let client = service.connect();
            let _ = client.try_send("say again\n");
            (client.read(1) == b"a").then_some(())
        });
        let stderr = service.stop();
        assert!(stderr.contains("out of file descriptors"), "{runtime}: {stderr}");
    }
}

#[test]
fn a_service_serves_and_loses_no_denial_while_the_journal_is_away() {
    for runtime in RUNTIMES {
        let journald = Journald::new();
        let service = service(&journald, runtime, ONLY_ROOT);
        let live = service.connect();
        answers(&live, "before");
        expect_flood(flood(ALICE, 20, &service.socket()), 20);
        journald.vanish();
        expect_flood(flood(BOB, 200, &service.socket()), 200);
        answers(&live, "meanwhile");
        journald.start();
        expect_flood(flood(ALICE, 20, &service.socket()), 20);
        service.stop();
        assert_eq!(stands_for(&journald.entries(), "denied", DENIALS), 240, "{runtime}");
    }
}

#[test]
fn a_service_that_returns_ends_connections_in_order_that_it_never_accepted() {
    for runtime in ["tokio", "tokio-one"] {
        let journald = Journald::new();
        let service = service(&journald, runtime, ALL);
        let (holder, waiting) = admitted_only(&service, &journald);
        holder.send("quit\n");
        waiting.iter().for_each(|client| assert_eq!(client.rest().1, End::Eof, "{runtime}"));
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {stderr}");
    }
}

/// The service's own code ends while connections are open, and tasks in the middle of something.
#[test]
fn a_runtime_that_is_shut_down_in_the_middle_ends_its_connections_in_order() {
    let journald = Journald::new();
    for runtime in ["tokio", "tokio-one"] {
        let service = service(&journald, runtime, ALL);
        let (idle, deaf, last) = (service.connect(), service.connect(), service.connect());
        answers(&idle, "one");
        idle.send("say hal");
        deaf.send("await\n");
        deaf.expect("waiting\n");
        last.send("quit\nand more that is not read\n");
        [idle, deaf, last].iter().for_each(|client| client.expect_end(""));
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {stderr}");
    }
}

#[test]
fn the_equation_holds_for_the_same_flood_on_every_runtime() {
    const TIMES: usize = 1500;
    for runtime in RUNTIMES {
        let journald = Journald::new();
        let service = service(&journald, runtime, ONLY_ROOT);
        let live = service.connect();
        answers(&live, "before");
        let floods = [ALICE, BOB, 64003].map(|uid| flood(uid, TIMES, &service.socket()));
        answers(&live, "meanwhile");
        for process in floods {
            expect_flood(process, TIMES);
        }
        answers(&live, "after");
        service.stop();
        let entries = journald.entries();
        assert_eq!(stands_for(&entries, "denied", DENIALS), 3 * TIMES as u64, "{runtime}");
        assert_eq!(entries.iter().filter(|entry| with_verdict("admitted")(entry)).count(), 1, "{runtime}");
        assert_eq!(entries.iter().filter(|entry| with_verdict("closed")(entry)).count(), 1, "{runtime}");
    }
}

/// The user database does not answer, and a process waits for the outcome of the reload.
#[test]
fn a_stop_tells_who_waits_for_a_reload_that_there_is_none() {
    needs_root();
    for runtime in RUNTIMES {
        let place = common::Place::new();
        let start = Start::example("service", &[runtime], ALL).wrapper(&common::hung_user_database(&place));
        let service = start.ready();
        service.place.file("policy.toml", "[allow.slow]\nusers = [\"somebody\"]\n");
        let mut ask = Command::new(env!("CARGO_BIN_EXE_echod"));
        let asking = ask.args(["reload", &service.pid().to_string()]).stderr(Stdio::piped()).spawn().unwrap();
        service.manager.wait_for("RELOADING=1", 1);
        service.signal(Signal::SIGTERM);
        let told = asking.wait_with_output().unwrap();
        assert_eq!(told.status.code(), Some(78), "{runtime}: {}", String::from_utf8_lossy(&told.stderr));
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {stderr}");
    }
}

#[test]
fn a_stop_gives_live_connections_their_end() {
    let journald = Journald::new();
    for runtime in RUNTIMES {
        let service = service(&journald, runtime, ALL);
        let client = service.connect();
        answers(&client, "one");
        service.signal(Signal::SIGTERM);
        client.expect_end("");
        service.manager.wait_for("STOPPING=1", 1);
        let (status, _, stderr) = service.wait();
        assert!(status.success(), "{runtime}: {stderr}");
    }
}

#[test]
fn a_stop_inline_serves_every_connection_that_is_admitted() {
    let journald = Journald::new();
    let service = service(&journald, "inline", ALL);
    let first = service.connect();
    first.expect("hello\n");
    // The gate's thread is held by the first connection: these come to the gate all at once, more than one turn judges.
    let others: Vec<_> = (0..40).map(|_| service.connect()).collect();
    first.send("x");
    others[0].expect("hello\n");
    service.signal(Signal::SIGTERM);
    service.manager.wait_for("STOPPING=1", 1);
    others.iter().for_each(|client| client.send("x"));
    others[0].expect_end("");
    others[1..].iter().for_each(|client| client.expect_end("hello\n"));
    let (status, _, stderr) = service.wait();
    assert!(status.success(), "{stderr}");
    assert_eq!(count(&journald, "admitted"), 41);
}

#[test]
fn the_manager_gets_signs_of_life_and_a_reload_in_order() {
    for runtime in RUNTIMES {
        let start = Start::example("service", &[runtime], ALL).env("WATCHDOG_USEC", "100000");
        let service = start.ready();
        service.manager.wait_for("WATCHDOG=1", 2);
        service.signal(Signal::SIGHUP);
        service.manager.wait_for("RELOADING=1", 1);
        service.manager.wait_for("READY=1", 2);
        service.stop();
    }
}

/// An example that the service manager's own program passes a socket, as README.md has it. It is ended when dropped.
struct Activated {
    child: Child,
    socket: PathBuf,
    _start: Start,
}

impl Activated {
    fn new(name: &str, policy: &str) -> Self {
        needs_root();
        let start = Start::example(name, &[], policy);
        let (place, program) = (start.place(), common::peer_program().with_file_name(name));
        let socket = place.path("activated");
        let mut activate = Command::new("systemd-socket-activate");
        activate.arg("-l").arg(&socket).arg(program).arg(place.path("policy.toml"));
        let mut child = activate.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        // The socket's file is there before anyone listens.
        assert!(stderr.any(|line| line.contains("Listening on")), "systemd-socket-activate, of systemd");
        // Read to the end, so that the pipe does not fill.
        thread::spawn(move || stderr.for_each(drop));
        fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
        Self { child, socket, _start: start }
    }

    fn stop(mut self) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let status = eventually("it ends", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_example_serves_two_users_under_systemd_socket_activate() {
    for (name, input, expected) in [("shout", "hello\n", "HELLO\n"), ("tokio_echo", "hello\n", "hello\n")] {
        let service = Activated::new(name, ONLY_ROOT);
        let client = Client::connect(&service.socket);
        client.send(input);
        client.half_close();
        client.expect_end(expected);
        PeerProcess::user(ALICE, &service.socket).client().expect_end(DENIED);
        service.stop();
    }
}

#[test]
fn an_http_example_serves_two_users_under_systemd_socket_activate() {
    let service = Activated::new("axum_note", &format!("{ONLY_ROOT}may-write = true\n"));
    let written = ("200".to_owned(), "written by uid 0\n".to_owned());
    assert_eq!(curl(&service.socket, 0, &["--data", "at one"]), written);
    assert_eq!(curl(&service.socket, 0, &[]), ("200".to_owned(), "at one".to_owned()));
    let denied = ("403".to_owned(), "{\"message\":\"Unauthorized access\"}\n".to_owned());
    assert_eq!(curl(&service.socket, ALICE, &[]), denied);
    service.stop();
}
