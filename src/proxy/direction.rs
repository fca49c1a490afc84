//! One direction of a connection: bytes from one end to the other, in order, as many as the other end takes.
//!
//! A direction holds the rest of one read at most, and only while the other end does not take it. Nothing is read before it
//! has.

use std::io;

use peergate_daemon::buffers::Buffers;
use peergate_daemon::protocol::Received;
use serde::{Deserialize, Serialize};

/// What of a direction is under way.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Direction {
    /// Read, and not taken by the other end from `taken` on; empty most of the time.
    held: Vec<u8>,
    taken: usize,
    state: State,
    /// How many bytes were read, and were taken.
    read: u64,
    written: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    #[default]
    Open,
    /// The end of file was read. It is passed on when what came before it is.
    Ended,
    /// Nothing more goes this way.
    Over,
}

/// What a turn of a direction has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Nothing.
    Nothing,
    /// Something.
    Some,
    /// The end of file is due at the other end.
    End,
    /// The end that sends is gone. What it has sent is due at the other end, and the end of file after it.
    SenderGone,
    /// The end that receives takes nothing more.
    ReceiverGone,
    /// What was read is not passed on.
    Stopped(Received),
}

impl Direction {
    /// Whether the end that sends is to be read from.
    pub fn reads(&self) -> bool {
        self.state == State::Open && self.held.is_empty()
    }

    /// Whether the end that receives has yet to take something.
    pub fn writes(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether nothing more goes this way.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// How many bytes the end that sends has sent.
    pub fn read(&self) -> u64 {
        self.read
    }

    /// How many bytes the end that receives has taken.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What is held.
    pub fn pending(&self) -> &[u8] {
        self.held.get(self.taken..).unwrap_or_default()
    }

    /// Nothing more goes this way, not even what is held.
    pub fn stop(&mut self, buffers: &mut Buffers) {
        self.state = State::Over;
        self.taken = 0;
        buffers.give_back(std::mem::take(&mut self.held));
    }

    /// Gives back the memory.
    pub fn release(self, buffers: &mut Buffers) {
        buffers.give_back(self.held);
    }

    /// Writes what is held.
    pub fn flush(&mut self, buffers: &mut Buffers, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> Moved {
        let pending = self.held.get(self.taken..).unwrap_or_default();
        let all = pending.len();
        let Ok(count) = write(pending) else { return Moved::ReceiverGone };
        self.written += count as u64;
        match count {
            0 => Moved::Nothing,
            count if count < all => {
                self.taken += count;
                Moved::Some
            }
            _ => {
                self.taken = 0;
                buffers.give_back(std::mem::take(&mut self.held));
                self.end_if_due()
            }
        }
    }

    /// Reads once and writes that.
    pub fn pass(
        &mut self,
        buffers: &mut Buffers,
        mut read: impl FnMut(&mut [u8]) -> Received,
        mut write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> Moved {
        let count = match read(&mut buffers.input) {
            Received::Bytes(count) => count,
            Received::Nothing => return Moved::Nothing,
            Received::End => {
                self.state = State::Ended;
                return self.end_if_due();
            }
            Received::Broken => {
                self.state = State::Ended;
                return Moved::SenderGone;
            }
            other => return Moved::Stopped(other),
        };
        self.read += count as u64;
        let Ok(written) = write(&buffers.input[..count]) else { return Moved::ReceiverGone };
        self.written += written as u64;
        if written < count {
            let mut held = buffers.take(count - written, usize::MAX);
            held.extend_from_slice(&buffers.input[written..count]);
            self.held = held;
        }
        Moved::Some
    }

    fn end_if_due(&mut self) -> Moved {
        if self.state != State::Ended {
            return Moved::Some;
        }
        self.state = State::Over;
        Moved::End
    }
}
