//! Where a guest's RAM arrives, over one link or several, before an agent's end and after it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::record::Record;
use crate::RamError;
use crate::arrival::{Arrival, ArrivalError};
use crate::kernel::InjectError;
use crate::memory::{Block, GuestRam, PunchError};
use crate::pages::PageSet;
use crate::wire::{Content, Malformed, Reader, Run};
use crate::{PAGE, delta, zero};

/// How many pages are changed by deltas at a time.
const AMENDED: u64 = 16;
/// How many bytes are looked at, or cleared, at a time.
const PIECE: u64 = 1 << 20;
/// How many pages are taken away at a time: 1 GiB.
const SLICE: u64 = 1 << 18;

/// See the module's text.
pub struct Landing {
    ram: Arc<GuestRam>,
    /// Whether all memory of a block was there from the beginning (`prealloc=on`). It stays so, as far as pages of zeroes
    /// are concerned.
    preallocated: Vec<bool>,
    /// Where what a new agent needs in post-copy is written.
    record: PathBuf,
    /// For post-copy, until that begins.
    ready: Mutex<Option<Ready>>,
    armed: OnceLock<Armed>,
    /// Nothing is left of post-copy, in QEMU or on record.
    finished: Mutex<bool>,
}

/// All that could fail of post-copy was done.
struct Ready {
    arrival: Arrival,
    record: Record,
    /// Missing pages are waited for, and so many are on record.
    begun: Option<u64>,
}

impl Ready {
    /// These are missing. They are taken away, if they are there at all.
    fn take_away(&mut self, blocks: &[Block], missing: &[PageSet], goes_on: impl Fn()) -> Result<(), RamError> {
        // First, so that the kernel fills no hole with a large page of zeroes meanwhile.
        self.arrival.begin()?;
        punch(blocks, missing, goes_on)?;
        let new: u64 =
            self.record.missing().iter().zip(missing).map(|(record, missing)| record.insert_all(missing)).sum();
        self.begun = Some(self.begun.unwrap_or(0) + new);
        Ok(())
    }
}

/// What there is in post-copy only.
pub(super) struct Armed {
    pub(super) arrival: Arrival,
    record: Record,
    left: AtomicU64,
}

impl Armed {
    /// Pages that the source has and this side has not, by block. One that is not among them and not there either is a page
    /// of zeroes: it was one when the guest left, or the guest has given it back since.
    pub(super) fn missing(&self) -> &[PageSet] {
        self.record.missing()
    }
}

impl Landing {
    /// In the RAM of a QEMU that waits for its guest. `record` is a file that is written when the guest may run before
    /// its RAM is complete, and goes when it is.
    pub fn new(ram: GuestRam, record: &Path) -> Self {
        let preallocated = ram.blocks().iter().map(|block| block.is_all_there().unwrap_or(false)).collect();
        let (ready, armed, finished) = (Mutex::default(), OnceLock::new(), Mutex::default());
        Self { ram: Arc::new(ram), preallocated, record: record.into(), ready, armed, finished }
    }

    /// Makes ready for a guest that runs before its RAM is complete, while it has none. Fails where that cannot be; the
    /// RAM may come before the guest all the same.
    pub fn prepare_post_copy(&self) -> Result<(), RamError> {
        let ready = self.make_ready()?;
        *self.ready.lock().expect("no holder of this lock panics") = Some(ready);
        Ok(())
    }

    fn make_ready(&self) -> Result<Ready, RamError> {
        let arrival = Arrival::ready(Arc::clone(&self.ram))?;
        match Record::create(&self.record, arrival.number(), self.blocks()) {
            Ok(record) => Ok(Ready { arrival, record, begun: None }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = arrival.disarm();
                Err(RamError::record(error))
            }
        }
    }

    fn take_ready(&self) -> Option<Ready> {
        self.ready.lock().expect("no holder of this lock panics").take()
    }

    /// There will be no post-copy: nothing is left in QEMU.
    pub(super) fn forget_post_copy(&self) -> Result<(), RamError> {
        let Some(Ready { arrival, record, .. }) = self.take_ready() else { return Ok(()) };
        let forgotten = record.forget().map_err(RamError::record);
        arrival.disarm()?;
        forgotten
    }

