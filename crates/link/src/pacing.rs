//! When bulk data may go: no faster than the cap, and not so fast that a queue builds up on the way in which urgent
//! frames would wait. Pure: the time is an argument.

use std::time::Duration;

/// A bucket holds what may be sent in this time, so that a late wake-up loses nothing.
const DEPTH: Duration = Duration::from_millis(4);
/// What was overdrawn before the rate changed is forgiven beyond this time's worth.
const LONGEST_DEBT: Duration = Duration::from_millis(100);

/// A token bucket that all bulk streams of a link share. It may be overdrawn by one write; the next one waits longer.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes a second; `None` is as fast as it goes.
    rate: Option<f64>,
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    pub(crate) fn new(rate: Option<f64>) -> Self {
        Self { rate, tokens: 0.0, filled: Duration::ZERO }
    }

    pub(crate) fn set_rate(&mut self, now: Duration, rate: Option<f64>) {
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

    /// How long the next write must wait; `None` when it may go now.
    pub(crate) fn wait(&mut self, now: Duration) -> Option<Duration> {
        let rate = self.rate?;
        self.fill(now);
        (self.tokens <= 0.0).then(|| Duration::from_secs_f64(((1.0 - self.tokens) / rate.max(1.0)).min(0.1)))
    }

    /// So many bytes are written.
    pub(crate) fn spend(&mut self, bytes: usize) {
        if self.rate.is_some() {
            self.tokens -= bytes as f64;
        }
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
            if let Some(wait) = bucket.wait(now) {
                now += wait;
            } else {
                bucket.spend(write);
                sent += write;
            }
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
        assert_eq!(bucket.wait(Duration::ZERO), None);
        let mut from = Duration::ZERO;
        for rate in [Some(10e6), Some(200e6), Some(10e6)] {
            bucket.set_rate(from, rate);
            let sent = run(&mut bucket, from, Duration::from_secs(1), 64 << 10);
            assert!(close_to(sent, rate.unwrap() as usize), "{rate:?}: {sent}");
            from += Duration::from_secs(1);
        }
        bucket.set_rate(from, None);
        assert_eq!(bucket.wait(from), None);
    }
}
