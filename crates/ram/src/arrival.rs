//! RAM that arrives while the guest already runs on it.
//!
//! Whoever touches a page that is not there waits (`UFFDIO_REGISTER_MODE_MISSING`,
//! Documentation/admin-guide/mm/userfaultfd.rst), and we are told which page that is. Placing a page fills it and puts it
//! there in one step: nobody sees half of it. A page that is there already is left alone, since the guest may have written
//! to it; so a page may be placed any number of times, by several threads, and the first wins.
//!
//! An agent may end in the middle of this, and the guest must not. So the userfaultfd stays open inside QEMU, whose threads
//! then simply wait, and the next agent takes it from there by its number.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::PAGE;
use crate::kernel::{Copied, EnableError, Fault, Feature, InjectError, Inside, Keep, Mode, Reach, Userfaultfd, Waited};
use crate::kernel::{close_in, make_in};
use crate::memory::{Addresses, GuestRam};

/// Why RAM cannot arrive while the guest runs.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// QEMU could not be made to allow it.
    #[error("cannot reach into QEMU to serve its RAM")]
    Inject(#[from] InjectError),
    /// The kernel is too old, or was built without it.
    #[error("this kernel has no {}", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Pages of it cannot be missing.
    #[error(
        "RAM `{id}` cannot be missing in parts: it must be in shared memory or on a tmpfs, and served by nobody else"
    )]
    NotShared {
        /// The block's name.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU has ended.
    #[error("QEMU has ended")]
    Gone,
    /// Another error.
    #[error("cannot serve RAM")]
    Io(#[source] io::Error),
}

impl From<EnableError> for ArrivalError {
    fn from(error: EnableError) -> Self {
        match error {
            EnableError::Lacks(features) => Self::Lacks(features),
            EnableError::Io(error) => Self::Io(error),
        }
    }
}

impl From<io::Error> for ArrivalError {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            // The memory is gone.
            Some(Errno::SRCH) => Self::Gone,
            _ => Self::Io(error),
        }
    }
}

/// What became of pages that were to be placed, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// They are there now.
    pub placed_bytes: u64,
    /// They were there before, and keep what they hold.
    pub already_bytes: u64,
}

/// See the module's text. It stays armed until [`disarm`](Arrival::disarm), even when this is dropped.
///
/// Blocks are named by their place in [`GuestRam::blocks`]; offsets are in bytes. Several threads may use it at once.
#[derive(Debug)]
pub struct Arrival {
    ram: Arc<GuestRam>,
    userfaultfd: Userfaultfd,
    number: RawFd,
    blocks: Vec<Addresses>,
    stood_still: Duration,
}

impl Arrival {
    /// Makes ready for [`begin`](Arrival::begin): all that QEMU's user may not be allowed to do is done, and RAM is as it was
    /// before. For RAM of which QEMU uses nothing yet.
    pub fn ready(ram: Arc<GuestRam>) -> Result<Self, ArrivalError> {
        // Also the kernel's accesses for QEMU must wait, such as those of KVM and of a disk that is read into RAM.
        let Inside { descriptor, number, stood_still } = make_in(ram.process(), Reach::Kernel, Keep::There)?;
        let userfaultfd = Userfaultfd::over(descriptor);
        let blocks = ram.addresses();
        let arrival = Self { ram, userfaultfd, number, blocks, stood_still };
        let tried = arrival.userfaultfd.enable(&[Feature::MissingShmem]).map_err(ArrivalError::from);
        match tried.and_then(|()| arrival.begin()).and_then(|()| arrival.end()) {
            Ok(()) => Ok(arrival),
            Err(error) => {
                // With its last descriptor the userfaultfd ends, and with it what was registered. The first error is the
                // one to tell.
                let _ = close_in(arrival.ram.process(), number);
                Err(error)
            }
        }
    }

    /// From here on, whoever touches a page that is not there waits for it. What is there stays; it is
    /// [`Block::punch`](crate::Block::punch) that makes pages missing, before this, while the guest does not run.
    pub fn begin(&self) -> Result<(), ArrivalError> {
        for (block, addresses) in self.ram.blocks().iter().zip(&self.blocks) {
            self.userfaultfd.register(addresses.all(), Mode::Missing).map_err(|source| match source.kind() {
                io::ErrorKind::InvalidInput | io::ErrorKind::ResourceBusy => {
                    ArrivalError::NotShared { id: block.id().to_owned(), source }
                }
                _ => source.into(),
            })?;
        }
        Ok(())
    }

