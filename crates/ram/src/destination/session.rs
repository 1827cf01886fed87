//! One link's worth of arrival: several threads take what comes and put it into place.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vmferry_link::{Frame, Link, LinkDown};

use super::faults::Windows;
use super::landing::Landing;
use super::waits::Waits;
use crate::PAGE;
use crate::RamError;
use crate::pages::PageSet;
use crate::wire::{
    ARM, ARMED, BUSY, COMPLETE, HELLO, Hello, MISSING, Malformed, PAGES, PLACED, PUNCH, PUNCHED, Pages, READY, REFUSED,
    STATE, STATE_EARLY, STATE_END, STATE_GO, WANT, Want, decode_missing, decode_number, encode_missing,
};

/// Threads that put bulk frames into place.
const WORKERS: usize = 2;
/// What is in place is told no more often than this.
const TELL_EVERY: Duration = Duration::from_millis(1);
/// How long frames that were sent before post-copy may take.
const STRAGGLERS: Duration = Duration::from_secs(30);
/// How often a thread that waits for faults looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);
/// How often the source is told that what it waits for goes on.
const STILL_BUSY: Duration = Duration::from_secs(1);
/// How far ahead of the last frame in place another may be.
const MOST_AHEAD: u64 = 1 << 20;
/// The most device state that may wait for QEMU to take it, in bytes.
const MOST_STATE: u64 = 256 << 20;

/// How the source ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// In order, before post-copy: it has sent what it wanted to, or does not want the guest to move any more.
    Closed,
    /// All of the guest's RAM is here, and nothing is left of post-copy.
    Complete,
}

/// Takes what a source sends over this link, until that is over. `qemu` waits for the device state, where that is still to
/// come. Blocks. In post-copy an error leaves the guest waiting for what is missing: another link goes on.
pub fn serve(link: &Link, landing: &Landing, qemu: Option<&UnixStream>) -> Result<Ended, RamError> {
    let session = Session {
        link,
        landing,
        blocks: landing.blocks().iter().map(|block| block.size() / PAGE).collect(),
        placed: Mutex::default(),
        progress: Condvar::new(),
        faults_taken: AtomicBool::new(false),
        waits: Mutex::default(),
        state_goes: AtomicBool::new(false),
        over: AtomicBool::new(false),
        failure: Mutex::default(),
    };
    let (pieces, to_qemu) = channel();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| session.part(Session::take_bulk));
        }
        scope.spawn(|| session.part(Session::tell_placed));
        scope.spawn(|| session.part(|session| session.hand_over_state(to_qemu, qemu)));
        // A guest waits for what this one does.
        scope.spawn(|| {
            vmferry_link::go_first();
            session.part(Session::take_faults);
        });
        // In a thread of its own, as it goes first once a guest waits for it.
        scope.spawn(|| {
            session.part(|session| session.take_urgent(pieces));
            session.end();
        });
    });
    if landing.missing().is_none()
        && let Err(error) = landing.forget_post_copy()
    {
        session.fail(error);
    }
    // The source is told that its last words were heard.
    let _ = link.close();
    let failure = session.failure.into_inner().expect("no holder of this lock panics");
    match (landing.missing(), failure) {
        // What is said after that does not matter any more.
        (Some(0), _) if landing.is_finished() => Ok(Ended::Complete),
        (_, Some(error)) => Err(error),
        (Some(_), None) => Err(RamError::Link(LinkDown::Closed)),
        (None, None) => Ok(Ended::Closed),
    }
}

struct Session<'a> {
    link: &'a Link,
    landing: &'a Landing,
    /// How many pages each block has.
    blocks: Vec<u64>,
    placed: Mutex<Placed>,
    /// More is in place, or it is over.
    progress: Condvar,
    /// Faults are this session's to take.
    faults_taken: AtomicBool,
    waits: Mutex<Waits>,
    /// QEMU may have the device state.
    state_goes: AtomicBool,
    over: AtomicBool,
    /// The first one.
    failure: Mutex<Option<RamError>>,
}

