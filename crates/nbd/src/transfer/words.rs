//! What the two ends say to each other.

use bytes::Bytes;

use crate::blocks::{GRAINS, Grains, Sum, blocks_of, place};
use crate::known::Offered;

/// The kinds of frames.
pub(super) mod kind {
    /// A block; bulk.
    pub(crate) const BLOCK: u16 = 1;
    /// A block is zero now; bulk.
    pub(crate) const ZERO: u16 = 2;
    /// That was all; urgent.
    pub(crate) const END: u16 = 3;
    /// Which sums there are; urgent, the other way.
    pub(crate) const KNOWN: u16 = 4;
    /// What came of it; urgent, the other way.
    pub(crate) const DONE: u16 = 5;
    /// The sums of a block's grains; bulk.
    pub(crate) const OFFER: u16 = 6;
    /// Which of those are not there; urgent, the other way.
    pub(crate) const LACKING: u16 = 7;
    /// Those; bulk.
    pub(crate) const REST: u16 = 8;
}

/// Number, whether there is a sum, sum, grains.
const WORDS: usize = 8 + 1 + 32 + GRAINS;
/// And nothing, so that the bytes behind it begin with a line of the processor's cache at both ends.
pub(super) const BLOCK_HEAD: usize = WORDS.next_multiple_of(64);
/// How many sums are told at once.
pub(super) const MOST_SUMS: usize = 1024;

/// What is before the bytes of a block, or of the rest of one: then the sum is of those bytes only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockHead {
    pub(super) block: u64,
    pub(super) sum: Option<Sum>,
    pub(super) grains: Grains,
}

impl BlockHead {
    pub(super) fn write(&self, into: &mut [u8]) {
        into[..8].copy_from_slice(&self.block.to_be_bytes());
        into[8] = u8::from(self.sum.is_some());
        into[9..41].copy_from_slice(&self.sum.unwrap_or_default());
        into[41..WORDS].copy_from_slice(&self.grains);
        into[WORDS..BLOCK_HEAD].fill(0);
    }

    /// With the block, packed.
    pub(super) fn read(frame: &[u8]) -> Option<(Self, &[u8])> {
        let (head, packed) = frame.split_first_chunk::<BLOCK_HEAD>()?;
        let sum = head[9..41].try_into().expect("32 bytes");
        let head = Self {
            block: u64::from_be_bytes(head[..8].try_into().expect("eight bytes")),
            sum: match head[8] {
                0 => None,
                1 => Some(sum),
                _ => return None,
            },
            grains: head[41..WORDS].try_into().expect("the rest of it"),
        };
        Some((head, packed))
    }
}

/// What is in a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) block: u64,
    pub(super) offered: Offered,
}

impl Offer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut frame = self.block.to_be_bytes().to_vec();
        self.offered.write(&mut frame);
        frame
    }

    /// Of a disk of so many bytes.
    pub(super) fn decode(frame: &[u8], size: u64) -> Option<Self> {
        let (block, offered) = frame.split_first_chunk::<8>()?;
        let block = u64::from_be_bytes(*block);
        let at = (block < blocks_of(size)).then(|| place(block, size))?;
        Some(Self { block, offered: Offered::read(offered, (at.end - at.start) as usize)? })
    }
}

/// What of a block that was offered is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lacking {
    pub(super) block: u64,
    pub(super) grains: Grains,
}

impl Lacking {
    pub(super) fn encode(self) -> Bytes {
        [&self.block.to_be_bytes()[..], &self.grains].concat().into()
    }

    pub(super) fn decode(frame: &[u8]) -> Option<Self> {
        let (block, grains) = frame.split_first_chunk::<8>()?;
        Some(Self { block: u64::from_be_bytes(*block), grains: grains.try_into().ok()? })
    }
}

/// All was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// How many frames that were.
    pub(super) frames: u64,
    /// The sum over all; none when nothing is to be compared.
    pub(super) root: Option<Sum>,
}

impl End {
    pub(super) fn encode(self) -> Bytes {
        let mut frame = self.frames.to_be_bytes().to_vec();
        frame.extend(self.root.iter().flatten());
        frame.into()
    }

    pub(super) fn decode(frame: &[u8]) -> Option<Self> {
        let (frames, root) = frame.split_first_chunk::<8>()?;
        let root = if root.is_empty() { None } else { Some(root.try_into().ok()?) };
        Some(Self { frames: u64::from_be_bytes(*frames), root })
    }
}

/// Of all blocks before this one it is known what is in them: nothing, or what has these sums.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KnownTo {
    pub(super) end: u64,
    pub(super) sums: Vec<(u64, Sum)>,
}

impl KnownTo {
    pub(super) fn encode(&self) -> Bytes {
        let mut frame = self.end.to_be_bytes().to_vec();
        for (block, sum) in &self.sums {
            frame.extend(block.to_be_bytes());
            frame.extend(sum);
        }
        frame.into()
    }

    pub(super) fn decode(frame: &[u8]) -> Option<Self> {
        let (end, rest) = frame.split_first_chunk::<8>()?;
        let (sums, []) = rest.as_chunks::<40>() else { return None };
        let sum = |it: &[u8; 40]| {
            let (block, sum) = it.split_first_chunk::<8>().expect("eight bytes of forty");
            (u64::from_be_bytes(*block), sum.try_into().expect("32 bytes"))
        };
        Some(Self { end: u64::from_be_bytes(*end), sums: sums.iter().map(sum).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_as_it_was_written_and_nothing_else_is_taken_for_it() {
        let mut grains = [0; GRAINS];
        grains[3] = 0x81;
        for sum in [None, Some([7; 32])] {
            let head = BlockHead { block: 1 << 40, sum, grains };
            let mut frame = vec![0; BLOCK_HEAD + 2];
            head.write(&mut frame);
            assert_eq!(BlockHead::read(&frame), Some((head, &[0, 0][..])));
            frame[8] = 2;
            assert!(BlockHead::read(&frame).is_none() && BlockHead::read(&frame[..BLOCK_HEAD - 1]).is_none());
        }
        for root in [None, Some([9; 32])] {
            let end = End { frames: 77, root };
            assert_eq!(End::decode(&end.encode()), Some(end));
        }
        assert!(End::decode(&[0; 9]).is_none() && End::decode(&[0; 41]).is_none());
        let known = KnownTo { end: 5, sums: vec![(1, [1; 32]), (4, [4; 32])] };
        assert_eq!(KnownTo::decode(&known.encode()), Some(known));
        assert!(KnownTo::decode(&[0; 47]).is_none());
        let offer = Offer { block: 2, offered: Offered::of(&[1; 5000]) };
        assert_eq!(Offer::decode(&offer.encode(), (2 << 20) + 5000), Some(offer.clone()));
        // There is no such block, or it is shorter.
        for size in [0, 2 << 20, (2 << 20) + 4096] {
            assert_eq!(Offer::decode(&offer.encode(), size), None);
        }
        let lacking = Lacking { block: 1 << 40, grains };
        assert_eq!(Lacking::decode(&lacking.encode()), Some(lacking));
        assert!(Lacking::decode(&[0; 41]).is_none() && Lacking::decode(&[0; 39]).is_none());
    }
}
