//! Commit: the destination's journal takes the guest over. From here on there is only forward, unless it says no.

use std::time::Instant;

use uuid::Uuid;
use vmferry_api::{MigrationEvent, Report, Step, in_one_line};

use super::run::{Halt, RETRY, Run};
use crate::engine::{RamEngine, Seen};
use crate::error::AgentError;
use crate::host::Stage;
use crate::journal::{InStep, OutStep};
use crate::peers::Peer;

impl Run {
    /// From here on there is only forward, unless the destination says no.
    pub(super) async fn hand_over(&mut self, engine: &mut dyn RamEngine, switched: &Seen) -> Result<Report, Halt> {
        self.commit(switched).await?;
        if !switched.complete {
            self.post_copy(engine).await?;
        }
        let totals = engine.totals();
        engine.close().await;
        self.retire(totals, !switched.complete).await
    }

    /// The destination takes the guest over. Until it has answered whether it did, the guest stays paused here.
    async fn commit(&mut self, switched: &Seen) -> Result<(), Halt> {
        let paused_at = switched.paused_at.unwrap_or_else(Instant::now);
        self.steps.begun.push((Step::SwitchOver, paused_at));
        self.steps.next(Step::Commit);
        self.host.store.step_out(self.migration.id, OutStep::Commit)?;
        self.vm.set_stage(Stage::InDoubt(self.migration.id));
        let settled = settle_commit(&self.plan.peer, self.migration.id, |text| self.migration.note(text)).await;
        self.downtime = paused_at.elapsed();
        match settled {
            Ok(()) => {
                if let Some(pages) = switched.last_pages {
                    let (name, post_copy) = (self.vm.name(), !switched.complete);
                    self.predicted = Some(pages + self.host.switchover_time(name, post_copy));
                    // A guest that a script pauses stands still for longer than a switchover takes.
                    if self.script.is_none() {
                        self.host.note_switchover(name, post_copy, self.downtime.saturating_sub(pages));
                    }
                }
                self.migration.told.tell(MigrationEvent::Step { step: Step::Commit });
                let next = if switched.complete { OutStep::Retire } else { OutStep::PostCopy };
                self.vm.set_stage(Stage::Left(self.migration.id));
                self.host.store.step_out(self.migration.id, next).map_err(|error| Halt::Lost(error.into()))
            }
            Err(why) => Err(Halt::Undo(AgentError::MigrationFailed {
                name: self.vm.name().into(),
                message: format!("the destination did not take the guest over: {why}"),
            })),
        }
    }
}

/// Asks the destination to take the guest over until it has answered: `Err` says why it never will.
pub(crate) async fn settle_commit(peer: &Peer, id: Uuid, note: impl Fn(String)) -> Result<(), String> {
    let mut told = false;
    loop {
        match peer.commit(id).await {
            Ok(state) => match state.step {
                InStep::Committed => return Ok(()),
                InStep::Abandoned => return Err(state.detail.unwrap_or_else(|| "it gives no reason".into())),
                // That is no answer.
                InStep::Prepared => tokio::time::sleep(RETRY).await,
            },
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    note(format!(
                        "Whether {} took the guest over is not known ({}). It stays paused here until that host answers.",
                        peer.address(),
                        in_one_line(&error)
                    ));
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
