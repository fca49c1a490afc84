//! From the gate to a worker, on the gate's thread. Whoever comes gets a first turn here, and while many come, one after
//! the other, stays for a moment: most have sent their line by the time they are admitted, and many want no more than its
//! echo. These have come and gone without a second thread having to wake up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use peergate::audit::Audit;
use peergate::gate::Admission;

use crate::config::Terms;
use crate::connection::{Buffers, Connection, Outcome, State};
use crate::exit::Exit;
use crate::mailbox::{Mailbox, Message};
use crate::pacing::Pacing;

/// The most that is read from a connection here: a line or a few. The rest is the worker's.
const FIRST_READ: usize = 4096;
/// How many may stay for a moment at once.
const MOST_STAYING: usize = 16;
/// And how long that moment is for one who is silent: whoever wants no more than one echo is gone by then. Meanwhile no
/// timeout runs out for anybody here.
const LONGEST_STAY: Duration = Duration::from_millis(5);

/// What stands between the gate and the workers.
pub struct Threshold {
    mailboxes: Vec<Arc<Mailbox>>,
    buffers: Buffers,
    audit: Audit,
    exit: Exit,
    /// Who has nothing pending, in the order in which they came.
    staying: VecDeque<Staying>,
    /// Looks for whoever comes or goes next, as long as that pays.
    pacing: Pacing,
    last_came: Instant,
    longest_stay: Duration,
}

/// A connection that no worker knows of yet.
struct Staying {
    connection: Box<Connection>,
    mailbox: Arc<Mailbox>,
    /// Of the ruling that admitted it.
    generation: u64,
}

impl Threshold {
    /// Before the workers of these `mailboxes`, of which there is at least one.
    pub fn new(mailboxes: Vec<Arc<Mailbox>>, audit: Audit, exit: Exit, pacing: Pacing) -> Self {
        let (buffers, staying) = (Buffers::new(FIRST_READ), VecDeque::new());
        let (last_came, longest_stay) = (Instant::now(), LONGEST_STAY);
        Self { mailboxes, buffers, audit, exit, staying, pacing, last_came, longest_stay }
    }

    /// One turn. `None`: it is over, and seen to.
    fn turn(&mut self, mut one: Staying) -> Option<Staying> {
        let line_length = one.mailbox.line_length();
        let limit = one.connection.line_length(line_length);
        match one.connection.read(limit, &mut self.buffers, &self.audit) {
            Outcome::Goes => Some(one),
            over => {
                self.exit.part(one.connection, over, line_length, &mut self.buffers, &one.mailbox);
                None
            }
        }
    }

    fn hand_over(&mut self, one: Staying) {
        let Staying { connection, mailbox, generation } = one;
        let slot = mailbox.take_slot();
        // Before the worker has the connection: from then on it may close it at any time.
        if mailbox.watch(&connection, slot).is_err() {
            // Out of memory or watches (fs.epoll.max_user_watches): this one cannot be served.
            mailbox.free_slot(slot);
            let line_length = mailbox.line_length();
            return self.exit.part(connection, Outcome::Over(None), line_length, &mut self.buffers, &mailbox);
        }
        mailbox.post_quietly(Message::Admit { connection, slot, generation });
    }

    /// Looks once at everybody who has stayed.
    fn look(&mut self) {
        for _ in 0..self.staying.len() {
            let Some(one) = self.staying.pop_front() else { return };
            let before = one.connection.bytes;
            let Some(mut one) = self.turn(one) else {
                self.pacing.found();
                continue;
            };
            let is_silent = one.connection.bytes == before;
            if !is_silent {
                self.pacing.found();
                one.connection.active = Instant::now();
            }
            // The first line may come a little later than its sender; whoever sends more, or waits, has come to talk.
            let may_stay = if is_silent { one.connection.since.elapsed() < self.longest_stay } else { before == 0 };
            if may_stay && is_at_rest(&one.connection) {
                self.staying.push_back(one);
            } else {
                self.hand_over(one);
            }
        }
    }
}

/// Whether it needs nothing but to be looked at.
fn is_at_rest(connection: &Connection) -> bool {
    connection.state == State::Reading && connection.held.is_empty()
}

