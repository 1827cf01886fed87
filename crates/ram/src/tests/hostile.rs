//! A side that does not keep to what is agreed, by mistake or on purpose: the other one says so in words, ends it, and
//! has done nothing that it should not.

use std::ops::Range;
use std::time::Duration;

use vmferry_link::Link;

use super::{DOWNTIME, Log, MIB, arriving, links, noise};
use crate::destination::Ended;
use crate::memory::GuestRam;
use crate::source::Source;
use crate::wire::{
    ARM, ARMED, COMPLETE, Content, HELLO, Hello, MISSING, PAGES, PLACED, Pages, READY, REFUSED, Run, STATE,
    STATE_EARLY, STATE_END, STATE_GO, WANT, Want,
};
use crate::{PAGE, RamError};

/// The destination's RAM: 100 pages, which end within a word of a set of pages, and 1 MiB.
const SIZES: [u64; 2] = [100 * PAGE, MIB];
/// How long an answer may take on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// A frame: over the urgent stream or not, its kind and body.
type Said = (bool, u16, Vec<u8>);

fn urgent(kind: u16, body: impl Into<Vec<u8>>) -> Said {
    (true, kind, body.into())
}

fn hello(resume: bool) -> Said {
    let blocks = SIZES.iter().enumerate().map(|(number, size)| (format!("ram{number}"), *size)).collect();
    urgent(HELLO, Hello { resume, blocks }.encode())
}

fn pages(number: u64, block: usize, first: u64, count: u64, zero: bool) -> Vec<u8> {
    let mut body = vec![0; Pages::head_length(1)];
    Pages::encode_head(
        number,
        &[Run { block, pages: first..first + count, content: if zero { Content::Zero } else { Content::Whole } }],
        &mut body,
    );
    body.extend(std::iter::repeat_n(0x5a, if zero { 0 } else { (count * PAGE) as usize }));
    body
}

/// What the bits of one frame say of a block from this page on.
fn missing(block: u32, first: u64, words: &[u64]) -> Vec<u8> {
    let mut body = block.to_le_bytes().to_vec();
    body.extend(first.to_le_bytes());
    body.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    body
}

fn send(link: &Link, said: &[Said]) {
    for (is_urgent, kind, body) in said {
        // It may have been refused in the middle.
        let _ = if *is_urgent { link.send_urgent(*kind, body.clone()) } else { link.send(*kind, body.clone()) };
    }
}

/// What a destination makes of a source that says this: the end of it there, and the words in which it tells.
fn served(said: &[Said], ram: impl FnOnce(&GuestRam)) -> (Result<Ended, RamError>, Option<String>) {
    let (here, there) = links(None);
    let (landing, taking) = arriving(there, &SIZES);
    send(&here, said);
    let refused = std::iter::from_fn(|| here.recv_urgent().ok()?).find(|frame| frame.kind == REFUSED);
    let words = refused.map(|frame| String::from_utf8(frame.payload.to_vec()).unwrap());
    drop(here);
    let ended = taking.join().unwrap();
    ram(landing.ram());
    (ended, words)
}

fn untouched(ram: &GuestRam) {
    for block in ram.blocks() {
        assert_eq!(block.data(0..block.size()).unwrap(), [], "{}", block.id());
    }
}

