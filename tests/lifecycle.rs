//! From READY=1 to the last record: reload, watchdog, idle exit and stop, with a service manager of the test's own.
//! Some tests need root, for mounts.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{BUSY, Client, DENIED, DENY_ALL, Echod, Manager, OWNER, Start, TOO_LONG, eventually, needs_root};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

fn messages(manager: &Manager) -> Vec<Vec<String>> {
    manager.received.lock().messages.clone()
}

#[test]
fn ready_is_sent_when_it_accepts_and_stopping_before_it_exits() {
    let echod = Start::serving(OWNER).ready();
    // Without another wait: a service that is ready accepts.
    echod.connect().echo("hello");
    let manager = Arc::clone(&echod.manager);
    echod.stop();
    let told = messages(&manager);
    assert_eq!(told[0], ["READY=1", "STATUS=0 connected, 0 admitted, 0 denied; policy of 1 rule"]);
    let stopping = told.iter().position(|message| message.contains(&"STOPPING=1".to_owned())).unwrap();
    assert!(told[stopping + 1..].iter().flatten().all(|field| !field.starts_with("READY")));
    assert_eq!(manager.received.lock().count("READY=1"), 1);
}

#[test]
fn a_failed_start_never_sends_ready() {
    let echod = Start::serving("[allow.x]\nuser = [0]\n").spawn();
    let manager = Arc::clone(&echod.manager);
    let (status, _, _) = echod.wait();
    assert_eq!(status.code(), Some(78));
    assert!(messages(&manager).is_empty());
}

#[test]
fn sigterm_and_sigint_exit_0_and_give_clients_an_end_of_file() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let echod = Start::serving(OWNER).ready();
        let (idle, midline) = (echod.connect(), echod.connect());
        idle.echo("hello");
        midline.send("half");
        echod.signal(signal);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{signal}: {stderr}");
        idle.expect_end(b"");
        midline.expect_end("> half");
    }
}

#[test]
fn a_second_sigterm_changes_nothing() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.send("half");
    for _ in 0..5 {
        echod.signal(Signal::SIGTERM);
    }
    let (status, _, _) = echod.wait();
    assert!(status.success());
    client.expect_end("> half");
}

#[test]
fn a_connection_made_during_a_stop_waits_for_the_next_process() {
    let echod = Start::serving(OWNER).ready();
    let socket = echod.socket();
    echod.signal(Signal::SIGTERM);
    let clients: Vec<Client> = (0..50)
        .map(|number| {
            let client = Client::connect(&socket);
            client.send(format!("{number}\n"));
            client
        })
        .collect();
    let echod = echod.start_again(|start, _| start);
    for (number, client) in clients.iter().enumerate() {
        client.expect(format!("> {number}\n"));
    }
    echod.stop();
}

#[test]
fn without_a_manager_it_serves_and_stops() {
    let place = common::Place::new();
    let gone = place.path("gone");
    for notify in ["(unset)", "", "/no/such/socket", gone.to_str().unwrap(), "@no-such-abstract-socket", "relative"] {
        let echod = Start::serving(OWNER).env("NOTIFY_SOCKET", notify).spawn();
        let client = echod.connect();
        client.echo("hello");
        assert_eq!(echod.reload().0, 0, "NOTIFY_SOCKET={notify}");
        echod.stop();
        client.expect_end(b"");
    }
}

#[test]
fn a_manager_socket_in_the_abstract_namespace_is_notified() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let name = format!("echod-notify-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    socket.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let echod = Start::serving(OWNER).env("NOTIFY_SOCKET", &format!("@{name}")).spawn();
    let mut buffer = [0; 4096];
    let count = socket.recv(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"READY=1\n"), "{}", common::show(&buffer[..count]));
    echod.stop();
}

#[test]
fn a_manager_that_exits_does_not_end_the_service() {
    let echod = Start::serving(OWNER).ready();
    fs::remove_file(echod.manager.socket()).unwrap();
    let client = echod.connect();
    client.echo("hello");
    assert_eq!(echod.reload().0, 0);
    client.echo("still here");
    echod.stop();
}

