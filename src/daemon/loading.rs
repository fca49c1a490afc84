//! Reading the configuration on a thread of its own. For main.
//!
//! The user database may take long to answer. Signals are heard meanwhile: a stop must not wait for it, because at a start
//! the service manager keeps connections of an earlier process, and drops them when the unit has ended.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use peergate::Wakeup;
use peergate::systemd::{Request, Signals};

use crate::cli::Choice;
use crate::config::{Config, LoadError};
use crate::protocol::Protocol;

/// A configuration that is being read as [`Config::load`] does.
pub struct Loading<P: Protocol> {
    choice: Choice<P::Options>,
    loaded: Receiver<Result<Config<P>, LoadError>>,
}

impl<P: Protocol> Loading<P> {
    /// Starts the thread. It notifies `wakeup` when it has finished.
    pub fn begin(choice: &Choice<P::Options>, wakeup: &Arc<Wakeup>) -> Self {
        let (result, loaded) = mpsc::channel();
        let load = {
            let (choice, wakeup) = (choice.clone(), Arc::clone(wakeup));
            move || {
                let _ = result.send(Config::load(&choice));
                wakeup.notify();
            }
        };
        // If no thread can be started, the channel is closed at once.
        let _ = thread::Builder::new().name("configuration".to_owned()).spawn(load);
        Self { choice: choice.clone(), loaded }
    }

    /// The configuration, once it is read. Arm the wake-up before: the thread may finish between this call and the wait.
    pub fn result(&self) -> Option<Result<Config<P>, LoadError>> {
        match self.loaded.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Disconnected) => Some(Config::load(&self.choice)),
            Err(TryRecvError::Empty) => None,
        }
    }
}

/// How reading the configuration ended at a start.
pub enum Outcome<P: Protocol> {
    Loaded(Box<Config<P>>),
    Failed(LoadError),
    /// A stop was asked for before the configuration was read.
    Stopped,
}

/// Reads the configuration at a start. Requests to reload that come meanwhile are put into `requests`.
///
/// # Errors
/// What making an eventfd says.
pub fn load_at_start<P: Protocol>(
    choice: &Choice<P::Options>,
    signals: &Signals,
    requests: &mut VecDeque<Request>,
) -> io::Result<Outcome<P>> {
    let wakeup = Arc::new(Wakeup::new()?);
    let loading = Loading::begin(choice, &wakeup);
    loop {
        wakeup.arm();
        while let Some(request) = signals.next() {
            if request == Request::Stop {
                return Ok(Outcome::Stopped);
            }
            requests.push_back(request);
        }
        if let Some(result) = loading.result() {
            return Ok(result.map_or_else(Outcome::Failed, |config| Outcome::Loaded(Box::new(config))));
        }
        let awaited = [signals.as_fd(), wakeup.as_fd()];
        let _ = poll(&mut awaited.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), PollTimeout::NONE);
        wakeup.clear();
    }
}
