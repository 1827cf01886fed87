//! Both sides over a real link, with RAM and a guest of our own: a thread that writes.

mod hostile;

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};

use crate::destination::{Ended, Landing, serve};
use crate::memory::GuestRam;
use crate::source::{Progress, Source, WriteLog};
use crate::{PAGE, RamError, TrackingError, WriteFaults};

const DOWNTIME: Duration = Duration::from_millis(300);
const MIB: u64 = 1 << 20;

/// What a guest has written, and the guest's way to write. A write and its note are one step, as in the kernel.
#[derive(Default)]
struct Log(Mutex<BTreeSet<(usize, u64)>>);

impl Log {
    fn write(&self, ram: &GuestRam, block: usize, page: u64, value: u64) {
        let mut written = self.0.lock().unwrap();
        ram.blocks()[block].write_at(page * PAGE, &noise(value)).unwrap();
        written.insert((block, page));
    }

    /// Writes a few bytes into a page.
    fn change(&self, ram: &GuestRam, block: usize, page: u64, at: u64, bytes: &[u8]) {
        let mut written = self.0.lock().unwrap();
        ram.blocks()[block].write_at(page * PAGE + at, bytes).unwrap();
        written.insert((block, page));
    }
}

impl WriteLog for Arc<Log> {
    fn protect(&self, block: usize, bytes: Range<u64>) -> io::Result<()> {
        self.take_written(block, bytes, &mut Vec::new())
    }

    fn written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        let written = self.0.lock().unwrap();
        let pages = written.range((block, bytes.start / PAGE)..(block, bytes.end / PAGE));
        out.extend(pages.map(|(_, page)| page * PAGE..(page + 1) * PAGE));
        Ok(())
    }

    fn take_written(&self, block: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        let pages = (block, bytes.start / PAGE)..(block, bytes.end / PAGE);
        let taken: Vec<_> = written.range(pages).copied().collect();
        for page in taken {
            written.remove(&page);
            out.push(page.1 * PAGE..(page.1 + 1) * PAGE);
        }
        Ok(())
    }

    fn prepare_pacing(&mut self, _: &GuestRam) -> Result<WriteFaults, TrackingError> {
        Err(TrackingError::Lacks(vec!["writers that wait"]))
    }

    fn pace(&mut self, _: usize, _: Range<u64>) -> io::Result<()> {
        unreachable!("it cannot be prepared")
    }
}

/// A page that nothing makes shorter, unless it is to be zero.
fn noise(seed: u64) -> Vec<u8> {
    let mut next = random(seed);
    (0..PAGE / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// Numbers that look random.
fn random(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Both ends of a plain link over the loopback address.
pub(crate) fn links(rate: Option<u64>) -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let sessions = Sessions::new();
    let options = LinkOptions { rate, ..LinkOptions::new(SessionId::random(), SessionKey::random()) };
    let streams = options.streams;
    let there = sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming().take(usize::from(streams) + 1) {
            let (sessions, stream) = (sessions.clone(), Unattached::plain(tcp.unwrap()));
            std::thread::spawn(move || sessions.attach(stream));
        }
    });
    (Link::connect(TcpDialer::plain(&address), options).unwrap(), there)
}

/// A destination that takes what comes.
pub(crate) fn arriving(link: Link, sizes: &[u64]) -> (Arc<Landing>, std::thread::JoinHandle<Result<Ended, RamError>>) {
    let dir = tempfile::tempdir().unwrap();
    let landing = Arc::new(Landing::new(GuestRam::of_our_own(sizes), &dir.path().join("record")));
    let taking = Arc::clone(&landing);
    (landing, std::thread::spawn(move || serve(&link, &taking, None)))
}

fn assert_same(one: &GuestRam, other: &GuestRam) {
    for (one, other) in one.blocks().iter().zip(other.blocks()) {
        let (mut ours, mut theirs) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
        for page in 0..one.size() / PAGE {
            one.read_at(page * PAGE, &mut ours).unwrap();
            other.read_at(page * PAGE, &mut theirs).unwrap();
            assert!(ours == theirs, "page {page} of {} differs: {:?} {:?}", one.id(), &ours[..8], &theirs[..8]);
        }
    }
}

/// Waits until it is time to pause the guest, or this time is over.
fn until_converged(source: &Source, at_most: Duration) -> bool {
    let until = Instant::now() + at_most;
    while Instant::now() < until {
        if source.wait(Duration::from_millis(20)).unwrap().converged {
            return true;
        }
    }
    false
}

