//! Passes bytes from one socket to another without copying them: splice(2), through a pipe that is empty in between.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::sys::splice;

/// The pipe.
#[derive(Debug)]
pub struct Pipe {
    out: File,
    into: File,
}

/// What went through.
#[derive(Clone, Copy, Debug)]
pub struct Spliced {
    /// So many bytes were read; 0: the end of file was.
    pub read: usize,
    /// So many of these were taken, or this is why no more will be.
    pub written: Result<usize, Errno>,
}

impl Pipe {
    /// # Errors
    /// What pipe2(2) says.
    pub fn new() -> Result<Self, Errno> {
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { out: out.into(), into: into.into() })
    }

    /// Reads once, no more than fits into `room`, and writes that. What was not taken is in `room`, in the place that it would
    /// have if everything had been read into it.
    ///
    /// # Errors
    /// What splice(2) says where it reads. UnexpectedEof where the rest cannot be taken out of the pipe: it is lost, and the pipe
    /// must not be used any more.
    pub fn pass(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<Spliced> {
        let read = splice(from, self.into.as_fd(), room.len())?;
        let (mut count, mut broken) = (0, None);
        while count < read && broken.is_none() {
            match splice(self.out.as_fd(), to, read - count) {
                Ok(taken) => count += taken,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => broken = Some(error),
            }
        }
        self.out.read_exact(&mut room[count..read]).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        Ok(Spliced { read, written: broken.map_or(Ok(count), Err) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    #[test]
    fn what_is_not_taken_is_where_it_would_have_been_read_to() {
        let ((from, mut sender), (mut to, mut receiver)) = (pair(), pair());
        let mut before = 0;
        while let Ok(taken) = to.write(&[b'x'; 4096]) {
            before += taken;
        }
        let sent: Vec<u8> = (0..50_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        sender.write_all(&sent).unwrap();
        let mut pipe = Pipe::new().unwrap();
        let mut room = vec![0; 65_536];
        let Spliced { read, written } = pipe.pass(from.as_fd(), to.as_fd(), &mut room).unwrap();
        let written = written.unwrap();
        assert!(written < read, "{written} of {read}");
        let mut heard = vec![0; before + written];
        receiver.read_exact(&mut heard).unwrap();
        heard.extend_from_slice(&room[written..read]);
        assert!(heard[before..] == sent[..read]);
    }

    #[test]
    fn what_cannot_be_written_does_not_stay_for_the_next_connection() {
        let (mut pipe, mut room) = (Pipe::new().unwrap(), vec![0; 65_536]);
        let ((from, mut sender), (to, receiver)) = (pair(), pair());
        sender.write_all(&[b'x'; 30_000]).unwrap();
        drop(receiver);
        let gone = pipe.pass(from.as_fd(), to.as_fd(), &mut room).unwrap();
        assert_eq!(gone.written, Err(Errno::EPIPE));
        let ((from, mut sender), (to, mut receiver)) = (pair(), pair());
        sender.write_all(b"its own").unwrap();
        drop(sender);
        let Spliced { read, written } = pipe.pass(from.as_fd(), to.as_fd(), &mut room).unwrap();
        assert_eq!((read, written), (7, Ok(7)));
        let mut heard = [0; 64];
        assert_eq!(receiver.read(&mut heard).unwrap(), 7);
        assert_eq!(&heard[..7], b"its own");
        assert_eq!(pipe.pass(from.as_fd(), to.as_fd(), &mut room).unwrap().read, 0, "the end of file");
    }
}
