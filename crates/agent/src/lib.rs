//! The agent: one per host. It starts and keeps VMs, takes and hands over guests, and serves the API.
//!
//! Where to find what: `api` what is said and how; `vm`, `console` a VM of this host; `migration` the source's side of
//! a migration from plan to end, `incoming` the destination's; `engine` what copies RAM; `store` the journal;
//! `trust` who may talk to this agent, `peer` talking to another; `recovery` what an agent does with what its
//! predecessor left. `boot_files` and `witness` serve measurements.

pub mod api;
mod boot_files;
mod callers;
pub mod config;
mod console;
mod disks;
pub mod engine;
pub mod error;
pub mod incoming;
mod lifecycle;
pub mod link_trial;
mod migration;
pub mod peer;
mod recovery;
pub mod relay;
mod server;
pub mod store;
pub mod trust;
mod vm;
pub mod witness;

pub use server::{ServeError, serve};

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Semaphore;
use uuid::Uuid;
use vmferry_link::{CipherSpeed, Sessions, measure_ciphers};
use vmferry_qemu::{Accel, CommandLine, Features, QemuInfo};

use crate::config::Config;
use crate::error::AgentError;
use crate::incoming::Incoming;
use crate::incoming::arrival::Arrival;
use crate::link_trial::MOST_TRIALS;
use crate::migration::Migration;
use crate::store::Store;
use crate::trust::Trusts;
use crate::vm::{Stage, Vm};

/// How many ended migrations can still be looked at in full.
const KEPT_MIGRATIONS: usize = 32;
/// How long a switchover takes besides its pages while none was seen.
const SWITCHOVER: Duration = Duration::from_millis(40);
/// How many VMs' switchovers are remembered.
const KEPT_SWITCHOVERS: usize = 4096;

/// A trial of KVM can fail because the host was busy.
const TRY_KVM_AGAIN: Duration = Duration::from_secs(300);
/// How long migrations may take to be undone when the agent ends.
const FAREWELL: Duration = Duration::from_secs(20);

/// One host's agent: what it knows and has under way.
pub struct Agent {
    /// How it was set up.
    pub config: Config,
    store: Store,
    trusts: Trusts,
    /// Where other agents are served.
    listens: Option<SocketAddr>,
    /// Links whose streams are expected.
    sessions: Sessions,
    /// How fast each cipher is on this host.
    ciphers: Vec<CipherSpeed>,
    /// Places for trials of the link.
    trials: Arc<Semaphore>,
    /// Held while an arrival of RAM goes on over another link.
    resuming: tokio::sync::Mutex<()>,
    /// Whether this agent can move RAM itself, once that was tried.
    external: OnceLock<Result<(), String>>,
    state: Mutex<State>,
    probed: tokio::sync::Mutex<Probed>,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<String, Arc<Vm>>,
    /// Names of VMs that are being started.
    reserved: HashSet<String>,
    /// Incoming migrations whose QEMUs are being started.
    preparing: HashSet<Uuid>,
    outgoing: Vec<Arc<Migration>>,
    incoming: HashMap<Uuid, Arc<Incoming>>,
    /// How long the last switchover of a VM took besides its pages; and whether that was one to post-copy.
    switchovers: HashMap<(String, bool), Duration>,
    /// RAM that other agents send.
    arrivals: HashMap<Uuid, Arrival>,
}

/// What QEMU binaries turned out to be able to do; asked once a binary and version of it.
#[derive(Default)]
struct Probed {
    accelerators: HashMap<PathBuf, (Accel, Instant)>,
    infos: HashMap<(PathBuf, Option<SystemTime>, bool), QemuInfo>,
}

/// A name that nobody else can take while this lives.
struct ReservedName<'a> {
    agent: &'a Agent,
    name: String,
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        self.agent.state().reserved.remove(&self.name);
    }
}

/// An incoming migration is being prepared while this lives.
struct Preparing<'a> {
    agent: &'a Agent,
    id: Uuid,
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        self.agent.state().preparing.remove(&self.id);
    }
}

