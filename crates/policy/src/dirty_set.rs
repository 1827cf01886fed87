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
/// Shorter intervals tell nothing, in seconds.
const LEAST: f64 = 1e-4;

/// See the module's text. Bytes and seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtySet {
    /// `(interval, left)`, by interval.
    points: Vec<(f64, f64)>,
    /// The guest has no more.
    total: f64,
    /// The interval of the measurement that goes on.
    going_on: Option<f64>,
}

impl DirtySet {
    /// Of a guest with so much RAM of which nothing is known.
    pub fn of(total: f64) -> Self {
        Self { points: Vec::new(), total: total.max(0.0), going_on: None }
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

    /// A round that is not over would leave so much if it were, as of this length: to be said again and again as it goes
    /// on. Some of these measurements are kept, since they are of one guest at different intervals.
    pub fn follow(&mut self, interval: f64, left: f64) {
        if let Some(head) = self.going_on {
            let has_near = self.points.iter().any(|(at, _)| *at < head && head / at < SAME);
            if has_near {
                self.points.retain(|(at, _)| at.total_cmp(&head).is_ne());
            }
        }
        let interval = interval.max(LEAST);
        if self.points.iter().any(|(at, _)| *at >= interval) {
            return self.learn(interval, left);
        }
        self.going_on = Some(interval);
        self.take(interval, left);
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
            (Some((t0, w0)), None) => {
                let power = match self.points.len().checked_sub(2) {
                    Some(second) => exponent(self.points[second], (t0, w0)) * 0.75,
                    None => ALONE.1,
                };
                Range { low: w0, mid: w0 * (t / t0).powf(power), high: w0 * t / t0 }
            }
        };
        range.at_most(self.total)
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
        assert!(hot.after(1.0).mid < 1.1e6, "it goes backwards");
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
