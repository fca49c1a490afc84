//! A filter: each line comes back in capitals. It reloads its policy, exits when it has been idle for a minute, and a restart
//! loses no byte of a live connection.
//!
//! ```console
//! $ cargo build --example shout --features restart
//! $ printf '[allow.owner]\nusers = ["self"]\n' > /tmp/shout.toml
//! $ systemd-socket-activate -l /tmp/shout.sock target/debug/examples/shout /tmp/shout.toml &
//! $ echo hello | nc -N -U /tmp/shout.sock
//! HELLO
//! ```
//!
//! For the restart its units have `KillSignal=SIGINT`, `RestartKillSignal=SIGTERM` and `FileDescriptorStoreMax=1`.

use std::io::{self, BufRead, Write};
use std::time::Duration;

use peergate::{Connection, Error, Service};
use serde::{Deserialize, Serialize};

/// What a connection is in the middle of.
#[derive(Default, Serialize, Deserialize)]
struct Work {
    line: Vec<u8>,
}

/// What has begun of a line goes on in the next process, or is the last one.
fn shout(connection: &mut Connection<()>, Work { line }: &mut Work) -> io::Result<()> {
    while connection.read_until(b'\n', line)? > 0 && line.ends_with(b"\n") {
        connection.write_all(&line.to_ascii_uppercase())?;
        line.clear();
    }
    if connection.goes_on() { Ok(()) } else { connection.write_all(&line.to_ascii_uppercase()) }
}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/shout.toml".into());
    let idle = std::env::args().nth(2).and_then(|span| span.parse().ok()).unwrap_or(60_000);
    let service = Service::<()>::from_systemd("shout").policy_file(file).idle_exit(Duration::from_millis(idle));
    service.hand_over::<Work>().serve_threads(shout)
}
