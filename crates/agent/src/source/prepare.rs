//! Prepare: the destination's QEMU waits, and ours is set to the same.

use std::sync::Arc;

use vmferry_api::Step;

use super::mover::Task;
use super::run::Run;
use crate::engine::RamEngine;
use crate::error::AgentError;

impl Run {
    /// The destination's QEMU waits, and ours is set to the same.
    pub(super) async fn prepare(&mut self) -> Result<Box<dyn RamEngine>, AgentError> {
        for note in self.plan.view.notes.clone() {
            self.migration.note(note);
        }
        self.teller.step(Step::Prepare);
        let mover = Arc::clone(&self.plan.mover);
        mover.set_up(&mut self.task()).await?;
        let prepared = tokio::select! {
            prepared = self.plan.peer.prepare(&self.plan.offer) => prepared?,
            () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
        };
        self.plan.markers = None;
        for note in &prepared.notes {
            self.migration.note(note.clone());
        }
        if let Some(why) = prepared.post_copy_obstacle.as_ref().filter(|_| self.limits.post_copy) {
            self.migration.note(format!("Post-copy is not possible: at {}: {why}.", self.plan.view.to));
            self.limits.post_copy = false;
        }
        mover.engine(&mut self.task(), &prepared).await
    }

    fn task(&mut self) -> Task<'_> {
        let plan = &mut self.plan;
        Task {
            id: self.migration.id,
            host: &self.host,
            vm: &self.vm,
            features: &plan.features,
            peer: &plan.peer,
            peer_key: plan.peer_key,
            remote: plan.remote,
            there: &plan.there,
            offer: &mut plan.offer,
            protect: &mut plan.protect,
            limits: &mut self.limits,
            bandwidth: self.bandwidth,
            relay: &mut self.relay,
        }
    }
}
