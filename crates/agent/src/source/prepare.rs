//! Prepare: the destination's QEMU waits, and ours is set to the same.

use std::sync::Arc;

use vmferry_api::Step;

use super::mover::Task;
use super::run::Run;
use crate::engine::RamEngine;
use crate::error::AgentError;
use crate::peers::Prepared;

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
        let to = &self.plan.view.to;
        self.post_copy_obstacle = prepared.post_copy_obstacle.as_ref().map(|why| format!("at {to}: {why}"));
        if let Some(why) = self.post_copy_obstacle.as_ref().filter(|_| self.limits.post_copy) {
            self.migration.note(format!("Post-copy is not possible: {why}."));
            self.limits = self.limits.without_post_copy();
            self.expecting.is_disturbed();
        }
        self.same_machine(&prepared).await?;
        mover.engine(&mut self.task(), &prepared).await
    }

    /// Refuses a destination whose machine is another one than ours, before a byte is copied.
    async fn same_machine(&self, prepared: &Prepared) -> Result<(), AgentError> {
        let (here, there) = (&self.host.config.name, &self.plan.view.to);
        let Some(theirs) = &prepared.inventory else {
            if self.plan.changed {
                let differences =
                    vec!["it does not tell what it is made of, and ours was changed since its start".into()];
                return Err(AgentError::OtherMachine { name: self.vm.name().into(), to: there.clone(), differences });
            }
            self.migration.note(format!("{there} does not tell what the machine that waits there is made of."));
            return Ok(());
        };
        let ours = self.plan.places.in_inventory(self.vm.inventory().await?);
        // What the guest of one that was adopted had changed by then nobody knows.
        let before = self.vm.first_inventory().filter(|_| !self.vm.spec.adopted);
        let unloadable = ours.unloadable(&self.plan.there.qemu_version, &self.vm.facts.qemu_version);
        let mut differences = ours.differences(theirs, before.as_ref(), &format!("at {here}"), &format!("at {there}"));
        differences.extend(unloadable);
        if differences.is_empty() {
            return Ok(());
        }
        Err(AgentError::OtherMachine { name: self.vm.name().into(), to: there.clone(), differences })
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
            planned: &plan.planned,
            there: &plan.there,
            offer: &mut plan.offer,
            protect: &mut plan.protect,
            limits: &mut self.limits,
            bandwidth: self.bandwidth,
            relay: &mut self.relay,
        }
    }
}
