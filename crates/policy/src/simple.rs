//! The simple rule: pre-copy while each round shrinks what is left, else post-copy; where post-copy may not be used, pace
//! the guest's writes, or throttle it where that cannot be, step by step.
//!
//! Whether a round shrinks anything is judged when it begins: what it has to send is what the guest wrote while the
//! round before was sent. If that is hardly less than the round before had to send, the rounds have met the guest's
//! hot set and more rounds only send it again. The second round has no such predecessor (the first sends all RAM), so
//! there the rates are compared.

use std::time::Duration;

use crate::{Action, Bytes, Observation, Percent, Phase, Policy, Reason};

/// A round counts as progress when it has at most this share of the round before to send.
const PROGRESS: f64 = 0.8;
/// When more of what the first round has sent is stale while it goes on, rounds lead nowhere.
const STALE: Percent = Percent(50);
/// The same while it has not gone on for long: what goes stale so fast outruns the link.
const STALE_SOON: Percent = Percent(30);
const SOON: Duration = Duration::from_secs(2);
/// The throttle begins here and grows by the step, as QEMU's auto-converge does by default.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const THROTTLE_MOST: u8 = 99;
/// The guest may make pages stale at this share of the link's rate at first, and at the half of it at each step. All RAM
/// then takes twice as long as if the guest stood still, and the guest is slow for that much less.
const PACE_FIRST: u8 = 50;
const PACE_LEAST: u8 = 6;
/// Rounds without progress, with the guest as slow as can be, before giving up.
const PATIENCE: u32 = 5;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Simple {
    round: u32,
    /// What the current round had to send when it began.
    to_send: Bytes,
    throttle: Percent,
    /// 0 while writes are not paced.
    pace: Percent,
    /// Rounds without progress, with the guest as slow as can be.
    stuck_rounds: u32,
    asked_post_copy: bool,
}

impl Policy for Simple {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.asked_post_copy {
            return Action::Continue;
        }
        if let Some(action) = self.mind_the_time(seen) {
            return action;
        }
        if goes_stale(seen) && seen.limits.post_copy {
            return self.post_copy();
        }
        if goes_stale(seen) && seen.can_pace && self.pace == Percent(0) {
            return self.slow_down(seen);
        }
        if seen.round <= self.round {
            return Action::Continue;
        }
        let before = std::mem::replace(&mut self.to_send, seen.remaining);
        self.round = seen.round;
        if seen.round < 2 || fits_the_downtime(seen) || progresses(seen, before) {
            self.stuck_rounds = 0;
            return Action::Continue;
        }
        if seen.limits.post_copy {
            return self.post_copy();
        }
        self.slow_down(seen)
    }
}

impl Simple {
    fn post_copy(&mut self) -> Action {
        self.asked_post_copy = true;
        Action::PostCopy
    }

    /// Post-copy needs about as long as the rest takes on the link, so it starts that much before the time is over.
    fn mind_the_time(&mut self, seen: &Observation) -> Option<Action> {
        let allowed = seen.limits.max_time?;
        if seen.limits.post_copy {
            let rest = time_for_the_rest(seen);
            return (seen.elapsed + rest >= allowed && !fits_the_downtime(seen)).then(|| self.post_copy());
        }
        (seen.elapsed >= allowed).then_some(Action::GiveUp(Reason::OutOfTime { allowed }))
    }

    fn slow_down(&mut self, seen: &Observation) -> Action {
        if self.throttle.0 >= THROTTLE_MOST || self.pace != Percent(0) && self.pace.0 <= PACE_LEAST {
            self.stuck_rounds += 1;
            if self.stuck_rounds < PATIENCE {
                return Action::Continue;
            }
            return Action::GiveUp(Reason::NotConverging { dirty_rate: seen.dirty_rate, link_rate: seen.link_rate });
        }
        if seen.can_pace {
            self.pace = match self.pace {
                Percent(0) => Percent(PACE_FIRST),
                Percent(now) => Percent(now / 2),
            };
            return Action::Pace(self.pace);
        }
        self.throttle = match self.throttle {
            Percent(0) => Percent(THROTTLE_FIRST),
            Percent(now) => Percent((now + THROTTLE_STEP).min(THROTTLE_MOST)),
        };
        Action::Throttle(self.throttle)
    }
}

/// How long what is left needs on the link. In the first round pages of zeroes count, but cost next to nothing, so
/// there the pace so far tells more.
fn time_for_the_rest(seen: &Observation) -> Duration {
    let by_rate = seen.remaining.time_at(seen.link_rate).unwrap_or_default();
    let done = seen.total.0.saturating_sub(seen.remaining.0);
    if seen.round > 1 || done == 0 {
        return by_rate;
    }
    by_rate.min(seen.elapsed.mul_f64(seen.remaining.0 as f64 / done as f64))
}

