//! What one user can take from another: time and memory. Work is counted, not timed. Needs root, for peers of several users.

mod common;

use std::fs;
use std::os::fd::AsRawFd;

use common::records::get;
use common::{
    ALICE, Client, Echod, Entry, Journald, MemoryGroup, PeerProcess, Place, Start, answer, clog_all, needs_root,
    setting,
};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, recv};

/// MESSAGE_ID of a line, and of the lines that were not recorded one by one.
const LINE: &str = "b4a1cf2d2f5c4b0f9d0f5ab96f3f1c27";
const SUMMARY_OF_LINES: &str = "a32225cea0b74f40a0009c977477f105";

const ALL: &str = "[allow.all]\nusers = [\"any\"]\n";

/// Lines of one connection: how many, and how long each is. Not more lines in all than records may wait.
const LINES: usize = 150;
const SHORT: usize = 400;
const EACH: &str = "[audit]\nrecord = \"lines\"\nburst = 100000\ninterval = \"1h\"\n";

/// With busy-poll a worker looks at the connection first that it has last heard of, which is the modest one.
const ONE_WORKER: &str = "workers = 1\nbusy-poll = \"off\"\n";

fn lines(count: usize, length: usize) -> String {
    format!("{}\n", "x".repeat(length)).repeat(count)
}

/// Greedy connections send many lines and a modest one a single line, all before the program looks. Returns how many of the
/// greedy lines were answered first: the order of the answers is the order of their records.
fn greedy_lines_first(journald: &Journald, echod: Echod, greedy: &[Client], count: usize, length: usize) -> usize {
    let sent = lines(count, length);
    let expected = answer(sent.as_bytes());
    let modest = PeerProcess::user(ALICE, &echod.socket());
    let all = || greedy.iter().chain([modest.client()]);
    // From here on each is heard by a worker.
    all().for_each(|client| client.echo("hello"));
    all().for_each(|client| client.echo("again"));
    echod.freeze();
    greedy.iter().for_each(|client| client.send(&sent));
    modest.client().send("me too\n");
    echod.kill(Signal::SIGCONT);
    modest.client().expect("> me too\n");
    greedy.iter().for_each(|client| client.expect(&expected));
    drop(echod.stop());
    let entries = journald.entries();
    let length = (length + 1).to_string();
    let has = |entry: &Entry, bytes: &str| entry.get("GATE_BYTES").is_some_and(|found| found == bytes);
    assert_eq!(entries.iter().filter(|entry| has(entry, &length)).count(), greedy.len() * count);
    entries.iter().take_while(|entry| !has(entry, "7")).filter(|entry| has(entry, &length)).count()
}

fn serve_lines(journald: &Journald, service: &str) -> Start {
    Start::serving(&format!("{EACH}[service]\n{service}{ALL}")).journal(journald)
}

#[test]
fn a_line_waits_for_a_few_turns_of_a_user_with_many_connections() {
    needs_root();
    for (poll, has_refusal) in [("50us", true), ("off", false)] {
        let journald = Journald::new();
        let start = serve_lines(&journald, &format!("workers = 1\nbusy-poll = \"{poll}\"\n"));
        // Without it a kernel cannot refuse descriptors, and each read is preceded by a peek.
        let without = ["trace=setsockopt", "inject=setsockopt:error=ENOPROTOOPT"];
        let trace = start.place().path("trace");
        let start = if has_refusal { start } else { start.traced(&trace, &without) };
        let echod = start.ready();
        let greedy: Vec<Client> = (0..16).map(|_| echod.connect()).collect();
        let first = greedy_lines_first(&journald, echod, &greedy, LINES, SHORT);
        figure!("{first} of {} lines of the greedy user came first", greedy.len() * LINES);
        assert!(first <= 4 * LINES, "busy-poll {poll}, refusal {has_refusal}: {first} lines came first");
    }
}

