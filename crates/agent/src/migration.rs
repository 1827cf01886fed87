//! A migration from plan to retirement, at the source. It reads top-down:
//!
//! ```text
//! plan         refuse early                                     nothing is touched yet
//! prepare      the destination's QEMU waits                     undo: abandon there
//! copy RAM     rounds until QEMU switches over, or post-copy    undo: cancel here, abandon there
//! commit       the destination's journal takes the guest over   no undo; until it answers the guest stays paused here
//! post-copy    (if used) the rest of the RAM follows
//! retire       the source's QEMU goes
//! ```
//!
//! Each step is written to the journal before it is done; `recovery.rs` goes on from there after a crash.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::Security;
use vmferry_api::in_one_line;
use vmferry_api::{
    Code, EngineName, MigrateRequest, MigrationEvent, PlanView, Problem, Progress, Report, Script, Step, StepTime,
};
use vmferry_link::{Cipher, Fingerprint, fastest_cipher};
use vmferry_policy::{Action, AfterRounds, Limits, Observation, Policy, Simple};
use vmferry_qemu::migration::{self, set_capabilities};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{
    Endpoint, Features, MigrationStatus, QmpError, RunState, StreamKey, protect_streams, tls_carries, tls_priority,
};
use vmferry_ram::Backend;

use crate::engine::external::{self, ExternalEngine, WayThere};
use crate::engine::qemu::{self, QemuEngine, Wishes};
use crate::engine::{EngineError, NewConnection, NewSession, Protection, RamEngine, Seen, Setup, Totals};
use crate::error::AgentError;
use crate::incoming::{CheckReply, IncomingState, Offer, tcp_uri};
use crate::peer::{Peer, PeerError};
use crate::relay::Relay;
use crate::store::{InStep, OutRecord, OutStep};
use crate::trust;
use crate::vm::{Claim, Stage, Vm};
use crate::{Agent, boot_files, disks};

/// How often the destination is told that the source is still there.
const KEEP: Duration = Duration::from_secs(3);
/// How long to wait between two tries of something that must not be given up.
const RETRY: Duration = Duration::from_secs(1);
/// How often a QEMU that does not do as told is asked to stop copying before the user is told.
const ABANDON_TRIES: u32 = 3;
/// Limits a user may set.
const DOWNTIME_MS: std::ops::RangeInclusive<u64> = 1..=60_000;
const LEAST_BANDWIDTH: u64 = 1 << 20;
const MAX_TIME_MS: std::ops::RangeInclusive<u64> = 1_000..=7 * 24 * 3600 * 1000;

/// A migration under way, or just over, as others see it.
pub(crate) struct Migration {
    /// Its id.
    pub(crate) id: Uuid,
    /// The VM's name.
    pub(crate) vm: String,
    /// The destination.
    pub(crate) peer: Peer,
    cancel: CancellationToken,
    /// The user allows post-copy.
    may_post_copy: bool,
    /// The user wants it now.
    wants_post_copy: AtomicBool,
    told: Mutex<Told>,
}

struct Told {
    /// All but progress; with the last progress this is what somebody needs who looks later.
    history: Vec<MigrationEvent>,
    progress: Option<Progress>,
    live: broadcast::Sender<MigrationEvent>,
}

impl Migration {
    fn new(id: Uuid, vm: &str, peer: Peer, may_post_copy: bool) -> Arc<Self> {
        let told = Told { history: Vec::new(), progress: None, live: broadcast::channel(256).0 };
        Arc::new(Self {
            id,
            vm: vm.into(),
            peer,
            cancel: CancellationToken::new(),
            may_post_copy,
            wants_post_copy: AtomicBool::new(false),
            told: Mutex::new(told),
        })
    }

    fn tell(&self, event: MigrationEvent) {
        let mut told = self.told();
        match &event {
            MigrationEvent::Progress(progress) => told.progress = Some(*progress),
            other => told.history.push(other.clone()),
        }
        // An error means that nobody looks.
        let _ = told.live.send(event);
    }

    fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(vm = self.vm, migration = %self.id, "{text}");
        self.tell(MigrationEvent::Note { text });
    }

    /// What was told so far, and a stream of what follows, without a gap between them.
    pub(crate) fn watch(&self) -> (Vec<MigrationEvent>, broadcast::Receiver<MigrationEvent>) {
        let told = self.told();
        let mut past = told.history.clone();
        let is_over = past.last().is_some_and(MigrationEvent::is_last);
        past.extend(told.progress.filter(|_| !is_over).map(MigrationEvent::Progress));
        (past, told.live.subscribe())
    }

    /// It has ended, one way or the other.
    pub(crate) fn is_over(&self) -> bool {
        self.told().history.last().is_some_and(MigrationEvent::is_last)
    }

    /// Asks it to stop; has no effect once the destination was told to take over.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Asks it to switch to post-copy as soon as it can, if it has not. False when the user has forbidden that.
    #[must_use]
    pub(crate) fn post_copy(&self) -> bool {
        self.wants_post_copy.store(self.may_post_copy, Ordering::Relaxed);
        self.may_post_copy
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().expect("no holder of this lock panics")
    }
}

