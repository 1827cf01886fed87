//! The destination's side of a migration: can it be taken, a QEMU that waits for it, and the moment of ownership.
//!
//! Who owns the guest is decided here and only here: `commit.rs` writes it to this host's journal, once, and only when
//! QEMU has everything it needs to run the guest. What was abandoned can never be committed and the other way round;
//! the journal sees to that. So a source that lost contact only has to ask, and whatever it hears is final.

mod abandon;
mod arrival;
mod check;
mod commit;
mod incoming;
mod lease;
mod prepare;
mod recover;
mod suitability;

pub(crate) use abandon::abandon;
pub(crate) use arrival::is_expected;
pub(crate) use check::check;
pub(crate) use commit::{commit, set_running};
pub(crate) use incoming::{Awaited, Incoming, keep, measuring_vm, relayed_vm, state};
pub(crate) use lease::watch_lease;
pub(crate) use prepare::prepare;
pub(crate) use recover::recover;
