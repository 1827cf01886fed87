//! One disk onto another.
//!
//! Several threads take pieces in turn, so that as many requests are under way. What the source says is zero is not
//! read, what turns out to be zero is not written, and both become holes at the target.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::backend::{Backend, Zeroing};
use crate::limits;
use crate::transmission::Extent;

/// How much is read and written at once.
const PIECE: u64 = 256 << 10;
/// How much is made zero at once.
const ZEROES: u64 = 1 << 30;
/// No hole is smaller.
const GRAIN: u64 = 4096;

/// Why a copy is not whole.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It would not fit.
    #[error("the target has {target} bytes and the source {needed}: give one that is as large")]
    TooSmall {
        /// How many it has.
        target: u64,
        /// How many there are.
        needed: u64,
    },
    /// It cannot be written.
    #[error("the target is read-only")]
    ReadOnly,
    /// The end cannot be read or written.
    #[error("the source's size, {size}, is no multiple of the block size {grain} of one of the two")]
    Crooked {
        /// How large it is.
        size: u64,
        /// What it should be a multiple of.
        grain: u64,
    },
    /// The source failed.
    #[error("cannot read the source at {at}")]
    Read {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The target failed.
    #[error("cannot write the target at {at}")]
    Write {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It may not be on the disk.
    #[error("cannot put the target on its disk")]
    Flush(#[source] io::Error),
    /// There are no threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// How a copy goes; can be looked at while it does.
#[derive(Debug, Default)]
pub struct Progress {
    /// So many bytes of the disk are done.
    pub done: AtomicU64,
    /// And so many of them were data.
    pub data: AtomicU64,
}

/// How it is copied.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// How many requests are under way.
    pub requests: usize,
    /// The target is all zeroes already.
    pub target_is_zero: bool,
}

/// Copies all of the source onto the beginning of the target. When it is done, it is on the target's disk.
pub fn copy(source: &dyn Backend, target: &dyn Backend, how: How, progress: &Progress) -> Result<(), CopyError> {
    let size = source.size();
    if target.size() < size {
        return Err(CopyError::TooSmall { target: target.size(), needed: size });
    }
    if target.read_only() {
        return Err(CopyError::ReadOnly);
    }
    let least = u64::from(source.blocks().minimum.max(target.blocks().minimum));
    if !size.is_multiple_of(least) {
        return Err(CopyError::Crooked { size, grain: least });
    }
    let most = u64::from(source.blocks().maximum.min(target.blocks().maximum)).min(PIECE);
    let grain = GRAIN.max(least);
    let pieces = Mutex::new(Pieces { source, at: 0, size, grain, most: most.max(grain), known: VecDeque::new() });
    let work = || -> Result<(), CopyError> {
        let mut buffer = vec![0; most.max(grain) as usize];
        loop {
            let piece = pieces.lock().expect("nobody panics with this lock").next()?;
            let Some(Piece { at, length, zero }) = piece else { return Ok(()) };
            let zero = zero || {
                let bytes = &mut buffer[..length as usize];
                source.read(at, bytes).map_err(|source| CopyError::Read { at, source })?;
                progress.data.fetch_add(length, Relaxed);
                let zero = is_zero(bytes);
                if !zero {
                    target.write(at, bytes).map_err(|source| CopyError::Write { at, source })?;
                }
                zero
            };
            if zero && !how.target_is_zero {
                let punch = Zeroing { may_punch: true, fast: false };
                target.write_zeroes(at, length, punch).map_err(|source| CopyError::Write { at, source })?;
            }
            progress.done.fetch_add(length, Relaxed);
        }
    };
    // A thread that fails takes what is left from the others.
    let work = || work().inspect_err(|_| pieces.lock().expect("nobody panics with this lock").end());
    std::thread::scope(|scope| {
        let spawn = |_| std::thread::Builder::new().name("nbd-copy".into()).spawn_scoped(scope, work);
        let threads: Vec<_> = (0..how.requests.max(1)).map(spawn).collect();
        threads.into_iter().try_for_each(|thread| match thread {
            Ok(thread) => thread.join().expect("a copying thread does not panic"),
            Err(error) => Err(CopyError::Thread(error)),
        })
    })?;
    target.flush().map_err(CopyError::Flush)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().take(16).all(|it| *it == 0) && bytes.chunks(4096).all(|part| part.iter().fold(0, |a, b| a | b) == 0)
}

/// What is left to copy.
struct Pieces<'a> {
    source: &'a dyn Backend,
    at: u64,
    size: u64,
    grain: u64,
    most: u64,
    /// What the source has told about what follows.
    known: VecDeque<Extent>,
}

struct Piece {
    at: u64,
    length: u64,
    zero: bool,
}

impl Pieces<'_> {
    fn end(&mut self) {
        self.at = self.size;
    }

    /// Begins and ends at multiples of the grain, or at the end.
    fn next(&mut self) -> Result<Option<Piece>, CopyError> {
        let (at, left) = (self.at, self.size - self.at);
        if left == 0 {
            return Ok(None);
        }
        if self.known.is_empty() {
            let told = self.source.status(at, left, limits::DESCRIPTORS);
            self.known = told.map_err(|source| CopyError::Read { at, source })?.into();
        }
        let extent = self.known.front().copied().unwrap_or(Extent::data(left));
        let whole = extent.length / self.grain * self.grain;
        let length = match extent.zero {
            true if extent.length >= left => left.min(ZEROES),
            true if whole > 0 => whole.min(ZEROES),
            // A hole that is too small counts as data.
            _ => extent.length.next_multiple_of(self.grain).min(self.most).min(left),
        };
        let zero = extent.zero && (whole > 0 || extent.length >= left);
        self.skip(length);
        self.at += length;
        Ok(Some(Piece { at, length, zero }))
    }

    fn skip(&mut self, mut length: u64) {
        while let Some(first) = self.known.front_mut() {
            if first.length > length {
                first.length -= length;
                return;
            }
            length -= first.length;
            self.known.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Memory;
    use crate::session::BlockSizes;

    const HOW: How = How { requests: 4, target_is_zero: false };

    fn patchy(size: usize) -> Memory {
        let disk = Memory::new(size);
        for at in (0..size as u64 - 5000).step_by(100_000) {
            disk.write(at + 777, &[at as u8 | 1; 4000]).unwrap();
        }
        disk
    }

    #[test]
    fn a_copy_is_equal_also_over_what_was_there_and_keeps_holes() {
        for size in [1 << 20, (1 << 20) + 4096, 1_234_567] {
            let (source, target) = (patchy(size), Memory::holding(vec![7; size]));
            let progress = Progress::default();
            copy(&source, &target, HOW, &progress).unwrap();
            assert!(source.contents() == target.contents());
            assert_eq!(progress.done.into_inner(), size as u64);
            let holes = |disk: &Memory| -> u64 {
                let told = disk.status(0, size as u64, 10_000).unwrap();
                told.iter().filter(|it| it.hole).map(|it| it.length / GRAIN).sum()
            };
            assert!(holes(&target) >= holes(&source), "{} < {}", holes(&target), holes(&source));
        }
    }

    #[test]
    fn what_cannot_fit_or_be_written_is_refused() {
        let source = patchy(1 << 20);
        let refused = |target: Memory| copy(&source, &target, HOW, &Progress::default()).unwrap_err();
        assert!(matches!(refused(Memory::new(1 << 19)), CopyError::TooSmall { .. }));
        assert!(matches!(refused(Memory::new(1 << 20).read_only()), CopyError::ReadOnly));
        let odd = Memory::new(1_000_000);
        let target = Memory::new(1 << 20).with_blocks(BlockSizes::with_minimum(4096).unwrap());
        assert!(matches!(copy(&odd, &target, HOW, &Progress::default()), Err(CopyError::Crooked { .. })));
    }
}
