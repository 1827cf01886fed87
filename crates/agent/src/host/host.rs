//! What an agent knows of its host, and what everything else needs of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use vmferry_api::in_one_line;
use vmferry_link::{Authority, CipherSpeed, Identity, Sessions, measure_ciphers};

use super::admission::Admission;
use super::contents::Contents;
use super::disks::Signature;
use super::domains::{Domains, OF_LIBVIRT, SeenDomain};
use super::idle::{Idle, IdleVm};
use super::qemus::Qemus;
use super::vm::{Stage, Vm};
use vmferry_policy::Costs;

use crate::config::Config;
use crate::error::AgentError;
use crate::journal::{Instance, Journal};

/// How long a switchover takes besides its pages while none was seen.
const SWITCHOVER: Duration = Duration::from_millis(40);
/// How many VMs' switchovers are remembered.
const KEPT_SWITCHOVERS: usize = 4096;
/// How long somebody who asks for a VM waits until it is found.
const FOUND: Duration = Duration::from_secs(1);
/// How many trials an agent serves at a time.
pub(crate) const MOST_TRIALS: usize = 4;

/// What this agent proves to be, and who vouches for others.
pub(crate) struct Trusts {
    /// Its own key and certificate.
    pub(crate) identity: Arc<Identity>,
    /// Whoever it vouches for is as good as paired.
    pub(crate) authority: Option<Authority>,
}

/// Whoever has more to do with this host's VMs than to run them.
pub(crate) trait Follower: Send + Sync {
    /// The agent has taken hold of this one.
    fn taken(&self, host: &Arc<Host>, vm: &Arc<Vm>);

    /// This one is gone.
    fn forgotten(&self, vm: &Vm);
}

/// One host, its VMs and what they need.
pub(crate) struct Host {
    /// How its agent was set up.
    pub(crate) config: Config,
    /// Its journal.
    pub(crate) journal: Journal,
    /// What its agent proves to be, and who vouches for others.
    pub(crate) trusts: Trusts,
    /// Where other agents are served.
    pub(crate) listens: Option<SocketAddr>,
    /// Links whose streams are expected.
    pub(crate) sessions: Sessions,
    /// Its QEMU binaries.
    pub(crate) qemus: Qemus,
    /// Memory that is promised.
    pub(crate) admission: Arc<Admission>,
    /// Places for trials of the link.
    pub(crate) trials: Arc<Semaphore>,
    /// Its libvirt's domains.
    pub(crate) domains: Arc<Domains>,
    /// Of the files that its guests read.
    pub(crate) contents: Arc<Contents>,
    /// Of its markers.
    pub(crate) signature: Signature,
    /// How fast each cipher is on this host.
    ciphers: Vec<CipherSpeed>,
    /// Whether its agent can move RAM itself, once that was tried.
    external: OnceLock<Result<(), String>>,
    follower: OnceLock<Box<dyn Follower>>,
    state: Mutex<State>,
}

/// What changes.
#[derive(Default)]
pub(super) struct State {
    pub(super) vms: BTreeMap<String, Arc<Vm>>,
    /// Those whose QEMU is not at hand.
    pub(super) idle: BTreeMap<String, IdleVm>,
    /// Names of VMs that are being started.
    pub(super) reserved: HashSet<String>,
    /// How long the last switchover of a VM took besides its pages; and whether that was one to post-copy.
    switchovers: HashMap<(String, bool), Duration>,
}

impl State {
    fn has(&self, name: &str) -> bool {
        self.vms.contains_key(name) || self.idle.get(name).is_some_and(|it| !matches!(it.why, Idle::Ended(_)))
    }
}

/// A name that nobody else can take while this lives.
pub(crate) struct ReservedName<'a> {
    host: &'a Host,
    name: String,
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        self.host.state().reserved.remove(&self.name);
    }
}

