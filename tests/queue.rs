//! The queue of new connections: users take turns in it, what one user has waiting delays no other user, and each
//! connection in it gets its answer and its place in the record. Needs root, to connect as several users.
//!
//! The program is stopped (SIGSTOP) while the queue fills, so that what it finds when it goes on is known to the last
//! connection. The order of the records shows the order in which connections were judged.

mod common;

use std::fs;

use common::records::{LONG, denials, get, serve, with_verdict};
use common::{
    ALICE, BOB, BUSY, Client, DENIED, Echod, Journald, PeerProcess, Rush, Start, needs_root, raise_descriptor_limit,
    stands_for,
};
use nix::sys::signal::Signal;

/// Every denial is written one by one.
const EACH: &str = "burst = 1000000\n";

fn connect(uid: u32, count: usize, echod: &Echod) -> Vec<Client> {
    PeerProcess::wrapped(&[], &["--as", &format!("{uid}:{uid}")], count, &echod.socket()).end()
}

/// The users of the records of denials, in their order.
fn order(journald: &Journald) -> Vec<u32> {
    let entries = journald.entries();
    entries.iter().filter(|entry| with_verdict("denied")(entry)).map(|e| get(e, "PEER_UID").parse().unwrap()).collect()
}

#[test]
fn a_users_connection_does_not_wait_for_another_users_two_hundred() {
    needs_root();
    let journald = Journald::new();
    let echod = serve(&journald, &format!("{LONG}{EACH}{}", common::DENY_ALL));
    echod.freeze();
    let flood = connect(ALICE, 200, &echod);
    let others: Vec<_> = [BOB, 64003].map(|uid| connect(uid, 1, &echod)).into();
    echod.signal(Signal::SIGCONT);
    flood.iter().chain(others.iter().flatten()).for_each(|client| client.expect_end(DENIED));
    echod.stop();
    let order = order(&journald);
    assert_eq!(order.len(), 202);
    let place = |uid| order.iter().position(|&other| other == uid).unwrap();
    // The first connection is judged before the gate knows of a second one.
    assert_eq!((place(BOB), place(64003)), (2, 3), "{:?}", &order[..8]);
}

/// In the order of the kernel's queue, or with a turn for each id, the other user's connection would be the last.
#[test]
fn a_thousand_subordinate_ids_have_one_turn_together() {
    needs_root();
    raise_descriptor_limit(4096);
    let journald = Journald::new();
    let place = common::Place::new();
    let config = format!("{LONG}{EACH}[limits]\nwaiting-per-user = 1024\n{}", common::DENY_ALL);
    let echod = Start::serving(&config).journal(&journald).wrapper(&place.with_subuid("64001:70000:1000\n")).ready();
    echod.freeze();
    let flood = PeerProcess::wrapped(&[], &["--ids", "70000"], 990, &echod.socket()).end();
    let its_owner = connect(ALICE, 3, &echod);
    let other = connect(BOB, 1, &echod);
    echod.signal(Signal::SIGCONT);
    flood.iter().chain(&its_owner).chain(&other).for_each(|client| client.expect_end(DENIED));
    echod.stop();
    let order = order(&journald);
    assert_eq!(order.len(), 994);
    // The gate accepts 256 in a turn, and judges 16.
    let place = order.iter().position(|&uid| uid == BOB).unwrap();
    assert!(place <= 4 * 16, "{place} came first");
}

#[test]
fn of_sixteen_users_at_once_each_has_one_connection_judged_before_a_newcomers() {
    needs_root();
    let journald = Journald::new();
    let config = format!("{LONG}{EACH}{}[service]\nworkers = 16\n", common::DENY_ALL);
    let echod = serve(&journald, &config);
    echod.freeze();
    let flood: Vec<_> = (0..16).flat_map(|user| connect(64101 + user, 15, &echod)).collect();
    let other = connect(BOB, 1, &echod);
    echod.signal(Signal::SIGCONT);
    flood.iter().chain(&other).for_each(|client| client.expect_end(DENIED));
    echod.stop();
    let order = order(&journald);
    assert_eq!(order.len(), 16 * 15 + 1);
    let place = order.iter().position(|&uid| uid == BOB).unwrap();
    // The first connection is judged before the gate knows of a second one.
    assert!(place <= 17, "{place} came first: {:?}", &order[..40]);
}

