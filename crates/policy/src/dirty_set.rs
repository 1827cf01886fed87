//! The dirty set as a function of time: how much a round of this length leaves to be sent.
//!
//! A guest's writes are no rate. One that sweeps over its memory makes stale as much as its speed times the time, until
//! it has been everywhere; one with a hot set makes that stale at once and then hardly more. Both are told apart by
//! rounds of different lengths, and each scan is one measurement: a round of `interval` left so much.
//!
//! What is between and beyond the measurements follows from what is true of any guest that goes on as it does. The
//! longer the round, the more is left; and two rounds in a row write no more pages, counted once, than both together
//! counted twice. So the function never falls and is concave through zero: from one measurement `(t, w)` follows that a
//! round of `t/2` leaves from `w/2` to `w`, and one of `2t` from `w` to `2w`. That is the range; the middle is a power
//! law through the nearest two measurements.
//!
//! A guest changes. The newest measurement is believed, and older ones as far as they can be true beside it.

/// From what to what something is expected, and what is thought likeliest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// Hardly less.
    pub low: f64,
    /// The likeliest.
    pub mid: f64,
    /// Hardly more.
    pub high: f64,
}

impl Range {
    /// Exactly so much.
    pub fn exactly(value: f64) -> Self {
        Self { low: value, mid: value, high: value }
    }

    fn at_most(self, most: f64) -> Self {
        Self { low: self.low.min(most), mid: self.mid.min(most), high: self.high.min(most) }
    }
}

/// Measurements whose intervals differ by less than this factor replace each other.
const SAME: f64 = 1.3;
/// More measurements are not kept.
const MOST: usize = 8;
/// The exponent of the power law while one measurement is all there is: towards shorter rounds, and longer ones.
const ALONE: (f64, f64) = (0.8, 0.6);
/// Between two sums of a first round there is at least this factor: the difference of two that are near tells little.
const APART: f64 = 1.5;
/// How fast the exponent may fall beyond what was measured.
const FALLS: (f64, f64) = (0.1, 2.0);
/// Shorter intervals tell nothing, in seconds.
const LEAST: f64 = 1e-4;

/// See the module's text. Bytes and seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtySet {
    /// `(interval, left)`, by interval.
    points: Vec<(f64, f64)>,
    /// The guest has no more.
    total: f64,
    /// Of a first round: when, and what it left by then.
    means: Vec<(f64, f64)>,
    /// The interval of the measurement that goes on.
    going_on: Option<f64>,
}

impl DirtySet {
    /// Of a guest with so much RAM of which nothing is known.
    pub fn of(total: f64) -> Self {
        Self { total: total.max(0.0), ..Self::default() }
    }

    /// The guest's RAM.
    pub fn total(&self) -> f64 {
        self.total
    }

    /// Nothing was measured yet.
    pub fn is_unknown(&self) -> bool {
        self.points.is_empty()
    }

    /// A round of this length left so much.
    pub fn learn(&mut self, interval: f64, left: f64) {
        self.going_on = None;
        let interval = interval.max(LEAST);
        self.points.retain(|(at, _)| *at > interval * SAME || *at < interval / SAME);
        self.take(interval, left);
    }

    /// A first round has left so much by now, or of so much as it has sent so far would leave of all: to be said again and
    /// again as it goes on, and when it is over. Each page was watched since it was sent, so that this is the mean of what
    /// rounds leave that are not as long: of two such sums the difference tells what one between both leaves.
    pub fn follow(&mut self, elapsed: f64, left: f64) {
        let elapsed = elapsed.max(LEAST);
        if !(elapsed.is_finite() && left.is_finite()) || left < 0.0 {
            return;
        }
        let mean = left.min(self.total);
        if self.means.last().is_some_and(|(before, _)| *before >= elapsed) {
            self.means.clear();
        }
        if let Some(head) = self.going_on.take() {
            self.points.retain(|(at, _)| at.total_cmp(&head).is_ne());
        }
        let (at, left) = match self.means.last() {
            Some(&before) => {
                // Of a power law the mean up to t is its value there by one more than its exponent.
                let power = exponent(before, (elapsed, mean));
                ((before.0 * elapsed).sqrt(), (before.1 * mean).sqrt() * (1.0 + power))
            }
            None => (elapsed / 2.0, mean),
        };
        self.points.retain(|(before, _)| *before < at || *before > at * SAME);
        self.take(at, left);
        if self.means.last().is_none_or(|(before, _)| elapsed >= before * APART) {
            self.means.push((elapsed, mean));
        } else {
            self.going_on = Some(at);
        }
    }

    fn take(&mut self, interval: f64, left: f64) {
        if !(interval.is_finite() && left.is_finite()) || left < 0.0 {
            return;
        }
        let left = left.min(self.total);
        for (at, bytes) in &mut self.points {
            let proportional = left * *at / interval;
            // What it can be beside the newest.
            *bytes = bytes.clamp(left.min(proportional), left.max(proportional)).min(self.total);
        }
        let place = self.points.partition_point(|(at, _)| *at < interval);
        self.points.insert(place, (interval, left));
        if self.points.len() > MOST {
            // Whatever is farthest from what is done now says least of what is to come.
            let (shortest, longest) = (interval / self.points[0].0, self.points[MOST].0 / interval);
            self.points.remove(if shortest > longest { 0 } else { MOST });
        }
        self.make_concave(interval);
    }

