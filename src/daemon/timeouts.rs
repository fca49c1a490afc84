//! When connections end because nothing moves on them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::moment::Moment;

/// Entries of closed connections that are not worth sorting out, however few connections there are.
pub const LEFT_OVER: usize = 64;

/// The earliest moment at which each connection's timeout could run out: one entry for each connection that has one, and some
/// of connections that are closed. What moves on a connection changes no entry: it is looked at when the entry is due.
#[derive(Debug, Default)]
pub struct Timeouts(BinaryHeap<Reverse<(Moment, usize, u64)>>);

impl Timeouts {
    /// Notes that connection `number` in place `slot` may time out then.
    pub fn push(&mut self, due: Moment, slot: usize, number: u64) {
        self.0.push(Reverse((due, slot, number)));
    }

    /// When the first entry is due.
    pub fn due(&self) -> Option<Moment> {
        self.0.peek().map(|Reverse((due, ..))| *due)
    }

    /// The first entry that is due by `now`: place and number.
    pub fn take_due(&mut self, now: Moment) -> Option<(usize, u64)> {
        self.due().filter(|due| *due <= now)?;
        self.0.pop().map(|Reverse((_, slot, number))| (slot, number))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Sorts the entries of closed connections out once there are more of them than of the `present` ones. They would stay
    /// until they are due, which may be days.
    pub fn sort_out(&mut self, present: usize, is_present: impl Fn(usize, u64) -> bool) {
        if self.len() > 2 * present + LEFT_OVER {
            self.0.retain(|Reverse((_, slot, number))| is_present(*slot, *number));
        }
    }

    /// How many entries this connection has.
    #[cfg(test)]
    pub fn entries_of(&self, number: u64) -> usize {
        self.0.iter().filter(|Reverse((.., of))| *of == number).count()
    }
}
