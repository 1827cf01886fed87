//! The kernel's services that the standard library does not offer, behind safe functions.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{ptr, slice};

use crate::pages::{PAGE_BYTES, Page};

// Values and layouts of x86-64 Linux, from its uapi headers and the C library's.
const PROT_READ_WRITE: c_int = 1 | 2;
const MAP_PRIVATE_ANONYMOUS: c_int = 0x02 | 0x20;
const MAP_HUGETLB: c_int = 0x4_0000;
const SCHED_FIFO: c_int = 1;
const CLOCK_MONOTONIC: c_int = 1;
const TIMER_ABSTIME: c_int = 1;
const TCSANOW: c_int = 0;
const RB_POWER_OFF: c_int = 0x4321_fedc;

#[repr(C)]
struct SchedParam {
    priority: c_int,
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: c_long,
}

/// The C library's `struct termios`, which only its own functions look into; it has 60 bytes.
#[repr(C, align(8))]
struct Termios([u8; 128]);

unsafe extern "C" {
    #[link_name = "mount"]
    fn c_mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn mmap(at: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn sched_setscheduler(pid: c_int, policy: c_int, param: *const SchedParam) -> c_int;
    fn clock_gettime(clock: c_int, now: *mut Timespec) -> c_int;
    fn clock_nanosleep(clock: c_int, flags: c_int, until: *const Timespec, left: *mut Timespec) -> c_int;
    fn tcgetattr(fd: c_int, termios: *mut Termios) -> c_int;
    fn tcsetattr(fd: c_int, when: c_int, termios: *const Termios) -> c_int;
    fn cfmakeraw(termios: *mut Termios);
    fn tcdrain(fd: c_int) -> c_int;
    fn reboot(what: c_int) -> c_int;
    fn ioperm(from: c_ulong, count: c_ulong, on: c_int) -> c_int;
}

fn checked(result: c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mounts a file system that needs no device.
pub(crate) fn mount(source: &str, target: &str, kind: &str) -> io::Result<()> {
    let [source, target, kind] = [CString::new(source)?, CString::new(target)?, CString::new(kind)?];
    // SAFETY: three strings that end in zero and live until after the call; these file systems take no data.
    checked(unsafe { c_mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, ptr::null()) })
}

/// Memory of its own, zero, not yet backed, for as long as the guest runs.
pub(crate) fn anonymous_memory(pages: usize) -> io::Result<&'static mut [Page]> {
    let bytes = pages.checked_mul(PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping where the kernel likes it touches no memory that exists.
    let start = unsafe { mmap(ptr::null_mut(), bytes, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0) };
    if start.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has that length, is page-aligned, zero is a valid u64, nobody else has it, nobody unmaps it.
    Ok(unsafe { slice::from_raw_parts_mut(start.cast::<Page>(), pages) })
}

/// Gives the calling thread real-time priority.
pub(crate) fn run_ahead_of_others() -> io::Result<()> {
    let param = SchedParam { priority: 50 };
    // SAFETY: reads the struct, which lives until after the call.
    checked(unsafe { sched_setscheduler(0, SCHED_FIFO, &raw const param) })
}

/// The monotonic clock, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: writes the struct. It cannot fail with this clock.
    unsafe { clock_gettime(CLOCK_MONOTONIC, &raw mut now) };
    now.seconds.unsigned_abs() * 1_000_000_000 + now.nanoseconds.unsigned_abs()
}

/// Sleeps until the monotonic clock shows this.
pub(crate) fn sleep_until(ns: u64) {
    let until = Timespec {
        seconds: i64::try_from(ns / 1_000_000_000).expect("a 64th of the range"),
        nanoseconds: c_long::try_from(ns % 1_000_000_000).expect("less than a second"),
    };
    // SAFETY: reads the struct; an absolute sleep writes no rest. Interrupted (by a signal, and there are none) it goes on.
    while unsafe { clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &raw const until, ptr::null_mut()) } != 0 {}
}

/// Makes a terminal pass bytes as they are, without echo.
pub(crate) fn make_terminal_raw(port: &File) -> io::Result<()> {
    let mut termios = Termios([0; 128]);
    let fd = port.as_raw_fd();
    // SAFETY: an open descriptor and a struct larger than the C library's, which lives until after the calls.
    unsafe {
        checked(tcgetattr(fd, &raw mut termios))?;
        cfmakeraw(&raw mut termios);
        checked(tcsetattr(fd, TCSANOW, &raw const termios))
    }
}

