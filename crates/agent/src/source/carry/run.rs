//! libvirt migrates, and is watched and steered meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use vmferry_api::{MigrationEvent, Problem, Step, Tuned, in_one_line};
use vmferry_custody::Start;
use vmferry_custody::source::Phase as Custody;
use vmferry_libvirt::{ConnectionError, Event, Migration as Call};
use vmferry_policy::{Action, BytesPerSec, Costs, Limits, Observation, Phase, Policy};

use super::outcome::{Whereabouts, find_out};
use super::plan::{ENGINE, Plan};
use super::report::report;
use super::settle::settle;
use super::steering::{Steering, mib};
use super::under_way::Carry;
use super::ways::Ways;
use crate::engine::Seen;
use crate::error::AgentError;
use crate::host::Host;
use crate::journal::{CarryEnd, CarryRecord};
use crate::peers::{Channel, DomainThere};
use crate::source::changes::Change;
use crate::source::compare::{Done, compare};
use crate::source::decider;
use crate::source::expect::Expecting;
use crate::source::limits::Asked;
use crate::source::migration::Migration;
use crate::source::outgoing::Outgoing;
use crate::source::teller::{Audience, Teller};
use crate::source::turn::Turn;

/// How often libvirt's job is looked at: until the copy begins, since what is set must be set before QEMU could switch
/// over, which it does not within its first tenth of a second; and then.
const FIRST_LOOK: Duration = Duration::from_millis(15);
const LOOK: Duration = Duration::from_millis(100);
/// How long it is tried to find out what came of one whose end was not heard, while its user looks.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the destination may take to say that the guest runs when libvirt says that it is there.
const RUNS: Duration = Duration::from_secs(5);
/// Between two tries to abort it.
const ABORT_AGAIN: Duration = Duration::from_secs(1);
/// What a switchover takes besides its pages, while none was seen: libvirt's two daemons talk in it.
pub(super) const SWITCHOVER: Duration = Duration::from_millis(120);
const HELD_UP: &str = "Post-copy has to wait: as many guests of this host are in it as may be.";

/// One that is under way.
pub(super) struct Carrying {
    pub(super) host: Arc<Host>,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) carry: Arc<Carry>,
    pub(super) migration: Arc<Migration>,
    pub(super) teller: Arc<Teller>,
    pub(super) plan: Plan,
    pub(super) record: CarryRecord,
    pub(super) ways: Ways,
    /// As its user said it.
    pub(super) asked: Asked,
    /// The same as far as it is possible.
    pub(super) limits: Limits,
    pub(super) changes: Option<mpsc::Receiver<Change>>,
    /// When it may be in post-copy.
    pub(super) turn: Turn,
    pub(super) expecting: Expecting,
    /// So many have one limit of bandwidth together.
    pub(super) siblings: u32,
}

/// What happens outside of our own looks.
struct Outside {
    /// libvirt's answer to its migration.
    migrating: JoinHandle<Result<(), ConnectionError>>,
    events: broadcast::Receiver<(Instant, Event)>,
    /// The destination's word that the guest runs there.
    runs_there: Option<JoinHandle<bool>>,
}

enum News {
    Over(Result<(), ConnectionError>),
    Stands(Instant),
    RunsThere(bool),
    /// With the downtime as QEMU reckons it, in ms.
    Completed(Option<u64>),
    Look,
}

impl Outside {
    /// What comes next, or that it is time to look.
    async fn next(&mut self, domain: uuid::Uuid, look: Duration) -> News {
        let tick = tokio::time::sleep(look);
        tokio::pin!(tick);
        loop {
            tokio::select! {
                over = &mut self.migrating => return News::Over(over.expect("a call does not panic")),
                event = self.events.recv() => match event {
                    Ok((at, event)) if event.domain().uuid == domain && event.hands_over() => return News::Stands(at),
                    Ok((_, Event::JobCompleted { domain: whose, stats })) if whose.uuid == domain => {
                        return News::Completed(stats.number("downtime"));
                    }
                    // Others' events, or too many of them: the looks tell the rest.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => tick.as_mut().await,
                },
                runs = async { self.runs_there.as_mut().expect("checked").await }, if self.runs_there.is_some() => {
                    self.runs_there = None;
                    return News::RunsThere(runs.unwrap_or(false));
                }
                () = &mut tick => return News::Look,
            }
        }
    }
}

impl Carrying {
    pub(super) async fn run(mut self) {
        let costs = self.costs();
        let (libvirt, domain) = (self.plan.libvirt.clone(), self.plan.domain.clone());
        let mut steering = Steering::new(libvirt, domain, self.limits, costs, self.plan.runs && self.plan.live);
        for note in &self.plan.view.notes {
            self.migration.note(note.clone());
        }
        let mut gave_up = None;
        let said = self.drive(&mut steering, &mut gave_up).await;
        // From here on nobody's change is taken.
        self.changes = None;
        self.turn.give_back();
        self.conclude(said, steering, gave_up).await;
    }

