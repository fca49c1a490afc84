//! The service manager's store: what is kept, refused, and left by a process that is killed.

use super::*;

#[test]
fn what_is_not_of_a_handover_is_closed_and_named() {
    let manager = Manager::new(9);
    let (mut clients, mut served) = pairs(3);
    leave(&manager.store(), NAME, b"", parcels(&served[..1]), PATIENCE).unwrap();
    // Of another name, and of another kind.
    manager.store().put_unwatched("other", served[1].as_fd(), PATIENCE).unwrap();
    manager.store().put_unwatched(NAME, served[2].as_fd(), PATIENCE).unwrap();
    served.clear();
    let inherited = take_back(manager.passed(), NAME, &manager.store());
    assert_eq!(inherited.foreign(), ["other", NAME]);
    assert_eq!(connections(inherited).len(), 1);
    assert!(manager.passed().is_empty());
    assert_ended(&mut clients);
}

#[test]
fn a_killed_successor_leaves_the_rest_to_the_next_one() {
    let (_clients, served) = pairs(2000);
    // With two sockets the second one's opening is still there; with one it has been read.
    for (send_buffer, header) in [(1, Some(&b"rest"[..])), (SEND_BUFFER, None)] {
        let (queue, _) = fill(b"rest", parcels(&served), send_buffer).unwrap();
        let (_, stored) = queue.finish();
        let first: Vec<_> = unpack(stored.try_clone().unwrap()).take(1).collect();
        assert_eq!(connections(first.into_iter()).len(), 1);
        let inherited = unpack(stored);
        assert_eq!(inherited.header(), header);
        let rest: Vec<_> = connections(inherited).iter().map(|parcel| number_of(&parcel.socket)).collect();
        assert!(rest.len() >= 1750);
        assert_eq!(rest, numbers(&served[2000 - rest.len()..]));
    }
}

#[test]
fn where_the_store_keeps_nothing_the_caller_has_its_connections() {
    let manager = Manager::new(0);
    let (mut clients, mut served) = pairs(300);
    let error = leave(&manager.store(), NAME, b"", parcels(&served), PATIENCE).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    served[0].write_all(b"still here").unwrap();
    clients[0].read_exact(&mut [0; 10]).unwrap();
    served.clear();
    assert_ended(&mut clients);
}

#[test]
fn a_manager_that_does_not_answer_keeps_no_connection() {
    let manager = Manager::new(1);
    {
        let mut held = manager.held.lock().unwrap();
        (held.barriers, held.keeps_all) = (Some(Vec::new()), true);
    }
    let (mut clients, mut served) = pairs(300);
    let error = leave(&manager.store(), NAME, b"", parcels(&served), Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    served.clear();
    manager.catch_up();
    assert!(manager.held.lock().unwrap().messages.iter().any(|text| text.contains("FDSTOREREMOVE=1")));
    // What it holds is the socket, and no connection is in it any more.
    assert_eq!(manager.held.lock().unwrap().store.len(), 1);
    assert_ended(&mut clients);
}

#[test]
fn without_a_manager_nothing_is_left() {
    let (mut clients, mut served) = pairs(2);
    let gone = Store::at(Path::new("@peergate-handover-none"));
    for store in [Store::from_env(), gone] {
        leave(&store, NAME, b"", parcels(&served), PATIENCE).unwrap_err();
    }
    assert_eq!(leave(&Store::from_env(), NAME, b"", [], PATIENCE).unwrap().connections, 0);
    served.clear();
    assert_ended(&mut clients);
}

/// A process that leaves 600 connections to `manager` and is killed when it has said so; its clients.
fn killed(test: &str, manager: &Manager, at: usize) -> Option<Vec<UnixStream>> {
    let listening = format!("{test}-{}", process::id());
    if let Ok(both) = env::var("HANDOVER_ALONE") {
        let (address, listening) = both.split_once(' ').unwrap();
        let listening = SocketAddr::from_abstract_name(listening).unwrap();
        let served: Vec<_> = (0..600).map(|_| UnixStream::connect_addr(&listening).unwrap()).collect();
        let parcels = parcels(&served).enumerate().map(|(number, parcel)| {
            if number == at {
                println!("\nREACHED");
                if at < 599 {
                    loop {
                        thread::park();
                    }
                }
            }
            parcel
        });
        let _ = leave(&Store::at(Path::new(address)), NAME, b"", parcels, PATIENCE);
        return None;
    }
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&listening).unwrap()).unwrap();
    let mut child = start_alone(test, &format!("{} {listening}", manager.address));
    let clients = (0..600).map(|_| listener.accept().unwrap().0).collect();
    let said = BufReader::new(child.stdout.take().unwrap());
    assert!(said.lines().map_while(Result::ok).any(|line| line.contains("REACHED")));
    while at == 599 && manager.held.lock().unwrap().barriers.as_ref().is_some_and(Vec::is_empty) {
        thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    Some(clients)
}

#[test]
fn killed_half_way_it_leaves_nothing() {
    let manager = Manager::new(1);
    let Some(mut clients) = killed("store::killed_half_way_it_leaves_nothing", &manager, 300) else { return };
    assert!(manager.passed().is_empty());
    assert_ended(&mut clients);
}

#[test]
fn killed_while_it_waits_for_the_manager_it_has_left_all() {
    let manager = Manager::new(1);
    manager.held.lock().unwrap().barriers = Some(Vec::new());
    let test = "store::killed_while_it_waits_for_the_manager_it_has_left_all";
    let Some(mut clients) = killed(test, &manager, 599) else { return };
    let taken = connections(take_back(manager.passed(), NAME, &manager.store()));
    assert_eq!(taken.len(), 600);
    drop(taken);
    assert_ended(&mut clients);
}
