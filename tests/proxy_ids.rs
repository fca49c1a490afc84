//! What the proxy passes on besides bytes: the peer's ids (`identity = "peer"`) and file descriptors (`descriptors = "pass"`).
//! Clients are processes of other users.

mod common;

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use common::behind::leave_free;
use common::{ALICE, BOB, Client, OWNER, PeerProcess, Start, eventually, needs_root, receive, send_along};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt};
use peergate::connect_as::{ConnectAs, Ids};
use peergate::{Gid, Uid};

const EVERYBODY: &str = "[allow.everybody]\nusers = [\"any\"]\n";

fn start(config: &str, more: &str) -> (Start, UnixListener) {
    let start = Start::bare();
    let path = start.place().path("behind");
    let behind = UnixListener::bind(&path).unwrap();
    let listener = start.place().listener("socket");
    let text = format!("{config}\n[forward]\nto = \"{}\"\n{more}", path.display());
    (start.config(&text).socket("peergate@test.socket", listener), behind)
}

fn accept(behind: &UnixListener) -> Client {
    Client::of(behind.accept().unwrap().0)
}

/// As the service sees the other end: uid, gid, and the list of supplementary groups as the kernel has it.
fn seen(service: &Client) -> (u32, u32, Vec<u32>) {
    let credentials = getsockopt(&service.0, sockopt::PeerCredentials).unwrap();
    let groups = peergate::Peer::supplementary_of(&service.0).unwrap().unwrap();
    (credentials.uid(), credentials.gid(), groups.into_iter().map(Gid::raw).collect())
}

fn open_to_all(behind: &Path) {
    std::fs::set_permissions(behind, std::fs::Permissions::from_mode(0o666)).unwrap();
}

