//! Used by docs.rs and docs_proxy.rs: reads what is written about a program, and has the program check a configuration.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use peergate::audit::{Event, Severity};

/// The program of the package whose test this is.
const PROGRAM: &str = match (option_env!("CARGO_BIN_EXE_echod"), option_env!("CARGO_BIN_EXE_peergate")) {
    (Some(program), _) | (None, Some(program)) => program,
    (None, None) => panic!("the package has no program"),
};

/// The top of the tree.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The program's own record fields that `text` names.
pub fn fields(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|word| word.starts_with("GATE_") || word.starts_with("PEER_"))
        .map(str::to_owned)
        .collect()
}

/// Runs `check` of the program on `text`, in a file that only its owner may write: its output, or its errors.
pub fn check(name: &str, text: &str) -> Result<String, String> {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("docs-{}-{name}", env!("CARGO_PKG_NAME")));
    fs::create_dir_all(&directory).unwrap();
    let file = directory.join("test.toml");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let check = Command::new(PROGRAM).arg("check").arg("--config").arg(&file).output().unwrap();
    fs::remove_dir_all(&directory).unwrap();
    let utf8 = |bytes| String::from_utf8(bytes).unwrap();
    let printed = utf8(check.stdout).replace(directory.to_str().unwrap(), "");
    if check.status.success() { Ok(printed) } else { Err(format!("{text}\n{}", utf8(check.stderr))) }
}

/// The mebibytes of memory that `check` says this configuration needs.
pub fn need(name: &str, config: &str) -> u64 {
    let said = check(name, config).unwrap();
    said.split_once("# up to ").unwrap().1.split_once("M of memory").unwrap().0.parse().unwrap()
}

/// MemoryMax= of the units is what the default limits need, up to the next 128 MiB; the comment has what `check` says.
pub fn assert_units_have_the_memory_for_the_default_limits(service: &str, more: &str) {
    let policy = "[allow.all]\nusers = [\"any\"]\n";
    let default = need("memory-default", &format!("{policy}{more}"));
    // As many MiB for 1,024 connections more are as many KiB for each.
    let each = need("memory-twice", &format!("{policy}{more}[limits]\nconnections = 2048\n")) - default;
    let comment = read(&format!("systemd/system/{service}")).replace("\n# ", " ");
    assert!(comment.contains(&format!("for the next process: {each}. 1,024 times that are {each} MiB")), "{each} KiB");
    for unit in [format!("systemd/system/{service}"), format!("systemd/user/{service}")] {
        let text = read(&unit);
        let limit = text.lines().find_map(|line| line.strip_prefix("MemoryMax=")?.strip_suffix('M')).unwrap();
        assert_eq!(limit, default.next_multiple_of(128).to_string(), "{unit}, where {default}M are needed");
    }
}

/// The shipped configuration with its commented settings in force.
pub fn uncommented(text: &str) -> String {
    let is_setting = |line: &str| line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains(" = ");
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if is_setting(rest) => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The settings in the tables that are no rules: `limits.connections`.
pub fn settings(toml: &str) -> BTreeSet<String> {
    let mut table = String::new();
    let mut found = BTreeSet::new();
    for line in toml.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            name.clone_into(&mut table);
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !table.contains('.') && !line.starts_with('#'))
        {
            found.insert(format!("{table}.{key}"));
        }
    }
    found
}

/// The settings that a manual page lists in its sections, except those that are about rules: `limits.connections`.
pub fn documented(page: &str) -> BTreeSet<String> {
    let mut section = String::new();
    let mut documented = BTreeSet::new();
    for line in page.lines() {
        if let Some(name) = line.strip_prefix(".Sh ") {
            section = name.to_lowercase();
        } else if let Some(key) = line.strip_prefix(".It Ic ").filter(|_| !section.starts_with("rules")) {
            documented.insert(format!("{section}.{}", key.replace("\\-", "-")));
        }
    }
    documented
}

