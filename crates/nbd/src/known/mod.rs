//! What is at the other end already is not sent.
//!
//! A disk that goes to another host is seldom new to it: it is a clone of a template that is there, it was there last week,
//! or the last try had brought half of it. So whoever sends a part of a disk first sends the sums of its grains of 4 KiB
//! ([`Offered`]), the other end takes those that it has from its own images ([`Bases`]), and only the others travel.
//!
//! Where to look is told by the same place of images that are likely to be alike, by where the last grains were found, and by
//! an [`Index`] of an image. An index of all grains would be as large as a deduplicating file system's. This one has a
//! grain in sixteen, chosen by its sum, so that both ends choose the same ones: what two images have in common comes in
//! runs, one grain of a run tells where it is, and the grains before and behind it are read and compared. (M. Lillibridge
//! et al., "Sparse Indexing", FAST 2009.) It is on disk, sorted, and read where it is needed: it takes no memory.
//!
//! An index is a hint and nothing else. A grain counts as known when it was read just now and its BLAKE3 is the one that was
//! offered, all 32 bytes. So an index that is old or damaged, and an image that somebody writes to meanwhile, cost time.

mod bases;
mod idle;
mod index;
mod offered;
mod pays;

pub use bases::{Base, Bases};
pub use idle::run_only_when_idle;
pub use index::{Identity, Index, index};
pub(crate) use offered::Offered;
pub(crate) use pays::Pays;

use crate::blocks::Sum;

/// One grain in so many is in an index.
const SAMPLE: u8 = 16;

/// Indexes have grains of this sum.
fn is_sampled(sum: &Sum) -> bool {
    sum[31].is_multiple_of(SAMPLE)
}
