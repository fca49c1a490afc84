//! The system calls that no crate wraps safely: the only unsafe code of the library.
//!
//! Each function is a thin wrapper: it checks what the kernel returns and hands out owned types.

#![allow(unsafe_code)]

mod thread_ids;

use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::SigSet;

pub(crate) use thread_ids::{
    keep_capabilities, may_set_ids, raise_set_ids, set_thread_gid, set_thread_groups, set_thread_uid, thread_groups,
};

/// Linux's number, which libc may lack on the oldest version we build with.
pub(crate) const SO_PASSRIGHTS: libc::c_int = 83;

/// Takes ownership of a descriptor that the service manager passed by number.
///
/// Marks it close-on-exec. Fails with EBADF where nothing is open at that number.
/// May be called once for a number, before any other code of the process opens descriptors there. Only
/// [`activation`](crate::activation) calls it.
pub(crate) fn adopt_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD on an arbitrary number has no effect but on that number's flags, or EBADF.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open (just checked), and by the LISTEN_FDS protocol this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// accept4(2): the next waiting connection, non-blocking and close-on-exec.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: null address pointers tell the kernel not to write an address.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: accept4 returned a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// pidfd_open(2): a handle on the process that has this number now. Linux 5.3.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, writes no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: pidfd_open returned a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// SO_PEERGROUPS: the supplementary groups of the peer at connect, unix(7). Linux 4.13. Returns how many there are. They
/// are in `room` if it has room for them all; if not, the kernel has copied none.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>, room: &mut [u32]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(size_of_val(room)).unwrap_or(libc::socklen_t::MAX);
    match getsockopt(socket, libc::SO_PEERGROUPS, room.as_mut_ptr().cast(), &mut length) {
        Ok(()) => Ok(length as usize / size_of::<u32>()),
        // The kernel says how much room it needs.
        Err(e) if e.raw_os_error() == Some(libc::ERANGE) && length as usize > size_of_val(room) => {
            Ok(length as usize / size_of::<u32>())
        }
        Err(e) => Err(e),
    }
}

/// SO_PEERSEC: the security label of the peer at connect, unix(7); the bytes as the LSM gave them, in `room`. ERANGE
/// where they do not fit in, ENOPROTOOPT where no security module has labels.
pub(crate) fn peer_label<'r>(socket: BorrowedFd<'_>, room: &'r mut [u8]) -> io::Result<&'r [u8]> {
    let mut length = libc::socklen_t::try_from(room.len()).unwrap_or(libc::socklen_t::MAX);
    getsockopt(socket, libc::SO_PEERSEC, room.as_mut_ptr().cast(), &mut length)?;
    Ok(room.get(..length as usize).unwrap_or_default())
}

/// splice(2): moves up to `most` bytes from one to the other, of which one is a pipe, without copying and without waiting.
pub(crate) fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, most: usize) -> Result<usize, Errno> {
    let (from, to, none) = (from.as_raw_fd(), to.as_raw_fd(), std::ptr::null_mut());
    // SAFETY: without offsets it reads and writes no memory of this process.
    let moved = unsafe { libc::splice(from, none, to, none, most, libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE) };
    Errno::result(moved).map(|moved| moved.unsigned_abs())
}

/// FIONREAD: how many bytes are in the receive queue, unix(7) (as SIOCINQ).
pub(crate) fn unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one int, and `count` outlives the call.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// How much memory holds what this datagram socket has sent and its receiver has not read (SIOCOUTQ, unix(7)).
pub(crate) fn sent_and_unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes one int, and `size` outlives the call.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut size) })?;
    Ok(usize::try_from(size).unwrap_or(0))
}

/// Sends `signal` with `value` attached, so that the receiver can tell it from a bare kill(1): sigqueue(3).
pub(crate) fn queue_signal(pid: i32, signal: i32, value: i32) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: value as usize as *mut libc::c_void };
    // SAFETY: the value is a number, never dereferenced on either side.
    Errno::result(unsafe { libc::sigqueue(pid, signal, value) })?;
    Ok(())
}

/// pidfd_send_signal(2): to the very process, also where its number has passed on to another. Linux 5.1.
pub(crate) fn signal_process(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let nothing_more = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: with a null pointer the kernel fills in the sender, as for kill(2); nothing of ours is read or written.
    Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, nothing_more, 0) })?;
    Ok(())
}

