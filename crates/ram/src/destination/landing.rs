//! Where a guest's RAM arrives, over one link or several, before an agent's end and after it.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::RamError;
use crate::arrival::{Arrival, ArrivalError};
use crate::kernel::InjectError;
use crate::memory::{Backend, Block, GuestRam, PunchError};
use crate::pages::PageSet;
use crate::wire::{Content, Malformed, Reader, Run, decode_missing, encode_missing};
use crate::{PAGE, delta};

/// How many pages are changed by deltas at a time.
const AMENDED: u64 = 16;

/// See the module's text.
pub struct Landing {
    ram: Arc<GuestRam>,
    /// Where what a new agent needs in post-copy is written.
    record: PathBuf,
    /// For post-copy, until that begins.
    ready: Mutex<Option<Arrival>>,
    armed: OnceLock<Armed>,
}

/// What there is in post-copy only.
pub(super) struct Armed {
    pub(super) arrival: Arrival,
    /// Pages that the source has and this side has not. A hole that is not among them is a page of zeroes.
    pub(super) missing: Vec<PageSet>,
    left: AtomicU64,
}

impl Landing {
    /// In the RAM of a QEMU that waits for its guest. `record` is a file that is written when the guest may run before
    /// its RAM is complete, and goes when it is.
    pub fn new(ram: GuestRam, record: &Path) -> Self {
        Self { ram: Arc::new(ram), record: record.into(), ready: Mutex::default(), armed: OnceLock::new() }
    }

    /// Makes ready for a guest that runs before its RAM is complete, while it has none. Fails where that cannot be; the
    /// RAM may come before the guest all the same.
    pub fn prepare_post_copy(&self) -> Result<(), RamError> {
        let arrival = Arrival::ready(Arc::clone(&self.ram))?;
        *self.ready.lock().expect("no holder of this lock panics") = Some(arrival);
        Ok(())
    }

    fn take_ready(&self) -> Option<Arrival> {
        self.ready.lock().expect("no holder of this lock panics").take()
    }

    /// There will be no post-copy: nothing is left in QEMU.
    pub(super) fn forget_post_copy(&self) -> Result<(), RamError> {
        self.take_ready().map_or(Ok(()), |arrival| Ok(arrival.disarm()?))
    }

    /// In the RAM of a guest that may run already, which an earlier agent has left: what has arrived is there, and all
    /// else is missing. `None` when there is no record of such a guest. Its QEMU, process `pid`, is asked for nothing.
    pub fn again(pid: u32, record: &Path) -> Result<Option<Self>, RamError> {
        if let Some(bytes) = read(&complete(record))? {
            let (number, backends) = read_head(&mut Reader(&bytes))?;
            match Arrival::again(Arc::new(GuestRam::open(pid, &backends)?), number) {
                Ok(arrival) => arrival.disarm()?,
                // The earlier agent came so far.
                Err(ArrivalError::Inject(InjectError::NotOurs { .. })) => {}
                Err(error) => return Err(error.into()),
            }
            std::fs::remove_file(complete(record)).map_err(RamError::record)?;
            return Ok(None);
        }
        let Some(bytes) = read(record)? else { return Ok(None) };
        let mut reader = Reader(&bytes);
        let (number, backends) = read_head(&mut reader)?;
        let ram = Arc::new(GuestRam::open(pid, &backends)?);
        let missing: Vec<PageSet> = ram.blocks().iter().map(|block| PageSet::new(block.size() / PAGE)).collect();
        while !reader.0.is_empty() {
            let length = reader.u32()? as usize;
            decode_missing(reader.bytes(length)?, &missing)?;
        }
        let mut left = 0;
        for (block, set) in ram.blocks().iter().zip(&missing) {
            for data in block.data(0..block.size()).map_err(RamError::io)? {
                set.remove(data.start / PAGE..data.end / PAGE);
            }
            left += set.len();
        }
        let arrival = Arrival::again(Arc::clone(&ram), number)?;
        let armed = OnceLock::from(Armed { arrival, missing, left: AtomicU64::new(left) });
        let landing = Self { ram, record: record.into(), ready: Mutex::default(), armed };
        if left == 0 {
            landing.disarm()?;
            return Ok(None);
        }
        Ok(Some(landing))
    }

    /// What is not here yet, in bytes; `None` before post-copy.
    pub fn missing(&self) -> Option<u64> {
        self.armed.get().map(|armed| armed.left.load(Ordering::Relaxed) * PAGE)
    }

    #[cfg(test)]
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(super) fn armed(&self) -> Option<&Armed> {
        self.armed.get()
    }

    pub(super) fn blocks(&self) -> &[Block] {
        self.ram.blocks()
    }

    /// Whatever a QEMU that waits has put into its RAM is none of the guest's.
    pub(super) fn clear(&self) -> Result<(), RamError> {
        Ok(self.blocks().iter().try_for_each(|block| block.punch(0..block.size()))?)
    }

