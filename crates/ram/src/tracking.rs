//! Which pages of a running guest were written, seen from outside QEMU.
//!
//! Each page is write-protected in a way in which nobody waits: the first write to it lifts the protection, and that is
//! the note that it was written (`UFFD_FEATURE_WP_ASYNC`, Documentation/admin-guide/mm/userfaultfd.rst). A scan finds the
//! notes and protects these pages again in the same instant, so no write falls between two scans. A guest pays for the
//! first write to each page after each scan, with a fault that the kernel answers itself.
//!
//! Only writes through QEMU's mapping are seen: the guest's, QEMU's own, and the kernel's for either. What another process
//! writes into the same memory (vhost-user), or a device that reaches it by itself (VFIO), is not. Nor is it a write when
//! memory is given back to the host, as by a balloon, though zeros are read there then; a guest that gives memory back
//! expects nothing to be in it.
//!
//! To pace the guest's writes, somebody has to wait after all. That takes a second userfaultfd without asynchronous
//! protection, and memory can have one at a time; so range by range, the second takes over from the first. What was
//! written in between is not seen by either: the guest must be paused meanwhile.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use nix::libc::{ENOENT, ESRCH};

use crate::PAGE;
use crate::kernel::make_in;
use crate::kernel::{
    EnableError, Fault, Feature, InjectError, Inside, Keep, Mode, Pagemap, Reach, Userfaultfd, Waited,
};
use crate::memory::{Addresses, Backend, GuestRam, MemoryError};
use crate::process::Process;

/// How much is given back at a time, in bytes: the guest waits for its mappings meanwhile, a fraction of a millisecond.
const SLICE: u64 = 64 << 20;

const FEATURES: [Feature; 3] = [Feature::WpAsync, Feature::WpUnpopulated, Feature::WpHugetlbfsShmem];
const PACING: [Feature; 3] = [Feature::ThreadId, Feature::WpUnpopulated, Feature::WpHugetlbfsShmem];

