//! KubeVirt without stall detection: it waits, and aborts. With VEP 291 it allows more downtime meanwhile.
//!
//! The monitor in `pkg/virt-launcher/virtwrap/live-migration-source.go`, defaults in `pkg/virt-config/virt-config.go`;
//! the tuning as VEP 291 describes it (`kubevirt/enhancements`,
//! `veps/sig-compute/291-dynamic-downtime-tuning/vep.md`), with the 1050 ms of its trial.

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy, Reason};

use super::levers::{Every, Levers, per_gib};

/// QEMU's, which it leaves alone.
const DOWNTIME_MS: u64 = 300;
/// `completionTimeoutPerGiB`, in seconds.
pub(super) const COMPLETION: f64 = 150.0;
/// `progressTimeout`: for so long there may be nothing less left than there was once.
const PROGRESS: Duration = Duration::from_secs(150);
const POLL: Duration = Duration::from_millis(400);
/// VEP 291: `initialMs`, `maxDowntimeMs`, `steps`, `startAfterIteration` and `cooldownSeconds`.
const TUNING: (u64, u64, u64, u32, Duration) = (150, 1050, 7, 3, Duration::from_secs(10));

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct KubeVirt {
    levers: Levers,
    every: Every,
    /// The least that was left, and when that was.
    least: Option<(u64, Duration)>,
}

impl KubeVirt {
    /// Its defaults.
    pub fn aborts() -> Self {
        Self::default()
    }

    fn watch(&mut self, seen: &Observation) {
        let least = self.least.get_or_insert((seen.remaining.0, seen.elapsed));
        if seen.remaining.0 < least.0 {
            *least = (seen.remaining.0, seen.elapsed);
        }
        if seen.elapsed.saturating_sub(least.1) > PROGRESS {
            self.levers.last(Action::GiveUp(Reason::OutOfTime { allowed: PROGRESS }));
        }
        let allowed = per_gib(seen.total, 1.0, COMPLETION);
        if seen.elapsed > allowed {
            self.levers.last(Action::GiveUp(Reason::OutOfTime { allowed }));
        }
    }
}

impl Policy for KubeVirt {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        if self.levers.allowed.is_zero() {
            self.levers.allow_ms(DOWNTIME_MS);
        }
        if self.every.is_due(seen, POLL) {
            self.watch(seen);
        }
        self.levers.next()
    }
}

/// KubeVirt with VEP 291.
#[derive(Clone, Debug, Default)]
pub struct KubeVirtTuning {
    kubevirt: KubeVirt,
    /// When the last step was, once they have begun.
    stepped: Option<Duration>,
}

impl Policy for KubeVirtTuning {
    fn decide(&mut self, seen: &Observation) -> Action {
        let (initial, most, steps, after, cooldown) = TUNING;
        let levers = &mut self.kubevirt.levers;
        if levers.allowed.is_zero() {
            levers.allow_ms(initial);
        }
        if seen.phase == Phase::PreCopy && seen.round >= after {
            let since = self.stepped.get_or_insert(seen.elapsed);
            if seen.elapsed.saturating_sub(*since) >= cooldown {
                *since = seen.elapsed;
                let step = (most - initial).div_ceil(steps - 1);
                levers.allow_ms((levers.allowed.as_millis() as u64 + step).min(most));
            }
        }
        self.kubevirt.decide(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::{allowed, said};

    #[test]
    fn with_tuning_its_downtime_grows_by_150_ms_every_ten_seconds_after_the_third_round() {
        let said = said(&mut KubeVirtTuning::default(), 100, 2000);
        assert_eq!(allowed(&said), [150, 300, 450, 600, 750, 900, 1050]);
        assert!((said[1].0 - 20.0).abs() < 0.5, "{said:?}");
    }
}
