//! What one user can take from another: time and memory. Work is counted, not timed. Needs root, for peers of several users.

mod common;

use common::records::{get, serve};
use common::{ALICE, Client, Journald, MemoryGroup, PeerProcess, Start, answer, clog_all, needs_root, setting};
use nix::sys::signal::Signal;

const ALL: &str = "[allow.all]\nusers = [\"any\"]\n";

/// The order in which lines were answered is the order of their records.
#[test]
fn a_line_waits_for_a_few_turns_of_a_user_with_many_connections() {
    const CONNECTIONS: usize = 16;
    const LINES: usize = 150;
    needs_root();
    let journald = Journald::new();
    let config = "[audit]\nrecord = \"lines\"\nburst = 100000\n[service]\nworkers = 1\nbusy-poll = \"off\"\n";
    let echod = serve(&journald, &format!("{config}{ALL}"));
    let greedy: Vec<Client> = (0..CONNECTIONS).map(|_| echod.connect()).collect();
    let modest = PeerProcess::user(ALICE, &echod.socket());
    // From here on both are heard, by the worker.
    greedy.iter().chain([modest.client()]).for_each(|client| client.echo("hello"));
    greedy.iter().chain([modest.client()]).for_each(|client| client.echo("again"));
    // What all of them send now is there before the worker looks.
    echod.kill(Signal::SIGSTOP);
    let sent = format!("{}\n", "x".repeat(400)).repeat(LINES);
    greedy.iter().for_each(|client| client.send(&sent));
    modest.client().send("me too\n");
    echod.kill(Signal::SIGCONT);
    modest.client().expect("> me too\n");
    let answer = format!("> {}\n", "x".repeat(400)).repeat(LINES);
    greedy.iter().for_each(|client| client.expect(&answer));
    drop(echod.stop());
    let entries = journald.entries();
    let length =
        |bytes: &'static str| entries.iter().filter(move |entry| entry.get("GATE_BYTES").is_some_and(|b| b == bytes));
    assert_eq!(length("401").count(), CONNECTIONS * LINES);
    let before =
        entries.iter().take_while(|entry| get(entry, "MESSAGE") != get(length("7").next().unwrap(), "MESSAGE"));
    let before = before.filter(|entry| entry.get("GATE_BYTES").is_some_and(|bytes| bytes == "401")).count();
    figure!("{before} of {} lines of the greedy user came first", CONNECTIONS * LINES);
    assert!(before <= 4 * LINES, "{before} lines came first");
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

/// Under a limit of what `check` says the connections take, no more: the kernel kills where that is too little.
fn survive_peers_that_do_not_read(limits: &str, lines: [usize; 3]) {
    let number = setting("CONNECTIONS", 96);
    let taken = (need(1024 + number, limits) - need(number, limits)) / 1024 * number as u64;
    // Where the kernel has no memory controller for a test, what the process itself takes is still compared.
    let group = MemoryGroup::new();
    let most = number + 8;
    let config = format!("{ALL}[limits]\nconnections = {most}\nconnections-per-user = {number}\n{limits}");
    let start = Start::serving(&config);
    let wrapper = group.as_ref().map(MemoryGroup::wrapper);
    let start = if let Some(wrapper) = &wrapper { start.wrapper(wrapper) } else { start };
    let echod = start.with_store();
    let modest = PeerProcess::user(ALICE, &echod.socket());
    modest.client().echo("hello");
    let before = group.as_ref().map_or(0, MemoryGroup::usage);
    // The second process is another copy of the first for a moment.
    let limit = before + taken + (8 << 20);
    group.iter().for_each(|group| group.set_limit(limit));
    let greedy: Vec<Client> = (0..number).map(|_| echod.connect()).collect();
    let mut sent = vec![Vec::new(); number];
    let third = number.div_ceil(3);
    for (kind, line) in lines.into_iter().enumerate() {
        let some = kind * third..((kind + 1) * third).min(number);
        sent[some.clone()].clone_from_slice(&clog_all(&greedy[some], &line_of(line)));
    }
    modest.client().echo("while nobody reads");
    let clogged = group.as_ref().map_or(0, MemoryGroup::usage);
    let own = common::memory(&echod, "VmHWM");
    let echod = echod.restart(|start, _| if let Some(wrapper) = &wrapper { start.wrapper(wrapper) } else { start });
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
}

#[test]
fn peers_that_do_not_read_take_no_more_than_is_stated_and_no_process_is_killed() {
    needs_root();
    survive_peers_that_do_not_read("", [1, 40, 65_536]);
}

#[test]
fn with_shorter_lines_peers_that_do_not_read_take_less() {
    needs_root();
    survive_peers_that_do_not_read("line-length = \"16K\"\n", [1, 40, 16_384]);
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
    echod.reload_with(&format!("{ALL}[limits]\nconnections = 500\n"));
    echod.stop();
    let warnings = journald.entries().into_iter().filter(|entry| get(entry, "MESSAGE").contains("MemoryMax"));
    assert_eq!(warnings.count(), 1, "less is needed since the reload");
}
