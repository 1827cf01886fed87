//! A raw image: a file, or a block device.

use std::fs::OpenOptions;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::backend::{Backend, Taken, Zeroing, locks};
use crate::session::BlockSizes;
use crate::transmission::Extent;

/// What is to be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is read and written.
    Write,
}

/// Why an image is not served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is neither a file nor a block device")]
    NoImage {
        /// What is no image.
        path: PathBuf,
    },
    /// Somebody uses it.
    #[error("cannot use {path}")]
    Taken {
        /// The image.
        path: PathBuf,
        /// Who, and what can be done.
        #[source]
        source: Taken,
    },
}

/// See the module's text.
pub struct File {
    image: std::fs::File,
    size: u64,
    access: Access,
    is_device: bool,
    /// The file system told that it can read without waiting.
    reads_at_once: AtomicBool,
    /// And that it knows holes.
    punches: AtomicBool,
}

/// How much is written at once where zeroes must be written one by one.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl File {
    /// Opens an image and keeps QEMUs out of it that do not go together with that.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.into(), source };
        // What blocks when it is opened is no image.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Write).custom_flags(nonblock);
        Self::over(options.open(path).map_err(failed)?, path, access)
    }

    /// The same of a file that is open for that, and at this path for its users.
    pub fn over(file: std::fs::File, path: &Path, access: Access) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.into(), source };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NoImage { path: path.into() });
        }
        locks::take(&file, access == Access::Write).map_err(|source| OpenError::Taken { path: path.into(), source })?;
        Self::unlocked(file, access).map_err(failed)
    }

    /// One that is read whatever others do to it, and nobody is kept from doing; at this path for its users.
    pub fn beside_others(file: std::fs::File, path: &Path) -> Result<Self, OpenError> {
        Self::unlocked(file, Access::Read).map_err(|source| OpenError::Open { path: path.into(), source })
    }

    fn unlocked(mut file: std::fs::File, access: Access) -> io::Result<Self> {
        let is_device = file.metadata()?.file_type().is_block_device();
        let size = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        let (reads_at_once, punches) = (AtomicBool::new(true), AtomicBool::new(true));
        Ok(Self { image: file, size, access, is_device, reads_at_once, punches })
    }

    /// Somebody has it open to write to it, and says so as QEMU does; or that cannot be told.
    pub fn is_written_by_others(&self) -> bool {
        locks::is_written(&self.image).unwrap_or(true)
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(&self.image, mode | FallocateFlags::KEEP_SIZE, offset, length) {
            // Block devices say so of what is not aligned to their sectors.
            Err(Errno::INVAL) => Err(Errno::OPNOTSUPP.into()),
            result => Ok(result?),
        }
    }

    /// Where data begins from here on, or a hole; `None` when it never does.
    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>> {
        match seek(&self.image, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY))
}

impl Backend for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.access == Access::Read
    }

    fn blocks(&self) -> BlockSizes {
        // Through the page cache any byte can be had; whole sectors are cheaper on a device.
        BlockSizes::DEFAULT
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // A file that has become shorter ends too early, which is an error here.
        self.image.read_exact_at(into, offset)
    }

    fn read_at_once(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        if !self.reads_at_once.load(Relaxed) {
            return Ok(false);
        }
        let length = into.len();
        match preadv2(&self.image, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == length),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.reads_at_once.store(false, Relaxed);
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.image.write_all_at(bytes, offset)
    }

    fn writes_are_quick(&self) -> bool {
        true
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        if how.may_punch && self.punches.load(Relaxed) {
            match self.fallocate(FallocateFlags::PUNCH_HOLE, offset, length) {
                Err(error) if is_unsupported(&error) => self.punches.store(self.is_device, Relaxed),
                result => return result,
            }
        }
        match self.fallocate(FallocateFlags::ZERO_RANGE, offset, length) {
            Err(error) if is_unsupported(&error) && how.fast => return Err(error),
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let part = (end - at).min(ZEROES.len() as u64);
            self.write(at, &ZEROES[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 || !self.punches.load(Relaxed) {
            return Ok(());
        }
        match self.fallocate(FallocateFlags::PUNCH_HOLE, offset, length) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    fn cache(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fadvise(&self.image, offset, std::num::NonZeroU64::new(length), Advice::WillNeed)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.sync_data()
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        // Devices do not tell.
        if self.is_device {
            return Ok(vec![Extent::data(length)]);
        }
        let (mut extents, mut at, end) = (Vec::new(), offset, offset + length);
        while at < end && extents.len() < most {
            let data = match self.seek(SeekFrom::Data(at)) {
                Ok(data) => data.unwrap_or(end).min(end),
                Err(error) if is_unsupported(&error) => at,
                Err(error) => return Err(error),
            };
            if data > at {
                extents.push(Extent::hole(data - at));
            } else {
                let hole = self.seek(SeekFrom::Hole(at)).ok().flatten().unwrap_or(end).min(end);
                if hole <= at {
                    // It was punched in between: the next round sees it.
                    continue;
                }
                extents.push(Extent::data(hole - at));
                at = hole;
                continue;
            }
            at = data;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sparse() -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * MIB).unwrap();
        file.as_file().write_all_at(&vec![7; 2 << 20], 2 * MIB).unwrap();
        let image = File::open(file.path(), Access::Write).unwrap();
        (file, image)
    }

    #[test]
    fn holes_are_told_and_kept_and_made() {
        let (_file, image) = sparse();
        let told = image.status(0, 8 * MIB, 100).unwrap();
        assert_eq!(told, [Extent::hole(2 * MIB), Extent::data(2 * MIB), Extent::hole(4 * MIB)]);
        assert_eq!(image.status(3 * MIB, 2 * MIB, 1).unwrap(), [Extent::data(MIB)]);
        let zeroing = Zeroing { may_punch: true, fast: true };
        image.write_zeroes(2 * MIB, MIB, zeroing).unwrap();
        assert_eq!(image.status(0, 4 * MIB, 100).unwrap(), [Extent::hole(3 * MIB), Extent::data(MIB)]);
        image.trim(3 * MIB, MIB).unwrap();
        assert_eq!(image.status(0, 8 * MIB, 100).unwrap(), [Extent::hole(8 * MIB)]);
        let mut read = [1; 4096];
        image.read(2 * MIB, &mut read).unwrap();
        assert_eq!(read, [0; 4096]);
    }

    #[test]
    fn zeroes_that_may_be_no_hole_are_allocated() {
        let (file, image) = sparse();
        image.write_zeroes(4 * MIB, MIB, Zeroing { may_punch: false, fast: false }).unwrap();
        let allocated = std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap()) * 512;
        assert!(allocated >= 3 * MIB, "{allocated}");
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let (file, image) = sparse();
        file.as_file().set_len(MIB).unwrap();
        assert!(image.read(MIB - 512, &mut [0; 1024]).is_err());
        assert!(!image.read_at_once(MIB - 512, &mut [0; 1024]).unwrap());
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let open = |path: &str| File::open(Path::new(path), Access::Read).err().unwrap().to_string();
        assert!(open("/dev/null").contains("neither a file nor a block device"));
        assert!(open("/").contains("neither"));
        assert!(open("/nothing").contains("cannot open"));
    }
}
