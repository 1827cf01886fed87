//! What each way forward would do, from what is known now. Pure: before a migration as well as in it.
//!
//! A round of pre-copy that has `x` to send takes `x / b` on a link of rate `b` and leaves what the guest writes in that
//! time, which the [`DirtySet`] tells; so rounds are played forward one by one. With pacing at a share `s` a round
//! leaves no more than `s` of what it sends; with a throttle of `p` the guest has `1 - p` of the round's time to write
//! in. Each way is played three times, with what is likeliest and with the luckiest and unluckiest of link and guest:
//! that is the range.

use std::time::Duration;

use crate::harm::Felt;
use crate::units::time;
use crate::{Bytes, Costs, DirtySet, Limits, Means, Percent, Preference, Range};

const PAGE: f64 = 4096.0;
const GIB: f64 = 1_073_741_824.0;
/// A round takes so much longer than what it sends, in seconds: a look at all pages, at each GiB of it, and what it takes
/// to hear of it.
const ROUND: (f64, f64) = (0.01, 0.003);
/// In so short a time after a scan nothing is stale yet.
const JUST_SCANNED: f64 = 0.003;
/// QEMU's throttle has a processor run for so long, and then sleep for as long as makes up the share
/// (`CPU_THROTTLE_TIMESLICE_NS` in its `system/cpu-throttle.c`).
const TIMESLICE: f64 = 0.01;
/// Rounds are not played further than this.
const MOST_ROUNDS: u32 = 24;
/// How often it is halved between what a paced guest works at least and at most.
const HALVINGS: u32 = 10;
/// A processor that waits for its turn to write stands about as long as so many pages take on the link.
const WRITERS: f64 = 8.0;
/// What a guest waits more at worst where its writes begin to be paced than where it turns to post-copy: it took 0.8 to 1.8 s
/// longer to rewrite 64 MiB (docs/FIGURES.md).
const PACED_STALL: f64 = 1.0;

/// How a migration stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// Since the copy began, in seconds.
    pub elapsed: f64,
    /// What this round has still to send, in bytes.
    pub left: f64,
    /// Since the scan that began this round, in seconds.
    pub age: f64,
    /// The first round goes on.
    pub first: Option<First>,
    /// How long the rest of the round takes at its own pace, where that is known to be less than what is left says:
    /// pages of zeroes take hardly any time.
    pub rest_of_round: Option<f64>,
    /// What rounds leave.
    pub dirty: DirtySet,
    /// What the link carries, in bytes a second.
    pub link: Range,
    /// What switches cost.
    pub costs: Costs,
    /// How long it takes there and back, in seconds.
    pub round_trip: f64,
    /// What the engine can do.
    pub means: Means,
    /// The guest is paced to this share already; 0 when it is not.
    pub paced: f64,
    /// Its processors are slowed down by this share already.
    pub throttled: f64,
    /// The guest loses this share of its time by that now.
    pub slowed: f64,
}

/// How far the first round is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct First {
    /// Which share of it was sent.
    pub share: f64,
    /// What of that is stale again, in bytes.
    pub stale: f64,
}

/// A way forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// So many scans from here, the guest is paused and the rest is sent. 0: now.
    Rounds(u32),
    /// The guest's writes are held to this share of what the link carries until what is left fits the downtime.
    Pace(Percent),
    /// The same, from the next scan on.
    PaceAfter(Percent),
    /// Its processors are slowed down by this share until what is left fits the downtime.
    Throttle(Percent),
    /// It runs at the destination at once.
    PostCopy,
    /// It runs at the destination when this round is over.
    PostCopyAfter,
}

/// What a way would do, in seconds and bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// From the beginning of the copy to its end.
    pub total: Range,
    /// Nobody runs the guest.
    pub downtime: Range,
    /// The longest wait of the running guest.
    pub stall: Range,
    /// Work that the guest does not do while it runs.
    pub lost: Range,
    /// In post-copy.
    pub at_risk: Range,
    /// Sent from now on.
    pub bytes: Range,
    /// What is left when the guest is paused.
    pub left: Range,
    /// By which share the guest is slowed down meanwhile.
    pub slowed: f64,
    /// What the guest feels with good luck, the usual one and bad.
    pub felt: [Felt; 3],
}

