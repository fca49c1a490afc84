//! Accepting: takes connections out of the kernel's queue as fast as they come and lets each wait for its user's turn.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit};

use super::arrivals::{Excess, MOST_WAITING};
use super::{ADMISSIONS_PER_TURN, Admission, Arrival, Gate, over_limit, reserve};
use crate::audit::Severity;
use crate::fd_passing::{Stream, refuses_from_all};
use crate::peer::Peer;
use crate::permits::{LimitExceeded, Terms};
use crate::sys;
use crate::systemd::activation::Listener;

/// Connections accepted from one listener before anything else gets a turn.
const ACCEPTS_PER_TURN: usize = 256;
/// Connections judged before more are accepted.
const JUDGED_PER_TURN: usize = 16;
/// No listener's queue holds more: the kernel bounds it by net.core.somaxconn, 4,096 by default.
const LONGEST_BACKLOG: u32 = 1 << 20;
/// How long no connection is accepted after the system was out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(10);

/// On which connections of a listener the kernel refuses descriptors.
pub(super) enum Refusal {
    /// Each is asked.
    Unknown,
    /// On each that is made from now on. Among so many more in the queue there may be an earlier one.
    OfLater(u32),
    /// On each.
    OfAll,
}

impl Refusal {
    pub(super) fn of(listener: &Listener) -> Self {
        if refuses_from_all(listener) { Self::OfLater(LONGEST_BACKLOG) } else { Self::Unknown }
    }

    /// Whether the next connection need not be asked.
    fn of_next(&mut self) -> bool {
        match self {
            Self::Unknown => false,
            Self::OfLater(left) => {
                *left -= 1;
                if *left == 0 {
                    *self = Self::OfAll;
                }
                false
            }
            Self::OfAll => true,
        }
    }

    /// The listener's queue is empty: no earlier connection is left.
    fn note_empty(&mut self) {
        if matches!(self, Self::OfLater(_)) {
            *self = Self::OfAll;
        }
    }
}

/// How many connections may wait for their turn: an eighth of the descriptors at most, so that enough are left for
/// connections that are served.
pub(super) fn most_waiting() -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    usize::try_from(soft / 8).unwrap_or(usize::MAX).min(MOST_WAITING)
}

