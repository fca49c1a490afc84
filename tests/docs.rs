//! What is written about the program matches it: manual pages, completions, journal catalog, shipped configuration and
//! packaging, each compared with its source.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use documents::*;

mod documents;
#[path = "../packaging/generate.rs"]
mod generate;

#[test]
fn completions_and_option_lists_match_the_command_line() {
    for (path, wanted) in generate::files(root()).unwrap() {
        let found = fs::read(root().join(&path)).unwrap();
        assert!(
            found == wanted,
            "{} does not follow src/daemon/cli.rs, or echod.toml(5): run `cargo run --example generate`",
            path.display()
        );
    }
}

/// The catalog's entries, by MESSAGE_ID: header lines and text.
fn catalog() -> BTreeMap<String, (Vec<String>, String)> {
    let text = read("packaging/peergate.catalog");
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
        for key in ["Subject: ", "Defined-By: peergate", "Documentation: man:"] {
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

#[test]
fn the_manual_page_lists_each_message_id_verdict_and_priority() {
    let written: BTreeSet<String> = WITH_ID.into_iter().filter_map(id_of).collect();
    assert_eq!(listed_ids(&read("packaging/man/echod.8")), written);
    assert_eq!(written.len(), catalog().len(), "an event is missing from WITH_ID");
}

#[test]
fn manual_page_and_catalog_name_exactly_the_fields_written() {
    let written = written_fields();
    // The proxy's page has these besides.
    let of_proxy = ["GATE_UPSTREAM", "GATE_BYTES_SENT"].map(str::to_owned);
    let of_echo = written.iter().filter(|name| !of_proxy.contains(name)).cloned().collect();
    assert_eq!(fields(&read("packaging/man/echod.8")), of_echo);
    let unknown: Vec<_> = fields(&read("packaging/peergate.catalog")).difference(&written).cloned().collect();
    assert_eq!(unknown, [] as [String; 0]);
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

#[test]
fn manual_page_and_shipped_configuration_list_the_same_settings() {
    let page = documented(&read("packaging/man/echod.toml.5"));
    assert_eq!(page, settings(&uncommented(&read("packaging/echod.toml"))));
}

#[test]
fn manual_page_and_shipped_configuration_show_every_key_of_a_rule() {
    assert_every_key_of_a_rule(&read("packaging/man/echod.toml.5"), &read("packaging/echod.toml"));
}

#[test]
fn manual_page_and_shipped_configuration_state_the_same_defaults() {
    assert_same_defaults(&read("packaging/man/echod.toml.5"), &read("packaging/echod.toml"), "[limits]");
}

#[test]
fn the_examples_of_the_manual_pages_are_accepted() {
    assert_examples_are_accepted(&read("packaging/man/echod.toml.5"), "");
}

#[test]
fn the_units_memory_is_enough_for_the_default_limits_and_the_manual_page_says_for_which_not() {
    assert_units_have_the_memory_for_the_default_limits("echo.service", "");
    let page = read("packaging/man/echod.toml.5").replace("\\-", "-");
    let example =
        page.split(".Bd -literal -offset indent\n").find(|block| block.contains("connections = 4096")).unwrap();
    let example = example.split(".Ed").next().unwrap().replace("\"self\"", "\"any\"");
    let need = need("memory-example", &example);
    assert!(page.contains(&format!("the service needs up to {need}M of memory")), "{need}M");
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