/// Asserts that `page` states as default what `shipped` has after a comment sign, from its table `first` on.
pub fn assert_same_defaults(page: &str, shipped: &str, first: &str) {
    let page = page.replace(".Li ", "").replace("\\(dq", "\"").replace("\\-", "-");
    let mut compared = 0;
    for line in shipped.lines().skip_while(|line| *line != first) {
        let Some((key, value)) = line.strip_prefix('#').unwrap_or(line).split_once(" = ") else { continue };
        if !line.starts_with('#') || !key.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
            continue;
        }
        let value = value.split('#').next().unwrap().trim();
        let after = page.split(&format!(".It Ic {key}\n")).last().unwrap();
        let default = after.split("Default").nth(1).unwrap().split_whitespace().next().unwrap();
        assert_eq!(default.trim_end_matches('.'), value, "{key}");
        compared += 1;
    }
    assert!(compared >= 10, "{compared} settings have a default");
}

/// Asserts that both show each key that any rule may have.
pub fn assert_every_key_of_a_rule(page: &str, shipped: &str) {
    let page = page.replace("\\-", "-");
    let rules = page.split(".Sh ").find(|section| section.starts_with("RULES\n")).unwrap();
    for key in peergate::policy::keys() {
        assert!(rules.contains(&format!("\n.It Ic {key}\n")), "the manual page does not list {key}");
        let is_shown = |line: &str| line.trim_start_matches("# ").starts_with(&format!("{key} = ["));
        assert!(shipped.lines().any(is_shown), "the shipped configuration does not show {key}");
    }
}

/// Asserts that the program accepts each example of a manual page, and that there are some. `more` is added to the examples
/// of rules alone.
pub fn assert_examples_are_accepted(page: &str, more: &str) {
    let blocks = page.split(".Bd -literal -offset indent\n").skip(1).map(|rest| rest.split(".Ed").next().unwrap());
    let plain = |block: &str| block.replace("\\-", "-").replace("\\e", "\\");
    let examples: Vec<String> =
        blocks.filter(|block| block.starts_with('[') || block.starts_with("# /etc/peergate/")).map(plain).collect();
    assert!(examples.len() >= 3, "the manual page has lost its examples");
    for (number, example) in examples.iter().enumerate() {
        let more = if example.contains("to = ") { "" } else { more };
        check(&format!("example-{number}"), &format!("{example}{more}")).unwrap();
    }
}

/// The ids that a manual page lists, with verdict and priority.
pub fn listed_ids(page: &str) -> BTreeSet<String> {
    page.lines()
        .filter_map(|line| line.strip_prefix(".It Li "))
        .map(|line| line.replace("Li ", "").replace("No ", ""))
        .filter_map(|line| line.split_once(" , ").map(|(id, rest)| (id.to_owned(), rest.to_owned())))
        .filter(|(id, _)| id.len() == 32)
        .map(|(id, rest)| format!("{id} {}", rest.replace(" , ", " ")))
        .collect()
}

/// The same of an event, from the source. `None` where it has no id.
pub fn id_of(event: Event) -> Option<String> {
    let priority = match event.severity() {
        Severity::Error => 3,
        Severity::Warning => 4,
        Severity::Notice => 5,
        Severity::Info => 6,
        _ => unreachable!("which syslog priority is that?"),
    };
    Some(format!("{} {} {priority}", event.message_id()?, event.verdict().unwrap_or("\\(en")))
}

/// The record fields that the source writes.
pub fn written_fields() -> BTreeSet<String> {
    // `PEER_UID = …` in the list of fields of an event.
    let named = |line: &str| line.trim().split_once(" = ").map(|(name, _)| fields(name));
    let written: BTreeSet<String> = read("src/peergate/journal.rs").lines().filter_map(named).flatten().collect();
    assert!(written.contains("GATE_VERDICT"), "the names of the fields are to be found elsewhere now");
    written
}

/// Every event that has an id.
pub const WITH_ID: [Event; 10] = [
    Event::Denied,
    Event::Refused,
    Event::Summary,
    Event::Admitted,
    Event::Closed,
    Event::Line,
    Event::LineSummary,
    Event::ConfigLoaded,
    Event::ConfigRefused,
    Event::Revoked,
];
