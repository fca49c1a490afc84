//! Records in the journal: reading them, and causing denials.

use super::{DENIED, Echod, Entry, Journald, Start, stands_for};

/// The reasons of summaries that count denials.
pub const DENIALS: &[&str] = &["policy", "no-credentials"];

/// An interval that does not end during a test: summaries are due only at a stop or a reload.
pub const LONG: &str = "[audit]\ninterval = \"1h\"\n";

pub fn get<'e>(entry: &'e Entry, field: &str) -> &'e str {
    entry.get(field).map_or("(absent)", String::as_str)
}

pub fn serve(journald: &Journald, config: &str) -> Echod {
    Start::serving(config).journal(journald).ready()
}

pub fn with_verdict(verdict: &str) -> impl Fn(&Entry) -> bool {
    move |entry| entry.get("GATE_VERDICT").is_some_and(|found| found == verdict)
}

pub fn denials(entries: &[Entry]) -> u64 {
    stands_for(entries, "denied", DENIALS)
}

/// Connects so many times and expects to be denied each time.
#[track_caller]
pub fn be_denied(echod: &Echod, times: usize) {
    for _ in 0..times {
        echod.connect().expect_end(DENIED);
    }
}

/// Expects that a process of [`flood`] got exactly the message of a denial each time.
#[track_caller]
pub fn expect_flood(process: std::process::Child, times: usize) {
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{times} Unauthorized access\\n\n"));
}
