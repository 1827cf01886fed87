//! What a guest costs that uses all of 1 TiB, in what this side remembers of it: its pages are not there.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Source, WriteLog};
use crate::memory::GuestRam;
use crate::tests::{arriving, links};
use crate::tracking::{TrackingError, WriteFaults};
use crate::wire::{decode_missing, encode_missing};
use crate::{PAGE, pages::PageSet};

const BYTES: u64 = 1 << 40;
const PAGES: u64 = BYTES / PAGE;
/// Of so many pages one was written since the guest was looked at last, just before it was paused.
const WRITTEN: u64 = 4096;

/// Tells of writes all over the RAM.
struct Scattered;

impl WriteLog for Scattered {
    fn protect(&self, _: usize, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn written(&self, _: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        let first = bytes.start.next_multiple_of(WRITTEN * PAGE);
        let written = (first..bytes.end).step_by((WRITTEN * PAGE) as usize).map(|at| at + PAGE);
        out.extend(written.map(|at| at..at + PAGE));
        Ok(())
    }

    fn take_written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        self.written(block, bytes, out)
    }

    fn prepare_pacing(&mut self, _: &GuestRam) -> Result<WriteFaults, TrackingError> {
        unreachable!("it is not paced")
    }

    fn pace(&mut self, _: usize, _: Range<u64>) -> io::Result<()> {
        unreachable!("it is not paced")
    }
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let result = work();
    let took = begun.elapsed();
    println!("{what}: {:.1} ms", took.as_secs_f64() * 1e3);
    (result, took)
}

#[test]
#[ignore = "prints figures"]
fn what_a_tebibyte_costs_with_the_guest_paused() {
    let (here, there) = links(None);
    let (_landing, taking) = arriving(there, &[BYTES]);
    let ram = GuestRam::of_our_own(&[BYTES]);
    let source = Source::begin_with(ram, Some(Box::new(Scattered)), here, Duration::ZERO, 0, None).unwrap();
    let inner = &source.inner;
    inner.end_rounds().unwrap();
    // All of it is in use; a quarter is not sent yet, and of the rest each 64th page is stale.
    inner.empty[0].remove(0..inner.empty[0].pages());
    inner.untouched[0].remove(0..inner.untouched[0].pages());
    inner.pending[0].remove(0..PAGES / 4 * 3);
    inner.pending[0].insert(PAGES / 4 * 3..PAGES);
    for page in (0..PAGES / 4 * 3).step_by(64) {
        inner.pending[0].insert(page..page + 1);
    }
    let told = [PageSet::new(PAGES)];
    let before = |pending: &[PageSet]| {
        for frame in encode_missing(pending, &told).collect::<Vec<_>>() {
            decode_missing(&frame, &told).unwrap();
        }
    };
    timed("before the pause: what is missing is told", || before(&inner.pending));

    let mut paused = Duration::ZERO;
    let (_, took) = timed("scan, without the kernel's part", || inner.look_on().unwrap());
    paused += took;
    let (frames, took) = timed("what is new is told", || {
        let frames: Vec<_> = encode_missing(&inner.pending, &told).collect();
        for frame in &frames {
            decode_missing(frame, &told).unwrap();
        }
        frames
    });
    paused += took;
    let bytes: usize = frames.iter().map(Vec::len).sum();
    assert!(!frames.is_empty(), "the guest has written");
    println!("that is {} frames of {} KiB in all", frames.len(), bytes >> 10);
    paused += timed("what is left is counted", || inner.recount()).1;
    println!("in all: {:.1} ms", paused.as_secs_f64() * 1e3);
    source.abandon();
    drop(taking.join().unwrap());
}
