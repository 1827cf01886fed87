//! Undo: everything is as it was, the guest first, then the destination. When QEMU has let go of the guest in the
//! meantime, there is only forward.

use std::sync::Arc;

use vmferry_api::{Code, Problem, Report, in_one_line};

use super::run::{Halt, RETRY, Run};
use super::settle::{abandon_there, settle};
use crate::engine::{EngineError, RamEngine};
use crate::error::AgentError;
use crate::host::Stage;
use crate::journal::OutStep;

/// How often a QEMU that does not do as told is asked to stop copying before the user is told.
const ABANDON_TRIES: u32 = 3;

impl Run {
    /// Brings everything back to what it was: the guest first, then the destination. When QEMU has let go of the guest
    /// in the meantime, there is only forward.
    pub(super) async fn undo(
        &mut self,
        engine: Option<&mut (dyn RamEngine + 'static)>,
        error: AgentError,
    ) -> Result<Report, Halt> {
        let id = self.migration.id;
        self.vm.set_stage(Stage::Migrating(id));
        if let Some(engine) = engine {
            match self.abandon_copy(engine).await {
                Ok(()) => {}
                Err(EngineError::TooLate) => return self.forward(engine, &error).await,
                Err(stuck) => return Err(self.undo_later(&stuck)),
            }
        }
        let why = in_one_line(&error);
        let there = self.plan.peer.abandon(id).await;
        if there.is_err() {
            // Its agent may be about to come back; what it prepared should not wait for its lease to run out.
            let peer = self.plan.peer.clone();
            tokio::spawn(async move { abandon_there(&peer, id).await });
        }
        let error = match (error, there) {
            // The destination often knows better why its QEMU went away.
            (AgentError::Engine(error), there) => {
                let detail = there.ok().and_then(|state| state.detail).filter(|detail| !detail.is_empty());
                let message = match detail {
                    Some(detail) => format!("{}; at the destination: {detail}", in_one_line(&error)),
                    None => in_one_line(&error),
                };
                AgentError::MigrationFailed { name: self.vm.name().into(), message }
            }
            (error, _) => error,
        };
        self.vm.set_stage(Stage::Owned);
        if let Err(error) = self.host.store.end_out(id, OutStep::Abandoned, &why) {
            tracing::error!(%error, "cannot write the journal");
        }
        if !self.vm.is_alive() {
            return Err(Halt::Undo(AgentError::SourceEnded { name: self.vm.name().into(), why }));
        }
        Err(Halt::Undo(error))
    }

    async fn abandon_copy(&self, engine: &mut dyn RamEngine) -> Result<(), EngineError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match engine.abandon().await {
                Err(EngineError::TooLate) => return Err(EngineError::TooLate),
                Err(_) if !self.vm.is_alive() => return Ok(()),
                Err(_) if tries < ABANDON_TRIES => tokio::time::sleep(RETRY).await,
                outcome => return outcome,
            }
        }
    }

    /// It was to be undone, but QEMU has let go of the guest: only the destination can have it now.
    async fn forward(&mut self, engine: &mut dyn RamEngine, error: &AgentError) -> Result<Report, Halt> {
        self.migration.note(format!(
            "Too late to undo it ({}): the guest is on its way and goes on by post-copy.",
            in_one_line(error)
        ));
        let forward = async {
            let switched = engine.observe().await?;
            self.hand_over(engine, &switched).await
        };
        match forward.await {
            Err(Halt::Undo(refused)) => {
                let reason = format!("QEMU here had let go of it, and {}", in_one_line(&refused));
                Err(self.stranded(reason))
            }
            other => other,
        }
    }

    /// Its QEMU does not do as told; whoever settles what a crashed agent left goes on trying.
    fn undo_later(&self, stuck: &EngineError) -> Halt {
        tokio::spawn(settle(Arc::clone(&self.host), self.record(OutStep::CopyRam)));
        Halt::Lost(AgentError::Unsettled { name: self.vm.name().into(), reason: in_one_line(stuck) })
    }
}

/// What the user is told of a migration that was undone.
pub(super) fn undone(name: &str, error: &AgentError) -> Problem {
    let problem = Problem::from(error);
    if !matches!(problem.code, Code::Internal | Code::QemuFailed | Code::Other) {
        return problem;
    }
    let message = match error {
        AgentError::SourceEnded { .. } => return problem,
        AgentError::Peer(_) => format!("at the destination: {}", problem.message),
        _ => problem.message,
    };
    Problem { hint: problem.hint, ..Problem::from(&AgentError::MigrationFailed { name: name.into(), message }) }
}
