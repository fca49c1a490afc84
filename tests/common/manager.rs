//! The service manager: systemd's side of sd_notify(3) and the file descriptor store.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Place, Shared, receive};

/// systemd's side of sd_notify(3): the messages received, and the file descriptor store.
pub struct Manager {
    pub received: Shared<Received>,
    _place: Place,
    path: PathBuf,
}

/// A descriptor in the store.
pub struct Stored {
    name: String,
    fd: OwnedFd,
    /// It was not stored with FDPOLL=0: it is dropped when it hangs up.
    is_watched: bool,
}

impl Stored {
    fn is_gone(&self) -> bool {
        let mut question = [PollFd::new(self.fd.as_fd(), PollFlags::empty())];
        self.is_watched && poll(&mut question, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }
}

/// What the manager has received from the service.
#[derive(Default)]
pub struct Received {
    /// The fields of each datagram, in order.
    pub messages: Vec<Vec<String>>,
    /// The file descriptor store, oldest first.
    pub store: Vec<Stored>,
    /// FileDescriptorStoreMax=.
    pub capacity: usize,
    /// `Some` plays a manager that is too busy: it never closes the descriptors of BARRIER=1, and collects them here.
    pub unsettled: Option<Vec<OwnedFd>>,
    /// How many processes have been started, and how many have exited with all their messages received.
    pub(super) begun: usize,
    ended: usize,
    caught_up: usize,
}

impl Received {
    /// Every process has exited, and all its messages have been received.
    pub fn is_over(&self) -> bool {
        self.ended >= self.begun
    }

    pub fn has(&self, field: &str) -> bool {
        self.count(field) > 0
    }

    pub fn count(&self, field: &str) -> usize {
        self.messages.iter().filter(|message| message.iter().any(|one| one == field)).count()
    }

    /// What the next process is passed: copies, the newest first, as PID 1 passes them.
    pub fn passed(&mut self) -> Vec<(String, OwnedFd)> {
        self.store.retain(|stored| !stored.is_gone());
        self.store.iter().rev().map(|stored| (stored.name.clone(), stored.fd.try_clone().unwrap())).collect()
    }

    fn take_in(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let fields: Vec<String> = text.lines().map(str::to_owned).collect();
        let has = |field: &str| fields.iter().any(|one| one == field);
        let name = fields.iter().find_map(|field| field.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if has("FDSTORE=1") {
            for fd in fds {
                // As PID 1: a descriptor beyond the capacity is closed without a word.
                if self.store.len() < self.capacity {
                    self.store.push(Stored { name: name.clone(), fd, is_watched: !has("FDPOLL=0") });
                }
            }
        } else if has("FDSTOREREMOVE=1") {
            self.store.retain(|stored| stored.name != name);
        } else if has("BARRIER=1") {
            if let Some(unsettled) = &mut self.unsettled {
                unsettled.extend(fds);
            }
        }
        self.messages.push(fields);
    }
}

impl Manager {
    pub fn new() -> Self {
        let place = Place::new();
        let path = place.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let received = Shared::new(Received::default());
        let filled = received.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(message) = receive(&socket, &mut buffer) {
                let (count, fds) = message.unwrap_or_default();
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                match text.as_str() {
                    "END" => return,
                    // Sent by the test after the process has exited.
                    "OVER" => filled.change(|received| received.ended += 1),
                    "CATCH UP" => filled.change(|received| received.caught_up += 1),
                    _ => filled.change(|received| received.take_in(&text, fds)),
                }
            }
        });
        Self { received, _place: place, path }
    }

    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// Waits until all messages sent so far have been received.
    pub fn catch_up(&self) {
        let before = self.received.lock().caught_up;
        // Fails if the test has removed the socket; then there is nothing to wait for.
        if UnixDatagram::unbound().and_then(|socket| socket.send_to(b"CATCH UP", &self.path)).is_ok() {
            self.received.try_wait(|received| (received.caught_up > before).then_some(())).expect("messages are read");
        }
    }

    /// Waits until `question` has an answer. Fails as soon as the service has exited without one.
    #[track_caller]
    pub fn wait<R>(&self, what: &str, mut question: impl FnMut(&mut Received) -> Option<R>) -> R {
        let mut over = false;
        let answer = self.received.try_wait(|received| match question(received) {
            Some(answer) => Some(Some(answer)),
            None if received.is_over() => {
                over = true;
                Some(None)
            }
            None => None,
        });
        match answer.flatten() {
            Some(answer) => answer,
            None if over => panic!("{what}: the service ended before"),
            None => panic!("{what}: never received, only {:?}", self.received.lock().messages),
        }
    }

    /// Waits for `count` messages with this field.
    #[track_caller]
    pub fn wait_for(&self, field: &str, count: usize) {
        self.wait(field, |received| (received.count(field) >= count).then_some(()));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"END", &self.path));
    }
}
