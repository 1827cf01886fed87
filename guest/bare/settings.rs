//! What the guest is told at boot, by the PVH start information (Xen's `hvm_start_info`) and the command line in it.
//!
//! The host's side of this is `crates/bench/src/guest.rs`.

use core::ffi::{CStr, c_char};

use crate::memory::PAGE;

/// What is rewritten ends here at the latest: below the hole for devices on every machine type.
const LIMIT: u64 = 3 << 30;
/// And begins here.
pub(crate) const MEMORY: u64 = 16 << 20;
/// Of a region that is RAM.
const RAM: u32 = 1;

#[repr(C)]
pub(crate) struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
}

#[repr(C)]
struct Region {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Which pages are rewritten, and in which order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Idle,
    Read,
    Write,
    Random,
    HotCold,
    /// Reads all while it must not write, and writes at random.
    Mixed,
}

impl Mode {
    const ALL: [Self; 6] = [Self::Idle, Self::Read, Self::Write, Self::Random, Self::HotCold, Self::Mixed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Read => "read",
            Self::Write => "write",
            Self::Random => "random",
            Self::HotCold => "hotcold",
            Self::Mixed => "mixed",
        }
    }
}

pub(crate) struct Settings {
    pub(crate) pages: u64,
    pub(crate) mode: Mode,
    /// In bytes a second; none: as much as it can.
    pub(crate) rate: Option<u64>,
    pub(crate) ram_end: u64,
}

impl Settings {
    pub(crate) fn read(info: &StartInfo) -> Self {
        let at = core::ptr::with_exposed_provenance::<c_char>(info.command_line as usize);
        // SAFETY: who started us has put it there.
        let line = unsafe { CStr::from_ptr(at) }.to_str().unwrap_or("");
        let mut settings = Self { pages: 0, mode: Mode::Write, rate: None, ram_end: ram_end(info) };
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("vmferry.mem", value)) => settings.pages = value.parse().unwrap_or(0) / PAGE,
                Some(("vmferry.rate", value)) => settings.rate = value.parse().ok().filter(|rate| *rate > 0),
                Some(("vmferry.mode", value)) => {
                    settings.mode = Mode::ALL.into_iter().find(|mode| mode.name() == value).unwrap_or(Mode::Write);
                }
                _ => {}
            }
        }
        settings
    }
}

/// The end of the RAM that has what is rewritten.
fn ram_end(info: &StartInfo) -> u64 {
    if info.version == 0 {
        return 0;
    }
    let at = core::ptr::with_exposed_provenance::<Region>(info.memory_map as usize);
    // SAFETY: who started us has put it there.
    let regions = unsafe { core::slice::from_raw_parts(at, info.memory_map_entries as usize) };
    let has = |it: &&Region| it.kind == RAM && it.address <= MEMORY && it.address + it.size > MEMORY;
    regions.iter().find(has).map_or(0, |it| (it.address + it.size).min(LIMIT))
}