#[test]
fn a_reload_sends_one_datagram_with_the_clock_and_then_ready() {
    let echod = Start::serving(OWNER).ready();
    echod.reload_with(&format!("{OWNER}[deny.x]\nusers = [1]\n"));
    let told = messages(&echod.manager);
    let reloading = told.iter().position(|message| message.contains(&"RELOADING=1".to_owned())).unwrap();
    let clock = told[reloading].iter().find_map(|field| field.strip_prefix("MONOTONIC_USEC=")).unwrap();
    assert!(clock.parse::<u64>().unwrap() > 0);
    let ready = &told[reloading + 1];
    assert_eq!(ready[0], "READY=1");
    assert!(ready[1].ends_with("policy of 2 rules"), "{ready:?}");
}

#[test]
fn sighup_reloads_and_sends_ready() {
    let echod = Start::serving(OWNER).ready();
    echod.place.file("echod.toml", DENY_ALL);
    echod.signal(Signal::SIGHUP);
    echod.manager.wait_for("READY=1", 2);
    echod.connect().expect_end(DENIED);
    echod.stop();
}

#[test]
fn the_new_policy_decides_on_the_next_connection() {
    let echod = Start::serving(OWNER).ready();
    for _ in 0..50 {
        echod.reload_with(DENY_ALL);
        echod.connect().expect_end(DENIED);
        echod.reload_with(OWNER);
        echod.connect().echo("in");
    }
}

#[test]
fn a_reload_revokes_only_connections_that_are_now_denied() {
    let config = |rule: &str| format!("{rule}[limits]\nconnections-per-user = 1000\n[service]\nworkers = 3\n");
    let echod = Start::serving(&config(OWNER)).ready();
    let clients: Vec<Client> = (0..60).map(|_| echod.connect()).collect();
    for (number, client) in clients.iter().enumerate() {
        client.echo("in");
        if number % 3 == 0 {
            client.send("half");
        }
    }
    echod.reload_with(&config("[allow.any]\nusers = [\"any\"]\n"));
    for (number, client) in clients.iter().enumerate() {
        client.send(" a line\n");
        client.expect(if number % 3 == 0 { "> half a line\n" } else { ">  a line\n" });
    }
    echod.reload_with(DENY_ALL);
    for client in &clients {
        // The unfinished line is not echoed: the peer is now denied.
        client.expect_end(DENIED);
    }
    eventually("no client is connected", || {
        messages(&echod.manager)
            .iter()
            .flatten()
            .any(|field| field.starts_with("STATUS=0 connected, 60 admitted"))
            .then_some(())
    });
}

#[test]
fn a_revoked_peer_that_keeps_sending_is_closed_without_a_reset() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.echo("in");
    client.send("no line yet");
    echod.reload_with(DENY_ALL);
    // Until the service has closed the connection.
    while client.try_send(vec![b'x'; 4000]).is_ok() {}
    client.expect_end(DENIED);
}

#[test]
fn new_limits_hold_for_live_connections() {
    let config = |length: usize, users: usize| {
        format!("[limits]\nline-length = {length}\nconnections-per-user = {users}\n{OWNER}")
    };
    let echod = Start::serving(&config(10, 3)).ready();
    let clients: Vec<Client> = (0..3).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("123456789"));
    echod.connect().expect_end(BUSY);
    echod.reload_with(&config(20, 4));
    clients.iter().for_each(|client| client.echo("1234567890123456789"));
    let fourth = echod.connect();
    fourth.echo("there is room now");
    echod.connect().expect_end(BUSY);
    echod.reload_with(&config(5, 2));
    clients[0].send("12345\n");
    clients[0].expect_end(TOO_LONG);
    // No connection is closed to meet a lower limit; none is admitted while it is exceeded.
    clients[1].echo("1234");
    echod.connect().expect_end(BUSY);
}

#[test]
fn a_lower_line_limit_cuts_off_no_half_sent_echo_at_a_reload() {
    let config = |length: &str| format!("[limits]\nline-length = \"{length}\"\n{OWNER}");
    let echod = Start::serving(&config("1M")).ready();
    let client = echod.connect();
    // More than a socket's buffer holds.
    let line = [vec![b'x'; 900_000], b"\n".to_vec()].concat();
    client.send(&line);
    client.expect("> xxx");
    let waits = echod.connect();
    waits.send("not yet a line");
    echod.reload_with(&config("10"));
    client.expect(&line[3..]);
    client.echo("123456789");
    client.send("1234567890\n");
    client.expect_end(TOO_LONG);
    // An unfinished line has not been accepted yet, so the new limit holds for it.
    let _ = waits.try_send("\n");
    waits.expect_end(TOO_LONG);
}

