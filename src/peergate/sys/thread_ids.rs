//! The ids and capabilities of the calling thread alone. Raw calls: the functions of the C library change every thread.

use std::io;

use nix::errno::Errno;

/// The numbers of the system calls whose ids are of 32 bits (setuid(2), "C library/kernel differences").
#[cfg(any(target_arch = "x86", target_arch = "arm"))]
mod number {
    pub(super) use libc::{SYS_setgroups32 as SETGROUPS, SYS_setresgid32 as SETRESGID, SYS_setresuid32 as SETRESUID};
}
#[cfg(not(any(target_arch = "x86", target_arch = "arm")))]
mod number {
    pub(super) use libc::{SYS_setgroups as SETGROUPS, SYS_setresgid as SETRESGID, SYS_setresuid as SETRESUID};
}

/// "Not changed" among the arguments of setresuid(2).
const UNCHANGED: libc::uid_t = libc::uid_t::MAX;

/// setresuid(2) of the effective uid, for the calling thread alone. glibc's function would change every thread.
pub(crate) fn set_thread_uid(uid: u32) -> io::Result<()> {
    // SAFETY: takes three integers, writes no memory.
    Errno::result(unsafe { libc::syscall(number::SETRESUID, UNCHANGED, uid, UNCHANGED) })?;
    Ok(())
}

/// setresgid(2) of the effective gid, for the calling thread alone.
pub(crate) fn set_thread_gid(gid: u32) -> io::Result<()> {
    // SAFETY: takes three integers, writes no memory.
    Errno::result(unsafe { libc::syscall(number::SETRESGID, UNCHANGED, gid, UNCHANGED) })?;
    Ok(())
}

/// setgroups(2), for the calling thread alone.
pub(crate) fn set_thread_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads as many ids as there are.
    Errno::result(unsafe { libc::syscall(number::SETGROUPS, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// getgroups(2): the supplementary groups of the calling thread.
pub(crate) fn thread_groups() -> io::Result<Vec<u32>> {
    // SAFETY: with no room the kernel writes nothing and tells how many there are.
    let count = Errno::result(unsafe { libc::getgroups(0, std::ptr::null_mut()) })?;
    let mut groups = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for `count` ids; if there are more by now, the kernel writes none and fails.
    let count = Errno::result(unsafe { libc::getgroups(count, groups.as_mut_ptr()) })?;
    groups.truncate(usize::try_from(count).unwrap_or(0));
    Ok(groups)
}

/// As capget(2) and capset(2) have it, version 3.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// CAP_SETGID and CAP_SETUID, of the first 32 (capabilities(7)).
const SET_IDS: u32 = 1 << 6 | 1 << 7;

fn capabilities() -> io::Result<[CapabilitySets; 2]> {
    let mut header = CapabilityHeader { version: 0x2008_0522, pid: 0 };
    let mut sets = [CapabilitySets::default(); 2];
    // SAFETY: version 3 has two sets; header and sets outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    Ok(sets)
}

/// Whether the calling thread has CAP_SETUID and CAP_SETGID, or can raise them.
pub(crate) fn may_set_ids() -> io::Result<bool> {
    Ok(capabilities()?[0].permitted & SET_IDS == SET_IDS)
}

/// Makes CAP_SETUID and CAP_SETGID effective for the calling thread, if they are not.
pub(crate) fn raise_set_ids() -> io::Result<()> {
    let mut sets = capabilities()?;
    if sets[0].effective & SET_IDS == SET_IDS {
        return Ok(());
    }
    sets[0].effective |= SET_IDS;
    let mut header = CapabilityHeader { version: 0x2008_0522, pid: 0 };
    // SAFETY: version 3 has two sets; the kernel reads both.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) })?;
    Ok(())
}

/// PR_SET_KEEPCAPS (prctl(2)), of the calling thread: its permitted capabilities stay when its last uid of root's goes.
pub(crate) fn keep_capabilities() -> io::Result<()> {
    // SAFETY: takes integers, writes no memory.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })?;
    raise_set_ids()
}