impl Agent {
    fn new(config: Config, store: Store, trusts: Trusts, listens: Option<SocketAddr>, sessions: Sessions) -> Arc<Self> {
        Arc::new(Self {
            config,
            store,
            trusts,
            listens,
            sessions,
            ciphers: measure_ciphers(),
            trials: Arc::new(Semaphore::new(MOST_TRIALS)),
            resuming: tokio::sync::Mutex::default(),
            external: OnceLock::new(),
            state: Mutex::default(),
            probed: tokio::sync::Mutex::default(),
        })
    }

    /// The ciphers that may be used with this address, and how fast they are here.
    fn ciphers_for(&self, address: IpAddr) -> Vec<CipherSpeed> {
        let only = self.config.network_of(address).and_then(|network| network.cipher.0);
        self.ciphers.iter().filter(|it| only.is_none_or(|only| only == it.cipher)).copied().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    fn vm(&self, name: &str) -> Result<Arc<Vm>, AgentError> {
        self.state().vms.get(name).cloned().ok_or_else(|| AgentError::UnknownVm { name: name.into() })
    }

    fn vms(&self) -> Vec<Arc<Vm>> {
        self.state().vms.values().cloned().collect()
    }

    fn has_vm(&self, name: &str) -> bool {
        self.state().vms.get(name).is_some_and(|vm| !matches!(vm.stage(), vm::Stage::Ended(_)))
    }

    fn reserve_name(&self, name: &str) -> Result<ReservedName<'_>, AgentError> {
        let exists = self.has_vm(name);
        let mut state = self.state();
        if exists || !state.reserved.insert(name.into()) {
            return Err(AgentError::VmExists { name: name.into(), host: self.config.name.clone() });
        }
        Ok(ReservedName { agent: self, name: name.into() })
    }