/// When QEMU may have a piece of the device state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    AtOnce,
    /// When the source says so.
    Told,
}

/// Which frames of pages are in place.
#[derive(Default)]
struct Placed {
    /// All up to this one.
    low: u64,
    /// And these.
    beyond: BTreeSet<u64>,
    /// What the source was told.
    told: u64,
}

impl Session<'_> {
    fn part(&self, part: impl FnOnce(&Self) -> Result<(), RamError>) {
        if let Err(error) = part(self) {
            self.fail(error);
        }
    }

    fn fail(&self, error: RamError) {
        let words = crate::error::in_one_line(&error);
        let is_ours = !matches!(error, RamError::Link(_));
        {
            let mut failure = self.failure.lock().expect("no holder of this lock panics");
            if failure.is_some() {
                return;
            }
            *failure = Some(error);
        }
        self.end();
        if is_ours {
            // The link takes it with its last words, if there is still a link.
            let _ = self.link.send_urgent(REFUSED, words.into_bytes());
            let _ = self.link.close();
        }
        self.link.give_up();
    }

    /// All threads come back.
    fn end(&self) {
        // Whoever is about to wait for this holds the lock.
        let placed = self.placed();
        self.over.store(true, Ordering::Relaxed);
        drop(placed);
        self.progress.notify_all();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn placed(&self) -> MutexGuard<'_, Placed> {
        self.placed.lock().expect("no holder of this lock panics")
    }

    fn take_bulk(&self) -> Result<(), RamError> {
        while let Some(frame) = self.link.recv()? {
            match frame.kind {
                PAGES => self.pages(&frame)?,
                _ => return Err(Malformed("a bulk frame of an unknown kind").into()),
            }
        }
        Ok(())
    }

    /// Puts pages into place, and remembers that they are.
    fn pages(&self, frame: &Frame) -> Result<(), RamError> {
        let pages = Pages::decode(&frame.payload, &self.blocks)?;
        let mut last = false;
        for (run, data) in &pages.runs {
            last |= self.landing.put(run, data)?;
        }
        if self.landing.armed().is_some() {
            let mut waits = self.waits();
            pages.runs.iter().for_each(|(run, _)| waits.end(run));
        }
        {
            let mut placed = self.placed();
            let number = pages.number;
            if number <= placed.low || number > placed.low + MOST_AHEAD || !placed.beyond.insert(number) {
                return Err(Malformed("a frame of pages comes twice").into());
            }
            while let next = placed.low + 1
                && placed.beyond.remove(&next)
            {
                placed.low = next;
            }
        }
        self.progress.notify_all();
        if last { self.complete() } else { Ok(()) }
    }

    /// Nothing is missing any more.
    fn complete(&self) -> Result<(), RamError> {
        self.landing.finish()?;
        let times = self.waits().times();
        Ok(self.link.send_urgent(COMPLETE, times.encode())?)
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().expect("no holder of this lock panics")
    }

    /// Tells the source what is in place, now and then.
    fn tell_placed(&self) -> Result<(), RamError> {
        loop {
            let low = {
                let nothing_new = |placed: &mut Placed| placed.low == placed.told && !self.is_over();
                let waited = self.progress.wait_while(self.placed(), nothing_new);
                let mut placed = waited.expect("no holder of this lock panics");
                if self.is_over() {
                    return Ok(());
                }
                placed.told = placed.low;
                placed.low
            };
            self.link.send_urgent(PLACED, low.to_le_bytes().to_vec())?;
            std::thread::sleep(TELL_EVERY);
        }
    }

    fn take_urgent(&self, state: Sender<(Bytes, When)>) -> Result<(), RamError> {
        // All that was told, and what of it has not been taken away.
        let (missing, mut present) = (self.no_pages(), self.no_pages());
        let (mut greeted, mut state, mut state_bytes, mut early) = (false, Some(state), 0, true);
        while let Some(frame) = self.link.recv_urgent()? {
            match frame.kind {
                HELLO if !greeted => {
                    self.greet(&Hello::decode(&frame.payload)?)?;
                    greeted = true;
                }
                _ if !greeted => return Err(Malformed("it does not begin with what RAM it has").into()),
                PAGES => self.pages(&frame)?,
                MISSING => {
                    decode_missing(&frame.payload, &missing)?;
                    decode_missing(&frame.payload, &present)?;
                }
                PUNCH if self.landing.missing().is_none() => {
                    self.landing.punch(&present, self.still_busy())?;
                    present = self.no_pages();
                    self.link.send_urgent(PUNCHED, Vec::new())?;
                }
                ARM => {
                    self.wait_for_stragglers(decode_number(&frame.payload)?)?;
                    self.landing.arm(&missing, &present)?;
                    // Whoever puts the last page into place says that it is complete.
                    let nothing_comes = self.landing.missing() == Some(0);
                    vmferry_link::go_first();
                    self.faults_taken.store(true, Ordering::Release);
                    self.link.send_urgent(ARMED, Vec::new())?;
                    if nothing_comes {
                        self.complete()?;
                    }
                }
                STATE_EARLY if !early => return Err(Malformed("device state that is early comes late").into()),
                kind @ (STATE | STATE_EARLY) => {
                    early = kind == STATE_EARLY;
                    state_bytes += frame.payload.len() as u64;
                    let to_qemu = state.as_ref().ok_or(Malformed("there is device state after its end"))?;
                    if state_bytes > MOST_STATE || frame.payload.is_empty() {
                        return Err(Malformed("there is more device state than any VM has").into());
                    }
                    // Whoever takes it tells why it does not any more.
                    let _ = to_qemu.send((frame.payload, if early { When::AtOnce } else { When::Told }));
                }
                STATE_END => state = None,
                STATE_GO => self.let_state_go()?,
                _ => return Err(Malformed("a frame of an unknown kind").into()),
            }
        }
        Ok(())
    }

    /// To be called while what the source waits for goes on.
    fn still_busy(&self) -> impl Fn() {
        let told = Cell::new(Instant::now());
        move || {
            if told.get().elapsed() >= STILL_BUSY {
                told.set(Instant::now());
                // If it cannot be told, there is nobody who waits.
                let _ = self.link.send_urgent(BUSY, Vec::new());
            }
        }
    }

    fn no_pages(&self) -> Vec<PageSet> {
        self.blocks.iter().map(|pages| PageSet::new(*pages)).collect()
    }

    /// What the device state refers to is in place, or will be fetched.
    fn let_state_go(&self) -> Result<(), RamError> {
        // Whoever is about to wait for this holds the lock.
        let placed = self.placed();
        if self.state_goes.swap(true, Ordering::Relaxed) {
            return Err(Malformed("the device state goes twice").into());
        }
        drop(placed);
        self.progress.notify_all();
        Ok(())
    }

    /// Makes sure that both sides mean the same RAM.
    fn greet(&self, hello: &Hello) -> Result<(), RamError> {
        let ours = self.landing.blocks().iter().map(|block| (block.id(), block.size()));
        if !ours.clone().eq(hello.blocks.iter().map(|(id, size)| (id.as_str(), *size))) {
            let told = |blocks: &mut dyn Iterator<Item = (&str, u64)>| {
                blocks.map(|(id, size)| format!("{id}: {size}")).collect::<Vec<_>>().join(", ")
            };
            let theirs = told(&mut hello.blocks.iter().map(|(id, size)| (id.as_str(), *size)));
            return Err(RamError::Layout { here: told(&mut ours.into_iter()), there: theirs });
        }
        match (hello.resume, self.landing.armed()) {
            (false, None) => self.landing.clear(self.still_busy())?,
            (true, Some(armed)) => {
                for frame in encode_missing(armed.missing(), &self.no_pages()) {
                    self.link.send_urgent(MISSING, frame)?;
                }
                // Faults that the last link was asked for are raised again.
                armed.arrival.wake_all()?;
                vmferry_link::go_first();
                self.faults_taken.store(true, Ordering::Release);
            }
            (false, Some(_)) => return Err(Malformed("it begins what has begun already").into()),
            (true, None) => return Err(Malformed("it goes on with a post-copy that has not begun").into()),
        }
        self.link.send_urgent(READY, Vec::new())?;
        if hello.resume && self.landing.missing() == Some(0) { self.complete() } else { Ok(()) }
    }

    /// Waits until everything up to this frame is in place.
    fn wait_for_stragglers(&self, number: u64) -> Result<(), RamError> {
        let until = Instant::now() + STRAGGLERS;
        let mut placed = self.placed();
        while placed.low < number {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_over() {
                return Err(RamError::NoAnswer { after: STRAGGLERS });
            }
            placed = self.progress.wait_timeout(placed, left).expect("no holder of this lock panics").0;
        }
        Ok(())
    }

    /// Asks for what faults need.
    fn take_faults(&self) -> Result<(), RamError> {
        match self.all_faults() {
            // Those that were left needed nothing any more.
            Err(_) if self.landing.missing() == Some(0) => Ok(()),
            result => result,
        }
    }

    fn all_faults(&self) -> Result<(), RamError> {
        let (mut windows, mut faults) = (Windows::default(), Vec::new());
        let asked = self.no_pages();
        while !self.is_over() {
            let armed = match self.landing.armed() {
                Some(armed) if self.faults_taken.load(Ordering::Acquire) => armed,
                _ => {
                    // Until post-copy begins.
                    let _ = self.progress.wait_timeout(self.placed(), LOOK);
                    continue;
                }
            };
            faults.clear();
            armed.arrival.faults(LOOK, &mut faults)?;
            for (block, offset) in faults.iter().copied() {
                let page = offset / PAGE;
                if !armed.missing()[block].contains(page) {
                    // A page that has never been written, or one that came meanwhile.
                    armed.arrival.place_zero(block, page * PAGE..(page + 1) * PAGE)?;
                    continue;
                }
                {
                    let mut waits = self.waits();
                    // It may have come since; who puts it there looks at this after that.
                    if armed.missing()[block].contains(page) {
                        waits.begin(block, page);
                    }
                }
                if asked[block].contains(page) {
                    continue;
                }
                let pages = windows.on_fault(block, page, self.blocks[block]);
                asked[block].insert(pages.clone());
                self.link.send_urgent(WANT, Want { block, pages, first: page }.encode())?;
            }
        }
        Ok(())
    }

    /// Writes the device state to QEMU when it may have it. QEMU may take it only as fast as its pages come.
    fn hand_over_state(&self, pieces: Receiver<(Bytes, When)>, qemu: Option<&UnixStream>) -> Result<(), RamError> {
        let mut written = false;
        for (piece, when) in pieces {
            if when == When::Told && !self.state_may_go() {
                return Ok(());
            }
            let nobody = || std::io::Error::other("nobody waits for it");
            qemu.ok_or_else(nobody).and_then(|mut qemu| qemu.write_all(&piece)).map_err(RamError::device_state)?;
            written = true;
        }
        // QEMU must not take what was cut short for whole.
        match qemu.filter(|_| written && self.state_may_go()) {
            Some(qemu) => qemu.shutdown(Shutdown::Write).map_err(RamError::device_state),
            None => Ok(()),
        }
    }

    /// Waits until QEMU may have the device state. False when it is over before.
    fn state_may_go(&self) -> bool {
        let goes = || self.state_goes.load(Ordering::Relaxed);
        drop(self.progress.wait_while(self.placed(), |_| !goes() && !self.is_over()));
        goes()
    }
}
