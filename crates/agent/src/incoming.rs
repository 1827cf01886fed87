//! The destination's side of a migration: can it be taken, a QEMU that waits for it, and the moment of ownership.
//!
//! Who owns the guest is decided here and only here: [`commit`] writes it to this host's journal, once, and only when
//! QEMU has everything it needs to run the guest. What was abandoned can never be committed and the other way round;
//! the journal sees to that. So a source that lost contact only has to ask, and whatever it hears is final.

pub(crate) mod arrival;
mod suitability;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use vmferry_api::Security;
use vmferry_api::VmSpec;
use vmferry_api::in_one_line;
use vmferry_link::CipherSpeed;
use vmferry_qemu::migration::{reset_capabilities, set_capabilities};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{
    Accel, CommandLine, Endpoint, Incoming as IncomingLaunch, MigrationStatus, QemuInfo, QmpError, RunState,
    protect_streams, tls_priority,
};

use crate::engine::qemu::check_offered;
use crate::engine::{NewSession, Protection, Setup};
use crate::error::AgentError;
use crate::lifecycle::check_name;
use crate::recovery;
use crate::relay;
use crate::store::{InStep, Source};
use crate::trust::{self, Caller};
use crate::vm::{Stage, Vm};
use crate::{Agent, boot_files, witness};

/// A source that is not heard of for this long has lost its claim: what was prepared for it goes.
const LEASE: Duration = Duration::from_secs(15);
/// How long what is abandoned while its QEMU starts may take to be gone.
const PREPARING_TIMEOUT: Duration = Duration::from_secs(10);
/// Why a migration was abandoned by its source.
const ASKED_TO: &str = "the source asked for it";
/// How often it is looked whether the lease has run out.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long QEMU may take to load what the source says it has sent.
const LOAD_TIMEOUT: Duration = Duration::from_secs(8);
/// How long QEMU may take to tell how post-copy stands, which it cannot while its main loop waits for a page.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the guest may take to be set running.
const RUN_TIMEOUT: Duration = Duration::from_secs(2);

/// A VM that a source would like to hand over.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Offer {
    /// The migration.
    pub id: Uuid,
    /// The source, as it calls itself.
    pub from: String,
    /// The VM.
    pub spec: VmSpec,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// The exact machine type.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The guest runs; otherwise it stays paused.
    pub running: bool,
    /// The writable disks, as absolute paths. Beside each, the source has put a marker named after the migration.
    #[schema(value_type = Vec<String>)]
    pub disks: Vec<PathBuf>,
    /// The user vouches for what cannot be proven.
    pub disks_are_shared: bool,
    /// What QEMU must be set to; not known yet when this is only a question.
    pub setup: Setup,
    /// How what QEMU sends is protected; not known yet when this is only a question. When the agents move the RAM
    /// themselves, `plain` means their link too, and anything else that it is encrypted.
    pub protection: Protection,
    /// The agents move the RAM themselves, over a link with this session.
    #[serde(default)]
    pub external: Option<NewSession>,
}

/// This host could take the VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckReply {
    /// What this host calls itself.
    pub host: String,
    /// Its QEMU's version.
    pub qemu_version: String,
    /// The migration capabilities its QEMU has.
    pub capabilities: BTreeSet<String>,
    /// How guests from the source are to be protected on their way.
    pub security: Security,
    /// Its QEMU can encrypt what it receives.
    pub tls: bool,
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
    /// Why its agent cannot move RAM itself; none when it can.
    #[serde(default)]
    pub external_obstacle: Option<String>,
}

/// A QEMU waits.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Prepared {
    /// At which port of this host; none when its connections are relayed. A source takes no more from a destination
    /// than this: QEMU runs what some addresses name.
    pub port: Option<u16>,
    /// What it was set to: less than was asked for when this host does not permit post-copy.
    pub setup: Setup,
    /// Why the guest cannot run here before all of its RAM is here, where the agents move that; none when it can.
    #[serde(default)]
    pub post_copy_obstacle: Option<String>,
    /// What the user should know, one plain sentence each.
    pub notes: Vec<String>,
}

