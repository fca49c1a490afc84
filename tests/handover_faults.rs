//! What can go wrong with a restart: what was left is cut off, changed or of another program; the kernel or the service
//! manager takes no more; a process is killed. Each connection goes on, or it ends and gets no byte that is wrong.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::sync::Arc;

use common::{Client, Echod, End, Journald, Manager, Message, OWNER, Start, change_left, left, needs_root};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Connections that an earlier process left: one at rest, and one in the middle of a line.
struct Two {
    at_rest: Client,
    midline: Client,
    echod: Echod,
}

impl Two {
    fn new() -> Self {
        let echod = Start::serving(OWNER).with_store();
        let (at_rest, midline) = (echod.connect(), echod.connect());
        at_rest.echo("before");
        midline.send("whole\nhal");
        midline.expect("> whole\n");
        Self { at_rest, midline, echod }
    }

    /// Restarts with the store changed. Both clients send meanwhile.
    fn restart(self, change: impl FnOnce(&mut Vec<(String, OwnedFd)>)) -> Self {
        let Self { at_rest, midline, echod } = self;
        let echod = echod.restart(|start, stored| {
            assert_eq!(stored.len(), 1, "one socket for all connections");
            at_rest.send("meanwhile\nfrag");
            midline.send("f a line\nmore");
            change(stored);
            start
        });
        Self { at_rest, midline, echod }
    }

    /// Ends the service, which must have served a new client and emptied the store. The record must say this.
    #[track_caller]
    fn expect_record(self, said: &str) {
        self.echod.connect().echo("a new one is served");
        assert!(self.echod.manager.received.lock().store.is_empty());
        let stderr = self.echod.stop();
        assert!(stderr.contains(said), "expected {said:?}: {stderr}");
    }

    #[track_caller]
    fn expect_both_go_on(&self) {
        self.at_rest.expect("> meanwhile\n");
        self.at_rest.send("\n");
        self.at_rest.expect("> frag\n");
        self.midline.expect("> half a line\n");
    }
}

/// Restarts with the message that holds the connections changed. No state is known: each connection only ends.
#[track_caller]
fn expect_ended(why: &str, change: impl FnOnce(&mut Message)) {
    let two = Two::new().restart(|stored| change_left(stored, |messages| change(&mut messages[1])));
    two.at_rest.expect_end("");
    two.midline.expect_end("");
    two.expect_record(&format!("0 connections carried over the restart, 2 ended ({why})"));
}

#[test]
fn connections_of_a_message_cut_off_end_without_a_byte() {
    for length in [8, 11, 12, 19, 20, 24, 31, 40] {
        expect_ended("the message is cut off or corrupted", |message| message.bytes.truncate(length));
    }
    expect_ended("the message is cut off or corrupted", |message| message.bytes.truncate(message.bytes.len() - 1));
    expect_ended("the message is cut off or corrupted", |message| message.bytes.push(0));
}

#[test]
fn a_process_that_cannot_serve_answers_nothing_where_no_state_is_known() {
    let Two { at_rest, midline, echod } = Two::new();
    echod.signal(Signal::SIGTERM);
    let (code, stderr) = echod.fail_again(|start, stored| {
        start.place().file("echod.toml", "[allow.x]\nuser = [0]\n");
        [&at_rest, &midline].iter().for_each(|client| client.send("meanwhile\n"));
        change_left(stored, |messages| messages[1].bytes.push(0));
        start
    });
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("2 connections of an earlier process ended"), "{stderr}");
    at_rest.expect_end("");
    midline.expect_end("");
}

#[test]
fn connections_of_a_corrupted_message_end_without_a_byte() {
    for place in [12, 20, 21, 25, 30, 40, 50] {
        expect_ended("the message is cut off or corrupted", |message| message.bytes[place] ^= 0x40);
    }
}

#[test]
fn connections_of_a_message_of_another_program_end_without_a_byte() {
    expect_ended("the message is of another program", |message| message.bytes = b"hello".to_vec());
    expect_ended("the message is of another program", |message| message.bytes.clear());
}

#[test]
fn connections_of_a_message_of_a_later_version_end_without_a_byte() {
    let why = "the message is of version 2, this program knows version 1";
    expect_ended(why, |message| message.bytes[8] = 2);
}

