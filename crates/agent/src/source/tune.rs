//! Limits that are changed while a migration runs.
//!
//! Whoever changes them waits for the migration itself to take them in, between two looks: so it hears whether they hold,
//! and nothing is half done. From the switchover on nobody takes them any more.

use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use vmferry_api::{TuneRequest, Tuned, in_one_line};
use vmferry_policy::queue::share;
use vmferry_policy::{BytesPerSec, Limits};

use super::changes::Change;
use super::decider;
use super::limits::Asked;
use super::migration::Migration;
use super::run::Run;
use crate::engine::RamEngine;
use crate::engine::budget::Budget;
use crate::error::AgentError;

impl Migration {
    /// Has its limits changed, and waits until they are. [`AgentError::BadLimit`] when they make no sense,
    /// [`AgentError::Conflict`] when they cannot be changed (any more).
    pub(crate) async fn tune(&self, wanted: TuneRequest) -> Result<Tuned, AgentError> {
        let (answer, answered) = oneshot::channel();
        match self.changes.try_send(Change { wanted, answer }) {
            Ok(()) => answered.await.unwrap_or_else(|_| Err(self.too_late())),
            Err(TrySendError::Full(_)) => Err(AgentError::Busy { what: "other changes of its limits".into() }),
            Err(TrySendError::Closed(_)) => Err(self.too_late()),
        }
    }

    fn too_late(&self) -> AgentError {
        let is = if self.told.is_over() { "has ended" } else { "is past its switchover, or being ended" };
        let message = format!("the limits of {} cannot be changed any more: its migration {is}", self.vm);
        AgentError::Conflict { message, hint: Some("`vmferry migrations` tells how it stands".into()) }
    }
}

impl Run {
    /// Takes in what its user has changed meanwhile, `elapsed` after the copy began; true when something was.
    pub(super) async fn take_changes(&mut self, engine: &mut dyn RamEngine, elapsed: Duration) -> bool {
        let mut changed = self.take_share(engine).await;
        while let Some(Change { wanted, answer }) = self.changes.as_mut().and_then(|it| it.try_recv().ok()) {
            let taken = self.tune(engine, &wanted, elapsed).await;
            changed |= taken.is_ok();
            // Whoever asked may have gone; it holds all the same.
            let _ = answer.send(taken);
        }
        changed
    }

    /// Takes its share of the bandwidth where it has one limit with others, as far as that is another than before; true if
    /// so.
    async fn take_share(&mut self, engine: &mut dyn RamEngine) -> bool {
        if self.changes.is_none() {
            return false;
        }
        let siblings = self.migration.siblings();
        if siblings == std::mem::replace(&mut self.siblings, siblings) || self.asked.bandwidth.is_none() {
            return false;
        }
        let taken = self.set(engine, self.asked, self.limits).await;
        if let Err(error) = &taken {
            tracing::warn!(vm = self.vm.name(), error = in_one_line(error), "cannot send at another rate");
        }
        taken.is_ok()
    }

    /// Nothing is changed any more.
    pub(super) fn no_more_changes(&mut self) {
        self.changes = None;
    }

    async fn tune(
        &mut self,
        engine: &mut dyn RamEngine,
        wanted: &TuneRequest,
        elapsed: Duration,
    ) -> Result<Tuned, AgentError> {
        if self.script.is_some() {
            let message = format!("a measurement of {} says itself what is done", self.vm.name());
            return Err(AgentError::Conflict { message, hint: None });
        }
        if let Some(baseline) = self.baseline.filter(|_| Asked::is_of_decisions(wanted)) {
            let message = format!("{} decides by limits of its own, which cannot be changed", baseline.name);
            let hint = Some("only its bandwidth, and whether post-copy is allowed, can be".into());
            return Err(AgentError::Conflict { message, hint });
        }
        let asked = self.asked.tuned(wanted, elapsed)?;
        let limits = self.possible(&asked, wanted, engine)?;
        let text = asked.unlike(&self.asked);
        let tuned = Tuned { elapsed_ms: elapsed.as_millis() as u64, text };
        if tuned.text.is_empty() {
            return Ok(tuned);
        }
        self.set(engine, asked, limits).await?;
        self.migration.allow_post_copy(limits.post_copy);
        self.teller.tuned(tuned.clone());
        Ok(tuned)
    }

    /// These limits hold from now on.
    async fn set(&mut self, engine: &mut dyn RamEngine, asked: Asked, limits: Limits) -> Result<(), AgentError> {
        let own = self.own_share(&asked);
        let limits = Limits { bandwidth: own.map(BytesPerSec), ..limits };
        let bandwidth = decider::cap(self.baseline, own.or(self.plan.rate));
        engine.set_limits(limits, bandwidth).await?;
        if let Some(mirrors) = &self.mirrors {
            // Until the RAM is copied they have all of it.
            let share = if self.copies_ram { bandwidth.map(Budget::for_disks) } else { bandwidth };
            mirrors.set_rate(share);
        }
        (self.asked, self.limits, self.bandwidth) = (asked, limits, bandwidth);
        Ok(())
    }

    /// What of its user's limit of bandwidth is its own, in bytes a second.
    fn own_share(&self, asked: &Asked) -> Option<u64> {
        asked.bandwidth.map(|budget| share(BytesPerSec(budget), self.siblings).0)
    }

    /// The limits, as far as this migration can still keep to them.
    fn possible(&self, asked: &Asked, wanted: &TuneRequest, engine: &dyn RamEngine) -> Result<Limits, AgentError> {
        let fixed = |message: String, hint: &str| Err(AgentError::Conflict { message, hint: Some(hint.into()) });
        let limits = asked.limits()?;
        let obstacle = self.post_copy_obstacle.clone().or_else(|| engine.post_copy_obstacle());
        match obstacle {
            Some(why) if wanted.post_copy == Some(true) => {
                fixed(format!("post-copy cannot be allowed any more: {why}"), "cancel it, and begin again")
            }
            Some(_) => Ok(limits.without_post_copy()),
            None if self.plan.mover.pauses_first() && !limits.post_copy => fixed(
                "post-copy cannot be forbidden any more: its guest can move by nothing else".into(),
                "cancel it; `vmferry migrate` tells what else there is",
            ),
            None => Ok(limits),
        }
    }
}
