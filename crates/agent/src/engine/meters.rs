//! What is to be told of QEMU's migration from its counters, as QEMU or libvirt has them: its rounds, how fast it sends, and
//! what a policy decides on.

use std::time::{Duration, Instant};

use vmferry_policy::{Bytes, BytesPerSec, Costs, Limits, Means, Observation, Percent, Phase, Scan};
use vmferry_qemu::qmp::commands::RamInfo;

/// Weight of the newest sample in the link rate, at ten samples a second.
const RATE_WEIGHT: f64 = 0.3;

/// Makes what a policy sees of one migration out of QEMU's counters.
pub(crate) struct Meters {
    rate: RateMeter,
    rounds: Rounds,
    /// The highest rate at which the guest wrote, in bytes a second.
    dirty_rate: u64,
    costs: Costs,
}

/// How one migration by QEMU stands, besides its counters.
pub(crate) struct Standing {
    /// The copy of the RAM began.
    pub(crate) started: Instant,
    pub(crate) phase: Phase,
    /// By which QEMU slows the guest down, in percent, where it tells.
    pub(crate) throttle: Option<u64>,
    pub(crate) means: Means,
    pub(crate) limits: Limits,
}

impl Meters {
    /// Of a migration whose switches cost so much.
    pub(crate) fn new(costs: Costs) -> Self {
        Self { rate: RateMeter::default(), rounds: Rounds::begin(), dirty_rate: 0, costs }
    }

    /// The copy of the RAM begins.
    pub(crate) fn begin(&mut self) {
        self.rounds = Rounds::begin();
    }

    /// The counters have changed: a round may have begun.
    pub(crate) fn count(&mut self, ram: &RamInfo) {
        self.rounds.update(ram);
    }

    /// What is to be decided on, when the counters say this at this moment.
    pub(crate) fn observe(&mut self, ram: &RamInfo, now: &Standing, at: Instant) -> Observation {
        let dirty_rate = ram.dirty_pages_rate * ram.page_size.unwrap_or(4096);
        self.dirty_rate = self.dirty_rate.max(dirty_rate);
        Observation {
            elapsed: at.duration_since(now.started),
            phase: now.phase,
            round: self.rounds.begun,
            remaining: Bytes(ram.remaining),
            total: Bytes(ram.total),
            scan: self.rounds.scan,
            stale: Bytes(0),
            sent: Bytes(ram.transferred),
            dirty_rate: BytesPerSec(dirty_rate),
            link_rate: BytesPerSec(self.rate.update(ram, at)),
            round_trip: Duration::ZERO,
            throttle: Percent(now.throttle.unwrap_or(0).min(100) as u8),
            means: now.means,
            costs: self.costs,
            limits: now.limits,
        }
    }

    /// So many rounds have begun.
    pub(crate) fn rounds(&self) -> u32 {
        self.rounds.begun
    }

    /// The highest rate at which the guest was seen to write, in bytes a second.
    pub(crate) fn dirty_rate(&self) -> u64 {
        self.dirty_rate
    }
}

/// The rounds of pre-copy.
///
/// QEMU tells how often it has collected what was written, which was once a round. But where it may go on by post-copy,
/// 11.1 does so ten times a second (seen with 11.1.3). There a round ends when as much was sent as there was to send when
/// it began.
struct Rounds {
    /// So many have begun.
    begun: u32,
    /// What began this round; none in the first one, which begins with all RAM.
    scan: Option<Scan>,
    scanned: Instant,
    /// What was left at the last look, and sent so far, in bytes.
    before: (u64, u64),
    /// It was seen that QEMU counts rounds.
    counted: bool,
    /// How many bytes of pages are sent when this round ends, where QEMU counts something else.
    ends_at: Option<u64>,
}

impl Rounds {
    /// The copy begins.
    fn begin() -> Self {
        Self { begun: 0, scan: None, scanned: Instant::now(), before: (0, 0), counted: false, ends_at: None }
    }

