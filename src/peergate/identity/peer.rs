//! What the kernel vouches for about the process on the other end of a socket: [`Peer`].
//!
//! The only module that uses the socket options for credentials (unix(7), socket(7)). It does not know the policy.
//!
//! | fact | from | fixed when | since |
//! | --- | --- | --- | --- |
//! | effective uid, gid; pid | SO_PEERCRED | connect(2) | Linux 2.2 |
//! | supplementary groups | SO_PEERGROUPS | connect(2) | Linux 4.13 |
//! | the process itself | SO_PEERPIDFD | connect(2) | Linux 6.5 |
//! | units, login, command name | /proc/PID, tied to the process by its pidfd | asked | |
//! | security label | SO_PEERSEC | connect(2) | Linux 2.6.2 |
//!
//! A pid is only a number, and is given to another process once its owner has been waited for. So
//! what is read from `/proc/PID` counts only if the pidfd shows afterwards that the process had not
//! ended: until then its number cannot have passed on.
//!
//! A peer chooses how many groups it has, how deep in the control group tree it is, and sometimes its label. The kernel is
//! asked on threads that all connections share. So each answer is read into a buffer of a fixed size. An answer that does
//! not fit is unknown.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{UnixAddr, getpeername, getsockopt, setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::subject::{Login, Subject};
use crate::escape::printable;
use crate::ids::{Gid, OVERFLOW_ID, Uid};
use crate::sys;
use crate::unit::Units;

impl Uid {
    /// The effective user id of this process (geteuid(2)), which [`User::Me`](crate::policy::User::Me) usually means.
    pub fn effective() -> Self {
        Self::new(nix::unistd::geteuid().as_raw())
    }
}

/// The longest list of supplementary groups that is read. Of a longer list only the length is known: an allow rule by
/// groups does not match, and a deny rule by groups does.
///
/// setgroups(2) takes 65,536 groups, even the same one so many times, and where newgidmap(1) is installed any user may
/// call it in a user namespace. The lists that directories give are shorter than this: a Windows domain, the richest
/// source of groups in practice, gives a user 1,015 at most (its access token has room for 1,024).
pub const MOST_GROUPS: usize = 1024;

/// How much of a file below /proc/PID is read: enough for four control group paths of the greatest length, or for any
/// command name.
const MOST_PROC: usize = 16 * 1024;

/// How long a label may be. Smack's have 255 bytes at most, and a usual one of SELinux some 60.
const MOST_LABEL: usize = 1024;

/// How much of /proc/PID/status is read: NGROUPS_MAX groups of 11 characters, and the other lines.
const MOST_STATUS: u64 = 1024 * 1024;

/// The process on the other end of a connected AF_UNIX socket, as of connect(2).
#[derive(Debug)]
pub struct Peer {
    uid: Uid,
    gid: Gid,
    /// The effective gid first, then the supplementary ones; no neighbours are equal. `None`: not known.
    groups: Option<Box<[Gid]>>,
    /// How many supplementary groups the kernel counts; 0 until it was asked.
    supplementary: u32,
    pid: i32,
    pidfd: Option<OwnedFd>,
    units: OnceLock<Option<Box<Units>>>,
    login: OnceLock<Login>,
    lacked_descriptors: AtomicBool,
}

/// What a record tells about a peer beyond its ids. A field is absent where it could not be tied to the process that
/// connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Details {
    /// The command name of the process, `/proc/PID/comm`, with anything unprintable escaped.
    pub comm: Option<String>,
    /// The innermost systemd unit that it runs in.
    pub unit: Option<String>,
    /// The user who logged in: [`Subject::login`].
    pub login: Option<Uid>,
    /// The number of the audit session of that login, which by default is also logind's.
    pub session: Option<u32>,
    /// Its label in the system's security module, with anything unprintable escaped.
    pub label: Option<String>,
}

