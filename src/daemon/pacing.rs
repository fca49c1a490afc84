//! Looking again before sleeping: a wake-up costs more than a look, as long as the next message comes soon.
//!
//! Waking a sleeping thread costs tens of microseconds on a virtual processor, on both sides. A thread that looks for a while
//! before it sleeps saves that. So that an idle or slow service never spins, a look follows only upon a short sleep, and
//! repeated looks in vain double the number of short sleeps that must come first. Between looks the thread yields the
//! processor. Where other threads keep it, looking saves nothing: the scheduler puts a thread that wakes from sleep before
//! them, and a thread that has yielded behind them.

use std::thread;
use std::time::{Duration, Instant};

/// A sleep is short up to this many times the span of a look: being woken is itself what makes it so long.
const SHORT: u32 = 4;
/// Looks in vain that cost nothing yet: a peer that is slow now and then is still worth looking for.
const FORGIVEN: u32 = 3;
/// Looks in vain that count: after so many only one in 1,024 short sleeps is followed by another look.
const MOST_IN_VAIN: u32 = FORGIVEN + 10;

/// A thread that yields and gets the processor back later than this has yielded it to threads that want it for themselves. A
/// peer that answers takes less.
const LONG_ABSENCE: Duration = Duration::from_micros(25);
/// And later than this also where something has come by then: a sleeping thread would have got it sooner. No peer that answers
/// takes as long, and a thread that wants the processor for itself gets it for longer at a time.
const TOO_LONG_ABSENCE: Duration = Duration::from_micros(500);
/// For how many times that absence nothing is looked for: so no more than about a twentieth of the time is lost.
const ABSENCES: u32 = 16;

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
    /// How long other threads have just kept the processor, unless that was worth it.
    absence: Option<Duration>,
    /// Until then other threads want the processor.
    crowded_until: Option<Instant>,
}

impl Pacing {
    /// Looks for as long as `span`; `None`: never.
    pub fn new(span: Option<Duration>) -> Self {
        Self { span, last_event: None, in_vain: 0, sleeps_due: 0, absence: None, crowded_until: None }
    }

    /// Whether to look once more instead of sleeping. When the span is over: no, until sleeps are short again.
    pub fn goes_on_looking(&mut self) -> bool {
        let (Some(span), Some(last)) = (self.span, self.last_event) else { return false };
        if last.elapsed() < span {
            return true;
        }
        self.stop_looking();
        false
    }

    fn stop_looking(&mut self) {
        self.last_event = None;
        if let Some(absence) = self.absence.take() {
            self.crowded_until = Instant::now().checked_add(ABSENCES * absence);
            return;
        }
        self.in_vain = (self.in_vain + 1).min(MOST_IN_VAIN);
        self.sleeps_due = (1 << self.in_vain.saturating_sub(FORGIVEN)) - 1;
    }

    /// Yields the processor before the next look: the peer may be waiting for it. False where other threads kept it last time
    /// and nothing had come when this one got it back, or kept it too long: then it is time to sleep.
    pub fn gives_way(&mut self) -> bool {
        self.gives_way_by(thread::yield_now)
    }

    fn gives_way_by(&mut self, yield_now: impl FnOnce()) -> bool {
        if self.absence.is_some() {
            self.stop_looking();
            return false;
        }
        let since = Instant::now();
        yield_now();
        self.absence = Some(since.elapsed()).filter(|absence| *absence > LONG_ABSENCE);
        true
    }

    /// A look found something.
    pub fn found(&mut self) {
        self.last_event = Some(Instant::now());
        self.in_vain /= 2;
        self.absence = self.absence.filter(|absence| *absence > TOO_LONG_ABSENCE);
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

    /// A connection came, so long after the one before: as good as an event that ends a sleep, or found by looking.
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
        if pause < SHORT * span && self.crowded_until.is_none_or(|until| until <= now) {
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

    fn absent() {
        thread::sleep(2 * LONG_ABSENCE);
    }

    #[test]
    fn where_others_keep_the_processor_and_nothing_comes_it_is_left_to_them_for_a_while() {
        let mut pacing = Pacing::new(Some(LONG));
        sleeps_until_a_look(&mut pacing);
        assert!(pacing.gives_way_by(absent), "something may have come meanwhile");
        assert!(pacing.goes_on_looking());
        assert!(!pacing.gives_way_by(|| panic!("it has given way once")));
        assert!(!pacing.goes_on_looking());
        assert_eq!(pacing.in_vain, 0, "it was not the peer's fault");
        let until = pacing.crowded_until.unwrap();
        pacing.judge(Duration::ZERO, LONG, until - Duration::from_nanos(1));
        assert!(!pacing.is_looking());
        pacing.judge(Duration::ZERO, LONG, until);
        assert!(pacing.is_looking());
    }

    #[test]
    fn a_peer_that_was_given_the_processor_and_answers_is_looked_for_again() {
        let mut pacing = Pacing::new(Some(LONG));
        sleeps_until_a_look(&mut pacing);
        for _ in 0..3 {
            pacing.absence = Some(TOO_LONG_ABSENCE);
            pacing.found();
            assert!(pacing.gives_way());
        }
        pacing.absence = Some(TOO_LONG_ABSENCE + Duration::from_nanos(1));
        pacing.found();
        assert!(pacing.is_looking() && !pacing.gives_way() && !pacing.is_looking(), "it came late");
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
