//! What has changed in a page since another version of it.
//!
//! A byte has a bit, least first, for each eighth of the page in which something has changed. For each of these follow 64
//! bits, one for each word of eight bytes, and then the words that have changed, as they are now. Being new content and
//! no difference to be added, it can be applied twice; and no bytes lead out of the page.

use crate::PAGE;
use crate::wire::{Malformed, Reader};

pub(crate) type Page = [u8; PAGE as usize];

/// No delta is longer, in bytes: half a page.
pub(crate) const LONGEST: usize = PAGE as usize / 2;
const WORD: usize = 8;
/// An eighth of a page: what a word of bits stands for.
const PART: usize = 64 * WORD;
const PARTS: usize = PAGE as usize / PART;
const BITS: usize = size_of::<u64>();

/// Writes what makes `new` of `old`; how many bytes that takes, or `None` when it would be too long.
pub(crate) fn encode(old: &Page, new: &Page, delta: &mut [u8; LONGEST]) -> Option<usize> {
    let (old, new) = (old.as_chunks::<PART>().0, new.as_chunks::<PART>().0);
    let (mut changed, mut length) = ([0; PARTS], 1);
    for (part, changed) in changed.iter_mut().enumerate() {
        *changed = changed_words(&old[part], &new[part]);
        if *changed != 0 {
            length += BITS + changed.count_ones() as usize * WORD;
        }
        if length > LONGEST {
            return None;
        }
    }
    let (parts, mut rest) = delta[..length].split_at_mut(1);
    parts[0] = 0;
    for (part, bits) in changed.into_iter().enumerate().filter(|(_, bits)| *bits != 0) {
        parts[0] |= 1 << part;
        let (head, words) = rest.split_at_mut(BITS);
        head.copy_from_slice(&bits.to_le_bytes());
        let (words, after) = words.split_at_mut(bits.count_ones() as usize * WORD);
        let new = new[part].as_chunks::<WORD>().0;
        for (to, word) in words.as_chunks_mut::<WORD>().0.iter_mut().zip(ones(bits)) {
            *to = new[word];
        }
        rest = after;
    }
    Some(length)
}

/// Which words of two parts differ, a bit each.
fn changed_words(old: &[u8; PART], new: &[u8; PART]) -> u64 {
    // Most parts are the same. This, and what follows, has no branches, so that the compiler uses vectors.
    let words = old.as_chunks::<WORD>().0.iter().zip(new.as_chunks::<WORD>().0);
    if words.fold(0, |all, (old, new)| all | u64::from_ne_bytes(*old) ^ u64::from_ne_bytes(*new)) == 0 {
        return 0;
    }
    let eights = old.as_chunks::<{ 8 * WORD }>().0.iter().zip(new.as_chunks::<{ 8 * WORD }>().0);
    eights.enumerate().fold(0, |bits, (eight, (old, new))| {
        let (old, new) = (old.as_chunks::<WORD>().0, new.as_chunks::<WORD>().0);
        bits | (0..8).fold(0, |bits, word| bits | u64::from(old[word] != new[word]) << word) << (8 * eight)
    })
}

/// The places of the bits that are set.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = bits.trailing_zeros() as usize;
        bits &= bits.checked_sub(1)?;
        Some(place)
    })
}

/// Takes one delta off the front and makes a page what it says.
pub(crate) fn apply(deltas: &mut Reader<'_>, page: &mut Page) -> Result<(), Malformed> {
    let (parts, _) = page.as_chunks_mut::<PART>();
    each_part(deltas, |part, bits, words| {
        let (page, _) = parts[part].as_chunks_mut::<WORD>();
        for (word, new) in ones(bits).zip(words.as_chunks::<WORD>().0) {
            page[word] = *new;
        }
    })
}

/// Takes one delta off the front.
pub(crate) fn skip(deltas: &mut Reader<'_>) -> Result<(), Malformed> {
    each_part(deltas, |_, _, _| ())
}

