//! What a host hears of a measuring guest, told to whoever measures, on this host or another: lines of JSON.
//!
//! A [`Told`] comes for everything that the guest says, with the moment by this host's monotonic clock, as it arrived
//! from QEMU: what is on its way over a busy link costs the measurement nothing. Twice a second it tells what processors
//! did. An [`Asked`] can be answered at once, to compare the clocks of two hosts, or typed into the guest's console.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use vmferry_qemu::processors::ProcessorUse;

/// What the API's routes upgrade to.
pub const PROTOCOL: &str = "vmferry-witness";
/// The longest line that either side reads, in bytes.
pub const LONGEST_LINE: usize = 1 << 20;

/// What a witness tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// Of the host that it is on; first of all.
    Host(HostFacts),
    /// The guest said this.
    Said {
        /// When, in ns of this host's monotonic clock.
        at_ns: u64,
        /// What. It need not be whole lines.
        text: String,
        /// It was said before somebody listened: only that it was by then is known.
        before: bool,
    },
    /// So much could not be told, as the connection is slower than the guest talks.
    Lost {
        /// Pieces of what it said.
        pieces: u64,
    },
    /// It is now this time.
    Clock {
        /// As it was asked.
        asked: u64,
        /// In ns of this host's monotonic clock.
        at_ns: u64,
    },
    /// What processors did until then. The guest's QEMU and this agent are the first of their kind.
    Processors {
        /// Until when, in ns of this host's monotonic clock.
        at_ns: u64,
        /// What.
        used: ProcessorUse,
    },
}

/// What a witness is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asked {
    /// What time it is; the number comes back.
    Clock(u64),
    /// To type this into the guest's console.
    Type(String),
}

/// What a host is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// What it calls itself.
    pub name: String,
    /// The model of its processor.
    pub model: String,
    /// Processors that can be used.
    pub processors: usize,
    /// Its memory, in bytes.
    pub ram: u64,
    /// Its kernel's release.
    pub kernel: String,
}

impl HostFacts {
    /// Of this host, which calls itself so.
    pub fn read(name: &str) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|it| it.1));
        let total =
            meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
        Self {
            name: name.into(),
            model: model.unwrap_or("unknown").trim().into(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            ram: total.map_or(0, |kib: u64| kib << 10),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
        }
    }
}

/// The monotonic clock, in ns.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