#[test]
fn a_guest_that_writes_meanwhile_arrives_as_it_was_when_it_was_paused() {
    let sizes = [64 * MIB, 2 * MIB + 3 * PAGE, 24 * MIB];
    let (here, there) = links(Some(200_000_000));
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    for page in (0..sizes[0] / PAGE).filter(|page| page % 3 != 0) {
        log.write(&ram, 0, page, page);
    }
    let (landing, taking) = arriving(there, &sizes);
    let writer = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
    let pause = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = random(88_172_645_463_325_252);
            while !pause.load(Ordering::Relaxed) {
                let state = random();
                let block = (state >> 60) as usize % 3;
                // Some become zero.
                let value = if state.is_multiple_of(5) { 0 } else { state };
                log.write(&writer, block, (state >> 20) % (writer.blocks()[block].size() / PAGE), value);
            }
        });
        until_converged(&source, Duration::from_secs(2));
        pause.store(true, Ordering::Relaxed);
    });
    source.finish().unwrap();
    assert_same(&writer, landing.ram());
    source.close().unwrap();
    assert_eq!(taking.join().unwrap().unwrap(), Ended::Closed);
}

#[test]
fn device_state_waits_for_the_ram_that_it_refers_to_and_what_comes_before_it_does_not() {
    let (here, there) = links(None);
    let dir = tempfile::tempdir().unwrap();
    let (for_qemu, mut arrived) = UnixStream::pair().unwrap();
    let landing = Landing::new(GuestRam::of_our_own(&[MIB]), &dir.path().join("record"));
    let taking = std::thread::spawn(move || serve(&there, &landing, Some(&for_qemu)));
    let ram = GuestRam::of_our_own(&[MIB]);
    let source = Source::begin_with(ram, Some(Box::new(Arc::<Log>::default())), here, DOWNTIME, 0, None).unwrap();
    let (mut qemu_here, to_source) = UnixStream::pair().unwrap();
    let is_due = AtomicBool::new(false);
    let mut buffer = [0; 16];
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| source.send_state(to_source, &is_due));
        qemu_here.write_all(b"firmware").unwrap();
        arrived.read_exact(&mut buffer[..8]).unwrap();
        is_due.store(true, Ordering::Release);
        qemu_here.write_all(b"devices").unwrap();
        drop(qemu_here);
        assert_eq!(sending.join().unwrap().unwrap(), 15);
        arrived.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert_eq!(arrived.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock, "too early");
        source.finish().unwrap();
        arrived.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut rest = Vec::new();
        arrived.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"devices");
    });
    source.close().unwrap();
    assert_eq!(taking.join().unwrap().unwrap(), Ended::Closed);
}

#[test]
fn an_idle_guest_is_sent_once_and_what_is_empty_not_at_all() {
    let sizes = [256 * MIB];
    let (here, there) = links(None);
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    for page in 1000..5000 {
        log.write(&ram, 0, page, page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let (landing, taking) = arriving(there, &sizes);
    let same = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(log)), here, DOWNTIME, 0, None).unwrap();
    assert!(until_converged(&source, Duration::from_secs(10)));
    source.finish().unwrap();
    assert_same(&same, landing.ram());
    let sent = source.link_stats().raw_sent;
    assert!(sent < 4100 * PAGE, "{sent} bytes for {}", 4000 * PAGE);
    source.close().unwrap();
    taking.join().unwrap().unwrap();
}