impl Peer {
    /// Asks the kernel for everything that a policy may need to know about the peer of `socket`.
    ///
    /// Holds a descriptor (the pidfd) until [`close_pidfd`](Self::close_pidfd) or drop.
    ///
    /// For a listening socket the kernel tells the process that called listen(2), and for a pair the process that called
    /// socketpair(2). So ask about the socket that [`accept`](crate::Listener::accept) returned.
    ///
    /// # Errors
    /// ENOTCONN where the kernel names no process, as for a socket that is not connected or not of AF_UNIX; else what
    /// getsockopt(2) says. Treat it as a denial.
    ///
    /// ```
    /// use std::os::unix::net::UnixStream;
    ///
    /// let (ours, _theirs) = UnixStream::pair()?;
    /// let peer = peergate::Peer::of(&ours)?;
    /// assert_eq!(peer.pid(), Some(std::process::id() as i32));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let mut peer = Self::credentials_of(socket)?;
        peer.open_pidfd(socket);
        Ok(peer)
    }

    /// As [`of`](Self::of), without the process: two system calls, no descriptor, but no units either.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn credentials_of(socket: &impl AsFd) -> io::Result<Self> {
        let mut peer = Self::ids_of(socket)?;
        peer.load_groups(socket);
        Ok(peer)
    }

    /// As [`of`](Self::of), without process and supplementary groups: one system call. The groups are incomplete until a
    /// decision or [`details`](Self::details) asks for them.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn ids_of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
        // Where there is no peer the answer is no error, but -1, which is no user (setreuid(2)).
        if credentials.uid() == u32::MAX {
            return Err(Errno::ENOTCONN.into());
        }
        Ok(Self::new(known_uid(credentials.uid()), known_gid(credentials.gid()), credentials.pid()))
    }

    /// The supplementary groups as the kernel lists them, in its order: with the effective gid, if the list has it, and with
    /// what it has more than once. `None` where there are more than [`MOST_GROUPS`].
    ///
    /// # Errors
    /// What getsockopt(2) says.
    pub fn supplementary_of(socket: &impl AsFd) -> io::Result<Option<Vec<Gid>>> {
        let mut room = [0; MOST_GROUPS];
        let count = sys::peer_groups(socket.as_fd(), &mut room)?;
        Ok(room.get(..count).map(|groups| groups.iter().copied().map(known_gid).collect()))
    }

    fn new(uid: Uid, gid: Gid, pid: i32) -> Self {
        let (units, login, lacked_descriptors) = (OnceLock::new(), OnceLock::new(), AtomicBool::new(false));
        Self { uid, gid, groups: None, supplementary: 0, pid, pidfd: None, units, login, lacked_descriptors }
    }

    /// Asks for the supplementary groups, unless they are known. They are fixed at connect(2), so the answer is the same
    /// later. Where the kernel gives none, or more than [`MOST_GROUPS`], they stay incomplete.
    pub(crate) fn load_groups(&mut self, socket: &impl AsFd) {
        if self.groups.is_some() {
            return;
        }
        let mut room = [0; MOST_GROUPS];
        let Ok(count) = sys::peer_groups(socket.as_fd(), &mut room) else { return };
        self.set_groups(count, &room);
    }

    /// Notes how many supplementary groups there are, and which they are unless there are more than [`MOST_GROUPS`].
    fn set_groups(&mut self, count: usize, listed: &[u32]) {
        self.supplementary = u32::try_from(count).unwrap_or(u32::MAX);
        let groups = listed.get(..count).filter(|groups| groups.len() <= MOST_GROUPS);
        self.groups = groups.map(|groups| united(self.gid, groups.iter().copied().map(known_gid)));
    }

    /// Frees the list of groups. Only a decision and its record need it.
    pub fn forget_groups(&mut self) {
        self.groups = None;
    }

    /// How many supplementary groups the kernel counted when it was last asked. Of more than [`MOST_GROUPS`] only the
    /// number is known.
    pub fn supplementary_groups(&self) -> usize {
        self.supplementary as usize
    }

    /// Opens a pidfd of the process that connected: its units can be told from then on. Without effect on
    /// kernels before 6.5, for a peer in another pid namespace and (before 6.16) for one that has been
    /// waited for already: such a peer has no units.
    pub(crate) fn open_pidfd(&mut self, socket: &impl AsFd) {
        if self.pidfd.is_none() && self.pid > 0 {
            let pidfd = getsockopt(&socket.as_fd(), sockopt::PeerPidfd);
            self.pidfd = pidfd.map_err(|error| self.note_lack(error)).ok();
        }
    }

    /// Whether a question has failed since the last call because no descriptor was free. Asked again, it may have an
    /// answer.
    pub(crate) fn lacked_descriptors(&self) -> bool {
        self.lacked_descriptors.swap(false, Ordering::Relaxed)
    }

    fn note_lack(&self, error: Errno) {
        if matches!(error, Errno::EMFILE | Errno::ENFILE) {
            self.lacked_descriptors.store(true, Ordering::Relaxed);
        }
    }

    /// Closes the pidfd. Units that were asked for stay known.
    pub fn close_pidfd(&mut self) {
        self.pidfd = None;
    }

    /// A live process, as it would be judged if it connected now: its effective ids and groups from
    /// `/proc/PID/status`, its units as for a peer.
    ///
    /// # Errors
    /// ESRCH where there is no such process or it ended meanwhile; what reading /proc says.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        if pid <= 0 {
            return Err(gone());
        }
        let pidfd = sys::pidfd_open(pid)?;
        let mut status = Vec::new();
        fs::File::open(format!("/proc/{pid}/status"))?.take(MOST_STATUS).read_to_end(&mut status)?;
        // The process chose its name, which is in the file too.
        let ids = ids_of_status(&String::from_utf8_lossy(&status));
        let (uid, gid, groups) = ids.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        if has_ended(pidfd.as_fd()) {
            return Err(gone());
        }
        let mut peer = Self::new(uid, gid, pid);
        peer.set_groups(groups.len(), &groups);
        peer.pidfd = Some(pidfd);
        Ok(peer)
    }

    /// The effective user id.
    pub fn uid(&self) -> Uid {
        self.uid
    }

    /// The effective group id.
    pub fn gid(&self) -> Gid {
        self.gid
    }

    /// The effective group id and the supplementary ones that are known. The gate asks for them where the policy depends on
    /// them, and frees them after the decision; [`details`](Self::details) asks for them again.
    pub fn gids(&self) -> &[Gid] {
        self.groups.as_deref().unwrap_or(std::slice::from_ref(&self.gid))
    }

    /// The process id as this pid namespace numbers it; `None` for a peer that has none here.
    pub fn pid(&self) -> Option<i32> {
        (self.pid > 0).then_some(self.pid)
    }

    /// The systemd units around the process; `None` where they cannot be tied to it. Read at the first call and then
    /// remembered, unless no descriptor was free.
    pub fn units(&self) -> Option<&Units> {
        if let Some(known) = self.units.get() {
            return known.as_deref();
        }
        let read = self.read_proc("cgroup").and_then(|text| Units::from_proc_cgroup(&text)).map(Box::new);
        // The file was not read, so there is no answer to remember.
        if read.is_none() && self.lacked_descriptors.load(Ordering::Relaxed) {
            return None;
        }
        self.units.get_or_init(|| read).as_deref()
    }

    /// The user who logged in; [`Login::Unknown`] where that cannot be tied to the process. Read at the first call and then
    /// remembered, unless no descriptor was free.
    pub fn login(&self) -> Login {
        if let Some(known) = self.login.get() {
            return *known;
        }
        let read = self.read_number("loginuid").map(Login::of_loginuid).unwrap_or_default();
        // In a user namespace the kernel shows a user that is not mapped as none.
        let read = if read == Login::None && maps_part() { Login::Unknown } else { read };
        if read == Login::Unknown && self.lacked_descriptors.load(Ordering::Relaxed) {
            return read;
        }
        *self.login.get_or_init(|| read)
    }

    /// What of its process is known, because it was asked for already.
    pub fn remembered(&self) -> Remembered {
        Remembered::new(self.remembered_units(), self.remembered_login())
    }

    /// Sets what is known of its process, for a connection that was judged in the process before this one.
    pub fn remember(&self, facts: Remembered) {
        if let Some(units) = facts.units.as_deref().and_then(Units::from_path) {
            let _ = self.units.set(Some(Box::new(units)));
        }
        if let Some(raw) = facts.login {
            let _ = self.login.set(Login::of_loginuid(raw));
        }
    }

    /// The login, if it was asked for already.
    pub fn remembered_login(&self) -> Login {
        self.login.get().copied().unwrap_or_default()
    }

    /// The units, if they were asked for already.
    pub fn remembered_units(&self) -> Option<&Units> {
        self.units.get().and_then(Option::as_deref)
    }

    /// What a record tells beyond the ids; loads the groups too. Costs several system calls: ask only where one is
    /// written.
    pub fn details(&mut self, socket: &impl AsFd) -> Details {
        self.open_pidfd(socket);
        self.load_groups(socket);
        Details {
            comm: self.read_proc("comm").map(|comm| printable(comm.strip_suffix('\n').unwrap_or(&comm))),
            unit: self.units().map(|units| printable(units.name())),
            login: self.login().user(),
            session: self.login().user().and_then(|_| self.read_number("sessionid")).filter(|raw| *raw != u32::MAX),
            label: sys::peer_label(socket.as_fd(), &mut [0; MOST_LABEL]).ok().and_then(label_text),
        }
    }

    fn read_number(&self, file: &str) -> Option<u32> {
        self.read_proc(file)?.trim_end().parse().ok()
    }

    /// Reads a file below /proc/PID, and makes sure that it is about the process that connected.
    fn read_proc(&self, file: &str) -> Option<String> {
        let pidfd = self.pidfd.as_ref()?;
        let note_lack = |error: io::Error| self.note_lack(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        let mut file = fs::File::open(format!("/proc/{}/{file}", self.pid)).map_err(note_lack).ok()?;
        let mut room = [0; MOST_PROC];
        let text = read_all(&mut file, &mut room)?;
        (!has_ended(pidfd.as_fd())).then(|| String::from_utf8_lossy(text).into_owned())
    }
}

