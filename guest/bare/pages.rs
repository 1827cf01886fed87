//! The pages: each word of each is another for another page and another sequence number, so that a page that is old, torn
//! or another's is told from the right one.

use core::fmt::Write;

use crate::memory::PAGE;
use crate::serial::Serial;
use crate::settings::{MEMORY, Mode};

const WORDS: usize = PAGE as usize / 8;
/// Words of each page that have its number and its sequence number.
const HEADER: usize = 2;
/// Odd, so that it goes through all words.
const STEP: u64 = 0xd134_2543_de82_ef95;
/// Any constant does: it keeps a page of zeros from being right.
const SEED: u64 = 0x766d_6665_7272_7921;
/// Lines about damaged pages, after which they are only counted.
const CORRUPT_LINES: u64 = 64;

type Page = [u64; WORDS];

/// splitmix64; Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
fn mix(from: u64) -> u64 {
    let z = from.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn first_word(number: u64, sequence: u32) -> u64 {
    mix(mix(number ^ SEED) ^ u64::from(sequence))
}

/// What a page has that is not its header, in order.
fn body(number: u64, sequence: u32) -> impl Iterator<Item = u64> {
    let mut word = first_word(number, sequence);
    core::iter::repeat_with(move || {
        word = word.wrapping_add(STEP);
        word
    })
}

pub(crate) struct Pages {
    pages: &'static mut [Page],
    /// What sequence number each page should have.
    expected: &'static mut [u32],
    /// Damaged pages ever seen.
    pub(crate) corrupt: u64,
}

impl Pages {
    /// Gives every page its first content; none when RAM ends before them.
    pub(crate) fn fill(count: u64, ram_end: u64) -> Option<Self> {
        let first = (MEMORY + count * 4).next_multiple_of(PAGE);
        if count == 0 || first + count * PAGE > ram_end {
            return None;
        }
        let expected = core::ptr::with_exposed_provenance_mut::<u32>(MEMORY as usize);
        let pages = core::ptr::with_exposed_provenance_mut::<Page>(first as usize);
        // SAFETY: RAM that nothing else uses.
        let (expected, pages) = unsafe {
            (
                core::slice::from_raw_parts_mut(expected, count as usize),
                core::slice::from_raw_parts_mut(pages, count as usize),
            )
        };
        let mut all = Self { pages, expected, corrupt: 0 };
        for number in 0..count {
            all.write(number, 1);
        }
        Some(all)
    }

    pub(crate) fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    fn write(&mut self, number: u64, sequence: u32) {
        let page = &mut self.pages[number as usize];
        (page[0], page[1]) = (number, u64::from(sequence));
        for (word, is) in page[HEADER..].iter_mut().zip(body(number, sequence)) {
            *word = is;
        }
        self.expected[number as usize] = sequence;
    }

    fn holds(&self, number: u64, sequence: u32) -> bool {
        let page = &self.pages[number as usize];
        let mut different = (page[0] ^ number) | (page[1] ^ u64::from(sequence));
        for (word, is) in page[HEADER..].iter().zip(body(number, sequence)) {
            different |= word ^ is;
        }
        different == 0
    }

    pub(crate) fn verify(&mut self, number: u64, serial: &mut Serial) {
        let expected = self.expected[number as usize];
        if self.holds(number, expected) {
            return;
        }
        self.corrupt += 1;
        if self.corrupt > CORRUPT_LINES {
            return;
        }
        let found = u32::try_from(self.pages[number as usize][1]).ok().filter(|found| self.holds(number, *found));
        let _ = match found {
            Some(found) => writeln!(serial, "CORRUPT page={number} expected={expected} found={found}"),
            None => writeln!(serial, "CORRUPT page={number} expected={expected} found=torn"),
        };
    }

    /// Verifies it, and gives it its next content, in one pass.
    pub(crate) fn rewrite(&mut self, number: u64, serial: &mut Serial) {
        let old = self.expected[number as usize];
        let new = old.wrapping_add(1);
        let page = &mut self.pages[number as usize];
        let mut different = (page[0] ^ number) | (page[1] ^ u64::from(old));
        if different != 0 {
            self.verify(number, serial);
            return self.write(number, new);
        }
        (page[0], page[1]) = (number, u64::from(new));
        for (word, (was, is)) in page[HEADER..].iter_mut().zip(body(number, old).zip(body(number, new))) {
            different |= *word ^ was;
            *word = is;
        }
        self.expected[number as usize] = new;
        if different != 0 {
            self.corrupt += 1;
            if self.corrupt <= CORRUPT_LINES {
                let _ = writeln!(serial, "CORRUPT page={number} expected={old} found=torn");
            }
        }
    }
}

/// Which page comes next.
pub(crate) struct Order {
    mode: Mode,
    pages: u64,
    count: u64,
}

impl Order {
    pub(crate) fn new(mode: Mode, pages: u64) -> Self {
        Self { mode, pages, count: 0 }
    }

    pub(crate) fn next(&mut self) -> u64 {
        let count = self.count;
        self.count += 1;
        let random = mix(count);
        match self.mode {
            // A tenth of the pages gets nine tenths of the writes.
            Mode::HotCold if mix(random) % 10 < 9 => random % self.pages.div_ceil(10),
            Mode::Random | Mode::HotCold | Mode::Mixed => random % self.pages,
            Mode::Idle | Mode::Read | Mode::Write => count % self.pages,
        }
    }
}