    /// Clamping each to the newest does not make them agree with each other: whoever breaks the shape goes.
    fn make_concave(&mut self, newest: f64) {
        let mut at = 1;
        while at < self.points.len() {
            let ((t0, w0), (t1, w1)) = (self.points[at - 1], self.points[at]);
            let agrees = w1 >= w0 * (1.0 - 1e-9) && w1 / t1 <= w0 / t0 * (1.0 + 1e-9);
            if agrees {
                at += 1;
                continue;
            }
            let goes = if t1.total_cmp(&newest).is_eq() { at - 1 } else { at };
            self.points.remove(goes);
            at = at.saturating_sub(1).max(1);
        }
    }

    /// What a round of this length leaves. Of a guest of which nothing is known, from nothing to all.
    pub fn after(&self, interval: f64) -> Range {
        let t = if interval.is_nan() { LEAST } else { interval.max(LEAST) };
        let above = self.points.partition_point(|(at, _)| *at < t);
        let before = above.checked_sub(1).map(|at| self.points[at]);
        let next = self.points.get(above).copied();
        let range = match (before, next) {
            (None, None) => Range { low: 0.0, mid: self.total / 2.0, high: self.total },
            (Some((t0, w0)), Some((t1, w1))) => {
                let mid = w0.max(1.0) * (t / t0).powf(exponent((t0, w0), (t1, w1)));
                let chord = w0 + (w1 - w0) * (t - t0) / (t1 - t0);
                Range { low: chord, mid: mid.clamp(chord, w1.max(chord)), high: w1.min(w0 * t / t0).max(chord) }
            }
            (None, Some((t1, w1))) => {
                // The shorter, the nearer to proportional.
                let power = match self.points.get(1) {
                    Some(second) => f64::midpoint(1.0, exponent((t1, w1), *second)),
                    None => ALONE.0,
                };
                Range { low: w1 * t / t1, mid: w1 * (t / t1).powf(power), high: w1 * (t / t1).powf(power * 0.7) }
            }
            (Some((t0, w0)), None) => self.beyond(t, (t0, w0)),
        };
        range.at_most(self.total)
    }

    /// What a round leaves that is longer than the longest that was measured.
    fn beyond(&self, t: f64, (t0, w0): (f64, f64)) -> Range {
        let longer = t / t0;
        let before: Vec<(f64, f64)> = self.points.iter().rev().skip(1).take(2).copied().collect();
        let Some(&(t1, w1)) = before.first() else {
            return Range { low: w0, mid: w0 * longer.powf(ALONE.1), high: w0 * longer };
        };
        let power = exponent((t1, w1), (t0, w0));
        // How fast the exponent falls, by the logarithm of the time: that of a guest that has been everywhere does.
        let falls = match before.get(1) {
            Some(&(t2, w2)) => {
                let (earlier, apart) = (exponent((t2, w2), (t1, w1)), (t0 / t2).ln() / 2.0);
                let falls = (earlier.max(0.01) / power.max(0.001)).ln() / apart;
                if falls.is_finite() { falls.clamp(FALLS.0, FALLS.1) } else { FALLS.0 }
            }
            None => FALLS.0 * 2.0,
        };
        let power = power * (-falls * (t0 / t1).ln() / 2.0).exp();
        let mid = w0 * (power * -(-falls * longer.ln()).exp_m1() / falls).exp();
        // It is concave: no higher than the chord goes on.
        let high = (w0 + (w0 - w1) / (t0 - t1) * (t - t0)).min(w0 * longer);
        Range { low: w0, mid: mid.min(high), high }
    }

    /// How fast pages become stale in short rounds, in bytes a second: as much as was seen, or what follows of it.
    pub fn rate(&self) -> f64 {
        self.points.first().map_or(0.0, |(interval, left)| left / interval)
    }
}

