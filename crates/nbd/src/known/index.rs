//! Where in an image there are grains of which sums; on disk.
//!
//! A file: a head, the image's path, and sections. A section is what one reading had in memory when that was full, sorted: so
//! making the index of an image takes the same memory whatever its size. It begins with two numbers, of its entries and of
//! the bits of its directory; the directory tells for each value of a sum's first bits where the entries begin, so that
//! a look takes two short reads. An entry is the beginning of a sum and the grain's place. Numbers are big-endian.

use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{Offered, is_sampled};
use crate::backend::Backend;
use crate::blocks::{BLOCK, GRAIN, Next, Sum, Walk, place, which};

const MAGIC: &[u8; 8] = b"VMFKNOWN";
const VERSION: u32 = 1;
/// Magic, version, bytes of the path, and what the image was: six numbers.
const HEAD: usize = 8 + 4 + 4 + 6 * 8;
/// Bytes of a sum that an entry has.
const KEY: usize = 7;
/// And of a grain's number.
const NUMBER: usize = 5;
const ENTRY: usize = KEY + NUMBER;
/// The most entries of a section: 48 MiB of memory while it is made, and about 256 GiB of an image.
const MOST_ENTRIES: usize = 4 << 20;
/// How many entries there are for each of a directory's, about.
const EACH: usize = 32;
/// No look reads more entries than this: only somebody who makes sums to that end has so many begin alike.
const MOST_READ: u32 = 1024;
/// The longest path.
const MOST_PATH: usize = 4096;

/// Which image it is, and how it was: when one of these is another, somebody may have written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its file system.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    size: u64,
    written: (i64, i64),
    /// Changes also when the time of the last write is set back.
    changed: i64,
}

impl Identity {
    /// Of this file, now.
    pub fn of(file: &Metadata) -> Self {
        let written = (file.mtime(), file.mtime_nsec());
        Self { device: file.dev(), inode: file.ino(), size: file.size(), written, changed: file.ctime() }
    }

    /// When it was written last, in seconds and nanoseconds since 1970.
    pub fn written(&self) -> (i64, i64) {
        self.written
    }

    fn numbers(&self) -> [u64; 6] {
        let Self { device, inode, size, written, changed } = *self;
        [device, inode, size, written.0 as u64, written.1 as u64, changed as u64]
    }

    fn from_numbers([device, inode, size, written, nanoseconds, changed]: [u64; 6]) -> Self {
        Self { device, inode, size, written: (written as i64, nanoseconds as i64), changed: changed as i64 }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Index {
    file: File,
    path: PathBuf,
    identity: Identity,
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Section {
    /// Of its directory.
    at: u64,
    bits: u32,
    entries: u32,
}

impl Section {
    fn entries_at(&self) -> u64 {
        self.at + ((1 << self.bits) + 1) * 4
    }

    fn end(&self) -> u64 {
        self.entries_at() + u64::from(self.entries) * ENTRY as u64
    }
}

fn no_index() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no index")
}

impl Index {
    /// One that was made.
    pub fn open(at: &Path) -> io::Result<Self> {
        let file = File::open(at)?;
        let end = file.metadata()?.len();
        let mut head = [0; HEAD];
        file.read_exact_at(&mut head, 0)?;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let length = number(12) as usize;
        if head[..8] != MAGIC[..] || number(8) != VERSION || length > MOST_PATH {
            return Err(no_index());
        }
        let (numbers, _) = head[16..].as_chunks::<8>();
        let numbers: [u64; 6] = std::array::from_fn(|it| u64::from_be_bytes(numbers[it]));
        let mut path = vec![0; length];
        file.read_exact_at(&mut path, HEAD as u64)?;
        let (mut sections, mut at) = (Vec::new(), (HEAD + length) as u64);
        while at < end {
            let mut head = [0; 8];
            file.read_exact_at(&mut head, at)?;
            let [entries, bits] = [0, 4].map(|it| u32::from_be_bytes(head[it..it + 4].try_into().expect("four bytes")));
            let section = Section { at: at + 8, bits, entries };
            if bits > 31 || entries as usize > MOST_ENTRIES || section.end() > end {
                return Err(no_index());
            }
            at = section.end();
            sections.push(section);
        }
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&path));
        Ok(Self { file, path, identity: Identity::from_numbers(numbers), sections })
    }

