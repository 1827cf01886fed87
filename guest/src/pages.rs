//! What a page holds, so that a page that is old, torn or somebody else's is told from the right one.
//!
//! A line of header (page number, sequence number, a check value over both), then a body that is different for each page
//! and sequence number, cut out of a template. Random pages have a window of the template each, masked (XOR) with a key
//! drawn from page and sequence number; text cannot be masked, or it would not compress, so there the window is drawn
//! from both. Every word is compared, so half a page of one sequence number and half of another never passes.
//!
//! It is written for speed under emulation, where a memory access costs about ten of the host's instructions: verifying
//! and rewriting a word of a random page takes two loads and one store, and the loops go by lines because their inner
//! loop is unrolled then. (Vector instructions are slower there; the build turns them off.)

use crate::settings::Fill;

/// Bytes of a page, the unit in which hypervisors track and send memory.
pub(crate) const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
/// Words that are treated without a branch.
const LINE: usize = 8;

/// One page, by words.
pub(crate) type Page = [u64; WORDS];

/// Windows into the template start at any word of its first 4 MiB.
const WINDOWS: usize = (4 << 20) / 8;

/// Any constant does: it only has to keep the check value from being zero on a page of zeros.
const SEED: u64 = 0x766d_6665_7272_7921;

/// What a page held that was expected to hold something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// All of another sequence number's content: the page is stale.
    Sequence(u32),
    /// No sequence number's content: torn, or damaged.
    Torn,
}

/// Makes and checks the content of pages.
pub(crate) struct Pattern {
    template: Vec<u64>,
    fill: Fill,
}

impl Pattern {
    pub(crate) fn new(fill: Fill) -> Pattern {
        let mut random = Random::new(SEED);
        let template = match fill {
            Fill::Random => (0..WINDOWS + WORDS).map(|_| random.next()).collect(),
            Fill::Text => text(&mut random, WINDOWS + WORDS),
        };
        Pattern { template, fill }
    }

    /// Gives the page its content for this sequence number.
    pub(crate) fn write(&self, page: &mut Page, number: u64, sequence: u32) {
        let content = self.content(number, sequence);
        page[..LINE].copy_from_slice(&content.header);
        for (line, template) in lines_mut(page).zip(lines(content.window)) {
            for (word, template) in line.iter_mut().zip(template) {
                *word = template ^ content.key;
            }
        }
    }

    /// Whether the page holds exactly what it was given for this sequence number.
    pub(crate) fn verify(&self, page: &Page, number: u64, sequence: u32) -> Result<(), Found> {
        if self.holds(page, number, sequence) { Ok(()) } else { Err(self.find(page, number)) }
    }

    /// Both at once, in one pass over the page: verifies it, and gives it the content of another sequence number.
    #[inline]
    pub(crate) fn rewrite(&self, page: &mut Page, number: u64, old: u32, new: u32) -> Result<(), Found> {
        let was = self.content(number, old);
        let is = self.content(number, new);
        if page[..LINE] != was.header {
            let found = self.find(page, number);
            self.write(page, number, new);
            return Err(found);
        }
        page[..LINE].copy_from_slice(&is.header);
        let mut different = 0;
        if self.fill == Fill::Random {
            // Both have the same window, so it is loaded once.
            for (line, template) in lines_mut(page).zip(lines(was.window)) {
                for (word, template) in line.iter_mut().zip(template) {
                    different |= *word ^ template ^ was.key;
                    *word = template ^ is.key;
                }
            }
        } else {
            for ((line, old), new) in lines_mut(page).zip(lines(was.window)).zip(lines(is.window)) {
                for ((word, old), new) in line.iter_mut().zip(old).zip(new) {
                    different |= *word ^ old;
                    // The key is zero, but the compiler does not know: else it would call memcpy, and the string
                    // instruction in there is slow under emulation.
                    *word = new ^ is.key;
                }
            }
        }
        // The header was right, so what differs is a part of the page.
        if different == 0 { Ok(()) } else { Err(Found::Torn) }
    }

    fn holds(&self, page: &Page, number: u64, sequence: u32) -> bool {
        let content = self.content(number, sequence);
        let mut different = 0;
        for (line, template) in lines(page).zip(lines(content.window)) {
            for (word, template) in line.iter().zip(template) {
                different |= word ^ template ^ content.key;
            }
        }
        different == 0 && page[..LINE] == content.header
    }

    #[cold]
    fn find(&self, page: &Page, number: u64) -> Found {
        match u32::try_from(page[1]) {
            Ok(sequence) if self.holds(page, number, sequence) => Found::Sequence(sequence),
            _ => Found::Torn,
        }
    }

    #[inline]
    fn content(&self, number: u64, sequence: u32) -> Content<'_> {
        let of_page = mix(number ^ SEED);
        let check = mix(of_page ^ u64::from(sequence));
        let (place, key) = match self.fill {
            Fill::Random => (of_page, mix(check)),
            Fill::Text => (check, 0),
        };
        let start = usize::try_from(place).expect("the guest is a 64-bit one") % WINDOWS;
        let window = self.template[start..start + WORDS].try_into().expect("the slice has that length");
        let mut header = [check; LINE];
        header[0] = number;
        header[1] = u64::from(sequence);
        Content { header, window, key }
    }
}

