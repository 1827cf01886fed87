//! Copy RAM: rounds, as the policy says, until the destination has what it needs to run the guest.

use std::sync::atomic::Ordering;

use vmferry_api::{MigrationEvent, Step};
use vmferry_policy::{Action, Observation};

use super::run::Run;
use super::teller::Audience;
use crate::engine::movable::came_up;
use crate::engine::{RamEngine, Seen};
use crate::error::AgentError;
use crate::measuring::scripts::policy_of;

impl Run {
    /// Nothing has come up since the plan that keeps the guest from being moved as planned.
    async fn as_planned(&self) -> Result<(), AgentError> {
        match came_up(&self.vm.qmp, &self.plan.planned, false).await? {
            None => Ok(()),
            Some(reason) => Err(AgentError::NotMigratable {
                name: self.vm.name().into(),
                reason,
                hint: Some("plan it again".into()),
            }),
        }
    }

    /// Copies rounds of RAM, as the policy says, until the destination has what it needs to run the guest.
    pub(super) async fn copy_ram(&mut self, engine: &mut dyn RamEngine) -> Result<Seen, AgentError> {
        self.teller.step(Step::CopyRam);
        self.as_planned().await?;
        engine.start().await?;
        let mut policy = policy_of(self.script.as_ref());
        loop {
            let seen = tokio::select! {
                seen = engine.observe() => seen?,
                () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
            };
            self.teller.progress(&seen);
            self.expecting.see(&seen.observation);
            self.custody.wants(engine.guest_runs()).await;
            if seen.ready_to_commit {
                // The last moment to undo it: its disks are to be those that wait there.
                if !seen.let_go {
                    self.as_planned().await?;
                }
                return Ok(seen);
            }
            let asked = self.post_copy_is_asked_for(&seen.observation);
            if asked || !engine.guest_runs() {
                self.expecting.is_disturbed();
            }
            let action = if asked { Action::PostCopy } else { policy.decide(&seen.observation) };
            if let Some(words) = policy.words() {
                self.teller.decided(words);
            }
            match &action {
                Action::Continue | Action::Allow(_) => {}
                // What is left is sent while it stands still.
                Action::Pause => self.migration.told.tell(MigrationEvent::Step { step: Step::SwitchOver }),
                Action::PostCopy => self.migration.note(post_copy_in_words(&seen.observation, asked)),
                Action::Throttle(share) => {
                    self.migration.note(format!("So that it ends, the guest is slowed by {} %.", share.0));
                }
                Action::Pace(share) => self.migration.note(format!(
                    "So that it ends, the guest's writes are held to {} % of what the link carries.",
                    share.0
                )),
                Action::GiveUp(reason) => {
                    let name = self.vm.name().into();
                    return Err(AgentError::GaveUp { name, reason: reason.to_string() });
                }
            }
            // The last moment before QEMU lets go of it.
            if action == Action::PostCopy {
                self.as_planned().await?;
            }
            engine.apply(&action).await?;
        }
    }

    /// The user wants post-copy, and it is the moment for it.
    fn post_copy_is_asked_for(&self, seen: &Observation) -> bool {
        let copies = seen.phase == vmferry_policy::Phase::PreCopy && seen.round > 0;
        if !copies || !self.migration.wants_post_copy.swap(false, Ordering::Relaxed) {
            return false;
        }
        if !self.limits.post_copy {
            self.migration.note("Post-copy was asked for and is not possible between these hosts.");
        }
        self.limits.post_copy
    }
}

/// With what the user risks by it.
fn post_copy_in_words(seen: &Observation, asked: bool) -> String {
    let why = match asked {
        true => "Post-copy, as asked for.",
        false => "Post-copy, as that harms the guest least.",
    };
    match seen.remaining.time_at(seen.link_rate) {
        Some(rest) => {
            format!("{why} For about {:.0} s at most it needs both hosts.", rest.as_secs_f64().max(1.0).ceil())
        }
        None => why.into(),
    }
}
