//! What the two sides say to each other about a guest's RAM: frames of the link, their kinds and bodies.
//!
//! Numbers are little-endian. Pages have 4 KiB and count from the start of their block; blocks are known by their place
//! in the source's list. Bulk frames are [`PAGES`] only; everything else, and the pages that a fault asked for, goes
//! over the urgent stream.

use std::ops::Range;
use std::time::Duration;

use crate::PAGE;
use crate::delta;
use crate::pages::PageSet;

/// The version of what is said here.
pub(crate) const VERSION: u32 = 4;
/// The most data in a frame of pages, in whole pages.
pub(crate) const MOST_DATA: u64 = 64;
/// The most runs in a frame of pages.
pub(crate) const MOST_RUNS: usize = 256;
/// The most pages that a frame tells of, those of zeroes included: 16 MiB, so that no frame takes long to put into place.
pub(crate) const MOST_TOLD: u64 = 4096;
/// The most words of bits in one [`MISSING`] frame: 32 KiB, for 1 GiB.
pub(crate) const MISSING_WORDS: usize = 4096;
/// So many words without a bit end such a frame: they take about as much as the head of another.
const MISSING_GAP: usize = 8;
/// The most pages that one fault asks for: 1 MiB.
pub(crate) const MOST_WANTED: u64 = 256;
/// The most blocks that a guest's RAM may have.
const MOST_BLOCKS: usize = 1024;
/// The longest name of a block.
const LONGEST_ID: usize = 255;

/// Pages, from the source.
pub(crate) const PAGES: u16 = 1;
/// The first word of the source: what RAM it has, see [`Hello`].
pub(crate) const HELLO: u16 = 2;
/// Which pages of a block the destination does not have, bit by bit.
pub(crate) const MISSING: u16 = 3;
/// All of them were told: post-copy begins.
pub(crate) const ARM: u16 = 4;
/// Bytes of the device state, in order.
pub(crate) const STATE: u16 = 5;
/// That was all of it.
pub(crate) const STATE_END: u16 = 6;
/// QEMU may have it: what it refers to is in place, or will be fetched.
pub(crate) const STATE_GO: u16 = 7;
/// As [`STATE`], before the first of those: what QEMU may have at once.
pub(crate) const STATE_EARLY: u16 = 8;

/// What was told to be missing is stale: it can go at once. More will be told before post-copy begins.
pub(crate) const PUNCH: u16 = 9;

/// The destination has that RAM, and waits.
pub(crate) const READY: u16 = 32;
/// The destination cannot go on, for the reason that follows.
pub(crate) const REFUSED: u16 = 33;
/// All frames of pages up to a number are in place.
pub(crate) const PLACED: u16 = 34;
/// Faults are taken from now on: the guest may run.
pub(crate) const ARMED: u16 = 35;
/// A fault: these pages next.
pub(crate) const WANT: u16 = 36;
/// All pages are here, see [`FaultTimes`].
pub(crate) const COMPLETE: u16 = 37;
/// What was stale is gone.
pub(crate) const PUNCHED: u16 = 38;
/// What was asked for takes its time.
pub(crate) const BUSY: u16 = 39;

/// Not what the other side says here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other agent says something malformed: {0}")]
pub struct Malformed(pub(crate) &'static str);

/// Reads numbers off the front.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Malformed("a frame is too short"))?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("four bytes")))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().expect("eight bytes")))
    }

    pub(crate) fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("a frame is too long")) }
    }
}

/// What the source begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Post-copy goes on over a new link: the destination tells what it still misses.
    pub(crate) resume: bool,
    /// Names and sizes in bytes.
    pub(crate) blocks: Vec<(String, u64)>,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [VERSION, u32::from(self.resume), self.blocks.len() as u32] {
            bytes.extend(number.to_le_bytes());
        }
        for (id, size) in &self.blocks {
            bytes.extend(size.to_le_bytes());
            bytes.extend((id.len() as u32).to_le_bytes());
            bytes.extend(id.as_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        if reader.u32()? != VERSION {
            return Err(Malformed("it speaks another version about RAM"));
        }
        let resume = match reader.u32()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed("it begins in an unknown way")),
        };
        let count = reader.u32()? as usize;
        if count > MOST_BLOCKS {
            return Err(Malformed("a guest with too many blocks of RAM"));
        }
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let size = reader.u64()?;
            let length = reader.u32()? as usize;
            if length > LONGEST_ID {
                return Err(Malformed("a block's name is too long"));
            }
            let id = std::str::from_utf8(reader.bytes(length)?).map_err(|_| Malformed("a block's name is no text"))?;
            blocks.push((id.to_owned(), size));
        }
        reader.end()?;
        Ok(Self { resume, blocks })
    }
}

