//! What a migration does to its guest, in one number: seconds that a second of lost work stands for.
//!
//! These weights are chosen, not measured: they say what this project takes for worse. A second of which the guest
//! loses its work costs one. A second in which nobody runs it costs three, as whoever talks to it waits too. The longest
//! stall counts twice, as it is part of the lost work already. A second in post-copy costs a tenth, since the guest
//! needs two hosts and the link, and entering it half a second, as there is no way back: by that a pause of the default
//! limit (300 ms) and a switch to post-copy that spares it are about the same. How long all takes costs a quarter of it,
//! or a fiftieth when the user prefers to be gentle.

use std::time::Duration;

use crate::{Limits, Preference};

/// What a second of each costs; `entering` is for a switch to post-copy as such.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Nobody runs the guest.
    pub downtime: f64,
    /// The longest time that a running guest waits.
    pub stall: f64,
    /// Work that the guest did not do while it ran.
    pub lost: f64,
    /// In post-copy.
    pub at_risk: f64,
    /// For turning to post-copy at all.
    pub entering: f64,
    /// From the beginning of the copy to its end.
    pub total: f64,
}

impl Preference {
    /// See the module's text.
    pub fn weights(self) -> Weights {
        let total = match self {
            Self::Short => 0.25,
            Self::Gentle => 0.02,
        };
        Weights { downtime: 3.0, stall: 2.0, lost: 1.0, at_risk: 0.1, entering: 0.5, total }
    }
}

/// What a migration did, or would do, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Felt {
    /// From the beginning of the copy to its end.
    pub total: f64,
    /// Nobody runs the guest.
    pub downtime: f64,
    /// The longest time that the running guest waits.
    pub stall: f64,
    /// Work that the guest did not do while it ran.
    pub lost: f64,
    /// In post-copy.
    pub at_risk: f64,
}

impl Felt {
    /// See the module's text.
    pub fn harm(&self, prefer: Preference) -> f64 {
        let weights = prefer.weights();
        let entering = if self.at_risk > 0.0 { weights.entering } else { 0.0 };
        self.downtime * weights.downtime
            + self.stall * weights.stall
            + self.lost * weights.lost
            + self.at_risk * weights.at_risk
            + entering
            + self.total * weights.total
    }

    /// By which shares of themselves limits are exceeded, together; 0 when they are kept.
    pub fn exceeds(&self, limits: &Limits) -> f64 {
        let over = |value: f64, limit: Duration| (value / limit.as_secs_f64().max(1e-3) - 1.0).max(0.0);
        over(self.downtime, limits.downtime) + limits.max_time.map_or(0.0, |limit| over(self.total, limit))
    }
}
