//! An echo under tokio's runtime, for the user it runs as.
//!
//! The runtime waits for the descriptor of the [`Gate`] as for any other. [`Gate::turn`] accepts, judges, records, and
//! closes what is denied. Each connection that it hands out becomes a task.
//!
//! ```console
//! $ cargo build --example tokio_echo
//! $ systemd-socket-activate -l /tmp/echo.sock target/debug/examples/tokio_echo &
//! $ nc -U /tmp/echo.sock
//! ```
//!
//! Its units are for the user's own service manager: under the system's, only the service's own user would be admitted.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use peergate::gate::Gate;
use peergate::{
    Admission, Audit, Notifier, Policy, Request, Rule, Setup, Signals, Stream, Uid, User, Writer, activation,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout_at;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Before the runtime has threads: the environment is read, and signals are blocked for all threads to come.
    let listeners = activation::adopt(|_| false)?.listeners;
    if listeners.is_empty() {
        return Err("no listening socket: nothing was passed".into());
    }
    let signals = Signals::catch()?;
    let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
    let audit = Audit::default();
    let journal = Writer::start(&audit, "tokio_echo")?;
    let gate = Gate::new(Setup::new(listeners, policy, audit)?)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::spawn(admit(gate));
        Notifier::from_env().ready("serving");
        tokio::task::spawn_blocking(move || {
            while signals.wait()? != Request::Stop {} // there is nothing to reload
            io::Result::Ok(())
        })
        .await?
    })?;
    drop(runtime);
    journal.finish(Duration::from_secs(1));
    Ok(())
}

/// In the runtime's hands. Newer versions of tokio ask for a promise that the descriptor stays the same for as long as
/// its owner lives: that is so for the types used here.
#[allow(deprecated)]
fn watched<T: AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, interest)
}

/// Gives the gate its turns, and each admitted connection a task.
async fn admit(mut gate: Gate<()>) -> io::Result<()> {
    let descriptor = watched(gate.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
    let mut admitted = Vec::new();
    loop {
        let readable = match gate.deadline() {
            Some(due) => timeout_at(due.into(), descriptor.readable()).await.ok().transpose()?,
            None => Some(descriptor.readable().await?),
        };
        // A turn is bounded, so there may be more to do. The runtime would not tell of it: it watches for changes only.
        loop {
            gate.turn(Some(Duration::ZERO), &mut admitted);
            for admission in admitted.drain(..) {
                tokio::spawn(echo(admission));
            }
            if poll(&mut [PollFd::new(gate.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? == 0 {
                break;
            }
            tokio::task::yield_now().await;
        }
        if let Some(mut readable) = readable {
            readable.clear_ready();
        }
    }
}

/// The permit is the connection's place in the limits. The place is free again when this returns.
async fn echo(admission: Admission<()>) -> io::Result<()> {
    let Admission { socket, permit: _permit, .. } = admission;
    let mut socket = watched(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match read(&mut socket, &mut buffer).await? {
            0 => return socket.get_ref().shutdown(Shutdown::Write),
            count => write_all(&mut socket, &buffer[..count]).await?,
        }
    }
}

async fn read(socket: &mut AsyncFd<Stream>, buffer: &mut [u8]) -> io::Result<usize> {
    socket.async_io_mut(Interest::READABLE, |stream| stream.read(buffer)).await
}

async fn write_all(socket: &mut AsyncFd<Stream>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = socket.async_io_mut(Interest::WRITABLE, |stream| stream.write(bytes)).await?;
        bytes = &bytes[written..];
    }
    Ok(())
}
