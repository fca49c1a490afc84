//! Which systemd units a process runs in, read from the text of `/proc/PID/cgroup` (cgroups(7)).
//!
//! Pure: takes text, returns names. [`peer`](crate::peer) makes sure that the text belongs to the right process.
//!
//! systemd gives each unit a control group. Its path repeats the unit's place in the tree:
//!
//! ```text
//! /system.slice/backup.service
//! /user.slice/user-1000.slice/session-3.scope
//! /user.slice/user-1000.slice/user@1000.service/app.slice/mail.service
//! ```
//!
//! Read from the root: any number of slices, then one unit that holds processes. What lies below that
//! unit was named by the owner of the unit, not by the system's manager: a container may call
//! a group of its own `backup.service`. So names below count only in one case, `user@UID.service`,
//! and then as *that user's* units, which that user may name at will.
//!
//! A container manager that works beside systemd may make a control group called `web.slice` and give it away, and its
//! new owner may make `system.slice/backup.service` inside. The shape of a name is therefore not enough; a name counts
//! only in the place where systemd would put it:
//!
//! - a slice inside the slice that its name says (systemd.slice(5)): `a-b.slice` in `a.slice`, and one without a dash,
//!   such as `system.slice`, at the top;
//! - `init.scope` at the top;
//! - `user@UID.service`, as a manager, in `user.slice/user-UID.slice`, where its unit file puts it.
//!
//! The chain of names ends before the first one that is out of place.

use crate::ids::Uid;

/// The longest chain of units that is read: the names that count and the slashes before them, in bytes. Users choose the
/// names of their own units, and a path may have 4096 bytes. The longest paths of a desktop have about 200.
const LONGEST: usize = 1024;

/// The longest name of a unit (systemd.unit(5)).
const LONGEST_NAME: usize = 255;

/// The units around one process: the system manager's, and below `user@UID.service` that user's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    system: Vec<String>,
    user: Option<(Uid, Vec<String>)>,
}

impl Units {
    /// Reads the contents of `/proc/PID/cgroup`. `None` where it names no unit: for a process outside this
    /// control group namespace, and on a system without systemd.
    ///
    /// Where systemd has a hierarchy of its own (cgroup v1 and hybrid: `name=systemd`) that one counts, else the unified
    /// one (`0::`). systemd puts no process at the top of the former. A process there is in a system that uses the latter:
    /// one booted unified, in a container on a hybrid machine.
    pub(crate) fn from_proc_cgroup(text: &str) -> Option<Self> {
        let path_of = |wanted: fn(&str, &str) -> bool| {
            text.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':');
                let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
                wanted(number, controllers).then_some(path)
            })
        };
        let path = path_of(|_, controllers| controllers == "name=systemd")
            .filter(|path| *path != "/")
            .or_else(|| path_of(|number, controllers| number == "0" && controllers.is_empty()))?;
        Self::from_root(path)
    }

    /// Reads a control group's path, such as `/system.slice/backup.service`. One without a slash in front begins with
    /// a unit's name, which is put where systemd would put it: `user-1000.slice` into `user.slice`, and
    /// `user@1000.service` into that; a service alone has no slice around it. `None` where it does not begin with a
    /// unit in its place, and where the names are longer than 1024 bytes in all.
    ///
    /// ```
    /// use peergate::unit::Units;
    ///
    /// let units = Units::from_path("/user.slice/user-1000.slice/user@1000.service/app.slice/mail.service").unwrap();
    /// assert_eq!(units.system(), ["user.slice", "user-1000.slice", "user@1000.service"]);
    /// assert_eq!(units.name(), "mail.service");
    /// assert_eq!(Units::from_path("user@1000.service/app.slice/mail.service"), Some(units));
    /// assert!(Units::from_path("/docker/0123abcd").is_none());
    /// assert!(Units::from_path("/machine.slice/system.slice/backup.service").unwrap().name() == "machine.slice");
    /// ```
    pub fn from_path(path: &str) -> Option<Self> {
        let first = path.split('/').next().unwrap_or_default();
        // A slash in front leaves nothing before it.
        if first.is_empty() { Self::from_root(path) } else { Self::from_root(&format!("{}/{path}", place_of(first))) }
    }

    fn from_root(path: &str) -> Option<Self> {
        let mut components = path.split('/').filter(|component| !component.is_empty()).peekable();
        let system = branch(&mut components)?;
        let user = match manager_of(&system) {
            Some(uid) => Some((uid, branch(&mut components)?)),
            None => None,
        };
        let units = Self { system, user: user.filter(|(_, units)| !units.is_empty()) };
        let length: usize = units.names().map(|name| 1 + name.len()).sum();
        (length > 0 && length <= LONGEST).then_some(units)
    }

    /// The system manager's units around the process, outermost first: slices, then the unit itself.
    pub fn system(&self) -> &[String] {
        &self.system
    }

    /// Where the process belongs to a user's manager: the uid of that user, and that manager's units around the process,
    /// outermost first. The user chose these names.
    pub fn user(&self) -> Option<(Uid, &[String])> {
        self.user.as_ref().map(|(uid, units)| (*uid, units.as_slice()))
    }

    /// The innermost unit, as `systemctl status PID` would head its answer.
    pub fn name(&self) -> &str {
        let innermost = self.user.as_ref().map_or(&self.system, |(_, units)| units);
        innermost.last().map_or("", String::as_str)
    }

    /// The whole chain in the form that [`from_path`](Self::from_path) reads.
    pub fn to_path(&self) -> String {
        self.names().fold(String::new(), |path, unit| path + "/" + unit)
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        self.system.iter().chain(self.user.iter().flat_map(|(_, units)| units))
    }
}

