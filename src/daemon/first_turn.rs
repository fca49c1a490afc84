//! A connection's first turn, on the gate's thread. Most peers have sent their line by the time they are admitted, and many
//! want no more than its answer: these come and go without a second thread having to wake up. While connections come close
//! together, one with nothing pending is parked here for a moment; then it is its worker's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use peergate::gate::Admission;

use crate::buffers::Buffers;
use crate::close::{Context, End};
use crate::connection::Connection;
use crate::mailbox::{Mailbox, Message};
use crate::moment::Moment;
use crate::pacing::Pacing;
use crate::protocol::{Interest, Protocol, Ready, Turn};
use crate::rounds::Share;
use crate::terms::Terms;

/// The most that is read from a connection here: a line or a few. The rest is the worker's.
const FIRST_READ: usize = 4096;
/// The most lines that are answered here: other users' connections wait behind this one.
const FIRST_LINES: usize = 1024;
/// How many connections may be parked at once.
const MOST_PARKED: usize = 16;
/// How long a silent connection is parked: a peer that wants no more than one answer has closed by then. Meanwhile no
/// timeout runs out here.
const LONGEST_PARKED: Duration = Duration::from_millis(5);

/// What stands between the gate and the workers.
pub struct FirstTurn<P: Protocol> {
    mailboxes: Vec<Arc<Mailbox<P>>>,
    buffers: Buffers,
    context: Context,
    /// In force for the next turn.
    pub settings: P::Settings,
    /// Connections with nothing pending, in the order in which they came.
    parked: VecDeque<Parked<P>>,
    /// Looks for what comes or closes next, as long as that pays.
    pacing: Pacing,
    last_came: Instant,
    longest_parked: Duration,
}

/// A connection that no worker knows of yet.
struct Parked<P: Protocol> {
    connection: Box<Connection<P>>,
    mailbox: Arc<Mailbox<P>>,
}

impl<P: Protocol> FirstTurn<P> {
    /// Before the workers of these `mailboxes`, of which there is at least one.
    pub fn new(mailboxes: Vec<Arc<Mailbox<P>>>, context: Context, settings: P::Settings) -> Self {
        let pacing = Pacing::new(context.busy_poll);
        let (buffers, parked) = (Buffers::new(FIRST_READ), VecDeque::new());
        let (last_came, longest_parked) = (Instant::now(), LONGEST_PARKED);
        Self { mailboxes, buffers, context, settings, parked, pacing, last_came, longest_parked }
    }

    /// Gives a connection its first turn. It will be the worker's with the fewest.
    pub fn admit(&mut self, admission: Admission<Terms<P::Terms>>) {
        let Some(mailbox) = self.mailboxes.iter().min_by_key(|one| one.connections.load(Ordering::Relaxed)) else {
            return;
        };
        mailbox.connections.fetch_add(1, Ordering::Relaxed);
        let mailbox = Arc::clone(mailbox);
        let connection = Box::new(Connection::admitted(admission));
        let now = Instant::now();
        self.pacing.came_after(now.saturating_duration_since(self.last_came), now);
        self.last_came = now;
        let Some((one, _)) = self.turn(Parked { connection, mailbox }) else { return };
        if !self.pacing.is_looking() || !one.awaits_input() {
            return self.give(one);
        }
        self.parked.push_back(one);
        if self.parked.len() > MOST_PARKED {
            if let Some((oldest, _)) = self.parked.pop_front().and_then(|oldest| self.turn(oldest)) {
                self.give(oldest);
            }
        }
    }

    /// Looks at every parked connection. Whether to look again at once instead of sleeping.
    pub fn goes_on_looking(&mut self) -> bool {
        self.look();
        if self.pacing.goes_on_looking() {
            // A peer that runs on this very processor waits for it. However long other threads keep it then, giving
            // everything to a worker costs more.
            thread::yield_now();
            return true;
        }
        self.give_all();
        false
    }

    /// Gives every connection to its worker.
    pub fn give_all(&mut self) {
        while let Some(one) = self.parked.pop_front() {
            self.give(one);
        }
    }

    /// Gives every connection to its worker, and lets go of the workers: no more are admitted.
    pub fn give_all_and_end(&mut self) {
        self.give_all();
        self.mailboxes.clear();
    }