/// What the guest and the link may turn out to be.
#[derive(Clone, Copy)]
enum Luck {
    Good,
    Usual,
    Bad,
}

impl Luck {
    fn of(self, range: Range) -> f64 {
        match self {
            Self::Good => range.low,
            Self::Usual => range.mid,
            Self::Bad => range.high,
        }
    }

    /// Of what is the better the more it is.
    fn rate(self, range: Range) -> f64 {
        let rate = match self {
            Self::Good => range.high,
            Self::Usual => range.mid,
            Self::Bad => range.low,
        };
        rate.max(1.0)
    }
}

/// One play of one way.
#[derive(Clone, Copy, Debug, Default)]
struct Play {
    felt: Felt,
    bytes: f64,
    left: f64,
    slowed: f64,
}

impl Outlook {
    /// What is missing at the destination now: what this round has not sent, and what is stale again.
    pub fn missing(&self) -> Range {
        let stale = match self.first {
            Some(first) => Range::exactly(first.stale),
            None if self.age < JUST_SCANNED => Range::exactly(0.0),
            None => self.dirty.after(self.age),
        };
        let most = |value: f64| (self.left + value).min(self.dirty.total().max(self.left));
        Range { low: most(stale.low), mid: most(stale.mid), high: most(stale.high) }
    }

    fn round_costs(&self) -> f64 {
        ROUND.0 + ROUND.1 * self.dirty.total() / GIB
    }

    /// How long the rest of this round takes.
    fn rest(&self, rate: f64) -> f64 {
        let by_rate = self.left / rate;
        self.rest_of_round.map_or(by_rate, |known| known.min(by_rate))
    }

    fn switch(&self, now: Play, after: f64, left: f64, rate: f64) -> Play {
        let downtime = left / rate + self.costs.switchover.as_secs_f64();
        let felt = Felt { downtime, total: self.elapsed + after + downtime, ..now.felt };
        Play { felt, bytes: now.bytes + left, left, ..now }
    }

    fn rounds(&self, scans: u32, luck: Luck) -> Play {
        let rate = luck.rate(self.link);
        let (mut after, mut left, mut bytes) = (0.0, luck.of(self.missing()), 0.0);
        for scan in 0..scans {
            let (sends, takes) = match scan {
                0 => (self.left, self.rest(rate)),
                _ => (left, left / rate),
            };
            let takes = takes + self.round_costs();
            bytes += sends;
            after += takes;
            left = if scan == 0 { self.leaves(takes, luck) } else { self.slowed_after(takes, luck) };
        }
        let slowed = Play { bytes, felt: Felt { lost: self.slowed * after, ..Felt::default() }, ..Play::default() };
        self.switch(slowed, after, left, rate)
    }

    /// What a round of this length leaves, as the guest is slowed down now.
    fn slowed_after(&self, interval: f64, luck: Luck) -> f64 {
        let wrote = luck.of(self.dirty.after(interval * (1.0 - self.throttled)));
        match self.paced {
            0.0 => wrote,
            share => wrote.min(share * interval * luck.rate(self.link)),
        }
    }

    /// What this round leaves that takes so much longer, as the guest is slowed down now.
    fn leaves(&self, takes: f64, luck: Luck) -> f64 {
        let Some(first) = self.first else { return self.slowed_after(self.age + takes, luck) };
        let adds = self.adds(first, takes * (1.0 - self.throttled), luck);
        let adds = if self.paced > 0.0 { adds.min(self.paced * takes * luck.rate(self.link)) } else { adds };
        (first.stale + adds).min(self.dirty.total())
    }

    /// What becomes stale in the rest of the first round while the guest works for so long. Each page is watched from when it
    /// was sent on: those that are, for up to its age and this; those that are not yet, for up to this.
    fn adds(&self, first: First, works: f64, luck: Luck) -> f64 {
        let sent = self.mean(works, self.age + works, luck) - self.mean(0.0, self.age, luck);
        (first.share * sent + (1.0 - first.share) * self.mean(0.0, works, luck)).max(0.0)
    }