/// How an incoming migration stands.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct IncomingState {
    /// Who owns the guest.
    pub step: InStep,
    /// Why, when it was abandoned.
    pub detail: Option<String>,
    /// Post-copy waits for a new connection.
    pub listens: bool,
    /// At this port; none when its connections are relayed.
    pub port: Option<u16>,
    /// For a link with this session.
    #[serde(default)]
    pub session: Option<NewSession>,
    /// Post-copy was to be recovered, but all memory is here.
    pub complete: bool,
}

/// One incoming migration that this agent serves.
pub struct Incoming {
    id: Uuid,
    from: String,
    vm: Arc<Vm>,
    begun: Instant,
    /// When the source was last heard of, in ms since `begun`.
    heard_ms: AtomicU64,
    /// Held while ownership changes, so that a commit and an abandon never run side by side.
    turn: tokio::sync::Mutex<()>,
}

impl Incoming {
    pub(crate) fn new(id: Uuid, from: String, vm: Arc<Vm>) -> Arc<Self> {
        let turn = tokio::sync::Mutex::new(());
        Arc::new(Self { id, from, vm, begun: Instant::now(), heard_ms: AtomicU64::new(0), turn })
    }

    fn heard(&self) {
        self.heard_ms.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.heard_ms.load(Ordering::Relaxed)))
    }
}

/// Whether this host could take the VM; touches nothing.
pub async fn check(agent: &Agent, mut offer: Offer, caller: &Caller) -> Result<CheckReply, AgentError> {
    boot_files::settle(agent, &mut offer.spec);
    let (_, _, info) = suitable(agent, &offer).await?;
    Ok(CheckReply {
        host: agent.config.name.clone(),
        qemu_version: info.version,
        capabilities: info.features.capabilities().clone(),
        security: agent.config.security_of(caller.remote),
        tls: info.tls,
        ciphers: agent.ciphers_for(caller.remote),
        external_obstacle: agent.external_obstacle(),
    })
}

/// A source that wants less protection than this host's configuration does not get its way.
fn acceptable(agent: &Agent, protection: &Protection, caller: &Caller) -> Result<(), AgentError> {
    match protection {
        Protection::Plain if agent.config.security_of(caller.remote) != Security::Plain => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused a guest that comes unencrypted");
            Err(AgentError::PlainRefused { host: agent.config.name.clone() })
        }
        Protection::Tls { key, .. } if !key.is_valid() => {
            Err(AgentError::BadRequest { message: "the key of the migration's streams is no key".into(), hint: None })
        }
        _ => Ok(()),
    }
}

/// By its name, as distributions call it.
fn is_qemu(binary: &str) -> bool {
    let name = binary.rsplit('/').next().unwrap_or_default();
    name.starts_with("qemu-") || name == "kvm"
}

async fn suitable(agent: &Agent, offer: &Offer) -> Result<(CommandLine, Accel, QemuInfo), AgentError> {
    let name = &offer.spec.name;
    check_name(name)?;
    if agent.has_vm(name) {
        return Err(AgentError::VmExists { name: name.clone(), host: agent.config.name.clone() });
    }
    let command = CommandLine::parse(&offer.spec.argv)?;
    if !is_qemu(command.binary()) {
        let message = format!("{:?} is no QEMU: nothing else is started for another host", command.binary());
        return Err(AgentError::BadRequest { message, hint: None });
    }
    let binary = agent.find_qemu(&command)?;
    let accel = match offer.accelerator.as_str() {
        "kvm" => agent.accelerator(&binary).await,
        _ => Accel::Tcg { why: "the guest runs under TCG at the source".into() },
    };
    let info = agent.qemu_info(&binary, &accel).await?;
    let memory = suitability::available_memory()
        .saturating_sub(agent.config.reserved_memory.as_u64())
        .saturating_sub(agent.promised_memory());
    let (offer, name) = (offer.clone(), agent.config.name.clone());
    // Files may lie on storage that does not answer, which must not keep others waiting.
    let judged = tokio::task::spawn_blocking(move || {
        let host = suitability::Host { name: &name, qemu: &info, accel: &accel, memory };
        suitability::judge(&offer, &command, &host)?;
        Ok((command, accel, info))
    });
    judged.await.expect("judging does not panic")
}