impl<T: Terms> Gate<T> {
    /// Accepts what waits in the kernel's queue, up to a number, and lets it wait for its turn. Whether the queue was found
    /// empty.
    pub(super) fn accept_from(&mut self, index: usize, admitted: &mut Vec<Admission<T>>) -> bool {
        // A connection that comes alone costs no second accept(2) in vain. A runtime tells of each change once: there the
        // queue has to be looked at until it is empty, but poll(2) costs less.
        let more_may_come = std::mem::replace(&mut self.more_may_come, true);
        let most = if more_may_come || self.is_watched_outside { ACCEPTS_PER_TURN } else { 1 };
        let reserve = Arc::clone(&self.reserve);
        for taken in 0..most {
            if admitted.len() >= ADMISSIONS_PER_TURN || !self.accepting {
                return false;
            }
            let Some(listener) = self.listeners.get(index) else { return true };
            if taken == 1 && self.is_watched_outside && !is_readable(listener.as_fd()) {
                self.note_empty(index);
                return true;
            }
            // While another thread judges with the reserved descriptors, an accepted connection would take one of them.
            let Some(mut reserve) = reserve.try_hold() else {
                self.pause();
                return false;
            };
            let error = match sys::accept(listener.as_fd()) {
                Ok(socket) => {
                    drop(reserve);
                    let arrival = self.arrival(socket, index);
                    if self.let_wait(arrival, admitted) {
                        continue;
                    }
                    return false;
                }
                Err(error) => error,
            };
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => {
                    self.note_empty(index);
                    return true;
                }
                // The client has gone already, or a signal came: the next one.
                Some(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO) => {}
                // Many of the connections that wait end when they are judged, and give a descriptor back.
                Some(Errno::EMFILE | Errno::ENFILE) if !self.arrivals.is_empty() => return false,
                Some(Errno::EMFILE | Errno::ENFILE) => {
                    if !self.accept_with_reserve(index, &mut reserve) {
                        self.pause();
                        return false;
                    }
                }
                // Out of memory for a socket, or something new: neither spin nor give up.
                _ => {
                    let text = format!("accepting from {}: {error}", listener.address());
                    self.record_once(Severity::Warning, &text);
                    self.pause();
                    return false;
                }
            }
        }
        false
    }

    /// The listener's queue is empty.
    fn note_empty(&mut self, index: usize) {
        self.more_may_come = !self.arrivals.is_empty();
        if let Some(refusal) = self.refusal.get_mut(index) {
            refusal.note_empty();
        }
    }

    /// Lets a connection wait for its user's turn. False where a bound is reached: then each user gets its turn before the
    /// next connection is accepted.
    fn let_wait(&mut self, mut arrival: Arrival, admitted: &mut Vec<Admission<T>>) -> bool {
        let Ok(peer) = Peer::ids_of(&arrival.socket) else {
            self.judge_arrival(arrival, None, admitted);
            return true;
        };
        let user = self.config.policy.owner_of(peer.uid());
        arrival.peer = Some(peer);
        let per_user = self.config.limits.waiting_per_user as usize;
        match self.arrivals.push(user, arrival, per_user) {
            None => return true,
            Some(Excess::OfUser(mut latest)) => {
                let decision = self.decide(&mut latest, Some(&self.judge()));
                self.turn_away(latest, decision.without_place(LimitExceeded::User));
            }
            Some(Excess::OfAll(oldest)) => {
                // It does not wait for a place too.
                let since = Instant::now();
                self.judge_arrival(oldest, Some((since, since + over_limit::PATIENCE)), admitted);
            }
        }
        false
    }

    /// Judges connections that wait, one of each user in turn, up to a number. Says whether there were any.
    pub(super) fn judge_in_turn(&mut self, admitted: &mut Vec<Admission<T>>) -> bool {
        let mut some = false;
        for _ in 0..JUDGED_PER_TURN {
            if admitted.len() >= ADMISSIONS_PER_TURN {
                break;
            }
            let Some(arrival) = self.arrivals.next() else { break };
            self.judge_arrival(arrival, None, admitted);
            some = true;
        }
        some
    }

    /// Out of descriptors: connections that are being closed go first. When there are none, the reserve makes room for one
    /// connection, which is judged, recorded and told, but cannot stay.
    fn accept_with_reserve(&mut self, index: usize, reserve: &mut reserve::Held<'_>) -> bool {
        if self.closings.finish_oldest(&self.epoll) {
            return true;
        }
        let text = "out of file descriptors: connections are refused (LimitNOFILE=, fs.file-max)";
        self.record_once(Severity::Warning, text);
        if !reserve.free() {
            return false;
        }
        let accepted = self.listeners.get(index).map(|listener| sys::accept(listener.as_fd()));
        let is_told = match accepted {
            Some(Ok(socket)) => {
                let mut arrival = self.arrival(socket, index);
                let decision = self.decide(&mut arrival, None);
                self.turn_away_at_once(arrival, decision.without_place(LimitExceeded::Total));
                true
            }
            _ => false,
        };
        let refilled = if self.accepting { reserve.refill() } else { Ok(()) };
        is_told && refilled.is_ok()
    }

    fn pause(&mut self) {
        self.paused_until = Some(Instant::now() + PAUSE);
        self.set_interest(EpollFlags::empty());
    }

    pub(super) fn resume_accepting(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            if let (true, Some(mut reserve)) = (self.accepting, self.reserve.try_hold()) {
                // If this fails, the next pause tries again.
                let _ = reserve.refill();
            }
            if self.accepting {
                self.set_interest(EpollFlags::EPOLLIN);
            }
        }
    }

    pub(super) fn set_interest(&self, interest: EpollFlags) {
        for (token, listener) in self.listeners.iter().enumerate() {
            let _ = self.epoll.modify(listener, &mut EpollEvent::new(interest, token as u64));
        }
    }

    pub(super) fn arrival(&mut self, socket: OwnedFd, listener: usize) -> Arrival {
        let number = self.next_connection;
        self.next_connection += 1;
        let is_refusing = self.refusal.get_mut(listener).is_some_and(Refusal::of_next);
        let mut socket = match (self.take_descriptors, is_refusing) {
            (true, _) => Stream::taking_descriptors(socket, self.pass_credentials),
            (false, true) => Stream::refusing(socket, self.pass_credentials),
            (false, false) => Stream::new(socket, self.pass_credentials),
        };
        // From Linux 6.16 on the option is inherited at connect, not at accept: a connection made before the listener had it
        // has yet to get it. What waits for accept carries credentials in any case; what comes between accept and this
        // does not. So it comes before the peer is judged, and before it waits for a place, which can take a while.
        let unattested = self.pass_credentials.then(|| socket.attach_credentials(true));
        Arrival { socket, peer: None, listener, number, unattested }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
