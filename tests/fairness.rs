//! What one user can take from another: time and memory. Work is counted, not timed. Needs root, for peers of several users.

mod common;

use common::records::{get, serve};
use common::{ALICE, Client, Journald, PeerProcess, needs_root};
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
