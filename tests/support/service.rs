//! A service of the tests, on either runtime: it does what a careless author might (tests/services.rs).
//!
//! ```text
//! service inline|threads|threads-read|tokio|tokio-one|tokio-carry|tokio-carry-apart POLICY [MILLISECONDS until it exits where it is idle]
//!
//! say TEXT        the answer is TEXT
//! panic           it panics
//! leave           it answers "bye" and returns, with more of the peer's bytes unread
//! shut            it answers "half", ends its direction, and waits for the peer's end
//! await           it answers "waiting", waits until the session is revoked, answers "told" and returns
//! pour            it answers "pouring" and then bytes without end, until the peer has gone
//! quit            on tokio: the service's own code returns at once
//! hold            on tokio: it answers "held", and until this connection is over no further one is accepted
//! anything else   no answer
//! ```
//!
//! Inline it knows none of these: it says "hello", and ends a connection at the first byte.

use std::future::Future;
use std::io::{self, BufRead, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use peergate::audit::{RecordScope, Settings};
use peergate::{Admission, Connection, Error, Service, Session, Uid, policy_file};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, Notify};

/// Wakes a thread that waits for a future.
struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait_for_revocation(session: &Session<()>) {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut revoked = pin!(session.revoked());
    while revoked.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Pending {
        thread::park();
    }
}

fn on_thread(connection: &mut Connection<()>) -> io::Result<()> {
    let mut line = String::new();
    while connection.read_line(&mut line)? > 0 {
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("say", text) => writeln!(connection, "{text}")?,
            ("panic", _) => panic!("as asked"),
            ("leave", _) => return connection.write_all(b"bye\n"),
            ("shut", _) => {
                connection.write_all(b"half\n")?;
                connection.shutdown(Shutdown::Write)?;
            }
            ("await", _) => {
                connection.write_all(b"waiting\n")?;
                wait_for_revocation(connection.session());
                return connection.write_all(b"told\n");
            }
            ("pour", _) => {
                connection.write_all(b"pouring\n")?;
                loop {
                    connection.write_all(&[0; 4096])?;
                }
            }
            _ => {}
        }
        line.clear();
    }
    Ok(())
}

/// Against all advice it waits for its peer, on the gate's thread.
fn inline(mut admission: Admission<()>) {
    let _ = admission.socket.write_all(b"hello\n");
    let mut waits = [PollFd::new(admission.socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut waits, PollTimeout::NONE).expect("poll(2)");
    let _ = admission.socket.read(&mut [0]);
}

/// What the tasks of the service share.
#[derive(Default)]
struct Shared {
    quit: Notify,
    accepting: Mutex<()>,
}

/// What has come of a line stays in `line`.
async fn in_task(
    connection: &mut peergate::tokio::Connection<()>,
    line: &mut String,
    shared: Arc<Shared>,
) -> io::Result<()> {
    let mut _held = None;
    loop {
        // Only this line is taken: `leave` leaves the rest unread.
        let mut byte = [0];
        while !line.ends_with('\n') {
            if connection.read(&mut byte).await? == 0 {
                return connection.shutdown().await;
            }
            line.push(byte[0].into());
        }
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("say", text) => connection.write_all(format!("{text}\n").as_bytes()).await?,
            ("panic", _) => panic!("as asked"),
            ("leave", _) => return connection.write_all(b"bye\n").await,
            ("shut", _) => {
                connection.write_all(b"half\n").await?;
                connection.shutdown().await?;
            }
            ("await", _) => {
                connection.write_all(b"waiting\n").await?;
                connection.session().revoked().await;
                return connection.write_all(b"told\n").await;
            }
            ("pour", _) => {
                connection.write_all(b"pouring\n").await?;
                loop {
                    connection.write_all(&[0; 4096]).await?;
                }
            }
            ("quit", _) => {
                shared.quit.notify_one();
                std::future::pending::<()>().await;
            }
            ("hold", _) => {
                _held = Some(shared.accepting.lock().await);
                connection.write_all(b"held\n").await?;
            }
            _ => {}
        }
        line.clear();
    }
}

async fn serve(gate: peergate::tokio::Handle<()>) -> io::Result<()> {
    let shared = Arc::new(Shared::default());
    loop {
        let accept = async {
            drop(shared.accepting.lock().await);
            gate.accept().await
        };
        let mut connection = tokio::select! {
            connection = accept => connection,
            () = gate.stopping() => return Ok(()),
            () = shared.quit.notified() => return Ok(()),
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move { in_task(&mut connection, &mut String::new(), shared).await });
    }
}

/// Its connections go to the next process.
async fn carry(gate: peergate::tokio::Carrier<(), String>) -> io::Result<()> {
    let shared = Arc::new(Shared::default());
    loop {
        drop(shared.accepting.lock().await);
        let carried = tokio::select! {
            carried = gate.accept() => carried,
            () = gate.stopping() => return Ok(()),
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(carried.serve(async move |connection, line| in_task(connection, line, shared).await));
    }
}

/// The same, accepted in a task apart from the one that waits for the end.
async fn carry_apart(gate: peergate::tokio::Carrier<(), String>) -> io::Result<()> {
    tokio::spawn(carry(gate.clone()));
    gate.stopping().await;
    Ok(())
}

fn main() -> Result<(), Error> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [runtime, policy, idle @ ..] = &words[..] else { panic!("service RUNTIME POLICY [MILLISECONDS]") };
    let mut record = Settings::default();
    (record.scope, record.burst) = (RecordScope::Connections, 5);
    let mut service = Service::from_systemd("service").record(record);
    service = if runtime == "threads-read" {
        let file = policy.clone();
        let read = move || policy_file::load::<(), ()>(Path::new(&file), Uid::effective()).map(|loaded| loaded.policy);
        service.policy_from(read)
    } else {
        service.policy_file(policy)
    };
    if let Some(idle) = idle.first().and_then(|span| span.parse().ok()) {
        service = service.idle_exit(Duration::from_millis(idle));
    }
    match runtime.as_str() {
        "inline" => service.serve_inline(inline),
        "threads" | "threads-read" => service.serve_threads(on_thread),
        "tokio" => service.block_on(serve),
        "tokio-carry" => service.hand_over().block_on(carry),
        "tokio-carry-apart" => service.hand_over().block_on(carry_apart),
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            service.block_on_runtime(runtime, serve)
        }
    }
}