#[test]
fn an_idle_timeout_set_by_a_reload_holds_for_live_connections() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.echo("hello");
    echod.reload_with(&format!("[limits]\nidle-timeout = \"50ms\"\n{OWNER}"));
    client.expect_end(b"");
}

#[test]
fn after_a_reload_a_connection_has_the_limits_of_its_new_rule() {
    let echod = Start::serving("[allow.a]\nusers = [\"self\"]\nline-length = 10\n").ready();
    let client = echod.connect();
    client.echo("123456789");
    echod.reload_with("[allow.b]\nusers = [\"self\"]\nline-length = 20\n");
    client.echo("1234567890123456789");
    client.send("12345678901234567890\n");
    client.expect_end(TOO_LONG);
}

/// Each of these reloads must leave everything as it was.
#[test]
fn a_reload_of_a_bad_file_is_refused_and_the_old_policy_stays() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let path = echod.place.path("echod.toml");
    type Spoil<'a> = (&'static str, Box<dyn Fn() + 'a>);
    let spoils: Vec<Spoil> = vec![
        ("faulty", Box::new(|| drop(echod.place.file("echod.toml", "[allow.x]\nuser = [0]\n")))),
        ("not TOML", Box::new(|| drop(echod.place.file("echod.toml", "\0[[[")))),
        (
            "half good",
            Box::new(|| drop(echod.place.file("echod.toml", &format!("{DENY_ALL}[limits]\nconnections = 0\n")))),
        ),
        ("missing", Box::new(|| fs::remove_file(&path).unwrap())),
        ("a directory", Box::new(|| fs::create_dir(&path).unwrap())),
        (
            "others may write",
            Box::new(|| {
                fs::remove_dir(&path).unwrap();
                echod.place.file("echod.toml", DENY_ALL);
                fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
            }),
        ),
    ];
    for (name, spoil) in &spoils {
        spoil();
        let (code, said) = echod.reload();
        assert_eq!(code, 78, "{name}: {said}");
        assert!(said.contains("the old one stays"), "{name}: {said}");
        client.echo(name);
        echod.connect().echo("by the old policy");
    }
    assert_eq!(echod.manager.received.lock().count("RELOADING=1"), spoils.len());
    // Each reload ended with READY=1, for which systemd waits.
    assert_eq!(echod.manager.received.lock().count("READY=1"), spoils.len() + 1);
    echod.reload_with(DENY_ALL);
    client.expect_end(DENIED);
}

#[test]
fn ten_reloads_at_once_succeed_and_the_last_file_is_in_force() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    echod.place.file("echod.toml", &format!("[limits]\nline-length = 10\n{OWNER}"));
    thread::scope(|scope| {
        let reloads: Vec<_> = (0..10).map(|_| scope.spawn(|| echod.reload())).collect();
        for reload in reloads {
            let (code, said) = reload.join().unwrap();
            assert_eq!(code, 0, "{said}");
        }
    });
    client.send("1234567890\n");
    client.expect_end(TOO_LONG);
}

#[test]
fn reloads_under_load_lose_no_byte() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for number in 0..5000 {
                client.send(format!("line {number}\n"));
            }
            client.half_close();
        });
        let receiver = scope.spawn(|| {
            let expected: String = (0..5000).map(|number| format!("> line {number}\n")).collect();
            client.expect_end(expected);
        });
        while !receiver.is_finished() {
            assert_eq!(echod.reload().0, 0);
        }
        sender.join().unwrap();
        receiver.join().unwrap();
    });
}

#[test]
fn a_reload_during_a_flood_admits_no_denied_peer() {
    let echod = Start::serving(DENY_ALL).ready();
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            for _ in 0..500 {
                echod.connect().expect_end(DENIED);
            }
        });
        while !flood.is_finished() {
            assert_eq!(echod.reload().0, 0);
        }
        flood.join().unwrap();
    });
}

#[test]
fn sigterm_during_reloads_stops_in_order() {
    for _ in 0..10 {
        let echod = Start::serving(OWNER).ready();
        let client = echod.connect();
        client.send("half");
        for _ in 0..3 {
            echod.signal(Signal::SIGHUP);
        }
        echod.signal(Signal::SIGTERM);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{stderr}");
        client.expect_end("> half");
    }
}