    /// Faults are taken from now on, and these pages will come.
    pub(super) fn arm(&self, missing: Vec<PageSet>) -> Result<&Armed, RamError> {
        if self.armed.get().is_some() {
            return Err(Malformed("post-copy begins twice").into());
        }
        // First, so that the kernel fills no hole with a large page of zeroes meanwhile.
        let arrival = match self.take_ready() {
            Some(arrival) => arrival,
            None => Arrival::ready(Arc::clone(&self.ram))?,
        };
        arrival.begin()?;
        let left = match self.punch(&missing) {
            Ok(left) => left,
            Err(error) => {
                // The first error is the one to tell.
                let _ = arrival.disarm();
                return Err(error);
            }
        };
        self.write_record(arrival.number(), &missing).map_err(RamError::record)?;
        let armed = Armed { arrival, missing, left: AtomicU64::new(left) };
        Ok(self.armed.get_or_init(|| armed))
    }

    /// Takes away what is stale; how many pages that is, with those that were never there.
    pub(super) fn punch(&self, missing: &[PageSet]) -> Result<u64, RamError> {
        let mut left = 0;
        for (block, set) in self.blocks().iter().zip(missing) {
            for data in block.data(0..block.size()).map_err(RamError::io)? {
                let mut from = data.start / PAGE;
                while let Some(stale) = set.next_run(from..data.end / PAGE) {
                    from = stale.end;
                    block.punch(stale.start * PAGE..stale.end * PAGE)?;
                }
            }
            left += set.len();
        }
        Ok(left)
    }

    /// Puts a run of pages where it belongs. True when it was the last that was missing.
    pub(super) fn put(&self, run: &Run, data: &[u8]) -> Result<bool, RamError> {
        let bytes = run.pages.start * PAGE..run.pages.end * PAGE;
        let block = &self.blocks()[run.block];
        let Some(armed) = self.armed.get() else {
            match run.content {
                Content::Whole => block.write_at(bytes.start, data).map_err(RamError::io)?,
                Content::Delta => amend(block, bytes, data)?,
                Content::Zero => match block.punch(bytes) {
                    // Zeroes they are.
                    Ok(()) | Err(PunchError::StillThere(_)) => {}
                    Err(error) => return Err(error.into()),
                },
            }
            return Ok(false);
        };
        if armed.left.load(Ordering::Acquire) == 0 {
            return Ok(false);
        }
        match run.content {
            Content::Whole => armed.arrival.place(run.block, bytes.start, data),
            Content::Zero => armed.arrival.place_zero(run.block, bytes),
            // What they differ from was punched out.
            Content::Delta => return Err(Malformed("differences of pages in post-copy").into()),
        }?;
        let new = armed.missing[run.block].remove(run.pages.clone());
        Ok(new > 0 && armed.left.fetch_sub(new, Ordering::AcqRel) == new)
    }

    /// All RAM is here: nothing is left of post-copy, in the guest or on record.
    pub(super) fn disarm(&self) -> Result<(), RamError> {
        let Some(armed) = self.armed.get() else { return Ok(()) };
        // From when faults are not taken any more, holes do not tell what is missing.
        let complete = complete(&self.record);
        std::fs::rename(&self.record, &complete).map_err(RamError::record)?;
        armed.arrival.disarm()?;
        std::fs::remove_file(complete).map_err(RamError::record)
    }

    fn write_record(&self, number: i32, missing: &[PageSet]) -> std::io::Result<()> {
        let begun = self.record.with_extension("new");
        let mut file = std::io::BufWriter::new(std::fs::File::create(&begun)?);
        for number in [number as u32, self.blocks().len() as u32] {
            file.write_all(&number.to_le_bytes())?;
        }
        for block in self.blocks() {
            file.write_all(&block.size().to_le_bytes())?;
            file.write_all(&block.address().to_le_bytes())?;
            file.write_all(&(block.id().len() as u32).to_le_bytes())?;
            file.write_all(block.id().as_bytes())?;
        }
        for frame in encode_missing(missing) {
            file.write_all(&(frame.len() as u32).to_le_bytes())?;
            file.write_all(&frame)?;
        }
        file.flush()?;
        std::fs::rename(begun, &self.record)
    }
}

/// Changes pages, bytes of a block, as deltas say.
fn amend(block: &Block, mut bytes: Range<u64>, deltas: &[u8]) -> Result<(), RamError> {
    let mut deltas = Reader(deltas);
    let mut pages = vec![0; (bytes.end - bytes.start).min(AMENDED * PAGE) as usize];
    while !bytes.is_empty() {
        pages.truncate((bytes.end - bytes.start) as usize);
        block.read_at(bytes.start, &mut pages).map_err(RamError::io)?;
        pages.as_chunks_mut().0.iter_mut().try_for_each(|page| delta::apply(&mut deltas, page))?;
        block.write_at(bytes.start, &pages).map_err(RamError::io)?;
        bytes.start += pages.len() as u64;
    }
    Ok(())
}

/// What a record becomes when all is there.
fn complete(record: &Path) -> PathBuf {
    record.with_extension("complete")
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, RamError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RamError::record(error)),
    }
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
