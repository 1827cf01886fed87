//! Which pages hold nothing but zeros: most of a guest's memory that was never used, and they need not be sent.

use std::ops::Range;

use crate::PAGE;

/// What is looked at before deciding whether to go on: a few vector registers.
const STRIDE: usize = 256;
const WORD: usize = size_of::<u128>();

/// There is nothing but zeros in these bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Pages that are not zero are known by their first few bytes, usually; those that are must be read to the end.
    let (strides, rest) = bytes.as_chunks::<STRIDE>();
    strides.iter().all(stride_is_zero) && rest.iter().all(|byte| *byte == 0)
}

/// Without a branch, so that the compiler uses vectors.
fn stride_is_zero(stride: &[u8; STRIDE]) -> bool {
    let (words, _) = stride.as_chunks::<WORD>();
    words.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0
}

/// Pages that lie beside one another and are alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Bytes of the buffer, whole pages but for the last of the buffer.
    pub(crate) range: Range<usize>,
    /// All of these pages hold nothing but zeros; otherwise none of them does.
    pub(crate) zero: bool,
}

/// The runs of zero and other pages, in order, that make up a buffer which begins with a page.
pub(crate) fn runs(buffer: &[u8]) -> impl Iterator<Item = Run> + '_ {
    let mut pages = buffer.chunks(PAGE as usize).map(|page| (page.len(), is_zero(page))).peekable();
    let mut start = 0;
    std::iter::from_fn(move || {
        let (length, zero) = pages.next()?;
        let mut end = start + length;
        while let Some((length, _)) = pages.next_if(|(_, also)| *also == zero) {
            end += length;
        }
        let run = Run { range: start..end, zero };
        start = end;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_found() {
        for length in [1, 15, 255, 256, 257, 4096, 5000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {length}");
                bytes[at] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn runs_cover_a_buffer_in_order() {
        let page = PAGE as usize;
        let mut buffer = vec![0; 6 * page + 100];
        for written in [2 * page + 17, 3 * page, 5 * page - 1] {
            buffer[written] = 1;
        }
        let run = |pages: Range<usize>, zero| Run { range: pages.start * page..pages.end * page, zero };
        let last = Run { range: 5 * page..buffer.len(), zero: true };
        assert_eq!(runs(&buffer).collect::<Vec<_>>(), [run(0..2, true), run(2..5, false), last]);
        buffer[6 * page + 99] = 1;
        let last = Run { range: 6 * page..buffer.len(), zero: false };
        assert_eq!(runs(&buffer).collect::<Vec<_>>()[2..], [run(5..6, true), last]);
        assert_eq!(runs(&[]).count(), 0);
    }
}