#[test]
fn reload_of_a_missing_process_fails_and_says_so() {
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    for pid in [gone.id().to_string(), "0".into(), "1000000000".into()] {
        let asked = std::process::Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &pid]).output().unwrap();
        assert_eq!(asked.status.code(), Some(71), "{pid}");
        assert!(!asked.stderr.is_empty());
    }
}

#[test]
fn reload_of_another_program_does_it_no_harm() {
    let mut other = std::process::Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let pid = other.id().to_string();
    let asked = std::process::Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &pid]).output().unwrap();
    assert_eq!(asked.status.code(), Some(71));
    let said = String::from_utf8(asked.stderr).unwrap();
    assert!(said.contains("it does not wait to be asked; expected the process of a service"), "{said}");
    drop(other.stdin.take());
    assert!(other.wait().unwrap().success(), "it was ended");
}

/// The thread of this name.
fn thread_of(echod: &Echod, name: &str) -> Pid {
    eventually(name, || {
        let tasks = fs::read_dir(format!("/proc/{}/task", echod.pid())).unwrap();
        tasks.filter_map(Result::ok).find_map(|task| {
            let comm = fs::read_to_string(task.path().join("comm")).ok()?;
            (comm.trim() == name).then(|| Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap()))
        })
    })
}

#[test]
fn the_watchdog_is_notified_while_every_thread_makes_progress() {
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "200000").ready();
    echod.manager.wait_for("WATCHDOG=1", 5);
    let client = echod.connect();
    client.echo("idle or busy");
    echod.manager.wait_for("WATCHDOG=1", 10);
    echod.stop();
}

#[test]
fn a_thread_that_hangs_stops_the_watchdog_until_it_continues() {
    for name in ["worker-0", "gate", "journal"] {
        let echod = Start::serving(&format!("[service]\nworkers = 2\n{OWNER}")).env("WATCHDOG_USEC", "100000").ready();
        echod.manager.wait_for("WATCHDOG=1", 2);
        // Stops this thread alone.
        let hung = thread_of(&echod, name);
        ptrace::seize(hung, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(hung).unwrap();
        waitpid(hung, Some(WaitPidFlag::__WALL)).unwrap();
        // The next log line names the thread; while the journal's own thread hangs, no line is written.
        if name != "journal" {
            echod.wait_for_stderr(&format!("no sign of life from: {}", name.replace('-', " ")));
        }
        // Messages already on their way have arrived by now: three checks fit into the timeout.
        let pause = std::time::Duration::from_millis(100);
        thread::sleep(pause);
        let fed = echod.manager.received.lock().count("WATCHDOG=1");
        thread::sleep(pause * 3);
        assert_eq!(echod.manager.received.lock().count("WATCHDOG=1"), fed, "{name} hangs and the watchdog is fed");
        ptrace::detach(hung, None).unwrap();
        echod.manager.wait_for("WATCHDOG=1", fed + 3);
        echod.stop();
    }
}

#[test]
fn the_watchdog_is_notified_while_a_reload_waits_for_a_lookup() {
    needs_root();
    let place = common::Place::new();
    let wrapper = common::hung_user_database(&place);
    let passwd = place.path("passwd");
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "200000").wrapper(&wrapper).ready();
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    echod.signal(Signal::SIGHUP);
    echod.manager.wait_for("RELOADING=1", 1);
    let fed = echod.manager.received.lock().count("WATCHDOG=1");
    echod.manager.wait_for("WATCHDOG=1", fed + 5);
    // The user database answers each lookup.
    std::thread::spawn(move || while std::fs::write(&passwd, "somebody:x:0:0::/:/bin/sh\n").is_ok() {});
    echod.manager.wait_for("READY=1", 2);
    echod.connect().echo("in");
}

#[test]
fn an_absurd_watchdog_setting_does_not_prevent_serving() {
    for usec in ["0", "-1", "nonsense", "", "18446744073709551615", "99999999999999999999999", "1"] {
        let echod = Start::serving(OWNER).env("WATCHDOG_USEC", usec).ready();
        echod.connect().echo(usec);
        echod.stop();
    }
}

#[test]
fn a_watchdog_of_another_process_is_ignored() {
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1").ready();
    echod.connect().echo("hello");
    let manager = Arc::clone(&echod.manager);
    echod.stop();
    assert!(!manager.received.lock().has("WATCHDOG=1"));
}