impl Subject for Peer {
    fn uid(&self) -> Uid {
        self.uid
    }

    fn gids(&self) -> &[Gid] {
        Peer::gids(self)
    }

    fn gids_complete(&self) -> bool {
        self.groups.is_some()
    }

    fn units(&self) -> Option<&Units> {
        Peer::units(self)
    }

    fn login(&self) -> Login {
        Peer::login(self)
    }
}

/// What of a peer's process was asked for, and cannot be asked again when the process has ended. For a service that hands its
/// connections to the next process; the other facts the kernel tells again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// As [`Units::to_path`] writes them.
    units: Option<String>,
    /// As in /proc/PID/loginuid.
    login: Option<u32>,
}

impl Remembered {
    /// These units and this login.
    pub fn new(units: Option<&Units>, login: Login) -> Self {
        let login = if login == Login::None { Some(u32::MAX) } else { login.user().map(Uid::raw) };
        Self { units: units.map(Units::to_path), login }
    }
}

/// Reads from a socket that has SO_PASSCRED (unix(7)): see [`Stream::receive`](crate::Stream::receive). Descriptors in
/// the message are closed: look for them before.
pub(crate) fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Option<Uid>)> {
    let (count, sender) = sys::receive(socket.as_fd(), buffer)?;
    Ok((count, sender.as_ref().and_then(self::sender)))
}

