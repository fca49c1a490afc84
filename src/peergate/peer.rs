//! A socket becomes a [`Peer`]: what the kernel vouches for about the process on the other end.
//!
//! Sole user of the credentials' socket options (unix(7), socket(7)). Knows the kernel, not the policy.
//!
//! | fact | from | fixed when | since |
//! | --- | --- | --- | --- |
//! | effective uid, gid; pid | SO_PEERCRED | connect(2) | Linux 2.2 |
//! | supplementary groups | SO_PEERGROUPS | connect(2) | Linux 4.13 |
//! | the process itself | SO_PEERPIDFD | connect(2) | Linux 6.5 |
//! | units, command name | /proc/PID, tied to the process by its pidfd | asked | |
//! | security label | SO_PEERSEC | connect(2) | Linux 2.6.2 |
//!
//! A pid is only a number, and is given to another process once its owner has been waited for. So
//! whatever is read from `/proc/PID` counts only if the pidfd shows afterwards that the process had
//! not ended in the meantime: until then its number cannot have passed on.
//!
//! A peer chooses how many groups it has, how deep in the control group tree it is, and sometimes its label, and it is
//! asked about on threads that all connections share. So each answer is read into room of a fixed size, and one that
//! does not fit in cannot be told.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{UnixAddr, getpeername, getsockopt, setsockopt, sockopt};

use crate::escape::printable;
use crate::ids::{Gid, OVERFLOW_ID, Uid};
use crate::subject::Subject;
use crate::sys;
use crate::unit::Units;

impl Uid {
    /// The user whose rights this process uses (geteuid(2)): whom [`User::Me`](crate::policy::User::Me) usually
    /// stands for.
    pub fn effective() -> Self {
        Self::new(nix::unistd::geteuid().as_raw())
    }
}

/// The longest list of supplementary groups that can be told. Of a longer one only the number is told: it fulfils no
/// allow rule by groups, and a deny rule by groups counts as matched.
///
/// setgroups(2) takes 65,536 groups, even the same one so many times, and where newgidmap(1) is installed any user may
/// call it in a user namespace. The lists that directories give are shorter than this: a Windows domain, the richest
/// source of groups in practice, gives a user 1,015 at most (its access token has room for 1,024).
pub const MOST_GROUPS: usize = 1024;

/// How much of a file below /proc/PID is read: four control groups' paths of the greatest length, far more than the
/// dozen short ones that there are, and any command name.
const MOST_PROC: usize = 16 * 1024;

/// How long a label may be. Those of Smack have 255 bytes at most, and a usual one of SELinux some 60.
const MOST_LABEL: usize = 1024;

/// Room for /proc/PID/status: NGROUPS_MAX groups of 11 characters, and what stands around them.
const MOST_STATUS: u64 = 1024 * 1024;

/// Who is on the other end of a connected AF_UNIX socket, as of connect(2).
#[derive(Debug)]
pub struct Peer {
    uid: Uid,
    gid: Gid,
    /// The effective gid first, then the supplementary ones; no neighbours alike. `None`: not known.
    groups: Option<Box<[Gid]>>,
    /// How many supplementary groups the kernel counts; 0 until it was asked.
    supplementary: u32,
    pid: i32,
    pidfd: Option<OwnedFd>,
    units: OnceLock<Option<Box<Units>>>,
    lacked_descriptors: AtomicBool,
}

/// What a record tells about a peer beyond its ids. Each is absent where it could not be tied to the
/// very process that connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Details {
    /// The command name of the process, `/proc/PID/comm`, with anything unprintable escaped.
    pub comm: Option<String>,
    /// The innermost systemd unit that it runs in.
    pub unit: Option<String>,
    /// Its label in the system's security module, with anything unprintable escaped.
    pub label: Option<String>,
}