    /// What rounds leave, in the mean over all lengths between these. Of what is concave most is at the beginning.
    fn mean(&self, from: f64, to: f64, luck: Luck) -> f64 {
        // Gauss and Legendre's four points, from 0 to 1.
        const POINTS: [(f64, f64); 4] =
            [(0.069_432, 0.173_927), (0.330_009, 0.326_073), (0.669_991, 0.326_073), (0.930_568, 0.173_927)];
        let at = |root: f64| luck.of(self.dirty.after(from + (to - from) * root * root));
        POINTS.iter().map(|(root, weight)| 2.0 * root * weight * at(*root)).sum()
    }

    /// For how long of this time a guest works that may make only so much stale.
    fn works(takes: f64, may: f64, stale: impl Fn(f64) -> f64) -> f64 {
        if stale(takes) <= may {
            return takes;
        }
        let (mut least, mut most) = (0.0, takes);
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(least, most);
            if stale(middle) <= may {
                least = middle;
            } else {
                most = middle;
            }
        }
        f64::midpoint(least, most)
    }

    /// Rounds until what is left fits into this time, with a guest that is slowed down, in this round (`now`) or from the
    /// next scan on: `leaves` tells what a round leaves, this one (the first of both) or a later one, and for how long of it
    /// the guest works.
    fn slowing(&self, fits: f64, luck: Luck, now: bool, leaves: impl Fn(bool, f64) -> (f64, f64)) -> Play {
        let rate = luck.rate(self.link);
        let (mut after, mut left, mut bytes, mut lost) = (0.0, self.left, 0.0, 0.0);
        for round in 0..MOST_ROUNDS {
            let takes = if round == 0 { self.rest(rate) } else { left / rate };
            bytes += left;
            after += takes + self.round_costs();
            let (next, works) = match round {
                0 if !now => (self.leaves(takes, luck), takes * (1.0 - self.slowed)),
                _ => leaves(round == 0, takes),
            };
            lost += takes - works;
            left = next;
            if left / rate <= fits {
                break;
            }
        }
        let slowed = if after > 0.0 { lost / after } else { 0.0 };
        let now = Play { felt: Felt { lost, ..Felt::default() }, bytes, slowed, ..Play::default() };
        self.switch(now, after, left, rate)
    }

    fn pace(&self, share: f64, now: bool, fits: f64, luck: Luck) -> Play {
        let rate = luck.rate(self.link);
        let mut play = self.slowing(fits, luck, now, |is_this, takes| {
            let may = share * rate * takes;
            let new = |works: f64| match self.first {
                Some(first) if is_this => self.adds(first, works, luck),
                _ => luck.of(self.dirty.after(works)),
            };
            let works = Self::works(takes, may, new);
            // What is stale already is so.
            let stale = if is_this { luck.of(self.missing()) - self.left } else { 0.0 };
            (stale + new(works).min(may), works)
        });
        let begins = if self.paced > 0.0 { 0.0 } else { PACED_STALL };
        play.felt.stall = begins.max(WRITERS * PAGE / (share * rate).max(1.0));
        play
    }

    fn throttle(&self, share: f64, fits: f64, luck: Luck) -> Play {
        // It takes effect at a scan.
        let mut play = self.slowing(fits, luck, false, |_, takes| {
            let works = takes * (1.0 - share);
            (luck.of(self.dirty.after(works)), works)
        });
        play.felt.stall = TIMESLICE * share / (1.0 - share).max(0.01);
        play
    }

    fn post_copy(&self, missing: f64, after: f64, bytes: f64, luck: Luck) -> Play {
        let rate = luck.rate(self.link);
        let takes = missing / rate + self.round_trip;
        let fault = self.costs.fault.as_secs_f64().max(self.round_trip);
        // The guest touches missing pages as fast as it writes, at first nothing but those, and ever fewer of them.
        let wants = self.dirty.rate() / PAGE * fault;
        let speed = if wants < 1e-6 { 1.0 } else { wants.ln_1p() / wants };
        let downtime = self.costs.post_copy.as_secs_f64();
        let felt = Felt {
            total: self.elapsed + after + downtime + takes,
            downtime,
            stall: fault * 4.0,
            lost: takes * (1.0 - speed) + self.slowed * after,
            at_risk: takes,
        };
        Play { felt, bytes: bytes + missing, left: missing, slowed: 1.0 - speed }
    }

    fn play(&self, way: Way, limits: &Limits, luck: Luck) -> Play {
        let fits = limits.for_pages(&self.costs).as_secs_f64() * FITS;
        match way {
            Way::Rounds(scans) => self.rounds(scans, luck),
            Way::Pace(share) => self.pace(share.share().max(0.01), true, fits, luck),
            Way::PaceAfter(share) => self.pace(share.share().max(0.01), false, fits, luck),
            Way::Throttle(share) => self.throttle(share.share().min(0.99), fits, luck),
            Way::PostCopy => self.post_copy(luck.of(self.missing()), 0.0, 0.0, luck),
            Way::PostCopyAfter => {
                let takes = self.rest(luck.rate(self.link));
                self.post_copy(self.leaves(takes, luck), takes, self.left, luck)
            }
        }
    }
}

