//! Reading the configuration at a start, while signals are heard. For main.
//!
//! The user database may take long to answer. A stop must not wait for it: the service manager keeps connections of an
//! earlier process, and it drops them when the unit has ended.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use peergate::Wakeup;
use peergate::systemd::{Request, Signals};

use crate::config::{Config, LoadError};
use crate::protocol::Protocol;

/// How reading the configuration ended.
pub enum Outcome<P: Protocol> {
    Loaded(Box<Config<P>>),
    Failed(LoadError),
    /// A stop was asked for before the configuration was read.
    Stopped,
}

/// Reads the configuration as [`Config::load`] does. Requests to reload that come meanwhile are put into `requests`.
///
/// # Errors
/// What making an eventfd says.
pub fn load<P: Protocol>(
    path: Option<&Path>,
    signals: &Signals,
    requests: &mut VecDeque<Request>,
) -> io::Result<Outcome<P>> {
    let wakeup = Arc::new(Wakeup::new()?);
    let (result, loaded) = mpsc::channel();
    let load = {
        let (path, wakeup) = (path.map(Path::to_path_buf), Arc::clone(&wakeup));
        move || {
            let _ = result.send(Config::load(path.as_deref()));
            wakeup.notify();
        }
    };
    // If no thread can be started, the channel is closed at once.
    let _ = thread::Builder::new().name("start".to_owned()).spawn(load);
    loop {
        // The thread may have finished before the wake-up was armed: look afterwards.
        wakeup.arm();
        while let Some(request) = signals.next() {
            if request == Request::Stop {
                return Ok(Outcome::Stopped);
            }
            requests.push_back(request);
        }
        let result = match loaded.try_recv() {
            Ok(result) => result,
            Err(TryRecvError::Disconnected) => Config::load(path),
            Err(TryRecvError::Empty) => {
                let awaited = [signals.as_fd(), wakeup.as_fd()];
                let _ = poll(&mut awaited.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), PollTimeout::NONE);
                wakeup.clear();
                continue;
            }
        };
        return Ok(result.map_or_else(Outcome::Failed, |config| Outcome::Loaded(Box::new(config))));
    }
}
