//! Blocks of a disk, the grains in them, which of those are zero, and their sums.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;

use crate::backend::Backend;
use crate::limits;
use crate::transmission::Extent;

/// Bytes of a block: the smallest part of a disk that is sent when it differs.
pub const BLOCK: u64 = 1 << 20;
/// The largest disk, in bytes: what the sums of one take in memory is bounded by this.
pub const LARGEST: u64 = 64 << 40;
/// Zeroes are found in pieces of this size.
pub(crate) const GRAIN: usize = 4096;
/// Bytes that tell something of each grain of a block, in a bit each.
pub(crate) const GRAINS: usize = BLOCK as usize / GRAIN / 8;
/// How much of a disk is looked at for holes at once.
const GLANCE: u64 = 4 << 30;

/// A BLAKE3: of bytes, or of sums.
pub type Sum = [u8; 32];

/// The sums of the blocks that are not zero.
pub(crate) type Sums = BTreeMap<u64, Sum>;

pub(crate) fn sum_of(bytes: &[u8]) -> Sum {
    *blake3::hash(bytes).as_bytes()
}

/// One sum over all blocks.
pub(crate) fn root(size: u64, sums: &Sums) -> Sum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_be_bytes());
    for (block, sum) in sums {
        hasher.update(&block.to_be_bytes()).update(sum);
    }
    *hasher.finalize().as_bytes()
}

/// How many blocks a disk of so many bytes has.
pub(crate) fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

/// Where a block of such a disk is.
pub(crate) fn place(block: u64, size: u64) -> Range<u64> {
    block * BLOCK..size.min((block + 1) * BLOCK)
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().take(16).all(|it| *it == 0) && bytes.chunks(GRAIN).all(|part| part.iter().fold(0, |a, b| a | b) == 0)
}

/// Moves these grains of a block to its beginning. Tells how many bytes they have.
pub(crate) fn pack(block: &mut [u8], grains: &Grains) -> usize {
    let mut packed = 0;
    for (number, at) in (0..block.len()).step_by(GRAIN).enumerate() {
        if has(grains, number) {
            let end = block.len().min(at + GRAIN);
            if packed < at {
                block.copy_within(at..end, packed);
            }
            packed += end - at;
        }
    }
    packed
}

/// A bit for each grain of a block, the first in the lowest.
pub(crate) type Grains = [u8; GRAINS];

/// It is said of this grain.
pub(crate) fn has(grains: &Grains, number: usize) -> bool {
    grains[number / 8] >> (number % 8) & 1 != 0
}

/// Of how many it is said.
pub(crate) fn count(grains: &Grains) -> usize {
    grains.iter().map(|it| it.count_ones() as usize).sum()
}

/// Of which it is said, in order.
pub(crate) fn which(grains: &Grains) -> impl Iterator<Item = usize> {
    (0..GRAINS * 8).filter(|number| has(grains, *number))
}

/// Where in a part of a block, of so many bytes, this grain of it is.
pub(crate) fn grain(number: usize, length: usize) -> Range<usize> {
    number * GRAIN..length.min((number + 1) * GRAIN)
}

/// The grains of so many bytes in runs of which the same is said.
pub(crate) fn runs<T: PartialEq>(length: usize, said: impl Fn(usize) -> T) -> impl Iterator<Item = (Range<usize>, T)> {
    let total = length.div_ceil(GRAIN);
    let mut end = 0;
    std::iter::from_fn(move || {
        let begin = (end < total).then_some(end)?;
        let of_run = said(begin);
        end = (begin + 1..total).find(|it| said(*it) != of_run).unwrap_or(total);
        Some((begin * GRAIN..length.min(end * GRAIN), of_run))
    })
}

/// Which grains are not zero.
pub(crate) fn full(block: &[u8]) -> Grains {
    let mut grains = [0; GRAINS];
    for (number, bytes) in block.chunks(GRAIN).enumerate() {
        grains[number / 8] |= u8::from(!is_zero(bytes)) << (number % 8);
    }
    grains
}

/// How many bytes are in these grains of a block of so many.
pub(crate) fn gathered(grains: &Grains, length: usize) -> usize {
    which(grains).map(|number| grain(number, length).len()).sum()
}

/// What is in these grains of a block, one after the other.
pub(crate) fn gather(block: &[u8], grains: &Grains) -> Vec<u8> {
    let mut packed = Vec::with_capacity(count(grains) * GRAIN);
    for number in which(grains) {
        packed.extend_from_slice(&block[grain(number, block.len())]);
    }
    packed
}

/// These grains of a part of so many bytes, which were gathered or packed; `None` when this cannot be them.
pub(crate) fn ungathered<'a>(grains: &Grains, length: usize, mut packed: &'a [u8]) -> Option<Vec<&'a [u8]>> {
    let mut all = Vec::with_capacity(count(grains));
    for number in which(grains) {
        let (bytes, rest) = packed.split_at_checked(grain(number, length).len())?;
        all.push(Some(bytes).filter(|it| !it.is_empty())?);
        packed = rest;
    }
    packed.is_empty().then_some(all)
}

/// Where there are holes on a disk, from its beginning to its end.
pub(crate) struct Walk<'a> {
    disk: &'a dyn Backend,
    block: u64,
    /// What was told of what follows.
    told: VecDeque<Extent>,
}

/// What comes next of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Blocks that are all zero.
    Hole(Range<u64>),
    /// A block that has to be read.
    Block(u64),
}

impl<'a> Walk<'a> {
    pub(crate) fn over(disk: &'a dyn Backend) -> Self {
        Self { disk, block: 0, told: VecDeque::new() }
    }

    /// Nothing comes any more.
    pub(crate) fn end(&mut self) {
        self.block = blocks_of(self.disk.size());
    }

    pub(crate) fn next(&mut self) -> io::Result<Option<Next>> {
        let size = self.disk.size();
        let (block, at) = (self.block, self.block * BLOCK);
        if at >= size {
            return Ok(None);
        }
        if self.told.is_empty() {
            self.told = self.disk.status(at, GLANCE.min(size - at), limits::DESCRIPTORS)?.into();
        }
        let first = self.told.front().copied().unwrap_or(Extent::data(BLOCK));
        let holes = match first.zero {
            true if at + first.length >= size => blocks_of(size) - block,
            true => first.length / BLOCK,
            false => 0,
        };
        self.block += holes.max(1);
        let mut passed = place(self.block - 1, size).end - at;
        while let Some(first) = self.told.front_mut() {
            if first.length > passed {
                first.length -= passed;
                break;
            }
            passed -= first.length;
            self.told.pop_front();
        }
        Ok(Some(if holes > 0 { Next::Hole(block..block + holes) } else { Next::Block(block) }))
    }
}