/// Plans the migration and, unless it is a dry run, starts it.
pub(crate) async fn begin(
    agent: &Arc<Agent>,
    name: &str,
    request: MigrateRequest,
) -> Result<(PlanView, Option<Arc<Migration>>), AgentError> {
    let begun = Instant::now();
    let id = Uuid::new_v4();
    let limits = limits(&request)?;
    let vm = agent.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(agent, &vm, id, &request).await?;
    if request.dry_run {
        predict(&mut plan, limits.post_copy).await?;
        return Ok((plan.view, None));
    }
    let migration = Migration::new(id, name, plan.peer.apart(), limits.post_copy);
    agent.add_migration(Arc::clone(&migration));
    claim.keep(Stage::Migrating(id));
    let view = plan.view.clone();
    let bandwidth = request.bandwidth.or(plan.rate);
    let run = Run {
        agent: Arc::clone(agent),
        migration: Arc::clone(&migration),
        vm,
        plan,
        limits,
        bandwidth,
        script: request.script,
        to: request.to,
        steps: Steps::begin(begun),
        downtime: Duration::ZERO,
        predicted: None,
        throttle: 0,
        keep: None,
        relay: None,
    };
    tokio::spawn(run.run());
    Ok((view, Some(migration)))
}

/// Claims a VM for a migration that may yet be refused.
fn claim(vm: &Vm) -> Result<Claim<'_>, AgentError> {
    let name = || vm.name().to_owned();
    let refuse = |reason: String| AgentError::NotMigratable { name: name(), reason, hint: None };
    Claim::take(vm, Stage::Planning).map_err(|doing| match doing {
        Stage::Ended(why) => refuse(format!("it does not run any more ({why})")),
        Stage::Stranded => refuse("it runs on another host; this is what an unfinished post-copy left".into()),
        Stage::Stopping => refuse("it is being stopped".into()),
        _ => AgentError::MigrationRuns { name: name() },
    })
}

fn limits(request: &MigrateRequest) -> Result<Limits, AgentError> {
    let bad = |message: String| Err(AgentError::BadLimit { message });
    if !DOWNTIME_MS.contains(&request.downtime_ms) {
        return bad(format!("a downtime of {} ms makes no sense: give 1 ms to 60 s", request.downtime_ms));
    }
    if let Some(max) = request.max_time_ms.filter(|max| !MAX_TIME_MS.contains(max)) {
        return bad(format!("a maximum time of {max} ms makes no sense: give 1 s to 7 days"));
    }
    if let Some(rate) = request.bandwidth.filter(|rate| *rate < LEAST_BANDWIDTH) {
        return bad(format!("a bandwidth of {rate} bytes a second makes no sense: give at least 1 MiB/s"));
    }
    Ok(Limits {
        downtime: Duration::from_millis(request.downtime_ms),
        max_time: request.max_time_ms.map(Duration::from_millis),
        post_copy: request.post_copy,
    })
}

/// What planning found out.
struct Plan {
    view: PlanView,
    offer: Offer,
    there: CheckReply,
    features: Features,
    peer: Peer,
    peer_key: Fingerprint,
    /// Where its agent is, and its QEMU will be.
    remote: IpAddr,
    protect: Protect,
    /// The most to send over the network between the hosts, in bytes a second.
    rate: Option<u64>,
    /// Until the destination has looked for them for the last time.
    markers: Option<disks::Markers>,
    /// The guest is paused before anything is copied.
    post_copy_first: bool,
    engine: Engine,
    /// What a measurement sets QEMU to, where that moves the RAM.
    scripted: Option<Setup>,
}

/// Who moves the RAM.
enum Engine {
    /// The agents: this is what there is to move.
    External(Vec<Backend>),
    /// QEMU.
    Qemu,
}

impl Engine {
    fn name(&self) -> EngineName {
        match self {
            Self::External(_) => EngineName::External,
            Self::Qemu => EngineName::Qemu,
        }
    }
}

/// How the guest is to be protected on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protect {
    Not,
    /// With the fastest cipher that both hosts allow.
    Tls(Cipher),
    Relay,
    /// The agents' link, with that cipher.
    Link(Cipher),
}

impl Protect {
    fn in_words(self) -> String {
        match self {
            Self::Not => "none: both hosts trust the network".into(),
            Self::Tls(cipher) => format!("TLS between the QEMUs ({cipher})"),
            Self::Link(cipher) => format!("TLS between the agents ({cipher})"),
            Self::Relay => "TLS between the agents, which relay what the QEMUs say".into(),
        }
    }
}