impl Peer {
    /// Asks the kernel everything that a policy may want to know of the peer of `socket`.
    ///
    /// Holds a descriptor (the pidfd) until [`release_process`](Self::release_process) or drop.
    ///
    /// Asked of a listening socket the kernel tells of whoever made it listen, and of a pair (socketpair(2)) who made
    /// that: ask what [`accept`](crate::Listener::accept) returned.
    ///
    /// # Errors
    /// ENOTCONN where the kernel names nobody, as for a socket that is not connected, or not of AF_UNIX; else what
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
        peer.hold_process(socket);
        Ok(peer)
    }

    /// As [`of`](Self::of), without the process: two system calls, no descriptor, but no units either.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn credentials_of(socket: &impl AsFd) -> io::Result<Self> {
        let mut peer = Self::ids_of(socket)?;
        peer.learn_groups(socket);
        Ok(peer)
    }

    /// As [`of`](Self::of), without process and supplementary groups: one system call. Until
    /// [`learn_groups`](Self::learn_groups) the groups are incomplete, which no policy that asks for them takes for
    /// less.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub(crate) fn ids_of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
        // Where there is no peer the answer is no error, but -1, which is no user (setreuid(2)).
        if credentials.uid() == u32::MAX {
            return Err(Errno::ENOTCONN.into());
        }
        let (uid, gid) = (known_uid(credentials.uid()), known_gid(credentials.gid()));
        let pid = credentials.pid();
        let lacked_descriptors = AtomicBool::new(false);
        let units = OnceLock::new();
        Ok(Self { uid, gid, groups: None, supplementary: 0, pid, pidfd: None, units, lacked_descriptors })
    }

    /// Asks for the supplementary groups, unless they are known. They are fixed at connect: to ask later
    /// gives the same answer. Where the kernel gives none, or more than [`MOST_GROUPS`], they stay incomplete.
    pub(crate) fn learn_groups(&mut self, socket: &impl AsFd) {
        if self.groups.is_some() {
            return;
        }
        let mut room = [0; MOST_GROUPS];
        let Ok(count) = sys::peer_groups(socket.as_fd(), &mut room) else { return };
        self.supplementary = u32::try_from(count).unwrap_or(u32::MAX);
        self.groups = room.get(..count).map(|groups| united(self.gid, groups.iter().copied().map(known_gid)));
    }

    /// Lets go of the groups. Only a decision and its record need them.
    pub fn forget_groups(&mut self) {
        self.groups = None;
    }

    /// How many supplementary groups the kernel counted when it was last asked. Where there are more than
    /// [`MOST_GROUPS`] of them, it counted them and no more is known.
    pub fn supplementary_groups(&self) -> usize {
        self.supplementary as usize
    }

    /// Takes hold of the process that connected, so that its units can be told. Without effect on
    /// kernels before 6.5, for a peer in another pid namespace and (before 6.16) for one that has been
    /// waited for already: such a peer has no units.
    pub(crate) fn hold_process(&mut self, socket: &impl AsFd) {
        if self.pidfd.is_none() && self.pid > 0 {
            let pidfd = getsockopt(&socket.as_fd(), sockopt::PeerPidfd);
            self.pidfd = pidfd.map_err(|error| self.note_lack(error)).ok();
        }
    }

    /// Whether something is not known only because there was no descriptor to ask with, since this was last called: to
    /// ask again, when there is one, may give another answer.
    pub(crate) fn lacked_descriptors(&self) -> bool {
        self.lacked_descriptors.swap(false, Ordering::Relaxed)
    }

    fn note_lack(&self, error: Errno) {
        if matches!(error, Errno::EMFILE | Errno::ENFILE) {
            self.lacked_descriptors.store(true, Ordering::Relaxed);
        }
    }

    /// Lets go of the process, and with it of the descriptor. Units that were asked for stay known.
    pub fn release_process(&mut self) {
        self.pidfd = None;
    }

    /// A live process as it would be judged if it connected now: its effective ids and groups from
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
        // The process chose its name, which is in there too.
        let ids = ids_of_status(&String::from_utf8_lossy(&status))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        if has_ended(pidfd.as_fd()) {
            return Err(gone());
        }
        let (uid, gid, supplementary, groups) = ids;
        let (units, lacked_descriptors) = (OnceLock::new(), AtomicBool::new(false));
        Ok(Self { uid, gid, groups, supplementary, pid, pidfd: Some(pidfd), units, lacked_descriptors })
    }

    /// The effective user id.
    pub fn uid(&self) -> Uid {
        self.uid
    }

    /// The effective group id.
    pub fn gid(&self) -> Gid {
        self.gid
    }

    /// The effective group id and, as far as they are known, all supplementary ones. The gate asks for them where the
    /// policy depends on them, and lets go of them after the decision; [`details`](Self::details) asks for them again.
    pub fn gids(&self) -> &[Gid] {
        self.groups.as_deref().unwrap_or(std::slice::from_ref(&self.gid))
    }

    /// The process id as this pid namespace numbers it; `None` for a peer that has none here.
    pub fn pid(&self) -> Option<i32> {
        (self.pid > 0).then_some(self.pid)
    }

    /// The systemd units around the process; `None` where they cannot be tied to it. Read at the first
    /// call, and then remembered, unless there was no descriptor to read with.
    pub fn units(&self) -> Option<&Units> {
        if let Some(known) = self.units.get() {
            return known.as_deref();
        }
        let read = self.read_proc("cgroup").and_then(|text| Units::from_proc_cgroup(&text)).map(Box::new);
        // The question was not asked: there is no answer to remember.
        if read.is_none() && self.lacked_descriptors.load(Ordering::Relaxed) {
            return None;
        }
        self.units.get_or_init(|| read).as_deref()
    }

    /// Sets what [`units`](Self::units) answers, for a connection that another process judged before us.
    pub fn remember_units(&self, units: Option<Units>) {
        let _ = self.units.set(units.map(Box::new));
    }

    /// The units, if they were asked for already.
    pub fn remembered_units(&self) -> Option<&Units> {
        self.units.get().and_then(Option::as_deref)
    }

    /// What a record tells beyond the ids; learns the groups too. Costs several system calls: ask only where one is
    /// written.
    pub fn details(&mut self, socket: &impl AsFd) -> Details {
        self.hold_process(socket);
        self.learn_groups(socket);
        Details {
            comm: self.read_proc("comm").map(|comm| printable(comm.strip_suffix('\n').unwrap_or(&comm))),
            unit: self.units().map(|units| printable(units.name())),
            label: sys::peer_label(socket.as_fd(), &mut [0; MOST_LABEL]).ok().and_then(label_text),
        }
    }

    /// Reads a file below /proc/PID, and makes sure that the process it told of is ours.
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
}

