use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::words::{BLOCK_HEAD, BlockHead, End, KnownTo, Lacking, Offer, kind};
use super::*;
use crate::backend::{Backend, Memory, Zeroing};
use crate::blocks::{BLOCK, GRAIN, GRAINS, Next, Walk, full, gather, grain, pack, ungathered, which};
use crate::carry::tests::links;
use crate::known::{Base, Bases, Offered};
use crate::transmission::Extent;

const MIB: usize = 1 << 20;

const VERIFIED: How = How { threads: 2, verify: true, known: false };

/// What came of a copy.
struct Copied {
    sent: Result<Option<Sum>, SendError>,
    received: Result<Option<Sum>, ReceiveError>,
    progress: Progress,
    finished: bool,
}

impl Copied {
    fn whole(self) -> (u64, u64, u64) {
        assert_eq!(self.sent.unwrap(), self.received.unwrap(), "both know the same sum");
        assert!(self.finished);
        let Progress { done, sent, same } = self.progress;
        (done.into_inner(), sent.into_inner(), same.into_inner())
    }
}

fn copy(source: &dyn Backend, target: &dyn Backend, before: &Before, how: How) -> Copied {
    copy_if(source, target, before, &Bases::default(), how, &|| Ok(()), &|| Ok(()))
}

fn copy_if(
    source: &dyn Backend,
    target: &dyn Backend,
    before: &Before,
    bases: &Bases,
    how: How,
    is_as_it_was: &(dyn Fn() -> Result<(), String> + Sync),
    finish: &(dyn Fn() -> io::Result<()> + Sync),
) -> Copied {
    let (here, there) = links();
    let (progress, finished) = (Progress::default(), AtomicU64::new(0));
    let count = || {
        finished.fetch_add(1, Relaxed);
        finish()
    };
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(&there, target, before, bases, &count));
        let sent = send(&here, source, how, &progress, is_as_it_was);
        (sent, receiving.join().unwrap())
    });
    Copied { sent, received, progress, finished: finished.into_inner() == 1 }
}

/// Mebibytes of what no two blocks have in common, where the pattern has no blank.
fn disk(pattern: &str, more: usize) -> Vec<u8> {
    let mut bytes = vec![0; pattern.len() * MIB + more];
    for (block, kind) in pattern.bytes().enumerate() {
        if kind != b' ' {
            let mut random = fastrand::Rng::with_seed(u64::from(kind) << 32 | block as u64);
            random.fill(&mut bytes[block * MIB..(block + 1) * MIB]);
        }
    }
    let end = pattern.len() * MIB;
    bytes[end..].fill(b'e');
    bytes
}

fn thin(bytes: &[u8]) -> Memory {
    let memory = Memory::new(bytes.len());
    for (at, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|it| *it != 0) {
            memory.write(at as u64 * 4096, block).unwrap();
        }
    }
    memory
}

fn allocated(disk: &dyn Backend) -> u64 {
    disk.status(0, disk.size(), usize::MAX).unwrap().iter().filter(|it| !it.hole).map(|it| it.length).sum()
}

#[test]
fn a_disk_arrives_as_it_is_and_stays_thin() {
    for (pattern, more) in [("", 0), ("", 5), ("a b  c", 0), (" a ", 777), ("    ", 1), ("abcdefgh", 4096)] {
        let bytes = disk(pattern, more);
        for how in [VERIFIED, How { verify: false, ..VERIFIED }] {
            let (source, target) = (thin(&bytes), Memory::new(bytes.len()));
            let (done, sent, same) = copy(&source, &target, &Before::Nothing, how).whole();
            assert!(target.contents() == bytes, "{pattern:?}");
            let data = (pattern.trim_matches('-').replace(' ', "").len() * MIB + more) as u64;
            assert_eq!((done, sent, same), (bytes.len() as u64, data, 0), "{pattern:?}");
            assert_eq!(allocated(&target), allocated(&source));
        }
    }
}

#[test]
fn zeroes_between_data_are_neither_sent_nor_written() {
    let mut bytes = vec![0; 4 * MIB];
    for at in [0, 8192, MIB + 512, 3 * MIB - 1] {
        bytes[at] = 1;
    }
    // All of the source is allocated.
    let (source, target) = (Memory::holding(bytes.clone()), Memory::new(bytes.len()));
    let (_, sent, _) = copy(&source, &target, &Before::Nothing, VERIFIED).whole();
    assert!(target.contents() == bytes);
    assert_eq!((sent, allocated(&target)), (4 * 4096, 4 * 4096));
}