/// Refuses everything that can be refused; nothing is touched, here or there, except that a measuring guest's boot files
/// are brought to where it is to go.
async fn plan(agent: &Agent, vm: &Vm, id: Uuid, request: &MigrateRequest) -> Result<Plan, AgentError> {
    let run_state = movable(vm).await?;
    let found = trust::find_peer(agent, &request.to)?;
    let met = found.hello().await?;
    let (peer, remote) = (found.pinned_to(&met), met.ip());
    // The disks may lie on storage that does not answer, which must not keep others waiting.
    let spec = vm.spec.clone();
    let put = tokio::task::spawn_blocking(move || disks::Markers::put(&spec, id));
    let markers = put.await.expect("putting markers does not panic")?;
    let offer = Offer {
        id,
        from: agent.config.name.clone(),
        spec: vm.spec.clone(),
        ram_bytes: vm.facts.ram_bytes,
        machine: vm.facts.machine.clone(),
        accelerator: vm.accelerator.clone(),
        running: run_state == RunState::Running,
        disks: markers.disks(),
        disks_are_shared: request.disks_are_shared,
        setup: Setup::default(),
        protection: Protection::default(),
        external: None,
    };
    if vm.spec.measuring {
        boot_files::send(&vm.spec, &peer).await?;
    }
    let there = peer.check(&offer).await?;
    let (features, can_tls) = agent.features_of(vm).await?;
    let mut notes = Vec::new();
    let (engine, other) = choose_engine(agent, vm, request, &there).await?;
    notes.extend(other);
    let is_external = engine.name() == EngineName::External;
    let cipher = fastest_cipher(&agent.ciphers_for(remote), &there.ciphers);
    let protect = match (agent.config.security_of(remote), there.security) {
        (Security::Plain, Security::Plain) => Protect::Not,
        (security, their_security) => {
            if security == Security::Plain || their_security == Security::Plain {
                notes
                    .push("The guest travels encrypted: only one of the two hosts is configured to do without.".into());
            }
            match cipher {
                Some(cipher) if is_external => Protect::Link(cipher),
                Some(cipher) if can_tls && there.tls && tls_carries(vm.facts.ram_bytes) => Protect::Tls(cipher),
                _ => Protect::Relay,
            }
        }
    };
    if request.post_copy && !is_external && !there.capabilities.contains("postcopy-ram") {
        notes.push(
            "Post-copy is not possible: the destination's QEMU lacks it; the guest is throttled if it must be.".into(),
        );
    }
    let running = run_state == RunState::Running;
    let has = |name: &str| there.capabilities.contains(name);
    let scripted = request.script.as_ref().filter(|_| !is_external);
    let scripted = scripted.map(|script| script_for(vm, &features, has, script)).transpose()?;
    let loses_writes_when_copied = running && !is_external && migration::loses_writes(&features, &vm.accelerator);
    if loses_writes_when_copied && scripted.is_some() {
        notes.push(format!("{}: expect damaged pages.", loses_writes(vm)));
    }
    let post_copy_first = loses_writes_when_copied && scripted.is_none();
    let means = match (&scripted, is_external) {
        (_, true) => vec![migration::IGNORE_SHARED],
        (Some(setup), _) => setup.capabilities.iter().map(String::as_str).collect(),
        (None, _) => qemu::means(&features, has, request.post_copy),
    };
    if post_copy_first {
        if !means.contains(&"postcopy-ram") {
            return Err(only_by_post_copy(vm));
        }
        notes.push(format!("{}: it goes first, and its memory follows by post-copy.", loses_writes(vm)));
    }
    if !running {
        notes.push("The guest is paused and will be paused there.".into());
    }
    let view = PlanView {
        vm: vm.name().into(),
        to: met.hello.name,
        engine: engine.name().to_string(),
        ram_bytes: vm.facts.ram_bytes,
        ram_used_bytes: disks::resident_memory(vm.pid).min(vm.facts.ram_bytes),
        link_rate: 0,
        first_round_ms: 0,
        source_qemu: vm.facts.qemu_version.clone(),
        destination_qemu: there.qemu_version.clone(),
        machine: vm.facts.machine.clone(),
        accelerator: vm.accelerator.clone(),
        capabilities: means.into_iter().map(str::to_owned).collect(),
        protection: protect.in_words(),
        notes,
    };
    let rate = agent.config.network_of(remote).and_then(|network| network.rate).map(|rate| rate.0);
    Ok(Plan {
        view,
        offer,
        there,
        features,
        peer,
        peer_key: met.key,
        remote,
        protect,
        rate,
        markers: Some(markers),
        post_copy_first,
        engine,
        scripted,
    })
}

/// What a measurement has QEMU set to.
fn script_for(
    vm: &Vm,
    features: &Features,
    there: impl Fn(&str) -> bool,
    script: &Script,
) -> Result<Setup, AgentError> {
    let refuse =
        |reason: String, hint: Option<String>| AgentError::NotMigratable { name: vm.name().into(), reason, hint };
    // What they leave set in QEMU is nothing for a guest that is to live on.
    if !vm.spec.measuring {
        return Err(refuse(
            "only a measuring guest is moved as a script says".into(),
            Some("`vmferry bench run`".into()),
        ));
    }
    qemu::scripted(features, there, &script.means).map_err(|lacks| refuse(lacks, None))
}

/// The one that is wanted; QEMU, and why, where the agents cannot and nobody insists on them.
async fn choose_engine(
    agent: &Agent,
    vm: &Vm,
    request: &MigrateRequest,
    there: &CheckReply,
) -> Result<(Engine, Option<String>), AgentError> {
    if request.engine.unwrap_or(agent.config.engine) == EngineName::Qemu {
        return Ok((Engine::Qemu, None));
    }
    let why = match (external::movable(agent, vm).await?, &there.external_obstacle) {
        (Err(why), _) => why,
        (Ok(_), Some(why)) => format!("at {}: {why}", there.host),
        (Ok(backends), None) => match external::ends(vm, request.post_copy).await {
            Ok(()) => return Ok((Engine::External(backends), None)),
            Err(why) => why,
        },
    };
    if request.engine.is_none() {
        return Ok((Engine::Qemu, Some(format!("QEMU moves the memory itself, as the agents cannot: {why}."))));
    }
    Err(AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!("its RAM cannot be moved by the agents: {why}"),
        hint: Some("let QEMU move it: --engine qemu".into()),
    })
}

