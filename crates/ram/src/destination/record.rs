//! What an agent that comes after this one needs to know of a post-copy: where QEMU has its userfaultfd and its RAM, and
//! which pages are missing.
//!
//! It is a file that is mapped, so each page that arrives changes a bit of it at once. It has its length, and its blocks on
//! disk, before the guest is paused. Its name tells how far things are: `.new` while the RAM comes before the guest, its own
//! in post-copy, `.complete` when all is there and QEMU still has to be left.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use crate::PAGE;
use crate::memory::{Backend, Block};
use crate::pages::PageSet;
use crate::wire::{Malformed, Reader};

/// What a record begins with; the last letter changes with what follows.
const MAGIC: [u8; 8] = *b"vmf-pc-2";
/// The longest head, in bytes: more than that has no record of ours.
const LONGEST_HEAD: u64 = 1 << 20;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Record {
    /// What it is called in post-copy.
    path: PathBuf,
    /// What it is called now.
    name: PathBuf,
    missing: Vec<PageSet>,
}

/// A record that an earlier agent has left.
pub(super) struct Found {
    pub(super) record: Record,
    /// The userfaultfd's descriptor in QEMU.
    pub(super) number: i32,
    pub(super) backends: Vec<Backend>,
}

impl Record {
    /// One of a post-copy that may begin later; no page is missing.
    pub(super) fn create(path: &Path, number: i32, blocks: &[Block]) -> io::Result<Self> {
        let mut head = MAGIC.to_vec();
        for number in [number as u32, blocks.len() as u32] {
            head.extend(number.to_le_bytes());
        }
        for block in blocks {
            head.extend(block.size().to_le_bytes());
            head.extend(block.address().to_le_bytes());
            head.extend((block.id().len() as u32).to_le_bytes());
            head.extend(block.id().as_bytes());
        }
        let name = path.with_extension("new");
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&name)?;
        file.write_all(&head)?;
        let sizes: Vec<u64> = blocks.iter().map(Block::size).collect();
        let length = Sets::of(head.len() as u64, &sizes).map(|set| set.offset + set.length).last().unwrap_or(PAGE);
        fallocate(&file, FallocateFlags::empty(), 0, length)?;
        let missing = map(&file, head.len() as u64, &sizes)?;
        Ok(Self { path: path.into(), name, missing })
    }

    /// Of a post-copy under way; `None` when there is none.
    pub(super) fn open(path: &Path) -> io::Result<Option<Found>> {
        Self::read(path, path.into())
    }

    /// Of one that had all it needed.
    pub(super) fn complete(path: &Path) -> io::Result<Option<Found>> {
        Self::read(path, path.with_extension("complete"))
    }

    fn read(path: &Path, name: PathBuf) -> io::Result<Option<Found>> {
        let file = match OpenOptions::new().read(true).write(true).open(&name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        (&file).take(LONGEST_HEAD).read_to_end(&mut bytes)?;
        let mut reader = Reader(&bytes);
        if reader.bytes(MAGIC.len()).map_err(io::Error::other)? != MAGIC {
            return Err(io::Error::other("another version of vmferry has written it, which has to be started again"));
        }
        let (number, backends) = read_head(&mut reader).map_err(io::Error::other)?;
        let head = (bytes.len() - reader.0.len()) as u64;
        let missing = map(&file, head, &backends.iter().map(|backend| backend.size).collect::<Vec<_>>())?;
        Ok(Some(Found { record: Self { path: path.into(), name, missing }, number, backends }))
    }

    /// By block.
    pub(super) fn missing(&self) -> &[PageSet] {
        &self.missing
    }

    /// The guest may run from here on, and what is missing is in it.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        std::fs::rename(&self.name, &self.path)?;
        self.name.clone_from(&self.path);
        Ok(())
    }

    /// All is there; may be told again.
    pub(super) fn end(&self) -> io::Result<()> {
        let complete = self.path.with_extension("complete");
        match std::fs::rename(&self.name, &complete) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && complete.exists() => Ok(()),
            result => result,
        }
    }

    /// Nothing of it is needed any more.
    pub(super) fn forget(&self) -> io::Result<()> {
        for name in [&self.name, &self.path.with_extension("complete")] {
            match std::fs::remove_file(name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Where the set of a block is in the file.
struct SetInFile {
    offset: u64,
    length: u64,
    pages: u64,
}

/// Where the sets of blocks of such sizes are, one after the other.
struct Sets;

impl Sets {
    fn of(head: u64, sizes: &[u64]) -> impl Iterator<Item = SetInFile> + '_ {
        sizes.iter().scan(head.next_multiple_of(PAGE), |next, size| {
            let (offset, pages) = (*next, size / PAGE);
            let length = PageSet::bytes_in_file(pages);
            *next += length;
            Some(SetInFile { offset, length, pages })
        })
    }
}

fn map(file: &File, head: u64, sizes: &[u64]) -> io::Result<Vec<PageSet>> {
    Sets::of(head, sizes).map(|set| PageSet::in_file(file, set.offset, set.pages)).collect()
}

/// The number of the userfaultfd in QEMU, and where its RAM is.
fn read_head(reader: &mut Reader<'_>) -> Result<(i32, Vec<Backend>), Malformed> {
    let (number, blocks) = (reader.u32()? as i32, reader.u32()?);
    let mut backend = || {
        let (size, address, length) = (reader.u64()?, reader.u64()?, reader.u32()?);
        let id = String::from_utf8_lossy(reader.bytes(length as usize)?).into_owned();
        Ok(Backend { id, size, address: Some(address) })
    };
    Ok((number, (0..blocks).map(|_| backend()).collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn what_is_missing_is_known_to_who_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let ram = GuestRam::of_our_own(&[100 * PAGE, 300_000 * PAGE]);
        let mut record = Record::create(&path, 17, ram.blocks()).unwrap();
        assert!(Record::open(&path).unwrap().is_none(), "no guest runs yet");
        record.missing()[0].insert(99..100);
        record.missing()[1].insert(262_000..263_000);
        record.begin().unwrap();
        record.missing()[1].remove(262_000..262_999);
        drop(record);

        let found = Record::open(&path).unwrap().unwrap();
        assert_eq!(found.number, 17);
        let told: Vec<_> = found.backends.iter().map(|backend| (backend.id.as_str(), backend.size)).collect();
        assert_eq!(told, [("ram0", 100 * PAGE), ("ram1", 300_000 * PAGE)]);
        assert_eq!(found.record.missing()[0].next_run(0..100), Some(99..100));
        assert_eq!(found.record.missing()[1].next_run(0..300_000), Some(262_999..263_000));

        found.record.end().unwrap();
        assert!(Record::open(&path).unwrap().is_none());
        Record::complete(&path).unwrap().unwrap().record.forget().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_was_cut_short_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        Record::create(&path, 3, GuestRam::of_our_own(&[1000 * PAGE]).blocks()).unwrap().begin().unwrap();
        for length in [PAGE, 20, 0] {
            OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
            assert!(Record::open(&path).is_err(), "{length} bytes");
        }
        std::fs::write(&path, [7; 5000]).unwrap();
        let error = Record::open(&path).err().unwrap();
        assert!(error.to_string().contains("another version"), "{error}");
    }

    #[test]
    fn a_folder_without_room_is_an_error_before_anything_is_missing() {
        let missing = Path::new("/nonexistent/record");
        assert!(Record::create(missing, 3, GuestRam::of_our_own(&[PAGE]).blocks()).is_err());
    }
}