/// The most lines for the bytes: a line costs more than its bytes do.
#[test]
fn a_line_waits_for_a_few_turns_of_a_user_that_sends_bare_line_feeds() {
    needs_root();
    let journald = Journald::new();
    let echod = serve_lines(&journald, ONE_WORKER).ready();
    let greedy: Vec<Client> = (0..64).map(|_| echod.connect()).collect();
    let first = greedy_lines_first(&journald, echod, &greedy, 30, 0);
    figure!("{first} of {} bare line feeds came first", greedy.len() * 30);
    // What a round gives a user is 17 turns of so many lines.
    assert!(first <= 2 * 17 * 30, "{first} lines came first");
}

#[test]
fn a_line_waits_for_a_few_turns_of_all_subordinate_ids_of_a_user() {
    needs_root();
    let journald = Journald::new();
    let place = Place::new();
    let start = serve_lines(&journald, ONE_WORKER).wrapper(&place.with_subuid("64021:70000:1000\n"));
    let echod = start.ready();
    let greedy = PeerProcess::wrapped(&[], &["--ids", "70000"], 16, &echod.socket());
    let first = greedy_lines_first(&journald, echod, &greedy.connections, LINES, SHORT);
    figure!("{first} of {} lines of the greedy user's ids came first", greedy.connections.len() * LINES);
    assert!(first <= 4 * LINES, "{first} lines came first");
}

#[test]
fn a_line_waits_for_a_few_turns_of_each_of_sixteen_users() {
    needs_root();
    let journald = Journald::new();
    let echod = serve_lines(&journald, ONE_WORKER).ready();
    let connect = |user| PeerProcess::wrapped(&[], &["--as", &format!("{0}:{0}", 64101 + user)], 4, &echod.socket());
    let greedy: Vec<Client> = (0..16).flat_map(|user| connect(user).end()).collect();
    let first = greedy_lines_first(&journald, echod, &greedy, 50, 2000);
    figure!("{first} of {} lines of sixteen greedy users came first", greedy.len() * 50);
    // Two reads of each use up its part of a round.
    assert!(first <= 16 * 2 * 50, "{first} lines came first");
}

/// With many workers the order of records is no order of turns: here it is the lines that count.
#[test]
fn no_line_is_lost_or_uncounted_while_the_journal_stands_still_in_a_reload_and_a_restart() {
    needs_root();
    let journald = Journald::new();
    let echod = serve_lines(&journald, "workers = 16\n").with_store();
    let config = fs::read_to_string(echod.place.path("echod.toml")).unwrap();
    let greedy: Vec<Client> = (0..32).map(|_| echod.connect()).collect();
    let modest = PeerProcess::user(ALICE, &echod.socket());
    let all = || greedy.iter().chain([modest.client()]);
    all().for_each(|client| client.echo("hello"));
    let sent = lines(LINES, SHORT);
    let expected = answer(sent.as_bytes());
    journald.stop_reading();
    greedy.iter().for_each(|client| client.send(&sent));
    modest.client().send("before the reload\n");
    echod.reload_with(&config);
    modest.client().expect("> before the reload\n");
    greedy.iter().for_each(|client| client.expect(&expected));
    journald.go_on();
    echod.freeze();
    greedy.iter().for_each(|client| client.send(&sent));
    modest.client().send("before the restart\n");
    echod.kill(Signal::SIGCONT);
    let echod = echod.restart(|start, _| start.journal(&journald));
    modest.client().expect("> before the restart\n");
    greedy.iter().for_each(|client| client.expect(&expected));
    echod.stop();
    let number = |entry: &Entry, field: &str| get(entry, field).parse::<usize>().unwrap();
    let count = |entry: &Entry| match get(entry, "MESSAGE_ID") {
        LINE => 1,
        SUMMARY_OF_LINES => number(entry, "GATE_COUNT"),
        _ => 0,
    };
    let counted: usize = journald.entries().iter().map(count).sum();
    assert_eq!(counted, 33 + 2 * (32 * LINES + 1));
}

