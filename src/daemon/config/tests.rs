//! What a configuration file may say, and what a wrong one is told.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use peergate::audit::RecordScope;
use peergate::ids::Gid;

use super::*;
use crate::testing::{LineTerms, Lines};

use std::num::NonZeroUsize;
use std::time::Duration;

type Config = super::Config<Lines>;
type Terms = super::Terms<LineTerms>;

fn load(location: Location, me: Uid, names: &dyn Names) -> Result<Config, LoadError> {
    super::load(location, me, names)
}

const ME: Uid = Uid::new(1000);

/// A user database of one user and one group.
struct Alice;

impl Names for Alice {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        Ok((name == "alice").then_some(Uid::new(1001)))
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        Ok((name == "adm").then_some(Gid::new(4)))
    }
}

fn read(text: &str) -> Result<Config, Faults> {
    Config::from_source(&Source::new("echod.toml", text), ME, &Alice)
}

/// What a file is told, without the file's name.
fn faults(text: &str) -> Vec<String> {
    let told = read(text).expect_err("a fault").to_string();
    told.lines().map(|line| line.strip_prefix("echod.toml:").unwrap().to_owned()).collect()
}

#[test]
fn what_the_file_leaves_out_is_as_documented() {
    let config = read("[allow.owner]\nusers = ['self']\n").unwrap();
    let default = Config::without_file(ME);
    assert_eq!((&config.limits, &config.audit, &config.service), (&default.limits, &default.audit, &default.service));
    assert_eq!(config.limits.connections, 1024);
    assert_eq!(config.limits.connections_per_user, 64);
    assert_eq!(config.settings.line_length, 65_536);
    assert_eq!(config.limits.idle_timeout, None);
    assert_eq!((config.audit.scope, config.audit.burst), (RecordScope::Denials, 10));
    assert_eq!(config.audit.interval, Duration::from_secs(10));
    assert_eq!((config.service.workers, config.service.verify), (None, Verify::Connection));
    assert_eq!(config.service.busy_poll, Some(Duration::from_micros(50)));
    assert_eq!(config.service.idle_exit, None);
}

#[test]
fn every_key_of_the_contract_is_read() {
    let config = read(concat!(
        "[deny.contractors]\nusers = ['2000-2999']\n",
        "[allow.owner]\nusers = ['self']\n",
        "[allow.operators]\ngroups = ['adm']\nconnections-per-user = 200\nline-length = '1M'\nidle-timeout = 'off'\n",
        "[limits]\nconnections = 10\nconnections-per-user = 2\nwaiting-per-user = 3\nline-length = '4K'\nidle-timeout = '10min'\n",
        "[audit]\nrecord = 'lines'\nburst = 5\ninterval = '1min 30s'\n",
        "[service]\nworkers = 3\nbusy-poll = 'off'\nverify = 'line'\nidle-exit = 60\n",
    ))
    .unwrap();
    let names: Vec<_> = config.policy.rules().map(|rule| rule.name().as_str()).collect();
    assert_eq!(names, ["deny.contractors", "allow.owner", "allow.operators"]);
    let terms: Vec<_> = config.policy.rules().map(|rule| rule.terms().clone()).collect();
    let own = LineTerms { line_length: Some(1 << 20) };
    let expected = Terms { connections_per_user: Some(200), idle_timeout: Some(None), own };
    assert_eq!(format!("{:?}", terms[1..].to_vec()), format!("{:?}", [Terms::default(), expected]));
    let idle_timeout = Some(Duration::from_secs(600));
    let limits = Limits { connections: 10, connections_per_user: 2, waiting_per_user: 3, idle_timeout };
    assert_eq!(config.limits, limits);
    assert_eq!(config.settings.line_length, 4096);
    let audit = (config.audit.scope, config.audit.burst, config.audit.interval);
    assert_eq!(audit, (RecordScope::Lines, 5, Duration::from_secs(90)));
    let idle_exit = Some(Duration::from_secs(60));
    let workers = NonZeroUsize::new(3);
    assert_eq!(config.service, Service { workers, busy_poll: None, verify: Verify::Line, idle_exit });
    assert_eq!(config.warnings, []);
}

