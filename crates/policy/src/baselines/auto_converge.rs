//! QEMU's auto-converge: when what the guest writes is more than half of what was sent, twice in a row, it is slowed
//! down by a share of its time, and by more each time after that.
//!
//! `migration_trigger_throttle` and `mig_throttle_guest_down` in QEMU's `migration/ram.c`; the defaults are in
//! `migration/options.c` (`DEFAULT_MIGRATE_THROTTLE_TRIGGER_THRESHOLD` and its neighbours).

use std::time::Duration;

use crate::{Action, Observation, Percent};

const THRESHOLD: f64 = 0.5;
const INITIAL: u8 = 20;
const INCREMENT: u8 = 10;
const MOST: u8 = 99;
/// It is judged at the first look after so long.
const PERIOD: Duration = Duration::from_secs(1);

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct AutoConverge {
    round: u32,
    since: Duration,
    sent: u64,
    written: u64,
    high: u32,
    now: u8,
}

impl AutoConverge {
    /// To be asked at each observation: the next step, when it is time for one.
    pub fn step(&mut self, seen: &Observation) -> Option<Action> {
        let scan = seen.scan.filter(|_| seen.round > self.round)?;
        self.round = seen.round;
        self.written = self.written.saturating_add(scan.left.0);
        if seen.elapsed < self.since.saturating_add(PERIOD) {
            return None;
        }
        let sent = seen.sent.0.saturating_sub(self.sent);
        let is_high = self.written as f64 > sent as f64 * THRESHOLD;
        (self.since, self.sent, self.written) = (seen.elapsed, seen.sent.0, 0);
        if !is_high {
            return None;
        }
        self.high += 1;
        if self.high < 2 {
            return None;
        }
        self.high = 0;
        let next = if self.now == 0 { INITIAL } else { (self.now + INCREMENT).min(MOST) };
        (next != self.now).then(|| {
            self.now = next;
            Action::Throttle(Percent(next))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bytes;
    use crate::baselines::tests::seen;

    #[test]
    fn it_steps_from_20_by_10_to_99_each_second_look_that_finds_more_than_half() {
        let (mut qemu, mut said) = (AutoConverge::default(), Vec::new());
        for round in 2..30 {
            let seen = seen(f64::from(round) * 2.0, round, 500);
            if let Some(Action::Throttle(share)) = qemu.step(&seen) {
                said.push((round, share.0));
            }
        }
        assert_eq!(said[..3], [(3, 20), (5, 30), (7, 40)]);
        assert_eq!(said.last(), Some(&(19, 99)));
        let mut calm = AutoConverge::default();
        for round in 2..30 {
            let seen = Observation { sent: Bytes(u64::from(round) << 30), ..seen(f64::from(round) * 2.0, round, 500) };
            assert_eq!(calm.step(&seen), None);
        }
    }
}
