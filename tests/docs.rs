//! What is written about the program matches it: manual pages, completions, journal catalog, shipped configuration and
//! packaging, each compared with its source.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use peergate::audit::{Event, Severity};

#[path = "../packaging/generate.rs"]
mod generate;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn completions_and_option_lists_match_the_command_line() {
    for (path, wanted) in generate::files(root()).unwrap() {
        let found = fs::read(root().join(&path)).unwrap();
        assert!(
            found == wanted,
            "{} does not follow src/daemon/cli.rs: run `cargo run --example generate`",
            path.display()
        );
    }
}

/// The catalog's entries, by MESSAGE_ID: header lines and text.
fn catalog() -> BTreeMap<String, (Vec<String>, String)> {
    let text = read("packaging/echod.catalog");
    let mut entries = BTreeMap::new();
    for entry in text.split("\n-- ").skip(1) {
        let (id, rest) = entry.split_once('\n').unwrap();
        let (header, body) = rest.split_once("\n\n").unwrap_or_else(|| panic!("{id}: no text"));
        let old = entries.insert(id.to_owned(), (header.lines().map(str::to_owned).collect(), body.to_owned()));
        assert!(old.is_none(), "{id} has two entries");
    }
    entries
}

/// The string literals of a source file, among them the names sought.
fn literals(path: &str) -> BTreeSet<String> {
    read(path).split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn each_message_id_has_a_catalog_entry_and_each_entry_an_id() {
    let is_id = |text: &String| text.len() == 32 && text.chars().all(|c| c.is_ascii_hexdigit());
    let ids: BTreeSet<String> = literals("src/peergate/audit/record.rs").into_iter().filter(is_id).collect();
    assert!(ids.contains("72261db9963c465c8c6121daadeb1cbc"), "src/peergate/audit/record.rs no longer holds the ids");
    assert_eq!(ids, catalog().into_keys().collect());
}

#[test]
fn a_catalog_entry_has_subject_author_and_documentation() {
    for (id, (header, body)) in catalog() {
        for key in ["Subject: ", "Defined-By: echod", "Documentation: man:"] {
            assert!(header.iter().any(|line| line.starts_with(key)), "{id} lacks {key:?}");
        }
        for line in body.lines() {
            assert!(line.chars().count() <= 80, "{id}: a terminal would break {line:?}");
        }
    }
}

#[test]
fn a_catalog_entry_tells_event_then_meaning_then_remedy() {
    for (id, (_, body)) in catalog() {
        let starts = |word: &str| body.match_indices(word).map(|(at, _)| at).collect::<Vec<_>>();
        let (meaning, to_do) = (starts("\n\nMeaning:"), starts("\n\nTo do:"));
        assert!(meaning.len() == 1 && to_do.len() == 1 && meaning[0] < to_do[0], "{id}: {meaning:?} {to_do:?}");
    }
}

#[test]
fn a_catalog_entry_warns_of_absent_fields_and_no_command_has_one() {
    for (id, (_, body)) in catalog() {
        // journalctl shows the bare field name if a record has no such field. About a peer any field may be missing.
        if body.contains("@PEER_") {
            assert_eq!(body.matches("the record has no").count(), 1, "{id} does not say what a bare name means");
        }
        for line in body.lines().filter(|line| line.starts_with("    ")) {
            assert!(!line.contains('@'), "{id}: a command, or a list, depends on a field: {line}");
        }
    }
}

/// Every event that has an id: as many as there are ids, see above.
const WITH_ID: [Event; 9] = [
    Event::Denied,
    Event::Refused,
    Event::Summary,
    Event::Admitted,
    Event::Closed,
    Event::Line,
    Event::ConfigLoaded,
    Event::ConfigRefused,
    Event::Revoked,
];

#[test]
fn the_manual_page_lists_each_message_id_verdict_and_priority() {
    let page = read("packaging/man/echod.8");
    let listed: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix(".It Li "))
        .map(|line| line.replace("Li ", "").replace("No ", ""))
        .filter_map(|line| line.split_once(" , ").map(|(id, rest)| (id.to_owned(), rest.to_owned())))
        .filter(|(id, _)| id.len() == 32)
        .map(|(id, rest)| format!("{id} {}", rest.replace(" , ", " ")))
        .collect();
    let written: BTreeSet<String> = WITH_ID
        .iter()
        .map(|event| {
            let priority = match event.severity() {
                Severity::Error => 3,
                Severity::Warning => 4,
                Severity::Notice => 5,
                Severity::Info => 6,
                _ => unreachable!("which syslog priority is that?"),
            };
            format!("{} {} {priority}", event.message_id().unwrap(), event.verdict().unwrap_or("\\(en"))
        })
        .collect();
    assert_eq!(listed, written);
    assert_eq!(written.len(), catalog().len(), "an event is missing from WITH_ID");
}