#[test]
fn it_exits_when_idle_and_sends_stopping_before() {
    let echod = Start::serving(&format!("[service]\nidle-exit = \"50ms\"\n{OWNER}")).ready();
    let manager = Arc::clone(&echod.manager);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    manager.wait_for("STOPPING=1", 1);
}

#[test]
fn it_does_not_exit_while_a_client_is_connected() {
    let config = format!("[service]\nidle-exit = \"20ms\"\n{OWNER}");
    let echod = Start::serving(&config).spawn();
    let client = echod.connect();
    client.echo("I stay");
    // A second service without clients exits; this one, idle for longer, does not.
    let other = Start::serving(&config).ready();
    assert!(other.wait().0.success());
    client.echo("still here");
    client.half_close();
    client.expect_end(b"");
    assert!(echod.wait().0.success());
}

#[test]
fn a_connection_made_during_an_idle_exit_is_served() {
    // More of them, for as long as you like: ECHOD_TEST_EXITS=3000 cargo test --test lifecycle during_an_idle_exit
    let exits = common::setting("ECHOD_TEST_EXITS", 150);
    let config = format!("[service]\nidle-exit = \"1ms\"\n{OWNER}");
    let first = Start::serving(&config).ready();
    let (socket, manager) = (first.socket(), Arc::clone(&first.manager));
    let mut echod = Some(first);
    for round in 0..exits {
        // At different moments of the exit: before it, at its first message, and after its last.
        let exits = manager.received.lock().count("STOPPING=1");
        match round % 3 {
            0 => {}
            1 => drop(
                manager
                    .received
                    .try_wait(|received| (received.count("STOPPING=1") > exits || received.is_over()).then_some(())),
            ),
            _ => drop(manager.received.try_wait(|received| received.is_over().then_some(()))),
        }
        let client = Client::connect(&socket);
        client.send(format!("round {round}\n"));
        client.half_close();
        // As the manager does: a connection in the backlog of an exited service starts it again.
        let answer = thread::scope(|scope| {
            let answer = scope.spawn(|| client.rest());
            echod = echod.take().map(|ended| ended.start_again(|start, _| start));
            answer.join().unwrap()
        });
        assert_eq!((common::show(&answer.0), answer.1), (format!("> round {round}\\n"), common::End::Eof));
    }
}

#[test]
fn time_spans_beyond_the_clock_mean_for_ever() {
    let longest = i64::MAX;
    for config in [
        format!("[limits]\nidle-timeout = {longest}\n{OWNER}"),
        format!("[allow.owner]\nusers = [\"self\"]\nidle-timeout = {longest}\n"),
        format!("[service]\nidle-exit = {longest}\n{OWNER}"),
        format!("[audit]\ninterval = {longest}\nrecord = \"lines\"\n{OWNER}"),
    ] {
        let echod = Start::serving(&config).ready();
        let client = echod.connect();
        client.echo("hello");
        assert_eq!(echod.reload(), (0, String::new()));
        client.echo("still here");
        client.half_close();
        client.expect_end("");
        echod.connect().echo("the next");
        echod.stop();
    }
}

#[test]
fn the_idle_time_begins_when_the_last_connection_ends() {
    let span = Duration::from_millis(400);
    let echod = Start::serving(&format!("[service]\nidle-exit = \"400ms\"\n{OWNER}")).ready();
    let client = echod.connect();
    client.echo("hello");
    // Longer than the time span: counted from the connect, it would be over when the connection ends.
    thread::sleep(2 * span);
    client.half_close();
    let left = Instant::now();
    client.expect_end("");
    let manager = Arc::clone(&echod.manager);
    manager.wait_for("STOPPING=1", 1);
    assert!(left.elapsed() >= span, "exits {:?} after the last one left", left.elapsed());
    assert!(echod.wait().0.success());
}

#[test]
fn reloads_do_not_keep_an_idle_connection_alive() {
    let echod = Start::serving(&format!("[limits]\nidle-timeout = \"500ms\"\n{OWNER}")).ready();
    let client = echod.connect();
    client.echo("hello");
    thread::scope(|scope| {
        let ended = scope.spawn(|| client.expect_end(""));
        // The reloads follow each other faster than the timeout, and together take far longer.
        for _ in 0..1000 {
            if ended.is_finished() {
                break;
            }
            assert_eq!(echod.reload().0, 0);
        }
        assert!(ended.is_finished(), "each reload began the time anew");
    });
}

