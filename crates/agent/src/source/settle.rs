//! What was under way when an agent ended: the same machine goes on from what the journal holds.

use std::sync::Arc;
use std::time::Duration;

use vmferry_custody::source::{OutStep, Phase};
use vmferry_qemu::{RunState, migration};

use super::custody::{Custody, Hands};
use super::outgoing::Outgoing;
use super::teller::Log;
use crate::engine::{disks, journey};
use crate::host::{Host, Vm};
use crate::journal::OutRecord;
use crate::peers::trust::pinned;

/// How often it is looked whether its VM was found.
const FIND: Duration = Duration::from_millis(50);

/// Takes up what the journal holds; what is due is done from now on.
pub(crate) fn take_up(outgoing: &Arc<Outgoing>, record: OutRecord) {
    tracing::warn!(vm = record.vm, migration = %record.id, step = ?record.step, "was under way when the agent ended");
    let peer = pinned(&outgoing.host, &record.address, record.peer_key);
    let custody = Custody::found(&outgoing.host, record, peer);
    outgoing.is_open(&custody);
    tokio::spawn(settle(Arc::clone(outgoing), custody));
}

/// Its VM, when it was found; none when its QEMU is gone.
async fn found(custody: &Custody) -> Option<Arc<Vm>> {
    loop {
        match custody.vm() {
            Some(vm) => return Some(vm),
            None if !custody.record.instance.is_alive() => return None,
            // What is due begins with its QEMU, too.
            None => tokio::time::sleep(FIND).await,
        }
    }
}

/// While no agent was there. QEMU calls it otherwise when it pauses a guest for its migration; so this can be told where
/// QEMU copies the RAM, and does not do so of a guest that the agent had paused. An agent that copies it says so when it
/// pauses the guest.
async fn was_paused_by_its_user(host: &Host, vm: &Vm) -> bool {
    if vm.spec.measuring {
        return false;
    }
    let is_paused = vm.run_state().await.is_ok_and(|state| state == RunState::Paused);
    if journey::is_sending(vm).is_some() {
        return is_paused && !journey::pauses(vm);
    }
    let features = host.qemus.features_of(vm).await;
    is_paused && features.is_ok_and(|(features, _)| !migration::loses_writes(&features, &vm.accelerator))
}

async fn settle(outgoing: Arc<Outgoing>, custody: Arc<Custody>) {
    let log = Log(custody.record.vm.clone());
    let mut hands = Hands { engine: None, serving: None, audience: &log };
    if custody.record.step == OutStep::CopyRam
        && let Some(vm) = found(&custody).await
    {
        disks::forget(&vm.qmp, &vm.dir).await;
        if was_paused_by_its_user(&outgoing.host, &vm).await {
            custody.wants(false).await;
        }
    }
    custody.look().await;
    custody.drive(&mut hands).await;
    if let Phase::Stranded { .. } = custody.phase() {
        custody.drive(&mut hands).await;
    }
    if let (Phase::Owned, Some(vm)) = (custody.phase(), custody.vm()) {
        disks::forget(&vm.qmp, &vm.dir).await;
    }
    tracing::warn!(
        vm = custody.record.vm,
        migration = %custody.record.id,
        "{}",
        match custody.phase() {
            Phase::Owned => format!("{}; undone: the guest runs on here", custody.why()),
            _ => "was handed over; what was left here is gone".into(),
        }
    );
    outgoing.is_over(&custody).await;
}
