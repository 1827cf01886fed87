//! How fast bulk may go so that no queue builds up on the way in which urgent frames would wait.
//!
//! The idea is that of LEDBAT (RFC 6817): a round trip that takes longer than the shortest one seen lately waits in a
//! queue, and whoever fills the queue can see that and slow down before anything is lost. The round trips are those of
//! pings on the urgent stream, the least of several, so that a busy processor is not taken for a full queue. LEDBAT
//! steers a window; all bulk streams of a link share a rate here, which is set around what went through lately: a bit
//! less while the queue is longer than wanted, a bit more while it is shorter. The queue is the sum over time of what is
//! too much, so that this settles without swinging.
//!
//! LEDBAT gives way to everybody, and a migration must not. A queue that stays although this link has slowed down is
//! not its own: then it stops caring for a while, and the streams' own congestion control has its way.

use std::time::Duration;

/// A decision each so often.
const INTERVAL: Duration = Duration::from_millis(24);
/// The queue that is wanted, besides a quarter of the round trip and the time that [`UNIT`] takes on the wire.
const WANTED: f64 = 0.001;
/// Bytes that are in the way at any speed.
const UNIT: f64 = 48.0 * 1024.0;
/// How far the rate goes from what went through.
const GAIN: f64 = 0.05;
/// A queue that is longer than the wanted one by so many times is emptied no faster.
const DEEP: f64 = 3.0;
/// How fast the rate grows while there is hardly a queue, each interval.
const GROWTH: f64 = 1.04;
/// A rate that is so much more than what goes through holds nothing up.
const LOOSE: f64 = 1.5;
/// So long a queue may stay before it is somebody else's.
const OWN: Duration = Duration::from_secs(1);
/// So long it does not matter then.
const CARELESS: Duration = Duration::from_secs(10);
/// The shortest round trip is taken over this time and the same before it.
const MEMORY: Duration = Duration::from_secs(20);

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Steering {
    /// The shortest round trips of this time and the one before it, in seconds.
    shortest: [f64; 2],
    remembered_since: Duration,
    /// The shortest one of this interval.
    least: f64,
    written: f64,
    interval_since: Duration,
    /// What goes through, in bytes a second.
    through: f64,
    rate: Option<f64>,
    /// How long the queue has been too long without a break.
    queued_since: Option<Duration>,
    careless_until: Duration,
}

impl Steering {
    pub(crate) fn new() -> Self {
        Self {
            shortest: [f64::INFINITY; 2],
            remembered_since: Duration::ZERO,
            least: f64::INFINITY,
            written: 0.0,
            interval_since: Duration::ZERO,
            through: 0.0,
            rate: None,
            queued_since: None,
            careless_until: Duration::ZERO,
        }
    }

    /// So many bytes of bulk were written.
    pub(crate) fn on_written(&mut self, bytes: usize) {
        self.written += bytes as f64;
    }

    /// A ping came back. Gives the rate to keep from now on.
    pub(crate) fn on_round_trip(&mut self, now: Duration, took: Duration) -> Option<f64> {
        let took = took.as_secs_f64();
        if now >= self.remembered_since + MEMORY {
            self.shortest = [f64::INFINITY, self.shortest[0]];
            self.remembered_since = now;
        }
        self.shortest[0] = self.shortest[0].min(took);
        self.least = self.least.min(took);
        let passed = now.saturating_sub(self.interval_since);
        if passed >= INTERVAL {
            // After a pause, what was written says nothing about what goes through.
            if passed < 4 * INTERVAL {
                let through = self.written / passed.as_secs_f64();
                // More is proof that more fits; less may only mean that the user had less to send.
                let new = if through > self.through { 0.7 } else { 0.3 };
                self.through += new * (through - self.through);
                self.decide(now);
            } else {
                (self.through, self.rate, self.queued_since) = (0.0, None, None);
            }
            (self.interval_since, self.least, self.written) = (now, f64::INFINITY, 0.0);
        }
        self.rate
    }