#[test]
fn memory_that_was_there_from_the_beginning_is_cleared_and_stays() {
    let sizes = [8 * MIB, 3 * MIB + 5 * PAGE];
    let (here, there) = links(None);
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    (100..200).for_each(|page| log.write(&ram, 0, page, page));
    let preallocated = GuestRam::of_our_own(&sizes);
    for block in preallocated.blocks() {
        block.write_at(0, &vec![0x5a; block.size() as usize]).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let landing = Arc::new(Landing::new(preallocated, &dir.path().join("record")));
    let taking = Arc::clone(&landing);
    let taking = std::thread::spawn(move || serve(&there, &taking, None));
    let writer = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
    assert!(until_converged(&source, Duration::from_secs(10)));
    // Some become zero, and others were never there.
    (150..180).for_each(|page| log.write(&writer, 0, page, 0));
    (10..20).for_each(|page| log.write(&writer, 1, page, page));
    source.finish().unwrap();
    assert_same(&writer, landing.ram());
    assert!(landing.ram().blocks().iter().all(|block| block.is_all_there().unwrap()));
    source.close().unwrap();
    assert_eq!(taking.join().unwrap().unwrap(), Ended::Closed);
}

#[test]
fn memory_that_a_guest_begins_to_use_while_it_is_copied_arrives() {
    let sizes = [64 * MIB];
    let (here, there) = links(None);
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    log.write(&ram, 0, 0, 1);
    let (landing, taking) = arriving(there, &sizes);
    let writer = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
    assert!(until_converged(&source, Duration::from_secs(10)));
    // Where nothing was, tracking does not see it: that there is memory tells.
    let unseen = |page: u64| writer.blocks()[0].write_at(page * PAGE, &noise(page)).unwrap();
    [5000, 5001, 9000, 16_383].into_iter().for_each(unseen);
    let round = source.wait(Duration::ZERO).unwrap().round;
    while source.wait(Duration::from_millis(20)).unwrap().round < round + 3 {}
    assert!(source.link_stats().raw_sent > 5 * PAGE, "rounds have found it");
    // And with the guest paused.
    [12_000, 12_001].into_iter().for_each(unseen);
    source.finish().unwrap();
    assert_same(&writer, landing.ram());
    source.close().unwrap();
    assert_eq!(taking.join().unwrap().unwrap(), Ended::Closed);
}

#[test]
fn pages_that_are_written_all_the_time_are_not_sent_all_the_time() {
    let sizes = [64 * MIB];
    let (here, there) = links(Some(40_000_000));
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    let write = |ram: &GuestRam, page: u64| log.write(ram, 0, page, page ^ 0x55aa_55aa_55aa_55aa);
    (0..sizes[0] / PAGE).for_each(|page| write(&ram, page));
    let (_landing, taking) = arriving(there, &sizes);
    let writer = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
    let pause = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // 8 MiB, over and over.
            while !pause.load(Ordering::Relaxed) {
                (0..2048).for_each(|page| write(&writer, page));
            }
        });
        assert!(until_converged(&source, Duration::from_secs(20)), "8 MiB at 40 MB/s fit 300 ms");
        pause.store(true, Ordering::Relaxed);
    });
    source.finish().unwrap();
    let sent = source.link_stats().raw_sent;
    assert!(sent < 64 * MIB + 4 * 8 * MIB, "{} MiB were sent", sent / MIB);
    source.close().unwrap();
    taking.join().unwrap().unwrap();
}

#[test]
fn a_guest_that_leaves_by_post_copy_within_the_first_round_was_seen_to_write() {
    // Its memory would take 3 s. What it writes is seen while it is sent, or at the last when it leaves before that.
    for waits_until_seen in [true, false] {
        let (sizes, hot) = ([64 * MIB], MIB / PAGE);
        let (here, there) = links(Some(20_000_000));
        let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
        let write = |ram: &GuestRam, page: u64| log.write(ram, 0, page, page ^ 0x55aa_55aa_55aa_55aa);
        (0..sizes[0] / PAGE).for_each(|page| write(&ram, page));
        let (_landing, taking) = arriving(there, &sizes);
        let writer = GuestRam::same(&ram);
        let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
        let (pause, passes) = (AtomicBool::new(false), AtomicU64::new(0));
        let wait_until = |enough: &dyn Fn(&Progress) -> bool| {
            while !enough(&source.wait(Duration::from_millis(5)).unwrap()) {}
        };
        let waited = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !pause.load(Ordering::Relaxed) {
                    (0..hot).for_each(|page| write(&writer, page));
                    passes.fetch_add(1, Ordering::Relaxed);
                }
            });
            // What is written comes first, and some of it was sent.
            wait_until(&|it| it.round > 1 || it.round == 1 && it.remaining < it.total - MIB);
            let (begun, before) = (Instant::now(), passes.load(Ordering::Relaxed));
            wait_until(&|it| match waits_until_seen {
                true => it.round > 1 || it.dirty_rate > 0,
                false => passes.load(Ordering::Relaxed) > before + 1,
            });
            let waited = begun.elapsed();
            source.prepare_post_copy().unwrap();
            pause.store(true, Ordering::Relaxed);
            waited
        });
        let Progress { dirty_rate, round, .. } = source.wait(Duration::ZERO).unwrap();
        assert!(round == 1 && dirty_rate > 0, "{dirty_rate} bytes a second in round {round}");
        assert!(dirty_rate as f64 * waited.as_secs_f64() <= (hot * PAGE) as f64, "no more than is written");
        source.abandon();
        drop(source);
        taking.join().unwrap().unwrap_err();
    }
}