#[test]
fn a_source_that_says_what_makes_no_sense_is_refused_in_words_and_writes_nothing() {
    let short = missing(0, 0, &[1])[..10].to_vec();
    for (what, said) in [
        ("does not begin with what RAM it has", vec![urgent(MISSING, missing(0, 0, &[1]))]),
        ("does not begin with what RAM it has", vec![urgent(PAGES, pages(1, 0, 0, 1, false))]),
        ("has not begun", vec![hello(true)]),
        ("a frame of an unknown kind", vec![hello(false), hello(false)]),
        ("a frame of an unknown kind", vec![hello(false), urgent(READY, [])]),
        ("a frame of an unknown kind", vec![hello(false), urgent(u16::MAX, [7; 100])]),
        ("a bulk frame of an unknown kind", vec![hello(false), (false, MISSING, missing(0, 0, &[1]))]),
        ("pages of an unknown block", vec![hello(false), (false, PAGES, pages(1, 2, 0, 1, false))]),
        ("beyond the end of their block", vec![hello(false), (false, PAGES, pages(1, 0, 99, 2, false))]),
        ("beyond the end of their block", vec![hello(false), urgent(PAGES, pages(1, 0, 99, 2, true))]),
        ("beyond the end of their block", vec![hello(false), urgent(PAGES, pages(1, 1, u64::MAX - 1, 1, true))]),
        ("too short", vec![hello(false), urgent(PAGES, pages(1, 0, 0, 2, false)[..5000].to_vec())]),
        ("too long", vec![hello(false), urgent(PAGES, [&pages(1, 0, 0, 1, false)[..], b"more"].concat())]),
        ("early comes late", vec![hello(false), urgent(STATE, [1]), urgent(STATE_EARLY, [1])]),
        ("too short", vec![hello(false), (false, PAGES, vec![1, 2, 3])]),
        ("pages of an unknown block are missing", vec![hello(false), urgent(MISSING, missing(2, 0, &[1]))]),
        ("beyond the end of their block are missing", vec![hello(false), urgent(MISSING, missing(0, 0, &[0, 0, 1]))]),
        ("beyond the end of their block are missing", vec![hello(false), urgent(MISSING, missing(0, 63, &[1]))]),
        ("beyond the end of their block are missing", vec![hello(false), urgent(MISSING, missing(1, 256, &[1]))]),
        ("too short", vec![hello(false), urgent(MISSING, short)]),
        ("too short", vec![hello(false), urgent(ARM, [0; 7])]),
        ("too long", vec![hello(false), urgent(ARM, [0; 9])]),
        ("device state", vec![hello(false), urgent(STATE, [])]),
        ("device state after its end", vec![hello(false), urgent(STATE_END, []), urgent(STATE, [1])]),
        ("the device state goes twice", vec![hello(false), urgent(STATE_GO, []), urgent(STATE_GO, [])]),
    ] {
        let (ended, words) = served(&said, untouched);
        let error = crate::error::in_one_line(&ended.expect_err(what));
        assert!(error.contains(what), "{what:?} is not in: {error}");
        assert_eq!(words.as_deref(), Some(error.as_str()), "the source is told the same");
    }
}

#[test]
fn a_frame_that_comes_twice_or_from_nowhere_is_refused() {
    for number in [1, 0, 5 << 20] {
        let said = [hello(false), urgent(PAGES, pages(1, 0, 3, 1, false)), urgent(PAGES, pages(number, 0, 5, 1, true))];
        let (ended, words) = served(&said, |ram| assert_eq!(ram.blocks()[1].data(0..MIB).unwrap(), []));
        assert!(matches!(ended, Err(RamError::Malformed(_))) && words.unwrap().contains("comes twice"), "{number}");
    }
}

#[test]
fn post_copy_that_cannot_begin_takes_nothing_away() {
    let said = [
        hello(false),
        urgent(PAGES, pages(1, 0, 3, 2, false)),
        // This process is no QEMU: it cannot be traced by itself.
        urgent(MISSING, missing(0, 0, &[1 << 3])),
        urgent(ARM, 1_u64.to_le_bytes()),
    ];
    let (ended, words) = served(&said, |ram| {
        assert_eq!(ram.blocks()[0].data(0..SIZES[0]).unwrap(), vec![3 * PAGE..5 * PAGE; 1]);
    });
    assert!(matches!(ended, Err(RamError::Arrival(_))), "{ended:?}");
    assert!(words.unwrap().contains("cannot serve the guest's faults"));
}

#[test]
fn whatever_a_source_says_a_destination_ends_and_its_ram_keeps_its_size() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for _ in 0..60 {
        let mut said = vec![hello(false)];
        for _ in 0..random(6) {
            let body = match random(4) {
                0 => pages(random(4), random(3) as usize, random(110), 1 + random(3), random(2) == 0),
                1 => missing(random(3) as u32, random(3) * 64, &[random(u64::MAX), random(u64::MAX)]),
                _ => noise(random(u64::MAX))[..random(40) as usize].to_vec(),
            };
            said.push((random(2) == 0, 1 + random(8) as u16, body));
        }
        // Nobody waits for more: what has not ended by itself ends here.
        let (here, there) = links(None);
        let (landing, taking) = arriving(there, &SIZES);
        send(&here, &said);
        std::thread::sleep(Duration::from_millis(2));
        here.give_up();
        let _ = taking.join().expect("it does not panic");
        for (block, size) in landing.ram().blocks().iter().zip(SIZES) {
            assert_eq!(block.data(size..1 << 40).unwrap(), [], "{} has grown", block.id());
        }
    }
}