/// Starts a QEMU that waits for the VM.
pub async fn prepare(agent: &Arc<Agent>, mut offer: Offer, caller: Caller) -> Result<Prepared, AgentError> {
    let name = offer.spec.name.clone();
    check_name(&name)?;
    acceptable(agent, &offer.protection, &caller)?;
    check_offered(&offer.setup, offer.spec.measuring)?;
    let _preparing = agent.begin_preparing(offer.id);
    let _name = agent.reserve_name(&name)?;
    boot_files::settle(agent, &mut offer.spec);
    let (command, accel, info) = suitable(agent, &offer).await?;
    if offer.spec.cwd.metadata().is_err() {
        // Nothing on the command line is relative to it, or it would have been missed above.
        offer.spec.cwd = "/".into();
    }
    let source = Source { name: offer.from.clone(), key: caller.key };
    if !agent.store.begin_in(offer.id, &name, &source, offer.running)? {
        return Err(AgentError::Conflict { message: "this migration is known here already".into(), hint: None });
    }
    let incoming = IncomingLaunch { machine_type: offer.machine.clone() };
    let launched = agent.launch(&offer.spec, &command, accel, Some((offer.id, incoming))).await;
    let (vm, _) = match launched {
        Ok(started) => started,
        Err(error) => {
            agent.store.abandon_in(offer.id, &in_one_line(&error))?;
            return Err(error);
        }
    };
    let incoming = Incoming::new(offer.id, offer.from.clone(), Arc::clone(&vm));
    agent.add_incoming(Arc::clone(&incoming));
    tokio::spawn(watch_lease(Arc::clone(agent), incoming));
    let known = info.features.capabilities();
    let received = match offer.external {
        Some(session) => {
            let plain = offer.protection == Protection::Plain;
            let expected = arrival::Expected { session, source: caller.key, plain };
            let begun = arrival::begin(agent, &vm, offer.id, known, expected).await;
            begun.map(|post_copy_obstacle| Prepared {
                port: None,
                setup: offer.setup,
                post_copy_obstacle,
                notes: Vec::new(),
            })
        }
        None => receive(&vm, known, offer.setup, &offer.protection, caller.local).await,
    };
    if let Some((InStep::Abandoned, why)) = agent.store.step_in(offer.id)? {
        // While its QEMU started.
        let why = why.unwrap_or_default();
        give_up(agent, offer.id, &why).await?;
        return Err(AgentError::Conflict { message: format!("this migration was abandoned: {why}"), hint: None });
    }
    match received {
        Ok(prepared) => {
            tracing::info!(vm = name, migration = %offer.id, from = offer.from, port = prepared.port, "waits for a guest");
            Ok(prepared)
        }
        Err(error) => {
            give_up(agent, offer.id, &format!("its QEMU could not be prepared: {}", in_one_line(&error))).await?;
            Err(error)
        }
    }
}

/// Sets QEMU up to receive. Post-copy may be refused by the host (userfaultfd); the migration can do without it.
async fn receive(
    vm: &Vm,
    known: &BTreeSet<String>,
    mut setup: Setup,
    protection: &Protection,
    address: IpAddr,
) -> Result<Prepared, AgentError> {
    let mut notes = Vec::new();
    if let Protection::Tls { key, cipher } = protection {
        protect_streams(&vm.qmp, &vm.dir.join("tls"), key, Endpoint::Server, tls_priority(*cipher)).await?;
    }
    if let Err(error) = set_capabilities(&vm.qmp, known, &as_strs(&setup.capabilities)).await {
        if !setup.has("postcopy-ram") {
            return Err(error.into());
        }
        notes.push(format!("Post-copy is not possible: the destination's QEMU says: {error}."));
        setup.capabilities.retain(|name| !name.starts_with("postcopy"));
        set_capabilities(&vm.qmp, known, &as_strs(&setup.capabilities)).await?;
    }
    if setup.channels > 0 {
        let channels = commands::MigrationParameters {
            multifd_channels: Some(setup.channels),
            ..commands::MigrationParameters::default()
        };
        vm.qmp.execute(channels).await?;
    }
    setup.set_parameters(&vm.qmp).await?;
    let port = match protection {
        Protection::Relay => {
            vm.qmp.execute(commands::MigrateIncoming { uri: relay::begin_receiving(vm)? }).await?;
            None
        }
        _ => Some(listen(vm, address).await?),
    };
    Ok(Prepared { port, setup, post_copy_obstacle: None, notes })
}

