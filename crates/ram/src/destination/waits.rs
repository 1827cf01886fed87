//! How long the guest waited for pages, from when we heard of a fault until the page was there.

use std::time::{Duration, Instant};

use crate::wire::{FaultTimes, Run};

/// So many times are kept; of later ones only their number.
const KEPT: usize = 1 << 20;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Block, page, and since when: about one for each processor of the guest.
    waiting: Vec<(usize, u64, Instant)>,
    micros: Vec<u32>,
    count: u64,
}

impl Waits {
    /// Somebody waits for this page.
    pub(super) fn begin(&mut self, block: usize, page: u64) {
        if !self.waiting.iter().any(|(other, number, _)| (*other, *number) == (block, page)) {
            self.waiting.push((block, page, Instant::now()));
        }
    }

    /// These pages are there.
    pub(super) fn end(&mut self, run: &Run) {
        let (count, micros) = (&mut self.count, &mut self.micros);
        self.waiting.retain(|(block, page, since)| {
            let is_there = run.block == *block && run.pages.contains(page);
            if is_there {
                *count += 1;
                if micros.len() < KEPT {
                    micros.push(since.elapsed().as_micros().try_into().unwrap_or(u32::MAX));
                }
            }
            !is_there
        });
    }

    pub(super) fn times(&self) -> FaultTimes {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        // The least that so many in a hundred are not longer than.
        let percentile = |share: usize| sorted.get((sorted.len() * share).div_ceil(100).saturating_sub(1)).copied();
        let time = |share| Duration::from_micros(percentile(share).unwrap_or(0).into());
        FaultTimes { count: self.count, median: time(50), p99: time(99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Content;

    fn run(pages: std::ops::Range<u64>) -> Run {
        Run { block: 0, pages, content: Content::Whole }
    }

    #[test]
    fn each_wait_counts_once_and_to_its_end() {
        let mut waits = Waits::default();
        assert_eq!(waits.times(), FaultTimes::default());
        waits.begin(0, 7);
        waits.begin(0, 7);
        waits.begin(1, 7);
        std::thread::sleep(Duration::from_millis(2));
        waits.end(&run(8..20));
        assert_eq!(waits.times().count, 0);
        waits.end(&run(0..20));
        waits.end(&run(0..20));
        let times = waits.times();
        assert!(times.count == 1 && times.median >= Duration::from_millis(2) && times.p99 == times.median, "{times:?}");
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let waits = Waits { micros: (1..=1000).rev().collect(), count: 1000, ..Waits::default() };
        let FaultTimes { median, p99, .. } = waits.times();
        assert_eq!((median, p99), (Duration::from_micros(500), Duration::from_micros(990)));
    }
}