#[test]
fn every_wrong_value_is_told_at_once_with_its_place_and_what_was_expected() {
    assert_eq!(
        faults(concat!(
            "[allow.owner]\nusers = ['self']\nline-length = '64Q'\nconnections-per-user = 0\nidle = 5\n",
            "[limits]\nconnections = 0\nline-length = true\nidle-timeout = '0'\nconection = 7\n",
            "[audit]\nrecord = 'everything'\nburst = -1\ninterval = 'off'\n",
            "[service]\nworkers = 257\nbusy-poll = '2s'\nverify = 5\nidle-exit = 1.5\n",
        )),
        [
            "3:15: `line-length`: string \"64Q\"; expected a size from 1 byte to 1G, such as 65536, \"64K\" or \"1M\"",
            "4:24: `connections-per-user`: integer `0`; expected a number of connections from 1 to 1048576, such as 64",
            "5:1: unknown key `idle`; expected one of `users`, `groups`, `logins`, `units`, `user-units`, `connections-per-user`, \
             `line-length`, `idle-timeout`",
            "7:15: `connections`: integer `0`; expected a number of connections from 1 to 1048576, such as 64",
            "8:15: `line-length`: boolean `true`; expected a size from 1 byte to 1G, such as 65536, \"64K\" or \"1M\"",
            "9:16: `idle-timeout`: string \"0\"; expected a time span above zero, such as \"90s\", \"10min\" or 90, \
             or \"off\"",
            "10:1: unknown key `conection`; expected one of `connections`, `connections-per-user`, `waiting-per-user`, `line-length`, \
             `idle-timeout`",
            "12:10: `record`: string \"everything\"; expected \"denials\", \"connections\" or \"lines\"",
            "13:9: `burst`: integer `-1`; expected a number of records from 0 to 4294967295, such as 10",
            "14:12: `interval`: string \"off\"; expected a time span above zero, such as \"90s\", \"1min 30s\" or 90",
            "16:11: `workers`: integer `257`; expected a number of threads from 1 to 256, such as 4, or \"auto\"",
            "17:13: `busy-poll`: string \"2s\"; expected a time span above zero and up to 1s, such as \"50us\", \
             or \"off\"",
            "18:10: `verify`: integer `5`; expected \"connection\" or \"line\"",
            "19:13: `idle-exit`: floating point `1.5`; expected a time span above zero, such as \"90s\", \"10min\" \
             or 90, or \"off\"",
        ]
    );
}

#[test]
fn a_table_that_nobody_knows_is_a_fault() {
    assert_eq!(
        faults("limits = 5\n[limit]\nconnections = 5\n[allow.owner]\nusers = ['self']\n"),
        [
            "1:10: `limits`: integer `5`; expected a table",
            "2:2: unknown key `limit`; expected one of `deny`, `allow`, `limits`, `audit`, `service`",
        ]
    );
}

fn location(cli: Option<&str>, me: u32, environment: &[(&str, &str)]) -> Location {
    let variable =
        |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
    match cli {
        Some(named) => Config::locate(&Choice { config: Some(named.into()), own: () }),
        None => locate("echod", "echod.toml", Uid::new(me), &variable),
    }
}

#[test]
fn the_file_is_looked_for_in_one_place() {
    let default = |path: &str| Location::Default(path.into());
    let systemd = ("CONFIGURATION_DIRECTORY", "/etc/echod:/etc/more");
    let xdg = ("XDG_CONFIG_HOME", "/x");
    let home = ("HOME", "/home/alice");
    assert_eq!(location(Some("c"), 0, &[systemd, xdg, home]), Location::Named("c".into()));
    assert_eq!(location(None, 0, &[xdg, home]), default("/etc/echod/echod.toml"));
    assert_eq!(location(None, 1000, &[systemd, xdg, home]), default("/etc/echod/echod.toml"));
    assert_eq!(location(None, 1000, &[("CONFIGURATION_DIRECTORY", "/c"), xdg]), default("/c/echod.toml"));
    assert_eq!(location(None, 1000, &[("CONFIGURATION_DIRECTORY", ""), xdg]), default("/x/echod/echod.toml"));
    assert_eq!(location(None, 1000, &[xdg, home]), default("/x/echod/echod.toml"));
    let relative = ("XDG_CONFIG_HOME", "x");
    assert_eq!(location(None, 1000, &[relative, home]), default("/home/alice/.config/echod/echod.toml"));
    assert_eq!(location(None, u32::MAX - 7, &[]), Location::Nowhere);
}

/// A directory of a test's own, gone when it ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = nix::unistd::mkdtemp(&std::env::temp_dir().join("echod-config-XXXXXX")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn file(&self, text: impl AsRef<[u8]>, mode: u32) -> PathBuf {
        let path = self.0.join("echod.toml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_missing_default_file_gives_the_defaults_but_a_missing_named_one_is_an_error() {
    let scratch = Scratch::new();
    let path = scratch.0.join("none.toml");
    let config = load(Location::Default(path.clone()), Uid::effective(), &Alice).unwrap();
    assert_eq!(config.source, None);
    assert_eq!(config.policy.rules().map(|rule| rule.name().as_str()).collect::<Vec<_>>(), ["allow.owner"]);
    let error = load(Location::Named(path.clone()), Uid::effective(), &Alice).unwrap_err();
    assert_eq!(error.exit_code(), 66);
    assert_eq!(
        error.to_string(),
        format!("{}: no such file; expected a readable file, since --config names it", path.display())
    );
}

