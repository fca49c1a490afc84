//! Which systemd units a process runs in, read from the text of `/proc/PID/cgroup` (cgroups(7)).
//!
//! Pure: takes text, returns names. Whether the text belongs to the right process is
//! [`peer`](crate::peer)'s business.
//!
//! systemd gives each unit a control group whose path repeats the unit's place in the tree:
//!
//! ```text
//! /system.slice/backup.service
//! /user.slice/user-1000.slice/session-3.scope
//! /user.slice/user-1000.slice/user@1000.service/app.slice/mail.service
//! ```
//!
//! Read from the root: any number of slices, then one unit that holds processes. What lies below that
//! unit was named by whoever the unit belongs to, not by the system's manager: a container may call
//! a group of its own `backup.service`. So names below count only in one case, `user@UID.service`,
//! and then as *that user's* units, which that user may name at will.

use crate::ids::Uid;

/// The units around one process: the system manager's, and below `user@UID.service` that user's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    system: Vec<String>,
    user: Option<(Uid, Vec<String>)>,
}

impl Units {
    /// Reads the contents of `/proc/PID/cgroup`. `None` where no unit can be made out: a process
    /// outside this control group namespace, a system without systemd.
    ///
    /// Where systemd has a hierarchy of its own (cgroup v1 and hybrid: `name=systemd`) that one
    /// tells, else the unified one (`0::`). A process at the very top of the former, where systemd puts none, is
    /// in a system that uses the latter: one booted unified, in a container on a hybrid machine.
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
        Self::from_path(path)
    }

    /// Reads a control group's path, such as `/system.slice/backup.service`. A bare unit name is a
    /// path of one component. `None` where it does not begin with a unit.
    ///
    /// ```
    /// use peergate::unit::Units;
    ///
    /// let units = Units::from_path("/user.slice/user-1000.slice/user@1000.service/app.slice/mail.service").unwrap();
    /// assert_eq!(units.system(), ["user.slice", "user-1000.slice", "user@1000.service"]);
    /// assert_eq!(units.name(), "mail.service");
    /// assert!(Units::from_path("/docker/0123abcd").is_none());
    /// ```
    pub fn from_path(path: &str) -> Option<Self> {
        let mut components = path.split('/').filter(|c| !c.is_empty()).map(unescape).peekable();
        let system = branch(&mut components);
        let user = system.last().and_then(|unit| manager_of(unit)).map(|uid| (uid, branch(&mut components)));
        let user = user.filter(|(_, units)| !units.is_empty());
        (!system.is_empty()).then_some(Self { system, user })
    }

    /// The system manager's units around the process, outermost first: slices, then the unit itself.
    pub fn system(&self) -> &[String] {
        &self.system
    }

    /// Where the process belongs to a user's manager: whose, and that manager's units around it,
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
        let user = self.user.iter().flat_map(|(_, units)| units);
        self.system.iter().chain(user).fold(String::new(), |path, unit| path + "/" + unit)
    }
}

/// Slices, then one unit that holds processes: as far as one manager's names go.
fn branch<'a>(components: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> Vec<String> {
    let mut units = Vec::new();
    while let Some(component) = components.next_if(|c| is_unit(c)) {
        units.push(component.to_owned());
        if !component.ends_with(".slice") {
            break;
        }
    }
    units
}

/// systemd puts `_` before a name that would collide with the kernel's own files (`_cpu.service`).
fn unescape(component: &str) -> &str {
    component.strip_prefix('_').unwrap_or(component)
}

/// The unit types that can have a control group (systemd.resource-control(5)), and the characters that unit names are
/// made of (systemd.unit(5)). Whoever may make control groups may call one as they like: no name of theirs is to read as
/// several words of a record.
pub(crate) fn is_unit(component: &str) -> bool {
    let Some((name, suffix)) = component.rsplit_once('.') else { return false };
    let fits = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    !name.is_empty()
        && name.chars().all(fits)
        && matches!(suffix, "slice" | "service" | "scope" | "socket" | "mount" | "swap")
}

/// The user whose manager `user@UID.service` is.
fn manager_of(unit: &str) -> Option<Uid> {
    let uid = unit.strip_prefix("user@")?.strip_suffix(".service")?;
    uid.parse().ok().map(Uid::new)
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
        assert_eq!(units("0::/system.slice/_cpu.service\n").0[1], "cpu.service");
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
