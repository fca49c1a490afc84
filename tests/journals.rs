//! `echod report` on real journal files, read by the real journalctl: damaged, absent and unreadable ones, and files
//! of several machines. Needs root, to read as another user.
//!
//! systemd-journal-remote(8) makes the files from entries in the export format, as it does with entries it receives.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const REMOTE: &str = "/usr/lib/systemd/systemd-journal-remote";
const ALPHA: &str = "3d1219c7c4c5404aaa1f6d2a48adfda4";
const BETA: &str = "4e1219c7c4c5404aaa1f6d2a48adfda4";
/// A user in no group that may read journals.
const STRANGER: u32 = 61_001;

/// A directory of journal files, removed at the end. It is outside the build directory, which other users may not
/// enter.
struct Files(PathBuf);

impl Files {
    fn new() -> Self {
        assert!(nix::unistd::getuid().is_root(), "this suite needs root: it reads journals as another user");
        let directory = nix::unistd::mkdtemp(&std::env::temp_dir().join("echod-journals-XXXXXX")).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        Self(directory)
    }

    /// A file with `count` denials of the user 1002 on this machine, one a second.
    fn denials(&self, file: &str, machine: &str, host: &str, count: u64) -> PathBuf {
        let path = self.0.join(file);
        let mut remote = Command::new(REMOTE);
        remote.arg(format!("--output={}", path.display())).arg("-").stdin(Stdio::piped()).stderr(Stdio::null());
        let mut remote = remote.spawn().expect("systemd-journal-remote(8), of the package of that name");
        let mut input = remote.stdin.take().unwrap();
        for n in 0..count {
            write!(
                input,
                "__REALTIME_TIMESTAMP={}\n__MONOTONIC_TIMESTAMP={n}\n_BOOT_ID={machine}\n_MACHINE_ID={machine}\n\
                 _HOSTNAME={host}\n_SYSTEMD_UNIT=echo.service\nSYSLOG_IDENTIFIER=echod\n\
                 MESSAGE_ID=72261db9963c465c8c6121daadeb1cbc\nGATE_VERDICT=denied\nGATE_REASON=policy\nPEER_UID=1002\n\n",
                1_795_464_855_000_000 + n * 1_000_000,
            )
            .unwrap();
        }
        drop(input);
        assert!(remote.wait().unwrap().success());
        path
    }

    fn report(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_echod"));
        command.args(["report", "--system", "--directory"]).arg(&self.0).args(arguments).env("TZ", "UTC");
        command.output().unwrap()
    }

