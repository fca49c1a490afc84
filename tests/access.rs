//! Which peers are admitted: real processes with other users and groups, decided on by their credentials. Needs root,
//! to change users.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{ALICE, BOB, BUSY, Client, DENIED, Echod, Manager, PeerProcess, Place, Start, needs_root};

/// Connects with the ids `uid:gid:groups` and expects to be admitted or denied.
#[track_caller]
fn expect(echod: &Echod, ids: &str, admitted: bool) {
    let other = PeerProcess::with(&["--as", ids], &echod.socket());
    expect_from(&other, ids, admitted);
}

#[track_caller]
fn expect_from(other: &PeerProcess, ids: &str, admitted: bool) {
    let client = other.client();
    // A denied connection may be closed before this is sent.
    let _ = client.try_send("who am I\n");
    if admitted {
        client.half_close();
        let (answer, end) = client.rest();
        assert_eq!((common::show(&answer), end), ("> who am I\\n".into(), common::End::Eof), "{ids}");
    } else {
        let (answer, end) = client.rest();
        assert_eq!((common::show(&answer), end), (common::show(DENIED), common::End::Eof), "{ids}");
    }
}

fn named_user() -> (&'static str, u32, u32) {
    // A user of every Debian system (base-passwd).
    ("backup", 34, 34)
}

#[test]
fn without_a_configuration_file_only_the_owner_is_admitted() {
    needs_root();
    let start = Start::bare().env("CONFIGURATION_DIRECTORY", "/no/such/directory");
    let listener = start.place().listener("socket");
    let echod = start.socket("s", listener).ready();
    echod.connect().echo("root is the owner here");
    expect(&echod, "64001:64001", false);
    expect(&echod, "64001:0:0", false);
}

#[test]
fn root_is_not_admitted_where_the_service_runs_as_another_user() {
    needs_root();
    let echod = Start::serving(common::OWNER).run_as("64001:64001").ready();
    echod.connect().expect_end(DENIED);
    expect(&echod, "64001:64001", true);
    expect(&echod, "64001:0:0", true);
    expect(&echod, "64002:64001", false);
    echod.stop();
}

#[test]
fn a_rule_names_users_by_name_number_range_or_any() {
    needs_root();
    let (name, uid, _) = named_user();
    for (users, inside, outside) in [
        (format!("[{ALICE}]"), vec![ALICE], vec![0, ALICE - 1, ALICE + 1]),
        (format!("[\"{ALICE}\"]"), vec![ALICE], vec![0, BOB]),
        ("[\"64001-64010\"]".into(), vec![64001, 64005, 64010], vec![64000, 64011, 0]),
        (format!("[\"{name}\"]"), vec![uid], vec![uid + 1, 0]),
        ("[\"any\"]".into(), vec![0, 1, ALICE, 4_000_000_000], vec![65_534]),
        (format!("[{BOB}, \"64100-64101\", \"{name}\"]"), vec![BOB, 64100, uid], vec![ALICE, 64102]),
    ] {
        let echod = Start::serving(&format!("[allow.listed]\nusers = {users}\n")).ready();
        for uid in inside {
            expect(&echod, &format!("{uid}:64900"), true);
        }
        for uid in outside {
            expect(&echod, &format!("{uid}:64900"), false);
        }
    }
}

#[test]
fn a_peers_groups_are_its_effective_and_supplementary_ones() {
    needs_root();
    let echod = Start::serving("[allow.listed]\ngroups = [\"adm\", 64100, \"64200-64210\"]\n").ready();
    // The group adm has gid 4 on every Debian system.
    for (ids, admitted) in [
        ("64001:4", true),
        ("64001:64001:4", true),
        ("64001:64100", true),
        ("64001:64001:64100", true),
        ("64001:64001:1,2,3,64210", true),
        ("64001:64001:64211", false),
        ("64001:64001", false),
        ("64001:64001:64099,64101", false),
        // A uid is no gid.
        ("64100:64001", false),
        // A member by its credentials, not in the user database.
        ("0:0:4", true),
        ("0:0", false),
        // 65534 is the overflow gid, which stands for any unmapped group.
        ("64001:65534", false),
        ("64001:64100:65534", true),
    ] {
        expect(&echod, ids, admitted);
    }
}