#[test]
fn traffic_before_a_reload_restarts_the_idle_timeout() {
    let config = |span: &str| format!("[limits]\nidle-timeout = \"{span}\"\n{OWNER}");
    let echod = Start::serving(&config("1h")).ready();
    let client = echod.connect();
    client.echo("hello");
    thread::sleep(Duration::from_millis(100));
    client.echo("hello again");
    // Counted from the connect or from the other reload, the time would be over at once.
    echod.reload_with(&config("59min"));
    client.echo("still here");
    echod.reload_with(&config("1ms"));
    client.expect_end("");
}

#[test]
fn a_reload_switches_verify_for_live_connections() {
    needs_root();
    let alice = "[allow.alice]\nusers = [64001]\n";
    let verifying = format!("[service]\nverify = \"line\"\n{alice}");
    let echod = Start::serving(alice).ready();
    let connect = || common::PeerProcess::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    let (first, second, halfway) = (connect(), connect(), connect());
    for one in [&first, &second, &halfway] {
        one.client().expect("> mine\n");
        // The test, which runs as root, has the connection now.
        one.client().echo("handed over");
    }
    // It was received before the reload, without credentials.
    halfway.client().send("half a line");
    echod.reload_with(&verifying);
    halfway.client().expect_end(DENIED);
    first.client().send("not hers\n");
    first.client().expect_end(DENIED);
    echod.reload_with(alice);
    second.client().echo("the sender is not checked");
    let third = connect();
    third.client().expect("> mine\n");
    echod.reload_with(&verifying);
    echod.reload_with(alice);
    third.client().echo("not checked either");
}

#[test]
fn a_reload_with_the_default_file_removed_is_refused() {
    let start = Start::bare();
    let listener = start.place().listener("socket");
    let directory = start.place().path("").to_str().unwrap().to_owned();
    start.place().file("echod.toml", &format!("[limits]\nconnections-per-user = 1\n{OWNER}"));
    let echod = start.env("CONFIGURATION_DIRECTORY", &directory).socket("echo.socket", listener).ready();
    let client = echod.connect();
    client.echo("in");
    fs::remove_file(echod.place.path("echod.toml")).unwrap();
    let (code, said) = echod.reload();
    assert_eq!(code, 78, "{said}");
    client.echo("still in");
    echod.connect().expect_end(BUSY);
    echod.wait_for_stderr("echod.toml: is gone");
    // The file is back, so it is read again.
    echod.reload_with(&format!("[limits]\nconnections-per-user = 2\n{OWNER}"));
    echod.connect().echo("the second");
    // A default file that was missing at the start may also be missing at a reload.
    let start = Start::bare();
    let listener = start.place().listener("socket");
    let directory = start.place().path("").to_str().unwrap().to_owned();
    let echod = start.env("CONFIGURATION_DIRECTORY", &directory).socket("echo.socket", listener).ready();
    assert_eq!(echod.reload(), (0, String::new()));
    echod.connect().echo("in");
}

#[test]
fn a_reload_of_an_unreadable_file_is_refused() {
    needs_root();
    let policy = "[allow.any]\nusers = [\"any\"]\n";
    for default in [false, true] {
        let start = Start::bare();
        let listener = start.place().listener("socket");
        let file = start.place().file("echod.toml", policy);
        let directory = start.place().path("").to_str().unwrap().to_owned();
        let start = match default {
            true => start.env("CONFIGURATION_DIRECTORY", &directory),
            false => start.args(&["--config", file.to_str().unwrap()]),
        };
        let echod = start.run_as("64001:64001").socket("echo.socket", listener).ready();
        echod.connect().echo("in");
        echod.place.file("echod.toml", DENY_ALL);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        echod.signal(Signal::SIGHUP);
        echod.manager.wait_for("READY=1", 2);
        echod.wait_for_stderr("Permission denied");
        echod.connect().echo("the old one stays");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        echod.signal(Signal::SIGHUP);
        echod.manager.wait_for("READY=1", 3);
        echod.connect().expect_end(DENIED);
    }
}

