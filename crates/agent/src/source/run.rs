//! One migration under way: what all of its phases share, and the way through them.

use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use vmferry_api::{Foretold, MigrationEvent, Script, in_one_line};
use vmferry_custody::source::{Event, Phase, Qemu};
use vmferry_policy::Limits;
use vmferry_policy::baselines::Baseline;

use super::all_disks::AllDisks;
use super::changes::Change;
use super::compare::{Done, compare};
use super::custody::{Custody, Hands};
use super::expect::Expecting;
use super::limits::Asked;
use super::migration::Migration;
use super::outgoing::Outgoing;
use super::plan::Plan;
use super::post_copy::Serving;
use super::teller::Teller;
use super::turn::Turn;
use crate::engine::budget::Budget;
use crate::engine::disks::Mirrors;
use crate::engine::{RamEngine, Seen};
use crate::error::AgentError;
use crate::host::{Host, Vm};
use crate::peers::Peer;
use crate::peers::relay::Relay;

/// How often the destination is told that the source is still there.
const KEEP: Duration = Duration::from_secs(3);

/// One migration, past its plan.
pub(super) struct Run {
    pub(super) host: Arc<Host>,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) migration: Arc<Migration>,
    pub(super) custody: Arc<Custody>,
    pub(super) teller: Arc<Teller>,
    pub(super) vm: Arc<Vm>,
    pub(super) plan: Plan,
    /// As its user said it.
    pub(super) asked: Asked,
    /// The same as far as it is possible.
    pub(super) limits: Limits,
    pub(super) bandwidth: Option<u64>,
    /// What its user changes of that; none when it is too late for it.
    pub(super) changes: Option<mpsc::Receiver<Change>>,
    /// Why the destination cannot run it before all of its RAM is there, if so.
    pub(super) post_copy_obstacle: Option<String>,
    /// When it may be in post-copy.
    pub(super) turn: Turn,
    /// With how many it shares the bandwidth that its user allows, this one among them.
    pub(super) siblings: u32,
    /// Its disks are in step, and leave some of the bandwidth to its RAM.
    pub(super) copies_ram: bool,
    pub(super) script: Option<Script>,
    /// Another manager whose policy decides.
    pub(super) baseline: Option<&'static Baseline>,
    pub(super) to: String,
    pub(super) keep: Option<AbortOnDropHandle<()>>,
    pub(super) relay: Option<Relay>,
    /// Its own disks, on their way.
    pub(super) mirrors: Option<Arc<Mirrors>>,
    /// What it is going to do.
    pub(super) expecting: Expecting,
    /// What it was expected to do, when it is done.
    pub(super) foretold: Option<Foretold>,
}

impl Run {
    /// To its end, whichever that is.
    pub(super) async fn run(mut self) {
        let mut engine = None;
        let moved = self.move_guest(&mut engine).await;
        self.no_more_changes();
        let stopped = match moved {
            Ok(seen) => {
                self.hand_over(engine.as_ref().is_none_or(|engine| engine.guest_runs()), seen);
                None
            }
            Err(error) => {
                if let Some(mirrors) = &self.mirrors {
                    mirrors.end().await;
                }
                self.custody.because(in_one_line(&error));
                self.custody.tell(Event::Failed);
                Some(error)
            }
        };
        let way = self.plan.mover.way(self.plan.remote, self.relay.as_ref());
        let serving = Some(Serving::new(way, self.relay.take()));
        let teller = Arc::clone(&self.teller);
        let mut hands = Hands { engine, serving, audience: teller.as_ref() };
        self.custody.drive(&mut hands).await;
        self.turn.give_back();
        if let (Phase::Owned, Some(mirrors)) = (self.custody.phase(), &self.mirrors) {
            mirrors.end().await;
        }
        let totals = hands.engine.as_ref().map(|engine| engine.totals()).unwrap_or_default();
        if let (Phase::Owned, kept @ 1..) = (self.custody.phase(), self.custody.kept_there()) {
            self.migration.note(format!(
                "{} keeps what has arrived of its disks ({}) for a day: another try need not send it.",
                self.plan.view.to,
                ByteSize(kept)
            ));
        }
        let retired = self.retired().await;
        if let Phase::Over { runs: true } = self.custody.phase() {
            let expecting = std::mem::replace(&mut self.expecting, Expecting::nothing());
            let (book, engine) = (self.teller.book(), self.plan.mover.name().to_string());
            let done = Done { peer: self.plan.peer_key, engine: &engine, book: &book, sent: totals.sent };
            self.foretold = compare(&self.host, expecting, done).await;
        }
        let last = self.last_event(stopped, totals);
        if let MigrationEvent::Failed(problem) = &last {
            tracing::warn!(vm = self.vm.name(), migration = %self.migration.id, "{}", problem.message);
        } else {
            tracing::info!(vm = self.vm.name(), migration = %self.migration.id, to = self.to, "migrated");
        }
        self.migration.told.tell(last);
        if !retired {
            // What is stranded must not run, until its user decides.
            self.custody.drive(&mut hands).await;
            self.retired().await;
        }
    }

    /// Sees to what is left when it is over. False when it is not.
    async fn retired(&self) -> bool {
        if let Phase::Stranded { .. } = self.custody.phase() {
            return false;
        }
        if let Phase::Over { .. } = self.custody.phase() {
            self.leaves_its_disks();
        }
        self.outgoing.is_over(&self.custody).await;
        true
    }

    async fn move_guest(&mut self, engine: &mut Option<Box<dyn RamEngine>>) -> Result<Seen, AgentError> {
        let engine = engine.insert(self.prepare().await?).as_mut();
        self.keep = Some(keep_alive(self.plan.peer.clone(), self.migration.id));
        if self.plan.offer.disks_session.is_some() {
            engine.reserve().await?;
        }
        self.copy_disks(engine).await?;
        if let (Some(mirrors), Some(cap)) = (&self.mirrors, self.bandwidth) {
            mirrors.set_rate(Some(Budget::for_disks(cap)));
        }
        self.copies_ram = true;
        engine.brings_disks(Arc::new(AllDisks::flush(&self.vm, self.mirrors.clone()).await));
        self.copy_ram(engine).await
    }

    /// The destination has what it needs. From here on there is only forward, unless it says no.
    fn hand_over(&self, running: bool, seen: Seen) {
        let qemu = if seen.let_go { Qemu::LetGo } else { Qemu::Stands };
        let complete = seen.complete;
        self.teller.switched(seen);
        for event in [Event::Wants { running }, Event::Told(qemu), Event::Ready { complete }] {
            self.custody.tell(event);
        }
    }

    pub(super) fn cancelled(&self) -> AgentError {
        AgentError::Cancelled { name: self.vm.name().into() }
    }
}

/// Tells the destination every now and then that the source is still there, until dropped.
fn keep_alive(peer: Peer, id: Uuid) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(KEEP).await;
            if let Err(error) = peer.keep(id).await {
                tracing::debug!(migration = %id, error = in_one_line(&error), "the destination did not hear of us");
            }
        }
    }))
}
