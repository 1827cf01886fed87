//! Memory that is promised to guests on their way here.
//!
//! Whoever is admitted takes what it will need at once, under one lock with the decision: of twenty that ask at the same
//! time for memory that is there once, one gets it. What has arrived of it is the host's to count from then on, so that
//! a promise shrinks as the guest's memory becomes resident, and goes when all of it is there, or none will be.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard};

/// What QEMU itself needs beside the guest's RAM, in bytes: its code, its heap, the frame buffer.
const QEMU_OVERHEAD: u64 = 96 << 20;

/// What a guest needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// Its RAM.
    pub(crate) ram: u64,
    /// Of pages of this size, which are set aside for such guests; ordinary memory otherwise.
    pub(crate) huge_page: Option<u64>,
}

/// There is not enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Short {
    /// So many bytes are needed.
    pub(crate) needed: u64,
    /// So many may be used.
    pub(crate) free: u64,
    /// Of pages of this size.
    pub(crate) huge_page: Option<u64>,
}

/// All promises of a host.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    held: Mutex<Vec<Held>>,
}

#[derive(Debug)]
struct Held {
    key: u64,
    need: Need,
    /// The QEMU that fills it.
    pid: Option<u32>,
}

/// Memory that is kept for one guest until this goes.
#[derive(Debug)]
pub(crate) struct Promise {
    of: Arc<Admission>,
    key: u64,
}

impl Admission {
    fn lock(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().expect("no holder of this lock panics")
    }

    /// Keeps memory for a guest, unless less than `reserved` bytes would be left to everybody else.
    pub(crate) fn admit(self: &Arc<Self>, need: Need, reserved: u64) -> Result<Promise, Short> {
        let mut held = self.lock();
        would_fit(&held, need, reserved)?;
        let key = held.iter().map(|it| it.key + 1).max().unwrap_or(0);
        held.push(Held { key, need, pid: None });
        Ok(Promise { of: Arc::clone(self), key })
    }

    /// Whether it would be admitted now; keeps nothing.
    pub(crate) fn look(&self, need: Need, reserved: u64) -> Result<(), Short> {
        would_fit(&self.lock(), need, reserved)
    }
}

impl Promise {
    /// This QEMU fills it from now on.
    pub(crate) fn is_filled_by(&self, pid: u32) {
        if let Some(held) = self.of.lock().iter_mut().find(|it| it.key == self.key) {
            held.pid = Some(pid);
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.of.lock().retain(|it| it.key != self.key);
    }
}

fn would_fit(held: &[Held], need: Need, reserved: u64) -> Result<(), Short> {
    let same = |it: &&Held| it.need.huge_page == need.huge_page;
    let to_come = |it: &Held| match it.need.huge_page {
        // Pages that QEMU has taken, or set aside for itself, are counted as such by the kernel.
        Some(_) if it.pid.is_some_and(|pid| shared_ram(pid).is_some()) => 0,
        Some(_) => it.need.ram,
        None => (it.need.ram + QEMU_OVERHEAD).saturating_sub(it.pid.map_or(0, resident_memory)),
    };
    let promised: u64 = held.iter().filter(same).map(to_come).sum();
    let (needed, there, kept) = match need.huge_page {
        Some(size) => (need.ram, free_huge_pages(size), 0),
        None => (need.ram.saturating_add(QEMU_OVERHEAD), available_memory(), reserved),
    };
    let free = there.saturating_sub(kept).saturating_sub(promised);
    match needed <= free {
        true => Ok(()),
        false => Err(Short { needed, free, huge_page: need.huge_page }),
    }
}

/// Memory that could be used without swapping, in bytes.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    meminfo_available(&text).unwrap_or(0)
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Huge pages of this size that nobody has taken or set aside for himself, in bytes.
fn free_huge_pages(size: u64) -> u64 {
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10);
    let count = |name: &str| {
        let text = std::fs::read_to_string(format!("{dir}/{name}")).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    count("free_hugepages").saturating_sub(count("resv_hugepages")) * size
}

/// Memory that the host has given to this QEMU, in bytes: what it uses, or what its guest's RAM holds, which others may
/// have filled.
pub(crate) fn resident_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let used = kib.and_then(|kib| kib.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10;
    used.max(shared_ram(pid).unwrap_or(0))
}

/// What the file of a guest's RAM holds, in bytes, where it is one that we gave to its QEMU.
fn shared_ram(pid: u32) -> Option<u64> {
    let words = vmferry_qemu::process_command_line(pid);
    let number = words.iter().find_map(|word| word.split("mem-path=/proc/self/fd/").nth(1))?;
    let number: u32 = number.split(',').next()?.parse().ok()?;
    Some(std::fs::metadata(format!("/proc/{pid}/fd/{number}")).ok()?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_the_kernels_words() {
        let text = "MemTotal:       24607360 kB\nMemFree: 1 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo_available(text), Some(23_000_000 << 10));
        assert!(available_memory() > 1 << 20);
    }

    #[test]
    fn of_twenty_at_once_for_memory_that_is_there_once_one_is_admitted() {
        let admission = Arc::new(Admission::default());
        let need = Need { ram: available_memory() / 3 * 2, huge_page: None };
        let admitted: Vec<Promise> = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..20).map(|_| scope.spawn(|| admission.admit(need, 0))).collect();
            asking.into_iter().filter_map(|it| it.join().unwrap().ok()).collect()
        });
        assert_eq!(admitted.len(), 1);
        assert!(admission.look(need, 0).is_err());
        drop(admitted);
        assert!(admission.look(need, 0).is_ok(), "it was given back");
    }

    #[test]
    fn huge_pages_are_counted_apart() {
        let admission = Arc::new(Admission::default());
        let size = 2 << 20;
        let need = Need { ram: free_huge_pages(size) + size, huge_page: Some(size) };
        let short = admission.admit(need, 0).unwrap_err();
        assert_eq!((short.needed, short.huge_page), (need.ram, Some(size)));
        let _other = admission.admit(Need { ram: available_memory() / 3 * 2, huge_page: None }, 0).unwrap();
        assert_eq!(admission.admit(need, 0).unwrap_err().free, short.free, "ordinary memory is none of theirs");
    }
}