#[test]
fn with_more_descriptors_than_states_no_state_is_used() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stranger = Client::of(ours);
    stranger.send("who am I\n");
    let two = Two::new().restart(|stored| {
        change_left(stored, |messages| messages[1].fds.insert(1, theirs.into()));
    });
    [&two.at_rest, &two.midline, &stranger].iter().for_each(|client| client.expect_end(""));
    two.expect_record("0 connections carried over the restart, 3 ended (3 descriptors came with a message of 2)");
}

#[test]
fn with_fewer_descriptors_than_states_no_state_is_used() {
    let two = Two::new().restart(|stored| change_left(stored, |messages| drop(messages[1].fds.remove(0))));
    // One of them is closed with its descriptor, with what it had sent.
    let ends = [two.at_rest.rest(), two.midline.rest()];
    assert!(ends.iter().all(|(output, _)| output.is_empty()), "{ends:?}");
    assert_eq!(ends.iter().filter(|(_, end)| *end == End::Eof).count(), 1, "{ends:?}");
    two.expect_record("0 connections carried over the restart, 2 ended (1 descriptors came with a message of 2)");
}

#[test]
fn states_of_a_later_version_end_their_connections_in_order() {
    // The first byte is the version of what the daemon writes, the second that of the protocol's own state.
    for (place, version) in [(0, "9.1"), (1, "2.9")] {
        let two = Two::new().restart(|stored| {
            change_left(stored, |messages| messages[1].change_states(|state| state[place] = 9));
        });
        two.at_rest.expect_end("> meanwhile\n> frag");
        two.midline.expect_end("");
        let why = format!("(their state is of version {version}, which this program does not know)");
        two.expect_record(&format!("0 connections carried over the restart, 2 ended {why}"));
    }
}

#[test]
fn states_cut_off_end_their_connections_in_order() {
    for length in [3, 4, 10] {
        let two = Two::new().restart(|stored| {
            change_left(stored, |messages| messages[1].change_states(|state| state.truncate(length)));
        });
        two.at_rest.expect_end("> meanwhile\n> frag");
        two.midline.expect_end("");
        two.expect_record("0 connections carried over the restart, 2 ended (their state is cut off or corrupted)");
    }
}

#[test]
fn a_state_that_cannot_be_used_ends_no_other_connection() {
    for is_at_rest in [0, 1] {
        let two = Two::new().restart(|stored| {
            let change = |state: &mut Vec<u8>| state[0] = if state[2] == is_at_rest { 9 } else { state[0] };
            change_left(stored, |messages| messages[1].change_states(change));
        });
        if is_at_rest == 1 {
            two.at_rest.expect_end("> meanwhile\n> frag");
            two.midline.expect("> half a line\n");
        } else {
            two.midline.expect_end("");
            two.at_rest.expect("> meanwhile\n");
        }
        two.expect_record("1 connections carried over the restart, 1 ended");
    }
}

#[test]
fn without_its_message_no_connection_is_made_up() {
    let two = Two::new().restart(|stored| change_left(stored, |messages| messages.truncate(1)));
    assert!(two.at_rest.rest().0.is_empty() && two.midline.rest().0.is_empty());
    two.echod.connect().echo("a new one is served");
    let stderr = two.echod.stop();
    assert!(!stderr.contains("carried over the restart"), "{stderr}");
}

#[test]
fn a_message_in_front_of_the_others_ends_no_connection() {
    let two = Two::new().restart(|stored| change_left(stored, |messages| messages.insert(0, Message::foreign(vec![]))));
    two.expect_both_go_on();
    two.expect_record("2 connections carried over the restart, 0 ended (the message is of another program)");
}

/// recvmsg(2) returns 0 for it, as at the end of file.
#[test]
fn a_message_without_bytes_ends_no_connection_after_it() {
    let empty = || Message { bytes: Vec::new(), fds: Vec::new() };
    let two = Two::new().restart(|stored| {
        change_left(stored, |messages| drop(messages.splice(1..1, [empty(), empty()])));
    });
    two.expect_both_go_on();
    two.expect_record("2 connections carried over the restart, 0 ended (the message is of another program)");
}

