//! A guest as it was seen to write: from how much of its memory was written within how long, to parts that would have been
//! written like that.
//!
//! What was seen is a curve, `W(t)`: how many bytes of pages were written, each counted once, within `t` of when writes
//! began to be noted. A part of `n` bytes that is written anywhere adds `n (1 - e^(-t/c))` to it, where `c` is how long it
//! takes to write as much as it has; one that is written page after page adds `n min(t/c, 1)`. So the curve is taken for a sum
//! of some of these, none of them negative, with times `c` in a row of which each is half as long again as the one before. Step by
//! step the one part is changed that brings the sum nearest (matching pursuit: S. Mallat, Z. Zhang, 1993), by errors that
//! are relative, since what short rounds leave decides the downtime.
//!
//! Where pages are noted from when they are sent, in a first round, a page was watched for anything from nothing to `t`: then
//! what was seen is the mean of the curve up to there.
//!
//! Nobody has seen what comes after the last moment. There the luck is ([`Luck`]): that the guest has been everywhere where it
//! writes, that it goes on as the sum does, or that it goes on as fast as at the end until it has been everywhere.

use crate::{Guest, Part};

/// From when writes were noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// Everywhere at the same moment.
    Beginning,
    /// Of each page from when it was sent, one after another.
    Sent,
}

/// What the guest turns out to be where nobody has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Luck {
    /// It has been everywhere where it writes.
    Good,
    /// The likeliest.
    Usual,
    /// It goes on as fast as it was, until it has been everywhere.
    Bad,
}

/// So much was written within so long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// Seconds.
    pub after: f64,
    /// Bytes of pages, each counted once.
    pub bytes: f64,
    /// From when that was noted.
    pub since: Since,
}

/// What was seen of a guest; see the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Its RAM, in bytes.
    pub ram: f64,
    /// What of that is more than zeroes, in bytes.
    pub used: f64,
    /// How much was written within how long, in any order. Nothing is known where it is empty.
    pub written: Vec<Written>,
    /// Its processors.
    pub processors: f64,
}

/// Between two times of parts.
const STEP: f64 = 1.5;
/// How often a part is changed, at most.
const CHANGES: usize = 400;
/// The most parts that are kept; a guest may have no more than 16, with those that do not come from here.
const MOST: usize = 12;
/// Errors smaller than this share of the most that was seen, and than so many bytes, do not count.
const BLUR: (f64, f64) = (0.01, 65_536.0);
/// A part that takes longer than this share of the time in which it was watched has not been seen to its end.
const SEEN: f64 = 0.5;
/// With fewer points than this nothing is known of the curve's shape.
const SHAPE: usize = 3;
/// Of a guest of which nothing is known the worst: it writes so much, in bytes a second.
const UNKNOWN: f64 = 4e9;

/// How a part is written, and how long it takes to write as much as it has.
#[derive(Clone, Copy)]
struct Kind {
    takes: f64,
    sweeps: bool,
}

impl Kind {
    /// Which share of it is written after so long.
    fn share(self, after: f64, since: Since) -> f64 {
        let turns = after / self.takes;
        match (since, self.sweeps) {
            (Since::Beginning, true) => turns.min(1.0),
            (Since::Beginning, false) => -(-turns).exp_m1(),
            (Since::Sent, true) if turns <= 1.0 => turns / 2.0,
            (Since::Sent, true) => 1.0 - 0.5 / turns,
            (Since::Sent, false) => 1.0 + (-turns).exp_m1() / turns,
        }
    }
}

impl Observed {
    /// A guest that writes as this one was seen to.
    pub fn guest(&self, luck: Luck) -> Guest {
        let mut parts = self.parts(luck);
        let used = self.used.clamp(0.0, self.ram);
        // None is larger than what there is: those that are written fastest come first.
        parts.sort_by(|a, b| (b.rate / b.bytes).total_cmp(&(a.rate / a.bytes)));
        let mut left = used;
        for part in &mut parts {
            part.bytes = part.bytes.min(left);
            left -= part.bytes;
        }
        parts.retain(|part| part.bytes > 0.0);
        parts.push(Part { bytes: left, rate: 0.0, sweeps: false, zero: false });
        let processors = self.processors.max(1.0);
        Guest { name: "observed".into(), parts, zero: self.ram - used, phases: Vec::new(), processors }
    }

