//! How far predictions were off, and what follows from that for the next one.
//!
//! Of one figure, such as the downtime of migrations to one host, the logarithm of outcome by prediction is averaged, the
//! newer the heavier (an exponentially weighted mean and variance: T. Finch, "Incremental calculation of weighted mean and
//! variance", 2009): errors of such figures are factors, and half as long is as far off as twice as long. The next
//! prediction is corrected by the mean, and its range is at least as wide as outcomes were spread around it.
//!
//! Before the first outcome it is taken that predictions are right on average, which weighs as much as one outcome. No
//! outcome weighs more than half, nor less than a seventh, and none counts as further off than four times: a migration in
//! which everything was otherwise does not spoil the next ten.

use crate::Range;

/// The spread of the logarithm before anything is known of it: a quarter more or less.
const PRIOR: f64 = 0.22;
/// The least weight of a new outcome.
const LEAST: f64 = 0.15;
/// No outcome counts as further off than this factor.
const MOST: f64 = 4.0;
/// Nine of ten outcomes are within so many standard deviations to either side, where they are spread as errors mostly are.
const NINE_OF_TEN: f64 = 1.645;

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lesson {
    /// Outcomes that it was learnt from.
    pub count: u32,
    /// Of the logarithm of outcome by prediction.
    pub mean: f64,
    /// Of the same.
    pub variance: f64,
}

impl Default for Lesson {
    fn default() -> Self {
        Self { count: 0, mean: 0.0, variance: PRIOR * PRIOR }
    }
}

impl Lesson {
    /// This was predicted, before any correction, and that came of it. What is zero, or no number, tells nothing.
    pub fn learn(&mut self, predicted: f64, outcome: f64) {
        let off = (outcome / predicted).ln();
        if !off.is_finite() || !self.mean.is_finite() || !self.variance.is_finite() {
            return;
        }
        let off = off.clamp(-MOST.ln(), MOST.ln());
        let weight = (1.0 / (f64::from(self.count) + 2.0)).max(LEAST);
        let from_mean = off - self.mean;
        self.mean += weight * from_mean;
        self.variance = (1.0 - weight) * (self.variance + weight * from_mean * from_mean);
        self.count = self.count.saturating_add(1);
    }

    /// What is to be expected where this is predicted: a range that is no narrower than it was, nor than outcomes were.
    pub fn correct(&self, predicted: Range) -> Range {
        if !(predicted.mid > 0.0 && self.mean.is_finite() && self.variance >= 0.0) {
            return predicted;
        }
        let mid = predicted.mid * self.mean.exp();
        let spread = NINE_OF_TEN * self.variance.sqrt();
        let down = (predicted.mid / predicted.low.max(0.0)).ln().max(spread);
        let up = (predicted.high / predicted.mid).ln().max(spread);
        Range { low: mid * (-down).exp(), mid, high: mid * up.exp() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After so many outcomes that are this many times what was predicted.
    fn after(outcomes: &[f64]) -> Lesson {
        outcomes.iter().fold(Lesson::default(), |mut lesson, outcome| {
            lesson.learn(10.0, 10.0 * outcome);
            lesson
        })
    }

    #[test]
    fn a_constant_error_is_corrected_and_the_range_becomes_narrow() {
        let lesson = after(&[1.4; 30]);
        let next = lesson.correct(Range::exactly(10.0));
        assert!((next.mid - 14.0).abs() < 0.1, "{next:?}");
        assert!(next.low > 13.0 && next.high < 15.1, "{next:?}");
        assert_eq!(lesson.count, 30);
    }

    #[test]
    fn after_one_outcome_half_of_it_is_believed() {
        let next = after(&[2.0]).correct(Range::exactly(10.0));
        assert!((next.mid - 10.0 * 2f64.sqrt()).abs() < 1e-9, "{next:?}");
        assert!(next.low < 10.5 && next.high > 19.0, "{next:?}");
    }

    #[test]
    fn one_outcome_that_is_far_off_moves_the_next_prediction_by_less_than_a_quarter() {
        let usual = after(&[1.0; 20]);
        let mut struck = usual;
        struck.learn(10.0, 10_000.0);
        let [before, now] = [usual, struck].map(|it| it.correct(Range::exactly(10.0)));
        assert!(now.mid / before.mid < 1.25 && now.high > before.high * 1.3, "{before:?} {now:?}");
    }

    #[test]
    fn a_range_is_never_narrower_than_it_was_and_holds_nine_of_ten_outcomes() {
        let wide = Range { low: 2.0, mid: 10.0, high: 80.0 };
        let next = after(&[1.0; 20]).correct(wide);
        assert!((next.mid / next.low - 5.0).abs() < 1e-6 && (next.high / next.mid - 8.0).abs() < 1e-6, "{next:?}");
        let outcomes: Vec<f64> = (0..100).map(|at| 0.8 + 0.5 * f64::from(at * 37 % 100) / 100.0).collect();
        let mut lesson = Lesson::default();
        let mut within = 0;
        for outcome in &outcomes {
            let range = lesson.correct(Range::exactly(10.0));
            within += usize::from(range.low <= outcome * 10.0 && outcome * 10.0 <= range.high);
            lesson.learn(10.0, outcome * 10.0);
        }
        assert!((85..=97).contains(&within), "{within} of 100");
    }

    #[test]
    fn what_is_no_number_teaches_nothing() {
        let mut lesson = after(&[1.2; 3]);
        let before = lesson;
        for (predicted, outcome) in [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (1.0, f64::INFINITY), (-1.0, 1.0)] {
            lesson.learn(predicted, outcome);
        }
        assert_eq!(lesson, before);
        for none in [Range::default(), Range::exactly(f64::NAN)] {
            let same = lesson.correct(none);
            assert!(same == none || same.mid.is_nan(), "{same:?}");
        }
        let from_zero = lesson.correct(Range { low: 0.0, mid: 1.0, high: 2.0 });
        assert!(from_zero.low == 0.0 && from_zero.high.is_finite(), "{from_zero:?}");
    }
}
