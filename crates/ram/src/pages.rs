//! Sets of a block's pages, a bit each, that several threads change at once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PAGE;
use crate::kernel::Words;

/// Pages that a word of the set stands for.
const WORD: u64 = 64;

/// A set of the pages 0 to `pages`. Every operation on a page is atomic, none on several.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Store,
    pages: u64,
}

/// Where the words of a set are.
#[derive(Debug)]
enum Store {
    Memory(Vec<AtomicU64>),
    File(Words),
}

impl PageSet {
    /// An empty set.
    pub(crate) fn new(pages: u64) -> Self {
        Self { words: Store::Memory((0..pages.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect()), pages }
    }

    /// The set that a file has from this place on, a multiple of a page; what is changed in the set is in the file.
    pub(crate) fn in_file(file: &File, offset: u64, pages: u64) -> io::Result<Self> {
        Ok(Self { words: Store::File(Words::map(file, offset, pages.div_ceil(WORD) as usize)?), pages })
    }

    /// How many bytes such a set takes up in a file.
    pub(crate) fn bytes_in_file(pages: u64) -> u64 {
        (pages.div_ceil(WORD) * 8).next_multiple_of(PAGE)
    }

    fn store(&self) -> &[AtomicU64] {
        match &self.words {
            Store::Memory(words) => words,
            Store::File(words) => words,
        }
    }

    /// How many pages the block has.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds these; gives back how many were not there.
    pub(crate) fn insert(&self, pages: Range<u64>) -> u64 {
        self.each_word(pages, |word, mask| (mask & !word.fetch_or(mask, Ordering::Relaxed)).count_ones())
    }

    /// Removes these; gives back how many were there.
    pub(crate) fn remove(&self, pages: Range<u64>) -> u64 {
        self.each_word(pages, |word, mask| (mask & word.fetch_and(!mask, Ordering::Relaxed)).count_ones())
    }

    /// How many are there.
    pub(crate) fn len(&self) -> u64 {
        self.count(0..self.pages)
    }

    /// How many of these are there.
    pub(crate) fn count(&self, pages: Range<u64>) -> u64 {
        self.each_word(pages, |word, mask| (mask & word.load(Ordering::Relaxed)).count_ones())
    }

    /// Whether this one is there.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.store()[(page / WORD) as usize].load(Ordering::Relaxed) & (1 << (page % WORD)) != 0
    }

    /// The first run of pages that are there, within these.
    pub(crate) fn next_run(&self, within: Range<u64>) -> Option<Range<u64>> {
        let first = self.find(within.clone(), |word| word)?;
        let end = self.find(first..within.end, |word| !word).unwrap_or(within.end);
        Some(first..end)
    }

    /// Takes the first run out, of at most so many pages: whoever gets a page is the only one.
    pub(crate) fn take_run(&self, within: Range<u64>, most: u64) -> Option<Range<u64>> {
        let mut from = within.start;
        while let Some(run) = self.next_run(from..within.end) {
            let mut end = run.start;
            while end < run.end.min(run.start.saturating_add(most)) && self.remove(end..end + 1) == 1 {
                end += 1;
            }
            if end > run.start {
                return Some(run.start..end);
            }
            // Somebody else was faster.
            from = run.start + 1;
        }
        None
    }

    /// The words that stand for these pages, whose first is a multiple of 64.
    pub(crate) fn words(&self, pages: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let words = (pages.start / WORD) as usize..pages.end.div_ceil(WORD) as usize;
        self.store()[words].iter().map(|word| word.load(Ordering::Relaxed))
    }

    /// Adds all that another set of the same block has; gives back how many were not there.
    pub(crate) fn insert_all(&self, other: &Self) -> u64 {
        let words = other.words(0..other.pages).enumerate().filter(|(_, word)| *word != 0);
        words.map(|(index, word)| self.insert_word(index as u64 * WORD, word)).sum()
    }

    /// Of these pages, has those that another set of the same block has, and no others.
    pub(crate) fn copy(&self, other: &Self, pages: Range<u64>) {
        let mut theirs = other.store()[(pages.start / WORD) as usize..].iter();
        self.each_word(pages, |word, mask| {
            let wanted = theirs.next().map_or(0, |word| word.load(Ordering::Relaxed)) & mask;
            word.fetch_and(wanted | !mask, Ordering::Relaxed);
            word.fetch_or(wanted, Ordering::Relaxed);
            0
        });
    }

