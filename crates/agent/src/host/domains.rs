//! The domains of this host's libvirt, as it tells of them.
//!
//! libvirt stays in charge of them: they are followed by its events, shown, and nothing is done to them but a migration by
//! libvirt's own means. When its daemon is started again, or only then, it is found within a second or two.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use uuid::Uuid;
use vmferry_api::VmView;
use vmferry_libvirt::event::Turn;
use vmferry_libvirt::{
    ConnectionError, Description, Domain, Event, Info, Libvirt, PausedWhy, RunState, State, qemu_user,
};

use super::disks::{Signature, sweep_beside};
use crate::config::LibvirtConfig;
use crate::error::AgentError;
use crate::journal::Instance;

/// Where libvirt's daemons listen: the modular one for QEMU, and the one for all.
const SOCKETS: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];
/// Where libvirt writes down the processes of its QEMUs.
const QEMUS: &str = "/run/libvirt/qemu";
/// The driver of the domains.
const DRIVER: &str = "qemu:///system";
/// What the name of a libvirt domain begins with, where it is to be told from a VM of the agent's own.
pub(super) const OF_LIBVIRT: &str = "libvirt:";
/// Between two looks for a daemon.
const LOOK: Duration = Duration::from_secs(1);
/// From an event to the second look at its domain.
const AGAIN: Duration = Duration::from_secs(1);
/// How long somebody who needs it waits for a daemon that is not there.
const PATIENCE: Duration = Duration::from_secs(3);

/// A domain, as it was last seen.
#[derive(Clone, Debug)]
pub(crate) struct SeenDomain {
    /// As libvirt names it.
    pub(crate) domain: Domain,
    /// How it stands.
    pub(crate) state: State,
    info: Option<Info>,
    /// What its XML says; none where that makes no sense.
    pub(crate) description: Option<Description>,
}

