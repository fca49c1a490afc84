//! A thread around a [`Gate`], for a simple service: one function takes what is admitted.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::os::unix::net::UnixStream;
//! use peergate::{Admission, Audit, Door, Policy, Rule, Setup, Uid, User, activation};
//!
//! let path = std::env::temp_dir().join(format!("door-{}.sock", std::process::id()));
//! let listener = activation::bind(&path)?;
//! let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
//! let setup = Setup::new(vec![listener], policy, Audit::default())?;
//! let mut door = Door::open(setup, |admission: Admission<()>| {
//!     let _ = writeln!(&admission.socket, "Come in, user {}", admission.peer.uid());
//! })?;
//!
//! let mut answer = String::new();
//! UnixStream::connect(&path)?.read_to_string(&mut answer)?;
//! assert_eq!(answer, format!("Come in, user {}\n", Uid::effective()));
//!
//! // No rule allows the next connection.
//! door.set_policy(Policy::new([], Uid::effective())?);
//! answer.clear();
//! UnixStream::connect(&path)?.read_to_string(&mut answer)?;
//! assert_eq!(answer, "Unauthorized access\n");
//! drop(door.shut());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use super::{Admission, Closer, Driver, Gate, GateConfig, GateThread, Setup};
use crate::audit::Severity;
use crate::permits::Terms;
use crate::policy::Policy;
use crate::systemd::Monitored;
use crate::systemd::activation::Listener;

/// A running gate, for any thread. Dropped, it is [shut](Self::shut).
///
/// Its methods wait until the gate's thread has done what they say. Called on that thread itself, by the function that
/// takes admissions, they return at once with nothing to tell, and it is done when that function has returned.
pub struct Door<T>(GateThread<Serving<T>>);

impl<T: Terms> Door<T> {
    /// Starts the gate's thread. There `serve` takes each admitted connection; it must not block, because no connection is
    /// accepted meanwhile. Where it panics, that is recorded, the connection it was given is closed, and the gate goes on.
    ///
    /// # Errors
    /// What epoll(7), eventfd(2) or starting a thread say.
    pub fn open(setup: Setup<T>, serve: impl FnMut(Admission<T>) + Send + 'static) -> io::Result<Self> {
        let serving = Serving { gate: Gate::new(setup)?, serve: Box::new(serve), admitted: Vec::new() };
        GateThread::start(serving).map(Self)
    }

    /// Puts a configuration in force, from the very next connection on. Returns its generation: an [`Admission`] of an
    /// earlier one was judged by an earlier policy. When this returns, `serve` has returned from the last of those.
    pub fn set_config(&self, config: GateConfig<T>) -> u64 {
        self.0.ask(move |serving| serving.gate.set_config(config)).unwrap_or_default()
    }

    /// As [`set_config`](Self::set_config), but only the policy changes.
    pub fn set_policy(&self, policy: impl Into<Arc<Policy<T>>>) -> u64 {
        let policy = policy.into();
        self.0.ask(move |serving| serving.gate.set_policy(policy)).unwrap_or_default()
    }

    /// Closes connections in order for other threads.
    pub fn closer(&self) -> Closer {
        self.0.closer()
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        self.0.monitored()
    }

    /// Shuts the gate if no connection is admitted, waits for a place or is being closed. A client that connects later
    /// stays in the listener's queue for the next process.
    pub fn shut_if_quiet(&mut self) -> bool {
        self.0.shut_if_quiet()
    }

    /// Accepts no connection from now on: a client that connects stays in the listener's queue for the next process.
    /// Closing goes on until [`shut`](Self::shut).
    pub fn stop_accepting(&self) {
        self.0.stop_accepting();
    }

    /// Stops accepting, closes in order what is being closed (two seconds at most), and hands the listeners back; none, where
    /// it was shut before. Admitted connections live on.
    pub fn shut(&mut self) -> Vec<Listener> {
        self.0.shut()
    }
}

impl<T> fmt::Debug for Door<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

/// What the gate's thread drives.
struct Serving<T> {
    gate: Gate<T>,
    serve: Box<dyn FnMut(Admission<T>) + Send>,
    admitted: Vec<Admission<T>>,
}

impl<T: Terms> Driver for Serving<T> {
    type Terms = T;

    fn gate(&mut self) -> &mut Gate<T> {
        &mut self.gate
    }

    fn turn(&mut self) {
        self.gate.turn(None, &mut self.admitted);
        self.deliver();
    }

    fn stop_accepting(&mut self) {
        // A connection that came before the command is not left in the queue: of our own listeners it goes with them.
        self.gate.turn(Some(Duration::ZERO), &mut self.admitted);
        self.deliver();
        self.gate.stop_accepting(&mut self.admitted);
        self.deliver();
    }

    fn into_gate(self) -> Gate<T> {
        self.gate
    }
}

