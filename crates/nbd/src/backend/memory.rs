//! A disk in memory, for tests: it remembers what was done to it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::backend::{Backend, Zeroing};
use crate::session::BlockSizes;
use crate::transmission::Extent;

/// What is allocated is told in blocks of this size.
const BLOCK: usize = 4096;

/// See the module's text.
pub struct Memory {
    disk: RwLock<Disk>,
    size: usize,
    read_only: bool,
    blocks: BlockSizes,
    /// How much more may be written.
    room: AtomicU64,
}

struct Disk {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

impl Memory {
    /// An empty disk of this size.
    pub fn new(size: usize) -> Self {
        let allocated = vec![false; size.div_ceil(BLOCK)];
        Self::with(Disk { bytes: vec![0; size], allocated })
    }

    /// A disk with this in it.
    pub fn holding(bytes: Vec<u8>) -> Self {
        let allocated = vec![true; bytes.len().div_ceil(BLOCK)];
        Self::with(Disk { bytes, allocated })
    }

    fn with(disk: Disk) -> Self {
        let (size, room) = (disk.bytes.len(), AtomicU64::new(u64::MAX));
        Self { disk: RwLock::new(disk), size, read_only: false, blocks: BlockSizes::DEFAULT, room }
    }

    /// The same, and nothing can be written to it.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The same in other sizes.
    #[must_use]
    pub fn with_blocks(self, blocks: BlockSizes) -> Self {
        Self { blocks, ..self }
    }

    /// The same, full when so many bytes were written to it.
    #[must_use]
    pub fn with_room(self, room: u64) -> Self {
        Self { room: AtomicU64::new(room), ..self }
    }

    /// All that is in it.
    pub fn contents(&self) -> Vec<u8> {
        self.reading().bytes.clone()
    }

    fn reading(&self) -> RwLockReadGuard<'_, Disk> {
        self.disk.read().expect("nobody panics with this lock")
    }

    fn writing(&self) -> io::Result<RwLockWriteGuard<'_, Disk>> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(self.disk.write().expect("nobody panics with this lock"))
    }
}

impl Backend for Memory {
    fn size(&self) -> u64 {
        self.size as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.reading().bytes[offset as usize..][..into.len()]);
        Ok(())
    }

    fn read_at_once(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.writing()?;
        let left = |room: u64| room.checked_sub(bytes.len() as u64);
        let full = |_| io::Error::new(io::ErrorKind::StorageFull, "no room there");
        self.room.fetch_update(Relaxed, Relaxed, left).map_err(full)?;
        let offset = offset as usize;
        disk.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        disk.allocated[offset / BLOCK..(offset + bytes.len()).div_ceil(BLOCK)].fill(true);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        let mut disk = self.writing()?;
        let (begin, end) = (offset as usize, (offset + length) as usize);
        disk.bytes[begin..end].fill(0);
        if how.may_punch {
            let (first, last) = (begin.div_ceil(BLOCK), end / BLOCK);
            disk.allocated[first.min(last)..last].fill(false);
        } else {
            disk.allocated[begin / BLOCK..end.div_ceil(BLOCK)].fill(true);
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, Zeroing { may_punch: true, fast: true })
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        let disk = self.reading();
        let (mut at, end) = (offset, offset + length);
        let mut extents: Vec<(bool, u64)> = Vec::new();
        while at < end {
            let block = at as usize / BLOCK;
            let next = ((block + 1) * BLOCK).min(end as usize) as u64;
            let allocated = disk.allocated[block];
            let told = extents.len();
            match extents.last_mut() {
                Some(last) if last.0 == allocated => last.1 += next - at,
                _ if told == most => break,
                _ => extents.push((allocated, next - at)),
            }
            at = next;
        }
        let extent = |(allocated, length)| if allocated { Extent::data(length) } else { Extent::hole(length) };
        Ok(extents.into_iter().map(extent).collect())
    }
}
