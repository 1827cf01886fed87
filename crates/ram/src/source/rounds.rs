//! Pre-copy: all RAM once, then what was written since, until what is left is little.
//!
//! A look at all pages begins each round. It tells which were written since the last look, and protects them again, so
//! that the guest pays one fault for a page and round. Pages that one look after another finds written are hot: they
//! come last within a round, when a new look has not found them cold, since whatever is sent of them is stale soon.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::shipping::{CHUNK, Filling, Shipping, There};
use super::{Inner, Look, RamError, WriteLog, in_threads, workers};
use crate::PAGE;
use crate::pages::PageSet;

/// How many pages one thread looks at, at a time: 512 MiB.
const SPAN: u64 = 1 << 17;
/// Where memory is found that was not there before, so many pages are told apart.
const NEAR: u64 = 16;
/// How often all pages are looked at while there is enough to send: at most, and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));
/// Each page that was written since the last look has cost the guest a fault, of about a microsecond. It is to lose no
/// more than a tenth of its time by them.
const FAULT: Duration = Duration::from_micros(10);
/// How often it is looked in the first round how much is stale already, and how fast it became so.
const GLANCE: Duration = Duration::from_millis(150);
/// So many pages must have been sent for that: 32 MiB.
const TELLING: u64 = 8192;
/// So many of them are looked at each time, at most: 4 GiB, which takes one thread some milliseconds.
const GLANCED: u64 = 1 << 20;
/// How long the guest may take to be paused once it is time for it, and whoever decides that to say so.
const PAUSE: Duration = Duration::from_millis(500);

/// What looks have found, by block: pages that one after another finds written are hot.
struct Heat {
    /// Written at the last look.
    written: Vec<PageSet>,
    /// Written at the one before, too.
    hot: Vec<PageSet>,
}

impl Heat {
    fn new(blocks: &[PageSet]) -> Self {
        let none = || blocks.iter().map(|block| PageSet::new(block.pages())).collect();
        Self { written: none(), hot: none() }
    }

    /// A look at these pages found some written, and the others not.
    fn look(&self, span: &Span, written: &[Range<u64>]) {
        let (last, hot) = (&self.written[span.block], &self.hot[span.block]);
        let mut from = span.pages.start;
        for pages in written.iter().map(pages) {
            for set in [last, hot] {
                set.remove(from..pages.start);
            }
            from = pages.end;
            hot.copy(last, pages.clone());
            last.insert(pages);
        }
        for set in [last, hot] {
            set.remove(from..span.pages.end);
        }
    }
}

/// Which of the pages that are to be sent are sent.
#[derive(Clone, Copy)]
enum Which<'a> {
    All,
    /// Those that are not hot.
    Cold(&'a Heat),
}

/// What is known of a chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nothing of it was sent: it is all to be sent anyway.
    Untouched,
    /// It had no memory when its turn came.
    Empty,
    /// It is protected, or was when it was sent.
    Tracked,
}

