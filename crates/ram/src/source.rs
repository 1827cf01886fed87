//! The source's side: a guest's RAM leaves while the guest writes to it.
//!
//! In pre-copy ([`rounds`]) all RAM is sent once and then, round by round, what was written meanwhile. A page is
//! protected before it is read: a write that comes later is seen by the next look, so that what was read is either
//! still true or will be sent again.
//!
//! A disk that goes around the host's cache (`O_DIRECT`) writes into pages some time after the kernel took them to be
//! written. Where there is one, its I/O is drained between protecting pages and reading them ([`Drain`]): what was under
//! way when a page was protected is over when that is read, and what began later is seen by the next look.
//!
//! When the guest is paused, either the rest is sent ([`Source::finish`]), or the destination is told what it does not
//! have and fetches it ([`Source::post_copy`], [`serving`]).
//!
//! In post-copy the source is a server with nothing to remember: its guest's RAM does not change any more, and the
//! destination knows what it misses. So a new agent, or a new link, goes on by asking ([`Source::resume`]).

mod last_sent;
mod pacing;
mod rounds;
mod serving;
mod shipping;
#[cfg(test)]
mod tebibyte;

use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_link::{Link, LinkDown, LinkStats};

use crate::PAGE;
use crate::RamError;
use crate::memory::{Block, GuestRam};
use crate::pages::PageSet;
use crate::tracking::{Tracking, TrackingError, WriteFaults};
use crate::wire::{
    ARM, FaultTimes, HELLO, Hello, MISSING, PUNCH, STATE, STATE_EARLY, STATE_END, STATE_GO, decode_missing,
    encode_missing,
};
use last_sent::LastSent;
use pacing::Pacing;
use shipping::{CHUNK, Filling, Shipping, There};

/// How long the destination may say nothing while it looks at what RAM it has, takes away what is stale, or arms it.
const ANSWER: Duration = Duration::from_secs(30);
/// How much of the device state is sent at once, in bytes.
const STATE_PIECE: usize = 64 << 10;
/// So few stale pages are taken away in some milliseconds, one here and one there.
const FEW_STALE: u64 = 512;
/// More threads than these are not needed to keep a link busy.
const MOST_WORKERS: usize = 8;

/// Waits until all I/O of the guest's disks is over that is under way; more may begin meanwhile.
pub type Drain = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Tells which pages a guest writes. Bytes of a block, whole pages.
pub(crate) trait WriteLog: Send + Sync {
    /// Writes to these are noticed from now on.
    fn protect(&self, block: usize, bytes: Range<u64>) -> io::Result<()>;

    /// Which of these were written since they were protected. They stay as they are.
    fn written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()>;

    /// Which of these were written since they were protected; they are protected again.
    fn take_written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()>;

    /// See [`Tracking::prepare_pacing`].
    fn prepare_pacing(&mut self, ram: &GuestRam) -> Result<WriteFaults, TrackingError>;

    /// See [`Tracking::pace`].
    fn pace(&mut self, block: usize, bytes: Range<u64>) -> io::Result<()>;
}

impl WriteLog for Tracking {
    fn protect(&self, block: usize, bytes: Range<u64>) -> io::Result<()> {
        Tracking::protect(self, block, bytes)
    }

    fn written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        Tracking::written(self, block, bytes, out)
    }

    fn take_written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        Tracking::take_written(self, block, bytes, out)
    }

    fn prepare_pacing(&mut self, ram: &GuestRam) -> Result<WriteFaults, TrackingError> {
        Tracking::prepare_pacing(self, ram)
    }

    fn pace(&mut self, block: usize, bytes: Range<u64>) -> io::Result<()> {
        Tracking::pace(self, block, bytes)
    }
}

/// What a look at all pages has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Since the one before, or since the first page was sent.
    pub interval: Duration,
    /// What was to be sent then, in bytes.
    pub left: u64,
}