/// The program's own record fields that `text` names.
fn fields(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|word| word.starts_with("GATE_") || word.starts_with("PEER_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn manual_page_and_catalog_name_exactly_the_fields_written() {
    // `PEER_UID = …` in the list of fields of an event.
    let named = |line: &str| line.trim().split_once(" = ").map(|(name, _)| fields(name));
    let written: BTreeSet<String> = read("src/peergate/journal.rs").lines().filter_map(named).flatten().collect();
    assert!(written.contains("GATE_VERDICT"), "the names of the fields are to be found elsewhere now");
    // The proxy's page has these besides.
    let of_proxy = ["GATE_UPSTREAM", "GATE_BYTES_SENT"].map(str::to_owned);
    let of_echo = written.iter().filter(|name| !of_proxy.contains(name)).cloned().collect();
    assert_eq!(fields(&read("packaging/man/echod.8")), of_echo);
    let unknown: Vec<_> = fields(&read("packaging/echod.catalog")).difference(&written).cloned().collect();
    assert_eq!(unknown, [] as [String; 0]);
}

/// Runs `echod check` on `text`, in a file that only its owner may write: its output, or its errors.
fn check(name: &str, text: &str) -> Result<String, String> {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("docs-{name}"));
    fs::create_dir_all(&directory).unwrap();
    let file = directory.join("echod.toml");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let check = Command::new(env!("CARGO_BIN_EXE_echod")).arg("check").arg("--config").arg(&file).output().unwrap();
    fs::remove_dir_all(&directory).unwrap();
    let utf8 = |bytes| String::from_utf8(bytes).unwrap();
    let printed = utf8(check.stdout).replace(directory.to_str().unwrap(), "");
    if check.status.success() { Ok(printed) } else { Err(format!("{text}\n{}", utf8(check.stderr))) }
}

/// The shipped configuration with its commented settings in force.
fn uncommented(text: &str) -> String {
    let is_setting = |line: &str| line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains(" = ");
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if is_setting(rest) => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_shipped_configurations_comments_are_the_defaults() {
    let text = read("packaging/echod.toml");
    let spelled_out = uncommented(&text);
    assert_ne!(spelled_out, text);
    assert_eq!(check("shipped", &text), check("spelled-out", &spelled_out));
    assert!(check("shipped-alone", &text).unwrap().contains("allow.members"));
}

#[test]
fn a_fault_in_the_shipped_configuration_would_be_noticed() {
    let said = check("faulty", "[limits]\nconections = 1\n").unwrap_err();
    assert!(said.contains("conections"), "{said}");
}

/// The settings in the tables that are no rules: `limits.connections`.
fn settings(toml: &str) -> BTreeSet<String> {
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

#[test]
fn manual_page_and_shipped_configuration_list_the_same_settings() {
    let mut section = String::new();
    let mut documented = BTreeSet::new();
    for line in read("packaging/man/echod.toml.5").lines() {
        if let Some(name) = line.strip_prefix(".Sh ") {
            section = name.to_lowercase();
        } else if let Some(key) = line.strip_prefix(".It Ic ").filter(|_| section != "rules") {
            documented.insert(format!("{section}.{}", key.replace("\\-", "-")));
        }
    }
    assert_eq!(documented, settings(&uncommented(&read("packaging/echod.toml"))));
}

#[test]
fn manual_page_and_shipped_configuration_show_every_key_of_a_rule() {
    let page = read("packaging/man/echod.toml.5").replace("\\-", "-");
    let rules = page.split(".Sh ").find(|section| section.starts_with("RULES\n")).unwrap();
    let shipped = read("packaging/echod.toml");
    for key in peergate::policy::keys() {
        assert!(rules.contains(&format!("\n.It Ic {key}\n")), "the manual page does not list {key}");
        let is_shown = |line: &str| line.trim_start_matches("# ").starts_with(&format!("{key} = ["));
        assert!(shipped.lines().any(is_shown), "packaging/echod.toml does not show {key}");
    }
}

#[test]
fn manual_page_and_shipped_configuration_state_the_same_defaults() {
    let page = read("packaging/man/echod.toml.5").replace(".Li ", "").replace("\\(dq", "\"").replace("\\-", "-");
    for line in uncommented(&read("packaging/echod.toml")).lines().skip_while(|line| *line != "[limits]") {
        let Some((key, value)) = line.split_once(" = ") else { continue };
        let value = value.split('#').next().unwrap().trim();
        let after = page.split(&format!(".It Ic {key}\n")).last().unwrap();
        let default = after.split("Default").nth(1).unwrap().split_whitespace().next().unwrap();
        assert_eq!(default.trim_end_matches('.'), value, "{key}");
    }
}

#[test]
fn the_examples_of_the_manual_pages_are_accepted() {
    let page = read("packaging/man/echod.toml.5");
    let blocks = page.split(".Bd -literal -offset indent\n").skip(1).map(|rest| rest.split(".Ed").next().unwrap());
    let examples: Vec<String> = blocks.filter(|b| b.starts_with('[')).map(|b| b.replace("\\-", "-")).collect();
    assert!(examples.len() >= 4, "the manual page has lost its examples");
    for (number, example) in examples.iter().enumerate() {
        check(&format!("example-{number}"), example).unwrap();
    }
}

#[test]
fn debian_copyright_has_the_licence_of_each_locked_crate() {
    let copyright = read("debian/copyright");
    let listed: BTreeSet<String> = copyright
        .lines()
        .filter_map(|line| line.strip_prefix("Comment: "))
        .flat_map(|line| line.split(", ").map(str::to_owned))
        .filter(|entry| entry.split(' ').count() == 2)
        .collect();
    let lock = read("Cargo.lock");
    let value = |package: &str, key: &str| {
        let line = package.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    let locked: BTreeSet<String> = lock
        .split("[[package]]")
        .filter(|package| value(package, "source").is_some())
        .map(|package| format!("{} {}", value(package, "name").unwrap(), value(package, "version").unwrap()))
        .collect();
    assert_eq!(locked, listed, "run packaging/vendor and packaging/copyright");
}

#[test]
fn the_package_has_the_programs_version() {
    // An entry that packaging/build-deb adds for another version stands above the release's own.
    let release = format!("\npeergate ({}-", env!("CARGO_PKG_VERSION"));
    assert!(format!("\n{}", read("debian/changelog")).contains(&release));
}
