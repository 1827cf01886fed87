//! The plan of a migration: everything that can be refused is refused here, and nothing is touched yet.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytesize::ByteSize;
use uuid::Uuid;
use vmferry_api::{EngineName, MigrateRequest, PlanView, Security};
use vmferry_link::{Fingerprint, fastest_cipher};
use vmferry_qemu::inventory::Glimpse;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{
    CommandLine, Drift, Features, Inventory, MigrationStatus, QmpError, RunState, WrittenImage, migration,
    written_images,
};

use super::decider::OURS;
use super::mover::{ByAgents, ByQemu, Guest, Mover, Protect};
use crate::engine::movable::{Planned, Slowed};
use crate::engine::{NewSession, Protection, Setup, movable};
use crate::error::AgentError;
use crate::host::{
    Claim, Content, Host, Markers, Placed, Places, Stage, Vm, device_id, drift_of, plugs, resident_memory,
};
use crate::measuring::boot_files;
use crate::peers::{CheckReply, Offer, OwnImage, Peer, trust};

/// What `O_DIRECT` may want sizes to be multiples of, in bytes.
const DIRECT: u64 = 4096;

/// What planning found out.
pub(super) struct Plan {
    pub(super) view: PlanView,
    pub(super) offer: Offer,
    pub(super) there: CheckReply,
    pub(super) features: Features,
    pub(super) peer: Peer,
    pub(super) peer_key: Fingerprint,
    /// Where its agent is, and its QEMU will be.
    pub(super) remote: IpAddr,
    pub(super) protect: Protect,
    /// The most to send over the network between the hosts, in bytes a second.
    pub(super) rate: Option<u64>,
    /// Until the destination has looked for them for the last time.
    pub(super) markers: Option<Markers>,
    /// Where its disks get other paths.
    pub(super) places: Places,
    /// It was changed since its start.
    pub(super) changed: bool,
    /// What may be otherwise when it is moved.
    pub(super) planned: Planned,
    /// Who moves the RAM.
    pub(super) mover: Arc<dyn Mover>,
}

/// Claims a VM for a migration that may yet be refused.
pub(super) fn claim(vm: &Vm) -> Result<Claim<'_>, AgentError> {
    let name = || vm.name().to_owned();
    let refuse = |reason: String| AgentError::NotMigratable { name: name(), reason, hint: None };
    Claim::take(vm, Stage::Planning).map_err(|doing| match doing {
        Stage::Unclear => refuse("it may be another host's: `vmferry resolve` says whose it is".into()),
        Stage::Stranded(_) => refuse("it runs on another host; this is what an unfinished post-copy left".into()),
        Stage::Stopping => refuse("it is being stopped".into()),
        Stage::MovingDisk => refuse("a disk of it is being moved: wait for that, or cancel it".into()),
        _ => AgentError::MigrationRuns { name: name() },
    })
}