fn each_part(deltas: &mut Reader<'_>, mut take: impl FnMut(usize, u64, &[u8])) -> Result<(), Malformed> {
    let parts = deltas.bytes(1)?[0];
    for part in ones(parts.into()) {
        let bits = deltas.u64()?;
        take(part, bits, deltas.bytes(bits.count_ones() as usize * WORD)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    fn page(seed: u64) -> Page {
        let mut state = seed | 1;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    }

    fn applied(old: &Page, delta: &[u8]) -> Page {
        let (mut page, mut reader) = (*old, Reader(delta));
        apply(&mut reader, &mut page).unwrap();
        reader.end().unwrap();
        page
    }

    #[test]
    fn what_is_the_same_takes_a_byte_and_one_word_seventeen() {
        let (old, mut delta) = (page(1), [0; LONGEST]);
        assert_eq!(encode(&old, &old, &mut delta), Some(1));
        for at in 0..PAGE as usize {
            let mut new = old;
            new[at] ^= 0x40;
            assert_eq!(encode(&old, &new, &mut delta), Some(17));
            assert!(applied(&old, &delta[..17]) == new, "byte {at}");
        }
    }

    #[test]
    fn what_is_all_new_has_no_delta() {
        assert_eq!(encode(&page(1), &page(2), &mut [0; LONGEST]), None);
    }

    proptest! {
        #[test]
        fn it_makes_the_new_page_of_the_old_one(
            seed: u64,
            changes in proptest::collection::vec((0..PAGE as usize, 1usize..600, any::<u8>()), 0..40),
        ) {
            let old = page(seed);
            let mut new = old;
            for (at, length, value) in changes {
                let end = (at + length).min(new.len());
                new[at..end].fill(value);
            }
            let mut delta = [0; LONGEST];
            let words = old.chunks(WORD).zip(new.chunks(WORD)).filter(|(old, new)| old != new).count();
            match encode(&old, &new, &mut delta) {
                Some(length) => {
                    prop_assert!(length <= 65 + words * WORD);
                    prop_assert!(applied(&old, &delta[..length]) == new);
                    // Once more makes no difference.
                    prop_assert!(applied(&new, &delta[..length]) == new);
                    let mut reader = Reader(&delta[..length]);
                    prop_assert!(skip(&mut reader).is_ok() && reader.0.is_empty());
                    prop_assert!(apply(&mut Reader(&delta[..length - 1]), &mut new).is_err());
                }
                None => prop_assert!(65 + words * WORD > LONGEST),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let (mut applied, mut skipped) = (Reader(&bytes), Reader(&bytes));
            prop_assert_eq!(apply(&mut applied, &mut page(3)), skip(&mut skipped));
            prop_assert_eq!(applied.0, skipped.0);
        }
    }

    #[test]
    #[ignore = "prints figures"]
    fn how_fast_it_is() {
        const PAGES: usize = 8192;
        let old: Vec<Page> = (0..PAGES as u64).map(page).collect();
        for (what, percent, record) in [
            ("same", 0, 8),
            ("1 %", 1, 8),
            ("10 %", 10, 8),
            ("10 % in 64s", 10, 64),
            ("50 %", 50, 8),
            ("random", 100, 8),
        ] {
            let mut new = old.clone();
            for (index, new) in new.iter_mut().enumerate() {
                let fresh = page(index as u64 + 1_000_000);
                let mut state = index as u64 + 1;
                for (new, fresh) in new.chunks_mut(record).zip(fresh.chunks(record)) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    if (state >> 33) % 100 < percent {
                        new.copy_from_slice(fresh);
                    }
                }
            }
            let (mut best, mut bytes, mut deltas, mut delta) = (f64::MAX, 0, Vec::new(), [0; LONGEST]);
            for _ in 0..30 {
                let begun = Instant::now();
                let lengths = old.iter().zip(&new).map(|(old, new)| encode(old, new, &mut delta).unwrap_or(0));
                bytes = lengths.sum();
                best = best.min(begun.elapsed().as_secs_f64());
            }
            for (old, new) in old.iter().zip(&new) {
                deltas.extend(encode(old, new, &mut delta).map(|length| (delta, length)));
            }
            let speed = |seconds: f64, pages: usize| (pages * PAGE as usize) as f64 / seconds / f64::from(1 << 30);
            let (begun, mut target) = (Instant::now(), old[0]);
            for (delta, length) in &deltas {
                apply(&mut Reader(&delta[..*length]), &mut target).unwrap();
            }
            let decoded = speed(begun.elapsed().as_secs_f64(), deltas.len());
            println!(
                "{what:12} encodes {:5.1} GiB/s, applies {decoded:6.1} GiB/s, {} of {PAGES} pages as deltas of {} bytes",
                speed(best, PAGES),
                deltas.len(),
                bytes.checked_div(deltas.len()).unwrap_or(0),
            );
        }
    }
}