fn as_strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

async fn listen(vm: &Vm, address: IpAddr) -> Result<u16, AgentError> {
    vm.qmp.execute(commands::MigrateIncoming { uri: tcp_uri(address, 0) }).await?;
    // QEMU chose the port.
    let info = vm.qmp.execute(commands::QueryMigrate {}).await?;
    let port = info.socket_address.iter().flatten().find_map(vmferry_qemu::qmp::commands::SocketAddress::tcp_port);
    port.ok_or_else(|| AgentError::Conflict {
        message: "the destination's QEMU does not tell where it listens".into(),
        hint: None,
    })
}

/// As QEMU's `migrate` and `migrate-incoming` want it.
pub(crate) fn tcp_uri(address: IpAddr, port: u16) -> String {
    format!("tcp:{}", std::net::SocketAddr::new(address, port))
}

/// Notes that the source is still there, and tells how it stands.
pub fn keep(agent: &Agent, id: Uuid) -> Result<IncomingState, AgentError> {
    if let Some(incoming) = agent.incoming(id) {
        incoming.heard();
    }
    state(agent, id)
}

/// How an incoming migration stands.
pub fn state(agent: &Agent, id: Uuid) -> Result<IncomingState, AgentError> {
    let (step, detail) = agent.store.step_in(id)?.ok_or_else(|| AgentError::Conflict {
        message: format!("this host knows no incoming migration {id}"),
        hint: None,
    })?;
    Ok(IncomingState {
        step,
        detail: detail.filter(|_| step == InStep::Abandoned),
        listens: false,
        port: None,
        session: None,
        complete: false,
    })
}

/// Makes this host the owner of the guest, if it can run it, and sets it running. May be asked again: the answer stays
/// the same. The answer is final either way.
pub async fn commit(agent: &Arc<Agent>, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    let Some(incoming) = agent.incoming(id) else {
        // It never came this far; or its VM is gone again; or this agent was started since, and has seen to it then.
        abandon_unheard(agent, id, caller, "this host knows nothing of it")?;
        return match agent.store.step_in(id)? {
            Some((InStep::Prepared, _)) => {
                Err(AgentError::Busy { what: "the VM's QEMU, which does not answer the new agent yet".into() })
            }
            _ => state(agent, id),
        };
    };
    let _turn = incoming.turn.lock().await;
    incoming.heard();
    let vm = &incoming.vm;
    let begun = Instant::now();
    if !matches!(agent.store.step_in(id)?, Some((InStep::Committed, _))) {
        if let Err(why) = loaded(vm).await {
            agent.drop_incoming(&incoming, &why).await?;
            return state(agent, id);
        }
        if !agent.store.commit_in(id)? {
            return state(agent, id);
        }
        vm.set_stage(Stage::Owned);
        let took_us = begun.elapsed().as_micros() as u64;
        tracing::info!(vm = vm.name(), migration = %id, took_us, "owns the guest now");
        if let Err(error) = set_running(agent, vm).await {
            // In post-copy it may answer only when the source has made a lost connection anew, and for that the source
            // must hear that the guest is here.
            tracing::error!(vm = vm.name(), error = in_one_line(&error), "cannot be set running yet");
            tokio::spawn(set_running_later(Arc::clone(agent), Arc::clone(vm)));
        }
        tokio::spawn(announce(Arc::clone(vm)));
    }
    state(agent, id)
}

async fn set_running_later(agent: Arc<Agent>, vm: Arc<Vm>) {
    while let Err(error) = set_running(&agent, &vm).await {
        tracing::debug!(vm = vm.name(), error = in_one_line(&error), "cannot be set running yet");
        tokio::time::sleep(RUN_TIMEOUT).await;
    }
}

