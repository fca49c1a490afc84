//! The proxy between clients and a service that is the test's own. Every byte is compared, and how each end sees the other
//! one go. Restarts: proxy_restart.rs. What goes wrong: proxy_abuse.rs.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;

use common::behind::{Behind, await_failure, pair, serve, start, start_traced};
use common::{DENY_ALL, End, OWNER, Place, Start, eventually, show};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use peergate::Stream;
use peergate::fd_passing::{Passing, refuse};

#[test]
fn bytes_pass_both_ways_and_so_does_each_end_of_file() {
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    client.send("a\0question");
    service.expect("a\0question");
    service.send("half an ");
    client.expect("half an ");
    client.half_close();
    service.expect_end("");
    service.send("answer");
    client.expect("answer");
    service.half_close();
    client.expect_end("");
    // The other way round, and the service speaks first.
    let (client, service) = pair(&proxy, &behind);
    service.send("welcome");
    service.half_close();
    client.expect_end("welcome");
    client.send("still here");
    service.expect("still here");
    drop((client, service));
    proxy.stop();
}

#[test]
fn what_a_client_sends_before_it_closes_reaches_the_service() {
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    client.send("one way");
    drop(client);
    service.expect_end("one way");
    // The peer has gone: as without a proxy, what is written to it fails.
    eventually("the proxy hangs up", || (&service.0).write(b"too late").is_err().then_some(()));
}

#[test]
fn a_denied_peer_causes_no_connection_to_the_service() {
    for (replies, expected) in
        [("none", ""), ("text", "Unauthorized access\n"), ("redis", "-NOPERM Unauthorized access\r\n")]
    {
        let (proxy, behind) = serve(DENY_ALL, &format!("replies = \"{replies}\"\n"));
        let client = proxy.connect();
        let _ = client.try_send("PING\r\n");
        client.expect_end(expected);
        assert!(behind.is_left_alone());
    }
}

#[test]
fn a_peer_over_a_limit_is_told_in_its_own_language() {
    let (proxy, behind) = serve(&format!("{OWNER}\n[limits]\nconnections = 1\n"), "replies = \"http\"\n");
    let _first = pair(&proxy, &behind);
    let second = proxy.connect();
    let (reply, end) = second.rest();
    let reply = String::from_utf8(reply).unwrap();
    assert!(
        reply.starts_with("HTTP/1.1 503 ") && reply.ends_with("{\"message\":\"Too many connections\"}\n"),
        "{reply}"
    );
    assert_eq!(end, End::Eof);
}

