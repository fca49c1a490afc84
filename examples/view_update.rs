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
//! SIGHUP reads the file again. A connection keeps the right with which it was admitted.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use peergate::audit::{Record, Severity};
use peergate::policy_file::{self, Faults};
use peergate::{
    Admission, Audit, Door, Notifier, Policy, Request, Setup, Signals, Stream, Terms, Uid, Writer, activation,
};
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

type Note = Arc<Mutex<String>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listeners = activation::adopt(|_| false)?.listeners; // before there is a second thread
    let signals = Signals::catch()?;
    let path = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| "/etc/view_update.toml".into()));
    let policy = read(&path).map_err(|faults| faults.to_string())?;
    let audit = Audit::default();
    let journal = Writer::start(&audit, "view_update")?;
    let note = Note::default();
    let mut door = Door::open(Setup::new(listeners, policy, audit.clone())?, move |client| {
        let note = Arc::clone(&note);
        thread::spawn(move || serve(client, &note));
    })?;
    let notifier = Notifier::from_env();
    notifier.ready("serving the note");
    while let Request::Reload { .. } = signals.wait()? {
        notifier.reloading();
        match read(&path) {
            Ok(policy) => _ = door.set_policy(policy),
            Err(faults) => audit.write(Record::note(Severity::Error, faults.to_string())),
        }
        notifier.ready("serving the note");
    }
    door.shut();
    journal.finish(Duration::from_secs(1));
    Ok(())
}

fn read(path: &std::path::Path) -> Result<Policy<Access>, Faults> {
    policy_file::load::<Access, ()>(path, Uid::effective()).map(|loaded| loaded.policy)
}

/// One connection, on a thread of its own.
fn serve(client: Admission<Access>, note: &Note) {
    let Admission { socket, rule, permit, .. } = client;
    // An error means that the client has disconnected, or has sent file descriptors.
    let _ = socket.set_nonblocking(false).and_then(|()| converse(socket, rule.terms().may, note));
    drop(permit); // its place in the limits
}

fn converse(socket: Stream, right: Right, note: &Note) -> io::Result<()> {
    let mut socket = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        if (&mut socket).take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        let note = || note.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("view", "") => format!("{}\n", *note()),
            ("update", _) if right < Right::Update => "You may view, not update\n".to_owned(),
            ("update", text) => {
                text.clone_into(&mut note());
                "updated\n".to_owned()
            }
            _ => "Say: view, or: update TEXT\n".to_owned(),
        };
        socket.get_mut().write_all(answer.as_bytes())?;
    }
}
