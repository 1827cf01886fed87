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

use std::io;
use std::ops::Range;
use std::time::Duration;

use crate::kernel::{EnableError, Feature, InjectError, Inside, Keep, Mode, Pagemap, Reach, Userfaultfd, make_in};
use crate::memory::{Addresses, GuestRam};

const FEATURES: [Feature; 3] = [Feature::WpAsync, Feature::WpUnpopulated, Feature::WpHugetlbfsShmem];

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
    stood_still: Duration,
}

impl Tracking {
    /// From here on pages can be protected; none is yet.
    pub fn begin(ram: &GuestRam) -> Result<Self, TrackingError> {
        // Whoever meets a protected page does not wait, so it need not be allowed to.
        let Inside { descriptor, stood_still, .. } = make_in(ram.process(), Reach::User, Keep::Ours)?;
        let userfaultfd = Userfaultfd::over(descriptor);
        userfaultfd.enable(&FEATURES)?;
        let blocks = ram.addresses();
        for (block, addresses) in ram.blocks().iter().zip(&blocks) {
            userfaultfd.register(addresses.all(), Mode::WriteProtect).map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => TrackingError::Taken { id: block.id().to_owned() },
                _ => TrackingError::Io(error),
            })?;
        }
        let pagemap = Pagemap::open(ram.process().pid)?;
        Ok(Self { userfaultfd, pagemap, blocks, stood_still })
    }

    /// How long one thread of QEMU stood still for the beginning.
    pub fn stood_still(&self) -> Duration {
        self.stood_still
    }

    /// Writes are noted from here on. Do this before what is there is read for the first time.
    ///
    /// It makes QEMU's page tables for pages that were never used: 8 bytes for each.
    pub fn protect(&self, block: usize, range: Range<u64>) -> io::Result<()> {
        self.userfaultfd.write_protect(self.blocks[block].of(&range))
    }

    /// Adds what was written since it was protected, in order, with neighbours merged. It counts as written afterwards.
    pub fn written(&self, block: usize, range: Range<u64>, written: &mut Vec<Range<u64>>) -> io::Result<()> {
        self.scan(block, &range, false, written)
    }

    /// As [`written`](Tracking::written), and protects it again. Read it after this, not before.
    pub fn take_written(&self, block: usize, range: Range<u64>, written: &mut Vec<Range<u64>>) -> io::Result<()> {
        self.scan(block, &range, true, written)
    }

    fn scan(&self, block: usize, range: &Range<u64>, protect: bool, written: &mut Vec<Range<u64>>) -> io::Result<()> {
        let addresses = &self.blocks[block];
        let begun = written.len();
        self.pagemap.written(addresses.of(range), protect, written)?;
        for range in &mut written[begun..] {
            *range = range.start - addresses.all().start..range.end - addresses.all().start;
        }
        Ok(())
    }
}
