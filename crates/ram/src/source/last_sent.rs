//! What was sent of pages last, as far as a bounded memory holds it: for pages that are sent again as differences.
//!
//! This is the idea of QEMU's XBZRLE (docs/xbzrle.txt there; Svärd et al., "Evaluation of Delta Compression Techniques
//! for Efficient Live Migration of Large Virtual Machines", VEE 2011). A cache that always takes the page at hand is worth
//! nothing to a guest that writes more than it holds, over and over: each page has gone when it comes again. So here a
//! page keeps its place as long as it is sent every few rounds and is worth it, and others go without. All of the memory
//! is taken when it begins, and none later.
//!
//! Whether it pays is found out before each round ([`LastSent::judge`]): some of the pages that are to be sent, and are
//! here, are encoded on trial. When the link is faster than that, or pages have changed too much, or hardly any of them
//! are here, only a sixteenth of all pages is kept in mind, from which can be told when it would pay again.
//!
//! The destination has what a version here says when the page goes again: the frame that had it was in place before
//! (see [`shipping`](super::shipping)), and whoever sends a page by any other way makes its version go.

use std::hint::black_box;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::PAGE;
use crate::delta::{self, LONGEST, Page};
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// How many places there are for a page.
const WAYS: usize = 8;
/// How many times that one lock guards.
const SETS: usize = 32;
/// A version that was of no use for so many rounds may be replaced.
const KEPT: u32 = 2;
/// While it does not pay, one set out of so many is in use.
const PROBE: usize = 16;
/// How many pages are encoded on trial: at most, and so that it tells something.
const TRIALS: (usize, usize) = (64, 16);
/// When so many pages are to be sent and hardly any of them is here, that tells something too.
const MANY: u64 = 1024;
/// About what a page costs before that was measured, and what it costs to find that one is not here.
const USUAL: Duration = Duration::from_micros(2);
const MISS: Duration = Duration::from_nanos(100);
/// The destination takes about as long again.
const BOTH: f64 = 2.0;
/// Less for a page is not worth the trouble, in bytes.
const LEAST: f64 = PAGE as f64 / 8.0;
/// It must win so many times its costs to be taken up again.
const CERTAIN: f64 = 2.0;

/// See the module's text.
pub(super) struct LastSent {
    shards: Vec<Mutex<Shard>>,
    round: AtomicU32,
    /// All pages are taken, and since this round.
    on: AtomicBool,
    since: AtomicU32,
    /// Nothing will be sent a second time any more.
    last_pass: AtomicBool,
}

struct Shard {
    slots: Vec<Slot>,
    versions: Vec<Page>,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    block: u32,
    /// Other pages may have the slot after this round; 0 when it is empty.
    until: u32,
    page: u64,
}

/// What trials have told.
#[derive(Default)]
struct Trials {
    /// How many pages that are to be sent are here.
    here: u64,
    saved: u64,
    /// How long each took.
    times: Vec<Duration>,
}

impl LastSent {
    /// In so many bytes, a whole number of MiB; less is nothing.
    pub(super) fn new(bytes: u64) -> Self {
        let shards = (0..bytes / Shard::BYTES).map(|_| Mutex::new(Shard::new())).collect();
        Self {
            shards,
            round: AtomicU32::new(1),
            on: AtomicBool::new(true),
            since: AtomicU32::new(1),
            last_pass: AtomicBool::new(false),
        }
    }

    /// Encodes a page as it is about to be sent, and remembers it. `None`: it is sent whole.
    pub(super) fn encode(&self, block: usize, page: u64, new: &Page, delta: &mut [u8; LONGEST]) -> Option<usize> {
        let (mut shard, first) = self.find(block, page)?;
        let shard = &mut *shard;
        let slots = &mut shard.slots[first..first + WAYS];
        let round = self.round.load(Ordering::Relaxed);
        let last_pass = self.last_pass.load(Ordering::Relaxed);
        let (way, length) = match slots.iter().position(|slot| slot.is(block, page)) {
            Some(way) => (way, delta::encode(&shard.versions[first + way], new, delta)),
            None if last_pass => return None,
            None => (slots.iter().position(|slot| slot.until < round)?, None),
        };
        // What has changed that much leaves its place to others.
        let is_here = slots[way].is(block, page);
        if last_pass || is_here && length.is_none() {
            slots[way].until = 0;
        } else {
            slots[way] = Slot { block: block as u32, until: round + KEPT, page };
            shard.versions[first + way] = *new;
        }
        length
    }

