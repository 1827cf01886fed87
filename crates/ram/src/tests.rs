//! Both sides over a real link, with RAM and a guest of our own: a thread that writes.

mod hostile;

use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};

use crate::destination::{Ended, Landing, serve};
use crate::memory::GuestRam;
use crate::source::{Source, WriteLog};
use crate::{PAGE, RamError};

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
}

/// A page that nothing makes shorter, unless it is to be zero.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..PAGE / 8).map(next).flat_map(u64::to_le_bytes).collect()
}

/// Both ends of a plain link over the loopback address.
fn links(rate: Option<u64>) -> (Link, Link) {
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
fn arriving(link: Link, sizes: &[u64]) -> (Arc<Landing>, std::thread::JoinHandle<Result<Ended, RamError>>) {
    let dir = tempfile::tempdir().unwrap();
    let landing = Arc::new(Landing::new(GuestRam::of_our_own(sizes), &dir.path().join("record")));
    let taking = Arc::clone(&landing);
    (landing, std::thread::spawn(move || serve(&link, &taking, &dir.path().join("state.sock"))))
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
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME).unwrap();
    let pause = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut state = 88_172_645_463_325_252_u64;
            while !pause.load(Ordering::Relaxed) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
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
fn an_idle_guest_is_sent_once_and_what_is_empty_not_at_all() {
    let sizes = [256 * MIB];
    let (here, there) = links(None);
    let (log, ram) = (Arc::new(Log::default()), GuestRam::of_our_own(&sizes));
    for page in 1000..5000 {
        log.write(&ram, 0, page, page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let (landing, taking) = arriving(there, &sizes);
    let same = GuestRam::same(&ram);
    let source = Source::begin_with(ram, Some(Box::new(log)), here, DOWNTIME).unwrap();
    assert!(until_converged(&source, Duration::from_secs(10)));
    source.finish().unwrap();
    assert_same(&same, landing.ram());
    let sent = source.link_stats().raw_sent;
    assert!(sent < 4100 * PAGE, "{sent} bytes for {}", 4000 * PAGE);
    source.close().unwrap();
    taking.join().unwrap().unwrap();
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
    let source = Source::begin_with(ram, Some(Box::new(Arc::clone(&log))), here, DOWNTIME).unwrap();
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
fn other_ram_is_refused_in_words_on_both_sides() {
    let (here, there) = links(None);
    let (_landing, taking) = arriving(there, &[4 * MIB]);
    let log = Box::new(Arc::new(Log::default()));
    let error = Source::begin_with(GuestRam::of_our_own(&[8 * MIB]), Some(log), here, DOWNTIME).err().unwrap();
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
    let source = Source::begin_with(ram, Some(Box::new(log)), here, DOWNTIME).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    source.abandon();
    assert!(begun.elapsed() < Duration::from_secs(1), "it took {:?}", begun.elapsed());
    assert!(source.wait(Duration::ZERO).is_err() && source.finish().is_err());
    assert!(taking.join().unwrap().is_err());
}