impl Threshold {
    /// Gives a connection its first turn. It will be the worker's with the fewest.
    pub fn admit(&mut self, admission: Admission<Terms>) {
        let Some(mailbox) = self.mailboxes.iter().min_by_key(|one| one.connections.load(Ordering::Relaxed)) else {
            return;
        };
        mailbox.connections.fetch_add(1, Ordering::Relaxed);
        let (mailbox, generation) = (Arc::clone(mailbox), admission.generation);
        let connection = Box::new(Connection::admitted(admission));
        let now = connection.since;
        self.pacing.came_after(now.saturating_duration_since(self.last_came), now);
        self.last_came = now;
        let Some(one) = self.turn(Staying { connection, mailbox, generation }) else { return };
        if !self.pacing.is_looking() || !is_at_rest(&one.connection) {
            return self.hand_over(one);
        }
        self.staying.push_back(one);
        if self.staying.len() > MOST_STAYING {
            if let Some(oldest) = self.staying.pop_front().and_then(|oldest| self.turn(oldest)) {
                self.hand_over(oldest);
            }
        }
    }

    /// Looks at every connection that stays. Whether to look again at once instead of sleeping.
    pub fn linger(&mut self) -> bool {
        self.look();
        if self.pacing.goes_on_looking() {
            // Where the peer runs on this very processor, it is waiting for us to let it. However long others keep it then:
            // to hand everybody over to a worker costs more.
            thread::yield_now();
            return true;
        }
        self.settle();
        false
    }

