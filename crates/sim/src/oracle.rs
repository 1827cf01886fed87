//! What would have been best, known only afterwards: all simple plans are tried, and the least harmful is kept.
//!
//! A plan lets so many rounds pass and then does one thing: switch over whatever is left, turn to post-copy (in the first
//! round after a share of its time, too), pace to a share, or throttle by one. So it is no bound: a policy that does one
//! thing after another can be better.

use std::time::Duration;

use vmferry_policy::{Action, Limits, Observation, Percent, Policy};

use crate::{Case, End, Engine, EngineKind, Outcome, run};

/// Rounds after which something is done.
const ROUNDS: [u32; 9] = [1, 2, 3, 4, 5, 6, 8, 12, 20];
/// Shares of the time that all RAM takes at least.
const INTO: [f64; 4] = [0.02, 0.1, 0.3, 0.6];
const PACES: [u8; 4] = [70, 50, 25, 12];
const THROTTLES: [u8; 8] = [20, 40, 60, 70, 80, 90, 95, 99];
/// After so many more rounds a plan that slows the guest switches over.
const AFTER: [u32; 4] = [1, 2, 3, 5];

/// When something is done.
#[derive(Clone, Copy)]
enum When {
    Round(u32),
    At(f64),
}

struct Plan {
    when: When,
    what: Option<Action>,
    /// Rounds after that in which it switches over, whatever is left.
    switch: Option<u32>,
    begun: Option<u32>,
    allowed: bool,
}

impl Plan {
    fn is_due(&self, seen: &Observation) -> bool {
        match self.when {
            When::Round(round) => seen.round > round,
            When::At(at) => seen.elapsed.as_secs_f64() >= at,
        }
    }
}

impl Policy for Plan {
    fn decide(&mut self, seen: &Observation) -> Action {
        if self.begun.is_none() && self.is_due(seen) {
            self.begun = Some(seen.round);
            if let Some(what) = self.what.take() {
                return what;
            }
        }
        let switches = self.begun.zip(self.switch).is_some_and(|(begun, after)| seen.round >= begun + after);
        match switches && seen.round > 1 && !std::mem::replace(&mut self.allowed, true) {
            true => Action::Allow(Duration::from_secs(100_000)),
            false => Action::Continue,
        }
    }
}

/// What is better: kept limits, and among these the least harm.
pub(crate) fn score(outcome: &Outcome, limits: &Limits) -> f64 {
    let kept = outcome.felt.exceeds(limits);
    let not_done = if outcome.end == End::Completed { 0.0 } else { 1e9 };
    not_done + kept * 1e3 + outcome.felt.harm(limits.prefer)
}

/// The best of all plans for this case.
pub fn best_in_hindsight(case: &Case, engine: Engine) -> Outcome {
    let floor = case.guest.parts.iter().map(|part| part.bytes).sum::<f64>() / case.link.rate;
    let mut plans: Vec<(When, Option<Action>, Option<u32>)> =
        ROUNDS.iter().map(|round| (When::Round(*round), None, Some(0))).collect();
    if case.limits.post_copy {
        plans.extend(ROUNDS[..4].iter().map(|round| (When::Round(*round), Some(Action::PostCopy), None)));
        plans.extend(INTO.iter().map(|into| (When::At(floor * into), Some(Action::PostCopy), None)));
    }
    let slows: Vec<Action> = match engine.kind {
        _ if case.limits.slow.0 == 0 => Vec::new(),
        EngineKind::External => PACES.iter().map(|share| Action::Pace(Percent(*share))).collect(),
        EngineKind::Qemu => THROTTLES.iter().map(|share| Action::Throttle(Percent(*share))).collect(),
    };
    for what in slows {
        for after in AFTER {
            for when in [When::At(floor * 0.02), When::At(floor * 0.5), When::Round(1), When::Round(2)] {
                plans.push((when, Some(what.clone()), Some(after)));
            }
        }
    }
    let played = plans.into_iter().map(|(when, what, switch)| {
        let mut plan = Plan { when, what, switch, begun: None, allowed: false };
        run(&case.guest, &case.link, engine, case.limits, case.seed, None, &mut plan)
    });
    played.min_by(|a, b| score(a, &case.limits).total_cmp(&score(b, &case.limits))).expect("there are plans")
}