    fn end(&self) -> Result<(), ArrivalError> {
        Ok(self.blocks.iter().try_for_each(|addresses| self.userfaultfd.unregister(addresses.all()))?)
    }

    /// Both at once.
    pub fn arm(ram: Arc<GuestRam>) -> Result<Self, ArrivalError> {
        let arrival = Self::ready(ram)?;
        arrival.begin()?;
        Ok(arrival)
    }

    /// Goes on with what an agent that ended has armed; `number` is what [`number`](Arrival::number) told it. Whoever
    /// waits is told of again.
    pub fn again(ram: Arc<GuestRam>, number: RawFd) -> Result<Self, ArrivalError> {
        if !ram.process().has_userfaultfd(number) {
            return Err(if ram.is_gone() { ArrivalError::Gone } else { InjectError::NotOurs { number }.into() });
        }
        let userfaultfd = Userfaultfd::over(ram.process().take(number)?);
        let blocks = ram.addresses();
        let arrival = Self { ram, userfaultfd, number, blocks, stood_still: Duration::ZERO };
        arrival.wake_all()?;
        Ok(arrival)
    }

    /// Whoever waits looks again, and is told of again: who was told of it before may have placed nothing.
    pub fn wake_all(&self) -> Result<(), ArrivalError> {
        Ok(self.blocks.iter().try_for_each(|addresses| self.userfaultfd.wake(addresses.all()))?)
    }

    /// What an agent needs to know to go on after this one: the userfaultfd's descriptor in QEMU.
    pub fn number(&self) -> RawFd {
        self.number
    }

    /// How long one thread of QEMU stood still for arming; zero after [`again`](Arrival::again).
    pub fn stood_still(&self) -> Duration {
        self.stood_still
    }

    /// Waits so long for somebody to touch a missing page, and adds all such pages: block and offset. The same page may
    /// be told of more than once, and also after it was placed.
    pub fn faults(&self, timeout: Duration, faults: &mut Vec<(usize, u64)>) -> Result<(), ArrivalError> {
        match self.userfaultfd.wait(self.ram.process(), timeout)? {
            Waited::Faults => {}
            Waited::Nothing => return Ok(()),
            Waited::Gone => return Err(ArrivalError::Gone),
        }
        let mut found = Vec::new();
        self.userfaultfd.read_faults(&mut found)?;
        for Fault { address, .. } in found {
            let (block, page) = Addresses::find(&self.blocks, address).expect("only the blocks are registered");
            faults.push((block, page * PAGE));
        }
        Ok(())
    }

    /// Places pages where there are none, and wakes who waits for them. `bytes` are whole pages.
    pub fn place(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<Placed, ArrivalError> {
        let range = self.blocks[block].of(&(offset..offset + bytes.len() as u64));
        self.place_pages(&range, |from| self.userfaultfd.copy(from, &bytes[(from - range.start) as usize..]))
    }

    /// As [`place`](Arrival::place), with zeros. Each page takes up memory; one that nobody waits for can be left out, as
    /// zeros are read there after [`disarm`](Arrival::disarm).
    pub fn place_zero(&self, block: usize, range: Range<u64>) -> Result<Placed, ArrivalError> {
        let range = self.blocks[block].of(&range);
        self.place_pages(&range, |from| self.userfaultfd.zero(from..range.end))
    }

    /// `attempt` places from an address to the end.
    fn place_pages(
        &self,
        range: &Range<u64>,
        attempt: impl Fn(u64) -> io::Result<Copied>,
    ) -> Result<Placed, ArrivalError> {
        let mut result = Placed::default();
        let mut from = range.start;
        while from < range.end {
            let Copied { bytes, met_a_page } = attempt(from)?;
            result.placed_bytes += bytes;
            from += bytes;
            if met_a_page {
                // Whoever placed it woke those who waited, unless it came there in another way.
                self.userfaultfd.wake(from..from + PAGE)?;
                result.already_bytes += PAGE;
                from += PAGE;
            }
        }
        Ok(result)
    }

    /// Nobody waits any more: zeros are found where nothing was placed. Nothing is left in QEMU.
    pub fn disarm(&self) -> Result<(), ArrivalError> {
        self.end()?;
        Ok(close_in(self.ram.process(), self.number)?)
    }
}