/// Consecutive pages of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) block: usize,
    pub(crate) pages: Range<u64>,
    pub(crate) content: Content,
}

/// What is said of the pages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Each whole.
    Whole,
    /// All of them are zero, and nothing follows for them.
    Zero,
    /// How each differs from what was sent of it last, see [`delta`]. Before post-copy only.
    Delta,
}

impl Run {
    fn length(&self) -> u64 {
        self.pages.end - self.pages.start
    }
}

/// The body of a frame of pages: a number, what the runs are, and then what is in those that are not zero.
#[derive(Debug)]
pub(crate) struct Pages<'a> {
    /// Counted by the source, from 1, without a gap.
    pub(crate) number: u64,
    /// Each run, with what is in it.
    pub(crate) runs: Vec<(Run, &'a [u8])>,
}

const RUN: usize = 4 + 4 + 8;
const ZERO: u32 = 1 << 31;
const DELTA: u32 = 1 << 30;

impl<'a> Pages<'a> {
    /// How long the part before the data is.
    pub(crate) fn head_length(runs: usize) -> usize {
        8 + 4 + runs * RUN
    }

    /// Writes what comes before the data, which has its length.
    pub(crate) fn encode_head(number: u64, runs: &[Run], head: &mut [u8]) {
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            head[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&number.to_le_bytes());
        put(&(runs.len() as u32).to_le_bytes());
        for run in runs {
            put(&(run.block as u32).to_le_bytes());
            let content = match run.content {
                Content::Whole => 0,
                Content::Zero => ZERO,
                Content::Delta => DELTA,
            };
            put(&(run.length() as u32 | content).to_le_bytes());
            put(&run.pages.start.to_le_bytes());
        }
    }

    /// `blocks` has the number of pages of each block.
    pub(crate) fn decode(bytes: &'a [u8], blocks: &[u64]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let number = reader.u64()?;
        let count = reader.u32()? as usize;
        if count > MOST_RUNS {
            return Err(Malformed("too many runs of pages in a frame"));
        }
        let (mut runs, mut told) = (Vec::with_capacity(count), 0);
        for _ in 0..count {
            let block = reader.u32()? as usize;
            let length = reader.u32()?;
            let start = reader.u64()?;
            let content = match length & (ZERO | DELTA) {
                0 => Content::Whole,
                ZERO => Content::Zero,
                DELTA => Content::Delta,
                _ => return Err(Malformed("pages that are zero and differ")),
            };
            let length = u64::from(length & !(ZERO | DELTA));
            let pages = blocks.get(block).ok_or(Malformed("pages of an unknown block"))?;
            let end = start.checked_add(length).filter(|end| end <= pages && length > 0);
            let end = end.ok_or(Malformed("pages beyond the end of their block"))?;
            told += length;
            if told > MOST_TOLD {
                return Err(Malformed("a frame that tells of too many pages"));
            }
            runs.push(Run { block, pages: start..end, content });
        }
        let with_data = |run: Run| {
            let from = reader.0;
            match run.content {
                Content::Whole => reader.bytes((run.length() * PAGE) as usize).map(|_| ())?,
                Content::Zero => {}
                Content::Delta => run.pages.clone().try_for_each(|_| delta::skip(&mut reader))?,
            }
            Ok((run, &from[..from.len() - reader.0.len()]))
        };
        let runs = runs.into_iter().map(with_data).collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Self { number, runs })
    }
}

/// Pages that the destination needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) block: usize,
    pub(crate) pages: Range<u64>,
    /// The one of them that somebody waits for.
    pub(crate) first: u64,
}