/// Sets a guest running that this host owns, once: its user may pause it afterwards.
pub(crate) async fn set_running(agent: &Agent, vm: &Vm) -> Result<(), AgentError> {
    if !agent.store.must_run(vm.name())? {
        return Ok(());
    }
    match run(vm).await {
        Err(error) if vm.is_alive() => return Err(error),
        Err(error) => tracing::error!(vm = vm.name(), %error, "its QEMU ended before it could be set running"),
        Ok(()) => {}
    }
    if arrival::is_expected(&vm.dir) {
        // What somebody saves to a file later is to have all RAM. It can wait until pages have come.
        let vm = vm.qmp.clone();
        tokio::spawn(async move {
            while let Err(error) = reset_capabilities(&vm).await {
                if vm.is_closed() {
                    return;
                }
                tracing::debug!(error = in_one_line(&error), "QEMU does not answer yet");
                tokio::time::sleep(RUN_TIMEOUT).await;
            }
        });
    }
    Ok(agent.store.did_run(vm.name())?)
}

/// Waits until QEMU has what it needs to run the guest.
async fn loaded(vm: &Vm) -> Result<(), String> {
    let deadline = Instant::now() + LOAD_TIMEOUT;
    loop {
        let told = async {
            let info = vm.qmp.execute(commands::QueryMigrate {}).await?;
            Ok::<_, vmferry_qemu::QmpError>((info, vm.run_state().await?))
        };
        let (info, run_state) = told.await.map_err(|error| format!("its QEMU does not answer: {error}"))?;
        match info.status.unwrap_or(MigrationStatus::None) {
            status
                if (status == MigrationStatus::Completed || status.is_post_copy())
                    && run_state != RunState::InMigrate =>
            {
                return Ok(());
            }
            MigrationStatus::Failed => {
                let why = info.error_desc.unwrap_or_else(|| "see its log".into());
                return Err(format!("its QEMU could not load the guest: {why}"));
            }
            _ if Instant::now() > deadline => return Err("its QEMU did not receive the whole guest".into()),
            _ => tokio::time::sleep(Duration::from_micros(300)).await,
        }
    }
}

