//! What was prepared is given up, now and for ever.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::incoming::{Awaited, Incoming, state};
use crate::error::AgentError;
use crate::journal::Source;
use crate::peers::IncomingState;
use crate::peers::trust::{self, Caller};

/// How long what is abandoned while its QEMU starts may take to be gone.
const PREPARING_TIMEOUT: Duration = Duration::from_secs(10);
/// Why a migration was abandoned by its source.
const ASKED_TO: &str = "the source asked for it";

/// Gives up what was prepared, now and for ever; what was committed stays. May be asked again, and of migrations that
/// this host never heard of. When it answers nothing of it is left, so that the VM can be offered again at once.
pub(crate) async fn abandon(here: &Incoming, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    abandon_unheard(here, id, caller, ASKED_TO)?;
    give_up(here, id, ASKED_TO).await?;
    let deadline = Instant::now() + PREPARING_TIMEOUT;
    while here.is_preparing(id) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    state(here, id)
}

/// What this host never heard of cannot begin any more either.
pub(super) fn abandon_unheard(here: &Incoming, id: Uuid, caller: &Caller, why: &str) -> Result<(), AgentError> {
    // It is written down for peers only; nobody else gets here with a migration that is not known.
    if let Ok(name) = trust::require_peer(&here.host, caller) {
        here.host.store.abandon_unheard(id, &Source { name, key: caller.key }, why)?;
    }
    Ok(())
}

pub(super) async fn give_up(here: &Incoming, id: Uuid, why: &str) -> Result<(), AgentError> {
    match here.awaited(id) {
        Some(incoming) => {
            let _turn = incoming.turn.lock().await;
            drop_awaited(here, &incoming, why).await?;
        }
        None => {
            here.host.store.abandon_in(id, why)?;
        }
    }
    Ok(())
}

/// Writes that this migration is abandoned and, unless it was committed before, ends its QEMU.
pub(super) async fn drop_awaited(here: &Incoming, incoming: &Awaited, why: &str) -> Result<(), AgentError> {
    let vm = &incoming.vm;
    let why = match vm.last_words() {
        Some(words) if vm.qmp.is_closed() => format!("{why} ({words})"),
        _ => why.into(),
    };
    if !here.host.store.abandon_in(incoming.id, &why)? {
        return Ok(());
    }
    if let Some(arrival) = here.arrivals.take(incoming.id) {
        arrival.give_up();
    }
    vmferry_qemu::kill_process(vm.pid, vm.start_time, Duration::from_secs(1)).await;
    here.host.forget_vm(vm)?;
    tracing::info!(vm = vm.name(), migration = %incoming.id, why, "abandoned");
    Ok(())
}
