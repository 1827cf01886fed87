//! What this host must not forget: its VMs, every step of every migration, and whom it trusts.

mod peers;
mod store;

pub use peers::{Joined, PeerRecord};
pub use store::{InStep, OutRecord, OutStep, Source, Store, VmRecord};
