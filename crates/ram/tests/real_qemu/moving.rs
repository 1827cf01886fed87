//! Guests that move from one QEMU to another, over a real link.

use std::fs;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};
use vmferry_ram::{Drain, Ended, GuestRam, Landing, PAGE, RamError, Source, serve};

use crate::PATIENCE;
use crate::guest::{Guest, qemus};

const DOWNTIME: Duration = Duration::from_millis(300);

/// Both ends of a plain link over the loopback address.
fn links() -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sessions, options) = (Sessions::new(), LinkOptions::new(SessionId::random(), SessionKey::random()));
    let streams = options.streams;
    let there = sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    thread::spawn(move || {
        for tcp in listener.incoming().take(usize::from(streams) + 1) {
            let (sessions, stream) = (sessions.clone(), Unattached::plain(tcp.unwrap()));
            thread::spawn(move || sessions.attach(stream));
        }
    });
    (Link::connect(TcpDialer::plain(&address), options).unwrap(), there)
}

fn ram_of(guest: &Guest) -> GuestRam {
    GuestRam::open(guest.pid(), &[Guest::backend()]).unwrap()
}

/// A guest's RAM that arrives.
struct Arriving {
    landing: Arc<Landing>,
    taking: JoinHandle<Result<Ended, RamError>>,
    dir: TempDir,
}

impl Arriving {
    fn begin(guest: &Guest, link: Link) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let landing = Arc::new(Landing::new(ram_of(guest), &dir.path().join("record")));
        landing.prepare_post_copy().unwrap();
        let there = Arc::clone(&landing);
        Self { landing, taking: thread::spawn(move || serve(&link, &there, None)), dir }
    }
}

/// Waits until it is so.
fn until(is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "it takes too long");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A drain that can be made to take long.
#[derive(Default)]
struct Tap {
    held: Mutex<bool>,
    changed: Condvar,
    waits: AtomicBool,
}

impl Tap {
    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.changed.notify_all();
    }

    fn drain(tap: &Arc<Self>) -> Drain {
        let tap = Arc::clone(tap);
        Box::new(move || {
            let held = tap.held.lock().unwrap();
            tap.waits.store(*held, Ordering::Relaxed);
            drop(tap.changed.wait_while(held, |held| *held).unwrap());
            Ok(())
        })
    }
}

#[test]
fn writers_that_wait_are_let_go_before_all_else_when_a_copy_is_given_up() {
    for qemu in qemus() {
        let (mut guest, there) = (Guest::start(&qemu, &[]), Guest::start(&qemu, &[]));
        let (here, link) = links();
        let arriving = Arriving::begin(&there, link);
        let tap = Arc::new(Tap::default());
        let source = Source::begin(ram_of(&guest), here, DOWNTIME, 0, Some(Tap::drain(&tap))).unwrap();
        until(|| source.wait(Duration::from_millis(1)).unwrap().round > 1);
        tap.hold(true);
        until(|| tap.waits.load(Ordering::Relaxed));

        let threads = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
        let threads: Vec<u32> =
            threads.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        source.pace(1, &threads).unwrap();
        assert!(source.take_over(PATIENCE).unwrap());
        // The first one is let go at once, the next one's turn is a while later.
        guest.write(9);
        guest.begin_write(7);
        let (answered, answer) = channel();
        thread::scope(|scope| {
            scope.spawn(|| answered.send(guest.answer()));
            scope.spawn(|| source.abandon());
            let heard = answer.recv_timeout(PATIENCE);
            tap.hold(false);
            assert_ne!(heard, Err(RecvTimeoutError::Timeout), "it waits for what else is under way");
        });
        assert!(!guest.flags(&guest.ram()).contains(&"uw".to_owned()));
        arriving.taking.join().unwrap().unwrap_err();
    }
}