    /// Adds what such a word says.
    pub(crate) fn insert_word(&self, first_page: u64, word: u64) -> u64 {
        let bits = (self.pages - first_page).min(WORD);
        let word = if bits < WORD { word & ((1 << bits) - 1) } else { word };
        let before = self.store()[(first_page / WORD) as usize].fetch_or(word, Ordering::Relaxed);
        (word & !before).count_ones().into()
    }

    fn find(&self, within: Range<u64>, sense: impl Fn(u64) -> u64) -> Option<u64> {
        let mut page = within.start;
        while page < within.end {
            let word = sense(self.store()[(page / WORD) as usize].load(Ordering::Relaxed)) >> (page % WORD);
            if word != 0 {
                let found = page + u64::from(word.trailing_zeros());
                return (found < within.end).then_some(found);
            }
            page = (page / WORD + 1) * WORD;
        }
        None
    }

    fn each_word(&self, pages: Range<u64>, mut change: impl FnMut(&AtomicU64, u64) -> u32) -> u64 {
        assert!(pages.end <= self.pages, "pages {pages:?} of a block of {}", self.pages);
        let (mut page, mut changed) = (pages.start, 0);
        while page < pages.end {
            let end = ((page / WORD + 1) * WORD).min(pages.end);
            let mask = (u64::MAX >> (WORD - (end - page))) << (page % WORD);
            changed += u64::from(change(&self.store()[(page / WORD) as usize], mask));
            page = end;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(pages in 1u64..300, steps in proptest::collection::vec((any::<bool>(), 0u64..300, 0u64..130), 0..30)) {
            let (set, mut model) = (PageSet::new(pages), BTreeSet::new());
            for (insert, start, length) in steps {
                let range = start.min(pages)..(start + length).min(pages);
                let changed = match insert {
                    true => set.insert(range.clone()) as usize == range.filter(|page| model.insert(*page)).count(),
                    false => set.remove(range.clone()) as usize == range.filter(|page| model.remove(page)).count(),
                };
                prop_assert!(changed);
            }
            prop_assert_eq!(set.count(0..pages) as usize, model.len());
            prop_assert!((0..pages).all(|page| set.contains(page) == model.contains(&page)));
            let copy = PageSet::new(pages);
            for (index, word) in set.words(0..pages).enumerate() {
                copy.insert_word(index as u64 * 64, word);
            }
            let mut seen = BTreeSet::new();
            while let Some(run) = copy.take_run(0..pages, 7) {
                prop_assert!(run.end - run.start <= 7);
                seen.extend(run);
            }
            prop_assert_eq!(seen, model);
        }
    }

    #[test]
    fn a_part_of_another_set_replaces_what_was_there() {
        let (set, other) = (PageSet::new(200), PageSet::new(200));
        set.insert(0..200);
        other.insert(60..70);
        other.insert(130..140);
        set.copy(&other, 50..135);
        let expected = |page: &u64| !(50..135).contains(page) || other.contains(*page);
        assert!((0..200).all(|page| set.contains(page) == expected(&page)));
        assert_eq!(other.insert_all(&set), set.len() - 20);
        assert_eq!(other.len(), set.len(), "the others were among them");
    }

    #[test]
    fn a_set_in_a_file_is_there_when_it_is_opened_again() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE + PageSet::bytes_in_file(1000)).unwrap();
        PageSet::in_file(&file, PAGE, 1000).unwrap().insert(990..1000);
        let again = PageSet::in_file(&file, PAGE, 1000).unwrap();
        assert_eq!(again.next_run(0..1000), Some(990..1000));
    }

    #[test]
    fn a_page_is_taken_by_one_thread_only() {
        let set = PageSet::new(100_000);
        set.insert(0..100_000);
        let taken: u64 = std::thread::scope(|scope| {
            let take =
                || std::iter::from_fn(|| set.take_run(0..100_000, 5)).map(|run| run.end - run.start).sum::<u64>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 100_000);
    }
}