    /// In the RAM of a guest that may run already, which an earlier agent has left: the record tells what is missing.
    /// `None` when there is no record of such a guest. Its QEMU, process `pid`, is asked for nothing.
    pub fn again(pid: u32, record: &Path) -> Result<Option<Self>, RamError> {
        if let Some(complete) = Record::complete(record).map_err(RamError::record)? {
            let ram = GuestRam::open(pid, &complete.backends)?;
            leave(Arrival::again(Arc::new(ram), complete.number).and_then(|arrival| arrival.disarm()))?;
            complete.record.forget().map_err(RamError::record)?;
            return Ok(None);
        }
        let Some(found) = Record::open(record).map_err(RamError::record)? else { return Ok(None) };
        let ram = Arc::new(GuestRam::open(pid, &found.backends)?);
        let arrival = Arrival::again(Arc::clone(&ram), found.number)?;
        let left = found.record.missing().iter().map(PageSet::len).sum();
        let armed = OnceLock::from(Armed { arrival, record: found.record, left: AtomicU64::new(left) });
        let preallocated = vec![false; ram.blocks().len()];
        let (ready, finished) = (Mutex::default(), Mutex::default());
        let landing = Self { ram, preallocated, record: record.into(), ready, armed, finished };
        if left == 0 {
            landing.finish()?;
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

    /// Whatever a QEMU that waits has put into its RAM is none of the guest's. What was there from the beginning stays
    /// there, with zeros in it. `goes_on` is called all the while.
    pub(super) fn clear(&self, goes_on: impl Fn()) -> Result<(), RamError> {
        for (block, preallocated) in self.blocks().iter().zip(&self.preallocated) {
            if !preallocated {
                block.punch(0..block.size())?;
                continue;
            }
            let mut piece = vec![0; PIECE as usize];
            for start in (0..block.size()).step_by(PIECE as usize) {
                goes_on();
                piece.truncate((block.size() - start) as usize);
                block.read_at(start, &mut piece).map_err(RamError::io)?;
                if !zero::is_zero(&piece) {
                    piece.fill(0);
                    block.write_at(start, &piece).map_err(RamError::io)?;
                }
            }
        }
        Ok(())
    }

    /// Faults are taken from now on, and these pages will come. Those that are stale have been taken away already
    /// ([`punch`](Landing::punch)), but for `stale`.
    pub(super) fn arm(&self, missing: &[PageSet], stale: &[PageSet]) -> Result<&Armed, RamError> {
        if self.armed.get().is_some() {
            return Err(Malformed("post-copy begins twice").into());
        }
        let mut ready = match self.take_ready() {
            Some(ready) => ready,
            None => self.make_ready()?,
        };
        let stale = if ready.begun.is_some() { stale } else { missing };
        let taken_away = ready.take_away(self.blocks(), stale, || ());
        if let Err(error) = taken_away.and_then(|()| ready.record.begin().map_err(RamError::record)) {
            // The first error is the one to tell.
            let _ = ready.arrival.disarm();
            return Err(error);
        }
        let Ready { arrival, record, begun } = ready;
        Ok(self.armed.get_or_init(|| Armed { arrival, record, left: AtomicU64::new(begun.unwrap_or(0)) }))
    }

    /// Takes away what is stale, before the guest is paused. `goes_on` is called all the while.
    pub(super) fn punch(&self, stale: &[PageSet], goes_on: impl Fn()) -> Result<(), RamError> {
        match &mut *self.ready.lock().expect("no holder of this lock panics") {
            Some(ready) => ready.take_away(self.blocks(), stale, goes_on),
            None => punch(self.blocks(), stale, goes_on),
        }
    }

    /// Puts a run of pages where it belongs. True when it was the last that was missing.
    pub(super) fn put(&self, run: &Run, data: &[u8]) -> Result<bool, RamError> {
        let bytes = run.pages.start * PAGE..run.pages.end * PAGE;
        let block = &self.blocks()[run.block];
        let Some(armed) = self.armed.get() else {
            match run.content {
                Content::Whole => block.write_at(bytes.start, data).map_err(RamError::io)?,
                Content::Delta => amend(block, bytes, data)?,
                Content::Zero if self.preallocated[run.block] => fill_with_zeros(block, bytes)?,
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
        // Not before they are there: what the record of an agent that ends here calls missing comes once more.
        let new = armed.missing()[run.block].remove(run.pages.clone());
        Ok(new > 0 && armed.left.fetch_sub(new, Ordering::AcqRel) == new)
    }

    /// All RAM is here: nothing is left of post-copy, in the guest or on record. To be asked again when it fails: until then
    /// the guest waits at what was never written.
    pub fn finish(&self) -> Result<(), RamError> {
        let Some(armed) = self.armed.get() else { return Ok(()) };
        let mut finished = self.finished.lock().expect("no holder of this lock panics");
        if !*finished {
            // From when faults are not taken any more, nothing waits for what is missing.
            armed.record.end().map_err(RamError::record)?;
            leave(armed.arrival.disarm())?;
            armed.record.forget().map_err(RamError::record)?;
            *finished = true;
        }
        Ok(())
    }

    /// Post-copy was, and nothing is left of it.
    pub(super) fn is_finished(&self) -> bool {
        *self.finished.lock().expect("no holder of this lock panics")
    }
}

/// QEMU was left, now or at an earlier attempt.
fn leave(disarmed: Result<(), ArrivalError>) -> Result<(), ArrivalError> {
    match disarmed {
        Err(ArrivalError::Inject(InjectError::NotOurs { .. })) => Ok(()),
        result => result,
    }
}

pub(super) fn punch(blocks: &[Block], stale: &[PageSet], goes_on: impl Fn()) -> Result<(), RamError> {
    for (block, set) in blocks.iter().zip(stale) {
        let mut from = 0;
        while let Some(run) = set.next_run(from..set.pages()) {
            let slice = run.start..run.end.min(run.start + SLICE);
            from = slice.end;
            block.punch(slice.start * PAGE..slice.end * PAGE)?;
            goes_on();
        }
    }
    Ok(())
}

fn fill_with_zeros(block: &Block, mut bytes: Range<u64>) -> Result<(), RamError> {
    let zeros = vec![0; (bytes.end - bytes.start).min(PIECE) as usize];
    while !bytes.is_empty() {
        let length = (bytes.end - bytes.start).min(PIECE);
        block.write_at(bytes.start, &zeros[..length as usize]).map_err(RamError::io)?;
        bytes.start += length;
    }
    Ok(())
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