async fn run(vm: &Vm) -> Result<(), AgentError> {
    let deadline = Instant::now() + RUN_TIMEOUT;
    loop {
        vm.qmp.execute_within(commands::Cont {}, RUN_TIMEOUT).await?;
        let state = vm.qmp.execute_within(commands::QueryStatus {}, RUN_TIMEOUT).await?.status;
        // A guest that shut down or crashed on its own in its first moment is none of ours to restart.
        if !matches!(state, RunState::Paused | RunState::InMigrate | RunState::Prelaunch) || Instant::now() > deadline {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Has the guest's network cards tell the switches where they are now, some times, as QEMU does by itself once.
async fn announce(vm: Arc<Vm>) {
    let rounds = commands::AnnounceSelf { initial: 50, max: 550, rounds: 5, step: 100 };
    if let Err(error) = vm.qmp.execute(rounds).await {
        tracing::warn!(vm = vm.name(), %error, "could not announce the guest's network cards");
    }
}

/// Gives up what was prepared, now and for ever; what was committed stays. May be asked again, and of migrations that
/// this host never heard of. When it answers nothing of it is left, so that the VM can be offered again at once.
pub async fn abandon(agent: &Agent, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    abandon_unheard(agent, id, caller, ASKED_TO)?;
    give_up(agent, id, ASKED_TO).await?;
    let deadline = Instant::now() + PREPARING_TIMEOUT;
    while agent.is_preparing(id) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    state(agent, id)
}

/// What this host never heard of cannot begin any more either.
fn abandon_unheard(agent: &Agent, id: Uuid, caller: &Caller, why: &str) -> Result<(), AgentError> {
    // It is written down for peers only; nobody else gets here with a migration that is not known.
    if let Ok(name) = trust::require_peer(agent, caller) {
        agent.store.abandon_unheard(id, &Source { name, key: caller.key }, why)?;
    }
    Ok(())
}

async fn give_up(agent: &Agent, id: Uuid, why: &str) -> Result<(), AgentError> {
    match agent.incoming(id) {
        Some(incoming) => {
            let _turn = incoming.turn.lock().await;
            agent.drop_incoming(&incoming, why).await?;
        }
        None => {
            agent.store.abandon_in(id, why)?;
        }
    }
    Ok(())
}

/// After a broken connection in post-copy: listens again, at this address of ours.
pub async fn recover(agent: &Arc<Agent>, id: Uuid, caller: &Caller) -> Result<IncomingState, AgentError> {
    let conflict = |message: String| AgentError::Conflict { message, hint: None };
    if !matches!(agent.store.step_in(id)?, Some((InStep::Committed, _))) {
        return Err(conflict(format!("no post-copy to recover in migration {id}")));
    }
    let name = newest_vm_of(agent, id)?;
    if arrival::is_expected(&agent.config.vm_dir(&name)) {
        return await_ram(agent, id, &name, caller).await;
    }
    let vm = match agent.vm(&name) {
        // Whatever its user is about to do with it: without its memory nothing comes of that.
        Ok(vm) if vm.is_alive() => vm,
        Err(error) if recovery::lives(agent, &name) => return Err(error),
        _ => return Err(conflict(format!("{name} does not run on {} any more", agent.config.name))),
    };
    let mut state = state(agent, id)?;
    match listen_again(&vm, caller.local).await {
        Ok(port) => {
            (state.listens, state.port) = (true, port);
            return Ok(state);
        }
        Err(AgentError::Qmp(QmpError::Command { desc, .. })) => {
            tracing::debug!(vm = name, desc, "does not listen again");
        }
        Err(error) => return Err(error),
    }
    let status = match vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await {
        Ok(info) => info.status.unwrap_or(MigrationStatus::None),
        // What keeps it from answering is a page that does not come.
        Err(QmpError::Timeout { .. }) => MigrationStatus::PostcopyActive,
        Err(error) => return Err(error.into()),
    };
    match status {
        // This side has not noticed yet that the connection is gone.
        MigrationStatus::PostcopyActive => match vm.qmp.execute(commands::MigratePause {}).await {
            Ok(_) | Err(QmpError::Command { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        status if status.is_post_copy() => {}
        MigrationStatus::Completed => state.complete = true,
        other => {
            return Err(conflict(format!("{name}'s QEMU on {} cannot go on: it is {other}", agent.config.name)));
        }
    }
    Ok(state)
}

/// The source's agent is to send the rest of the RAM over a new link. QEMU is not asked: it may wait for that.
async fn await_ram(agent: &Arc<Agent>, id: Uuid, name: &str, caller: &Caller) -> Result<IncomingState, AgentError> {
    let Some(record) = recovery::living(agent, name)? else {
        if let Some(arrival) = agent.take_arrival(id) {
            arrival.give_up();
        }
        let message = format!("{name} does not run on {} any more", agent.config.name);
        return Err(AgentError::Conflict { message, hint: None });
    };
    let mut state = state(agent, id)?;
    match arrival::again(agent, id, &agent.config.vm_dir(name), record.pid, caller.key).await? {
        arrival::Standing::Complete => state.complete = true,
        arrival::Standing::Awaited(session) => (state.listens, state.session) = (true, Some(session)),
    }
    Ok(state)
}

/// Has a QEMU whose post-copy is paused listen once more. It can do this even while its main loop, which would tell
/// what port it chose, waits for a page: so the port is chosen here. That somebody takes it in between is seen, and the
/// source asks again.
async fn listen_again(vm: &Vm, address: IpAddr) -> Result<Option<u16>, AgentError> {
    if relay::is_receiving(vm) {
        let uri = relay::uri_at_destination(vm);
        vm.qmp.execute(commands::MigrateRecover { uri }).await?;
        return Ok(None);
    }
    let free = std::net::TcpListener::bind((address, 0)).and_then(|listener| listener.local_addr());
    let port = free.map_err(AgentError::io(address.to_string()))?.port();
    vm.qmp.execute(commands::MigrateRecover { uri: tcp_uri(address, port) }).await?;
    Ok(Some(port))
}

/// The VM that this migration brings, for one of its connections that is relayed.
pub(crate) fn relayed_vm(agent: &Agent, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    let vm = agent.vm(&newest_vm_of(agent, id)?)?;
    match relay::is_receiving(&vm) {
        true => Ok(vm),
        false => {
            Err(AgentError::Conflict { message: "this migration's connections are not relayed".into(), hint: None })
        }
    }
}

/// The measuring guest that this migration brings.
pub(crate) fn measuring_vm(agent: &Agent, id: Uuid) -> Result<Arc<Vm>, AgentError> {
    let incoming = agent.incoming(id).ok_or_else(|| AgentError::Conflict {
        message: format!("nothing waits here for the guest of migration {id}"),
        hint: None,
    })?;
    witness::only_measuring(Arc::clone(&incoming.vm))
}

/// The VM of this migration, if it was the last one to bring a VM of that name here: what another brought since is none
/// of its source's business.
fn newest_vm_of(agent: &Agent, id: Uuid) -> Result<String, AgentError> {
    let name = agent.store.vm_of(id)?;
    match agent.store.newest_in(&name)? {
        Some(newest) if newest == id => Ok(name),
        _ => {
            Err(AgentError::Conflict { message: format!("{name} came here with another migration since"), hint: None })
        }
    }
}

/// Abandons what was prepared when its source falls silent, or its QEMU ends.
///
/// Not in post-copy: there the source's QEMU has let go of the guest and could not take it back, so only the source
/// may say that it is over.
pub(crate) async fn watch_lease(agent: Arc<Agent>, incoming: Arc<Incoming>) {
    loop {
        let why = tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {
                format!("the source's agent ({}) was not heard of for {} s", incoming.from, LEASE.as_secs())
            }
            () = incoming.vm.qmp.closed() => "its QEMU ended".into(),
        };
        if !matches!(agent.store.step_in(incoming.id), Ok(Some((InStep::Prepared, _)))) {
            return;
        }
        let is_closed = incoming.vm.qmp.is_closed();
        // Agents that move the RAM have the guest at the source until the commit.
        let may_be_left = !arrival::is_expected(&incoming.vm.dir);
        let silent = incoming.silent_for() >= LEASE;
        if !is_closed && (!silent || may_be_left && in_post_copy(&incoming.vm).await) {
            continue;
        }
        tracing::warn!(vm = incoming.vm.name(), migration = %incoming.id, why, "abandons an incoming migration");
        match give_up(&agent, incoming.id, &why).await {
            Ok(()) => return,
            Err(error) => tracing::error!(error = in_one_line(&error), "cannot abandon it"),
        }
    }
}

async fn in_post_copy(vm: &Vm) -> bool {
    match vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await {
        Ok(info) => info.status.is_some_and(|status| status.is_post_copy()),
        // It may wait for a page.
        Err(error) => matches!(error, QmpError::Timeout { .. }),
    }
}

impl Agent {
    /// Writes that this migration is abandoned and, unless it was committed before, ends its QEMU.
    async fn drop_incoming(&self, incoming: &Incoming, why: &str) -> Result<(), AgentError> {
        let vm = &incoming.vm;
        let why = match vm.last_words() {
            Some(words) if vm.qmp.is_closed() => format!("{why} ({words})"),
            _ => why.into(),
        };
        if !self.store.abandon_in(incoming.id, &why)? {
            return Ok(());
        }
        if let Some(arrival) = self.take_arrival(incoming.id) {
            arrival.give_up();
        }
        vmferry_qemu::kill_process(vm.pid, vm.start_time, Duration::from_secs(1)).await;
        self.forget_vm(vm)?;
        tracing::info!(vm = vm.name(), migration = %incoming.id, why, "abandoned");
        Ok(())
    }
}

impl Incoming {
    /// Which migration it is.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Guest RAM that is promised to it, in bytes.
    pub(crate) fn ram_bytes(&self) -> u64 {
        self.vm.facts.ram_bytes
    }

    /// This VM came with it.
    pub(crate) fn brought(&self, vm: &Vm) -> bool {
        self.vm.pid == vm.pid && self.vm.start_time == vm.start_time
    }

    /// The source still owns the guest.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.vm.stage(), Stage::Incoming(_))
    }
}