#[test]
fn what_is_there_already_is_not_sent_again_and_what_is_wrong_there_is_put_right() {
    let new = disk("abcd  gh", 900);
    for (old, expected) in [("abcd  gh", 0), ("abXd  gh", 1), ("abcdZZgh", 0), ("ab    gh", 2), ("XXXXXXXX", 6)] {
        for verify in [true, false] {
            let target = thin(&disk(old, 900));
            let (_, sent, same) = copy(&thin(&new), &target, &Before::Something, How { verify, ..VERIFIED }).whole();
            assert!(target.contents() == new, "{old:?}");
            assert_eq!((sent, same), ((expected * MIB) as u64, ((6 - expected) * MIB + 900) as u64), "{old:?}");
            assert_eq!(allocated(&target), 6 * MIB as u64 + 4096_u64.min(target.size()).min(900), "{old:?}");
        }
    }
}

#[test]
fn an_older_copy_stands_in_where_nothing_is_yet() {
    let new = disk("abcdef", 0);
    for (old, begun) in
        [("abXdef", "      "), ("abXdef  ", "ab    "), ("abX", "   d  "), ("", "abc   "), ("ZbXd", "aQ    ")]
    {
        let (older, target) = (thin(&disk(old, 100)), thin(&disk(begun, 0)));
        let copied = copy(&thin(&new), &target, &Before::AndOlder(Box::new(older)), VERIFIED);
        let (_, sent, _) = copied.whole();
        assert!(target.contents() == new, "{old:?} {begun:?}");
        let mut missing = 0;
        for at in 0..6 {
            let begun = begun.as_bytes()[at];
            let there = if begun == b' ' { old.as_bytes().get(at).copied().unwrap_or(b' ') } else { begun };
            missing += u64::from(there != b"abcdef"[at]);
        }
        assert_eq!(sent, missing * MIB as u64, "{old:?} {begun:?}");
    }
}

#[test]
fn whatever_was_there_before_it_becomes_what_the_source_is() {
    for seed in 0..24 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut some = |blocks: usize| (0..blocks).map(|_| [' ', ' ', 'a', 'b'][random.usize(..4)]).collect::<String>();
        let (pattern, begun, older) = (some(5), some(5), some(seed as usize % 8));
        let (bytes, target) = (disk(&pattern, 3000), thin(&disk(&begun, 3000)));
        let before = match seed % 3 {
            0 => Before::Something,
            _ => Before::AndOlder(Box::new(thin(&disk(&older, 12)))),
        };
        let source = thin(&bytes);
        copy(&source, &target, &before, How { verify: seed % 4 != 0, ..VERIFIED }).whole();
        assert!(target.contents() == bytes, "{seed}: {pattern:?} over {begun:?} and {older:?}");
        assert_eq!(allocated(&target), allocated(&source), "{seed}: {pattern:?} over {begun:?} and {older:?}");
    }
}

#[test]
fn a_target_without_room_ends_it_at_both_ends_and_nothing_is_finished() {
    let source = thin(&disk(&"a".repeat(64), 0));
    let copied = copy(&source, &Memory::new(64 << 20).with_room(3 << 20), &Before::Nothing, VERIFIED);
    let error = copied.sent.unwrap_err();
    assert!(matches!(&error, SendError::There(it) if it.kind() == io::ErrorKind::StorageFull), "{error:?}");
    assert!(error.to_string().contains("no room there"), "{error}");
    assert!(matches!(copied.received, Err(ReceiveError::Io { what: "write", .. })) && !copied.finished);
}

#[test]
fn a_source_that_has_changed_or_cannot_be_read_is_not_finished() {
    let source = thin(&disk("abc", 0));
    let target = Memory::new(3 * MIB);
    let changed = || Err("it has changed".to_owned());
    let copied = copy_if(&source, &target, &Before::Nothing, &Bases::default(), VERIFIED, &changed, &|| Ok(()));
    assert!(matches!(copied.sent, Err(SendError::Changed(it)) if it == "it has changed"));
    assert!(copied.received.is_err() && !copied.finished);
    let copied = copy(&Broken, &Memory::new(8 * MIB), &Before::Nothing, VERIFIED);
    // Of two threads that each found a block that cannot be read, either may be heard.
    assert!(matches!(copied.sent, Err(SendError::Read { at, .. }) if at < 2 * BLOCK) && !copied.finished);
}

#[test]
fn a_copy_that_cannot_be_finished_is_told_of() {
    let finish = || Err(io::Error::other("somebody took its name"));
    let source = thin(&disk("ab", 0));
    let copied =
        copy_if(&source, &Memory::new(2 * MIB), &Before::Nothing, &Bases::default(), VERIFIED, &|| Ok(()), &finish);
    assert!(copied.sent.unwrap_err().to_string().contains("somebody took its name"));
    assert!(matches!(copied.received, Err(ReceiveError::Finish(_))));
}

