//! A running guest is watched, and nothing of it is sent: how much of its memory it writes within how long.
//!
//! All memory that it has is protected once, and then looked at again and again; what was written is left as it is. So each
//! page costs the guest one fault at most, however often it is looked, and what is found grows: that is the dirty set as a
//! function of time. When it ends, be it by the end of our process, the guest is as it was before ([`Tracking`]).

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::memory::Block;
use crate::tracking::Tracking;
use crate::{GuestRam, PAGE, RamError, zero};

/// Memory is protected in pieces of so many bytes, where there is any.
const PIECE: u64 = 2 << 20;
/// Of so many pages it is looked whether they are zero.
const SAMPLES: u64 = 2048;

/// See the module's text.
pub struct Watch {
    ram: GuestRam,
    tracking: Tracking,
    parts: Vec<Parts>,
    /// In the middle of protecting.
    begun: Instant,
    protecting: Duration,
}

/// Bytes of a block.
#[derive(Default)]
struct Parts {
    /// Protected, since there was memory.
    protected: Vec<Range<u64>>,
    /// Without memory.
    empty: Vec<Range<u64>>,
}

impl Parts {
    fn of(block: &Block) -> io::Result<Self> {
        let mut parts = Self::default();
        let add = |list: &mut Vec<Range<u64>>, range: Range<u64>| match list.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.is_empty() => {}
            _ => list.push(range),
        };
        let (mut from, end) = (0, block.size().next_multiple_of(PAGE));
        while let Some(first) = block.first_data(from..end)? {
            let piece = first - first % PIECE;
            add(&mut parts.empty, from..piece.max(from));
            from = (piece + PIECE).min(end);
            add(&mut parts.protected, piece..from);
        }
        add(&mut parts.empty, from..end);
        Ok(parts)
    }
}

/// What a look has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Since writes began to be noted.
    pub after: Duration,
    /// How much was written by then, in bytes of pages; each counts once.
    pub bytes: u64,
    /// How long the look took.
    pub took: Duration,
}

impl Watch {
    /// Begins with it. Fails when somebody tracks the guest already, as while it is migrated.
    pub fn begin(ram: GuestRam) -> Result<Self, RamError> {
        let tracking = Tracking::begin(&ram)?;
        let parts = ram.blocks().iter().map(Parts::of).collect::<io::Result<Vec<_>>>().map_err(RamError::io)?;
        let first = Instant::now();
        for (block, parts) in parts.iter().enumerate() {
            let protected = parts.protected.iter().try_for_each(|part| tracking.protect(block, part.clone()));
            protected.map_err(RamError::io)?;
        }
        let protecting = first.elapsed();
        Ok(Self { ram, tracking, parts, begun: first + protecting / 2, protecting })
    }

    /// How much was written so far.
    pub fn look(&self) -> Result<Written, RamError> {
        if self.ram.is_gone() {
            return Err(RamError::io(io::Error::new(io::ErrorKind::NotFound, "its QEMU has ended")));
        }
        let first = Instant::now();
        let bytes = self.written().map_err(RamError::io)?;
        let took = first.elapsed();
        Ok(Written { after: (first + took / 2).duration_since(self.begun), bytes, took })
    }

    fn written(&self) -> io::Result<u64> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        for (number, (block, parts)) in self.ram.blocks().iter().zip(&self.parts).enumerate() {
            for part in &parts.protected {
                self.tracking.written(number, part.clone(), &mut found)?;
            }
            for part in &parts.empty {
                bytes += new_memory(block, part.clone())?;
            }
        }
        Ok(bytes + found.iter().map(|range| range.end - range.start).sum::<u64>())
    }

    /// How much memory the guest has, in bytes; whole pieces of 2 MiB.
    pub fn tracked(&self) -> u64 {
        self.parts.iter().flat_map(|parts| &parts.protected).map(|part| part.end - part.start).sum()
    }

    /// Which share of that is more than zeroes, from 0 to 1, by a sample of its pages.
    pub fn share_in_use(&self) -> Result<f64, RamError> {
        let every = (self.tracked() / PAGE).div_ceil(SAMPLES).max(1) * PAGE;
        let (mut page, mut looked, mut used) = ([0; PAGE as usize], 0_u64, 0_u64);
        for (block, parts) in self.ram.blocks().iter().zip(&self.parts) {
            for part in &parts.protected {
                for at in part.clone().step_by(every as usize).filter(|at| at + PAGE <= block.size()) {
                    block.read_at(at, &mut page).map_err(RamError::io)?;
                    looked += 1;
                    used += u64::from(!zero::is_zero(&page));
                }
            }
        }
        Ok(if looked == 0 { 0.0 } else { used as f64 / looked as f64 })
    }

    /// How long one thread of QEMU stood still for the beginning, and how long it took to protect all memory.
    pub fn beginning(&self) -> (Duration, Duration) {
        (self.tracking.stood_still(), self.protecting)
    }
}

/// How much memory there is, in bytes, where there was none.
fn new_memory(block: &Block, part: Range<u64>) -> io::Result<u64> {
    let (mut from, mut bytes) = (part.start, 0);
    while let Some(first) = block.first_data(from..part.end)? {
        from = (first - first % PIECE + PIECE).min(part.end);
        bytes += block.data(first..from)?.iter().map(|data| data.end - data.start).sum::<u64>();
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pieces_with_memory_are_protected_and_new_memory_is_found() {
        let ram = GuestRam::of_our_own(&[16 * PIECE + 3 * PAGE]);
        let block = &ram.blocks()[0];
        for at in [0, 5 * PIECE + 7 * PAGE, 6 * PIECE, 16 * PIECE + 2 * PAGE] {
            block.write_at(at, &[1; PAGE as usize]).unwrap();
        }
        let parts = Parts::of(block).unwrap();
        let end = 16 * PIECE + 3 * PAGE;
        assert_eq!(parts.protected, [0..PIECE, 5 * PIECE..7 * PIECE, 16 * PIECE..end]);
        assert_eq!(parts.empty, [PIECE..5 * PIECE, 7 * PIECE..16 * PIECE]);
        let new = || parts.empty.iter().map(|part| new_memory(block, part.clone()).unwrap()).sum::<u64>();
        assert_eq!(new(), 0);
        block.write_at(9 * PIECE + PAGE, &[1; 2 * PAGE as usize]).unwrap();
        block.write_at(12 * PIECE, &[1; PAGE as usize]).unwrap();
        assert_eq!(new(), 3 * PAGE);
    }
}