#[test]
fn the_service_sees_the_peers_ids_and_groups() {
    needs_root();
    let (start, behind) = start(EVERYBODY, "identity = \"peer\"\n");
    open_to_all(&start.place().path("behind"));
    // Only root gets to the socket, by its path.
    let gated = start.place().path("gated");
    std::fs::create_dir(&gated).unwrap();
    std::fs::set_permissions(&gated, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::rename(start.place().path("behind"), gated.join("behind")).unwrap();
    let to = gated.join("behind").display().to_string();
    let proxy = start.args(&["--to", &to]).wrapper(&["setpriv", "--groups", "64030", "--"]).ready();
    for (ids, expected) in [
        ("64001:64010", (ALICE, 64010, vec![])),
        ("64002:64002:64020,64021", (BOB, 64002, vec![64020, 64021])),
        // As initgroups(3) makes the list, with the effective group in it. The kernel keeps what is in it twice.
        ("64002:64002:64002,64020", (BOB, 64002, vec![64002, 64020])),
        ("64001:64010:64020,64010,64020", (ALICE, 64010, vec![64010, 64020, 64020])),
        ("64001:64001:4", (ALICE, 64001, vec![4])),
    ] {
        let peer = PeerProcess::with(&["--as", ids], &proxy.socket());
        let service = accept(&behind);
        assert_eq!(seen(&service), expected);
        peer.connections[0].send("hello");
        service.expect("hello");
        service.send("you");
        peer.connections[0].expect("you");
    }
    // Of all threads' ids: their own again.
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", proxy.pid())).unwrap();
    for status in tasks.map(|task| status(task.unwrap())) {
        assert!(status.contains("Uid:\t0\t0\t0\t0\n") && status.contains("Gid:\t0\t0\t0\t0\n"), "{status}");
        assert!(status.contains("Groups:\t64030 \n"), "{status}");
    }
}

#[test]
fn without_being_root_it_connects_as_root_and_then_as_others() {
    needs_root();
    let (start, behind) = start(
        "[allow.root]\nusers = [0]\nroot = true\n[allow.everybody]\nusers = [\"any\"]\n",
        "identity = \"peer\"\n",
    );
    open_to_all(&start.place().path("behind"));
    let ids = "+setuid,+setgid";
    let as_another =
        ["setpriv", "--reuid=64003", "--regid=64003", "--clear-groups", "--inh-caps", ids, "--ambient-caps", ids];
    let proxy = start.wrapper(&as_another).ready();
    for uid in [0, ALICE, 0, BOB] {
        let peer = PeerProcess::user(uid, &proxy.socket());
        let service = accept(&behind);
        assert_eq!(seen(&service), (uid, uid, vec![]));
        peer.connections[0].send("hello");
        service.expect("hello");
    }
}

#[test]
fn a_peer_whose_groups_cannot_all_be_told_does_not_get_to_the_service() {
    needs_root();
    let (start, behind) = start(EVERYBODY, "identity = \"peer\"\nreplies = \"text\"\n");
    open_to_all(&start.place().path("behind"));
    let proxy = start.ready();
    let groups: Vec<_> = (0..1100).map(|number| (100_000 + number).to_string()).collect();
    let peer = PeerProcess::with(&["--as", &format!("64001:64001:{}", groups.join(","))], &proxy.socket());
    peer.connections[0].expect_end("Service unavailable\n");
    behind.set_nonblocking(true).unwrap();
    assert!(behind.accept().is_err());
    drop(peer);
    let told = proxy.stop();
    assert!(told.contains("cannot be connected to with groups that cannot all be told"), "{told}");
}

#[test]
fn connecting_as_another_user_changes_no_thread_for_longer_than_that() {
    needs_root();
    let address = SocketAddr::from_abstract_name(format!("connect-as-{}", std::process::id())).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let connect_as = ConnectAs::start().unwrap();
    let ids = |uid, gid, groups: &[u32]| Ids {
        uid: Uid::new(uid),
        gid: Gid::new(gid),
        groups: groups.iter().map(|group| Gid::new(*group)).collect(),
    };
    let connect = |to: &SocketAddr, ids: Ids| {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        connect_as.connect(socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap(), to, ids)
    };
    for (uid, gid, groups) in [(ALICE, 64011, &[64021, 64022][..]), (BOB, BOB, &[]), (0, 0, &[7]), (ALICE, 5, &[6])] {
        let _connection = connect(&address, ids(uid, gid, groups)).unwrap();
        assert_eq!(seen(&accept(&listener)), (uid, gid, groups.to_vec()));
    }
    for unknown in [ids(65534, 1, &[]), ids(1, 65534, &[]), ids(1, 1, &[65534])] {
        assert_eq!(connect(&address, unknown).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    let nowhere = SocketAddr::from_pathname("/nonexistent/socket").unwrap();
    assert_eq!(connect(&nowhere, ids(ALICE, ALICE, &[])).unwrap_err().kind(), ErrorKind::NotFound);
    let _connection = connect(&address, ids(BOB, ALICE, &[])).unwrap();
    assert_eq!(seen(&accept(&listener)), (BOB, ALICE, vec![]), "the thread goes on");
    assert!(nix::unistd::geteuid().is_root() && nix::unistd::getegid().as_raw() == 0);
}

#[test]
fn the_file_mode_of_the_services_socket_holds_for_the_peer() {
    needs_root();
    let (start, behind) = start(EVERYBODY, "identity = \"peer\"\nreplies = \"text\"\n");
    let proxy = start.ready();
    // Only root may write to it.
    let peer = PeerProcess::user(ALICE, &proxy.socket());
    peer.connections[0].expect_end("Service unavailable\n");
    behind.set_nonblocking(true).unwrap();
    assert!(behind.accept().is_err());
    drop(peer);
    assert!(proxy.stop().contains("could not be reached: Permission denied"));
}

#[test]
fn root_gets_to_the_service_only_under_a_rule_that_says_so() {
    needs_root();
    let (proxy, behind) = start(OWNER, "identity = \"peer\"\nreplies = \"text\"\n");
    let proxy = proxy.ready();
    proxy.connect().expect_end("Service unavailable\n");
    let to = proxy.place.path("behind");
    proxy.reload_with(&format!("{OWNER}root = true\n[forward]\nto = \"{}\"\nidentity = \"peer\"\n", to.display()));
    let _client = proxy.connect();
    assert_eq!(seen(&accept(&behind)).0, 0);
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(proxy.wait().2.contains("is not connected to as root; expected root = true in its rule"));
}

#[test]
fn without_the_capabilities_the_start_and_a_reload_fail() {
    needs_root();
    let without = |capability| ["setpriv", "--bounding-set", capability, "--inh-caps", capability, "--"];
    for capability in ["-setgid", "-setuid"] {
        let (first, _) = start(OWNER, "identity = \"peer\"\n");
        let (code, _, told) = first.wrapper(&without(capability)).run();
        assert!(code == 78 && told.contains("CAP_SETUID") && told.contains("peergate@NAME.service.d/"), "{told}");
    }
    let (proxy, behind) = start(OWNER, "");
    let proxy = proxy.wrapper(&without("-setuid")).ready();
    let to = proxy.place.path("behind");
    proxy.place.file("echod.toml", &format!("{OWNER}[forward]\nto = \"{}\"\nidentity = \"peer\"\n", to.display()));
    assert_eq!(proxy.reload().0, 78);
    let client = proxy.connect();
    let service = accept(&behind);
    client.send("as before");
    service.expect("as before");
}

#[test]
fn a_reload_that_changes_whose_ids_the_service_sees_ends_live_connections() {
    needs_root();
    let config = |root: bool, identity| {
        let rule = format!("{EVERYBODY}root = {root}\n");
        move |to: &Path| format!("{rule}[forward]\nto = \"{}\"\nidentity = \"{identity}\"\n", to.display())
    };
    let (start, behind) = start(&format!("{EVERYBODY}root = true\n"), "identity = \"peer\"\n");
    let to = start.place().path("behind");
    open_to_all(&to);
    let mut proxy = start.with_store();
    let talk = |client: &Client, service: &Client| {
        client.send("still");
        service.expect("still");
    };
    for is_restart in [false, true] {
        proxy.reload_with(&config(true, "peer")(&to));
        let root = proxy.connect();
        let its_service = accept(&behind);
        let alice = PeerProcess::user(ALICE, &proxy.socket());
        let service = accept(&behind);
        talk(&root, &its_service);
        talk(alice.client(), &service);
        let change = |proxy: common::Echod, config: String| {
            proxy.place.file("echod.toml", &config);
            if is_restart {
                proxy.restart(|start, _| start)
            } else {
                assert_eq!(proxy.reload().0, 0);
                proxy
            }
        };
        // Root may not be shown to the service any more. That concerns no other user.
        proxy = change(proxy, config(false, "peer")(&to));
        root.expect_end("");
        its_service.expect_end("");
        talk(alice.client(), &service);
        proxy = change(proxy, config(false, "own")(&to));
        alice.client().expect_end("");
        service.expect_end("");
        let (client, service) = (proxy.connect(), accept(&behind));
        talk(&client, &service);
        proxy = change(proxy, config(true, "peer")(&to));
        client.expect_end("");
        service.expect_end("");
        if !is_restart {
            proxy.wait_for_stderr("the service is to see the ids of its peers now");
            proxy.wait_for_stderr("the service is not to see root any more");
        }
    }
    proxy.stop();
}

#[test]
fn ids_that_cannot_be_given_back_end_the_program() {
    needs_root();
    let (start, _behind) = start(EVERYBODY, "identity = \"peer\"\n");
    open_to_all(&start.place().path("behind"));
    // The first call takes the peer's uid, the second is to take the own one back.
    let trace = start.place().path("trace");
    let proxy = start.traced(&trace, &["inject=setresuid:error=EPERM:when=2+"]).ready();
    let peer = PeerProcess::user(ALICE, &proxy.socket());
    let (status, _, _) = proxy.wait();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(nix::libc::SIGABRT));
    drop(peer);
}

#[test]
fn long_streams_are_verified_too_where_senders_are() {
    needs_root();
    let (start, behind) = start(&format!("{EVERYBODY}[service]\nverify = \"line\"\n"), "");
    let proxy = start.ready();
    let sent = "x".repeat(100_000);
    let peer = PeerProcess::with(&["--as", "64001:64001", "--say", &sent], &proxy.socket());
    let service = accept(&behind);
    service.expect(&sent);
    // The same connection in the hands of another user.
    let _ = peer.client().try_send("z".repeat(100_000));
    service.expect_end("");
    assert_eq!(peer.client().rest().0, b"");
    drop((peer, service));
    let told = proxy.stop();
    assert!(told.contains("Revoked ") && told.contains("its data came from another user (uid 0)"), "{told}");
}

#[test]
fn a_peer_with_an_id_that_is_unknown_here_does_not_get_to_the_service() {
    needs_root();
    let rule = "[allow.root]\nusers = [0]\nroot = true\n";
    let (start, behind) = start(rule, "identity = \"peer\"\nreplies = \"text\"\n");
    // A user namespace that maps root and its group, and no other.
    let proxy = start.wrapper(&["unshare", "-U", "-r"]).ready();
    let peer = PeerProcess::with(&["--as", "0:64001"], &proxy.socket());
    peer.connections[0].expect_end("Service unavailable\n");
    behind.set_nonblocking(true).unwrap();
    assert!(behind.accept().is_err());
    drop(peer);
    let told = proxy.stop();
    assert!(told.contains("cannot be connected to with an id that is unknown here"), "{told}");
}

fn is_same_file(one: &impl AsFd, other: &impl AsFd) -> bool {
    let file = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).unwrap();
    file(one.as_fd()) == file(other.as_fd())
}

/// The next message: its bytes, and what came with them.
fn next(from: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut room = [0; 1024];
    let (count, fds) = receive(from, &mut room).unwrap().unwrap();
    (room[..count].to_vec(), fds)
}

#[test]
fn descriptors_pass_both_ways_with_the_bytes_that_they_came_with() {
    let (start, behind) = start(OWNER, "descriptors = \"pass\"\n");
    let proxy = start.with_store();
    let before = common::descriptors(&proxy);
    let client = proxy.connect();
    let service = accept(&behind);
    let (one, other) = UnixStream::pair().unwrap();
    for (from, to) in [(&client, &service), (&service, &client)] {
        from.send("before");
        send_along(&from.0, b"with two", &[one.as_raw_fd(), other.as_raw_fd()]).unwrap();
        from.send("after");
        to.expect("before");
        let (bytes, fds) = next(&to.0);
        assert_eq!((&*bytes, fds.len()), (&b"with two"[..], 2));
        assert!(is_same_file(&fds[0], &one) && is_same_file(&fds[1], &other));
        to.expect("after");
    }
    common::expect_descriptors(&proxy, before + 2);
    // The service does not read: they wait in the proxy, also over a restart.
    let clogged = client.clog(b"x");
    client.0.set_nonblocking(true).unwrap();
    let proxy = proxy.restart(|start, _| start);
    let mut heard = 0;
    let mut room = vec![0; 65_536];
    let mut sent = false;
    while heard < clogged.len() || !sent {
        if !sent {
            let result = send_along(&client.0, b"late", &[one.as_raw_fd()]);
            // While the queue is full.
            assert!(result.is_ok() || result == Err(nix::errno::Errno::EAGAIN), "{result:?}");
            sent = result.is_ok();
        }
        if heard < clogged.len() {
            let most = room.len().min(clogged.len() - heard);
            heard += (&service.0).read(&mut room[..most]).unwrap();
        }
    }
    let (bytes, fds) = next(&service.0);
    assert!(bytes == b"late" && fds.len() == 1 && is_same_file(&fds[0], &one));
    send_along(&service.0, b"back", &[one.as_raw_fd()]).unwrap();
    client.0.set_nonblocking(false).unwrap();
    let (bytes, fds) = next(&client.0);
    assert!(bytes == b"back" && fds.len() == 1 && is_same_file(&fds[0], &one));
    drop((client, service));
    proxy.stop();
}

#[test]
fn as_many_descriptors_as_are_stated_pass_and_one_more_ends_the_connection() {
    const MOST: usize = 124;
    let (start, behind) = start(OWNER, "descriptors = \"pass\"\n");
    let proxy = start.ready();
    let before = common::descriptors(&proxy);
    let client = proxy.connect();
    let service = accept(&behind);
    let (one, _other) = UnixStream::pair().unwrap();
    send_along(&client.0, b"all", &[one.as_raw_fd(); MOST]).unwrap();
    let (bytes, fds) = next(&service.0);
    assert_eq!((&*bytes, fds.len()), (&b"all"[..], MOST));
    drop(fds);
    send_along(&client.0, b"too many", &[one.as_raw_fd(); MOST + 1]).unwrap();
    assert!(receive(&service.0, &mut [0; 64]).unwrap().is_none(), "neither bytes nor descriptors");
    assert_eq!(client.rest().0, b"");
    drop((client, service));
    common::expect_descriptors(&proxy, before);
    let told = proxy.stop();
    assert!(told.contains("Revoked ") && told.contains("it sent file descriptors, which are not taken"), "{told}");
}

#[test]
fn without_numbers_for_descriptors_their_bytes_do_not_go_alone() {
    let (start, behind) = start(OWNER, "descriptors = \"pass\"\n");
    let proxy = start.ready();
    let client = proxy.connect();
    let service = accept(&behind);
    client.send("before");
    service.expect("before");
    let (one, _other) = UnixStream::pair().unwrap();
    // What the program has open for a moment, to tell the manager its status, may leave one: then both have come.
    let came = (0..20).take_while(|_| {
        leave_free(&proxy, 0);
        send_along(&client.0, b"with one", &[one.as_raw_fd()]).unwrap();
        let mut bytes = [0; 64];
        let received = receive(&service.0, &mut bytes).unwrap();
        received.is_some_and(|(count, fds)| {
            assert_eq!((&bytes[..count], fds.len()), (&b"with one"[..], 1), "bytes without their descriptor");
            true
        })
    });
    assert!(came.count() < 20, "there are numbers for descriptors all the time");
    assert_eq!(client.rest().0, b"");
}

/// Whether each descriptor of the program but the standard three is close-on-exec.
fn all_close_on_exec(proxy: &common::Echod) -> bool {
    let flags = |entry: std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
        i32::from_str_radix(&flags, 8).unwrap()
    };
    let entries = std::fs::read_dir(format!("/proc/{}/fdinfo", proxy.pid())).unwrap().map(Result::unwrap);
    let mut later = entries.filter(|entry| entry.file_name().to_str().unwrap().parse::<u32>().unwrap() > 2);
    later.all(|entry| flags(entry) & nix::libc::O_CLOEXEC != 0)
}