#[test]
fn a_name_unknown_at_the_start_is_found_by_a_reload() {
    needs_root();
    let place = common::Place::new();
    let passwd = place.path("passwd");
    fs::copy("/etc/passwd", &passwd).unwrap();
    let script = "mount --bind \"$0\" /etc/passwd && exec \"$@\"";
    let wrapper = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, passwd.to_str().unwrap()];
    let echod = Start::serving("[allow.new]\nusers = [\"newcomer\"]\n").wrapper(&wrapper).ready();
    echod.wait_for_stderr("newcomer");
    echod.connect().expect_end(DENIED);
    assert_eq!(echod.reload(), (0, String::new()));
    echod.connect().expect_end(DENIED);
    let mut file = fs::OpenOptions::new().append(true).open(&passwd).unwrap();
    std::io::Write::write_all(&mut file, b"newcomer:x:0:0::/:/bin/sh\n").unwrap();
    assert_eq!(echod.reload(), (0, String::new()));
    echod.connect().echo("known now");
}

/// A service with a reload that waits for the user database, which never answers.
fn slow_reload(manager: Arc<Manager>) -> (Echod, common::Place) {
    needs_root();
    let place = common::Place::new();
    let wrapper = common::hung_user_database(&place);
    let echod = Start::serving(OWNER).env("FDSTORE", "100").wrapper(&wrapper).ready_with(manager);
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    (echod, place)
}

#[test]
fn a_stop_does_not_wait_for_a_reload_that_waits_for_a_lookup() {
    for keep in [true, false] {
        let manager = Arc::new(Manager::new());
        manager.received.change(|received| received.capacity = 100);
        let (echod, _place) = slow_reload(manager);
        let client = echod.connect();
        client.echo("in");
        client.send("half");
        let pid = echod.pid().to_string();
        let ask = || {
            let mut ask = std::process::Command::new(env!("CARGO_BIN_EXE_echod"));
            ask.args(["reload", &pid]).stderr(Stdio::piped()).spawn().unwrap()
        };
        let first = ask();
        echod.manager.wait_for("RELOADING=1", 1);
        // Queued behind the first reload, or about to be; and SIGHUP, which surely is.
        let second = ask();
        echod.signal(Signal::SIGHUP);
        echod.signal(if keep { Signal::SIGTERM } else { Signal::SIGINT });
        let first = first.wait_with_output().unwrap();
        assert_eq!(first.status.code(), Some(78), "{}", String::from_utf8_lossy(&first.stderr));
        assert_ne!(second.wait_with_output().unwrap().status.code(), Some(0));
        let manager = Arc::clone(&echod.manager);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{stderr}");
        let stored = std::mem::take(&mut manager.received.lock().store);
        if keep {
            assert_eq!(stored.len(), 1, "the connection, in one socket: {stderr}");
        } else {
            client.expect_end("> half");
            assert_eq!(stored.len(), 0);
        }
    }
}

#[test]
fn a_reload_that_the_service_cannot_answer_fails_at_once() {
    needs_root();
    let echod = Start::serving("[allow.any]\nusers = [\"any\"]\n").run_as("64001:64001").ready();
    let asked = Instant::now();
    let (code, said) = echod.reload();
    assert_eq!(code, 71, "{said}");
    assert!(said.contains("it runs as uid 64001 and could not answer uid 0"), "{said}");
    assert!(asked.elapsed() < Duration::from_secs(50), "it waited for an answer");
    assert!(!echod.manager.received.lock().has("RELOADING=1"), "it was asked all the same");
    let pid = echod.pid().to_string();
    let program = echod.place.path("echod");
    let asked = std::process::Command::new("setpriv")
        .args(["--reuid", "64001", "--regid", "64001", "--clear-groups"])
        .arg(program)
        .args(["reload", &pid])
        .output()
        .unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", String::from_utf8_lossy(&asked.stderr));
}

#[test]
fn the_status_is_sent_at_most_once_a_second() {
    let echod = Start::serving(OWNER).ready();
    let begin = Instant::now();
    let mut came = 0;
    while begin.elapsed() < Duration::from_millis(2500) {
        echod.connect().echo("hello");
        came += 1;
    }
    let count =
        |received: &common::Received| received.messages.iter().filter(|one| one[0].starts_with("STATUS=")).count();
    let sent = echod.manager.wait("the last status", |received| {
        let last = format!("STATUS=0 connected, {came} admitted, 0 denied; policy of 1 rule");
        received.has(&last).then(|| count(received))
    });
    let most = begin.elapsed().as_secs() as usize + 1;
    assert!((1..=most).contains(&sent), "{sent} times in {:?} while {came} came", begin.elapsed());
}