/// Reads from a socket that has SO_PASSCRED (unix(7)): see [`Stream::receive`](crate::Stream::receive). Descriptors that
/// come along are closed: look for them before.
pub(crate) fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Option<Uid>)> {
    let (count, sender) = sys::receive(socket.as_fd(), buffer)?;
    Ok((count, sender.map(|sender| known_uid(sender.uid)).filter(|uid| uid.is_known())))
}

/// Sets SO_PASSCRED on a connection just accepted. Returns within how many bytes, from the first on, some may have come
/// without credentials because the option was not set yet; 0 where it was inherited. None that come later are without.
pub(crate) fn attach_credentials(socket: &impl AsFd) -> usize {
    let fd = socket.as_fd();
    if getsockopt(&fd, sockopt::PassCred) == Ok(true) {
        return 0;
    }
    // Where it fails every sender is unknown, which the application takes for a stranger.
    let _ = setsockopt(&fd, sockopt::PassCred, &true);
    // Whoever sends looks at the option and fills the queue under a lock of this socket. To tell the peer's address the
    // kernel takes the same lock: after that, who still found the option unset has their data in the queue, to be counted.
    let _ = getpeername::<UnixAddr>(fd.as_raw_fd());
    sys::unread(fd).unwrap_or(0)
}

/// The whole of a file; `None` where it cannot be read, or may not have ended where the room does.
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
/// Where the question itself fails, the answer is the safe one.
fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut question = [PollFd::new(pidfd, PollFlags::POLLIN)];
    !matches!(poll(&mut question, PollTimeout::ZERO), Ok(0))
}

