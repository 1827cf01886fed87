//! The RAM of real QEMUs, emulated, with a guest that does to its memory what it is told and nothing else.

mod guest;
mod huge;
mod moving;

use std::env;
use std::fs;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;

use guest::{Guest, RAM_BYTES, SHARED, qemus};
use vmferry_ram::can_pace;
use vmferry_ram::{
    Arrival, ArrivalError, GuestRam, InjectError, MemoryError, PAGE, Tracking, TrackingError, WriteFault,
};

/// Generous: a fault takes microseconds on a machine that has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(20);
const PAGE_BYTES: usize = PAGE as usize;
/// A user and a group without rights.
const NOBODY: u32 = 65534;
/// Tells this program, started once more, which QEMU to hold.
const HELD: &str = "VMFERRY_TEST_HELD_PID";

fn pages(range: Range<u64>) -> Range<u64> {
    range.start * PAGE..range.end * PAGE
}

/// All that was written since it was last asked, in pages.
fn take_written(tracking: &Tracking) -> Vec<Range<u64>> {
    let mut written = Vec::new();
    tracking.take_written(0, 0..RAM_BYTES, &mut written).unwrap();
    written.into_iter().map(|range| range.start / PAGE..range.end / PAGE).collect()
}

fn nothing() -> Vec<Range<u64>> {
    Vec::new()
}

/// The next fault that somebody is told of.
fn next_faults(arrival: &Arrival) -> Vec<(usize, u64)> {
    let mut faults = Vec::new();
    arrival.faults(PATIENCE, &mut faults).unwrap();
    faults
}

#[test]
fn tracking_sees_exactly_the_pages_that_were_written() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let ram = guest.ram();
        let tracking = Tracking::begin(&ram).unwrap();
        println!("{qemu:?}: a thread stood still for {:?}", tracking.stood_still());
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        assert_eq!(take_written(&tracking), nothing());

        guest.write(5);
        guest.read(6);
        guest.write(7);
        guest.write(8);
        let mut written = Vec::new();
        tracking.written(0, 0..RAM_BYTES, &mut written).unwrap();
        assert_eq!(written, [pages(5..6), pages(7..9)]);
        assert_eq!(take_written(&tracking), [5..6, 7..9]);
        assert_eq!(take_written(&tracking), nothing());
        guest.write(7);
        assert_eq!(take_written(&tracking), vec![7..8; 1]);

        // A page that was never there, written by the kernel as for a disk that is read into RAM.
        let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", guest.pid())).unwrap();
        memory.write_all_at(b"x", ram.blocks()[0].address() + 9000 * PAGE + 17).unwrap();
        assert_eq!(take_written(&tracking), vec![9000..9001; 1]);

        // What does not go through QEMU's mapping is not seen, and says so in the docs.
        ram.blocks()[0].write_at(70 * PAGE, b"x").unwrap();
        assert_eq!(take_written(&tracking), nothing());
    }
}

#[test]
fn a_scan_and_the_protection_again_take_little_time() {
    let mut guest = Guest::start(&qemus()[0], &[]);
    let ram = guest.ram();
    let tracking = Tracking::begin(&ram).unwrap();
    let begun = Instant::now();
    tracking.protect(0, 0..RAM_BYTES).unwrap();
    println!("{} MiB were protected in {:?}", RAM_BYTES >> 20, begun.elapsed());
    for page in 0..100 {
        guest.write(page);
    }
    let begun = Instant::now();
    let written = take_written(&tracking);
    let took = begun.elapsed();
    println!("{} MiB were scanned in {took:?}", RAM_BYTES >> 20);
    assert_eq!(written, vec![0..100; 1]);
    assert!(took < Duration::from_millis(100), "{took:?}");
}