    /// One turn. `None`: the connection is over, and closed.
    fn turn(&mut self, mut one: Parked<P>) -> Option<(Parked<P>, Turn)> {
        let mut share = Share::of(Ready::Any, FIRST_LINES);
        let turn = one.connection.turn(&mut share, &self.settings, &mut self.buffers, &self.context.audit);
        match End::of(turn) {
            None => Some((one, turn)),
            Some(end) => {
                self.context.close(one.connection, end, &self.settings, &mut self.buffers, &one.mailbox);
                None
            }
        }
    }

    fn give(&mut self, one: Parked<P>) {
        let Parked { mut connection, mailbox } = one;
        // Not for a connection that ends here: it sends one short answer.
        connection.bound_send_buffer(&self.settings);
        let slot = mailbox.take_slot();
        // Before the worker has the connection: from then on it may close it at any time.
        if mailbox.watch(&mut connection, slot).is_err() {
            // Out of memory or watches (fs.epoll.max_user_watches): this connection cannot be served.
            mailbox.free_slot(slot);
            return self.context.close(connection, End::Closed, &self.settings, &mut self.buffers, &mailbox);
        }
        // The worker may have been told already of something that it will not be told of again, and lacked the connection.
        let is_awaited = P::HAS_SECOND && (connection.protocol.due().is_some() || connection.watched().is_told_once());
        let message = Message::Admit { connection, slot };
        if is_awaited { mailbox.post(message) } else { mailbox.post_quietly(message) }
    }

    /// Looks once at every parked connection.
    fn look(&mut self) {
        for _ in 0..self.parked.len() {
            let Some(one) = self.parked.pop_front() else { return };
            let is_first = one.connection.protocol.counters().bytes == 0;
            let Some((mut one, turn)) = self.turn(one) else {
                self.pacing.found();
                continue;
            };
            let is_silent = turn == Turn::Idle;
            if !is_silent {
                self.pacing.found();
                one.connection.progress.active = Moment::now();
            }
            // The first message may come a little later than its sender. A peer that sends more is a worker's.
            let may_stay =
                if is_silent { one.connection.progress.since.elapsed() < self.longest_parked } else { is_first };
            if may_stay && one.awaits_input() {
                self.parked.push_back(one);
            } else {
                self.give(one);
            }
        }
    }
}

