//! The messages in which one process has left its connections to the next, for a test to change. Their format is at the
//! head of src/peergate/handover/message.rs.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

use super::{receive, send_along};

/// Magic, version, checksum; then the kind.
const HEAD: usize = 20;
/// Of a message with connections: where the table of their states begins, and how long an entry is.
const TABLE: usize = HEAD + 5;
const ENTRY: usize = 6;

/// The first message is the opening, each other one has connections.
pub struct Message {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Of another program.
    pub fn foreign(fds: Vec<OwnedFd>) -> Self {
        Self { bytes: b"hello".to_vec(), fds }
    }

    /// Takes the last descriptor from the only connection.
    pub fn lose_descriptor(&mut self) {
        self.bytes[TABLE] -= 1;
        self.fds.pop();
        self.seal();
    }

    fn seal(&mut self) {
        let sum = checksum(&self.bytes[HEAD..]);
        self.bytes[HEAD - 8..HEAD].copy_from_slice(&sum.to_le_bytes());
    }

    /// Changes the state of each connection. It begins with two versions and with whether the connection is at rest (1).
    pub fn change_states(&mut self, mut change: impl FnMut(&mut Vec<u8>)) {
        let count = u32::from_le_bytes(self.bytes[TABLE - 4..TABLE].try_into().unwrap()) as usize;
        let mut rest = self.bytes.split_off(TABLE + count * ENTRY);
        for number in 0..count {
            let length = TABLE + number * ENTRY + 2;
            let length = &mut self.bytes[length..length + 4];
            let mut state: Vec<u8> = rest.drain(..u32::from_le_bytes((*length).try_into().unwrap()) as usize).collect();
            change(&mut state);
            length.copy_from_slice(&(state.len() as u32).to_le_bytes());
            self.bytes.extend(state);
        }
        self.seal();
    }
}

/// First the bytes behind the last whole eight, then the numbers of eight bytes each.
fn checksum(bytes: &[u8]) -> u64 {
    let (whole, rest) = bytes.split_at(bytes.len() / 8 * 8);
    let numbers = whole.chunks(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()));
    rest.iter()
        .map(|byte| u64::from(*byte))
        .chain(numbers)
        .fold(bytes.len() as u64, |sum, number| (sum ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(29))
}

/// Changes what was left: the stored socket is replaced by one with the changed messages.
pub fn change_left(stored: &mut [(String, OwnedFd)], change: impl FnOnce(&mut Vec<Message>)) {
    let (_, socket) =
        stored.iter_mut().find(|(name, _)| ["echod", "peergate"].contains(&&**name)).expect("connections were left");
    let (mut messages, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    while let Some((count, fds)) = receive(socket, &mut buffer).unwrap() {
        messages.push(Message { bytes: buffer[..count].to_vec(), fds });
    }
    change(&mut messages);
    *socket = left(&messages);
}

/// A socket that holds these messages.
pub fn left(messages: &[Message]) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (writer, reader) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    setsockopt(&writer, sockopt::SndBuf, &(4 << 20)).unwrap();
    for Message { bytes, fds } in messages {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        send_along(&writer, bytes, &fds).unwrap();
    }
    reader
}