    /// Hands every connection over to its worker.
    pub fn settle(&mut self) {
        while let Some(one) = self.staying.pop_front() {
            self.hand_over(one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Ruling;
    use crate::mailbox::{MOST_UNREAD, TOKEN_WAKE};
    use crate::worker::tests::{admission, surroundings};

    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::epoll::{EpollEvent, EpollTimeout};

    use peergate::gate::Gate;
    use peergate::ids::Uid;
    use peergate::permits::{Limits, Permits};
    use peergate::policy::Policy;

    const LONG: Duration = Duration::from_secs(3600);
    const NOBODY: [u64; 0] = [];

    /// A threshold before a worker that is not there, so that all it is given stays in its mailbox.
    struct Scene {
        threshold: Threshold,
        mailbox: Arc<Mailbox>,
        policy: Arc<Policy<Terms>>,
        limits: Permits,
        came: u64,
        _gate: Gate<Terms>,
    }

    impl Scene {
        fn new(busy_poll: Option<Duration>) -> Self {
            let policy = Arc::new(Policy::<Terms>::owner_only(Uid::effective()));
            let (around, gate) = surroundings(&policy);
            let ruling = Ruling { policy: Arc::clone(&policy), line_length: 100, idle_timeout: None, verify: false };
            let mailbox = Arc::new(Mailbox::new(&ruling).unwrap());
            let exit = around.exit();
            let mut threshold = Threshold::new(vec![Arc::clone(&mailbox)], around.audit, exit, Pacing::new(busy_poll));
            // However slow this machine is.
            threshold.longest_stay = LONG;
            Self { threshold, mailbox, policy, limits: Permits::new(), came: 0, _gate: gate }
        }

        /// Somebody comes, who sends this before being let in.
        fn comes(&mut self, sends: &[u8]) -> UnixStream {
            let (mut admission, mut client) = admission(&self.policy, self.came);
            client.set_nonblocking(true).unwrap();
            client.write_all(sends).unwrap();
            admission.permit = self.limits.acquire(self.policy.me(), &Limits::default(), &()).unwrap();
            admission.generation = self.came;
            self.came += 1;
            self.threshold.admit(admission);
            client
        }

        /// The numbers of those whom the worker was given by now, in that order.
        fn handed_over(&self) -> Vec<u64> {
            let number = |message| match message {
                Message::Admit { connection, generation, .. } => {
                    assert_eq!(connection.number, generation, "judged by the ruling that it came with");
                    connection.number
                }
                _ => unreachable!("nobody gives orders here"),
            };
            self.mailbox.open().into_iter().map(number).collect()
        }
    }

    fn hears(client: &mut UnixStream, expected: &[u8]) {
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, expected);
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn who_wants_no_more_than_an_echo_is_gone_without_a_worker() {
        let mut scene = Scene::new(Some(LONG));
        for _ in 0..100 {
            let mut client = scene.comes(b"hello\n");
            hears(&mut client, b"> hello\n");
            assert!(scene.threshold.linger());
            assert_eq!(scene.limits.total(), 1);
            drop(client);
            assert!(scene.threshold.linger());
            assert_eq!(scene.limits.total(), 0);
        }
        assert_eq!(scene.handed_over(), NOBODY);
        assert_eq!(scene.mailbox.connections.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_that_comes_after_its_sender_is_echoed_here_and_the_next_by_a_worker() {
        let mut scene = Scene::new(Some(LONG));
        let mut client = scene.comes(b"");
        client.write_all(b"late\n").unwrap();
        assert!(scene.threshold.linger());
        hears(&mut client, b"> late\n");
        assert_eq!(scene.handed_over(), NOBODY);
        client.write_all(b"again\n").unwrap();
        scene.threshold.linger();
        hears(&mut client, b"> again\n");
        assert_eq!(scene.handed_over(), [0]);
    }

    #[test]
    fn who_has_begun_a_line_is_a_workers() {
        let mut scene = Scene::new(Some(LONG));
        let _begun = scene.comes(b"hal");
        assert_eq!(scene.handed_over(), [0]);
    }

    #[test]
    fn when_looking_is_over_everybody_is_handed_over_in_the_order_in_which_they_came() {
        let mut scene = Scene::new(Some(LONG));
        let _clients: Vec<_> = (0..3).map(|_| scene.comes(b"\n")).collect();
        assert_eq!(scene.handed_over(), NOBODY);
        scene.threshold.settle();
        assert_eq!(scene.handed_over(), [0, 1, 2]);
        let _another = scene.comes(b"\n");
        // The one look that is left, however slow this machine is.
        scene.threshold.pacing = Pacing::new(Some(Duration::ZERO));
        assert!(!scene.threshold.linger());
        assert_eq!(scene.handed_over(), [3]);
    }

    #[test]
    fn however_many_others_come_nobody_stays_for_longer_than_a_moment() {
        let mut scene = Scene::new(Some(LONG));
        let mut talker = scene.comes(b"");
        let came = scene.threshold.staying[0].connection.active;
        talker.write_all(b"late\n").unwrap();
        scene.threshold.linger();
        assert!(scene.threshold.staying[0].connection.active > came, "what comes counts for the idle timeout");
        let _silent = scene.comes(b"\n");
        scene.threshold.longest_stay = Duration::ZERO;
        assert!(scene.threshold.linger(), "the others are looked for all the same");
        assert_eq!(scene.handed_over(), [0, 1]);
    }

    #[test]
    fn no_more_stay_than_a_few() {
        let mut scene = Scene::new(Some(LONG));
        let mut clients: Vec<_> = (0..MOST_STAYING).map(|_| scene.comes(b"\n")).collect();
        assert_eq!(scene.handed_over(), NOBODY);
        clients.push(scene.comes(b"\n"));
        assert_eq!(scene.handed_over(), [0]);
        // The second is gone: it makes room.
        drop(clients.remove(1));
        clients.push(scene.comes(b"\n"));
        assert_eq!(scene.handed_over(), NOBODY);
        assert_eq!((scene.threshold.staying.len(), scene.limits.total()), (MOST_STAYING, MOST_STAYING));
    }

    #[test]
    fn nobody_waits_for_somebody_silent() {
        let mut scene = Scene::new(Some(LONG));
        let _silent = scene.comes(b"");
        let mut late = scene.comes(b"");
        let gone = scene.comes(b"\n");
        late.write_all(b"late\n").unwrap();
        drop(gone);
        scene.threshold.linger();
        hears(&mut late, b"> late\n");
        assert_eq!((scene.limits.total(), scene.handed_over()), (2, vec![]));
    }

    #[test]
    fn a_worker_is_woken_before_those_who_are_silent_become_many() {
        let mut scene = Scene::new(None);
        assert!(scene.mailbox.sleeps(true));
        let mut events = [EpollEvent::empty(); 4];
        let mut is_woken = |scene: &Scene| {
            let count = scene.mailbox.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
            events[..count].iter().any(|event| event.data() == TOKEN_WAKE)
        };
        let _silent: Vec<_> = (1..MOST_UNREAD).map(|_| scene.comes(b"")).collect();
        assert!(!is_woken(&scene));
        let _one_more = scene.comes(b"");
        assert!(is_woken(&scene));
    }

    #[test]
    fn without_looking_nobody_stays() {
        let mut scene = Scene::new(None);
        for number in 0..3 {
            let _client = scene.comes(b"\n");
            assert_eq!(scene.handed_over(), [number]);
            assert!(!scene.threshold.linger());
        }
    }
}