    fn begin_preparing(&self, id: Uuid) -> Preparing<'_> {
        self.state().preparing.insert(id);
        Preparing { agent: self, id }
    }

    fn is_preparing(&self, id: Uuid) -> bool {
        self.state().preparing.contains(&id)
    }

    fn add_migration(&self, migration: Arc<Migration>) {
        let mut state = self.state();
        state.outgoing.push(migration);
        let surplus = state.outgoing.len().saturating_sub(KEPT_MIGRATIONS);
        let ended: Vec<Uuid> =
            state.outgoing.iter().filter(|migration| migration.is_over()).take(surplus).map(|it| it.id).collect();
        state.outgoing.retain(|migration| !ended.contains(&migration.id));
    }

    fn migration(&self, id: Uuid) -> Option<Arc<Migration>> {
        self.state().outgoing.iter().find(|migration| migration.id == id).cloned()
    }

    fn migration_of(&self, vm: &str) -> Option<Arc<Migration>> {
        self.state().outgoing.iter().find(|migration| migration.vm == vm && !migration.is_over()).cloned()
    }

    /// Before the agent ends: what is not committed is undone, or QEMU would go on alone and nobody would commit.
    async fn cancel_migrations(&self) {
        let under_way: Vec<Arc<Migration>> =
            self.state().outgoing.iter().filter(|migration| !migration.is_over()).cloned().collect();
        for migration in &under_way {
            migration.cancel();
        }
        let is_settled = |it: &Arc<Migration>| {
            it.is_over() || self.vm(&it.vm).is_ok_and(|vm| matches!(vm.stage(), Stage::Left(_) | Stage::InDoubt(_)))
        };
        let deadline = Instant::now() + FAREWELL;
        while !under_way.iter().all(is_settled) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn add_incoming(&self, incoming: Arc<Incoming>) {
        self.state().incoming.insert(incoming.id(), incoming);
    }

    fn incoming(&self, id: Uuid) -> Option<Arc<Incoming>> {
        self.state().incoming.get(&id).cloned()
    }

    /// How long a switchover of this VM takes besides its pages: as long as its last one from here, or any VM's.
    fn switchover_time(&self, vm: &str, post_copy: bool) -> Duration {
        let known = &self.state().switchovers;
        let longest = || known.iter().filter(|((_, kind), _)| *kind == post_copy).map(|(_, time)| *time).max();
        known.get(&(vm.to_owned(), post_copy)).copied().or_else(longest).unwrap_or(SWITCHOVER)
    }

    fn note_switchover(&self, vm: &str, post_copy: bool, time: Duration) {
        let mut state = self.state();
        if state.switchovers.len() >= KEPT_SWITCHOVERS {
            state.switchovers.clear();
        }
        state.switchovers.insert((vm.into(), post_copy), time);
    }

    fn take_arrival(&self, id: Uuid) -> Option<Arrival> {
        self.state().arrivals.remove(&id)
    }

    /// Why this agent cannot move RAM itself; found out by trying, once.
    fn external_obstacle(&self) -> Option<String> {
        let tried = self.external.get_or_init(|| vmferry_ram::support().map_err(|why| vmferry_api::in_one_line(&why)));
        tried.clone().err()
    }

    /// Memory that incoming VMs will still fill, at most, in bytes.
    fn promised_memory(&self) -> u64 {
        self.state().incoming.values().filter(|it| it.is_open()).map(|it| it.ram_bytes()).sum()
    }

    fn find_qemu(&self, command: &CommandLine) -> Result<PathBuf, AgentError> {
        self.find_binary(command.binary())
    }

    fn find_binary(&self, binary: &str) -> Result<PathBuf, AgentError> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
        vmferry_qemu::find_binary(binary, &self.config.qemu_dirs, &path)
            .ok_or_else(|| AgentError::NoQemu { binary: binary.into(), host: self.config.name.clone() })
    }

    /// Asks this architecture's QEMU before it is needed, or the first migration would wait for it.
    async fn learn_qemu(&self) {
        let binary = format!("qemu-system-{}", std::env::consts::ARCH);
        let learned = async {
            let binary = self.find_binary(&binary)?;
            self.qemu_info(&binary, &self.accelerator(&binary).await).await
        };
        if let Err(error) = learned.await {
            tracing::warn!(error = vmferry_api::in_one_line(&error), "cannot tell what QEMU can do here");
        }
    }

    /// What a VM's QEMU can do, and whether it can encrypt its streams. It is asked itself only when its binary was
    /// replaced since: the answer is so long that QEMU leaves its guest waiting for some tenths of a second.
    async fn features_of(&self, vm: &Vm) -> Result<(Features, bool), AgentError> {
        let same_build = async {
            let binary = self.find_qemu(&CommandLine::parse(&vm.spec.argv)?)?;
            let info = self.qemu_info(&binary, &self.accelerator(&binary).await).await?;
            Ok::<_, AgentError>(Some(info).filter(|info| info.build == vm.facts.qemu_build))
        };
        match same_build.await {
            Ok(Some(info)) => Ok((info.features, info.tls)),
            // Whether it can encrypt is seen when it is told to.
            _ => Ok((Features::probe(&vm.qmp).await?, true)),
        }
    }

    /// Whether KVM works with this QEMU; where it did not, that is tried again after a while.
    async fn accelerator(&self, binary: &Path) -> Accel {
        let mut probed = self.probed.lock().await;
        if let Some((known, tried)) = probed.accelerators.get(binary)
            && (*known == Accel::Kvm || tried.elapsed() < TRY_KVM_AGAIN)
        {
            return known.clone();
        }
        let found = vmferry_qemu::try_kvm(binary).await;
        tracing::info!(binary = %binary.display(), accelerator = %found, "tried KVM");
        probed.accelerators.insert(binary.into(), (found.clone(), Instant::now()));
        found
    }

    /// What this QEMU can do, asked once a version.
    async fn qemu_info(&self, binary: &Path, accel: &Accel) -> Result<QemuInfo, AgentError> {
        let changed = std::fs::metadata(binary).and_then(|it| it.modified()).ok();
        let key = (binary.to_owned(), changed, matches!(accel, Accel::Kvm));
        let mut probed = self.probed.lock().await;
        if let Some(known) = probed.infos.get(&key) {
            return Ok(known.clone());
        }
        let info = vmferry_qemu::probe_qemu(binary, accel).await?;
        probed.infos.insert(key, info.clone());
        Ok(info)
    }
}
