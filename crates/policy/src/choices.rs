//! Ways forward beside each other: those that keep the limits first, and of these the least harmful.
//!
//! Another round can be thought better of at the next scan, a switch cannot, and what the guest did not do while it was
//! slowed down is not got back. So a switch is judged by its bad luck and the others by what is likeliest. And in the first
//! round, of which only the beginning was seen, ways that do nothing before its end are worth what the best of them is worth
//! with each luck, as by then it is known which: to wait is to keep the choice. It takes more than a wavering prediction to
//! give that up, or one that is the same with any luck.

use crate::harm::Felt;
use crate::predict::{Outlook, Prediction, Way, predict};
use crate::{Observation, Preference};

/// How likely good luck is, the usual one and bad.
const LUCK: [f64; 3] = [0.25, 0.5, 0.25];
/// What is done before the first round ends has to be better than to wait by this share, unless it is with any luck.
const HASTE: f64 = 0.8;
/// Post-copy after the end of a round has at most this share left to fetch of what it would have at once: it is no way to
/// have a round sent again in post-copy.
const WAITED_FOR: f64 = 0.8;
/// Ways that exceed the downtime are alike up to this factor: rounds that cost minutes each are not for a hundredth less.
const ALIKE: f64 = 1.25;

/// A way and what it would do.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) way: Way,
    pub(crate) prediction: Prediction,
    /// By how much limits would be exceeded; 0 when they are kept.
    pub(crate) exceeds: f64,
    /// What is to be expected of it, or of what can be done in its place when more is known.
    pub(crate) harm: f64,
    /// What is to be expected of it alone.
    alone: f64,
}

/// These ways, the best one first.
pub(crate) fn in_order(ways: Vec<Way>, seen: &Observation, outlook: &Outlook) -> Vec<Choice> {
    let most_fetched = outlook.missing().mid * WAITED_FOR;
    let pays = |it: &Choice| it.way != Way::PostCopyAfter || it.prediction.left.mid <= most_fetched;
    let mut choices: Vec<Choice> = ways.into_iter().map(|way| weigh(way, seen, outlook)).filter(pays).collect();
    if outlook.first.is_some() {
        keep_the_choice(&mut choices, seen.limits.prefer);
    }
    // Who says by when it has to be done wants it as soon as it can be.
    let coarse = |exceeds: f64| match seen.limits.max_time {
        Some(_) => exceeds,
        None => (exceeds.ln_1p() / ALIKE.ln()).ceil(),
    };
    let rank = |it: &Choice| (coarse(it.exceeds), it.harm, it.alone);
    choices.sort_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal));
    choices
}

fn weigh(way: Way, seen: &Observation, outlook: &Outlook) -> Choice {
    let limits = &seen.limits;
    let prediction = predict(outlook, way, limits);
    let (likeliest, worst) = (prediction.likeliest(), prediction.at_worst());
    let judged = match way {
        // What can be thought better of may turn out badly, but not take too long for anything else.
        Way::Rounds(1..) | Way::Pace(_) | Way::PaceAfter(_) | Way::Throttle(_) | Way::PostCopyAfter => {
            Felt { total: worst.total, ..likeliest }
        }
        Way::Rounds(0) => Felt { downtime: worst.downtime, ..likeliest },
        // Nothing of it depends on what is left but its end.
        Way::PostCopy => Felt { downtime: 0.0, ..likeliest },
    };
    let mut exceeds = judged.exceeds(limits);
    if prediction.slowed > limits.slow.share() + 1e-9
        && matches!(way, Way::Pace(_) | Way::PaceAfter(_) | Way::Throttle(_))
    {
        exceeds += 100.0;
    }
    let harm = expected(prediction.harms(limits.prefer));
    Choice { way, prediction, exceeds, harm, alone: harm }
}

fn expected(harms: [f64; 3]) -> f64 {
    harms.iter().zip(LUCK).map(|(harm, share)| harm * share).sum()
}

/// See the module's text.
fn keep_the_choice(choices: &mut [Choice], prefer: Preference) {
    let waits =
        |it: &Choice| it.exceeds <= 0.0 && matches!(it.way, Way::Rounds(1..) | Way::PaceAfter(_) | Way::PostCopyAfter);
    let mut least = [f64::INFINITY; 3];
    for choice in choices.iter().filter(|it| waits(it)) {
        for (least, harm) in least.iter_mut().zip(choice.prediction.harms(prefer)) {
            *least = least.min(harm);
        }
    }
    // What is better with any luck is better.
    let is_better = |it: &Choice| it.prediction.harms(prefer).iter().zip(least).all(|(harm, least)| *harm < least);
    let haste = if choices.iter().any(|it| it.exceeds <= 0.0 && is_better(it)) { 1.0 } else { HASTE };
    for choice in choices.iter_mut().filter(|it| waits(it)) {
        choice.harm = expected(least) * haste;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::seen;
    use crate::predict::First;
    use crate::{Costs, DirtySet, Means, Range};

    const MIB: f64 = 1_048_576.0;

    /// In the first tenth of a first round over 100 MiB/s, of a guest that has written so much within these seconds.
    fn outlook(written: &[(f64, f64)]) -> Outlook {
        let mut dirty = DirtySet::of(8000.0 * MIB);
        for (after, bytes) in written {
            dirty.follow(*after, bytes * MIB);
        }
        Outlook {
            elapsed: 8.0,
            left: 7200.0 * MIB,
            age: 8.0,
            first: Some(First { share: 0.1, stale: written.last().map_or(0.0, |it| it.1 * MIB * 0.1) }),
            rest_of_round: Some(72.0),
            dirty,
            link: Range { low: 95.0 * MIB, mid: 100.0 * MIB, high: 105.0 * MIB },
            costs: Costs::default(),
            round_trip: 0.001,
            means: Means { pace: true, throttle: false },
            paced: 0.0,
            throttled: 0.0,
            slowed: 0.0,
        }
    }

    fn best(outlook: &Outlook, ways: &[Way]) -> Way {
        in_order(ways.to_vec(), &seen(8.0, 1, 7200), outlook)[0].way
    }

    #[test]
    fn what_may_turn_out_to_be_everywhere_soon_waits_and_what_outruns_the_link_by_far_does_not() {
        let ways = [Way::PostCopy, Way::PostCopyAfter, Way::Rounds(1), Way::Rounds(5)];
        let slows_down = outlook(&[(1.0, 300.0), (2.0, 500.0), (4.0, 700.0), (8.0, 850.0)]);
        assert_eq!(best(&slows_down, &ways), Way::PostCopyAfter);
        let goes_on = outlook(&[(1.0, 900.0), (2.0, 1800.0), (4.0, 3600.0), (8.0, 7200.0)]);
        assert_eq!(best(&goes_on, &ways), Way::PostCopy);
    }

    #[test]
    fn of_two_ways_that_would_do_the_same_the_one_that_can_be_thought_better_of_goes_first() {
        let calm = outlook(&[(1.0, 1.0), (8.0, 1.0)]);
        for ways in [[Way::Pace(crate::Percent(12)), Way::Rounds(1)], [Way::PostCopy, Way::Rounds(1)]] {
            assert_eq!(best(&calm, &ways), Way::Rounds(1));
        }
    }
}
