//! A prediction made when the copy has begun, from what is seen of it.
//!
//! The first round tells how much of what was sent is stale, and how fast the link is; after half a second, and a
//! twentieth of the round, that is enough to play the rest. Of a QEMU that moves the RAM nothing is known of what the guest
//! writes before the first round is over.

use tokio::task::JoinHandle;
use vmferry_policy::{Observation, Range};
use vmferry_sim::{EngineKind, Observed, Since, Written};

use super::forecast::{Base, Raw};

/// Before so long, and so much that was sent, nothing is predicted, in seconds and bytes.
const EARLY: (f64, u64) = (0.5, 48 << 20);
/// Before this share of the first round.
const SHARE: f64 = 0.05;
/// Before so long nobody has looked what is stale, in seconds.
const FIRST: f64 = 0.2;
/// Between two looks that tell something, in seconds.
const APART: f64 = 0.14;
/// How far the link's rate may be from what it is at first.
const RATE: (f64, f64) = (0.9, 1.1);
/// What is sent for a byte of memory, at least and at most.
const PACKED: (f64, f64) = (0.02, 1.2);

/// Waits for the moment to predict, and predicts.
pub(super) struct Expecting {
    base: Option<Base>,
    /// What was predicted before it was asked for.
    pub(super) before: Option<Raw>,
    /// How much of all that is in use would be stale after so long.
    points: Vec<Written>,
    playing: Option<JoinHandle<Raw>>,
    /// Something came between that no prediction has to know.
    pub(super) disturbed: bool,
}

impl Expecting {
    /// Nothing, as of a migration that is done by a script.
    pub(super) fn nothing() -> Self {
        Self { base: None, before: None, points: Vec::new(), playing: None, disturbed: false }
    }

    pub(super) fn of(base: Base, before: Option<Raw>) -> Self {
        let disturbed = !base.running;
        Self { base: Some(base), before, disturbed, ..Self::nothing() }
    }

    /// Its user has changed what was predicted: that teaches nothing.
    pub(super) fn is_disturbed(&mut self) {
        self.disturbed = true;
    }

    /// Looks whether enough is known by now, and predicts as soon as it is.
    pub(super) fn see(&mut self, seen: &Observation) {
        let Some(base) = self.base.as_ref().filter(|_| self.playing.is_none()) else { return };
        let at = seen.elapsed.as_secs_f64();
        let rate = seen.link_rate.0 as f64;
        let (total, used) = (seen.total.0 as f64, base.resident.min(seen.total.0 as f64));
        let done = total - seen.remaining.0 as f64;
        // Zeroes, and what was packed, take less of the link than of the memory.
        let sent = (rate * at).min(done).max(1.0);
        let point = |after, bytes| Written { after, bytes, since: Since::Sent };
        let first_round = if rate > 0.0 { used / rate } else { f64::INFINITY };
        let tells = match seen.scan {
            Some(scan) if seen.round > 1 => {
                self.points.push(point(scan.interval.as_secs_f64(), scan.left.0 as f64));
                true
            }
            _ if base.pauses_first => at >= EARLY.0,
            _ => {
                let is_new = self.points.last().is_none_or(|last| at >= last.after + APART);
                let by_agents = base.engine.kind == EngineKind::External;
                if by_agents && at >= FIRST && seen.sent.0 >= EARLY.1 && is_new {
                    self.points.push(point(at, (seen.stale.0 as f64 / sent).min(1.0) * used));
                }
                !self.points.is_empty() && at >= EARLY.0.max(first_round * SHARE)
            }
        };
        if !tells || rate <= 0.0 {
            return;
        }
        let packed = (seen.sent.0 as f64 / sent).clamp(PACKED.0, PACKED.1);
        let range = Range { low: rate * RATE.0, mid: rate, high: rate * RATE.1 };
        let (base, round_trip) = (base.clone(), seen.round_trip.as_secs_f64());
        let written = std::mem::take(&mut self.points);
        let observed = Observed { ram: total, used, written, processors: base.processors };
        self.playing = Some(tokio::task::spawn_blocking(move || {
            let mut raw = base.foresee(observed, range, round_trip);
            let bytes = &mut raw.forecast.bytes;
            *bytes = Range { low: bytes.low * packed, mid: bytes.mid * packed, high: bytes.high * packed };
            raw
        }));
    }

    /// What was predicted, if there was a moment for it.
    pub(super) async fn at_start(&mut self) -> Option<Raw> {
        // Nothing waits for a prediction that failed.
        self.playing.take()?.await.ok()
    }
}
