//! A daemon of one's own: answers each line with its length in bytes. It has all that echod has: a configuration file with a
//! policy, `check`, `explain`, `report`, reload, idle exit, limits, records, and restarts that lose no connection.
//!
//! ```console
//! $ cargo run --example length_daemon -- --listen /tmp/length.sock &
//! $ printf 'hello\n' | nc -N -U /tmp/length.sock
//! 5
//! ```

use std::process::ExitCode;

use peergate_daemon::protocol::{Counters, Interest, Io, Protocol, Received, Turn};
use serde::{Deserialize, Serialize};

/// One connection. A restart writes it down and reads it again.
#[derive(Default, Serialize, Deserialize)]
struct Length {
    /// Of the line that has begun.
    length: usize,
    /// Answers that the peer has not taken yet.
    answers: Vec<u8>,
    lines: u64,
    bytes: u64,
}

impl Protocol for Length {
    type Settings = ();
    type Terms = ();
    type Options = ();
    const NAME: &'static str = "length_daemon";
    const UNIT: &'static str = "length_daemon";
    const ABOUT: &'static str = "Answers each line with its length";

    fn start() -> Self {
        Self::default()
    }

    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn {
        if self.answers.is_empty() {
            match io.peer.receive(&mut io.buffers.input) {
                Received::Bytes(count) => io.buffers.input[..count].iter().for_each(|byte| {
                    (self.bytes, self.length) = (self.bytes + 1, self.length + 1);
                    if *byte == b'\n' {
                        io.lines.record(self.length);
                        self.answers.extend(format!("{}\n", self.length - 1).bytes());
                        (self.lines, self.length) = (self.lines + 1, 0);
                    }
                }),
                Received::Nothing => return Turn::Idle,
                Received::End | Received::Broken => return Turn::Closed,
                Received::SenderMismatch(sender) => return Turn::SenderMismatch(sender),
                Received::Descriptors => return Turn::DescriptorsReceived,
            }
        }
        let Ok(sent) = io.peer.send(&self.answers) else { return Turn::Closed };
        self.answers.drain(..sent);
        Turn::Progress
    }

    fn waits_for(&self) -> Interest {
        if self.answers.is_empty() { Interest::Read } else { Interest::Write }
    }

    fn is_at_rest(&self) -> bool {
        self.answers.is_empty() && self.length == 0
    }

    fn owed(&self) -> Vec<u8> {
        self.answers.clone()
    }

    fn counters(&self) -> Counters {
        Counters { lines: Some(self.lines), bytes: self.bytes, sent: None }
    }
}

fn main() -> ExitCode {
    peergate_daemon::main::<Length>()
}