/// How sending stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The round of pre-copy, from 1.
    pub round: u32,
    /// What is still to be sent, in bytes; in the first round pages of zeroes count.
    pub remaining: u64,
    /// The guest's RAM, in bytes.
    pub total: u64,
    /// How much of what the first round has sent the guest has written again, as of lately, in bytes; 0 while too little
    /// was sent to tell.
    pub stale: u64,
    /// The look that began this round; none in the first one.
    pub look: Option<Look>,
    /// How fast the guest made pages stale during the last round, in bytes a second; in the first one, those that it
    /// has sent, as of lately. A page counts once a round, so a guest that rewrites the same pages writes faster.
    pub dirty_rate: u64,
    /// How fast the link carries pages, in bytes a second of what remains, part of which may go as differences; 0 when
    /// that is not known yet.
    pub link_rate: u64,
    /// How much of their time the guest's processors waited lately as their writes are paced, in percent.
    pub slowed: u8,
    /// How many pages went as differences from what was sent before.
    pub deltas: u64,
    /// How many bytes that has saved.
    pub saved: u64,
    /// What is left can be sent within what is allowed ([`Source::allow`]): pause the guest now.
    pub converged: bool,
    /// The destination has all RAM.
    pub complete: bool,
    /// How long the guest waited for pages there, when it has them all by post-copy.
    pub fault_times: Option<FaultTimes>,
}

/// See the module's text. Dropping it ends tracking and gives the link up.
pub struct Source {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    link: Arc<Link>,
    ram: GuestRam,
    /// None in post-copy that is resumed, and when tracking has ended.
    log: RwLock<Option<Box<dyn WriteLog>>>,
    /// Where something writes into pages after they count as written.
    drain: Option<Drain>,
    resumed: bool,
    shipping: Shipping,
    pacing: Pacing,
    last_sent: LastSent,
    /// What the destination does not have, as far as it is known.
    pending: Vec<PageSet>,
    /// What of that it was told before the guest was paused.
    told: Mutex<Vec<PageSet>>,
    /// Chunks of which nothing was sent yet, by their number in the block.
    untouched: Vec<PageSet>,
    /// Chunks in which there was no memory when their turn came, by their number in the block. They are zero at both sides,
    /// and not protected: that would take page tables. If there is memory later, the guest has written.
    empty: Vec<PageSet>,
    /// Where the next glance begins, in pages of what was sent.
    glanced: AtomicU64,
    remaining: AtomicU64,
    /// The guest is paused, or nobody wants the copy any more: no more rounds.
    stop: AtomicBool,
    state: Mutex<State>,
    news: Condvar,
}

/// What the destination may say depends on it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    PreCopy,
    /// The destination was told to take away what is stale.
    Punching,
    /// The destination was told to take faults.
    Arming,
    /// It does.
    PostCopy,
}

#[derive(Default)]
struct State {
    round: u32,
    first_round_began: Option<Instant>,
    /// The last one that somebody who waits was told of.
    seen_round: u32,
    dirty_rate: u64,
    look: Option<Look>,
    /// Pages that are left may take so long while the guest stands.
    allowed: Duration,
    /// A round whose pages would take no longer waits for a word of whoever decides.
    asks_within: Duration,
    /// It does now.
    asks: bool,
    /// Which share of what this round had to send need not be, as differences are shorter.
    spared: f64,
    stale: u64,
    converged: bool,
    rounds_ended: bool,
    ready: bool,
    phase: Phase,
    complete: bool,
    fault_times: Option<FaultTimes>,
    /// When the destination said last that it is at what it was asked for.
    busy: Option<Instant>,
    /// Where post-copy sends from next: block and page.
    cursor: (usize, u64),
    /// When a fault was told of last, or the guest was let go.
    wanted: Option<Instant>,
    /// For how long nothing else was sent because of faults.
    quiet: Duration,
    failed: Option<RamError>,
}

impl Source {
    /// Begins to send the RAM of a guest, which may run. Its pages are tracked from here until this is dropped. It says that
    /// it has converged when the rest takes no longer than `allowed`, which may be changed ([`Source::allow`]). With `delta_cache` bytes of memory it
    /// remembers what it has sent, so that pages that have changed a little go as differences. Guests whose disks go
    /// around the host's cache need a `drain`. Fails when the destination's RAM is another one.
    pub fn begin(
        ram: GuestRam,
        link: Link,
        allowed: Duration,
        delta_cache: u64,
        drain: Option<Drain>,
    ) -> Result<Self, RamError> {
        let log: Box<dyn WriteLog> = Box::new(Tracking::begin(&ram)?);
        Self::begin_with(ram, Some(log), link, allowed, delta_cache, drain)
    }