#[test]
fn a_service_that_comes_late_gets_what_was_sent_before() {
    let (start, trace) = start_traced(OWNER, "connect-timeout = \"1h\"\n");
    let place = Arc::clone(start.place());
    let path = place.path("behind");
    let proxy = start.ready();
    // Nothing is there.
    let early = proxy.connect();
    early.send("early");
    await_failure(&trace, "ENOENT");
    let gone = proxy.connect();
    gone.send("and gone");
    drop(gone);
    // A socket on which no process has listened for a moment: connect(2) is refused.
    let flags = SockFlag::SOCK_CLOEXEC;
    let bound = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    bind(bound.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    let middle = proxy.connect();
    middle.send("middle");
    await_failure(&trace, "ECONNREFUSED");
    std::fs::remove_file(&path).unwrap();
    let behind = Behind::at(&place);
    let mut heard: Vec<_> = (0..3)
        .map(|_| behind.accept())
        .map(|service| {
            service.0.set_nonblocking(false).unwrap();
            let mut word = [0; 64];
            let count = (&service.0).read(&mut word).unwrap();
            // The client that is gone takes no answer.
            let _ = service.try_send("yes");
            String::from_utf8(word[..count].to_vec()).unwrap()
        })
        .collect();
    heard.sort();
    assert_eq!(heard, ["and gone", "early", "middle"]);
    early.expect("yes");
    middle.expect("yes");
}

#[test]
fn a_client_that_leaves_while_the_service_is_away_costs_nothing_further() {
    let (start, _) = start(OWNER, "connect-timeout = \"1h\"\n");
    let proxy = start.ready();
    let before = common::descriptors(&proxy);
    let clients: Vec<_> = (0..10).map(|_| proxy.connect()).collect();
    // What only the start needs may have been open before.
    eventually("they wait in the proxy", || (common::descriptors(&proxy) >= before + 5).then_some(()));
    drop(clients);
    common::expect_descriptors(&proxy, before);
}

#[test]
fn a_full_backlog_is_waited_for() {
    let (start, trace) = start_traced(OWNER, "connect-timeout = \"1h\"\n");
    let behind = Behind::at(start.place());
    let proxy = start.ready();
    listen(&behind.listener, Backlog::new(0).unwrap()).unwrap();
    // Takes the only place.
    let _first = UnixStream::connect(&behind.path).unwrap();
    let client = proxy.connect();
    client.send("waits");
    await_failure(&trace, "EAGAIN");
    behind.accept();
    let service = behind.accept();
    service.expect("waits");
    service.send("served");
    client.expect("served");
}

#[test]
fn a_service_that_stays_away_is_told_of_and_recorded() {
    for (replies, expected) in [
        ("none", ""),
        ("text", "Service unavailable\n"),
        ("redis", "-ERR Service unavailable\r\n"),
        ("postgresql", "E\0\0\0/SFATAL\0VFATAL\0C57P03\0Mservice unavailable\0\0"),
    ] {
        let (start, path) = start(OWNER, &format!("connect-timeout = \"1ms\"\nreplies = \"{replies}\"\n"));
        let proxy = start.ready();
        let client = proxy.connect();
        let _ = client.try_send("unheard");
        client.expect_end(expected);
        drop(client);
        let told = proxy.stop();
        let why = format!("{} could not be reached: No such file or directory", path.display());
        assert!(told.contains("Refused ") && told.contains(&why), "{told}");
    }
}

#[test]
fn a_socket_of_another_kind_is_not_waited_for() {
    let (start, path) = start(OWNER, "connect-timeout = \"1h\"\n");
    let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let proxy = start.ready();
    proxy.connect().expect_end("");
    assert!(proxy.stop().contains("Protocol wrong type for socket"));
}

#[test]
fn a_service_that_closes_at_once_ends_the_connection() {
    let (proxy, behind) = serve(OWNER, "");
    for _ in 0..20 {
        let (client, service) = pair(&proxy, &behind);
        drop(service);
        client.expect_end("");
    }
    // With an answer, and what the client has sent unread.
    for _ in 0..20 {
        let client = proxy.connect();
        client.send("a question");
        let service = behind.accept();
        service.send("an answer");
        drop(service);
        let (heard, _) = client.rest();
        assert_eq!(show(&heard), "an answer");
    }
}

#[test]
fn a_side_that_does_not_read_is_not_read_for() {
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    let before = common::memory(&proxy, "VmRSS");
    let up = client.clog(b"up the stream ");
    let down = service.clog(b"down the stream ");
    // What lies in the kernel's queues on both sides of the proxy, and no more than 128 KiB in it.
    assert!(up.len() < 1 << 20 && down.len() < 1 << 20, "{} up, {} down", up.len(), down.len());
    let grown = common::memory(&proxy, "VmRSS").saturating_sub(before);
    assert!(grown < 1024, "grown by {grown} KiB");
    client.half_close();
    service.half_close();
    service.expect_end(&up);
    client.expect_end(&down);
}

/// Calls in strace(1)'s output: reads, writes, and looks for descriptors before a read.
fn calls(trace: &std::path::Path) -> [usize; 3] {
    let trace = std::fs::read_to_string(trace).unwrap();
    ["recvfrom(", "sendto(", "recvmsg("].map(|call| trace.matches(call).count())
}

#[test]
fn a_message_costs_one_read_and_one_write_also_after_a_restart() {
    const TIMES: usize = 50;
    let trace = ["trace=recvfrom,sendto,recvmsg"];
    let (start, _) = start(&format!("{OWNER}[service]\nbusy-poll = \"off\"\n"), "");
    let (behind, place) = (Behind::at(start.place()), Arc::clone(start.place()));
    let mut proxy = start.traced(&place.path("trace-1"), &trace).with_store();
    let (client, service) = pair(&proxy, &behind);
    let talk = || {
        for _ in 0..TIMES {
            client.send("question");
            service.expect("question");
            service.send("answer");
            client.expect("answer");
        }
    };
    talk();
    proxy = proxy.restart(|start, _| start.traced(&place.path("trace-2"), &trace));
    talk();
    drop((client, service));
    proxy.stop();
    // Whether this kernel can refuse descriptors.
    let (socket, _other) = UnixStream::pair().unwrap();
    refuse(&socket);
    let peeks = if Stream::accepted(socket).passing() == Passing::RefusedUnread { 0 } else { 2 * TIMES };
    for trace in ["trace-1", "trace-2"] {
        let found = calls(&place.path(trace));
        figure!("{TIMES} questions and answers, {trace}: reads, writes, peeks {found:?}");
        // Besides, both ends are looked at when the connection begins, and when it or the process ends.
        let around = [2 * TIMES, 2 * TIMES, peeks].map(|count| count..count + 15);
        assert!(found.iter().zip(&around).all(|(found, around)| around.contains(found)), "{trace}: {found:?}");
    }
}

#[test]
fn an_end_that_reads_no_more_is_told_to_the_other_one() {
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    client.0.shutdown(Shutdown::Read).unwrap();
    eventually("the service gets EPIPE", || (&service.0).write(b"into the void").is_err().then_some(()));
    client.send("and yet");
    service.expect("and yet");
    let (client, service) = pair(&proxy, &behind);
    service.0.shutdown(Shutdown::Read).unwrap();
    eventually("the client gets EPIPE", || (&client.0).write(b"into the void").is_err().then_some(()));
    service.send("and yet");
    client.expect("and yet");
}

#[test]
fn a_stop_gives_each_end_what_it_is_owed() {
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    client.send("the last");
    service.expect("the last");
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    service.expect_end("");
    service.send("word");
    drop(service);
    client.expect_end("word");
    assert!(proxy.wait().0.success());
}

#[test]
fn a_rule_may_lead_to_another_service() {
    let start = Start::bare();
    let place = Arc::clone(start.place());
    let listener = place.listener("socket");
    let behind = Behind::at(&place);
    // The general one, which the rule's own takes precedence over.
    let path = place.path("general");
    let general = Behind { listener: UnixListener::bind(&path).unwrap(), path };
    let forward = format!("[forward]\nto = \"{}\"\n", general.path.display());
    let to = format!("{OWNER}to = \"{}\"\n{forward}", behind.path.display());
    let proxy = start.config(&to).socket("peergate@test.socket", listener).ready();
    let (client, service) = pair(&proxy, &behind);
    client.send("hello");
    service.expect("hello");
    // The same service by another path, and nothing else has changed.
    let other = place.path("other");
    std::os::unix::fs::symlink(&behind.path, &other).unwrap();
    proxy.reload_with(&to);
    client.send("still");
    service.expect("still");
    proxy.reload_with(&format!("{OWNER}to = \"{}\"\n{forward}", other.display()));
    client.expect_end("");
    service.expect_end("");
    drop((client, service));
    assert!(general.is_left_alone());
    let told = proxy.stop();
    assert!(
        told.contains("Revoked ") && told.contains(&format!("its rule leads to {} now", other.display())),
        "{told}"
    );
}

#[test]
fn only_allow_rules_need_a_service() {
    let rules = |to: &str| format!("[deny.guests]\nusers = [64001]\n{OWNER}{to}");
    let check = |config: &str| Start::bare().args(&["check"]).config(config).run();
    let (code, summary, told) = check(&rules("to = \"/run/service\"\n"));
    assert!(code == 0 && summary.contains("to /run/service"), "{code} {summary} {told}");
    assert_eq!(check(&rules("")).0, 78);
}

#[test]
fn a_service_in_the_abstract_namespace_is_reached() {
    let name = format!("behind-{}", std::process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let start = Start::bare();
    let gate = start.place().listener("socket");
    let config = format!("{OWNER}[forward]\nto = \"@{name}\"\nconnect-timeout = \"1ms\"\n");
    let proxy = start.config(&config).socket("peergate@test.socket", gate).ready();
    let (client, behind) = (proxy.connect(), Behind { listener, path: "".into() });
    let service = behind.accept();
    client.send("hello");
    service.expect("hello");
}

#[test]
fn its_own_abstract_socket_is_no_upstream() {
    let name = format!("own-{}", std::process::id());
    let own = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let start = Start::bare().config(&format!("{OWNER}[forward]\nto = \"@{name}\"\n"));
    let (code, _, told) = start.socket("peergate@test.socket", own).run();
    assert!(code == 78 && told.contains(&format!("@{name} is a socket that peergate itself listens on")), "{told}");
}

#[test]
fn a_reload_puts_no_message_into_a_stream_that_it_denies() {
    let (proxy, behind) = serve(OWNER, "replies = \"text\"\n");
    let (client, service) = pair(&proxy, &behind);
    service.send("half an ans");
    client.expect("half an ans");
    let (silent, _its_service) = pair(&proxy, &behind);
    let to = format!("[forward]\nto = \"{}\"\nreplies = \"text\"\n", behind.path.display());
    proxy.reload_with(&format!("{DENY_ALL}{to}"));
    client.expect_end("");
    service.expect_end("");
    silent.expect_end("Unauthorized access\n");
}

#[test]
fn its_own_socket_is_no_upstream_at_the_start_and_at_a_reload() {
    let (first, path) = start(OWNER, "");
    std::os::unix::fs::symlink(first.place().path("socket"), &path).unwrap();
    let (code, _, told) = first.run();
    assert!(code == 78 && told.contains("is a socket that peergate itself listens on"), "{code} {told}");
    let (proxy, behind) = serve(OWNER, "");
    let (client, service) = pair(&proxy, &behind);
    let (own, to) = (proxy.socket().display().to_string(), behind.path.display().to_string());
    for config in [
        format!("{OWNER}[forward]\nto = \"{own}\"\n"),
        // In a rule, beside one that is right.
        format!("{OWNER}to = \"{own}\"\n[forward]\nto = \"{to}\"\n"),
    ] {
        proxy.place.file("echod.toml", &config);
        assert_eq!(proxy.reload().0, 78, "{config}");
    }
    client.send("as before");
    service.expect("as before");
}

#[test]
fn what_can_be_no_upstream_is_a_fault_of_the_configuration() {
    for (to, expected) in [
        (format!("/{}", "x".repeat(107)), "toml:4:6: `to`: string \"/xxx"),
        (
            "relative".to_owned(),
            "toml:4:6: `to`: string \"relative\"; expected the absolute path of a socket, of 107 bytes",
        ),
        ("/tmp".to_owned(), "/tmp is a directory; expected the socket of a service"),
        ("/dev/null".to_owned(), "/dev/null is no socket; expected"),
    ] {
        let (code, _, told) = Start::serving(&format!("{OWNER}[forward]\nto = \"{to}\"\n")).run();
        assert!(code == 78 && told.contains(expected), "{code} {told}");
    }
    let (code, _, told) = Start::serving(OWNER).run();
    assert!(
        code == 78 && told.contains("`to` is missing in [forward]") && told.contains("allow.owner"),
        "{code} {told}"
    );
}

#[test]
fn without_a_file_the_command_line_is_enough() {
    let start = Start::bare();
    let place = Arc::clone(start.place());
    let behind = Behind::at(&place);
    let (to, listen) = (behind.path.display().to_string(), place.path("socket").display().to_string());
    let proxy = start.args(&["--to", &to, "--listen", &listen]).ready();
    let (client, service) = pair(&proxy, &behind);
    client.send("hello");
    service.expect("hello");
    drop((client, service));
    proxy.stop();
    assert!(!place.path("socket").exists());
}

#[test]
fn an_instance_has_a_file_of_its_name() {
    let run = |args: &[&str], directory: &std::path::Path| {
        Start::bare().args(args).env("CONFIGURATION_DIRECTORY", directory.to_str().unwrap()).run()
    };
    let place = Place::new();
    let file = place.file("docker.toml", &format!("{OWNER}[forward]\nto = \"@docker\"\n"));
    let directory = file.parent().unwrap();
    let (code, summary, _) = run(&["check", "--instance", "docker"], directory);
    assert!(
        code == 0 && summary.contains("docker.toml\n") && summary.contains("to = \"@docker\"\n"),
        "{code} {summary}"
    );
    let (code, summary, _) = run(&["check", "--instance", "docker", "--to", "/run/other"], directory);
    assert!(code == 0 && summary.contains("to = \"/run/other\"\n"), "{code} {summary}");
    assert_eq!(run(&["check", "--instance", "none"], directory).0, 66);
    assert_eq!(run(&["check", "--instance", "../docker"], directory).0, 2);
    let (code, verdict, _) = run(&["explain", "--instance", "docker", "--uid", "64001"], directory);
    assert!(code == 1 && verdict.starts_with("denied by default\n"), "{code} {verdict}");
}