/// Room for the credentials of one message and nothing else: descriptors that a peer sends along find none, and the
/// kernel closes them (MSG_CTRUNC, recvmsg(2)).
#[repr(C)]
union OneCredential {
    header: libc::cmsghdr,
    // SAFETY: CMSG_SPACE computes, it touches no memory.
    bytes: [u8; unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) } as usize],
}

/// A message header for these buffers. It holds pointers to them: they must outlive the call that it is for.
fn message(parts: &mut [libc::iovec], control: Option<&mut MaybeUninit<OneCredential>>) -> libc::msghdr {
    // SAFETY: a msghdr of zeros and null pointers is a valid, empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    if let Some(control) = control {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<OneCredential>() as _;
    }
    message
}

/// recvmsg(2) on a socket with SO_PASSCRED: how many bytes came, and the sender's credentials (unix(7)); `None` where
/// the kernel attached none. Never waits.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<libc::ucred>)> {
    let mut control = MaybeUninit::<OneCredential>::zeroed();
    let mut parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let mut message = message(&mut parts, Some(&mut control));
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: buffer and control outlive the call, and the lengths are theirs.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let count = Errno::result(count)? as usize;
    // SAFETY: the kernel has set msg_controllen to what it wrote; the macro checks it against a header's size.
    let first = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if first.is_null() {
        return Ok((count, None));
    }
    // SAFETY: not null, so a whole header is there, in aligned memory of ours.
    let header = unsafe { first.read() };
    // SAFETY: CMSG_LEN computes, it touches no memory.
    let whole = unsafe { libc::CMSG_LEN(size_of::<libc::ucred>() as u32) };
    let is_credentials = header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_CREDENTIALS;
    if !is_credentials || (header.cmsg_len as usize) < whole as usize {
        return Ok((count, None));
    }
    // SAFETY: behind the header, within what the kernel wrote (checked by cmsg_len).
    let data = unsafe { libc::CMSG_DATA(first) };
    // SAFETY: as above; read_unaligned asks for no alignment.
    Ok((count, Some(unsafe { data.cast::<libc::ucred>().read_unaligned() })))
}

// SAFETY: CMSG_SPACE computes, it touches no memory.
const RIGHTS_SPACE: u32 = unsafe { libc::CMSG_SPACE((253 * size_of::<RawFd>()) as u32) };
// SAFETY: as above.
const CREDENTIALS_SPACE: u32 = unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) };

/// Room for as many descriptors as one message carries (SCM_MAX_FD in the kernel's net/scm.h), and for credentials.
#[repr(C)]
union AllDescriptors {
    header: libc::cmsghdr,
    bytes: [u8; (RIGHTS_SPACE + CREDENTIALS_SPACE) as usize],
}

/// A message and what came with it.
pub(crate) struct Received {
    /// How many bytes are in the buffer.
    pub(crate) length: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// Only on a socket with SO_PASSCRED.
    pub(crate) sender: Option<libc::ucred>,
    /// False where the message is longer than the buffer.
    pub(crate) is_whole: bool,
    /// The kernel has closed descriptors: the process has no numbers left for them.
    pub(crate) lacks_descriptors: bool,
}

/// recvmsg(2) of one message with its descriptors, which are close-on-exec. With `peek` the message stays where it is, and
/// the descriptors are duplicates. The kernel closes the descriptors for which the process has no numbers left. Never waits.
pub(crate) fn receive_descriptors(socket: BorrowedFd<'_>, buffer: &mut [u8], peek: bool) -> io::Result<Received> {
    let mut control = MaybeUninit::<AllDescriptors>::zeroed();
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a msghdr of zeros and null pointers is a valid, empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<AllDescriptors>() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: buffer and control outlive the call, and the lengths are theirs.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let length = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let (mut fds, mut sender) = (Vec::new(), None);
    // SAFETY: the kernel has set msg_controllen to what it wrote; the macro checks it against a header's size.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !next.is_null() {
        // SAFETY: not null, so a whole header is there, in aligned memory of ours.
        let header = unsafe { next.read() };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN computes, it touches no memory.
            let data_length = (header.cmsg_len as usize).saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            // SAFETY: behind the header, within what the kernel wrote.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for index in 0..data_length / size_of::<RawFd>() {
                // SAFETY: `index` numbers are there by cmsg_len, which is the kernel's.
                let place = unsafe { data.add(index) };
                // SAFETY: as above; read_unaligned asks for no alignment.
                let fd = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has just installed it for us; each number is read once.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: CMSG_LEN computes, it touches no memory.
        let whole = unsafe { libc::CMSG_LEN(size_of::<libc::ucred>() as u32) } as usize;
        let is_credentials = header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_CREDENTIALS;
        if is_credentials && header.cmsg_len as usize >= whole {
            // SAFETY: behind the header, within what the kernel wrote (checked by cmsg_len).
            let data = unsafe { libc::CMSG_DATA(next) };
            // SAFETY: as above; read_unaligned asks for no alignment.
            sender = Some(unsafe { data.cast::<libc::ucred>().read_unaligned() });
        }
        // SAFETY: `next` is a header in `message`, whose lengths the kernel has set.
        next = unsafe { libc::CMSG_NXTHDR(&message, next) };
    }
    let (is_whole, lacks_descriptors) =
        (message.msg_flags & libc::MSG_TRUNC == 0, message.msg_flags & libc::MSG_CTRUNC != 0);
    Ok(Received { length, fds, sender, is_whole, lacks_descriptors })
}

