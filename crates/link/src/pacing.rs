//! When bulk data may go: no faster than the user's cap, nor than the [`steering`](crate::steering) says. Pure: the time
//! is an argument.

use std::time::Duration;

/// A bucket holds what may be sent in this time, so that a late wake-up loses nothing.
const DEPTH: Duration = Duration::from_millis(4);
/// Bytes a second: at less, the pauses would look like the silence of a dead peer.
const LEAST_RATE: f64 = 256.0 * 1024.0;
/// What was overdrawn before the rate changed is forgiven beyond this time's worth.
const LONGEST_DEBT: Duration = Duration::from_millis(100);

/// A token bucket that all bulk streams of a link share. Whoever writes takes what it needs at once and waits for as
/// long as the bucket is overdrawn by then: so each has its turn, and nobody wakes up in vain.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes a second; `None` is as fast as it goes.
    rate: Option<f64>,
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    pub(crate) fn new(rate: Option<f64>) -> Self {
        Self { rate: rate.map(|rate| rate.max(LEAST_RATE)), tokens: 0.0, filled: Duration::ZERO }
    }

    pub(crate) fn set_rate(&mut self, now: Duration, rate: Option<f64>) {
        let rate = rate.map(|rate| rate.max(LEAST_RATE));
        self.fill(now);
        if self.rate.is_none() {
            self.tokens = 0.0;
        }
        // What was overdrawn at a high rate must not stop a low one for long.
        if let Some(rate) = rate {
            self.tokens = self.tokens.max(-rate * LONGEST_DEBT.as_secs_f64());
        }
        self.rate = rate;
    }

    /// How much may be written at once: half a millisecond's worth, so that streams share and nothing waits long.
    pub(crate) fn quantum(&self) -> usize {
        const LEAST: f64 = 16.0 * 1024.0;
        const MOST: f64 = 256.0 * 1024.0;
        self.rate.map_or(usize::MAX, |rate| (rate * 0.0005).clamp(LEAST, MOST) as usize)
    }

    /// Takes so many bytes; gives back how long to wait before they are written.
    pub(crate) fn take(&mut self, now: Duration, bytes: usize) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        self.fill(now);
        let overdrawn = (-self.tokens).max(0.0);
        self.tokens -= bytes as f64;
        Duration::from_secs_f64(overdrawn / rate)
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        if let Some(rate) = self.rate {
            self.tokens = (self.tokens + passed * rate).min(rate * DEPTH.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes as fast as the bucket allows; gives back the bytes.
    fn run(bucket: &mut Bucket, from: Duration, length: Duration, write: usize) -> usize {
        let (mut now, mut sent) = (from, 0);
        while now < from + length {
            now += bucket.take(now, write);
            sent += write;
        }
        sent
    }

    fn close_to(sent: usize, expected: usize) -> bool {
        sent.abs_diff(expected) < expected / 50 + (256 << 10)
    }

    #[test]
    fn the_rate_is_kept_whatever_the_size_of_writes() {
        for write in [100, 16 << 10, 256 << 10] {
            let mut bucket = Bucket::new(Some(100e6));
            let sent = run(&mut bucket, Duration::ZERO, Duration::from_secs(2), write);
            assert!(close_to(sent, 200_000_000), "{sent}");
        }
    }

    #[test]
    fn an_idle_time_saves_up_no_burst() {
        let mut bucket = Bucket::new(Some(100e6));
        run(&mut bucket, Duration::ZERO, Duration::from_millis(100), 10_000);
        let sent = run(&mut bucket, Duration::from_secs(60), Duration::from_millis(100), 10_000);
        assert!(close_to(sent, 10_000_000), "{sent}");
    }

    #[test]
    fn a_rate_that_changes_is_kept_from_then_on() {
        let mut bucket = Bucket::new(None);
        assert_eq!(bucket.take(Duration::ZERO, 1 << 30), Duration::ZERO);
        let mut from = Duration::ZERO;
        for rate in [Some(10e6), Some(200e6), Some(10e6)] {
            bucket.set_rate(from, rate);
            let sent = run(&mut bucket, from, Duration::from_secs(1), 64 << 10);
            assert!(close_to(sent, rate.unwrap() as usize), "{rate:?}: {sent}");
            from += Duration::from_secs(1);
        }
        bucket.set_rate(from, None);
        assert_eq!(bucket.take(from, 1 << 30), Duration::ZERO);
    }
}
