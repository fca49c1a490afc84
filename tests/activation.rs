//! Starting: with sockets that systemd passed or with a bound socket, and the message when neither works. Needs no
//! privileges.

mod common;

use std::fs;
use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};

use common::{Client, OWNER, Place, Start, eventually};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

#[test]
fn without_a_socket_it_names_both_ways_to_start_and_exits_64() {
    let (code, stdout, stderr) = Start::bare().run();
    assert_eq!((code, stdout.as_str()), (64, ""));
    assert!(stderr.contains("systemctl start echo.socket") && stderr.contains("echod --listen PATH"), "{stderr}");
}

#[test]
fn several_passed_sockets_are_all_served() {
    let start = Start::bare().config(OWNER);
    let names = ["one", "two", "three"];
    let listeners: Vec<UnixListener> = names.iter().map(|name| start.place().listener(name)).collect();
    let mut start = start;
    for (name, listener) in names.iter().zip(listeners) {
        start = start.socket(name, listener);
    }
    let echod = start.ready();
    for name in names {
        Client::connect(echod.place.path(name)).echo(name);
    }
    echod.stop();
}

#[test]
fn a_socket_in_the_abstract_namespace_is_served() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    let address = SocketAddr::from_abstract_name(format!("echod-test-{}", std::process::id())).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let echod = Start::bare().config(OWNER).socket("abstract", listener).ready();
    Client::of(UnixStream::connect_addr(&address).unwrap()).echo("nowhere in the file system");
    echod.stop();
}

#[test]
fn passed_and_bound_sockets_are_served_together() {
    let start = Start::serving(OWNER);
    let own = start.place().path("own");
    let echod = start.args(&["--listen", own.to_str().unwrap()]).ready();
    echod.connect().echo("theirs");
    Client::connect(&own).echo("ours");
    echod.stop();
    assert!(!own.exists(), "our own is removed");
}

#[test]
fn a_passed_sockets_file_is_left_as_it_was() {
    let start = Start::serving(OWNER);
    let path = start.place().path("socket");
    let before = fs::metadata(&path).unwrap().ino();
    let echod = start.ready();
    let place = echod.place.clone();
    echod.connect().echo("hello");
    let next = echod.restart(|start, _| start);
    next.connect().echo("hello again");
    next.stop();
    assert_eq!(fs::metadata(place.path("socket")).unwrap().ino(), before);
}

/// Descriptors of other kinds that a service manager could pass, and how the message names each.
fn wrong_things(place: &Place) -> Vec<(&'static str, OwnedFd, &'static str)> {
    let seqpacket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(std::os::fd::AsRawFd::as_raw_fd(&seqpacket), &UnixAddr::new(&place.path("seqpacket")).unwrap()).unwrap();
    listen(&seqpacket, Backlog::new(5).unwrap()).unwrap();
    let (connected, other) = UnixStream::pair().unwrap();
    // Kept open: the descriptor itself must be the fault, not a closed other end.
    std::mem::forget(other);
    let (pipe, _) = nix::unistd::pipe().unwrap();
    let unbound = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    vec![
        ("tcp", TcpListener::bind("127.0.0.1:0").unwrap().into(), "a listening AF_INET stream socket"),
        ("udp", UdpSocket::bind("127.0.0.1:0").unwrap().into(), "an AF_INET datagram socket"),
        ("datagram", UnixDatagram::bind(place.path("datagram")).unwrap().into(), "an AF_UNIX datagram socket"),
        ("seqpacket", seqpacket, "a listening AF_UNIX sequential-packet socket"),
        ("accepted", connected.into(), "an AF_UNIX stream socket that does not listen"),
        ("unbound", unbound, "an AF_UNIX stream socket that does not listen"),
        ("file", fs::File::open("/proc/self/status").unwrap().into(), "a regular file"),
        ("directory", fs::File::open("/").unwrap().into(), "a directory"),
        ("fifo", pipe, "a pipe or FIFO"),
        ("device", fs::File::open("/dev/null").unwrap().into(), "a character device"),
    ]
}

#[test]
fn a_descriptor_of_another_kind_is_named_and_exits_76() {
    let place = Place::new();
    for (name, fd, what) in wrong_things(&place) {
        let (code, _, stderr) = Start::bare().config(OWNER).socket(name, fd).run();
        assert_eq!(code, 76, "{name}: {stderr}");
        assert!(stderr.contains(&format!("fd 3 ({name}) is {what}")), "{stderr}");
        assert!(stderr.contains("expected a listening AF_UNIX stream socket"), "{stderr}");
    }
}