#[test]
fn foreign_descriptors_are_closed_and_named_and_disturb_no_connection() {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    let two = Two::new().restart(|stored| {
        // A connection of an older version, one that systemd has no name for, one under our name.
        let names = ["echod-c", "stored", "echod"];
        stored.extend(names.iter().zip(theirs).map(|(name, socket)| ((*name).to_owned(), socket.into())));
        stored.push(("echod-s".to_owned(), File::open("/dev/null").unwrap().into()));
        stored.insert(0, ("echod".to_owned(), File::open("/").unwrap().into()));
    });
    two.expect_both_go_on();
    ours.into_iter().for_each(|socket| Client::of(socket).expect_end(""));
    two.expect_record("5 stored file descriptors that are not ours were closed: echod, echod-c, echod-s, stored");
}

#[test]
fn a_foreign_handover_ends_its_connections_and_no_other() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let two = Two::new().restart(|stored| {
        stored.push(("echod".to_owned(), left(&[Message::foreign(vec![theirs.into()])])));
        // Nothing was sent into this one, and something still may be.
        let flags = SockFlag::SOCK_CLOEXEC;
        let (empty, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        stored.extend([("echod".to_owned(), empty), ("echod".to_owned(), other)]);
    });
    two.expect_both_go_on();
    Client::of(ours).expect_end("");
    two.expect_record("2 connections carried over the restart, 1 ended (the message is of another program)");
}

#[test]
fn what_is_no_connection_among_connections_is_closed() {
    let two = Two::new().restart(|stored| {
        change_left(stored, |messages| {
            let fds = [File::open("/dev/null").unwrap().into(), File::open("/").unwrap().into()];
            let mut message = Message { bytes: messages[1].bytes.clone(), fds: fds.into() };
            message.change_states(|_| ());
            messages.push(message);
        });
    });
    two.expect_both_go_on();
    two.expect_record("2 connections carried over the restart, 0 ended (their state is cut off or corrupted)");
}

#[test]
fn a_carried_connection_made_blocking_delays_no_other() {
    let two = Two::new().restart(|stored| {
        change_left(stored, |messages| {
            for fd in &messages[1].fds {
                nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
            }
        });
    });
    two.midline.clog(b"\n");
    two.at_rest.expect("> meanwhile\n");
    two.echod.stop();
}

#[test]
fn connection_numbers_stay_unique_where_the_opening_is_lost() {
    needs_root();
    let journald = Journald::new();
    let config = format!("[audit]\nrecord = \"connections\"\n{OWNER}");
    let echod = Start::serving(&config).journal(&journald).with_store();
    let clients: Vec<_> = (0..3).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.echo("in"));
    let echod = echod.restart(|start, stored| {
        let mut is_first = true;
        change_left(stored, |messages| {
            messages.remove(0);
            messages[0].change_states(|state| state[0] = if std::mem::take(&mut is_first) { 9 } else { state[0] });
        });
        start.journal(&journald)
    });
    let new = echod.connect();
    new.echo("in");
    echod.signal(Signal::SIGINT);
    new.expect_end("");
    assert!(echod.wait().0.success());
    let entries = journald.entries();
    let closed = entries.iter().filter(|entry| entry.get("GATE_VERDICT").is_some_and(|it| it == "closed"));
    let mut numbers: Vec<u64> = closed.map(|entry| entry["GATE_CONNECTION"].parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers.len(), 4);
    assert!(numbers.windows(2).all(|two| two[0] < two[1]), "{numbers:?}");
}

/// Stops a service with three clients in the middle of a line, where nothing can be left to the next process.
#[track_caller]
fn expect_nothing_left(start: Start, manager: &Arc<Manager>, why: &str) {
    let echod = start.ready_with(Arc::clone(manager));
    let clients: Vec<_> = (0..3).map(|_| echod.connect()).collect();
    for client in &clients {
        client.echo("in");
        client.send("half");
    }
    let stderr = echod.stop();
    clients.iter().for_each(|client| client.expect_end("> half"));
    assert!(stderr.contains("0 connections left to the next process, 3 ended"), "{stderr}");
    assert!(stderr.contains(&format!("3 connections cannot be left to the next process: {why}")), "{stderr}");
    assert!(manager.received.change(common::Received::passed).is_empty());
}

#[test]
fn where_the_store_takes_nothing_all_connections_end_in_order() {
    for said in ["4", "(unset)"] {
        let start = Start::serving(OWNER).env("FDSTORE", said);
        expect_nothing_left(start, &Arc::new(Manager::new()), "the service manager did not keep it");
    }
}

