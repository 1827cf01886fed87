//! Pre-copy: all RAM once, then what was written since, until what is left is little.
//!
//! A look at all pages begins each round. It tells which were written since the last look, and protects them again, so
//! that the guest pays one fault for a page and round. Pages that one look after another finds written are hot: they
//! come last within a round, when a new look has not found them cold, since whatever is sent of them is stale soon.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::shipping::{CHUNK, Filling, Shipping, There};
use super::{Inner, RamError, WriteLog, in_threads, workers};
use crate::PAGE;
use crate::pages::PageSet;

/// Written at so many looks in a row, a page is hot.
const HOT: u8 = 2;
/// Nothing is hotter.
const HOTTEST: u8 = u8::MAX - 1;
/// How many pages one thread looks at, at a time: 512 MiB.
const SPAN: u64 = 1 << 17;
/// How often all pages are looked at while there is enough to send: at most, and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));
/// Each page that was written since the last look has cost the guest a fault, of about a microsecond. It is to lose no
/// more than a tenth of its time by them.
const FAULT: Duration = Duration::from_micros(10);
/// How often it is looked in the first round how much is stale already, and how fast it became so.
const GLANCE: Duration = Duration::from_millis(150);
/// So many pages must have been sent for that: 32 MiB.
const TELLING: u64 = 8192;
/// What takes no longer than this is not worth another round.
const LITTLE: Duration = Duration::from_millis(4);
/// A round that leaves more than this share of what the last one left is not worth another one either.
const SHRINKS: f64 = 0.7;
/// How often what fits the downtime is tried to be made less.
const MOST_ATTEMPTS: u32 = 6;
/// How long the guest may take to be paused once it is time for it.
const PAUSE: Duration = Duration::from_millis(500);

/// At how many looks in a row each page was found written, by block.
struct Heat(Vec<Vec<AtomicU8>>);

impl Heat {
    fn of(&self, block: usize, page: u64) -> u8 {
        self.0[block][page as usize].load(Ordering::Relaxed)
    }

    /// A look at these pages found some written, and the others not.
    fn look(&self, span: &Span, written: &[Range<u64>]) {
        let heat = &self.0[span.block][..span.pages.end as usize];
        let mut from = span.pages.start as usize;
        for run in written {
            let (start, end) = ((run.start / PAGE) as usize, (run.end / PAGE) as usize);
            heat[from..start].iter().for_each(|cold| cold.store(0, Ordering::Relaxed));
            heat[start..end]
                .iter()
                .for_each(|page| page.store((page.load(Ordering::Relaxed) + 1).min(HOTTEST), Ordering::Relaxed));
            from = end;
        }
        heat[from..].iter().for_each(|cold| cold.store(0, Ordering::Relaxed));
    }
}

/// A part of a block that one thread looks at, at a time.
struct Span {
    block: usize,
    pages: Range<u64>,
}

/// A part of a block that one thread sends at a time.
#[derive(Clone, Copy)]
struct Chunk {
    block: usize,
    index: u64,
}

/// So many pages in this time, in bytes a second.
fn rate_of(pages: u64, time: Duration) -> u64 {
    (pages as f64 * PAGE as f64 / time.as_secs_f64().max(1e-3)) as u64
}

impl Inner {
    /// Fails when tracking has ended.
    fn tracked<T>(&self, ask: impl FnOnce(&dyn WriteLog) -> io::Result<T>) -> Result<T, RamError> {
        let log = self.log.read().expect("no holder of this lock panics");
        log.as_deref().map_or(Err(io::ErrorKind::NotConnected.into()), ask).map_err(RamError::io)
    }