/// Refuses everything that can be refused; nothing is touched, here or there, except that a measuring guest's boot files
/// are brought to where it is to go.
pub(super) async fn plan(host: &Host, vm: &Vm, id: Uuid, request: &MigrateRequest) -> Result<Plan, AgentError> {
    let run_state = movable(vm).await?;
    // One that sleeps goes on sleeping when it is set running.
    let running = matches!(run_state, RunState::Running | RunState::Suspended);
    let seen = Glimpse::of(&vm.qmp).await?;
    if !request.disks_are_shared {
        flushes(vm).await?;
    }
    let images = written_images(&vm.qmp).await?;
    would_run(vm, &images)?;
    let places = places(vm, &images, request)?;
    let (now, drift) = as_it_is(host, vm).await?;
    let ram_bytes = vm.ram_bytes().await?;
    let behind = now.as_ref().map(Inventory::backing_files).unwrap_or_default();
    let changed = drift.is_some();
    let mut spec = vm.spec.clone();
    let mut notes = Vec::new();
    if let Some(drift) = drift {
        notes.extend(drift.notes());
        spec.argv = drift.argv;
    }
    let cpu_features = now.as_ref().map(Inventory::cpu_features).unwrap_or_default();
    // Those that were set before anybody looked, too.
    if let Some(now) = now {
        spec.io_limits = Some(now.io_limits().clone());
    }
    let found = trust::find_peer(host, &request.to).await?;
    let met = found.hello().await?;
    let (peer, remote) = (found.pinned_to(&met), met.ip());
    // The disks may lie on storage that does not answer, which must not keep others waiting.
    let (of, signature) = (spec.clone(), host.signature.clone());
    let put = tokio::task::spawn_blocking(move || Markers::put(&of, &behind, id, &signature));
    let markers = put.await.expect("putting markers does not panic")?;
    let networks = plugs(&CommandLine::parse(&spec.argv)?);
    let here = std::mem::take(&mut spec.argv);
    spec.argv = places.words(vm.name(), &here, &[])?;
    let mut offer = Offer {
        id,
        from: host.config.name.clone(),
        spec,
        ram_bytes,
        machine: vm.facts.machine.clone(),
        accelerator: vm.accelerator.clone(),
        running,
        cpu_features,
        images: own_images(vm, images, &markers, &places, request),
        own_disks: Vec::new(),
        disks_session: None,
        disks: markers.disks().iter().map(|disk| places.there(disk)).collect(),
        read_only: markers.read_only(),
        contents: BTreeMap::new(),
        networks,
        stopped: false,
        disks_are_shared: request.disks_are_shared,
        setup: Setup::default(),
        protection: Protection::default(),
        external: None,
    };
    if vm.spec.measuring {
        boot_files::send(&vm.spec, &peer).await?;
    }
    let mut there = peer.check(&offer).await?;
    if !there.unproven.is_empty() {
        offer.contents = contents_of(host, &offer, &there.unproven).await?;
        there = peer.check(&offer).await?;
    }
    offer.spec.argv = places.words(vm.name(), &here, &there.devices)?;
    let (features, can_tls) = host.qemus.features_of(vm).await?;
    let carries_sleep = migration::carries_sleep(|name| features.has_capability(name))
        && migration::carries_sleep(|name| there.capabilities.contains(name));
    if run_state == RunState::Suspended && !carries_sleep {
        let reason = "it is suspended to RAM, and would not wake up there: that takes QEMU 9.0 on both hosts";
        let hint = "wake it first (`system_wakeup` in its monitor)";
        return Err(AgentError::NotMigratable {
            name: vm.name().into(),
            reason: reason.into(),
            hint: Some(hint.into()),
        });
    }
    let mut planned = Planned { seen, carries_sleep, drains: false, slowed: Slowed::default() };
    let mover: Arc<dyn Mover> = match agents_can(host, vm, request, &there).await? {
        Ok(by_agents) => {
            planned.drains = by_agents.drains;
            Arc::new(by_agents)
        }
        Err(why) => {
            notes.extend(why.map(|why| format!("QEMU moves the memory itself, as the agents cannot: {why}.")));
            let blocks = vm.qmp.execute(commands::QueryMemdev {}).await?.into_iter().map(|it| it.size);
            let guest = Guest { running, ram_bytes, blocks: blocks.collect() };
            Arc::new(ByQemu::plan(vm, (&features, can_tls), &guest, &there, request)?)
        }
    };
    if !there.own_disks.is_empty() {
        offer.own_disks.clone_from(&there.own_disks);
        offer.disks_session = Some(NewSession::random());
        // No more than was offered.
        if let Some(other) = there.own_disks.iter().find(|disk| offer.image(disk).is_none()) {
            let reason = format!("{} asks for {}, which is none of its disks", there.host, other.display());
            return Err(AgentError::NotMigratable { name: vm.name().into(), reason, hint: None });
        }
        if request.script.is_some() {
            let reason = "its disks are not shared, and a measurement moves none".into();
            return Err(AgentError::NotMigratable { name: vm.name().into(), reason, hint: None });
        }
        let own = there.own_disks.iter().filter_map(|disk| offer.image(disk));
        notes.extend(own.map(|image| in_words(image, &places, there.devices.contains(&image.path))));
    }
    let protect = match (host.config.security_of(remote), there.security) {
        (Security::Plain, Security::Plain) => Protect::Not,
        (security, their_security) => {
            if security == Security::Plain || their_security == Security::Plain {
                notes
                    .push("The guest travels encrypted: only one of the two hosts is configured to do without.".into());
            }
            mover.protection(fastest_cipher(&host.ciphers_for(remote), &there.ciphers))
        }
    };
    let protect = mover.reaches(remote, protect);
    notes.extend(mover.notes());
    match run_state {
        RunState::Running => {}
        RunState::Suspended => notes.push("The guest is suspended to RAM, and will be there.".into()),
        RunState::IoError => notes.push(
            "The guest waits since its disk failed, and will be paused there: `vmferry resume` has it try again."
                .into(),
        ),
        _ => notes.push("The guest is paused and will be paused there.".into()),
    }
    let view = PlanView {
        vm: vm.name().into(),
        to: met.hello.name,
        engine: mover.name().to_string(),
        policy: if request.script.is_some() {
            "script".into()
        } else {
            request.policy.clone().unwrap_or_else(|| OURS.into())
        },
        ram_bytes,
        ram_used_bytes: resident_memory(vm.pid).min(ram_bytes),
        link_rate: 0,
        first_round_ms: 0,
        source_qemu: vm.facts.qemu_version.clone(),
        destination_qemu: there.qemu_version.clone(),
        machine: vm.facts.machine.clone(),
        accelerator: vm.accelerator.clone(),
        capabilities: mover.means(),
        protection: protect.in_words(),
        notes,
        prediction: None,
    };
    let rate = host.config.network_of(remote).and_then(|network| network.rate).map(|rate| rate.0);
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
        places,
        changed,
        planned,
        mover,
    })
}

