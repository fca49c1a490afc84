//! A note that every admitted user may view and some may also update: the last idea of Bowen's article. The policy is a
//! file whose rules have one more key: `may = "view"` or `may = "update"`.
//!
//! ```console
//! $ cargo build --example view_update
//! $ systemd-socket-activate -l /tmp/note.sock target/debug/examples/view_update examples/view_update.toml &
//! $ nc -U /tmp/note.sock
//! update Lunch is at one
//! updated
//! view
//! Lunch is at one
//! ```
//!
//! SIGHUP reads the file again: a live connection gets the right that the new rules give it, or is revoked.

use std::io::{self, BufRead, Read, Write};
use std::sync::{Mutex, PoisonError};

use peergate::{Connection, Error, Service, Terms};
use serde::Deserialize;

/// The longest command.
const LONGEST: u64 = 4096;

/// The terms of a rule: the further keys of its table in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Access {
    may: Right,
}

/// In rising order: the right to update includes the right to view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Right {
    #[default]
    View,
    Update,
}

impl Terms for Access {}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/view_update.toml".into());
    let note = Mutex::default();
    Service::from_systemd("view_update").policy_file(file).serve_threads(move |client| converse(client, &note))
}

/// One connection, on a thread of its own. An error means that the client has gone, or has sent file descriptors.
fn converse(client: &mut Connection<Access>, note: &Mutex<String>) -> io::Result<()> {
    loop {
        let mut line = Vec::new();
        if client.take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        let note = || note.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("view", "") => format!("{}\n", *note()),
            ("update", _) if !client.session().require(|access| access.may >= Right::Update) => {
                "You may view, not update\n".to_owned()
            }
            ("update", text) => {
                text.clone_into(&mut note());
                "updated\n".to_owned()
            }
            _ => "Say: view, or: update TEXT\n".to_owned(),
        };
        client.write_all(answer.as_bytes())?;
    }
}