/// See the module's text.
pub(crate) struct Domains {
    config: LibvirtConfig,
    state: Mutex<Seen>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Seen {
    libvirt: Option<Libvirt>,
    /// Why there is none.
    why_not: Option<String>,
    /// As whom it runs QEMUs, once it has said so.
    qemu_user: Option<QemuUser>,
    domains: BTreeMap<Uuid, Looked>,
    looks: u64,
}

/// User and group; none where libvirt leaves QEMU its own.
#[derive(Clone, Copy)]
struct QemuUser(Option<(u32, u32)>);

/// What the latest look at a domain has told: looks may come back in another order than they went.
struct Looked {
    look: u64,
    /// None when it is gone.
    domain: Option<SeenDomain>,
}

impl Domains {
    /// None is known yet.
    pub(super) fn new(config: &LibvirtConfig) -> Arc<Self> {
        Arc::new(Self { config: config.clone(), state: Mutex::default(), changed: watch::channel(()).0 })
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<SeenDomain> {
        self.lock().domains.values().filter_map(|it| it.domain.clone()).collect()
    }

    /// The one of this name.
    pub(super) fn named(&self, name: &str) -> Option<SeenDomain> {
        self.lock().domains.values().filter_map(|it| it.domain.as_ref()).find(|it| it.domain.name == name).cloned()
    }

    /// The one of this UUID.
    pub(crate) fn of(&self, uuid: Uuid) -> Option<SeenDomain> {
        self.lock().domains.get(&uuid)?.domain.clone()
    }

    /// The daemon, if it is there.
    pub(crate) fn libvirt(&self) -> Option<Libvirt> {
        self.lock().libvirt.clone().filter(|it| !it.has_ended())
    }

    /// The daemon; one that is just being started again is waited for a moment.
    pub(crate) async fn at_hand(&self) -> Result<Libvirt, AgentError> {
        let mut changed = self.changed.subscribe();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(libvirt) = self.libvirt() {
                    return libvirt;
                }
                // It ends only with the agent.
                let _ = changed.changed().await;
            }
        });
        found.await.map_err(|_| AgentError::Conflict {
            message: format!("libvirt is not at hand on this host: {}", self.why_not()),
            hint: Some("`virsh -c qemu:///system version` on that host tells more".into()),
        })
    }

    /// Why there is none.
    pub(crate) fn why_not(&self) -> String {
        match (self.config.enabled, &self.lock().why_not) {
            (false, _) => "its agent's configuration says enabled = false in [libvirt]".into(),
            (true, Some(why)) => why.clone(),
            (true, None) => "it was not found yet".into(),
        }
    }

    /// Its socket, as far as there is one.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        match &self.config.socket {
            Some(socket) => Some(socket.clone()),
            None => SOCKETS.iter().map(PathBuf::from).find(|it| it.exists()),
        }
    }

    /// Peers may migrate domains to it.
    pub(crate) fn takes_arrivals(&self) -> bool {
        self.config.enabled && self.config.arrivals
    }

    /// As whom it runs QEMUs; none where it does not change that. A daemon that was just started takes some seconds to
    /// find out what its host can do.
    pub(crate) async fn qemu_user(&self) -> Result<Option<(u32, u32)>, AgentError> {
        if let Some(QemuUser(known)) = self.lock().qemu_user {
            return Ok(known);
        }
        let capabilities = self.at_hand().await?.capabilities().await?;
        let user = qemu_user(&capabilities).map_err(|error| AgentError::Conflict {
            message: format!("nobody can tell as whom libvirt runs QEMUs on this host: {error}"),
            hint: None,
        })?;
        self.lock().qemu_user = Some(QemuUser(user));
        Ok(user)
    }

    /// Waits until this is so of a domain, or it is too late for it; how it was seen last.
    pub(crate) async fn wait(
        &self,
        uuid: Uuid,
        patience: Duration,
        is_so: impl Fn(Option<State>) -> bool,
    ) -> Option<State> {
        let mut changed = self.changed.subscribe();
        let state = || self.of(uuid).map(|it| it.state);
        let waiting = async {
            while !is_so(state()) {
                // It ends only with the agent.
                let _ = changed.changed().await;
            }
        };
        let _ = tokio::time::timeout(patience, waiting).await;
        state()
    }

    /// Follows the daemon for as long as the agent lives.
    pub(crate) async fn follow(self: Arc<Self>, signature: Signature) {
        if !self.config.enabled {
            return;
        }
        let mut swept = false;
        loop {
            let found = match self.socket() {
                Some(socket) => self.open(&socket).await,
                None => Err("no socket of it is there".to_owned()),
            };
            match found {
                Ok((libvirt, events)) => {
                    if !std::mem::replace(&mut swept, true) {
                        self.sweep(&signature);
                    }
                    self.keep_up(&libvirt, events).await;
                    tracing::info!("libvirt's daemon has gone");
                    self.lock().libvirt = None;
                    self.why("its daemon has gone".into());
                }
                Err(why) => self.why(why),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// There is none now, for this reason. What was seen of its domains stays no longer.
    fn why(&self, why: String) {
        let mut seen = self.lock();
        if seen.why_not.as_ref() != Some(&why) {
            tracing::debug!(why, "no libvirt is followed");
        }
        seen.why_not = Some(why);
        seen.domains.clear();
        drop(seen);
        self.changed.send_replace(());
    }

    /// Connects, and looks at all domains.
    async fn open(&self, socket: &Path) -> Result<(Libvirt, Events), String> {
        let opening = async {
            let libvirt = Libvirt::open(socket, DRIVER).await?;
            // Before the look: nothing falls between the two.
            let events = libvirt.follow().await?;
            let domains = libvirt.domains().await?;
            Ok::<_, ConnectionError>((libvirt, events, domains))
        };
        let (libvirt, events, domains) = opening.await.map_err(|error| error.to_string())?;
        let host = libvirt.hostname().await.unwrap_or_default();
        tracing::info!(version = libvirt.version, host, domains = domains.len(), "follows libvirt");
        {
            let mut seen = self.lock();
            (seen.libvirt, seen.why_not, seen.qemu_user) = (Some(libvirt.clone()), None, None);
        }
        self.changed.send_replace(());
        let looks = domains.into_iter().map(|domain| self.look(&libvirt, domain.uuid));
        futures_util::future::join_all(looks).await;
        Ok((libvirt, events))
    }

    /// Takes in what happens to its domains until it has gone.
    async fn keep_up(self: &Arc<Self>, libvirt: &Libvirt, mut events: Events) {
        let mut looks = JoinSet::new();
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok((_, event)) => {
                        let uuid = event.domain().uuid;
                        self.hear(&event);
                        if matches!(event, Event::Lifecycle { .. }) {
                            let (domains, libvirt) = (Arc::clone(self), libvirt.clone());
                            looks.spawn(async move {
                                domains.look(&libvirt, uuid).await;
                                // libvirt tells of some changes a moment before they can be seen.
                                tokio::time::sleep(AGAIN).await;
                                domains.look(&libvirt, uuid).await;
                            });
                        }
                    }
                    // Too many at once: all of them are looked at again.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        for domain in libvirt.domains().await.unwrap_or_default() {
                            self.look(libvirt, domain.uuid).await;
                        }
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                () = libvirt.ended() => return,
                Some(_) = looks.join_next() => {}
            }
        }
    }

    /// What an event itself tells, without asking: so somebody who waits hears it at once.
    fn hear(&self, event: &Event) {
        let Event::Lifecycle { domain, turn, detail } = event else { return };
        let state = match turn {
            Turn::Resumed => State { run: RunState::Running, reason: if *detail == 4 { 11 } else { 0 } },
            Turn::Suspended => State {
                run: RunState::Paused(match detail {
                    1 => PausedWhy::Migration,
                    7 => PausedWhy::PostCopy,
                    8 => PausedWhy::PostCopyFailed,
                    _ => PausedWhy::Other,
                }),
                reason: 0,
            },
            _ => return,
        };
        if let Some(seen) = self.lock().domains.get_mut(&domain.uuid).and_then(|it| it.domain.as_mut()) {
            seen.state = state;
        }
        self.changed.send_replace(());
    }

    /// Looks at a domain, and notes what is seen unless somebody has looked later.
    async fn look(&self, libvirt: &Libvirt, uuid: Uuid) {
        let look = {
            let mut seen = self.lock();
            seen.looks += 1;
            seen.looks
        };
        let domain = match see(libvirt, uuid, self.of(uuid)).await {
            Ok(domain) => domain,
            Err(error) => {
                tracing::debug!(domain = %uuid, %error, "cannot look at a domain");
                return;
            }
        };
        let mut all = self.lock();
        if all.domains.get(&uuid).is_none_or(|known| known.look < look) {
            all.domains.insert(uuid, Looked { look, domain });
        }
        drop(all);
        self.changed.send_replace(());
    }

    /// Markers that an earlier agent has left beside their disks go.
    fn sweep(&self, signature: &Signature) {
        let disks: Vec<PathBuf> = self.all().iter().flat_map(SeenDomain::written_files).collect();
        let signature = signature.clone();
        // The disks may lie on storage that does not answer.
        tokio::task::spawn_blocking(move || sweep_beside(disks.into_iter(), &signature));
    }
}

