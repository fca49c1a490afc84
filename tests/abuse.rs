//! Attacks by peers that can connect: floods, silence, greed, passed descriptors, and a process without spare
//! descriptors. Well-behaved clients must not notice. Needs no privileges.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    BUSY, Client, DENIED, DENY_ALL, Echod, End, Entry, Journald, OWNER, Start, TOO_LONG, cpu, descriptors, eventually,
    expect_descriptors, memory, show,
};

/// Echoes lines until `stop` is set. Returns their number and the longest wait for an echo.
fn talk(client: &Client, stop: &AtomicBool) -> (usize, Duration) {
    let mut longest = Duration::ZERO;
    let mut count = 0;
    loop {
        let asked = Instant::now();
        client.echo("are you there?");
        longest = longest.max(asked.elapsed());
        count += 1;
        if stop.load(Ordering::Relaxed) {
            return (count, longest);
        }
    }
}

/// Runs `abuse` while an admitted client sends lines and reads their echo.
fn while_a_client_talks(echod: &Echod, abuse: impl FnOnce()) {
    let client = echod.connect();
    client.echo("first");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let talker = scope.spawn(|| talk(&client, &stop));
        abuse();
        stop.store(true, Ordering::Relaxed);
        let (count, longest) = talker.join().unwrap();
        figure!("an admitted client had {count} answers, the slowest after {longest:?}");
    });
}

/// Sends a line together with a descriptor that blocks in close(2) for hours (common::lingering), and keeps no copy.
fn send_bomb(client: &Client, line: &str) -> std::net::TcpStream {
    let (bomb, other_end) = common::lingering();
    common::send_along(&client.0, line.as_bytes(), &[bomb.as_raw_fd()]).unwrap();
    other_end
}

#[test]
fn a_received_descriptor_that_blocks_in_close_delays_no_client() {
    for (config, heard) in [(OWNER, &b"> are you there?\n"[..]), (DENY_ALL, DENIED)] {
        let start = Start::serving(config).env("WATCHDOG_USEC", "500000");
        // They connect before the service starts: no setting can refuse their descriptors yet, and no thread reads
        // them.
        let bombers: Vec<_> = (0..8).map(|_| Client::connect(start.place().path("socket"))).collect();
        let ends: Vec<_> = bombers.iter().map(|bomber| send_bomb(bomber, "boom\n")).collect();
        let echod = start.ready();
        let before = descriptors(&echod);
        for _ in 0..3 {
            let client = echod.connect();
            let _ = client.try_send("are you there?\n");
            assert_eq!(show(&client.read(heard.len())), show(heard));
        }
        for bomber in &bombers {
            bomber.expect_end(if config == DENY_ALL { DENIED } else { b"" });
        }
        // Every thread makes progress, and all descriptors are closed in the end.
        let seen = echod.manager.received.lock().count("WATCHDOG=1");
        echod.manager.wait_for("WATCHDOG=1", seen + 3);
        drop(bombers);
        expect_descriptors(&echod, before);
        echod.stop();
        drop(ends);
    }
}

#[test]
fn each_of_thousands_of_denied_connections_gets_the_message() {
    let echod = Start::serving(DENY_ALL).ready();
    let before = descriptors(&echod);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..1000 {
                    let client = echod.connect();
                    if round % 2 == 0 {
                        let _ = client.try_send("let me in\n");
                    }
                    client.expect_end(DENIED);
                }
            });
        }
    });
    expect_descriptors(&echod, before);
    let stderr = echod.stop();
    let records = stderr.lines().filter(|line| line.contains(": no rule allows it")).count();
    let summed = common::summed(&stderr);
    figure!("tried 4000, records {records}, in summaries {summed}");
    assert_eq!(records + summed, 4000, "{stderr}");
}

#[test]
fn denied_connections_that_never_close_hold_no_descriptor_for_long() {
    let echod = Start::serving(DENY_ALL).ready();
    let before = descriptors(&echod);
    // Twice the number of lingering closes at one time; none of these clients closes.
    let held: Vec<Client> = (0..600).map(|_| echod.connect()).collect();
    expect_descriptors(&echod, before);
    for client in &held {
        client.expect_end(DENIED);
    }
}

