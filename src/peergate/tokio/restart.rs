//! Live connections of a service on tokio, over a restart.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Connection, Handle, Stopping, ended_by, run, runtime};
use crate::gate::Admission;
use crate::permits::Terms;
use crate::service::{Error, HandOver, Inheritance, Leaving, Start, finish, leave};
use crate::session::Session;

/// How long tasks may take to leave their connections. Before that each connection is cut off.
const PATIENCE: Duration = Duration::from_secs(11);

impl<T: Terms, W: Serialize + DeserializeOwned + Default + Send + 'static> HandOver<T, W> {
    /// As [`Service::block_on`](crate::Service::block_on), with connections that go to the next process at a restart
    /// ([`Carried::serve`]). When `main` has returned, the tasks that serve connections go on until each has left or ended
    /// its connection; what lives after ten seconds is cut off.
    ///
    /// ```no_run
    /// use std::io;
    ///
    /// use peergate::tokio::{Carrier, Connection};
    /// use peergate::{Error, Service};
    /// use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
    ///
    /// /// What a connection is in the middle of.
    /// #[derive(Default, serde::Serialize, serde::Deserialize)]
    /// struct Work {
    ///     line: Vec<u8>,
    /// }
    ///
    /// async fn shout(connection: &mut Connection<()>, Work { line }: &mut Work) -> io::Result<()> {
    ///     // A line that has no end yet stays in `line`, for the next process.
    ///     while connection.read_until(b'\n', line).await? > 0 && line.ends_with(b"\n") {
    ///         connection.write_all(&line.to_ascii_uppercase()).await?;
    ///         line.clear();
    ///     }
    ///     Ok(())
    /// }
    ///
    /// async fn serve(gate: Carrier<(), Work>) -> io::Result<()> {
    ///     loop {
    ///         tokio::select! {
    ///             carried = gate.accept() => drop(tokio::spawn(carried.serve(shout))),
    ///             () = gate.stopping() => return Ok(()),
    ///         }
    ///     }
    /// }
    ///
    /// fn main() -> Result<(), Error> {
    ///     Service::from_systemd("shout").policy_file("/etc/shout.toml").hand_over::<Work>().block_on(serve)
    /// }
    /// ```
    ///
    /// # Errors
    /// What keeps the service from starting, as a sentence; the error of `main`.
    pub fn block_on<F, R, E>(self, main: F) -> Result<(), Error>
    where
        F: FnOnce(Carrier<T, W>) -> R,
        R: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        self.block_on_made(runtime, main)
    }

    /// As [`block_on`](Self::block_on), on a runtime that the caller has made, after the [`Service`](crate::Service).
    ///
    /// # Errors
    /// As [`block_on`](Self::block_on).
    pub fn block_on_runtime<F, R, E>(self, runtime: Runtime, main: F) -> Result<(), Error>
    where
        F: FnOnce(Carrier<T, W>) -> R,
        R: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        self.block_on_made(|| Ok(runtime), main)
    }

    fn block_on_made<F, R, E>(self, runtime: impl FnOnce() -> Result<Runtime, Error>, main: F) -> Result<(), Error>
    where
        F: FnOnce(Carrier<T, W>) -> R,
        R: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        let mut opened = self.into_service().open()?;
        let inherited = Inheritance::take_back(&mut opened);
        let shared = Arc::new(Shared::default());
        let keeps = Arc::clone(&shared);
        let main = move |handle: Handle<T>| {
            inherited.go_on(&handle.core, |admission, start| {
                handle.queue.inherited.fetch_add(1, Ordering::Release);
                keeps.lock().push_back((admission, start));
            });
            let carrier = Carrier { handle, shared: keeps };
            let main = main(carrier.clone());
            async move {
                let ended = main.await;
                carrier.close_inherited();
                carrier.wait_for_tasks().await;
                ended
            }
        };
        let (ended, attendant) = run(opened, runtime()?, true, main)?;
        leave(&attendant, &shared.left);
        attendant.end();
        ended.map_err(ended_by)
    }
}

/// The running service, for the tasks that serve, where connections go to the next process: [`HandOver::block_on`]. Cheap to
/// clone.
pub struct Carrier<T: Terms, W> {
    handle: Handle<T>,
    shared: Arc<Shared<T, W>>,
}

struct Shared<T, W> {
    /// Connections of the process before that nothing serves yet.
    inherited: Mutex<VecDeque<(Admission<T>, Start<W>)>>,
    /// Connections that go to the next process.
    left: Leaving,
    /// How many are being served.
    served: AtomicUsize,
    none_served: Notify,
}

impl<T, W> Default for Shared<T, W> {
    fn default() -> Self {
        let (served, none_served) = (AtomicUsize::new(0), Notify::new());
        Self { inherited: Mutex::default(), left: Leaving::default(), served, none_served }
    }
}

