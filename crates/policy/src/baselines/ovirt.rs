//! oVirt: steps that are taken as rounds fail to bring what is left down.
//!
//! The three policies are the value of `MigrationPolicies` in ovirt-engine's `0000_config.sql`; last items have the limit
//! -1 (`ConvergenceSchedule.java`), and vdsm takes one step a time when more rounds than its limit were seen
//! (`MonitorThread` in vdsm's `migration.py`): a round is when more is left than at the look before, of which there is
//! one in ten seconds (`migration_monitor_interval`). Auto-converge is on in all of them.

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy, Reason};

use super::auto_converge::AutoConverge;
use super::levers::{Every, Levers};

const INITIAL_MS: u64 = 100;
const POLL: Duration = Duration::from_secs(10);

/// What is done.
#[derive(Clone, Copy, Debug)]
enum Step {
    Downtime(u64),
    PostCopy,
    Abort,
}

/// With the rounds that must have failed before; -1 for at once.
type Schedule = &'static [(i64, Step)];

const MINIMAL_DOWNTIME: Schedule = &[
    (1, Step::Downtime(150)),
    (2, Step::Downtime(200)),
    (3, Step::Downtime(300)),
    (4, Step::Downtime(400)),
    (6, Step::Downtime(500)),
    (-1, Step::Abort),
];
const SUSPEND_WORKLOAD: Schedule = &[
    (1, Step::Downtime(150)),
    (2, Step::Downtime(200)),
    (3, Step::Downtime(300)),
    (4, Step::Downtime(400)),
    (6, Step::Downtime(500)),
    (-1, Step::Downtime(5000)),
    (-1, Step::Abort),
];
const POST_COPY: Schedule =
    &[(1, Step::Downtime(150)), (2, Step::Downtime(200)), (-1, Step::PostCopy), (-1, Step::Abort)];

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Ovirt {
    schedule: Schedule,
    levers: Levers,
    every: Every,
    qemu: AutoConverge,
    remaining: Option<u64>,
    failed: i64,
}

impl Ovirt {
    fn new(schedule: Schedule) -> Self {
        let (levers, every, qemu) = Default::default();
        Self { schedule, levers, every, qemu, remaining: None, failed: 0 }
    }

    /// "Minimal downtime".
    pub fn minimal_downtime() -> Self {
        Self::new(MINIMAL_DOWNTIME)
    }

    /// "Suspend workload if needed".
    pub fn suspend_workload() -> Self {
        Self::new(SUSPEND_WORKLOAD)
    }

    /// "Post-copy migration".
    pub fn post_copy() -> Self {
        Self::new(POST_COPY)
    }

    fn take(&mut self, step: Step, seen: &Observation) {
        match step {
            Step::Downtime(ms) => self.levers.allow_ms(ms),
            // Where it cannot be, nothing happens, and the next step comes at its time.
            Step::PostCopy if !seen.limits.post_copy => {}
            Step::PostCopy => self.levers.last(Action::PostCopy),
            Step::Abort => self.levers.last(Action::GiveUp(Reason::NotConverging {
                dirty_rate: seen.dirty_rate,
                link_rate: seen.link_rate,
                instead: String::new(),
            })),
        }
    }
}

impl Policy for Ovirt {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        if self.levers.allowed.is_zero() {
            self.levers.allow_ms(INITIAL_MS);
        }
        self.levers.queue.extend(self.qemu.step(seen));
        if !self.every.is_due(seen, POLL) {
            return self.levers.next();
        }
        let before = self.remaining.replace(seen.remaining.0);
        if before.is_some_and(|before| before < seen.remaining.0) {
            self.failed += 1;
            if let [(limit, step), rest @ ..] = self.schedule
                && *limit < self.failed
            {
                self.schedule = rest;
                self.take(*step, seen);
            }
        }
        self.levers.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::seen;

    /// What it says when more is left at each look than at the one before.
    fn steps(mut policy: Ovirt) -> Vec<Action> {
        let mut said = Vec::new();
        for look in 0..20_u32 {
            let seen = seen(f64::from(look) * 10.0, 1, 100 + u64::from(look));
            loop {
                match policy.decide(&seen) {
                    Action::Continue => break,
                    action => said.push(action),
                }
            }
        }
        said
    }

    #[test]
    fn its_three_policies_take_their_steps_in_their_order() {
        let ms = |said: &[Action]| -> Vec<u128> {
            let pause = |it: &Action| if let Action::Allow(pause) = it { Some(pause.as_millis()) } else { None };
            said.iter().filter_map(pause).collect()
        };
        let minimal = steps(Ovirt::minimal_downtime());
        assert_eq!(ms(&minimal), [100, 150, 200, 300, 400, 500]);
        assert!(matches!(minimal.last(), Some(Action::GiveUp(_))));
        assert_eq!(ms(&steps(Ovirt::suspend_workload())), [100, 150, 200, 300, 400, 500, 5000]);
        let post_copy = steps(Ovirt::post_copy());
        assert_eq!((ms(&post_copy), post_copy.last()), (vec![100, 150, 200], Some(&Action::PostCopy)));
    }
}
