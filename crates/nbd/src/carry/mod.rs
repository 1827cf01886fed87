//! Disks over a link: what is done to a disk here ([`Carried`]) is done to one at the other end ([`land`]).
//!
//! A link is encrypted, has parallel streams and survives the end of its connections. Frames of its streams overtake each
//! other; so a request is answered when the other end has done it and not before, and whoever has two that touch the same
//! bytes under way at once does what no order is promised for, as with any disk.
//!
//! Of a target that is new it is known what is zero: zeroes that are written to where nothing else was written before go
//! nowhere, and it stays as thin as it is. QEMU's mirrors begin with zeroes for the whole disk.

mod carrier;
mod landing;
#[cfg(test)]
pub(crate) mod tests;
mod words;

pub use carrier::{Carried, Carrier};
pub use landing::{LandError, Landing, land};
pub(crate) use words::{Refused, decode_done, encode_done};