impl Want {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = (self.block as u32).to_le_bytes().to_vec();
        for number in [self.pages.start, self.pages.end, self.first] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8], blocks: &[u64]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let block = reader.u32()? as usize;
        let (pages, first) = (reader.u64()?..reader.u64()?, reader.u64()?);
        reader.end()?;
        let most = *blocks.get(block).ok_or(Malformed("a fault in an unknown block"))?;
        if pages.end > most || !pages.contains(&first) {
            return Err(Malformed("a fault beyond the end of a block"));
        }
        if pages.end - pages.start > MOST_WANTED {
            return Err(Malformed("a fault that asks for too much"));
        }
        Ok(Self { block, pages, first })
    }
}

/// The frames that tell which pages are missing, but for those that are told already: of these, and of blocks where none
/// is, there is no frame.
pub(crate) fn encode_missing<'a>(sets: &'a [PageSet], told: &'a [PageSet]) -> impl Iterator<Item = Vec<u8>> + 'a {
    sets.iter().zip(told).enumerate().flat_map(|(block, (set, told))| {
        let new = |(word, told): (u64, u64)| word & !told;
        let mut words = set.words(0..set.pages()).zip(told.words(0..told.pages())).map(new).enumerate().peekable();
        std::iter::from_fn(move || {
            let (first, word) = words.find(|(_, word)| *word != 0)?;
            let (mut bits, mut end) = (vec![word], 1);
            while bits.len() < MISSING_WORDS
                && bits.len() - end < MISSING_GAP
                && let Some((_, word)) = words.next()
            {
                bits.push(word);
                if word != 0 {
                    end = bits.len();
                }
            }
            let mut bytes = (block as u32).to_le_bytes().to_vec();
            bytes.extend((first as u64 * 64).to_le_bytes());
            bits[..end].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
            Some(bytes)
        })
    })
}

/// Adds what such a frame tells to the sets; gives back how many pages of it were not there.
pub(crate) fn decode_missing(bytes: &[u8], sets: &[PageSet]) -> Result<u64, Malformed> {
    let mut reader = Reader(bytes);
    let set = sets.get(reader.u32()? as usize).ok_or(Malformed("pages of an unknown block are missing"))?;
    let first = reader.u64()?;
    let pages = (reader.0.len() as u64) * 8;
    let fits = first.is_multiple_of(64) && first < set.pages() && reader.0.len() <= MISSING_WORDS * 8;
    if !fits || first + pages > set.pages().next_multiple_of(64) || !reader.0.len().is_multiple_of(8) {
        return Err(Malformed("pages beyond the end of their block are missing"));
    }
    let words = reader.0.as_chunks().0.iter().enumerate();
    Ok(words.map(|(index, word)| set.insert_word(first + index as u64 * 64, u64::from_le_bytes(*word))).sum())
}

/// How long a guest waited for pages in post-copy, from when the destination's agent heard of a fault until the page was
/// there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultTimes {
    /// How often.
    pub count: u64,
    /// Half of the times were no longer than that.
    pub median: Duration,
    /// 99 of 100 were no longer than that.
    pub p99: Duration,
}

impl FaultTimes {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let micros = |time: Duration| time.as_micros() as u64;
        [self.count, micros(self.median), micros(self.p99)].into_iter().flat_map(u64::to_le_bytes).collect()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let (count, median, p99) = (reader.u64()?, reader.u64()?, reader.u64()?);
        reader.end()?;
        Ok(Self { count, median: Duration::from_micros(median), p99: Duration::from_micros(p99) })
    }
}