#[test]
fn all_wrong_descriptors_are_named_at_once_with_their_numbers() {
    let place = Place::new();
    let mut start = Start::serving(OWNER);
    let mut expected = Vec::new();
    for (number, (name, fd, what)) in wrong_things(&place).into_iter().enumerate() {
        start = start.socket(name, fd);
        expected.push(format!("fd {} ({name}) is {what}", number + 4));
    }
    let (code, _, stderr) = start.run();
    assert_eq!(code, 76, "{stderr}");
    for line in expected {
        assert!(stderr.contains(&line), "{line} is missing in {stderr}");
    }
    assert!(!stderr.contains("fd 3 "), "the good one is not complained of: {stderr}");
}

#[test]
fn descriptors_for_another_process_are_ignored_with_a_reason() {
    for pid in ["1", "(unset)", "", "nonsense"] {
        let (code, _, stderr) = Start::serving(OWNER).env("LISTEN_PID", pid).run();
        assert_eq!(code, 64, "LISTEN_PID={pid}: {stderr}");
        assert!(stderr.contains("LISTEN_PID") && stderr.contains("ignored"), "LISTEN_PID={pid}: {stderr}");
    }
}

#[test]
fn an_impossible_number_of_descriptors_exits_76() {
    for count in ["-1", "nonsense", "", "99999999999999999999", "4294967297"] {
        let (code, _, stderr) = Start::serving(OWNER).env("LISTEN_FDS", count).run();
        assert_eq!(code, 76, "LISTEN_FDS={count}: {stderr}");
        assert!(stderr.contains(&format!("LISTEN_FDS={count}")), "{stderr}");
    }
}

#[test]
fn a_missing_descriptor_is_named_and_exits_76() {
    let (code, _, stderr) = Start::serving(OWNER).env("LISTEN_FDS", "3").run();
    assert_eq!(code, 76, "{stderr}");
    assert!(stderr.contains("fd 4 ") && stderr.contains("not open"), "{stderr}");
}

#[test]
fn wrong_descriptor_names_do_not_prevent_serving() {
    for names in ["(unset)", "", "one:two:three"] {
        let echod = Start::serving(OWNER).env("LISTEN_FDNAMES", names).ready();
        echod.connect().echo(names);
        echod.stop();
    }
}

#[test]
fn no_child_process_would_inherit_a_socket() {
    let echod = Start::serving(OWNER).ready();
    let _client = echod.connect();
    let directory = format!("/proc/{}/fdinfo", echod.pid());
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap_or("0");
        let flags = u32::from_str_radix(flags, 8).unwrap();
        if number > 2 {
            count += 1;
            assert!(flags & 0o2_000_000 != 0, "descriptor {number} is not close-on-exec: {info}");
        }
    }
    assert!(count > 3);
}

fn listening(path: &std::path::Path) -> Start {
    Start::bare().config(OWNER).args(&["--listen", path.to_str().unwrap()])
}

#[test]
fn a_bound_socket_is_open_to_every_user_and_removed_at_exit() {
    let place = Place::new();
    let path = place.path("own");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let echod = listening(&path).ready();
        let found = fs::metadata(&path).unwrap();
        assert!(found.file_type().is_socket());
        assert_eq!(found.permissions().mode() & 0o777, 0o666);
        Client::connect(&path).echo("hello");
        echod.signal(signal);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{signal}: {stderr}");
        assert!(!path.exists(), "{signal} leaves the socket's file behind");
    }
}

#[test]
fn several_bound_sockets_are_all_served() {
    let place = Place::new();
    let paths = [place.path("a"), place.path("b")];
    let echod = listening(&paths[0]).args(&["--listen", paths[1].to_str().unwrap()]).ready();
    for path in &paths {
        Client::connect(path).echo("hello");
    }
    echod.stop();
    assert!(paths.iter().all(|path| !path.exists()));
}

#[test]
fn a_stale_socket_is_replaced() {
    let place = Place::new();
    let path = place.path("own");
    drop(UnixListener::bind(&path).unwrap());
    let echod = listening(&path).ready();
    Client::connect(&path).echo("alive again");
    echod.stop();
    assert!(!path.exists());
}

#[test]
fn a_socket_with_a_listener_is_left_alone() {
    let place = Place::new();
    let path = place.path("own");
    let living = UnixListener::bind(&path).unwrap();
    let (code, _, stderr) = listening(&path).run();
    assert_eq!(code, 71, "{stderr}");
    assert!(stderr.contains("another process listens there already"), "{stderr}");
    // The check for a listener has connected; the next connection is the test's.
    let (mut asked, _) = living.accept().unwrap();
    assert_eq!(asked.read(&mut [0; 8]).unwrap(), 0);
    UnixStream::connect(&path).expect("it is still there, and listens");
}