#[test]
fn where_the_manager_never_answers_all_connections_end_in_order() {
    let manager = Arc::new(Manager::new());
    manager.received.change(|received| (received.capacity, received.unsettled) = (4, Some(Vec::new())));
    expect_nothing_left(Start::serving(OWNER).env("FDSTORE", "4"), &manager, "timed out");
}

#[test]
fn a_manager_that_does_not_say_how_much_it_stores_is_tried() {
    let manager = Arc::new(Manager::new());
    manager.received.change(|received| received.capacity = 4);
    let echod = Start::serving(OWNER).ready_with(manager);
    let client = echod.connect();
    client.echo("before");
    let echod = echod.restart(|start, _| start.env("FDSTORE", "(unset)"));
    client.echo("after");
    echod.stop();
}

/// A policy for any number of connections of any user.
const MANY: &str = "[limits]\nconnections = 8000\nconnections-per-user = 8000\n[allow.any]\nusers = [\"any\"]\n";

/// So many clients, each in the middle of a line.
fn many(echod: &Echod, count: usize, half: &str) -> Vec<Client> {
    let clients: Vec<_> = (0..count).map(|_| echod.connect()).collect();
    for client in &clients {
        client.echo("in");
        client.send(half);
    }
    clients
}

/// How many of the connections go on after a restart. Each other client must have got the rest of its echo, and a clean end.
#[track_caller]
fn count_carried(clients: &[Client], half: &str) -> usize {
    let carried = clients.iter().filter(|client| {
        let _ = client.try_send(" line\n");
        client.0.shutdown(std::net::Shutdown::Write).ok();
        let (output, end) = client.rest();
        assert_eq!(end, End::Eof);
        let is_carried = output == format!("> {half} line\n").into_bytes();
        assert!(is_carried || output == format!("> {half}").into_bytes(), "{}", common::show(&output));
        is_carried
    });
    carried.count()
}

/// Done by the process's own user, `uid`: that takes no privilege.
fn lower_descriptor_limit(echod: &Echod, uid: u32, limit: usize) {
    let (pid, limit) = (echod.pid().to_string(), format!("--nofile={limit}:{limit}"));
    let mut lower = std::process::Command::new("prlimit");
    assert!(lower.args(["--pid", &pid, &limit]).uid(uid).gid(uid).status().unwrap().success());
}

#[test]
fn more_connections_than_may_be_in_flight_end_in_order() {
    const LIMIT: usize = 200;
    needs_root();
    // Root has no such limit, and each user has one.
    let echod = Start::serving(MANY).run_as("64003:64003:").with_store();
    let clients = many(&echod, 250, "half");
    // Now no descriptor is free, except the gate's reserve.
    lower_descriptor_limit(&echod, 64003, LIMIT);
    echod.signal(Signal::SIGTERM);
    echod.wait_for_stderr("connections left to the next process, ");
    let stderr = echod.stderr();
    let echod = echod.start_again(|start, _| start);
    let carried = count_carried(&clients, "half");
    assert!((LIMIT - 16..=LIMIT + 16).contains(&carried), "{carried}");
    let ended = 250 - carried;
    assert!(stderr.contains(&format!("{carried} connections left to the next process, {ended} ended")), "{stderr}");
    let why = format!("{ended} connections cannot be left to the next process: Too many references");
    assert!(stderr.contains(&why), "{stderr}");
    echod.stop();
}

#[test]
fn a_full_descriptor_table_at_the_stop_costs_no_connection() {
    const LIMIT: usize = 100;
    let limit = format!("--nofile={LIMIT}:{LIMIT}");
    let echod = Start::serving(MANY).wrapper(&["prlimit", &limit]).with_store();
    let mut clients: Vec<_> = (0..LIMIT).map(|_| echod.connect()).collect();
    clients.iter().for_each(|client| client.send("in\nhalf"));
    // There is no descriptor for the last ones: they are refused.
    clients.retain(|client| client.read(4) == b"> in");
    assert!((LIMIT - 40..LIMIT).contains(&clients.len()), "{}", clients.len());
    let echod = echod.restart(|start, _| start);
    clients.iter().for_each(|client| client.expect("\n"));
    assert_eq!(count_carried(&clients, "half"), clients.len());
    echod.stop();
}

#[test]
fn a_low_soft_limit_of_the_next_process_costs_no_connection() {
    common::raise_descriptor_limit(4096);
    let echod = Start::serving(MANY).with_store();
    let clients = many(&echod, 600, "half");
    let echod = echod.restart(|start, _| start.wrapper(&["prlimit", "--nofile=256:4096"]));
    assert_eq!(count_carried(&clients, "half"), 600);
    echod.stop();
}

