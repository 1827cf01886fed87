//! One instance of a VM: a process of one boot of this host.

use std::sync::OnceLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Tells a QEMU from every other that there ever was on this host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instance {
    /// The kernel's id of this boot.
    pub boot: String,
    /// The process; 0 while it is not known.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl Instance {
    /// A process of this boot.
    pub fn now(pid: u32, start_time: u64) -> Self {
        Self { boot: boot_id().into(), pid, start_time }
    }

    /// It still runs. Whatever an earlier boot had does not.
    pub fn is_alive(&self) -> bool {
        // Of rows that an earlier version wrote the boot is not known.
        (self.boot.is_empty() || self.boot == boot_id()) && vmferry_qemu::is_same_process(self.pid, self.start_time)
    }

    /// Ends it, if it still runs; its QEMU has this long to end by itself.
    pub async fn end(&self, grace: Duration) {
        if self.is_alive() {
            vmferry_qemu::kill_process(self.pid, self.start_time, grace).await;
        }
    }
}

/// The kernel's id of this boot.
fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into())
}
