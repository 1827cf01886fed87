//! What migrations are measured with: the measuring guest and what is read from it.
//!
//! [`INITRD`] is a whole Linux guest but for its kernel: one program that rewrites memory in a known pattern, checks it,
//! and beats every 5 ms on its serial port (`guest/`). [`GuestOptions`] says how it is to behave, [`GuestLog`] reads what
//! it says, from both hosts of a migration, and tells how long the guest's users had to wait.

pub mod batch;
pub mod compare;
#[cfg(test)]
mod cpio;
mod guest;
pub mod link;
mod log;
pub mod migration;
pub mod page;
pub mod ram;
pub mod record;
pub mod report;
pub mod run;
pub mod scenario;
pub mod testbed;
mod tracking;

pub use guest::{Fill, GuestOptions, Mode, ParseError};
pub use log::{Beat, Gap, GuestLog, PERIOD, Ready, Switchover, Verified, Written};

/// The measuring guest's first root file system, for `-initrd`: gzipped, with nothing in it but its static `/init`.
pub const INITRD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/initrd.gz"));

/// The middle one; the mean of both, where two are in the middle. None of none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => Some(f64::midpoint(values[middle.checked_sub(1)?], values[middle])),
        _ => Some(values[middle]),
    }
}
