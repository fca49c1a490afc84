//! Names of users and groups that the user database does not have yet, answers late or answers at length. The program
//! sees an /etc of the test's own. Needs root, for mounts and other users.

mod common;

use std::fs;
use std::io::ErrorKind;

use common::{ALICE, DENIED, Database, Echod, Journald, PeerProcess, Place, Start, TOO_LONG, eventually, needs_root};
use nix::sys::signal::Signal;

/// The number of threads of this name.
fn threads(echod: &Echod, name: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", echod.pid())).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|comm| comm.trim() == name).count()
}

fn denied(echod: &Echod, ids: &str) {
    PeerProcess::with(&["--as", ids], &echod.socket()).client().expect_end(DENIED);
}

fn echoes(echod: &Echod, ids: &str) {
    PeerProcess::with(&["--as", ids], &echod.socket()).client().echo("in");
}

#[test]
fn a_user_and_a_group_added_later_are_admitted_without_a_reload() {
    needs_root();
    let (database, journald) = (Database::new(), Journald::new());
    let policy = "[allow.new]\nusers = [\"newcomer\"]\n[allow.club]\ngroups = [\"club\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).journal(&journald).ready();
    denied(&echod, "64001:64001");
    denied(&echod, "64002:64100");
    database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
    let found = |name: &'static str| {
        journald.wait_for(name, move |entry| {
            let message = entry.get("MESSAGE").map_or("", String::as_str);
            message.starts_with("Names found and in force: ") && message.contains(name)
        })
    };
    let record = found("user \"newcomer\" (64001)");
    assert_eq!(record["MESSAGE_ID"], "b07bc66e288e48eba96896e38dfe1144");
    assert_eq!(record["PRIORITY"], "5");
    echoes(&echod, "64001:64001");
    denied(&echod, "64002:64100");
    // The other name is still looked up.
    database.add("group", "club:x:64100:");
    found("group \"club\" (64100)");
    echoes(&echod, "64002:64100");
    assert!(!echod.manager.received.lock().has("RELOADING=1"));
    echod.stop();
}

#[test]
fn a_name_found_later_holds_for_live_connections_too() {
    needs_root();
    let database = Database::new();
    let policy = "[allow.new]\nusers = [\"newcomer\"]\nline-length = 10\n[allow.any]\nusers = [\"any\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).ready();
    let alice = PeerProcess::user(ALICE, &echod.socket());
    alice.client().echo("longer than ten bytes");
    database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
    echod.wait_for_stderr("Names found");
    alice.client().send("longer than ten bytes\n");
    alice.client().expect_end(TOO_LONG);
    echod.connect().echo("longer than ten bytes");
}

#[test]
fn a_name_found_later_does_not_load_a_changed_file() {
    needs_root();
    let database = Database::new();
    let policy = "[allow.new]\nusers = [\"newcomer\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).ready();
    echod.place.file("echod.toml", "[allow.any]\nusers = [\"any\"]\n[half a change");
    database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
    echod.wait_for_stderr("Names found");
    echoes(&echod, "64001:64001");
    denied(&echod, "64002:64002");
}

#[test]
fn a_database_that_never_answers_blocks_only_one_thread() {
    needs_root();
    let database = Database::new();
    let policy = "[allow.new]\nusers = [\"newcomer\", \"self\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).env("WATCHDOG_USEC", "200000").ready();
    let client = echod.connect();
    let pipe = database.hang("passwd");
    eventually("a look for the name", || (threads(&echod, "names") > 0).then_some(()));
    client.echo("served");
    // A reload replaces the lookup in progress, and starts no second one.
    echod.reload_with("[allow.me]\nusers = [\"self\"]\n[allow.club]\ngroups = [\"club\"]\n");
    let fed = echod.manager.received.lock().count("WATCHDOG=1");
    echod.manager.wait_for("WATCHDOG=1", fed + 80);
    client.echo("still served");
    assert_eq!(threads(&echod, "names"), 1);
    // The late answer is not used, and the lookup of the name that is unknown now goes on.
    database.add("group", "club:x:64100:");
    // The C library may close a pipe unread, for it cannot seek in one: that ends the lookup too.
    let written = fs::write(&pipe, "newcomer:x:64001:64001::/:/bin/sh\n");
    assert!(
        written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) || written.is_ok(),
        "{written:?}"
    );
    echod.wait_for_stderr("Names found and in force: group \"club\" (64100)");
    echoes(&echod, "64002:64100");
    denied(&echod, "64001:64001");
    assert!(!echod.stderr().contains("newcomer\" (64001)"), "{}", echod.stderr());
}

#[test]
fn a_stop_does_not_wait_for_a_lookup() {
    needs_root();
    let database = Database::new();
    let echod = Start::serving("[allow.new]\nusers = [\"newcomer\", \"self\"]\n").wrapper(&database.wrapper()).ready();
    let client = echod.connect();
    client.send("half");
    database.hang("passwd");
    eventually("a look for the name", || (threads(&echod, "names") > 0).then_some(()));
    echod.signal(Signal::SIGTERM);
    let (status, _, stderr) = echod.wait();
    assert!(status.success(), "{stderr}");
    client.expect_end("> half");
}

