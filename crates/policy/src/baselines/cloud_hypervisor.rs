//! Cloud Hypervisor: rounds until the next one would take no longer than 300 ms, for an hour.
//!
//! `is_precopy_converged` in its `vmm/src/lib.rs`; the bandwidth is that of the last round
//! (`vm-migration/src/context.rs`); defaults are in `docs/live_migration.md` there. It looks only when a round begins,
//! where a QEMU that is allowed as much looks within rounds too. Its post-copy is chosen before the start.

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy, Reason};

use super::levers::Levers;

const DOWNTIME_MS: u64 = 300;
const TIMEOUT: Duration = Duration::from_secs(3600);

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct CloudHypervisor {
    levers: Levers,
    round: u32,
}

impl Policy for CloudHypervisor {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        self.levers.allow_ms(DOWNTIME_MS);
        // A round that has begun is sent to its end.
        if std::mem::replace(&mut self.round, seen.round) < seen.round && seen.elapsed >= TIMEOUT {
            self.levers.last(Action::GiveUp(Reason::OutOfTime { allowed: TIMEOUT }));
        }
        self.levers.next()
    }
}
