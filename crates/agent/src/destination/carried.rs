//! Domains that another host's libvirt migrates to this host's, carried by the two agents.
//!
//! For one that was announced, and only for that one and its announcer, connections are let through: to libvirt itself
//! what its gate lets through (`vmferry_libvirt::Gate`), and to the sockets on which its QEMU waits. Who owns the guest is
//! libvirt's to decide; nothing of it is written down here. An agent that ends takes the connections along, and libvirt
//! then undoes the migration.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::Code;
use vmferry_libvirt::frame::Frame;
use vmferry_libvirt::{Announced, Gate, Libvirt, Verdict};
use vmferry_link::Fingerprint;

use super::suitability::no_memory;
use crate::error::AgentError;
use crate::host::{Host, Need, Promise, marker_beside};
use crate::peers::carried::{self, Folder};
use crate::peers::trust::Caller;
use crate::peers::{CarryOffer, CarryReply, Channel, DomainThere};

/// What is read of a stream at once, in bytes.
const BUFFER: usize = 256 << 10;
/// The largest frame of a source's libvirt, in bytes: a domain's XML and a cookie.
const LARGEST: usize = 8 << 20;
/// So many may be announced at a time.
const MOST: usize = 64;
/// For so long one is let through that has no connection.
const LEASE: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How long guests that run here may take to get the rest of their memory when the agent ends.
const DRAIN: Duration = Duration::from_secs(20);
/// So many connections one may have at a time.
const CONNECTIONS: u32 = 64;
/// How long a domain may take until it runs, when somebody waits for it.
const RUNS: Duration = Duration::from_secs(50);

/// See the module's text.
#[derive(Default)]
pub(crate) struct Carried(Mutex<HashMap<Uuid, Arc<Arrival>>>);

/// One that was announced.
struct Arrival {
    by: Fingerprint,
    id: Uuid,
    name: String,
    gate: Gate,
    over: CancellationToken,
    connections: AtomicU32,
    last: Mutex<Instant>,
    /// Held for their `Drop`.
    _promise: Promise,
    _folder: Folder,
}

/// One connection of it.
struct Connected(Arc<Arrival>);

