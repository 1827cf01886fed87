//! A link: a rate, a round trip, and what becomes of the rate.

use crate::Random;

/// A megabit a second, in bytes a second of guest memory: what TCP carries of it (docs/FIGURES.md: 114 MiB/s of 1 Gbit/s).
pub(crate) const MBIT: f64 = 114.0 * 1_048_576.0 / 1000.0;

/// See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// In bytes a second.
    pub rate: f64,
    /// There and back, in seconds.
    pub round_trip: f64,
    /// From these seconds on, this share of the rate.
    pub changes: Vec<(f64, f64)>,
}

impl Link {
    /// Of so many Mbit/s that stay.
    pub fn steady(mbit: f64) -> Self {
        Self { rate: mbit * MBIT, round_trip: 0.0005, changes: Vec::new() }
    }

    /// What it carries when nothing changes any more.
    pub(crate) fn in_the_end(&self) -> f64 {
        self.rate * self.changes.last().map_or(1.0, |(_, share)| *share)
    }

    /// What it carries, and for how long from now.
    pub(crate) fn at(&self, at: f64) -> (f64, f64) {
        let next = self.changes.iter().position(|(from, _)| *from > at);
        let until = next.map_or(f64::INFINITY, |next| self.changes[next].0 - at);
        let last = next.unwrap_or(self.changes.len()).checked_sub(1);
        (self.rate * last.map_or(1.0, |last| self.changes[last].1), until.max(1e-3))
    }

    /// One of all kinds: half of them stay as they are, others change, drop to a tenth or to nothing and come back.
    pub fn any(random: &mut Random) -> Self {
        let round_trip = random.between(0.0001, 0.02);
        let mbit = [100.0, 1000.0, 1000.0, 10_000.0, 25_000.0][random.below(5)] * random.between(0.8, 1.0);
        let from = random.between(1.0, 60.0);
        let back = from + random.between(1.0, 15.0);
        let changes = match random.below(8) {
            0 => vec![(from, random.between(0.3, 1.0))],
            1 => vec![(from, 0.1), (back, 1.0)],
            2 => vec![(from, 0.0), (back, 1.0)],
            3 => (1..20).map(|step| (f64::from(step) * from, random.between(0.5, 1.0))).collect(),
            _ => Vec::new(),
        };
        Self { rate: mbit * MBIT, round_trip, changes }
    }
}