#[test]
fn a_membership_only_in_the_database_does_not_count() {
    needs_root();
    // The user database lists backup in the group backup; this process is not in that group.
    let (name, uid, _) = named_user();
    let echod = Start::serving(&format!("[allow.listed]\ngroups = [\"{name}\"]\n")).ready();
    expect(&echod, &format!("{uid}:64001"), false);
    expect(&echod, &format!("{uid}:{uid}"), true);
}

#[test]
fn a_peers_groups_count_as_they_were_at_connect() {
    needs_root();
    let echod = Start::serving("[allow.root]\nusers = [0]\n").ready();
    // Connects as root, then changes its user. The decision uses the credentials at connect(2).
    let other = PeerProcess::with(&["--then", "64001", "--say-after", "still root's\n"], &echod.socket());
    other.client().expect("> still root's\n");
}

#[test]
fn every_key_of_a_rule_must_hold() {
    needs_root();
    let echod = Start::serving("[allow.both]\nusers = [64001]\ngroups = [64100]\n").ready();
    expect(&echod, "64001:64100", true);
    expect(&echod, "64001:64001:64100", true);
    expect(&echod, "64001:64001", false);
    expect(&echod, "64002:64100", false);
}

#[test]
fn deny_rules_come_first_wherever_they_are_written() {
    needs_root();
    let policy = "[allow.all]\nusers = [\"any\"]\n[deny.contractors]\nusers = [\"64001-64005\"]\n\
                  [deny.tainted]\ngroups = [64100]\n";
    let echod = Start::serving(policy).ready();
    for (ids, admitted) in [
        ("64001:64001", false),
        ("64005:64001", false),
        ("64006:64006", true),
        ("64006:64006:64100", false),
        ("64006:64100", false),
        ("0:0", true),
    ] {
        expect(&echod, ids, admitted);
    }
}

#[test]
fn a_deny_rule_on_an_unmapped_group_counts_as_matched() {
    needs_root();
    let echod = Start::serving("[allow.all]\nusers = [\"any\"]\n[deny.tainted]\ngroups = [64100]\n").ready();
    // An unmapped group could be the denied one.
    expect(&echod, "64001:64001:65534", false);
    expect(&echod, "64001:64001", true);
}

#[test]
fn the_first_matching_allow_rule_in_the_file_sets_the_limits() {
    needs_root();
    let policy = "[allow.first]\nusers = [64001]\nline-length = 10\n\
                  [allow.second]\nusers = [\"any\"]\nline-length = 20\n";
    let echod = Start::serving(policy).ready();
    let alice = PeerProcess::user(ALICE, &echod.socket());
    alice.client().send("123456789\n1234567890\n");
    alice.client().expect_end("> 123456789\nLine too long\n");
    let bob = PeerProcess::user(BOB, &echod.socket());
    bob.client().send("1234567890\n1234567890123456789\n12345678901234567890\n");
    bob.client().expect_end("> 1234567890\n> 1234567890123456789\nLine too long\n");
}

#[test]
fn the_limit_for_each_user_is_exact_and_counted_by_user() {
    needs_root();
    let echod = Start::serving("[limits]\nconnections-per-user = 5\n[allow.all]\nusers = [\"any\"]\n").ready();
    // Kept open until the end of the test, so that ALICE's connections would count if BOB had no limit of his own.
    let mut crowds = Vec::new();
    for uid in [ALICE, BOB] {
        let ids = format!("{uid}:{uid}");
        let crowd = PeerProcess::wrapped(&[], &["--as", &ids], 5, &echod.socket());
        for client in &crowd.connections {
            client.echo("in");
        }
        let late = PeerProcess::wrapped(&[], &["--as", &ids], 3, &echod.socket());
        for client in &late.connections {
            client.expect_end(BUSY);
        }
        crowds.push(crowd);
    }
    echod.connect().echo("root has a limit of its own too");
}

#[test]
fn a_rule_may_raise_or_lower_the_limit_for_its_peers() {
    needs_root();
    let policy = "[limits]\nconnections-per-user = 3\n\
                  [allow.many]\nusers = [64001]\nconnections-per-user = 7\n\
                  [allow.few]\nusers = [64002]\nconnections-per-user = 1\n\
                  [allow.rest]\nusers = [\"any\"]\n";
    let echod = Start::serving(policy).ready();
    let mut stay = Vec::new();
    for (uid, limit) in [(ALICE, 7), (BOB, 1), (64003, 3)] {
        let ids = format!("{uid}:{uid}");
        let crowd = PeerProcess::wrapped(&[], &["--as", &ids], limit + 2, &echod.socket());
        let (inside, outside) = crowd.connections.split_at(limit);
        inside.iter().for_each(|client| client.echo("in"));
        outside.iter().for_each(|client| client.expect_end(BUSY));
        inside.iter().for_each(|client| client.echo("still in"));
        stay.push(crowd);
    }
}

