//! Deny means deny: peers that shed their groups or take on subordinate ids, with the real unshare(1) and newuidmap(1); and
//! which user logged in. The program and its peers see an /etc of the test's own. Needs root, for mounts and other users.

mod common;

use std::path::PathBuf;

use common::records::{get, with_verdict};
use common::{BUSY, Client, DENIED, Database, Echod, End, Journald, PeerProcess, Start, needs_root, show};

const EVE: &str = "64021";
const ADMIT_ALL: &str = "[allow.any]\nusers = [\"any\"]\n";
/// What unshare(1) makes of a user who has subordinate ids: root in a user namespace of its own.
const UNSHARE: [&str; 3] = ["unshare", "--map-root-user", "--map-auto"];

/// eve, a member of the group outcasts, with subordinate ids as useradd(8) gives them. frank's own group is outcasts.
fn world() -> Database {
    needs_root();
    let database = Database::new();
    database.add(
        "passwd",
        "eve:x:64021:64021::/:/bin/sh\nfrank:x:64022:64030::/:/bin/sh\nmallory:x:64023:64023::/:/bin/sh",
    );
    database.add("group", "eve:x:64021:\noutcasts:x:64030:eve,gone");
    let ids = "eve:1000000:65536\nfrank:1065536:65536\n";
    database.put("subuid", ids);
    database.put("subgid", ids);
    database
}

fn serving(database: &Database, policy: &str) -> Echod {
    Start::serving(policy).wrapper(&database.wrapper()).ready()
}

/// Connects `count` times as `uid`, with these supplementary groups, by way of `wrapper`.
fn connect(database: &Database, echod: &Echod, ids: [&str; 2], wrapper: &[&str], count: usize) -> PeerProcess {
    let [uid, groups] = ids;
    // frank's own group is another than that of his number.
    let gid = if uid == "64022" { "64030" } else { uid };
    let program: PathBuf = echod.place.path("peer");
    if !program.exists() {
        common::copy_program(common::peer_program(), &program);
    }
    let mut words = database.wrapper();
    let become_user = ["setpriv", "--reuid", uid, "--regid", gid];
    words.extend(become_user.map(str::to_owned));
    if groups.is_empty() {
        words.push("--clear-groups".to_owned());
    } else {
        words.extend(["--groups".to_owned(), groups.to_owned()]);
    }
    words.extend(wrapper.iter().map(|word| (*word).to_owned()));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    PeerProcess::of_program(&program, &words, &[], count, &echod.socket())
}

#[track_caller]
fn is_admitted(client: &Client) -> bool {
    let _ = client.try_send("in?\n");
    let _ = client.0.shutdown(std::net::Shutdown::Write);
    match client.rest() {
        (answer, End::Eof) if answer == b"> in?\n" => true,
        (answer, End::Eof) if answer == DENIED => false,
        (answer, end) => panic!("{} {end:?}", show(&answer)),
    }
}

#[test]
fn a_member_of_a_denied_group_is_denied_without_showing_the_group() {
    let database = world();
    let policy = format!("[deny.outcasts]\ngroups = [\"outcasts\"]\n{ADMIT_ALL}");
    let echod = serving(&database, &policy);
    let shed = [&UNSHARE[..], &["setpriv", "--clear-groups"]].concat();
    let under_another = [&UNSHARE[..], &["setpriv", "--reuid", "7", "--regid", "7", "--clear-groups"]].concat();
    for (ids, wrapper, admitted) in [
        ([EVE, "64030"], &[][..], false),
        ([EVE, "64030"], &shed, false),
        ([EVE, "64030"], &under_another, false),
        // frank is in no list of members: the group is his own.
        (["64022", ""], &under_another, false),
        (["64023", ""], &[], true),
    ] {
        let peer = connect(&database, &echod, ids, wrapper, 1);
        assert_eq!(is_admitted(peer.client()), admitted, "{ids:?} {wrapper:?}");
    }
    let config = echod.place.path("echod.toml");
    let explain = |uid: &str| database.echod(&["explain", "--uid", uid], &config).1;
    assert!(
        explain(EVE).contains("groups: yes, uid 64021 is a member of group 64030 by the user database"),
        "{}",
        explain(EVE)
    );
    let text = explain("1000006");
    assert!(text.starts_with("denied by deny.outcasts\n"), "{text}");
    assert!(
        text.contains("groups: yes, uid 1000006 is a subordinate id of uid 64021 (/etc/subuid), which is a member"),
        "{text}"
    );
}

