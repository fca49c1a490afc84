//! One direction of a connection: bytes from one end to the other, in order, as many as the other end takes.
//!
//! A direction holds the rest of one read at most, and only while the other end does not take it. Nothing is read before it
//! has.
//!
//! Where reads are long, the bytes are not copied (splice(2)). That costs more for short ones, so that the length of a read
//! decides for the next.

use std::io::{self, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use peergate::fd_passing::Descriptors;
use peergate::pipe::Spliced;
use peergate_daemon::buffers::Buffers;
use peergate_daemon::moment::Moment;
use peergate_daemon::protocol::{MOST_FURTHER, Received};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most descriptors that come with one message: those of both directions go to the next process with the connection to the
/// service.
pub const MOST_DESCRIPTORS: usize = (MOST_FURTHER - 1) / 2;
/// A read of so many bytes is long.
const LONG: usize = 16 * 1024;
/// The pause before descriptors are sent again that could not be taken, because too many are in flight.
const PAUSE: Duration = Duration::from_millis(50);

/// What of a direction is under way.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Direction {
    /// Read, and not taken by the other end from `taken` on; empty most of the time.
    held: Vec<u8>,
    taken: usize,
    state: State,
    /// What came with the first byte of `held`, and has not gone yet.
    descriptors: InTransit,
    /// How many bytes were read, and were taken.
    read: u64,
    written: u64,
    /// Whether the last read was long.
    #[serde(skip)]
    is_long: bool,
    /// When what is held is written again, where no event tells when it can be.
    #[serde(skip)]
    retry: Option<Moment>,
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

/// Descriptors that are on their way. Written down is how many: they go to the next process beside that.
#[derive(Debug, Default)]
struct InTransit {
    here: Descriptors,
    left: u8,
}

impl Serialize for InTransit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(u8::try_from(self.here.len()).unwrap_or(u8::MAX))
    }
}

