//! One migration under way: what all of its phases share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use vmferry_api::{MigrationEvent, Progress, Script, Step, StepTime};
use vmferry_policy::Limits;

use super::migration::Migration;
use super::plan::Plan;
use crate::engine::Seen;
use crate::error::AgentError;
use crate::host::{Host, Vm};
use crate::journal::{OutRecord, OutStep};
use crate::peers::relay::Relay;

/// How long to wait between two tries of something that must not be given up.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// When each step began.
pub(super) struct Steps {
    pub(super) request: Instant,
    pub(super) begun: Vec<(Step, Instant)>,
}

impl Steps {
    pub(super) fn begin(request: Instant) -> Self {
        Self { request, begun: vec![(Step::Plan, request)] }
    }

    pub(super) fn now(&self) -> Step {
        self.begun.last().map_or(Step::Plan, |(step, _)| *step)
    }

    pub(super) fn next(&mut self, step: Step) {
        self.begun.push((step, Instant::now()));
    }

    pub(super) fn times(&self) -> Vec<StepTime> {
        let ends = self.begun.iter().skip(1).map(|(_, at)| *at).chain([Instant::now()]);
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        self.begun.iter().zip(ends).map(|((step, from), to)| StepTime { step: *step, ms: ms(*from, to) }).collect()
    }
}

/// How a migration stopped short of its end.
pub(super) enum Halt {
    /// Before the commit: all is undone and the guest runs on here.
    Undo(AgentError),
    /// After the commit there is no way back.
    Lost(AgentError),
}

impl<E: Into<AgentError>> From<E> for Halt {
    fn from(error: E) -> Self {
        Self::Undo(error.into())
    }
}

/// One migration, past its plan.
pub(super) struct Run {
    pub(super) host: Arc<Host>,
    pub(super) migration: Arc<Migration>,
    pub(super) vm: Arc<Vm>,
    pub(super) plan: Plan,
    pub(super) limits: Limits,
    pub(super) bandwidth: Option<u64>,
    pub(super) script: Option<Script>,
    pub(super) to: String,
    pub(super) steps: Steps,
    pub(super) downtime: Duration,
    pub(super) predicted: Option<Duration>,
    pub(super) throttle: u8,
    pub(super) keep: Option<AbortOnDropHandle<()>>,
    pub(super) relay: Option<Relay>,
}

impl Run {
    pub(super) fn step(&mut self, step: Step) {
        tracing::debug!(vm = self.vm.name(), migration = %self.migration.id, ?step, "next step");
        self.steps.next(step);
        self.migration.told.tell(MigrationEvent::Step { step });
    }

    /// What the journal says of it at this step.
    pub(super) fn record(&self, step: OutStep) -> OutRecord {
        OutRecord {
            id: self.migration.id,
            vm: self.vm.name().into(),
            peer: self.plan.view.to.clone(),
            address: self.plan.peer.address().into(),
            peer_key: self.plan.peer_key,
            running: self.plan.offer.running,
            step,
        }
    }

    pub(super) fn cancelled(&self) -> Halt {
        Halt::Undo(AgentError::Cancelled { name: self.vm.name().into() })
    }

    pub(super) fn tell_progress(&mut self, seen: &Seen) {
        let it = &seen.observation;
        self.throttle = self.throttle.max(it.throttle.0);
        let step = match it.phase {
            vmferry_policy::Phase::SwitchOver => Step::SwitchOver,
            _ => self.steps.now(),
        };
        self.migration.told.tell(MigrationEvent::Progress(Progress {
            step,
            elapsed_ms: it.elapsed.as_millis() as u64,
            round: it.round,
            total: it.total.0,
            remaining: it.remaining.0,
            sent: it.sent.0,
            dirty_rate: it.dirty_rate.0,
            link_rate: it.link_rate.0,
            throttle: it.throttle.0,
        }));
    }
}
