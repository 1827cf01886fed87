//! RAM moves from one QEMU to another: of a guest of nearly 1 TiB, of which it has touched next to nothing, so that what is
//! done with it paused must not grow with its size; and of one whose agents end in the middle of post-copy.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};
use vmferry_ram::{Backend, Ended, GuestRam, Landing, PAGE, Source, serve};

use crate::guest::{Guest, RAM_BYTES, qemus};

/// What fits below the addresses that QEMU's processors have by default.
const SIZE: u64 = 1000 << 30;
/// With the guest paused, in a build for tests on a machine that does other things, too.
const PAUSE: Duration = Duration::from_secs(1);
/// Of page tables and the like, in KiB; all pages would take 2 GiB of them.
const TABLES: u64 = 64 << 10;

fn start(qemu: &Path) -> Guest {
    Guest::start_with(qemu, &format!("memory-backend-memfd,id=ram,size={SIZE},share=on"), |command| {
        command.args(["-m", &format!("{}G", SIZE >> 30)]);
    })
}

fn ram(guest: &Guest) -> GuestRam {
    GuestRam::open(guest.pid(), &[Backend { id: "ram".into(), size: SIZE, address: None }]).unwrap()
}

fn page(ram: &GuestRam, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    ram.blocks()[0].read_at(page * PAGE, &mut bytes).unwrap();
    bytes
}

/// What QEMU's page tables take, in KiB.
fn tables(guest: &Guest) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Both ends of a plain link over the loopback address.
fn links(rate: Option<u64>) -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let sessions = Sessions::new();
    let options = LinkOptions { rate, ..LinkOptions::new(SessionId::random(), SessionKey::random()) };
    let streams = usize::from(options.streams) + 1;
    let there = sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming().take(streams) {
            let (sessions, stream) = (sessions.clone(), Unattached::plain(tcp.unwrap()));
            std::thread::spawn(move || sessions.attach(stream));
        }
    });
    (Link::connect(TcpDialer::plain(&address), options).unwrap(), there)
}

/// Moves the RAM and tells how long the guest would have been paused, and how long it took to undo what was done at the
/// source.
fn moves(source_guest: &mut Guest, there: &Guest, post_copy: bool) -> (Duration, Duration) {
    let dir = tempfile::tempdir().unwrap();
    let (here, link) = links(None);
    let landing = Arc::new(Landing::new(ram(there), &dir.path().join("record")));
    landing.prepare_post_copy().unwrap();
    let taking = Arc::clone(&landing);
    let taking = std::thread::spawn(move || serve(&link, &taking, None));
    let begun = Instant::now();
    let source = Source::begin(ram(source_guest), here, Duration::from_millis(300), 0, None).unwrap();
    while !source.wait(Duration::from_millis(20)).unwrap().converged {}
    let copied = begun.elapsed();
    // Pages that had no memory when it was their turn, and one that was sent.
    (30..40).for_each(|page| source_guest.write(page));
    source_guest.write(5);
    let pause = if post_copy {
        source.prepare_post_copy().unwrap();
        source_guest.write(45);
        let paused = Instant::now();
        source.post_copy().unwrap();
        let pause = paused.elapsed();
        while !source.wait(Duration::from_millis(5)).unwrap().complete {}
        pause
    } else {
        let paused = Instant::now();
        source.finish().unwrap();
        paused.elapsed()
    };
    source.close().unwrap();
    println!("copied in {copied:?}, page tables of {} KiB", tables(source_guest));
    assert!(tables(source_guest) < TABLES && tables(there) < TABLES);
    let begun = Instant::now();
    drop(source);
    let undone = begun.elapsed();
    taking.join().unwrap().unwrap();
    (pause, undone)
}

#[test]
fn a_guest_of_a_terabyte_that_uses_little_is_paused_for_little() {
    let qemu = qemus().pop().unwrap();
    for post_copy in [false, true] {
        let (mut here, there) = (start(&qemu), start(&qemu));
        (0..20).for_each(|page| here.write(page));
        // At the far end, too.
        let far = SIZE - 3 * PAGE;
        let file = ram(&here);
        file.blocks()[0].write_at(far, &[7; PAGE as usize]).unwrap();
        let (pause, undone) = moves(&mut here, &there, post_copy);
        println!("post-copy {post_copy}: paused for {pause:?}, undone in {undone:?}");
        assert!(pause < PAUSE, "{pause:?}");
        let arrived = ram(&there);
        for number in (0..128).chain([far / PAGE]) {
            assert!(page(&file, number) == page(&arrived, number), "page {number}");
        }
        assert_eq!(arrived.blocks()[0].data(0..SIZE).unwrap().last(), Some(&(far..far + PAGE)));
    }
}

#[test]
fn what_a_guest_gave_back_is_not_fetched_again_by_the_next_agent() {
    for qemu in qemus() {
        let (here, there) = (Guest::start(&qemu, &[]), Guest::start(&qemu, &[]));
        let (theirs, all) = (here.ram(), RAM_BYTES / PAGE);
        let noise: Vec<u8> =
            (0..RAM_BYTES / 8).flat_map(|it| (it.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes()).collect();
        theirs.blocks()[0].write_at(0, &noise).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("record");
        let open = |guest: &Guest| GuestRam::open(guest.pid(), &[Guest::backend()]).unwrap();

        let (link_here, link) = links(Some(4 << 20));
        let landing = Arc::new(Landing::new(open(&there), &record));
        let taking = Arc::clone(&landing);
        let taking = std::thread::spawn(move || serve(&link, &taking, None));
        let source = Source::begin(open(&here), link_here, Duration::from_millis(300), 0, None).unwrap();
        source.prepare_post_copy().unwrap();
        source.post_copy().unwrap();
        let begun = landing.missing().unwrap();
        while landing.missing().unwrap() > begun - (1 << 20) {
            source.wait(Duration::from_millis(5)).unwrap();
        }
        source.abandon();
        taking.join().unwrap().unwrap_err();
        let missing = landing.missing().unwrap();
        drop(landing);

        // One that has come and that the guest does not need any more.
        let ours = open(&there);
        let came = ours.blocks()[0].data(0..RAM_BYTES).unwrap().last().unwrap().start;
        assert!(page(&ours, came / PAGE) == page(&theirs, came / PAGE));
        ours.blocks()[0].punch(came..came + PAGE).unwrap();

        let landing = Arc::new(Landing::again(there.pid(), &record).unwrap().unwrap());
        assert_eq!(landing.missing(), Some(missing), "what had come has not gone");
        let (link_here, link) = links(None);
        let taking = Arc::clone(&landing);
        let taking = std::thread::spawn(move || serve(&link, &taking, None));
        let source = Source::resume(open(&here), link_here).unwrap();
        while !source.wait(Duration::from_millis(5)).unwrap().complete {}
        source.close().unwrap();
        assert_eq!(taking.join().unwrap().unwrap(), Ended::Complete);
        assert!(page(&ours, came / PAGE).iter().all(|byte| *byte == 0), "it is zero, as the guest expects it to be");
        let others = (0..all).filter(|number| *number != came / PAGE);
        assert!(others.into_iter().all(|number| page(&ours, number) == page(&theirs, number)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no record is left");
    }
}
