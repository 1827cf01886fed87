//! Frames of pages on their way: filled, numbered, and counted until the destination has put them in place.
//!
//! Two things follow from the count. Not more is on its way than keeps the link busy, so that a switchover does not wait
//! for what was sent before it. And pages are not sent again before what was sent of them last is in place: frames of
//! different streams overtake each other, and an old page must not land on a newer one.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vmferry_link::{Buffer, Link, LinkDown, Pool};

use super::last_sent::LastSent;
use crate::delta::LONGEST;
use crate::memory::GuestRam;
use crate::wire::{Content, MOST_DATA, MOST_RUNS, MOST_TOLD, PAGES, Pages, Run};
use crate::{PAGE, zero};

/// Pages that are tracked and sent together: 2 MiB.
pub(super) const CHUNK: u64 = 512;
/// How much may be on its way, in bytes: at least, and at most. 40 Gbit/s over 20 ms, or 10 over 80.
const IN_FLIGHT: (u64, u64) = (4 << 20, 192 << 20);
/// How long what is on its way may take beyond the round trip.
const QUEUE: Duration = Duration::from_millis(25);
/// So much more than that, so that the link can turn out to be faster.
const HEADROOM: f64 = 1.5;
/// How long what is on its way may take beyond the round trip in post-copy: a guest that needs some of it waits for all
/// that was sent before. It is no less than the time until what was sent is known to be in place.
const QUEUE_IN_POST_COPY: Duration = Duration::from_millis(4);
/// The least that may be on its way then, in bytes.
const LEAST_IN_POST_COPY: u64 = 256 << 10;
/// How long a frame takes on the link then, as its first page is there only when its last one is.
const FRAME_IN_POST_COPY: Duration = Duration::from_micros(500);
/// The fewest pages in it.
const LEAST_FRAME: u64 = 8;
/// How often the link's rate is reckoned.
const SAMPLE: Duration = Duration::from_millis(100);
/// Weight of a new sample.
const WEIGHT: f64 = 0.3;

/// A frame that is being filled.
pub(super) struct Filling {
    buffer: Buffer,
    runs: Vec<Run>,
    /// Bytes of data.
    data: usize,
    /// Pages in it, whole or not.
    pages: u64,
    /// Pages that it tells of: these, and those of zeroes.
    told: u64,
    /// The most of those.
    most: u64,
    deltas: u64,
}

/// What the destination has of pages.
#[derive(Clone, Copy)]
pub(super) enum There<'a> {
    /// Zeroes: it need not be told of those.
    Zeroes,
    /// Whatever it is.
    Something,
    /// What was sent last; what that was may be known.
    LastSent(&'a LastSent),
}

/// Room for the longest head; the data begins after it, with a line of the processor's cache ([`Buffer`]s do, too): the
/// kernel takes up to four times as long to copy pages to anywhere else.
const HEAD: usize = (12 + MOST_RUNS * 16usize).next_multiple_of(64);
/// The most data in a frame, in bytes.
const DATA: usize = (MOST_DATA * PAGE) as usize;
/// The most pages in a frame that are not zero.
const MOST_PAGES: u64 = 512;