impl<P: Protocol> Parked<P> {
    /// Whether it needs nothing but to be looked at.
    fn awaits_input(&self) -> bool {
        let protocol = &self.connection.protocol;
        protocol.waits_for() == Interest::Read && protocol.is_at_rest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::{MOST_UNREAD, TOKEN_WAKE};
    use crate::testing::{LineSettings, LineTerms, Lines, admission, config, context, owner};

    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::epoll::{EpollEvent, EpollTimeout};

    use peergate::gate::Gate;
    use peergate::permits::{Limits, Permits};
    use peergate::policy::Policy;

    const LONG: Duration = Duration::from_secs(3600);
    const NOBODY: [u64; 0] = [];

    /// A first turn before a worker that is not there, so that all it is given stays in its mailbox.
    struct Scene {
        first_turn: FirstTurn<Lines>,
        mailbox: Arc<Mailbox<Lines>>,
        policy: Arc<Policy<Terms<LineTerms>>>,
        permits: Permits,
        came: u64,
        _gate: Gate<Terms<LineTerms>>,
    }

    impl Scene {
        fn new(busy_poll: Option<Duration>) -> Self {
            let policy = owner();
            let (mut context, gate) = context(&policy);
            context.busy_poll = busy_poll;
            let mailbox = Arc::new(Mailbox::new(&config(&policy)).unwrap());
            let mut first_turn = FirstTurn::new(vec![Arc::clone(&mailbox)], context, LineSettings::default());
            // However slow this machine is.
            first_turn.longest_parked = LONG;
            Self { first_turn, mailbox, policy, permits: Permits::new(), came: 0, _gate: gate }
        }

        /// A client comes that sends this before it is admitted.
        fn comes(&mut self, sends: &[u8]) -> UnixStream {
            let (mut admission, mut client) = admission(&self.policy, self.came);
            client.set_nonblocking(true).unwrap();
            client.write_all(sends).unwrap();
            admission.permit = self.permits.acquire(self.policy.me(), &Limits::default(), &()).unwrap();
            self.came += 1;
            self.first_turn.admit(admission);
            client
        }

        /// The numbers of the connections that the worker was given by now, in that order.
        fn given(&self) -> Vec<u64> {
            let number = |message| match message {
                Message::Admit { connection, .. } => connection.progress.number,
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
            hears(&mut client, b"hello\n");
            assert!(scene.first_turn.goes_on_looking());
            assert_eq!(scene.permits.total(), 1);
            drop(client);
            assert!(scene.first_turn.goes_on_looking());
            assert_eq!(scene.permits.total(), 0);
        }
        assert_eq!(scene.given(), NOBODY);
        assert_eq!(scene.mailbox.connections.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_that_comes_after_its_sender_is_echoed_here_and_the_next_by_a_worker() {
        let mut scene = Scene::new(Some(LONG));
        let mut client = scene.comes(b"");
        client.write_all(b"late\n").unwrap();
        assert!(scene.first_turn.goes_on_looking());
        hears(&mut client, b"late\n");
        assert_eq!(scene.given(), NOBODY);
        client.write_all(b"again\n").unwrap();
        scene.first_turn.goes_on_looking();
        hears(&mut client, b"again\n");
        assert_eq!(scene.given(), [0]);
    }

    #[test]
    fn who_has_begun_a_line_is_a_workers() {
        let mut scene = Scene::new(Some(LONG));
        let _begun = scene.comes(b"hal");
        assert_eq!(scene.given(), [0]);
    }

    #[test]
    fn when_looking_is_over_everybody_is_given_to_the_worker_in_the_order_in_which_they_came() {
        let mut scene = Scene::new(Some(LONG));
        let _clients: Vec<_> = (0..3).map(|_| scene.comes(b"\n")).collect();
        assert_eq!(scene.given(), NOBODY);
        scene.first_turn.give_all();
        assert_eq!(scene.given(), [0, 1, 2]);
        let _another = scene.comes(b"\n");
        // The one look that is left, however slow this machine is.
        scene.first_turn.pacing = Pacing::new(Some(Duration::ZERO));
        assert!(!scene.first_turn.goes_on_looking());
        assert_eq!(scene.given(), [3]);
    }

    #[test]
    fn however_many_others_come_nobody_stays_for_longer_than_a_moment() {
        let mut scene = Scene::new(Some(LONG));
        let mut talker = scene.comes(b"");
        let came = scene.first_turn.parked[0].connection.progress.active;
        talker.write_all(b"late\n").unwrap();
        scene.first_turn.goes_on_looking();
        assert!(scene.first_turn.parked[0].connection.progress.active > came, "what comes counts for the idle timeout");
        let _silent = scene.comes(b"\n");
        scene.first_turn.longest_parked = Duration::ZERO;
        assert!(scene.first_turn.goes_on_looking(), "the others are looked for all the same");
        assert_eq!(scene.given(), [0, 1]);
    }

    #[test]
    fn no_more_stay_than_a_few() {
        let mut scene = Scene::new(Some(LONG));
        let mut clients: Vec<_> = (0..MOST_PARKED).map(|_| scene.comes(b"\n")).collect();
        assert_eq!(scene.given(), NOBODY);
        clients.push(scene.comes(b"\n"));
        assert_eq!(scene.given(), [0]);
        // The second is gone: it makes room.
        drop(clients.remove(1));
        clients.push(scene.comes(b"\n"));
        assert_eq!(scene.given(), NOBODY);
        assert_eq!((scene.first_turn.parked.len(), scene.permits.total()), (MOST_PARKED, MOST_PARKED));
    }

    #[test]
    fn nobody_waits_for_somebody_silent() {
        let mut scene = Scene::new(Some(LONG));
        let _silent = scene.comes(b"");
        let mut late = scene.comes(b"");
        let gone = scene.comes(b"\n");
        late.write_all(b"late\n").unwrap();
        drop(gone);
        scene.first_turn.goes_on_looking();
        hears(&mut late, b"late\n");
        assert_eq!((scene.permits.total(), scene.given()), (2, vec![]));
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
            assert_eq!(scene.given(), [number]);
            assert!(!scene.first_turn.goes_on_looking());
        }
    }
}
