//! What is behind an export.

mod file;
mod locks;
mod memory;

pub use file::{Access, File, OpenError};
pub use locks::Taken;
pub use memory::Memory;

use std::io;

use crate::session::BlockSizes;
use crate::transmission::Extent;

/// How zeroes are to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroing {
    /// What was there may be given back, so that it becomes a hole.
    pub may_punch: bool,
    /// Fail with [`Unsupported`](io::ErrorKind::Unsupported) rather than write them one by one.
    pub fast: bool,
}

/// A disk. Many threads use it at once, and may wait in it. No range that it is given ends beyond its size.
pub trait Backend: Send + Sync + 'static {
    /// In bytes; does not change.
    fn size(&self) -> u64;

    /// It refuses what writes.
    fn read_only(&self) -> bool;

    /// In which sizes it is read and written.
    fn blocks(&self) -> BlockSizes {
        BlockSizes::DEFAULT
    }

    /// Reads all of these bytes.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Reads them if that needs no waiting: `false` means that it would.
    fn read_at_once(&self, _offset: u64, _into: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    /// Writes all of these bytes.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Writes usually only copy to memory. Such are done where they are read from the client, which is fastest.
    fn writes_are_quick(&self) -> bool {
        false
    }

    /// Makes zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()>;

    /// What is there is not needed any more. Doing nothing is right too.
    fn trim(&self, offset: u64, length: u64) -> io::Result<()>;

    /// What is there will be needed soon. Doing nothing is right too.
    fn cache(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// Puts on the disk all that was written before this, by any thread.
    fn flush(&self) -> io::Result<()>;

    /// What of these bytes is a hole, and what is zero: one extent at least, `most` at most, from `offset` on.
    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>>;
}
