//! Ports, the clock, and waiting.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

/// The timer wakes a guest that waits so often a second.
const HZ: u64 = 200;
/// What the timer counts a second.
const PIT_HZ: u64 = 1_193_182;
/// Counts of the timer over which the clock is measured: 17 ms.
const MEASURED: u64 = 20_000;

unsafe extern "C" {
    fn wait_for_interrupt();
}

/// Until the timer's next interrupt.
pub(crate) fn wait() {
    // SAFETY: boot.s halts until an interrupt and comes back.
    unsafe { wait_for_interrupt() }
}

pub(crate) fn out(port: u16, value: u8) {
    // SAFETY: ports of devices that never write memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

pub(crate) fn read_in(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// All at once: each access to a port costs some microseconds.
pub(crate) fn out_all(port: u16, bytes: &[u8]) {
    // SAFETY: as above; it reads these bytes.
    unsafe {
        asm!("rep outsb", inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, in("dx") port,
            options(nostack, preserves_flags, readonly));
    }
}

/// Turns the machine off: ACPI's S5 where firmware puts its port on `pc` and `q35`.
pub(crate) fn off() -> ! {
    let (port, sleep): (u16, u16) = (0x604, 0x2000);
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") sleep, options(nostack, preserves_flags)) }
    loop {
        wait();
    }
}

/// The time stamp counter, from when it was begun. On another host that may be another, but this never goes back.
pub(crate) struct Clock {
    pub(crate) per_ms: u64,
    start: u64,
    last: u64,
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 has it.
    unsafe { _rdtsc() }
}

impl Clock {
    /// Measures it by the timer, and sets that to wake whoever waits.
    pub(crate) fn start() -> Self {
        // The shortest: whoever is interrupted sees the counter go round.
        let per_ms = (0..3).map(|_| measure()).min().unwrap_or(1).max(1);
        set_timer((PIT_HZ / HZ) as u16);
        // Interrupt controllers: interrupts from 0x20 on, of the timer alone.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
            out(port, value);
        }
        for (port, value) in [(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1), (0x21, 0xfe), (0xa1, 0xff)] {
            out(port, value);
        }
        // The local one lets them through, which not every firmware has it do.
        for (address, value) in [(0xfee0_00f0_u64, 0x1ff_u32), (0xfee0_0350, 0x700)] {
            // SAFETY: its registers, which are mapped like all memory.
            unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) }
        }
        Self { per_ms, start: ticks(), last: ticks() }
    }

    /// It is zero now.
    pub(crate) fn begin(&mut self) {
        self.start = ticks();
        self.last = self.start;
    }

    pub(crate) fn now(&mut self) -> u64 {
        let now = ticks();
        if now < self.last {
            self.start = self.start.wrapping_sub(self.last - now);
        }
        self.last = now;
        now.wrapping_sub(self.start)
    }
}

fn set_timer(count: u16) {
    out(0x43, 0x34);
    for byte in count.to_le_bytes() {
        out(0x40, byte);
    }
}

/// Ticks a millisecond.
fn measure() -> u64 {
    // From 65536 down, again and again.
    set_timer(0);
    let start = ticks();
    loop {
        out(0x43, 0);
        let left = u16::from_le_bytes([read_in(0x40), read_in(0x40)]);
        let (gone, end) = (u64::from(0_u16.wrapping_sub(left)), ticks());
        if gone >= MEASURED {
            return (end - start) * (PIT_HZ / 1000) / gone;
        }
    }
}
