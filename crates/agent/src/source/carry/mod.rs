//! A domain of this host's libvirt goes to that of another, by libvirt's own migration: peer to peer, over Unix sockets at
//! both ends, between which the agents carry what the libvirts and their QEMUs say.
//!
//! ```text
//! plan      what can be refused is refused; nothing is touched
//! announce  the destination's agent lets this one domain through to its libvirt
//! migrate   libvirt's call; meanwhile its job is watched, and steered by libvirt's own calls, as the policy decides
//! outcome   both libvirts are asked where the guest is
//! ```
//!
//! Who owns the guest is decided by libvirt, at both ends and at every moment. So there is no undoing here beside
//! `virsh domjobabort`, and whatever breaks is followed by asking the two libvirts (`outcome.rs`), also by the next agent
//! (`settle.rs`).

mod begin;
mod foretell;
mod outcome;
mod plan;
mod report;
mod run;
mod settle;
mod steering;
mod under_way;
mod ways;

pub(crate) use begin::{begin, check, dry_run};
pub(crate) use foretell::dirty_rate;
pub(crate) use settle::take_up;
pub(crate) use under_way::{Carries, Carry};