#[test]
fn denied_connections_closed_at_once_leave_no_descriptor() {
    let echod = Start::serving(DENY_ALL).ready();
    let before = descriptors(&echod);
    for round in 0..2000 {
        let client = echod.connect();
        if round % 2 == 0 {
            let _ = client.try_send("bye\n");
        }
    }
    echod.connect().expect_end(DENIED);
    expect_descriptors(&echod, before);
    echod.stop();
}

#[test]
fn admitted_connections_closed_at_once_give_their_permits_back() {
    let echod = Start::serving(&format!("[limits]\nconnections = 10\nconnections-per-user = 10\n{OWNER}")).ready();
    let before = descriptors(&echod);
    for _ in 0..1000 {
        drop(echod.connect());
    }
    let all: Vec<Client> = eventually("all places are free", || {
        let all: Vec<Client> = (0..10).map(|_| echod.connect()).collect();
        let inside = |client: &Client| {
            client.send("in?\n");
            client.read(1) == b">"
        };
        all.iter().all(inside).then_some(all)
    });
    echod.connect().expect_end(BUSY);
    drop(all);
    expect_descriptors(&echod, before);
}

#[test]
fn a_flood_of_denied_connections_stops_no_admitted_client() {
    // With a limit of one connection for each user; the flood is of connections over it.
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1\n{OWNER}")).ready();
    while_a_client_talks(&echod, || {
        for _ in 0..300 {
            echod.connect().expect_end(BUSY);
        }
    });
}

#[test]
fn a_client_that_streams_at_full_rate_stops_no_other_client() {
    let echod = Start::serving(&format!("[service]\nworkers = 1\n{OWNER}")).ready();
    let stream = echod.connect();
    let line = [vec![b's'; 1000], b"\n".to_vec()].concat();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..20_000 {
                if stream.try_send(&line).is_err() {
                    break;
                }
            }
            let _ = stream.0.shutdown(std::net::Shutdown::Write);
        });
        let reader = scope.spawn(|| stream.rest());
        while_a_client_talks(&echod, || {
            let (output, end) = reader.join().unwrap();
            assert_eq!((output.len(), end), (20_000 * 1003, End::Eof));
        });
    });
}

