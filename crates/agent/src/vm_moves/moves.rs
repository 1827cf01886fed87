//! The moves of this host's VMs: begun, looked at, cancelled, and gone on with after a crash.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::oneshot;
use uuid::Uuid;
use vmferry_api::{Resolve, VmMoveRequest, VmMoveState, VmMoveView, in_one_line};

use super::hand_over::{decide, hand_over};
use super::leave::leave;
use super::plan::plan;
use super::told::{Told, told};
use crate::copying::Copies;
use crate::error::AgentError;
use crate::host::{Host, Idle};
use crate::journal::MoveOut;

/// The least that makes sense, in bytes a second.
const LEAST_BANDWIDTH: u64 = 1 << 20;

/// See the module's text.
pub(crate) struct VmMoves {
    host: Arc<Host>,
    copies: Arc<Copies>,
    /// The last of each VM.
    moves: Mutex<BTreeMap<String, Arc<Told>>>,
    /// Held by whoever decides where a VM is.
    settling: tokio::sync::Mutex<()>,
}

type Answer = oneshot::Sender<Result<VmMoveView, AgentError>>;

impl VmMoves {
    pub(crate) fn new(host: Arc<Host>, copies: Arc<Copies>) -> Arc<Self> {
        Arc::new(Self { host, copies, moves: Mutex::default(), settling: tokio::sync::Mutex::default() })
    }