/// Tells of so many pages at each look, one here and one there, and of none at the looks after those.
struct Told(Mutex<std::vec::IntoIter<u64>>);

impl WriteLog for Arc<Told> {
    fn protect(&self, _: usize, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn written(&self, _: usize, bytes: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut looks = self.0.lock().unwrap();
        let first = looks.as_slice().iter().sum::<u64>();
        let pages = looks.next().unwrap_or(0);
        let all = (first - pages..first).map(|page| bytes.start + 2 * page * PAGE);
        out.extend(all.map(|start| start..start + PAGE));
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

#[test]
fn what_is_stale_is_taken_away_until_little_more_becomes_so() {
    // What the guest writes while that is done, and how many looks are left after it.
    for (looks, left) in [(vec![9000, 3000, 400, 77], 1), (vec![9000, 8000, 7000, 6000], 2), (vec![100, 9000], 1)] {
        let sizes = [256 * MIB];
        let (here, there) = links(None);
        let (_landing, taking) = arriving(there, &sizes);
        let ram = GuestRam::of_our_own(&sizes);
        (0..sizes[0]).step_by(MIB as usize).for_each(|at| ram.blocks()[0].write_at(at, &[1]).unwrap());
        let log = Arc::new(Told(Mutex::new(Vec::new().into_iter())));
        let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, 0, None).unwrap();
        // It waits to be told what to do, and looks no more until then.
        while !source.wait(Duration::from_millis(1)).unwrap().converged {}
        *log.0.lock().unwrap() = looks.into_iter();
        source.prepare_post_copy().unwrap();
        assert_eq!(log.0.lock().unwrap().len(), left);
        source.abandon();
        drop(source);
        taking.join().unwrap().unwrap_err();
    }
}

#[test]
fn other_ram_is_refused_in_words_on_both_sides() {
    let (here, there) = links(None);
    let (_landing, taking) = arriving(there, &[4 * MIB]);
    let log = Box::new(Arc::new(Log::default()));
    let error = Source::begin_with(GuestRam::of_our_own(&[8 * MIB]), Some(log), here, DOWNTIME, 0, None).err().unwrap();
    assert!(error.to_string().contains("ram0: 8388608 at the source, ram0: 4194304 at the destination"), "{error}");
    assert!(matches!(taking.join().unwrap(), Err(RamError::Layout { .. })));
}

#[test]
fn a_destination_that_goes_away_is_an_error_and_ends_no_thread_late() {
    let (here, there) = links(Some(10_000_000));
    let ram = GuestRam::of_our_own(&[64 * MIB]);
    let log = Arc::new(Log::default());
    (0..16_384).for_each(|page| log.write(&ram, 0, page, page + 1));
    let (_landing, taking) = arriving(there, &[64 * MIB]);
    let source = Source::begin_with(ram, Some(Box::new(log)), here, DOWNTIME, 0, None).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    source.abandon();
    assert!(begun.elapsed() < Duration::from_secs(1), "it took {:?}", begun.elapsed());
    assert!(source.wait(Duration::ZERO).is_err() && source.finish().is_err());
    assert!(taking.join().unwrap().is_err());
}

/// What a migration of a guest that writes came to.
struct Moved {
    converged: bool,
    took: Duration,
    paused: Duration,
    sent: u64,
    progress: Progress,
    /// Differences did not pay at some time.
    was_off: bool,
}

/// Moves a guest of 56 MiB that is never zero and does this over and over, with a number that grows.
fn moves(rate: u64, delta_cache: u64, at_most: Duration, write: impl Fn(&Log, &GuestRam, u64) + Sync) -> Moved {
    let sizes = [48 * MIB, 8 * MIB];
    let (here, there) = links(Some(rate));
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    for (block, size) in sizes.iter().enumerate() {
        (0..size / PAGE).for_each(|page| log.write(&ram, block, page, page + 1));
    }
    let (landing, taking) = arriving(there, &sizes);
    let (writer, begun) = (GuestRam::same(&ram), Instant::now());
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME, delta_cache, None).unwrap();
    let (pause, mut was_off) = (AtomicBool::new(false), false);
    let converged = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !pause.load(Ordering::Relaxed) {
                write(&log, &writer, number);
                number += 1;
            }
        });
        let mut converged = false;
        while !converged && begun.elapsed() < at_most {
            converged = source.wait(Duration::from_millis(20)).unwrap().converged;
            was_off |= !source.takes_all_pages_for_deltas();
        }
        pause.store(true, Ordering::Relaxed);
        converged
    });
    let paused = Instant::now();
    source.finish().unwrap();
    let (took, paused) = (begun.elapsed(), paused.elapsed());
    assert_same(&writer, landing.ram());
    let (sent, progress) = (source.link_stats().raw_sent, source.wait(Duration::ZERO).unwrap());
    source.close().unwrap();
    assert_eq!(taking.join().unwrap().unwrap(), Ended::Closed);
    Moved { converged, took, paused, sent, progress, was_off }
}