    fn parts(&self, luck: Luck) -> Vec<Part> {
        let part = |bytes: f64, takes: f64, sweeps| Part { bytes, rate: bytes / takes, sweeps, zero: false };
        let is_sound = |it: &Written| it.after > 0.0 && it.after.is_finite() && it.bytes >= 0.0;
        let mut points: Vec<Written> = self.written.iter().copied().filter(is_sound).collect();
        points.sort_by(|a, b| a.after.total_cmp(&b.after));
        let Some(&last) = points.last() else {
            return match luck {
                Luck::Bad => vec![Part { bytes: self.used, rate: UNKNOWN, sweeps: true, zero: false }],
                _ => Vec::new(),
            };
        };
        let end = last.after;
        if points.iter().all(|it| it.bytes <= 0.0) {
            return Vec::new();
        }
        let found = match points.len() {
            ..SHAPE => alone(last, luck),
            _ => fit(&points),
        };
        let (mut parts, mut goes_on) = (Vec::new(), 0.0);
        for (kind, bytes) in found {
            let is_seen = kind.takes <= end * SEEN;
            match luck {
                Luck::Good if !is_seen => {
                    // All that there is of it was seen.
                    let share = kind.share(end, Since::Beginning);
                    parts.push(part(bytes * share, kind.takes * share, true));
                }
                Luck::Bad if !is_seen => goes_on += bytes / kind.takes,
                _ => parts.push(part(bytes, kind.takes, kind.sweeps)),
            }
        }
        if goes_on > 0.0 {
            parts.push(Part { bytes: self.used, rate: goes_on, sweeps: true, zero: false });
        }
        parts
    }
}

/// Of one measurement: what is hot and small, or a sweep, or something between.
fn alone(Written { after: end, bytes, since }: Written, luck: Luck) -> Vec<(Kind, f64)> {
    let kind = match luck {
        Luck::Good => Kind { takes: end / 8.0, sweeps: false },
        Luck::Usual => Kind { takes: end * SEEN, sweeps: false },
        Luck::Bad => Kind { takes: end, sweeps: true },
    };
    vec![(kind, bytes / kind.share(end, since))]
}

