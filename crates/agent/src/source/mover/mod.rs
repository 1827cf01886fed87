//! Who moves the RAM: chosen when a migration is planned, and asked from then on. Nobody else needs to know which it is.

mod agents;
mod face;
mod qemu;

pub(super) use agents::ByAgents;
pub(super) use face::{Mover, Protect, Task};
pub(super) use qemu::{ByQemu, Guest};
