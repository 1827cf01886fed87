//! VMs that do not run, and move to another host with their disks:
//!
//! ```text
//! plan         refuse early                                        nothing is touched yet
//! leave        its disks are copied, one after the other           the VM is this host's; what has arrived is kept there
//! hand over    the journal here gives it away, the one there       it is started by neither; no undo
//!              takes it, the one here forgets it
//! ```
//!
//! A VM can be started where a journal has it as one of the host's own. This host's gives it away, in one transaction,
//! when all of it is there; the other's takes it, in one transaction, when it was asked to, which is only done after that. So it
//! can never be started on both. Whatever dies in between, this host asks again until it has an answer (`hand_over`), which
//! is final: a host that says that it has not taken a VM never will by the same move. `arrive` is the other host's side.

mod arrive;
mod hand_over;
mod leave;
mod moves;
mod plan;
mod told;

pub(crate) use arrive::{begin as begin_arrival, check as check_arrival, give_up, take};
pub(crate) use moves::VmMoves;
