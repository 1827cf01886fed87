//! Write pacing: the guest makes pages stale no faster than a share of what the link carries, so that pre-copy converges.
//!
//! A processor of the guest that writes to a page which the destination has waits until that page's turn comes. Whoever
//! only reads, or writes to what must be sent anyway, does not wait; nor do QEMU's other threads, which may hold locks
//! that all of the guest needs. Whoever is no thread of QEMU writes for a processor: under KVM a worker of the kernel
//! brings the page to one that goes on with something else meanwhile (Linux' `virt/kvm/async_pf.c`).

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::shipping::CHUNK;
use super::{Inner, RamError, Source, WriteLog};
use crate::PAGE;
use crate::tracking::{WriteFault, WriteFaults};

/// How often it is looked whether all is over, while nobody waits.
const IDLE: Duration = Duration::from_millis(20);
/// The same while somebody does.
const BUSY: Duration = Duration::from_millis(1);
/// What was not used can be made up for so long.
const BURST: Duration = Duration::from_millis(5);
/// The rate while the link's is not known, in bytes a second.
const LEAST_RATE: f64 = (1 << 20) as f64;
/// How often it is reckoned how much the guest was slowed down, and of how short a time it can be at the end.
const SAMPLE: Duration = Duration::from_millis(500);
const LAST_SAMPLE: Duration = Duration::from_millis(50);
/// How many pages are taken over at a time while the guest is paused: 256 MiB.
const SLICE: u64 = CHUNK * 128;

/// What the thread that lets writers go is told, and tells.
#[derive(Default)]
pub(super) struct Pacing {
    /// Of what the link carries, in percent; 0 before it began.
    share: AtomicU8,
    /// Nobody waits any more.
    lifted: AtomicBool,
    over: AtomicBool,
    /// How much of their time the guest's processors waited lately, in percent.
    slowed: AtomicU8,
    /// How many pages of the guest's RAM were taken over.
    taken: AtomicU64,
}

impl Pacing {
    pub(super) fn is_on(&self) -> bool {
        self.taken.load(Ordering::Relaxed) > 0
    }

    pub(super) fn slowed(&self) -> u8 {
        self.slowed.load(Ordering::Relaxed)
    }