    /// As [`tracked`](Inner::tracked), alone with what tracks.
    pub(super) fn change_tracking<T>(
        &self,
        change: impl FnOnce(&mut dyn WriteLog) -> Result<T, RamError>,
    ) -> Result<T, RamError> {
        let mut log = self.log.write().expect("no holder of this lock panics");
        change(log.as_deref_mut().ok_or_else(|| RamError::io(io::ErrorKind::NotConnected.into()))?)
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn pages_of(&self, chunk: Chunk) -> Range<u64> {
        let first = chunk.index * CHUNK;
        first..(first + CHUNK).min(self.pending[chunk.block].pages())
    }

    fn all_chunks(&self) -> Vec<Chunk> {
        let blocks = self.pending.iter().enumerate();
        blocks
            .flat_map(|(block, set)| (0..set.pages().div_ceil(CHUNK)).map(move |index| Chunk { block, index }))
            .collect()
    }

    /// Sends round after round until somebody stops it.
    pub(super) fn rounds(&self) {
        let result = self.all_rounds();
        // Nobody may take what failed for ended.
        if let Err(error) = result {
            self.fail(error);
        }
        self.lock().rounds_ended = true;
        self.news.notify_all();
    }

    fn all_rounds(&self) -> Result<(), RamError> {
        let heat = Heat(self.pending.iter().map(|set| (0..set.pages()).map(|_| AtomicU8::new(0)).collect()).collect());
        let chunks = self.all_chunks();
        let mut looked = Instant::now();
        {
            let mut state = self.lock();
            (state.round, state.first_round_began) = (1, Some(looked));
        }
        // What is not sent of it when it is stopped is still to be sent.
        for set in self.pending.iter().chain(&self.untouched) {
            set.insert(0..set.pages());
        }
        let glanced = Mutex::new(Instant::now());
        if self.drain.is_some() {
            for (block, set) in self.pending.iter().enumerate() {
                self.tracked(|log| log.protect(block, 0..set.pages() * PAGE))?;
            }
            self.drain()?;
        }
        self.each_chunk(&chunks, true, |chunk, frame| {
            self.first_time(chunk, frame)?;
            match glanced.try_lock() {
                Ok(mut last) if last.elapsed() >= GLANCE => {
                    self.glance()?;
                    *last = Instant::now();
                    Ok(())
                }
                _ => Ok(()),
            }
        })?;
        self.lock().stale = 0;
        let (mut before, mut attempts) = (u64::MAX, 0);
        while !self.is_stopped() {
            let since = looked.elapsed();
            looked = Instant::now();
            // Where writes are paced, what is protected is what writers wait for: what is to be sent anyway is not, and
            // what is written to all the time is not told from what waits to be sent.
            let paced = self.pacing.is_on();
            let written = match paced {
                // What is to be read after a drain has to be protected before it.
                true if self.drain.is_some() => self.look(true, |_, _| ())?,
                true => self.look_on()?,
                false => self.look(true, |span, runs| heat.look(span, runs))?,
            };
            self.drain()?;
            let below = if paced { u8::MAX } else { HOT };
            let look = looked.elapsed();
            let left = self.recount();
            let dirty_rate = rate_of(written, since);
            let rate = self.shipping.rate();
            let spared = self.last_sent.judge(&self.ram, &self.pending, left, rate).map_err(RamError::io)?;
            let time = self.time_for(left).map(|time| time.mul_f64(1.0 - spared));
            let fits = time.is_some_and(|time| time + look <= self.downtime);
            attempts = if fits { attempts + 1 } else { 0 };
            let enough = time.is_some_and(|time| time <= LITTLE) || left as f64 > before as f64 * SHRINKS;
            before = left;
            {
                let mut state = self.lock();
                state.round += 1;
                state.dirty_rate = dirty_rate;
                state.spared = spared;
                if left == 0 || fits && (enough || attempts >= MOST_ATTEMPTS) {
                    state.converged = true;
                    self.news.notify_all();
                    // It is up to whoever watches to pause the guest.
                    let waiting = |_: &mut super::State| !self.is_stopped();
                    drop(self.news.wait_timeout_while(state, PAUSE, waiting));
                    self.lock().converged = false;
                    continue;
                }
            }
            self.news.notify_all();
            self.each_chunk(&chunks, true, |chunk, frame| self.again(chunk, frame, &heat, below))?;
            let next_look = FAULT.mul_f64(written as f64).clamp(LOOK.0, LOOK.1);
            if looked.elapsed() < next_look && !self.is_stopped() {
                self.each_chunk(&chunks, true, |chunk, frame| match looked.elapsed() < next_look {
                    true => self.again(chunk, frame, &heat, u8::MAX),
                    false => Ok(()),
                })?;
            }
        }
        Ok(())
    }

    fn last_sent(&self) -> There<'_> {
        There::LastSent(&self.last_sent)
    }