    /// Where its image was.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its image was.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Where in the image, in bytes, there was a grain of this sum; one of the places, if there were several.
    pub(super) fn find(&self, sum: &Sum) -> Option<u64> {
        // What cannot be read is not known.
        self.sections.iter().find_map(|section| self.find_in(section, sum).ok().flatten())
    }

    fn find_in(&self, section: &Section, sum: &Sum) -> io::Result<Option<u64>> {
        let mut bounds = [0; 8];
        self.file.read_exact_at(&mut bounds, section.at + u64::from(bucket_of(sum, section.bits)) * 4)?;
        let [from, to] = [0, 4].map(|it| u32::from_be_bytes(bounds[it..it + 4].try_into().expect("four bytes")));
        if from > to || to > section.entries {
            return Err(no_index());
        }
        let mut entries = vec![0; (to - from).min(MOST_READ) as usize * ENTRY];
        self.file.read_exact_at(&mut entries, section.entries_at() + u64::from(from) * ENTRY as u64)?;
        let (entries, _) = entries.as_chunks::<ENTRY>();
        let found = entries.iter().find(|entry| entry[..KEY] == sum[..KEY]);
        Ok(found.map(|entry| entry[KEY..].iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) * GRAIN as u64))
    }
}

/// Which of a directory's entries this is for, by its first bits.
fn bucket_of(sum: &[u8], bits: u32) -> u32 {
    let first = u32::from_be_bytes(sum[..4].try_into().expect("a sum has more"));
    first.checked_shr(32 - bits).unwrap_or(0)
}

/// Makes the index of this image, which is at this path and was this when it was opened, whole or not at all; `false` when
/// `goes_on` said so, which is asked after each block. Reads all of it.
pub fn index(
    image: &dyn Backend,
    path: &Path,
    identity: Identity,
    into: &Path,
    goes_on: &mut dyn FnMut() -> bool,
) -> io::Result<bool> {
    let new = into.with_extension("new");
    let made = (|| {
        let mut out = BufWriter::new(File::create(&new)?);
        let path = path.as_os_str().as_bytes();
        if path.len() > MOST_PATH {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its path is too long"));
        }
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_be_bytes())?;
        out.write_all(&(path.len() as u32).to_be_bytes())?;
        for number in identity.numbers() {
            out.write_all(&number.to_be_bytes())?;
        }
        out.write_all(path)?;
        let (mut walk, mut buffer, mut entries) = (Walk::over(image), vec![0; BLOCK as usize], Vec::new());
        while let Some(next) = walk.next()? {
            if !goes_on() {
                return Ok(false);
            }
            let Next::Block(block) = next else { continue };
            let at = place(block, image.size());
            let bytes = &mut buffer[..(at.end - at.start) as usize];
            image.read(at.start, bytes)?;
            let offered = Offered::of(bytes);
            for (number, sum) in which(&offered.full).zip(&offered.sums) {
                if is_sampled(sum) {
                    let mut entry = [0; ENTRY];
                    entry[..KEY].copy_from_slice(&sum[..KEY]);
                    entry[KEY..]
                        .copy_from_slice(&(at.start / GRAIN as u64 + number as u64).to_be_bytes()[8 - NUMBER..]);
                    entries.push(entry);
                }
            }
            if entries.len() + BLOCK as usize / GRAIN > MOST_ENTRIES {
                write_section(&mut out, &mut entries)?;
            }
        }
        write_section(&mut out, &mut entries)?;
        out.flush()?;
        std::fs::rename(&new, into)?;
        Ok(true)
    })();
    if !matches!(made, Ok(true)) {
        let _ = std::fs::remove_file(&new);
    }
    made
}