#[test]
fn writers_wait_where_their_writes_are_paced_and_readers_do_not() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let (ram, descriptors) = (guest.ram(), guest.descriptors());
        can_pace(guest.pid()).unwrap();
        let mut tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        guest.write(5);
        let faults = tracking.prepare_pacing(&ram).unwrap();
        assert_eq!(take_written(&tracking), vec![5..6; 1], "not yet");

        // The first hundred pages.
        let begun = Instant::now();
        tracking.pace(0, pages(0..100)).unwrap();
        println!("{qemu:?}: taken over in {:?}", begun.elapsed());
        tracking.protect(0, pages(0..100)).unwrap();
        assert_eq!(take_written(&tracking), nothing());
        guest.read(7);
        guest.write(101);
        guest.begin_write(7);
        let mut waiting = Vec::new();
        while waiting.is_empty() {
            assert!(faults.wait(&ram, PATIENCE, &mut waiting).unwrap());
        }
        let WriteFault { block, page, thread } = waiting[0];
        assert_eq!((block, page), (0, 7));
        assert!(std::path::Path::new(&format!("/proc/{}/task/{thread}", guest.pid())).exists());
        assert_eq!(take_written(&tracking), vec![101..102; 1], "it waits");
        faults.let_go(block, page).unwrap();
        assert_eq!(guest.answer(), 7);
        assert_eq!(take_written(&tracking), vec![7..8; 1]);
        assert_eq!(take_written(&tracking), nothing(), "it is protected again");

        // Nobody waits for an agent that is gone.
        guest.begin_write(9);
        assert!(faults.wait(&ram, PATIENCE, &mut waiting).unwrap());
        drop((tracking, faults));
        assert_eq!(guest.answer(), 9);
        assert_eq!(guest.descriptors(), descriptors);
        assert!(!guest.flags(&ram).contains(&"uw".to_owned()));
    }
}

#[test]
fn tracking_that_ends_leaves_nothing_behind() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let (ram, descriptors) = (guest.ram(), guest.descriptors());
        let tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        assert_eq!(guest.descriptors(), descriptors, "the userfaultfd is ours alone");
        assert!(guest.flags(&ram).contains(&"uw".to_owned()));
        assert!(matches!(Tracking::begin(&ram), Err(TrackingError::Taken { id }) if id == "ram"));
        drop(tracking);
        assert!(!guest.flags(&ram).contains(&"uw".to_owned()));
        guest.write(5);

        let mut holder = Holder::start(&guest, "tracking");
        assert!(guest.flags(&ram).contains(&"uw".to_owned()));
        holder.kill();
        assert!(!guest.flags(&ram).contains(&"uw".to_owned()));
        guest.write(6);
        let tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        guest.write(7);
        assert_eq!(take_written(&tracking), vec![7..8; 1]);
    }
}

#[test]
fn a_sandboxed_qemu_is_tracked_and_served_and_its_sandbox_stays() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: a sandbox is suspended by root only");
        return;
    }
    let all = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    for qemu in qemus() {
        let mut guests = vec![Guest::start(&qemu, &["-sandbox", all])];
        // One that would end it for what is done inside it.
        guests.push(Guest::start_with(&qemu, SHARED, |command| {
            // SAFETY: between fork and exec; it makes two system calls.
            #[expect(unsafe_code)]
            unsafe {
                command.pre_exec(forbid_userfaultfd)
            };
        }));
        for mut guest in guests {
            let (ram, descriptors) = (guest.ram(), guest.descriptors());
            let tracking = Tracking::begin(&ram).unwrap();
            tracking.protect(0, 0..RAM_BYTES).unwrap();
            guest.write(5);
            assert_eq!(take_written(&tracking), vec![5..6; 1]);
            drop(tracking);
            let arrival = Arrival::arm(Arc::clone(&ram)).unwrap();
            arrival.disarm().unwrap();
            guest.write(6);
            let status = fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
            assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
            assert_eq!(guest.descriptors(), descriptors);
        }
    }
}

/// From here on this process is killed when it makes a userfaultfd.
fn forbid_userfaultfd() -> std::io::Result<()> {
    const KILL_PROCESS: u32 = 0x8000_0000;
    const ALLOW: u32 = 0x7fff_0000;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // The call's number; userfaultfd's is what it is for this processor.
    let mut filter = [
        op(0x20, 0, 0, 0),
        op(0x15, 0, 1, libc::SYS_userfaultfd as u32),
        op(0x06, 0, 0, KILL_PROCESS),
        op(0x06, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program.
    #[expect(unsafe_code)]
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn a_qemu_without_rights_is_tracked_and_cannot_be_served() {
    let nobody = |command: &mut Command| {
        // Without rights ourselves, we start one that has none either.
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
    };
    for qemu in qemus() {
        let mut guest = Guest::start_with(&qemu, SHARED, nobody);
        let (ram, descriptors) = (guest.ram(), guest.descriptors());
        let tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        guest.write(5);
        assert_eq!(take_written(&tracking), vec![5..6; 1]);
        drop(tracking);
        if std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() == "0" {
            let error = Arrival::arm(Arc::clone(&ram)).unwrap_err();
            assert!(matches!(error, ArrivalError::Inject(InjectError::QemuNotAllowed)), "{error:?}");
            let error = Arrival::ready(Arc::clone(&ram)).unwrap_err();
            assert!(matches!(error, ArrivalError::Inject(InjectError::QemuNotAllowed)), "{error:?}");
        }
        assert_eq!(guest.descriptors(), descriptors);
        guest.write(6);
    }
}

#[test]
fn memory_that_is_given_back_counts_as_written_when_it_is_used_again() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let ram = guest.ram();
        guest.write(5);
        guest.write(6);
        let tracking = Tracking::begin(&ram).unwrap();
        assert_eq!(take_written(&tracking), vec![0..RAM_BYTES / PAGE; 1], "nothing was protected before");
        ram.blocks()[0].punch(pages(5..6)).unwrap();
        assert_eq!(take_written(&tracking), nothing());
        guest.write(5);
        assert_eq!(take_written(&tracking), vec![5..6; 1]);
    }
}

#[test]
fn that_ram_may_arrive_is_found_out_and_leaves_nothing_behind() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let (ram, descriptors) = (guest.ram(), guest.descriptors());
        ram.blocks()[0].punch(pages(10..20)).unwrap();
        let arrival = Arrival::ready(Arc::clone(&ram)).unwrap();
        assert_eq!(guest.descriptors(), descriptors + 1);
        assert!(!guest.flags(&ram).contains(&"um".to_owned()));
        assert_eq!(guest.read(12), 0, "nobody waits");
        arrival.disarm().unwrap();
        assert_eq!(guest.descriptors(), descriptors);
    }
}

