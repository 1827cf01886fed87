//! The sums of the grains of a part of a disk, which is offered before it is sent.

use crate::blocks::{BLOCK, GRAIN, GRAINS, Grains, Sum, count, full, grain, which};
use crate::sums::{sum_of_sums, sums_of};

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    /// In bytes; at most a block.
    pub(crate) length: usize,
    /// The grains that are not zero.
    pub(crate) full: Grains,
    /// The sums of those, in order.
    pub(crate) sums: Vec<Sum>,
}

impl Offered {
    /// Of these bytes.
    pub(crate) fn of(part: &[u8]) -> Self {
        assert!(part.len() as u64 <= BLOCK, "no more than a block is offered at once");
        let full = full(part);
        let grains: Vec<&[u8]> = which(&full).map(|number| &part[grain(number, part.len())]).collect();
        Self { length: part.len(), full, sums: sums_of(&grains) }
    }

    pub(crate) fn write(&self, into: &mut Vec<u8>) {
        into.extend(self.full);
        into.extend(self.sums.iter().flatten());
    }

    /// Of so many bytes; `None` when it is none of such.
    pub(crate) fn read(frame: &[u8], length: usize) -> Option<Self> {
        let (full, sums) = frame.split_first_chunk::<GRAINS>()?;
        let (sums, []) = sums.as_chunks::<32>() else { return None };
        let last = which(full).last();
        let fits = length as u64 <= BLOCK && last.is_none_or(|last| last * GRAIN < length) && sums.len() == count(full);
        fits.then(|| Self { length, full: *full, sums: sums.to_vec() })
    }

    /// One sum over all of them.
    pub(crate) fn root(&self) -> Sum {
        sum_of_sums(&self.full, &self.sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_read_as_it_was_written_and_nothing_else_is_taken_for_it() {
        for length in [1, GRAIN, 3 * GRAIN + 7, 1 << 20] {
            let mut part = vec![0; length];
            for at in (0..length).step_by(2 * GRAIN) {
                part[at] = 1 + (at / GRAIN) as u8;
            }
            let offered = Offered::of(&part);
            assert_eq!(offered.sums.len(), length.div_ceil(2 * GRAIN));
            let mut frame = Vec::new();
            offered.write(&mut frame);
            assert_eq!(Offered::read(&frame, length).as_ref(), Some(&offered));
            // Shorter, longer, of another length, with another number of sums.
            for bad in [&frame[..frame.len() - 1], &frame[..GRAINS - 1], &[&frame[..], &[0; 32]].concat()] {
                assert_eq!(Offered::read(bad, length), None);
            }
            assert_eq!(Offered::read(&frame, (2 << 20) + 1), None);
            frame[0] ^= 1;
            assert_eq!(Offered::read(&frame, length), None);
        }
        let behind_its_end = Offered { length: 0, full: [0xff; GRAINS], sums: vec![[1; 32]; 256] };
        let mut frame = Vec::new();
        behind_its_end.write(&mut frame);
        assert_eq!(Offered::read(&frame, 255 * GRAIN), None);
        assert!(Offered::read(&frame, 255 * GRAIN + 1).is_some());
    }
}
