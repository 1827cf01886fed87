//! The RAM of a running QEMU, moved from outside: QEMU knows nothing of it and is not changed.
//!
//! # How it works
//!
//! Guest RAM is a shared file that QEMU has mapped, so [`GuestRam`] reads and writes it like one. Two kernel interfaces
//! do the rest, and both are for a process's own memory only: so a *userfaultfd* is made inside QEMU, by stopping one of
//! its threads for a fraction of a millisecond and having it make one system call (`kernel/inject.rs`).
//!
//! - [`Tracking`], at the source: pages are write-protected in a way in which nobody waits (`UFFD_FEATURE_WP_ASYNC`). The
//!   first write to a page lifts its protection, and a scan of the page map (`PAGEMAP_SCAN`) finds those and protects
//!   them again in one step. Its descriptor is ours alone, so whatever becomes of the agent, the kernel undoes it.
//! - [`Arrival`], at the destination in post-copy: whoever touches a page that is not there waits
//!   (`UFFDIO_REGISTER_MODE_MISSING`) until it is put there (`UFFDIO_COPY`), which never overwrites a page that is. Its
//!   descriptor stays in QEMU, so that the guest's threads simply wait while there is no agent, and the next one goes on.
//!
//! Where post-copy may not be used, a guest that outruns the link has its writes *paced* (`source/pacing.rs`): a second
//! userfaultfd, without asynchronous protection, takes the memory over while the guest is paused for some milliseconds.
//! From then on a processor that writes to a page which was sent waits for its turn, and turns come at a share of what
//! the link carries. Reading costs nothing, and so does writing to what must be sent anyway.
//!
//! [`Source`] sends: all RAM once, then in rounds what was written since; each page is protected before it is read, so
//! what was read is still true or will be sent again. Hot pages come last in a round. When the guest is paused, the rest
//! is sent (*stop-and-copy*), or the destination is told what it has not got. [`serve`] receives into a [`Landing`]. There,
//! in post-copy, what is stale was punched out before the guest runs, and a file has a bit for each page that is missing. So
//! the source of a post-copy needs no memory of its own: over a new link, or as a new process, it is told what is missing
//! and sends that.
//!
//! The field's words for what is called a look here: a *dirty scan*, which finds written pages, and mostly *write-protects*
//! them again.
//!
//! Until then, pages that were sent before and have changed a little go as differences from what was sent last, as far
//! as a memory of a given size holds that (`source/last_sent.rs`, `delta.rs`). The destination has exactly this when they
//! come: no page goes again before its last frame is in place. Trials before each round tell whether it pays, and how
//! much less than all of it the link will have to carry.
//!
//! [`Watch`] tracks a guest and sends nothing: what it writes within some seconds tells what its migration would do.
//!
//! # What it relies on
//!
//! Linux 6.7 for `PAGEMAP_SCAN` and asynchronous write protection (Documentation/admin-guide/mm/pagemap.rst and
//! userfaultfd.rst); `pidfd_getfd` and `ptrace` on QEMU; shared RAM in memory or on tmpfs; QEMU's `x-ignore-shared`,
//! which since 8.1 wants RAM that was given by a path. [`support`] tells by trying whether this host can do it.
//!
//! Writes are seen when they go through QEMU's page tables: the guest's, QEMU's own, the kernel's for either (vhost).
//! What other processes or devices write by themselves is not (vhost-user, VFIO), nor are the pages by which KVM gives
//! interrupts to guests of a guest, and of a read around the host's cache (`O_DIRECT`) only the beginning is: such VMs are
//! left to QEMU's own engine.
//!
//! # Limits
//!
//! Of a guest with M GiB that it has used at some time, and T threads (one a core, at most 8):
//!
//! - A scan takes 1 to 2 ms × M / T; so does the last one, with the guest paused. What was never used costs nothing.
//! - A page that is written after a scan costs the guest a fault: about 1 µs under TCG, some 10 µs under KVM where kernels are
//!   emulated. So w pages a second that are written anew cost w × that; scans come no more often than that makes a tenth.
//! - Downtime without post-copy: that scan, what is left ÷ the link's rate, and the device state. With post-copy: that scan,
//!   and punching what was written since the copy was stopped, about 1 µs a run of pages.
//! - A page in post-copy takes the link's round trip, its own 4 KiB ÷ the link's rate, what of the bulk is in the network's
//!   queues before it, and some hops from thread to thread at both ends; one that is on its way already, up to 4 ms.
//! - Memory: at the source 4 bits a page of the guest's RAM (128 MiB a TiB) and what differences are made from; at the destination
//!   3 bits, and 1 in a file. On their way are link rate × (round trip + 25 ms) × 1.5, at most 192 MiB; in
//!   post-copy link rate × (round trip + 4 ms).
//! - Pacing lets some 100 000 pages a second go, by one thread.
//! - A stop of the migration gives the mappings of QEMU back 64 MiB at a time, and the guest waits for one of them at most.
//!
//! A process that is killed while a thread of QEMU makes our system call for it leaves that thread astray; that is the agent
//! only where it has no other to do it ([`trace_by`]). Huge pages of hugetlbfs are refused.
//!
//! Shared memory has huge pages where its tmpfs was mounted with `huge=`, as that of guests that vmferry starts is, or where
//! `transparent_hugepage/shmem_enabled` says so (with `advise`, QEMU's RAM had none here). Pages that arrive before the guest
//! are in huge ones then, at half the cost. When the guest's writes begin to be noted, and where pages are taken away for
//! post-copy, they are split: 13 us each.
//!
//! Addresses are nobody's business but this crate's: callers name a [`Block`] by its place in [`GuestRam::blocks`], and
//! offsets within it in bytes.

mod arrival;
mod delta;
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
mod watch;
mod wire;
mod zero;

pub use arrival::{Arrival, ArrivalError, Placed};
pub use destination::{Ended, Landing, serve};
pub use error::RamError;
pub use kernel::{InjectError, Unsupported, support, trace_by, trace_qemu};
pub use memory::{Backend, Block, GuestRam, MemoryError, PunchError};
pub use process::{USERFAULTFD_DEVICE, has_cap_sys_ptrace};
pub use source::{Drain, Look, Progress, Source};
pub use tracking::{Tracking, TrackingError, WriteFault, WriteFaults, can_pace, can_track};
pub use watch::{Watch, Written};
pub use wire::{FaultTimes, Malformed};

/// What memory is mapped, tracked and placed by, in bytes.
///
/// Kernels for aarch64 can be built with larger pages; [`support`] refuses those.
pub const PAGE: u64 = 4096;