/// A destination that greets a source and then says this.
fn saying(link: Link, said: Vec<Said>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while let Ok(Some(frame)) = link.recv_urgent() {
            match frame.kind {
                HELLO => send(&link, &said),
                ARM => send(&link, &[urgent(ARMED, [])]),
                _ => {}
            }
        }
    })
}

/// What a source in pre-copy, or in post-copy over a new link, makes of such a destination.
fn sent_to(said: Vec<Said>, resume: bool) -> RamError {
    let (here, there) = links(None);
    let taking = saying(there, said);
    let log = (!resume).then(|| Box::new(std::sync::Arc::new(Log::default())) as Box<dyn crate::source::WriteLog>);
    let error = match Source::begin_with(GuestRam::of_our_own(&SIZES), log, here, DOWNTIME, 0, None) {
        Err(error) => error,
        Ok(source) => until_failed(&source),
    };
    taking.join().unwrap();
    error
}

fn until_failed(source: &Source) -> RamError {
    let until = std::time::Instant::now() + PATIENCE;
    while std::time::Instant::now() < until {
        if let Err(error) = source.wait(Duration::from_millis(5)) {
            return error;
        }
    }
    panic!("it takes what makes no sense");
}

#[test]
fn a_destination_that_says_what_makes_no_sense_is_an_error_in_words() {
    let want = |block, pages: Range<u64>| urgent(WANT, Want { block, first: pages.start, pages }.encode());
    let number = |kind, number: u64| urgent(kind, number.to_le_bytes());
    for (what, resume, said) in [
        ("cannot go on: no room", false, vec![urgent(REFUSED, *b"no room")]),
        ("what was not sent", false, vec![urgent(READY, []), number(PLACED, 1 << 40)]),
        ("what was not sent", true, vec![urgent(READY, []), number(PLACED, 1)]),
        ("too short", false, vec![urgent(READY, []), urgent(PLACED, [0; 3])]),
        ("has no place here", false, vec![urgent(READY, []), want(0, 0..1)]),
        ("has no place here", false, vec![urgent(READY, []), urgent(ARMED, [])]),
        ("has no place here", false, vec![urgent(READY, []), urgent(COMPLETE, [])]),
        ("has no place here", false, vec![urgent(READY, []), urgent(MISSING, missing(0, 0, &[1]))]),
        ("has no place here", false, vec![urgent(9999, [])]),
        ("has no place here", true, vec![urgent(READY, []), urgent(MISSING, missing(0, 0, &[1]))]),
        ("are missing", true, vec![urgent(MISSING, missing(0, 0, &[0, 0, 1])), urgent(READY, [])]),
        ("an unknown block are missing", true, vec![urgent(MISSING, missing(7, 0, &[1])), urgent(READY, [])]),
        ("an unknown block", true, vec![urgent(READY, []), want(2, 0..1)]),
        ("beyond the end", true, vec![urgent(READY, []), want(0, 99..101)]),
        ("beyond the end", true, vec![urgent(READY, []), want(0, 5..5)]),
        ("beyond the end", true, vec![urgent(READY, []), want(1, 7..u64::MAX)]),
    ] {
        let error = sent_to(said, resume).to_string();
        assert!(error.contains(what), "{what:?} is not in: {error}");
    }
}

#[test]
fn a_source_reads_nothing_beyond_its_ram_whatever_is_missing() {
    let (here, there) = links(None);
    // The last word has bits for 28 pages that are not there.
    let said = vec![urgent(MISSING, missing(0, 0, &[0, u64::MAX])), urgent(READY, [])];
    let taking = saying(there, said);
    let source = Source::begin_with(GuestRam::of_our_own(&SIZES), None, here, DOWNTIME, 0, None).unwrap();
    let until = std::time::Instant::now() + PATIENCE;
    while source.wait(Duration::from_millis(5)).unwrap().remaining > 0 {
        assert!(std::time::Instant::now() < until, "it does not get to the end");
    }
    drop(source);
    taking.join().unwrap();
}
