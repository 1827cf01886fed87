//! Copy RAM: rounds, as the policy says, until the destination has what it needs to run the guest.

use std::sync::atomic::Ordering;
use std::time::Duration;

use vmferry_api::{MigrationEvent, Step};
use vmferry_policy::{Action, Observation, Phase};

use super::decider;
use super::run::Run;
use super::teller::Audience;
use crate::engine::movable::came_up;
use crate::engine::{RamEngine, Seen};
use crate::error::AgentError;

/// How often it is looked whether its user wants post-copy now.
const LOOK: Duration = Duration::from_millis(200);
const HELD_UP: &str = "Post-copy has to wait: as many guests of this host are in it as may be.";

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
        if self.plan.mover.pauses_first() {
            self.waits_for_post_copy().await?;
        }
        engine.start().await?;
        let mut policy = decider::policy(self.baseline, self.script.as_ref());
        loop {
            let mut seen = tokio::select! {
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
            if seen.observation.phase == Phase::PreCopy {
                if self.take_changes(engine, seen.observation.elapsed).await {
                    seen.observation.limits = self.limits;
                    self.expecting.is_disturbed();
                }
            } else {
                self.no_more_changes();
            }
            let asked = self.post_copy_is_asked_for(&seen.observation);
            if !self.turn.is_free() && seen.observation.limits.post_copy {
                seen.observation.limits.post_copy = false;
                self.expecting.is_disturbed();
            }
            let decided = if asked { Action::PostCopy } else { policy.decide(&seen.observation) };
            let (action, is_held_up) = self.turn.take(decided, asked, self.limits.post_copy);
            if asked || is_held_up || !engine.guest_runs() {
                self.expecting.is_disturbed();
            }
            if is_held_up {
                self.migration.note(HELD_UP);
            }
            if let Some(words) = policy.words() {
                self.teller.decided(words);
            }
            match &action {
                Action::Continue | Action::Allow(_) => {}
                // What is left is sent while it stands still.
                Action::Pause => self.migration.told.tell(MigrationEvent::Step { step: Step::SwitchOver }),
                Action::PostCopy => {
                    let by = self.baseline.filter(|_| !asked).map(|it| it.name);
                    self.migration.note(post_copy_in_words(&seen.observation, asked, by));
                }
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
            if matches!(action, Action::Pause | Action::PostCopy) {
                self.no_more_changes();
            }
            // The last moment before QEMU lets go of it.
            if action == Action::PostCopy {
                self.as_planned().await?;
            }
            engine.apply(&action).await?;
        }
    }

    /// Of one that goes by post-copy from its first byte: the guest runs here until it may.
    async fn waits_for_post_copy(&mut self) -> Result<(), AgentError> {
        if self.turn.try_seat() {
            return Ok(());
        }
        self.migration.note(HELD_UP);
        let asked = async {
            while !self.migration.wants_post_copy.swap(false, Ordering::Relaxed) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = self.turn.wait() => Ok(()),
            () = asked => Ok(()),
            () = self.migration.cancel.cancelled() => Err(self.cancelled()),
        }
    }

    /// The user wants post-copy, and it is the moment for it.
    fn post_copy_is_asked_for(&self, seen: &Observation) -> bool {
        let copies = seen.phase == Phase::PreCopy && seen.round > 0;
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
fn post_copy_in_words(seen: &Observation, asked: bool, by: Option<&str>) -> String {
    let why = match (asked, by) {
        (true, _) => "Post-copy, as asked for.".into(),
        (false, Some(manager)) => format!("Post-copy, as {manager} decides."),
        (false, None) => "Post-copy, as that harms the guest least.".to_owned(),
    };
    match seen.remaining.time_at(seen.link_rate) {
        Some(rest) => {
            format!("{why} For about {:.0} s at most it needs both hosts.", rest.as_secs_f64().max(1.0).ceil())
        }
        None => why,
    }
}
