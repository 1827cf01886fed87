//! What the guest finds itself to be made of: to see from inside what was plugged in, and whether it is still there.

use std::fs;
use std::path::{Path, PathBuf};

/// Takes into use what was plugged in since, and tells of all: processors that run, memory in KiB, and what is on PCI
/// (`1af4:1041 at 0000:01:00.0`).
pub(crate) fn in_words() -> String {
    for processor in below("/sys/devices/system/cpu") {
        take(&processor.join("online"), "0", "1");
    }
    for block in below("/sys/devices/system/memory") {
        take(&block.join("state"), "offline", "online");
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let kib = memory_kib("MemTotal:").unwrap_or(0);
    let mut devices: Vec<String> = below("/sys/bus/pci/devices").iter().filter_map(|device| named(device)).collect();
    devices.sort();
    format!(r#"{{"hardware":{{"cpus":{cpus},"memory_kib":{kib},"pci":["{}"]}}}}"#, devices.join("\",\""))
}

/// One line of what the kernel tells of memory.
pub(crate) fn memory_kib(of: &str) -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(of))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn below(folder: &str) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// What cannot be taken is not counted afterwards.
fn take(file: &Path, idle: &str, used: &str) {
    if fs::read_to_string(file).is_ok_and(|text| text.trim() == idle) {
        let _ = fs::write(file, used);
    }
}

fn named(device: &Path) -> Option<String> {
    let id = |file: &str| Some(fs::read_to_string(device.join(file)).ok()?.trim().trim_start_matches("0x").to_owned());
    Some(format!("{}:{} at {}", id("vendor")?, id("device")?, device.file_name()?.to_str()?))
}