impl Filling {
    /// How many pages can be read into it.
    pub(super) fn room(&self) -> u64 {
        // Each page may turn out to be a run of its own, and whole.
        let runs = (MOST_RUNS - self.runs.len()) as u64;
        ((DATA - self.data) as u64 / PAGE).min(runs).min(MOST_PAGES - self.pages).min(self.most - self.told)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Reads these pages, of which there must be room for, from the guest's RAM. Pages of zeroes take no room.
    pub(super) fn read(&mut self, ram: &GuestRam, block: usize, pages: Range<u64>, there: There<'_>) -> io::Result<()> {
        assert!(pages.end - pages.start <= self.room(), "more pages than there is room for");
        let length = ((pages.end - pages.start) * PAGE) as usize;
        let begin = HEAD + self.data;
        ram.blocks()[block].read_at(pages.start * PAGE, &mut self.buffer.as_mut()[begin..begin + length])?;
        let found: Vec<_> = zero::runs(&self.buffer.as_mut()[begin..begin + length]).collect();
        for zero::Run { range, zero } in found {
            let [start, end] = [range.start, range.end].map(|at| pages.start + at as u64 / PAGE);
            match (zero, there) {
                (true, There::Zeroes) => {}
                (true, There::Something) => self.tell(block, start..end, Content::Zero),
                (true, There::LastSent(versions)) => {
                    (start..end).for_each(|page| versions.forget(block, page));
                    self.tell(block, start..end, Content::Zero);
                }
                (false, There::LastSent(versions)) => {
                    for (page, at) in (start..end).zip((begin + range.start..).step_by(PAGE as usize)) {
                        self.take_changes(block, page, at, versions);
                    }
                }
                (false, _) => self.take(block, start..end, begin + range.start),
            }
        }
        Ok(())
    }

    /// Keeps pages, which are here in the buffer, whole.
    fn take(&mut self, block: usize, pages: Range<u64>, at: usize) {
        let length = ((pages.end - pages.start) * PAGE) as usize;
        self.buffer.as_mut().copy_within(at..at + length, HEAD + self.data);
        self.data += length;
        self.pages += pages.end - pages.start;
        self.tell(block, pages, Content::Whole);
    }

    /// Keeps what has changed in a page, which is here in the buffer, if that is known and not too much.
    fn take_changes(&mut self, block: usize, page: u64, at: usize, versions: &LastSent) {
        // The guest may write meanwhile: what is here, and nothing else, is what is sent and remembered.
        let new = self.buffer.as_mut()[at..].first_chunk().expect("pages are whole");
        let mut delta = [0; LONGEST];
        let Some(length) = versions.encode(block, page, new, &mut delta) else {
            return self.take(block, page..page + 1, at);
        };
        let begin = HEAD + self.data;
        self.buffer.as_mut()[begin..begin + length].copy_from_slice(&delta[..length]);
        self.data += length;
        self.pages += 1;
        self.deltas += 1;
        self.tell(block, page..page + 1, Content::Delta);
    }

    fn tell(&mut self, block: usize, pages: Range<u64>, content: Content) {
        self.told += pages.end - pages.start;
        match self.runs.last_mut() {
            Some(last) if last.block == block && last.pages.end == pages.start && last.content == content => {
                last.pages.end = pages.end;
            }
            _ => self.runs.push(Run { block, pages, content }),
        }
    }

    fn finish(mut self, number: u64) -> Bytes {
        let head = Pages::head_length(self.runs.len());
        Pages::encode_head(number, &self.runs, &mut self.buffer.as_mut()[HEAD - head..HEAD]);
        self.buffer.freeze().slice(HEAD - head..HEAD + self.data)
    }
}

/// See the module's text.
pub(super) struct Shipping {
    link: Arc<Link>,
    pool: Arc<Pool>,
    sent: Mutex<Sent>,
    progress: Condvar,
}

struct Sent {
    /// The number of the next frame.
    next: u64,
    /// Everything up to this one is in place.
    placed: u64,
    /// What is on its way: numbers and bytes of data.
    on_the_way: VecDeque<(u64, u64)>,
    bytes: u64,
    /// The last frame that had pages of a chunk, by block and chunk.
    last: Vec<Vec<u64>>,
    /// The first frame of this pass.
    pass: u64,
    /// Each page goes once, and a guest may wait for it.
    in_post_copy: bool,
    /// Nothing can be sent any more.
    over: Option<LinkDown>,
    rate: Rate,
    /// How many were sent at all.
    pages: u64,
    /// How many of them as differences, and how many bytes that has saved.
    deltas: u64,
    saved: u64,
}

impl Shipping {
    /// For blocks of so many pages.
    pub(super) fn new(link: Arc<Link>, blocks: &[u64]) -> Self {
        let sent = Sent {
            next: 1,
            placed: 0,
            on_the_way: VecDeque::new(),
            bytes: 0,
            last: blocks.iter().map(|pages| vec![0; pages.div_ceil(CHUNK) as usize]).collect(),
            pass: 1,
            in_post_copy: false,
            over: None,
            rate: Rate::new(),
            pages: 0,
            deltas: 0,
            saved: 0,
        };
        Self { link, pool: Arc::default(), sent: Mutex::new(sent), progress: Condvar::new() }
    }

    pub(super) fn filling(&self) -> Filling {
        let most = {
            let sent = self.lock();
            if sent.in_post_copy { sent.rate.frame_in_post_copy() } else { MOST_TOLD }
        };
        let buffer = self.pool.take(HEAD + DATA);
        Filling { buffer, runs: Vec::with_capacity(MOST_RUNS), data: 0, pages: 0, told: 0, most, deltas: 0 }
    }

