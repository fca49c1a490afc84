//! The most memory that connections can take, and what the control group allows.
//!
//! The memory of a connection is bounded at rest and while its peer does not read; a restart needs the most, because the
//! state of each connection is written for the next process while this one still holds it. All of it is charged to the
//! service's control group, also what waits in the kernel for a peer to read it. What a peer has sent and the service has not
//! read is charged to the peer.

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};
use peergate::policy::Kind;

use crate::config::Config;
use crate::protocol::Protocol;
use crate::service::MOST_WORKERS;

/// What the process takes besides its connections: the program, its threads, records that wait, connections being closed.
const PROCESS: u64 = 24 << 20;
/// What a worker takes besides its connections: buffers, a stack.
const WORKER: u64 = 1 << 20;
/// What every connection takes: its socket, its descriptor, its entries in the kernel and here. At rest it takes nothing else.
const CONNECTION: u64 = 5 * 1024;
/// The longest piece in which the kernel takes what is written, with what it needs to keep it.
const LONGEST_PIECE: u64 = 37 * 1024;
const PAGE: u64 = 4096;

/// The most that one connection takes besides what every connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// What the peer has not read.
    pub to_peer: Unread,
    /// What is not read at the second descriptor ([`Protocol::second`]), where there is one: it is another connection.
    pub to_second: Option<Unread>,
    /// The state that a restart writes for the next process, in bytes.
    pub state: usize,
}

/// What one end of a connection has not read, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread {
    /// What the protocol holds, in one buffer.
    pub held: usize,
    /// The send buffer (SO_SNDBUF, socket(7)): what the kernel takes before the other end has read. It counts what it needs
    /// to keep the bytes, not the bytes alone. `None`: as the system has it.
    pub send_buffer: Option<usize>,
}

impl Footprint {
    /// What the whole connection takes at most.
    pub fn worst(self) -> u64 {
        let second = self.to_second.map_or(0, |unread| CONNECTION.saturating_add(unread.worst()));
        CONNECTION.saturating_add(self.to_peer.worst()).saturating_add(second).saturating_add(pages(self.state))
    }
}

impl Unread {
    fn worst(self) -> u64 {
        // Buffers of this size are mapped one by one, with a page for their head.
        let held = if self.held > 0 { pages(self.held).saturating_add(PAGE) } else { 0 };
        let send_buffer = self.send_buffer.unwrap_or_else(default_send_buffer) as u64;
        // The kernel takes one more piece as long as the buffer is not full.
        send_buffer.saturating_add(LONGEST_PIECE.min(send_buffer / 2 + 1024)).saturating_add(held)
    }
}

