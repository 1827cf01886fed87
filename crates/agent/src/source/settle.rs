//! What was under way when an agent ended, or cannot be ended now: it is tried until it is settled.
//!
//! The journal tells which step had begun. Before the commit everything is undone. In the commit only the destination
//! knows who owns the guest, so it is asked until it answers. After the commit there is only forward.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_policy::Limits;
use vmferry_qemu::qmp::commands::QueryMigrate;

use super::commit::settle_commit;
use super::post_copy::{Way, follow_post_copy};
use super::retire::{retire, strand};
use crate::engine::external::{self, ExternalEngine, WayThere};
use crate::engine::movable::backends_of;
use crate::engine::qemu::{self, QemuEngine};
use crate::engine::{EngineError, RamEngine, Setup, journey};
use crate::error::AgentError;
use crate::host::{Host, Stage, Vm};
use crate::journal::{OutRecord, OutStep};
use crate::peers::Peer;
use crate::peers::relay::Relay;
use crate::peers::trust::pinned;

/// For how long the destination is asked to abandon; then its own lease must do it.
const ABANDON_TRIES: u32 = 20;
/// Between two tries to settle a migration.
const SETTLE_AGAIN: Duration = Duration::from_secs(5);

/// Tries until it is settled: the guest must not stay half-way because its QEMU was slow to answer once.
pub(crate) async fn settle(host: Arc<Host>, record: OutRecord) {
    let peer = pinned(&host, &record.address, record.peer_key);
    let mut told = false;
    loop {
        let outcome = match host.vm(&record.vm) {
            Ok(vm) if vm.is_alive() => settle_step(&host, &vm, &peer, &record).await,
            Err(_) if host.lives(&record.vm) => {
                Err(AgentError::Conflict { message: format!("{}'s QEMU does not answer", record.vm), hint: None })
            }
            vm => settle_without_vm(&host, vm.ok().as_deref(), &peer, &record).await,
        };
        let Err(error) = outcome else { return };
        if !std::mem::replace(&mut told, true) {
            tracing::error!(vm = record.vm, migration = %record.id, error = in_one_line(&error), "cannot be settled yet");
        }
        tokio::time::sleep(SETTLE_AGAIN).await;
    }
}

/// The source's QEMU is gone: nothing is left to hand over, and what was handed over stays where it is.
async fn settle_without_vm(host: &Host, vm: Option<&Vm>, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
    let note = |text: String| tracing::warn!(vm = record.vm, migration = %record.id, "{text}");
    let handed_over = match record.step {
        OutStep::PostCopy | OutStep::Retire => true,
        // The destination may have all of the guest.
        OutStep::Commit => settle_commit(peer, record.id, note).await.is_ok(),
        _ => {
            abandon_there(peer, record.id).await;
            false
        }
    };
    let (step, outcome) = match handed_over {
        true => (OutStep::Done, "the guest was handed over; its QEMU here is gone"),
        false => (OutStep::Abandoned, "the guest's QEMU at the source ended while no agent was there"),
    };
    host.store.end_out(record.id, step, outcome)?;
    match vm {
        Some(vm) if handed_over => host.forget_vm(vm),
        // Whoever watches it has waited for this to tell its end.
        Some(vm) => {
            vm.set_stage(Stage::Owned);
            Ok(())
        }
        None => Ok(()),
    }
}

async fn settle_step(host: &Host, vm: &Vm, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
    let note = |text: String| tracing::warn!(vm = vm.name(), migration = %record.id, "{text}");
    match record.step {
        OutStep::Prepare | OutStep::CopyRam if !has_let_go(vm).await? => {
            undo(host, vm, peer, record, "the agent ended while it was under way").await
        }
        OutStep::Prepare | OutStep::CopyRam | OutStep::Commit => {
            vm.set_stage(Stage::InDoubt(record.id));
            host.store.step_out(record.id, OutStep::Commit)?;
            match settle_commit(peer, record.id, note).await {
                Ok(()) => retire_after_post_copy(host, vm, peer, record).await,
                Err(why) => undo(host, vm, peer, record, &why).await,
            }
        }
        OutStep::PostCopy => retire_after_post_copy(host, vm, peer, record).await,
        OutStep::Retire => retire(host, vm, record.id).await,
        OutStep::Done | OutStep::Abandoned => Ok(()),
    }
}

