//! The guests that come to this host.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::arrival::Arrivals;
use crate::error::AgentError;
use crate::host::{Host, Stage, Vm};
use crate::journal::InStep;
use crate::measuring::witness;
use crate::peers::{IncomingState, relay};

/// How long QEMU may take to tell how post-copy stands, which it cannot while its main loop waits for a page.
pub(super) const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// One guest that a QEMU of this host waits for, or has waited for.
pub(crate) struct Awaited {
    pub(super) id: Uuid,
    pub(super) from: String,
    pub(super) vm: Arc<Vm>,
    begun: Instant,
    /// When the source was last heard of, in ms since `begun`.
    heard_ms: AtomicU64,
    /// Held while ownership changes, so that a commit and an abandon never run side by side.
    pub(super) turn: tokio::sync::Mutex<()>,
}

impl Awaited {
    pub(crate) fn new(id: Uuid, from: String, vm: Arc<Vm>) -> Arc<Self> {
        let turn = tokio::sync::Mutex::new(());
        Arc::new(Self { id, from, vm, begun: Instant::now(), heard_ms: AtomicU64::new(0), turn })
    }

    pub(super) fn heard(&self) {
        self.heard_ms.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.heard_ms.load(Ordering::Relaxed)))
    }

    /// Guest RAM that is promised to it, in bytes.
    fn ram_bytes(&self) -> u64 {
        self.vm.facts.ram_bytes
    }

    /// This VM came with it.
    fn brought(&self, vm: &Vm) -> bool {
        self.vm.pid == vm.pid && self.vm.start_time == vm.start_time
    }

    /// The source still owns the guest.
    fn is_open(&self) -> bool {
        matches!(self.vm.stage(), Stage::Incoming(_))
    }
}

/// See the module's text.
pub(crate) struct Incoming {
    /// To where.
    pub(crate) host: Arc<Host>,
    /// Their RAM, where the agents move it.
    pub(super) arrivals: Arc<Arrivals>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    awaited: HashMap<Uuid, Arc<Awaited>>,
    /// Migrations whose QEMUs are being started.
    preparing: HashSet<Uuid>,
}

/// An incoming migration is being prepared while this lives.
pub(crate) struct Preparing<'a> {
    here: &'a Incoming,
    id: Uuid,
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        self.here.lock().preparing.remove(&self.id);
    }
}

impl Incoming {
    /// To this host: none yet.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, arrivals: Arc::default(), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn add(&self, awaited: Arc<Awaited>) {
        self.lock().awaited.insert(awaited.id, awaited);
    }

    pub(super) fn awaited(&self, id: Uuid) -> Option<Arc<Awaited>> {
        self.lock().awaited.get(&id).cloned()
    }

    /// This VM is gone.
    pub(crate) fn forget(&self, vm: &Vm) {
        self.lock().awaited.retain(|_, awaited| !awaited.brought(vm));
    }

    pub(super) fn begin_preparing(&self, id: Uuid) -> Preparing<'_> {
        self.lock().preparing.insert(id);
        Preparing { here: self, id }
    }

    pub(super) fn is_preparing(&self, id: Uuid) -> bool {
        self.lock().preparing.contains(&id)
    }

    /// Memory that incoming VMs will still fill, at most, in bytes.
    pub(super) fn promised_memory(&self) -> u64 {
        self.lock().awaited.values().filter(|it| it.is_open()).map(|it| it.ram_bytes()).sum()
    }
}

/// Notes that the source is still there, and tells how it stands.
pub(crate) fn keep(here: &Incoming, id: Uuid) -> Result<IncomingState, AgentError> {
    if let Some(incoming) = here.awaited(id) {
        incoming.heard();
    }
    state(here, id)
}

/// How an incoming migration stands.
pub(crate) fn state(here: &Incoming, id: Uuid) -> Result<IncomingState, AgentError> {
    let (step, detail) = here.host.store.step_in(id)?.ok_or_else(|| AgentError::Conflict {
        message: format!("this host knows no incoming migration {id}"),
        hint: None,
    })?;
    Ok(IncomingState {
        step,
        detail: detail.filter(|_| step == InStep::Abandoned),
        listens: false,
        port: None,
        session: None,
        complete: false,
    })
}

/// The VM that this migration brings, for one of its connections that is relayed.
pub(crate) fn relayed_vm(here: &Incoming, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    let vm = here.host.vm(&newest_vm_of(here, id)?)?;
    match relay::is_receiving(&vm) {
        true => Ok(vm),
        false => {
            Err(AgentError::Conflict { message: "this migration's connections are not relayed".into(), hint: None })
        }
    }
}

/// The measuring guest that this migration brings.
pub(crate) fn measuring_vm(here: &Incoming, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    let incoming = here.awaited(id).ok_or_else(|| AgentError::Conflict {
        message: format!("nothing waits here for the guest of migration {id}"),
        hint: None,
    })?;
    witness::only_measuring(Arc::clone(&incoming.vm))
}

/// The VM of this migration, if it was the last one to bring a VM of that name here: what another brought since is none
/// of its source's business.
pub(super) fn newest_vm_of(here: &Incoming, id: Uuid) -> Result<String, AgentError> {
    let name = here.host.store.vm_of(id)?;
    match here.host.store.newest_in(&name)? {
        Some(newest) if newest == id => Ok(name),
        _ => {
            Err(AgentError::Conflict { message: format!("{name} came here with another migration since"), hint: None })
        }
    }
}
