//! A note over HTTP, on axum: every admitted user may read it, and a rule with `may-write = true` lets its peers write.
//!
//! ```console
//! $ cargo build --example axum_note --features axum
//! $ printf '[allow.owner]\nusers = ["self"]\nmay-write = true\n' > /tmp/note.toml
//! $ systemd-socket-activate -l /tmp/note.sock target/debug/examples/axum_note /tmp/note.toml &
//! $ curl --unix-socket /tmp/note.sock -d 'Lunch is at one' http://localhost/note
//! $ curl --unix-socket /tmp/note.sock http://localhost/note
//! Lunch is at one
//! ```
//!
//! SIGHUP reads the file again, for live connections too.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use peergate::axum::require;
use peergate::gate::Replies;
use peergate::{Error, Service, Session, Terms};
use serde::Deserialize;

/// The further keys of a rule.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Access {
    may_write: bool,
}

impl Terms for Access {}

type Note = Arc<Mutex<String>>;

async fn read(State(note): State<Note>) -> String {
    note.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

async fn write(session: Session<Access>, State(note): State<Note>, text: String) -> String {
    *note.lock().unwrap_or_else(PoisonError::into_inner) = text;
    format!("written by uid {}\n", session.uid())
}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/axum_note.toml".into());
    let writing = post(write).layer(require(|access: &Access| access.may_write));
    let app = Router::new().route("/note", get(read).merge(writing)).with_state(Note::default());
    let service = Service::<Access>::from_systemd("axum_note").policy_file(file).replies(Replies::http());
    service.block_on(|gate| async move {
        axum::serve(gate.listener(), app.into_make_service_with_connect_info::<Session<Access>>())
            .with_graceful_shutdown(gate.stopping())
            .await
    })
}
