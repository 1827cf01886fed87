//! The destination's side of a migration: can it be taken, a QEMU that waits for it, and the moment of ownership.
//!
//! Who owns the guest is decided here and only here, by the destination's half of the protocol (`vmferry_custody`), which
//! `awaited.rs` drives: it is written to this host's journal, once, and only when QEMU has everything it needs to run the
//! guest. What was abandoned can never be committed; the journal sees to that. So a source that lost contact only has to
//! ask, and whatever it hears is final.

mod arrival;
mod awaited;
pub(crate) mod carried;
mod check;
mod commit;
mod disks;
mod formatted;
mod incoming;
mod parts;
mod prepare;
mod recover;
mod suitability;

pub(crate) use arrival::is_expected;
pub(crate) use check::{check, could_start};
pub(crate) use commit::{abandon, commit, fence};
pub(crate) use disks::sweep as sweep_disks;
pub(crate) use incoming::{Incoming, is_undisputed, keep, measuring_vm, relayed_vm, settled, state};
pub(crate) use parts::remove_old_parts;
pub(crate) use prepare::prepare;
pub(crate) use recover::recover;
