//! A daemon of one's own: answers each line with its length in bytes. It has all that echod has: a configuration file with a
//! policy, `check`, `explain`, `report`, reload, idle exit, limits, records, and restarts that lose no connection.
//!
//! ```console
//! $ cargo build --example length_daemon
//! $ target/debug/examples/length_daemon --listen /tmp/length.sock &
//! $ printf 'hello\nworld, again\n' | nc -N -U /tmp/length.sock
//! 5
//! 12
//! $ sudo nc -N -U /tmp/length.sock
//! Unauthorized access
//! $ target/debug/examples/length_daemon explain --user root | head -n 1
//! denied by default
//! ```

use std::process::ExitCode;

use peergate_daemon::protocol::{Counters, Interest, Io, Protocol, Received, Turn};
use serde::{Deserialize, Serialize};

/// One connection. A restart writes it down and reads it again.
#[derive(Serialize, Deserialize)]
struct Length {
    /// Of the line that has begun.
    length: usize,
    /// Answers that the peer has not taken yet.
    answers: Vec<u8>,
    counters: (u64, u64),
}

impl Protocol for Length {
    type Settings = ();
    type Terms = ();
    type Options = ();

    const NAME: &'static str = "length_daemon";
    const UNIT: &'static str = "length_daemon";
    const ABOUT: &'static str = "Answers each line with its length";

    fn start() -> Self {
        Self { length: 0, answers: Vec::new(), counters: (0, 0) }
    }

    fn turn(&mut self, io: &mut Io<'_, Self>) -> Turn {
        if self.answers.is_empty() {
            match io.peer.receive(&mut io.buffers.input) {
                Received::Bytes(count) => {
                    let input = &io.buffers.input[..count];
                    input.iter().filter_map(|byte| self.take(*byte)).for_each(|length| io.lines.record(length));
                }
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
        Counters { lines: Some(self.counters.0), bytes: self.counters.1, sent: None }
    }
}

impl Length {
    /// The length of the line that ends with this byte.
    fn take(&mut self, byte: u8) -> Option<usize> {
        self.counters.1 += 1;
        self.length += 1;
        (byte == b'\n').then(|| {
            let length = std::mem::take(&mut self.length);
            self.counters.0 += 1;
            self.answers.extend_from_slice(format!("{}\n", length - 1).as_bytes());
            length
        })
    }
}

fn main() -> ExitCode {
    peergate_daemon::main::<Length>()
}