/// The images of this VM that could move with it.
fn own_images(
    vm: &Vm,
    images: Vec<WrittenImage>,
    markers: &Markers,
    places: &Places,
    request: &MigrateRequest,
) -> Vec<OwnImage> {
    let disks = if request.copy_disks { markers.disks() } else { Vec::new() };
    let images = images.into_iter().filter_map(|image| {
        let here = vm.spec.cwd.join(&image.file);
        let path = places.there(&here);
        let is_named = places.is_named(&path);
        let file = std::fs::metadata(&here).ok().filter(std::fs::Metadata::is_file);
        // What is a device here can be anything there, so that only its user knows where.
        let may_move = disks.contains(&here) && (is_named || file.is_some());
        may_move.then(|| OwnImage {
            owner: file.as_ref().map(|file| (file.uid(), file.gid())),
            mode: file.map(|file| file.mode()),
            path,
            placed: is_named,
            device_id: device_id(&here),
            format: image.format,
            size: image.size,
            allocated: image.allocated.unwrap_or(image.size),
            backing: image.backing,
        })
    });
    images.collect()
}

/// Refuses a guest that QEMU would not set running again: one that has been moved opens its disks with less rights than one
/// that is started, and cannot make a disk a little larger that `O_DIRECT` could not be used for to its end otherwise.
fn would_run(vm: &Vm, images: &[WrittenImage]) -> Result<(), AgentError> {
    let odd = |image: &&WrittenImage| image.format == "raw" && image.is_direct && !image.size.is_multiple_of(DIRECT);
    let Some(image) = images.iter().find(odd) else { return Ok(()) };
    let fits = image.size.next_multiple_of(DIRECT);
    Err(AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!(
            "{} goes around the host's cache, and its size, {} bytes, is no multiple of {DIRECT}: QEMU would not set it \
             running where it goes",
            image.disk, image.size
        ),
        hint: Some(format!("enlarge it to {fits} bytes (`block_resize` in its monitor), or use another cache mode")),
    })
}

/// The disks that its user wants to be elsewhere.
fn places(vm: &Vm, images: &[WrittenImage], request: &MigrateRequest) -> Result<Places, AgentError> {
    if !request.disks.is_empty() && !request.copy_disks {
        let message = "a disk that gets another place has to move, and no disk is to move".into();
        return Err(AgentError::BadRequest { message, hint: Some("give either --disk or --no-copy-disks".into()) });
    }
    let known = images.iter().map(|image| Placed {
        names: vec![image.disk.clone(), image.node.clone()],
        file: image.file.clone(),
        here: vm.spec.cwd.join(&image.file),
        format: image.format.clone(),
        there: PathBuf::new(),
    });
    Places::of(vm.name(), &request.disks, &known.collect::<Vec<_>>())
}

fn in_words(image: &OwnImage, places: &Places, is_device: bool) -> String {
    let (here, there) = (places.here(&image.path), image.path.display());
    let how = match (image.placed, is_device) {
        (false, _) => "is not shared and moves with it".to_owned(),
        (true, false) => format!("moves with it, to {there}"),
        (true, true) => {
            format!("moves with it, to the device {there}: what is on that is lost, also when the migration fails")
        }
    };
    format!(
        "Its disk {} ({}, {} of {} in use) {how}.",
        here.display(),
        image.format,
        ByteSize(image.allocated),
        ByteSize(image.size)
    )
}

