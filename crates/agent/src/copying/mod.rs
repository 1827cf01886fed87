//! Images that no guest runs from, copied between two hosts: one end reads, the other writes. What goes over the link
//! between them is `vmferry_nbd`'s to say (`transfer/`).
//!
//! A copy is written beside the name that it is to have, and gets that when it is whole and on its disk: what has the name
//! is all of the old or all of the new. What a copy that failed has left is where the next one begins.

mod arriving;
mod copies;
mod leaving;

pub(crate) use arriving::{accept, part_of};
pub(crate) use copies::Copies;
pub(crate) use leaving::begin;