    /// This page is sent in another way.
    pub(super) fn forget(&self, block: usize, page: u64) {
        if let Some((mut shard, first)) = self.find(block, page) {
            let slots = &mut shard.slots[first..first + WAYS];
            slots.iter_mut().filter(|slot| slot.is(block, page)).for_each(|slot| slot.until = 0);
        }
    }

    /// A round begins, nothing is being sent, and so many pages are to be, at this rate in bytes a second. Gives back
    /// which share of them need not be sent, as differences are shorter.
    pub(super) fn judge(&self, ram: &GuestRam, pending: &[PageSet], left: u64, rate: u64) -> io::Result<f64> {
        let round = self.round.fetch_add(1, Ordering::Relaxed) + 1;
        if self.shards.is_empty() || left == 0 || rate == 0 {
            return Ok(0.0);
        }
        let mut tried = self.try_some(ram, pending)?;
        let was_on = self.on.load(Ordering::Relaxed);
        let for_page = |saved: f64| saved / rate as f64;
        let (saved, spent) = tried.for_page();
        let tells = tried.times.len() >= TRIALS.1 || left >= MANY && round > self.since.load(Ordering::Relaxed) + KEPT;
        let misses = left as f64 * MISS.as_secs_f64();
        let on = match (was_on, tells) {
            (true, true) => tried.here as f64 * (for_page(saved) - BOTH * spent) > misses,
            (true, false) => for_page(PAGE as f64 / 2.0) > BOTH * USUAL.as_secs_f64(),
            (false, true) => {
                let here = (tried.here * PROBE as u64).min(left) as f64;
                here * (for_page(saved) - CERTAIN * BOTH * spent) > misses
            }
            (false, false) => false,
        };
        if on != was_on {
            self.on.store(on, Ordering::Relaxed);
            self.since.store(round, Ordering::Relaxed);
            if !on {
                self.shards.iter().for_each(|shard| lock(shard).slots.fill(Slot::default()));
            }
        }
        let spared = tried.here as f64 * (saved - BOTH * spent * rate as f64) / (left * PAGE) as f64;
        Ok(if on { spared.clamp(0.0, 0.99) } else { 0.0 })
    }

