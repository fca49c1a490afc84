//! A thread that gives a gate its turns, and what other threads ask of it: for a [`Door`](super::Door), and for a daemon that
//! does more on that thread.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;

use super::{Closer, Gate};
use crate::permits::Terms;
use crate::systemd::activation::Listener;
use crate::systemd::{Heartbeat, Monitored};

/// What a [`GateThread`] drives: a gate, and what serves the connections that it admits.
pub trait Driver: Send + 'static {
    /// Of the gate's policy.
    type Terms: Terms;

    /// The gate that is driven.
    fn gate(&mut self) -> &mut Gate<Self::Terms>;

    /// Waits until there is something to do, and does it.
    fn turn(&mut self);

    /// Accepts no connection from now on. Each admitted one is served when it returns.
    fn stop_accepting(&mut self);

    /// The gate, to be ended.
    fn into_gate(self) -> Gate<Self::Terms>;
}

/// The running thread, as other threads see it. Dropped, it is [shut](Self::shut).
///
/// Its methods wait until the thread has done what they say, between two turns. Called on that thread itself, they return at
/// once with nothing to tell, and it is done after the turn.
pub struct GateThread<D> {
    /// `None` once it is to end.
    commands: Option<mpsc::Sender<Command<D>>>,
    closer: Closer,
    heartbeat: Arc<Heartbeat>,
    thread: Option<thread::JoinHandle<Vec<Listener>>>,
}

/// True where it ends the thread. Dropped without having run, it tells the caller that the thread has ended.
type Command<D> = Box<dyn FnOnce(&mut D) -> bool + Send>;

impl<D: Driver> GateThread<D> {
    /// Starts the thread.
    ///
    /// # Errors
    /// What starting a thread says.
    pub fn start(mut driver: D) -> io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let (closer, heartbeat) = (driver.gate().closer(), Arc::new(Heartbeat::default()));
        let of_thread = Arc::clone(&heartbeat);
        let thread =
            thread::Builder::new().name("gate".to_owned()).spawn(move || drive(driver, &received, &of_thread))?;
        Ok(Self { commands: Some(commands), closer, heartbeat, thread: Some(thread) })
    }

    /// Has the thread do this. `None` where the thread has ended, or is this one.
    pub fn ask<A: Send + 'static>(&self, what: impl FnOnce(&mut D) -> A + Send + 'static) -> Option<A> {
        let (answer, answered) = mpsc::channel();
        self.send(move |driver| {
            let _ = answer.send(what(driver));
            false
        });
        if self.is_on_its_thread() { None } else { answered.recv().ok() }
    }

    /// Accepts no connection from now on: a client that connects stays in the listener's queue for the next process.
    /// Closing goes on until [`shut`](Self::shut). Returns the number that the next connection would have.
    pub fn stop_accepting(&self) -> u64 {
        let stop = |driver: &mut D| {
            driver.stop_accepting();
            driver.gate().next_connection()
        };
        self.ask(stop).unwrap_or_default()
    }

    /// Shuts the gate if no connection is admitted, waits for a place or is being closed. A client that connects later
    /// stays in the listener's queue for the next process.
    pub fn shut_if_quiet(&mut self) -> bool {
        if self.is_on_its_thread() {
            return false;
        }
        let (answer, answered) = mpsc::channel();
        self.send(move |driver| {
            let is_quiet = driver.gate().is_quiet();
            answer.send(is_quiet).is_ok() && is_quiet
        });
        // No answer: the thread has ended, and with it every connection it cared for.
        let is_quiet = answered.recv().unwrap_or(true);
        if is_quiet {
            self.shut();
        }
        is_quiet
    }
}

impl<D> GateThread<D> {
    /// Closes connections in order for other threads.
    pub fn closer(&self) -> Closer {
        self.closer.clone()
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        let closer = self.closer.clone();
        Monitored::new("gate", &self.heartbeat, move || closer.wake())
    }

    /// Stops accepting, closes in order what is being closed (two seconds at most), and hands the listeners back; none, where
    /// it was shut before. Admitted connections live on.
    pub fn shut(&mut self) -> Vec<Listener> {
        self.commands = None;
        self.closer.wake();
        let is_on_its_thread = self.is_on_its_thread();
        let thread = self.thread.take().filter(|_| !is_on_its_thread);
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    }

    fn send(&self, command: impl FnOnce(&mut D) -> bool + Send + 'static) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(Box::new(command));
            self.closer.wake();
        }
    }

    fn is_on_its_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.thread().id() == thread::current().id())
    }
}

fn drive<D: Driver>(mut driver: D, commands: &mpsc::Receiver<Command<D>>, heartbeat: &Heartbeat) -> Vec<Listener> {
    let mut is_over = false;
    while !is_over {
        heartbeat.answer();
        driver.turn();
        while !is_over {
            match commands.try_recv() {
                Ok(command) => is_over = command(&mut driver),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    driver.stop_accepting();
                    is_over = true;
                }
            }
        }
    }
    driver.into_gate().finish()
}

impl<D> Drop for GateThread<D> {
    fn drop(&mut self) {
        self.shut();
    }
}

impl<D> fmt::Debug for GateThread<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GateThread").finish_non_exhaustive()
    }
}
