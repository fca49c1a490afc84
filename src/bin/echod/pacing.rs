//! Looking again before sleeping: to be woken costs more than to look, as long as the next line comes soon.
//!
//! Waking a sleeping thread costs tens of microseconds on a virtual processor, on both sides. Whoever looks
//! for a while before it sleeps saves that. So that an idle or slow service never spins, a look follows only
//! upon a sleep that was short, and when looks are in vain again and again, each doubles how many short sleeps
//! must come first.

use std::time::{Duration, Instant};

/// A sleep is short up to this many times the span of a look: being woken is itself what makes it so long.
const SHORT: u32 = 4;
/// Looks in vain that cost nothing yet: a peer that is slow now and then is still worth looking for.
const FORGIVEN: u32 = 3;
/// Looks in vain that count: after so many only one in 1,024 short sleeps is followed by another look.
const MOST_IN_VAIN: u32 = FORGIVEN + 10;

/// Whether to look again, and for how long.
#[derive(Debug)]
pub struct Pacing {
    span: Option<Duration>,
    /// When something last came, while it is worth looking for more.
    last_event: Option<Instant>,
    /// Looks in vain of late.
    in_vain: u32,
    /// Short sleeps to come before the next look.
    sleeps_due: u32,
}

impl Pacing {
    /// Looks for as long as `span`; `None`: never.
    pub fn new(span: Option<Duration>) -> Self {
        Self { span, last_event: None, in_vain: 0, sleeps_due: 0 }
    }

    /// Whether to look once more instead of sleeping. When the span is over: no, until sleeps are short again.
    pub fn goes_on_looking(&mut self) -> bool {
        let (Some(span), Some(last)) = (self.span, self.last_event) else { return false };
        if last.elapsed() < span {
            return true;
        }
        self.last_event = None;
        self.in_vain = (self.in_vain + 1).min(MOST_IN_VAIN);
        self.sleeps_due = (1 << self.in_vain.saturating_sub(FORGIVEN)) - 1;
        false
    }

    /// A look found something.
    pub fn found(&mut self) {
        self.last_event = Some(Instant::now());
        self.in_vain /= 2;
    }

    /// Sleeps by calling `sleep`, which says how many events ended it, and judges whether a look would have been
    /// better.
    pub fn sleep(&mut self, sleep: impl FnOnce() -> usize) -> usize {
        let Some(span) = self.span else { return sleep() };
        let since = Instant::now();
        let count = sleep();
        let now = Instant::now();
        self.last_event = None;
        if count > 0 {
            self.judge(now.duration_since(since), span, now);
        }
        count
    }

    /// Somebody came, so long after the one before: as good as an event that ends a sleep, or found by looking.
    pub fn came_after(&mut self, pause: Duration, now: Instant) {
        let Some(span) = self.span else { return };
        match self.last_event {
            Some(_) => self.found(),
            None => self.judge(pause, span, now),
        }
    }

    /// Whether looking goes on.
    pub fn is_looking(&self) -> bool {
        self.last_event.is_some()
    }

    /// Whether upon an event after this pause it is better to look for the next than to sleep.
    fn judge(&mut self, pause: Duration, span: Duration, now: Instant) {
        if pause < SHORT * span {
            match self.sleeps_due.checked_sub(1) {
                None => self.last_event = Some(now),
                Some(due) => self.sleeps_due = due,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn without_a_span_nothing_is_ever_looked_for() {
        let mut pacing = Pacing::new(None);
        assert_eq!(pacing.sleep(|| 3), 3);
        assert!(!pacing.goes_on_looking());
    }

    #[test]
    fn looking_begins_with_a_short_sleep_that_an_event_ended() {
        let mut pacing = Pacing::new(Some(LONG));
        assert!(!pacing.goes_on_looking(), "nothing has come yet");
        pacing.sleep(|| 0);
        assert!(!pacing.goes_on_looking(), "nothing came");
        pacing.sleep(|| 1);
        assert!(pacing.goes_on_looking());
    }

    #[test]
    fn a_long_sleep_ends_it() {
        let mut pacing = Pacing::new(Some(Duration::from_nanos(1)));
        pacing.sleep(|| {
            std::thread::sleep(Duration::from_millis(1));
            1
        });
        assert!(!pacing.goes_on_looking());
    }

    /// Short sleeps until looking is tried again.
    fn sleeps_until_a_look(pacing: &mut Pacing) -> u32 {
        // However slow the machine is: what is under test is what follows upon short sleeps.
        pacing.span = Some(LONG);
        (1..=2000).find(|_| pacing.sleep(|| 1) == 1 && pacing.last_event.is_some()).unwrap()
    }

    fn look_in_vain(pacing: &mut Pacing) {
        pacing.span = Some(Duration::ZERO);
        assert!(!pacing.goes_on_looking());
    }

    #[test]
    fn looks_in_vain_one_after_the_other_become_rarer_until_one_is_not() {
        let mut pacing = Pacing::new(Some(LONG));
        let mut sleeps = Vec::new();
        for _ in 0..15 {
            sleeps.push(sleeps_until_a_look(&mut pacing));
            look_in_vain(&mut pacing);
        }
        assert_eq!(sleeps, [1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024]);
        sleeps_until_a_look(&mut pacing);
        pacing.found();
        pacing.found();
        look_in_vain(&mut pacing);
        assert_eq!(sleeps_until_a_look(&mut pacing), 2);
    }
}
