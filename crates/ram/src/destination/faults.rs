//! How much to fetch for a fault: more for a guest that goes on where it was before, little for one that jumps.
//!
//! This is what readahead does for files: streams of faults are told apart by where the next one is expected.

use std::ops::Range;

use crate::wire::MOST_WANTED;

/// The first fault of a stream fetches so many pages.
const FIRST: u64 = 8;
/// One that goes on fetches twice as many as the one before, up to so many: 1 MiB.
const MOST: u64 = MOST_WANTED;
/// When hardly any fault goes on with a stream, so many.
const JUMPY: u64 = 2;
/// Streams that are followed at a time: about one for each processor of a guest that faults.
const STREAMS: usize = 16;
/// Of the last 32 faults, fewer than these go on with a stream when the guest jumps.
const FEW: u32 = 4;

/// A guest's faults, as far as they tell what comes next.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    /// The latest first.
    streams: Vec<Stream>,
    /// Whether each of the last faults went on with a stream.
    history: u32,
}

#[derive(Debug)]
struct Stream {
    block: usize,
    /// What was fetched last.
    last: Range<u64>,
    /// It goes down.
    down: bool,
}

impl Windows {
    /// What to fetch for a fault at this page of a block with so many.
    pub(crate) fn on_fault(&mut self, block: usize, page: u64, pages: u64) -> Range<u64> {
        let met =
            self.streams.iter().enumerate().find_map(|(index, stream)| Some((index, stream.direction(block, page)?)));
        self.history = self.history << 1 | u32::from(met.is_some());
        let (window, down) = match met {
            Some((index, down)) => {
                let last = self.streams.remove(index).last;
                (((last.end - last.start) * 2).clamp(FIRST, MOST), down)
            }
            None if self.history.count_ones() < FEW && self.streams.len() == STREAMS => (JUMPY, false),
            None => (FIRST, false),
        };
        let last = match down {
            true => (page + 1).saturating_sub(window)..page + 1,
            false => page..(page + window).min(pages),
        };
        self.streams.insert(0, Stream { block, last: last.clone(), down });
        self.streams.truncate(STREAMS);
        last
    }
}

impl Stream {
    /// Whether a fault goes on with it, and downwards. It may come a bit later than expected, as some pages may be
    /// there already.
    fn direction(&self, block: usize, page: u64) -> Option<bool> {
        let Range { start, end } = self.last;
        let reach = 2 * (end - start);
        if self.block != block {
            return None;
        }
        let is_above = (end..end + reach).contains(&page);
        let is_below = (start.saturating_sub(reach)..start).contains(&page);
        // A stream that knows its way keeps it.
        let known = end - start > FIRST;
        match (is_above, is_below) {
            (true, _) if !(known && self.down) => Some(false),
            (_, true) if !known || self.down => Some(true),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1 << 20;

    #[test]
    fn a_guest_that_goes_up_gets_more_each_time() {
        let (mut windows, mut page, mut faults) = (Windows::default(), 1000, 0);
        while page < 100_000 {
            page = windows.on_fault(0, page, PAGES).end;
            faults += 1;
        }
        assert!(faults < 400 + 10, "{faults} faults for 99000 pages");
    }

    #[test]
    fn a_guest_that_goes_down_gets_what_lies_below() {
        let (mut windows, mut page, mut faults) = (Windows::default(), 100_000, 0);
        while page > 1000 {
            page = windows.on_fault(0, page, PAGES).start - 1;
            faults += 1;
        }
        assert!(faults < 400 + 20, "{faults} faults for 99000 pages");
    }

    #[test]
    fn a_guest_that_jumps_gets_little() {
        let mut windows = Windows::default();
        let (mut state, mut fetched) = (12_345_u64, 0);
        for _ in 0..1000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (state >> 33) % PAGES;
            let range = windows.on_fault(0, page, PAGES);
            assert!(range.contains(&page));
            fetched += range.end - range.start;
        }
        assert!(fetched < 2500, "{fetched} pages for 1000 faults");
    }

    #[test]
    fn several_streams_are_told_apart() {
        let mut windows = Windows::default();
        let mut at = [0, 100_000, 200_000, 300_000];
        for _ in 0..20 {
            for page in &mut at {
                *page = windows.on_fault(0, *page, PAGES).end;
            }
        }
        assert!(at.iter().enumerate().all(|(index, page)| page - index as u64 * 100_000 > 3000), "{at:?}");
    }

    #[test]
    fn windows_end_with_their_block() {
        let mut windows = Windows::default();
        assert_eq!(windows.on_fault(0, 9, 10), 9..10);
        assert_eq!(windows.on_fault(1, 0, 10), 0..8);
    }
}