    /// Sends a frame over one of the bulk streams, as soon as it may go.
    pub(super) fn ship(&self, frame: Filling) -> Result<(), LinkDown> {
        if frame.is_empty() {
            return Ok(());
        }
        let mut sent = self.lock();
        loop {
            if let Some(down) = &sent.over {
                return Err(down.clone());
            }
            let has_room = sent.has_room();
            if has_room && !sent.would_overtake(&frame.runs) {
                break;
            }
            sent.rate.full |= !has_room;
            sent = self.progress.wait(sent).expect("no holder of this lock panics");
        }
        let number = sent.number(&frame);
        drop(sent);
        self.link.send(PAGES, frame.finish(number))
    }

    /// Sends a frame over the urgent stream, at once. Only where pages are sent once, as in post-copy.
    pub(super) fn ship_urgently(&self, frame: Filling) -> Result<(), LinkDown> {
        if frame.is_empty() {
            return Ok(());
        }
        let number = self.lock().number(&frame);
        self.link.send_urgent(PAGES, frame.finish(number))
    }

    /// From here on each page goes once, and a guest may wait for it.
    pub(super) fn begin_post_copy(&self) {
        self.lock().in_post_copy = true;
    }

    /// Pages that were sent before may be sent again from here on.
    pub(super) fn next_pass(&self) {
        let mut sent = self.lock();
        sent.pass = sent.next;
    }

    /// Everything up to this frame is in place. False for a number that makes no sense.
    #[must_use]
    pub(super) fn on_placed(&self, number: u64) -> bool {
        let round_trip = self.link.stats().round_trip.unwrap_or_default();
        let mut sent = self.lock();
        if number >= sent.next || number < sent.placed {
            return false;
        }
        sent.placed = number;
        let mut bytes = 0;
        while let Some((first, length)) = sent.on_the_way.front().copied()
            && first <= number
        {
            sent.on_the_way.pop_front();
            bytes += length;
        }
        sent.bytes -= bytes;
        let idle = sent.on_the_way.is_empty();
        sent.rate.on_placed(Instant::now(), bytes, round_trip, idle);
        drop(sent);
        self.progress.notify_all();
        true
    }

    /// Waits until everything that was sent is in place.
    pub(super) fn settle(&self) -> Result<(), LinkDown> {
        let mut sent = self.lock();
        loop {
            if let Some(down) = &sent.over {
                return Err(down.clone());
            }
            if sent.placed + 1 == sent.next {
                return Ok(());
            }
            sent = self.progress.wait(sent).expect("no holder of this lock panics");
        }
    }

    /// Nobody waits here any more.
    pub(super) fn end(&self, why: LinkDown) {
        self.lock().over.get_or_insert(why);
        self.progress.notify_all();
    }

    /// How many pages were sent, without those of zeroes.
    pub(super) fn pages(&self) -> u64 {
        self.lock().pages
    }

    /// How many of them as differences, and how many bytes that has saved.
    pub(super) fn deltas(&self) -> (u64, u64) {
        let sent = self.lock();
        (sent.deltas, sent.saved)
    }

    /// How many frames were sent.
    pub(super) fn frames(&self) -> u64 {
        self.lock().next - 1
    }

    /// How fast pages get into place while there are enough of them, in bytes a second; 0 when it is not known.
    pub(super) fn rate(&self) -> u64 {
        self.lock().rate.now as u64
    }

    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().expect("no holder of this lock panics")
    }
}

impl Sent {
    fn has_room(&self) -> bool {
        self.bytes < self.rate.in_flight(self.in_post_copy)
    }

    /// Some of these pages may be on their way since an earlier pass.
    fn would_overtake(&self, runs: &[Run]) -> bool {
        chunks(runs).any(|(block, chunk)| {
            let last = self.last[block][chunk];
            last < self.pass && last > self.placed
        })
    }

    fn number(&mut self, frame: &Filling) -> u64 {
        let number = self.next;
        self.next += 1;
        for (block, chunk) in chunks(&frame.runs) {
            self.last[block][chunk] = number;
        }
        let bytes = frame.data as u64;
        self.pages += frame.pages;
        self.deltas += frame.deltas;
        self.saved += frame.pages * PAGE - bytes;
        self.rate.thin |= frame.deltas > 0;
        self.on_the_way.push_back((number, bytes));
        self.bytes += bytes;
        number
    }
}

fn chunks(runs: &[Run]) -> impl Iterator<Item = (usize, usize)> + '_ {
    runs.iter().flat_map(|run| {
        let chunks = run.pages.start / CHUNK..run.pages.end.div_ceil(CHUNK);
        chunks.map(|chunk| (run.block, chunk as usize))
    })
}

