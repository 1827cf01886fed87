//! What the link carries, how surely, and whether it just collapsed.

use crate::Range;

/// Weights of the newest second: in the deviation, and in what the link used to carry.
const DEVIATION: f64 = 0.5;
const MEMORY: f64 = 0.1;
/// It is never known better than this, and what is worse is no estimate.
const SPREAD: (f64, f64) = (0.05, 0.5);
/// Below this share of what it used to carry it has collapsed: it may come back.
const COLLAPSED: f64 = 0.4;

/// An estimate of the link's rate from what the engine measures, in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkRate {
    now: f64,
    usual: f64,
    deviation: f64,
    seen: f64,
    /// It cannot carry more than this, which is believed of what is measured when that had the time to follow.
    cap: Option<(f64, f64)>,
}

impl LinkRate {
    /// From this moment on so much is sent at most, in bytes a second, or as much as goes: what was known is what used to
    /// be, and what is measured follows until `settled`.
    pub fn is_capped(&mut self, rate: Option<f64>, settled: f64) {
        self.cap = rate.map(|rate| (rate, settled));
        self.usual = 0.0;
    }

    /// At this moment, in seconds, so much was measured.
    pub fn update(&mut self, at: f64, rate: f64) {
        let rate = match self.cap {
            Some((cap, settled)) if at < settled => rate.min(cap),
            _ => rate,
        };
        let passed = (at - self.seen).clamp(0.0, 10.0);
        self.seen = at.max(self.seen);
        self.now = rate.max(0.0);
        if self.usual == 0.0 {
            self.usual = self.now;
        }
        if self.usual > 0.0 && passed > 0.0 {
            let off = ((self.now - self.usual).abs() / self.usual).min(1.0);
            self.deviation += (off - self.deviation) * (1.0 - (-passed * DEVIATION).exp());
            // A link that turns out faster is no surprise to wait for.
            let lags = self.usual + (self.now - self.usual) * (1.0 - (-passed * MEMORY).exp());
            self.usual = lags.max(self.now);
        }
    }

    /// Nothing is known of it, or it carries nothing.
    pub fn is_unknown(&self) -> bool {
        self.now < 1.0
    }

    /// It carries much less than it used to, and may come back: not a moment for what cannot be taken back.
    pub fn has_collapsed(&self) -> bool {
        self.now < self.usual * COLLAPSED
    }

    /// What it carries.
    pub fn range(&self) -> Range {
        let spread = self.deviation.clamp(SPREAD.0, SPREAD.1);
        Range { low: self.now * (1.0 - spread), mid: self.now, high: self.now * (1.0 + spread) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_is_capped_has_not_collapsed_and_is_not_believed_to_be_faster() {
        let mut link = LinkRate::default();
        for tick in 0..100 {
            link.update(f64::from(tick) * 0.1, 1e8);
        }
        link.is_capped(Some(1e7), 12.0);
        link.update(10.1, 9e7);
        assert!(link.range().mid <= 1e7 && !link.has_collapsed(), "{link:?}");
        link.update(12.1, 1e7);
        assert!(!link.has_collapsed(), "{link:?}");
        link.is_capped(None, 20.0);
        link.update(18.1, 9e7);
        assert!(link.range().mid > 8e7, "{link:?}");
    }

    #[test]
    fn a_link_that_drops_to_a_tenth_has_collapsed_until_one_gets_used_to_it() {
        let mut link = LinkRate::default();
        for tick in 0..100 {
            link.update(f64::from(tick) * 0.1, 1e8);
        }
        assert!(!link.has_collapsed() && link.range().low > 0.9e8);
        link.update(10.1, 1e7);
        assert!(link.has_collapsed());
        for tick in 0..300 {
            link.update(10.2 + f64::from(tick) * 0.1, 1e7);
        }
        assert!(!link.has_collapsed(), "{link:?}");
        link.update(50.0, 2e8);
        assert!(!link.has_collapsed());
    }
}