    /// What switches of this domain cost, as far as its last ones tell.
    fn costs(&self) -> Costs {
        let known = self.host.costs_of(&self.migration.vm);
        Costs { switchover: known.switchover.max(SWITCHOVER), post_copy: known.post_copy.max(SWITCHOVER), ..known }
    }

    fn call(&self) -> Call {
        Call {
            to: self.ways.libvirt_uri(),
            ram_uri: self.ways.uri(Channel::Ram),
            disks_uri: self.ways.uri(Channel::Disks),
            disks: self.plan.disks.clone(),
            moves_definition: self.plan.moves_definition,
            live: self.plan.live,
            post_copy: self.plan.post_copy_obstacle.is_none() && self.asked.post_copy,
            vouched_for: self.plan.vouched_for,
            connections: self.plan.connections,
            bandwidth_mib: self.plan.bandwidth(&self.asked, self.siblings).map(mib),
        }
    }

    /// Until libvirt says that its migration is over.
    async fn drive(
        &mut self,
        steering: &mut Steering,
        gave_up: &mut Option<AgentError>,
    ) -> Result<(), ConnectionError> {
        self.teller.step(Step::Prepare);
        let (libvirt, domain, how) = (self.plan.libvirt.clone(), self.plan.domain.clone(), self.call());
        self.try_to("tell its limit of bandwidth", steering.remember_speed().await);
        let events = libvirt.events();
        let migrating = tokio::spawn(async move { libvirt.migrate(&domain, &how).await });
        let mut outside = Outside { migrating, events, runs_there: None };
        let mut policy = decider::policy(None, None);
        let (mut last, mut copies_disks, mut aborted): (Option<Seen>, bool, Option<Instant>) = (None, false, None);
        loop {
            let look = if steering.copies_ram() { LOOK } else { FIRST_LOOK };
            match outside.next(self.plan.domain.uuid, look).await {
                News::Over(said) => {
                    if let Some(runs_there) = outside.runs_there {
                        let runs = tokio::time::timeout(RUNS, runs_there).await;
                        self.runs_there(steering, runs.is_ok_and(|it| it.unwrap_or(false)));
                    }
                    return said;
                }
                News::Stands(at) if steering.paused_at.is_none() => {
                    steering.paused_at = Some(at);
                    if let Some(seen) = last.take() {
                        let (complete, let_go) = (!steering.post_copy, steering.post_copy);
                        // In post-copy no pages are sent while it stands.
                        let last_pages = if let_go { Some(Duration::ZERO) } else { seen.last_pages };
                        self.teller.switched(Seen { paused_at: Some(at), complete, let_go, last_pages, ..seen });
                    }
                    self.migration.told.tell(MigrationEvent::Step { step: Step::SwitchOver });
                    self.changes = None;
                    let (peer, uuid) = (self.plan.peer.apart(), self.plan.domain.uuid);
                    outside.runs_there = self.plan.runs.then(|| {
                        tokio::spawn(
                            async move { peer.domain_runs(uuid).await.is_ok_and(|it| it == DomainThere::Runs) },
                        )
                    });
                }
                News::RunsThere(runs) => self.runs_there(steering, runs),
                News::Completed(downtime_ms) => steering.downtime_ms = downtime_ms,
                News::Stands(_) | News::Look => {}
            }
            if (self.migration.was_cancelled() || gave_up.is_some())
                && !steering.post_copy
                && aborted.is_none_or(|at| at.elapsed() > ABORT_AGAIN)
            {
                aborted = Some(Instant::now());
                if let Err(error) = self.plan.libvirt.abort_job(&self.plan.domain).await {
                    tracing::debug!(vm = self.migration.vm, %error, "libvirt's job is not aborted yet");
                }
            }
            if steering.paused_at.is_none() && !steering.post_copy && aborted.is_none() {
                self.take_changes(steering, last.as_ref().map_or(Duration::ZERO, |it| it.observation.elapsed)).await;
            }
            self.take_share(steering).await;
            let was_copying = steering.copies_ram();
            // What cannot be seen now may be next time; the answer to the migration tells what counts.
            let Ok(seen) = steering.observe().await else { continue };
            let Some(seen) = seen else {
                if !self.plan.disks.is_empty()
                    && steering.disks_sent() > 0
                    && !std::mem::replace(&mut copies_disks, true)
                {
                    self.teller.step(Step::CopyDisks);
                }
                continue;
            };
            if !was_copying {
                self.teller.step(Step::CopyRam);
                if self.plan.live {
                    self.try_to("hold its switchover back", steering.hold().await);
                }
            }
            self.teller.progress(&seen);
            let observation = seen.observation;
            self.expecting.see(&observation);
            last = Some(seen);
            if observation.phase != Phase::PreCopy || !self.plan.live || aborted.is_some() {
                continue;
            }
            self.steer(steering, observation, policy.as_mut(), gave_up).await;
        }
    }