/// See the module's text.
fn fit(points: &[Written]) -> Vec<(Kind, f64)> {
    let (first, end) = (points[0].after, points[points.len() - 1].after);
    let most = points.iter().map(|it| it.bytes).fold(0.0, f64::max);
    let times = std::iter::successors(Some(first / 2.0), |takes| Some(takes * STEP)).take_while(|it| *it <= end * 8.0);
    let kinds: Vec<Kind> = times.flat_map(|takes| [true, false].map(|sweeps| Kind { takes, sweeps })).collect();
    let weights: Vec<f64> = points.iter().map(|it| (it.bytes + most * BLUR.0 + BLUR.1).powi(-2)).collect();
    let shares: Vec<Vec<f64>> =
        kinds.iter().map(|kind| points.iter().map(|it| kind.share(it.after, it.since)).collect()).collect();
    let mut bytes = vec![0.0; kinds.len()];
    let mut missing: Vec<f64> = points.iter().map(|it| it.bytes).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).zip(&weights).map(|((a, b), weight)| a * b * weight).sum::<f64>();
    let norms: Vec<f64> = shares.iter().map(|share| dot(share, share)).collect();
    for _ in 0..CHANGES {
        // How much nearer each would bring it, and by which change.
        let changes = (0..kinds.len()).filter(|at| norms[*at] > 0.0).map(|at| {
            let toward = dot(&shares[at], &missing);
            let change = (toward / norms[at]).max(-bytes[at]);
            (change * (2.0 * toward - change * norms[at]), at, change)
        });
        let Some((nearer, at, change)) = changes.max_by(|a, b| a.0.total_cmp(&b.0)) else { break };
        if nearer < 1e-9 {
            break;
        }
        bytes[at] += change;
        for (missing, share) in missing.iter_mut().zip(&shares[at]) {
            *missing -= change * share;
        }
    }
    let mut found: Vec<(Kind, f64)> = kinds.into_iter().zip(bytes).filter(|(_, bytes)| *bytes >= 1.0).collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found.truncate(MOST);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GIB, MIB};

    /// What is seen within three seconds of a guest with this curve.
    fn seen(curve: impl Fn(f64) -> f64) -> Observed {
        let times = (1..=12).map(|step| f64::from(step * step) / 144.0 * 3.0);
        let since = Since::Beginning;
        let written = times.map(|after| Written { after, bytes: curve(after), since }).collect();
        Observed { ram: 4.0 * GIB, used: 2.0 * GIB, written, processors: 1.0 }
    }

    /// What a guest has written after so long.
    fn after(guest: &Guest, at: f64) -> f64 {
        let share = |part: &Part| match part.rate {
            0.0 => 0.0,
            rate => Kind { takes: part.bytes / rate, sweeps: part.sweeps }.share(at, Since::Beginning),
        };
        guest.parts.iter().map(|part| part.bytes * share(part)).sum()
    }

    #[test]
    fn a_guest_writes_as_it_was_seen_to_whatever_its_kind() {
        let random = |t: f64| 200.0 * MIB * (1.0 - (-t / 0.8).exp());
        let sweep = |t: f64| (150.0 * MIB * t).min(210.0 * MIB);
        let hot_cold = |t: f64| 12.0 * MIB * (1.0 - (-t / 0.02).exp()) + 9.0 * MIB * t;
        let curves: [&dyn Fn(f64) -> f64; 3] = [&random, &sweep, &hot_cold];
        for (which, curve) in curves.into_iter().enumerate() {
            let observed = seen(curve);
            for luck in [Luck::Good, Luck::Usual, Luck::Bad] {
                let guest = observed.guest(luck);
                for at in [0.05, 0.3, 1.0, 2.0, 2.9] {
                    let (is, was) = (after(&guest, at), curve(at));
                    assert!((is / was - 1.0).abs() < 0.2, "{which}, {luck:?}, {at}: {is} and not {was}");
                }
            }
        }
    }

    #[test]
    fn what_nobody_has_seen_is_between_nothing_more_and_as_fast_as_ever() {
        let observed = seen(|t| 40.0 * MIB * t);
        let [good, usual, bad] = [Luck::Good, Luck::Usual, Luck::Bad].map(|luck| after(&observed.guest(luck), 30.0));
        assert!((good / (120.0 * MIB) - 1.0).abs() < 0.1, "{good}");
        assert!((bad / (1200.0 * MIB) - 1.0).abs() < 0.1, "{bad}");
        assert!(good < usual && usual <= bad, "{good} {usual} {bad}");
        let flat = seen(|_| 50.0 * MIB);
        for luck in [Luck::Good, Luck::Bad] {
            assert!((after(&flat.guest(luck), 30.0) / (50.0 * MIB) - 1.0).abs() < 0.05, "all of it was seen");
        }
    }

    #[test]
    fn pages_that_were_watched_from_when_they_were_sent_tell_the_same_guest() {
        let truth = |t: f64| 100.0 * MIB * (1.0 - (-t / 0.5_f64).exp());
        let mean = |t: f64| (0..1000).map(|step| truth(t * (f64::from(step) + 0.5) / 1000.0)).sum::<f64>() / 1000.0;
        let mut observed = seen(mean);
        observed.written.iter_mut().for_each(|it| it.since = Since::Sent);
        let guest = observed.guest(Luck::Usual);
        for at in [0.1, 0.5, 2.0] {
            assert!((after(&guest, at) / truth(at) - 1.0).abs() < 0.2, "{at}: {} {}", after(&guest, at), truth(at));
        }
    }

    #[test]
    fn no_guest_has_more_memory_than_it_uses_whatever_was_said_of_it() {
        let wild = [
            vec![],
            vec![(0.0, 0.0)],
            vec![(3.0, 0.0)],
            vec![(3.0, 1e12)],
            vec![(f64::NAN, 1.0), (1.0, f64::NAN)],
            vec![(1.0, 5e9), (2.0, 1.0), (3.0, 1e10)],
        ];
        for written in wild {
            for since in [Since::Beginning, Since::Sent] {
                for luck in [Luck::Good, Luck::Usual, Luck::Bad] {
                    let points = written.iter().map(|&(after, bytes)| Written { after, bytes, since });
                    let observed = Observed { written: points.collect(), ..seen(|_| 0.0) };
                    let guest = observed.guest(luck);
                    assert!((guest.ram() - 4.0 * GIB).abs() < 1.0, "{written:?}: {guest:?}");
                    assert!(guest.parts.len() <= 16);
                    assert!(guest.parts.iter().all(|part| part.bytes >= 0.0 && part.rate.is_finite()), "{guest:?}");
                }
            }
        }
    }
}
