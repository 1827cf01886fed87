//! What an agent does, when it starts, with what its predecessor left: VMs that run on, and migrations in any step.
//!
//! The journal tells which step had begun. Before the commit everything is undone. In the commit only the destination
//! knows who owns the guest, so it is asked until it answers. After the commit there is only forward.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_policy::Limits;
use vmferry_qemu::Qmp;
use vmferry_qemu::qmp::commands::QueryMigrate;

use crate::Agent;
use crate::engine::external::{self, ExternalEngine, WayThere};
use crate::engine::qemu::{self, QemuEngine};
use crate::engine::{EngineError, RamEngine, Setup};
use crate::error::AgentError;
use crate::incoming::{Incoming, arrival, set_running, watch_lease};
use crate::migration::{Way, follow_post_copy, retire, settle_commit, strand};
use crate::peer::Peer;
use crate::relay::Relay;
use crate::store::{InStep, OutRecord, OutStep, VmRecord};
use crate::trust::pinned;
use crate::vm::{GRACE, Stage, Vm, pid_from_file};

/// How long the monitor of a QEMU that lives may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For how long the destination is asked to abandon; then its own lease must do it.
const ABANDON_TRIES: u32 = 20;
/// Between two tries to settle a migration.
const SETTLE_AGAIN: Duration = Duration::from_secs(5);

/// Finds the VMs again and goes on with what had begun.
pub(crate) async fn recover(agent: &Arc<Agent>) -> Result<(), AgentError> {
    for record in agent.store.vms()? {
        let name = record.spec.name.clone();
        if let Err(error) = find_again(agent, record.clone()).await {
            tracing::error!(vm = name, error = in_one_line(&error), "runs, but does not answer yet");
            tokio::spawn(find_later(Arc::clone(agent), record));
        }
    }
    for record in agent.store.unfinished_out()? {
        if let Ok(vm) = agent.vm(&record.vm) {
            vm.set_stage(Stage::Migrating(record.id));
        }
        tracing::warn!(vm = record.vm, migration = %record.id, step = ?record.step, "was under way when the agent ended");
        tokio::spawn(settle(Arc::clone(agent), record));
    }
    Ok(())
}

/// A QEMU whose migration stands still may not answer for long.
async fn find_later(agent: Arc<Agent>, record: VmRecord) {
    let Ok(_name) = agent.reserve_name(&record.spec.name) else { return };
    loop {
        tokio::time::sleep(SETTLE_AGAIN).await;
        match find_again(&agent, record.clone()).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(vm = record.spec.name, error = in_one_line(&error), "does not answer yet"),
        }
    }
}

async fn find_again(agent: &Arc<Agent>, mut record: VmRecord) -> Result<(), AgentError> {
    let name = record.spec.name.clone();
    let dir = agent.config.vm_dir(&name);
    if record.pid == 0 {
        // The agent ended between writing the record and learning the process.
        record.pid = pid_from_file(&dir).unwrap_or(0);
        record.start_time = vmferry_qemu::process_start_time(record.pid).unwrap_or(0);
    }
    if record.pid == 0 || !vmferry_qemu::is_same_process(record.pid, record.start_time) {
        tracing::warn!(vm = name, pid = record.pid, "ended while no agent was there");
        if let Some(id) = record.incoming {
            agent.store.abandon_in(id, "its QEMU ended while no agent was there")?;
        }
        return Ok(agent.store.remove_vm(&name)?);
    }
    if let Some(id) = record.incoming
        && matches!(agent.store.step_in(id)?, Some((InStep::Abandoned, _)))
    {
        tracing::warn!(vm = name, pid = record.pid, migration = %id, "was abandoned, and goes");
        vmferry_qemu::kill_process(record.pid, record.start_time, GRACE).await;
        return Ok(agent.store.remove_vm(&name)?);
    }
    if let Some(id) = record.incoming
        && arrival::is_expected(&dir)
        && agent.store.abandon_in(id, "the destination's agent ended before it had the guest")?
    {
        // What was to bring the guest ended with the old agent, and QEMU may wait for it and not answer.
        vmferry_qemu::kill_process(record.pid, record.start_time, GRACE).await;
        return Ok(agent.store.remove_vm(&name)?);
    }
    agent.store.put_vm(&record)?;
    let qmp = Qmp::connect(Path::new(&record.qmp), CONNECT_TIMEOUT).await?;
    let vm = agent.take(&record, qmp).await?;
    if let Some(id) = record.incoming {
        tracing::warn!(vm = name, pid = record.pid, migration = %id, "still waits for a guest");
        let source = agent.store.source_of(id)?.map(|source| source.name).unwrap_or_default();
        let incoming = Incoming::new(id, source, vm);
        agent.add_incoming(Arc::clone(&incoming));
        tokio::spawn(watch_lease(Arc::clone(agent), incoming));
    } else {
        set_running(agent, &vm).await?;
        let state = vm.view(agent.config.engine).await.state;
        tracing::info!(vm = name, pid = record.pid, state, "found again");
    }
    Ok(())
}

/// Tries until it is settled: the guest must not stay half-way because its QEMU was slow to answer once.
pub(crate) async fn settle(agent: Arc<Agent>, record: OutRecord) {
    let peer = pinned(&agent, &record.address, record.peer_key);
    let mut told = false;
    loop {
        let outcome = match agent.vm(&record.vm) {
            Ok(vm) if vm.is_alive() => settle_step(&agent, &vm, &peer, &record).await,
            Err(_) if lives(&agent, &record.vm) => {
                Err(AgentError::Conflict { message: format!("{}'s QEMU does not answer", record.vm), hint: None })
            }
            vm => settle_without_vm(&agent, vm.ok().as_deref(), &peer, &record).await,
        };
        let Err(error) = outcome else { return };
        if !std::mem::replace(&mut told, true) {
            tracing::error!(vm = record.vm, migration = %record.id, error = in_one_line(&error), "cannot be settled yet");
        }
        tokio::time::sleep(SETTLE_AGAIN).await;
    }
}

