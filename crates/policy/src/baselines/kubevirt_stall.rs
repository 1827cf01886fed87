//! KubeVirt's stall detection (VEP 248): when what rounds leave has not come down for 40 s, it waits for one of the better
//! moments and ends the migration there.
//!
//! `pkg/virt-launcher/virtwrap/stall-detector.go`, its use in `live-migration-source.go`, and defaults in
//! `pkg/virt-config/virt-config.go` (`DefaultStallMargin` and its neighbours).

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy, Reason};

use super::kubevirt::COMPLETION;
use super::levers::{Every, Levers, per_gib};

const DOWNTIME: Duration = Duration::from_millis(300);
/// `maxDowntimeMs`, and by how much more it may seem to take: `precopyPossibleFactor`.
const MOST_DOWNTIME: Duration = Duration::from_millis(900);
const POSSIBLE: f64 = 1.5;
/// `stallMargin` and `stallProgressTimeout`.
const MARGIN: f64 = 0.04;
const WINDOW: Duration = Duration::from_secs(40);
/// `patienceWindowDecayFactor`, `ewmaAlpha`, `completionTimeoutFactor`, `switchoverTimeout`.
const DECAY: f64 = 0.5;
const WEIGHT: f64 = 0.4;
const TWICE: f64 = 2.0;
const SWITCHOVER: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(400);

/// See the module's text.
#[derive(Clone, Debug)]
pub struct KubeVirtStall {
    /// `allowPostCopy` and `allowWorkloadDisruption`.
    disrupts: bool,
    levers: Levers,
    every: Every,
    rate: f64,
    round: u32,
    /// What rounds of the last 40 s have left, as far as it was less than before; and the least of those before.
    recent: Vec<(Duration, u64)>,
    outside: Option<u64>,
    /// Since it has stalled.
    stalled: Option<Stalled>,
    switches_by: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Stalled {
    best: u64,
    history: Vec<u64>,
    patience: Duration,
    deadline: Duration,
}

impl KubeVirtStall {
    /// One that may turn to post-copy, or only pause the guest for a while.
    pub fn new(disrupts: bool) -> Self {
        Self {
            disrupts,
            levers: Levers::default(),
            every: Every::default(),
            rate: 0.0,
            round: 0,
            recent: Vec::new(),
            outside: None,
            stalled: None,
            switches_by: None,
        }
    }

    fn takes(&self, left: u64) -> Option<Duration> {
        (self.rate > 0.0).then(|| crate::units::seconds(left as f64 / self.rate))
    }

    /// A round has begun with so much to send.
    fn iteration(&mut self, seen: &Observation, left: u64) {
        while let Some((at, bytes)) = self.recent.first().copied()
            && seen.elapsed.saturating_sub(at) >= WINDOW
        {
            self.recent.remove(0);
            self.outside = Some(self.outside.map_or(bytes, |least| least.min(bytes)));
        }
        let is_less = self.outside.is_none_or(|least| left <= least)
            && self.recent.last().is_none_or(|(_, before)| left < *before);
        if is_less {
            self.recent.push((seen.elapsed, left));
        }
        match (&mut self.stalled, self.outside) {
            (Some(stalled), _) => stalled.relax(seen.elapsed, left),
            (None, Some(least)) if left as f64 >= least as f64 * (1.0 - MARGIN) => {
                let best = self.recent.iter().map(|(_, bytes)| *bytes).fold(least, u64::min);
                let stalled = Stalled {
                    best,
                    history: Vec::new(),
                    patience: WINDOW,
                    deadline: seen.elapsed.saturating_add(WINDOW),
                };
                self.stalled = Some(stalled);
            }
            _ => return,
        }
        self.act(seen, left);
    }

    fn act(&mut self, seen: &Observation, left: u64) {
        let (Some(stalled), Some(takes)) = (&self.stalled, self.takes(left)) else { return };
        let is_good = left as f64 <= stalled.best as f64 * (1.0 + MARGIN);
        let budget = per_gib(seen.total, 1.0, COMPLETION * TWICE).saturating_sub(seen.elapsed);
        if self.switches_by.is_some() || !is_good || takes > budget {
            return;
        }
        if self.disrupts && seen.limits.post_copy {
            self.levers.last(Action::PostCopy);
        } else if self.disrupts {
            self.switch(seen, Duration::from_secs(2000));
        } else if takes <= MOST_DOWNTIME.mul_f64(POSSIBLE) {
            self.switch(seen, MOST_DOWNTIME);
        } else {
            self.levers.last(Action::GiveUp(Reason::NotConverging {
                dirty_rate: seen.dirty_rate,
                link_rate: seen.link_rate,
                instead: String::new(),
            }));
        }
    }

    fn switch(&mut self, seen: &Observation, within: Duration) {
        self.levers.allow(within);
        self.switches_by = Some(seen.elapsed.saturating_add(SWITCHOVER));
    }

    fn mind_the_time(&mut self, seen: &Observation) {
        let allowed = per_gib(seen.total, 1.0, COMPLETION);
        let is_late = seen.elapsed > self.switches_by.unwrap_or(allowed);
        if !is_late {
            return;
        }
        let budget = per_gib(seen.total, 1.0, COMPLETION * TWICE).saturating_sub(seen.elapsed);
        let completes = self.takes(seen.remaining.0).is_some_and(|takes| takes <= budget);
        if self.switches_by.is_none() && self.disrupts && completes {
            match seen.limits.post_copy {
                true => self.levers.last(Action::PostCopy),
                false => self.switch(seen, Duration::from_secs(2000)),
            }
        } else {
            self.levers.last(Action::GiveUp(Reason::OutOfTime { allowed }));
        }
    }
}

impl Stalled {
    fn relax(&mut self, now: Duration, left: u64) {
        self.history.push(left);
        if now < self.deadline {
            return;
        }
        self.history.sort_unstable();
        self.best = self.history.remove(0);
        self.patience = self.patience.mul_f64(DECAY);
        self.deadline = now.saturating_add(self.patience);
    }
}

impl Policy for KubeVirtStall {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        if self.levers.allowed.is_zero() {
            self.levers.allow(DOWNTIME.min(MOST_DOWNTIME));
        }
        if self.every.is_due(seen, POLL) {
            let sample = seen.link_rate.0 as f64;
            self.rate = if self.rate == 0.0 { sample } else { WEIGHT * sample + (1.0 - WEIGHT) * self.rate };
            self.mind_the_time(seen);
        }
        if seen.round > self.round {
            self.round = seen.round;
            if let Some(scan) = seen.scan.filter(|_| self.rate > 0.0 && !self.levers.over) {
                self.iteration(seen, scan.left.0);
            }
        }
        self.levers.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::said;

    #[test]
    fn a_stall_is_seen_after_the_window_and_ends_by_what_is_allowed() {
        // 2000 MiB at 100 MiB/s are far from 900 ms.
        let gives_up = said(&mut KubeVirtStall::new(false), 200, 2000);
        assert!(matches!(gives_up[..], [_, (at, Action::GiveUp(_))] if (40.0..60.0).contains(&at)), "{gives_up:?}");
        let post_copy = said(&mut KubeVirtStall::new(true), 200, 2000);
        assert!(matches!(post_copy[..], [_, (at, Action::PostCopy)] if (40.0..60.0).contains(&at)), "{post_copy:?}");
        // 80 MiB are 800 ms: within what it allows then.
        let waits = said(&mut KubeVirtStall::new(false), 90, 80);
        assert!(matches!(waits[..], [_, (_, Action::Allow(MOST_DOWNTIME))]), "{waits:?}");
    }
}
