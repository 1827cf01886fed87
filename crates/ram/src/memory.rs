//! Guest RAM as what it is on the host: shared files that QEMU has mapped, which are read and written like others.
//!
//! They are not mapped here. Mapped memory that somebody else writes to is no memory in Rust's sense, and it would count
//! as ours: the kernel would find the agent as large as all its guests together.

mod mappings;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, major, minor, seek};
use rustix::io::Errno;

use crate::PAGE;
use crate::process::Process;
use mappings::{Area, areas};

/// What `fstatfs` says of huge pages.
const HUGETLBFS: u64 = 0x9584_58F6;

/// A memory backend of a QEMU (`-object memory-backend-*`), as QEMU is asked about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its name.
    pub id: String,
    /// In bytes.
    pub size: u64,
    /// Where QEMU has mapped it, if that is known. If not, it is known by its size.
    pub address: Option<u64>,
}

/// Why the RAM of a QEMU cannot be used from outside.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It has ended, or we may not look at it.
    #[error("cannot look at the memory of process {pid}")]
    Process {
        /// QEMU's.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nobody but QEMU can see what is in it.
    #[error(
        "RAM `{id}` is not shared: it takes a memory backend with share=on, such as `-object memory-backend-memfd,id={id},share=on,size=...`"
    )]
    NotShared {
        /// The backend's name.
        id: String,
    },
    /// No such memory is mapped.
    #[error("QEMU has no shared memory of {size} bytes, as RAM `{id}` should be")]
    Missing {
        /// The backend's name.
        id: String,
        /// Its size in bytes.
        size: u64,
    },
    /// Two could be meant.
    #[error("RAM `{id}` could be {one} or {other} in QEMU, which are of one size")]
    Ambiguous {
        /// The backend's name.
        id: String,
        /// A mapping.
        one: String,
        /// Another.
        other: String,
    },
    /// What is at the address has another size.
    #[error("RAM `{id}` has {size} bytes, but QEMU has mapped {mapped} where it should be")]
    Size {
        /// The backend's name.
        id: String,
        /// Its size in bytes.
        size: u64,
        /// The mapping's.
        mapped: u64,
    },
    /// The mapping does not begin where its file does.
    #[error("RAM `{id}` begins {offset} bytes into its file; that is not supported")]
    Offset {
        /// The backend's name.
        id: String,
        /// In bytes.
        offset: u64,
    },
    /// It cannot be moved page by page.
    #[error("RAM `{id}` is in huge pages of hugetlbfs; that is not supported")]
    HugePages {
        /// The backend's name.
        id: String,
    },
    /// Its file cannot be opened.
    #[error("cannot open the file behind RAM `{id}`")]
    File {
        /// The backend's name.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why memory was not given back.
#[derive(Debug, thiserror::Error)]
pub enum PunchError {
    /// The kernel left pages where they were, with zeros in them: they are part of a larger one that is in use.
    #[error("{} bytes of RAM from {:#x} on could not be given back", .0.end - .0.start, .0.start)]
    StillThere(Range<u64>),
    /// Another error.
    #[error("cannot give RAM back")]
    Io(#[from] io::Error),
}

/// The RAM of one QEMU.
#[derive(Debug)]
pub struct GuestRam {
    process: Process,
    blocks: Vec<Block>,
}

impl GuestRam {
    /// Finds the memory of these backends in a QEMU, in the same order.
    pub fn open(pid: u32, backends: &[Backend]) -> Result<Self, MemoryError> {
        let look = |source| MemoryError::Process { pid, source };
        let process = Process::open(pid).map_err(look)?;
        let areas = areas(&process.mappings().map_err(look)?);
        let mut blocks = Vec::with_capacity(backends.len());
        for backend in backends {
            let area = mappings::find(&areas, backends, backend)?;
            blocks.push(Block::open(&process, backend, area)?);
        }
        Ok(Self { process, blocks })
    }

    /// Blocks of our own, of these sizes.
    #[cfg(test)]
    pub(crate) fn of_our_own(sizes: &[u64]) -> Self {
        let block = |(number, size): (usize, &u64)| {
            let id = format!("ram{number}");
            let file = File::from(rustix::fs::memfd_create(&id, rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            file.set_len(*size).unwrap();
            Block { id, size: *size, address: 0, file }
        };
        let process = Process::open(std::process::id()).unwrap();
        Self { process, blocks: sizes.iter().enumerate().map(block).collect() }
    }

    /// The same blocks once more.
    #[cfg(test)]
    pub(crate) fn same(other: &Self) -> Self {
        let again = |block: &Block| Block { id: block.id.clone(), file: block.file.try_clone().unwrap(), ..*block };
        let process = Process::open(std::process::id()).unwrap();
        Self { process, blocks: other.blocks.iter().map(again).collect() }
    }

    /// In the order in which the backends were given.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// QEMU has ended.
    pub fn is_gone(&self) -> bool {
        self.process.is_gone()
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn addresses(&self) -> Vec<Addresses> {
        self.blocks.iter().map(Block::addresses).collect()
    }
}

/// One backend's memory. Offsets are in bytes from its beginning.
#[derive(Debug)]
pub struct Block {
    id: String,
    size: u64,
    address: u64,
    file: File,
}

impl Block {
    fn open(process: &Process, backend: &Backend, area: &Area) -> Result<Self, MemoryError> {
        let id = backend.id.clone();
        if area.offset != 0 {
            return Err(MemoryError::Offset { id, offset: area.offset });
        }
        let file = open_file(process, area).map_err(|source| MemoryError::File { id: id.clone(), source })?;
        let of = fstatfs(&file).map_err(|errno| MemoryError::File { id: id.clone(), source: errno.into() })?;
        if of.f_type as u64 == HUGETLBFS {
            return Err(MemoryError::HugePages { id });
        }
        Ok(Self { id, size: backend.size, address: area.range.start, file })
    }

    /// The backend's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where QEMU has it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Reads what is there; zeros where nothing is, which stays so. Must not reach beyond the end.
    ///
    /// While the guest runs, a page that it writes to may be read half old and half new. Tracking tells that it was
    /// written.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Writes to memory that nobody uses yet. Must not reach beyond the end: the file would grow.
    ///
    /// Neither tracking nor an armed [`Arrival`](crate::Arrival) notices, and whoever waits for a page is not woken.
    /// With huge pages in shared memory (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`) the pages around it may be
    /// there afterwards too, filled with zeros.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= self.size, "a guest's RAM does not grow");
        self.file.write_all_at(bytes, offset)
    }

    /// Gives memory back to the host: zeros are read there, and an armed [`Arrival`](crate::Arrival) finds it missing.
    /// `range` consists of whole pages.
    pub fn punch(&self, range: Range<u64>) -> Result<(), PunchError> {
        if range.is_empty() {
            return Ok(());
        }
        assert!(range.end <= self.size.next_multiple_of(PAGE), "beyond the guest's RAM");
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, how, range.start, range.end - range.start).map_err(io::Error::from)?;
        // Of a large page that somebody holds, the kernel only clears the part that was asked for.
        match self.data(range)?.into_iter().next() {
            None => Ok(()),
            Some(rest) => Err(PunchError::StillThere(rest)),
        }
    }

    /// Whether there is memory for all of it, as QEMU's `prealloc=on` sees to.
    pub(crate) fn is_all_there(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.blocks() * 512 >= self.size)
    }

    /// Where in `range` there is memory, in order and in whole pages. Elsewhere zeros are read.
    pub fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut from = range.start;
        while from < range.end {
            let start = match seek(&self.file, SeekFrom::Data(from)) {
                Ok(start) if start < range.end => start,
                // Nothing but holes up to the end of the range or of the file.
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            let end = seek(&self.file, SeekFrom::Hole(start))?.next_multiple_of(PAGE).min(range.end);
            let start = start - start % PAGE;
            match found.last_mut() {
                // Memory may come while it is looked for.
                Some(last) if last.end >= start => last.end = end,
                _ => found.push(start.max(range.start)..end),
            }
            from = end;
        }
        Ok(found)
    }

    /// Where the first memory in `range` is, in whole pages; none when there is none. What is before it is a hole. Unlike
    /// [`data`](Block::data), which looks for the end of each stretch, however far beyond the range, this is quick.
    pub fn first_data(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(start) if start < range.end => Ok(Some((start - start % PAGE).max(range.start))),
            Ok(_) | Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn addresses(&self) -> Addresses {
        Addresses { start: self.address, size: self.size.next_multiple_of(PAGE) }
    }
}

/// Where a block is in QEMU: the only place where offsets become addresses, and the other way.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    start: u64,
    size: u64,
}

impl Addresses {
    pub(crate) fn all(&self) -> Range<u64> {
        self.start..self.start + self.size
    }

    /// `offsets` are of whole pages.
    pub(crate) fn of(&self, offsets: &Range<u64>) -> Range<u64> {
        let whole = offsets.start.is_multiple_of(PAGE) && offsets.end.is_multiple_of(PAGE);
        assert!(whole && offsets.end <= self.size, "{offsets:?} are not pages of a block of {} bytes", self.size);
        self.start + offsets.start..self.start + offsets.end
    }

    pub(crate) fn offset(&self, address: u64) -> Option<u64> {
        self.all().contains(&address).then(|| address - self.start)
    }

    /// Which of these blocks an address is in, and the number of its page there.
    pub(crate) fn find(blocks: &[Self], address: u64) -> Option<(usize, u64)> {
        blocks.iter().enumerate().find_map(|(block, of)| Some((block, of.offset(address)? / PAGE)))
    }
}

/// A description of our own, so that where we seek is not where QEMU is.
fn open_file(process: &Process, area: &Area) -> io::Result<File> {
    let open = |path: String| OpenOptions::new().read(true).write(true).open(path);
    let pid = process.pid;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
    for number in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let path = format!("/proc/{pid}/fd/{number}");
        let is_it = std::fs::metadata(&path).is_ok_and(|file| {
            (major(file.dev()), minor(file.dev()), file.ino()) == area.file && file.file_type().is_file()
        });
        if is_it && let Ok(file) = open(path) {
            return Ok(file);
        }
    }
    // QEMU has closed its descriptor, or may only read through it. This takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    open(format!("/proc/{pid}/map_files/{:x}-{:x}", area.first.start, area.first.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(size: u64) -> Block {
        let file = File::from(rustix::fs::memfd_create("block", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        Block { id: "ram".into(), size, address: 0x10_0000, file }
    }

    #[test]
    fn only_what_was_written_is_there_until_it_is_punched() {
        let block = block(64 * PAGE);
        assert_eq!(block.data(0..block.size()).unwrap(), []);
        block.write_at(3 * PAGE, &[1; 2 * PAGE as usize]).unwrap();
        block.write_at(9 * PAGE + 5, &[1]).unwrap();
        block.write_at(63 * PAGE, &[1]).unwrap();
        let pages = |pages: Range<u64>| pages.start * PAGE..pages.end * PAGE;
        assert_eq!(block.data(0..block.size()).unwrap(), [pages(3..5), pages(9..10), pages(63..64)]);
        assert_eq!(block.data(pages(4..9)).unwrap(), [pages(4..5)]);
        assert_eq!(block.data(pages(5..9)).unwrap(), []);

        assert_eq!(block.first_data(0..block.size()).unwrap(), Some(3 * PAGE));
        assert_eq!(block.first_data(pages(4..9)).unwrap(), Some(4 * PAGE));
        assert_eq!(block.first_data(pages(5..9)).unwrap(), None);

        block.punch(pages(4..60)).unwrap();
        assert_eq!(block.data(0..block.size()).unwrap(), [pages(3..4), pages(63..64)]);
        let mut page = [7; PAGE as usize];
        block.read_at(4 * PAGE, &mut page).unwrap();
        assert!(crate::zero::is_zero(&page));
        assert_eq!(block.data(0..block.size()).unwrap().len(), 2, "reading makes no memory");
        block.punch(0..0).unwrap();
    }

    #[test]
    fn a_block_has_no_memory_beyond_its_end() {
        let block = block(2 * PAGE);
        assert!(block.read_at(PAGE, &mut [0; PAGE as usize + 1]).is_err());
        let beyond = std::panic::catch_unwind(|| block.write_at(2 * PAGE, &[1]));
        assert!(beyond.is_err() && block.file.metadata().unwrap().len() == 2 * PAGE);
    }

    #[test]
    fn offsets_and_addresses_are_each_others_inverse() {
        let addresses = block(4 * PAGE).addresses();
        assert_eq!(addresses.of(&(PAGE..2 * PAGE)), 0x10_1000..0x10_2000);
        assert_eq!(addresses.offset(0x10_1000), Some(PAGE));
        assert_eq!((addresses.offset(0xF_FFFF), addresses.offset(0x10_4000)), (None, None));
        for wrong in [1..PAGE, 0..5 * PAGE] {
            assert!(std::panic::catch_unwind(|| addresses.of(&wrong)).is_err());
        }
    }
}