    /// How long so many whole pages take; `None` while that is not known.
    fn time_for(&self, pages: u64) -> Option<Duration> {
        let rate = self.shipping.rate();
        (rate > 0).then(|| Duration::from_secs_f64(pages as f64 * PAGE as f64 / rate as f64))
    }

    /// What was protected by now is read after this.
    fn drain(&self) -> Result<(), RamError> {
        self.drain.as_ref().map_or(Ok(()), |drain| drain()).map_err(|error| RamError::Drain(Arc::new(error)))
    }

    /// Looks which pages were written and tells of each part. Gives back how many there were. When they are not
    /// protected, those that were to be sent anyway are found again and do not count.
    fn look(&self, protect: bool, found: impl Fn(&Span, &[Range<u64>]) + Sync) -> Result<u64, RamError> {
        let blocks = self.pending.iter().map(PageSet::pages).enumerate();
        let spans = blocks.flat_map(|(block, pages)| {
            (0..pages).step_by(SPAN as usize).map(move |first| Span { block, pages: first..(first + SPAN).min(pages) })
        });
        let (spans, pages): (Vec<Span>, _) = (spans.collect(), AtomicU64::new(0));
        let next = AtomicUsize::new(0);
        let look = || {
            let mut runs = Vec::new();
            while let Some(span) = spans.get(next.fetch_add(1, Ordering::Relaxed)) {
                runs.clear();
                let bytes = span.pages.start * PAGE..span.pages.end * PAGE;
                self.tracked(|log| match protect {
                    true => log.take_written(span.block, bytes, &mut runs),
                    false => log.written(span.block, bytes, &mut runs),
                })?;
                for run in &runs {
                    let new = self.pending[span.block].insert(run.start / PAGE..run.end / PAGE);
                    let count = if protect { (run.end - run.start) / PAGE } else { new };
                    pages.fetch_add(count, Ordering::Relaxed);
                }
                found(span, &runs);
            }
            Ok(())
        };
        in_threads(workers().min(spans.len()), look)?;
        Ok(pages.into_inner())
    }

    /// Looks which pages were written, and leaves them as they are. Gives back how many were not to be sent before.
    pub(super) fn look_on(&self) -> Result<u64, RamError> {
        self.look(false, |_, _| ())
    }

    /// Those of these pages, in bytes, of which something was sent, if only that they are zero. They begin with a chunk.
    pub(super) fn sent_once(&self, block: usize, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let (untouched, end) = (&self.untouched[block], pages.end.div_ceil(CHUNK));
        let mut chunk = pages.start / CHUNK;
        let parts = std::iter::from_fn(move || {
            (chunk < end).then(|| {
                let next = untouched.next_run(chunk..end).unwrap_or(end..end);
                let part = chunk * CHUNK * PAGE..(next.start * CHUNK).min(pages.end) * PAGE;
                chunk = next.end;
                part
            })
        });
        parts.filter(|part| !part.is_empty())
    }

    /// Finds out how much of what the first round has sent is stale already, and how fast it became so.
    pub(super) fn glance(&self) -> Result<(), RamError> {
        let (mut runs, mut rewritten) = (Vec::new(), 0);
        for (block, set) in self.pending.iter().enumerate() {
            for bytes in self.sent_once(block, 0..set.pages()) {
                runs.clear();
                self.tracked(|log| log.written(block, bytes, &mut runs))?;
                rewritten += runs.iter().map(|run| (run.end - run.start) / PAGE).sum::<u64>();
            }
        }
        let sent = self.shipping.pages();
        let mut state = self.lock();
        if let Some(began) = state.first_round_began {
            state.dirty_rate = rate_of(rewritten, began.elapsed());
        }
        if sent >= TELLING {
            state.stale = (rewritten * 100 / sent).min(100) as u8;
        }
        Ok(())
    }

    /// Nothing was sent of it yet.
    fn first_time(&self, chunk: Chunk, frame: &mut Filling) -> Result<(), RamError> {
        let pages = self.pages_of(chunk);
        let bytes = pages.start * PAGE..pages.end * PAGE;
        if self.drain.is_none() {
            self.tracked(|log| log.protect(chunk.block, bytes.clone()))?;
        }
        self.untouched[chunk.block].remove(chunk.index..chunk.index + 1);
        self.fewer(self.pending[chunk.block].remove(pages));
        match self.ram.blocks()[chunk.block].first_data(bytes.clone()).map_err(RamError::io)? {
            // The destination's RAM is all zero when it is new: holes and zeroes are not told.
            Some(data) => self.read(frame, chunk.block, data / PAGE..bytes.end / PAGE, There::Zeroes, Shipping::ship),
            None => Ok(()),
        }
    }

