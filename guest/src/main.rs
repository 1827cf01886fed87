//! The measuring guest: the only program of a Linux guest, its /init, which writes memory and tells whether it survived.
//!
//! A migration is measured from outside, by what this guest says on its serial port: a heartbeat every 5 ms (a gap in
//! it is time that the guest lost), how long each 64 MiB of rewriting took, and `CORRUPT` for every page that does not
//! hold what was last written to it. If it is to, it does the same with a disk ([`disk`]). It is told what to do on the
//! kernel's command line ([`settings`]) and, while it runs, by lines on its serial port: `verify`, `hardware`, `suspend` and
//! `poweroff`.
//!
//! Nothing but the standard library, and the C library linked in: it is the whole of an initrd.

mod console;
mod disk;
mod hardware;
mod heartbeat;
mod kernel;
mod pages;
mod power;
mod settings;
mod writer;

use std::fs;
use std::sync::{Arc, mpsc};
use std::thread;

use console::Console;
use disk::Disk;
use pages::{PAGE_BYTES, Pattern};
use settings::Settings;
use writer::{Shared, Writer};

/// What a guest needs beside the memory it rewrites: page tables and the expected sequence numbers (both grow with that
/// memory), the template of the pages, stacks, and the kernel's own reserve.
const RESERVE_BYTES: u64 = 24 << 20;

fn main() {
    // Without /proc, /dev or the serial port there is nobody to tell; the kernel panics when init ends.
    kernel::mount("proc", "/proc", "proc").expect("the kernel has /proc");
    kernel::mount("devtmpfs", "/dev", "devtmpfs").expect("the kernel has devtmpfs");
    kernel::mount("sysfs", "/sys", "sysfs").expect("the kernel has sysfs");
    let (console, commands) = Console::open("/dev/ttyS0").expect("the guest has a serial port, ttyS0");
    let console = Arc::new(console);

    let command_line = fs::read_to_string("/proc/cmdline").expect("/proc is mounted");
    match Settings::parse(&command_line).and_then(|settings| prepare(&settings, &console)) {
        Ok(verifications) => obey(&console, commands, &verifications),
        Err(message) => {
            console.say(&format!(r#"{{"error":"{message}"}}"#));
            power::off(&console);
        }
    }
}

/// Fills the memory, says `ready`, and starts heartbeat and writers. Verifications are asked for with what it returns.
fn prepare(settings: &Settings, console: &Arc<Console>) -> Result<mpsc::Sender<()>, String> {
    let threads = settings.threads;
    let pages_each = settings.mem / PAGE_BYTES as u64 / u64::from(threads);
    if pages_each == 0 {
        return Err(format!("vmferry.mem={} is less than a page for each of {threads} threads", settings.mem));
    }
    let needed = settings.mem + settings.mem / 256 + RESERVE_BYTES;
    let available = available_memory().ok_or("/proc/meminfo does not tell how much memory is available")?;
    if needed > available {
        return Err(format!(
            "vmferry.mem={}M does not fit: {}M of this guest's RAM are available, {}M would be needed",
            settings.mem >> 20,
            available >> 20,
            needed.div_ceil(1 << 20),
        ));
    }
    let pages_each = usize::try_from(pages_each).map_err(|_| "vmferry.mem is more than can be addressed")?;
    let memory = kernel::anonymous_memory(pages_each * threads as usize)
        .map_err(|error| format!("vmferry.mem={}M cannot be mapped: {error}", settings.mem >> 20))?;

    let disk = settings.disk.map(Disk::find).transpose()?;

    let pattern = Arc::new(Pattern::new(settings.fill));
    let shared = Arc::new(Shared::new(Arc::clone(console), threads));
    let writers: Vec<_> = memory
        .chunks_exact_mut(pages_each)
        .enumerate()
        .map(|(thread, part)| Writer::new(thread, part, Arc::clone(&pattern), Arc::clone(&shared), settings))
        .collect();
    let filling: Vec<_> = writers.into_iter().map(|writer| thread::spawn(|| writer.fill())).collect();
    let filled: Vec<_> =
        filling.into_iter().map(|thread| thread.join().expect("a panic would have ended us")).collect();

    power::watch_button(Arc::clone(console));
    console.say(&format!(
        r#"{{"ready":{{"mem":{},"threads":{threads},"mode":"{}"}}}}"#,
        settings.mem,
        settings.mode.name()
    ));
    heartbeat::start(Arc::clone(console))?;
    if let Some(disk) = disk {
        disk.start(Arc::clone(console));
    }
    for writer in filled {
        thread::spawn(move || writer.run());
    }
    let (ask, asked) = mpsc::channel();
    thread::spawn(move || {
        for () in asked {
            shared.verify_all();
        }
    });
    Ok(ask)
}

/// Does what lines on the serial port say, for ever.
fn obey(console: &Console, commands: console::Commands, verifications: &mpsc::Sender<()>) {
    for command in commands {
        match command.as_str() {
            "verify" => verifications.send(()).expect("the verifying thread never ends"),
            "hardware" => console.say(&hardware::in_words()),
            "suspend" => power::suspend(console),
            "poweroff" => power::off(console),
            "" => {}
            unknown => {
                let readable: String = unknown.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
                console.say(&format!(r#"{{"error":"unknown command {readable}"}}"#));
            }
        }
    }
}

fn available_memory() -> Option<u64> {
    Some(hardware::memory_kib("MemAvailable:")? * 1024)
}