/// What `check` says a service with so many connections needs at most, in bytes.
fn need(connections: usize, limits: &str) -> u64 {
    let config = format!("{ALL}[limits]\nconnections = {connections}\nconnections-per-user = {connections}\n{limits}");
    let (code, shown, stderr) = Start::bare().args(&["check"]).config(&config).run();
    assert_eq!(code, 0, "{stderr}");
    let line = shown.lines().find_map(|line| line.strip_prefix("# up to ")).unwrap();
    line.split_once("M of memory").unwrap().0.parse::<u64>().unwrap() << 20
}

fn line_of(length: usize) -> Vec<u8> {
    [&b"m".repeat(length - 1)[..], b"\n"].concat()
}

/// How many bytes the kernel holds that this client has not read.
fn unread(client: &Client) -> usize {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(client.0.as_raw_fd(), &mut vec![0; 1 << 20], flags).unwrap_or(0)
}

/// Whose connections read nothing.
#[derive(Clone, Copy, Debug)]
enum Greedy {
    OneUser,
    SubordinateIds,
    SixteenUsers,
}

impl Greedy {
    fn connect(self, number: usize, echod: &Echod) -> Vec<Client> {
        let of = |options: &[&str], number| PeerProcess::wrapped(&[], options, number, &echod.socket()).end();
        match self {
            Self::OneUser => (0..number).map(|_| echod.connect()).collect(),
            Self::SubordinateIds => of(&["--ids", "70000"], number),
            Self::SixteenUsers => {
                (64101..64117).flat_map(|uid| of(&["--as", &format!("{uid}:{uid}")], number / 16)).collect()
            }
        }
    }
}

/// Under a limit of what `check` says the connections take, no more: the kernel kills where that is too little. Each has a send
/// buffer of so many bytes. With so many workers, over a reload while the journal stands still, and over a restart.
fn survive_peers_that_do_not_read(greedy: Greedy, workers: usize, limits: &str, lines: [usize; 3], send_buffer: usize) {
    let number = setting("CONNECTIONS", 48);
    let taken = (need(1024 + number, limits) - need(number, limits)) / 1024 * number as u64;
    // Where the kernel has no memory controller for a test, what the process itself takes is still compared.
    let group = MemoryGroup::new();
    let most = number + 8;
    let service = format!("[service]\nworkers = {workers}\n");
    let config = format!("{ALL}[limits]\nconnections = {most}\nconnections-per-user = {number}\n{limits}{service}");
    let (journald, place) = (Journald::new(), Place::new());
    let mut wrapper = place.with_subuid("64021:70000:1000\n");
    wrapper.extend(group.iter().flat_map(MemoryGroup::wrapper));
    let echod = Start::serving(&config).journal(&journald).wrapper(&wrapper).with_store();
    let modest = PeerProcess::user(ALICE, &echod.socket());
    modest.client().echo("hello");
    let before = group.as_ref().map_or(0, MemoryGroup::usage);
    // The second process is another copy of the first for a moment. A worker's buffers come with its first connection.
    let limit = before + taken + ((8 + workers as u64) << 20);
    group.iter().for_each(|group| group.set_limit(limit));
    journald.stop_reading();
    let greedy = greedy.connect(number, &echod);
    let mut sent = vec![Vec::new(); number];
    let third = number.div_ceil(3);
    for (kind, line) in lines.into_iter().enumerate() {
        let some = kind * third..((kind + 1) * third).min(number);
        sent[some.clone()].clone_from_slice(&clog_all(&greedy[some], &line_of(line)));
    }
    modest.client().echo("while nobody reads");
    let most = greedy.iter().map(unread).max().unwrap();
    // The kernel takes one piece more.
    assert!(most <= send_buffer + (37 << 10), "{most} bytes are unread, with a send buffer of {send_buffer}");
    let clogged = group.as_ref().map_or(0, MemoryGroup::usage);
    let own = common::memory(&echod, "VmHWM");
    echod.reload_with(&config);
    modest.client().echo("after the reload");
    journald.go_on();
    let echod = echod.restart(|start, _| start.journal(&journald).wrapper(&wrapper));
    modest.client().echo("after the restart");
    PeerProcess::user(ALICE, &echod.socket()).client().echo("a new one");
    if let Some(group) = &group {
        let (at_rest, peak) = (clogged.saturating_sub(before), group.peak().saturating_sub(before));
        figure!(
            "{number} connections that do not read: {} KiB each, {} at a restart, {} stated",
            at_rest / 1024 / number as u64,
            peak / 1024 / number as u64,
            taken / 1024 / number as u64
        );
        assert_eq!(group.killed(), 0);
        assert!(peak <= limit - before, "{peak} bytes, where {taken} were stated");
    } else {
        figure!("no memory controller: the process alone took {own} KiB");
        assert!(own * 1024 < taken + (64 << 20), "{own} KiB");
    }
    // No connection was lost, no byte either.
    for (client, sent) in greedy.iter().zip(&sent).step_by(number / 6) {
        client.half_close();
        client.expect_end(answer(sent));
    }
    drop((greedy, modest));
    echod.stop();
    let refused = journald.entries().into_iter().find(|entry| get(entry, "GATE_VERDICT") == "refused");
    assert_eq!(refused, None);
}

