//! The gate's parts under tokio's runtime: an echo for the user it runs as.
//!
//! [`peergate::Door`] brings a thread of its own. Where the runtime accepts, these are the steps that the door would
//! take: ask, decide, find a place, record, see off.
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
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use peergate::{
    Audit, Limits, Listener, Notifier, Peer, Permits, Policy, Request, Rule, Signals, Stream, Uid, User, Verdict,
    Writer, activation,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

/// A connection as the library gives it, which reads no descriptors that strangers send, in the runtime's hands.
type Guest = AsyncFd<Stream>;

/// What all connections share.
struct Gate {
    policy: Policy<()>,
    caps: Limits,
    inside: Permits,
    /// Those on their way out: a flood of strangers must not cost all descriptors.
    leaving: Permits,
    audit: Audit,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Before the runtime has threads: the environment is read, and signals are blocked for all that come.
    let listeners = activation::adopt(|_| false)?.listeners;
    if listeners.is_empty() {
        return Err("no listening socket: nothing was passed".into());
    }
    let signals = Signals::catch()?;
    let policy = Policy::new([Rule::allow("owner", ()).users([User::Me])], Uid::effective())?;
    let audit = Audit::default();
    let journal = Writer::start(&audit, "tokio_echo")?;
    let (inside, leaving) = (Permits::new(), Permits::new());
    let gate = Arc::new(Gate { policy, caps: Limits::default(), inside, leaving, audit });

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for listener in listeners {
            tokio::spawn(accept(watched(listener, Interest::READABLE)?, Arc::clone(&gate)));
        }
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
/// its owner lives: that is so for the library's types.
#[allow(deprecated)]
fn watched<T: AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, interest)
}

async fn accept(listener: AsyncFd<Listener>, gate: Arc<Gate>) {
    let address = Arc::clone(listener.get_ref().address());
    loop {
        let accepted = listener.async_io(Interest::READABLE, Listener::accept).await;
        match accepted.and_then(|guest| watched(guest, Interest::READABLE | Interest::WRITABLE)) {
            Ok(guest) => _ = tokio::spawn(meet(guest, Arc::clone(&address), Arc::clone(&gate))),
            // Out of descriptors, or it left before we came to it: neither spin nor give up.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Who is it, may they in, is there a place?
async fn meet(guest: Guest, listener: Arc<str>, gate: Arc<Gate>) -> io::Result<()> {
    let Ok(mut peer) = Peer::of(&guest) else {
        gate.audit.unidentified(&listener);
        return see_off(guest, b"Unauthorized access\n", &gate, Uid::new(0)).await;
    };
    let rule = match gate.policy.decide(&peer) {
        Verdict::Admitted(rule) => rule,
        Verdict::Denied(rule) => {
            gate.audit.denied(&mut peer, &guest, &listener, rule.map(|rule| rule.name()));
            return see_off(guest, b"Unauthorized access\n", &gate, peer.uid()).await;
        }
    };
    match gate.inside.acquire(peer.uid(), &gate.caps, rule.terms()) {
        Ok(_permit) => {
            gate.audit.admitted(&mut peer, &guest, &listener, rule.name());
            peer.close_pidfd();
            echo(guest).await
        }
        Err(excess) => {
            gate.audit.refused(&mut peer, &guest, &listener, rule.name(), excess);
            see_off(guest, b"Too many connections\n", &gate, peer.uid()).await
        }
    }
}

async fn echo(mut guest: Guest) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match read(&mut guest, &mut buffer).await? {
            0 => return guest.get_ref().shutdown(Shutdown::Write),
            count => write_all(&mut guest, &buffer[..count]).await?,
        }
    }
}

async fn read(guest: &mut Guest, buffer: &mut [u8]) -> io::Result<usize> {
    guest.async_io_mut(Interest::READABLE, |socket| socket.read(buffer)).await
}

async fn write_all(guest: &mut Guest, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = guest.async_io_mut(Interest::WRITABLE, |socket| socket.write(bytes)).await?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// The message, then a clean end of file: what the peer has sent is read first, up to a bound, because closing with
/// data unread would reach the peer as ECONNRESET.
async fn see_off(mut guest: Guest, message: &[u8], gate: &Gate, uid: Uid) -> io::Result<()> {
    let Ok(_permit) = gate.leaving.acquire(uid, &Limits::new(256, 64), &()) else { return Ok(()) };
    let farewell = async {
        write_all(&mut guest, message).await?;
        guest.get_ref().shutdown(Shutdown::Write)?;
        let (mut buffer, mut left) = (vec![0; 4096], 64 * 1024_usize);
        while left > 0 {
            match read(&mut guest, &mut buffer).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        Ok(())
    };
    timeout(Duration::from_secs(1), farewell).await?
}