fn loses_writes(vm: &Vm) -> String {
    format!("QEMU {} loses track of what a guest writes under TCG while its RAM is copied", vm.facts.qemu_version)
}

fn only_by_post_copy(vm: &Vm) -> AgentError {
    AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!("{}, so that a running guest could only move by post-copy", loses_writes(vm)),
        hint: Some("allow post-copy on both hosts, pause the guest first, or use QEMU 9.0 or newer".into()),
    }
}

/// The VM's run state, if it is one in which it can move, and nothing about it stands in the way.
async fn movable(vm: &Vm) -> Result<RunState, AgentError> {
    let refuse = |reason: String, hint: &str| AgentError::NotMigratable {
        name: vm.name().into(),
        reason,
        hint: (!hint.is_empty()).then(|| hint.into()),
    };
    let info = vm.qmp.execute(commands::QueryMigrate {}).await?;
    if let Some(reasons) = info.blocked_reasons.filter(|reasons| !reasons.is_empty()) {
        return Err(refuse(format!("QEMU says: {}", reasons.join("; ")), "remove what blocks it from the VM"));
    }
    if !matches!(
        info.status,
        None | Some(
            MigrationStatus::None | MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled
        )
    ) {
        return Err(refuse("somebody else is migrating it already".into(), "see query-migrate in its monitor"));
    }
    if vmferry_qemu::CommandLine::parse(&vm.spec.argv)?.snapshot() {
        return Err(refuse(
            "its disks' changes are in a temporary file of this host".into(),
            "run it without snapshot",
        ));
    }
    match vm.run_state().await? {
        state @ (RunState::Running | RunState::Paused) => Ok(state),
        // A guest that was started with -S: paused, with all its state.
        RunState::Prelaunch | RunState::Suspended => Ok(RunState::Paused),
        RunState::PostMigrate => Err(refuse(
            "it is paused since a migration that was undone, and QEMU moves such a guest only after it ran".into(),
            "let it run for a moment (`cont` in its monitor)",
        )),
        other => Err(refuse(format!("it is {other}"), "only a running or paused guest can be migrated")),
    }
}

/// Only for a dry run, since it uses the link.
async fn predict(plan: &mut Plan, post_copy: bool) -> Result<(), AgentError> {
    plan.view.link_rate = plan.peer.try_link().await?;
    plan.view.first_round_ms = plan.view.ram_used_bytes * 1000 / plan.view.link_rate.max(1);
    if post_copy {
        let most = plan.view.first_round_ms.div_ceil(1000).max(1);
        plan.view.notes.push(format!("Should it take post-copy, the guest needs both hosts for up to about {most} s."));
    }
    Ok(())
}

/// When each step began.
struct Steps {
    request: Instant,
    begun: Vec<(Step, Instant)>,
}

impl Steps {
    fn begin(request: Instant) -> Self {
        Self { request, begun: vec![(Step::Plan, request)] }
    }

    fn now(&self) -> Step {
        self.begun.last().map_or(Step::Plan, |(step, _)| *step)
    }

    fn next(&mut self, step: Step) {
        self.begun.push((step, Instant::now()));
    }

    fn times(&self) -> Vec<StepTime> {
        let ends = self.begun.iter().skip(1).map(|(_, at)| *at).chain([Instant::now()]);
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        self.begun.iter().zip(ends).map(|((step, from), to)| StepTime { step: *step, ms: ms(*from, to) }).collect()
    }
}

/// How a migration stopped short of its end.
enum Halt {
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
struct Run {
    agent: Arc<Agent>,
    migration: Arc<Migration>,
    vm: Arc<Vm>,
    plan: Plan,
    limits: Limits,
    bandwidth: Option<u64>,
    script: Option<Script>,
    to: String,
    steps: Steps,
    downtime: Duration,
    predicted: Option<Duration>,
    throttle: u8,
    keep: Option<tokio_util::task::AbortOnDropHandle<()>>,
    relay: Option<Relay>,
}

impl Run {
    async fn run(mut self) {
        let mut engine = None;
        let outcome = match self.all_steps(&mut engine).await {
            Err(Halt::Undo(error)) => self.undo(engine.as_deref_mut(), error).await,
            other => other,
        };
        let last = match outcome {
            Ok(report) => MigrationEvent::Finished(Box::new(report)),
            Err(Halt::Undo(error)) => MigrationEvent::Failed(undone(self.vm.name(), &error)),
            Err(Halt::Lost(error)) => {
                MigrationEvent::Failed(Problem { code: Code::GuestAtRisk, ..Problem::from(&error) })
            }
        };
        if let MigrationEvent::Failed(problem) = &last {
            tracing::warn!(vm = self.vm.name(), migration = %self.migration.id, "{}", problem.message);
        } else {
            tracing::info!(vm = self.vm.name(), migration = %self.migration.id, to = self.to, "migrated");
        }
        self.migration.tell(last);
    }

    async fn all_steps(&mut self, engine: &mut Option<Box<dyn RamEngine>>) -> Result<Report, Halt> {
        let engine = engine.insert(self.prepare().await?).as_mut();
        self.keep = Some(keep_alive(self.plan.peer.clone(), self.migration.id));
        let switched = self.copy_ram(engine).await?;
        self.hand_over(engine, &switched).await
    }

