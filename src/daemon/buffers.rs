//! Memory that all connections of a thread use in turn, so that an idle connection owns none and the steady state allocates
//! nothing.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;

use peergate::pipe::{Pipe, Spliced};

/// Buffers kept for the next connection that needs one: so many big ones, so many small ones.
const SPARE: usize = 4;
const SPARE_SMALL: usize = 16;
/// What fits into a small buffer. A peer that leaves a message unfinished keeps a buffer for as long as it likes: it must not
/// be one that grew for another connection's long messages.
pub const SMALL: usize = 4 * 1024;
/// The capacity above which a buffer is not kept.
const LARGEST_SPARE: usize = 128 * 1024;

/// What all connections of a thread use in turn.
#[derive(Debug)]
pub struct Buffers {
    /// What one turn reads.
    pub input: Box<[u8]>,
    /// What one turn writes.
    pub output: Vec<u8>,
    spare: Vec<Vec<u8>>,
    spare_small: Vec<Vec<u8>>,
    pipe: Option<Pipe>,
}

/// Makes room for `more` bytes in a buffer of messages that are `limit` bytes long at most. Capacities are powers of two:
/// buffers of any size, taken and given back in any order, would leave gaps that nothing else fits into.
pub fn grow(buffer: &mut Vec<u8>, more: usize, limit: usize) {
    let needed = buffer.len() + more;
    if needed > buffer.capacity() {
        let most = needed.max(limit.saturating_mul(2));
        buffer.reserve_exact(needed.next_power_of_two().min(most) - buffer.len());
    }
}

impl Buffers {
    /// For reads of up to `read` bytes.
    pub fn new(read: usize) -> Self {
        Self { input: vec![0; read].into(), output: Vec::new(), spare: Vec::new(), spare_small: Vec::new(), pipe: None }
    }

    /// As if `input` was read into and then written, but without copying. Only what is not taken is in `input` afterwards.
    ///
    /// # Errors
    /// What splice(2) says where it reads, or pipe2(2); UnexpectedEof where bytes were read and are lost.
    pub fn splice(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<Spliced> {
        let mut pipe = self.pipe.take().map_or_else(Pipe::new, Ok)?;
        let outcome = pipe.pass(from, to, &mut self.input);
        // Never with bytes in it, which the next connection would get.
        let is_empty = !outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::UnexpectedEof);
        self.pipe = is_empty.then_some(pipe);
        outcome
    }

    /// An empty buffer for `length` bytes, of a connection whose messages are `limit` bytes long at most.
    pub fn take(&mut self, length: usize, limit: usize) -> Vec<u8> {
        let spare = if length <= SMALL { self.spare_small.pop() } else { self.take_big(limit) };
        let mut buffer = spare.unwrap_or_default();
        grow(&mut buffer, length, limit);
        buffer
    }

    /// Not one that grew for longer messages: what is held for a connection follows from its own limit.
    fn take_big(&mut self, limit: usize) -> Option<Vec<u8>> {
        let fits = self.spare.iter().rposition(|buffer| buffer.capacity() / 2 <= limit)?;
        Some(self.spare.swap_remove(fits))
    }

    /// Prepares `held` for `more` bytes: takes a spare big buffer, where there is one, instead of making a small one grow.
    pub fn make_room(&mut self, held: &mut Vec<u8>, more: usize, limit: usize) {
        if held.capacity() <= SMALL && held.len() + more > SMALL {
            if let Some(mut big) = self.take_big(limit) {
                grow(&mut big, held.len(), limit);
                big.extend_from_slice(held);
                self.give_back(std::mem::replace(held, big));
            }
        }
    }

    /// Keeps a buffer for the next connection that needs one, unless it has grown too big to keep.
    pub fn give_back(&mut self, mut buffer: Vec<u8>) {
        let (spare, most) = match buffer.capacity() {
            0 => return,
            1..=SMALL => (&mut self.spare_small, SPARE_SMALL),
            _ => (&mut self.spare, SPARE),
        };
        if buffer.capacity() <= LARGEST_SPARE && spare.len() < most {
            buffer.clear();
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_grew_for_long_messages_is_not_for_short_ones() {
        let mut buffers = Buffers::new(65_536);
        for capacity in [131_072, 9000] {
            buffers.give_back(Vec::with_capacity(capacity));
        }
        let mut held = vec![b'x'; SMALL];
        buffers.make_room(&mut held, 1, 5000);
        assert_eq!((held.len(), held.capacity()), (SMALL, 9000));
        assert_eq!(buffers.take(SMALL + 1, 5000).capacity(), 2 * SMALL, "the other one is too big");
        assert_eq!(buffers.take(SMALL + 1, 65_536).capacity(), 131_072);
    }

    #[test]
    fn a_buffer_grows_to_powers_of_two_and_at_most_twice_the_longest_message() {
        for (more, limit, capacity) in [(5000, 65_536, 8192), (9000, 5000, 10_000), (9000, usize::MAX, 16_384)] {
            let mut held = vec![b'x'; 10];
            grow(&mut held, more - 10, limit);
            assert_eq!(held.capacity(), capacity);
            grow(&mut held, more - 10, limit);
            assert_eq!((held.len(), held.capacity()), (10, capacity), "there is room already");
        }
    }
}
