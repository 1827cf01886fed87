//! The rule of a measurement: post-copy when so many rounds are done, whatever was seen meanwhile.

use crate::{Action, Observation, Phase, Policy};

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub struct AfterRounds {
    rounds: u32,
    asked: bool,
}

impl AfterRounds {
    /// Turns to post-copy when so many rounds are done.
    pub fn new(rounds: u32) -> Self {
        Self { rounds, asked: false }
    }
}

impl Policy for AfterRounds {
    fn decide(&mut self, seen: &Observation) -> Action {
        // A round is done when the next one has begun.
        if self.asked || seen.phase != Phase::PreCopy || seen.round.saturating_sub(1) < self.rounds {
            return Action::Continue;
        }
        self.asked = true;
        Action::PostCopy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, BytesPerSec, Limits, Percent};
    use std::time::Duration;

    #[test]
    fn post_copy_comes_once_and_when_so_many_rounds_are_done() {
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
        let mut policy = AfterRounds::new(2);
        let said: Vec<Action> = [0, 1, 2, 3, 4].map(|round| policy.decide(&seen(round))).into();
        let go_on = Action::Continue;
        assert_eq!(said, [go_on.clone(), go_on.clone(), go_on.clone(), Action::PostCopy, go_on]);
        assert_eq!(AfterRounds::new(0).decide(&seen(1)), Action::PostCopy);
    }
}
