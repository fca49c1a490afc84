//! Descriptor passing.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Sends descriptors over a socket, at most 250 with one message (the kernel takes 253).
pub fn send_fds(socket: &impl AsRawFd, fds: &[RawFd]) {
    for some in fds.chunks(250) {
        let control = [ControlMessage::ScmRights(some)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b".")], &control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }
}

/// Sends bytes and descriptors with one message.
pub fn send_along(socket: &impl AsRawFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
    let control = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)
}

/// Both ends of a TCP connection. The first has unsent data and SO_LINGER of hours: close(2) of its last descriptor
/// blocks for that long.
pub fn lingering() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut one = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    one.set_nonblocking(true).unwrap();
    while one.write(&[0; 65536]).is_ok() {}
    one.set_nonblocking(false).unwrap();
    let hours = nix::libc::linger { l_onoff: 1, l_linger: 10_000 };
    nix::sys::socket::setsockopt(&one, nix::sys::socket::sockopt::Linger, &hours).unwrap();
    (one, other)
}

/// Receives one message and its descriptors. `None` at the end of file.
pub fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for one in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = one {
            fds.extend(received);
        }
    }
    let end = message.bytes == 0 && fds.is_empty();
    Ok((!end).then_some((message.bytes, fds)))
}

pub fn duplicate(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}