fn pages(bytes: usize) -> u64 {
    (bytes as u64).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// What a new socket has. A sandbox may hide net.core.wmem_default, so a socket is asked.
fn default_send_buffer() -> usize {
    let asked = UnixStream::pair().ok().and_then(|(socket, _)| getsockopt(&socket, sockopt::SndBuf).ok());
    asked.unwrap_or(208 * 1024)
}

/// What the service needs where every connection takes the most. `None`: the protocol does not say what that is.
pub fn need<P: Protocol>(config: &Config<P>) -> Option<u64> {
    let mut rules = Vec::new();
    for rule in config.policy.rules().filter(|rule| rule.name().kind() == Kind::Allow) {
        let terms = rule.terms();
        let per_user = terms.connections_per_user.map_or(config.limits.connections_per_user as u64, u64::from);
        let most = rule.most_users().map_or(u64::MAX, |users| users.saturating_mul(per_user));
        rules.push((P::footprint(&config.settings, &terms.own)?.worst(), most));
    }
    // The largest connections take as many places as they can.
    rules.sort_unstable_by_key(|(worst, _)| std::cmp::Reverse(*worst));
    let mut places = config.limits.connections as u64;
    let connections = rules.into_iter().fold(0_u64, |sum, (worst, most)| {
        let taken = most.min(places);
        places -= taken;
        sum.saturating_add(worst.saturating_mul(taken))
    });
    let workers = config.service.workers.map_or(MOST_WORKERS, NonZeroUsize::get) as u64;
    Some(connections.saturating_add(PROCESS).saturating_add(workers.saturating_mul(WORKER)))
}

/// That the limit of a control group is below what the configuration needs.
pub fn shortage<P: Protocol>(config: &Config<P>, limit: Option<u64>) -> Option<String> {
    let (need, limit) = (need(config)?, limit?);
    (limit < need).then(|| {
        format!(
            "[limits] connections = {} needs up to {} of memory if nothing is read, the control group's limit is {} (MemoryMax=)",
            config.limits.connections,
            mebibytes(need),
            mebibytes(limit)
        )
    })
}

/// Rounded up, in systemd's way to write it.
pub fn mebibytes(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}

/// The limit on this process's memory: the lowest of its control groups.
pub fn own_limit() -> Option<u64> {
    limit_of(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The limit of the system's unit of this name, while the unit is active; of a template, of its instance.
pub fn limit_of_unit(unit: &str, instance: Option<&str>) -> Option<u64> {
    let path = path_of_unit(unit, instance);
    limit_of(Path::new("/sys/fs/cgroup"), &format!("1:memory:{path}\n0::{path}\n"))
}

fn path_of_unit(unit: &str, instance: Option<&str>) -> String {
    let Some(template) = unit.strip_suffix('@') else { return format!("/system.slice/{unit}.service") };
    // Instances have a slice for each template (Slice=, systemd.unit(5)).
    format!("/system.slice/system-{template}.slice/{unit}{}.service", instance.unwrap_or_default())
}

/// `groups` is a process's cgroup file (cgroups(7)). A limit of a group counts for all groups below it.
fn limit_of(mount: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (controllers, path) = (fields.nth(1)?, fields.next()?.trim_start_matches('/'));
        let (root, file): (PathBuf, _) = match controllers {
            "" => (mount.to_path_buf(), "memory.max"),
            // Version 1. Without a limit it is the largest number of pages.
            _ if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        let group = root.join(path);
        let on_the_way = group.ancestors().take_while(|group| group.starts_with(&root));
        on_the_way.filter_map(|group| fs::read_to_string(group.join(file)).ok()?.trim().parse().ok()).min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_on_the_way_to_the_group_counts() {
        let mount = nix::unistd::mkdtemp(&std::env::temp_dir().join("peergate-memory-XXXXXX")).unwrap();
        let put = |path: &str, text: &str| {
            let path = mount.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("system.slice/echo.service/memory.max", "max\n");
        assert_eq!(limit_of(&mount, "0::/system.slice/echo.service\n"), None);
        put("system.slice/memory.max", "1000000\n");
        assert_eq!(limit_of(&mount, "0::/system.slice/echo.service\n"), Some(1_000_000));
        put("system.slice/echo.service/memory.max", "4096\n");
        assert_eq!(limit_of(&mount, "1:cpu:/a\n0::/system.slice/echo.service\n"), Some(4096));
        put("memory/a/b/memory.limit_in_bytes", "8192\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        for (groups, limit) in
            [("5:cpu,memory:/a/b\n0::/\n", 8192), ("5:memory:/\n0::/gone\n", 9_223_372_036_854_771_712)]
        {
            assert_eq!(limit_of(&mount, groups), Some(limit));
        }
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn the_control_group_of_an_instance_lies_in_its_templates_slice() {
        assert_eq!(path_of_unit("echo", None), "/system.slice/echo.service");
        let path = path_of_unit("peergate@", Some("docker"));
        assert_eq!(path, "/system.slice/system-peergate.slice/peergate@docker.service");
    }

    #[test]
    fn a_second_descriptor_counts_as_another_connection() {
        let to_peer = Unread { held: 1, send_buffer: Some(8192) };
        let one = Footprint { to_peer, to_second: None, state: 1 }.worst();
        assert_eq!(one, CONNECTION + 8192 + 5120 + 2 * PAGE + PAGE);
        let two = Footprint { to_peer, to_second: Some(Unread { held: 0, send_buffer: Some(400) }), state: 1 }.worst();
        assert_eq!(two - one, CONNECTION + 400 + 1224);
        let as_the_system_has_it = Unread { held: 0, send_buffer: None }.worst();
        assert!(as_the_system_has_it > LONGEST_PIECE, "{as_the_system_has_it}");
    }

    #[test]
    fn the_largest_connections_take_as_many_places_as_their_rules_allow() {
        use crate::terms::Terms;
        use crate::testing::{LineTerms, Lines};
        use peergate::ids::Uid;
        use peergate::policy::{Policy, Rule, User};
        let mut config = Config::<Lines>::without_file(Uid::new(1000));
        config.service.workers = NonZeroUsize::new(2);
        let worst = |held| {
            let to_peer = Unread { held, send_buffer: Some(0) };
            Footprint { to_peer, to_second: None, state: 0 }.worst()
        };
        let base = PROCESS + 2 * WORKER;
        assert_eq!(need(&config), Some(base + 64 * worst(65_536)), "one user alone has no more places");
        let own = |line_length, connections_per_user| Terms {
            own: LineTerms { line_length: Some(line_length) },
            connections_per_user,
            ..Terms::default()
        };
        let large =
            Rule::allow("large", own(1 << 20, Some(3))).users([User::Me, User::Range(Uid::new(5), Uid::new(6))]);
        let small = Rule::allow("small", own(100, None)).groups([peergate::ids::Gid::new(4)]);
        config.policy = std::sync::Arc::new(Policy::new([small, large], Uid::new(1000)).unwrap());
        config.limits.connections = 100;
        let expected = base + 9 * worst(1 << 20) + 91 * worst(100);
        assert_eq!(need(&config), Some(expected));
        assert_eq!(shortage(&config, Some(expected)), None);
        let text = shortage(&config, Some(20 << 20)).unwrap();
        assert!(
            text.starts_with("[limits] connections = 100 needs up to ") && text.contains(" limit is 20M "),
            "{text}"
        );
    }
}
