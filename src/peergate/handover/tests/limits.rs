//! Descriptors in flight, free descriptors, memory.

use super::*;

/// The number behind this word.
#[track_caller]
fn number_said(said: &str, word: &str) -> usize {
    let after = said.split_once(word).and_then(|(_, rest)| rest.split_whitespace().next());
    after.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {word}: {said}"))
}

#[test]
fn as_many_as_may_be_in_flight_are_left() {
    const LIMIT: usize = 400;
    let manager = Manager::new(1);
    let said = alone("limits::as_many_as_may_be_in_flight_are_left", &manager.address, |address| {
        let store = Store::at(Path::new(address));
        allow_descriptors(4096);
        // Takes the low numbers, which are the only free ones later.
        let low: Vec<_> = (0..LIMIT).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let (_clients, served) = pairs(600);
        drop(low);
        allow_descriptors(LIMIT as u64);
        // Root has no such limit. No other process of this user has descriptors in flight.
        let uid = nix::unistd::Uid::from_raw(1_000_000_000 + process::id());
        nix::unistd::setresuid(uid, uid, uid).unwrap();
        let left = leave(&store, NAME, b"", parcels(&served), PATIENCE).unwrap();
        assert_eq!(left.stopped_by.unwrap().raw_os_error(), Some(Errno::ETOOMANYREFS as i32));
        println!("\nLEFT {}", left.connections);
    });
    let Some(said) = said else { return };
    let taken = connections(take_back(manager.passed(), NAME, &manager.store()));
    assert_eq!(taken.len(), number_said(&said, "LEFT "));
    assert!((LIMIT - 16..LIMIT + 8).contains(&taken.len()), "{}", taken.len());
    assert!(taken.iter().enumerate().all(|(number, parcel)| parcel.state == state_of(number)));
}

/// Has as many descriptors of this user in flight as the kernel takes, in a socket that is no handover's. Root has no limit.
fn fill_up(limit: u64, leave_free: usize) -> OwnedFd {
    allow_descriptors(limit);
    let uid = nix::unistd::Uid::from_raw(1_100_000_000 + process::id());
    nix::unistd::setresuid(uid, uid, uid).unwrap();
    let (writer, reader) = raw_pair();
    let mut more = limit as usize + 1 - leave_free;
    while more > 0 {
        let count = more.min(200);
        send_raw(&writer, b"x", &vec![writer.as_fd(); count]);
        more -= count;
    }
    reader
}

/// Closes the socket, and with it what is in flight there, as soon as this thread sleeps.
fn close_when_waited_for(reader: OwnedFd) -> thread::JoinHandle<()> {
    let stat = format!("/proc/self/task/{}/stat", nix::unistd::gettid());
    thread::spawn(move || {
        while !fs::read_to_string(&stat).unwrap().contains(") S ") {
            thread::yield_now();
        }
        drop(reader);
    })
}

#[test]
fn descriptors_of_another_process_in_flight_are_waited_for() {
    // Some are free: enough for what is sent before the first connection.
    for (name, leave_free) in [("from the start", 0), ("later", 40)] {
        let manager = Manager::new(1);
        let address = format!("{leave_free} {}", manager.address);
        let said = alone("limits::descriptors_of_another_process_in_flight_are_waited_for", &address, |address| {
            let (leave_free, address) = address.split_once(' ').unwrap();
            let store = Store::at(Path::new(address));
            let (_clients, served) = pairs(60);
            let other = fill_up(400, leave_free.parse().unwrap());
            let closes = close_when_waited_for(other);
            let left = leave(&store, NAME, b"", parcels(&served), PATIENCE).unwrap();
            assert!(left.stopped_by.is_none(), "{left:?}");
            assert_eq!(left.connections, 60);
            closes.join().unwrap();
        });
        if said.is_none() {
            return;
        }
        assert_eq!(connections(take_back(manager.passed(), NAME, &manager.store())).len(), 60, "{name}");
    }
}

