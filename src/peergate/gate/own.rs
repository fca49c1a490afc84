//! Listeners that we bound ourselves. Connections in the queue of another listener wait for the next process; with one of
//! ours its queue goes.

use super::{Admission, Gate};
use crate::permits::Terms;

impl<T: Terms> Gate<T> {
    /// Accepts what waits in the queues of our own listeners, up to 256 connections of each, before the gate stops accepting.
    pub(crate) fn accept_from_own(&mut self, admitted: &mut Vec<Admission<T>>) {
        self.more_may_come = true;
        for index in 0..self.listeners.len() {
            if self.listeners[index].is_ours() {
                self.accept_from(index, admitted);
            }
        }
    }
}
