//! Disks that move to another place while their VM stays on this host.
//!
//! Of a VM that runs, QEMU mirrors the disk to the new place and goes on with that (`running`, `mirror`); of one that does
//! not, the image is copied and the words of its command line are changed (`stopped`). What is made for it is noted on this
//! host's disk before it is made (`note`), so that the next agent ends what this one could not. Where a disk is, its QEMU
//! says: whatever became of a job, the node that the disk has then is the truth. No disk goes to where one is (`places`), and
//! what is at a server is looked at before the guest's QEMU opens it (`trial`).

mod copy;
mod mirror;
mod moves;
mod note;
mod places;
mod running;
mod stopped;
mod target;
mod told;
mod trial;

pub(crate) use moves::{DiskMoves, list};
pub(crate) use stopped::sweep;
