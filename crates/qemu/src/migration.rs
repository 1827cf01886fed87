//! QEMU's own migration: what we use of it, and what is to be known of some of its releases.

use std::collections::BTreeSet;

use crate::qmp::commands::{CapabilityState, MigrateSetCapabilities};
use crate::qmp::{Features, Qmp, QmpError};

/// The capability of QEMU's migration that all depends on: shared RAM stays where it is.
pub const IGNORE_SHARED: &str = "x-ignore-shared";
/// Only at the source: QEMU pauses the guest and waits before it writes the device state.
pub const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";

/// The capabilities that we ever use, but for measurements.
pub const OURS: [&str; 8] = [
    "events",
    "return-path",
    "auto-converge",
    "postcopy-ram",
    "postcopy-preempt",
    "multifd",
    IGNORE_SHARED,
    PAUSE_BEFORE_SWITCHOVER,
];

/// Switches these capabilities on and all others that we ever use off, in one command, as QEMU checks them together.
pub async fn set_capabilities(qmp: &Qmp, known: &BTreeSet<String>, wanted: &[&str]) -> Result<(), QmpError> {
    let others = wanted.iter().filter(|name| !OURS.contains(name));
    let capabilities = OURS
        .iter()
        .chain(others)
        .filter(|name| known.contains(**name))
        .map(|name| CapabilityState { capability: (*name).into(), state: wanted.contains(name) })
        .collect();
    qmp.execute(MigrateSetCapabilities { capabilities }).await?;
    Ok(())
}

/// QEMU's own migration takes shared RAM along again, and stops nowhere.
pub async fn reset_capabilities(qmp: &Qmp) -> Result<(), QmpError> {
    let off = |capability: &str| CapabilityState { capability: capability.into(), state: false };
    qmp.execute(MigrateSetCapabilities { capabilities: vec![off(IGNORE_SHARED), off(PAUSE_BEFORE_SWITCHOVER)] })
        .await?;
    Ok(())
}

/// Whether a guest that is suspended to RAM goes on sleeping where a QEMU with these capabilities moves it, or has it
/// arrive. Before 9.0 its clock stands there, so that it does not wake up.
pub fn carries_sleep(has_capability: impl Fn(&str) -> bool) -> bool {
    is_since_9_0(has_capability)
}

/// Whether the threads of multifd may look for pages of zeroes themselves: where they do, such a page is no more than a
/// number in their packets, which a destination before 9.0 would pass over.
pub fn finds_zeroes_by_multifd(features: &Features, there: impl Fn(&str) -> bool) -> bool {
    features.has_parameter("zero-page-detection") && is_since_9_0(there)
}

/// Told by a capability that this release brought.
fn is_since_9_0(has_capability: impl Fn(&str) -> bool) -> bool {
    has_capability("mapped-ram")
}

/// Whether this QEMU would crash while it copies RAM that lies in blocks of these sizes, in bytes.
///
/// Under TCG, since 9.0: it clears its dirty bitmap in pieces of 1 GiB, and fails an assertion of its own
/// (`tlb_reset_dirty_range_all`) where such a piece reaches beyond a block (seen with 10.0.2). Of several blocks that are
/// no multiples of that, some do and some do not, by where QEMU has put them.
pub fn crashes_copying(features: &Features, accelerator: &str, blocks: &[u64]) -> bool {
    let fits = |bytes: &u64| bytes.is_multiple_of(1 << 30);
    accelerator == "tcg"
        && is_since_9_0(|name| features.has_capability(name))
        && blocks.len() > 1
        && !blocks.iter().all(fits)
}

/// Whether this QEMU fails to notice some of what a running guest writes while its RAM is copied.
///
/// Under TCG, before 9.0: reading the dirty bitmap left translations in place that write without marking the page, so
/// from the second round on a destination can get stale pages, and its guest kernel crashes within a second (seen with
/// 7.2.22; fixed upstream in March 2024, "Fix migration dirty bitmap coherency with TCG memory access"). What does not
/// run writes nothing: such a guest is paused first and moves by post-copy from the first byte.
pub fn loses_writes(features: &Features, accelerator: &str) -> bool {
    accelerator == "tcg" && !is_since_9_0(|name| features.has_capability(name))
}
