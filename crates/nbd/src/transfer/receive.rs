//! The end that gets the disk.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard};

use vmferry_link::{Frame, Link, LinkDown};

use super::words::{BlockHead, End, KnownTo, Lacking, MOST_SUMS, Offer, kind};
use crate::backend::{Backend, Zeroing};
use crate::blocks::{
    BLOCK, Next, Sum, Sums, Walk, blocks_of, full, has, is_zero, place, root, runs, sum_of, ungathered,
};
use crate::carry::encode_done;
use crate::known::{Bases, Offered};
use crate::sums::{sum_of_sums, sums_of};

/// Threads that write what arrives.
const WORKERS: usize = 4;
/// What was written goes to the disk when it is so much: that much a failing host can lose.
const UNFLUSHED: u64 = 64 << 20;
/// After so many blocks the sender is told of those that were read.
const TELL_EVERY: u64 = 16;
const PUNCH: Zeroing = Zeroing { may_punch: true, fast: false };

/// Why a disk was not received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The link is down.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// Something arrived that is no part of a copy.
    #[error("the other agent sent what is no part of a copy")]
    NoSense,
    /// A block's sum is not the one that it was sent with.
    #[error("what arrived at {at} is not what was sent: its BLAKE3 is another")]
    Damaged {
        /// Where it belongs.
        at: u64,
    },
    /// The sums over all are not the same.
    #[error("the copy is not what the source is: its BLAKE3 is another")]
    Differs,
    /// The disk cannot be read or written.
    #[error("cannot {what} the copy at {at}")]
    Io {
        /// What could not be done.
        what: &'static str,
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// All is there, and the copy could not be finished.
    #[error("cannot finish the copy")]
    Finish(#[source] io::Error),
    /// There are no threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl ReceiveError {
    /// What the other end is told.
    fn to_be_told(&self) -> io::Error {
        match self {
            Self::Io { source, .. } | Self::Finish(source) => {
                let kind = match crate::ErrorCode::of(source) {
                    crate::ErrorCode::NoSpace => io::ErrorKind::StorageFull,
                    _ => source.kind(),
                };
                io::Error::new(kind, format!("{self}: {source}"))
            }
            other => io::Error::other(other.to_string()),
        }
    }
}

/// What is there before anything comes.
pub enum Before {
    /// Nothing.
    Nothing,
    /// Something, which need not be sent again where it is right.
    Something,
    /// That, and an older copy that stands in where it is zero.
    AndOlder(Box<dyn Backend>),
}

/// What a grain becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Becomes {
    Data,
    Zero,
    /// What it is.
    Kept,
}

/// Gives out what was packed, run by run.
fn in_order<'b>(mut packed: &'b [u8]) -> impl FnMut(Range<usize>) -> &'b [u8] {
    move |run| packed.split_off(..run.len()).expect("it has as much as it was said to have")
}

struct Receiver<'a> {
    link: &'a Link,
    target: &'a dyn Backend,
    bases: &'a Bases,
    unflushed: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is not zero at the target.
    sums: Sums,
    /// The sender knows what is before this block.
    told: u64,
    /// So many frames were done.
    frames: u64,
    failed: Option<ReceiveError>,
}

/// Has this disk become what is sent over the link, less what is in these others or in itself; `finish` is called when it
/// is, and on its own disk. Gives back the sum over all, if that was compared. The link is over then.
pub fn receive(
    link: &Link,
    target: &dyn Backend,
    before: &Before,
    bases: &Bases,
    finish: &(dyn Fn() -> io::Result<()> + Sync),
) -> Result<Option<Sum>, ReceiveError> {
    let unflushed = AtomicU64::new(0);
    let receiver = Receiver { link, target, bases, unflushed, state: Mutex::default(), changed: Condvar::new() };
    std::thread::scope(|scope| {
        let named = |name: &str| std::thread::Builder::new().name(name.into());
        for _ in 0..WORKERS {
            if let Err(error) = named("copy-arrives").spawn_scoped(scope, || receiver.work()) {
                receiver.fail(ReceiveError::Thread(error));
            }
        }
        if let Err(error) = named("copy-known").spawn_scoped(scope, || receiver.tell(before)) {
            receiver.fail(ReceiveError::Thread(error));
        }
        match receiver.until_the_end(finish) {
            Ok(root) => {
                let over = link.send_urgent(kind::DONE, encode_done(0, &Ok(()))).and_then(|()| link.close());
                if let Err(error) = over {
                    tracing::debug!(%error, "the link of a copy that is there did not end in order");
                }
                Ok(root)
            }
            Err(error) => {
                receiver.fail(error);
                Err(receiver.lock().failed.take().expect("it has just failed"))
            }
        }
    })
}

