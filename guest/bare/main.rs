//! The measuring guest without a kernel: for a KVM that runs nothing but 64-bit programs at the processor's speed, and
//! emulates a guest's kernel (PVM, as in some clouds). Such a guest shows what KVM does to a migration, which software
//! emulation does not. It speaks the lines that `guest/src` speaks (see `crates/bench/src/log.rs`), and obeys `verify` and
//! `poweroff`. Of what a command line may say it knows `vmferry.mem`, `.mode` and `.rate`; it has one processor.
//!
//! `boot.s` gets to ring 3 by as few instructions as possible, and all else happens here, in ring 3: ports by the I/O
//! bitmap, the clock by `rdtsc` (under such a KVM that is the host's, which goes on while a guest is paused). Interrupts
//! are off but in [`wait`], where a timer wakes it 200 times a second. There is no allocator; what it rewrites begins at
//! 16 MiB, up to 3 GiB.

#![no_std]
#![no_main]

mod cpu;
mod memory;
mod pages;
mod serial;
mod settings;

use core::arch::global_asm;
use core::fmt::Write;

use cpu::Clock;
use pages::Pages;
use serial::Serial;
use settings::{Mode, Settings, StartInfo};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// Beats follow each other by so much.
const PERIOD_MS: u64 = 5;
/// What is rewritten, or read, is reported each time after so many pages: 64 MiB.
const REPORT: u64 = 16 << 10;
/// How much is rewritten in one go before the clock is read, at a rate.
const FORGIVEN_MS: u64 = 50;

/// Counts pages of one kind of work.
struct Tally {
    what: &'static str,
    pages: u64,
    since: u64,
}

struct Guest {
    serial: Serial,
    clock: Clock,
    pages: Pages,
    slot: u64,
    next_beat: u64,
}

impl Guest {
    /// Beats when it is time for it, and leaves out the numbers of beats that it is too late for.
    fn beat(&mut self) {
        if self.clock.now() < self.next_beat {
            return;
        }
        let _ = writeln!(self.serial, r#"{{"beat":{}}}"#, self.slot);
        let period = PERIOD_MS * self.clock.per_ms;
        self.slot = (self.slot + 1).max(self.clock.now().div_ceil(period));
        self.next_beat = self.slot * period;
        self.serial.talk();
    }

    /// One more page; tells each 64 MiB, and sends what there is to send once in a while.
    fn count(&mut self, tally: &mut Tally) {
        tally.pages += 1;
        if tally.pages % REPORT == 0 {
            let now = self.clock.now();
            let us = (now - tally.since) * 1000 / self.clock.per_ms;
            tally.since = now;
            let (n, pass) = (tally.pages / REPORT, tally.pages / self.pages.count());
            let (what, ms, tenths) = (tally.what, us / 1000, us / 100 % 10);
            let _ = writeln!(self.serial, r#"{{"{what}":{{"thread":0,"n":{n},"ms":{ms}.{tenths},"pass":{pass}}}}}"#);
            self.serial.talk();
        } else if tally.pages % 16 == 0 && self.serial.has_more() {
            self.serial.talk();
        }
    }

    fn obey(&mut self) {
        if core::mem::take(&mut self.serial.wants.verify) {
            let before = self.pages.corrupt;
            for number in 0..self.pages.count() {
                self.pages.verify(number, &mut self.serial);
                if number % 64 == 0 {
                    self.beat();
                }
            }
            let (pages, total) = (self.pages.count(), self.pages.corrupt);
            let corrupt = total - before;
            let _ = writeln!(self.serial, r#"{{"verified":{{"pages":{pages},"corrupt":{corrupt},"total":{total}}}}}"#);
        }
        if self.serial.wants.off {
            self.serial.drain();
            cpu::off();
        }
    }
}

/// Called by `boot.s`, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn main(info: &StartInfo) -> ! {
    let mut serial = Serial::open();
    let clock = Clock::start();
    let settings = Settings::read(info);
    let Some(pages) = Pages::fill(settings.pages, settings.ram_end) else {
        let _ = writeln!(serial, r#"{{"error":"vmferry.mem does not fit: RAM ends at {}M"}}"#, settings.ram_end >> 20);
        serial.drain();
        cpu::off();
    };
    let (mem, mode) = (settings.pages * memory::PAGE, settings.mode.name());
    let _ = writeln!(serial, r#"{{"ready":{{"mem":{mem},"threads":1,"mode":"{mode}"}}}}"#);
    let mut guest = Guest { serial, clock, pages, slot: 0, next_beat: 0 };
    guest.clock.begin();
    work(&mut guest, &settings)
}

fn work(guest: &mut Guest, settings: &Settings) -> ! {
    let mut order = pages::Order::new(settings.mode, guest.pages.count());
    let mut written = Tally { what: "written", pages: 0, since: guest.clock.now() };
    let mut read = Tally { what: "read", pages: 0, since: guest.clock.now() };
    let mut due = guest.clock.now();
    loop {
        guest.beat();
        guest.obey();
        let writes = match settings.mode {
            Mode::Idle | Mode::Read => false,
            // One that also reads does so while it must not write.
            Mode::Mixed | Mode::Write | Mode::Random | Mode::HotCold => {
                settings.rate.is_none() || guest.clock.now() >= due
            }
        };
        if writes {
            let page = order.next();
            guest.pages.rewrite(page, &mut guest.serial);
            guest.count(&mut written);
            if let Some(rate) = settings.rate {
                due += memory::PAGE * guest.clock.per_ms * 1000 / rate;
                let now = guest.clock.now();
                if now > due + FORGIVEN_MS * guest.clock.per_ms {
                    due = now;
                }
            }
        } else if matches!(settings.mode, Mode::Read | Mode::Mixed) {
            let page = read.pages % guest.pages.count();
            guest.pages.verify(page, &mut guest.serial);
            guest.count(&mut read);
        } else if guest.serial.has_more() {
            guest.serial.talk();
        } else {
            cpu::wait();
            guest.serial.talk();
        }
    }
}

/// Called by `boot.s`, in ring 0: a fault is a bug of ours. frame: vector, error code, rip, cs, flags, rsp, ss.
#[unsafe(no_mangle)]
extern "C" fn fault_main(frame: &[u64; 7], cr2: u64) {
    let [vector, error, rip, ..] = frame;
    let mut serial = Serial::open();
    let _ = writeln!(serial, r#"{{"error":"fault {vector} ({error}) at {rip:x}, {cr2:x}"}}"#);
    serial.drain();
    cpu::off();
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let mut serial = Serial::open();
    let line = info.location().map_or(0, core::panic::Location::line);
    let _ = writeln!(serial, r#"{{"error":"a panic at line {line}"}}"#);
    serial.drain();
    cpu::off();
}