#[test]
fn where_every_name_is_known_nothing_is_looked_up() {
    needs_root();
    let database = Database::new();
    let text = "[allow.known]\nusers = [\"root\"]\n[deny.known]\ngroups = [\"adm\"]\n";
    let echod = Start::serving(text).wrapper(&database.wrapper()).ready();
    database.hang("passwd");
    database.hang("group");
    // Another service finishes its first lookup in the time this one would take.
    let other = Database::new();
    let policy = "[allow.new]\nusers = [\"newcomer\", \"self\"]\n";
    let looking = Start::serving(policy).wrapper(&other.wrapper()).ready();
    other.hang("passwd");
    eventually("a look for the name", || (threads(&looking, "names") > 0).then_some(()));
    assert_eq!(threads(&echod, "names"), 0);
    echod.connect().echo("served");
}

#[test]
fn a_name_keeps_its_id_over_a_reload_without_an_answer() {
    needs_root();
    let database = Database::new();
    database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
    let policy = "[allow.new]\nusers = [\"newcomer\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).ready();
    let alice = PeerProcess::user(ALICE, &echod.socket());
    alice.client().echo("in");
    // A symlink to itself cannot be opened: ELOOP.
    fs::remove_file(database.path("passwd")).unwrap();
    std::os::unix::fs::symlink("passwd", database.path("passwd")).unwrap();
    echod.reload_with(&format!("{policy}[allow.root]\nusers = [0]\n"));
    echod.wait_for_stderr("the user database did not answer; as before: user \"newcomer\" (64001)");
    alice.client().echo("not cut off");
    echod.connect().echo("the new rule is in force");
    // A deny rule must not be lost.
    echod.place.file("echod.toml", "[allow.any]\nusers = [\"any\"]\n[deny.new]\nusers = [\"newcomer\"]\n");
    assert_eq!(echod.reload().0, 78);
    alice.client().echo("by the old policy");
}

/// A group of so many members that its entry is longer than 1 MiB. `newcomer` is one of them.
fn large_group(database: &Database) {
    let members: Vec<String> = (0..70_000).map(|number| format!("member-{number:010}")).collect();
    database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
    database.add("group", &format!("large:x:64100:{},newcomer", members.join(",")));
    assert!(fs::metadata(database.path("group")).unwrap().len() > 1 << 20);
}

#[test]
fn a_group_whose_entry_is_longer_than_a_mebibyte_is_found() {
    needs_root();
    let database = Database::new();
    large_group(&database);
    let policy = "[allow.large]\ngroups = [\"large\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).ready();
    echoes(&echod, "64002:64100");
    denied(&echod, "64002:64002");
    echod.reload_with(&format!("{policy}[deny.large]\ngroups = [\"large\"]\n"));
    denied(&echod, "64002:64100");

    let config = echod.place.file("allowed.toml", policy);
    let (code, shown, said) = database.echod(&["check"], &config);
    assert_eq!((code, said.as_str()), (0, ""));
    assert!(shown.contains("groups large (64100)"), "{shown}");
    for asked in [["--user", "newcomer"].as_slice(), &["--uid", "5", "--group", "large"]] {
        let (code, shown, said) = database.echod(&[&["explain"], asked].concat(), &config);
        assert!(shown.starts_with("admitted by allow.large\n"), "{asked:?}: {code} {shown} {said}");
    }
}

/// 66,000 groups are more than the kernel takes.
#[test]
fn explain_counts_all_groups_and_decides_as_the_service() {
    needs_root();
    let place = Place::new();
    for (count, verdict) in [(1_000, "admitted by allow.last\n"), (66_000, "denied by default\n")] {
        let database = Database::new();
        database.add("passwd", "newcomer:x:64001:64001::/:/bin/sh");
        let groups: Vec<String> = (0..count).map(|n| format!("g{n}:x:{}:newcomer", 100_000 + n)).collect();
        database.add("group", &groups.join("\n"));
        let config = place.file("echod.toml", &format!("[allow.last]\ngroups = [{}]\n", 99_999 + count));
        let (code, shown, said) = database.echod(&["explain", "--user", "newcomer"], &config);
        assert!(shown.starts_with(verdict), "{code} {shown} {said}");
        // The user's primary group counts too.
        let told = format!("({} supplementary groups; of more than 1024 none can be told)", count + 1);
        assert_eq!(shown.contains(&told), count > 1024, "{shown}");
    }
}

#[test]
fn names_in_allow_rules_wait_for_a_failing_database() {
    needs_root();
    let database = Database::new();
    fs::remove_file(database.path("passwd")).unwrap();
    std::os::unix::fs::symlink("passwd", database.path("passwd")).unwrap();
    let policy = "[allow.some]\nusers = [\"newcomer\", 0]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).ready();
    echod.wait_for_stderr("\"newcomer\" could not be looked up (");
    echod.connect().echo("by number");
    fs::remove_file(database.path("passwd")).unwrap();
    database.put("passwd", "newcomer:x:64001:64001::/:/bin/sh\n");
    echod.wait_for_stderr("Names found");
    echoes(&echod, "64001:64001");

    let config = echod.place.file("denied.toml", &format!("{policy}[deny.x]\nusers = [\"gone\"]\n"));
    fs::remove_file(database.path("passwd")).unwrap();
    std::os::unix::fs::symlink("passwd", database.path("passwd")).unwrap();
    let (code, _, said) = database.echod(&["check"], &config);
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("\"gone\" could not be looked up ("), "{said}");
}
