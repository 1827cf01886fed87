//! The moment of ownership: this host's journal takes the guest over, once, and then it is set running.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_qemu::migration::reset_capabilities;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{MigrationStatus, RunState};

use super::abandon::{abandon_unheard, drop_awaited};
use super::arrival;
use super::incoming::{Incoming, state};
use crate::error::AgentError;
use crate::host::{Host, Stage, Vm};
use crate::journal::InStep;
use crate::peers::IncomingState;
use crate::peers::trust::Caller;

/// How long QEMU may take to load what the source says it has sent.
const LOAD_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the guest may take to be set running.
const RUN_TIMEOUT: Duration = Duration::from_secs(2);

/// Makes this host the owner of the guest, if it can run it, and sets it running. May be asked again: the answer stays
/// the same. The answer is final either way.
pub(crate) async fn commit(here: &Arc<Incoming>, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    let Some(incoming) = here.awaited(id) else {
        // It never came this far; or its VM is gone again; or this agent was started since, and has seen to it then.
        abandon_unheard(here, id, caller, "this host knows nothing of it")?;
        return match here.host.store.step_in(id)? {
            Some((InStep::Prepared, _)) => {
                Err(AgentError::Busy { what: "the VM's QEMU, which does not answer the new agent yet".into() })
            }
            _ => state(here, id),
        };
    };
    let _turn = incoming.turn.lock().await;
    incoming.heard();
    let vm = &incoming.vm;
    let begun = Instant::now();
    if !matches!(here.host.store.step_in(id)?, Some((InStep::Committed, _))) {
        if let Err(why) = loaded(vm).await {
            drop_awaited(here, &incoming, &why).await?;
            return state(here, id);
        }
        if !here.host.store.commit_in(id)? {
            return state(here, id);
        }
        vm.set_stage(Stage::Owned);
        let took_us = begun.elapsed().as_micros() as u64;
        tracing::info!(vm = vm.name(), migration = %id, took_us, "owns the guest now");
        if let Err(error) = set_running(&here.host, vm).await {
            // In post-copy it may answer only when the source has made a lost connection anew, and for that the source
            // must hear that the guest is here.
            tracing::error!(vm = vm.name(), error = in_one_line(&error), "cannot be set running yet");
            tokio::spawn(set_running_later(Arc::clone(&here.host), Arc::clone(vm)));
        }
        tokio::spawn(announce(Arc::clone(vm)));
    }
    state(here, id)
}

async fn set_running_later(host: Arc<Host>, vm: Arc<Vm>) {
    while let Err(error) = set_running(&host, &vm).await {
        tracing::debug!(vm = vm.name(), error = in_one_line(&error), "cannot be set running yet");
        tokio::time::sleep(RUN_TIMEOUT).await;
    }
}

/// Sets a guest running that this host owns, once: its user may pause it afterwards.
pub(crate) async fn set_running(host: &Host, vm: &Vm) -> Result<(), AgentError> {
    if !host.store.must_run(vm.name())? {
        return Ok(());
    }
    match run(vm).await {
        Err(error) if vm.is_alive() => return Err(error),
        Err(error) => tracing::error!(vm = vm.name(), %error, "its QEMU ended before it could be set running"),
        Ok(()) => {}
    }
    if arrival::is_expected(&vm.dir) {
        // What somebody saves to a file later is to have all RAM. It can wait until pages have come.
        let vm = vm.qmp.clone();
        tokio::spawn(async move {
            while let Err(error) = reset_capabilities(&vm).await {
                if vm.is_closed() {
                    return;
                }
                tracing::debug!(error = in_one_line(&error), "QEMU does not answer yet");
                tokio::time::sleep(RUN_TIMEOUT).await;
            }
        });
    }
    Ok(host.store.did_run(vm.name())?)
}

/// Waits until QEMU has what it needs to run the guest.
async fn loaded(vm: &Vm) -> Result<(), String> {
    let deadline = Instant::now() + LOAD_TIMEOUT;
    loop {
        let told = async {
            let info = vm.qmp.execute(commands::QueryMigrate {}).await?;
            Ok::<_, vmferry_qemu::QmpError>((info, vm.run_state().await?))
        };
        let (info, run_state) = told.await.map_err(|error| format!("its QEMU does not answer: {error}"))?;
        match info.status.unwrap_or(MigrationStatus::None) {
            status
                if (status == MigrationStatus::Completed || status.is_post_copy())
                    && run_state != RunState::InMigrate =>
            {
                return Ok(());
            }
            MigrationStatus::Failed => {
                let why = info.error_desc.unwrap_or_else(|| "see its log".into());
                return Err(format!("its QEMU could not load the guest: {why}"));
            }
            _ if Instant::now() > deadline => return Err("its QEMU did not receive the whole guest".into()),
            _ => tokio::time::sleep(Duration::from_micros(300)).await,
        }
    }
}

async fn run(vm: &Vm) -> Result<(), AgentError> {
    let deadline = Instant::now() + RUN_TIMEOUT;
    loop {
        vm.qmp.execute_within(commands::Cont {}, RUN_TIMEOUT).await?;
        let state = vm.qmp.execute_within(commands::QueryStatus {}, RUN_TIMEOUT).await?.status;
        // A guest that shut down or crashed on its own in its first moment is none of ours to restart.
        if !matches!(state, RunState::Paused | RunState::InMigrate | RunState::Prelaunch) || Instant::now() > deadline {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Has the guest's network cards tell the switches where they are now, some times, as QEMU does by itself once.
async fn announce(vm: Arc<Vm>) {
    let rounds = commands::AnnounceSelf { initial: 50, max: 550, rounds: 5, step: 100 };
    if let Err(error) = vm.qmp.execute(rounds).await {
        tracing::warn!(vm = vm.name(), %error, "could not announce the guest's network cards");
    }
}