/// The real uid of the sender of data, where the kernel tells one.
pub(crate) fn sender(credentials: &nix::libc::ucred) -> Option<Uid> {
    Some(known_uid(credentials.uid)).filter(|uid| uid.is_known())
}

/// Sets SO_PASSCRED on a connection just accepted. Returns how many bytes came before, so that they may be without
/// credentials; 0 where the option was inherited. All later bytes have them.
pub(crate) fn attach_credentials(socket: &impl AsFd) -> usize {
    let fd = socket.as_fd();
    if getsockopt(&fd, sockopt::PassCred) == Ok(true) {
        return 0;
    }
    // If it fails, every sender is unknown, and the application must treat it as a stranger.
    let _ = setsockopt(&fd, sockopt::PassCred, &true);
    // A sender looks at the option and fills the queue under a lock of this socket. getpeername(2) takes the same lock. So
    // when it returns, the data of every sender that found the option unset is in the queue and is counted.
    let _ = getpeername::<UnixAddr>(fd.as_raw_fd());
    sys::unread(fd).unwrap_or(0)
}

/// A whole file; `None` where it cannot be read or may be longer than the buffer.
fn read_all<'r>(file: &mut fs::File, room: &'r mut [u8]) -> Option<&'r [u8]> {
    let mut length = 0;
    while length < room.len() {
        match file.read(&mut room[length..]) {
            Ok(0) => return Some(&room[..length]),
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    None
}

/// A pidfd polls readable once its process has ended, waited for or not (pidfd_open(2)).
/// If poll(2) fails, the process counts as ended.
fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut question = [PollFd::new(pidfd, PollFlags::POLLIN)];
    !matches!(poll(&mut question, PollTimeout::ZERO), Ok(0))
}