/// Of the power law through these two: from 0, as nothing is added, to 1, proportional.
fn exponent((t0, w0): (f64, f64), (t1, w1): (f64, f64)) -> f64 {
    let power = (w1.max(1.0) / w0.max(1.0)).ln() / (t1 / t0).ln();
    if power.is_finite() { power.clamp(0.0, 1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = 1_073_741_824.0;

    #[test]
    fn of_a_guest_that_sweeps_the_middle_is_proportional_and_of_a_hot_set_flat() {
        let (mut sweep, mut hot) = (DirtySet::of(GIB), DirtySet::of(GIB));
        for t in [4.0, 2.0, 1.0] {
            sweep.learn(t, t * 1e8);
            hot.learn(t, 5e7);
        }
        assert!((sweep.after(0.5).mid - 5e7).abs() < 1e6, "{:?}", sweep.after(0.5));
        assert!(sweep.after(3.0).mid > 2.9e8 && sweep.after(3.0).mid < 3.1e8);
        assert!((hot.after(3.0).mid - 5e7).abs() < 1e5, "{:?}", hot.after(3.0));
        assert!(hot.after(0.9).mid > 4.5e7);
        assert!((hot.after(60.0).mid - 5e7).abs() < 1e5);
    }

    #[test]
    fn the_range_holds_whatever_guest_that_fits_the_measurements() {
        // Of a random writer to a set of 64 MiB.
        let truth = |t: f64| 6.4e7 * (1.0 - (-t * 1e8 / 6.4e7).exp());
        let mut set = DirtySet::of(GIB);
        for t in [5.0, 0.8, 0.3] {
            set.learn(t, truth(t));
        }
        for t in [0.1, 0.2, 0.5, 1.0, 3.0, 10.0] {
            let range = set.after(t);
            assert!(range.low <= truth(t) * 1.001 && truth(t) <= range.high * 1.001, "{t}: {range:?}, {}", truth(t));
            assert!(range.low <= range.mid && range.mid <= range.high, "{t}: {range:?}");
        }
    }

    #[test]
    fn the_newest_is_believed_and_the_old_as_far_as_it_can_be_true_beside() {
        let mut set = DirtySet::of(GIB);
        set.learn(4.0, 4e8);
        set.learn(1.0, 1e6);
        assert!(set.after(4.0).high <= 4e6 * 1.001, "{:?}", set.after(4.0));
        set.learn(0.5, 5e8);
        assert!(set.after(0.5).mid >= 5e8 * 0.999 && set.after(1.0).low >= 5e8 * 0.999);
    }

    #[test]
    fn a_first_round_that_goes_on_tells_a_hot_set_from_a_sweep() {
        let (mut sweep, mut hot) = (DirtySet::of(GIB), DirtySet::of(GIB));
        for tick in 1..100 {
            let t = f64::from(tick) / 10.0;
            sweep.follow(t, t * 1e7);
            hot.follow(t, 5e7 * (1.0 - (-t * 4.0).exp()));
        }
        assert!(sweep.after(60.0).mid > 3e8, "{:?}", sweep.after(60.0));
        assert!(hot.after(60.0).mid < 6e7, "{:?}", hot.after(60.0));
        assert!(hot.points.len() <= MOST);
        hot.follow(1.0, 1e6);
        assert!(hot.after(1.0).high < 2.1e6, "it goes backwards: {:?}", hot.after(1.0));
    }

    /// Each page is watched from when it was sent: what is seen of a round of `t` is the mean of what rounds up to `t` leave.
    fn mean(truth: impl Fn(f64) -> f64, t: f64) -> f64 {
        (0..1000).map(|step| truth(t * (f64::from(step) + 0.5) / 1000.0)).sum::<f64>() / 1000.0
    }

    #[test]
    fn the_beginning_of_a_first_round_tells_what_later_rounds_leave_of_a_guest_that_has_been_everywhere_and_one_that_has_not()
     {
        let uniform = |t: f64| 2e8 * (1.0 - (-t / 2.0).exp());
        let sweep = |t: f64| t * 2e6;
        let hot_cold = |t: f64| 3e7 * (1.0 - (-t * 5.0).exp()) + 1e8 * (1.0 - (-t / 50.0).exp());
        let guests: [(&dyn Fn(f64) -> f64, f64); 3] = [(&uniform, 1.1), (&sweep, 1.5), (&hot_cold, 1.5)];
        for (which, (truth, near)) in guests.into_iter().enumerate() {
            let mut set = DirtySet::of(GIB);
            for tick in 1..=100 {
                let t = f64::from(tick) / 10.0;
                set.follow(t, mean(truth, t));
            }
            for t in [3.0, 8.0, 20.0, 100.0] {
                let (range, is) = (set.after(t), truth(t));
                assert!(range.mid < is * near && range.mid > is / near, "{which}, {t}: {range:?}, {is}");
                assert!(range.high > is * 0.9, "{which}, {t}: {range:?}, {is}");
            }
        }
    }

    #[test]
    fn a_burst_at_the_end_of_what_was_seen_is_not_taken_for_how_it_goes_on() {
        let mut set = DirtySet::of(8.0 * GIB);
        // A hundred times as fast for the last tenth of the time.
        let written = |t: f64| 1e6 * t + 1e8 * (t - 9.0).max(0.0);
        for tick in 1..=100 {
            let t = f64::from(tick) / 10.0;
            set.follow(t, mean(written, t));
        }
        let (after, as_fast) = (set.after(200.0).mid, 1e8 * 200.0);
        assert!(after < as_fast / 20.0 && after > 1e6 * 200.0 / 2.0, "{after}");
    }

    #[test]
    fn nothing_that_is_said_breaks_it() {
        let mut set = DirtySet::of(0.0);
        for value in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e30] {
            set.learn(value, value);
            set.learn(1.0, value);
            set.follow(value, value);
            let range = set.after(value);
            assert!(range.low.is_finite() && range.mid.is_finite() && range.high.is_finite(), "{value}: {range:?}");
        }
    }
}