/// Sends messages with this descriptor until nothing more fits in anywhere: the proxy holds some. How many bytes and messages
/// went.
fn clog_with(end: &Client, one: &UnixStream) -> (usize, usize) {
    end.0.set_nonblocking(true).unwrap();
    let (mut sent, mut messages, mut stalls) = (0, 0, 0);
    while stalls < 50 {
        // The kernel takes as many bytes as a whole or not at all: what the proxy holds has its descriptor.
        match send_along(&end.0, &[b'm'; 20_000], &[one.as_raw_fd()]) {
            Ok(count) => {
                sent += count;
                messages += 1;
                stalls = 0;
            }
            Err(_) => {
                stalls += 1;
                std::thread::yield_now();
            }
        }
    }
    end.0.set_nonblocking(false).unwrap();
    (sent, messages)
}

#[test]
fn descriptors_held_at_a_restart_arrive() {
    let (start, behind) = start(OWNER, "descriptors = \"pass\"\n");
    let mut proxy = start.with_store();
    let client = proxy.connect();
    let service = accept(&behind);
    let (one, other) = UnixStream::pair().unwrap();
    let (up, down) = (clog_with(&client, &one), clog_with(&service, &other));
    assert!(all_close_on_exec(&proxy), "also the descriptors that wait");
    proxy = proxy.restart(|start, _| start);
    client.half_close();
    service.half_close();
    for (end, sent, file) in [(&service, up, one), (&client, down, other)] {
        let (mut heard, mut fds) = (0, 0);
        let mut room = vec![0; 20_000];
        while let Some((count, came)) = receive(&end.0, &mut room).unwrap().filter(|(count, _)| *count > 0) {
            assert!(came.iter().all(|fd| is_same_file(fd, &file)));
            heard += count;
            fds += came.len();
        }
        assert_eq!((heard, fds), sent);
    }
    drop((client, service));
    proxy.stop();
}

