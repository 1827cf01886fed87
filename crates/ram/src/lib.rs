//! The RAM of a running QEMU, moved from outside: QEMU knows nothing of it and is not changed.
//!
//! Guest RAM is a shared file, so [`GuestRam`] reads and writes it like one. Two kernel interfaces do the rest:
//!
//! - [`Tracking`], at the source: which pages the guest wrote since they were last looked at.
//! - [`Arrival`], at the destination: the guest runs while RAM is missing, waits at a page that is not there yet, and
//!   goes on when it is placed.
//!
//! Both rest on a userfaultfd, which a process can make only for its own memory. So it is made inside QEMU: one of its
//! threads is stopped for less than a millisecond, makes one system call, and goes on as if nothing had been.
//!
//! [`support`] tells whether this host can do that. Addresses are nobody's business but this crate's: callers name a
//! [`Block`] by its place in [`GuestRam::blocks`], and offsets within it in bytes.

mod arrival;
mod destination;
mod error;
mod kernel;
mod memory;
mod pages;
mod process;
mod source;
#[cfg(test)]
mod tests;
mod tracking;
mod wire;
pub mod zero;

pub use arrival::{Arrival, ArrivalError, Placed};
pub use destination::{Ended, Landing, serve};
pub use error::RamError;
pub use kernel::{InjectError, Unsupported, support};
pub use memory::{Backend, Block, GuestRam, MemoryError, PunchError};
pub use source::{Progress, Source};
pub use tracking::{Tracking, TrackingError};
pub use wire::Malformed;

/// What memory is mapped, tracked and placed by, in bytes.
///
/// Kernels for aarch64 can be built with larger pages; [`support`] refuses those.
pub const PAGE: u64 = 4096;