/// Has a receiver of two blocks take these frames, and tells how it ended.
fn received(bulk: Vec<(u16, Vec<u8>)>, urgent: Option<(u16, Vec<u8>)>) -> (ReceiveError, bool) {
    let (here, there) = links();
    let finished = AtomicU64::new(0);
    let error = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let target = Memory::new(2 * MIB);
            receive(&there, &target, &Before::Nothing, &Bases::default(), &|| {
                finished.fetch_add(1, Relaxed);
                Ok(())
            })
        });
        here.recv_urgent().unwrap();
        for (kind, frame) in bulk {
            here.send(kind, frame).unwrap();
        }
        if let Some((kind, frame)) = urgent {
            here.send_urgent(kind, frame).unwrap();
        }
        // It says what is wrong, and waits for this end to end it.
        assert_eq!(here.recv_urgent().unwrap().unwrap().kind, kind::DONE);
        here.give_up();
        receiving.join().unwrap().unwrap_err()
    });
    (error, finished.into_inner() > 0)
}

#[test]
fn whatever_a_sender_says_wrong_or_damages_on_the_way_ends_it_and_is_not_finished() {
    let block = |block: u64, sum: Option<Sum>, data: usize| {
        let mut grains = [0; GRAINS];
        grains[0] = 1;
        let mut frame = vec![7; BLOCK_HEAD + data];
        BlockHead { block, sum, grains }.write(&mut frame);
        (kind::BLOCK, frame)
    };
    let end = |frames, root| Some((kind::END, End { frames, root }.encode().to_vec()));
    let zero = |block: u64| (kind::ZERO, block.to_be_bytes().to_vec());
    let offer = |block: u64, length: usize| {
        let mut frame = Offer { block, offered: Offered::of(&vec![1; length]) }.encode();
        frame.truncate(if length == 5000 { frame.len() - 1 } else { frame.len() });
        (kind::OFFER, frame)
    };
    for kind in [kind::BLOCK, kind::REST] {
        let damaged = (kind, block(0, Some([1; 32]), GRAIN).1);
        assert!(matches!(received(vec![damaged], None), (ReceiveError::Damaged { at: 0 }, false)));
    }
    for bad in [
        block(2, None, GRAIN),
        block(u64::MAX, None, GRAIN),
        block(0, None, GRAIN - 1),
        block(0, None, GRAIN + 1),
        zero(2),
        (kind::ZERO, vec![0; 7]),
        offer(2, 1 << 20),
        offer(0, 5000),
        (kind::OFFER, vec![0; 8 + GRAINS - 1]),
        (kind::REST, block(2, None, GRAIN).1),
        (kind::REST, block(0, None, GRAIN + 1).1),
        (99, vec![]),
    ] {
        assert!(matches!(received(vec![bad.clone()], None), (ReceiveError::NoSense, false)), "{bad:?}");
    }
    let root = end(1, Some([1; 32]));
    assert!(matches!(received(vec![block(0, None, GRAIN)], root), (ReceiveError::Differs, false)));
    assert!(matches!(received(vec![], Some((kind::END, vec![0; 9]))), (ReceiveError::NoSense, false)));
    assert!(matches!(received(vec![], Some((kind::DONE, vec![]))), (ReceiveError::NoSense, false)));
}

#[test]
fn a_copy_whose_link_ends_ends_at_both_ends() {
    let (here, there) = links();
    std::thread::scope(|scope| {
        let receiving =
            scope.spawn(|| receive(&there, &Memory::new(MIB), &Before::Nothing, &Bases::default(), &|| Ok(())));
        here.give_up();
        assert!(matches!(receiving.join().unwrap(), Err(ReceiveError::Link(_))));
    });
    let (here, there) = links();
    drop(there);
    let sent = send(&here, &thin(&disk("a", 0)), VERIFIED, &Progress::default(), &|| Ok(()));
    assert!(matches!(sent, Err(SendError::Link(_))), "{sent:?}");
}

/// Changes one grain in so many.
fn changed(bytes: &[u8], one_in: usize) -> (Vec<u8>, usize) {
    let (mut bytes, mut random, mut grains) = (bytes.to_vec(), fastrand::Rng::with_seed(1), 0);
    for grain in bytes.chunks_mut(GRAIN) {
        if random.usize(..one_in) == 0 {
            grain[random.usize(..grain.len())] ^= 1;
            grains += 1;
        }
    }
    (bytes, grains)
}

#[test]
fn a_clone_of_what_is_there_costs_what_has_changed_in_it() {
    let template = disk("abc def  gh", 5000);
    let (clone, grains) = changed(&template, 30);
    let holding = |bytes: &[u8]| Base::new(Box::new(thin(bytes)), None).alike();
    for verify in [true, false] {
        let (source, target) = (thin(&clone), Memory::new(clone.len()));
        let bases = Bases::new(vec![holding(&disk("zz", 0)), holding(&template)], Arc::default());
        let how = How { verify, known: true, ..VERIFIED };
        let copied = copy_if(&source, &target, &Before::Nothing, &bases, how, &|| Ok(()), &|| Ok(()));
        let (_, sent, same) = copied.whole();
        assert!(target.contents() == clone);
        // What was a hole, and had something written to it, is sent too.
        assert!(sent <= (grains * GRAIN) as u64 && sent > (grains as u64 - 2) * GRAIN as u64, "{sent} {grains}");
        assert_eq!(sent + same, allocated(&source).min((clone.len() / GRAIN * GRAIN + 904) as u64));
        assert_eq!(allocated(&target), allocated(&source));
    }
}