    fn decide(&mut self, now: Duration) {
        let base = self.shortest[0].min(self.shortest[1]);
        let queue = self.least - base;
        let wanted = WANTED + base / 4.0 + UNIT / self.through.max(1.0);
        if now < self.careless_until {
            return;
        }
        if queue <= wanted {
            self.queued_since = None;
        } else if now >= *self.queued_since.get_or_insert(now) + OWN {
            (self.rate, self.queued_since) = (None, None);
            self.careless_until = now + CARELESS;
            return;
        }
        let room = (1.0 - queue / wanted).clamp(-DEEP, 1.0);
        let around = self.through * (1.0 + GAIN * room);
        self.rate = match self.rate {
            None if queue > wanted => Some(around),
            None => None,
            Some(rate) if room > 0.5 => Some(around.max(rate * GROWTH)).filter(|rate| *rate < LOOSE * self.through),
            Some(_) => Some(around),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wire with a queue before it, and streams that fill it as far as they are let.
    struct Wire {
        capacity: f64,
        /// Seconds that it takes without a queue.
        base: f64,
        /// Bytes in the queue, and how many the streams' own congestion control leaves there.
        queue: f64,
        deepest: f64,
        /// A queue that somebody else keeps full, in seconds.
        foreign: f64,
        /// What the user sends at most.
        demand: f64,
        now: f64,
        steering: Steering,
        rate: Option<f64>,
    }

    impl Wire {
        fn new(capacity: f64) -> Self {
            Self {
                capacity,
                base: 0.0003,
                queue: 0.0,
                deepest: capacity * 0.006,
                foreign: 0.0,
                demand: f64::INFINITY,
                now: 0.0,
                steering: Steering::new(),
                rate: None,
            }
        }

        /// Runs for this long; gives back what went through a second, and the longest wait in the queue.
        fn run(&mut self, seconds: f64) -> (f64, f64) {
            const STEP: f64 = 0.001;
            let (mut delivered, mut longest, steps) = (0.0, 0.0_f64, (seconds / STEP) as u32);
            for step in 0..steps {
                let fits = self.deepest - self.queue + self.capacity * STEP;
                let written = fits.min(self.rate.unwrap_or(f64::INFINITY) * STEP).min(self.demand * STEP).max(0.0);
                self.steering.on_written(written as usize);
                let passed = (self.queue + written).min(self.capacity * STEP);
                self.queue += written - passed;
                delivered += passed;
                self.now += STEP;
                let wait = self.queue / self.capacity;
                longest = longest.max(wait);
                if step % 8 == 0 {
                    let took = Duration::from_secs_f64(self.base + wait + self.foreign);
                    self.rate = self.steering.on_round_trip(Duration::from_secs_f64(self.now), took);
                }
            }
            (delivered / seconds, longest)
        }
    }

    #[test]
    fn the_queue_gets_short_and_the_wire_stays_busy() {
        for capacity in [12.5e6, 125e6, 1.25e9] {
            let mut wire = Wire::new(capacity);
            wire.demand = 0.0;
            wire.run(0.2);
            wire.demand = f64::INFINITY;
            wire.run(1.0);
            let (through, longest) = wire.run(5.0);
            assert!(through > 0.97 * capacity, "{through} of {capacity}");
            assert!(longest < 0.0035 + UNIT / capacity, "{longest} s at {capacity}");
        }
    }

    #[test]
    fn a_wire_that_gets_faster_or_slower_is_followed() {
        let mut wire = Wire::new(125e6);
        wire.demand = 0.0;
        wire.run(0.2);
        wire.demand = f64::INFINITY;
        wire.run(1.0);
        wire.capacity = 250e6;
        wire.run(2.0);
        assert!(wire.run(1.0).0 > 0.95 * 250e6);
        wire.capacity = 60e6;
        wire.run(2.0);
        let (through, longest) = wire.run(1.0);
        assert!(through > 0.95 * 60e6 && longest < 0.006, "{through}, {longest}");
    }

    #[test]
    fn a_queue_of_somebody_else_does_not_stop_the_migration() {
        let mut wire = Wire::new(125e6);
        wire.run(0.5);
        wire.foreign = 0.04;
        wire.run(1.0);
        let (through, _) = wire.run(20.0);
        assert!(through > 0.9 * 125e6, "{through}");
    }

    #[test]
    fn a_user_that_sends_little_finds_the_wire_open_when_it_sends_more() {
        let mut wire = Wire::new(125e6);
        wire.run(0.5);
        wire.demand = 1e6;
        wire.run(1.0);
        wire.demand = f64::INFINITY;
        assert!(wire.run(0.5).0 > 0.9 * 125e6);
    }
}