#[test]
fn a_file_that_others_may_write_is_refused_wherever_it_is_named() {
    let scratch = Scratch::new();
    for mode in [0o664, 0o646, 0o666] {
        let path = scratch.file("[allow.owner]\nusers = ['self']\n", mode);
        for location in [Location::Named(path.clone()), Location::Default(path.clone())] {
            let error = load(location, Uid::effective(), &Alice).unwrap_err();
            assert_eq!(error.exit_code(), 78);
            assert!(error.to_string().contains(&format!("may write it (mode {mode:04o})")), "{error}");
        }
    }
    let path = scratch.file("[allow.owner]\nusers = ['self']\n", 0o600);
    assert_eq!(load(Location::Default(path.clone()), Uid::effective(), &Alice).unwrap().source, Some(path));
}

#[test]
fn a_file_of_somebody_else_is_refused() {
    if Uid::effective().raw() != 0 {
        // Only root can give a file away; a file of root's own is fine for everyone.
        let root = Source::read(Path::new("/etc/passwd"), Uid::effective());
        assert!(root.is_ok(), "{root:?}");
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.file("", 0o644);
    std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
    let error = load(Location::Named(path.clone()), Uid::effective(), &Alice).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(error.to_string().contains("owned by uid 12345; expected root or the service's user"), "{error}");
    assert!(Source::read(&path, Uid::new(12_345)).is_ok());
}

#[test]
fn what_is_no_file_of_text_is_refused() {
    let scratch = Scratch::new();
    let error = load(Location::Default(scratch.0.clone()), Uid::effective(), &Alice).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");

    let fifo = scratch.0.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let error = load(Location::Default(fifo), Uid::effective(), &Alice).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");

    let path = scratch.file(vec![b'#'; (1 << 20) + 1], 0o644);
    let error = load(Location::Default(path.clone()), Uid::effective(), &Alice).unwrap_err();
    assert!(error.to_string().contains("longer than 1048576 bytes"), "{error}");

    scratch.file(b"[allow.owner]\nusers = ['\xff']\n", 0o644);
    let error = load(Location::Default(path), Uid::effective(), &Alice).unwrap_err();
    assert!(error.to_string().contains(":2:11: the byte 0xff"), "{error}");
    assert_eq!(error.exit_code(), 78);
}

#[test]
fn an_unreadable_default_file_is_refused_and_never_replaced_by_the_defaults() {
    let scratch = Scratch::new();
    // A link to itself can be opened by nobody, root included.
    let path = scratch.0.join("echod.toml");
    std::os::unix::fs::symlink("echod.toml", &path).unwrap();
    let error = load(Location::Default(path.clone()), Uid::effective(), &Alice).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(error.to_string().contains("cannot be read"), "{error}");
    assert_eq!(load(Location::Named(path), Uid::effective(), &Alice).unwrap_err().exit_code(), 66);
}

#[test]
fn a_default_file_is_missing_only_where_nothing_has_its_name() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.0.join(name);
    fs::write(path("file"), "").unwrap();
    fs::create_dir(path("empty")).unwrap();
    symlink("empty", path("link")).unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    symlink("file/x", path("through")).unwrap();
    symlink(path("gone/echod.toml"), path("absolute")).unwrap();
    for absent in ["none.toml", "no/such/directory/echod.toml", "empty/echod.toml", "link/echod.toml"] {
        assert_eq!(load(Location::Default(path(absent)), Uid::effective(), &Alice).unwrap().source, None, "{absent}");
        assert_eq!(
            load(Location::Named(path(absent)), Uid::effective(), &Alice).unwrap_err().exit_code(),
            66,
            "{absent}"
        );
    }
    for (present, why) in [
        ("dangling", "a symbolic link leads to"),
        ("absolute", "a symbolic link leads to"),
        ("dangling/echod.toml", "nowhere, which does not exist"),
        ("file/echod.toml", "file: Not a directory"),
        ("through", "file: Not a directory"),
    ] {
        let error = load(Location::Default(path(present)), Uid::effective(), &Alice).unwrap_err();
        assert_eq!(error.exit_code(), 78, "{present}");
        assert!(error.to_string().contains("cannot be read") && error.to_string().contains(why), "{error}");
        assert_eq!(
            load(Location::Named(path(present)), Uid::effective(), &Alice).unwrap_err().exit_code(),
            66,
            "{present}"
        );
    }
}

#[test]
fn an_unknown_home_directory_is_no_reason_to_take_the_defaults() {
    let error = load(Location::Unknown(Errno::EIO), Uid::effective(), &Alice).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(error.to_string().contains("expected an answer from the user database"), "{error}");
}

#[test]
fn a_link_to_the_file_is_followed() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.0.join(name);
    fs::create_dir(path("real")).unwrap();
    fs::set_permissions(path("real"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(scratch.file("[allow.owner]\nusers = ['self']\n", 0o644), path("real/echod.toml")).unwrap();
    symlink("real/../real", path("directory")).unwrap();
    symlink(path("directory/echod.toml"), path("file")).unwrap();
    for name in ["real/echod.toml", "directory/echod.toml", "file", "real/../file"] {
        assert!(load(Location::Named(path(name)), Uid::effective(), &Alice).is_ok(), "{name}");
    }
}
