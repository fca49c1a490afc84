//! Which journal files a report rests on, and which of them could not be read. Pure. Used by [`report`](super).
//!
//! That no record was found says something only about the files that were read. journalctl exits with 0 also where it
//! found no file, or skipped one. So the report asks it for the headers of the files that it opens
//! (`journalctl --header`), and is complete only where the records can be in no other file.

use std::path::{Path, PathBuf};

use super::entry::Scope;

/// Where journald keeps files that do not outlive a boot. A journal on disk replaces it (journald.conf(5), Storage=).
pub const VOLATILE: &str = "/run/log/journal";
/// Where it keeps those that do.
pub const PERSISTENT: &str = "/var/log/journal";

/// A file that journalctl has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its path.
    pub path: PathBuf,
    /// The time of its oldest entry, in microseconds since 1970; `None` where it is empty.
    pub oldest: Option<i64>,
}

/// Reads what `journalctl --header` prints. Each file begins with its path. The hexadecimal number behind a time is
/// the same in every time zone.
pub fn parse_headers(text: &str) -> Vec<File> {
    let mut files: Vec<File> = Vec::new();
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("File path: ") {
            files.push(File { path: path.into(), oldest: None });
        } else if let Some(time) = line.strip_prefix("Head realtime timestamp: ") {
            let hexadecimal = time.rsplit_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
            let time = hexadecimal.and_then(|digits| i64::from_str_radix(digits, 16).ok()).filter(|time| *time > 0);
            if let Some(file) = files.last_mut() {
                file.oldest = time;
            }
        }
    }
    files
}

/// What was read, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The files that may hold the records and were read.
    pub files: Vec<File>,
    /// Files, and directories of files, that may hold records and that the caller may not read.
    pub unreadable: Vec<PathBuf>,
    /// Journal namespaces that exist here and were not asked for.
    pub namespaces: Vec<String>,
    /// Where files were looked for, in words.
    pub places: Vec<String>,
}

impl Sources {
    /// Sorts out which of the files that were `opened`, and of the paths that are `unreadable`, may hold the records.
    ///
    /// `explicit`: the caller named the files, and all of them may. Otherwise the names tell (systemd-journald(8),
    /// journald.conf(5), SplitMode=): journald keeps the system's records in `system.journal`. A user's are in
    /// `user-UID.journal`, or in the system's where there is no such file; on volatile storage there never is one.
    pub fn new(scope: Scope, explicit: bool, opened: Vec<File>, unreadable: Vec<PathBuf>) -> Self {
        if explicit {
            return Self { files: opened, unreadable, ..Self::default() };
        }
        let own = match scope {
            Scope::System(_) => "system".to_owned(),
            Scope::User(_, uid) => format!("user-{uid}"),
        };
        let has_own = opened.iter().any(|file| is_of(&file.path, &own));
        let relevant = |path: &Path| is_of(path, &own) || (!has_own && is_of(path, "system"));
        let missed =
            |path: &PathBuf| !is_file(path) || relevant(path) || (path.starts_with(VOLATILE) && is_of(path, "system"));
        // A directory below VOLATILE may hold a system.journal with the user's records; one below PERSISTENT that the
        // user's own file was opened in can be read.
        Self {
            files: opened.into_iter().filter(|file| relevant(&file.path)).collect(),
            unreadable: unreadable.into_iter().filter(missed).collect(),
            ..Self::default()
        }
    }

    /// The directories that the files are in, each once.
    pub fn directories(&self) -> Vec<&Path> {
        let mut directories: Vec<_> = self.files.iter().filter_map(|file| file.path.parent()).collect();
        directories.sort_unstable();
        directories.dedup();
        directories
    }

    /// The time of the oldest entry in any of the files.
    pub fn oldest(&self) -> Option<i64> {
        self.files.iter().filter_map(|file| file.oldest).min()
    }
}

/// Whether journald calls a journal file of this owner so: `OWNER.journal` or `OWNER@….journal`, and `….journal~`.
fn is_of(path: &Path, owner: &str) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    name.strip_prefix(owner).is_some_and(|rest| rest.starts_with(['.', '@'])) && is_file(path)
}

/// Whether a path is called as journal files are.
pub fn is_file(path: &Path) -> bool {
    path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy();
        name.ends_with(".journal") || name.ends_with(".journal~")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ECHOD;

    fn file(path: &str) -> File {
        File { path: path.into(), oldest: None }
    }

    /// The names of the files that count as read, and of the paths that count as missed.
    fn sorted(scope: Scope, opened: &[&str], unreadable: &[&str]) -> (Vec<String>, Vec<String>) {
        let opened = opened.iter().map(|path| file(path)).collect();
        let sources = Sources::new(scope, false, opened, unreadable.iter().map(PathBuf::from).collect());
        let shown = |path: &Path| path.display().to_string();
        let files = sources.files.iter().map(|file| shown(&file.path)).collect();
        (files, sources.unreadable.iter().map(|path| shown(path)).collect())
    }

    const SYSTEM: &str = "/var/log/journal/m/system.journal";
    const OLD: &str = "/var/log/journal/m/system@1-2-3.journal~";
    const ALICE: &str = "/var/log/journal/m/user-1001.journal";
    const RUN: &str = "/run/log/journal/m/system.journal";

    #[test]
    fn each_file_begins_with_its_path_and_tells_its_oldest_entry() {
        let text = "File path: /var/a b.journal\nHead realtime timestamp: Mon 2026-11-23 20:14:15 UTC (660f73ce93109)\n\
                    \nFile path: /var/empty.journal\nHead realtime timestamp: n/a (0)\nEntry objects: 0\n";
        let oldest = Some(1_795_464_855_367_945);
        assert_eq!(parse_headers(text), [File { path: "/var/a b.journal".into(), oldest }, file("/var/empty.journal")]);
        assert_eq!(
            parse_headers("Head realtime timestamp: (1)\nFile path: x\nHead realtime timestamp: (z)"),
            [file("x")]
        );
    }

    #[test]
    fn the_systems_records_are_in_no_users_file() {
        assert_eq!(sorted(Scope::System(ECHOD), &[SYSTEM, OLD, ALICE], &[]), (vec![SYSTEM.into(), OLD.into()], vec![]));
        assert_eq!(sorted(Scope::System(ECHOD), &[ALICE], &[SYSTEM]), (vec![], vec![SYSTEM.into()]));
        assert_eq!(
            sorted(Scope::System(ECHOD), &[SYSTEM], &["/var/log/journal/m/user-1002.journal"]).1,
            [] as [String; 0]
        );
    }

    #[test]
    fn a_user_with_a_file_of_their_own_needs_not_read_the_systems() {
        assert_eq!(sorted(Scope::User(ECHOD, 1001), &[ALICE], &[SYSTEM]), (vec![ALICE.into()], vec![]));
        assert_eq!(sorted(Scope::User(ECHOD, 100), &[ALICE], &[SYSTEM]), (vec![], vec![SYSTEM.into()]));
    }

    #[test]
    fn on_volatile_storage_a_users_records_are_in_the_systems_file() {
        assert_eq!(sorted(Scope::User(ECHOD, 1001), &[], &[RUN]), (vec![], vec![RUN.into()]));
        assert_eq!(sorted(Scope::User(ECHOD, 1001), &[ALICE], &[RUN]), (vec![ALICE.into()], vec![RUN.into()]));
        assert_eq!(sorted(Scope::User(ECHOD, 1001), &[RUN], &[]), (vec![RUN.into()], vec![]));
    }
}