    /// From here on there is only forward, unless the destination says no.
    async fn hand_over(&mut self, engine: &mut dyn RamEngine, switched: &Seen) -> Result<Report, Halt> {
        self.commit(switched).await?;
        if !switched.complete {
            self.post_copy(engine).await?;
        }
        let totals = engine.totals();
        engine.close().await;
        self.retire(totals, !switched.complete).await
    }

    fn step(&mut self, step: Step) {
        tracing::debug!(vm = self.vm.name(), migration = %self.migration.id, ?step, "next step");
        self.steps.next(step);
        self.migration.tell(MigrationEvent::Step { step });
    }

    /// The destination's QEMU waits, and ours is set to the same.
    async fn prepare(&mut self) -> Result<Box<dyn RamEngine>, Halt> {
        for note in self.plan.view.notes.clone() {
            self.migration.note(note);
        }
        self.step(Step::Prepare);
        self.agent.store.begin_out(&self.record(OutStep::Prepare))?;
        let plan = &mut self.plan;
        let has = |name: &str| plan.there.capabilities.contains(name);
        let stops_first = migration::loses_writes(&plan.features, &self.vm.accelerator);
        if plan.engine.name() == EngineName::External {
            vmferry_qemu::unprotect_streams(&self.vm.qmp).await?;
            let wanted = external::capabilities(stops_first);
            set_capabilities(&self.vm.qmp, plan.features.capabilities(), wanted).await?;
            let trusted = plan.protect == Protect::Not;
            external::make_folder(&external::sending_dir(&self.vm), trusted)?;
            plan.offer.protection = if trusted { Protection::Plain } else { Protection::Relay };
            plan.offer.external = Some(NewSession::random());
        } else {
            external::forget(&self.vm);
            plan.offer.setup = match plan.scripted.take() {
                Some(setup) => {
                    let wanted: Vec<&str> = setup.capabilities.iter().map(String::as_str).collect();
                    set_capabilities(&self.vm.qmp, plan.features.capabilities(), &wanted).await?;
                    setup
                }
                None => qemu::choose(&self.vm.qmp, &plan.features, has, self.limits.post_copy).await?,
            };
            plan.offer.protection = protect(&self.vm, plan).await?;
        }
        let prepared = tokio::select! {
            prepared = plan.peer.prepare(&plan.offer) => prepared?,
            () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
        };
        plan.markers = None;
        for note in &prepared.notes {
            self.migration.note(note.clone());
        }
        if let Some(why) = prepared.post_copy_obstacle.as_ref().filter(|_| self.limits.post_copy) {
            self.migration.note(format!("Post-copy is not possible: at {}: {why}.", plan.view.to));
            self.limits.post_copy = false;
        }
        if let (Engine::External(backends), Some(session)) = (&plan.engine, &plan.offer.external) {
            let way = WayThere {
                address: plan.peer.address().into(),
                identity: Arc::clone(&self.agent.trusts.identity),
                peer: plan.peer_key,
                protection: match plan.protect {
                    Protect::Not => None,
                    Protect::Link(cipher) => Some(Some(cipher)),
                    _ => Some(None),
                },
            };
            let wishes = external::Wishes {
                pid: self.vm.pid,
                backends: backends.clone(),
                dir: external::sending_dir(&self.vm),
                way,
                limits: self.limits,
                besides: self.agent.switchover_time(self.vm.name(), false),
                bandwidth: self.bandwidth,
                delta_cache: self.agent.config.delta_cache.as_u64(),
                was_running: plan.offer.running,
                stops_first,
            };
            return Ok(Box::new(ExternalEngine::new(self.vm.qmp.clone(), wishes, session.clone())));
        }
        // The destination may take less than was offered, and say no more about our QEMU than that.
        let mut setup = plan.offer.setup.clone();
        setup.capabilities.retain(|it| prepared.setup.has(it));
        if setup != plan.offer.setup {
            let names: Vec<&str> = setup.capabilities.iter().map(String::as_str).collect();
            set_capabilities(&self.vm.qmp, plan.features.capabilities(), &names).await?;
        }
        self.limits.post_copy &= setup.has("postcopy-ram");
        if plan.post_copy_first && !self.limits.post_copy {
            return Err(Halt::Undo(only_by_post_copy(&self.vm)));
        }
        let uri = if plan.offer.protection == Protection::Relay {
            let relay = Relay::open(&self.vm, plan.peer.clone(), self.migration.id)?;
            self.relay.insert(relay).uri().to_owned()
        } else {
            let port = prepared.port.ok_or_else(|| no_port(&plan.view.to))?;
            tcp_uri(plan.remote, port)
        };
        let wishes = Wishes {
            uri,
            limits: self.limits,
            bandwidth: self.bandwidth,
            setup,
            post_copy_first: plan.post_copy_first,
            scripted: self.script.is_some(),
        };
        let engine = QemuEngine::new(self.vm.qmp.clone(), plan.features.clone(), plan.offer.running, wishes);
        Ok(Box::new(engine))
    }

