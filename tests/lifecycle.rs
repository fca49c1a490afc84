//! From READY=1 to the last record: reload, watchdog, idle exit and stop, with a service manager of the test's own.
//! Some of it needs mounts of its own, and so root.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{BUSY, Client, DENIED, Echod, Manager, NOBODY, OWNER, Start, TOO_LONG, eventually, needs_root};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

fn messages(manager: &Manager) -> Vec<Vec<String>> {
    manager.told.lock().messages.clone()
}

#[test]
fn ready_is_told_once_it_accepts_and_stopping_before_it_ends() {
    let echod = Start::serving(OWNER).ready();
    // No second look: what was told as ready accepts.
    echod.connect().echo("hello");
    let manager = Arc::clone(&echod.manager);
    echod.stop();
    let told = messages(&manager);
    assert_eq!(told[0], ["READY=1", "STATUS=0 connected, 0 admitted, 0 denied; policy of 1 rule"]);
    let stopping = told.iter().position(|message| message.contains(&"STOPPING=1".to_owned())).unwrap();
    assert!(told[stopping + 1..].iter().flatten().all(|field| !field.starts_with("READY")));
    assert_eq!(manager.told.lock().count("READY=1"), 1);
}

#[test]
fn a_start_that_fails_never_says_ready() {
    let echod = Start::serving("[allow.x]\nuser = [0]\n").spawn();
    let manager = Arc::clone(&echod.manager);
    let (status, _, _) = echod.wait();
    assert_eq!(status.code(), Some(78));
    assert!(messages(&manager).is_empty());
}