/// The whole pages of a range of bytes.
fn pages(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / PAGE..bytes.end / PAGE
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
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
        let heat = Heat::new(&self.pending);
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
            chunks.iter().try_for_each(|chunk| self.begin_chunk(*chunk).map(drop))?;
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
            let which = if paced { Which::All } else { Which::Cold(&heat) };
            let left = self.recount();
            let dirty_rate = rate_of(written, since);
            let rate = self.shipping.rate();
            let spared = self.last_sent.judge(&self.ram, &self.pending, left, rate).map_err(RamError::io)?;
            let time = self.time_for(left).map(|time| time.mul_f64(1.0 - spared));
            let takes = |state: &super::State, most: fn(&super::State) -> Duration| {
                !most(state).is_zero() && (left == 0 || time.is_some_and(|time| time <= most(state)))
            };
            {
                let mut state = self.lock();
                state.round += 1;
                state.dirty_rate = dirty_rate;
                state.spared = spared;
                state.look = Some(Look { interval: since, left: left * PAGE });
                if takes(&state, |state| state.asks_within) {
                    // What is sent before the word comes would only be in the way of the last pages.
                    state.asks = true;
                    self.news.notify_all();
                    let waiting = |state: &mut super::State| state.asks && !self.is_stopped();
                    (state, _) =
                        self.news.wait_timeout_while(state, PAUSE, waiting).expect("no holder of this lock panics");
                    state.asks = false;
                }
                if takes(&state, |state| state.allowed) {
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
            self.each_chunk(&chunks, true, |chunk, frame| self.again(chunk, frame, which))?;
            let next_look = FAULT.mul_f64(written as f64).clamp(LOOK.0, LOOK.1);
            if looked.elapsed() < next_look && !self.is_stopped() {
                self.each_chunk(&chunks, true, |chunk, frame| match looked.elapsed() < next_look {
                    true => self.again(chunk, frame, Which::All),
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
        let (spans, found_pages): (Vec<Span>, _) = (spans.collect(), AtomicU64::new(0));
        let next = AtomicUsize::new(0);
        let look = || {
            let mut runs = Vec::new();
            while let Some(span) = spans.get(next.fetch_add(1, Ordering::Relaxed)) {
                runs.clear();
                self.written(span.block, span.pages.clone(), protect, &mut runs)?;
                for run in &runs {
                    let new = self.pending[span.block].insert(run.start / PAGE..run.end / PAGE);
                    let count = if protect { (run.end - run.start) / PAGE } else { new };
                    found_pages.fetch_add(count, Ordering::Relaxed);
                }
                found(span, &runs);
            }
            Ok(())
        };
        in_threads(workers().min(spans.len()), look)?;
        Ok(found_pages.into_inner())
    }

    /// Looks which pages were written, and leaves them as they are. Gives back how many were not to be sent before.
    pub(super) fn look_on(&self) -> Result<u64, RamError> {
        self.look(false, |_, _| ())
    }

    /// These pages, which begin with a chunk, in parts of which the same is known.
    fn parts(&self, block: usize, pages: Range<u64>) -> impl Iterator<Item = (Known, Range<u64>)> + '_ {
        let (mut chunk, end) = (pages.start / CHUNK, pages.end.div_ceil(CHUNK));
        std::iter::from_fn(move || {
            let first = (chunk < end).then_some(chunk)?;
            let next = |set: &PageSet| set.next_run(first..end).unwrap_or(end..end);
            let (untouched, empty) = (next(&self.untouched[block]), next(&self.empty[block]));
            let (known, part_end) = match () {
                () if untouched.start == first => (Known::Untouched, untouched.end),
                () if empty.start == first => (Known::Empty, empty.end.min(untouched.start)),
                () => (Known::Tracked, untouched.start.min(empty.start)),
            };
            chunk = part_end;
            Some((known, first * CHUNK..(part_end * CHUNK).min(pages.end)))
        })
    }

    /// Adds which of these pages, in bytes, were written since they were protected, or may have been before they were.
    /// They begin with a chunk.
    pub(super) fn written(
        &self,
        block: usize,
        pages: Range<u64>,
        protect: bool,
        out: &mut Vec<Range<u64>>,
    ) -> Result<(), RamError> {
        for (known, part) in self.parts(block, pages) {
            match known {
                Known::Tracked => self.tracked(|log| match protect {
                    true => log.take_written(block, bytes(&part), out),
                    false => log.written(block, bytes(&part), out),
                })?,
                Known::Empty => self.filled(block, part, protect, out)?,
                Known::Untouched => self.untold(block, part, out)?,
            }
        }
        Ok(())
    }

    /// Adds what of these pages, of which nothing was sent and which are not protected, has memory and is not to be sent so
    /// far, as it had none.
    fn untold(&self, block: usize, mut part: Range<u64>, out: &mut Vec<Range<u64>>) -> Result<(), RamError> {
        let (ram, pending) = (&self.ram.blocks()[block], &self.pending[block]);
        while let Some(first) = ram.first_data(bytes(&part)).map_err(RamError::io)? {
            let chunk = self.pages_of(Chunk { block, index: first / PAGE / CHUNK });
            let mut from = first / PAGE;
            while from < chunk.end {
                let known = pending.next_run(from..chunk.end).unwrap_or(chunk.end..chunk.end);
                if from < known.start {
                    let new = ram.first_data(bytes(&(from..known.start))).map_err(RamError::io)?;
                    out.extend(new.map(|new| new..known.start * PAGE));
                }
                from = known.end;
            }
            part.start = chunk.end.min(part.end);
        }
        Ok(())
    }

    /// Adds what of these pages, which had no memory, has some now, or is near such. When they are to be protected, their
    /// chunks are, and count as tracked.
    fn filled(
        &self,
        block: usize,
        mut part: Range<u64>,
        protect: bool,
        out: &mut Vec<Range<u64>>,
    ) -> Result<(), RamError> {
        let ram = &self.ram.blocks()[block];
        while let Some(first) = ram.first_data(bytes(&part)).map_err(RamError::io)? {
            let index = first / PAGE / CHUNK;
            let chunk = self.pages_of(Chunk { block, index });
            if protect {
                self.tracked(|log| log.protect(block, bytes(&chunk)))?;
                self.empty[block].remove(index..index + 1);
            }
            // After it is protected, as it may have more by then.
            for from in chunk.clone().step_by(NEAR as usize) {
                let near = from..(from + NEAR).min(chunk.end);
                let first = ram.first_data(bytes(&near)).map_err(RamError::io)?;
                out.extend(first.map(|first| first..near.end * PAGE));
            }
            part.start = chunk.end.min(part.end);
        }
        Ok(())
    }

    /// Those of these pages, in bytes, that are not known to have had no memory. They begin with a chunk.
    pub(super) fn not_empty(&self, block: usize, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let (mut chunk, end) = (pages.start / CHUNK, pages.end.div_ceil(CHUNK));
        let parts = std::iter::from_fn(move || {
            let first = (chunk < end).then_some(chunk)?;
            let empty = self.empty[block].next_run(first..end).unwrap_or(end..end);
            chunk = empty.end;
            Some(bytes(&(first * CHUNK..(empty.start * CHUNK).min(pages.end))))
        });
        parts.filter(|part| !part.is_empty())
    }

    /// Those of these pages, in bytes, that are protected or were when they were sent. They begin with a chunk.
    pub(super) fn sent_once(&self, block: usize, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let tracked = |(known, part): (Known, Range<u64>)| (known == Known::Tracked).then(|| bytes(&part));
        self.parts(block, pages).filter_map(tracked)
    }

    /// Finds out how much of what the first round has sent is stale already, and how fast it became so. Of a large guest
    /// a part is looked at, the next part at the next time.
    pub(super) fn glance(&self) -> Result<(), RamError> {
        let blocks = self.pending.iter().enumerate();
        let sent_once: Vec<(usize, Range<u64>)> = blocks
            .flat_map(|(block, set)| self.sent_once(block, 0..set.pages()).map(move |bytes| (block, pages(&bytes))))
            .collect();
        let all: u64 = sent_once.iter().map(|(_, pages)| pages.end - pages.start).sum();
        let (mut skip, mut left) = (self.glanced.load(Ordering::Relaxed) % all.max(1), all.min(GLANCED));
        self.glanced.fetch_add(left, Ordering::Relaxed);
        let (mut runs, looked) = (Vec::new(), left);
        // Around once: what is skipped at the beginning comes at the end.
        for (block, part) in sent_once.iter().chain(&sent_once) {
            let skipped = skip.min(part.end - part.start);
            skip -= skipped;
            let from = part.start + skipped;
            let part = from..part.end.min(from + left);
            left -= part.end - part.start;
            if !part.is_empty() {
                self.tracked(|log| log.written(*block, bytes(&part), &mut runs))?;
            }
        }
        let found: u64 = runs.iter().map(|run| (run.end - run.start) / PAGE).sum();
        let rewritten = (found as f64 * all as f64 / looked.max(1) as f64) as u64;
        let sent = self.shipping.pages();
        let mut state = self.lock();
        if let Some(began) = state.first_round_began {
            state.dirty_rate = rate_of(rewritten, began.elapsed());
        }
        if sent >= TELLING {
            state.stale = rewritten.min(sent) * PAGE;
        }
        Ok(())
    }

    /// From here on what is written to a chunk of which nothing was sent is seen. False when there is no memory in it, and
    /// so nothing to send.
    fn begin_chunk(&self, chunk: Chunk) -> Result<bool, RamError> {
        let pages = self.pages_of(chunk);
        let has_data = || self.ram.blocks()[chunk.block].first_data(bytes(&pages)).map_err(RamError::io);
        if has_data()?.is_none() {
            self.empty[chunk.block].insert(chunk.index..chunk.index + 1);
            return Ok(false);
        }
        self.tracked(|log| log.protect(chunk.block, bytes(&pages)))?;
        Ok(true)
    }

    /// Nothing was sent of it yet.
    fn first_time(&self, chunk: Chunk, frame: &mut Filling) -> Result<(), RamError> {
        let pages = self.pages_of(chunk);
        let has_memory = match self.drain {
            Some(_) => !self.empty[chunk.block].contains(chunk.index),
            None => self.begin_chunk(chunk)?,
        };
        self.untouched[chunk.block].remove(chunk.index..chunk.index + 1);
        self.fewer(self.pending[chunk.block].remove(pages.clone()));
        if !has_memory {
            return Ok(());
        }
        // After it is protected, as there may be more by then.
        match self.ram.blocks()[chunk.block].first_data(bytes(&pages)).map_err(RamError::io)? {
            // The destination's RAM is all zero when it is new: holes and zeroes are not told.
            Some(data) => self.read(frame, chunk.block, data / PAGE..pages.end, There::Zeroes, Shipping::ship),
            None => Ok(()),
        }
    }

    /// Sends of it what is to be sent.
    fn again(&self, chunk: Chunk, frame: &mut Filling, which: Which<'_>) -> Result<(), RamError> {
        let pages = self.pages_of(chunk);
        let pending = &self.pending[chunk.block];
        if self.next_run(chunk.block, pages.clone(), which).is_none() {
            return Ok(());
        }
        // What a disk may still be writing is not protected and read at once: it is as the round's scan has left it.
        if self.drain.is_none() {
            let mut written = Vec::new();
            self.written(chunk.block, pages.clone(), true, &mut written)?;
            self.more(chunk.block, written);
        }
        let mut from = pages.start;
        while let Some(run) = self.next_run(chunk.block, from..pages.end, which) {
            from = run.end;
            self.fewer(pending.remove(run.clone()));
            self.read(frame, chunk.block, run, self.last_sent(), Shipping::ship)?;
        }
        Ok(())
    }

    /// The first run of pages that are to be sent, within these.
    fn next_run(&self, block: usize, within: Range<u64>, which: Which<'_>) -> Option<Range<u64>> {
        let mut from = within.start;
        while let Some(run) = self.pending[block].next_run(from..within.end) {
            let Which::Cold(heat) = which else { return Some(run) };
            let hot = heat.hot[block].next_run(run.clone()).unwrap_or(run.end..run.end);
            if hot.start > run.start {
                return Some(run.start..hot.start);
            }
            from = hot.end;
        }
        None
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

    /// What was never sent and has never been written is zero at the destination too.
    pub(super) fn forget_holes(&self) -> Result<(), RamError> {
        for (block, untouched) in self.untouched.iter().enumerate() {
            let (set, mut next) = (&self.pending[block], 0);
            while let Some(run) = untouched.next_run(next..untouched.pages()) {
                next = run.end;
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
