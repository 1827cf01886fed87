//! Post-copy lost its connection: this host waits for a new one.

use std::net::IpAddr;
use std::sync::Arc;

use uuid::Uuid;
use vmferry_custody::InStep;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{MigrationStatus, QmpError};

use super::arrival;
use super::awaited::{Awaited, STATUS_TIMEOUT};
use super::incoming::Incoming;
use crate::engine::qemu::tcp_uri;
use crate::error::AgentError;
use crate::host::{Stage, Vm};
use crate::peers::trust::Caller;
use crate::peers::{IncomingState, relay};

/// After a broken connection in post-copy: listens again, at this address of ours.
pub(crate) async fn recover(here: &Arc<Incoming>, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    let conflict = |message: String| AgentError::Conflict { message, hint: None };
    let awaited = here.find(id).await?.filter(|it| matches!(it.machine().row(), Some(InStep::Committed { .. })));
    let Some(awaited) = awaited else {
        return Err(conflict(format!("no post-copy to recover in migration {id}")));
    };
    let name = awaited.name.clone();
    let gone = || conflict(format!("{name} does not run on {} any more", here.host.config.name));
    let Some(pid) = living(here, &awaited) else {
        if let Some(arrival) = here.arrivals.take(id) {
            arrival.give_up();
        }
        // One that was shut down, or stopped by its user, misses nothing any more.
        if here.host.idle(&name).is_none_or(|idle| idle.record.incoming != Some(id)) && here.host.vm(&name).is_err() {
            return Ok(IncomingState { complete: true, tried: true, runs: true, ..awaited.view().await });
        }
        return Err(gone());
    };
    let mut state = awaited.view().await;
    // It may be on its way to another host by now: what brought it here has nothing more to say.
    let is_elsewhere = |vm: &Arc<Vm>| matches!(vm.stage(), Stage::InDoubt(_) | Stage::Left(_) | Stage::Stranded(_));
    let moves_on = awaited.vm.get().is_some_and(is_elsewhere);
    if moves_on || here.host.journal.row_in(id).await?.is_some_and(|row| row.settled) {
        state.complete = true;
        return Ok(state);
    }
    if arrival::is_expected(&here.host.config.vm_dir(&name)) {
        // QEMU is not asked: it may wait for that.
        let dir = here.host.config.vm_dir(&name);
        match arrival::again(&here.host, &here.arrivals, id, &dir, pid, caller.key).await? {
            arrival::Standing::Complete => {
                awaited.has_arrived();
                state.complete = true;
            }
            arrival::Standing::Awaited(session) => (state.listens, state.session) = (true, Some(session)),
        }
        return Ok(state);
    }
    // Whatever its user is about to do with it: without its memory nothing comes of that.
    let Some(vm) = awaited.vm.get() else {
        return Err(AgentError::Busy { what: format!("the QEMU of {name}, which does not answer the new agent yet") });
    };
    match listen_again(vm, caller.local).await {
        Ok(port) => {
            (state.listens, state.port) = (true, port);
            return Ok(state);
        }
        Err(AgentError::Qmp(QmpError::Command { desc, .. })) => {
            tracing::debug!(vm = name, desc, "does not listen again");
        }
        Err(error) => return Err(error),
    }
    let status = match vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await {
        Ok(info) => info.status.unwrap_or(MigrationStatus::None),
        // What keeps it from answering is a page that does not come.
        Err(QmpError::Timeout { .. }) => MigrationStatus::PostcopyActive,
        Err(error) => return Err(error.into()),
    };
    match status {
        // This side has not noticed yet that the connection is gone.
        MigrationStatus::PostcopyActive => match vm.qmp.execute(commands::MigratePause {}).await {
            Ok(_) | Err(QmpError::Command { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        status if status.is_post_copy() => {}
        MigrationStatus::Completed => {
            awaited.has_arrived();
            state.complete = true;
        }
        other => {
            return Err(conflict(format!("{name}'s QEMU on {} cannot go on: it is {other}", here.host.config.name)));
        }
    }
    Ok(state)
}

/// The process of its QEMU, if that lives, whether or not it answers.
fn living(here: &Incoming, awaited: &Awaited) -> Option<u32> {
    if let Some(vm) = awaited.vm.get() {
        return vm.is_alive().then_some(vm.pid);
    }
    // An agent may be about to take hold of it.
    if let Ok(vm) = here.host.vm(&awaited.name)
        && vm.incoming == Some(awaited.id)
    {
        return vm.is_alive().then_some(vm.pid);
    }
    let idle = here.host.idle(&awaited.name).filter(|it| it.record.incoming == Some(awaited.id))?;
    idle.record.instance.is_alive().then_some(idle.record.instance.pid)
}

/// Has a QEMU whose post-copy is paused listen once more. It can do this even while its main loop, which would tell
/// what port it chose, waits for a page: so the port is chosen here. That somebody takes it in between is seen, and the
/// source asks again.
async fn listen_again(vm: &Vm, address: IpAddr) -> Result<Option<u16>, AgentError> {
    if relay::is_receiving(vm) {
        let uri = relay::uri_at_destination(vm);
        vm.qmp.execute(commands::MigrateRecover { uri }).await?;
        return Ok(None);
    }
    let free = std::net::TcpListener::bind((address, 0)).and_then(|listener| listener.local_addr());
    let port = free.map_err(AgentError::io(address.to_string()))?.port();
    vm.qmp.execute(commands::MigrateRecover { uri: tcp_uri(address, port) }).await?;
    Ok(Some(port))
}