#[test]
fn while_the_journal_stands_still_users_take_turns_and_each_denial_counts() {
    needs_root();
    let journald = Journald::new();
    let config = format!("{LONG}{EACH}{}[service]\nworkers = 1\nbusy-poll = \"off\"\n", common::DENY_ALL);
    // A kernel that cannot refuse descriptors: each connection is asked.
    let without = ["trace=setsockopt", "inject=setsockopt:error=ENOPROTOOPT"];
    let start = Start::serving(&config).journal(&journald);
    let place = std::sync::Arc::clone(start.place());
    let trace = place.path("trace");
    let echod = start.traced(&trace, &without).ready();
    journald.stop_reading();
    echod.freeze();
    let flood = connect(ALICE, 240, &echod);
    let other = connect(BOB, 1, &echod);
    echod.signal(Signal::SIGCONT);
    flood.iter().chain(&other).for_each(|client| client.expect_end(DENIED));
    journald.go_on();
    echod.stop();
    let order = order(&journald);
    assert_eq!((order.len(), order.iter().position(|&uid| uid == BOB)), (241, Some(2)));
    assert!(fs::read_to_string(trace).unwrap().contains("ENOPROTOOPT"));
}

/// What each client is told, where all of them asked while the program was stopped: how many were served and how many refused.
fn served_and_refused(clients: &[Client]) -> (usize, u64) {
    let told = clients.iter().map(|client| (client, client.until("\n")));
    let (served, refused): (Vec<_>, Vec<_>) = told.partition(|(_, told)| told == b"> hello\n");
    for (client, told) in &refused {
        assert_eq!(told, BUSY);
        client.expect_end("");
    }
    (served.len(), refused.len() as u64)
}

#[test]
fn more_than_may_wait_are_turned_away_as_the_policy_says_and_counted_in_a_reload_too() {
    needs_root();
    let journald = Journald::new();
    let config = format!("{LONG}burst = 3\n[limits]\nconnections-per-user = 1000\nwaiting-per-user = 5\n");
    let policy = format!("[deny.alice]\nusers = [{ALICE}]\n[allow.all]\nusers = [\"any\"]\n");
    let echod = serve(&journald, &format!("{config}{policy}"));
    echod.freeze();
    let (denied, flood, modest) = (connect(ALICE, 150, &echod), connect(BOB, 120, &echod), connect(64003, 5, &echod));
    flood.iter().chain(&modest).for_each(|client| client.send("hello\n"));
    echod.signal(Signal::SIGHUP);
    echod.signal(Signal::SIGCONT);
    denied.iter().for_each(|client| client.expect_end(DENIED));
    let (served, refused) = served_and_refused(&flood);
    // Of six that come, five wait and are served.
    assert!((80..=110).contains(&served) && refused >= 10, "{served} served, {refused} refused");
    modest.iter().for_each(|client| client.expect("> hello\n"));
    echod.stop();
    let entries = journald.entries();
    assert_eq!(denials(&entries), 150);
    assert_eq!(stands_for(&entries, "refused", &["user-limit"]), refused);
    let of_refusals: Vec<_> = entries.iter().filter(|entry| with_verdict("refused")(entry)).collect();
    assert_eq!(of_refusals.len(), 3);
    for entry in of_refusals {
        let fields = ["PEER_UID", "GATE_REASON", "GATE_RULE"].map(|field| get(entry, field));
        assert_eq!(fields, [&BOB.to_string(), "user-limit", "allow.all"]);
    }
}

#[test]
fn a_user_with_more_than_may_wait_gets_all_places_and_no_more() {
    needs_root();
    let journald = Journald::new();
    let config = "[audit]\ninterval = \"1h\"\n[limits]\nconnections-per-user = 40\nwaiting-per-user = 10\n";
    let echod = serve(&journald, &format!("{config}[allow.all]\nusers = [\"any\"]\n"));
    echod.freeze();
    let (flood, other) = (connect(ALICE, 100, &echod), connect(BOB, 1, &echod));
    flood.iter().for_each(|client| client.send("hello\n"));
    echod.signal(Signal::SIGCONT);
    other[0].echo("hello");
    assert_eq!(served_and_refused(&flood), (40, 60));
    echod.stop();
    assert_eq!(stands_for(&journald.entries(), "refused", &["user-limit"]), 60);
}