    /// From now on this much is sent at most, in bytes a second.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.inner.link.set_rate(rate);
    }

    /// Post-copy goes on over a new link; the guest stays paused.
    pub fn resume(ram: GuestRam, link: Link) -> Result<Self, RamError> {
        Self::begin_with(ram, None, link, Duration::ZERO, 0, None)
    }

    pub(crate) fn begin_with(
        ram: GuestRam,
        log: Option<Box<dyn WriteLog>>,
        link: Link,
        allowed: Duration,
        delta_cache: u64,
        drain: Option<Drain>,
    ) -> Result<Self, RamError> {
        let link = Arc::new(link);
        let blocks: Vec<u64> = ram.blocks().iter().map(|block| block.size() / PAGE).collect();
        let resume = log.is_none();
        let phase = if resume { Phase::PostCopy } else { Phase::PreCopy };
        let inner = Arc::new(Inner {
            shipping: Shipping::new(Arc::clone(&link), &blocks),
            last_sent: LastSent::new(delta_cache),
            pending: no_pages(&blocks),
            told: Mutex::new(no_pages(&blocks)),
            untouched: blocks.iter().map(|pages| PageSet::new(pages.div_ceil(CHUNK))).collect(),
            empty: blocks.iter().map(|pages| PageSet::new(pages.div_ceil(CHUNK))).collect(),
            glanced: AtomicU64::new(0),
            remaining: AtomicU64::new(blocks.iter().sum()),
            link,
            ram,
            log: RwLock::new(log),
            drain,
            resumed: resume,
            pacing: Pacing::default(),
            stop: AtomicBool::new(false),
            state: Mutex::new(State { allowed, phase, ..State::default() }),
            news: Condvar::new(),
        });
        let source = Self { inner, threads: Mutex::default() };
        source.spawn("ram-urgent", Inner::listen)?;
        let blocks = source.inner.ram.blocks().iter().map(|block| (block.id().to_owned(), block.size())).collect();
        source.inner.link.send_urgent(HELLO, Hello { resume, blocks }.encode())?;
        source.inner.wait_for(|state| state.ready)?;
        match resume {
            true => {
                source.inner.shipping.begin_post_copy();
                source.spawn_pushing()?;
            }
            false => source.spawn("ram-rounds", |inner| {
                inner.rounds();
                Ok(())
            })?,
        }
        Ok(source)
    }

    /// From here on it has converged at the first look that leaves no more than takes so long to send.
    pub fn allow(&self, pause: Duration) {
        let mut state = self.inner.lock();
        state.allowed = pause;
        // What was allowed before is taken back.
        state.converged &= !pause.is_zero();
    }

    /// From here on a look that leaves no more than takes so long to send is waited with for a word of whoever watches
    /// ([`Source::answer`]), at most half a second.
    pub fn ask_within(&self, pause: Duration) {
        self.inner.lock().asks_within = pause;
    }

    /// Whoever watches has seen the look that began this round, and has said what it had to say.
    pub fn answer(&self, round: u32) {
        let mut state = self.inner.lock();
        if state.asks && state.round <= round {
            state.asks = false;
            self.inner.news.notify_all();
        }
    }

    /// Waits for news, at most so long.
    pub fn wait(&self, at_most: Duration) -> Result<Progress, RamError> {
        let inner = &self.inner;
        let state = inner.lock();
        let quiet = |state: &mut State| {
            let same_round = state.round == std::mem::replace(&mut state.seen_round, state.round);
            same_round && state.failed.is_none() && !state.converged && !state.complete
        };
        let (state, _) = inner.news.wait_timeout_while(state, at_most, quiet).expect("no holder of this lock panics");
        if let Some(error) = state.failed.as_ref().filter(|_| !state.complete) {
            return Err(error.clone());
        }
        let (deltas, saved) = inner.shipping.deltas();
        Ok(Progress {
            round: state.round,
            remaining: inner.remaining.load(Ordering::Relaxed) * PAGE,
            total: inner.ram.blocks().iter().map(Block::size).sum(),
            stale: state.stale,
            look: state.look,
            dirty_rate: state.dirty_rate,
            link_rate: (inner.shipping.rate() as f64 / (1.0 - state.spared)) as u64,
            slowed: inner.pacing.slowed(),
            deltas,
            saved,
            converged: state.converged,
            complete: state.complete,
            fault_times: state.fault_times,
        })
    }

    /// Sends what is left, of a guest that is paused for good: after this the destination has all RAM.
    pub fn finish(&self) -> Result<(), RamError> {
        self.inner.end_rounds()?;
        self.inner.forget_holes()?;
        self.inner.look_on()?;
        self.inner.recount();
        self.inner.send_rest()?;
        self.inner.shipping.settle()?;
        self.inner.let_state_go()?;
        self.inner.lock().complete = true;
        Ok(())
    }

    /// Has the destination take away what is stale, while the guest still runs: there is less to do then when it is
    /// paused. Nothing is sent any more before [`Source::post_copy`].
    pub fn prepare_post_copy(&self) -> Result<(), RamError> {
        let inner = &self.inner;
        inner.end_rounds()?;
        inner.shipping.settle()?;
        if inner.lock().round == 1 {
            // The last time that it can be seen how fast this guest writes.
            inner.glance()?;
        }
        inner.forget_holes()?;
        let mut before = u64::MAX;
        loop {
            inner.look_on()?;
            let stale = inner.tell_missing()?;
            inner.lock().phase = Phase::Punching;
            inner.link.send_urgent(PUNCH, Vec::new())?;
            inner.wait_for(|state| state.phase == Phase::PreCopy)?;
            // What became stale meanwhile is less each time, unless the guest is faster than that.
            if stale <= FEW_STALE || stale > before / 2 {
                return Ok(());
            }
            before = stale;
        }
    }

    /// Tells the destination what it does not have, of a guest that is paused for good: after this the guest may run
    /// there, and what it misses follows.
    pub fn post_copy(&self) -> Result<(), RamError> {
        let inner = &self.inner;
        inner.end_rounds()?;
        inner.look_on()?;
        inner.tell_missing()?;
        inner.recount();
        {
            let mut state = inner.lock();
            // From here on each page goes once, and whole.
            (state.phase, state.spared) = (Phase::Arming, 0.0);
        }
        inner.link.send_urgent(ARM, inner.shipping.frames().to_le_bytes().to_vec())?;
        inner.wait_for(|state| state.phase == Phase::PostCopy)?;
        // One page after the other, as somebody may wait for one of them already.
        inner.shipping.begin_post_copy();
        inner.send_first_pages()?;
        inner.lock().wanted = Some(Instant::now());
        inner.let_state_go()?;
        self.spawn_pushing()
    }

    /// Sends the device state, as QEMU writes it, to its end. Gives back how many bytes that were. The destination's QEMU
    /// gets it when [`Source::finish`] or [`Source::post_copy`] have done their part: it looks into the RAM. What is read
    /// before `is_due` is no device's, and the destination's QEMU gets it at once.
    pub fn send_state(&self, mut from: impl Read, is_due: &AtomicBool) -> Result<u64, RamError> {
        let mut sent = 0;
        loop {
            let mut piece = vec![0; STATE_PIECE];
            let length = match from.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(RamError::device_state(error)),
            };
            piece.truncate(length);
            let kind = if is_due.load(Ordering::Acquire) { STATE } else { STATE_EARLY };
            self.inner.link.send_urgent(kind, piece)?;
            sent += length as u64;
        }
        self.inner.link.send_urgent(STATE_END, Vec::new())?;
        Ok(sent)
    }

    /// What the link did.
    pub fn link_stats(&self) -> LinkStats {
        self.inner.link.stats()
    }

    #[cfg(test)]
    pub(crate) fn takes_all_pages_for_deltas(&self) -> bool {
        self.inner.last_sent.is_on()
    }

    /// Ends the link in order, when all RAM is there: waits until the destination has taken all that was said.
    pub fn close(&self) -> Result<(), RamError> {
        Ok(self.inner.link.close()?)
    }

    /// Stops at once, whatever else is under way, and leaves nothing in the guest.
    pub fn abandon(&self) {
        let inner = &self.inner;
        // Writers that wait go first, and those that still meet protection go at once until there is none.
        inner.pacing.lift();
        inner.stop();
        inner.link.give_up();
        inner.fail(RamError::Link(LinkDown::GivenUp));
        drop(inner.log.write().expect("no holder of this lock panics").take());
        inner.pacing.end();
        let threads = std::mem::take(&mut *self.threads.lock().expect("no holder of this lock panics"));
        for thread in threads {
            // What it had to say is in the state.
            let _ = thread.join();
        }
    }

    fn spawn_pushing(&self) -> Result<(), RamError> {
        for _ in 0..workers() {
            self.spawn("ram-push", Inner::push)?;
        }
        Ok(())
    }

    fn spawn(
        &self,
        name: &str,
        run: impl FnOnce(&Inner) -> Result<(), RamError> + Send + 'static,
    ) -> Result<(), RamError> {
        let inner = Arc::clone(&self.inner);
        let body = move || {
            if let Err(error) = run(&inner) {
                inner.fail(error);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(body).map_err(RamError::thread)?;
        self.threads.lock().expect("no holder of this lock panics").push(thread);
        Ok(())
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// A set without a page for each of these blocks.
fn no_pages(blocks: &[u64]) -> Vec<PageSet> {
    blocks.iter().map(|pages| PageSet::new(*pages)).collect()
}

/// How many threads read RAM.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).clamp(1, MOST_WORKERS)
}

/// Has so many threads, of which the caller's is one, do the same.
fn in_threads(count: usize, work: impl Fn() -> Result<(), RamError> + Sync) -> Result<(), RamError> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..count).map(|_| scope.spawn(&work)).collect();
        let result = work();
        threads.into_iter().fold(result, |result, thread| result.and(thread.join().expect("moving RAM does not panic")))
    })
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    fn fail(&self, error: RamError) {
        let down = match &error {
            RamError::Link(down) => down.clone(),
            _ => LinkDown::GivenUp,
        };
        self.lock().failed.get_or_insert(error);
        self.shipping.end(down);
        self.news.notify_all();
    }

    /// Waits for an answer of the destination.
    fn wait_for(&self, answered: impl Fn(&State) -> bool) -> Result<(), RamError> {
        let (mut state, mut heard) = (self.lock(), Instant::now());
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if answered(&state) {
                return Ok(());
            }
            heard = state.busy.map_or(heard, |busy| busy.max(heard));
            let left = ANSWER.saturating_sub(heard.elapsed());
            if left.is_zero() {
                return Err(RamError::NoAnswer { after: ANSWER });
            }
            state = self.news.wait_timeout(state, left).expect("no holder of this lock panics").0;
        }
    }

    /// Has the rounds end, and waits for it.
    fn end_rounds(&self) -> Result<(), RamError> {
        self.stop();
        self.wait_for(|state| state.rounds_ended)
    }

    /// No more rounds.
    fn stop(&self) {
        // Whoever is about to wait for this holds the lock.
        let state = self.lock();
        self.stop.store(true, Ordering::Relaxed);
        drop(state);
        self.news.notify_all();
    }

    /// What was written in a block, in bytes, is to be sent.
    fn more(&self, block: usize, written: Vec<Range<u64>>) {
        for run in written {
            let new = self.pending[block].insert(run.start / PAGE..run.end / PAGE);
            self.remaining.fetch_add(new, Ordering::Relaxed);
        }
    }

    /// So many pages are not to be sent any more. More may be, while they are counted anew.
    fn fewer(&self, pages: u64) {
        let less = |remaining: u64| Some(remaining.saturating_sub(pages));
        let _ = self.remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Counts what is to be sent anew.
    fn recount(&self) -> u64 {
        let left = self.pending.iter().map(PageSet::len).sum();
        self.remaining.store(left, Ordering::Relaxed);
        left
    }

    /// Reads pages into frames, and has each that is full sent.
    fn read(
        &self,
        frame: &mut Filling,
        block: usize,
        mut pages: Range<u64>,
        there: There<'_>,
        ship: fn(&Shipping, Filling) -> Result<(), LinkDown>,
    ) -> Result<(), RamError> {
        while !pages.is_empty() {
            let room = frame.room();
            if room == 0 {
                ship(&self.shipping, std::mem::replace(frame, self.shipping.filling()))?;
                continue;
            }
            let end = pages.end.min(pages.start + room);
            frame.read(&self.ram, block, pages.start..end, there).map_err(RamError::io)?;
            pages.start = end;
        }
        Ok(())
    }

    /// What the destination was not told yet: with the guest paused that is little. Gives back how many pages that are.
    fn tell_missing(&self) -> Result<u64, RamError> {
        let told = self.told.lock().expect("no holder of this lock panics");
        let mut new = 0;
        for frame in encode_missing(&self.pending, &told) {
            self.link.send_urgent(MISSING, frame.clone())?;
            new += decode_missing(&frame, &told)?;
        }
        Ok(new)
    }

    /// The destination's QEMU may look into the RAM.
    fn let_state_go(&self) -> Result<(), RamError> {
        Ok(self.link.send_urgent(STATE_GO, Vec::new())?)
    }
}