#[test]
fn of_two_processes_that_bind_one_path_one_succeeds() {
    let place = Place::new();
    let path = place.path("own");
    let first = listening(&path).ready();
    let (code, _, _) = listening(&path).run();
    assert_eq!(code, 71);
    Client::connect(&path).echo("the first one serves on");
    first.stop();
}

#[test]
fn a_file_of_another_kind_at_the_path_is_named_and_left_alone() {
    let place = Place::new();
    fs::write(place.path("file"), "precious").unwrap();
    fs::create_dir(place.path("directory")).unwrap();
    drop(UnixListener::bind(place.path("stale")).unwrap());
    symlink("stale", place.path("link")).unwrap();
    symlink("nowhere", place.path("dangling")).unwrap();
    let _datagram = UnixDatagram::bind(place.path("datagram")).unwrap();
    for (name, what) in [
        ("file", "a file that is no socket"),
        ("directory", "a directory"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("datagram", "a socket of another type"),
    ] {
        let before = fs::symlink_metadata(place.path(name)).unwrap().ino();
        let (code, _, stderr) = listening(&place.path(name)).run();
        assert_eq!(code, 71, "{name}: {stderr}");
        assert!(stderr.contains(&format!("there is {what}")), "{stderr}");
        assert_eq!(fs::symlink_metadata(place.path(name)).unwrap().ino(), before);
    }
    assert_eq!(fs::read_to_string(place.path("file")).unwrap(), "precious");
    let (code, _, stderr) = listening(&place.path("no/such/directory")).run();
    assert_eq!(code, 71, "{stderr}");
}

#[test]
fn a_path_of_107_bytes_is_served_and_one_of_108_is_refused() {
    let place = Place::new();
    let base = place.path("");
    let room = 107 - base.as_os_str().len();
    let longest = base.join("x".repeat(room));
    assert_eq!(longest.as_os_str().len(), 107);
    let echod = listening(&longest).ready();
    Client::connect(&longest).echo("just fits");
    echod.stop();

    let (code, _, stderr) = listening(&base.join("x".repeat(room + 1))).run();
    assert_eq!(code, 71, "{stderr}");
    assert!(stderr.contains("108 bytes") && stderr.contains("at most 107"), "{stderr}");
}

#[test]
fn every_path_that_cannot_be_bound_is_named_and_none_is_left() {
    let place = Place::new();
    fs::create_dir(place.path("d1")).unwrap();
    fs::create_dir(place.path("d2")).unwrap();
    let good = place.path("good");
    let mut start = listening(&good);
    for wrong in ["d1", "d2"] {
        start = start.args(&["--listen", place.path(wrong).to_str().unwrap()]);
    }
    let (code, _, stderr) = start.run();
    assert_eq!(code, 71, "{stderr}");
    assert!(stderr.contains("d1: there is a directory") && stderr.contains("d2: there is a directory"), "{stderr}");
    assert!(!good.exists(), "the one that could be bound is removed again");
}

#[test]
fn a_socket_file_replaced_meanwhile_is_not_removed() {
    let place = Place::new();
    let path = place.path("own");
    let echod = listening(&path).ready();
    fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    echod.stop();
    assert!(path.exists());
}

/// The owner of the directory can do so while root starts the service.
#[test]
fn a_symlink_in_place_of_the_socket_is_not_followed() {
    let place = Place::new();
    let secret = place.path("secret");
    fs::write(&secret, "").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let path = place.path("own");
    let echod = listening(&path).swapped_after_bind(&path, || {
        fs::rename(&path, place.path("away")).unwrap();
        symlink(&secret, &path).unwrap();
    });
    assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(place.path("away")).unwrap().mode() & 0o7777, 0o666);
    Client::connect(place.path("away")).echo("it serves all the same");
    echod.stop();
    assert!(fs::symlink_metadata(place.path("own")).unwrap().is_symlink(), "the link is not ours to remove");
}

#[test]
fn after_bind_no_path_is_used() {
    let place = Place::new();
    let elsewhere = Place::new();
    let trace = elsewhere.path("trace");
    let path = place.path("own");
    let echod = listening(&path).traced(&trace, &["trace=bind,connect,%file"]).ready();
    echod.stop();
    let calls = fs::read_to_string(&trace).unwrap();
    let (_, after) = calls.split_once(" bind(").expect("the socket is bound");
    let (_, after) = after.split_once('\n').unwrap();
    let by_path: Vec<_> = after.lines().filter(|call| call.contains(place.path("").to_str().unwrap())).collect();
    assert!(by_path.is_empty(), "{by_path:#?}");
    assert!(!path.exists(), "and yet the file is removed");
}