    /// The report as JSON, and the exit status.
    fn json(&self) -> (Value, Option<i32>) {
        let output = self.report(&["--json"]);
        (serde_json::from_slice(&output.stdout).unwrap(), output.status.code())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn with_several_machines_each_row_names_its_machine() {
    let files = Files::new();
    files.denials("a.journal", ALPHA, "alpha", 3);
    let (json, code) = files.json();
    assert_eq!((&json["complete"], &json["denied"]["total"], code), (&true.into(), &3.into(), Some(0)));
    assert!(json["peers"][0].get("machine").is_none(), "one machine: {json}");
    files.denials("b.journal", BETA, "beta", 2);
    let (json, code) = files.json();
    assert_eq!((&json["complete"], &json["denied"]["total"], code), (&true.into(), &5.into(), Some(0)));
    let of = |peer: &Value| (peer["machine"]["host"].clone(), peer["machine"]["id"].clone(), peer["total"].clone());
    let rows: Vec<_> = json["peers"].as_array().unwrap().iter().map(of).collect();
    assert_eq!(rows, [("alpha".into(), ALPHA.into(), 3.into()), ("beta".into(), BETA.into(), 2.into())]);
    let text = stdout(&files.report(&[]));
    assert!(text.contains("denied; on alpha\n") && text.contains("denied; on beta\n"), "{text}");
    assert!(text.contains("Denied:  5 = 5 recorded"), "{text}");
    assert!(text.contains("Read: 2 journal files in "), "{text}");
}

#[test]
fn machines_of_the_same_name_are_separated_by_their_ids() {
    let files = Files::new();
    files.denials("a.journal", ALPHA, "web", 2);
    files.denials("b.journal", BETA, "web", 1);
    let text = stdout(&files.report(&[]));
    assert!(text.contains("on web/3d1219c7c4c5\n") && text.contains("on web/4e1219c7c4c5\n"), "{text}");
}

#[test]
fn a_truncated_journal_file_makes_the_report_incomplete() {
    let files = Files::new();
    files.denials("a.journal", ALPHA, "alpha", 3);
    let cut = files.denials("b.journal", ALPHA, "alpha", 3);
    fs::OpenOptions::new().write(true).open(cut).unwrap().set_len(100).unwrap();
    let (json, code) = files.json();
    assert_eq!((&json["complete"], &json["denied"]["total"], code), (&false.into(), &3.into(), Some(74)));
    // Whatever the caller has set for systemd's programs.
    let mut command = Command::new(env!("CARGO_BIN_EXE_echod"));
    command.args(["report", "--system", "--directory"]).arg(&files.0);
    let output = command.env("SYSTEMD_LOG_LEVEL", "emerg").env("SYSTEMD_LOG_TARGET", "null").output().unwrap();
    assert!(stderr(&output).contains("b.journal is truncated"), "{}", stderr(&output));
    assert!(stdout(&output).contains("\nNot complete: "), "{}", stdout(&output));
}

/// The offsets of the entry objects in a journal file (systemd's JOURNAL_FILE_FORMAT: a header, then objects that begin
/// with type and size).
fn entry_objects(file: &[u8]) -> Vec<usize> {
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let mut at = number(88);
    let mut found = Vec::new();
    while at + 16 <= file.len() && file[at] != 0 {
        if file[at] == 3 {
            found.push(at);
        }
        at = (at + number(at + 8)).next_multiple_of(8);
    }
    found
}

#[test]
fn a_file_skipped_without_a_message_makes_the_report_incomplete() {
    let files = Files::new();
    let path = files.denials("a.journal", ALPHA, "alpha", 3);
    let mut bytes = fs::read(&path).unwrap();
    let second = entry_objects(&bytes)[1];
    bytes[second] = 77;
    fs::write(&path, bytes).unwrap();
    let (json, code) = files.json();
    assert_eq!((&json["complete"], &json["denied"]["total"], code), (&false.into(), &1.into(), Some(74)));
}

#[test]
fn without_a_journal_file_no_number_of_denials_is_reported() {
    let files = Files::new();
    let output = files.report(&[]);
    assert_eq!(output.status.code(), Some(74));
    let (text, here) = (stdout(&output), files.0.display().to_string());
    assert!(text.contains("No record was found") && !text.contains("No connection was turned away"), "{text}");
    assert!(text.replace('\n', " ").contains(&format!("looked in {here}.")), "{text}");
    assert!(stderr(&output).contains(&format!("was found in {here}")), "{}", stderr(&output));
    let (json, _) = files.json();
    assert_eq!((&json["complete"], &json["journal"]["looked_in"]), (&false.into(), &json!([here])));
}

#[test]
fn no_denials_in_a_journal_differs_from_an_unread_journal() {
    let files = Files::new();
    files.denials("a.journal", ALPHA, "alpha", 1);
    let output = files.report(&["--since", "2030-01-01"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(
        text.starts_with("No connection was turned away by the system's echod.\nRead: 1 journal file in "),
        "{text}"
    );
    assert!(text.replace('\n', " ").contains(", from Mon 2026-11-23 20:14:15 UTC on."), "{text}");
}

fn as_stranger(program: &Path, directory: &Path) -> Output {
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={STRANGER}"), format!("--regid={STRANGER}"), "--clear-groups".to_owned()]);
    command.arg(program).args(["report", "--system", "--json", "--directory"]).arg(directory).output().unwrap()
}

#[test]
fn an_unreadable_journal_file_is_named_in_an_incomplete_report() {
    let files = Files::new();
    let program = files.0.join("echod");
    // Not by this process: a child that another test forks meanwhile would hold the file open (ETXTBSY).
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_echod")).arg(&program).status().unwrap().success());
    let theirs = files.denials("a.journal", ALPHA, "alpha", 3);
    chown(&theirs, Some(STRANGER), None).unwrap();
    let output = as_stranger(&program, &files.0);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for readable in [3, 0] {
        let closed = files.denials(&format!("closed-{readable}.journal"), ALPHA, "alpha", 3);
        if readable == 0 {
            fs::remove_file(&theirs).unwrap();
        }
        let output = as_stranger(&program, &files.0);
        assert_eq!(output.status.code(), Some(74));
        let complaint = stderr(&output);
        assert!(
            complaint.contains("no permission to read") && complaint.contains(closed.to_str().unwrap()),
            "{complaint}"
        );
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&json["complete"], &json["denied"]["total"]), (&false.into(), &readable.into()));
    }
}