#[test]
fn a_denied_user_is_denied_under_a_subordinate_id() {
    let database = world();
    let echod = serving(&database, &format!("[deny.eve]\nusers = [\"eve\"]\n{ADMIT_ALL}"));
    let under_another = [&UNSHARE[..], &["setpriv", "--reuid", "7", "--regid", "7", "--clear-groups"]].concat();
    for (uid, wrapper, admitted) in
        [(EVE, &UNSHARE[..], false), (EVE, &under_another, false), ("64022", &under_another, true)]
    {
        let peer = connect(&database, &echod, [uid, ""], wrapper, 1);
        assert_eq!(is_admitted(peer.client()), admitted, "{uid} {wrapper:?}");
    }
    let text = database.echod(&["explain", "--uid", "1000006"], &echod.place.path("echod.toml")).1;
    let why = "users: yes, uid 1000006 is a subordinate id of uid 64021 (/etc/subuid), which is among eve (64021)";
    assert!(text.contains(why), "{text}");
}

#[test]
fn a_user_whose_uid_lies_in_anothers_range_is_not_that_other_one() {
    let database = world();
    database.put("subuid", "frank:64000:100\n");
    let policy = format!("[limits]\nconnections-per-user = 1\n[deny.frank]\nusers = [\"frank\"]\n{ADMIT_ALL}");
    let echod = serving(&database, &policy);
    let held = [EVE, "64023"].map(|uid| connect(&database, &echod, [uid, ""], &[], 1));
    held.iter().for_each(|peer| peer.client().echo("in, beside another user of the range"));
    for uid in ["64022", "64000", "64099"] {
        assert!(!is_admitted(connect(&database, &echod, [uid, ""], &[], 1).client()), "{uid}");
    }
    assert!(is_admitted(connect(&database, &echod, ["64100", ""], &[], 1).client()));
    let warning = "/etc/subuid:1:1: the range covers the uid 64021 of a user, who keeps it";
    assert!(echod.stop().contains(warning));
}

#[test]
fn each_of_fifty_thousand_members_of_a_denied_group_is_denied() {
    let database = world();
    let names: Vec<String> = (0..50_000).map(|number| format!("member{number}")).collect();
    let accounts = names.iter().zip(200_000..).map(|(name, uid)| format!("{name}:x:{uid}:{uid}::/:\n"));
    database.add("passwd", accounts.collect::<String>().trim_end());
    database.add("group", &format!("crowd:x:64040:{}", names.join(",")));
    let policy = format!("[deny.crowd]\ngroups = [\"crowd\"]\n{ADMIT_ALL}");
    database.put("echod.toml", &policy);
    for (uid, verdict) in
        [("200000", "denied by deny.crowd"), ("249999", "denied by deny.crowd"), ("250000", "admitted by allow.any")]
    {
        let text = database.echod(&["explain", "--uid", uid], &database.path("echod.toml")).1;
        assert_eq!(text.lines().next(), Some(verdict), "{text}");
    }
    let echod = serving(&database, &policy);
    assert!(!is_admitted(connect(&database, &echod, ["249999", ""], &[], 1).client()));
    assert!(is_admitted(connect(&database, &echod, ["250000", ""], &[], 1).client()));
}