/// How fast the link carries pages.
struct Rate {
    now: f64,
    /// The highest that it was.
    highest: f64,
    round_trip: Duration,
    since: Instant,
    bytes: u64,
    /// There was a moment in this sample in which nothing was on its way.
    idle: bool,
    /// There was one in which nothing more could be.
    full: bool,
    /// There were differences, which take more work than their length tells.
    thin: bool,
}

impl Rate {
    fn new() -> Self {
        Self {
            now: 0.0,
            highest: 0.0,
            round_trip: Duration::ZERO,
            since: Instant::now(),
            bytes: 0,
            idle: true,
            full: false,
            thin: false,
        }
    }

    fn on_placed(&mut self, now: Instant, bytes: u64, round_trip: Duration, idle: bool) {
        self.bytes += bytes;
        self.idle |= idle;
        self.round_trip = round_trip;
        let took = now.duration_since(self.since);
        if took < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / took.as_secs_f64();
        // A link that waits for us is at least that fast.
        self.now = match self.idle || self.thin && !self.full {
            true => self.now.max(sample),
            false if self.now == 0.0 => sample,
            false => self.now + WEIGHT * (sample - self.now),
        };
        self.highest = self.highest.max(self.now);
        (self.since, self.bytes, self.idle) = (now, 0, idle);
        (self.full, self.thin) = (false, false);
    }

    fn in_flight(&self, in_post_copy: bool) -> u64 {
        if in_post_copy && self.highest > 0.0 {
            // Of the highest rate: with so little on its way a link that seems slow would become so.
            let wanted = self.highest * (self.round_trip + QUEUE_IN_POST_COPY).as_secs_f64();
            return (wanted as u64).clamp(LEAST_IN_POST_COPY, IN_FLIGHT.1);
        }
        let wanted = self.now * (self.round_trip + QUEUE).as_secs_f64() * HEADROOM;
        (wanted as u64).clamp(IN_FLIGHT.0, IN_FLIGHT.1)
    }

    /// How many pages a frame has then, at most.
    fn frame_in_post_copy(&self) -> u64 {
        let pages = self.highest * FRAME_IN_POST_COPY.as_secs_f64() / PAGE as f64;
        (pages as u64).clamp(LEAST_FRAME, MOST_DATA)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link that has carried this much a second, over this round trip.
    fn rate(bytes: f64, round_trip: Duration) -> Rate {
        let mut rate = Rate::new();
        let begun = rate.since;
        for sample in 1..=20 {
            rate.on_placed(begun + SAMPLE * sample, (bytes * SAMPLE.as_secs_f64()) as u64, round_trip, false);
        }
        rate
    }

    #[test]
    fn in_post_copy_what_is_on_its_way_is_there_soon_and_keeps_the_link_busy() {
        for (bytes, round_trip) in [(125e6, 0.0002), (125e6, 0.04), (1.25e9, 0.0002), (1.25e9, 0.04)] {
            let rate = rate(bytes, Duration::from_secs_f64(round_trip));
            let took = rate.in_flight(true) as f64 / bytes;
            assert!((round_trip + 0.003..round_trip + 0.005).contains(&took), "{took} s at {bytes}");
            let frame = rate.frame_in_post_copy();
            assert!((frame * PAGE) as f64 / bytes <= 0.0005 && (15..=MOST_DATA).contains(&frame), "{frame} at {bytes}");
        }
    }

    #[test]
    fn a_link_that_seems_slow_as_little_is_on_its_way_is_not_made_slower() {
        let mut rate = rate(125e6, Duration::ZERO);
        let (before, mut now) = (rate.in_flight(true), rate.since);
        for _ in 0..20 {
            now += SAMPLE;
            rate.on_placed(now, 1 << 20, Duration::ZERO, false);
        }
        assert_eq!(rate.in_flight(true), before);
        let unknown = Rate::new();
        assert_eq!((unknown.in_flight(true), unknown.frame_in_post_copy()), (IN_FLIGHT.0, LEAST_FRAME));
    }

    #[test]
    fn a_frame_tells_of_few_pages_though_zeroes_take_no_room() {
        let ram = GuestRam::of_our_own(&[4 * MOST_TOLD * PAGE]);
        let buffer = Arc::<Pool>::default().take(HEAD + DATA);
        let mut frame = Filling { buffer, runs: Vec::new(), data: 0, pages: 0, told: 0, most: MOST_TOLD, deltas: 0 };
        let mut next = 0;
        while frame.room() > 0 {
            let end = next + frame.room();
            frame.read(&ram, 0, next..end, There::Something).unwrap();
            next = end;
        }
        assert_eq!((next, frame.runs.len()), (MOST_TOLD, 1));
    }
}
