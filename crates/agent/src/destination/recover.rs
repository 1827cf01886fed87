//! Post-copy lost its connection: this host waits for a new one.

use std::net::IpAddr;
use std::sync::Arc;

use uuid::Uuid;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{MigrationStatus, QmpError};

use super::arrival;
use super::incoming::{Incoming, STATUS_TIMEOUT, newest_vm_of, state};
use crate::engine::qemu::tcp_uri;
use crate::error::AgentError;
use crate::host::Vm;
use crate::journal::InStep;
use crate::peers::trust::Caller;
use crate::peers::{IncomingState, relay};

/// After a broken connection in post-copy: listens again, at this address of ours.
pub(crate) async fn recover(here: &Arc<Incoming>, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    let conflict = |message: String| AgentError::Conflict { message, hint: None };
    if !matches!(here.host.store.step_in(id)?, Some((InStep::Committed, _))) {
        return Err(conflict(format!("no post-copy to recover in migration {id}")));
    }
    let name = newest_vm_of(here, id)?;
    if arrival::is_expected(&here.host.config.vm_dir(&name)) {
        return await_ram(here, id, &name, caller).await;
    }
    let vm = match here.host.vm(&name) {
        // Whatever its user is about to do with it: without its memory nothing comes of that.
        Ok(vm) if vm.is_alive() => vm,
        Err(error) if here.host.lives(&name) => return Err(error),
        _ => return Err(conflict(format!("{name} does not run on {} any more", here.host.config.name))),
    };
    let mut state = state(here, id)?;
    match listen_again(&vm, caller.local).await {
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
        MigrationStatus::Completed => state.complete = true,
        other => {
            return Err(conflict(format!("{name}'s QEMU on {} cannot go on: it is {other}", here.host.config.name)));
        }
    }
    Ok(state)
}

/// The source's agent is to send the rest of the RAM over a new link. QEMU is not asked: it may wait for that.
async fn await_ram(here: &Arc<Incoming>, id: Uuid, name: &str, caller: &Caller) -> Result<IncomingState, AgentError> {
    let Some(record) = here.host.living(name)? else {
        if let Some(arrival) = here.arrivals.take(id) {
            arrival.give_up();
        }
        let message = format!("{name} does not run on {} any more", here.host.config.name);
        return Err(AgentError::Conflict { message, hint: None });
    };
    let mut state = state(here, id)?;
    match arrival::again(&here.host, &here.arrivals, id, &here.host.config.vm_dir(name), record.pid, caller.key).await?
    {
        arrival::Standing::Complete => state.complete = true,
        arrival::Standing::Awaited(session) => (state.listens, state.session) = (true, Some(session)),
    }
    Ok(state)
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
