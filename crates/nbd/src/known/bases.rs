//! The images of a host from which it takes what it need not be sent.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Index, Offered, is_sampled};
use crate::backend::Backend;
use crate::blocks::{GRAIN, Grains, Sum, has, runs, which};
use crate::sums::sums_of;

/// Grains that are read and compared at once: 64 KiB.
const STEP: usize = 16;
/// How many of a block's grains are looked for in the indexes.
const MOST_LOOKS: usize = 12;
/// How many places are remembered where grains were found, each as a base and how far from their own place.
const MOST_TRAILS: usize = 4;
/// Where a trail has led to nothing in so many steps, it is not followed further in this block.
const MOST_MISSES: usize = 2;

/// One of them.
pub struct Base {
    disk: Box<dyn Backend>,
    index: Option<Index>,
    is_alike: bool,
}

impl Base {
    /// An image, with an index of it, if there is one.
    pub fn new(disk: Box<dyn Backend>, index: Option<Index>) -> Self {
        Self { disk, index, is_alike: false }
    }

    /// One that is likely to have the same in the same place.
    #[must_use]
    pub fn alike(self) -> Self {
        Self { is_alike: true, ..self }
    }
}

/// All of them, for one disk that arrives.
#[derive(Default)]
pub struct Bases {
    own: Vec<Base>,
    others: Arc<Vec<Base>>,
    trails: Mutex<Vec<Trail>>,
}

/// What is found in this base, by its number, is so many bytes behind the place where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trail {
    base: usize,
    shift: i64,
}

impl Bases {
    /// Those of this disk only, and others.
    pub fn new(own: Vec<Base>, others: Arc<Vec<Base>>) -> Self {
        Self { own, others, trails: Mutex::default() }
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty() && self.others.is_empty()
    }

    fn base(&self, number: usize) -> Option<&Base> {
        self.all().nth(number)
    }

    fn all(&self) -> impl Iterator<Item = &Base> {
        self.own.iter().chain(self.others.iter())
    }

    fn trails(&self) -> MutexGuard<'_, Vec<Trail>> {
        self.trails.lock().expect("nobody panics with this lock")
    }

    fn remember(&self, trail: Trail) {
        let mut trails = self.trails();
        trails.retain(|it| *it != trail);
        trails.insert(0, trail);
        trails.truncate(MOST_TRAILS);
    }

    /// Puts what is known of a part that begins at `at` into its place there; tells which grains are not known. `itself` is
    /// what was there before, if something was. What is zero is left alone, and what is not known is anything.
    pub(crate) fn fill(&self, itself: Option<&dyn Backend>, at: u64, offered: &Offered, into: &mut [u8]) -> Grains {
        let mut search = Search::new(at, offered, into);
        let alike = self.all().filter(|it| it.is_alike).map(|it| &*it.disk);
        for disk in itself.into_iter().chain(alike) {
            search.follow(disk, 0, 0, usize::MAX);
        }
        let trails = self.trails().clone();
        for trail in trails {
            if let Some((base, first)) = self.base(trail.base).zip(search.first())
                && search.follow(&*base.disk, trail.shift, first, MOST_MISSES)
            {
                self.remember(trail);
            }
        }
        let mut looks = 0;
        for (number, sum) in which(&offered.full).zip(&offered.sums) {
            if looks == MOST_LOOKS || search.first().is_none() {
                break;
            }
            if !is_sampled(sum) || !has(&search.lacking, number) {
                continue;
            }
            looks += 1;
            for (number_of_base, base) in self.all().enumerate() {
                let Some(found) = base.index.as_ref().and_then(|index| index.find(sum)) else { continue };
                let shift = found as i64 - (at + (number * GRAIN) as u64) as i64;
                if search.follow(&*base.disk, shift, number, MOST_MISSES) {
                    self.remember(Trail { base: number_of_base, shift });
                    break;
                }
            }
        }
        search.lacking
    }
}

/// For what is not known yet of a part.
struct Search<'a> {
    at: u64,
    offered: &'a Offered,
    /// The sum of each grain.
    sums: Vec<Option<&'a Sum>>,
    into: &'a mut [u8],
    lacking: Grains,
}

impl<'a> Search<'a> {
    fn new(at: u64, offered: &'a Offered, into: &'a mut [u8]) -> Self {
        let mut sums = vec![None; offered.length.div_ceil(GRAIN)];
        for (number, sum) in which(&offered.full).zip(&offered.sums) {
            sums[number] = Some(sum);
        }
        Self { at, offered, sums, into, lacking: offered.full }
    }

    /// The first grain that is not known.
    fn first(&self) -> Option<usize> {
        which(&self.lacking).next()
    }

    /// Takes what is in this image so far behind the place where it belongs: from this grain on to the end of the part, and
    /// from there to its beginning, until too many steps were in vain. Tells whether anything was found.
    fn follow(&mut self, disk: &dyn Backend, shift: i64, from: usize, most_misses: usize) -> bool {
        let (middle, end) = (from / STEP, self.sums.len().div_ceil(STEP));
        let mut found = false;
        for steps in [&mut (middle..end) as &mut dyn Iterator<Item = usize>, &mut (0..middle).rev()] {
            let mut misses = 0;
            for step in steps {
                match self.take(disk, shift, step) {
                    Some(0) => misses += 1,
                    Some(_) => (found, misses) = (true, 0),
                    None => {}
                }
                if misses == most_misses {
                    break;
                }
            }
        }
        found
    }