    pub(super) fn lift(&self) {
        self.lifted.store(true, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Lets so many pages a second go.
struct Bucket {
    pages: f64,
    filled: Instant,
}

impl Bucket {
    /// Whether one more may go.
    fn take(&mut self, now: Instant, rate: f64) -> bool {
        let passed = now.duration_since(self.filled).as_secs_f64();
        self.pages = (self.pages + passed * rate).min((rate * BURST.as_secs_f64()).max(1.0));
        self.filled = now;
        let enough = self.pages >= 1.0;
        if enough {
            self.pages -= 1.0;
        }
        enough
    }
}

impl Source {
    /// Sets the share of what the link carries that the guest may make stale, in percent. At first this prepares for
    /// pacing with `processors`, the threads that run the guest; [`Source::take_over`] then begins it.
    pub fn pace(&self, share: u8, processors: &[u32]) -> Result<(), RamError> {
        let inner = &self.inner;
        if inner.pacing.share.swap(share.max(1), Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let faults = inner.change_tracking(|log| Ok(log.prepare_pacing(&inner.ram)?))?;
        let processors = processors.to_vec();
        self.spawn("ram-pacing", move |inner| inner.let_writers_go(&faults, &processors))
    }

    /// Begins to pace as much of the RAM as can be taken over in about so long, at least a slice of it. The guest must be
    /// paused. False when there is more.
    pub fn take_over(&self, at_most: Duration) -> Result<bool, RamError> {
        let inner = &self.inner;
        let (begun, mut skip) = (Instant::now(), inner.pacing.taken.load(Ordering::Relaxed));
        inner.change_tracking(|log| {
            for (block, pending) in inner.pending.iter().enumerate() {
                for first in (0..pending.pages()).step_by(SLICE as usize) {
                    let slice = first..(first + SLICE).min(pending.pages());
                    let length = slice.end - slice.start;
                    if skip >= length {
                        skip -= length;
                        continue;
                    }
                    if begun.elapsed() >= at_most {
                        return Ok(false);
                    }
                    inner.take_over(log, block, slice).map_err(RamError::io)?;
                    inner.pacing.taken.fetch_add(length, Ordering::Relaxed);
                }
            }
            Ok(true)
        })
    }

    /// Nobody waits any more: the guest is about to be paused for good.
    pub fn lift_pacing(&self) {
        self.inner.pacing.lift();
    }
}

impl Inner {
    /// Has writers wait at these pages of a guest that is paused. They begin with a chunk.
    fn take_over(&self, log: &mut dyn WriteLog, block: usize, pages: Range<u64>) -> io::Result<()> {
        let mut written = Vec::new();
        self.sent_once(block, pages.clone()).try_for_each(|sent| log.written(block, sent, &mut written))?;
        self.more(block, written);
        log.pace(block, pages.start * PAGE..pages.end * PAGE)?;
        if self.drain.is_some() {
            // What is sent for the first time from here on is not protected then.
            return self.not_empty(block, pages).try_for_each(|bytes| log.protect(block, bytes));
        }
        // Of what was never sent, nothing needs protection.
        self.sent_once(block, pages).try_for_each(|sent| log.protect(block, sent))
    }

    /// Lets writers go, each in its turn, until all is over.
    fn let_writers_go(&self, faults: &WriteFaults, processors: &[u32]) -> Result<(), RamError> {
        let (mut found, mut waiting) = (Vec::new(), VecDeque::<(WriteFault, Instant)>::new());
        let mut bucket = Bucket { pages: 0.0, filled: Instant::now() };
        let (mut sampled, mut waited, mut rate) = (Instant::now(), Duration::ZERO, LEAST_RATE / PAGE as f64);
        let mut was_lifted = false;
        while !self.pacing.over.load(Ordering::Relaxed) {
            let next = Duration::from_secs_f64(1.0 / rate).min(BUSY);
            let timeout = if waiting.is_empty() { IDLE } else { next };
            if !faults.wait(&self.ram, timeout, &mut found).map_err(RamError::io)? {
                return Ok(());
            }
            let now = Instant::now();
            for fault in found.drain(..) {
                let is_stale = self.pending[fault.block].contains(fault.page);
                let is_qemus = !processors.contains(&fault.thread) && self.ram.process().has_thread(fault.thread);
                if is_stale || is_qemus {
                    faults.let_go(fault.block, fault.page).map_err(RamError::io)?;
                } else {
                    waiting.push_back((fault, now));
                }
            }
            let lifted = self.pacing.lifted.load(Ordering::Relaxed);
            while let Some((fault, since)) = waiting.front()
                && (lifted || bucket.take(now, rate))
            {
                faults.let_go(fault.block, fault.page).map_err(RamError::io)?;
                waited += now - *since;
                waiting.pop_front();
            }
            let sample = now - sampled;
            // What comes after it is lifted is no pacing.
            let ends = lifted && !std::mem::replace(&mut was_lifted, lifted);
            if sample >= SAMPLE && !was_lifted || ends && sample >= LAST_SAMPLE {
                let most = sample.as_secs_f64() * processors.len().max(1) as f64;
                let slowed = (waited.as_secs_f64() / most * 100.0).min(99.0);
                self.pacing.slowed.store(slowed as u8, Ordering::Relaxed);
                (sampled, waited) = (now, Duration::ZERO);
            }
            let share = f64::from(self.pacing.share.load(Ordering::Relaxed)) / 100.0;
            rate = (self.shipping.rate() as f64).max(LEAST_RATE) * share / PAGE as f64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_as_many_go_as_its_rate_says_and_makes_up_for_little() {
        let begun = Instant::now();
        let mut bucket = Bucket { pages: 0.0, filled: begun };
        let mut taken = |from: u64, to: u64| {
            let moments = (from..to).map(|micros| begun + Duration::from_micros(micros));
            moments.filter(|now| bucket.take(*now, 1000.0)).count()
        };
        assert_eq!(taken(0, 1_000_000), 999);
        assert!((1..=6).contains(&taken(9_000_000, 9_000_100)), "not 8000 at once");
    }
}