#[test]
fn sigterm_and_sigint_end_it_with_0_and_its_clients_with_an_end_of_file() {
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
fn those_who_connect_during_a_stop_wait_for_the_next_process() {
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
fn without_a_manager_it_serves_and_stops_all_the_same() {
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
fn a_manager_in_the_abstract_namespace_is_told_too() {
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
fn a_manager_that_dies_is_no_reason_to_die() {
    let echod = Start::serving(OWNER).ready();
    fs::remove_file(echod.manager.socket()).unwrap();
    let client = echod.connect();
    client.echo("hello");
    assert_eq!(echod.reload().0, 0);
    client.echo("still here");
    echod.stop();
}

#[test]
fn a_reload_is_told_in_one_datagram_with_the_clock_and_ends_with_ready() {
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
fn sighup_reloads_and_ends_with_ready_too() {
    let echod = Start::serving(OWNER).ready();
    echod.place.file("echod.toml", NOBODY);
    echod.signal(Signal::SIGHUP);
    echod.manager.wait_for("READY=1", 2);
    echod.connect().expect_end(DENIED);
    echod.stop();
}

#[test]
fn the_new_policy_judges_the_very_next_connection() {
    let echod = Start::serving(OWNER).ready();
    for _ in 0..50 {
        echod.reload_with(NOBODY);
        echod.connect().expect_end(DENIED);
        echod.reload_with(OWNER);
        echod.connect().echo("in");
    }
}

#[test]
fn a_reload_revokes_those_now_denied_and_nobody_else_notices() {
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
    echod.reload_with(NOBODY);
    for client in &clients {
        // What was not a line yet is not echoed to somebody who may not be here.
        client.expect_end(DENIED);
    }
    eventually("nobody is connected", || {
        messages(&echod.manager)
            .iter()
            .flatten()
            .any(|field| field.starts_with("STATUS=0 connected, 60 admitted"))
            .then_some(())
    });
}

#[test]
fn somebody_revoked_who_keeps_sending_and_never_reads_is_out_without_a_reset() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.echo("in");
    client.send("no line yet");
    echod.reload_with(NOBODY);
    // Until the other side has let go.
    while client.try_send(vec![b'x'; 4000]).is_ok() {}
    client.expect_end(DENIED);
}

#[test]
fn new_limits_hold_for_those_who_stay() {
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
    // Nobody is thrown out to meet a limit; nobody comes in while it is exceeded.
    clients[1].echo("1234");
    echod.connect().expect_end(BUSY);
}

#[test]
fn a_lower_limit_does_not_cut_off_a_line_whose_echo_is_half_out() {
    let config = |length: &str| format!("[limits]\nline-length = \"{length}\"\n{OWNER}");
    let echod = Start::serving(&config("1M")).ready();
    let client = echod.connect();
    // More than fits into the socket.
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
    // Of a line that is not whole yet nothing was accepted.
    let _ = waits.try_send("\n");
    waits.expect_end(TOO_LONG);
}

#[test]
fn an_idle_timeout_that_a_reload_brings_holds_for_those_who_are_in() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.echo("hello");
    echod.reload_with(&format!("[limits]\nidle-timeout = \"50ms\"\n{OWNER}"));
    client.expect_end(b"");
}

#[test]
fn a_rules_terms_follow_the_rule_that_admits_after_the_reload() {
    let echod = Start::serving("[allow.a]\nusers = [\"self\"]\nline-length = 10\n").ready();
    let client = echod.connect();
    client.echo("123456789");
    echod.reload_with("[allow.b]\nusers = [\"self\"]\nline-length = 20\n");
    client.echo("1234567890123456789");
    client.send("12345678901234567890\n");
    client.expect_end(TOO_LONG);
}

/// Each must leave everything as it was.
#[test]
fn a_faulty_unreadable_or_missing_file_is_refused_and_the_old_policy_stays() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let path = echod.place.path("echod.toml");
    type Spoil<'a> = (&'static str, Box<dyn Fn() + 'a>);
    let spoils: Vec<Spoil> = vec![
        ("faulty", Box::new(|| drop(echod.place.file("echod.toml", "[allow.x]\nuser = [0]\n")))),
        ("not TOML", Box::new(|| drop(echod.place.file("echod.toml", "\0[[[")))),
        (
            "half good",
            Box::new(|| drop(echod.place.file("echod.toml", &format!("{NOBODY}[limits]\nconnections = 0\n")))),
        ),
        ("missing", Box::new(|| fs::remove_file(&path).unwrap())),
        ("a directory", Box::new(|| fs::create_dir(&path).unwrap())),
        (
            "others may write",
            Box::new(|| {
                fs::remove_dir(&path).unwrap();
                echod.place.file("echod.toml", NOBODY);
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
    assert_eq!(echod.manager.told.lock().count("RELOADING=1"), spoils.len());
    // Each ended with ready again: systemd would wait for it.
    assert_eq!(echod.manager.told.lock().count("READY=1"), spoils.len() + 1);
    echod.reload_with(NOBODY);
    client.expect_end(DENIED);
}

#[test]
fn ten_reloads_at_once_all_succeed_and_the_last_file_is_in_force() {
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
fn reloads_under_load_cost_nobody_a_byte() {
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
fn a_reload_during_a_flood_of_denials_does_not_let_one_in() {
    let echod = Start::serving(NOBODY).ready();
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
fn sigterm_during_reloads_ends_in_order() {
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
fn asking_a_process_that_is_not_there_to_reload_fails_and_says_so() {
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    for pid in [gone.id().to_string(), "0".into(), "1000000000".into()] {
        let asked = std::process::Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &pid]).output().unwrap();
        assert_eq!(asked.status.code(), Some(71), "{pid}");
        assert!(!asked.stderr.is_empty());
    }
}

#[test]
fn asking_another_program_to_reload_does_it_no_harm() {
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
fn the_watchdog_is_fed_while_every_thread_makes_progress() {
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "200000").ready();
    echod.manager.wait_for("WATCHDOG=1", 5);
    let client = echod.connect();
    client.echo("idle or busy");
    echod.manager.wait_for("WATCHDOG=1", 10);
    echod.stop();
}

#[test]
fn the_watchdog_starves_when_any_one_thread_hangs_and_is_fed_again_when_it_goes_on() {
    for name in ["worker-0", "gate", "journal"] {
        let echod = Start::serving(&format!("[service]\nworkers = 2\n{OWNER}")).env("WATCHDOG_USEC", "100000").ready();
        echod.manager.wait_for("WATCHDOG=1", 2);
        // Stops this one thread; the others go on.
        let hung = thread_of(&echod, name);
        ptrace::seize(hung, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(hung).unwrap();
        waitpid(hung, Some(WaitPidFlag::__WALL)).unwrap();
        // The next note says so; while the journal's own thread hangs nobody can.
        if name != "journal" {
            echod.wait_for_stderr(&format!("no sign of life from: {}", name.replace('-', " ")));
        }
        // What was under way when it stopped has been told by now: three looks fit into the timeout.
        let pause = std::time::Duration::from_millis(100);
        thread::sleep(pause);
        let fed = echod.manager.told.lock().count("WATCHDOG=1");
        thread::sleep(pause * 3);
        assert_eq!(echod.manager.told.lock().count("WATCHDOG=1"), fed, "{name} hangs and the watchdog is fed");
        ptrace::detach(hung, None).unwrap();
        echod.manager.wait_for("WATCHDOG=1", fed + 3);
        echod.stop();
    }
}

#[test]
fn the_watchdog_is_fed_while_a_reload_waits_for_the_user_database() {
    needs_root();
    let place = common::Place::new();
    let wrapper = common::hung_user_database(&place);
    let passwd = place.path("passwd");
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "200000").wrapper(&wrapper).ready();
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    echod.signal(Signal::SIGHUP);
    echod.manager.wait_for("RELOADING=1", 1);
    let fed = echod.manager.told.lock().count("WATCHDOG=1");
    echod.manager.wait_for("WATCHDOG=1", fed + 5);
    // As often as it is asked.
    std::thread::spawn(move || while std::fs::write(&passwd, "somebody:x:0:0::/:/bin/sh\n").is_ok() {});
    echod.manager.wait_for("READY=1", 2);
    echod.connect().echo("in");
}

#[test]
fn an_absurd_watchdog_setting_is_no_reason_not_to_serve() {
    for usec in ["0", "-1", "nonsense", "", "18446744073709551615", "99999999999999999999999", "1"] {
        let echod = Start::serving(OWNER).env("WATCHDOG_USEC", usec).ready();
        echod.connect().echo(usec);
        echod.stop();
    }
}

#[test]
fn a_watchdog_for_another_process_is_not_ours() {
    let echod = Start::serving(OWNER).env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1").ready();
    echod.connect().echo("hello");
    let manager = Arc::clone(&echod.manager);
    echod.stop();
    assert!(!manager.told.lock().has("WATCHDOG=1"));
}

#[test]
fn it_exits_when_idle_and_says_stopping_before() {
    let echod = Start::serving(&format!("[service]\nidle-exit = \"50ms\"\n{OWNER}")).ready();
    let manager = Arc::clone(&echod.manager);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    manager.wait_for("STOPPING=1", 1);
}

#[test]
fn it_does_not_exit_while_anybody_is_connected() {
    let config = format!("[service]\nidle-exit = \"20ms\"\n{OWNER}");
    let echod = Start::serving(&config).spawn();
    let client = echod.connect();
    client.echo("I stay");
    // A second service with nobody there ends; ours, idle for longer, does not.
    let other = Start::serving(&config).ready();
    assert!(other.wait().0.success());
    client.echo("still here");
    client.half_close();
    client.expect_end(b"");
    assert!(echod.wait().0.success());
}

#[test]
fn nobody_who_connects_as_it_exits_is_lost() {
    // More of them, for as long as you like: ECHOD_TEST_EXITS=3000 cargo test --test lifecycle nobody_who
    let exits = common::setting("ECHOD_TEST_EXITS", 150);
    let config = format!("[service]\nidle-exit = \"1ms\"\n{OWNER}");
    let first = Start::serving(&config).ready();
    let (socket, manager) = (first.socket(), Arc::clone(&first.manager));
    let mut echod = Some(first);
    for round in 0..exits {
        // Aimed at the exit: at once, at its first word, and after its last.
        let exits = manager.told.lock().count("STOPPING=1");
        match round % 3 {
            0 => {}
            1 => drop(manager.told.try_wait(|told| (told.count("STOPPING=1") > exits || told.is_over()).then_some(()))),
            _ => drop(manager.told.try_wait(|told| told.is_over().then_some(()))),
        }
        let client = Client::connect(&socket);
        client.send(format!("round {round}\n"));
        client.half_close();
        // As the manager does: somebody waits at the socket of a service that has ended.
        let answer = thread::scope(|scope| {
            let answer = scope.spawn(|| client.rest());
            echod = echod.take().map(|ended| ended.start_again(|start, _| start));
            answer.join().unwrap()
        });
        assert_eq!((common::show(&answer.0), answer.1), (format!("> round {round}\\n"), common::End::Eof));
    }
}

#[test]
fn spans_beyond_what_a_clock_can_tell_are_as_good_as_for_ever() {
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
fn the_time_until_an_idle_exit_begins_when_the_last_connection_ends() {
    let span = Duration::from_millis(400);
    let echod = Start::serving(&format!("[service]\nidle-exit = \"400ms\"\n{OWNER}")).ready();
    let client = echod.connect();
    client.echo("hello");
    // Longer than the span: whoever counts from their coming exits at once when they go.
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
        // Far more reloads than half a second has room for, each of them sooner than it.
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
fn what_moved_on_a_connection_counts_also_where_a_reload_comes_in_between() {
    let config = |span: &str| format!("[limits]\nidle-timeout = \"{span}\"\n{OWNER}");
    let echod = Start::serving(&config("1h")).ready();
    let client = echod.connect();
    client.echo("hello");
    thread::sleep(Duration::from_millis(100));
    client.echo("hello again");
    // Were it the time of its coming that counts, or the other's, it would be over at once.
    echod.reload_with(&config("59min"));
    client.echo("still here");
    echod.reload_with(&config("1ms"));
    client.expect_end("");
}

#[test]
fn verify_that_a_reload_brings_or_takes_away_holds_for_those_who_are_in() {
    needs_root();
    let alice = "[allow.alice]\nusers = [64001]\n";
    let verifying = format!("[service]\nverify = \"line\"\n{alice}");
    let echod = Start::serving(alice).ready();
    let connect = || common::Other::with(&["--as", "64001:64001", "--say", "mine\\n"], &echod.socket());
    let (first, second, halfway) = (connect(), connect(), connect());
    for one in [&first, &second, &halfway] {
        one.client().expect("> mine\n");
        // We, root, hold it now.
        one.client().echo("handed over");
    }
    // Nothing tells any more who sent it.
    halfway.client().send("half a line");
    echod.reload_with(&verifying);
    halfway.client().expect_end(DENIED);
    first.client().send("not hers\n");
    first.client().expect_end(DENIED);
    echod.reload_with(alice);
    second.client().echo("nobody asks any more");
    let third = connect();
    third.client().expect("> mine\n");
    echod.reload_with(&verifying);
    echod.reload_with(alice);
    third.client().echo("nobody asks");
}

#[test]
fn a_reload_that_finds_the_default_file_gone_is_refused() {
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
    // Back again, it is read again.
    echod.reload_with(&format!("[limits]\nconnections-per-user = 2\n{OWNER}"));
    echod.connect().echo("the second");
    // Where there was none from the start there need be none at a reload.
    let start = Start::bare();
    let listener = start.place().listener("socket");
    let directory = start.place().path("").to_str().unwrap().to_owned();
    let echod = start.env("CONFIGURATION_DIRECTORY", &directory).socket("echo.socket", listener).ready();
    assert_eq!(echod.reload(), (0, String::new()));
    echod.connect().echo("in");
}

#[test]
fn a_reload_of_a_file_that_it_may_not_read_is_refused() {
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
        echod.place.file("echod.toml", NOBODY);
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

/// A service that reads its configuration for as long as the user database takes: for ever.
fn slow_reload(manager: Arc<Manager>) -> (Echod, common::Place) {
    needs_root();
    let place = common::Place::new();
    let wrapper = common::hung_user_database(&place);
    let echod = Start::serving(OWNER).env("FDSTORE", "100").wrapper(&wrapper).ready_with(manager);
    echod.place.file("echod.toml", "[allow.slow]\nusers = [\"self\", \"somebody\"]\n");
    (echod, place)
}

#[test]
fn a_stop_does_not_wait_for_a_reload_that_waits_for_the_user_database() {
    for keep in [true, false] {
        let manager = Arc::new(Manager::new());
        manager.told.change(|told| told.capacity = 100);
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
        // In line behind the first, or about to be; and one that surely is.
        let second = ask();
        echod.signal(Signal::SIGHUP);
        echod.signal(if keep { Signal::SIGTERM } else { Signal::SIGINT });
        let first = first.wait_with_output().unwrap();
        assert_eq!(first.status.code(), Some(78), "{}", String::from_utf8_lossy(&first.stderr));
        assert_ne!(second.wait_with_output().unwrap().status.code(), Some(0));
        let manager = Arc::clone(&echod.manager);
        let (status, _, stderr) = echod.wait();
        assert!(status.success(), "{stderr}");
        let stored = std::mem::take(&mut manager.told.lock().store);
        if keep {
            assert_eq!(stored.len(), 2, "the connection and its state: {stderr}");
        } else {
            client.expect_end("> half");
            assert_eq!(stored.len(), 0);
        }
    }
}

#[test]
fn one_whom_the_service_could_not_answer_is_told_so_at_once() {
    needs_root();
    let echod = Start::serving("[allow.any]\nusers = [\"any\"]\n").run_as("64001:64001").ready();
    let asked = Instant::now();
    let (code, said) = echod.reload();
    assert_eq!(code, 71, "{said}");
    assert!(said.contains("it runs as uid 64001 and could not answer uid 0"), "{said}");
    assert!(asked.elapsed() < Duration::from_secs(50), "it waited for an answer");
    assert!(!echod.manager.told.lock().has("RELOADING=1"), "it was asked all the same");
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
fn the_status_is_told_no_more_than_once_a_second_however_many_come() {
    let echod = Start::serving(OWNER).ready();
    let begin = Instant::now();
    let mut came = 0;
    while begin.elapsed() < Duration::from_millis(2500) {
        echod.connect().echo("hello");
        came += 1;
    }
    let count = |told: &mut common::Told| told.messages.iter().filter(|told| told[0].starts_with("STATUS=")).count();
    let told = echod.manager.wait("the last status", |told| {
        let last = format!("STATUS=0 connected, {came} admitted, 0 denied; policy of 1 rule");
        told.has(&last).then(|| count(told))
    });
    let most = begin.elapsed().as_secs() as usize + 1;
    assert!((1..=most).contains(&told), "{told} times in {:?} while {came} came", begin.elapsed());
}