/// What a page holds: the header, then the window's words but for its first line, masked with the key.
struct Content<'a> {
    header: [u64; LINE],
    window: &'a Page,
    key: u64,
}

fn lines(page: &Page) -> impl Iterator<Item = &[u64; LINE]> {
    page.as_chunks().0[1..].iter()
}

fn lines_mut(page: &mut Page) -> impl Iterator<Item = &mut [u64; LINE]> {
    page.as_chunks_mut().0[1..].iter_mut()
}

/// The finalizer of `SplitMix64` (Steele, Lea, Flood 2014): every bit of the input changes half of the output's.
#[inline]
pub(crate) fn mix(input: u64) -> u64 {
    let mut z = input.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random numbers that are the same in every run: `SplitMix64`.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform below `bound`, as well as a number of pages needs it (Lemire 2019, without the rejection).
    #[inline]
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let wide = u128::from(self.next()) * bound as u128;
        usize::try_from(wide >> 64).expect("less than the bound, which is one")
    }
}

/// Words of made-up language, common ones much more often than rare ones, as in a real one.
fn text(random: &mut Random, words: usize) -> Vec<u64> {
    const VOCABULARY: usize = 2048;
    let vocabulary: Vec<Vec<u8>> = (0..VOCABULARY)
        .map(|_| {
            let length = 2 + random.below(11);
            (0..length).map(|_| b"eeetttaaooiinnsshhrrdlucmfwygpbvk"[random.below(33)]).collect()
        })
        .collect();
    let mut bytes = Vec::with_capacity(words * 8 + 16);
    while bytes.len() < words * 8 {
        // Squared, so that a word's frequency falls with its rank.
        let rank = random.below(VOCABULARY) * random.below(VOCABULARY) / VOCABULARY;
        bytes.extend_from_slice(&vocabulary[rank]);
        bytes.push(b' ');
    }
    bytes.chunks_exact(8).take(words).map(|chunk| u64::from_le_bytes(chunk.try_into().expect("8 bytes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(pattern: &Pattern, number: u64, sequence: u32) -> Page {
        let mut page = [0; WORDS];
        pattern.write(&mut page, number, sequence);
        page
    }

    fn both(test: impl Fn(&Pattern)) {
        test(&Pattern::new(Fill::Random));
        test(&Pattern::new(Fill::Text));
    }

    #[test]
    fn a_page_holds_what_was_written() {
        both(|pattern| assert_eq!(pattern.verify(&written(pattern, 7, 3), 7, 3), Ok(())));
    }

    #[test]
    fn a_rewritten_page_holds_the_new_content() {
        both(|pattern| {
            let mut page = written(pattern, 7, 3);
            assert_eq!(pattern.rewrite(&mut page, 7, 3, 4), Ok(()));
            assert!(page == written(pattern, 7, 4));
        });
    }

    #[test]
    fn rewriting_finds_and_repairs_what_is_stale_or_torn() {
        both(|pattern| {
            let mut page = written(pattern, 7, 2);
            assert_eq!(pattern.rewrite(&mut page, 7, 3, 4), Err(Found::Sequence(2)));
            assert!(page == written(pattern, 7, 4));
            page[WORDS - 1] ^= 1;
            assert_eq!(pattern.rewrite(&mut page, 7, 4, 5), Err(Found::Torn));
            assert!(page == written(pattern, 7, 5));
            page[0] ^= 1;
            assert_eq!(pattern.rewrite(&mut page, 7, 5, 6), Err(Found::Torn));
            assert!(page == written(pattern, 7, 6));
        });
    }

    #[test]
    fn a_stale_page_names_its_sequence_number() {
        both(|pattern| assert_eq!(pattern.verify(&written(pattern, 7, 2), 7, 3), Err(Found::Sequence(2))));
    }

    #[test]
    fn a_page_torn_at_any_word_is_found() {
        both(|pattern| {
            let (old, new) = (written(pattern, 7, 2), written(pattern, 7, 3));
            for cut in 2..WORDS {
                let mut page = new;
                page[cut..].copy_from_slice(&old[cut..]);
                // At the very end old and new text may agree, and then nothing is torn.
                assert!(page == new || pattern.verify(&page, 7, 3) == Err(Found::Torn), "torn at word {cut}");
                let mut page = old;
                page[cut..].copy_from_slice(&new[cut..]);
                assert!(pattern.verify(&page, 7, 3).is_err(), "torn at word {cut}");
            }
        });
    }

    #[test]
    fn a_flipped_bit_another_pages_content_and_zeros_are_found() {
        both(|pattern| {
            for word in 0..WORDS {
                let mut page = written(pattern, 7, 3);
                page[word] ^= 1 << (word % 64);
                assert_eq!(pattern.verify(&page, 7, 3), Err(Found::Torn));
            }
            assert_eq!(pattern.verify(&written(pattern, 8, 3), 7, 3), Err(Found::Torn));
            assert_eq!(pattern.verify(&[0; WORDS], 0, 0), Err(Found::Torn));
        });
    }
}
