//! `echod check` and `echod explain` from outside: what they print, and the status they exit with.

// The lint's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A configuration file of a test's own, gone when it ends.
struct Configuration {
    directory: PathBuf,
    file: PathBuf,
}

impl Configuration {
    fn new(text: &str) -> Self {
        let directory = nix::unistd::mkdtemp(&std::env::temp_dir().join("echod-explain-XXXXXX")).unwrap();
        let file = directory.join("echod.toml");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        Self { directory, file }
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let (subcommand, rest) = arguments.split_first().unwrap();
        run(Command::new(env!("CARGO_BIN_EXE_echod")).arg(subcommand).arg("--config").arg(&self.file).args(rest))
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Outcome {
    /// The first line of what was printed, and the status.
    fn verdict(&self) -> (&str, i32) {
        (self.stdout.lines().next().unwrap_or(""), self.code)
    }
}

fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

const POLICY: &str = "\
[deny.contractors]
users = ['2000-2999']

[allow.root]
users = ['root']

[allow.operators]
groups = [4]
connections-per-user = 200

[allow.backup]
users = [34, 1001]
units = ['backup.service']

[allow.mail]
users = [1001]
user-units = ['mail.service']

[limits]
line-length = '4K'
";

#[test]
fn explain_prints_the_verdict_first_and_exits_with_it() {
    let configuration = Configuration::new(POLICY);
    let verdict = |arguments: &[&str]| {
        let outcome = configuration.run(&[&["explain"], arguments].concat());
        let (line, code) = outcome.verdict();
        (line.to_owned(), code)
    };
    let admitted = |rule: &str| (format!("admitted by {rule}"), 0);
    let by_default = ("denied by default".to_owned(), 1);

    assert_eq!(verdict(&["--uid", "2500"]), ("denied by deny.contractors".to_owned(), 1));
    assert_eq!(verdict(&["--uid", "5"]), by_default);
    assert_eq!(verdict(&["--user", "root"]), admitted("allow.root"));

    // Without --gid the group has the user's number; --group adds groups.
    assert_eq!(verdict(&["--uid", "4"]), admitted("allow.operators"));
    assert_eq!(verdict(&["--uid", "4", "--gid", "5"]), by_default);
    assert_eq!(verdict(&["--uid", "5", "--gid", "4"]), admitted("allow.operators"));
    assert_eq!(verdict(&["--uid", "5", "--group", "7", "--group", "4"]), admitted("allow.operators"));
    assert_eq!(verdict(&["--uid", "5", "--group", "root"]), by_default);

    assert_eq!(verdict(&["--uid", "34"]), by_default);
    assert_eq!(verdict(&["--uid", "34", "--unit", "backup.service"]), admitted("allow.backup"));
    assert_eq!(verdict(&["--uid", "34", "--unit", "other.service"]), by_default);
    let own = |uid: u32| format!("user@{uid}.service/app.slice/mail.service");
    assert_eq!(verdict(&["--uid", "1001", "--unit", "user@1001.service/backup.service"]), by_default);
    assert_eq!(verdict(&["--uid", "1001", "--unit", &own(1001)]), admitted("allow.mail"));
    assert_eq!(verdict(&["--uid", "1001", "--unit", &own(34)]), by_default);
    let path = format!("/user.slice/user-1001.slice/{}", own(1001));
    assert_eq!(verdict(&["--uid", "1001", "--unit", &path]), admitted("allow.mail"));
    assert_eq!(verdict(&["--uid", "34", "--unit", "/web.slice/system.slice/backup.service"]), by_default);
    assert_eq!(verdict(&["--uid", "65534"]), ("denied by deny.contractors".to_owned(), 1));
}

#[test]
fn explain_gives_the_reason_and_the_place_of_the_rule() {
    let configuration = Configuration::new(POLICY);
    let outcome = configuration.run(&["explain", "--uid", "34"]);
    let file = configuration.file.display();
    let why = format!(
        "denied by default\n\
         \x20 deny.contractors ({file}:1) does not match:\n\
         \x20   users: no, uid 34 is not among 2000-2999\n\
         \x20 allow.root ({file}:4) does not match:\n\
         \x20   users: no, uid 34 is not among root (0)\n\
         \x20 allow.operators ({file}:7) does not match:\n\
         \x20   groups: no, no gid of 34 is among 4\n\
         \x20 allow.backup ({file}:11) does not match:\n\
         \x20   users: yes, uid 34 is among 34, 1001\n\
         \x20   units: not known, the unit cannot be told\n\
         \x20 allow.mail ({file}:15) does not match:\n\
         \x20   users: no, uid 34 is not among 1001\n\
         \x20   user-units: not asked, the other keys settle it\n\
         \x20 no rule matches\n\
         \x20 (the policy depends on units; --unit tells from which one the process would connect)\n"
    );
    assert_eq!(outcome.stdout, why);
    assert_eq!(outcome.stderr, "");
}

#[test]
fn explain_reads_the_credentials_of_a_live_process() {
    let uid = fs::metadata("/proc/self").map(|status| std::os::unix::fs::MetadataExt::uid(&status)).unwrap();
    let configuration = Configuration::new(&format!("[allow.tester]\nusers = [{uid}]\n"));
    let pid = std::process::id().to_string();
    assert_eq!(configuration.run(&["explain", "--pid", &pid]).verdict(), ("admitted by allow.tester", 0));

    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let gone = configuration.run(&["explain", "--pid", &child.id().to_string()]);
    assert_eq!((gone.code, gone.stdout.as_str()), (71, ""));
    assert!(gone.stderr.contains(&format!("process {}: ", child.id())), "{}", gone.stderr);
}

#[test]
fn explain_admits_by_no_group_where_the_list_is_incomplete() {
    let policy = "[deny.d]\ngroups = [7]\nusers = [5]\n[allow.a]\ngroups = [4, 9]\n";
    let configuration = Configuration::new(policy);
    let explain = |uid: &str, gid: &str, group: &str, count: usize| {
        let groups = ["--group", group].repeat(count);
        let outcome = configuration.run(&[&["explain", "--uid", uid, "--gid", gid], &groups[..]].concat());
        let said =
            outcome.stdout.contains(&format!("({count} supplementary groups; of more than 1024 none can be told)"));
        (outcome.verdict().0.to_owned(), said)
    };
    let verdict = |line: &str, said| (line.to_owned(), said);
    assert_eq!(explain("6", "6", "4", 1024), verdict("admitted by allow.a", false));
    assert_eq!(explain("6", "6", "4", 1025), verdict("denied by default", true));
    assert_eq!(explain("5", "4", "8", 1024), verdict("admitted by allow.a", false));
    assert_eq!(explain("5", "4", "8", 1025), verdict("denied by deny.d", true));
    // The effective group is not part of that list, and is known.
    assert_eq!(explain("6", "9", "4", 1025), verdict("admitted by allow.a", true));
}

#[test]
fn explain_decides_nothing_about_an_unknown_user_or_process() {
    let configuration = Configuration::new(POLICY);
    for (arguments, message) in [
        (["--user", "no such user"].as_slice(), "no user \"no such user\""),
        (&["--uid", "5", "--group", "no such group"], "no group \"no such group\""),
        (&["--uid", "5", "--unit", "backup"], "\"backup\" is no unit"),
    ] {
        let outcome = configuration.run(&[&["explain"], arguments].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (64, ""), "{arguments:?}");
        assert!(outcome.stderr.contains(message) && outcome.stderr.contains("; expected"), "{}", outcome.stderr);
    }
    // The exit code of clap.
    assert_eq!(configuration.run(&["explain"]).code, 2);
    assert_eq!(configuration.run(&["explain", "--uid", "5", "--pid", "6"]).code, 2);
}

#[test]
fn check_prints_the_policy_and_the_settings_in_force() {
    let configuration = Configuration::new(POLICY);
    let outcome = configuration.run(&["check"]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let file = configuration.file.display();
    let cells =
        |line: &str| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>().join("|");
    let lines: Vec<String> = outcome.stdout.lines().map(cells).collect();
    assert_eq!(
        lines[..8],
        [
            file.to_string(),
            String::new(),
            "RULE|WHO|UNITS|TERMS|WHERE".to_owned(),
            format!("deny.contractors|users 2000-2999|any|-|{file}:1"),
            format!("allow.root|users root (0)|any|-|{file}:4"),
            format!("allow.operators|groups 4|any|connections-per-user 200|{file}:7"),
            format!("allow.backup|users 34, 1001|backup.service|-|{file}:11"),
            format!("allow.mail|users 1001|user-units mail.service|-|{file}:15"),
        ]
    );
    assert!(lines.contains(&"line-length = \"4K\"".to_owned()), "{lines:#?}");
    assert!(lines.contains(&"busy-poll = \"50us\"".to_owned()), "{lines:#?}");
}

#[test]
fn check_shortens_a_long_list_and_prints_its_length() {
    // No two of these ranges touch. Together they are longer than any width that std's formatting takes.
    let ranges: Vec<String> = (0..5000).map(|n| format!("{}-{}", 100_000 + 10 * n, 100_005 + 10 * n)).collect();
    let units: Vec<String> = (0..5000).map(|n| format!("a-rather-long-name-{n}.service")).collect();
    let text = format!("[deny.many]\nusers = {ranges:?}\n[allow.units]\nunits = {units:?}\n");
    let configuration = Configuration::new(&text);
    let outcome = configuration.run(&["check"]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let line = |rule: &str| outcome.stdout.lines().find(|line| line.starts_with(rule)).unwrap();
    let many = line("deny.many");
    assert!(many.contains("users 100000-100005, 100010-100015, "), "{many}");
    assert!(many.contains(", ... (5000 in all)  ") && many.len() < 300, "{many}");
    let units = line("allow.units");
    assert!(units.contains("a-rather-long-name-0.service, ") && units.contains(", ... (5000 in all)  "), "{units}");
    assert_eq!(configuration.run(&["explain", "--uid", "100012"]).verdict(), ("denied by deny.many", 1));
}

#[test]
fn check_warns_on_standard_error_and_still_succeeds() {
    let configuration = Configuration::new("[allow.old]\nusers = ['no such user']\n");
    let outcome = configuration.run(&["check"]);
    assert_eq!(outcome.code, 0);
    assert!(outcome.stderr.contains(":2:10: the user \"no such user\" does not exist"), "{}", outcome.stderr);
    assert!(outcome.stderr.lines().all(|line| line.starts_with("warning: ")), "{}", outcome.stderr);
}

#[test]
fn check_warns_where_a_user_namespace_leaves_users_unmapped() {
    let configuration = Configuration::new(POLICY);
    let check = ["--user", "--map-root-user", env!("CARGO_BIN_EXE_echod"), "check", "--config"];
    let outcome = run(Command::new("unshare").args(check).arg(&configuration.file));
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.starts_with("warning: this user namespace maps 1 user ids"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("PrivateUsers="), "{}", outcome.stderr);
}

#[test]
fn check_prints_every_fault_and_exits_78() {
    let configuration = Configuration::new("[allow.x]\nuser = [5]\n[limits]\nconnections = 0\n");
    let outcome = configuration.run(&["check"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (78, ""));
    let places: Vec<_> = outcome.stderr.lines().map(|line| line.split(": ").next().unwrap()).collect();
    let file = configuration.file.display();
    assert_eq!(places, [format!("{file}:1:8"), format!("{file}:2:1"), format!("{file}:4:15")]);
    // explain refuses the same file for the same reasons.
    let explained = configuration.run(&["explain", "--uid", "5"]);
    assert_eq!((explained.code, explained.stderr), (78, outcome.stderr));
}

#[test]
fn a_named_configuration_file_that_is_missing_exits_66() {
    let missing = ["--config", "/nonexistent/echod.toml"];
    for arguments in [&["check"][..], &["explain", "--uid", "5"]] {
        let outcome = run(Command::new(env!("CARGO_BIN_EXE_echod")).args(arguments).args(missing));
        assert_eq!(
            (outcome.code, outcome.stderr.trim()),
            (66, "/nonexistent/echod.toml: no such file; expected a readable file, since --config names it")
        );
    }
}

#[test]
fn without_any_file_explain_admits_only_the_owner() {
    let configuration = Configuration::new("");
    fs::remove_file(&configuration.file).unwrap();
    let uid = fs::metadata("/proc/self").map(|status| std::os::unix::fs::MetadataExt::uid(&status)).unwrap();
    let explain = |uid: u32| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_echod"));
        command.env("CONFIGURATION_DIRECTORY", &configuration.directory);
        run(command.args(["explain", "--uid", &uid.to_string()]))
    };
    assert_eq!(explain(uid).verdict(), ("admitted by allow.owner", 0));
    assert_eq!(explain(uid + 1).verdict(), ("denied by default", 1));
}

#[test]
fn groups_may_be_given_only_with_a_uid() {
    for arguments in
        [["--user", "root", "--gid", "5"], ["--user", "root", "--group", "5"], ["--pid", "1", "--gid", "5"]]
    {
        let outcome = run(Command::new(env!("CARGO_BIN_EXE_echod")).arg("explain").args(arguments));
        assert_eq!(outcome.code, 2, "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("cannot be used with"), "{}", outcome.stderr);
    }
}

#[test]
fn check_shows_and_explain_explains_every_key_of_a_rule() {
    /// A key, its value in a file, and the key that it needs beside it.
    const EXAMPLES: [(&str, &str, &str); 5] = [
        ("users", "2000-2999", ""),
        ("groups", "3000-3999", ""),
        ("logins", "4000-4999", ""),
        ("units", "backup.service", ""),
        ("user-units", "mail.service", "users = [5]\n"),
    ];
    for key in peergate::policy::keys() {
        let example = EXAMPLES.iter().find(|(name, ..)| *name == key);
        let (_, value, beside) = example.unwrap_or_else(|| panic!("no example of the key {key}"));
        let text = format!("[allow.example]\n{beside}{key} = ['{value}']\n");
        let configuration = Configuration::new(&text);
        let checked = configuration.run(&["check"]);
        let line = checked.stdout.lines().find(|line| line.starts_with("allow.example")).unwrap_or_default();
        assert!(line.contains(value), "{key}: {line}");
        let explained = configuration.run(&["explain", "--uid", "5"]).stdout;
        let finding = format!("\n    {key}: ");
        assert!(explained.contains(&finding), "{key}: {explained}");
    }
}
