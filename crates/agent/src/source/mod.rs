//! A migration from plan to retirement, at the source. Each phase has a file, and `run.rs` leads through them:
//!
//! ```text
//! plan         refuse early                                     nothing is touched yet
//! prepare      the destination's QEMU waits                     undo: abandon there
//! copy disks   those that are not shared, to the end             undo: end the mirrors here, abandon there
//! copy RAM     rounds until QEMU switches over, or post-copy    undo: cancel here, abandon there
//! commit       the destination's journal takes the guest over   no undo; until it answers the guest stays paused here
//! post-copy    (if used) the rest of the RAM follows
//! retire       the source's QEMU goes
//! ```
//!
//! Who moves the RAM is chosen in the plan, and asked from then on (`mover/`).
//!
//! Who owns the guest meanwhile is for the source's half of the protocol (`vmferry_custody`), which `custody.rs` drives:
//! under way, and from what the journal holds after a crash (`settle.rs`).

mod all_disks;
mod begin;
pub(crate) mod carry;
mod changes;
mod checked;
mod compare;
mod copy_disks;
mod copy_ram;
mod custody;
mod decider;
mod end;
mod expect;
mod fences;
mod forecast;
mod foresee;
pub(crate) mod guest;
mod limits;
mod look;
mod migration;
mod mover;
mod outgoing;
mod plan;
mod post_copy;
mod prepare;
mod resolve;
mod run;
mod serve;
mod settle;
mod teller;
mod told;
mod tune;
mod turn;
mod watch;

pub(crate) use checked::Checked;
pub(crate) use fences::keep as keep_fences;
pub(crate) use migration::{Migration, Seat};
pub(crate) use outgoing::Outgoing;
pub(crate) use plan::contents_of;
pub(crate) use resolve::{discard, resolve};
pub(crate) use settle::take_up;