#[test]
fn the_limit_on_all_connections_is_exact_over_all_users() {
    needs_root();
    let echod = Start::serving("[limits]\nconnections = 6\n[allow.all]\nusers = [\"any\"]\n").ready();
    let alice = PeerProcess::wrapped(&[], &["--as", "64001:64001"], 4, &echod.socket());
    let bob = PeerProcess::wrapped(&[], &["--as", "64002:64002"], 2, &echod.socket());
    alice.connections.iter().chain(&bob.connections).for_each(|client| client.echo("in"));
    echod.connect().expect_end(BUSY);
    for client in bob.end() {
        client.half_close();
        client.expect_end(b"");
    }
    let again: Vec<Client> = (0..2).map(|_| echod.connect()).collect();
    again.iter().for_each(|client| client.echo("in the places given back"));
    echod.connect().expect_end(BUSY);
}

/// Every way in which a connection can end. After each its permit is free at once.
#[test]
fn a_permit_is_given_back_however_a_connection_ends() {
    let policy = |limit: usize| {
        format!("[limits]\nconnections-per-user = 1\nconnections = 1\nline-length = {limit}\n{}", common::OWNER)
    };
    let echod = Start::serving(&policy(100)).ready();
    type Way = (&'static str, fn(&Echod, Client));
    let ways: [Way; 7] = [
        ("half-closed", |_, client| {
            client.half_close();
            client.expect_end(b"");
        }),
        ("closed", |_, client| drop(client)),
        ("closed in the middle of a line", |_, client| client.send("half")),
        ("closed with its echo unread", |_, client| client.send("never read\n")),
        ("too long a line", |_, client| {
            client.send([b'x'; 101]);
            client.expect_end(common::TOO_LONG);
        }),
        ("revoked", |echod, client| {
            echod.reload_with(common::DENY_ALL);
            client.expect_end(DENIED);
        }),
        ("shut down on both sides", |_, client| {
            client.0.shutdown(std::net::Shutdown::Both).unwrap();
        }),
    ];
    for (way, end) in ways {
        for _ in 0..5 {
            echod.reload_with(&policy(100));
            let client = echod.connect();
            client.echo("in");
            echod.connect().expect_end(BUSY);
            end(&echod, client);
            echod.reload_with(&policy(100));
            let next = echod.connect();
            next.send("next\n");
            let (answer, _) = {
                next.half_close();
                next.rest()
            };
            assert_eq!(common::show(&answer), "> next\\n", "after a connection was {way}");
        }
    }
}

#[test]
fn an_idle_connection_is_closed_cleanly_and_an_active_one_stays() {
    let echod = Start::serving(&format!("[limits]\nidle-timeout = \"300ms\"\n{}", common::OWNER)).ready();
    let idle = echod.connect();
    idle.echo("once");
    let halfway = echod.connect();
    halfway.send("a fragment is not echoed at a timeout");
    let busy = echod.connect();
    // The busy client echoes until the idle connection is closed, and must still be open then.
    idle.0.set_nonblocking(true).unwrap();
    let mut byte = [0];
    loop {
        busy.echo("busy");
        match std::io::Read::read(&mut &idle.0, &mut byte) {
            Ok(0) => break,
            Ok(_) => panic!("an idle connection got a byte"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    busy.echo("still here");
    assert_eq!(halfway.rest().1, common::End::Eof);
}

#[test]
fn a_rule_may_have_an_idle_timeout_of_its_own() {
    needs_root();
    let policy = "[limits]\nidle-timeout = \"50ms\"\n\
                  [allow.patient]\nusers = [64001]\nidle-timeout = \"off\"\n[allow.rest]\nusers = [\"any\"]\n";
    let echod = Start::serving(policy).ready();
    let alice = PeerProcess::user(ALICE, &echod.socket());
    alice.client().echo("I think");
    let bob = PeerProcess::user(BOB, &echod.socket());
    bob.client().expect_end(b"");
    alice.client().echo("slowly");
}

fn explain(config: &Path, args: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_echod"))
        .arg("explain")
        .args(args)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn explain_and_the_service_decide_the_same_about_a_process() {
    needs_root();
    let policy =
        "[deny.tainted]\ngroups = [64100]\n[allow.listed]\nusers = [64001, 64002]\n[allow.staff]\ngroups = [64200]\n";
    let echod = Start::serving(policy).ready();
    for (ids, expected) in [
        ("64001:64001", "admitted by allow.listed"),
        ("64001:64100", "denied by deny.tainted"),
        ("64003:64003", "denied by default"),
        ("64003:64003:64200", "admitted by allow.staff"),
        ("64003:64200:64100", "denied by deny.tainted"),
        ("0:0", "denied by default"),
    ] {
        let other = PeerProcess::with(&["--as", ids], &echod.socket());
        let (code, text) = explain(&echod.place.path("echod.toml"), &["--pid", &other.pid().to_string()]);
        assert_eq!(text.lines().next(), Some(expected), "{ids}");
        let admitted = expected.starts_with("admitted");
        assert_eq!(code, i32::from(!admitted), "{ids}");
        expect_from(&other, ids, admitted);
    }
}

#[test]
fn the_status_counts_connections_and_denials() {
    let echod = Start::serving(common::OWNER).ready();
    let client = echod.connect();
    client.echo("hello");
    let status = "STATUS=1 connected, 1 admitted, 0 denied; policy of 1 rule";
    wait_for_status(&echod.manager, status);
    echod.reload_with(common::DENY_ALL);
    client.expect_end(DENIED);
    echod.connect().expect_end(DENIED);
    wait_for_status(&echod.manager, "STATUS=0 connected, 1 admitted, 1 denied; policy of 1 rule");
}

fn wait_for_status(manager: &Manager, status: &str) {
    manager.wait_for(status, 1);
}

/// A service that binds its own socket.
fn listening(path: &Path) -> Start {
    Start::bare().config(common::OWNER).args(&["--listen", path.to_str().unwrap()])
}

#[test]
fn a_socket_of_another_user_at_the_path_is_not_removed() {
    needs_root();
    let place = Place::new();
    let path = place.path("own");
    let mut theirs = None;
    let echod = listening(&path).swapped_after_bind(&path, || {
        fs::remove_file(&path).unwrap();
        theirs = Some(UnixListener::bind(&path).unwrap());
        chown(&path, Some(ALICE), None).unwrap();
    });
    echod.stop();
    UnixStream::connect(&path).expect("the other socket is still there");
}

#[test]
fn a_socket_is_bound_in_an_unreadable_directory() {
    needs_root();
    let place = Place::new();
    let directory = place.path("drop");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o733)).unwrap();
    let path = directory.join("own");
    let echod = listening(&path).run_as("64001:64001").ready();
    PeerProcess::user(ALICE, &path).client().echo("it serves");
    echod.stop();
    assert!(!path.exists());
}

fn check(config: &Path) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_echod")).arg("check").arg("--config").arg(config).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn directory(path: PathBuf, owner: u32, mode: u32) -> PathBuf {
    fs::create_dir(&path).unwrap();
    chown(&path, Some(owner), None).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// Owner and mode do not protect the file: any user that may write the directory can move an old file of root there.
#[test]
fn a_file_below_a_directory_that_others_may_write_is_refused() {
    needs_root();
    let owned = "owned by uid 64001; expected root or the service's user, uid 0";
    let writable = |mode: &str| format!("others than its owner may write it (mode {mode}); expected mode 0755 or less");
    for (owner, mode, why) in [
        (ALICE, 0o755, owned.to_owned()),
        (ALICE, 0o1777, owned.to_owned()),
        (0, 0o775, writable("0775")),
        (0, 0o757, writable("0757")),
        (0, 0o777, writable("0777")),
    ] {
        let place = Place::new();
        let outer = directory(place.path("outer"), owner, mode);
        let inner = directory(outer.join("inner"), 0, 0o755);
        let file = place.file("outer/echod.toml", common::OWNER);
        fs::copy(&file, inner.join("echod.toml")).unwrap();
        symlink(&outer, place.path("link")).unwrap();
        symlink("outer/inner/../echod.toml", place.path("echod.toml")).unwrap();
        for way in ["outer/echod.toml", "outer/inner/echod.toml", "link/echod.toml", "echod.toml"] {
            let (code, stderr) = check(&place.path(way));
            assert_eq!(code, 78, "{way}, {owner}, {mode:o}: {stderr}");
            assert!(stderr.contains(&format!("directory {}: {why}", outer.display())), "{way}: {stderr}");
        }
        let (code, _, stderr) =
            Start::bare().args(&["--listen", "/x", "--config"]).args(&[file.to_str().unwrap()]).run();
        assert_eq!(code, 78, "{stderr}");
    }
}

/// Any user that may write the directory can remove the file, to have the defaults used in its stead.
#[test]
fn a_default_file_that_others_may_remove_is_an_error_if_missing() {
    needs_root();
    let place = Place::new();
    for (name, owner, mode) in [("owned", ALICE, 0o755), ("writable", 0, 0o777)] {
        let theirs = directory(place.path(name), owner, mode);
        let start = Start::bare().env("CONFIGURATION_DIRECTORY", theirs.to_str().unwrap());
        let listener = start.place().listener("socket");
        let (code, _, stderr) = start.socket("s", listener).run();
        assert_eq!(code, 78, "{stderr}");
    }
}

#[test]
fn a_default_file_below_a_closed_directory_is_an_error() {
    needs_root();
    let place = Place::new();
    let closed = directory(place.path("closed"), 0, 0o700);
    let start = Start::bare().env("CONFIGURATION_DIRECTORY", closed.to_str().unwrap()).run_as("64001:64001");
    let listener = start.place().listener("socket");
    let (code, _, stderr) = start.socket("s", listener).run();
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("cannot be read"), "{stderr}");
}

/// Like /tmp: a file of root in a sticky directory can be replaced only by root.
#[test]
fn in_a_sticky_directory_only_a_file_of_another_user_is_refused() {
    needs_root();
    let place = Place::new();
    let sticky = directory(place.path("sticky"), 0, 0o1777);
    let file = place.file("sticky/echod.toml", common::OWNER);
    assert_eq!(check(&file).0, 0);
    let inner = directory(sticky.join("inner"), 0, 0o755);
    fs::rename(&file, inner.join("echod.toml")).unwrap();
    assert_eq!(check(&inner.join("echod.toml")).0, 0);

    let link = sticky.join("link");
    symlink(inner.join("echod.toml"), &link).unwrap();
    assert_eq!(check(&link).0, 0);
    lchown(&link, Some(ALICE), None).unwrap();
    let (code, stderr) = check(&link);
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains(&format!("symbolic link {}: owned by uid {ALICE}", link.display())), "{stderr}");

    let second_name = sticky.join("hard");
    fs::hard_link(inner.join("echod.toml"), &second_name).unwrap();
    let (code, stderr) = check(&second_name);
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("has 2 names"), "{stderr}");
}

