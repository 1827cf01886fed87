//! The destination's side: RAM arrives, and the guest may run before it is complete.
//!
//! Until the switchover pages are written into the files that are the RAM of a QEMU that waits. In post-copy what the
//! source says is missing is punched out first, so that the guest cannot read what is stale: it faults, and waits until
//! the page is there. From then on a page is put in place once, by a call that leaves alone what is there already; so
//! the RAM itself is the record of what has arrived, and a new agent that finds the guest waiting goes on with it.

mod faults;
mod landing;
mod record;
mod session;
#[cfg(test)]
mod tebibyte;
mod waits;

pub use landing::Landing;
pub use session::{Ended, serve};
