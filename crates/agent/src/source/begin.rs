//! A migration from its plan to its end: its phases, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use vmferry_api::{Code, MigrateRequest, MigrationEvent, PlanView, Problem, Report, in_one_line};

use super::migration::Migration;
use super::outgoing::Outgoing;
use super::plan::{claim, limits, plan, predict};
use super::run::{Halt, Run, Steps};
use super::undo::undone;
use crate::engine::RamEngine;
use crate::error::AgentError;
use crate::host::Stage;
use crate::peers::Peer;

/// How often the destination is told that the source is still there.
const KEEP: Duration = Duration::from_secs(3);

/// Plans the migration and, unless it is a dry run, starts it.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    name: &str,
    request: MigrateRequest,
) -> Result<(PlanView, Option<Arc<Migration>>), AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let id = Uuid::new_v4();
    let limits = limits(&request)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(host, &vm, id, &request).await?;
    if request.dry_run {
        predict(&mut plan, limits.post_copy).await?;
        return Ok((plan.view, None));
    }
    let migration = Migration::new(id, name, plan.peer.apart(), limits.post_copy);
    outgoing.add(Arc::clone(&migration));
    claim.keep(Stage::Migrating(id));
    let view = plan.view.clone();
    let bandwidth = request.bandwidth.or(plan.rate);
    let run = Run {
        host: Arc::clone(host),
        migration: Arc::clone(&migration),
        vm,
        plan,
        limits,
        bandwidth,
        script: request.script,
        to: request.to,
        steps: Steps::begin(begun),
        downtime: Duration::ZERO,
        predicted: None,
        throttle: 0,
        keep: None,
        relay: None,
    };
    tokio::spawn(run.run());
    Ok((view, Some(migration)))
}

impl Run {
    async fn run(mut self) {
        let mut engine = None;
        let outcome = match self.all_steps(&mut engine).await {
            Err(Halt::Undo(error)) => self.undo(engine.as_deref_mut(), error).await,
            other => other,
        };
        let last = match outcome {
            Ok(report) => MigrationEvent::Finished(Box::new(report)),
            Err(Halt::Undo(error)) => MigrationEvent::Failed(undone(self.vm.name(), &error)),
            Err(Halt::Lost(error)) => {
                MigrationEvent::Failed(Problem { code: Code::GuestAtRisk, ..Problem::from(&error) })
            }
        };
        if let MigrationEvent::Failed(problem) = &last {
            tracing::warn!(vm = self.vm.name(), migration = %self.migration.id, "{}", problem.message);
        } else {
            tracing::info!(vm = self.vm.name(), migration = %self.migration.id, to = self.to, "migrated");
        }
        self.migration.told.tell(last);
    }

    async fn all_steps(&mut self, engine: &mut Option<Box<dyn RamEngine>>) -> Result<Report, Halt> {
        let engine = engine.insert(self.prepare().await?).as_mut();
        self.keep = Some(keep_alive(self.plan.peer.clone(), self.migration.id));
        let switched = self.copy_ram(engine).await?;
        self.hand_over(engine, &switched).await
    }
}

/// Tells the destination every now and then that the source is still there, until dropped.
fn keep_alive(peer: Peer, id: Uuid) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(KEEP).await;
            if let Err(error) = peer.keep(id).await {
                tracing::debug!(migration = %id, error = in_one_line(&error), "the destination did not hear of us");
            }
        }
    }))
}