/// Slices, then one unit that holds processes: as far as one manager's names go. `None` where the next name may or may
/// not be the manager's.
fn branch<'a>(components: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> Option<Vec<String>> {
    let mut units: Vec<String> = Vec::new();
    while let Some(component) = components.peek() {
        let name = unescape(component)?;
        let slice = units.last().map_or("", String::as_str);
        if !is_unit(name) || !is_in_place(name, slice) {
            break;
        }
        units.push(name.to_owned());
        components.next();
        if !name.ends_with(".slice") {
            break;
        }
    }
    Some(units)
}

/// Whether systemd would put the unit `name` into `slice`, which is empty for the manager's own control group.
fn is_in_place(name: &str, slice: &str) -> bool {
    match parent_of(name) {
        Some(parent) => parent == slice.strip_suffix(".slice").unwrap_or_default(),
        // A manager is in a scope of its own. Any other unit that holds processes can be configured to be in any slice.
        None => name != "init.scope" || slice.is_empty(),
    }
}

/// The slice around this one, without its suffix: `a` for `a-b.slice`, nothing for `a.slice`. `None` for other units.
fn parent_of(slice: &str) -> Option<&str> {
    let stem = slice.strip_suffix(".slice")?;
    Some(stem.rsplit_once('-').map_or("", |(parent, _)| parent))
}

/// The path of the control group around the unit `name`, as far as the name tells.
fn place_of(name: &str) -> String {
    let slices = |mut slice: String| {
        let mut path = String::new();
        while let Some(parent) = parent_of(&slice).filter(|parent| !parent.is_empty()) {
            slice = format!("{parent}.slice");
            path = format!("/{slice}{path}");
        }
        path
    };
    match manager(name) {
        Some(uid) => format!("/user.slice/user-{uid}.slice"),
        None => slices(name.to_owned()),
    }
}

/// systemd puts `_` before a name that would collide with the kernel's own files (`_cpu.service`), and before one that
/// begins so already. `None` where systemd 252 to 262 would not have put the `_`: a later version might,
/// for a controller that does not exist yet.
fn unescape(component: &str) -> Option<&str> {
    // With the controllers of cgroup v1.
    const KERNELS: [&str; 12] =
        ["cgroup", "cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices", "pids", "hugetlb", "misc", "rdma"];
    let Some(name) = component.strip_prefix('_') else { return Some(component) };
    let collides = KERNELS.iter().any(|kernels| name.strip_prefix(kernels).is_some_and(|rest| rest.starts_with('.')));
    (collides || name.starts_with(['_', '.']) || name.starts_with("bpf-")).then_some(name)
}

/// The unit types that can have a control group (systemd.resource-control(5)), and the characters that unit names are
/// made of (systemd.unit(5)). A user with the right to make control groups may give one any name: the name must not
/// read as several words of a record.
pub(crate) fn is_unit(component: &str) -> bool {
    let Some((name, suffix)) = component.rsplit_once('.') else { return false };
    let fits = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let fits_slice = || !name.split('-').any(str::is_empty) && !name.contains('@');
    !name.is_empty()
        && component.len() <= LONGEST_NAME
        && name.chars().all(fits)
        && match suffix {
            // Not `-.slice` either: that is the root, which has no name in a path.
            "slice" => fits_slice(),
            "service" | "scope" | "socket" | "mount" | "swap" => true,
            _ => false,
        }
}