/// Reads the effective uid, the effective gid, the number of groups and the groups from the text of /proc/PID/status,
/// proc(5).
#[allow(clippy::type_complexity)]
fn ids_of_status(status: &str) -> Option<(Uid, Gid, u32, Option<Box<[Gid]>>)> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let effective = |name| field(name)?.split_whitespace().nth(1)?.parse::<u32>().ok();
    let uid = known_uid(effective("Uid")?);
    let gid = known_gid(effective("Gid")?);
    let groups: Result<Vec<u32>, _> = field("Groups")?.split_whitespace().map(str::parse).collect();
    let groups = groups.ok()?;
    let count = u32::try_from(groups.len()).unwrap_or(u32::MAX);
    let told = groups.len() <= MOST_GROUPS;
    Some((uid, gid, count, told.then(|| united(gid, groups.into_iter().map(known_gid)))))
}

/// The effective gid is not among what the kernel calls the groups, or only by chance. It sorts them (setgroups(2)), so
/// that those alike are neighbours.
fn united(gid: Gid, supplementary: impl Iterator<Item = Gid>) -> Box<[Gid]> {
    let mut groups: Vec<Gid> = std::iter::once(gid).chain(supplementary.filter(|other| *other != gid)).collect();
    groups.dedup();
    groups.into()
}

/// The administrator may have moved the overflow ids; to everyone else they are [`OVERFLOW_ID`].
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

/// How much of `/proc/self/uid_map` and `gid_map` is missing: a process in a user namespace that does not
/// map every id sees all the others as [`OVERFLOW_ID`] (user_namespaces(7)).
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
    fn what_came_before_credentials_were_attached_is_counted_and_what_comes_after_has_them() {
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

    /// The kernel answers for them all, with nobody's credentials.
    #[test]
    fn a_socket_that_is_no_connection_to_a_local_process_has_no_peer() {
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
        let (uid, gid, count, gids) = ids_of_status(status).unwrap();
        assert_eq!((uid, gid, count), (Uid::new(0), Gid::new(6), 3));
        assert_eq!(&*gids.unwrap(), [Gid::new(6), Gid::new(24), Gid::new(27)]);
    }

    #[test]
    fn a_list_of_groups_is_told_up_to_the_bound_and_counted_beyond_it() {
        let groups = |count: u32| {
            let list = (0..count).map(|gid| gid.to_string()).collect::<Vec<_>>().join(" ");
            let (_, _, counted, groups) =
                ids_of_status(&format!("Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t{list} \n")).unwrap();
            assert_eq!(counted, count);
            groups.map(|groups| groups.len())
        };
        assert_eq!((groups(0), groups(1024), groups(1025), groups(65_536)), (Some(1), Some(1024), None, None));
        let same = united(Gid::new(5), [4, 4, 4, 5, 5, 6, 6].into_iter().map(Gid::new));
        assert_eq!(*same, [5, 4, 6].map(Gid::new), "those alike need no room of their own");
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
        held.hold_process(&ours);
        assert!(held.read_proc("comm").is_some(), "with one there is a name: the pid alone is not what is missing");
    }

    #[test]
    fn a_process_that_has_ended_has_no_facts() {
        use std::io::{Read, Write};
        use std::process::{Command, Stdio};
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Until it answers it may be on its way from this program to that one.
        child.stdin.as_ref().unwrap().write_all(b"?").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let peer = Peer::of_process(child.id() as i32).unwrap();
        assert_eq!(peer.read_proc("comm").as_deref(), Some("cat\n"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(peer.read_proc("comm"), None);
    }
}
