//! What crate boundaries do not enforce, read from the sources: the policy is pure; each crate that speaks to systemd, unsafe
//! code and the credential calls have one module each; no two modules import each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The sources of a crate, by their path in its folder: code only, without comments and tests.
fn sources(krate: &str) -> BTreeMap<String, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(krate);
    let mut found = BTreeMap::new();
    let mut directories = vec![src.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("examples") {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
                found.insert(name, code(&fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).fold(String::new(), |all, line| all + line + "\n")
}

/// The library's sources.
fn library() -> BTreeMap<String, String> {
    let sources = sources("peergate");
    assert!(sources.len() > 10, "the sources are to be found elsewhere now");
    sources
}

/// The files that hold one of these words.
fn users_of(words: &[&str], sources: &BTreeMap<String, String>) -> Vec<String> {
    let uses = |code: &str| words.iter().any(|word| code.contains(word));
    sources.iter().filter(|(_, code)| uses(code)).map(|(name, _)| name.clone()).collect()
}

#[test]
fn each_crate_that_speaks_to_systemd_has_one_module() {
    let library = library();
    assert_eq!(users_of(&["listenfd"], &library), ["systemd/activation.rs"]);
    assert_eq!(users_of(&["sd_notify"], &library), ["systemd/notify.rs"]);
    assert_eq!(users_of(&["tracing_journald", "tracing_subscriber", "tracing::"], &library), ["journal.rs"]);
    let program = sources("echod");
    let none: [String; 0] = [];
    assert_eq!(users_of(&["listenfd", "sd_notify", "tracing"], &program), none);
}

#[test]
fn only_sys_is_unsafe() {
    let all = library();
    assert_eq!(users_of(&["unsafe {", "unsafe fn", "allow(unsafe_code)"], &all), ["sys.rs", "sys/thread_ids.rs"]);
    assert!(all["lib.rs"].contains("#![deny(unsafe_code)]"));
    for program in ["echod", "proxy"] {
        assert!(sources(program)["lib.rs"].contains("#![cfg_attr(not(test), forbid(unsafe_code))]"));
        assert!(sources(program)["main.rs"].contains("#![forbid(unsafe_code)]"));
    }
}

#[test]
fn only_peer_reads_credentials() {
    let words = ["PeerCredentials", "PeerPidfd", "peer_groups(", "peer_label("];
    assert_eq!(users_of(&words, &library()), ["identity/peer.rs", "sys.rs"]);
}

#[test]
fn the_policy_uses_no_socket_no_clock_no_log_and_no_file() {
    let is_of_policy = |name: &String| name == "policy.rs" || name.starts_with("policy/");
    let policy: BTreeMap<_, _> = library().into_iter().filter(|(name, _)| is_of_policy(name)).collect();
    assert!(policy.contains_key("policy.rs"));
    let impure = ["std::os", "std::net", "std::time", "std::fs", "std::io", "std::env", "tracing", "nix::", "libc::"];
    let none: [String; 0] = [];
    assert_eq!(users_of(&impure, &policy), none);
    for (name, code) in &policy {
        for module in imports(code) {
            let is_pure = ["ids", "unit", "Subject", "escape"].contains(&module.as_str());
            assert!(is_pure, "{name} imports {module}");
        }
    }
}

/// Cargo does not look for tests at the top of the workspace: a file that no manifest names is never compiled.
#[test]
fn each_test_file_is_named_in_a_manifest() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let manifest = |krate: &str| fs::read_to_string(top.join("src").join(krate).join("Cargo.toml")).unwrap();
    let manifests = ["peergate", "daemon", "echod", "proxy"].map(manifest).concat();
    let names = fs::read_dir(top.join("tests")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let files: Vec<_> = names.filter(|name| name.ends_with(".rs")).collect();
    assert!(files.len() > 10, "the tests are to be found elsewhere now");
    let unnamed: Vec<_> = files.iter().filter(|name| !manifests.contains(&format!("/tests/{name}\""))).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
}

/// What the library's root calls the modules and types that a source names.
fn imports(code: &str) -> BTreeSet<String> {
    let after = code.split("crate::").skip(1);
    let words = after.filter_map(|rest| rest.split(|c: char| !c.is_ascii_alphabetic() && c != '_').next());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[test]
fn no_two_modules_import_each_other() {
    let library = imports_by_module(library());
    assert!(library["gate"].contains("identity"), "imports are written otherwise now");
    expect_no_cycle(&library);
}

fn imports_by_module(sources: BTreeMap<String, String>) -> BTreeMap<String, BTreeSet<String>> {
    let mut known: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, code) in sources {
        let module = name.trim_end_matches(".rs").split('/').next().unwrap().to_owned();
        if module != "lib" && module != "main" {
            // The root has short names for these.
            let is_identity = |name: &String| ["ids", "peer", "unit", "Subject"].contains(&name.as_str());
            let homes =
                imports(&code).into_iter().map(|name| if is_identity(&name) { "identity".into() } else { name });
            known.entry(module).or_default().extend(homes);
        }
    }
    known
}

fn expect_no_cycle(known: &BTreeMap<String, BTreeSet<String>>) {
    // The modules reachable from this one. It is among them only if there is a cycle.
    for start in known.keys() {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&String> = known[start].iter().filter(|other| *other != start).collect();
        while let Some(module) = next.pop() {
            if reached.insert(module.clone()) {
                next.extend(known.get(module).into_iter().flatten().filter(|other| *other != module));
            }
        }
        assert!(!reached.contains(start), "{start} imports itself by way of {reached:?}");
    }
}