/// The user of the manager at the end of this chain of units.
fn manager_of(system: &[String]) -> Option<Uid> {
    let [top, slice, unit] = system else { return None };
    let uid = manager(unit)?;
    (top == "user.slice" && *slice == format!("user-{uid}.slice")).then_some(uid)
}

/// The user of the manager `user@UID.service`.
fn manager(unit: &str) -> Option<Uid> {
    let text = unit.strip_prefix("user@")?.strip_suffix(".service")?;
    let uid: u32 = text.parse().ok()?;
    // Not +1000 or 01000, which are other units.
    (uid.to_string() == text).then_some(Uid::new(uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(text: &str) -> (Vec<String>, Option<(Uid, Vec<String>)>) {
        let units = Units::from_proc_cgroup(text).unwrap();
        (units.system, units.user)
    }

    #[test]
    fn a_system_service_is_its_slices_and_itself() {
        let (system, user) = units("0::/system.slice/system-getty.slice/getty@tty1.service\n");
        assert_eq!(system, ["system.slice", "system-getty.slice", "getty@tty1.service"]);
        assert_eq!(user, None);
    }

    #[test]
    fn a_users_unit_is_kept_apart_from_the_systems() {
        let (system, user) = units("0::/user.slice/user-1000.slice/user@1000.service/app.slice/mail.service/sub\n");
        assert_eq!(system, ["user.slice", "user-1000.slice", "user@1000.service"]);
        assert_eq!(user, Some((Uid::new(1000), vec!["app.slice".into(), "mail.service".into()])));
    }

    #[test]
    fn a_control_group_whose_name_no_unit_can_have_is_none() {
        let (system, user) = units("0::/user.slice/user-1.slice/user@1.service/a  9  root (0).slice/x.service\n");
        assert_eq!(system, ["user.slice", "user-1.slice", "user@1.service"]);
        assert_eq!(user, None);
        let too_long = format!("0::/a.slice/{}.service\n", "x".repeat(248));
        assert_eq!(units(&too_long).0, ["a.slice"]);
        assert_eq!(units(&too_long.replacen("xx", "x", 1)).0.len(), 2);
        assert_eq!(units("0::/a.slice/dev-disk-by\\x2dlabel-a:b.swap\n").0[1], "dev-disk-by\\x2dlabel-a:b.swap");
    }

    #[test]
    fn names_below_a_delegated_unit_do_not_count() {
        let (system, user) = units("0::/machine.slice/machine-web.scope/payload/system.slice/backup.service\n");
        assert_eq!(system, ["machine.slice", "machine-web.scope"]);
        assert_eq!(user, None);
    }

    #[test]
    fn systemds_own_hierarchy_tells_before_the_unified_one() {
        let (system, _) = units("4:memory:/elsewhere.slice\n1:name=systemd:/system.slice/a.service\n0::/b.slice\n");
        assert_eq!(system, ["system.slice", "a.service"]);
    }

    #[test]
    fn escaped_names_are_read_as_systemd_means_them() {
        for (written, name) in [
            ("_cpu.service", "cpu.service"),
            ("_cgroup.service", "cgroup.service"),
            ("__x.service", "_x.service"),
            ("_bpf-devices.service", "bpf-devices.service"),
        ] {
            assert_eq!(units(&format!("0::/system.slice/{written}\n")).0[1], name);
        }
    }

    #[test]
    fn an_escape_that_systemd_would_not_write_leaves_nothing_to_tell() {
        for path in [
            "/_system.slice/backup.service",
            "/system.slice/_backup.service",
            "/user.slice/user-1.slice/user@1.service/_app.slice/a.service",
        ] {
            assert_eq!(Units::from_path(path), None, "{path}");
        }
        // Below a unit a control group may have any name.
        assert_eq!(units("0::/system.slice/a.service/_b.service\n").0, ["system.slice", "a.service"]);
    }

    #[test]
    fn a_slice_counts_only_where_systemd_would_put_it() {
        for (path, system) in [
            // Delegated control groups that are called like slices.
            ("/web.slice/system.slice/backup.service", ["web.slice"].as_slice()),
            ("/web.slice/user.slice/user-1.slice/user@1.service/a.service", &["web.slice"]),
            ("/web.slice/-.slice/backup.service", &["web.slice"]),
            ("/system.slice/backup.slice/backup.service", &["system.slice"]),
            ("/a.slice/a-b-c.slice/x.service", &["a.slice"]),
            ("/a.slice/b-a.slice/x.service", &["a.slice"]),
            ("/a.slice/a-.slice/x.service", &["a.slice"]),
            ("/a.slice/a--b.slice/x.service", &["a.slice"]),
            ("/a.slice/a-b@c.slice/x.service", &["a.slice"]),
            ("/system.slice/init.scope", &["system.slice"]),
            ("/machine.slice/machine-web.scope/payload/init.scope", &["machine.slice", "machine-web.scope"]),
            ("/system.slice/web.service/web.slice/backup.service", &["system.slice", "web.service"]),
            // Where they belong.
            ("/a.slice/a-b.slice/a-b-c.slice/x.service", &["a.slice", "a-b.slice", "a-b-c.slice", "x.service"]),
            ("/a.slice/a-b\\x2dc.slice/x.scope", &["a.slice", "a-b\\x2dc.slice", "x.scope"]),
            ("/init.scope", &["init.scope"]),
            ("/dev-hugepages.mount", &["dev-hugepages.mount"]),
        ] {
            let units = Units::from_path(path).unwrap();
            assert_eq!(units.system(), system, "{path}");
            assert_eq!(units.user(), None, "{path}");
        }
        for path in
            ["/-.slice/a.service", "/a-b.slice/x.service", "/user-1.slice/session-3.scope", "/-a.slice/x.service"]
        {
            assert_eq!(Units::from_path(path), None, "{path}");
        }
    }

    #[test]
    fn a_users_manager_counts_only_in_that_users_slice() {
        for manager in [
            "/system.slice/user@1000.service",
            "/user@1000.service",
            "/user.slice/user@1000.service",
            "/user.slice/user-1001.slice/user@1000.service",
            "/user.slice/user-1000.slice/user@01000.service",
            "/user.slice/user-1000.slice/user@+1000.service",
            "/user.slice/user-1000.slice/user-1000-x.slice/user@1000.service",
        ] {
            assert_eq!(Units::from_path(&format!("{manager}/mail.service")).unwrap().user(), None, "{manager}");
        }
        let (_, user) = units("0::/user.slice/user-1.slice/user@1.service/app.slice/app-a.slice/a.service\n");
        assert_eq!(user, Some((Uid::new(1), vec!["app.slice".into(), "app-a.slice".into(), "a.service".into()])));
        // The same holds inside, and a manager in there is a unit like any other.
        for (below, expected) in [
            ("x.slice/system.slice/a.service", ["x.slice"].as_slice()),
            ("init.scope", &["init.scope"]),
            ("user.slice/user-2.slice/user@2.service/a.service", &["user.slice", "user-2.slice", "user@2.service"]),
        ] {
            let (_, user) = units(&format!("0::/user.slice/user-1.slice/user@1.service/{below}\n"));
            assert_eq!(user.unwrap().1, expected);
        }
    }

    #[test]
    fn a_chain_longer_than_a_page_of_text_is_not_told() {
        let mut path = "/user.slice/user-1.slice/user@1.service".to_owned();
        let mut slice = String::from("a");
        while path.len() + slice.len() + 7 <= LONGEST {
            path = format!("{path}/{slice}.slice");
            slice += "-a";
        }
        assert!(Units::from_path(&path).is_some_and(|units| units.to_path() == path));
        assert_eq!(Units::from_path(&format!("{path}/{slice}.slice")), None);
        // What does not count may be as long as it likes.
        assert!(Units::from_path(&format!("/system.slice/a.service{}", "/x.slice".repeat(500))).is_some());
    }

    #[test]
    fn a_name_alone_is_put_where_systemd_would_put_it() {
        for (name, path) in [
            ("backup.service", "/backup.service"),
            ("system.slice/backup.service", "/system.slice/backup.service"),
            ("user-1.slice/session-3.scope", "/user.slice/user-1.slice/session-3.scope"),
            ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"),
            ("user@1.service/a.service", "/user.slice/user-1.slice/user@1.service/a.service"),
        ] {
            assert_eq!(Units::from_path(name).map(|units| units.to_path()).as_deref(), Some(path));
        }
    }

    #[test]
    fn what_is_no_unit_gives_none() {
        for text in [
            "",
            "0::/\n",
            "0::/../other.slice\n",
            "nonsense",
            "0::/docker/abc\n",
            "0::/.slice\n",
            "0::/a b.service\n",
            "0::/\u{e4}.slice\n",
        ] {
            assert_eq!(Units::from_proc_cgroup(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_innermost_unit_names_the_process() {
        assert_eq!(Units::from_path("/user.slice/user-1.slice/session-3.scope").unwrap().name(), "session-3.scope");
        assert_eq!(Units::from_path("backup.service").unwrap().name(), "backup.service");
    }
}