type Events = broadcast::Receiver<(Instant, Event)>;

/// How a domain is; none when it is gone.
async fn see(libvirt: &Libvirt, uuid: Uuid, before: Option<SeenDomain>) -> Result<Option<SeenDomain>, ConnectionError> {
    let Some(domain) = libvirt.find(uuid).await? else { return Ok(None) };
    let Some(state) = libvirt.state(&domain).await? else { return Ok(None) };
    // A domain that is on its way here has neither for a moment.
    let info = libvirt.info(&domain).await.ok().or(before.as_ref().and_then(|it| it.info));
    let xml = libvirt.xml(&domain).await.ok();
    let description = xml.and_then(|xml| Description::parse(&xml).ok()).or(before.and_then(|it| it.description));
    Ok(Some(SeenDomain { domain, state, info, description }))
}

impl SeenDomain {
    /// Its RAM, in bytes, as far as it is known.
    pub(crate) fn ram_bytes(&self) -> u64 {
        self.info.map_or(0, |it| it.max_memory)
    }

    /// The process of its QEMU, as libvirt has written it down.
    pub(crate) fn pid_of(domain: &str) -> Option<u32> {
        let file = Path::new(QEMUS).join(format!("{domain}.pid"));
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// Its name that no VM of the agent's own can have.
    pub(crate) fn full_name(&self) -> String {
        format!("{OF_LIBVIRT}{}", self.domain.name)
    }

    /// Its QEMU, as far as libvirt has written it down.
    pub(crate) fn instance(&self) -> Instance {
        let pid = Self::pid_of(&self.domain.name).unwrap_or(0);
        Instance::now(pid, vmferry_qemu::process_start_time(pid).unwrap_or(0))
    }

    /// The files that it writes to.
    pub(crate) fn written_files(&self) -> Vec<PathBuf> {
        let disks = self.description.iter().flat_map(|it| &it.disks).filter(|it| !it.read_only);
        let files = disks.filter_map(|it| match &it.kind {
            vmferry_libvirt::DiskKind::File(path) => Some(path.clone()),
            _ => None,
        });
        files.collect()
    }

    /// As its user sees it, by this name; `migration` is the one that takes it away.
    pub(crate) fn view(&self, name: String, migration: Option<Uuid>) -> VmView {
        let detail = match self.state.run {
            RunState::Paused(PausedWhy::PostCopyFailed) => Some("its post-copy broke: it waits to be resumed"),
            RunState::Paused(PausedWhy::PostCopy) => Some("it runs at its destination, which still needs it here"),
            RunState::Paused(PausedWhy::Migration) => Some("for a migration"),
            RunState::Running if self.state.runs_without_its_ram() => Some("its post-copy broke, and it lacks memory"),
            _ => None,
        };
        let description = self.description.as_ref();
        VmView {
            name,
            state: if migration.is_some() { "migrating" } else { self.state.in_words() }.into(),
            detail: detail.map(str::to_owned),
            pid: Self::pid_of(&self.domain.name).filter(|_| self.state.is_active()).unwrap_or(0),
            ram_bytes: self.ram_bytes(),
            argv: Vec::new(),
            // libvirt tells that of its usual QEMU, which need not be this domain's.
            qemu_version: None,
            machine: description.and_then(|it| it.machine.clone()),
            accelerator: description.map(|it| it.accelerator.clone()),
            adopted: false,
            manager: Some("libvirt".into()),
            autostart: false,
            console: false,
            engine: "libvirt".into(),
            external_obstacle: None,
            changes: Vec::new(),
            migration,
        }
    }
}