impl<T: Terms> Serving<T> {
    fn deliver(&mut self) {
        for admission in self.admitted.drain(..) {
            // A panic must not end the gate: clients that connect later would wait in the listener's queue for ever.
            let Err(fault) = panic::catch_unwind(AssertUnwindSafe(|| (self.serve)(admission))) else { continue };
            let said = fault.downcast_ref::<&str>().copied().or(fault.downcast_ref::<String>().map(String::as_str));
            let text = format!("the application panicked: {}", said.unwrap_or("no message"));
            self.gate.record_once(Severity::Error, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::audit::{Audit, Event, Next};
    use crate::policy::Rule;
    use crate::{Limits, Uid, activation};

    fn owner() -> Policy<()> {
        Policy::owner_only(Uid::effective())
    }

    fn path_of(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("door-test-{name}-{}.sock", std::process::id()))
    }

    fn setup(name: &str) -> Setup<()> {
        Setup::new(vec![activation::bind(path_of(name)).unwrap()], owner(), Audit::default()).unwrap()
    }

    #[test]
    fn a_configuration_is_set_once_the_last_older_admission_is_handed_over() {
        let (arrived, arrivals) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let mut door = Door::open(setup("set"), move |admission| {
            let _ = arrived.send(admission.generation);
            let _ = may_go_on.recv();
        })
        .unwrap();
        let _client = UnixStream::connect(path_of("set")).unwrap();
        assert_eq!(arrivals.recv(), Ok(0));
        thread::scope(|scope| {
            let (done, is_done) = mpsc::channel();
            let door = &door;
            scope.spawn(move || done.send(door.set_config(GateConfig::new(owner()))));
            // However slow this machine is, it is not over before the other is.
            assert!(is_done.recv_timeout(Duration::from_millis(50)).is_err());
            go_on.send(()).unwrap();
            assert_eq!(is_done.recv(), Ok(1));
        });
        let _client = UnixStream::connect(path_of("set")).unwrap();
        assert_eq!(arrivals.recv(), Ok(1));
        drop(go_on);
        door.shut();
    }

    /// A door with one connection, which is in the hands of `serve`.
    fn door_with_one(name: &str, mut serve: impl FnMut() + Send + 'static) -> (Door<()>, UnixStream) {
        let (arrived, arrival) = mpsc::channel();
        let door = Door::open(setup(name), move |_| {
            let _ = arrived.send(());
            serve();
        });
        let client = UnixStream::connect(path_of(name)).unwrap();
        arrival.recv().unwrap();
        (door.unwrap(), client)
    }

    /// The calls that wait for the gate's thread.
    const ASK: [fn(&mut Door<()>); 3] = [
        |door| _ = door.set_config(GateConfig::new(owner())),
        |door| door.stop_accepting(),
        |door| assert!(door.shut_if_quiet(), "no connection is left"),
    ];

    #[test]
    fn a_call_is_answered_although_the_application_panics() {
        for (number, ask) in ASK.into_iter().enumerate() {
            for is_asked_before in [true, false] {
                let (panic, may_panic) = mpsc::channel::<()>();
                let (mut door, mut client) = door_with_one(&format!("panic-{number}-{is_asked_before}"), move || {
                    let _ = may_panic.recv();
                    panic!("the application's fault");
                });
                let (answered, answer) = mpsc::channel();
                let asking = move || {
                    ask(&mut door);
                    answered.send(())
                };
                if is_asked_before {
                    thread::spawn(asking);
                    assert!(answer.recv_timeout(Duration::from_millis(20)).is_err());
                    drop(panic);
                } else {
                    drop(panic);
                    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the connection goes with the panic");
                    thread::spawn(asking);
                }
                assert_eq!(answer.recv_timeout(Duration::from_secs(60)), Ok(()), "{number}, {is_asked_before}");
            }
        }
    }

    #[test]
    fn a_call_is_answered_by_a_door_that_is_shut() {
        for ask in ASK {
            let (mut door, _client) = door_with_one("asked-late", || ());
            assert_eq!(door.shut().len(), 1);
            ask(&mut door);
            assert_eq!(door.shut().len(), 0);
        }
    }

    #[test]
    fn each_of_several_callers_waits_until_it_is_done() {
        let ask: [fn(&Door<()>); 2] =
            [|door| assert!(door.set_config(GateConfig::new(owner())) > 0), |door| door.stop_accepting()];
        for (number, ask) in ask.into_iter().enumerate() {
            let (go_on, may_go_on) = mpsc::channel::<()>();
            let (mut door, _client) = door_with_one(&format!("several-{number}"), move || {
                let _ = may_go_on.recv();
            });
            let (answered, answers) = mpsc::channel();
            thread::scope(|scope| {
                for _ in 0..3 {
                    let (answered, door) = (answered.clone(), &door);
                    scope.spawn(move || {
                        ask(door);
                        answered.send(())
                    });
                }
                // However slow this machine is, it is not so before.
                assert!(answers.recv_timeout(Duration::from_millis(50)).is_err());
                drop(go_on);
                (0..3).for_each(|_| answers.recv_timeout(Duration::from_secs(60)).unwrap());
            });
            door.shut();
        }
    }

    #[test]
    fn a_panic_is_on_record_and_the_next_connection_is_admitted() {
        let setup = setup("goes-on");
        let audit = setup.audit.clone();
        let mut door = Door::open(setup, |mut admission| {
            assert!(admission.connection > 2, "connection {} is one too many", admission.connection);
            admission.socket.write_all(b"welcome").unwrap();
        })
        .unwrap();
        for expected in ["", "", "welcome", "welcome"] {
            let mut answer = String::new();
            let mut client = UnixStream::connect(path_of("goes-on")).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, expected);
        }
        door.shut();
        for number in [1, 2] {
            let Next::Write(record) = audit.next() else { panic!("no record of connection {number}") };
            assert_eq!(record.event, Event::Note(Severity::Error));
            let text = format!("the application panicked: connection {number} is one too many");
            assert_eq!(record.message(None, None), text);
        }
    }

    #[test]
    fn a_dropped_door_is_shut_also_on_its_own_thread() {
        let open = |mut serve: Box<dyn FnMut() + Send>| Door::open(setup("dropped"), move |_| serve()).unwrap();
        drop(open(Box::new(|| ())));
        assert!(!path_of("dropped").exists(), "the listener went with the door");

        let (give, given) = mpsc::channel::<Door<()>>();
        give.send(open(Box::new(move || drop(given.recv())))).unwrap();
        let mut client = UnixStream::connect(path_of("dropped")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        while path_of("dropped").exists() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_call_on_the_doors_own_thread_does_not_wait_for_itself() {
        let (give, given) = mpsc::channel::<Door<()>>();
        let (called, calls) = mpsc::channel();
        let door = Door::open(setup("own-thread"), move |_| {
            let Ok(mut door) = given.recv() else { return };
            assert_eq!(door.set_config(GateConfig::new(owner())), 0);
            door.stop_accepting();
            assert!(!door.shut_if_quiet());
            assert!(door.shut().is_empty());
            called.send(()).unwrap();
        })
        .unwrap();
        give.send(door).unwrap();
        let _client = UnixStream::connect(path_of("own-thread")).unwrap();
        calls.recv_timeout(Duration::from_secs(60)).unwrap();
        while path_of("own-thread").exists() {
            thread::yield_now();
        }
    }

    #[test]
    fn another_policy_leaves_the_rest_of_the_configuration() {
        let mut setup = setup("policy");
        setup.config.limits = Limits::new(7, 0);
        setup.config.pass_credentials = true;
        let door = Door::open(setup, |_| ()).unwrap();
        let all = Policy::new([Rule::allow("all", ()).users([crate::User::Any])], Uid::effective()).unwrap();
        assert_eq!(door.set_policy(all), 1);
        let mut answer = String::new();
        UnixStream::connect(path_of("policy")).unwrap().read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "Too many connections\n", "the limits are still in force");
    }

    #[test]
    fn a_connection_given_to_a_closer_after_the_end_is_closed_in_order() {
        let mut door = Door::open(setup("late"), |_| {}).unwrap();
        assert!(door.shut_if_quiet());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        theirs.write_all(b"unread").unwrap();
        let closer = door.closer();
        let closing = thread::spawn(move || closer.close_denied(OwnedFd::from(ours)));
        let mut answer = String::new();
        theirs.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "Unauthorized access\n");
        drop(theirs);
        closing.join().unwrap();
    }

    /// With the listener, which is ours, the connections in its queue would go.
    #[test]
    fn a_connection_that_waits_in_our_own_listener_is_served_before_the_door_is_shut() {
        let (served, is_served) = mpsc::channel();
        let (give, given) = mpsc::channel::<Door<()>>();
        let (give_back, given_back) = mpsc::channel();
        let door = Door::open(setup("rest"), move |admission| {
            let _ = served.send(admission.connection);
            // Asked for before the gate's thread looks for the next connection.
            if let Ok(door) = given.recv() {
                door.stop_accepting();
                let _ = give_back.send(door);
            }
        })
        .unwrap();
        let _first = UnixStream::connect(path_of("rest")).unwrap();
        assert_eq!(is_served.recv(), Ok(1));
        let _others = [(); 5].map(|()| UnixStream::connect(path_of("rest")).unwrap());
        give.send(door).unwrap();
        drop(give);
        assert_eq!(given_back.recv().unwrap().shut().len(), 1);
        assert_eq!(is_served.iter().collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
    }
}
