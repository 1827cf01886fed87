//! How a migration ended, as its user is told.

use vmferry_api::{Code, MigrationEvent, Problem, Report, in_one_line};
use vmferry_custody::source::Phase;

use super::run::Run;
use super::teller::Reported;
use crate::engine::Totals;
use crate::error::AgentError;

impl Run {
    /// The last that is told of it. `stopped` is what kept it from being handed over, if something here did.
    pub(super) fn last_event(&self, stopped: Option<AgentError>, totals: Totals) -> MigrationEvent {
        let (name, to) = (self.vm.name().to_owned(), self.plan.view.to.clone());
        match self.custody.phase() {
            Phase::Over { runs: true } => MigrationEvent::Finished(Box::new(self.report(totals))),
            Phase::Stranded { theirs: None } => failed(&AgentError::Nowhere { name, reason: self.custody.why() }),
            Phase::Stranded { .. } => failed(&AgentError::GuestAtRisk { name, to, reason: self.custody.why() }),
            Phase::Owned => failed(&self.undone(stopped)),
            // It is theirs, and was not said to run.
            _ => failed(&AgentError::DoesNotRun { name, to }),
        }
    }

    fn undone(&self, stopped: Option<AgentError>) -> AgentError {
        let (name, why) = (self.vm.name().to_owned(), self.custody.why());
        if self.custody.was_kept() {
            return AgentError::Kept { name };
        }
        if !self.vm.is_alive() {
            return AgentError::SourceEnded { name, why };
        }
        match stopped {
            // The destination often knows better why its QEMU went away.
            Some(AgentError::Engine(error)) => {
                let message = match self.custody.detail() {
                    Some(detail) => format!("{}; at the destination: {detail}", in_one_line(&error)),
                    None => in_one_line(&error),
                };
                AgentError::MigrationFailed { name, message }
            }
            Some(error) => error,
            None if self.migration.was_cancelled() => self.cancelled(),
            None => AgentError::MigrationFailed { name, message: why },
        }
    }

    fn report(&self, totals: Totals) -> Report {
        self.teller.report(Reported {
            from: &self.host.config.name,
            to: &self.plan.view.to,
            engine: self.plan.mover.name().to_string(),
            policy: &self.plan.view.policy,
            paused_first: self.plan.mover.pauses_first(),
            foretold: self.foretold.clone(),
            totals,
            disks: self.disks_moved(),
        })
    }
}

/// What the user is told of a migration that did not come to its end.
fn failed(error: &AgentError) -> MigrationEvent {
    let problem = Problem::from(error);
    let is_ours = matches!(problem.code, Code::Internal | Code::QemuFailed | Code::Other);
    let message = match error {
        _ if !is_ours => return MigrationEvent::Failed(problem),
        AgentError::SourceEnded { .. } => return MigrationEvent::Failed(problem),
        AgentError::Peer(_) => format!("at the destination: {}", problem.message),
        _ => problem.message,
    };
    let name = String::new();
    let Problem { code, .. } = Problem::from(&AgentError::MigrationFailed { name, message: String::new() });
    MigrationEvent::Failed(Problem {
        code,
        message: format!("{message}; the guest runs on at the source, unharmed"),
        hint: problem.hint,
    })
}