/// A QEMU of that name is on record and lives, whether or not it answers.
pub(crate) fn lives(agent: &Agent, name: &str) -> bool {
    matches!(living(agent, name), Ok(Some(_)))
}

/// The record of a QEMU of that name that lives, whether or not it answers.
pub(crate) fn living(agent: &Agent, name: &str) -> Result<Option<VmRecord>, AgentError> {
    let is_it = |it: &VmRecord| it.spec.name == name && vmferry_qemu::is_same_process(it.pid, it.start_time);
    Ok(agent.store.vms()?.into_iter().find(is_it))
}

/// The source's QEMU is gone: nothing is left to hand over, and what was handed over stays where it is.
async fn settle_without_vm(agent: &Agent, vm: Option<&Vm>, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
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
    agent.store.end_out(record.id, step, outcome)?;
    match vm {
        Some(vm) if handed_over => agent.forget_vm(vm),
        // Whoever watches it has waited for this to tell its end.
        Some(vm) => {
            vm.set_stage(Stage::Owned);
            Ok(())
        }
        None => Ok(()),
    }
}

async fn settle_step(agent: &Agent, vm: &Vm, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
    let note = |text: String| tracing::warn!(vm = vm.name(), migration = %record.id, "{text}");
    match record.step {
        OutStep::Prepare | OutStep::CopyRam if !has_let_go(vm).await? => {
            undo(agent, vm, peer, record, "the agent ended while it was under way").await
        }
        OutStep::Prepare | OutStep::CopyRam | OutStep::Commit => {
            vm.set_stage(Stage::InDoubt(record.id));
            agent.store.step_out(record.id, OutStep::Commit)?;
            match settle_commit(peer, record.id, note).await {
                Ok(()) => retire_after_post_copy(agent, vm, peer, record).await,
                Err(why) => undo(agent, vm, peer, record, &why).await,
            }
        }
        OutStep::PostCopy => retire_after_post_copy(agent, vm, peer, record).await,
        OutStep::Retire => retire(agent, vm, record.id).await,
        OutStep::Done | OutStep::Abandoned => Ok(()),
    }
}

/// QEMU has let go of the guest for post-copy: only the destination can have it.
async fn has_let_go(vm: &Vm) -> Result<bool, AgentError> {
    let status = vm.qmp.execute(QueryMigrate {}).await?.status;
    Ok(status.is_some_and(|status| status.is_post_copy()))
}

/// The guest runs on here; the destination forgets.
async fn undo(agent: &Agent, vm: &Vm, peer: &Peer, record: &OutRecord, why: &str) -> Result<(), AgentError> {
    vm.set_stage(Stage::Migrating(record.id));
    match qemu::abandon(&vm.qmp, record.running).await {
        Err(EngineError::TooLate) => {
            return strand(agent, vm, record.id, &format!("QEMU here had let go of it, and {why}"));
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
    Ok(agent.store.end_out(record.id, OutStep::Abandoned, &outcome)?)
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

async fn retire_after_post_copy(agent: &Agent, vm: &Vm, peer: &Peer, record: &OutRecord) -> Result<(), AgentError> {
    vm.set_stage(Stage::Left(record.id));
    agent.store.step_out(record.id, OutStep::PostCopy)?;
    let note = |text: String| tracing::warn!(vm = vm.name(), migration = %record.id, "{text}");
    let relay = match Relay::was_open(vm) {
        true => Some(Relay::open(vm, peer.clone(), record.id)?),
        false => None,
    };
    let (mut engine, way) = match (external::is_sending(vm), &relay) {
        (Some(_), _) => (Box::new(resumed_external(agent, vm, record).await?) as Box<dyn RamEngine>, Way::Link),
        (None, Some(relay)) => (resumed_qemu(agent, vm, record).await?, Way::Relayed(relay.uri().into())),
        (None, None) => (resumed_qemu(agent, vm, record).await?, Way::Direct(peer.hello().await?.ip())),
    };
    if let Err(why) = follow_post_copy(engine.as_mut(), peer, record.id, &way, note, |_| {}).await {
        return strand(agent, vm, record.id, &why);
    }
    engine.close().await;
    agent.store.step_out(record.id, OutStep::Retire)?;
    retire(agent, vm, record.id).await?;
    tracing::info!(vm = vm.name(), migration = %record.id, "was handed over; what was left here is gone");
    Ok(())
}

/// Nothing is left to decide in post-copy.
const NO_LIMITS: Limits = Limits { downtime: Duration::ZERO, max_time: None, post_copy: true };

async fn resumed_qemu(agent: &Agent, vm: &Vm, record: &OutRecord) -> Result<Box<dyn RamEngine>, AgentError> {
    let (features, _) = agent.features_of(vm).await?;
    let (uri, setup) = (String::new(), Setup::default());
    let wishes =
        qemu::Wishes { uri, limits: NO_LIMITS, bandwidth: None, setup, post_copy_first: false, scripted: false };
    Ok(Box::new(QemuEngine::new(vm.qmp.clone(), features, record.running, wishes)))
}

async fn resumed_external(agent: &Agent, vm: &Vm, record: &OutRecord) -> Result<ExternalEngine, AgentError> {
    let plain = external::is_sending(vm) == Some(true);
    let wishes = external::Wishes {
        pid: vm.pid,
        backends: external::backends_of(vm).await?,
        dir: external::sending_dir(vm),
        way: WayThere {
            address: record.address.clone(),
            identity: Arc::clone(&agent.trusts.identity),
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
