//! What an agent does, when it starts, with what its predecessor left: VMs that run on, and migrations in any step.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;
use vmferry_qemu::Qmp;

use crate::destination::{Awaited, Incoming, is_expected, set_running, watch_lease};
use crate::error::AgentError;
use crate::host::{GRACE, Stage, pid_from_file};
use crate::journal::{InStep, VmRecord};
use crate::source::settle;

/// How long the monitor of a QEMU that lives may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries to find one.
const FIND_AGAIN: Duration = Duration::from_secs(5);

/// Finds the VMs again and goes on with what had begun.
pub(crate) async fn recover(here: &Arc<Incoming>) -> Result<(), AgentError> {
    for record in here.host.store.vms()? {
        let name = record.spec.name.clone();
        if let Err(error) = find_again(here, record.clone()).await {
            tracing::error!(vm = name, error = in_one_line(&error), "runs, but does not answer yet");
            tokio::spawn(find_later(Arc::clone(here), record));
        }
    }
    for record in here.host.store.unfinished_out()? {
        if let Ok(vm) = here.host.vm(&record.vm) {
            vm.set_stage(Stage::Migrating(record.id));
        }
        tracing::warn!(vm = record.vm, migration = %record.id, step = ?record.step, "was under way when the agent ended");
        tokio::spawn(settle(Arc::clone(&here.host), record));
    }
    Ok(())
}

/// A QEMU whose migration stands still may not answer for long.
async fn find_later(here: Arc<Incoming>, record: VmRecord) {
    let Ok(_name) = here.host.reserve_name(&record.spec.name) else { return };
    loop {
        tokio::time::sleep(FIND_AGAIN).await;
        match find_again(&here, record.clone()).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(vm = record.spec.name, error = in_one_line(&error), "does not answer yet"),
        }
    }
}

async fn find_again(here: &Arc<Incoming>, mut record: VmRecord) -> Result<(), AgentError> {
    let name = record.spec.name.clone();
    let dir = here.host.config.vm_dir(&name);
    if record.pid == 0 {
        // The agent ended between writing the record and learning the process.
        record.pid = pid_from_file(&dir).unwrap_or(0);
        record.start_time = vmferry_qemu::process_start_time(record.pid).unwrap_or(0);
    }
    if record.pid == 0 || !vmferry_qemu::is_same_process(record.pid, record.start_time) {
        tracing::warn!(vm = name, pid = record.pid, "ended while no agent was there");
        if let Some(id) = record.incoming {
            here.host.store.abandon_in(id, "its QEMU ended while no agent was there")?;
        }
        return Ok(here.host.store.remove_vm(&name)?);
    }
    if let Some(id) = record.incoming
        && matches!(here.host.store.step_in(id)?, Some((InStep::Abandoned, _)))
    {
        tracing::warn!(vm = name, pid = record.pid, migration = %id, "was abandoned, and goes");
        vmferry_qemu::kill_process(record.pid, record.start_time, GRACE).await;
        return Ok(here.host.store.remove_vm(&name)?);
    }
    if let Some(id) = record.incoming
        && is_expected(&dir)
        && here.host.store.abandon_in(id, "the destination's agent ended before it had the guest")?
    {
        // What was to bring the guest ended with the old agent, and QEMU may wait for it and not answer.
        vmferry_qemu::kill_process(record.pid, record.start_time, GRACE).await;
        return Ok(here.host.store.remove_vm(&name)?);
    }
    here.host.store.put_vm(&record)?;
    let qmp = Qmp::connect(Path::new(&record.qmp), CONNECT_TIMEOUT).await?;
    let vm = here.host.take(&record, qmp).await?;
    if let Some(id) = record.incoming {
        tracing::warn!(vm = name, pid = record.pid, migration = %id, "still waits for a guest");
        let source = here.host.store.source_of(id)?.map(|source| source.name).unwrap_or_default();
        let incoming = Awaited::new(id, source, vm);
        here.add(Arc::clone(&incoming));
        tokio::spawn(watch_lease(Arc::clone(here), incoming));
    } else {
        set_running(&here.host, &vm).await?;
        let state = vm.view(here.host.config.engine).await.state;
        tracing::info!(vm = name, pid = record.pid, state, "found again");
    }
    Ok(())
}