#[test]
fn one_user_has_one_limit_under_all_subordinate_ids() {
    let database = world();
    let policy = format!("[limits]\nconnections-per-user = 3\n{ADMIT_ALL}");
    let echod = Start::serving(&policy).wrapper(&database.wrapper()).with_store();
    let under = |uid: &'static str, count| {
        let wrapper = [&UNSHARE[..], &["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]].concat();
        connect(&database, &echod, [EVE, ""], &wrapper, count)
    };
    let held = [connect(&database, &echod, [EVE, ""], &[], 1), under("5", 1), under("6", 1)];
    held.iter().for_each(|peer| peer.client().echo("in"));
    under("7", 1).client().expect_end(BUSY);
    connect(&database, &echod, ["64023", ""], &[], 1).client().echo("another user");
    // A restart counts them alike.
    let echod = echod.restart(|start, _| start.wrapper(&database.wrapper()));
    held.iter().for_each(|peer| peer.client().echo("still in"));
    let wrapper = [&UNSHARE[..], &["setpriv", "--reuid", "8", "--regid", "8", "--clear-groups"]].concat();
    connect(&database, &echod, [EVE, ""], &wrapper, 1).client().expect_end(BUSY);
}

#[test]
fn one_user_has_one_burst_of_records_under_all_subordinate_ids() {
    let policy = format!("[audit]\nburst = 2\n{}", common::DENY_ALL);
    for is_learnt_by_a_reload in [false, true] {
        let (database, journald) = (world(), Journald::new());
        let subuid = std::fs::read_to_string(database.path("subuid")).unwrap();
        if is_learnt_by_a_reload {
            database.put("subuid", "");
        }
        let echod = Start::serving(&policy).wrapper(&database.wrapper()).journal(&journald).ready();
        if is_learnt_by_a_reload {
            database.put("subuid", &subuid);
            echod.reload();
        }
        for uid in [EVE, "5", "6", "7", "8"] {
            let under = [&UNSHARE[..], &["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]].concat();
            let wrapper = if uid == EVE { &[][..] } else { &under };
            connect(&database, &echod, [EVE, ""], wrapper, 1).client().expect_end(DENIED);
        }
        echod.stop();
        let entries = journald.entries();
        let of = |verdict| entries.iter().filter(|entry| with_verdict(verdict)(entry)).collect::<Vec<_>>();
        let denied: Vec<_> = of("denied").iter().map(|entry| get(entry, "PEER_UID")).collect();
        assert_eq!(denied, [EVE, "1000004"], "{entries:?}");
        let [summary] = of("summary")[..] else { panic!("{entries:?}") };
        assert_eq!([get(summary, "PEER_UID"), get(summary, "GATE_COUNT")], [EVE, "3"]);
    }
}

#[test]
fn a_reload_learns_new_members_and_subordinate_ids() {
    let database = world();
    let policy = format!("[deny.outcasts]\ngroups = [\"outcasts\"]\n{ADMIT_ALL}");
    let echod = serving(&database, &policy);
    let peer = || connect(&database, &echod, ["64023", ""], &[], 1);
    let admitted = peer();
    admitted.client().echo("in");
    let members = std::fs::read_to_string(database.path("group")).unwrap().replace(":eve,gone", ":eve,gone,mallory");
    database.put("group", &members);
    echod.reload();
    assert!(!is_admitted(peer().client()));
    admitted.client().expect_end(DENIED);
}

#[test]
fn check_tells_of_lines_in_subuid_that_are_not_as_meant() {
    let database = world();
    database.put(
        "subuid",
        "eve:1000000:65536\nfrank:64000:100\n# comment\nnobody-here:1:1\neve:1:-5\nmallory:0x200000:010\n",
    );
    let config = database.path("echod.toml");
    database.put("echod.toml", ADMIT_ALL);
    let (code, _, stderr) = database.echod(&["check"], &config);
    assert_eq!(code, 0, "{stderr}");
    for warning in [
        "warning: /etc/subuid:2:1: the range covers the uid 64021 of a user, who keeps it; expected ids that no user has",
        "warning: /etc/subuid:4:1: \"nobody-here:1:1\" gives no user an id; expected a user that exists",
        "warning: /etc/subuid:5:1: \"eve:1:-5\" gives no user an id; expected OWNER:FIRST:COUNT such as alice:100000:65536",
    ] {
        assert!(stderr.contains(warning), "{warning}\n{stderr}");
    }
    assert_eq!(stderr.lines().count(), 3, "{stderr}");
    database.put("nsswitch.conf", "passwd: files sss\ngroup: files\nsubid: sss\n");
    database.put("echod.toml", &format!("[deny.outcasts]\ngroups = [\"outcasts\"]\n{ADMIT_ALL}"));
    let (_, _, stderr) = database.echod(&["check"], &config);
    assert!(stderr.contains("warning: a deny rule has groups, and /etc/nsswitch.conf names files, sss:"), "{stderr}");
    assert!(stderr.contains("warning: subordinate ids come from sss (subid: in /etc/nsswitch.conf)"), "{stderr}");
}

/// A process of root's that a login of `login` started connects.
fn of_login(login: &str, uid: &str, echod: &Echod) -> PeerProcess {
    PeerProcess::with(&["--login", login, "--as", &format!("{uid}:{uid}")], &echod.socket())
}

const NO_LOGIN: &str = "4294967295";

#[test]
fn the_record_of_a_denied_root_names_the_user_who_logged_in() {
    let database = world();
    let journald = Journald::new();
    let start = Start::serving(common::DENY_ALL).wrapper(&database.wrapper()).journal(&journald);
    let echod = start.ready();
    let record = |login: &str, uid: &str| {
        let peer = of_login(login, uid, &echod);
        peer.client().expect_end(DENIED);
        let pid = peer.pid().to_string();
        journald.wait_for("the denial", |entry| get(entry, "PEER_PID") == pid && with_verdict("denied")(entry))
    };
    let denied = record(EVE, "0");
    assert_eq!((get(&denied, "PEER_LOGINUID"), get(&denied, "PEER_LOGIN")), (EVE, "eve"));
    assert!(get(&denied, "PEER_SESSION").parse::<u32>().is_ok(), "{denied:?}");
    let message = get(&denied, "MESSAGE");
    assert!(message.starts_with("Denied root (uid 0, logged in as eve) gid 0 pid "), "{message}");
    // An account that has been deleted.
    let denied = record("64999", "0");
    assert_eq!((get(&denied, "PEER_LOGINUID"), denied.get("PEER_LOGIN")), ("64999", None));
    assert!(get(&denied, "MESSAGE").starts_with("Denied root (uid 0, logged in as uid 64999) gid 0 "), "{denied:?}");
    // The login is the peer's own.
    let denied = record(EVE, EVE);
    assert_eq!(get(&denied, "PEER_LOGINUID"), EVE);
    assert!(get(&denied, "MESSAGE").starts_with("Denied eve (uid 64021) gid 64021 "), "{denied:?}");
    let denied = record(NO_LOGIN, "0");
    assert!(
        ["PEER_LOGINUID", "PEER_LOGIN", "PEER_SESSION"].iter().all(|field| !denied.contains_key(*field)),
        "{denied:?}"
    );
    assert!(get(&denied, "MESSAGE").starts_with("Denied root (uid 0) gid 0 "), "{denied:?}");
}

#[test]
fn a_rule_by_login_tells_one_users_root_from_anothers() {
    let database = world();
    let echod = serving(
        &database,
        "[deny.l]\nlogins = [\"mallory\"]\n[allow.a]\nusers = [0]\nlogins = [\"eve\", \"mallory\"]\n",
    );
    for (login, uid, verdict) in [
        (EVE, "0", "admitted by allow.a"),
        (EVE, EVE, "denied by default"),
        ("64023", "0", "denied by deny.l"),
        ("64022", "0", "denied by default"),
        (NO_LOGIN, "0", "denied by default"),
    ] {
        let peer = of_login(login, uid, &echod);
        let pid = peer.pid().to_string();
        let text = database.echod(&["explain", "--pid", &pid], &echod.place.path("echod.toml")).1;
        assert_eq!(text.lines().next(), Some(verdict), "{text}");
        let login_shown = format!("(a login of uid {login} started the process)");
        assert_eq!(text.contains(&login_shown), login != NO_LOGIN, "{text}");
        assert_eq!(is_admitted(peer.client()), verdict.starts_with("admitted"), "{login} {uid}");
        let described = ["explain", "--uid", uid, "--login", login];
        let text = database.echod(&described, &echod.place.path("echod.toml")).1;
        assert_eq!(text.lines().next(), Some(verdict), "{text}");
        assert_eq!(text.contains("no login started the process"), login == NO_LOGIN, "{text}");
    }
}

#[test]
fn a_process_without_a_login_may_name_any_user_once() {
    needs_root();
    let script = "echo 1234 >/proc/self/loginuid; cat /proc/self/loginuid; echo 1235 >/proc/self/loginuid || cat /proc/self/loginuid";
    let reset =
        format!("echo {NO_LOGIN} >/proc/self/loginuid; exec setpriv --reuid {EVE} --clear-groups sh -c '{script}'");
    let output = std::process::Command::new("sh").args(["-c", &reset]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "12341234", "the manual page says otherwise");
}

#[test]
fn a_login_that_cannot_be_told_matches_each_deny_rule_and_no_allow_rule() {
    let database = world();
    for (policy, told) in [
        (format!("[deny.l]\nlogins = [\"mallory\"]\n{ADMIT_ALL}"), true),
        ("[allow.l]\nusers = [\"any\"]\nlogins = [\"any\"]\n".to_owned(), true),
        (ADMIT_ALL.to_owned(), false),
    ] {
        // The process ended before it was accepted.
        let start = Start::serving(&policy).wrapper(&database.wrapper());
        let options = ["--login", EVE, "--as", "64021:64021", "--gone"];
        let client = PeerProcess::with(&options, &start.place().path("socket")).end().pop().unwrap();
        let echod = start.ready();
        assert_eq!(is_admitted(&client), !told, "ended: {policy}");
        assert!(is_admitted(of_login(EVE, EVE, &echod).client()), "{policy}");
        // /proc shows no other user's processes.
        let script = "mount -t proc -o hidepid=2 proc /proc && exec \"$@\"";
        let hidden = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"];
        let start = Start::serving(&policy).wrapper(&database.wrapper()).wrapper(&hidden);
        let echod = start.run_as("64022:64022").ready();
        assert_eq!(is_admitted(of_login(EVE, EVE, &echod).client()), !told, "hidden: {policy}");
    }
    // In a user namespace that does not map the login, the kernel shows none.
    let policy = format!("[deny.l]\nlogins = [64999]\n{ADMIT_ALL}");
    let echod = Start::serving(&policy).wrapper(&["unshare", "--user", "--map-root-user"]).ready();
    assert!(!is_admitted(of_login(EVE, "0", &echod).client()));
    assert!(is_admitted(of_login("0", "0", &echod).client()));
}

#[test]
fn a_login_survives_a_restart_after_its_process_ended() {
    let database = world();
    let policy = "[allow.l]\nusers = [\"any\"]\nlogins = [\"eve\"]\n";
    let echod = Start::serving(policy).wrapper(&database.wrapper()).with_store();
    let peer = of_login(EVE, "0", &echod);
    peer.client().echo("in");
    let clients = peer.end();
    let echod = echod.restart(|start, _| start.wrapper(&database.wrapper()));
    clients[0].echo("still in");
    drop(echod);
}