#[test]
fn ram_arrives_while_the_guest_runs_on_it() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let (ram, descriptors) = (guest.ram(), guest.descriptors());
        let block = &ram.blocks()[0];
        guest.write(9);
        block.punch(pages(10..100)).unwrap();
        let arrival = Arrival::arm(Arc::clone(&ram)).unwrap();
        println!("{qemu:?}: a thread stood still for {:?}", arrival.stood_still());
        assert_eq!(guest.descriptors(), descriptors + 1);
        assert!(guest.flags(&ram).contains(&"um".to_owned()));
        assert_eq!(guest.read(9), 9, "what is there stays");

        // A read waits for the page that is placed, and a page is placed once.
        guest.begin_read(12);
        assert_eq!(next_faults(&arrival), [(0, 12 * PAGE)]);
        let placed = arrival.place(0, 12 * PAGE, &[0x42; PAGE_BYTES]).unwrap();
        assert_eq!((placed.placed_bytes, placed.already_bytes), (PAGE, 0));
        assert_eq!(guest.answer(), 0x42);
        let placed = arrival.place(0, 12 * PAGE, &[0x43; PAGE_BYTES]).unwrap();
        assert_eq!((placed.placed_bytes, placed.already_bytes), (0, PAGE));
        assert_eq!(guest.read(12), 0x42);

        // What the guest wrote meanwhile is newer than what arrives.
        guest.begin_write(15);
        assert_eq!(next_faults(&arrival), [(0, 15 * PAGE)]);
        let placed = arrival.place_zero(0, pages(15..17)).unwrap();
        assert_eq!((placed.placed_bytes, placed.already_bytes), (2 * PAGE, 0));
        guest.answer();
        let placed = arrival.place(0, 9 * PAGE, &vec![0x44; 11 * PAGE_BYTES]).unwrap();
        assert_eq!((placed.placed_bytes, placed.already_bytes), (7 * PAGE, 4 * PAGE), "9, 12, 15 and 16 were there");
        assert_eq!((guest.read(15), guest.read(16), guest.read(17), guest.read(9)), (15, 0, 0x44, 9));
        // A buffer need not be aligned.
        let unaligned = &[0x45; 2 * PAGE_BYTES][3..3 + PAGE_BYTES];
        arrival.place(0, 30 * PAGE, unaligned).unwrap();
        assert_eq!(guest.read(30), 0x45);
        let mut faults = Vec::new();
        arrival.faults(Duration::ZERO, &mut faults).unwrap();
        assert_eq!(faults, []);

        // Nobody waits any more, and nothing is left.
        guest.begin_read(50);
        assert_eq!(next_faults(&arrival), [(0, 50 * PAGE)]);
        arrival.disarm().unwrap();
        assert_eq!((guest.answer(), guest.read(51)), (0, 0));
        assert_eq!(guest.descriptors(), descriptors);
        assert!(!guest.flags(&ram).contains(&"um".to_owned()));
    }
}