#[test]
fn what_could_not_be_left_is_not_called_complete_and_is_left_later() {
    let qemu = &qemus()[0];
    let (mut guest, mut there) = (Guest::start(qemu, &[]), Guest::start(qemu, &[]));
    (1..100).for_each(|page| guest.write(page));
    let descriptors = there.descriptors();
    let (here, link) = links();
    let arriving = Arriving::begin(&there, link);
    let source = Source::begin(ram_of(&guest), here, DOWNTIME, 0, None).unwrap();
    until(|| source.wait(Duration::from_millis(1)).unwrap().round > 1);
    (10..20).for_each(|page| guest.write(page));
    // Where the name of a complete record is taken by a folder, this cannot be written down.
    let obstacle = arriving.dir.path().join("record.complete");
    fs::create_dir_all(obstacle.join("full")).unwrap();
    source.post_copy().unwrap();
    let error = arriving.taking.join().unwrap().unwrap_err();
    assert!(matches!(error, RamError::Record(_)), "{error:?}");
    assert_eq!(arriving.landing.missing(), Some(0));
    assert!(there.flags(&there.ram()).contains(&"um".to_owned()), "it is still served");
    arriving.landing.finish().unwrap_err();

    fs::remove_dir_all(obstacle).unwrap();
    arriving.landing.finish().unwrap();
    arriving.landing.finish().unwrap();
    assert!(!there.flags(&there.ram()).contains(&"um".to_owned()));
    assert_eq!(there.descriptors(), descriptors);
    assert_eq!(fs::read_dir(arriving.dir.path()).unwrap().count(), 0);
    assert_eq!((there.read(15), there.read(50), there.read(120)), (15, 50, 0));
}

#[test]
fn memory_that_was_allocated_beforehand_is_so_after_post_copy() {
    let qemu = &qemus()[0];
    let preallocated = "memory-backend-memfd,id=ram,size=64M,share=on,prealloc=on";
    let (mut guest, mut there) = (Guest::start(qemu, &[]), Guest::start_with(qemu, preallocated, |_| {}));
    let block = |ram: &GuestRam| ram.blocks()[0].data(0..ram.blocks()[0].size()).unwrap();
    let whole = vec![0..ram_of(&there).blocks()[0].size(); 1];
    assert_eq!(block(&ram_of(&there)), whole);
    (1..120).for_each(|page| guest.write(page));
    let (here, link) = links();
    let arriving = Arriving::begin(&there, link);
    let source = Source::begin(ram_of(&guest), here, DOWNTIME, 0, None).unwrap();
    until(|| source.wait(Duration::from_millis(1)).unwrap().round > 1);
    // Some are stale; of those, some are zero.
    let ram = ram_of(&guest);
    (0..10).for_each(|page| guest.write(page));
    (20..50).for_each(|page| guest.write(page));
    ram.blocks()[0].write_at(20 * PAGE, &vec![0; 20 * PAGE as usize]).unwrap();
    source.prepare_post_copy().unwrap();
    assert_ne!(block(&ram_of(&there)), whole, "what is stale was taken away");
    source.post_copy().unwrap();
    until(|| source.wait(Duration::from_millis(1)).unwrap().complete);
    source.close().unwrap();
    assert_eq!(arriving.taking.join().unwrap().unwrap(), Ended::Complete);
    assert_eq!(block(&ram_of(&there)), whole);
    assert_eq!((there.read(5), there.read(25), there.read(45), there.read(100)), (5, 0, 45, 100));
}

#[test]
fn what_the_guest_wrote_here_and_there_is_there_before_it_runs() {
    let qemu = &qemus()[0];
    let (mut guest, there) = (Guest::start(qemu, &[]), Guest::start(qemu, &[]));
    (1..120).for_each(|page| guest.write(page));
    let (here, link) = links();
    let arriving = Arriving::begin(&there, link);
    let source = Source::begin(ram_of(&guest), here, DOWNTIME, 0, None).unwrap();
    until(|| source.wait(Duration::from_millis(1)).unwrap().round > 1);
    // Much at a time, and pages that lie alone, before what is stale is taken away and after it. Those come last otherwise.
    (10..60).chain([70, 71]).for_each(|page| guest.write(page));
    source.prepare_post_copy().unwrap();
    (10..60).chain([100]).for_each(|page| guest.write(page));
    // What is not sent with the pause takes a while.
    source.set_rate(Some(100_000));
    source.post_copy().unwrap();
    let ram = ram_of(&there);
    let is_there = |page| !ram.blocks()[0].data(page * PAGE..(page + 1) * PAGE).unwrap().is_empty();
    until(|| [70, 71, 100].into_iter().all(is_there));
    assert!(!is_there(55) && !is_there(59), "they are to come later");
    source.set_rate(None);
    until(|| source.wait(Duration::from_millis(1)).unwrap().complete);
    source.close().unwrap();
    assert_eq!(arriving.taking.join().unwrap().unwrap(), Ended::Complete);
    assert!([10, 59, 70, 71, 100].into_iter().all(is_there));
}