#[test]
fn the_services_user_may_own_the_directories_of_its_file() {
    needs_root();
    let place = Place::new();
    let home = directory(place.path("home"), ALICE, 0o755);
    let config = directory(home.join("echod"), ALICE, 0o755);
    fs::write(config.join("echod.toml"), common::OWNER).unwrap();
    chown(config.join("echod.toml"), Some(ALICE), None).unwrap();
    let start = Start::bare().env("CONFIGURATION_DIRECTORY", "").env("XDG_CONFIG_HOME", home.to_str().unwrap());
    let listener = start.place().listener("socket");
    let echod = start.run_as("64001:64001").socket("s", listener).ready();
    expect(&echod, "64001:64001", true);
    echod.stop();
}

/// In this user namespace the directories of root belong to the overflow uid.
#[test]
fn in_a_user_namespace_without_root_the_users_file_is_read() {
    needs_root();
    let place = Place::new();
    let program = place.path("echod");
    common::copy_program(env!("CARGO_BIN_EXE_echod"), &program);
    let home = directory(place.path("home"), ALICE, 0o755);
    let file = place.file("home/echod.toml", common::OWNER);
    let check = || {
        let words = ["--reuid=64001", "--regid=64001", "--clear-groups", "unshare", "--user", "--map-root-user"];
        let mut command = Command::new("setpriv");
        command.args(words).arg(&program).arg("check").arg("--config").arg(&file).current_dir(&home);
        let output = command.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = check();
    assert_eq!(code, 78, "root's file: {stderr}");
    assert!(stderr.contains("owned by uid 65534"), "{stderr}");
    chown(&file, Some(ALICE), None).unwrap();
    let (code, stderr) = check();
    assert_eq!(code, 0, "{stderr}");
}