#[test]
fn what_stores_the_connections_waits_for_descriptors_of_another_process() {
    let manager = Manager::new(1);
    let said = alone(
        "limits::what_stores_the_connections_waits_for_descriptors_of_another_process",
        &manager.address,
        |address| {
            let store = Store::at(Path::new(address));
            let (ours, _theirs) = raw_pair();
            let closes = close_when_waited_for(fill_up(100, 0));
            store.put_unwatched(NAME, ours.as_fd(), PATIENCE).unwrap();
            closes.join().unwrap();
        },
    );
    if said.is_some() {
        assert_eq!(manager.passed().len(), 1);
    }
}

#[test]
fn descriptors_of_another_process_that_stay_in_flight_end_the_waiting() {
    let manager = Manager::new(1);
    let said = alone(
        "limits::descriptors_of_another_process_that_stay_in_flight_end_the_waiting",
        &manager.address,
        |address| {
            let store = Store::at(Path::new(address));
            let (_clients, served) = pairs(3);
            let _stays = fill_up(400, 0);
            let error = leave(&store, NAME, b"", parcels(&served), PATIENCE).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::ETOOMANYREFS as i32));
        },
    );
    if said.is_some() {
        assert!(manager.passed().is_empty());
    }
}

#[test]
fn four_free_descriptors_are_enough() {
    let manager = Manager::new(1);
    let said = alone("limits::four_free_descriptors_are_enough", &manager.address, |address| {
        let store = Store::at(Path::new(address));
        let (_clients, served) = pairs(60);
        let state = |number| [state_of(number), vec![0; 100_000]].concat();
        let parcels = served.iter().enumerate().map(|(number, socket)| Parcel::new(socket.as_fd(), state(number)));
        allow_descriptors(300);
        let mut full: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
        full.truncate(full.len() - 4);
        // So many sockets as a small buffer makes necessary, and files beside them.
        let (queue, left) = fill(b"", parcels.take(60), 1).unwrap();
        assert_eq!((left.connections, left.stopped_by.is_none(), queue.pairs > 2), (60, true, true));
        keep(&store, NAME, queue, PATIENCE).unwrap();
    });
    if said.is_some() {
        let taken = connections(take_back(manager.passed(), NAME, &manager.store()));
        assert_eq!(taken.len(), 60);
        assert!(taken.iter().enumerate().all(|(number, parcel)| parcel.state.starts_with(&state_of(number))));
    }
}

/// A value of /proc/self/status, in KiB.
fn status(key: &str) -> usize {
    number_said(&fs::read_to_string("/proc/self/status").unwrap(), key)
}

/// By how many KiB the memory of this process has grown at the most meanwhile, and how long it took.
fn measured<R>(work: impl FnOnce() -> R) -> (R, usize, Duration) {
    // Resets VmHWM: proc_pid_clear_refs(5).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, start) = (status("VmRSS:"), Instant::now());
    let result = work();
    let took = start.elapsed();
    (result, status("VmHWM:").saturating_sub(before), took)
}

#[test]
fn ten_thousand_connections_take_less_than_two_mebibytes() {
    let said = alone("limits::ten_thousand_connections_take_less_than_two_mebibytes", "", |_| {
        let (_, most) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        allow_descriptors(most);
        let manager = Manager::new(1);
        for count in [250, 4_000, 10_000] {
            // The client has gone, and what it sent has come: so half as many descriptors are open.
            let served: Vec<_> = (0..count).map(|_| UnixStream::pair().unwrap().1).collect();
            let parcels = served.iter().map(|socket| Parcel::new(socket.as_fd(), vec![7; 64]));
            let (left, memory, took) = measured(|| leave(&manager.store(), NAME, b"", parcels, PATIENCE).unwrap());
            assert_eq!(left.connections, count);
            println!("\n{count} connections: left within {took:?} and {memory} KiB");
            assert!(memory < 2048);
            let (passed, numbers, mut taken) = (manager.passed(), numbers(&served), Vec::with_capacity(count));
            drop(served);
            let ((), memory, took) = measured(|| {
                for found in take_back(passed, NAME, &manager.store()) {
                    let Found::Connection(parcel) = found else { panic!("{found:?}") };
                    assert_eq!(parcel.state, [7; 64]);
                    taken.push(parcel.socket);
                }
            });
            println!("{count} connections: taken back within {took:?} and {memory} KiB");
            assert!(memory < 2048);
            assert_eq!(numbers, self::numbers(&taken));
        }
    });
    said.into_iter().for_each(|said| print!("{said}"));
}