/// Leaves others some time: the guest writes no more than 256 pages a millisecond.
fn rest(number: u64) {
    if number.is_multiple_of(256) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn pages_that_change_a_little_go_as_differences_and_arrive_as_they_were() {
    // 32 MiB, of which 13 MiB fit the downtime.
    let moved = moves(45_000_000, 48 * MIB, Duration::from_secs(30), |log, ram, number| {
        log.change(ram, 0, number % 8192, number % 500 * 8, &number.to_le_bytes());
        rest(number);
    });
    let Moved { converged, sent, progress, .. } = moved;
    assert!(converged, "{progress:?}");
    assert!(progress.deltas > 8000 && progress.saved > progress.deltas * PAGE / 2, "{progress:?}");
    assert!(sent < 56 * MIB + 3 * 32 * MIB, "{} MiB were sent", sent / MIB);
}

#[test]
fn whatever_becomes_of_pages_they_arrive_as_they_were() {
    // More than the memory for it, so that pages come and go there, and than may be left for the pause.
    let moved = moves(40_000_000, 5 * MIB, Duration::from_secs(4), |log, ram, number| {
        let mut random = random(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (block, page) = (random() as usize % 2, random() % 2000);
        match random() % 20 {
            0 => log.write(ram, block, page, 0),
            1 => log.write(ram, block, page, random()),
            _ => log.change(ram, block, page, random() % (PAGE - 64), &noise(random())[..(number % 64) as usize]),
        }
    });
    assert!(moved.progress.deltas > 100 && moved.progress.saved > 0, "{:?}", moved.progress);
}

#[test]
fn pages_that_are_written_all_over_do_not_go_as_differences() {
    // All of 12 MiB many times in a round.
    let moved = moves(25_000_000, 48 * MIB, Duration::from_secs(5), |log, ram, number| {
        log.write(ram, 0, number % 3072, number + 1_000_000);
    });
    assert!(moved.progress.round > 3, "{:?}", moved.progress);
    // But for those that were sent again as they were: written just before they were read.
    assert!(moved.progress.deltas * PAGE < moved.sent / 10, "{:?}", moved.progress);
    assert!(moved.was_off);
}

#[test]
#[ignore = "prints figures"]
fn what_differences_save() {
    type Write = fn(&Log, &GuestRam, u64);
    const HOT: u64 = 48 * MIB / PAGE;
    let little: Write = |log, ram, number| {
        log.change(ram, 0, number % HOT, number % 500 * 8, &number.to_le_bytes());
        rest(number);
    };
    let tenth: Write = |log, ram, number| {
        log.change(ram, 0, number % HOT, number / HOT % 8 * 448, &noise(number + 1)[..400]);
        rest(number);
    };
    let all: Write = |log, ram, number| {
        log.write(ram, 0, number % HOT, number + 1_000_000);
        rest(number);
    };
    let cold: Write = |log, ram, number| {
        // Slow enough to converge by itself.
        log.write(ram, 0, number * 7919 % HOT, number + 1_000_000);
        std::thread::sleep(Duration::from_micros(200));
    };
    for (what, write) in [("8 bytes", little), ("a tenth", tenth), ("all", all), ("all, slowly", cold)] {
        for delta_cache in [0, 64 * MIB, 0, 64 * MIB] {
            let Moved { converged, took, paused, sent, progress, .. } =
                moves(125_000_000, delta_cache, Duration::from_secs(15), write);
            println!(
                "{what:12} {:2} MiB: {} in {:5.2} s, paused {:4} ms, {:4} MiB sent, {} deltas saved {} MiB, {} rounds",
                delta_cache / MIB,
                if converged { "converged" } else { "stopped  " },
                took.as_secs_f64(),
                paused.as_millis(),
                sent / MIB,
                progress.deltas,
                progress.saved / MIB,
                progress.round
            );
        }
    }
}
