//! What other hosts need not send to this one, because one of its images has it: indexes of those are made when nobody
//! needs the disk (indexing.rs), and used when an image or a guest's disk arrives (bases.rs).

mod bases;
mod indexes;
mod indexing;

pub(crate) use bases::{base_of, bases};
pub(crate) use indexing::keep_indexes;
