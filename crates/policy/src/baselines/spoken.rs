//! What a baseline decides, in words: none of them has any of its own.

use crate::{Action, Bytes, Observation, Policy};

use super::Baseline;

/// A baseline that says what it decides.
pub struct Spoken {
    name: &'static str,
    policy: Box<dyn Policy>,
    words: Option<String>,
}

impl Spoken {
    /// For one migration.
    pub fn new(baseline: &Baseline) -> Self {
        Self { name: baseline.name, policy: (baseline.make)(), words: None }
    }
}

impl Policy for Spoken {
    fn decide(&mut self, seen: &Observation) -> Action {
        let action = self.policy.decide(seen);
        let what = match &action {
            Action::Continue => return action,
            Action::Allow(pause) => format!("switch over when what is left takes {} ms", pause.as_millis()),
            Action::Throttle(share) => format!("slow the guest by {} %", share.0),
            Action::Pace(share) => format!("hold its writes to {} % of the link", share.0),
            Action::PostCopy => "post-copy".into(),
            Action::Pause => "pause the guest, and send what is left".into(),
            Action::GiveUp(reason) => format!("give up: {reason}"),
        };
        self.words = Some(format!(
            "{:.1} s, round {}: {} left, link {}: {}: {what}",
            seen.elapsed.as_secs_f64(),
            seen.round,
            Bytes(seen.remaining.0),
            seen.link_rate,
            self.name
        ));
        action
    }

    fn words(&mut self) -> Option<String> {
        self.words.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::by_name;
    use crate::baselines::tests::seen;

    #[test]
    fn each_step_is_said_once_in_one_line_with_who_took_it() {
        let mut nova = Spoken::new(by_name("nova").unwrap());
        assert!(matches!(nova.decide(&seen(0.5, 1, 100)), Action::Allow(_)));
        let words = nova.words();
        assert_eq!(
            words.as_deref(),
            Some("0.5 s, round 1: 100 MiB left, link 100 MiB/s: nova: switch over when what is left takes 50 ms")
        );
        assert_eq!((nova.decide(&seen(0.6, 1, 90)), nova.words()), (Action::Continue, None));
    }
}