/// Reads the effective uid, the effective gid and the supplementary groups from the text of /proc/PID/status, proc(5).
fn ids_of_status(status: &str) -> Option<(Uid, Gid, Vec<u32>)> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let effective = |name| field(name)?.split_whitespace().nth(1)?.parse::<u32>().ok();
    let (uid, gid) = (known_uid(effective("Uid")?), known_gid(effective("Gid")?));
    let groups: Result<Vec<u32>, _> = field("Groups")?.split_whitespace().map(str::parse).collect();
    Some((uid, gid, groups.ok()?))
}

/// The effective gid, then the supplementary groups, which may repeat it. The kernel sorts the latter (setgroups(2)), so
/// that equal ones are neighbours.
fn united(gid: Gid, supplementary: impl Iterator<Item = Gid>) -> Box<[Gid]> {
    let mut groups: Vec<Gid> = std::iter::once(gid).chain(supplementary.filter(|other| *other != gid)).collect();
    groups.dedup();
    groups.into()
}

/// The administrator may have changed the overflow ids. In this library they are always [`OVERFLOW_ID`].
fn known_uid(raw: u32) -> Uid {
    static OVERFLOW: OnceLock<u32> = OnceLock::new();
    Uid::new(overflow_as_default(raw, &OVERFLOW, "/proc/sys/kernel/overflowuid"))
}

fn known_gid(raw: u32) -> Gid {
    static OVERFLOW: OnceLock<u32> = OnceLock::new();
    Gid::new(overflow_as_default(raw, &OVERFLOW, "/proc/sys/kernel/overflowgid"))
}

fn overflow_as_default(raw: u32, cached: &OnceLock<u32>, file: &str) -> u32 {
    let read = || fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(OVERFLOW_ID);
    if raw == *cached.get_or_init(read) { OVERFLOW_ID } else { raw }
}

/// Whether the user namespace of this process maps a part of the ids only.
fn maps_part() -> bool {
    static PART: OnceLock<bool> = OnceLock::new();
    *PART.get_or_init(|| unmapped_ids().is_some())
}

/// How much of `/proc/self/uid_map` and `gid_map` is missing: a process in a user namespace that does not
/// map every id sees each unmapped one as [`OVERFLOW_ID`] (user_namespaces(7)).
///
/// `None` where every id is mapped, else a sentence that says what is and what to look for.
pub fn unmapped_ids() -> Option<String> {
    let mapped = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(file).ok()?;
        Some(text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum())
    };
    let (uids, gids) = (mapped("/proc/self/uid_map")?, mapped("/proc/self/gid_map")?);
    // 2^32 - 1 ids exist; the last number is no id.
    let all = u64::from(u32::MAX);
    (uids < all || gids < all).then(|| {
        format!(
            "this user namespace maps {uids} user ids and {gids} group ids: every other user reads as {OVERFLOW_ID} \
             (unmapped) and is denied; look for PrivateUsers=, for PrivateTmp=, ProtectSystem= or another \
             mount directive in a user unit, or for a container"
        )
    })
}

