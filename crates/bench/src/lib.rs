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

pub use guest::{Fill, GuestKind, GuestOptions, Mode, ParseError};
pub use log::{Beat, Gap, GuestLog, Hardware, PERIOD, Ready, Switchover, Verified, Written};

/// The measuring guest's first root file system, for `-initrd`: gzipped, with nothing in it but its static `/init`.
pub const INITRD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/initrd.gz"));

/// The measuring guest that needs no kernel: an ELF file for `-kernel`.
pub const BARE_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bare.elf"));

/// What a table says where there is no figure.
const NO_FIGURE: &str = "-";

/// A figure in the words that are made of it, or a dash: where there is none, and for what comes of a division by nothing.
pub fn in_words(figure: Option<f64>, words: impl FnOnce(f64) -> String) -> String {
    figure.filter(|it| it.is_finite()).map_or_else(|| NO_FIGURE.into(), words)
}

/// The middle one; the mean of both, where two are in the middle. None of none; what is no number does not count.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|it| it.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => Some(f64::midpoint(values[middle.checked_sub(1)?], values[middle])),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_figure_is_a_dash() {
        let ms = |figure| in_words(figure, |ms| format!("{ms:.0} ms"));
        assert_eq!([ms(Some(12.3)), ms(Some(0.0))], ["12 ms", "0 ms"]);
        assert_eq!([None, Some(f64::NAN), Some(f64::INFINITY)].map(ms), ["-"; 3]);
    }

    #[test]
    fn a_median_is_of_what_was_measured() {
        assert_eq!(median([3.0, f64::NAN, 1.0, 2.0, f64::INFINITY].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median([f64::NAN].into_iter()), None);
    }
}