#[test]
fn a_block_that_has_changed_a_little_costs_what_has_changed_in_it() {
    let old = disk("abcdefgh", 0);
    let (new, grains) = changed(&old, 100);
    for before in [Before::Something, Before::AndOlder(Box::new(thin(&old)))] {
        let target = if matches!(before, Before::Something) { thin(&old) } else { Memory::new(old.len()) };
        let (_, sent, same) = copy(&thin(&new), &target, &before, VERIFIED).whole();
        assert!(target.contents() == new);
        assert_eq!((sent, same), ((grains * GRAIN) as u64, (new.len() - grains * GRAIN) as u64));
    }
}

#[test]
fn what_nobody_knows_is_soon_not_offered_any_more() {
    let bytes = disk(&"abcdefghijklmnopqrstuvwxyz".repeat(8), 0);
    let target = Memory::new(bytes.len());
    let bases = Bases::new(vec![Base::new(Box::new(thin(&disk("zz", 0))), None).alike()], Arc::default());
    let how = How { known: true, ..VERIFIED };
    let copied = copy_if(&thin(&bytes), &target, &Before::Nothing, &bases, how, &|| Ok(()), &|| Ok(()));
    assert_eq!(copied.whole().1, bytes.len() as u64);
    assert!(target.contents() == bytes);
}

#[test]
fn a_receiver_that_lacks_what_it_was_not_offered_ends_it() {
    let lacking = |block: u64, byte: u8| Lacking { block, grains: [byte; GRAINS] }.encode();
    let known = KnownTo { end: 1, sums: vec![(0, [1; 32])] };
    for bad in [lacking(1, 0), lacking(0, 0xff), vec![0; 39].into()] {
        let (here, there) = links();
        let source = Memory::holding([vec![1; GRAIN], vec![0; GRAIN]].concat());
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| send(&here, &source, VERIFIED, &Progress::default(), &|| Ok(())));
            there.send_urgent(kind::KNOWN, known.encode()).unwrap();
            assert_eq!(there.recv().unwrap().unwrap().kind, kind::OFFER);
            there.send_urgent(kind::LACKING, bad).unwrap();
            assert!(matches!(sending.join().unwrap(), Err(SendError::NoSense)));
        });
    }
}

#[test]
fn what_is_packed_is_found_again_and_nothing_else_is_taken_for_it() {
    for (length, data) in [(MIB, vec![0, 3, 255]), (5000, vec![1]), (GRAIN, vec![0]), (1, vec![0]), (MIB, vec![])] {
        let mut block = vec![0; length];
        for number in data {
            block[grain(number, length)].fill(number as u8 | 1);
        }
        let (full, mut packed) = (full(&block), block.clone());
        let bytes = pack(&mut packed, &full);
        assert!(packed[..bytes] == gather(&block, &full));
        let again = ungathered(&full, length, &packed[..bytes]).unwrap();
        assert!(which(&full).zip(&again).all(|(number, bytes)| block[grain(number, length)] == **bytes));
        assert_eq!(again.len(), which(&full).count());
        assert!(bytes == 0 || ungathered(&full, length, &packed[..bytes - 1]).is_none());
        assert!(ungathered(&full, length, &[&packed[..bytes], &[0]].concat()).is_none());
    }
    assert!(ungathered(&[0xff; GRAINS], MIB - GRAIN, &vec![1; MIB]).is_none(), "a grain behind its end");
}

#[test]
fn a_walk_comes_by_every_block_once() {
    use Next::{Block, Hole};
    let mut bytes = vec![0; 9 * MIB + 10];
    for at in [2 * MIB - 1, 5 * MIB + 4096, 9 * MIB] {
        bytes[at] = 1;
    }
    let source = thin(&bytes);
    let mut walk = Walk::over(&source);
    let steps: Vec<Next> = std::iter::from_fn(|| walk.next().unwrap()).collect();
    assert_eq!(steps, [Hole(0..1), Block(1), Hole(2..5), Block(5), Hole(6..9), Block(9)]);
}

/// Cannot be read.
struct Broken;

impl Backend for Broken {
    fn size(&self) -> u64 {
        8 << 20
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: Zeroing) -> io::Result<()> {
        Ok(())
    }
    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, _: u64, length: u64, _: usize) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent::data(length)])
    }
}