    /// What is seen now.
    fn update(&mut self, ram: &RamInfo) {
        let before = self.begun;
        self.count(ram);
        let new = self.begun.saturating_sub(before);
        if new > 0 && self.begun > 1 {
            let interval = self.scanned.elapsed() / new;
            // QEMU begins anew while some of the round before is left: that was written before.
            let (remaining, transferred) = self.before;
            let left_over = remaining.saturating_sub(ram.transferred.saturating_sub(transferred));
            let left_over = if self.begun > 2 { left_over } else { 0 };
            self.scan = Some(Scan { interval, left: Bytes(ram.remaining.saturating_sub(left_over)) });
        }
        if new > 0 {
            self.scanned = Instant::now();
        }
        self.before = (ram.remaining, ram.transferred);
    }

    fn count(&mut self, ram: &RamInfo) {
        let sent = (ram.normal + ram.duplicate) * ram.page_size.unwrap_or(4096);
        let count = ram.dirty_sync_count as u32;
        match self.ends_at {
            Some(end) if sent >= end => (self.begun, self.ends_at) = (self.begun + 1, Some(sent + ram.remaining)),
            Some(_) => {}
            // Its first round cannot be over.
            None if count > 1 && !self.counted && sent < ram.total / 2 => {
                (self.begun, self.ends_at) = (1, Some(ram.total));
            }
            None => (self.begun, self.counted) = (count, count > 1),
        }
    }
}

/// Bytes a second, smoothed over the last second or so.
///
/// Pages of zeroes cost next to nothing to send and something to find: while hardly anything else is found, what is sent
/// tells nothing of what the link carries. Where there is hardly anything to send, it tells at most that the link carries
/// more than was thought; and that only over a second, as QEMU sends what it may within each tenth of one all at once.
#[derive(Default)]
struct RateMeter {
    last: Option<(Counted, Instant)>,
    rate: Option<f64>,
    /// Since then there was hardly anything to send.
    idle: Option<(Counted, Instant)>,
}

/// What QEMU has sent: bytes, pages, and of them those of zeroes.
#[derive(Clone, Copy)]
struct Counted {
    bytes: u64,
    normal: u64,
    zero: u64,
}

/// So many pages of zeroes to one other, and it is not the link that holds QEMU up.
const ZEROES: u64 = 4;
/// Nor is it when there is no more to send than takes so many seconds.
const ENOUGH: f64 = 0.1;
/// So many seconds tell what is sent even then.
const IDLE: f64 = 1.0;

impl RateMeter {
    /// What is seen at this moment; the rate by now.
    fn update(&mut self, ram: &RamInfo, at: Instant) -> u64 {
        let now = Counted { bytes: ram.transferred, normal: ram.normal, zero: ram.duplicate };
        if let Some((before, then)) = self.last {
            let seconds = at.duration_since(then).as_secs_f64();
            // News can come within a tick: too short to tell a rate from.
            if seconds < 0.05 {
                return self.rate.unwrap_or(0.0) as u64;
            }
            let (normal, zero) = (now.normal.saturating_sub(before.normal), now.zero.saturating_sub(before.zero));
            let is_of_pages = zero <= normal.saturating_mul(ZEROES) || self.rate.is_none() && normal > 0;
            let sent = |from: Counted| now.bytes.saturating_sub(from.bytes) as f64;
            if self.rate.is_none_or(|rate| ram.remaining as f64 > rate * ENOUGH) {
                self.idle = None;
                if is_of_pages {
                    self.blend(sent(before) / seconds);
                }
            } else {
                let (from, since) = *self.idle.get_or_insert((before, then));
                let seconds = at.duration_since(since).as_secs_f64();
                if seconds >= IDLE {
                    self.idle = None;
                    let sample = sent(from) / seconds;
                    if self.rate.is_some_and(|rate| sample > rate) {
                        self.blend(sample);
                    }
                }
            }
        }
        self.last = Some((now, at));
        self.rate.unwrap_or(0.0) as u64
    }

