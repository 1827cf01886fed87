//! A whole disk over a link, where what the other end has already is not sent.
//!
//! A disk is taken in blocks, and a block is known by its BLAKE3. The receiver reads what it has at its end, an older copy
//! or what came of a copy that was broken off, and tells the sums while it reads. The sender reads its own, and sends the
//! blocks whose sums differ, each with its sum and without the zeroes in it. There is no list of what has arrived: what is
//! in the blocks decides. So nothing can be wrong about a copy that goes on after a crash, whichever writes were lost in
//! it, nor about a source that has changed in between; and both read their disks at the same time, so that it costs
//! little more than the reading at one end, which has to be anyway.
//!
//! What differs, or is not there, is offered before it is sent, where the receiver may know parts of it: it is told the sums
//! of the grains in a block, takes what it has, from the same block or from other images, and asks for the rest. Many blocks
//! are on offer at once, so nobody waits for an answer. Whether it pays is seen by what comes of it ([`crate::known`]).
//!
//! When all is there the two compare one sum over those of all blocks, and only then does the receiver give the copy its
//! name.

mod receive;
mod send;
#[cfg(test)]
mod tests;
mod there;
mod words;

pub use crate::blocks::{BLOCK, LARGEST, Sum};
pub use receive::{Before, ReceiveError, receive};
pub use send::{How, Progress, SendError, send};
