//! A gate whose listeners a runtime watches.
//!
//! A runtime waits in an epoll of its own. With the gate's epoll in it, each connection would be announced twice, and cost the
//! system calls of both. So the listeners are taken out of the gate's epoll, and the runtime watches them itself, edge-triggered
//! as it watches everything. It tells of a change once. [`Ready`] keeps what it told of until the gate has dealt with it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{Admission, Gate};
use crate::permits::Terms;

/// What there may be something to do with. At first that is everything.
#[derive(Debug)]
pub(crate) struct Ready {
    /// The gate's epoll: connections that are being closed, and what other threads ask for.
    pub(crate) epoll: bool,
    pub(crate) listeners: Box<[bool]>,
}

impl<T: Terms> Gate<T> {
    /// From now on the caller watches the listeners, of which it gets copies, and the epoll ([`AsFd`]), and takes turns by
    /// [`turn_with`](Self::turn_with).
    pub(crate) fn watch_outside(&mut self) -> io::Result<(Vec<OwnedFd>, Ready)> {
        let listeners = self.listeners.iter().map(|listener| listener.as_fd().try_clone_to_owned());
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        for listener in &self.listeners {
            self.epoll.delete(listener)?;
        }
        self.is_watched_outside = true;
        let ready = Ready { epoll: true, listeners: vec![true; listeners.len()].into() };
        Ok((listeners, ready))
    }

    /// Does what is due and what `ready` tells of, without waiting. When the next turn is due in any case.
    pub(crate) fn turn_with(&mut self, ready: &mut Ready, admitted: &mut Vec<Admission<T>>) -> Option<Instant> {
        if ready.epoll {
            ready.epoll = self.take_events(Some(Duration::ZERO), admitted);
        }
        for index in 0..self.listeners.len() {
            if ready.listeners[index] && self.may_accept() {
                ready.listeners[index] = !self.accept_from(index, admitted);
            }
        }
        self.do_what_is_due(admitted);
        let is_left = ready.epoll || (self.may_accept() && ready.listeners.contains(&true));
        if is_left { Some(Instant::now()) } else { self.deadline() }
    }

    fn may_accept(&self) -> bool {
        self.accepting && self.paused_until.is_none()
    }
}