    /// How many grains of this step were found; `None` when none is lacking.
    fn take(&mut self, disk: &dyn Backend, shift: i64, step: usize) -> Option<usize> {
        let first = step * STEP;
        let length = self.offered.length.min((step + 1) * STEP * GRAIN) - first * GRAIN;
        let is_lacking = |number: usize| has(&self.lacking, first + number);
        let lacking: Vec<_> = runs(length, is_lacking).filter_map(|(run, is_so)| is_so.then_some(run)).collect();
        lacking.first()?;
        let found = |run: Range<usize>| self.take_run(disk, shift, first * GRAIN + run.start, run.len());
        Some(lacking.into_iter().map(found).sum())
    }

    /// How many grains were found of these that are lacking, which begin here.
    fn take_run(&mut self, disk: &dyn Backend, shift: i64, at: usize, length: usize) -> usize {
        let there = (self.at + at as u64).checked_add_signed(shift).filter(|it| *it < disk.size());
        let Some(there) = there else { return 0 };
        // What ends within a grain has no sum of it.
        let length = length.min(usize::try_from(disk.size() - there).unwrap_or(usize::MAX));
        let bytes = &mut self.into[at..at + length];
        // What cannot be read is not known: it may have become shorter.
        if disk.read(there, bytes).is_err() {
            return 0;
        }
        let grains: Vec<&[u8]> = bytes.chunks(GRAIN).collect();
        let mut found = 0;
        for (number, sum) in (at / GRAIN..).zip(sums_of(&grains)) {
            if self.sums[number] == Some(&sum) {
                self.lacking[number / 8] &= !(1 << (number % 8));
                found += 1;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Identity, index};
    use super::*;
    use crate::backend::Memory;
    use crate::blocks::{count, grain};

    const MIB: usize = 1 << 20;

    fn random(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        bytes
    }

    /// With an index of what is said to be in it.
    fn base(bytes: Vec<u8>, indexed: &[u8]) -> Base {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("it");
        let identity = Identity::of(&tempfile::tempfile().unwrap().metadata().unwrap());
        index(&Memory::holding(indexed.to_vec()), Path::new("/it"), identity, &at, &mut || true).unwrap();
        Base::new(Box::new(Memory::holding(bytes)), Some(Index::open(&at).unwrap()))
    }

    /// How many grains are not found of this part that belongs there; what is found is right.
    fn lacking(bases: &Bases, itself: Option<&dyn Backend>, at: usize, part: &[u8]) -> usize {
        let (offered, mut into) = (Offered::of(part), vec![0xee; part.len()]);
        let lacking = bases.fill(itself, at as u64, &offered, &mut into);
        for (number, bytes) in part.chunks(GRAIN).enumerate() {
            let place = grain(number, part.len());
            let is_known = has(&offered.full, number) && !has(&lacking, number);
            let is_zero = !has(&offered.full, number);
            assert!(!is_known || into[place.clone()] == *bytes);
            assert!(!is_zero || into[place].iter().all(|it| *it == 0xee));
        }
        count(&lacking)
    }

    #[test]
    fn what_an_image_has_elsewhere_is_found_by_its_index_around_what_has_changed() {
        let image = random(1, 16 * MIB);
        let bases = Bases::new(Vec::new(), Arc::new(vec![base(random(9, MIB), &[]), base(image.clone(), &image)]));
        let mut part = image[5 * MIB + 3 * GRAIN..][..MIB].to_vec();
        for number in [0, 17, 18, 200] {
            part[number * GRAIN] ^= 1;
        }
        part[32 * GRAIN..40 * GRAIN].fill(0);
        assert_eq!(lacking(&bases, None, 100 * MIB, &part), 4);
        // What follows is found without the index: it has hardly any grains, and ends in the middle of one.
        let next = &image[6 * MIB + 3 * GRAIN..][..2 * GRAIN + 5];
        assert_eq!(lacking(&bases, None, 101 * MIB, next), 0);
        assert_eq!(lacking(&bases, None, 0, &random(3, MIB)), 256);
        assert_eq!(lacking(&Bases::default(), None, 0, &image[..MIB]), 256);
    }

    #[test]
    fn what_is_in_the_same_place_of_an_image_that_is_alike_needs_no_index() {
        let image = random(1, 3 * MIB + 100);
        let alike = Base::new(Box::new(Memory::holding(image.clone())), None).alike();
        let bases = Bases::new(vec![alike], Arc::default());
        for at in [0, 2 * MIB] {
            assert_eq!(lacking(&bases, None, at, &image[at..at + MIB]), 0);
        }
        // Also in the middle of something else, and at its end.
        let mut part = random(2, MIB);
        part[100 * GRAIN..110 * GRAIN].copy_from_slice(&image[MIB + 100 * GRAIN..][..10 * GRAIN]);
        assert_eq!(lacking(&bases, None, MIB, &part), 246);
        assert_eq!(lacking(&bases, None, 3 * MIB, &image[3 * MIB..]), 0);
        let longer = [&image[3 * MIB..], &[0; 5000], &[1]].concat();
        assert_eq!(lacking(&bases, None, 3 * MIB, &longer), 2);
        let itself = Memory::holding(longer.clone());
        assert_eq!(lacking(&Bases::default(), Some(&itself), 0, &longer), 0);
    }

    #[test]
    fn an_index_that_lies_costs_time_and_nothing_else() {
        let (image, other) = (random(1, 4 * MIB), random(2, 4 * MIB));
        let changed = base(other, &image);
        let shorter = base(image[..MIB].to_vec(), &image);
        let bases = Bases::new(Vec::new(), Arc::new(vec![changed, shorter]));
        assert_eq!(lacking(&bases, None, 0, &image[MIB..2 * MIB]), 256);
        assert_eq!(lacking(&bases, None, 0, &image[..MIB]), 0, "what is still there is found in spite of it");
    }
}