    fn blend(&mut self, sample: f64) {
        self.rate = Some(self.rate.map_or(sample, |rate| rate + RATE_WEIGHT * (sample - rate)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(250);

    #[test]
    fn the_link_rate_follows_what_is_sent() {
        let mut meter = RateMeter::default();
        let begin = Instant::now();
        let mut rate = 0;
        for tick in 0..20 {
            rate = meter.update(&sent(tick * 10_000_000, 0), begin + TICK * tick as u32);
        }
        assert!(rate.abs_diff(40_000_000) < 10, "{rate}");
        // A stretch of zeroes, of which hardly anything is sent, does not make it slower.
        for tick in 20..40 {
            rate = meter.update(&sent(190_000_000 + tick * 1000, tick * 100_000), begin + TICK * tick as u32);
        }
        assert!(rate.abs_diff(40_000_000) < 10, "{rate}");
        // Nor does having nothing to send.
        for tick in 40..60 {
            let idle = RamInfo { remaining: 4096, ..sent(190_020_000 + tick, 4_000_000) };
            rate = meter.update(&idle, begin + TICK * tick as u32);
        }
        assert!(rate.abs_diff(40_000_000) < 10, "{rate}");
    }

    /// So many bytes, and pages of zeroes.
    fn sent(bytes: u64, zeroes: u64) -> RamInfo {
        RamInfo { transferred: bytes, normal: bytes >> 12, duplicate: zeroes, remaining: 1 << 30, ..RamInfo::default() }
    }

    /// What QEMU tells after so many pages of 1000 were sent, and so many looks.
    fn ram(pages: u64, looks: u64, remaining: u64) -> RamInfo {
        RamInfo {
            total: 1000 << 12,
            normal: pages,
            dirty_sync_count: looks,
            remaining: remaining << 12,
            ..RamInfo::default()
        }
    }

    #[test]
    fn rounds_are_those_that_qemu_counts() {
        let mut rounds = Rounds::begin();
        for (pages, looks) in [(10, 1), (900, 1), (1000, 2), (1010, 5)] {
            rounds.update(&ram(pages, looks, 100));
            assert_eq!(u64::from(rounds.begun), looks);
        }
    }

    #[test]
    fn where_qemu_counts_looks_a_round_ends_when_what_it_began_with_is_sent() {
        let mut rounds = Rounds::begin();
        for (pages, looks, round) in
            [(10, 2, 1), (400, 6, 1), (999, 12, 1), (1000, 13, 2), (1299, 20, 2), (1300, 21, 3)]
        {
            rounds.update(&ram(pages, looks, 300));
            assert_eq!(rounds.begun, round, "{pages} pages, {looks} looks");
        }
    }

    #[test]
    fn bursts_at_the_end_do_not_make_the_link_faster_than_it_is_and_a_faster_link_is_seen() {
        let mut meter = RateMeter::default();
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        for tick in 0..10 {
            meter.update(&sent(tick * 10_000_000, 0), at(tick * 250));
        }
        // Little is left, and QEMU sends its 4 MB of each tenth of a second at once: looked at just before and after that.
        let little = |bytes: u64| RamInfo { remaining: 1_000_000, ..sent(90_000_000 + bytes, 0) };
        let mut rate = 0;
        for tenth in 1..100 {
            meter.update(&little((tenth - 1) * 4_000_000), at(2250 + tenth * 100 - 30));
            rate = meter.update(&little(tenth * 4_000_000), at(2250 + tenth * 100 + 30));
        }
        assert!((39_000_000..44_000_000).contains(&rate), "{rate}");
        for tenth in 0..60 {
            rate = meter.update(&little(400_000_000 + tenth * 10_000_000), at(12_250 + tenth * 100));
        }
        assert!(rate > 80_000_000, "{rate}");
    }

    #[test]
    fn news_within_a_tick_do_not_spoil_the_rate() {
        let mut meter = RateMeter::default();
        let begin = Instant::now();
        meter.update(&sent(0, 0), begin);
        let rate = meter.update(&sent(10_000_000, 0), begin + TICK);
        assert_eq!(meter.update(&sent(10_000_000, 0), begin + TICK + Duration::from_millis(1)), rate);
    }
}