impl<T, W> Shared<T, W> {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(Admission<T>, Start<W>)>> {
        self.inherited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Terms, W: Default> Carrier<T, W> {
    /// The next connection: one of the process before, in the middle of its work, or one that was just admitted. As
    /// [`Handle::accept`].
    pub async fn accept(&self) -> Carried<T, W> {
        loop {
            // A connection counts as served before it is taken. Afterwards the queue may be empty, and the service stops:
            // `main`, which may be another task, waits for what is served.
            let carrier = Served::new(self);
            if let Some((connection, work)) = self.next_inherited().or_else(|| self.next_admitted()) {
                return Carried { connection, work, carrier };
            }
            drop(carrier);
            self.handle.queue.more.notified().await;
        }
    }

    fn next_inherited(&self) -> Option<(Connection<T>, W)> {
        loop {
            let (admission, (work, received)) = self.pop_inherited()?;
            if let Some(mut connection) = self.handle.enter(admission, true) {
                connection.hold(received);
                return Some((connection, work));
            }
        }
    }

    fn next_admitted(&self) -> Option<(Connection<T>, W)> {
        Some((self.handle.try_accept()?, W::default()))
    }
}

impl<T: Terms, W> Carrier<T, W> {
    /// Ready when the service stops: no connection is accepted any more, and the tasks leave theirs.
    pub fn stopping(&self) -> Stopping<T> {
        self.handle.stopping()
    }

    /// How many connections are admitted.
    pub fn connections(&self) -> usize {
        self.handle.connections()
    }

    fn pop_inherited(&self) -> Option<(Admission<T>, Start<W>)> {
        let next = self.shared.lock().pop_front()?;
        self.handle.queue.inherited.fetch_sub(1, Ordering::Release);
        Some(next)
    }

    /// Closes connections of the process before that nothing will serve.
    fn close_inherited(&self) {
        while let Some((admission, _)) = self.pop_inherited() {
            self.handle.core.close_in_order(admission.socket);
        }
    }

    /// Waits until no connection is served, if the service stops. Otherwise `main` has ended it, and the tasks do not know.
    async fn wait_for_tasks(&self) {
        if !self.handle.core.stopping.is_given() {
            return;
        }
        let none = async {
            while self.shared.served.load(Ordering::Acquire) > 0 {
                self.shared.none_served.notified().await;
            }
        };
        // By then each connection is cut off. A task that waits for something else is cut off with the runtime.
        let _ = timeout(PATIENCE, none).await;
    }
}

impl<T: Terms, W> Clone for Carrier<T, W> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone(), shared: Arc::clone(&self.shared) }
    }
}

impl<T: Terms, W> fmt::Debug for Carrier<T, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Carrier").field(&self.handle).finish()
    }
}

/// A connection that goes to the next process at a restart, with its state: [`Carrier::accept`]. Dropped, it is closed in
/// order.
#[must_use = "a connection is closed when it is dropped"]
pub struct Carried<T: Terms, W> {
    connection: Connection<T>,
    work: W,
    carrier: Served<T, W>,
}

impl<T: Terms, W: Serialize> Carried<T, W> {
    /// The peer, the rule that admits it, whether it is revoked.
    pub fn session(&self) -> &Session<T> {
        self.connection.session()
    }

    /// Serves the connection to its end. At a restart a read returns 0, as at the end of file, before all that came is read.
    /// `serve` returns then, with everything in its second argument that the next process needs to go on; what is received and
    /// not consumed ([`AsyncBufRead`](tokio::io::AsyncBufRead)) is kept beside it. The connection is not closed: the next
    /// process accepts it with that work.
    ///
    /// If `serve` fails, panics, or is dropped before it returns, or does not return within ten seconds, the connection is
    /// closed.
    pub async fn serve<F>(self, serve: F)
    where
        F: AsyncFnOnce(&mut Connection<T>, &mut W) -> io::Result<()>,
    {
        let Self { mut connection, mut work, carrier } = self;
        if serve(&mut connection, &mut work).await.is_err() {
            return;
        }
        let (mut link, received) = connection.into_parts();
        // The thread that ends connections holds one for a moment.
        let link = loop {
            match Arc::try_unwrap(link) {
                Ok(link) => break link,
                Err(held) => link = held,
            }
            tokio::task::yield_now().await;
        };
        finish(&carrier.0.handle.core, link, (work, received), &carrier.0.shared.left);
    }
}

impl<T: Terms, W> fmt::Debug for Carried<T, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Carried").field(&self.connection).finish()
    }
}

/// Counts a connection that is served.
struct Served<T: Terms, W>(Carrier<T, W>);

impl<T: Terms, W> Served<T, W> {
    fn new(carrier: &Carrier<T, W>) -> Self {
        carrier.shared.served.fetch_add(1, Ordering::AcqRel);
        Self(carrier.clone())
    }
}

impl<T: Terms, W> Drop for Served<T, W> {
    fn drop(&mut self) {
        if self.0.shared.served.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.shared.none_served.notify_one();
        }
    }
}
