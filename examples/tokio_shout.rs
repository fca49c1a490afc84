//! The filter of `shout.rs` on tokio's runtime: each line comes back in capitals, and a restart loses no byte of a live
//! connection.
//!
//! ```console
//! $ cargo build --example tokio_shout --features tokio,restart
//! $ printf '[allow.owner]\nusers = ["self"]\n' > /tmp/shout.toml
//! $ systemd-socket-activate -l /tmp/shout.sock target/debug/examples/tokio_shout /tmp/shout.toml &
//! $ echo hello | nc -N -U /tmp/shout.sock
//! HELLO
//! ```
//!
//! For the restart its units have `KillSignal=SIGINT`, `RestartKillSignal=SIGTERM` and `FileDescriptorStoreMax=1`.

use std::io;

use peergate::tokio::{Carrier, Connection};
use peergate::{Error, Service};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

/// What a connection is in the middle of.
#[derive(Default, Serialize, Deserialize)]
struct Work {
    line: Vec<u8>,
}

/// What has begun of a line goes on in the next process, or is the last one.
async fn shout(connection: &mut Connection<()>, Work { line }: &mut Work) -> io::Result<()> {
    while connection.read_until(b'\n', line).await? > 0 && line.ends_with(b"\n") {
        connection.write_all(&line.to_ascii_uppercase()).await?;
        line.clear();
    }
    if connection.goes_on() { Ok(()) } else { connection.write_all(&line.to_ascii_uppercase()).await }
}

async fn serve(gate: Carrier<(), Work>) -> io::Result<()> {
    loop {
        tokio::select! {
            carried = gate.accept() => drop(tokio::spawn(carried.serve(shout))),
            () = gate.stopping() => return Ok(()),
        }
    }
}

fn main() -> Result<(), Error> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "/etc/shout.toml".into());
    Service::from_systemd("tokio_shout").policy_file(file).hand_over::<Work>().block_on(serve)
}
