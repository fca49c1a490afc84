//! Names of users and groups that the user database did not know when the configuration was read: at boot a directory
//! service may come up after us. They are looked up again now and then, on a thread of their own, because the database
//! may take long to answer, or never answer. For [`serve`](crate::serve).

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use peergate::Wakeup;
use peergate::policy::Name;
use peergate::policy_file::{self, SystemNames};

/// The pause before the first look. Each that finds nothing doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What a look found: names and their ids.
pub type Found = Vec<(Name, u32)>;

/// The names to look for, and the look that is under way, of which there is never more than one.
pub struct NameSearch {
    names: Vec<Name>,
    pause: Duration,
    due: Instant,
    look: Option<Look>,
    /// Wakes the main thread when a look has ended.
    wakeup: Arc<Wakeup>,
}

struct Look {
    found: Receiver<Found>,
    /// It began for a configuration that has been replaced since, so its result is not used.
    superseded: bool,
}

impl NameSearch {
    pub fn new(names: Vec<Name>, wakeup: Arc<Wakeup>) -> Self {
        let due = Instant::now() + FIRST_PAUSE;
        Self { names, pause: FIRST_PAUSE, due, look: None, wakeup }
    }

    /// Looks for these names from now on: the names of a configuration that was put in force.
    pub fn set_names(&mut self, names: Vec<Name>, now: Instant) {
        self.names = names;
        self.pause = FIRST_PAUSE;
        self.due = now + FIRST_PAUSE;
        if let Some(look) = &mut self.look {
            look.superseded = true;
        }
    }

    /// When [`turn`](Self::turn) is to be called next, besides when a look has ended.
    pub fn due(&self) -> Option<Instant> {
        (self.look.is_none() && !self.names.is_empty()).then_some(self.due)
    }

    /// What a look that has ended found. Starts the next one if it is time for it. Never waits.
    pub fn turn(&mut self, now: Instant) -> Found {
        let found = self.take_result(now);
        // What was found changes the names to look for: first that.
        if found.is_empty() && self.due().is_some_and(|due| due <= now) {
            self.start_look(now);
        }
        found
    }

    fn take_result(&mut self, now: Instant) -> Found {
        let Some(look) = &self.look else { return Vec::new() };
        let found = match look.found.try_recv() {
            Err(TryRecvError::Empty) => return Vec::new(),
            Err(TryRecvError::Disconnected) => Vec::new(),
            Ok(found) => found,
        };
        let superseded = look.superseded;
        self.look = None;
        if superseded {
            return Vec::new();
        }
        self.look_later(now);
        found
    }

    fn start_look(&mut self, now: Instant) {
        let (result, found) = mpsc::channel();
        let (names, wakeup) = (self.names.clone(), Arc::clone(&self.wakeup));
        let look = move || {
            let _ = result.send(policy_file::look_up(&names, &SystemNames));
            wakeup.notify();
        };
        match thread::Builder::new().name("names".to_owned()).spawn(look) {
            Ok(_) => self.look = Some(Look { found, superseded: false }),
            // Not on this thread, which the daemon waits for.
            Err(_) => self.look_later(now),
        }
    }

    fn look_later(&mut self, now: Instant) {
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.due = now + self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One look from its beginning to its end, at this time.
    fn look(search: &mut NameSearch, now: Instant) -> Found {
        assert!(search.turn(now).is_empty() && search.due().is_none(), "a look is under way");
        loop {
            let found = search.turn(now);
            if search.due().is_some() || !found.is_empty() {
                return found;
            }
            thread::yield_now();
        }
    }

    #[test]
    fn pauses_grow_to_five_minutes_and_a_configuration_starts_them_over() {
        let nobody = vec![Name::User("no such user".to_owned())];
        let mut search = NameSearch::new(nobody.clone(), Arc::new(Wakeup::new().unwrap()));
        let pauses: Vec<u64> = (0..8)
            .map(|_| {
                let now = search.due().unwrap();
                assert!(search.turn(now - Duration::from_millis(1)).is_empty() && search.due() == Some(now));
                assert_eq!(look(&mut search, now), []);
                (search.due().unwrap() - now).as_secs()
            })
            .collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300, 300]);
        let now = Instant::now();
        search.set_names(nobody, now);
        assert_eq!(search.due(), Some(now + FIRST_PAUSE));
        search.set_names(Vec::new(), now);
        assert_eq!(search.due(), None);
    }

    #[test]
    fn what_is_found_is_told_once() {
        let root = Name::User("root".to_owned());
        let mut search = NameSearch::new(vec![root.clone()], Arc::new(Wakeup::new().unwrap()));
        let now = search.due().unwrap();
        assert_eq!(look(&mut search, now), [(root, 0)]);
        search.set_names(Vec::new(), now);
        assert!(search.turn(now + LONGEST_PAUSE * 2).is_empty() && search.look.is_none());
    }

    #[test]
    fn a_look_that_began_for_another_configuration_is_not_used() {
        let root = vec![Name::User("root".to_owned())];
        let mut search = NameSearch::new(root.clone(), Arc::new(Wakeup::new().unwrap()));
        let now = search.due().unwrap();
        assert!(search.turn(now).is_empty() && search.look.is_some());
        search.set_names(root, now);
        while search.look.is_some() {
            assert!(search.turn(now).is_empty());
        }
        assert_eq!(search.due(), Some(now + FIRST_PAUSE));
    }
}
