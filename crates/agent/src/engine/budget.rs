//! One cap for a guest's RAM and for what it writes to disks that move with it: RAM gets what those leave. Pure: the time is an
//! argument.

use std::time::Duration;

/// How often it is looked what the disks take.
const LOOK: Duration = Duration::from_millis(500);
/// RAM gets this part of the cap at least.
const LEAST: f64 = 0.25;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Bytes a second.
    cap: u64,
    /// When it was looked, and what had been sent of the disks by then, in bytes.
    seen: Option<(Duration, u64)>,
    /// What RAM may take.
    share: u64,
}

impl Budget {
    pub(crate) fn new(cap: u64) -> Self {
        Self { cap, seen: None, share: cap }
    }

    /// What the disks may take, in bytes a second.
    pub(crate) fn for_disks(cap: u64) -> u64 {
        cap - (cap as f64 * LEAST) as u64
    }

    /// So much was sent of the disks until `now`, in bytes: tells what RAM may take from now on, in bytes a second, when that is
    /// something else than before.
    pub(crate) fn for_ram(&mut self, now: Duration, sent: u64) -> Option<u64> {
        let Some((then, before)) = self.seen else {
            self.seen = Some((now, sent));
            return None;
        };
        let passed = now.saturating_sub(then);
        if passed < LOOK {
            return None;
        }
        self.seen = Some((now, sent));
        let disks = sent.saturating_sub(before) as f64 / passed.as_secs_f64();
        let cap = self.cap as f64;
        let share = (cap - disks).max(cap * LEAST) as u64;
        (std::mem::replace(&mut self.share, share) != share).then_some(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_gets_what_the_disks_leave_and_a_quarter_at_least() {
        let mut budget = Budget::new(100_000_000);
        let at = Duration::from_millis;
        assert_eq!(budget.for_ram(at(0), 7), None);
        assert_eq!(budget.for_ram(at(100), 8), None, "not so soon");
        assert_eq!(budget.for_ram(at(1000), 7), None, "they take nothing");
        assert_eq!(budget.for_ram(at(2000), 30_000_007), Some(70_000_000));
        assert_eq!(budget.for_ram(at(3000), 130_000_007), Some(25_000_000));
        assert_eq!(budget.for_ram(at(3500), 0), Some(100_000_000), "what goes backwards is nothing");
        assert!(budget.for_ram(at(3000), 0).is_none(), "and so is time");
        assert_eq!(Budget::for_disks(100_000_000), 75_000_000);
    }
}