    /// Sends what is pending of it and colder than that.
    fn again(&self, chunk: Chunk, frame: &mut Filling, heat: &Heat, below: u8) -> Result<(), RamError> {
        let pages = self.pages_of(chunk);
        let pending = &self.pending[chunk.block];
        if !self.any_below(chunk, heat, below) {
            return Ok(());
        }
        // What a disk may still be writing is not protected and read at once: it is as the round's scan has left it.
        if self.drain.is_none() {
            let mut written = Vec::new();
            let bytes = pages.start * PAGE..pages.end * PAGE;
            self.tracked(|log| log.take_written(chunk.block, bytes, &mut written))?;
            self.more(chunk.block, written);
        }
        let mut from = pages.start;
        while let Some(run) = pending.next_run(from..pages.end) {
            from = run.end;
            let mut page = run.start;
            while page < run.end {
                let is_cold = |page: &u64| heat.of(chunk.block, *page) < below;
                let cold = (page..run.end).take_while(is_cold).count() as u64;
                if cold > 0 {
                    self.fewer(pending.remove(page..page + cold));
                    self.read(frame, chunk.block, page..page + cold, self.last_sent(), Shipping::ship)?;
                }
                page += cold + 1;
            }
        }
        Ok(())
    }

    fn any_below(&self, chunk: Chunk, heat: &Heat, below: u8) -> bool {
        let pages = self.pages_of(chunk);
        let mut from = pages.start;
        while let Some(run) = self.pending[chunk.block].next_run(from..pages.end) {
            if run.clone().any(|page| heat.of(chunk.block, page) < below) {
                return true;
            }
            from = run.end;
        }
        false
    }

    /// Has several threads do this for each chunk, each with a frame of its own, to the end or until it is stopped.
    fn each_chunk(
        &self,
        chunks: &[Chunk],
        can_be_stopped: bool,
        send: impl Fn(Chunk, &mut Filling) -> Result<(), RamError> + Sync,
    ) -> Result<(), RamError> {
        // Each of them sends a page once.
        self.shipping.next_pass();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut frame = self.shipping.filling();
            while !(can_be_stopped && self.is_stopped())
                && let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed))
            {
                send(*chunk, &mut frame)?;
            }
            self.shipping.ship(frame).map_err(RamError::from)
        };
        in_threads(workers(), work)
    }

    /// The guest is paused: what was written since the last look is the last of it.
    pub(super) fn last_look(&self) -> Result<(), RamError> {
        self.look_on()?;
        self.forget_holes()?;
        self.recount();
        Ok(())
    }

    /// What was never sent and has never been written is zero at the destination too.
    fn forget_holes(&self) -> Result<(), RamError> {
        for (block, untouched) in self.untouched.iter().enumerate() {
            while let Some(run) = untouched.take_run(0..untouched.pages(), u64::MAX) {
                let set = &self.pending[block];
                let pages = run.start * CHUNK..(run.end * CHUNK).min(set.pages());
                let mut from = pages.start;
                let data = self.ram.blocks()[block].data(pages.start * PAGE..pages.end * PAGE);
                for data in data.map_err(RamError::io)? {
                    set.remove(from..data.start / PAGE);
                    from = data.end / PAGE;
                }
                set.remove(from..pages.end);
            }
        }
        Ok(())
    }

    /// Sends all that is pending.
    pub(super) fn send_rest(&self) -> Result<(), RamError> {
        self.last_sent.last_pass();
        self.each_chunk(&self.all_chunks(), false, |chunk, frame| {
            let pages = self.pages_of(chunk);
            while let Some(run) = self.pending[chunk.block].take_run(pages.clone(), CHUNK) {
                self.fewer(run.end - run.start);
                self.read(frame, chunk.block, run, self.last_sent(), Shipping::ship)?;
            }
            Ok(())
        })
    }
}