/// Why writes cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// QEMU could not be made to allow it.
    #[error("cannot reach into QEMU to track its RAM")]
    Inject(#[from] InjectError),
    /// The kernel is too old, or was built without it.
    #[error("this kernel has no {}: tracking takes Linux 6.7", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Somebody does that already.
    #[error("RAM `{id}` is tracked already, by another agent or by QEMU itself")]
    Taken {
        /// The block's name.
        id: String,
    },
    /// QEMU cannot be looked at.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Another error.
    #[error("cannot track RAM")]
    Io(#[from] io::Error),
}

impl From<EnableError> for TrackingError {
    fn from(error: EnableError) -> Self {
        match error {
            EnableError::Lacks(features) => Self::Lacks(features),
            EnableError::Io(error) => Self::Io(error),
        }
    }
}

/// See the module's text. Whenever it ends, be it by the end of our process, the guest is left as it was before.
///
/// Blocks are named by their place in [`GuestRam::blocks`]; ranges are offsets in bytes and consist of whole pages.
#[derive(Debug)]
pub struct Tracking {
    userfaultfd: Userfaultfd,
    pagemap: Pagemap,
    blocks: Vec<Addresses>,
    /// What is registered, of each block.
    registered: Vec<Range<u64>>,
    stood_still: Duration,
    pacing: Option<Paced>,
}

/// Once more at its end, but in slices: when the last descriptor goes, the kernel takes all protection away in one step, for
/// which everybody in QEMU waits who touches memory.
impl Drop for Tracking {
    fn drop(&mut self) {
        let paced = self.pacing.as_ref().map(|paced| &*paced.userfaultfd);
        for range in &self.registered {
            for start in range.clone().step_by(SLICE as usize) {
                let slice = start..(start + SLICE).min(range.end);
                for userfaultfd in paced.into_iter().chain([&self.userfaultfd]) {
                    // What this cannot do the kernel does. A process that has ended has nothing left.
                    if userfaultfd.unregister(slice.clone()).is_err_and(|error| error.raw_os_error() == Some(ESRCH)) {
                        return;
                    }
                }
            }
        }
    }
}

/// The memory in which writers wait.
#[derive(Debug)]
struct Paced {
    userfaultfd: Arc<Userfaultfd>,
    /// How much of each block, from its beginning, in bytes.
    up_to: Vec<u64>,
}

/// Whether writes of this QEMU to its RAM can be tracked, tried out on a page of each block, and undone.
pub fn can_track(pid: u32, backends: &[Backend]) -> Result<(), TrackingError> {
    let ram = GuestRam::open(pid, backends)?;
    let pages = ram.addresses().into_iter().map(|block| block.of(&(0..PAGE.min(block.all().end - block.all().start))));
    let tracking = Tracking::begin_with(&ram, pages)?;
    for (block, about) in ram.blocks().iter().enumerate() {
        let page = 0..PAGE.min(about.size());
        tracking.protect(block, page.clone())?;
        tracking.take_written(block, page, &mut Vec::new())?;
    }
    Ok(())
}

/// Whether writes of this QEMU could be made to wait, tried out.
pub fn can_pace(pid: u32) -> Result<(), TrackingError> {
    let process = Process::open(pid).map_err(|source| MemoryError::Process { pid, source })?;
    userfaultfd_for_pacing(&process).map(drop)
}

fn userfaultfd_for_pacing(process: &Process) -> Result<Userfaultfd, TrackingError> {
    // Also what the kernel writes for QEMU must wait, or it would fail.
    let userfaultfd = Userfaultfd::over(make_in(process, Reach::Kernel, Keep::Ours)?.descriptor);
    userfaultfd.enable(&PACING)?;
    Ok(userfaultfd)
}

impl Tracking {
    /// From here on pages can be protected; none is yet.
    pub fn begin(ram: &GuestRam) -> Result<Self, TrackingError> {
        Self::begin_with(ram, ram.addresses().iter().map(Addresses::all))
    }

    /// The same of a part of each block: of the others nothing is done, now or at the end.
    fn begin_with(ram: &GuestRam, parts: impl Iterator<Item = Range<u64>>) -> Result<Self, TrackingError> {
        // Whoever meets a protected page does not wait, so it need not be allowed to.
        let Inside { descriptor, stood_still, .. } = make_in(ram.process(), Reach::User, Keep::Ours)?;
        let userfaultfd = Userfaultfd::over(descriptor);
        userfaultfd.enable(&FEATURES)?;
        let pagemap = Pagemap::open(ram.process().pid)?;
        let (blocks, registered) = (ram.addresses(), Vec::new());
        let mut tracking = Self { userfaultfd, pagemap, blocks, registered, stood_still, pacing: None };
        for (block, part) in ram.blocks().iter().zip(parts) {
            tracking.userfaultfd.register(part.clone(), Mode::WriteProtect).map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => TrackingError::Taken { id: block.id().to_owned() },
                _ => TrackingError::Io(error),
            })?;
            tracking.registered.push(part);
        }
        Ok(tracking)
    }

    /// How long one thread of QEMU stood still for the beginning.
    pub fn stood_still(&self) -> Duration {
        self.stood_still
    }

    /// Writes are noted from here on. Do this before what is there is read for the first time.
    ///
    /// It makes QEMU's page tables for pages that were never used: 8 bytes for each.
    pub fn protect(&self, block: usize, range: Range<u64>) -> io::Result<()> {
        for (userfaultfd, range, _) in self.parts(block, range) {
            userfaultfd.write_protect(self.blocks[block].of(&range))?;
        }
        Ok(())
    }

    /// Adds what was written since it was protected, in order, with neighbours merged. It counts as written afterwards.
    pub fn written(&self, block: usize, range: Range<u64>, written: &mut Vec<Range<u64>>) -> io::Result<()> {
        for (_, part, _) in self.parts(block, range) {
            self.found(block, written, |written| self.pagemap.written(self.blocks[block].of(&part), written))?;
        }
        Ok(())
    }

    /// Prepares for writers to wait. None does yet.
    pub fn prepare_pacing(&mut self, ram: &GuestRam) -> Result<WriteFaults, TrackingError> {
        let userfaultfd = Arc::new(userfaultfd_for_pacing(ram.process())?);
        self.pacing = Some(Paced { userfaultfd: Arc::clone(&userfaultfd), up_to: vec![0; self.blocks.len()] });
        Ok(WriteFaults { userfaultfd, blocks: ram.addresses() })
    }

    /// From here on, whoever writes to a protected page of the next part of a block waits until it is let go. None of
    /// these pages is protected at first, and so all count as written. The guest must be paused.
    pub fn pace(&mut self, block: usize, range: Range<u64>) -> io::Result<()> {
        let paced = self.pacing.as_mut().expect("pacing was prepared");
        assert_eq!(paced.up_to[block], range.start, "parts follow each other");
        let addresses = self.blocks[block].of(&range);
        self.userfaultfd.unregister(addresses.clone())?;
        paced.userfaultfd.register(addresses, Mode::WriteProtect)?;
        paced.up_to[block] = range.end;
        Ok(())
    }

    /// A range in up to two parts: whose userfaultfd each is of, and whether writers wait there.
    fn parts(&self, block: usize, range: Range<u64>) -> impl Iterator<Item = (&Userfaultfd, Range<u64>, bool)> {
        let limit = self.pacing.as_ref().map_or(0, |paced| paced.up_to[block]).clamp(range.start, range.end);
        let paced = self.pacing.as_ref().map(|paced| (&*paced.userfaultfd, range.start..limit, true));
        let parts = paced.into_iter().chain([(&self.userfaultfd, limit..range.end, false)]);
        parts.filter(|(_, range, _)| !range.is_empty())
    }

    /// As [`written`](Tracking::written), and protects it again. Read it after this, not before.
    pub fn take_written(&self, block: usize, range: Range<u64>, written: &mut Vec<Range<u64>>) -> io::Result<()> {
        for (userfaultfd, part, waits) in self.parts(block, range) {
            let addresses = self.blocks[block].of(&part);
            self.found(block, written, |written| {
                if !waits {
                    return self.pagemap.take_written(addresses, written);
                }
                // What is written between the two is read after this, as are all of these pages.
                let begun = written.len();
                self.pagemap.written(addresses, written)?;
                written[begun..].iter().try_for_each(|range| userfaultfd.write_protect(range.clone()))
            })?;
        }
        Ok(())
    }

    /// Turns the addresses that a scan adds into offsets.
    fn found(
        &self,
        block: usize,
        written: &mut Vec<Range<u64>>,
        scan: impl FnOnce(&mut Vec<Range<u64>>) -> io::Result<()>,
    ) -> io::Result<()> {
        let (begun, first) = (written.len(), self.blocks[block].all().start);
        scan(written)?;
        for range in &mut written[begun..] {
            *range = range.start - first..range.end - first;
        }
        Ok(())
    }
}