/// Waits until a terminal has sent what was written to it.
pub(crate) fn drain_terminal(port: &File) {
    // SAFETY: an open descriptor.
    unsafe { tcdrain(port.as_raw_fd()) };
}

/// Turns the machine off. Only for pid 1, which this is.
pub(crate) fn power_off() -> ! {
    // SAFETY: does not come back when it works; it touches no memory of ours.
    unsafe { reboot(RB_POWER_OFF) };
    // Then the kernel panics, as init is gone, and that ends the machine too.
    std::process::abort();
}

/// Memory that a device can be told of: 2 MiB in one piece, which stay where they are.
pub(crate) struct PinnedMemory {
    pub(crate) words: &'static [AtomicU64],
    /// Where it begins for devices.
    pub(crate) physical: u64,
}

impl PinnedMemory {
    const BYTES: usize = 2 << 20;

    pub(crate) fn allocate() -> io::Result<PinnedMemory> {
        std::fs::write("/proc/sys/vm/nr_hugepages", "1")?;
        let flags = MAP_PRIVATE_ANONYMOUS | MAP_HUGETLB;
        // SAFETY: a new mapping where the kernel likes it touches no memory that exists.
        let start = unsafe { mmap(ptr::null_mut(), Self::BYTES, PROT_READ_WRITE, flags, -1, 0) };
        if start.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping has that length, is page-aligned, zero is a valid AtomicU64, nobody unmaps it; devices
        // change it, and words that may change at any time are what atomics are for.
        let words = unsafe { slice::from_raw_parts(start.cast::<AtomicU64>(), Self::BYTES / 8) };
        words[0].store(0, Ordering::SeqCst);
        // Documentation/admin-guide/mm/pagemap.rst: 64 bits a page, of which the lower 55 are its number.
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, (start.addr() / PAGE_BYTES * 8) as u64)?;
        let page = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        if page == 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(PinnedMemory { words, physical: page * PAGE_BYTES as u64 })
    }
}

/// The I/O ports of a device, for the thread that was allowed them.
pub(crate) struct IoPorts {
    first: u16,
    count: u16,
    /// Other threads are not allowed them.
    _of_one_thread: PhantomData<*mut ()>,
}

impl IoPorts {
    pub(crate) fn allow(first: u16, count: u16) -> io::Result<IoPorts> {
        // SAFETY: allows this thread some ports.
        checked(unsafe { ioperm(c_ulong::from(first), c_ulong::from(count), 1) })?;
        Ok(IoPorts { first, count, _of_one_thread: PhantomData })
    }

    fn port(&self, offset: u16, bytes: u16) -> u16 {
        assert!(offset + bytes <= self.count, "the device has no such register");
        self.first + offset
    }

    pub(crate) fn read_u16(&self, offset: u16) -> u16 {
        let port = self.port(offset, 2);
        let value: u16;
        // SAFETY: the thread is allowed the port, which reaches a device.
        unsafe { std::arch::asm!("in ax, dx", out("ax") value, in("dx") port, options(nostack, preserves_flags)) };
        value
    }

    pub(crate) fn write_u8(&self, offset: u16, value: u8) {
        let port = self.port(offset, 1);
        // SAFETY: the thread is allowed the port; what the device does to memory then is only to what it was told of.
        unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
    }

    pub(crate) fn write_u16(&self, offset: u16, value: u16) {
        let port = self.port(offset, 2);
        // SAFETY: as above.
        unsafe { std::arch::asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
    }

    pub(crate) fn write_u32(&self, offset: u16, value: u32) {
        let port = self.port(offset, 4);
        // SAFETY: as above.
        unsafe { std::arch::asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
    }
}

/// Sets bits in a 16-bit register behind an I/O port.
pub(crate) fn set_port_bits(port: u16, bits: u16) -> io::Result<()> {
    // SAFETY: allows this thread two ports.
    checked(unsafe { ioperm(c_ulong::from(port), 2, 1) })?;
    // SAFETY: the ports were allowed just now; they reach a device, not memory.
    unsafe {
        let mut value: u16;
        std::arch::asm!("in ax, dx", out("ax") value, in("dx") port, options(nomem, nostack, preserves_flags));
        value |= bits;
        std::arch::asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags));
    }
    Ok(())
}
