//! A VM leaves: its disks are copied, and then it is given away.

use std::sync::Arc;

use uuid::Uuid;
use vmferry_api::{CopyEvent, CopyRequest};

use super::plan::{Plan, written};
use super::told::Told;
use crate::copying::{self, Copies};
use crate::error::AgentError;
use crate::host::{Host, Idle};
use crate::journal::MoveOut;
use crate::peers::DiskThere;

/// How often all of them are copied: what was written to meanwhile is copied again, once.
const ROUNDS: u32 = 2;

/// Copies what is missing there, and gives the VM away. Nobody starts it meanwhile. Until this answers it is this host's.
pub(super) async fn leave(
    host: &Host,
    copies: &Arc<Copies>,
    plan: &Plan,
    bandwidth: Option<u64>,
    told: &Told,
) -> Result<MoveOut, AgentError> {
    let name = &plan.record.spec.name;
    let mut rounds = 0;
    loop {
        let there = tokio::select! {
            there = plan.peer.begin_move(&plan.offer) => there?.there,
            () = told.cancelled.cancelled() => return Err(cancelled(name)),
        };
        let is_whole = |it: &DiskThere| *it == DiskThere::Whole;
        if there.len() == plan.disks.len() && there.iter().all(is_whole) {
            break;
        }
        if rounds == ROUNDS || there.len() != plan.disks.len() {
            return Err(failed(format!("{} has not got the disks of {name} after they were copied", plan.to)));
        }
        rounds += 1;
        let (mut done, mut sent) = (0, 0);
        for (leaving, there) in plan.disks.iter().zip(there) {
            if !is_whole(&there) {
                let request = CopyRequest {
                    image: leaving.disk.from.clone(),
                    to: plan.peer.address().into(),
                    path: leaving.disk.to.clone(),
                    bandwidth,
                    verify: true,
                    update: there == DiskThere::Older,
                };
                sent += copy(copies, request, told, (done, sent)).await?;
            }
            done += leaving.disk.size;
            told.progress(done, sent);
        }
    }
    for (leaving, then) in plan.disks.iter().zip(&plan.offer.written) {
        if written(&leaving.disk.from)? != *then {
            let path = leaving.disk.from.display();
            return Err(failed(format!("{path} has changed while it was copied: somebody writes it")));
        }
    }
    if told.cancelled.is_cancelled() {
        return Err(cancelled(name));
    }
    let given = MoveOut {
        id: plan.offer.vm.id,
        vm: name.clone(),
        instance: plan.record.instance.clone(),
        peer: plan.to.clone(),
        peer_key: plan.peer_key,
        address: plan.peer.address().into(),
        disks: plan.disks.iter().map(|it| it.disk.from.clone()).collect(),
        done: false,
    };
    host.journal.give_vm(&given).await?;
    host.rest(plan.record.clone(), Idle::Leaving(plan.to.clone()));
    told.hands_over();
    tracing::info!(vm = name, id = %given.id, to = plan.to, "is given away, with its disks");
    Ok(given)
}

/// Copies one of them, after so much was done and sent; the answer is how much was sent of it.
async fn copy(copies: &Arc<Copies>, request: CopyRequest, told: &Told, before: (u64, u64)) -> Result<u64, AgentError> {
    let id: Uuid = copying::begin(copies, request).await?;
    let leaving = copies.leaving(id)?;
    let mut watched = leaving.watch();
    let mut is_cancelled = false;
    loop {
        tokio::select! {
            changed = watched.changed() => if changed.is_err() {
                return Err(failed("the copy was lost sight of".into()));
            },
            () = told.cancelled.cancelled(), if !is_cancelled => {
                is_cancelled = true;
                leaving.cancel();
                continue;
            }
        }
        let event = watched.borrow_and_update().clone();
        match event {
            CopyEvent::Progress(it) => told.progress(before.0 + it.done, before.1 + it.wire_sent),
            CopyEvent::Finished(report) => return Ok(report.wire_sent),
            CopyEvent::Failed(problem) => {
                return Err(AgentError::CopyFailed { message: problem.message, cancelled: is_cancelled });
            }
        }
    }
}

fn failed(message: String) -> AgentError {
    AgentError::CopyFailed { message, cancelled: false }
}

fn cancelled(name: &str) -> AgentError {
    AgentError::CopyFailed { message: format!("cancelled; {name} is here as it was"), cancelled: true }
}
