//! What a guest of 1 TiB costs this side while it is paused, in what is remembered of it: its pages are not there.

use std::time::{Duration, Instant};

use super::landing::punch;
use super::record::Record;
use crate::PAGE;
use crate::memory::GuestRam;
use crate::pages::PageSet;
use crate::wire::{decode_missing, encode_missing};

const BYTES: u64 = 1 << 40;
const PAGES: u64 = BYTES / PAGE;

#[test]
#[ignore = "prints figures"]
fn what_a_tebibyte_costs_with_the_guest_paused() {
    let dir = tempfile::tempdir().unwrap();
    let ram = GuestRam::of_our_own(&[BYTES]);
    let mut record = Record::create(&dir.path().join("record"), 3, ram.blocks()).unwrap();
    let sets = || [PageSet::new(PAGES)];
    // A quarter has not come before the pause, and of the rest each 64th page is stale.
    let (before, none) = (sets(), sets());
    before[0].insert(PAGES / 4 * 3..PAGES);
    for page in (0..PAGES / 4 * 3).step_by(64) {
        before[0].insert(page..page + 1);
    }
    let (missing, present) = (sets(), sets());
    let step = |what: &str, work: &mut dyn FnMut()| {
        let begun = Instant::now();
        work();
        println!("{what}: {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
        begun.elapsed()
    };
    let frames: Vec<_> = encode_missing(&before, &none).collect();
    step("before the pause: what is missing is heard", &mut || {
        for frame in &frames {
            decode_missing(frame, &missing).unwrap();
        }
    });
    step("and written down", &mut || {
        record.missing()[0].insert_all(&before[0]);
    });
    // What was written since: each 4096th page, which has come.
    let written = sets();
    for page in (0..PAGES / 4 * 3).step_by(4096) {
        written[0].insert(page + 1..page + 2);
        ram.blocks()[0].write_at((page + 1) * PAGE, &[1; PAGE as usize]).unwrap();
    }
    let frames: Vec<_> = encode_missing(&written, &none).collect();
    let mut paused = Duration::ZERO;
    paused += step("what is new is heard", &mut || {
        for frame in &frames {
            decode_missing(frame, &missing).unwrap();
            decode_missing(frame, &present).unwrap();
        }
    });
    paused += step("and taken away", &mut || punch(ram.blocks(), &present, || ()).unwrap());
    paused += step("and written down", &mut || {
        record.missing()[0].insert_all(&present[0]);
    });
    paused += step("the record begins", &mut || record.begin().unwrap());
    println!("in all: {:.1} ms", paused.as_secs_f64() * 1e3);
}