/// The guest writes what was just sent again: another round would only be sent for nothing.
fn goes_stale(seen: &Observation) -> bool {
    let most = if seen.elapsed <= SOON { STALE_SOON } else { STALE };
    seen.round == 1 && seen.stale > most
}

fn fits_the_downtime(seen: &Observation) -> bool {
    seen.remaining.time_at(seen.link_rate).is_some_and(|time| time <= seen.limits.downtime)
}

fn progresses(seen: &Observation, before: Bytes) -> bool {
    if seen.round == 2 {
        return seen.dirty_rate < seen.link_rate;
    }
    (seen.remaining.0 as f64) < before.0 as f64 * PROGRESS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BytesPerSec, Limits};
    use std::time::Duration;

    const MIB: u64 = 1 << 20;

    /// A guest that rewrites a hot set in order, and a link: enough to play pre-copy rounds.
    struct Model {
        hot: u64,
        write_rate: u64,
        link_rate: u64,
        limits: Limits,
        can_pace: bool,
    }

    #[derive(Debug, PartialEq)]
    enum End {
        SwitchedOver { at: Duration, throttle: Percent, pace: Percent },
        PostCopy { at: Duration },
        GaveUp(Reason),
    }

    impl Model {
        fn play(&self, policy: &mut dyn Policy) -> End {
            let (mut elapsed, mut remaining, mut throttle) = (0.0, 1024 * MIB, Percent(0));
            let (mut dirty_rate, mut pace) = (0, Percent(0));
            for round in 1..1000 {
                let round_time = remaining as f64 / self.link_rate as f64;
                for step in 0..10 {
                    let part = f64::from(step) / 10.0;
                    let seen = Observation {
                        elapsed: Duration::from_secs_f64(elapsed + round_time * part),
                        phase: Phase::PreCopy,
                        round,
                        remaining: Bytes((remaining as f64 * (1.0 - part)) as u64),
                        dirty_rate: BytesPerSec(dirty_rate),
                        link_rate: BytesPerSec(self.link_rate),
                        throttle,
                        can_pace: self.can_pace,
                        limits: self.limits,
                        ..seen()
                    };
                    match policy.decide(&seen) {
                        Action::Continue => {}
                        Action::Throttle(by) => throttle = by,
                        Action::Pace(share) => pace = share,
                        Action::PostCopy => return End::PostCopy { at: seen.elapsed },
                        Action::Pause => panic!("no rule of ours pauses the guest"),
                        Action::GiveUp(reason) => return End::GaveUp(reason),
                    }
                }
                elapsed += round_time;
                let mut speed = self.write_rate as f64 * f64::from(100 - throttle.0) / 100.0;
                if pace != Percent(0) {
                    speed = speed.min(self.link_rate as f64 * f64::from(pace.0) / 100.0);
                }
                remaining = ((speed * round_time) as u64).min(self.hot);
                dirty_rate = (remaining as f64 / round_time) as u64;
                if (remaining as f64 / self.link_rate as f64) <= self.limits.downtime.as_secs_f64() {
                    return End::SwitchedOver { at: Duration::from_secs_f64(elapsed), throttle, pace };
                }
            }
            panic!("the rule never ended the migration");
        }
    }

    fn limits() -> Limits {
        Limits { downtime: Duration::from_millis(300), max_time: None, post_copy: true }
    }

    fn model() -> Model {
        Model { hot: 512 * MIB, write_rate: 1300 * MIB, link_rate: 119 * MIB, limits: limits(), can_pace: false }
    }

    /// A first round that has gone on for a second.
    fn seen() -> Observation {
        Observation {
            elapsed: Duration::from_secs(1),
            phase: Phase::PreCopy,
            round: 1,
            remaining: Bytes(900 * MIB),
            total: Bytes(1024 * MIB),
            stale: Percent(0),
            sent: Bytes(119 * MIB),
            dirty_rate: BytesPerSec(0),
            link_rate: BytesPerSec(119 * MIB),
            throttle: Percent(0),
            can_pace: false,
            limits: limits(),
        }
    }

    #[test]
    fn pages_of_zeroes_in_the_first_round_do_not_make_the_time_seem_short() {
        let seen = Observation {
            remaining: Bytes(3072 * MIB),
            total: Bytes(4096 * MIB),
            link_rate: BytesPerSec(5 * MIB),
            limits: Limits { max_time: Some(Duration::from_secs(10)), ..limits() },
            ..seen()
        };
        assert_eq!(Simple::default().decide(&seen), Action::Continue);
        let slow = Observation { remaining: Bytes(4000 * MIB), ..seen };
        assert_eq!(Simple::default().decide(&slow), Action::PostCopy, "at this pace it takes 40 s");
    }

    #[test]
    fn a_guest_that_writes_again_what_was_just_sent_goes_to_post_copy_within_the_first_round() {
        let seen = Observation { stale: Percent(80), ..seen() };
        assert_eq!(Simple::default().decide(&seen), Action::PostCopy);
        for other in [
            Observation { stale: Percent(25), ..seen },
            Observation { stale: Percent(45), elapsed: Duration::from_secs(4), ..seen },
            Observation { limits: Limits { post_copy: false, ..limits() }, ..seen },
        ] {
            assert_eq!(Simple::default().decide(&other), Action::Continue, "{other:?}");
        }
    }

    #[test]
    fn a_guest_that_converges_needs_no_post_copy() {
        let end = Model { write_rate: 40 * MIB, ..model() }.play(&mut Simple::default());
        assert!(matches!(end, End::SwitchedOver { throttle: Percent(0), .. }), "{end:?}");
    }

    #[test]
    fn a_guest_faster_than_the_link_goes_to_post_copy_within_three_rounds() {
        let End::PostCopy { at } = model().play(&mut Simple::default()) else { panic!("no post-copy") };
        assert!(at < Duration::from_secs(14), "{at:?}");
    }

    #[test]
    fn a_small_hot_set_that_is_rewritten_all_the_time_is_seen_as_not_converging() {
        let hot = Model { hot: 100 * MIB, ..model() };
        assert!(matches!(hot.play(&mut Simple::default()), End::PostCopy { .. }));
    }

    #[test]
    fn without_post_copy_the_guest_is_throttled_until_it_converges() {
        let throttled = Model { limits: Limits { post_copy: false, ..limits() }, ..model() };
        let end = throttled.play(&mut Simple::default());
        assert!(matches!(end, End::SwitchedOver { throttle: Percent(90..), .. }), "{end:?}");
    }

    #[test]
    fn without_post_copy_writes_are_paced_where_that_can_be() {
        let paced = Model { can_pace: true, limits: Limits { post_copy: false, ..limits() }, ..model() };
        let End::SwitchedOver { at, throttle: Percent(0), pace: Percent(50) } = paced.play(&mut Simple::default())
        else {
            panic!("not paced, or not to its end")
        };
        assert!(at < Duration::from_secs(3 * 1024 / 119), "{at:?}");
        let stale = Observation { stale: Percent(80), can_pace: true, limits: paced.limits, ..seen() };
        let mut policy = Simple::default();
        assert_eq!(policy.decide(&stale), Action::Pace(Percent(50)), "in the first round");
        assert_eq!(policy.decide(&stale), Action::Continue);
    }

    #[test]
    fn without_post_copy_a_guest_that_no_throttle_tames_stays_where_it_is() {
        let wild = Model { write_rate: 100_000 * MIB, limits: Limits { post_copy: false, ..limits() }, ..model() };
        let end = wild.play(&mut Simple::default());
        assert!(matches!(end, End::GaveUp(Reason::NotConverging { .. })), "{end:?}");
    }

    #[test]
    fn post_copy_starts_early_enough_for_the_time_allowed() {
        let allowed = Duration::from_secs(9);
        let hasty = Model { limits: Limits { max_time: Some(allowed), ..limits() }, ..model() };
        let End::PostCopy { at } = hasty.play(&mut Simple::default()) else { panic!("no post-copy") };
        assert!(at < allowed, "{at:?}");
    }

    #[test]
    fn without_post_copy_the_time_allowed_ends_the_migration() {
        let allowed = Duration::from_secs(10);
        let limits = Limits { max_time: Some(allowed), post_copy: false, ..limits() };
        let end = Model { limits, ..model() }.play(&mut Simple::default());
        assert_eq!(end, End::GaveUp(Reason::OutOfTime { allowed }));
    }

    #[test]
    fn post_copy_is_asked_for_once() {
        let mut policy = Simple::default();
        assert!(matches!(model().play(&mut policy), End::PostCopy { .. }));
        let seen =
            Observation { elapsed: Duration::from_secs(60), round: 9, dirty_rate: BytesPerSec(500 * MIB), ..seen() };
        assert_eq!(policy.decide(&seen), Action::Continue);
    }
}