#[test]
fn the_next_agent_is_told_again_of_who_waits() {
    for qemu in qemus() {
        let mut guest = Guest::start(&qemu, &[]);
        let ram = guest.ram();
        ram.blocks()[0].punch(pages(10..100)).unwrap();
        let mut holder = Holder::start(&guest, "arrival");
        let number = holder.answer().parse().unwrap();
        guest.begin_read(12);
        assert_eq!(holder.answer(), format!("0 {}", 12 * PAGE));
        holder.kill();

        assert!(matches!(
            Arrival::again(Arc::clone(&ram), 0),
            Err(ArrivalError::Inject(InjectError::NotOurs { number: 0 }))
        ));
        let arrival = Arrival::again(Arc::clone(&ram), number).unwrap();
        assert_eq!(next_faults(&arrival), [(0, 12 * PAGE)]);
        arrival.place(0, 12 * PAGE, &[0x42; PAGE_BYTES]).unwrap();
        assert_eq!(guest.answer(), 0x42);
        arrival.disarm().unwrap();
        assert_eq!(guest.read(13), 0);
    }
}

#[test]
fn the_end_of_qemu_ends_the_wait_for_faults() {
    let mut guest = Guest::start(&qemus()[0], &[]);
    let ram = guest.ram();
    let arrival = Arrival::arm(Arc::clone(&ram)).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| arrival.faults(PATIENCE, &mut Vec::new()));
        guest.kill();
        assert!(matches!(waiting.join().unwrap(), Err(ArrivalError::Gone)));
    });
    assert!(ram.is_gone());
    assert!(matches!(arrival.place(0, 0, &[1; PAGE_BYTES]), Err(ArrivalError::Gone)));
    assert!(Tracking::begin(&ram).is_err());
}

#[test]
fn memory_that_is_not_shared_is_refused() {
    let private = "memory-backend-ram,id=ram,size=64M";
    let guest = Guest::start_with(&qemus()[0], private, |_| {});
    let error = GuestRam::open(guest.pid(), &[Guest::backend()]).unwrap_err();
    assert!(matches!(error, MemoryError::NotShared { .. }), "{error:?}");
}

#[test]
fn every_kind_of_shared_memory_is_tracked_and_served() {
    let files = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = format!("memory-backend-file,id=ram,size=64M,share=on,mem-path={}", files.path().join("ram").display());
    for memory in ["memory-backend-ram,id=ram,size=64M,share=on", &file] {
        let mut guest = Guest::start_with(&qemus()[0], memory, |_| {});
        let ram = guest.ram();
        let tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        guest.write(5);
        assert_eq!(take_written(&tracking), vec![5..6; 1], "{memory}");
        drop(tracking);
        ram.blocks()[0].punch(pages(10..20)).unwrap();
        let arrival = Arrival::arm(Arc::clone(&ram)).unwrap();
        guest.begin_read(12);
        assert_eq!(next_faults(&arrival), [(0, 12 * PAGE)], "{memory}");
        arrival.place(0, 12 * PAGE, &[0x42; PAGE_BYTES]).unwrap();
        assert_eq!(guest.answer(), 0x42);
        arrival.disarm().unwrap();
    }
}

/// This program once more, in [`a_process_that_holds_a_guests_ram`].
struct Holder {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Holder {
    /// Returns when it holds the guest's RAM.
    fn start(guest: &Guest, what: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_process_that_holds_a_guests_ram", "--ignored", "--nocapture", "--quiet"])
            .env(HELD, format!("{} {what}", guest.pid()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut holder = Self { child, output };
        assert_eq!(holder.answer(), "holding");
        holder
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it ended");
            if let Some(answer) = line.trim().strip_prefix("holder: ") {
                return answer.to_owned();
            }
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "other tests start it"]
fn a_process_that_holds_a_guests_ram() {
    let Ok(held) = env::var(HELD) else { return };
    let (pid, what) = held.split_once(' ').unwrap();
    let ram = Arc::new(GuestRam::open(pid.parse().unwrap(), &[Guest::backend()]).unwrap());
    let say = |text: String| {
        println!("\nholder: {text}");
        std::io::stdout().flush().unwrap();
    };
    if what == "tracking" {
        let tracking = Tracking::begin(&ram).unwrap();
        tracking.protect(0, 0..RAM_BYTES).unwrap();
        say("holding".into());
        // Until it is killed, or the test has ended.
        let _ = std::io::stdin().read(&mut [0]);
    } else {
        let arrival = Arrival::arm(Arc::clone(&ram)).unwrap();
        say("holding".into());
        say(arrival.number().to_string());
        for (block, offset) in next_faults(&arrival) {
            say(format!("{block} {offset}"));
        }
        let _ = std::io::stdin().read(&mut [0]);
    }
}