#[test]
fn the_socket_is_removed_from_the_directory_it_was_made_in() {
    let place = Place::new();
    let [made_in, moved, other] = ["made-in", "moved", "other"].map(|name| place.path(name));
    fs::create_dir(&made_in).unwrap();
    fs::create_dir(&other).unwrap();
    let echod = listening(&made_in.join("own")).ready();
    fs::rename(&made_in, &moved).unwrap();
    fs::hard_link(moved.join("own"), other.join("own")).unwrap();
    symlink("other", &made_in).unwrap();
    echod.stop();
    assert!(!moved.join("own").exists());
    assert!(other.join("own").exists(), "a file was removed by way of a link that came later");
}

/// Any user that may read a directory can lock it, for any length of time.
#[test]
fn a_lock_of_another_process_on_the_directory_refuses_no_start() {
    let place = Place::new();
    let path = place.path("own");
    let directory = fs::File::open(place.path("")).unwrap();
    let _held = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, error)| error).unwrap();
    for stale in [false, true] {
        if stale {
            drop(UnixListener::bind(&path).unwrap());
        }
        let echod = listening(&path).ready();
        Client::connect(&path).echo("it serves");
        let (code, _, stderr) = listening(&path).run();
        assert_eq!(code, 71, "{stderr}");
        Client::connect(&path).echo("and nobody takes its socket");
        echod.stop();
        assert!(!path.exists());
    }
}

#[test]
fn a_configuration_file_that_is_named_must_exist() {
    let (code, _, stderr) = Start::bare().args(&["--listen", "/x", "--config", "/no/such/echod.toml"]).run();
    assert_eq!(code, 66, "{stderr}");
    assert!(stderr.contains("/no/such/echod.toml"), "{stderr}");
}

#[test]
fn a_faulty_configuration_exits_78_and_every_fault_has_its_place() {
    let text = "[limits]\nline-length = \"many\"\n\n[allow.x]\nuser = [\"root\"]\n[allow.y]\nusers = [\"5-3\"]\n";
    let start = Start::serving(text);
    let path = start.place().path("echod.toml");
    let (code, _, stderr) = start.run();
    assert_eq!(code, 78, "{stderr}");
    for place in [":2:", ":5:", ":7:"] {
        assert!(stderr.contains(&format!("{}{place}", path.display())), "no {place} in {stderr}");
    }
}

#[test]
fn a_configuration_file_that_others_may_write_exits_78() {
    for mode in [0o666, 0o646, 0o664] {
        let start = Start::serving(OWNER);
        let path = start.place().path("echod.toml");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let (code, _, stderr) = start.run();
        assert_eq!(code, 78, "mode {mode:o}: {stderr}");
        assert!(stderr.contains("echod.toml"), "{stderr}");
    }
}

#[test]
fn the_configuration_directory_of_systemd_precedes_the_default() {
    let start = Start::bare();
    let place = start.place().clone();
    let listener = place.listener("socket");
    fs::create_dir(place.path("conf")).unwrap();
    let directory = place.path("conf").to_str().unwrap().to_owned();
    let echod = start.env("CONFIGURATION_DIRECTORY", &directory).socket("s", listener).ready();
    echod.connect().echo("no file: the owner is admitted");
    fs::write(place.path("conf/echod.toml"), common::DENY_ALL).unwrap();
    echod.signal(Signal::SIGHUP);
    echod.manager.wait_for("READY=1", 2);
    echod.connect().expect_end(common::DENIED);
    echod.stop();
}

#[test]
fn a_wrong_option_exits_with_the_code_of_clap() {
    assert_eq!(Start::bare().args(&["--no-such-option"]).run().0, 2);
    let (code, stdout, _) = Start::bare().args(&["--version"]).run();
    assert_eq!((code, stdout), (0, format!("echod {}\n", env!("CARGO_PKG_VERSION"))));
    assert_eq!(Start::bare().args(&["--help"]).run().0, 0);
}

#[test]
fn it_serves_with_an_empty_environment() {
    let place = Place::new();
    let path = place.path("own");
    let config = place.file("echod.toml", OWNER);
    let mut bare = Command::new(env!("CARGO_BIN_EXE_echod"))
        .args(["--listen".as_ref(), path.as_os_str(), "--config".as_ref(), config.as_os_str()])
        .env_clear()
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let client = eventually("it listens", || UnixStream::connect(&path).ok());
    Client::of(client).echo("hello");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(bare.id() as i32), Signal::SIGTERM).unwrap();
    assert!(bare.wait().unwrap().success());
}
