//! What a source asks about ownership: take the guest over, let go of it, and, when its user has kept it, let go of it
//! even so. Each may be asked again and has the same answer then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_custody::destination::{Event, Qemu};
use vmferry_custody::{Destination, InStep};

use super::awaited::Awaited;
use super::incoming::Incoming;
use crate::error::AgentError;
use crate::host::{Idle, Stage};
use crate::journal::Source;
use crate::peers::trust::{self, Caller};
use crate::peers::{Abandon, Commit, IncomingState};

/// How long QEMU may take to load what the source says it has sent.
const LOAD_TIMEOUT: Duration = Duration::from_secs(8);
/// The same, of one that answers nothing: its main loop may wait for what does not come any more, as when its source's
/// agent ended in the middle.
const SILENT_TIMEOUT: Duration = Duration::from_secs(20);
/// What is decided is answered at once; that the guest runs may take so long.
const RUN_TIMEOUT: Duration = Duration::from_secs(3);
/// How long it may take until all is gone of what is abandoned.
const END_TIMEOUT: Duration = Duration::from_secs(12);
/// No peer fills the journal: a source that is in order leaves no more than a few of these.
const MOST_UNHEARD: u32 = 10_000;
/// Why a migration was abandoned by its source.
const ASKED_TO: &str = "the source asked for it";

/// Makes this host the owner of the guest, if it can run it, and sets it running. When nothing can be decided yet, it
/// says that it is as it was.
pub(crate) async fn commit(
    here: &Arc<Incoming>,
    id: Uuid,
    asked: Commit,
    caller: &Caller,
) -> Result<IncomingState, AgentError> {
    let Some(awaited) = here.find(id).await? else {
        return unheard(here, id, caller, "this host knows nothing of it").await;
    };
    awaited.heard();
    awaited.is_to_commit(asked);
    let begun = Instant::now();
    let mut decided = None;
    loop {
        awaited.act().await;
        let machine = awaited.machine();
        let patience = if machine.qemu() == Qemu::Silent { SILENT_TIMEOUT } else { LOAD_TIMEOUT };
        let too_long = begun.elapsed() > patience;
        match machine.row() {
            Some(InStep::Committed { .. }) => {
                let since = *decided.get_or_insert_with(Instant::now);
                if awaited.view().await.runs || machine.is_at_rest() || since.elapsed() > RUN_TIMEOUT {
                    return Ok(awaited.view().await);
                }
            }
            Some(InStep::Abandoned) => return Ok(awaited.view().await),
            // The journal cannot be written: it is not for this host to say that nothing will come of it.
            _ if !wants_to_commit(machine) => return Ok(awaited.view().await),
            // Only its source may say that a guest is lost that its QEMU has let go of.
            _ if too_long && asked.let_go => return Ok(awaited.view().await),
            _ if too_long => {
                awaited.give_up(Event::GiveUp, "its QEMU did not receive the whole guest");
                awaited.act().await;
                return Ok(awaited.view().await);
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
}

/// It was asked to, and nothing else came of that yet.
fn wants_to_commit(machine: Destination) -> bool {
    !machine.due().is_empty()
}

/// Gives up what was prepared, now and for ever; what was committed stays. Also a migration that this host never heard
/// of. When it answers nothing of it is left, so that the VM can be offered again at once.
pub(crate) async fn abandon(
    here: &Arc<Incoming>,
    id: Uuid,
    asked: Abandon,
    caller: &Caller,
) -> Result<IncomingState, AgentError> {
    match here.find(id).await? {
        Some(awaited) => {
            if asked.drop_disks {
                awaited.drop_disks();
            }
            Ok(let_go(&awaited, Event::Abandon, ASKED_TO).await)
        }
        None => unheard(here, id, caller, ASKED_TO).await,
    }
}

/// The source's user has decided that the guest goes on there: whatever this host has of it ends.
pub(crate) async fn fence(
    here: &Arc<Incoming>,
    id: Uuid,
    vm: &str,
    caller: &Caller,
) -> Result<IncomingState, AgentError> {
    const WHY: &str = "the source's user has kept the guest there";
    if let Some(awaited) = here.find(id).await? {
        tracing::warn!(vm = awaited.name, migration = %id, "its source's user has kept it: what is here ends");
        return Ok(let_go(&awaited, Event::Fence, WHY).await);
    }
    // A journal that was lost knows nothing of it; but somebody may still run it.
    if let Some(found) = here.host.idle(vm).filter(|idle| idle.why == Idle::Unclear) {
        tracing::warn!(vm, migration = %id, "its source's user has kept it: what was found here ends");
        found.record.instance.end(Duration::ZERO).await;
        here.host.forget_idle(&found).await?;
    }
    // Its monitor may have answered just now.
    if let Ok(found) = here.host.vm(vm)
        && found.stage() == Stage::Unclear
    {
        tracing::warn!(vm, migration = %id, "its source's user has kept it: what was found here ends");
        // Nobody else says how it ended.
        found.set_stage(Stage::Stopping);
        found.instance().end(Duration::ZERO).await;
        here.host.forget_vm(&found).await?;
    }
    let name = trust::require_peer(&here.host, caller).await?;
    write_unheard(here, id, Source { name, key: caller.key }, WHY).await
}

async fn let_go(awaited: &Awaited, event: Event, why: &str) -> IncomingState {
    awaited.give_up(event, why);
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        awaited.act().await;
        let machine = awaited.machine();
        // What was committed is not abandoned; and what cannot be written is said to be as it was.
        let stays = matches!(machine.row(), Some(InStep::Committed { .. })) && event != Event::Fence;
        if awaited.is_gone() || stays || Instant::now() > deadline {
            return awaited.view().await;
        }
        // While its QEMU starts, whoever starts it ends it.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What this host never heard of cannot begin any more either. It is written down for peers only; nobody else gets here
/// with a migration that is not known.
async fn unheard(here: &Arc<Incoming>, id: Uuid, caller: &Caller, why: &str) -> Result<IncomingState, AgentError> {
    let name = trust::require_peer(&here.host, caller).await?;
    // It may be one of those that nobody knows any more.
    if here.host.has_unclear() {
        return Err(AgentError::Busy {
            what: "this host's user, who is to say whose the VMs are that were found here".into(),
        });
    }
    write_unheard(here, id, Source { name, key: caller.key }, why).await
}

async fn write_unheard(here: &Arc<Incoming>, id: Uuid, source: Source, why: &str) -> Result<IncomingState, AgentError> {
    if here.host.journal.unheard_of(source.key).await? >= MOST_UNHEARD {
        let message = format!("{} has abandoned {MOST_UNHEARD} migrations that it never began", source.name);
        return Err(AgentError::Conflict { message, hint: None });
    }
    here.host.journal.write_in(id, "", &source, InStep::Abandoned, why, false).await?;
    super::incoming::state(here, id).await
}
