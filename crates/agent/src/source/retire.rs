//! Retire: what is left here of a guest that was handed over goes; or stays, when its memory could not follow.

use uuid::Uuid;
use vmferry_api::{Report, Step};

use super::run::{Halt, Run};
use crate::engine::Totals;
use crate::error::AgentError;
use crate::host::{Host, Stage, Vm};
use crate::journal::OutStep;

impl Run {
    /// What is left here goes.
    pub(super) async fn retire(&mut self, totals: Totals, post_copy: bool) -> Result<Report, Halt> {
        self.step(Step::Retire);
        retire(&self.host, &self.vm, self.migration.id).await.map_err(Halt::Lost)?;
        Ok(Report {
            id: self.migration.id,
            vm: self.vm.name().into(),
            from: self.host.config.name.clone(),
            to: self.plan.view.to.clone(),
            engine: self.plan.engine.name().to_string(),
            post_copy,
            paused_first: self.plan.post_copy_first,
            total_ms: self.steps.request.elapsed().as_secs_f64() * 1e3,
            downtime_ms: self.downtime.as_secs_f64() * 1e3,
            predicted_downtime_ms: self.predicted.map(|it| it.as_secs_f64() * 1e3),
            qemu_downtime_ms: totals.downtime_ms,
            sent: totals.sent,
            deltas: totals.deltas,
            saved_by_deltas: totals.saved_by_deltas,
            rounds: totals.rounds,
            dirty_rate: totals.dirty_rate,
            throttle: self.throttle,
            steps: self.steps.times(),
        })
    }

    /// Some of the guest's memory may be here only, and cannot follow.
    pub(super) fn stranded(&self, reason: String) -> Halt {
        let (name, to) = (self.vm.name().into(), self.to.clone());
        let error = strand(&self.host, &self.vm, self.migration.id, &reason).err();
        Halt::Lost(error.unwrap_or(AgentError::GuestAtRisk { name, to, reason }))
    }
}

/// Ends what is left of a guest that runs elsewhere.
pub(crate) async fn retire(host: &Host, vm: &Vm, id: Uuid) -> Result<(), AgentError> {
    vm.quit().await;
    host.forget_vm(vm)?;
    host.store.end_out(id, OutStep::Done, "the guest runs on the destination")?;
    Ok(())
}

/// The guest is elsewhere, or nowhere, and what is left of it here may be all that there is of some of its memory.
pub(crate) fn strand(host: &Host, vm: &Vm, id: Uuid, reason: &str) -> Result<(), AgentError> {
    vm.set_stage(Stage::Stranded);
    host.store.strand(vm.name())?;
    Ok(host.store.end_out(id, OutStep::Done, &format!("post-copy could not be finished: {reason}"))?)
}