    fn moves(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Told>>> {
        self.moves.lock().expect("no holder of this lock panics")
    }

    fn told(&self, name: &str) -> Option<Arc<Told>> {
        self.moves().get(name).cloned()
    }

    /// Plans it and begins; it goes on by itself. One that had come so far that it cannot be undone is shown as it is.
    pub(crate) async fn begin(self: &Arc<Self>, name: &str, request: VmMoveRequest) -> Result<VmMoveView, AgentError> {
        if let Some(rate) = request.bandwidth.filter(|rate| *rate < LEAST_BANDWIDTH) {
            let message = format!("a bandwidth of {rate} bytes a second makes no sense: give at least 1 MiB/s");
            return Err(AgentError::BadLimit { message });
        }
        match self.told(name).map(|told| told.view()) {
            Some(view) if view.state == VmMoveState::HandingOver => return Ok(view),
            Some(view) if view.state == VmMoveState::Copying => {
                let message = format!("{name} is being moved to {} already", view.to);
                return Err(AgentError::Conflict { message, hint: Some("wait for it, or cancel it".into()) });
            }
            _ => {}
        }
        if let Some(view) = self.is_there_already(name, &request.to).await? {
            return Ok(view);
        }
        let (answer, answered) = oneshot::channel();
        tokio::spawn(Arc::clone(self).run(name.to_owned(), request, answer));
        let lost = |_| AgentError::Busy { what: format!("{name}, whose move was not begun") };
        answered.await.map_err(lost)?
    }

    /// It was moved there, and whoever wanted that has not heard of it.
    async fn is_there_already(&self, name: &str, to: &str) -> Result<Option<VmMoveView>, AgentError> {
        if self.host.idle(name).is_some() || self.host.vm(name).is_ok() {
            return Ok(None);
        }
        let last = self.host.journal.last_move_out(name).await?;
        let last = last.filter(|it| it.peer == to || it.address == to);
        Ok(last.map(|it| told(name, &it.peer, VmMoveState::Done, Vec::new(), Vec::new()).view()))
    }

    async fn run(self: Arc<Self>, name: String, request: VmMoveRequest, answer: Answer) {
        let host = &self.host;
        let planned = async {
            does_not_run(host, &name).await?;
            Ok::<_, AgentError>((host.hold(&name)?, plan(host, &name, Uuid::new_v4(), &request).await?))
        };
        let (held, plan) = match planned.await {
            Ok(planned) => planned,
            Err(error) => return drop(answer.send(Err(error))),
        };
        let disks = plan.disks.iter().map(|it| it.disk.clone()).collect();
        let state = if request.dry_run { VmMoveState::Planned } else { VmMoveState::Copying };
        let told = Arc::new(told(&name, &plan.to, state, disks, plan.notes.clone()));
        if request.dry_run {
            return drop(answer.send(Ok(told.view())));
        }
        self.moves().insert(name.clone(), Arc::clone(&told));
        // Whoever asked may have gone.
        let _ = answer.send(Ok(told.view()));
        let given = leave(host, &self.copies, &plan, request.bandwidth, &told).await;
        drop((held, plan));
        match given {
            Ok(given) => hand_over(host, &given, &told, &self.settling).await,
            Err(error) => {
                tracing::warn!(vm = name, error = in_one_line(&error), "has not moved");
                told.ends(&Err(error));
            }
        }
    }

    /// Goes on with what earlier agents had begun: before anybody can start a VM.
    pub(crate) async fn take_up(self: &Arc<Self>) -> Result<(), AgentError> {
        for coming in self.host.journal.moves_in().await? {
            let from = coming.source.name.clone();
            tracing::warn!(vm = coming.coming.spec.name, from, "was on its way to here when the agent ended");
            self.host.rest(coming.record(&self.host.config.vm_dir(&coming.coming.spec.name)), Idle::Arriving(from));
        }
        for given in self.host.journal.moves_out().await? {
            tracing::warn!(vm = given.vm, to = given.peer, "was given away when the agent ended");
            if let Some(idle) = self.host.idle(&given.vm).filter(|idle| idle.record.instance == given.instance) {
                self.host.rest(idle.record, Idle::Leaving(given.peer.clone()));
            }
            let state = VmMoveState::HandingOver;
            let told = Arc::new(told(&given.vm, &given.peer, state, Vec::new(), Vec::new()));
            self.moves().insert(given.vm.clone(), Arc::clone(&told));
            let here = Arc::clone(self);
            tokio::spawn(async move { hand_over(&here.host, &given, &told, &here.settling).await });
        }
        Ok(())
    }

    /// How far the last move of a VM is.
    pub(crate) fn view(&self, name: &str) -> Result<VmMoveView, AgentError> {
        self.told(name).map(|told| told.view()).ok_or_else(|| none(name))
    }

    /// Has it end. False when there is none.
    pub(crate) fn cancel(&self, name: &str) -> Result<bool, AgentError> {
        let Some(told) = self.told(name) else { return Ok(false) };
        match told.state() {
            VmMoveState::Copying => {
                told.cancelled.cancel();
                Ok(true)
            }
            VmMoveState::HandingOver => {
                let message = format!("too late to cancel it: {name} was given to {} already", told.view().to);
                Err(AgentError::Conflict { message, hint: Some(format!("move {name} back when it is there")) })
            }
            _ => Ok(false),
        }
    }

    /// Does as the user has decided about a VM that was given away. False when this one was not.
    pub(crate) async fn resolve(&self, name: &str, how: Resolve) -> Result<bool, AgentError> {
        let given: Option<MoveOut> = self.host.journal.moves_out().await?.into_iter().find(|it| it.vm == name);
        let Some((given, told)) = given.zip(self.told(name)) else { return Ok(false) };
        decide(&self.host, &given, how, &told, &self.settling).await.map(|()| true)
    }
}

/// It has ended, and is this host's to move.
async fn does_not_run(host: &Host, name: &str) -> Result<(), AgentError> {
    match host.found(name).await {
        Ok(_) => Err(AgentError::Conflict {
            message: format!("{name} cannot be moved: it runs"),
            hint: Some(format!("`vmferry migrate {name} --to HOST` moves it while it does")),
        }),
        Err(AgentError::Ended { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn none(name: &str) -> AgentError {
    AgentError::Conflict { message: format!("{name} is not being moved"), hint: None }
}