    /// Nothing is sent after this pass: there is nothing to be remembered.
    pub(super) fn last_pass(&self) {
        self.last_pass.store(true, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Encodes some of the pages that are here and are to be sent.
    fn try_some(&self, ram: &GuestRam, pending: &[PageSet]) -> io::Result<Trials> {
        let mut trials = Trials::default();
        let (mut now, mut kept, mut delta) = ([0; PAGE as usize], [0; PAGE as usize], [0; LONGEST]);
        for shard in &self.shards {
            let shard = lock(shard);
            let taken = shard.slots.iter().zip(&shard.versions).filter(|(slot, _)| slot.until > 0);
            for (slot, version) in taken.filter(|(slot, _)| pending[slot.block as usize].contains(slot.page)) {
                trials.here += 1;
                // Pages have no order here, so that the first ones are as good as any.
                if trials.times.len() == TRIALS.0 {
                    continue;
                }
                ram.blocks()[slot.block as usize].read_at(slot.page * PAGE, &mut now)?;
                let begun = Instant::now();
                let length = delta::encode(version, &now, &mut delta);
                kept.copy_from_slice(black_box(&now));
                black_box(&kept);
                trials.times.push(begun.elapsed());
                trials.saved += length.map_or(0, |length| PAGE - length as u64);
            }
        }
        Ok(trials)
    }

    /// Where a page has its places, if it may have one.
    fn find(&self, block: usize, page: u64) -> Option<(MutexGuard<'_, Shard>, usize)> {
        // Fibonacci hashing: neighbours lie far apart, and evenly.
        let hash = (page ^ (block as u64) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let set = (hash as usize * self.shards.len() * SETS) >> 32;
        let shard = self.shards.get(set / SETS)?;
        let in_use = self.on.load(Ordering::Relaxed) || set.is_multiple_of(PROBE);
        in_use.then(|| (lock(shard), set % SETS * WAYS))
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().expect("no holder of this lock panics")
}

impl Shard {
    const SLOTS: usize = SETS * WAYS;
    const BYTES: u64 = (size_of::<Mutex<Self>>() + Self::SLOTS * (size_of::<Slot>() + size_of::<Page>())) as u64;

    fn new() -> Self {
        Self { slots: vec![Slot::default(); Self::SLOTS], versions: vec![[0; PAGE as usize]; Self::SLOTS] }
    }
}

impl Slot {
    fn is(&self, block: usize, page: u64) -> bool {
        self.until > 0 && self.page == page && self.block as usize == block
    }
}

impl Trials {
    /// How many bytes a page saves, if that is worth it, and how many seconds it takes.
    fn for_page(&mut self) -> (f64, f64) {
        let count = self.times.len().max(1);
        let saved = Some(self.saved as f64 / count as f64).filter(|saved| *saved >= LEAST);
        // The median, as other threads may have had the processor meanwhile.
        self.times.sort_unstable();
        (saved.unwrap_or(0.0), self.times.get(count / 2).map_or(0.0, Duration::as_secs_f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    const MIB: u64 = 1 << 20;
    /// 119 MiB/s.
    const GIGABIT: u64 = 125_000_000;

    fn page(value: u64) -> Page {
        let mut state = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    }

    /// A guest, some pages of which are sent in each round.
    struct Guest {
        ram: GuestRam,
        pending: [PageSet; 1],
        last_sent: LastSent,
    }

    impl Guest {
        fn new(pages: u64, cache: u64) -> Self {
            let ram = GuestRam::of_our_own(&[pages * PAGE]);
            Self { ram, pending: [PageSet::new(pages)], last_sent: LastSent::new(cache) }
        }

        /// Which share was foretold to be spared, and how many pages went as deltas.
        fn round(&self, rate: u64, pages: Range<u64>, content: impl Fn(u64) -> Page) -> (f64, u64) {
            let write = |page: u64| self.ram.blocks()[0].write_at(page * PAGE, &content(page)).unwrap();
            pages.clone().for_each(write);
            self.pending[0].insert(pages.clone());
            let left = pages.end - pages.start;
            let spared = self.last_sent.judge(&self.ram, &self.pending, left, rate).unwrap();
            self.pending[0].remove(pages.clone());
            let encode = |page: &u64| self.last_sent.encode(0, *page, &content(*page), &mut [0; LONGEST]).is_some();
            (spared, pages.filter(encode).count() as u64)
        }
    }

    fn changed_a_little(page_number: u64, round: u64) -> Page {
        let mut bytes = page(page_number);
        bytes[64..72].copy_from_slice(&round.to_le_bytes());
        bytes
    }

    #[test]
    fn a_delta_is_made_of_what_was_sent_last() {
        let last_sent = LastSent::new(2 * MIB);
        let mut delta = [0; LONGEST];
        let mut encode = |value| last_sent.encode(3, 77, &changed_a_little(1, value), &mut delta);
        assert_eq!((encode(1), encode(2), encode(2)), (None, Some(17), Some(1)));
        last_sent.forget(3, 76);
        assert_eq!(encode(3), Some(17));
        last_sent.forget(3, 77);
        assert_eq!((encode(3), encode(3)), (None, Some(1)));
        // The same page of another block is another one.
        assert_eq!(last_sent.encode(2, 77, &changed_a_little(1, 3), &mut [0; LONGEST]), None);
    }

    #[test]
    fn what_has_changed_too_much_is_not_kept() {
        let last_sent = LastSent::new(2 * MIB);
        let encode = |value| last_sent.encode(0, 5, &page(value), &mut [0; LONGEST]);
        assert_eq!((encode(1), encode(2), encode(2), encode(2)), (None, None, None, Some(1)));
    }

    #[test]
    fn what_is_sent_last_of_all_is_not_kept() {
        let last_sent = LastSent::new(2 * MIB);
        let encode = |page_number| last_sent.encode(0, page_number, &page(1), &mut [0; LONGEST]);
        assert_eq!(encode(1), None);
        last_sent.last_pass();
        assert_eq!((encode(1), encode(1), encode(2), encode(2)), (Some(1), None, None, None));
    }

    #[test]
    fn it_takes_no_more_memory_than_it_was_given() {
        for bytes in [0, MIB, 2 * MIB, 10 * MIB] {
            let last_sent = LastSent::new(bytes);
            (0..10 * MIB / PAGE).for_each(|number| {
                last_sent.encode(0, number, &page(number), &mut [0; LONGEST]);
            });
            let shards = last_sent.shards.iter().map(|shard| {
                let shard = lock(shard);
                let contents =
                    shard.slots.capacity() * size_of::<Slot>() + shard.versions.capacity() * size_of::<Page>();
                (size_of_val(&shard) + contents) as u64
            });
            let taken = shards.sum::<u64>();
            assert!(taken <= bytes && taken + Shard::BYTES > bytes, "{taken} of {bytes} bytes");
        }
    }

    #[test]
    fn more_pages_than_it_holds_do_not_drive_one_another_out() {
        let guest = Guest::new(4 * 1024, 5 * MIB);
        let rounds = (0..6).map(|round| guest.round(GIGABIT, 0..4096, |number| changed_a_little(number, round)));
        let (_, met) = rounds.last().unwrap();
        assert!((900..=1024).contains(&met), "{met} of 4096 pages in the memory of 1024");
    }

    #[test]
    fn pages_that_are_not_sent_any_more_leave_their_places() {
        let guest = Guest::new(2048, 5 * MIB);
        let part = |round| if round < 4 { 0..1024 } else { 1024..2048 };
        let rounds = (0..10).map(|round| guest.round(GIGABIT, part(round), |number| changed_a_little(number, round)));
        let (_, met) = rounds.last().unwrap();
        assert!(met > 900, "{met} of 1024 pages");
    }

    #[test]
    fn what_will_be_spared_is_known_when_pages_come_again() {
        let guest = Guest::new(1024, 8 * MIB);
        let rounds = (0..4).map(|round| guest.round(GIGABIT, 0..1024, |page| changed_a_little(page, round)));
        let rounds: Vec<_> = rounds.collect();
        assert_eq!(rounds[0], (0.0, 0));
        assert!(rounds[1..].iter().all(|(spared, met)| *spared > 0.7 && *met > 950), "{rounds:?}");
    }

    #[test]
    fn it_is_off_when_pages_change_all_over_and_on_when_they_do_not_any_more() {
        let guest = Guest::new(2048, 16 * MIB);
        for round in 0..6 {
            assert_eq!(guest.round(GIGABIT, 0..2048, |number| page(number + 10_000 * round)), (0.0, 0));
            // The first round tells nothing.
            assert_eq!(guest.last_sent.is_on(), round == 0, "round {round}");
        }
        let rounds = (0..8).map(|round| guest.round(GIGABIT, 0..2048, |number| changed_a_little(number, round)));
        let (_, met) = rounds.last().unwrap();
        assert!(met > 1900, "{met} of 2048 pages");
    }

    #[test]
    fn it_is_off_when_the_link_is_faster() {
        let guest = Guest::new(2048, 16 * MIB);
        for round in 0..4 {
            let (spared, met) = guest.round(100_000_000_000, 0..2048, |number| changed_a_little(number, round));
            assert!(spared == 0.0 && met < 256 && !guest.last_sent.is_on(), "round {round}: {met} pages");
        }
    }

    #[test]
    fn it_is_off_when_no_page_comes_again() {
        let guest = Guest::new(8 * 2048, 16 * MIB);
        for round in 0..6 {
            guest.round(GIGABIT, round * 2048..(round + 1) * 2048, page);
        }
        assert!(!guest.last_sent.is_on());
    }
}
