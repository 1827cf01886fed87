//! The rule of a measurement: one thing is done when so many rounds are, whatever was seen meanwhile.

use crate::{Action, Observation, Phase, Policy};

/// See the module's text.
#[derive(Clone, Debug)]
pub struct AfterRounds {
    rounds: u32,
    then: Option<Action>,
}

impl AfterRounds {
    /// Does this when so many rounds are done.
    pub fn new(rounds: u32, then: Action) -> Self {
        Self { rounds, then: Some(then) }
    }

    /// Does nothing at all: rounds until what is left fits the downtime.
    pub fn never() -> Self {
        Self { rounds: 0, then: None }
    }
}

impl Policy for AfterRounds {
    fn decide(&mut self, seen: &Observation) -> Action {
        // A round is done when the next one has begun.
        if seen.phase != Phase::PreCopy || seen.round.saturating_sub(1) < self.rounds {
            return Action::Continue;
        }
        self.then.take().unwrap_or(Action::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, BytesPerSec, Limits, Percent};
    use std::time::Duration;

    #[test]
    fn it_is_done_once_and_when_so_many_rounds_are() {
        let limits = Limits { downtime: Duration::from_millis(300), max_time: None, post_copy: true };
        let seen = |round| Observation {
            elapsed: Duration::from_secs(60),
            phase: Phase::PreCopy,
            round,
            remaining: Bytes(1 << 30),
            total: Bytes(1 << 30),
            stale: Percent(100),
            sent: Bytes(0),
            dirty_rate: BytesPerSec(1 << 30),
            link_rate: BytesPerSec(1),
            throttle: Percent(0),
            can_pace: false,
            limits,
        };
        for then in [Action::PostCopy, Action::Pause] {
            let mut policy = AfterRounds::new(2, then.clone());
            let said: Vec<Action> = [0, 1, 2, 3, 4].map(|round| policy.decide(&seen(round))).into();
            let go_on = Action::Continue;
            assert_eq!(said, [go_on.clone(), go_on.clone(), go_on.clone(), then, go_on]);
        }
        assert_eq!(AfterRounds::new(0, Action::Pause).decide(&seen(1)), Action::Pause);
        assert_eq!(AfterRounds::never().decide(&seen(99)), Action::Continue);
    }
}
