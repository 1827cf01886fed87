//! A migration from plan to retirement, at the source. Each phase has a file, and `begin.rs` drives them:
//!
//! ```text
//! plan         refuse early                                     nothing is touched yet
//! prepare      the destination's QEMU waits                     undo: abandon there
//! copy RAM     rounds until QEMU switches over, or post-copy    undo: cancel here, abandon there
//! commit       the destination's journal takes the guest over   no undo; until it answers the guest stays paused here
//! post-copy    (if used) the rest of the RAM follows
//! retire       the source's QEMU goes
//! ```
//!
//! Each step is written to the journal before it is done; `settle.rs` goes on from there after a crash.

mod begin;
mod commit;
mod copy_ram;
mod migration;
mod outgoing;
mod plan;
mod post_copy;
mod prepare;
mod retire;
mod run;
mod settle;
mod told;
mod undo;

pub(crate) use begin::begin;
pub(crate) use migration::Migration;
pub(crate) use outgoing::Outgoing;
pub(crate) use settle::settle;