fn write_section(out: &mut impl Write, entries: &mut Vec<[u8; ENTRY]>) -> io::Result<()> {
    entries.sort_unstable();
    // Of grains that are the same one is enough.
    entries.dedup_by(|one, other| one[..KEY] == other[..KEY]);
    if entries.is_empty() {
        return Ok(());
    }
    let bits = (entries.len() / EACH).max(1).ilog2();
    out.write_all(&(entries.len() as u32).to_be_bytes())?;
    out.write_all(&bits.to_be_bytes())?;
    let mut before = 0;
    for bucket in 0..=1_u32 << bits {
        while before < entries.len() && bucket_of(&entries[before], bits) < bucket {
            before += 1;
        }
        out.write_all(&(before as u32).to_be_bytes())?;
    }
    for entry in entries.drain(..) {
        out.write_all(&entry)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Memory;
    use crate::blocks::sum_of;

    const MIB: usize = 1 << 20;

    fn identity() -> Identity {
        Identity::of(&tempfile::tempfile().unwrap().metadata().unwrap())
    }

    fn made(bytes: &[u8]) -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("it.known");
        let image = Memory::holding(bytes.to_vec());
        assert!(index(&image, Path::new("/a/b"), identity(), &at, &mut || true).unwrap());
        let index = Index::open(&at).unwrap();
        (dir, index)
    }

    fn random(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        bytes
    }

    #[test]
    fn every_sampled_grain_is_found_where_it_is_and_no_other() {
        for length in [0, 1, GRAIN, 3 * MIB + 5, 64 * MIB] {
            let bytes = random(1, length);
            let (_dir, index) = made(&bytes);
            assert_eq!((index.path(), index.sections.len()), (Path::new("/a/b"), usize::from(length > 3 * MIB)));
            let mut sampled = 0;
            for (number, bytes) in bytes.chunks(GRAIN).enumerate() {
                let sum = sum_of(bytes);
                sampled += usize::from(is_sampled(&sum));
                assert_eq!(index.find(&sum), is_sampled(&sum).then_some((number * GRAIN) as u64), "{length}: {number}");
            }
            assert!(sampled.abs_diff(length / GRAIN / 16) < 150, "{sampled} of {length}");
            assert!((0..200).all(|it| index.find(&sum_of(&random(2 + it, GRAIN))).is_none()));
        }
    }

    #[test]
    fn what_is_there_often_is_in_it_once_and_zeroes_are_not() {
        let same = (0..1000).map(|seed| random(seed, GRAIN)).find(|it| is_sampled(&sum_of(it))).unwrap();
        let bytes = [vec![0; MIB], same.repeat(2 * MIB / GRAIN)].concat();
        let (dir, index) = made(&bytes);
        assert_eq!(index.find(&sum_of(&same)), Some(MIB as u64));
        assert!(std::fs::metadata(dir.path().join("it.known")).unwrap().len() < 200);
    }

    #[test]
    fn it_takes_a_five_thousandth_of_the_image() {
        let (dir, _index) = made(&random(3, 64 * MIB));
        let length = std::fs::metadata(dir.path().join("it.known")).unwrap().len();
        assert!(length * 4900 < 64 * MIB as u64, "{length}");
    }

    #[test]
    fn a_file_that_is_none_or_is_damaged_is_refused_or_knows_nothing_and_does_no_harm() {
        let image = random(4, 8 * MIB);
        let (dir, index) = made(&image);
        let at = dir.path().join("it.known");
        let good = std::fs::read(&at).unwrap();
        let sum = image.chunks(GRAIN).map(sum_of).find(is_sampled);
        assert!(index.find(&sum.unwrap()).is_some());
        for cut in [0, 7, HEAD - 1, HEAD + 2, HEAD + 8, good.len() - 1] {
            std::fs::write(&at, &good[..cut]).unwrap();
            assert!(Index::open(&at).is_err(), "{cut}");
        }
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..300 {
            let mut bad = good.clone();
            let most = if random.bool() { 600 } else { usize::MAX };
            let at_byte = random.usize(..bad.len().min(most));
            bad[at_byte] = random.u8(..);
            std::fs::write(&at, &bad).unwrap();
            if let Ok(index) = Index::open(&at) {
                index.find(&sum.unwrap());
            }
        }
    }

    #[test]
    fn one_that_is_not_finished_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("it.known");
        let image = Memory::holding(random(6, 4 * MIB));
        let mut blocks = 0;
        let mut twice = || {
            blocks += 1;
            blocks < 3
        };
        assert!(!index(&image, Path::new("/a"), identity(), &at, &mut twice).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
