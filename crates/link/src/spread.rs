//! How many of a link's bulk streams are used: as many as pay.
//!
//! One TCP connection fills no fast link, since one core works for it at each end; too many only stand in each other's
//! way (Cloud Hypervisor saw eight connections fill 100 Gbit/s and sixteen carry less, pull request 7669). So a link
//! connects as many as its users permit, begins with the usual four and climbs: now and then one more is tried for a
//! while, and stays if more got through; or one less, and stays away if no less did.

use std::time::Duration;

/// So many are used at first, and no fewer later.
const USUAL: usize = 4;
/// How long a number is looked at.
const LOOK: Duration = Duration::from_millis(400);
/// Between two trials; it doubles with each that changed nothing.
const BETWEEN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// One more must bring so much more, or it is not worth its threads.
const GAIN: f64 = 1.05;
/// One less may cost so much.
const LOSS: f64 = 0.99;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Spread {
    most: usize,
    used: usize,
    /// What the trial under way began with.
    trial: Option<Trial>,
    up_next: bool,
    pause: Duration,
    since: Duration,
    written: f64,
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    before: usize,
    /// What got through before, in bytes a second.
    rate: f64,
}

impl Spread {
    /// For a link with so many bulk streams.
    pub(crate) fn new(most: usize) -> Self {
        let used = most.min(USUAL);
        Self { most, used, trial: None, up_next: true, pause: BETWEEN.0, since: Duration::ZERO, written: 0.0 }
    }

    /// The first so many bulk streams are to be used.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// So many bytes of bulk were written by now. `busy`: users had more to send than went through all the time, so
    /// that what was written tells what the streams carry.
    pub(crate) fn on_written(&mut self, now: Duration, bytes: usize, busy: bool) {
        if !busy {
            // What is seen now tells nothing; what is tried is over.
            if let Some(trial) = self.trial.take() {
                self.used = trial.before;
            }
            (self.since, self.written) = (now, 0.0);
            return;
        }
        self.written += bytes as f64;
        let looked = now.saturating_sub(self.since);
        let due = if self.trial.is_some() { LOOK } else { LOOK + self.pause };
        if looked < due || self.most <= USUAL {
            return;
        }
        let rate = self.written / looked.as_secs_f64();
        (self.since, self.written) = (now, 0.0);
        match self.trial.take() {
            None => self.try_another(rate),
            Some(trial) => self.judge(trial, rate),
        }
    }

    fn try_another(&mut self, rate: f64) {
        let up = self.used < self.most && (self.up_next || self.used == USUAL);
        self.trial = Some(Trial { before: self.used, rate });
        self.used = if up { self.used + 1 } else { self.used - 1 };
    }

    fn judge(&mut self, trial: Trial, rate: f64) {
        let up = self.used > trial.before;
        if rate >= trial.rate * if up { GAIN } else { LOSS } {
            // It pays: on in the same direction, soon.
            (self.up_next, self.pause) = (up, BETWEEN.0);
        } else {
            (self.used, self.up_next) = (trial.before, !up);
            self.pause = (self.pause * 2).min(BETWEEN.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are used after so many seconds on a link that carries this much with so many streams.
    fn climb(most: usize, seconds: u64, carries: impl Fn(usize) -> f64) -> (usize, f64) {
        let mut spread = Spread::new(most);
        let (tick, mut through, mut best) = (Duration::from_millis(10), 0.0, 0.0);
        for step in 0..seconds * 100 {
            let rate = carries(spread.used());
            spread.on_written(tick * step as u32, (rate * tick.as_secs_f64()) as usize, true);
            assert!((most.min(USUAL)..=most).contains(&spread.used()));
            through += rate;
            best += (1..=most).map(&carries).fold(0.0, f64::max);
        }
        (spread.used(), through / best)
    }

    #[test]
    fn streams_that_each_bring_more_are_all_used() {
        let (used, share) = climb(8, 120, |streams| streams as f64 * 1e9);
        assert!(used >= 7 && share > 0.85, "{used} {share}");
    }

    #[test]
    fn where_more_streams_bring_nothing_no_more_are_used() {
        let (used, share) = climb(8, 60, |_| 125e6);
        assert!(used <= USUAL + 1 && share > 0.999, "{used} {share}");
    }

    #[test]
    fn it_stays_at_the_knee() {
        let (used, share) = climb(8, 120, |streams| if streams <= 6 { streams as f64 } else { 5.0 } * 1e9);
        assert!((5..=7).contains(&used) && share > 0.85, "{used} {share}");
    }

    #[test]
    fn what_an_idle_link_carries_is_no_reason() {
        let mut spread = Spread::new(8);
        for step in 0..6000 {
            spread.on_written(Duration::from_millis(10 * step), 1000 * step as usize, false);
            assert_eq!(spread.used(), USUAL);
        }
    }

    #[test]
    fn who_has_few_streams_uses_them_all() {
        for most in [1, 2, 4] {
            assert_eq!(climb(most, 30, |_| 1e9).0, most);
        }
    }
}