#[test]
fn peers_that_do_not_read_take_no_more_than_is_stated_and_no_process_is_killed() {
    needs_root();
    for (greedy, workers) in [(Greedy::OneUser, 1), (Greedy::SubordinateIds, 16), (Greedy::SixteenUsers, 1)] {
        survive_peers_that_do_not_read(greedy, workers, "", [1, 40, 65_536], 128 << 10);
    }
}

#[test]
fn with_shorter_lines_peers_that_do_not_read_take_less() {
    needs_root();
    for (greedy, workers) in [(Greedy::OneUser, 1), (Greedy::SubordinateIds, 1), (Greedy::SixteenUsers, 16)] {
        survive_peers_that_do_not_read(greedy, workers, "line-length = \"16K\"\n", [1, 40, 16_384], 32 << 10);
    }
}

#[test]
fn a_start_warns_where_the_control_group_has_less_than_the_limits_need() {
    needs_root();
    let Some(group) = MemoryGroup::new() else { return figure!("no memory controller: see daemon/memory.rs") };
    let journald = Journald::new();
    let limit = need(1024, "") - (1 << 20);
    group.set_limit(limit);
    let limits = "[limits]\nconnections = 1024\nconnections-per-user = 1024\n";
    let start = Start::serving(&format!("{ALL}{limits}")).wrapper(&group.wrapper()).journal(&journald);
    let echod = start.ready();
    let warning = journald.wait_for("warning", |entry| get(entry, "MESSAGE").contains("(MemoryMax=)"));
    let expected = format!("the control group's limit is {}M", limit >> 20);
    assert!(get(&warning, "MESSAGE").contains(&expected), "{warning:?}");
    // A check that is run as the service, in its control group.
    let check = Start::bare().args(&["check"]).env("CONFIGURATION_DIRECTORY", "/nowhere").wrapper(&group.wrapper());
    let (code, _, stderr) = check.config(&format!("{ALL}{limits}")).run();
    assert!(code == 0 && stderr.starts_with("warning: ") && stderr.contains(&expected), "{stderr}");
    echod.reload_with(&format!("{ALL}[limits]\nconnections = 500\n"));
    echod.stop();
    let warnings = journald.entries().into_iter().filter(|entry| get(entry, "MESSAGE").contains("MemoryMax"));
    assert_eq!(warnings.count(), 1, "less is needed since the reload");
}