impl Receiver<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with this lock")
    }

    /// Ends it, unless something else has before, and tells the other end why.
    fn fail(&self, error: ReceiveError) {
        let mut state = self.lock();
        if state.failed.is_some() {
            return;
        }
        let is_link = matches!(error, ReceiveError::Link(_));
        let words = encode_done::<()>(0, &Err(error.to_be_told()));
        state.failed = Some(error);
        drop(state);
        self.changed.notify_all();
        if !is_link && self.link.send_urgent(kind::DONE, words).is_ok() {
            // It may be down by now: then there is nobody to be told.
            let _ = self.link.close();
        }
    }

    /// Takes what comes, until nothing does.
    fn work(&self) {
        let mut buffer = vec![0; BLOCK as usize];
        let ended = loop {
            match self.link.recv() {
                Ok(Some(frame)) => {
                    if let Err(error) = self.take(&frame, &mut buffer) {
                        break Err(error);
                    }
                    self.lock().frames += 1;
                    self.changed.notify_all();
                }
                Ok(None) => break Ok(()),
                Err(down) => break Err(down.into()),
            }
        };
        if let Err(error) = ended {
            self.fail(error);
        }
    }

    fn take(&self, frame: &Frame, buffer: &mut [u8]) -> Result<(), ReceiveError> {
        let size = self.target.size();
        // Nobody reads any more there.
        let is_told = |block: u64| if block < self.lock().told { Ok(block) } else { Err(ReceiveError::NoSense) };
        match frame.kind {
            kind::ZERO => {
                let block = frame.payload[..].try_into().map_err(|_| ReceiveError::NoSense)?;
                let block = is_told(u64::from_be_bytes(block))?;
                let at = place(block, size);
                let zeroed = self.target.write_zeroes(at.start, at.end - at.start, PUNCH);
                zeroed.map_err(|source| ReceiveError::Io { what: "write", at: at.start, source })?;
                self.lock().sums.remove(&block);
                Ok(())
            }
            kind::BLOCK => {
                let (head, packed) = BlockHead::read(&frame.payload).ok_or(ReceiveError::NoSense)?;
                let at = place(is_told(head.block)?, size);
                let length = (at.end - at.start) as usize;
                let grains = ungathered(&head.grains, length, packed).ok_or(ReceiveError::NoSense)?;
                if head.sum.is_some_and(|sum| sum != sum_of_sums(&head.grains, &sums_of(&grains))) {
                    return Err(ReceiveError::Damaged { at: at.start });
                }
                // Something is there from now on, whatever its sum.
                let is_new = self.lock().sums.insert(head.block, head.sum.unwrap_or_default()).is_none();
                let zero = if is_new { Becomes::Kept } else { Becomes::Zero };
                let becomes = |grain| if has(&head.grains, grain) { Becomes::Data } else { zero };
                self.write(at.start, length, becomes, in_order(packed))
            }
            kind::OFFER => {
                let Offer { block, offered } = Offer::decode(&frame.payload, size).ok_or(ReceiveError::NoSense)?;
                let at = place(is_told(block)?, size);
                let bytes = &mut buffer[..offered.length];
                // What is there may be most of it, and is looked at before it is overwritten.
                let was = self.lock().sums.insert(block, offered.root());
                let lacking = self.bases.fill(was.map(|_| self.target), at.start, &offered, bytes);
                let becomes = |grain| match (has(&offered.full, grain), has(&lacking, grain)) {
                    (true, false) => Becomes::Data,
                    (false, _) if was.is_some() => Becomes::Zero,
                    _ => Becomes::Kept,
                };
                self.write(at.start, bytes.len(), becomes, |run| &bytes[run])?;
                self.link.send_urgent(kind::LACKING, Lacking { block, grains: lacking }.encode())?;
                Ok(())
            }
            kind::REST => {
                let (head, packed) = BlockHead::read(&frame.payload).ok_or(ReceiveError::NoSense)?;
                let at = place(is_told(head.block)?, size);
                let length = (at.end - at.start) as usize;
                ungathered(&head.grains, length, packed).ok_or(ReceiveError::NoSense)?;
                if head.sum.is_some_and(|sum| sum != sum_of(packed)) {
                    return Err(ReceiveError::Damaged { at: at.start });
                }
                let becomes = |grain| if has(&head.grains, grain) { Becomes::Data } else { Becomes::Kept };
                self.write(at.start, length, becomes, in_order(packed))
            }
            _ => Err(ReceiveError::NoSense),
        }
    }

    /// Has the grains of a block become something. What is to be in a run of them is asked for in order.
    fn write<'b>(
        &self,
        at: u64,
        length: usize,
        becomes: impl Fn(usize) -> Becomes,
        mut bytes: impl FnMut(Range<usize>) -> &'b [u8],
    ) -> Result<(), ReceiveError> {
        let mut written = 0;
        for (run, becomes) in runs(length, becomes) {
            let at = at + run.start as u64;
            let done = match becomes {
                Becomes::Kept => Ok(()),
                Becomes::Zero => self.target.write_zeroes(at, run.len() as u64, PUNCH),
                Becomes::Data => {
                    written += run.len() as u64;
                    self.target.write(at, bytes(run))
                }
            };
            done.map_err(|source| ReceiveError::Io { what: "write", at, source })?;
        }
        if self.unflushed.fetch_add(written, Relaxed) + written >= UNFLUSHED {
            self.unflushed.store(0, Relaxed);
            self.target.flush().map_err(|source| ReceiveError::Io { what: "flush", at, source })?;
        }
        Ok(())
    }

    /// Reads what is there, and tells the sender.
    fn tell(&self, before: &Before) {
        if let Err(error) = self.read_and_tell(before) {
            self.fail(error);
        }
    }

    fn read_and_tell(&self, before: &Before) -> Result<(), ReceiveError> {
        let mut known = KnownTo { end: blocks_of(self.target.size()), sums: Vec::new() };
        if matches!(before, Before::Nothing) {
            return self.say(&mut known);
        }
        let older = match before {
            Before::AndOlder(older) => Some(&**older),
            _ => None,
        };
        let (mut walk, mut buffer) = (Walk::over(self.target), vec![0; BLOCK as usize]);
        let failed = |source| ReceiveError::Io { what: "read", at: 0, source };
        let mut told = 0;
        while let Some(next) = walk.next().map_err(failed)? {
            let (blocks, is_hole) = match next {
                Next::Hole(blocks) => (blocks, true),
                Next::Block(block) => (block..block + 1, false),
            };
            for block in blocks {
                let sum = match is_hole {
                    true => None,
                    false => self.sum(self.target, block, &mut buffer)?,
                };
                let sum = match (sum, older) {
                    (None, Some(older)) => self.copy_older(older, block, &mut buffer)?,
                    (sum, _) => sum,
                };
                known.sums.extend(sum.map(|sum| (block, sum)));
                known.end = block + 1;
                if known.sums.len() >= MOST_SUMS || !is_hole && known.end >= told + TELL_EVERY {
                    told = known.end;
                    self.say(&mut known)?;
                }
            }
        }
        self.say(&mut known)
    }

    fn say(&self, known: &mut KnownTo) -> Result<(), ReceiveError> {
        let mut state = self.lock();
        state.told = known.end;
        state.sums.extend(known.sums.iter().copied());
        drop(state);
        self.link.send_urgent(kind::KNOWN, known.encode())?;
        known.sums.clear();
        Ok(())
    }

    /// The sum of a block of this disk, which is in the buffer then; none when it is zero.
    fn sum(&self, disk: &dyn Backend, block: u64, buffer: &mut [u8]) -> Result<Option<Sum>, ReceiveError> {
        let at = place(block, self.target.size());
        let bytes = &mut buffer[..(at.end - at.start) as usize];
        // What is behind the end of an older copy is nothing.
        let there = disk.size().clamp(at.start, at.end) - at.start;
        let (read, beyond) = bytes.split_at_mut(there as usize);
        beyond.fill(0);
        disk.read(at.start, read).map_err(|source| ReceiveError::Io { what: "read", at: at.start, source })?;
        Ok((!is_zero(bytes)).then(|| Offered::of(bytes).root()))
    }

    /// Puts into the target what an older copy has there.
    fn copy_older(&self, older: &dyn Backend, block: u64, buffer: &mut [u8]) -> Result<Option<Sum>, ReceiveError> {
        let at = place(block, self.target.size());
        let failed = |source| ReceiveError::Io { what: "read", at: at.start, source };
        if at.start >= older.size() {
            return Ok(None);
        }
        let there = older.size().min(at.end) - at.start;
        let is_hole =
            older.status(at.start, there, 1).map_err(failed)?.first().is_some_and(|it| it.zero && it.length >= there);
        if is_hole {
            return Ok(None);
        }
        let sum = self.sum(older, block, buffer)?;
        if sum.is_some() {
            let bytes = &buffer[..(at.end - at.start) as usize];
            let full = full(bytes);
            let becomes = |grain| if has(&full, grain) { Becomes::Data } else { Becomes::Kept };
            self.write(at.start, bytes.len(), becomes, |run| &bytes[run])?;
        }
        Ok(sum)
    }

    /// Waits until the sender says that this was all, and finishes.
    fn until_the_end(&self, finish: &(dyn Fn() -> io::Result<()> + Sync)) -> Result<Option<Sum>, ReceiveError> {
        let frame = self.link.recv_urgent()?.ok_or(LinkDown::Closed)?;
        let end = Some(frame).filter(|it| it.kind == kind::END).and_then(|it| End::decode(&it.payload));
        let End { frames, root: theirs } = end.ok_or(ReceiveError::NoSense)?;
        let mut state = self.lock();
        while state.frames < frames && state.failed.is_none() {
            state = self.changed.wait(state).expect("nobody panics with this lock");
        }
        if state.failed.is_some() {
            return Err(LinkDown::Closed.into());
        }
        let size = self.target.size();
        if state.frames > frames || state.told < blocks_of(size) {
            return Err(ReceiveError::NoSense);
        }
        if theirs.is_some_and(|theirs| theirs != root(size, &state.sums)) {
            return Err(ReceiveError::Differs);
        }
        drop(state);
        self.target.flush().and_then(|()| finish()).map_err(ReceiveError::Finish)?;
        Ok(theirs)
    }
}
