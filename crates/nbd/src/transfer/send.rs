//! The end that has the disk.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use vmferry_link::{Link, LinkDown, Pool};

use super::there::{Held, Rest, There};
use super::words::{BLOCK_HEAD, BlockHead, End, Offer, kind};
use crate::backend::Backend;
use crate::blocks::{BLOCK, GRAIN, Next, Sum, Sums, Walk, blocks_of, full, gather, is_zero, pack, place, root, sum_of};
use crate::known::Offered;

/// How many blocks may be offered and not answered, or answered and not sent: what is in them is in memory.
const MOST_OFFERED: usize = 32;

/// Why a disk was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The link is down.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// The disk cannot be read.
    #[error("cannot read it at {at}")]
    Read {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what it was when it was begun.
    #[error("{0}")]
    Changed(String),
    /// The other end could not do it.
    #[error(transparent)]
    There(io::Error),
    /// The other end said something else than what is expected.
    #[error("the other host does not say what is expected")]
    NoSense,
    /// There are no threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// How a disk is sent.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Threads that read, sum and send.
    pub threads: usize,
    /// Every block is summed, and the two ends compare the sums. Otherwise only those are of which the other end has
    /// something.
    pub verify: bool,
    /// The other end has images that may have parts of this one.
    pub known: bool,
}

/// How it goes; can be looked at while it does.
#[derive(Debug, Default)]
pub struct Progress {
    /// So many bytes of the disk are done.
    pub done: AtomicU64,
    /// So many of them were sent: what is neither zero nor there already.
    pub sent: AtomicU64,
    /// So many of them were there already.
    pub same: AtomicU64,
}

/// Sends all of this disk to whoever [`receive`](super::receive)s it. Before it says that this was all, it asks whether
/// the disk `is_as_it_was`. Gives back the sum over all, if that was compared. The link is over then.
pub fn send(
    link: &Link,
    disk: &dyn Backend,
    how: How,
    progress: &Progress,
    is_as_it_was: &dyn Fn() -> Result<(), String>,
) -> Result<Option<Sum>, SendError> {
    let there = There::default();
    let ended = std::thread::scope(|scope| {
        let listening = std::thread::Builder::new().name("copy-known".into());
        listening.spawn_scoped(scope, || there.listen(link, progress)).map_err(SendError::Thread)?;
        let sender = Sender {
            link,
            disk,
            how,
            progress,
            there: &there,
            walk: Mutex::new(Walk::over(disk)),
            frames: AtomicU64::new(0),
            sums: Mutex::default(),
            pool: Arc::default(),
        };
        let sent = sender.send_all().and_then(|end| {
            let Some(end) = end else { return Ok(None) };
            is_as_it_was().map_err(SendError::Changed)?;
            link.send_urgent(kind::END, end.encode())?;
            Ok(Some(end))
        });
        // What the other end says matters more than what came of it here.
        let over = match sent {
            Ok(Some(end)) => there.done().map(|()| end.root),
            Ok(None) => there.done().and(Err(SendError::NoSense)),
            Err(SendError::Link(down)) => there.done().and(Err(down.into())),
            Err(error) => Err(error),
        };
        if over.is_err() {
            link.give_up();
        }
        over
    });
    if ended.is_ok()
        && let Err(error) = link.close()
    {
        tracing::debug!(%error, "the link of a copy that is there did not end in order");
    }
    ended
}

struct Sender<'a> {
    link: &'a Link,
    disk: &'a dyn Backend,
    how: How,
    progress: &'a Progress,
    there: &'a There,
    walk: Mutex<Walk<'a>>,
    frames: AtomicU64,
    sums: Mutex<Sums>,
    /// What is read goes into these.
    pool: Arc<Pool>,
}

impl<'a> Sender<'a> {
    fn walk(&self) -> MutexGuard<'_, Walk<'a>> {
        self.walk.lock().expect("nobody panics with this lock")
    }

    /// Tells what was sent; `None` when the other end has ended it.
    fn send_all(self) -> Result<Option<End>, SendError> {
        let work = || self.work().inspect_err(|_| self.walk().end());
        std::thread::scope(|scope| {
            let start = |_| std::thread::Builder::new().name("copy-blocks".into()).spawn_scoped(scope, work);
            let threads: Vec<_> = (0..self.how.threads.max(1)).map(start).collect();
            threads.into_iter().try_for_each(|thread| match thread {
                Ok(thread) => thread.join().expect("sending does not panic"),
                Err(error) => Err(SendError::Thread(error)),
            })
        })?;
        let size = self.disk.size();
        if self.there.until(blocks_of(size)).is_none() {
            return Ok(None);
        }
        let sums = self.sums.into_inner().expect("nobody panics with this lock");
        Ok(Some(End { frames: self.frames.into_inner(), root: self.how.verify.then(|| root(size, &sums)) }))
    }