/// recvmsg(2) with MSG_PEEK: how many bytes are there, and whether descriptors are among them. Takes neither. On a
/// socket with SO_PASSCRED there is room for `credentials` and nothing else, on any other for nothing: what does not
/// fit is descriptors, if no further ancillary data is turned on. Waits only with `may_wait`, where the socket does.
pub(crate) fn peek(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    credentials: bool,
    may_wait: bool,
) -> io::Result<(usize, bool)> {
    let mut control = MaybeUninit::<OneCredential>::zeroed();
    let mut parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let mut message = message(&mut parts, credentials.then_some(&mut control));
    let flags = libc::MSG_PEEK | if may_wait { 0 } else { libc::MSG_DONTWAIT };
    // SAFETY: buffer and control outlive the call, and the lengths are theirs.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let count = Errno::result(count)? as usize;
    Ok((count, message.msg_flags & libc::MSG_CTRUNC != 0))
}

/// As [`peek`], without waiting, of whole messages: how many bytes are in the first ones that together have no more than
/// `length`, up to and including the first with descriptors, and whether it has some. (0, false) where the first message is
/// longer.
///
/// Behind room for so many bytes comes a buffer at no address. The kernel copies message by message; one that reaches there
/// fails as a whole, before its descriptors are looked at, and the answer is what was copied before it.
pub(crate) fn peek_messages(socket: BorrowedFd<'_>, length: usize, credentials: bool) -> io::Result<(usize, bool)> {
    /// What UIO_MAXIOV (1024) leaves, with the one at no address.
    const MOST_PARTS: usize = 1023;
    // What was copied is not looked at: all parts are the same memory.
    let mut scratch = vec![0_u8; length.clamp(1, 64 * 1024)];
    let length = length.min(MOST_PARTS * scratch.len());
    let mut parts: Vec<libc::iovec> = (0..length)
        .step_by(scratch.len())
        .map(|at| libc::iovec { iov_base: scratch.as_mut_ptr().cast(), iov_len: scratch.len().min(length - at) })
        .collect();
    parts.push(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 });
    let mut control = MaybeUninit::<OneCredential>::zeroed();
    let mut message = message(&mut parts, credentials.then_some(&mut control));
    // SAFETY: scratch, parts and control outlive the call, and the lengths are theirs. At the null address the kernel finds
    // no page to write to, which it answers with EFAULT or by stopping there.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    match Errno::result(count) {
        Ok(count) => Ok((count as usize, message.msg_flags & libc::MSG_CTRUNC != 0)),
        Err(Errno::EFAULT) => Ok((0, false)),
        Err(error) => Err(error.into()),
    }
}

/// A signal that does nothing, sent to one thread again and again, so that a call of its which waits is over with
/// EINTR. The signal's disposition is the process's: SIGRTMIN+2.
pub(crate) struct Interruptions(libc::timer_t);

impl Interruptions {
    /// Of the thread that calls this; none come before [`every`](Self::every).
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int) {}
        let signal = libc::SIGRTMIN() + 2;
        // SAFETY: a sigaction of zeros has an empty mask and no flags: no SA_RESTART, which is the point.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler touches nothing.
        Errno::result(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) })?;
        // The thread that started this one may have blocked every signal.
        signal_set(&[signal]).thread_unblock()?;
        // SAFETY: all zeros is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: takes nothing.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = std::ptr::null_mut();
        // SAFETY: both outlive the call, which writes the timer's name.
        Errno::result(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) })?;
        Ok(Self(timer))
    }

    /// From now on once in each `period`; with zero, no more.
    pub(crate) fn every(&self, period: std::time::Duration) -> io::Result<()> {
        let period =
            libc::timespec { tv_sec: period.as_secs() as libc::time_t, tv_nsec: period.subsec_nanos() as libc::c_long };
        let setting = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer is ours and lives; the setting outlives the call.
        Errno::result(unsafe { libc::timer_settime(self.0, 0, &setting, std::ptr::null_mut()) })?;
        Ok(())
    }
}