#[test]
fn a_reload_and_a_restart_that_refuse_or_pass_descriptors_reach_live_connections() {
    let what = |word: &str| format!("descriptors = \"{word}\"\n");
    let (start, behind) = start(OWNER, &what("pass"));
    let to = start.place().path("behind");
    let mut proxy = start.with_store();
    let (one, _other) = UnixStream::pair().unwrap();
    for (is_restart, is_up) in [(false, true), (false, false), (true, true), (true, false)] {
        let change = |proxy: common::Echod, word| {
            let config = format!("{OWNER}\n[forward]\nto = \"{}\"\n{}", to.display(), what(word));
            proxy.place.file("echod.toml", &config);
            if is_restart {
                proxy.restart(|start, _| start)
            } else {
                assert_eq!(proxy.reload().0, 0);
                proxy
            }
        };
        proxy = change(proxy, "pass");
        let (client, service) = (proxy.connect(), accept(&behind));
        let (from, into) = if is_up { (&client, &service) } else { (&service, &client) };
        let passes = || {
            send_along(&from.0, b"with one", &[one.as_raw_fd()]).unwrap();
            let (bytes, fds) = next(&into.0);
            assert!(bytes == b"with one" && fds.len() == 1 && is_same_file(&fds[0], &one));
        };
        // With its first turn a connection of an earlier process has what the configuration says.
        let talk = || {
            from.send("alone");
            into.expect("alone");
        };
        passes();
        proxy = change(proxy, "refuse");
        talk();
        match send_along(&from.0, b"with one", &[one.as_raw_fd()]) {
            Err(error) => assert_eq!(error, nix::errno::Errno::EPERM),
            // Before Linux 6.16 the kernel cannot refuse them.
            Ok(_) => {
                into.expect_end("");
                continue;
            }
        }
        talk();
        proxy = change(proxy, "pass");
        talk();
        passes();
    }
    proxy.stop();
}