    /// What the other end lacks of what it was offered goes before what is new.
    fn work(&self) -> Result<(), SendError> {
        loop {
            if let Some(rest) = self.there.rest(MOST_OFFERED) {
                self.send_rest(rest)?;
                continue;
            }
            let next = self.walk().next();
            let at = |source| SendError::Read { at: 0, source };
            let (blocks, is_hole) = match next.map_err(at)? {
                None => break,
                Some(Next::Hole(blocks)) => (blocks, true),
                Some(Next::Block(block)) => (block..block + 1, false),
            };
            // When it is over, whoever waits for the end is told why.
            let Some(there) = self.there.among(blocks.clone()) else { return Ok(()) };
            match is_hole {
                true => there.iter().try_for_each(|(block, _)| self.send_zero(*block))?,
                false => self.send_block(blocks.start, there.first().map(|it| it.1))?,
            }
            let length = place(blocks.end - 1, self.disk.size()).end - blocks.start * BLOCK;
            self.progress.done.fetch_add(length, Relaxed);
        }
        while let Some(rest) = self.there.rest(0) {
            self.send_rest(rest)?;
        }
        Ok(())
    }

    fn send(&self, kind: u16, frame: impl Into<Bytes>) -> Result<(), SendError> {
        self.link.send(kind, frame)?;
        self.frames.fetch_add(1, Relaxed);
        Ok(())
    }

    fn send_zero(&self, block: u64) -> Result<(), SendError> {
        self.send(kind::ZERO, block.to_be_bytes().to_vec())
    }

    /// One that is said to have something in it. There is one of this sum there, or a zero one.
    fn send_block(&self, block: u64, there: Option<Sum>) -> Result<(), SendError> {
        let at = place(block, self.disk.size());
        let length = at.end - at.start;
        let mut frame = self.pool.take(BLOCK_HEAD + length as usize);
        let bytes = &mut frame.as_mut()[BLOCK_HEAD..];
        self.disk.read(at.start, bytes).map_err(|source| SendError::Read { at: at.start, source })?;
        if is_zero(bytes) {
            return if there.is_some() { self.send_zero(block) } else { Ok(()) };
        }
        let offer = (there.is_some() || self.how.known) && self.there.pays.offer(bytes.len().div_ceil(GRAIN) as u64);
        let offered = (offer || there.is_some() || self.how.verify).then(|| Offered::of(bytes));
        let sum = offered.as_ref().map(Offered::root);
        self.knows(block, sum);
        if sum.is_some() && sum == there {
            self.progress.same.fetch_add(length, Relaxed);
            return Ok(());
        }
        let full = offered.as_ref().map_or_else(|| full(bytes), |it| it.full);
        if let Some(offered) = offered.filter(|_| offer) {
            let offer = Offer { block, offered };
            self.there.is_offered(&offer, Held(frame));
            return self.send(kind::OFFER, offer.encode());
        }
        let packed = pack(bytes, &full);
        BlockHead { block, sum: sum.filter(|_| self.how.verify), grains: full }.write(frame.as_mut());
        self.send(kind::BLOCK, frame.freeze().slice(..BLOCK_HEAD + packed))?;
        self.progress.sent.fetch_add(packed as u64, Relaxed);
        Ok(())
    }

    /// The sum over all has this in it.
    fn knows(&self, block: u64, sum: Option<Sum>) {
        if self.how.verify {
            self.sums.lock().expect("nobody panics with this lock").extend(sum.map(|sum| (block, sum)));
        }
    }

    fn send_rest(&self, Rest { block, grains, held }: Rest) -> Result<(), SendError> {
        let packed = gather(held.bytes(), &grains);
        let mut frame = vec![0; BLOCK_HEAD];
        BlockHead { block, sum: self.how.verify.then(|| sum_of(&packed)), grains }.write(&mut frame);
        frame.extend(&packed);
        self.send(kind::REST, frame)?;
        self.progress.sent.fetch_add(packed.len() as u64, Relaxed);
        Ok(())
    }
}