impl<'de> Deserialize<'de> for InTransit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { here: Descriptors::default(), left: u8::deserialize(deserializer)? })
    }
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

    /// Whether an event tells when that end takes something.
    pub fn awaits_room(&self) -> bool {
        self.writes() && self.retry.is_none()
    }

    /// When it is to be tried again, where no event does.
    pub fn retry(&self) -> Option<Moment> {
        self.retry
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
        (self.taken, self.retry) = (0, None);
        self.descriptors.here.clear();
        buffers.give_back(std::mem::take(&mut self.held));
    }

    /// Descriptors that are on their way.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors.here
    }

    /// Takes them out.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors.here).into()
    }

    /// Takes as many as were on their way in the process that left this.
    pub fn put_descriptors(&mut self, from: &mut impl Iterator<Item = OwnedFd>) {
        let fds: Vec<_> = from.take(usize::from(self.descriptors.left)).collect();
        self.descriptors = InTransit { here: fds.into(), left: 0 };
    }

    /// Gives back the memory.
    pub fn release(self, buffers: &mut Buffers) {
        buffers.give_back(self.held);
    }

    /// Writes what is held.
    pub fn flush(
        &mut self,
        buffers: &mut Buffers,
        mut write: impl FnMut(&[u8], &Descriptors) -> io::Result<usize>,
    ) -> Moved {
        if self.retry.is_some_and(|retry| Moment::now() < retry) {
            return Moved::Nothing;
        }
        let pending = self.held.get(self.taken..).unwrap_or_default();
        let all = pending.len();
        let written = write(pending, &self.descriptors.here);
        let Some(count) = self.taken_of(written) else { return Moved::ReceiverGone };
        self.written += count as u64;
        if count > 0 {
            self.descriptors.here.clear();
        }
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
        mut read: impl FnMut(&mut [u8], &mut Descriptors) -> Received,
        mut write: impl FnMut(&[u8], &Descriptors) -> io::Result<usize>,
    ) -> Moved {
        let count = match read(&mut buffers.input, &mut self.descriptors.here) {
            Received::Bytes(_) if self.descriptors.here.len() > MOST_DESCRIPTORS => {
                self.descriptors.here.clear();
                return Moved::Stopped(Received::Descriptors);
            }
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
        let written = write(&buffers.input[..count], &self.descriptors.here);
        let written = self.taken_of(written);
        self.note_passed(count, written, buffers)
    }

    /// How many bytes a write has taken. `None`: no more can be written.
    ///
    /// The kernel bounds how many descriptors of a user may be in flight (RLIMIT_NOFILE, unix(7)), and all that the proxy passes
    /// on are its user's: what lies unread on one connection is in the way of the others. So that is no fault of this end. No
    /// event tells when there is room again.
    fn taken_of(&mut self, written: io::Result<usize>) -> Option<usize> {
        let too_many = Some(Errno::ETOOMANYREFS as i32);
        let is_in_the_way = written.as_ref().is_err_and(|error| error.raw_os_error() == too_many);
        self.retry = if is_in_the_way { Moment::now().checked_add(PAUSE) } else { None };
        if is_in_the_way { Some(0) } else { written.ok() }
    }

    /// Reads once and writes that without copying it. `None`: the last read was not long, or this cannot be done.
    pub fn splice(&mut self, buffers: &mut Buffers, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Option<Moved> {
        if !self.is_long {
            return None;
        }
        match buffers.splice(from, to) {
            Ok(Spliced { read: 0, .. }) => {
                self.state = State::Ended;
                Some(self.end_if_due())
            }
            Ok(Spliced { read, written }) => Some(self.note_passed(read, written.ok(), buffers)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(Moved::Nothing),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof) => {
                self.state = State::Ended;
                Some(Moved::SenderGone)
            }
            Err(_) => None,
        }
    }

    /// So many bytes were read into the buffer, and so many of these written; `None`: no more can be.
    fn note_passed(&mut self, count: usize, written: Option<usize>, buffers: &mut Buffers) -> Moved {
        self.read += count as u64;
        self.is_long = count >= LONG;
        let Some(written) = written else { return Moved::ReceiverGone };
        self.written += written as u64;
        if written > 0 {
            self.descriptors.here.clear();
        }
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_held_goes_to_the_next_process_from_where_it_was_taken_on() {
        let sent = b"thirty bytes that were read on";
        let (mut buffers, mut direction) = (Buffers::new(64), Direction::default());
        let read = |room: &mut [u8], _: &mut Descriptors| {
            room[..sent.len()].copy_from_slice(sent);
            Received::Bytes(sent.len())
        };
        assert_eq!(direction.pass(&mut buffers, read, |_, _| Ok(10)), Moved::Some);
        assert_eq!(direction.flush(&mut buffers, |_, _| Ok(5)), Moved::Some);
        let bytes = postcard::to_allocvec(&direction).unwrap();
        let mut next: Direction = postcard::from_bytes(&bytes).unwrap();
        next.put_descriptors(&mut std::iter::empty());
        assert_eq!((next.pending(), next.read(), next.written()), (&sent[15..], 30, 15));
        assert!(next.writes() && !next.reads());
        let mut rest = Vec::new();
        let all = |bytes: &[u8], _: &Descriptors| {
            rest.extend_from_slice(bytes);
            Ok(bytes.len())
        };
        assert_eq!(next.flush(&mut buffers, all), Moved::Some);
        assert!(rest == sent[15..] && next.reads());
    }

    #[test]
    fn descriptors_go_with_the_first_bytes_that_are_taken_and_only_once() {
        let (mut buffers, mut direction) = (Buffers::new(64), Direction::default());
        let read = |room: &mut [u8], descriptors: &mut Descriptors| {
            room[..30].fill(b'x');
            let (one, other) = UnixStream::pair().unwrap();
            *descriptors = vec![one.into(), other.into()].into();
            Received::Bytes(30)
        };
        // How many come with each write, and how many bytes of it are taken.
        let came = RefCell::new(Vec::new());
        let take = |count: usize| {
            let came = &came;
            move |_: &[u8], descriptors: &Descriptors| {
                came.borrow_mut().push(descriptors.len());
                Ok(count)
            }
        };
        direction.pass(&mut buffers, read, take(0));
        direction.flush(&mut buffers, take(0));
        direction.flush(&mut buffers, take(10));
        direction.flush(&mut buffers, take(15));
        direction.flush(&mut buffers, take(5));
        direction.pass(&mut buffers, read, take(10));
        direction.flush(&mut buffers, take(20));
        assert_eq!(came.into_inner(), [2, 2, 2, 0, 0, 2, 0]);
        assert!(direction.reads());
    }

    #[test]
    fn descriptors_that_cannot_be_taken_now_are_tried_again_by_the_clock() {
        let (mut buffers, mut direction) = (Buffers::new(64), Direction::default());
        let read = |room: &mut [u8], descriptors: &mut Descriptors| {
            room[..5].copy_from_slice(b"bytes");
            *descriptors = vec![UnixStream::pair().unwrap().0.into()].into();
            Received::Bytes(5)
        };
        let in_the_way = |_: &[u8], _: &Descriptors| Err(Errno::ETOOMANYREFS.into());
        assert_eq!(direction.pass(&mut buffers, read, in_the_way), Moved::Some);
        // No event tells when they can be: an epoll that looked for room would find it all the time.
        assert!(direction.writes() && !direction.awaits_room() && !direction.reads());
        let due = direction.retry().unwrap();
        assert_eq!(direction.flush(&mut buffers, |_, _| unreachable!("before it is due")), Moved::Nothing);
        direction.retry = Moment::now().checked_sub(PAUSE);
        assert_eq!(direction.flush(&mut buffers, in_the_way), Moved::Nothing);
        assert!(direction.retry() > Some(due));
        direction.retry = Moment::now().checked_sub(PAUSE);
        let take = |bytes: &[u8], descriptors: &Descriptors| {
            assert_eq!(descriptors.len(), 1);
            Ok(bytes.len() - 1)
        };
        assert_eq!(direction.flush(&mut buffers, take), Moved::Some);
        assert!(direction.awaits_room() && direction.retry().is_none() && direction.descriptors().is_empty());
        // Any other error is the end of this direction.
        assert_eq!(direction.flush(&mut buffers, |_, _| Err(Errno::EPIPE.into())), Moved::ReceiverGone);
    }
}