#[test]
fn a_restart_that_still_passes_descriptors_refuses_none_in_between() {
    let (start, behind) = start(OWNER, "descriptors = \"pass\"\n");
    let place = std::sync::Arc::clone(start.place());
    let trace = place.path("trace");
    let proxy = start.with_store();
    let (client, service) = (proxy.connect(), accept(&behind));
    client.send("before");
    service.expect("before");
    let proxy = proxy.restart(|start, _| start.traced(&trace, &["trace=setsockopt"]));
    client.send("after");
    service.expect("after");
    drop((client, service));
    proxy.stop();
    let told = std::fs::read_to_string(&trace).unwrap();
    // strace(1) may not know its name. The first descriptor that is passed is the listener.
    let of_option = told.lines().filter(|line| line.contains("SO_PASSRIGHTS") || line.contains(", 0x53 "));
    let of_connections: Vec<_> = of_option.filter(|line| !line.contains("setsockopt(3, ")).collect();
    assert!(!of_connections.is_empty(), "{told}");
    assert!(of_connections.iter().all(|line| line.contains(", [1], 4)")), "{of_connections:#?}");
}

/// How many descriptors lie unread in the sockets of this process (`self`) or of another one.
fn unread(pid: &str) -> usize {
    let of_one = |entry: std::io::Result<std::fs::DirEntry>| {
        let told = std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        told.lines().find_map(|line| line.strip_prefix("scm_fds:")?.trim().parse::<usize>().ok()).unwrap_or(0)
    };
    std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().map(of_one).sum()
}

