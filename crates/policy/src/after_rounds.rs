//! The rule of a measurement: one thing is done when so many rounds are, whatever was seen meanwhile.

use crate::{Action, Observation, Phase, Policy};

/// See the module's text.
#[derive(Clone, Debug)]
pub struct AfterRounds {
    rounds: u32,
    then: Option<Action>,
    /// The engine may switch over.
    allows: bool,
}

impl AfterRounds {
    /// Does this when so many rounds are done.
    pub fn new(rounds: u32, then: Action) -> Self {
        Self { rounds, then: Some(then), allows: false }
    }

    /// Does nothing at all: rounds until what is left fits the downtime.
    pub fn never() -> Self {
        Self { rounds: 0, then: None, allows: false }
    }
}

impl Policy for AfterRounds {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy {
            return Action::Continue;
        }
        // A round is done when the next one has begun.
        let done = seen.round.saturating_sub(1);
        if done >= self.rounds
            && let Some(then) = self.then.take()
        {
            return then;
        }
        // In the first round an engine may take the pace of pages of zeroes for that of all.
        match done > 0 && !std::mem::replace(&mut self.allows, true) {
            true => Action::Allow(seen.limits.for_pages(&seen.costs)),
            false => Action::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::seen;
    use std::time::Duration;

    #[test]
    fn it_is_done_once_and_when_so_many_rounds_are() {
        let said = |policy: &mut AfterRounds| -> Vec<Action> {
            [0, 1, 2, 3, 4, 5].map(|round| policy.decide(&seen(60.0, round, 900))).into()
        };
        let (go_on, allow) = (Action::Continue, Action::Allow(Duration::from_millis(260)));
        for then in [Action::PostCopy, Action::Pause] {
            let expected = [go_on.clone(), go_on.clone(), allow.clone(), then.clone(), go_on.clone(), go_on.clone()];
            assert_eq!(said(&mut AfterRounds::new(2, then)), expected);
        }
        assert_eq!(AfterRounds::new(0, Action::Pause).decide(&seen(60.0, 1, 900)), Action::Pause);
        let never = said(&mut AfterRounds::never());
        assert_eq!(never.iter().filter(|it| **it != go_on).collect::<Vec<_>>(), [&allow]);
    }
}