impl Connected {
    fn to(arrival: Arc<Arrival>) -> Self {
        arrival.connections.fetch_add(1, Ordering::Relaxed);
        Self(arrival)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        *self.0.last.lock().expect("no holder of this lock panics") = Instant::now();
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Arrival {
    fn has_run_out(&self) -> bool {
        let last = *self.last.lock().expect("no holder of this lock panics");
        self.connections.load(Ordering::Relaxed) == 0 && last.elapsed() > LEASE
    }
}

impl Carried {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Arrival>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    fn has_room_for(&self, offer: &CarryOffer) -> Result<(), AgentError> {
        Self::has_room(&self.lock(), offer)
    }

    /// One at a time of each name and each UUID: libvirt ends an arrival by its name alone.
    fn has_room(all: &HashMap<Uuid, Arc<Arrival>>, offer: &CarryOffer) -> Result<(), AgentError> {
        let is_it = |it: &Arc<Arrival>| it.name == offer.name || it.gate.announced().uuid == offer.uuid;
        if all.values().any(is_it) {
            return Err(AgentError::Busy { what: format!("another {}, which is on its way here", offer.name) });
        }
        if all.len() >= MOST {
            return Err(AgentError::Busy { what: "other domains that are on their way here".into() });
        }
        Ok(())
    }

    /// Before the agent ends, which takes their connections along: those whose guest runs here already get a while for the
    /// rest of its memory.
    pub(crate) async fn drain(&self, host: &Host) {
        let in_post_copy = |it: &Arc<Arrival>| {
            let state = host.domains.of(it.gate.announced().uuid).map(|it| it.state);
            it.connections.load(Ordering::Relaxed) > 0 && DomainThere::of(state) == DomainThere::Runs
        };
        let deadline = Instant::now() + DRAIN;
        while self.lock().values().any(in_post_copy) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The arrival of this id, for the agent that has announced it.
    fn of(&self, id: Uuid, by: Fingerprint) -> Result<Arc<Arrival>, AgentError> {
        match self.lock().get(&id) {
            Some(arrival) if arrival.by == by => Ok(Arc::clone(arrival)),
            Some(_) => Err(AgentError::NotYours),
            None => {
                Err(AgentError::Conflict { message: format!("no domain is announced as {id} (any more)"), hint: None })
            }
        }
    }
}

/// Whether this host's libvirt could take it; touches nothing.
pub(crate) async fn check(host: &Arc<Host>, offer: &CarryOffer) -> Result<CarryReply, AgentError> {
    let refuse = |code: Code, reason: String, hint: &str| AgentError::Unsuitable {
        host: host.config.name.clone(),
        name: offer.name.clone(),
        code,
        reason,
        hint: Some(hint.into()),
    };
    let domains = &host.domains;
    if !domains.takes_arrivals() {
        let hint = "set arrivals = true (and enabled = true) in [libvirt] of that agent's configuration";
        return Err(refuse(Code::Conflict, "its agent does not let domains through to its libvirt".into(), hint));
    }
    let libvirt = domains.at_hand().await?;
    if !libvirt.migrates_over_sockets() {
        let reason = format!("its libvirt {} does not migrate over Unix sockets", libvirt.version);
        return Err(refuse(Code::OtherVersion, reason, "libvirt 6.8 or newer does"));
    }
    if domains.of(offer.uuid).is_some_and(|it| it.state.is_active()) {
        let reason = "its libvirt has this very domain running already".into();
        return Err(refuse(Code::VmExists, reason, "`virsh list` on both hosts; only one of them may have it"));
    }
    let is_namesake = |it: &crate::host::SeenDomain| it.domain.name == offer.name && it.domain.uuid != offer.uuid;
    if domains.all().iter().any(|it| is_namesake(it) && it.state.is_active()) {
        let reason = "its libvirt has another domain of this name running".into();
        return Err(refuse(Code::VmExists, reason, "`virsh domrename` gives a domain that is shut off another name"));
    }
    if offer.accelerator == "kvm" && !Path::new("/dev/kvm").exists() {
        let reason = "the guest runs under KVM, which is not there".into();
        return Err(refuse(Code::NoAccelerator, reason, "a running guest cannot change its accelerator"));
    }
    let need = Need { ram: offer.ram_bytes, huge_page: None };
    let looked = host.admission.look(need, host.config.reserved_memory.as_u64());
    looked.map_err(|short| no_memory(&host.config.name, &offer.name, short))?;
    let (written, read, id) = (offer.disks.clone(), offer.read_only.clone(), offer.id);
    // The disks may lie on storage that does not answer, which must not keep others waiting.
    let looked = tokio::task::spawn_blocking(move || look_at_files(&written, &read, id));
    let (own_disks, missing) = looked.await.expect("looking at files does not panic");
    if let Some(missing) = missing {
        let reason = format!("it reads {}, which is not there", missing.display());
        return Err(refuse(Code::NoFile, reason, "put it there, or take it out of the guest (`virsh change-media`)"));
    }
    Ok(CarryReply {
        host: host.config.name.clone(),
        libvirt: libvirt.version.clone(),
        own_disks,
        post_copy_obstacle: post_copy_obstacle(domains.qemu_user().await?),
        several_connections: true,
    })
}

/// Those of the written files that are not shared, and one of those that are read that is missing.
fn look_at_files(written: &[PathBuf], read: &[PathBuf], id: Uuid) -> (Vec<PathBuf>, Option<PathBuf>) {
    let is_shared = |disk: &&PathBuf| marker_beside(disk, id).is_some_and(|marker| marker.exists());
    let own = written.iter().filter(|disk| !is_shared(disk)).cloned().collect();
    (own, read.iter().find(|file| !file.exists()).cloned())
}

/// Why a QEMU of this user cannot have the kernel wait for pages; libvirt finds that out when the migration has begun, and
/// then fails it.
fn post_copy_obstacle(user: Option<(u32, u32)>) -> Option<String> {
    let is_root = user.is_none_or(|(user, _)| user == 0);
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let is_forbidden = allowed.is_ok_and(|it| it.trim() == "0") && !is_root;
    is_forbidden.then(|| "vm.unprivileged_userfaultfd is 0 there, and libvirt's QEMU is not root".into())
}

/// From now on this domain is let through for this agent.
pub(crate) async fn announce(
    host: &Arc<Host>,
    carried: &Arc<Carried>,
    offer: &CarryOffer,
    caller: &Caller,
) -> Result<CarryReply, AgentError> {
    let reply = check(host, offer).await?;
    let sockets = [Channel::Ram, Channel::Disks].map(|channel| carried::socket(offer.id, channel, &offer.name));
    let announced = Announced { name: offer.name.clone(), uuid: offer.uuid, sockets: sockets.into() };
    carried.has_room_for(offer)?;
    let qemu_user = host.domains.qemu_user().await?;
    let need = Need { ram: offer.ram_bytes, huge_page: None };
    let promised = host.admission.admit(need, host.config.reserved_memory.as_u64());
    let promise = promised.map_err(|short| no_memory(&host.config.name, &offer.name, short))?;
    let arrival = Arc::new(Arrival {
        by: caller.key,
        id: offer.id,
        name: offer.name.clone(),
        gate: Gate::new(announced),
        over: CancellationToken::new(),
        connections: AtomicU32::new(0),
        last: Mutex::new(Instant::now()),
        _promise: promise,
        // It can be made only once: an id that is known is refused by that.
        _folder: Folder::make(offer.id, qemu_user)?,
    });
    tracing::info!(domain = offer.name, migration = %offer.id, from = %caller.remote, "lets a domain through to libvirt");
    {
        let mut all = carried.lock();
        // Somebody may have been faster.
        Carried::has_room(&all, offer)?;
        all.insert(offer.id, Arc::clone(&arrival));
    }
    tokio::spawn(watch_lease(Arc::clone(carried), arrival));
    Ok(reply)
}

async fn watch_lease(carried: Arc<Carried>, arrival: Arc<Arrival>) {
    while !arrival.has_run_out() {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = arrival.over.cancelled() => return,
        }
    }
    tracing::warn!(domain = arrival.name, migration = %arrival.id, "its source has gone: it is not let through any more");
    carried.lock().remove(&arrival.id);
    arrival.over.cancel();
}

/// Nothing of it is let through any more.
pub(crate) fn withdraw(carried: &Carried, id: Uuid, by: Fingerprint) -> Result<(), AgentError> {
    let arrival = carried.of(id, by)?;
    carried.lock().remove(&id);
    arrival.over.cancel();
    Ok(())
}

/// How a domain stands with this host's libvirt; with `wait`, as soon as it runs.
pub(crate) async fn domain(host: &Host, uuid: Uuid, wait: bool) -> Result<DomainThere, AgentError> {
    let runs = |state| DomainThere::of(state) == DomainThere::Runs;
    if wait && runs(host.domains.wait(uuid, RUNS, runs).await) {
        return Ok(DomainThere::Runs);
    }
    Ok(DomainThere::of(ask(&host.domains.at_hand().await?, uuid).await?))
}

async fn ask(libvirt: &Libvirt, uuid: Uuid) -> Result<Option<vmferry_libvirt::State>, AgentError> {
    match libvirt.find(uuid).await? {
        Some(domain) => Ok(libvirt.state(&domain).await?),
        None => Ok(None),
    }
}

/// Where a connection of this channel leads.
pub(crate) struct Way {
    to: Connected,
    channel: Channel,
    socket: PathBuf,
}

/// The way for one more connection of the agent that has announced this.
pub(crate) fn way(
    host: &Host,
    carried: &Carried,
    id: Uuid,
    by: Fingerprint,
    channel: Channel,
) -> Result<Way, AgentError> {
    let arrival = carried.of(id, by)?;
    if arrival.connections.load(Ordering::Relaxed) >= CONNECTIONS {
        return Err(AgentError::Busy { what: format!("the other connections of {}", arrival.name) });
    }
    let socket = match channel {
        Channel::Control => host.domains.socket().ok_or_else(|| AgentError::Conflict {
            message: format!("libvirt is not at hand on this host: {}", host.domains.why_not()),
            hint: None,
        })?,
        Channel::Ram | Channel::Disks => carried::socket(id, channel, &arrival.name),
    };
    Ok(Way { to: Connected::to(arrival), channel, socket })
}

impl Way {
    /// Carries what comes there, and back, until one of them is over.
    pub(crate) async fn carry(self, from: impl AsyncRead + AsyncWrite + Unpin + Send) {
        let arrival = &self.to.0;
        let joined = async {
            let to = UnixStream::connect(&self.socket).await?;
            match self.channel {
                Channel::Control => through_the_gate(from, to, arrival).await,
                Channel::Ram | Channel::Disks => through(from, to).await,
            }
        };
        tokio::select! {
            joined = joined => if let Err(error) = joined {
                tracing::debug!(migration = %arrival.id, channel = self.channel.word(), %error, "a carried connection broke");
            },
            () = arrival.over.cancelled() => {}
        }
    }
}

async fn through(mut from: impl AsyncRead + AsyncWrite + Unpin, mut to: UnixStream) -> std::io::Result<()> {
    copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER, BUFFER).await.map(drop)
}

/// Frames of the source's libvirt go to ours if they may; ours go back between the answers to those that may not.
async fn through_the_gate(
    mut theirs: impl AsyncRead + AsyncWrite + Unpin,
    mut ours: UnixStream,
    arrival: &Arrival,
) -> std::io::Result<()> {
    let bad = |why: &dyn std::fmt::Display| std::io::Error::new(std::io::ErrorKind::InvalidData, why.to_string());
    let (mut said, mut answered) = (BytesMut::new(), BytesMut::new());
    let mut gate = arrival.gate.clone();
    loop {
        said.reserve(BUFFER);
        answered.reserve(BUFFER);
        tokio::select! {
            count = theirs.read_buf(&mut said) => {
                if count? == 0 {
                    return Ok(());
                }
                while let Some(frame) = Frame::take(&mut said, LARGEST).map_err(|error| bad(&error))? {
                    match gate.judge(frame) {
                        Verdict::Pass(frame) => ours.write_all(&frame.encode()).await?,
                        Verdict::Refuse { answer, what } => {
                            tracing::warn!(domain = arrival.name, migration = %arrival.id, what, "refused of a source's libvirt");
                            theirs.write_all(&answer.encode()).await?;
                            theirs.flush().await?;
                        }
                        Verdict::End(why) => {
                            tracing::warn!(domain = arrival.name, migration = %arrival.id, why, "ended a source's libvirt");
                            return Err(bad(&why));
                        }
                    }
                }
            }
            count = ours.read_buf(&mut answered) => {
                if count? == 0 {
                    return Ok(());
                }
                // Whole ones only: an answer of the gate's goes between two.
                while let Some(frame) = Frame::take(&mut answered, vmferry_libvirt::frame::LARGEST).map_err(|error| bad(&error))? {
                    gate.hear(&frame);
                    theirs.write_all(&frame.encode()).await?;
                }
                theirs.flush().await?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_shared_where_the_marker_is_found_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let id = Uuid::new_v4();
        let (shared, own) = (dir.path().join("shared/a.raw"), dir.path().join("own/b.raw"));
        for file in [&shared, &own] {
            std::fs::create_dir(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        }
        std::fs::write(marker_beside(&shared, id).unwrap(), "").unwrap();
        let missing = dir.path().join("cd.iso");
        let gone = dir.path().join("own/gone.raw");
        let (found, lacks) =
            look_at_files(&[shared.clone(), own.clone(), gone.clone()], &[shared, missing.clone()], id);
        assert_eq!((found, lacks), (vec![own, gone], Some(missing)));
    }

    #[test]
    fn a_qemu_that_is_root_needs_no_leave_to_have_pages_waited_for() {
        assert_eq!(post_copy_obstacle(None), None);
        assert_eq!(post_copy_obstacle(Some((0, 0))), None);
    }
}