/// What is in the files of which the destination wants to know.
pub(crate) async fn contents_of(
    host: &Host,
    offer: &Offer,
    unproven: &[PathBuf],
) -> Result<BTreeMap<PathBuf, Content>, AgentError> {
    // Of nothing else than what was offered.
    let files: Vec<PathBuf> = offer.read_only.iter().filter(|it| unproven.contains(it)).cloned().collect();
    let (contents, name) = (Arc::clone(&host.contents), offer.spec.name.clone());
    let read = move || {
        let one = |file: PathBuf| match contents.of(&file) {
            Ok(content) => Ok((file, content)),
            Err(error) => Err(AgentError::NotMigratable {
                name: name.clone(),
                reason: format!(
                    "nothing tells that {} is the same on both hosts: it cannot be read ({error})",
                    file.display()
                ),
                hint: Some("if you know that it is, say --disks-are-shared".into()),
            }),
        };
        files.into_iter().map(one).collect()
    };
    tokio::task::spawn_blocking(read).await.expect("reading files does not panic")
}

/// The agents, where they are wanted and can; otherwise QEMU does it, and this is why, if it is not what is wanted.
async fn agents_can(
    host: &Host,
    vm: &Vm,
    request: &MigrateRequest,
    there: &CheckReply,
) -> Result<Result<ByAgents, Option<String>>, AgentError> {
    if request.engine.unwrap_or(host.config.engine) == EngineName::Qemu {
        return Ok(Err(None));
    }
    let why = match (movable::movable(host, vm).await?, &there.external_obstacle) {
        (Err(why), _) => why,
        (Ok(_), Some(why)) => format!("at {}: {why}", there.host),
        (Ok(movable), None) => match movable::try_out(host, vm, &movable, request.post_copy).await {
            Ok(paces) => return Ok(Ok(ByAgents { backends: movable.backends, drains: movable.drains, paces })),
            Err(why) => why,
        },
    };
    if request.engine.is_none() {
        return Ok(Err(Some(why)));
    }
    Err(AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!("its RAM cannot be moved by the agents: {why}"),
        hint: Some("let QEMU move it: --engine qemu".into()),
    })
}

/// What it is made of now, and how it was changed since its start; refused where that cannot go along.
async fn as_it_is(host: &Host, vm: &Vm) -> Result<(Option<Inventory>, Option<Drift>), AgentError> {
    let now = match vm.inventory().await {
        Ok(now) => now,
        // It does not tell; what differs is seen when the destination has made its own.
        Err(QmpError::Command { .. }) => return Ok((None, None)),
        Err(error) => return Err(error.into()),
    };
    let drift = drift_of(host, vm, &now).await?;
    let obstacles = match &drift {
        Some(drift) => drift.obstacles.clone(),
        // In a way that has no words.
        None => vm.changes(&now),
    };
    match obstacles.is_empty() {
        true => Ok((Some(now), drift)),
        false => Err(AgentError::Changed { name: vm.name().into(), changes: obstacles }),
    }
}

/// Refuses a guest whose disks are not written when it asks for that: what this host has not written the other cannot
/// read.
async fn flushes(vm: &Vm) -> Result<(), AgentError> {
    let nodes = vm.qmp.execute(commands::QueryNamedBlockNodes { flat: true }).await?;
    match nodes.into_iter().find(|node| node.cache.no_flush && !node.ro) {
        None => Ok(()),
        Some(node) => Err(AgentError::NotMigratable {
            name: vm.name().into(),
            reason: format!(
                "{} is written when this host likes (cache=unsafe), so that the other may read what is old",
                node.file
            ),
            hint: Some("use another cache mode; if both hosts see all that is written, say --disks-are-shared".into()),
        }),
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
    if let Some(job) = vm.qmp.execute(commands::QueryBlockJobs {}).await?.first() {
        let what = format!("a disk of it is being worked on ({}, the job {:?})", job.kind, job.device);
        return Err(refuse(what, "wait for its end, or cancel it (`block-job-cancel` in its monitor)"));
    }
    if CommandLine::parse(&vm.spec.argv)?.snapshot() {
        return Err(refuse(
            "its disks' changes are in a temporary file of this host".into(),
            "run it without snapshot",
        ));
    }
    match vm.run_state().await? {
        // One that waits for its disk may find it well where it goes.
        state @ (RunState::Running | RunState::Suspended | RunState::Paused | RunState::IoError) => Ok(state),
        // A guest that was started with -S: paused, with all its state.
        RunState::Prelaunch => Ok(RunState::Paused),
        RunState::PostMigrate => Err(refuse(
            "it is paused since a migration that was undone, and QEMU moves such a guest only after it ran".into(),
            "let it run for a moment (`cont` in its monitor)",
        )),
        other => Err(refuse(format!("it is {other}"), "only a running or paused guest can be migrated")),
    }
}