fn label_text(label: &[u8]) -> Option<String> {
    // The module may or may not count the closing NUL.
    let label = label.strip_suffix(b"\0").unwrap_or(label);
    (!label.is_empty()).then(|| printable(&String::from_utf8_lossy(label)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_that_came_before_credentials_were_attached_are_counted() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"before").unwrap();
        assert_eq!(attach_credentials(&ours), 6);
        theirs.write_all(b"after").unwrap();
        let mut buffer = [0; 99];
        assert_eq!(receive(&ours, &mut buffer).unwrap(), (6, None));
        assert_eq!(receive(&ours, &mut buffer).unwrap(), (5, Some(Uid::new(nix::unistd::getuid().as_raw()))));
        theirs.write_all(b"with").unwrap();
        assert_eq!(attach_credentials(&ours), 0, "the option was set when it came");
    }

    /// The kernel answers for all of these, with a uid of -1.
    #[test]
    fn a_socket_without_a_local_process_at_its_end_has_no_peer() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        use std::net::{TcpListener, TcpStream, UdpSocket};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let unconnected = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let others: [OwnedFd; 5] = [listener.into(), tcp.into(), udp.into(), datagram.into(), unconnected];
        for other in others {
            for asked in [Peer::of(&other), Peer::credentials_of(&other), Peer::ids_of(&other)] {
                assert_eq!(asked.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
            }
        }
        let file = fs::File::open("/dev/null").unwrap();
        assert_eq!(Peer::of(&file).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
    }

    #[test]
    fn effective_ids_are_read_from_status() {
        let status = "Name:\tx\nUid:\t1000\t0\t1\t2\nGid:\t5\t6\t7\t8\nGroups:\t6 24 27 \n";
        assert_eq!(ids_of_status(status), Some((Uid::new(0), Gid::new(6), vec![6, 24, 27])));
    }

    #[test]
    fn more_groups_than_the_bound_are_counted_but_not_listed() {
        let told = |count: u32| {
            let mut peer = Peer::new(Uid::new(1), Gid::new(0), 1);
            peer.set_groups(count as usize, &(0..count).collect::<Vec<_>>());
            assert_eq!(peer.supplementary_groups(), count as usize);
            peer.groups.map(|groups| groups.len())
        };
        assert_eq!((told(0), told(1024), told(1025), told(65_536)), (Some(1), Some(1024), None, None));
        let same = united(Gid::new(5), [4, 4, 4, 5, 5, 6, 6].into_iter().map(Gid::new));
        assert_eq!(*same, [5, 4, 6].map(Gid::new), "equal ones are listed once");
    }

    #[test]
    fn what_does_not_fit_into_the_room_for_it_is_not_read() {
        let read = |size: u64, room: usize| {
            let mut file =
                fs::File::from(nix::sys::memfd::memfd_create(c"text", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(size).unwrap();
            read_all(&mut file, &mut vec![1; room]).map(<[u8]>::len)
        };
        assert_eq!((read(0, 10), read(9, 10), read(10, 10), read(1 << 40, 10)), (Some(0), Some(9), None, None));
    }

    #[test]
    fn a_label_of_odd_bytes_is_harmless_in_a_record() {
        assert_eq!(label_text(b"unconfined\0").as_deref(), Some("unconfined"));
        assert_eq!(label_text(b"a\nb\x1b]0;x\x07\xff\0").as_deref(), Some("a\\nb\\u{1b}]0;x\\u{7}\u{fffd}"));
        assert_eq!(label_text(b"\0"), None);
    }

    /// Stands for a kernel before 6.5, which has no SO_PEERPIDFD: the descriptor is what it would leave out.
    #[test]
    fn without_a_pidfd_there_are_neither_units_nor_a_command_name() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = Peer::credentials_of(&ours).unwrap();
        assert_eq!(peer.pid(), Some(std::process::id() as i32));
        assert_eq!(peer.read_proc("comm"), None);
        assert_eq!(peer.units(), None);
        let mut held = Peer::credentials_of(&ours).unwrap();
        held.open_pidfd(&ours);
        assert!(held.read_proc("comm").is_some(), "with one there is a name: the pid alone is not what is missing");
    }

    #[test]
    fn a_process_that_has_ended_has_no_facts() {
        use std::io::{Read, Write};
        use std::process::{Command, Stdio};

        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        use nix::unistd::Pid;
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Until it answers it may be on its way from this program to that one.
        child.stdin.as_ref().unwrap().write_all(b"?").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let peer = Peer::of_process(child.id() as i32).unwrap();
        assert_eq!(peer.read_proc("comm").as_deref(), Some("cat\n"));
        child.kill().unwrap();
        let (id, flags) = (Id::Pid(Pid::from_raw(child.id() as i32)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        waitid(id, flags).unwrap();
        // Until it is waited for, /proc goes on telling of it: only the pidfd does not.
        for file in ["comm", "loginuid", "cgroup"] {
            assert!(!fs::read(format!("/proc/{}/{file}", child.id())).unwrap().is_empty());
            assert_eq!(peer.read_proc(file), None);
        }
        assert_eq!((peer.login(), peer.units()), (Login::Unknown, None));
        child.wait().unwrap();
        assert_eq!(peer.read_proc("comm"), None);
    }
}