    /// Copies rounds of RAM, as the policy says, until the destination has what it needs to run the guest.
    async fn copy_ram(&mut self, engine: &mut dyn RamEngine) -> Result<Seen, Halt> {
        self.step(Step::CopyRam);
        self.agent.store.step_out(self.migration.id, OutStep::CopyRam)?;
        engine.start().await?;
        let mut policy: Box<dyn Policy> = match &self.script {
            Some(Script { post_copy_after: Some(rounds), .. }) => Box::new(AfterRounds::new(*rounds, Action::PostCopy)),
            Some(Script { pause_after: Some(rounds), .. }) => Box::new(AfterRounds::new(*rounds, Action::Pause)),
            Some(_) => Box::new(AfterRounds::never()),
            None => Box::<Simple>::default(),
        };
        loop {
            let seen = tokio::select! {
                seen = engine.observe() => seen?,
                () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
            };
            self.tell_progress(&seen);
            if seen.ready_to_commit {
                return Ok(seen);
            }
            let asked = self.post_copy_is_asked_for(&seen.observation);
            let action = if asked { Action::PostCopy } else { policy.decide(&seen.observation) };
            match &action {
                Action::Continue => {}
                // What is left is sent while it stands still.
                Action::Pause => self.migration.tell(MigrationEvent::Step { step: Step::SwitchOver }),
                Action::PostCopy => self.migration.note(post_copy_in_words(&seen.observation, asked)),
                Action::Throttle(share) => {
                    self.migration
                        .note(format!("The guest writes faster than the link carries: slowed by {} %.", share.0));
                }
                Action::Pace(share) => self.migration.note(format!(
                    "The guest writes faster than the link carries: its writes are held to {} % of what it does carry.",
                    share.0
                )),
                Action::GiveUp(reason) => {
                    let name = self.vm.name().into();
                    return Err(Halt::Undo(AgentError::GaveUp { name, reason: reason.to_string() }));
                }
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

    /// The destination takes the guest over. Until it has answered whether it did, the guest stays paused here.
    async fn commit(&mut self, switched: &Seen) -> Result<(), Halt> {
        let paused_at = switched.paused_at.unwrap_or_else(Instant::now);
        self.steps.begun.push((Step::SwitchOver, paused_at));
        self.steps.next(Step::Commit);
        self.agent.store.step_out(self.migration.id, OutStep::Commit)?;
        self.vm.set_stage(Stage::InDoubt(self.migration.id));
        let settled = settle_commit(&self.plan.peer, self.migration.id, |text| self.migration.note(text)).await;
        self.downtime = paused_at.elapsed();
        match settled {
            Ok(()) => {
                if let Some(pages) = switched.last_pages {
                    let (name, post_copy) = (self.vm.name(), !switched.complete);
                    self.predicted = Some(pages + self.agent.switchover_time(name, post_copy));
                    // A guest that a script pauses stands still for longer than a switchover takes.
                    if self.script.is_none() {
                        self.agent.note_switchover(name, post_copy, self.downtime.saturating_sub(pages));
                    }
                }
                self.migration.tell(MigrationEvent::Step { step: Step::Commit });
                let next = if switched.complete { OutStep::Retire } else { OutStep::PostCopy };
                self.vm.set_stage(Stage::Left(self.migration.id));
                self.agent.store.step_out(self.migration.id, next).map_err(|error| Halt::Lost(error.into()))
            }
            Err(why) => Err(Halt::Undo(AgentError::MigrationFailed {
                name: self.vm.name().into(),
                message: format!("the destination did not take the guest over: {why}"),
            })),
        }
    }

    /// The guest runs there; what it misses follows. A lost connection is made anew, for as long as it takes.
    async fn post_copy(&mut self, engine: &mut dyn RamEngine) -> Result<(), Halt> {
        self.step(Step::PostCopy);
        let (told, peer) = (Arc::clone(&self.migration), self.plan.peer.clone());
        let note = |text| told.note(text);
        let way = match (&self.relay, &self.plan.engine) {
            (_, Engine::External(_)) => Way::Link,
            (Some(relay), _) => Way::Relayed(relay.uri().to_owned()),
            (None, _) => Way::Direct(self.plan.remote),
        };
        match follow_post_copy(engine, &peer, told.id, &way, note, |seen| self.tell_progress(seen)).await {
            Ok(()) => Ok(()),
            Err(reason) => Err(self.stranded(reason)),
        }
    }

    /// What is left here goes.
    async fn retire(&mut self, totals: Totals, post_copy: bool) -> Result<Report, Halt> {
        self.step(Step::Retire);
        retire(&self.agent, &self.vm, self.migration.id).await.map_err(Halt::Lost)?;
        Ok(Report {
            id: self.migration.id,
            vm: self.vm.name().into(),
            from: self.agent.config.name.clone(),
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

    /// Brings everything back to what it was: the guest first, then the destination. When QEMU has let go of the guest
    /// in the meantime, there is only forward.
    async fn undo(
        &mut self,
        engine: Option<&mut (dyn RamEngine + 'static)>,
        error: AgentError,
    ) -> Result<Report, Halt> {
        let id = self.migration.id;
        self.vm.set_stage(Stage::Migrating(id));
        if let Some(engine) = engine {
            match self.abandon_copy(engine).await {
                Ok(()) => {}
                Err(EngineError::TooLate) => return self.forward(engine, &error).await,
                Err(stuck) => return Err(self.undo_later(&stuck)),
            }
        }
        let why = in_one_line(&error);
        let there = self.plan.peer.abandon(id).await;
        if there.is_err() {
            // Its agent may be about to come back; what it prepared should not wait for its lease to run out.
            let peer = self.plan.peer.clone();
            tokio::spawn(async move { crate::recovery::abandon_there(&peer, id).await });
        }
        let error = match (error, there) {
            // The destination often knows better why its QEMU went away.
            (AgentError::Engine(error), there) => {
                let detail = there.ok().and_then(|state| state.detail).filter(|detail| !detail.is_empty());
                let message = match detail {
                    Some(detail) => format!("{}; at the destination: {detail}", in_one_line(&error)),
                    None => in_one_line(&error),
                };
                AgentError::MigrationFailed { name: self.vm.name().into(), message }
            }
            (error, _) => error,
        };
        self.vm.set_stage(Stage::Owned);
        if let Err(error) = self.agent.store.end_out(id, OutStep::Abandoned, &why) {
            tracing::error!(%error, "cannot write the journal");
        }
        if !self.vm.is_alive() {
            return Err(Halt::Undo(AgentError::SourceEnded { name: self.vm.name().into(), why }));
        }
        Err(Halt::Undo(error))
    }

    async fn abandon_copy(&self, engine: &mut dyn RamEngine) -> Result<(), EngineError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match engine.abandon().await {
                Err(EngineError::TooLate) => return Err(EngineError::TooLate),
                Err(_) if !self.vm.is_alive() => return Ok(()),
                Err(_) if tries < ABANDON_TRIES => tokio::time::sleep(RETRY).await,
                outcome => return outcome,
            }
        }
    }

    /// It was to be undone, but QEMU has let go of the guest: only the destination can have it now.
    async fn forward(&mut self, engine: &mut dyn RamEngine, error: &AgentError) -> Result<Report, Halt> {
        self.migration.note(format!(
            "Too late to undo it ({}): the guest is on its way and goes on by post-copy.",
            in_one_line(error)
        ));
        let forward = async {
            let switched = engine.observe().await?;
            self.hand_over(engine, &switched).await
        };
        match forward.await {
            Err(Halt::Undo(refused)) => {
                let reason = format!("QEMU here had let go of it, and {}", in_one_line(&refused));
                Err(self.stranded(reason))
            }
            other => other,
        }
    }

    /// Some of the guest's memory may be here only, and cannot follow.
    fn stranded(&self, reason: String) -> Halt {
        let (name, to) = (self.vm.name().into(), self.to.clone());
        let error = strand(&self.agent, &self.vm, self.migration.id, &reason).err();
        Halt::Lost(error.unwrap_or(AgentError::GuestAtRisk { name, to, reason }))
    }

    /// Its QEMU does not do as told; whoever settles what a crashed agent left goes on trying.
    fn undo_later(&self, stuck: &EngineError) -> Halt {
        tokio::spawn(crate::recovery::settle(Arc::clone(&self.agent), self.record(OutStep::CopyRam)));
        Halt::Lost(AgentError::Unsettled { name: self.vm.name().into(), reason: in_one_line(stuck) })
    }

    /// What the journal says of it at this step.
    fn record(&self, step: OutStep) -> OutRecord {
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

    fn cancelled(&self) -> Halt {
        Halt::Undo(AgentError::Cancelled { name: self.vm.name().into() })
    }

    fn tell_progress(&mut self, seen: &Seen) {
        let it = &seen.observation;
        self.throttle = self.throttle.max(it.throttle.0);
        let step = match it.phase {
            vmferry_policy::Phase::SwitchOver => Step::SwitchOver,
            _ => self.steps.now(),
        };
        self.migration.tell(MigrationEvent::Progress(Progress {
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

/// With what the user risks by it.
fn post_copy_in_words(seen: &Observation, asked: bool) -> String {
    let why = match asked {
        true => "Post-copy, as asked for.",
        false => "The guest writes faster than the link carries: post-copy.",
    };
    match seen.remaining.time_at(seen.link_rate) {
        Some(rest) => {
            format!("{why} For about {:.0} s at most it needs both hosts.", rest.as_secs_f64().max(1.0).ceil())
        }
        None => why.into(),
    }
}

fn no_port(host: &str) -> AgentError {
    AgentError::Conflict { message: format!("{host} does not tell where its QEMU listens"), hint: None }
}

/// Has our QEMU protect what it sends; one that cannot is relayed.
async fn protect(vm: &Vm, plan: &mut Plan) -> Result<Protection, AgentError> {
    Relay::forget(vm);
    if let Protect::Tls(cipher) = plan.protect {
        let key = StreamKey::new(&vmferry_link::random_bytes());
        let priority = tls_priority(cipher);
        match protect_streams(&vm.qmp, &vm.dir.join("tls"), &key, Endpoint::Client, priority).await {
            Ok(()) => return Ok(Protection::Tls { key, cipher }),
            Err(error) => {
                tracing::warn!(vm = vm.name(), error = in_one_line(&error), "its connections are relayed");
                plan.protect = Protect::Relay;
            }
        }
    }
    vmferry_qemu::unprotect_streams(&vm.qmp).await?;
    Ok(if plan.protect == Protect::Not { Protection::Plain } else { Protection::Relay })
}

/// Tells the destination every now and then that the source is still there, until dropped.
fn keep_alive(peer: Peer, id: Uuid) -> tokio_util::task::AbortOnDropHandle<()> {
    tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(KEEP).await;
            if let Err(error) = peer.keep(id).await {
                tracing::debug!(migration = %id, error = in_one_line(&error), "the destination did not hear of us");
            }
        }
    }))
}

/// What the user is told of a migration that was undone.
fn undone(name: &str, error: &AgentError) -> Problem {
    let problem = Problem::from(error);
    if !matches!(problem.code, Code::Internal | Code::QemuFailed | Code::Other) {
        return problem;
    }
    let message = match error {
        AgentError::SourceEnded { .. } => return problem,
        AgentError::Peer(_) => format!("at the destination: {}", problem.message),
        _ => problem.message,
    };
    Problem { hint: problem.hint, ..Problem::from(&AgentError::MigrationFailed { name: name.into(), message }) }
}

/// The guest is elsewhere, or nowhere, and what is left of it here may be all that there is of some of its memory.
pub(crate) fn strand(agent: &Agent, vm: &Vm, id: Uuid, reason: &str) -> Result<(), AgentError> {
    vm.set_stage(Stage::Stranded);
    agent.store.strand(vm.name())?;
    Ok(agent.store.end_out(id, OutStep::Done, &format!("post-copy could not be finished: {reason}"))?)
}

/// Asks the destination to take the guest over until it has answered: `Err` says why it never will.
pub(crate) async fn settle_commit(peer: &Peer, id: Uuid, note: impl Fn(String)) -> Result<(), String> {
    let mut told = false;
    loop {
        match peer.commit(id).await {
            Ok(state) => match state.step {
                InStep::Committed => return Ok(()),
                InStep::Abandoned => return Err(state.detail.unwrap_or_else(|| "it gives no reason".into())),
                // That is no answer.
                InStep::Prepared => tokio::time::sleep(RETRY).await,
            },
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    note(format!(
                        "Whether {} took the guest over is not known ({}). It stays paused here until that host answers.",
                        peer.address(),
                        in_one_line(&error)
                    ));
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Where QEMU connects to.
pub(crate) enum Way {
    /// To the destination's QEMU, which is at this address.
    Direct(IpAddr),
    /// To this agent, at this URI.
    Relayed(String),
    /// It does not: the agents do, over their link.
    Link,
}

impl Way {
    /// To where the destination waits now.
    fn again(&self, state: &IncomingState) -> Option<NewConnection> {
        match self {
            Self::Direct(address) => Some(NewConnection::Uri(tcp_uri(*address, state.port?))),
            Self::Relayed(uri) => Some(NewConnection::Uri(uri.clone())),
            Self::Link => state.session.clone().map(NewConnection::Session),
        }
    }
}

/// Follows post-copy to its end, over new connections when one is lost: `Err` says why it has no end.
pub(crate) async fn follow_post_copy(
    engine: &mut dyn RamEngine,
    peer: &Peer,
    id: Uuid,
    way: &Way,
    note: impl Fn(String),
    mut progress: impl FnMut(&Seen),
) -> Result<(), String> {
    let mut is_broken = false;
    loop {
        let seen = match engine.observe().await {
            Ok(seen) => seen,
            // QEMU may be busy, or stand still with its connection.
            Err(EngineError::Qmp(QmpError::Timeout { .. })) => continue,
            // The last words between the two can get lost when all memory is there.
            Err(error) => match peer.recover(id).await {
                Ok(state) if state.complete => return Ok(()),
                _ => return Err(in_one_line(&error)),
            },
        };
        progress(&seen);
        if seen.complete {
            return Ok(());
        }
        match seen.broken {
            Some(why) => {
                if !std::mem::replace(&mut is_broken, true) {
                    note(format!(
                        "The connection to {} broke ({why}); the guest waits for pages until it is back.",
                        peer.address()
                    ));
                }
                if reconnect(engine, peer, id, way).await? {
                    return Ok(());
                }
                tokio::time::sleep(RETRY).await;
            }
            None if std::mem::replace(&mut is_broken, false) => {
                note("The connection is back; post-copy goes on.".into());
            }
            None => {}
        }
    }
}

/// Tries once to make the connection anew. True when that is not needed: the destination has all memory.
async fn reconnect(engine: &mut dyn RamEngine, peer: &Peer, id: Uuid, way: &Way) -> Result<bool, String> {
    match peer.recover(id).await {
        Ok(state) if state.complete => return Ok(true),
        Ok(state) => {
            if state.listens
                && let Some(to) = way.again(&state)
                && let Err(error) = engine.reconnect(&to).await
            {
                tracing::debug!(error = in_one_line(&error), "cannot reconnect yet");
            }
        }
        Err(PeerError::Refused { problem }) if problem.code == Code::Conflict => return Err(problem.message),
        Err(error) => tracing::debug!(error = in_one_line(&error), "cannot recover yet"),
    }
    Ok(false)
}

/// Ends what is left of a guest that runs elsewhere.
pub(crate) async fn retire(agent: &Agent, vm: &Vm, id: Uuid) -> Result<(), AgentError> {
    vm.quit().await;
    agent.forget_vm(vm)?;
    agent.store.end_out(id, OutStep::Done, "the guest runs on the destination")?;
    Ok(())
}