/// QEMU has let go of the guest for post-copy: only the destination can have it.
async fn has_let_go(vm: &Vm) -> Result<bool, AgentError> {
    let status = vm.qmp.execute(QueryMigrate {}).await?.status;
    Ok(status.is_some_and(|status| status.is_post_copy()))
}

/// The guest runs on here; the destination forgets.
async fn undo(host: &Host, vm: &Vm, peer: &Peer, record: &OutRecord, why: &str) -> Result<(), AgentError> {
    vm.set_stage(Stage::Migrating(record.id));
    match qemu::abandon(&vm.qmp, record.running).await {
        Err(EngineError::TooLate) => {
            return strand(host, vm, record.id, &format!("QEMU here had let go of it, and {why}"));
        }
        other => other?,
    }
    vm.set_stage(Stage::Owned);
    let there = match abandon_there(peer, record.id).await {
        true => "what the destination had prepared is gone",
        false => "the destination does not answer, but drops what it had prepared by itself",
    };
    let outcome = format!("{why}; undone: the guest runs on here, {there}");
    tracing::warn!(vm = vm.name(), migration = %record.id, "{outcome}");
    Ok(host.store.end_out(record.id, OutStep::Abandoned, &outcome)?)
}

/// False when the destination does not answer.
pub(crate) async fn abandon_there(peer: &Peer, id: Uuid) -> bool {
    for _ in 0..ABANDON_TRIES {
        if peer.abandon(id).await.is_ok() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    false
}

async fn retire_after_post_copy(host: &Host, vm: &Vm, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
    vm.set_stage(Stage::Left(record.id));
    host.store.step_out(record.id, OutStep::PostCopy)?;
    let note = |text: String| tracing::warn!(vm = vm.name(), migration = %record.id, "{text}");
    let relay = match Relay::was_open(vm) {
        true => Some(Relay::open(vm, peer.clone(), record.id)?),
        false => None,
    };
    let (mut engine, way) = match (journey::is_sending(vm), &relay) {
        (Some(_), _) => (Box::new(resumed_external(host, vm, record).await?) as Box<dyn RamEngine>, Way::Link),
        (None, Some(relay)) => (resumed_qemu(host, vm, record).await?, Way::Relayed(relay.uri().into())),
        (None, None) => (resumed_qemu(host, vm, record).await?, Way::Direct(peer.hello().await?.ip())),
    };
    if let Err(why) = follow_post_copy(engine.as_mut(), peer, record.id, &way, note, |_| {}).await {
        return strand(host, vm, record.id, &why);
    }
    engine.close().await;
    host.store.step_out(record.id, OutStep::Retire)?;
    retire(host, vm, record.id).await?;
    tracing::info!(vm = vm.name(), migration = %record.id, "was handed over; what was left here is gone");
    Ok(())
}

/// Nothing is left to decide in post-copy.
const NO_LIMITS: Limits = Limits { downtime: Duration::ZERO, max_time: None, post_copy: true };

async fn resumed_qemu(host: &Host, vm: &Vm, record: &OutRecord) -> Result<Box<dyn RamEngine>, AgentError> {
    let (features, _) = host.qemus.features_of(vm).await?;
    let (uri, setup) = (String::new(), Setup::default());
    let wishes =
        qemu::Wishes { uri, limits: NO_LIMITS, bandwidth: None, setup, post_copy_first: false, scripted: false };
    Ok(Box::new(QemuEngine::new(vm.qmp.clone(), features, record.running, wishes)))
}

async fn resumed_external(host: &Host, vm: &Vm, record: &OutRecord) -> Result<ExternalEngine, AgentError> {
    let plain = journey::is_sending(vm) == Some(true);
    let wishes = external::Wishes {
        pid: vm.pid,
        backends: backends_of(vm).await?,
        dir: journey::sending_dir(vm),
        way: WayThere {
            address: record.address.clone(),
            identity: Arc::clone(&host.trusts.identity),
            peer: record.peer_key,
            protection: (!plain).then_some(None),
        },
        limits: NO_LIMITS,
        besides: Duration::ZERO,
        bandwidth: None,
        delta_cache: 0,
        was_running: record.running,
        stops_first: true,
    };
    Ok(ExternalEngine::in_post_copy(vm.qmp.clone(), wishes))
}