/// One number.
pub(crate) fn decode_number(bytes: &[u8]) -> Result<u64, Malformed> {
    let mut reader = Reader(bytes);
    let number = reader.u64()?;
    reader.end().map(|()| number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: [u64; 2] = [1000, 300_000];

    fn frame(number: u64, runs: &[Run], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; Pages::head_length(runs.len())];
        Pages::encode_head(number, runs, &mut bytes);
        bytes.extend(data);
        bytes
    }

    #[test]
    fn pages_are_read_as_they_were_written() {
        let runs = [
            Run { block: 0, pages: 998..1000, content: Content::Whole },
            Run { block: 1, pages: 200_000..204_000, content: Content::Zero },
            Run { block: 1, pages: 300..303, content: Content::Delta },
            Run { block: 1, pages: 7..8, content: Content::Whole },
        ];
        let mut data: Vec<u8> = (0..3 * PAGE).map(|at| at as u8).collect();
        // Two that are the same, and one in which the first word of the last part has changed.
        let deltas = [&[0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 0][..], b"new word"].concat();
        data.splice(2 * PAGE as usize..2 * PAGE as usize, deltas.clone());
        let bytes = frame(77, &runs, &data);
        let pages = Pages::decode(&bytes, &BLOCKS).unwrap();
        assert_eq!(pages.number, 77);
        assert!(pages.runs.iter().map(|(run, _)| run).eq(&runs));
        let (first, last) = data.split_at(2 * PAGE as usize);
        assert!(pages.runs.iter().map(|(_, data)| *data).eq([first, &[], &deltas, &last[deltas.len()..]]));
    }

    #[test]
    fn pages_that_are_not_there_are_refused() {
        let refused =
            |run: Run, data: u64| Pages::decode(&frame(1, &[run], &vec![0; (data * PAGE) as usize]), &BLOCKS).is_err();
        assert!(refused(Run { block: 2, pages: 0..1, content: Content::Whole }, 1));
        assert!(refused(Run { block: 0, pages: 999..1001, content: Content::Whole }, 2));
        assert!(refused(Run { block: 0, pages: 5..5, content: Content::Whole }, 0));
        assert!(refused(Run { block: 0, pages: 0..2, content: Content::Whole }, 1));
        assert!(refused(Run { block: 0, pages: 0..1, content: Content::Zero }, 1));
        assert!(refused(Run { block: 0, pages: 0..PAGE + 1, content: Content::Delta }, 1));
        assert!(refused(Run { block: 0, pages: 0..10, content: Content::Delta }, 1));
        assert!(refused(Run { block: 1, pages: 0..MOST_TOLD + 1, content: Content::Zero }, 0));
        assert!(refused(Run { block: 1, pages: u64::MAX - 1..u64::MAX, content: Content::Zero }, 0));
    }

    #[test]
    fn what_is_missing_is_told_whole() {
        let sets = BLOCKS.map(PageSet::new);
        sets[0].insert(999..1000);
        sets[1].insert(0..2);
        sets[1].insert(262_143..262_145);
        sets[1].insert(299_990..300_000);
        let (copy, none) = (BLOCKS.map(PageSet::new), BLOCKS.map(PageSet::new));
        let frames: Vec<_> = encode_missing(&sets, &none).collect();
        assert_eq!(frames.len(), 4);
        for frame in &frames {
            decode_missing(frame, &copy).unwrap();
        }
        for (set, copy) in sets.iter().zip(&copy) {
            assert!(set.words(0..set.pages()).eq(copy.words(0..set.pages())));
        }
        sets[1].insert(1000..1001);
        let more: Vec<_> = encode_missing(&sets, &copy).collect();
        assert!(more.len() == 1 && more[0].len() == 12 + 8, "only what is new: {more:?}");
        sets[1].insert(0..300_000);
        assert_eq!(encode_missing(&sets, &none).count(), 3, "long frames are cut");
    }

    #[test]
    fn times_are_read_as_they_were_written() {
        let times = FaultTimes { count: 3, median: Duration::from_micros(200), p99: Duration::from_secs(2) };
        assert_eq!(FaultTimes::decode(&times.encode()), Ok(times));
        assert!(FaultTimes::decode(&[]).is_err() && FaultTimes::decode(&[0; 25]).is_err());
    }

    #[test]
    fn a_greeting_is_read_as_it_was_written() {
        let hello = Hello { resume: true, blocks: vec![("ram0".into(), 1 << 40), ("dimm-ä".into(), 4096)] };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello.clone()));
        assert!(Hello::decode(&hello.encode()[1..]).is_err() && Hello::decode(&hello.encode()[..20]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let sets = BLOCKS.map(PageSet::new);
            let _ = (Hello::decode(&bytes), Pages::decode(&bytes, &BLOCKS), Want::decode(&bytes, &BLOCKS));
            let _ = (decode_missing(&bytes, &sets), decode_number(&bytes));
        }
    }
}