impl Host {
    /// With nothing running on it yet.
    pub(crate) fn new(
        config: Config,
        journal: Journal,
        trusts: Trusts,
        listens: Option<SocketAddr>,
        sessions: Sessions,
    ) -> Arc<Self> {
        Arc::new(Self {
            qemus: Qemus::new(&config.name, &config.qemu_dirs, &config.run_dir),
            domains: Domains::new(&config.libvirt),
            config,
            journal,
            contents: Arc::default(),
            signature: Signature::of(trusts.identity.fingerprint()),
            trusts,
            listens,
            sessions,
            ciphers: measure_ciphers(),
            admission: Arc::default(),
            trials: Arc::new(Semaphore::new(MOST_TRIALS)),
            external: OnceLock::new(),
            follower: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// Tells this one of all VMs from now on; only the first that is named is told.
    pub(crate) fn tell(&self, follower: Box<dyn Follower>) {
        if self.follower.set(follower).is_err() {
            unreachable!("a host has one follower");
        }
    }

    pub(super) fn follower(&self) -> Option<&dyn Follower> {
        self.follower.get().map(AsRef::as_ref)
    }

    /// The ciphers that may be used with this address, and how fast they are here.
    pub(crate) fn ciphers_for(&self, address: IpAddr) -> Vec<CipherSpeed> {
        let only = self.config.network_of(address).and_then(|network| network.cipher.0);
        self.ciphers.iter().filter(|it| only.is_none_or(|only| only == it.cipher)).copied().collect()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn vm(&self, name: &str) -> Result<Arc<Vm>, AgentError> {
        self.state().vms.get(name).cloned().ok_or_else(|| AgentError::UnknownVm { name: name.into() })
    }

    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        self.state().vms.values().cloned().collect()
    }

    /// The VM whose QEMU this is, if it is at hand.
    pub(crate) fn vm_of(&self, name: &str, instance: &Instance) -> Option<Arc<Vm>> {
        self.state().vms.get(name).filter(|vm| vm.instance() == *instance).cloned()
    }

    /// A VM whose QEMU answers. One that an agent has only just begun to look for is waited for a moment.
    pub(crate) async fn found(&self, name: &str) -> Result<Arc<Vm>, AgentError> {
        let deadline = Instant::now() + FOUND;
        loop {
            let idle = self.idle(name);
            if let Some(between) = idle.as_ref().and_then(IdleVm::between_hosts) {
                return Err(between);
            }
            match (self.vm(name), idle.map(|idle| idle.why)) {
                (Ok(vm), _) => return Ok(vm),
                (Err(_), Some(Idle::Silent | Idle::Unclear)) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                (Err(_), Some(Idle::Silent | Idle::Unclear)) => {
                    return Err(AgentError::Busy { what: format!("the QEMU of {name}, which does not answer") });
                }
                (Err(_), Some(Idle::Ended(why))) => return Err(AgentError::Ended { name: name.into(), why }),
                (Err(unknown), _) => return Err(unknown),
            }
        }
    }

    /// The libvirt domain of this name. A name that a VM of the agent's own has is that VM's; `libvirt:NAME` is always
    /// libvirt's.
    pub(crate) fn domain(&self, name: &str) -> Option<SeenDomain> {
        match name.strip_prefix(OF_LIBVIRT) {
            Some(name) => self.domains.named(name),
            None if self.has_any(name) => None,
            None => self.domains.named(name),
        }
    }

    /// What a libvirt domain is called here.
    pub(crate) fn name_of(&self, domain: &SeenDomain) -> String {
        let name = &domain.domain.name;
        if self.has_any(name) { format!("{OF_LIBVIRT}{name}") } else { name.clone() }
    }

    /// A VM of the agent's own has this name, whether it runs or not.
    fn has_any(&self, name: &str) -> bool {
        let state = self.state();
        state.vms.contains_key(name) || state.idle.contains_key(name)
    }

    /// There are VMs of which nobody knows whose their guests are.
    pub(crate) fn has_unclear(&self) -> bool {
        let state = self.state();
        state.vms.values().any(|vm| vm.stage() == Stage::Unclear)
            || state.idle.values().any(|idle| idle.why == Idle::Unclear)
    }

    pub(crate) fn has_vm(&self, name: &str) -> bool {
        self.state().has(name)
    }

    /// A name for a VM that is about to be there. One that has ended gives up its own.
    pub(crate) fn reserve_name(&self, name: &str) -> Result<ReservedName<'_>, AgentError> {
        let mut state = self.state();
        if state.has(name) || !state.reserved.insert(name.into()) {
            return Err(AgentError::VmExists { name: name.into(), host: self.config.name.clone() });
        }
        Ok(ReservedName { host: self, name: name.into() })
    }

    /// The name of a VM that does not run, which nobody starts while this is held.
    pub(crate) fn hold(&self, name: &str) -> Result<ReservedName<'_>, AgentError> {
        let busy = |_| AgentError::Busy { what: format!("{name}, which is being started, or moved") };
        self.reserve_name(name).map_err(busy)
    }

    /// How long a switchover of this VM takes besides its pages: as long as its last one from here, or any VM's.
    pub(crate) fn switchover_time(&self, vm: &str, post_copy: bool) -> Duration {
        let known = &self.state().switchovers;
        let longest = || known.iter().filter(|((_, kind), _)| *kind == post_copy).map(|(_, time)| *time).max();
        known.get(&(vm.to_owned(), post_copy)).copied().or_else(longest).unwrap_or(SWITCHOVER)
    }

    /// What switches of this VM cost, as far as its last ones tell.
    pub(crate) fn costs_of(&self, vm: &str) -> Costs {
        let [switchover, post_copy] = [false, true].map(|post_copy| self.switchover_time(vm, post_copy));
        Costs { switchover, post_copy, ..Costs::default() }
    }

    pub(crate) fn note_switchover(&self, vm: &str, post_copy: bool, time: Duration) {
        let mut state = self.state();
        if state.switchovers.len() >= KEPT_SWITCHOVERS {
            state.switchovers.clear();
        }
        state.switchovers.insert((vm.into(), post_copy), time);
    }

    /// Why this agent cannot move RAM itself; found out by trying, once.
    pub(crate) fn external_obstacle(&self) -> Option<String> {
        let tried = self.external.get_or_init(|| vmferry_ram::support().map_err(|why| in_one_line(&why)));
        tried.clone().err()
    }
}
