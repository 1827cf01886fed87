//! Following a VM that is changed while it runs: its record keeps the words that make it as it is, for its next start and
//! for where it goes.

use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;
use vmferry_qemu::inventory::Glimpse;
use vmferry_qemu::qmp::commands::QueryBlockJobs;
use vmferry_qemu::{CommandLine, Drift, Inventory};

use super::host::Host;
use super::vm::{Stage, Vm};
use crate::error::AgentError;

/// How often a QEMU is asked whether anything was changed.
const LOOK: Duration = Duration::from_secs(5);

/// How a VM was changed since its start; none when it was not, as far as can be told.
pub(crate) async fn drift_of(host: &Host, vm: &Vm, now: &Inventory) -> Result<Option<Drift>, AgentError> {
    let command = CommandLine::parse(&vm.spec.argv)?;
    let set = host.qemus.set_by_machines(vm).await;
    let set = set.as_ref().and_then(|set| set.get(&vm.facts.machine));
    let drift = Drift::of(&vm.qmp, &command, vm.first_inventory().as_ref(), now, set).await?;
    Ok(drift.is_any().then_some(drift))
}

/// Keeps the record of a VM as it is, for as long as its QEMU lives.
pub(super) async fn follow(host: Arc<Host>, vm: Arc<Vm>) {
    let mut known: Option<Glimpse> = None;
    while vm.is_alive() && !vm.qmp.is_closed() {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = vm.qmp.closed() => return,
        }
        // While it moves, the migration has the say over its QEMU; what is changed then is seen afterwards.
        if vm.stage() != Stage::Owned {
            continue;
        }
        let seen = match Glimpse::of(&vm.qmp).await {
            Ok(seen) if known.as_ref() == Some(&seen) => continue,
            Ok(seen) => seen,
            Err(error) => {
                tracing::debug!(vm = vm.name(), %error, "does not tell what it is made of");
                continue;
            }
        };
        match record_drift(&host, &vm).await {
            Ok(true) => known = Some(seen),
            Ok(false) => {}
            Err(error) => {
                let why = in_one_line(&error);
                tracing::warn!(vm = vm.name(), why, "cannot follow its changes");
                // What it was before is not what it is: it is not to be started so.
                if known.is_some() {
                    keep_unknown(&host, &vm, &why).await;
                }
            }
        }
    }
}

async fn keep_unknown(host: &Host, vm: &Vm, why: &str) {
    keep_from_starting(host, vm, format!("it was changed, and how could not be told: {why}")).await;
}

/// Has it not be started again as it was, for this reason, in one sentence.
pub(crate) async fn keep_from_starting(host: &Host, vm: &Vm, why: String) {
    let obstacles = vec![why];
    let unknown = Drift { argv: vm.spec.argv.clone(), obstacles, ..Drift::default() };
    if let Err(error) = keep(host, vm, Some(unknown)).await {
        tracing::warn!(vm = vm.name(), error = in_one_line(&error), "cannot record that");
    }
}

/// Records how it is changed, unless a disk is being worked on: what stands in front of that meanwhile is none of it.
pub(crate) async fn record_drift(host: &Host, vm: &Vm) -> Result<bool, AgentError> {
    if !vm.qmp.execute(QueryBlockJobs {}).await?.is_empty() {
        return Ok(false);
    }
    let drift = drift_of(host, vm, &vm.inventory().await?).await?;
    vm.ram_bytes().await?;
    keep(host, vm, drift).await?;
    Ok(true)
}

async fn keep(host: &Host, vm: &Vm, drift: Option<Drift>) -> Result<(), AgentError> {
    if vm.drift() != drift {
        for change in drift.iter().flat_map(Drift::sentences) {
            tracing::info!(vm = vm.name(), change, "was changed");
        }
        host.journal.vm_changed(vm.name(), &vm.instance(), drift.as_ref()).await?;
        vm.set_drift(drift);
    }
    Ok(())
}