#[test]
fn a_turn_is_bounded_in_bytes_however_short_the_lines() {
    // The echo of the most that one turn reads (three bytes for each newline).
    const TURN: u64 = 3 * 64 * 1024;
    const ROUNDS: usize = 200;
    let echod = Start::serving(&format!("[service]\nworkers = 1\n{OWNER}")).ready();
    let (greedy, modest) = (echod.connect(), echod.connect());
    let (stop, echoed) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let lines = [b'\n'; 65_536];
            while !stop.load(Ordering::Relaxed) {
                greedy.send(lines);
            }
            greedy.half_close();
        });
        let reader = scope.spawn(|| {
            let mut buffer = vec![0; 1 << 20];
            while let count @ 1.. = (&greedy.0).read(&mut buffer).unwrap() {
                echoed.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        while echoed.load(Ordering::Relaxed) < 10 * TURN {
            thread::yield_now();
        }
        let mut meanwhile: Vec<u64> = (0..ROUNDS)
            .map(|_| {
                let before = echoed.load(Ordering::Relaxed);
                modest.echo("is it my turn?");
                echoed.load(Ordering::Relaxed) - before
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        meanwhile.sort_unstable();
        let (median, most) = (meanwhile[ROUNDS / 2], meanwhile[ROUNDS - 1]);
        figure!(
            "between a line and its echo, a client that pipelines bare newlines got {median} bytes (median), {most} at the most; \
             a turn is {TURN}"
        );
        // The median, since the program cannot make the scheduler run the client as soon as the echo is there.
        assert!(median <= 4 * TURN, "{median} bytes, where a turn is {TURN}");
    });
}

/// Clients that send lines until the socket takes no more, and never read.
fn clients_that_never_read(echod: &Echod, number: usize) -> Vec<Client> {
    let line = [vec![b'g'; 8000], b"\n".to_vec()].concat();
    let greedy: Vec<Client> = (0..number).map(|_| echod.connect()).collect();
    for client in &greedy {
        client.0.set_nonblocking(true).unwrap();
        // The socket takes no more: nothing could be sent for a while.
        let mut stalls = 0;
        let mut sent = 0;
        while stalls < 2 {
            match (&client.0).write(&line[sent % line.len()..]) {
                Ok(count) => sent += count,
                Err(_) => {
                    stalls += 1;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
    while_a_client_talks(echod, || {});
    greedy
}

#[test]
fn hundreds_of_clients_that_never_read_hold_a_bounded_buffer_each() {
    const GREEDY: usize = 300;
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1000\n{OWNER}")).ready();
    let before = memory(&echod, "VmRSS");
    let greedy = clients_that_never_read(&echod, GREEDY);
    let grown = memory(&echod, "VmHWM") - before;
    figure!("{GREEDY} clients that never read: {grown} KiB more at the most, {} KiB each", grown / GREEDY as u64);
    // Twice the limit on a line for each, and some room.
    assert!(grown < GREEDY as u64 * 128 + 4096, "{grown} KiB");
    drop(greedy);
    echod.stop();
}

#[test]
fn buffers_of_closed_connections_are_freed_while_others_stay_open() {
    const GREEDY: usize = 100;
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1000\n{OWNER}")).ready();
    let (before, open) = (memory(&echod, "RssAnon"), descriptors(&echod));
    // Some allocators keep memory that was freed once, and return only what is freed after that.
    for round in 1..=3 {
        let greedy = clients_that_never_read(&echod, GREEDY);
        // One in ten stays open, so that its buffers lie between the freed ones.
        let staying: Vec<Client> = greedy.into_iter().step_by(10).collect();
        expect_descriptors(&echod, open + staying.len());
        let kept = memory(&echod, "RssAnon") - before;
        figure!("round {round}: {} of {GREEDY} stay, {kept} KiB more than before", staying.len());
        assert!(kept < staying.len() as u64 * 128 + 1024, "{kept} KiB in round {round}");
    }
    echod.stop();
}

#[test]
fn an_unfinished_line_holds_no_buffer_that_grew_for_a_long_one() {
    const SLOW: usize = 300;
    let config = format!("[limits]\nconnections-per-user = 1000\n[service]\nworkers = 1\n{OWNER}");
    let echod = Start::serving(&config).ready();
    let before = memory(&echod, "VmRSS");
    let line = [&[b'l'; 50_000][..], b"\n"].concat();
    let slow: Vec<Client> = (0..SLOW)
        .map(|number| {
            let client = echod.connect();
            // In two parts, so that the program must keep the first. The fragment comes with the second part or by
            // itself.
            client.echo("first");
            client.send(&line[..25_000]);
            let (rest, after) = if number % 2 == 0 { ("fragment", "") } else { ("", "fragment") };
            client.send([&line[25_000..], rest.as_bytes()].concat());
            client.expect([b"> ", &line[..]].concat());
            client.send(after);
            client
        })
        .collect();
    echod.connect().echo("all of them have been heard");
    let grown = memory(&echod, "VmRSS") - before;
    figure!("{SLOW} unfinished lines: {grown} KiB more, {} KiB each", grown / SLOW as u64);
    assert!(grown < SLOW as u64 * 12 + 2048, "{grown} KiB");
    for client in &slow {
        client.send("\n");
        client.expect("> fragment\n");
    }
}

#[test]
fn zeros_without_a_newline_hold_no_more_memory_than_a_line() {
    let echod = Start::serving(OWNER).ready();
    let before = memory(&echod, "VmHWM");
    for _ in 0..30 {
        let client = echod.connect();
        let (output, end) = thread::scope(|scope| {
            scope.spawn(|| while client.try_send([0; 65_536]).is_ok() {});
            client.rest()
        });
        assert_eq!((show(&output), end), (show(TOO_LONG), End::Eof));
    }
    let grown = memory(&echod, "VmHWM") - before;
    figure!("30 writers of NULs: {grown} KiB more at the most");
    assert!(grown < 4096);
}

#[test]
fn slow_senders_are_served_line_by_line_and_stop_no_client() {
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 300\n{OWNER}")).ready();
    let slow: Vec<Client> = (0..200).map(|_| echod.connect()).collect();
    while_a_client_talks(&echod, || {
        for byte in b"a byte at a time" {
            for client in &slow {
                client.send([*byte]);
            }
        }
    });
    for client in &slow {
        client.send("\n");
        client.expect("> a byte at a time\n");
    }
}

#[test]
fn a_thousand_idle_connections_cost_no_cpu_time_and_little_memory() {
    const IDLE: usize = 1000;
    let limits = "[limits]\nconnections = 5000\nconnections-per-user = 5000\n";
    let echod = Start::serving(&format!("{limits}{OWNER}")).ready();
    let idle: Vec<Client> = (0..IDLE).map(|_| echod.connect()).collect();
    idle.iter().for_each(|client| client.echo("in"));
    let each = memory(&echod, "VmRSS") * 1024 / IDLE as u64;
    figure!("{IDLE} idle connections: {each} bytes each, the program itself included");
    assert!(each < 32 * 1024);
    let before = cpu(&echod);
    // Another process is kept busy; this one has nothing to do.
    let other = Start::serving(OWNER).ready();
    let client = other.connect();
    (0..2000).for_each(|_| client.echo("meanwhile"));
    assert!(cpu(&echod) - before <= 2, "idle connections cost {} ticks", cpu(&echod) - before);
    idle.iter().for_each(|client| client.echo("still in"));
}

#[test]
fn a_thousand_peers_refused_at_once_all_get_the_message() {
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1\n{OWNER}")).ready();
    let first = echod.connect();
    first.echo("in");
    let late: Vec<Client> = (0..1000).map(|_| echod.connect()).collect();
    for client in &late {
        client.expect_end(BUSY);
    }
    first.echo("still in");
    echod.stop();
}

#[test]
fn ten_thousand_connections_idle_while_as_many_are_refused() {
    let idle = common::setting("ECHOD_TEST_IDLE", 10_000);
    // Both processes count: the open connections, the refused ones, and some room for the other tests.
    const AT_ONCE: usize = 4000;
    common::raise_descriptor_limit((idle + AT_ONCE) as u64 + 4000);
    let caps = format!("[limits]\nconnections = {idle}\nconnections-per-user = {}\n", 2 * idle);
    let echod = Start::serving(&format!("{caps}{OWNER}")).ready();
    let (empty, before) = (memory(&echod, "VmRSS"), descriptors(&echod));
    let inside: Vec<Client> = (0..idle).map(|_| echod.connect()).collect();
    inside.iter().for_each(|client| client.echo("in"));
    let full = memory(&echod, "VmRSS");
    let mut refused = 0;
    while refused < idle {
        let late: Vec<Client> = (0..AT_ONCE.min(idle - refused)).map(|_| echod.connect()).collect();
        late.iter().for_each(|client| client.expect_end(BUSY));
        refused += late.len();
    }
    figure!(
        "{idle} idle inside: {empty} KiB before, {full} KiB with them, {} bytes each; {refused} refused; at the most {} KiB",
        (full - empty) * 1024 / idle as u64,
        memory(&echod, "VmHWM"),
    );
    assert!(
        memory(&echod, "VmHWM") - empty < idle as u64 + 8192,
        "more than a KiB for each, and some room for the rest"
    );
    inside.iter().for_each(|client| client.echo("still in"));
    drop(inside);
    expect_descriptors(&echod, before);
    echod.connect().echo("there is room again");
    let stderr = echod.stop();
    let lines = stderr.lines().filter(|line| line.contains(": too many connections in all")).count();
    // One line, or several, is the summary.
    let summaries = stderr.lines().filter(|line| line.contains(" more times in ")).count();
    assert_eq!(lines - summaries + common::summed(&stderr), refused, "{stderr}");
}

/// A service with so few descriptors that a handful of clients uses them up.
fn with_few_descriptors(config: &str) -> Echod {
    Start::serving(config).wrapper(&["prlimit", "--nofile=40:40"]).ready()
}

#[test]
fn out_of_descriptors_it_refuses_does_not_spin_and_recovers() {
    let echod = with_few_descriptors(&format!("[limits]\nconnections = 100\nconnections-per-user = 100\n{OWNER}"));
    let before = descriptors(&echod);
    let mut inside = Vec::new();
    let mut refused = 0;
    for _ in 0..60 {
        let client = echod.connect();
        let _ = client.try_send("in?\n");
        let mut first = [0];
        match (&client.0).read(&mut first).unwrap() {
            1 if first == *b">" => {
                client.expect(" in?\n");
                inside.push(client);
            }
            1 => {
                let (rest, end) = client.rest();
                assert_eq!((show(&[&first[..], &rest].concat()), end), (show(BUSY), End::Eof));
                refused += 1;
            }
            _ => panic!("turned away without a word"),
        }
    }
    figure!("{} got in, {refused} were refused", inside.len());
    assert!(inside.len() >= 15 && refused >= 20, "{} in, {refused} refused", inside.len());

    let spent = cpu(&echod);
    let other = Start::serving(OWNER).ready();
    let client = other.connect();
    (0..2000).for_each(|_| client.echo("meanwhile"));
    assert!(cpu(&echod) - spent <= 3, "it spins: {} ticks", cpu(&echod) - spent);

    inside.iter().for_each(|client| client.echo("still in"));
    for client in inside {
        client.half_close();
        client.expect_end(b"");
    }
    expect_descriptors(&echod, before);
    let again: Vec<Client> = (0..15).map(|_| echod.connect()).collect();
    again.iter().for_each(|client| client.echo("there is room again"));
    let stderr = echod.stop();
    assert!(stderr.contains("out of file descriptors"), "{stderr}");
}

/// Connects until no descriptor is left, and some times more.
fn use_up_descriptors(echod: &Echod) -> Vec<Client> {
    let clients: Vec<Client> = (0..50).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| drop(client.try_send("in?\n")));
    let mut inside: Vec<Client> = clients.into_iter().filter(|client| client.read(1) == b">").collect();
    assert!((10..45).contains(&inside.len()), "{} in", inside.len());
    inside.iter_mut().for_each(|client| client.expect(" in?\n"));
    inside
}

const MANY: &str = "[limits]\nconnections = 100\nconnections-per-user = 100\n";

#[test]
fn out_of_descriptors_the_manager_still_gets_watchdog_and_status() {
    let few = ["prlimit", "--nofile=40:40"];
    let echod = Start::serving(&format!("{MANY}{OWNER}")).env("WATCHDOG_USEC", "500000").wrapper(&few).ready();
    let inside = use_up_descriptors(&echod);
    let seen = echod.manager.received.lock().count("WATCHDOG=1");
    echod.manager.wait_for("WATCHDOG=1", seen + 10);
    let status = format!("STATUS={} connected, {} admitted, 0 denied; policy of 1 rule", inside.len(), inside.len());
    echod.manager.wait_for(&status, 1);
    inside.iter().for_each(|client| client.echo("still in"));
    echod.stop();
}

#[test]
fn out_of_descriptors_a_restart_still_loses_no_connection() {
    let few = ["prlimit", "--nofile=40:40"];
    let echod = Start::serving(&format!("{MANY}{OWNER}")).env("FDSTORE", "100").wrapper(&few).spawn();
    echod.manager.received.change(|received| received.capacity = 100);
    echod.manager.wait_for("READY=1", 1);
    let inside = use_up_descriptors(&echod);
    let next = echod.restart(|start, _| start);
    inside.iter().for_each(|client| client.echo("still in"));
    next.stop();
}

#[test]
fn out_of_descriptors_a_denied_peer_is_still_denied_and_recorded() {
    let policy = "[audit]\ninterval = \"1h\"\nburst = 1000\n";
    let echod = with_few_descriptors(&format!("{policy}{DENY_ALL}"));
    // All at once, so that the lingering closes use up all descriptors.
    for _ in 0..5 {
        let clients: Vec<Client> = (0..100).map(|_| echod.connect()).collect();
        for client in &clients {
            client.expect_end(DENIED);
        }
    }
    let stderr = echod.stop();
    assert_eq!(stderr.lines().filter(|line| line.contains(": no rule allows it")).count(), 500, "{stderr}");
}

#[test]
fn a_start_that_runs_out_of_descriptors_loses_no_denial() {
    let (mut failed, mut started) = (0, 0);
    for descriptors in 5..24 {
        let start = Start::serving(DENY_ALL);
        let client = Client::connect(start.place().path("socket"));
        client.0.set_nonblocking(true).unwrap();
        let limit = format!("--nofile={descriptors}:{descriptors}");
        let echod = start.wrapper(&["prlimit", &limit]).spawn();
        // Waits until the process is ready or has exited.
        let ready = echod.manager.received.try_wait(|received| match received.has("READY=1") {
            true => Some(true),
            false => received.is_over().then_some(false),
        });
        let stderr = if ready == Some(true) {
            started += 1;
            echod.stop()
        } else {
            failed += 1;
            let (status, _, stderr) = echod.wait();
            assert!(!status.success(), "with {descriptors} descriptors: {status}: {stderr}");
            stderr
        };
        let mut answer = [0; 64];
        let told = (&client.0).read(&mut answer).is_ok_and(|count| answer[..count] == *DENIED);
        let recorded = stderr.contains(": no rule allows it");
        assert_eq!(told, recorded, "with {descriptors} descriptors: {stderr}");
    }
    figure!("{failed} starts failed, {started} did not");
    assert!(failed >= 3 && started >= 3);
}

/// strace(1) injects the errors of system calls: a real ENFILE or ENOMEM would hit the whole machine. The program is
/// the real one.
struct Faults {
    echod: Echod,
    trace: std::path::PathBuf,
}

impl Faults {
    /// `faults` are expressions of strace(1), such as `accept4:error=ENFILE:when=2..9`.
    fn inject(config: &str, faults: &[&str]) -> Self {
        let start = Start::serving(config);
        let trace = start.place().path("trace");
        let faults = faults.iter().map(|fault| format!("inject={fault}"));
        let expressions: Vec<_> = faults.chain(["trace=accept4,epoll_wait,eventfd2,sendto".to_owned()]).collect();
        Self { echod: start.traced(&trace, &expressions).ready(), trace }
    }

    /// How often accept4 failed by injection, and how often the gate's wait timed out.
    fn failures_and_pauses(&self) -> (usize, usize) {
        let trace = std::fs::read_to_string(&self.trace).unwrap();
        let gate = trace.lines().find(|line| line.contains("accept4(")).and_then(|line| line.split(' ').next());
        let own = || trace.lines().filter(|line| line.split(' ').next() == gate);
        (
            own().filter(|line| line.contains("accept4") && line.ends_with("(INJECTED)")).count(),
            own().filter(|line| line.contains("epoll_wait") && line.ends_with(" = 0")).count(),
        )
    }
}

#[test]
fn no_denial_is_lost_while_accept_fails_with_enfile_or_enomem() {
    const DENIALS: usize = 20;
    for (error, said) in [
        ("ENFILE", "out of file descriptors"),
        ("EMFILE", "out of file descriptors"),
        ("ENOMEM", "Cannot allocate memory"),
        ("ENOBUFS", "No buffer space available"),
    ] {
        let config = format!("[audit]\ninterval = \"1h\"\nburst = 1000\n{DENY_ALL}");
        let fault = format!("accept4:error={error}:when=5..120");
        // The reserve descriptors cannot be opened again either. Fewer than 20 are made before the gate begins.
        let faults = Faults::inject(&config, &[&fault, &format!("eventfd2:error={error}:when=20..40")]);
        let clients: Vec<Client> = (0..DENIALS).map(|_| faults.echod.connect()).collect();
        clients.iter().for_each(|client| client.expect_end(DENIED));
        let (failures, pauses) = faults.failures_and_pauses();
        faults.echod.connect().expect_end(DENIED);
        let stderr = faults.echod.stop();
        let records = stderr.lines().filter(|line| line.contains(": no rule allows it")).count();
        figure!("{error}: {failures} times, {pauses} pauses; denied {}, records {records}", DENIALS + 1);
        assert_eq!(failures, 116);
        // Lingering closes are ended first, without a pause, and a try without a reserve is made twice.
        assert!(pauses >= (failures - DENIALS) / 2, "{error}: {failures} failures, {pauses} pauses");
        assert_eq!(records, DENIALS + 1, "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn aborted_connections_and_interrupting_signals_delay_no_client() {
    for error in ["ECONNABORTED", "EINTR", "EPROTO"] {
        let faults = Faults::inject(OWNER, &[&format!("accept4:error={error}:when=2..200")]);
        let clients: Vec<Client> = (0..5).map(|_| faults.echod.connect()).collect();
        clients.iter().for_each(|client| client.echo("in"));
        let (failures, _) = faults.failures_and_pauses();
        figure!("{error}: {failures} times");
        assert_eq!(failures, 199);
        let stderr = faults.echod.stop();
        assert!(!stderr.contains("accepting from"), "{stderr}");
    }
}

#[test]
fn a_write_that_fails_for_memory_closes_only_that_connection() {
    // strace counts the calls of each thread apart. The gate may write the first echo of each connection; with busy
    // polling off it writes no other, so only the worker makes a third call.
    let config = format!("[service]\nbusy-poll = \"off\"\n{OWNER}");
    let faults = Faults::inject(&config, &["sendto:error=ENOBUFS:when=3"]);
    let (first, second) = (faults.echod.connect(), faults.echod.connect());
    first.echo("one");
    second.echo("one");
    let is_over = (0..4).any(|number| {
        let _ = first.try_send(format!("{number}\n"));
        let mut echo = [0; 4];
        let count = (&first.0).read(&mut echo).unwrap_or(0);
        assert!(count == 0 || echo == *format!("> {number}\n").as_bytes(), "{}", show(&echo));
        count == 0
    });
    assert!(is_over, "the fault came to nothing");
    second.echo("still in");
    faults.echod.stop();
}

#[test]
fn a_full_backlog_delays_connections_and_loses_none() {
    let start = Start::bare().config(OWNER);
    let path = start.place().path("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(5).unwrap()).unwrap();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..20)
            .map(|number| {
                let path = &path;
                scope.spawn(move || {
                    // Blocks while the backlog is full.
                    let client = Client::connect(path);
                    client.echo(&format!("client {number}"));
                })
            })
            .collect();
        let echod = start.socket("s", listener).ready();
        clients.into_iter().for_each(|client| client.join().unwrap());
        echod.stop();
    });
}

#[test]
fn descriptors_sent_with_data_are_refused_or_end_the_connection() {
    let echod = Start::serving(OWNER).ready();
    for verify in ["connection", "line"] {
        echod.reload_with(&format!("[service]\nverify = \"{verify}\"\n{OWNER}"));
        let before = descriptors(&echod);
        for _ in 0..50 {
            let client = echod.connect();
            client.echo("first");
            let (ours, theirs) = UnixStream::pair().unwrap();
            match common::send_along(&client.0, b"second\n", &[theirs.as_raw_fd()]) {
                // From Linux 6.16 on sendmsg(2) fails, and the connection stays open.
                Err(nix::errno::Errno::EPERM) => client.echo("third"),
                sent => {
                    sent.unwrap();
                    assert_eq!(show(&client.rest().0), "");
                }
            }
            drop(theirs);
            // The other end is closed: the descriptor was refused, or closed by the service.
            Client::of(ours).expect_end(b"");
        }
        expect_descriptors(&echod, before);
    }
}

/// Sends a descriptor that closes without blocking. Returns its other end.
fn send_a_descriptor(client: &Client) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    common::send_along(&client.0, b"with it\n", &[theirs.as_raw_fd()]).unwrap();
    ours
}

/// The data before the descriptors, the data after them, and the expected answer.
type Case<'a> = (&'a [&'a [u8]], &'a [u8], &'a [u8]);

/// These descriptors are queued before the service can refuse them. The data before them must not be lost.
#[test]
fn data_before_passed_descriptors_is_echoed_before_the_end() {
    for verify in ["connection", "line"] {
        let journald = Journald::new();
        let start = Start::serving(&format!("[service]\nverify = \"{verify}\"\n{OWNER}")).journal(&journald);
        let connect = || Client::connect(start.place().path("socket"));
        let long = [&[b'x'; 50_000][..], b"\n"].concat();
        let echo_of_long = [b"> ", &long[..]].concat();
        let cases: [Case; 6] = [
            (&[b"one\n"], b"", b"> one\n"),
            (&[b"one\n", b"two\nfragm"], b"", b"> one\n> two\n> fragm"),
            (&[], b"after\n", b""),
            (&[b"one\n"], b"after\n", b"> one\n"),
            (&[&long, b"\n"], b"", &[&echo_of_long[..], b"> \n"].concat()),
            (&[b"fragm"], b"ent\n", b"> fragm"),
        ];
        let mut clients = Vec::new();
        for (before, after, heard) in &cases {
            let client = connect();
            before.iter().for_each(|part| client.send(part));
            let end = send_a_descriptor(&client);
            client.send(after);
            clients.push((client, heard.to_vec(), end));
        }
        let last = connect();
        last.send("one\n");
        let _last_end = send_a_descriptor(&last);
        last.half_close();
        let echod = start.ready();
        for (client, heard, _) in &clients {
            client.expect_end(heard);
        }
        last.expect_end("> one\n");
        let is_due = |entry: &Entry| entry.get("GATE_VERDICT").is_some_and(|it| it == "revoked");
        let entry = journald.wait_for("the record", is_due);
        assert_eq!(entry["GATE_REASON"], "sender");
        assert!(entry["MESSAGE"].ends_with(": it sent file descriptors, which are not taken"), "{}", entry["MESSAGE"]);
        echod.stop();
        let records = journald.entries().into_iter().filter(is_due).count();
        assert_eq!(records, cases.len() + 1);
    }
}

/// The descriptors are only received once the peer has read its echo, and the stop comes before.
#[test]
fn a_stop_sends_the_echo_of_data_before_passed_descriptors() {
    let start = Start::serving(OWNER);
    let client = Client::connect(start.place().path("socket"));
    client.send("one\nfragm");
    let _end = send_a_descriptor(&client);
    let echod = start.ready();
    echod.stop();
    client.expect_end("> one\n> fragm");
}

#[test]
fn an_idle_timeout_echoes_the_unfinished_line() {
    let echod = Start::serving(&format!("[limits]\nidle-timeout = \"100ms\"\n{OWNER}")).ready();
    let client = echod.connect();
    client.send("one\nfragm");
    client.expect_end("> one\n> fragm");
}

#[test]
fn a_mixed_load_leaves_as_many_descriptors_as_before() {
    let config = format!("[limits]\nconnections-per-user = 40\nline-length = 4096\nidle-timeout = \"1s\"\n{OWNER}");
    let echod = Start::serving(&config).ready();
    let before = descriptors(&echod);
    thread::scope(|scope| {
        for kind in 0..8 {
            let echod = &echod;
            scope.spawn(move || {
                for round in 0..150 {
                    let client = echod.connect();
                    match (kind + round) % 6 {
                        0 => drop(client),
                        1 => {
                            let _ = client.try_send("half a li");
                        }
                        2 => {
                            let _ = client.try_send("one\ntwo\n");
                            let _ = client.0.shutdown(std::net::Shutdown::Write);
                            let (output, end) = client.rest();
                            assert_eq!(end, End::Eof);
                            assert!(output == b"> one\n> two\n" || output == BUSY, "{}", show(&output));
                        }
                        3 => {
                            let _ = client.try_send(vec![b'l'; 5000]);
                            let (output, end) = client.rest();
                            assert_eq!(end, End::Eof);
                            assert!(output == TOO_LONG || output == BUSY, "{}", show(&output));
                        }
                        4 => {
                            let _ = client.try_send(vec![b'\n'; 3000]);
                        }
                        _ => assert_eq!(echod.reload().0, 0),
                    }
                }
            });
        }
    });
    expect_descriptors(&echod, before);
    let stderr = echod.stop();
    assert!(!stderr.contains("panicked"), "{stderr}");
}