    /// Does what the policy says of what is seen.
    async fn steer(
        &mut self,
        steering: &mut Steering,
        mut seen: Observation,
        policy: &mut dyn Policy,
        gave_up: &mut Option<AgentError>,
    ) {
        let asked = seen.round > 0 && self.migration.wants_post_copy.swap(false, Ordering::Relaxed);
        let asked = asked && self.limits.post_copy;
        seen.limits.post_copy &= self.turn.is_free();
        if asked || seen.limits.post_copy != self.limits.post_copy {
            self.expecting.is_disturbed();
        }
        let decided = if asked { Action::PostCopy } else { policy.decide(&seen) };
        let (action, is_held_up) = self.turn.take(decided, asked, self.limits.post_copy);
        if is_held_up {
            self.expecting.is_disturbed();
            self.migration.note(HELD_UP);
        }
        if let Some(words) = policy.words() {
            self.teller.decided(words);
        }
        match &action {
            Action::GiveUp(reason) => {
                let name = self.migration.vm.clone();
                *gave_up = Some(AgentError::GaveUp { name, reason: reason.to_string() });
            }
            Action::PostCopy => {
                let why = if asked { "as asked for" } else { "as that harms the guest least" };
                self.migration.note(format!("Post-copy, {why}. While it lasts it needs both hosts."));
            }
            Action::Pause => self.migration.note("It is paused, so that what is left can be sent."),
            _ => {}
        }
        let done = steering.apply(&action).await;
        if action == Action::PostCopy && done.is_ok() {
            self.is_in_post_copy(steering).await;
        }
        self.try_to("do as the policy says", done);
    }

    async fn is_in_post_copy(&mut self, steering: &mut Steering) {
        steering.post_copy = true;
        self.carry.turns_to_post_copy();
        if let Err(error) = self.host.journal.carry_is_in_post_copy(self.record.id).await {
            tracing::error!(vm = self.migration.vm, %error, "cannot note that it is in post-copy");
        }
    }

    /// The destination has said whether it runs.
    fn runs_there(&self, steering: &Steering, runs: bool) {
        if runs {
            self.teller.phase(Custody::Away { complete: !steering.post_copy, start: Start::Done });
        }
    }

    /// A call that does not come off is no end of the migration: libvirt goes on by what it was told before.
    fn try_to(&self, what: &str, done: Result<(), ConnectionError>) {
        if let Err(error) = done {
            tracing::warn!(vm = self.migration.vm, %error, "libvirt did not {what}");
        }
    }

    /// Takes in what its user has changed meanwhile.
    async fn take_changes(&mut self, steering: &mut Steering, elapsed: Duration) {
        while let Some(Change { wanted, answer }) = self.changes.as_mut().and_then(|it| it.try_recv().ok()) {
            let taken = match self.asked.tuned(&wanted, elapsed) {
                Ok(asked) => self.tune(steering, asked, wanted.post_copy, elapsed).await,
                Err(error) => Err(error),
            };
            // Whoever asked may have gone; it holds all the same.
            let _ = answer.send(taken);
        }
    }

    async fn tune(
        &mut self,
        steering: &mut Steering,
        asked: Asked,
        post_copy: Option<bool>,
        elapsed: Duration,
    ) -> Result<Tuned, AgentError> {
        // libvirt is told in the beginning whether it may come to that.
        let obstacle = match &self.plan.post_copy_obstacle {
            Some(why) => Some(why.clone()),
            None => (!self.call_had_post_copy()).then(|| "it was forbidden when the migration began".into()),
        };
        if let Some(why) = obstacle.as_ref().filter(|_| post_copy == Some(true)) {
            let message = format!("post-copy cannot be allowed any more: {why}");
            return Err(AgentError::Conflict { message, hint: Some("cancel it, and begin again".into()) });
        }
        let limits = asked.limits()?;
        let limits = if obstacle.is_some() { limits.without_post_copy() } else { limits };
        let tuned = Tuned { elapsed_ms: elapsed.as_millis() as u64, text: asked.unlike(&self.asked) };
        if tuned.text.is_empty() {
            return Ok(tuned);
        }
        let bandwidth = self.plan.bandwidth(&asked, self.siblings);
        let limits = Limits { bandwidth: bandwidth.map(BytesPerSec), ..limits };
        steering.set_limits(limits, bandwidth).await?;
        self.expecting.is_disturbed();
        (self.asked, self.limits) = (asked, limits);
        self.migration.allow_post_copy(limits.post_copy);
        self.teller.tuned(tuned.clone());
        Ok(tuned)
    }

