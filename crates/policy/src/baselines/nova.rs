//! OpenStack Nova: a downtime that grows with time, and an end when there was too much of it.
//!
//! `downtime_steps`, `update_downtime` and `should_trigger_timeout_action` in `nova/virt/libvirt/migration.py`,
//! `_live_migration_data_gb` and `_live_migration_monitor` in `driver.py`, defaults in `nova/conf/libvirt.py`
//! (`live_migration_downtime` and its neighbours).

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy, Reason};

use super::auto_converge::AutoConverge;
use super::levers::{Every, Levers, per_gib};

/// `live_migration_downtime`, in ms, and in how many steps it gets there.
const DOWNTIME: f64 = 500.0;
const STEPS: f64 = 10.0;
/// Seconds between steps and until the end, for each GiB, of which at least two count.
const DELAY: f64 = 75.0;
const COMPLETION: f64 = 800.0;
const LEAST_GIB: f64 = 2.0;
/// How often the monitor looks.
const POLL: Duration = Duration::from_millis(500);

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Nova {
    /// `live_migration_timeout_action` is `force_complete`, and post-copy is permitted.
    forces: bool,
    levers: Levers,
    every: Every,
    qemu: AutoConverge,
}

impl Nova {
    fn new(forces: bool) -> Self {
        Self { forces, levers: Levers::default(), every: Every::default(), qemu: AutoConverge::default() }
    }

    /// Its defaults.
    pub fn aborts() -> Self {
        Self::new(false)
    }

    /// With post-copy and auto-converge permitted and `force_complete`: post-copy where it can be, else auto-converge,
    /// and a pause in the end.
    pub fn forces() -> Self {
        Self::new(true)
    }
}

impl Policy for Nova {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        let post_copy = self.forces && seen.limits.post_copy;
        if self.forces && !post_copy {
            self.levers.queue.extend(self.qemu.step(seen));
        }
        if !self.every.is_due(seen, POLL) {
            return self.levers.next();
        }
        let allowed = per_gib(seen.total, LEAST_GIB, COMPLETION);
        if seen.elapsed > allowed {
            self.levers.last(match (self.forces, post_copy) {
                (true, true) => Action::PostCopy,
                (true, false) => Action::Pause,
                _ => Action::GiveUp(Reason::OutOfTime { allowed }),
            });
        }
        let delay = per_gib(seen.total, LEAST_GIB, DELAY).as_secs_f64();
        let step = (seen.elapsed.as_secs_f64() / delay).floor().clamp(0.0, STEPS);
        let base = DOWNTIME / STEPS;
        self.levers.allow_ms((base + (DOWNTIME - base) / STEPS * step) as u64);
        self.levers.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::{allowed, said};

    #[test]
    fn its_downtime_grows_from_50_to_500_ms_in_ten_steps() {
        let said = said(&mut Nova::aborts(), 6300, 2000);
        assert_eq!(allowed(&said), [50, 95, 140, 185, 230, 275, 320, 365, 410, 455, 500]);
        assert!((said[1].0 - 600.0).abs() < 1.0, "{said:?}");
    }

    #[test]
    fn forced_it_turns_to_post_copy_in_the_end() {
        let said = said(&mut Nova::forces(), 6500, 2000);
        assert!(said.iter().any(|(at, action)| *action == Action::PostCopy && (*at - 6400.0).abs() < 1.0), "{said:?}");
    }
}
