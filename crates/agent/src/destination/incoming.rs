//! The guests that come to this host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use uuid::Uuid;
use vmferry_custody::destination::{Event, Qemu};

use super::arrival::Arrivals;
use super::awaited::Awaited;
use crate::error::AgentError;
use crate::host::{Host, Vm};
use crate::journal::InRow;
use crate::measuring::witness;
use crate::peers::trust;
use crate::peers::{IncomingState, relay};

/// See the module's text.
pub(crate) struct Incoming {
    /// To where.
    pub(crate) host: Arc<Host>,
    /// Their RAM, where the agents move it.
    pub(super) arrivals: Arc<Arrivals>,
    awaited: Mutex<HashMap<Uuid, Arc<Awaited>>>,
}

impl Incoming {
    /// To this host: none yet.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, arrivals: Arc::default(), awaited: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Awaited>>> {
        self.awaited.lock().expect("no holder of this lock panics")
    }

    /// The one that is known already, if there is one; otherwise this.
    pub(super) fn add(&self, awaited: Arc<Awaited>) -> Result<(), Arc<Awaited>> {
        let mut all = self.lock();
        all.retain(|_, it| !it.is_gone());
        if let Some(known) = all.get(&awaited.id) {
            return Err(Arc::clone(known));
        }
        all.insert(awaited.id, awaited);
        Ok(())
    }

    pub(super) fn awaited(&self, id: Uuid) -> Option<Arc<Awaited>> {
        self.lock().get(&id).cloned()
    }

    /// It is over, or was never begun.
    pub(super) fn remove(&self, id: Uuid) {
        self.lock().remove(&id);
    }

    /// This VM is gone.
    pub(crate) fn forget(&self, vm: &Vm) {
        self.lock().retain(|_, awaited| !awaited.brought(vm));
    }

    /// One that is under way, or that the journal knows: then what is due is done from now on.
    pub(super) async fn find(self: &Arc<Self>, id: Uuid) -> Result<Option<Arc<Awaited>>, AgentError> {
        if let Some(known) = self.awaited(id) {
            return Ok(Some(known));
        }
        let Some(row) = self.host.journal.row_in(id).await? else { return Ok(None) };
        Ok(Some(self.take_up(id, row)))
    }

    /// One that the journal knows goes on.
    pub(crate) fn take_up(self: &Arc<Self>, id: Uuid, row: InRow) -> Arc<Awaited> {
        let awaited = Awaited::found((&self.host, &self.arrivals), id, row);
        let vm = self.host.vm(&awaited.name).ok().filter(|vm| vm.incoming == Some(id));
        let is_idle = self
            .host
            .idle(&awaited.name)
            .is_some_and(|it| it.record.incoming == Some(id) && it.record.instance.is_alive());
        match vm {
            Some(vm) => awaited.is_served_by(&vm),
            None if is_idle => {}
            // Whatever it had is gone.
            None => awaited.apply(Event::Told(Qemu::Ended)),
        }
        // Of what is over there is nothing to be done, and nobody to be kept in mind.
        if awaited.machine().is_at_rest() && awaited.vm.get().is_none() {
            return awaited;
        }
        if let Err(known) = self.add(Arc::clone(&awaited)) {
            return known;
        }
        tokio::spawn(Arc::clone(&awaited).watch());
        awaited
    }
}

impl Incoming {
    /// One that the journal knows goes on; what was to bring its guest may have been lost with the last agent.
    pub(crate) fn take_up_again(self: &Arc<Self>, id: Uuid, row: InRow, lost: bool) {
        let awaited = self.take_up(id, row);
        if lost {
            awaited.give_up(Event::GiveUp, "the destination's agent ended before it had the guest");
        }
    }

    /// This VM's QEMU answers, after all.
    pub(crate) fn is_found(&self, vm: &Arc<Vm>) {
        if let Some(awaited) = vm.incoming.and_then(|id| self.awaited(id)) {
            awaited.heard();
            awaited.is_served_by(vm);
        }
    }
}

/// Whether the source of a guest that this host has taken over has nothing more to say of it. One that was kept there,
/// while this host was away, is not this host's any more; and as long as that cannot be asked, nobody knows.
pub(crate) async fn is_undisputed(here: &Arc<Incoming>, id: Uuid) -> Result<bool, AgentError> {
    let Some(row) = here.host.journal.row_in(id).await? else { return Ok(true) };
    if row.settled {
        return Ok(true);
    }
    let peers = here.host.journal.peers().await?;
    let Some(known) = peers.iter().find(|peer| peer.fingerprint == row.source.key && !peer.address.is_empty()) else {
        return Err(AgentError::Busy {
            what: format!("the agent of {}, which has the last word on it", row.source.name),
        });
    };
    let peer = trust::pinned(&here.host, &known.address, known.fingerprint);
    match peer.outgoing(id).await?.step.as_deref() {
        Some("kept-here" | "abandoned") => {
            let awaited = here.take_up(id, row);
            awaited.give_up(Event::Fence, "the source's user has kept the guest there");
            awaited.act().await;
            Ok(false)
        }
        Some("done" | "retire") | None => {
            here.host.journal.settle_in(id).await?;
            Ok(true)
        }
        Some(_) => {
            Err(AgentError::Busy { what: format!("{}, which does not know yet where the guest is", row.source.name) })
        }
    }
}

/// Notes that the source is still there, and tells how it stands.
pub(crate) async fn keep(here: &Arc<Incoming>, id: Uuid) -> Result<IncomingState, AgentError> {
    if let Some(incoming) = here.awaited(id) {
        incoming.heard();
    }
    state(here, id).await
}

/// How an incoming migration stands.
pub(crate) async fn state(here: &Arc<Incoming>, id: Uuid) -> Result<IncomingState, AgentError> {
    match here.find(id).await? {
        Some(awaited) => Ok(awaited.view().await),
        None => {
            Err(AgentError::Conflict { message: format!("this host knows no incoming migration {id}"), hint: None })
        }
    }
}

/// The source has nothing more to do with this migration: the guest is whole, and this host's without dispute.
pub(crate) async fn settled(here: &Arc<Incoming>, id: Uuid) -> Result<IncomingState, AgentError> {
    if let Some(awaited) = here.awaited(id) {
        awaited.has_arrived();
    }
    here.host.journal.settle_in(id).await?;
    state(here, id).await
}

/// The VM that this migration brought, or is to bring.
fn vm_of(here: &Incoming, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    here.awaited(id).and_then(|awaited| awaited.vm.get().cloned()).ok_or_else(|| AgentError::Conflict {
        message: format!("nothing waits here for the guest of migration {id}"),
        hint: None,
    })
}

/// For one of its connections that is relayed.
pub(crate) async fn relayed_vm(here: &Arc<Incoming>, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    here.find(id).await?;
    let vm = vm_of(here, id)?;
    match relay::is_receiving(&vm) {
        true => Ok(vm),
        false => {
            Err(AgentError::Conflict { message: "this migration's connections are not relayed".into(), hint: None })
        }
    }
}

/// If it is a measuring guest.
pub(crate) fn measuring_vm(here: &Incoming, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    witness::only_measuring(vm_of(here, id)?)
}