    /// Takes its share of the bandwidth where it has one limit with others, as far as that is another than before. libvirt
    /// forgets what it is told of that before it begins to copy.
    async fn take_share(&mut self, steering: &mut Steering) {
        let siblings = self.migration.siblings();
        if siblings == self.siblings || self.asked.bandwidth.is_none() || !steering.copies_ram() {
            return;
        }
        let bandwidth = self.plan.bandwidth(&self.asked, siblings);
        let limits = Limits { bandwidth: bandwidth.map(BytesPerSec), ..self.limits };
        match steering.set_limits(limits, bandwidth).await {
            Ok(()) => {
                (self.siblings, self.limits) = (siblings, limits);
                self.expecting.is_disturbed();
            }
            // It is tried again at the next look.
            Err(error) => tracing::debug!(vm = self.migration.vm, %error, "libvirt does not send at another rate yet"),
        }
    }

    fn call_had_post_copy(&self) -> bool {
        self.plan.view.capabilities.iter().any(|it| it == "post-copy")
    }

    /// libvirt has said how it ended, or cannot any more: what came of it is told, and written down.
    async fn conclude(
        mut self,
        said: Result<(), ConnectionError>,
        mut steering: Steering,
        gave_up: Option<AgentError>,
    ) {
        let (uuid, id) = (self.plan.domain.uuid, self.record.id);
        let found = match &said {
            Ok(()) => Whereabouts::There,
            Err(_) => find_out(&self.host.domains, &self.plan.peer, uuid, PATIENCE).await,
        };
        let (name, to) = (self.migration.vm.clone(), self.plan.view.to.clone());
        let why = said.err().map_or_else(String::new, |error| self.in_words(&error));
        let (end, outcome, event) = match found {
            Whereabouts::There => {
                if self.teller.book().times().last().is_none_or(|it| it.step != Step::Retire) {
                    self.teller.step(Step::Retire);
                }
                let expecting = std::mem::replace(&mut self.expecting, Expecting::nothing());
                let (book, sent) = (self.teller.book(), steering.ram_sent());
                let done = Done { peer: self.plan.key, engine: ENGINE, book: &book, sent };
                let foretold = compare(&self.host, expecting, done).await;
                let report = report(&self.host, &self.teller, &self.plan, &steering, foretold);
                (Some(CarryEnd::Done), "done".to_owned(), MigrationEvent::Finished(Box::new(report)))
            }
            Whereabouts::Here { .. } => {
                steering.set_back().await;
                let error = match gave_up {
                    Some(error) => error,
                    None if self.migration.was_cancelled() => AgentError::Cancelled { name },
                    None => AgentError::MigrationFailed { name, message: why },
                };
                (Some(CarryEnd::Abandoned), in_one_line(&error), failed(&error))
            }
            Whereabouts::Broken => (None, String::new(), failed(&AgentError::PostCopyBroke { name, to, reason: why })),
            Whereabouts::Nowhere => {
                let reason = format!("{why}; neither libvirt has it running");
                (None, String::new(), failed(&AgentError::WhereUnknown { name, to, reason }))
            }
            Whereabouts::Unknown(reason) => {
                (None, String::new(), failed(&AgentError::WhereUnknown { name, to, reason }))
            }
        };
        if let Some(end) = end
            && let Err(error) = self.host.journal.end_carry(id, end, &outcome).await
        {
            tracing::error!(vm = self.migration.vm, %error, "cannot note how its migration ended");
        }
        self.outgoing.carries.end(uuid);
        if end.is_none() {
            // Its QEMUs may still be at it, whatever their libvirts do: the connections stay until it is known.
            let settling = settle(Arc::clone(&self.outgoing), self.record.clone());
            let ways = self.ways;
            tokio::spawn(async move {
                settling.await;
                drop(ways);
            });
        } else if let Err(error) = self.plan.peer.withdraw_domain(id).await {
            tracing::debug!(migration = %id, error = in_one_line(&error), "the destination does not hear that it is over");
        }
        self.migration.told.tell(event);
    }

    fn in_words(&self, error: &ConnectionError) -> String {
        match error.refused() {
            Some(refused) if refused.is_aborted() && !self.migration.was_cancelled() => {
                format!("libvirt's job was aborted ({refused})")
            }
            Some(refused) => format!("libvirt: {refused}"),
            None => in_one_line(error),
        }
    }
}

fn failed(error: &AgentError) -> MigrationEvent {
    MigrationEvent::Failed(Problem::from(error))
}
