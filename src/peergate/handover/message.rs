//! The messages of a handover: bytes only, no descriptors and no I/O.
//!
//! ```text
//! magic "handover"                     8 bytes
//! version                              u32
//! checksum of what follows             u64
//! kind                                 u8
//! 0, opening:      descriptors u8 (1 where there is a socket before this one); the service's own bytes
//! 1, connections:  count u32; for each: descriptors u16, length of its state u32; then the states
//! 2, elsewhere:    nothing; the first descriptor is a sealed file that holds the message, of kind 1
//! ```
//!
//! All numbers are little-endian. A state belongs to a connection by its place. The checksum tells every change of a single
//! byte.

use std::fmt;

const MAGIC: &[u8] = b"handover";
const VERSION: u32 = 1;
/// Of all that comes before the kind.
const HEAD: usize = MAGIC.len() + 4 + 8;

const OPENING: u8 = 0;
const CONNECTIONS: u8 = 1;
const ELSEWHERE: u8 = 2;

/// Why a message cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It was not written by this library.
    Foreign,
    /// It is of a version that this program does not know.
    Version(u32),
    /// It is cut off or corrupted.
    Torn,
    /// The numbers of descriptors do not agree.
    Descriptors {
        /// How many the message says there are.
        said: usize,
        /// How many came.
        came: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("the message is of another program"),
            Self::Version(version) => {
                write!(f, "the message is of version {version}, this program knows version {VERSION}")
            }
            Self::Torn => f.write_str("the message is cut off or corrupted"),
            Self::Descriptors { said, came } => write!(f, "{came} descriptors came with a message of {said}"),
        }
    }
}

impl std::error::Error for Fault {}

/// What a message says of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) fds: usize,
    pub(super) state: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<'m> {
    Opening { fds: usize, header: &'m [u8] },
    Connections { shapes: Vec<Shape>, states: &'m [u8] },
    Elsewhere,
}

pub(super) fn opening(header: &[u8], follows_another: bool) -> Vec<u8> {
    seal(OPENING, &[&[u8::from(follows_another)], header])
}

pub(super) fn elsewhere() -> Vec<u8> {
    seal(ELSEWHERE, &[])
}

/// `None` where a number has no room.
pub(super) fn connections(shapes: &[Shape], states: &[u8]) -> Option<Vec<u8>> {
    let mut table = Vec::with_capacity(4 + shapes.len() * 6);
    table.extend(u32::try_from(shapes.len()).ok()?.to_le_bytes());
    for shape in shapes {
        table.extend(u16::try_from(shape.fds).ok()?.to_le_bytes());
        table.extend(u32::try_from(shape.state).ok()?.to_le_bytes());
    }
    Some(seal(CONNECTIONS, &[&table, states]))
}

fn seal(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length = HEAD + 1 + parts.iter().map(|part| part.len()).sum::<usize>();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.push(kind);
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    let sum = checksum(&bytes[HEAD..]);
    bytes[HEAD - 8..HEAD].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub(super) fn read(bytes: &[u8]) -> Result<Message<'_>, Fault> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(Fault::Foreign)?;
    let (version, rest) = rest.split_first_chunk().ok_or(Fault::Torn)?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    let (sum, rest) = rest.split_first_chunk().ok_or(Fault::Torn)?;
    if u64::from_le_bytes(*sum) != checksum(rest) {
        return Err(Fault::Torn);
    }
    match rest.split_first() {
        Some((&OPENING, [fds, header @ ..])) => Ok(Message::Opening { fds: usize::from(*fds), header }),
        Some((&CONNECTIONS, rest)) => read_connections(rest).ok_or(Fault::Torn),
        Some((&ELSEWHERE, [])) => Ok(Message::Elsewhere),
        _ => Err(Fault::Torn),
    }
}

fn read_connections(rest: &[u8]) -> Option<Message<'_>> {
    let (count, rest) = rest.split_first_chunk()?;
    let table = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (table, states) = rest.split_at_checked(table)?;
    let shapes: Vec<_> = table.chunks_exact(6).map(shape).collect::<Option<_>>()?;
    let length = shapes.iter().try_fold(0_usize, |length, shape| length.checked_add(shape.state))?;
    (length == states.len()).then_some(Message::Connections { shapes, states })
}

