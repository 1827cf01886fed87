//! What a VM's RAM is made of, for an engine that moves it from outside QEMU: its memory backends, and where QEMU has
//! each of them in its own address space, which tells two of one size apart in `/proc/PID/maps`.
//!
//! QMP tells ids, sizes and what is shared. Which of the backends the guest has, and where, is told to humans only:
//! `info ramblock` has the addresses in newer QEMUs; before, `info mtree` says where in the guest's memory a backend is
//! and `gpa2hva` where that is in QEMU. See QEMU's hmp-commands.hx and hmp-commands-info.hx.

mod monitor;
mod obstacles;

pub use obstacles::{Obstacle, external_obstacles, uses_direct_io};

use std::collections::BTreeMap;

use crate::qmp::commands::{HumanMonitorCommand, QomList, QueryMemdev, QueryMemorySizeSummary};
use crate::qmp::{Qmp, QmpError, open_enum};
use monitor::MappedRange;
pub(crate) use monitor::{NetClient, net_clients, ram_blocks};

/// Where QEMU keeps the objects that its user made.
pub(crate) const OBJECTS: &str = "/objects";

/// What the guest's RAM is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    /// The memory backends that the guest has, whatever gave them to it: the machine, NUMA nodes or DIMMs.
    pub backends: Vec<RamBackend>,
    /// How much of the guest's RAM is in none of them, in bytes; 0 in all but odd machines.
    pub elsewhere: u64,
}

/// One memory backend. A machine that was only given `-m` has one that it made itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBackend {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: BackendKind,
    /// In bytes. The guest may see less of it: an NVDIMM's label is not RAM.
    pub size: u64,
    /// Other processes see what the guest writes.
    pub shared: bool,
    /// Of its pages, in bytes; more than the host's page size means hugetlbfs. Absent when QEMU does not tell.
    pub page_size: Option<u64>,
    /// Of its first byte, in QEMU's address space. Absent when QEMU does not tell.
    pub address: Option<u64>,
}

open_enum! {
    /// What a memory backend is.
    BackendKind {
        /// An anonymous file.
        Memfd = "memory-backend-memfd",
        /// A file with a path.
        File = "memory-backend-file",
        /// Plain memory; when it is shared, an anonymous file all the same.
        Ram = "memory-backend-ram",
        /// POSIX shared memory (9.1 and newer).
        Shm = "memory-backend-shm",
    }
}

/// Asks a QEMU what its guest's RAM is made of. Nothing of it changes unless memory is plugged in or out.
pub async fn ram_backends(qmp: &Qmp) -> Result<RamLayout, QmpError> {
    let memory = qmp.execute(QueryMemorySizeSummary {}).await?;
    let memory = memory.base_memory.saturating_add(memory.plugged_memory.unwrap_or(0));
    let kinds: BTreeMap<String, String> = children(qmp, OBJECTS).await?.into_iter().collect();
    let blocks = monitor::ram_blocks(&ask_if_known(qmp, "info ramblock").await?);
    let ranges = monitor::mapped_ranges(&ask_if_known(qmp, "info mtree -f -o").await?);
    let mut backends = Vec::new();
    for memdev in qmp.execute(QueryMemdev {}).await? {
        // What has no name cannot be asked about, and counts as RAM elsewhere.
        let Some((id, kind)) = memdev.id.and_then(|id| kinds.get_key_value(&id)) else { continue };
        let block = blocks.iter().find(|block| block.name.strip_prefix("/objects/").unwrap_or(&block.name) == id);
        let ranges: Vec<&MappedRange> = ranges.iter().filter(|range| range.backend == *id).collect();
        let address = match block.and_then(|block| block.address) {
            Some(address) => Some(address),
            None => address_of(qmp, &ranges).await?,
        };
        let backend = RamBackend {
            id: id.clone(),
            kind: kind.as_str().into(),
            size: memdev.size,
            shared: memdev.share.unwrap_or(false),
            page_size: block.and_then(|block| block.page_size),
            address,
        };
        backends.push((backend, !ranges.is_empty()));
    }
    Ok(layout(backends, memory))
}

/// The guest has those that are mapped; unless they are not all its memory, and then any may be.
fn layout(backends: Vec<(RamBackend, bool)>, memory: u64) -> RamLayout {
    let sum = |backends: &[RamBackend]| backends.iter().fold(0_u64, |sum, backend| sum.saturating_add(backend.size));
    let mapped = backends.iter().filter(|(_, mapped)| *mapped).map(|(backend, _)| backend.clone()).collect::<Vec<_>>();
    let backends = match sum(&mapped) >= memory {
        true => mapped,
        false => backends.into_iter().map(|(backend, _)| backend).collect(),
    };
    let elsewhere = memory.saturating_sub(sum(&backends));
    RamLayout { backends, elsewhere }
}

/// Where a backend begins, from where any part of it is.
async fn address_of(qmp: &Qmp, ranges: &[&MappedRange]) -> Result<Option<u64>, QmpError> {
    for range in ranges {
        let told = ask_if_known(qmp, &format!("gpa2hva {:#x}", range.guest_address)).await?;
        if let Some(address) = range.backend_address(&told) {
            return Ok(Some(address));
        }
    }
    Ok(None)
}

/// The objects below this one: what each is called, and its type.
pub(crate) async fn children(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let properties = qmp.execute(QomList { path: path.into() }).await?;
    Ok(properties.iter().filter_map(|it| Some((it.name.clone(), it.child_type()?.to_owned()))).collect())
}

/// Asks the monitor for humans. It answers in words even when it does not know what was asked; that is an error here.
async fn ask(qmp: &Qmp, line: &str) -> Result<String, QmpError> {
    let answer = qmp.execute(HumanMonitorCommand { command_line: line.into() }).await?;
    if answer.starts_with("unknown command") {
        return Err(QmpError::Command { command: line.into(), class: "CommandNotFound".into(), desc: answer });
    }
    Ok(answer)
}

/// Asks the monitor for humans; no answer, when this QEMU does not know what was asked.
pub(crate) async fn ask_if_known(qmp: &Qmp, line: &str) -> Result<String, QmpError> {
    match ask(qmp, line).await {
        Err(QmpError::Command { .. }) => Ok(String::new()),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(id: &str, size: u64) -> RamBackend {
        let kind = BackendKind::Memfd;
        RamBackend { id: id.into(), kind, size, shared: true, page_size: None, address: None }
    }

    #[test]
    fn a_backend_that_nothing_uses_is_no_ram_and_nothing_that_may_be_is_left_out() {
        let ids = |layout: &RamLayout| layout.backends.iter().map(|it| it.id.clone()).collect::<Vec<_>>().join(" ");
        let backends = |mapped: [bool; 3]| {
            ["a", "b", "idle"].into_iter().zip(mapped).map(|(id, mapped)| (backend(id, 100), mapped)).collect()
        };
        let told = layout(backends([true, true, false]), 200);
        assert_eq!((ids(&told).as_str(), told.elsewhere), ("a b", 0));
        let half_told = layout(backends([true, false, false]), 200);
        assert_eq!((ids(&half_told).as_str(), half_told.elsewhere), ("a b idle", 0));
        let untold = layout(backends([false; 3]), 1000);
        assert_eq!((ids(&untold).as_str(), untold.elsewhere), ("a b idle", 700));
    }
}