/// Writers that wait. Whoever holds it must let them go.
#[derive(Debug)]
pub struct WriteFaults {
    userfaultfd: Arc<Userfaultfd>,
    blocks: Vec<Addresses>,
}

/// A thread waits to write to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteFault {
    /// The block's place.
    pub block: usize,
    /// The page's number in it.
    pub page: u64,
    /// The thread's id, as QEMU knows it.
    pub thread: u32,
}

impl WriteFaults {
    /// Waits so long for writers, and adds them. False when QEMU has ended.
    pub fn wait(&self, ram: &GuestRam, timeout: Duration, faults: &mut Vec<WriteFault>) -> io::Result<bool> {
        match self.userfaultfd.wait(ram.process(), timeout)? {
            Waited::Gone => return Ok(false),
            Waited::Nothing => return Ok(true),
            Waited::Faults => {}
        }
        let mut found = Vec::new();
        self.userfaultfd.read_faults(&mut found)?;
        faults.extend(found.into_iter().map(|Fault { address, thread }| {
            let (block, page) = Addresses::find(&self.blocks, address).expect("only the blocks are registered");
            WriteFault { block, page, thread }
        }));
        Ok(true)
    }

    /// This page may be written.
    pub fn let_go(&self, block: usize, page: u64) -> io::Result<()> {
        match self.userfaultfd.let_write(self.blocks[block].of(&(page * PAGE..(page + 1) * PAGE))) {
            // Tracking has ended there, and whoever waited has gone on.
            Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(()),
            result => result,
        }
    }
}
