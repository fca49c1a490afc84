//! `echod report` from outside: how it calls journalctl, and what it prints for each answer.
//!
//! journalctl is a script here that prints recorded lines in systemd's format. Real journals are read in
//! tests/journals.rs.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// A directory for each test, with a journalctl that notes its arguments, prints `lines` and `errors`, and exits with
/// `code`. Asked for the headers of its files, it lists one.
struct Journal {
    directory: PathBuf,
}

impl Journal {
    fn new(lines: &str, errors: &str, code: u8) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("report-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let journal = Self { directory };
        journal.write("lines", lines);
        journal.write("errors", errors);
        let here = journal.directory.display();
        journal.script(&format!(
            "printf '%s\\n' \"$@\" >'{here}/asked'\ncat '{here}/lines'\ncat '{here}/errors' >&2\nexit {code}\n"
        ));
        journal
    }

    fn of(lines: &[&str]) -> Self {
        Self::new(&lines.iter().map(|line| format!("{line}\n")).collect::<String>(), "", 0)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.join(name), text).unwrap();
    }

    fn script(&self, body: &str) {
        let header = "File path: /var/log/journal/m/system.journal\n\
                      Head realtime timestamp: Mon 2026-11-23 20:14:15 UTC (660f73ce93109)\n";
        let headers = format!("case \" $* \" in *' --header '*) printf '%s' '{header}'; exit 0;; esac\n");
        self.write("journalctl", &format!("#!/bin/sh\n{headers}{body}"));
        fs::set_permissions(self.directory.join("journalctl"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn asked(&self) -> Vec<String> {
        let asked = fs::read_to_string(self.directory.join("asked")).unwrap();
        asked.lines().map(str::to_owned).collect()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = format!("{}:/usr/bin:/bin", self.directory.display());
        let environment = [("PATH", path.as_str()), ("TZ", "UTC"), ("LC_ALL", "C.UTF-8"), ("TERM", "xterm")];
        command.env_clear().envs(environment).stdin(Stdio::null());
        command
    }

    /// With a directory of journal files, so that the result does not depend on the machine's own.
    fn report_command(&self) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_echod"));
        command.arg("report").arg("--directory").arg(&self.directory);
        command
    }

    fn report(&self, arguments: &[&str]) -> Output {
        self.report_command().args(arguments).output().unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.report(arguments);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The output when a part of the journal could not be read.
    fn incomplete(&self, arguments: &[&str]) -> String {
        let output = self.report(arguments);
        assert_eq!(output.status.code(), Some(74), "{output:?}");
        assert!(!output.stderr.is_empty());
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.text(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// The report on a terminal, which script(1) of util-linux makes.
    fn on_terminal(&self, before: &str) -> Child {
        let here = self.directory.display();
        let shell = format!("{before} '{}' report --system --directory '{here}'", env!("CARGO_BIN_EXE_echod"));
        let mut command = self.command("script");
        command.args(["-qefc", &shell, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().expect("script(1), of the package bsdutils")
    }

    fn text_on_terminal(&self, before: &str) -> String {
        let output = self.on_terminal(before).wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// As journald and journalctl 252 write it.
const DENIED_ROOT: &str = r#"{"_SYSTEMD_UNIT":"echo.service","_EXE":"/usr/bin/echod","__CURSOR":"s=45a5dd2d5d24465980c96b0cd631903f;i=15b;b=3b828a83a0bb413a983f0afdc02f3259;m=d89987cb;t=660f73ce93109;x=657dbc86b7793100","_MACHINE_ID":"3d1219c7c4c5404aaa1f6d2a48adfda4","_UID":"61234","PEER_COMM":"python3","_COMM":"echod","CODE_LINE":"215","_PID":"30503","__REALTIME_TIMESTAMP":"1795464855367945","PEER_USER":"root","_GID":"61234","GATE_VERDICT":"denied","_RUNTIME_SCOPE":"system","CODE_FILE":"src/journal.rs","GATE_RULE":"default","TARGET":"peergate","GATE_SOCKET":"/run/echo.sock","MESSAGE":"Denied root (uid 0) gid 0 pid 30505 (python3): no rule allows it","_CAP_EFFECTIVE":"0","PEER_PID":"30505","__MONOTONIC_TIMESTAMP":"3633940427","_BOOT_ID":"3b828a83a0bb413a983f0afdc02f3259","_SOURCE_REALTIME_TIMESTAMP":"1795464855367875","_CMDLINE":"/usr/bin/echod","GATE_REASON":"policy","_HOSTNAME":"vm","PEER_UID":"0","MESSAGE_ID":"72261db9963c465c8c6121daadeb1cbc","PRIORITY":"4","SYSLOG_IDENTIFIER":"echod","_TRANSPORT":"journal","PEER_GID":"0"}"#;

/// A line of the system's echod with these fields.
fn ours(fields: &str) -> String {
    format!(r#"{{"_SYSTEMD_UNIT":"echo.service","_UID":"61234","SYSLOG_IDENTIFIER":"echod",{fields}}}"#)
}

/// An example of a day.
fn day() -> Journal {
    let lines = [
        DENIED_ROOT.to_owned(),
        ours(
            r#""__REALTIME_TIMESTAMP":"1795464856000000","GATE_VERDICT":"denied","GATE_REASON":"policy","GATE_RULE":"deny.contractors","PEER_UID":"2001","PEER_USER":"carol","PEER_COMM":"nc","PEER_UNIT":"session-3.scope""#,
        ),
        ours(
            r#""__REALTIME_TIMESTAMP":"1795464857000000","GATE_VERDICT":"denied","GATE_REASON":"policy","GATE_RULE":"deny.contractors","PEER_UID":"2001","PEER_USER":"carol","PEER_COMM":"socat","PEER_UNIT":"session-3.scope""#,
        ),
        ours(
            r#""__REALTIME_TIMESTAMP":"1795464867000000","GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"12343","GATE_DURATION_USEC":"9000000","PEER_UID":"2001","PEER_USER":"carol""#,
        ),
        ours(
            r#""__REALTIME_TIMESTAMP":"1795464867000001","GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"800","GATE_DURATION_USEC":"9000000""#,
        ),
        ours(
            r#""__REALTIME_TIMESTAMP":"1795464868000000","GATE_VERDICT":"refused","GATE_REASON":"user-limit","GATE_RULE":"allow.operators","PEER_UID":"1000","PEER_USER":"alice","PEER_COMM":"echo-client","PEER_UNIT":"user@1000.service""#,
        ),
    ];
    Journal::of(&lines.each_ref().map(String::as_str))
}

#[test]
fn the_table_lists_user_reason_count_times_and_unit() {
    let expected = "\
Turned away by the system's echod, Mon 2026-11-23 20:14:15 UTC to Mon 2026-11-23 20:14:28 UTC

 COUNT                        USER          REASON      FIRST            LAST
12,345  ████████████████████  carol (2001)  policy      Nov 23 20:14:16  Nov 23 20:14:27
        denied: 2 in full, 12,343 counted; by deny.contractors; from session-3.scope;
        with nc (1), socat (1)
   800  █▎                    others        policy      Nov 23 20:14:18  Nov 23 20:14:27
        denied: counted only
     1  ▏                     root (0)      policy      Nov 23 20:14:15  Nov 23 20:14:15
        denied; by default; with python3
     1  ▏                     alice (1000)  user-limit  Nov 23 20:14:28  Nov 23 20:14:28
        refused; by allow.operators; from user@1000.service; with echo-client

Denied:  13,146 = 3 recorded in full + 13,143 counted
Refused: 1 = 1 recorded in full + 0 counted
Read: 1 journal file in /var/log/journal/m, from Mon 2026-11-23 20:14:15 UTC on.
";
    let journal = day();
    let output = journal.report_command().arg("--system").env("COLUMNS", "88").output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn a_row_names_the_user_who_logged_in_where_it_is_another() {
    let denied = |login: &str, time: u32| {
        ours(&format!(
            r#""__REALTIME_TIMESTAMP":"179546486{time}000000","GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"0","PEER_USER":"root"{login}"#
        ))
    };
    let alice = r#","PEER_LOGINUID":"1000","PEER_LOGIN":"alice""#;
    let (own, gone) = (r#","PEER_LOGINUID":"0","PEER_LOGIN":"root""#, r#","PEER_LOGINUID":"1009""#);
    let lines = [denied(alice, 1), denied(alice, 2)];
    let text = Journal::of(&lines.each_ref().map(String::as_str)).text(&["--system"]);
    assert!(text.contains("  root (0), logged in as alice  policy "), "{text}");
    let lines = [denied(alice, 1), denied(own, 2), denied(gone, 3), denied("", 4)];
    let journal = Journal::of(&lines.each_ref().map(String::as_str));
    let text = journal.text(&["--system"]);
    assert!(text.contains("  root (0)  policy "), "{text}");
    assert!(text.contains("denied; logged in as alice (1), 1009 (1)\n"), "{text}");
    let logins = &journal.json(&["--system"])["peers"][0]["logins"];
    assert_eq!(*logins, serde_json::json!([{ "name": "alice", "records": 1 }, { "name": "1009", "records": 1 }]));
}

#[test]
fn a_connection_cut_off_counts_as_neither_denied_nor_refused() {
    let lines = [
        ours(r#""GATE_VERDICT":"revoked","GATE_REASON":"policy","GATE_RULE":"default","PEER_UID":"1000""#),
        ours(r#""GATE_VERDICT":"revoked","GATE_REASON":"sender","GATE_RULE":"allow.operators","PEER_UID":"1000""#),
        ours(r#""GATE_VERDICT":"summary","GATE_REASON":"sender","GATE_COUNT":"40","PEER_UID":"1000""#),
    ];
    let journal = Journal::of(&lines.each_ref().map(String::as_str));
    let json = journal.json(&["--system"]);
    assert_eq!((&json["denied"]["total"], &json["refused"]["total"]), (&0.into(), &0.into()));
    assert_eq!(json["revoked"], serde_json::json!({ "total": 42, "records": 2, "counted": 40 }));
    let text = journal.text(&["--system"]);
    assert!(text.contains("\nRevoked: 42 = 2 recorded in full + 40 counted\n"), "{text}");
}

#[test]
fn json_holds_the_same_numbers_as_the_table() {
    let json = day().json(&["--system", "--since", "yesterday"]);
    assert_eq!(json["denied"], serde_json::json!({ "total": 13146, "records": 3, "counted": 13143 }));
    assert_eq!(json["refused"], serde_json::json!({ "total": 1, "records": 1, "counted": 0 }));
    let peers = json["peers"].as_array().unwrap();
    let denied: u64 =
        peers.iter().filter(|peer| peer["verdict"] == "denied").map(|peer| peer["total"].as_u64().unwrap()).sum();
    assert_eq!(denied, 13146);
    let expected = serde_json::json!({
        "verdict": "denied", "reason": "policy", "uid": 2001, "user": "carol",
        "total": 12345, "records": 2, "counted": 12343,
        "first": "2026-11-23T20:14:16Z", "last": "2026-11-23T20:14:27Z",
        "rules": [{ "name": "deny.contractors", "records": 2 }],
        "units": [{ "name": "session-3.scope", "records": 2 }],
        "programs": [{ "name": "nc", "records": 1 }, { "name": "socat", "records": 1 }],
        "logins": [],
    });
    assert_eq!(peers[0], expected);
    assert_eq!(
        (&json["scope"], &json["since"], &json["complete"]),
        (&"system".into(), &"yesterday".into(), &true.into())
    );
    assert_eq!(peers[1]["uid"], Value::Null, "a summary without PEER_UID stands for others");
}

#[test]
fn journalctl_is_asked_only_for_the_programs_records() {
    let journal = day();
    journal.text(&["--system", "--since", "-1h", "--until", "-5min"]);
    let asked = journal.asked();
    let ids = [
        "72261db9963c465c8c6121daadeb1cbc",
        "a45920b1da8c42cb8c4acbd02e5140bf",
        "e00fb3280d1140dca1192a4f029b14b6",
        "765ab08f733d46e1a5b6850cc41b9003",
    ];
    for wanted in ["--output=json", "--no-pager", "--quiet", "--since=-1h", "--until=-5min", "SYSLOG_IDENTIFIER=echod"]
    {
        assert!(asked.iter().any(|argument| argument == wanted), "{wanted} in {asked:?}");
    }
    let of_echod = asked.iter().take_while(|argument| *argument != "+");
    let matches: Vec<_> = of_echod.filter_map(|argument| argument.strip_prefix("MESSAGE_ID=")).collect();
    assert_eq!(matches, ids);
    assert!(!asked.iter().any(|argument| argument.starts_with("_UID=")), "{asked:?}");

    let me = nix::unistd::getuid();
    journal.report(&["--user"]);
    assert!(journal.asked().contains(&format!("_UID={me}")), "{:?}", journal.asked());
}

#[test]
fn records_of_other_senders_are_left_out_and_mentioned() {
    let forged = r#"{"_UID":"1000","_COMM":"echod","_EXE":"/usr/bin/echod","_SYSTEMD_UNIT":"user@1000.service","SYSLOG_IDENTIFIER":"echod","GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"1000000","PEER_UID":"0"}"#;
    let journal = Journal::of(&[DENIED_ROOT, forged, forged]);
    let json = journal.json(&["--system"]);
    assert_eq!((&json["denied"]["total"], &json["entries"]["left_aside"]), (&1.into(), &2.into()));
    let text = journal.text(&["--system"]);
    assert!(text.contains("Note: 2 entries in our name"), "{text}");
    assert!(text.contains("Denied:  1 = 1 recorded"), "{text}");
}

#[test]
fn damaged_lines_and_fields_do_not_stop_the_report() {
    let lines = [
        "-- Boot 3b828a83a0bb413a983f0afdc02f3259 --".to_owned(),
        r#"{"_SYSTEMD_UNIT":"echo.service","GATE_VERDICT":"den"#.to_owned(),
        ours(r#""GATE_VERDICT":"denied","GATE_REASON":["policy","x"],"PEER_UID":null,"PEER_COMM":[27,91,50,74,255]"#),
        ours(
            r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"-1","__REALTIME_TIMESTAMP":"9223372036854775807""#,
        ),
        ours(r#""GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"lots""#),
        ours(
            r#""GATE_VERDICT":"denied","GATE_REASON":"\u001b]0;x\u0007","PEER_UID":"5","PEER_USER":"\u202eeve\n\u001b[2J""#,
        ),
        DENIED_ROOT.to_owned(),
    ];
    let journal = Journal::of(&lines.each_ref().map(String::as_str));
    let text = journal.incomplete(&["--system"]);
    assert!(text.contains("Note: 2 entries damaged") && text.contains("\nNot complete: "), "{text}");
    assert!(text.contains("Note: 1 entry of ours without a verdict or count"), "{text}");
    assert!(text.contains("Denied:  4 = 4 recorded"), "{text}");
    assert!(text.contains(r"\u{1b}[2J"), "{text}");
    let steers = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(steers), "{text:?}");
    let json = journal.incomplete(&["--system", "--json"]);
    assert!(json.contains(r#""complete": false"#), "{json}");
    assert!(!json.contains(steers) && !json.contains(r"\u001b"), "{json:?}");
}

#[test]
fn a_program_name_cannot_look_like_more_than_a_name() {
    let named = |comm: &str| {
        ours(&format!(
            r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"5","PEER_COMM":"{comm}","PEER_UNIT":"a{:45}1,000,000  root (0).service""#,
            ""
        ))
    };
    let lines = [named("x; by allow.me"), named("tmux: server"), named("nc")];
    let text = Journal::of(&lines.each_ref().map(String::as_str)).text(&["--system"]);
    assert!(text.contains(r#""x; by allow.me" (1)"#) && text.contains(r#""tmux: server" (1)"#), "{text}");
    assert!(text.contains("nc (1)"), "{text}");
    let forged = |line: &str| line.trim_start().starts_with("1,000,000");
    assert!(!text.lines().any(forged), "{text}");
}

#[test]
fn times_are_local_as_in_journalctl() {
    let journal = Journal::of(&[DENIED_ROOT]);
    for (zone, full, short) in [
        ("UTC", "Mon 2026-11-23 20:14:15 UTC", "Nov 23 20:14:15"),
        ("EST5EDT,M3.2.0,M11.1.0", "Mon 2026-11-23 15:14:15 EST", "Nov 23 15:14:15"),
        ("<+0545>-5:45", "Tue 2026-11-24 01:59:15 +0545", "Nov 24 01:59:15"),
    ] {
        let mut command = journal.report_command();
        let output = command.arg("--system").env("TZ", zone).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(full) && text.contains(short), "{zone}: {text}");
    }
}

#[test]
fn a_time_span_over_new_year_shows_the_year() {
    let earlier = ours(
        r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"5","__REALTIME_TIMESTAMP":"1735689599000000""#,
    );
    let text = Journal::of(&[&earlier, DENIED_ROOT]).text(&["--system"]);
    assert!(text.contains("2024-12-31 23:59:59") && text.contains("2026-11-23 20:14:15"), "{text}");
}

#[test]
fn the_table_fits_the_width_it_is_given() {
    for width in [71_usize, 80, 100, 200] {
        let journal = day();
        let mut command = journal.report_command();
        let output = command.arg("--system").env("COLUMNS", width.to_string()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // The heading is a sentence, not part of the table.
        let widest = text.lines().skip(1).map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= width, "{widest} of {width}:\n{text}");
        assert_eq!(text.contains('█'), width >= 80, "{width}:\n{text}");
    }
}

#[test]
fn without_utf_8_everything_is_ascii() {
    let line = ours(r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"5","PEER_USER":"jörg""#);
    let journal = Journal::of(&[&line]);
    let mut command = journal.report_command();
    let output = command.arg("--system").env("LC_ALL", "C").env("COLUMNS", "100").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.is_ascii() && text.contains("####") && text.contains(r"j\u{f6}rg"), "{text}");
}

#[test]
fn colours_are_used_on_a_terminal_and_on_request() {
    let journal = Journal::of(&[DENIED_ROOT]);
    assert!(!journal.text(&["--system"]).contains('\u{1b}'));
    assert!(journal.text_on_terminal("").contains("\u{1b}[31m"));
    for without in ["NO_COLOR=1", "TERM=dumb"] {
        let text = journal.text_on_terminal(without);
        assert!(text.contains("root (0)") && !text.contains("\u{1b}[1m") && !text.contains("\u{1b}[31m"), "{text:?}");
    }
}

#[test]
fn a_terminal_shows_the_progress_and_is_then_clean() {
    let journal = Journal::of(&[DENIED_ROOT]);
    let here = journal.directory.display().to_string();
    assert!(Command::new("mkfifo").arg(journal.directory.join("gate")).status().unwrap().success());
    // The rest of the journal comes only after the count was shown.
    journal.script(&format!("cat '{here}/lines'\nread x <'{here}/gate'\ncat '{here}/lines'\n"));
    let mut terminal = journal.on_terminal("");
    let mut stdout = terminal.stdout.take().unwrap();
    let mut seen = String::new();
    while !seen.contains("1 entries read") {
        let mut some = [0; 256];
        let n = stdout.read(&mut some).unwrap();
        assert!(n > 0, "no count: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&some[..n]));
    }
    fs::OpenOptions::new().write(true).open(journal.directory.join("gate")).unwrap().write_all(b"\n").unwrap();
    stdout.read_to_string(&mut seen).unwrap();
    assert!(terminal.wait().unwrap().success());
    let (_, report) = seen.rsplit_once("\r\u{1b}[K").unwrap();
    assert!(report.starts_with("Turned away") && report.contains("2 = 2 recorded"), "{seen:?}");
}

#[test]
fn without_journalctl_it_says_so_and_exits_69() {
    let journal = Journal::of(&[]);
    fs::remove_file(journal.directory.join("journalctl")).unwrap();
    let mut command = journal.report_command();
    let output = command.arg("--system").env("PATH", &journal.directory).output().unwrap();
    assert_eq!(output.status.code(), Some(69));
    assert!(stderr(&output).contains("journalctl"), "{}", stderr(&output));
}

#[test]
fn an_error_of_journalctl_is_repeated_and_exits_74() {
    let output = Journal::new("", "Failed to parse timestamp: \u{1b}[31mnever\n", 1).report(&["--since", "never"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(74), &b""[..]));
    let said = stderr(&output);
    assert!(said.contains(r"Failed to parse timestamp: \u{1b}[31mnever") && !said.contains('\u{1b}'), "{said}");
}

#[test]
fn an_error_of_journalctl_with_exit_0_makes_a_report_incomplete() {
    let said = "Journal file /var/log/journal/m/system.journal is truncated, ignoring file.";
    let journal = Journal::new(&format!("{DENIED_ROOT}\n"), &format!("<28>{said}\n<31>File x added.\n"), 0);
    let output = journal.report(&["--system", "--json"]);
    assert_eq!(output.status.code(), Some(74));
    assert_eq!(stderr(&output), format!("echod: journalctl: {said}\n"));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["complete"], &json["denied"]["total"]), (&false.into(), &1.into()));
    assert_eq!(json["complaints"], serde_json::json!([format!("journalctl: {said}")]));
}

#[test]
fn a_journalctl_that_is_cut_off_makes_a_report_incomplete() {
    for (end, complaint) in [("kill -9 $$", "signal: 9"), ("printf '{\"_SYSTEMD_UNIT\"'", "1 entries of the journal")] {
        let journal = Journal::of(&[DENIED_ROOT]);
        journal.script(&format!("cat '{}/lines'\n{end}\n", journal.directory.display()));
        let output = journal.report(&["--system", "--json"]);
        assert_eq!(output.status.code(), Some(74), "{end}");
        assert!(stderr(&output).contains(complaint), "{end}: {}", stderr(&output));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&json["complete"], &json["denied"]["total"]), (&false.into(), &1.into()), "{end}");
    }
}

#[test]
fn entries_dropped_by_journald_make_a_report_incomplete() {
    let note = r#"{"_TRANSPORT":"driver","SYSLOG_IDENTIFIER":"systemd-journald","N_DROPPED":"40","MESSAGE":"Suppressed 40 messages from echo.service"}"#;
    let json: Value =
        serde_json::from_str(&Journal::of(&[DENIED_ROOT, note]).incomplete(&["--system", "--json"])).unwrap();
    assert_eq!((&json["complete"], &json["denied"]["total"]), (&false.into(), &1.into()));
    assert_eq!((&json["suppressed"], &json["entries"]["read"]), (&40.into(), &1.into()));
}

#[test]
fn options_for_the_journal_are_passed_to_journalctl() {
    let journal = day();
    for (given, asked) in [
        (&["--namespace", "*"][..], &["--namespace=*"][..]),
        (&["--namespace=+audit", "--merge"], &["--namespace=+audit", "--merge"]),
        (&["--directory", "/no such"], &["--directory=/no such"]),
        (&["--file=/var/*.journal", "--file", "b"], &["--file=/var/*.journal", "--file=b"]),
        (&["--machine", "web"], &["--machine=web"]),
    ] {
        journal.command(env!("CARGO_BIN_EXE_echod")).arg("report").args(given).output().unwrap();
        let all = journal.asked();
        assert!(asked.iter().all(|wanted| all.iter().any(|argument| argument == wanted)), "{asked:?} in {all:?}");
    }
    assert_eq!(journal.report(&["--merge"]).status.code(), Some(2), "one place is asked for, not two");
}

#[test]
fn entries_read_before_journalctl_fails_are_reported() {
    let journal = Journal::new(&format!("{DENIED_ROOT}\n"), "Bad message\n", 1);
    let output = journal.report(&["--system", "--json"]);
    assert_eq!(output.status.code(), Some(74));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["complete"], &json["denied"]["total"]), (&false.into(), &1.into()));
}

#[test]
fn a_journal_without_records_gives_a_report_that_says_so() {
    let journal = Journal::of(&[]);
    let output = journal.report(&["--system"]);
    assert_eq!(output.status.code(), Some(0));
    let expected = "No connection was turned away by the system's echod.\n\
                    Read: 1 journal file in /var/log/journal/m, from Mon 2026-11-23 20:14:15 UTC on.\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert_eq!(journal.report(&["--user", "--system"]).status.code(), Some(2));
}

#[test]
fn a_closed_output_pipe_is_no_error() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let journal = day();
    let mut command = journal.report_command();
    let child = command.arg("--system").stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}