/// More than the 512 connections of all users that may wait with so few descriptors.
#[test]
fn a_restart_turns_no_connection_away_for_waiting() {
    needs_root();
    raise_descriptor_limit(4096);
    let journald = Journald::new();
    let config = "[limits]\nconnections = 2000\nconnections-per-user = 1000\n[allow.all]\nusers = [\"any\"]\n";
    let echod = Start::serving(config).journal(&journald).with_store();
    echod.freeze();
    let (many, more, other) = (connect(ALICE, 700, &echod), connect(BOB, 600, &echod), connect(64003, 1, &echod));
    many.iter().chain(&more).chain(&other).for_each(|client| client.send("hello\n"));
    let next = echod.restart(|start, _| start.journal(&journald));
    assert_eq!(served_and_refused(&other), (1, 0));
    assert_eq!((served_and_refused(&many), served_and_refused(&more)), ((700, 0), (600, 0)));
    next.stop();
}

#[test]
fn a_restart_answers_each_connection_that_waits_in_either_queue() {
    needs_root();
    let journald = Journald::new();
    let policy = format!("[deny.alice]\nusers = [{ALICE}]\n[allow.all]\nusers = [\"any\"]\n");
    let echod = Start::serving(&format!("{LONG}burst = 3\n{policy}")).journal(&journald).with_store();
    echod.freeze();
    let (denied, admitted) = (connect(ALICE, 150, &echod), connect(BOB, 30, &echod));
    let next = echod.restart(|start, _| start.journal(&journald));
    denied.iter().for_each(|client| client.expect_end(DENIED));
    admitted.iter().for_each(|client| client.echo("hello"));
    next.stop();
    assert_eq!(denials(&journald.entries()), 150);
}

/// Denied users connect and close without end, in a reload, a restart and while the journal stands still. Each connection is
/// counted, and another user's are served, each of them.
fn count_what_connects_and_closes(service: &str, attackers: &[&[&str]]) {
    needs_root();
    let journald = Journald::new();
    let policy = format!("{LONG}{service}[allow.bob]\nusers = [{BOB}]\n");
    let place = common::Place::new();
    let wrapper = place.with_subuid("64001:70000:1000\n");
    let echod = Start::serving(&policy).journal(&journald).wrapper(&wrapper).with_store();
    let visit = |echod: &Echod| {
        let visits = connect(BOB, 20, echod);
        visits.iter().for_each(|client| client.echo("hello"));
    };
    let rushes: Vec<_> = attackers.iter().map(|options| Rush::begin(options, &echod.socket())).collect();
    visit(&echod);
    journald.stop_reading();
    visit(&echod);
    echod.reload_with(&policy);
    visit(&echod);
    journald.go_on();
    let echod = echod.restart(|start, _| start.journal(&journald).wrapper(&wrapper));
    visit(&echod);
    let count: u64 = rushes.into_iter().map(Rush::end).sum();
    // What came before it has been accepted.
    visit(&echod);
    echod.stop();
    figure!("{service:?}: {count} connections were closed at once");
    assert_eq!(denials(&journald.entries()), count);
}

#[test]
fn each_connection_of_a_user_that_connects_and_closes_is_counted() {
    let user = ["--as", "64001:64001"];
    count_what_connects_and_closes("", &[&user, &user]);
    count_what_connects_and_closes("[service]\nworkers = 1\nbusy-poll = \"off\"\n", &[&user, &user]);
}

#[test]
fn each_connection_of_a_thousand_subordinate_ids_that_connect_and_close_is_counted() {
    let ids = ["--ids", "70000", "--times", "1000"];
    count_what_connects_and_closes("[service]\nworkers = 16\n", &[&ids, &ids]);
}

#[test]
fn each_connection_of_sixteen_users_that_connect_and_close_is_counted() {
    let ids: Vec<_> = (64101..64117).map(|uid| format!("{uid}:{uid}")).collect();
    let options: Vec<_> = ids.iter().map(|ids| ["--as", ids.as_str()]).collect();
    let attackers: Vec<_> = options.iter().map(|options| options.as_slice()).collect();
    count_what_connects_and_closes("", &attackers);
}