fn shape(entry: &[u8]) -> Option<Shape> {
    let (fds, state) = entry.split_first_chunk()?;
    let (fds, state) = (u16::from_le_bytes(*fds), u32::from_le_bytes(*state.first_chunk()?));
    Some(Shape { fds: fds.into(), state: usize::try_from(state).ok()? }).filter(|shape| shape.fds > 0)
}

/// As FNV-1a, but by eight bytes at a time: megabytes of states would take as long as all the rest of a restart. Each step can
/// be undone, so that a change of one number changes the sum.
fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, number: u64| (sum ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    let chunks = bytes.chunks_exact(8);
    let rest = chunks.remainder().iter().copied().map(u64::from).fold(bytes.len() as u64, step);
    let numbers = chunks.map(|chunk| chunk.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)));
    numbers.fold(rest, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<u8> {
        let shapes = [Shape { fds: 1, state: 3 }, Shape { fds: 2, state: 0 }, Shape { fds: 1, state: 2 }];
        connections(&shapes, b"abcde").unwrap()
    }

    #[test]
    fn a_message_says_what_was_put_into_it() {
        let bytes = some();
        let Ok(Message::Connections { shapes, states }) = read(&bytes) else { panic!("not read") };
        assert_eq!((shapes.len(), shapes[1], states), (3, Shape { fds: 2, state: 0 }, &b"abcde"[..]));
        assert_eq!(read(&opening(b"mine", false)), Ok(Message::Opening { fds: 0, header: b"mine" }));
        assert_eq!(read(&opening(b"", true)), Ok(Message::Opening { fds: 1, header: b"" }));
        assert_eq!(read(&elsewhere()), Ok(Message::Elsewhere));
    }

    #[test]
    fn no_bit_of_a_message_can_change_unseen() {
        for whole in [some(), opening(b"mine", true), elsewhere()] {
            for at in 0..whole.len() {
                for bit in 0..8 {
                    let mut bytes = whole.clone();
                    bytes[at] ^= 1 << bit;
                    let fault = read(&bytes).unwrap_err();
                    match at {
                        0..8 => assert_eq!(fault, Fault::Foreign),
                        8..12 => assert!(matches!(fault, Fault::Version(_)), "{fault}"),
                        _ => assert_eq!(fault, Fault::Torn),
                    }
                }
            }
        }
    }

    #[test]
    fn a_message_cut_off_anywhere_or_too_long_is_torn() {
        for length in 0..some().len() {
            let fault = read(&some()[..length]).unwrap_err();
            assert_eq!(fault, if length < 8 { Fault::Foreign } else { Fault::Torn }, "{length}");
        }
        assert_eq!(read(&[some(), vec![0]].concat()), Err(Fault::Torn));
    }

    #[test]
    fn counts_that_do_not_add_up_are_torn_under_a_right_checksum() {
        let shapes = [Shape { fds: 1, state: 3 }];
        for states in [&b"ab"[..], b"abcd"] {
            assert_eq!(read(&connections(&shapes, states).unwrap()), Err(Fault::Torn));
        }
        for count in [2_u32, u32::MAX] {
            assert_eq!(read(&seal(CONNECTIONS, &[&count.to_le_bytes(), &[0; 6]])), Err(Fault::Torn));
        }
        assert_eq!(read(&connections(&[Shape { fds: 0, state: 0 }], &[]).unwrap()), Err(Fault::Torn));
        assert_eq!(read(&seal(ELSEWHERE, &[b"x"])), Err(Fault::Torn));
        assert_eq!(read(&seal(3, &[])), Err(Fault::Torn));
    }
}
