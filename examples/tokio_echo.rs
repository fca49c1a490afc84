//! An echo under tokio's runtime, for the user it runs as.
//!
//! ```console
//! $ cargo build --example tokio_echo --features tokio
//! $ systemd-socket-activate -l /tmp/echo.sock target/debug/examples/tokio_echo &
//! $ nc -U /tmp/echo.sock
//! ```
//!
//! Its units are for the user's own service manager: under the system's, only the service's own user would be admitted.

use std::io;

use peergate::tokio::{Connection, Handle};
use peergate::{Policy, Rule, Service, Uid, User};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
    Service::from_systemd("tokio_echo").policy(policy).block_on(serve)?;
    Ok(())
}

async fn serve(gate: Handle<()>) -> io::Result<()> {
    loop {
        tokio::select! {
            connection = gate.accept() => drop(tokio::spawn(echo(connection))),
            () = gate.stopping() => return Ok(()),
        }
    }
}

/// An error means that the client has gone, or has sent file descriptors.
async fn echo(mut connection: Connection<()>) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match connection.read(&mut buffer).await? {
            0 => return connection.shutdown().await,
            count => connection.write_all(&buffer[..count]).await?,
        }
    }
}