#[test]
fn descriptors_that_lie_unread_hold_up_other_connections_and_end_none() {
    needs_root();
    const LIMIT: usize = 64;
    const EACH: usize = 5;
    let (start, behind) = start(EVERYBODY, "descriptors = \"pass\"\n");
    open_to_all(&start.place().path("behind"));
    // The kernel counts what is in flight for each user and bounds it by RLIMIT_NOFILE, for root without a bound.
    let start = start.wrapper(&["setpriv", "--reuid=64030", "--regid=64030", "--clear-groups"]);
    let proxy = start.wrapper(&["prlimit", &format!("--nofile={LIMIT}:{LIMIT}")]).ready();
    let (hoarder, deaf) = (proxy.connect(), accept(&behind));
    let (client, service) = (proxy.connect(), accept(&behind));
    let (one, _other) = UnixStream::pair().unwrap();
    let of_deaf = format!("/proc/self/fdinfo/{}", deaf.0.as_raw_fd());
    let messages = LIMIT / EACH + 1;
    for number in 1..=messages {
        send_along(&hoarder.0, b"unread", &[one.as_raw_fd(); EACH]).unwrap();
        let lie_there = format!("scm_fds: {}\n", number * EACH);
        eventually("they lie there", || std::fs::read_to_string(&of_deaf).unwrap().contains(&lie_there).then_some(()));
        // The proxy closes its own on another thread.
        eventually("they are closed", || (common::descriptors(&proxy) < LIMIT - 2 * EACH).then_some(()));
    }
    for from in [&client, &service] {
        send_along(&from.0, b"with one", &[one.as_raw_fd()]).unwrap();
        from.send("after");
        let proxy = proxy.pid().to_string();
        eventually("the proxy has read it", || (unread(&proxy) == 0).then_some(()));
    }
    // Other connections have nothing to do with that.
    let (another, its_service) = (proxy.connect(), accept(&behind));
    another.send("question");
    its_service.expect("question");
    for _ in 0..messages {
        let (bytes, fds) = next(&deaf.0);
        assert_eq!((&*bytes, fds.len()), (&b"unread"[..], EACH));
    }
    for end in [&service, &client] {
        let (bytes, fds) = next(&end.0);
        assert!(bytes == b"with one" && fds.len() == 1 && is_same_file(&fds[0], &one));
        end.expect("after");
    }
}

#[test]
fn descriptors_are_refused_unless_they_are_asked_for() {
    // From Linux 6.16 on the kernel refuses them. The injection stands for an earlier one.
    let without = ["trace=setsockopt", "inject=setsockopt:error=ENOPROTOOPT"];
    for (can_refuse, is_from_client) in [(true, true), (true, false), (false, true), (false, false)] {
        let (start, behind) = start(OWNER, "");
        let trace = start.place().path("trace");
        let proxy = if can_refuse { start } else { start.traced(&trace, &without) }.ready();
        let client = proxy.connect();
        let service = accept(&behind);
        let (from, to) = if is_from_client { (client, service) } else { (service, client) };
        let (one, _) = UnixStream::pair().unwrap();
        from.send("before");
        to.expect("before");
        match send_along(&from.0, b"with one", &[one.as_raw_fd()]) {
            Err(error) => assert!(can_refuse && error == nix::errno::Errno::EPERM, "{error}"),
            Ok(_) => to.expect_end(""),
        }
    }
}
