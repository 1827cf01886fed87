//! The BLAKE3s of many grains at once.
//!
//! BLAKE3 cuts what it sums into chunks of 1 KiB, and a processor's vectors hold up to sixteen of those. A grain has four:
//! summed one by one, grains take more than twice as long as one piece of the same length. So the chunks of sixteen grains
//! are put side by side, those at the same place of their grains at once, and then the nodes of their trees in the same
//! way. (J. O'Connor, J.-P. Aumasson, S. Neves, Z. Wilcox-O'Hearn, "BLAKE3", sections 2.4 and 5.3.)

use blake3::platform::Platform;
use blake3::{CHUNK_LEN, IncrementCounter};

use crate::blocks::{GRAIN, Grains, Sum, sum_of};

/// How many are summed at once: as many chunks as the widest vectors hold.
const LANES: usize = 16;
const CHUNKS: usize = GRAIN / CHUNK_LEN;
/// The paper's key of what has none, and its flags.
const KEY: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

/// The sums of these grains, the last of which may be a short one.
pub(crate) fn sums_of(grains: &[&[u8]]) -> Vec<Sum> {
    let mut sums = vec![Sum::default(); grains.len()];
    for (grains, sums) in grains.chunks(LANES).zip(sums.chunks_mut(LANES)) {
        let whole: Option<Vec<&[u8; GRAIN]>> = grains.iter().map(|grain| (*grain).try_into().ok()).collect();
        match whole {
            Some(grains) => side_by_side(&grains, sums),
            None => sums.iter_mut().zip(grains).for_each(|(sum, grain)| *sum = sum_of(grain)),
        }
    }
    sums
}

/// One sum of a part of a disk: over which of its grains are not zero, and the sums of those.
pub(crate) fn sum_of_sums(full: &Grains, sums: &[Sum]) -> Sum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(full).update(sums.as_flattened());
    *hasher.finalize().as_bytes()
}

fn side_by_side(grains: &[&[u8; GRAIN]], sums: &mut [Sum]) {
    let platform = Platform::detect();
    let mut nodes = [[Sum::default(); LANES]; CHUNKS];
    for (number, nodes) in nodes.iter_mut().enumerate() {
        let chunks: Vec<&[u8; CHUNK_LEN]> = grains.iter().map(|grain| &grain.as_chunks().0[number]).collect();
        let (counter, into) = (number as u64, nodes.as_flattened_mut());
        platform.hash_many(&chunks, &KEY, counter, IncrementCounter::No, 0, CHUNK_START, CHUNK_END, into);
    }
    let join = |left: &[Sum], right: &[Sum], flags: u8, into: &mut [Sum]| {
        let pairs: Vec<[Sum; 2]> = left.iter().zip(right).map(|(left, right)| [*left, *right]).collect();
        let pairs: Vec<&[u8; 64]> = pairs.iter().map(|it| it.as_flattened().try_into().expect("twice 32")).collect();
        platform.hash_many(&pairs, &KEY, 0, IncrementCounter::No, PARENT | flags, 0, 0, into.as_flattened_mut());
    };
    let [first, second, third, fourth] = nodes.each_ref().map(|it| &it[..grains.len()]);
    let mut halves = [[Sum::default(); LANES]; 2];
    let [left, right] = halves.each_mut().map(|it| &mut it[..grains.len()]);
    join(first, second, 0, left);
    join(third, fourth, 0, right);
    join(left, right, ROOT, sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_grains_have_the_sums_that_blake3_gives_each() {
        let mut bytes = vec![0; 40 * GRAIN];
        fastrand::Rng::with_seed(1).fill(&mut bytes);
        for length in
            [0, 1, GRAIN - 1, GRAIN, 3 * GRAIN + 1, 15 * GRAIN, 16 * GRAIN, 17 * GRAIN, 40 * GRAIN - 1, 40 * GRAIN]
        {
            let grains: Vec<&[u8]> = bytes[..length].chunks(GRAIN).collect();
            let each: Vec<Sum> = grains.iter().map(|grain| *blake3::hash(grain).as_bytes()).collect();
            assert_eq!(sums_of(&grains), each, "{length}");
        }
    }

    #[test]
    fn the_sum_of_sums_tells_where_which_grain_is() {
        let sums = [[1; 32], [2; 32]];
        let full = |byte: u8| [byte; size_of::<Grains>()];
        let all =
            [sum_of_sums(&full(3), &sums), sum_of_sums(&full(5), &sums), sum_of_sums(&full(3), &[sums[1], sums[0]])];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    }
}