/// Of the time that is allowed, pages that are left should take no more than this share: the rate may be less by then.
const FITS: f64 = 0.8;

/// What this way would do.
pub fn predict(outlook: &Outlook, way: Way, limits: &Limits) -> Prediction {
    let [good, usual, bad] = [Luck::Good, Luck::Usual, Luck::Bad].map(|luck| outlook.play(way, limits, luck));
    // More of one thing can be less of another: the range is of each.
    let range = |of: fn(&Play) -> f64| {
        let [a, mid, b] = [&good, &usual, &bad].map(of);
        Range { low: a.min(mid).min(b), mid, high: a.max(mid).max(b) }
    };
    Prediction {
        total: range(|it| it.felt.total),
        downtime: range(|it| it.felt.downtime),
        stall: range(|it| it.felt.stall),
        lost: range(|it| it.felt.lost),
        at_risk: range(|it| it.felt.at_risk),
        bytes: range(|it| it.bytes),
        left: range(|it| it.left),
        slowed: usual.slowed,
        felt: [good.felt, usual.felt, bad.felt],
    }
}

impl Prediction {
    /// What is likeliest.
    pub fn likeliest(&self) -> Felt {
        self.each(|range| range.mid)
    }

    /// What may come of it with bad luck.
    pub fn at_worst(&self) -> Felt {
        self.each(|range| range.high)
    }

    /// What may come of it with good luck.
    pub fn at_best(&self) -> Felt {
        self.each(|range| range.low)
    }

    fn each(&self, of: fn(Range) -> f64) -> Felt {
        Felt {
            total: of(self.total),
            downtime: of(self.downtime),
            stall: of(self.stall),
            lost: of(self.lost),
            at_risk: of(self.at_risk),
        }
    }

    /// What it harms with good luck, the usual one and bad.
    pub fn harms(&self, prefer: Preference) -> [f64; 3] {
        self.felt.map(|felt| felt.harm(prefer))
    }

    /// For how long the guest may be paused for it.
    pub fn pause(&self) -> Duration {
        crate::units::seconds(self.downtime.mid)
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rounds(0) => write!(f, "switch over now"),
            Self::Rounds(1) => write!(f, "switch over after this round"),
            Self::Rounds(rounds) => write!(f, "switch over after {rounds} rounds"),
            Self::Pace(share) => write!(f, "hold its writes to {} % of the link", share.0),
            Self::PaceAfter(share) => write!(f, "from the next round on, hold its writes to {} % of the link", share.0),
            Self::Throttle(share) => write!(f, "slow it by {} %", share.0),
            Self::PostCopy => write!(f, "post-copy now"),
            Self::PostCopyAfter => write!(f, "post-copy after this round"),
        }
    }
}

impl std::fmt::Display for Prediction {
    /// In one line, with ranges for what matters most.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |range: Range| match range.high - range.low < range.mid * 0.1 {
            true => time(range.mid),
            false => format!("{} ({} to {})", time(range.mid), time(range.low), time(range.high)),
        };
        write!(f, "downtime {}, total {}", of(self.downtime), of(self.total))?;
        if self.lost.mid > 0.01 {
            write!(f, ", {} of work lost", time(self.lost.mid))?;
        }
        if self.at_risk.mid > 0.0 {
            write!(f, ", {} at risk", time(self.at_risk.mid))?;
        }
        write!(f, ", {} to send", Bytes(self.bytes.mid as u64))
    }
}
