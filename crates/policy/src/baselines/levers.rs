//! What several managers have: levers that are pulled one after the other, looks every so often.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{Action, Bytes, Observation};

/// What is still to be said to QEMU, and how long it may have it stand.
#[derive(Clone, Debug, Default)]
pub(super) struct Levers {
    pub(super) queue: VecDeque<Action>,
    pub(super) allowed: Duration,
    pub(super) over: bool,
}

impl Levers {
    pub(super) fn allow(&mut self, pause: Duration) {
        if pause != self.allowed {
            self.allowed = pause;
            self.queue.push_back(Action::Allow(pause));
        }
    }

    pub(super) fn allow_ms(&mut self, ms: u64) {
        self.allow(Duration::from_millis(ms));
    }

    /// Nothing is decided after this.
    pub(super) fn last(&mut self, action: Action) {
        if !std::mem::replace(&mut self.over, true) {
            self.queue.push_back(action);
        }
    }

    pub(super) fn next(&mut self) -> Action {
        self.queue.pop_front().unwrap_or(Action::Continue)
    }
}

/// Looks only so often.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Every {
    pub(super) last: Option<Duration>,
}

impl Every {
    pub(super) fn is_due(&mut self, seen: &Observation, every: Duration) -> bool {
        let is_due = self.last.is_none_or(|last| seen.elapsed >= last.saturating_add(every));
        if is_due {
            self.last = Some(seen.elapsed);
        }
        is_due
    }
}

pub(super) const GIB: f64 = 1_073_741_824.0;

/// So many seconds for each GiB of the guest's RAM, of which at least so many count.
pub(super) fn per_gib(total: Bytes, least: f64, seconds: f64) -> Duration {
    crate::units::seconds((total.0 as f64 / GIB).max(least) * seconds)
}