impl Drop for Interruptions {
    fn drop(&mut self) {
        // SAFETY: made by timer_create, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// mallopt(3), M_MMAP_THRESHOLD: allocations of so many bytes and more come from the system one by one.
pub(crate) fn map_allocations_from(bytes: usize) {
    #[cfg(target_env = "gnu")]
    {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        // SAFETY: takes two integers, and only what is allocated from now on is affected. What it refuses stays as it was.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, bytes) };
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = bytes;
}

/// The room that an entry of the user database gets at first.
const FIRST_ROOM: usize = 16 << 10;
/// The most room that it gets: a group of ten million members. nix stops at 1 MiB.
const MOST_ROOM: usize = 256 << 20;
/// The most groups of one user that are listed. No process can have more than 65,536.
const MOST_GROUPS: usize = 1 << 20;
/// How many users or groups are listed at most.
const MOST_LISTED: usize = 1 << 20;

/// What the user database says of a user: passwd(5).
#[derive(Debug)]
pub(crate) struct PasswdEntry {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: PathBuf,
}

/// getpwnam_r(3). `None` where there is no such user.
pub(crate) fn user_by_name(name: &CStr) -> io::Result<Option<PasswdEntry>> {
    // SAFETY: the name ends with NUL; the rest is as `entry` promises.
    entry(|user, room, size, found| unsafe { libc::getpwnam_r(name.as_ptr(), user, room, size, found) }, passwd_entry)
}

/// getpwuid_r(3). `None` where there is no such user.
pub(crate) fn user_by_id(uid: u32) -> io::Result<Option<PasswdEntry>> {
    // SAFETY: as `entry` promises.
    entry(|user, room, size, found| unsafe { libc::getpwuid_r(uid, user, room, size, found) }, passwd_entry)
}

/// The gid of the group with this name: getgrnam_r(3). `None` where there is no such group.
pub(crate) fn group_by_name(name: &CStr) -> io::Result<Option<u32>> {
    // SAFETY: the name ends with NUL; the rest is as `entry` promises.
    let call = |group: *mut libc::group, room, size, found| unsafe {
        libc::getgrnam_r(name.as_ptr(), group, room, size, found)
    };
    entry(call, |group| group.gr_gid)
}

/// What the user database says of a group: group(5).
#[derive(Debug)]
pub(crate) struct GroupEntry {
    pub(crate) gid: u32,
    pub(crate) members: Vec<String>,
}

/// getgrgid_r(3). `None` where there is no such group.
pub(crate) fn group_by_id(gid: u32) -> io::Result<Option<GroupEntry>> {
    // SAFETY: as `entry` promises.
    entry(|group, room, size, found| unsafe { libc::getgrgid_r(gid, group, room, size, found) }, group_entry)
}

/// The C library has one place in the list of users and one in that of groups for the whole process: one thread at a time.
static LISTING: Mutex<()> = Mutex::new(());

/// Every user that the database lists: getpwent_r(3).
pub(crate) fn users() -> io::Result<Vec<PasswdEntry>> {
    let _alone = LISTING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no arguments, and no other thread of this library is in the list.
    unsafe { libc::setpwent() };
    // SAFETY: as `entry` promises.
    let next = || entry(|user, room, size, found| unsafe { libc::getpwent_r(user, room, size, found) }, passwd_entry);
    let users = std::iter::from_fn(|| next().transpose()).take(MOST_LISTED).collect();
    // SAFETY: as above.
    unsafe { libc::endpwent() };
    users
}

/// Every group that the database lists: getgrent_r(3).
pub(crate) fn groups() -> io::Result<Vec<GroupEntry>> {
    let _alone = LISTING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no arguments, and no other thread of this library is in the list.
    unsafe { libc::setgrent() };
    // SAFETY: as `entry` promises.
    let next = || entry(|group, room, size, found| unsafe { libc::getgrent_r(group, room, size, found) }, group_entry);
    let groups = std::iter::from_fn(|| next().transpose()).take(MOST_LISTED).collect();
    // SAFETY: as above.
    unsafe { libc::endgrent() };
    groups
}

fn group_entry(group: &libc::group) -> GroupEntry {
    let mut members = Vec::new();
    let mut next = group.gr_mem;
    // SAFETY: null, or the first of an array of pointers that ends with a null pointer, in the room that `entry` keeps.
    while let Some(&name) = unsafe { next.as_ref() }.filter(|name| !name.is_null()) {
        // SAFETY: not null, so a string that ends with NUL, in the same room.
        members.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        // SAFETY: this one is not the last, so there is another behind it.
        next = unsafe { next.add(1) };
    }
    GroupEntry { gid: group.gr_gid, members }
}

fn passwd_entry(user: &libc::passwd) -> PasswdEntry {
    let bytes = |text: *const libc::c_char| {
        if text.is_null() {
            return &[][..];
        }
        // SAFETY: not null, so a string that ends with NUL, in the room that `entry` keeps while this runs.
        unsafe { CStr::from_ptr(text) }.to_bytes()
    };
    PasswdEntry {
        name: String::from_utf8_lossy(bytes(user.pw_name)).into_owned(),
        uid: user.pw_uid,
        gid: user.pw_gid,
        home: OsStr::from_bytes(bytes(user.pw_dir)).into(),
    }
}

/// An entry of the user database. `call` gets room for the entry, room for its strings and the size of that, and where
/// to put the pointer to the entry; all of it is valid for the call. ERANGE asks for more room.
fn entry<E, R>(
    call: impl Fn(*mut E, *mut libc::c_char, usize, *mut *mut E) -> libc::c_int,
    read: impl Fn(&E) -> R,
) -> io::Result<Option<R>> {
    let mut size = FIRST_ROOM;
    loop {
        let mut room: Vec<u8> = Vec::new();
        room.try_reserve_exact(size).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut entry = MaybeUninit::<E>::uninit();
        let mut found = std::ptr::null_mut();
        match call(entry.as_mut_ptr(), room.as_mut_ptr().cast(), size, &mut found) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: on success it points to `entry`, filled in, with its strings in `room`; both live until here.
            0 => return Ok(Some(read(unsafe { &*found }))),
            // Some sources report "nothing found" as an error (getpwnam(3), ERRORS).
            libc::ENOENT | libc::ESRCH => return Ok(None),
            libc::ERANGE if size < MOST_ROOM => size *= 4,
            libc::EINTR => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// The gids of a user's groups, `gid` among them: getgrouplist(3), which tells nothing of a database that does not
/// answer.
pub(crate) fn groups_of(name: &CStr, gid: u32) -> io::Result<Vec<u32>> {
    let mut size = 64;
    loop {
        let mut gids: Vec<u32> = Vec::with_capacity(size);
        let mut count = libc::c_int::try_from(size).unwrap_or(libc::c_int::MAX);
        // SAFETY: the name ends with NUL, and there is room for as many as `count` says.
        let answer = unsafe { libc::getgrouplist(name.as_ptr(), gid, gids.as_mut_ptr(), &mut count) };
        let count = usize::try_from(count).unwrap_or(0);
        if answer >= 0 {
            // SAFETY: so many were written, no more than there was room for.
            unsafe { gids.set_len(count.min(size)) };
            return Ok(gids);
        }
        if size >= MOST_GROUPS {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        size = count.max(size * 2).min(MOST_GROUPS);
    }
}

/// A socket option that is a number.
pub(crate) fn option(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    getsockopt(socket, option, (&raw mut value).cast(), &mut length)?;
    Ok(value)
}

/// Sets a socket option that is a number.
pub(crate) fn set_option(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value outlives the call, and the length is its own.
    Errno::result(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), length)
    })?;
    Ok(())
}

/// The set of these signals. By number, because nix has no names for the real-time ones.
pub(crate) fn signal_set(numbers: &[i32]) -> SigSet {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: writes the whole set, and nothing else.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has just made it.
    let mut set = unsafe { set.assume_init() };
    for number in numbers {
        // SAFETY: a valid set; a number that is no signal changes nothing.
        unsafe { libc::sigaddset(&mut set, *number) };
    }
    // SAFETY: made by sigemptyset and sigaddset alone.
    unsafe { SigSet::from_sigset_t_unchecked(set) }
}

fn getsockopt(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
    value: *mut libc::c_void,
    length: &mut libc::socklen_t,
) -> io::Result<()> {
    // SAFETY: every caller passes a buffer of at least `*length` bytes that outlives the call.
    Errno::result(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, length) })?;
    Ok(())
}