/// Restarts 600 connections onto a process with this limit. Returns how many it says go on, it ended in order and were lost,
/// and the clients.
fn restart_with_limit(limit: usize) -> (usize, usize, usize, Vec<Client>, Echod) {
    common::raise_descriptor_limit(4096);
    let echod = Start::serving(MANY).with_store();
    let clients = many(&echod, 600, "half");
    let limit = format!("--nofile={limit}:{limit}");
    let echod = echod.restart(|start, _| start.wrapper(&["prlimit", &limit]));
    echod.wait_for_stderr(" connections carried over the restart, ");
    let said = echod.stderr();
    let numbers = |text: &str| -> usize {
        let before = said.lines().filter_map(|line| line.split_once(text)?.0.rsplit(' ').next());
        before.map(|number| number.parse::<usize>().unwrap()).sum()
    };
    let in_order = numbers(" connections of an earlier process ended: the limit of descriptors is too low for them");
    let lost = numbers(" ended (");
    (numbers(" connections carried over the restart, "), in_order, lost, clients, echod)
}

#[test]
fn connections_above_the_next_processs_limit_end_in_order() {
    let (carried, in_order, lost, clients, echod) = restart_with_limit(600);
    assert!(carried > 100 && in_order > 100, "{carried} {in_order}: {}", echod.stderr());
    assert_eq!((carried + in_order, lost), (600, 0), "{}", echod.stderr());
    assert_eq!(count_carried(&clients, "half"), carried);
    echod.stop();
}

#[test]
fn connections_of_a_message_above_the_limit_are_counted() {
    let (carried, in_order, lost, clients, echod) = restart_with_limit(200);
    assert!(lost > 100, "{}", echod.stderr());
    assert_eq!(carried + in_order + lost, 600, "{}", echod.stderr());
    drop(clients);
    echod.stop();
}

#[test]
fn with_small_send_buffers_every_connection_goes_on() {
    common::raise_descriptor_limit(8192);
    let place = common::Place::new();
    let half = "half of a line that takes its place in the message";
    // As with a tiny net.core.wmem_max: the buffers stay as they are.
    let fault = ["trace=setsockopt", "inject=setsockopt:error=EPERM"];
    let echod = Start::serving(MANY).traced(&place.path("trace"), &fault).with_store();
    let clients = many(&echod, 3000, half);
    let echod = echod.restart(|start, stored| {
        change_left(stored, |messages| assert_eq!(messages[0].fds.len(), 1, "there is a socket before this one"));
        start
    });
    assert_eq!(count_carried(&clients, half), 3000);
    echod.stop();
}

#[test]
fn killed_half_way_through_sending_it_leaves_nothing() {
    common::raise_descriptor_limit(4096);
    // Each message has its states in a file of its own: the second one is never sent. With --seccomp-bpf strace
    // injects no signal.
    let strace = ["strace", "-D", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=memfd_create"];
    let start = Start::serving(MANY).env("LSAN_OPTIONS", "detect_leaks=0").wrapper(&strace);
    let echod = start.wrapper(&["-e", "inject=memfd_create:signal=SIGKILL:when=2"]).with_store();
    let clients = many(&echod, 600, &"half".repeat(100));
    let echod = echod.restart(|start, stored| {
        assert!(stored.is_empty(), "nothing was stored before all was sent");
        start
    });
    assert!(clients.iter().all(|client| client.rest().0.is_empty()));
    echod.connect().echo("a new one is served");
    echod.stop();
}

#[test]
fn killed_while_it_waits_for_the_manager_it_has_left_all() {
    let two = Two::new();
    let manager = Arc::clone(&two.echod.manager);
    manager.received.change(|received| received.unsettled = Some(Vec::new()));
    two.echod.signal(Signal::SIGTERM);
    manager.wait_for("FDSTORE=1", 1);
    two.echod.signal(Signal::SIGKILL);
    manager.received.change(|received| received.unsettled = None);
    let Two { at_rest, midline, echod } = two;
    let echod = echod.start_again(|start, _| start);
    at_rest.echo("after");
    midline.send("f a line\n");
    midline.expect("> half a line\n");
    assert!(manager.received.lock().store.is_empty());
    echod.stop();
}
