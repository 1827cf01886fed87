//! Refuse early: what can be told of a domain's migration before anything is touched.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::{Code, MigrateRequest, PlanView};
use vmferry_libvirt::{Description, DiskKind, Domain, JobKind, Libvirt, PausedWhy, RunState};
use vmferry_link::{Fingerprint, usual_streams};

use crate::error::AgentError;
use crate::host::{Host, Markers, SeenDomain};
use crate::journal::Instance;
use crate::peers::{CarryOffer, Peer, trust};
use crate::source::decider::OURS;

/// Who moves the RAM, in the words of a plan and a report.
pub(super) const ENGINE: &str = "libvirt";
/// How long a QEMU may take to tell its version.
const VERSION: Duration = Duration::from_secs(5);
/// The first QEMU that sees all that a guest writes under TCG; see `vmferry_qemu::migration::loses_writes`.
const SEES_ALL_WRITES: u32 = 9;

/// What is going to be done.
pub(super) struct Plan {
    pub(super) view: PlanView,
    pub(super) offer: CarryOffer,
    pub(super) libvirt: Libvirt,
    pub(super) domain: Domain,
    pub(super) peer: Peer,
    pub(super) key: Fingerprint,
    /// The most that may be sent to this network, in bytes a second.
    pub(super) rate: Option<u64>,
    /// The disks that libvirt copies, by their targets.
    pub(super) disks: Vec<String>,
    /// Some lie where both hosts see them, which was found out, or its user says so.
    pub(super) vouched_for: bool,
    /// It is defined here, and will be there.
    pub(super) moves_definition: bool,
    /// It runs: it stands there when it stands here.
    pub(super) runs: bool,
    /// It may run while its RAM is copied.
    pub(super) live: bool,
    pub(super) vcpus: u32,
    /// Its QEMU.
    pub(super) instance: Instance,
    /// Of the disks that libvirt copies, so much is on this host's disk, in bytes.
    pub(super) disk_bytes: u64,
    /// Over so many connections its RAM goes, where it is not one: QEMU has post-copy go over one.
    pub(super) connections: Option<u8>,
    /// Why it cannot be turned to post-copy, if so.
    pub(super) post_copy_obstacle: Option<String>,
    /// Held until the disks were looked at.
    _markers: Markers,
}

/// Refuses everything that can be refused; nothing is touched.
pub(super) async fn plan(
    host: &Arc<Host>,
    name: &str,
    seen: &SeenDomain,
    id: Uuid,
    request: &MigrateRequest,
) -> Result<Plan, AgentError> {
    only_what_libvirt_can(name, request)?;
    let refuse = |reason: String, hint: Option<String>| AgentError::NotMigratable { name: name.into(), reason, hint };
    let libvirt = host.domains.at_hand().await?;
    if !libvirt.migrates_over_sockets() {
        let reason = format!("libvirt {} does not migrate over Unix sockets", libvirt.version);
        return Err(refuse(reason, Some("libvirt 6.8 or newer does".into())));
    }
    let gone = || AgentError::UnknownVm { name: name.into() };
    let domain = libvirt.find(seen.domain.uuid).await?.ok_or_else(gone)?;
    let state = libvirt.state(&domain).await?.ok_or_else(gone)?;
    let virsh = &domain.name;
    match state.run {
        RunState::Running | RunState::Paused(PausedWhy::Other) => {}
        RunState::Paused(PausedWhy::PostCopyFailed) => {
            let hint = format!("{}; vmferry does not carry that yet", resume_in_virsh(virsh));
            return Err(refuse("its post-copy to another host broke, and has to be resumed".into(), Some(hint)));
        }
        RunState::ShutOff => {
            let hint =
                format!("`virsh start {virsh}`, or move its definition by `virsh migrate --offline --persistent`");
            return Err(refuse("it does not run".into(), Some(hint)));
        }
        _ => {
            let hint = format!("`virsh domstate {virsh} --reason` tells more");
            return Err(refuse(format!("libvirt says that it is {}", state.in_words()), Some(hint)));
        }
    }
    if libvirt.job(&domain).await?.kind == JobKind::UnderWay {
        let hint = format!("`virsh domjobinfo {virsh}` tells which");
        return Err(refuse("libvirt has a job of it under way".into(), Some(hint)));
    }
    let description = Description::parse(&libvirt.xml(&domain).await?);
    let description = description.map_err(|error| refuse(error.to_string(), None))?;
    let mut notes = Vec::new();
    if let Some(manager) = description.manager {
        let reason = format!("{} manages it, which would not know that it has moved", manager.name);
        if !request.dry_run {
            let hint = format!(
                "have {} migrate it; if it is not its any more: `virsh metadata {virsh} --uri {} --remove`, with --config too",
                manager.name, manager.namespace
            );
            return Err(refuse(reason, Some(hint)));
        }
        notes.push(format!("vmferry does not move it: {reason}."));
    }
    if let Some(device) = &description.host_device {
        return Err(refuse(format!("{device} of this host is passed through to it"), None));
    }
    let files = Files::of(&description, request.disks_are_shared, name)?;
    let found = trust::find_peer(host, &request.to).await?;
    let met = found.hello().await?;
    let (peer, remote) = (found.pinned_to(&met), met.ip());
    // The disks may lie on storage that does not answer, which must not keep others waiting.
    let (written, read, signature) = (files.written_paths(), files.read.clone(), host.signature.clone());
    let put = tokio::task::spawn_blocking(move || Markers::beside(written, read, id, &signature));
    let markers = put.await.expect("putting markers does not panic");
    let info = libvirt.info(&domain).await?;
    let offer = CarryOffer {
        id,
        name: domain.name.clone(),
        uuid: domain.uuid,
        ram_bytes: info.max_memory,
        accelerator: description.accelerator.clone(),
        disks: markers.disks(),
        read_only: markers.read_only(),
    };
    let there = peer.check_domain(&offer).await?;
    let own = if request.disks_are_shared { &[][..] } else { &there.own_disks };
    let disks = files.to_copy(own, request, name, &there.host, &mut notes)?;
    let copied = files.written.iter().filter(|(target, ..)| disks.contains(target));
    let disk_bytes = copied.filter_map(|(_, path, _)| std::fs::metadata(path).ok()).map(|it| it.blocks() * 512).sum();
    let vouched_for = files.written.len() > disks.len();
    let version = qemu_version(virsh).await;
    let sees_all_writes = version.as_deref().and_then(major).is_some_and(|it| it >= SEES_ALL_WRITES);
    let live = description.accelerator != "tcg" || sees_all_writes;
    if !live {
        notes.push(
            "Its QEMU is older than 9.0, or does not tell, and loses writes of a guest that runs under TCG: libvirt pauses it \
             first, and it stands until all of its memory is there."
                .into(),
        );
    }
    let moves_definition = libvirt.is_persistent(&domain).await?;
    if moves_definition && libvirt.autostarts(&domain).await? {
        notes.push(format!(
            "It is started with this host, which libvirt does not take along: `virsh autostart {virsh}` there."
        ));
    }
    let post_copy_obstacle = match live {
        true => there.post_copy_obstacle.clone(),
        false => Some("it is paused first".into()),
    };
    if let Some(why) = post_copy_obstacle.as_ref().filter(|_| request.post_copy && live) {
        notes.push(format!("Post-copy cannot be used: {why}."));
    }
    // What QEMU needs besides is little beside it.
    let resident = if description.huge_pages { None } else { libvirt.resident(&domain).await? };
    let resident = resident.map_or(offer.ram_bytes, |it| it.min(offer.ram_bytes));
    let rate = host.config.network_of(remote).and_then(|network| network.rate).map(|rate| rate.0);
    let can_post_copy = post_copy_obstacle.is_none() && request.post_copy;
    let connections = (there.several_connections && live && !can_post_copy).then(usual_streams);
    let view = PlanView {
        vm: name.into(),
        to: there.host.clone(),
        engine: ENGINE.into(),
        policy: OURS.into(),
        ram_bytes: offer.ram_bytes,
        ram_used_bytes: resident,
        link_rate: 0,
        first_round_ms: 0,
        source_qemu: format!("{} under libvirt {}", version.unwrap_or_else(|| "some QEMU".into()), libvirt.version),
        destination_qemu: format!("libvirt {}", there.libvirt),
        machine: description.machine.unwrap_or_default(),
        accelerator: description.accelerator,
        capabilities: ["peer to peer"]
            .into_iter()
            .chain(can_post_copy.then_some("post-copy"))
            .map(str::to_owned)
            .chain(connections.map(|it| format!("{it} connections")))
            .collect(),
        protection: "TLS between the agents, which carry what the libvirts and the QEMUs say".into(),
        notes,
        prediction: None,
    };
    Ok(Plan {
        view,
        offer,
        libvirt,
        domain,
        peer,
        key: met.key,
        rate,
        disks,
        vouched_for,
        moves_definition,
        runs: state.run == RunState::Running,
        live,
        vcpus: info.vcpus,
        instance: seen.instance(),
        disk_bytes,
        connections,
        post_copy_obstacle,
        _markers: markers,
    })
}

/// How libvirt resumes a broken post-copy by itself.
fn resume_in_virsh(domain: &str) -> String {
    format!("`virsh migrate --live --p2p --postcopy --postcopy-resume {domain} qemu+ssh://HOST/system` here resumes it")
}

/// What only VMs of vmferry's own can have is refused by name.
fn only_what_libvirt_can(name: &str, request: &MigrateRequest) -> Result<(), AgentError> {
    let refuse = |what: &str, hint: &str| {
        let message = format!("{name} is libvirt's, which moves it by its own means: {what}");
        Err(AgentError::BadRequest { message, hint: Some(hint.into()) })
    };
    if request.engine.is_some() {
        return refuse("there is no engine to choose", "leave --engine out");
    }
    if request.policy.as_deref().is_some_and(|it| it != OURS) || request.script.is_some() {
        return refuse("only vmferry's policy steers it", "leave --policy out");
    }
    if !request.disks.is_empty() {
        return refuse(
            "disks have the same place there",
            "leave --disk out; `virsh migrate --xml` can say another place",
        );
    }
    Ok(())
}

/// What a domain writes to, and reads, as far as it is files.
struct Files {
    /// With the targets, and whether libvirt would copy it.
    written: Vec<(String, PathBuf, bool)>,
    read: Vec<PathBuf>,
}

impl Files {
    /// Of what nobody can tell whether both hosts have the same, its user has to say so.
    fn of(description: &Description, vouched_for: bool, name: &str) -> Result<Self, AgentError> {
        let mut files = Self { written: Vec::new(), read: Vec::new() };
        for disk in &description.disks {
            match &disk.kind {
                DiskKind::File(path) if disk.read_only => files.read.push(path.clone()),
                DiskKind::File(path) => files.written.push((disk.target.clone(), path.clone(), !disk.shareable)),
                DiskKind::Network => {}
                DiskKind::Block(_) | DiskKind::Other(_) if vouched_for => {}
                DiskKind::Block(path) => return Err(not_told(name, &disk.target, &path.display().to_string())),
                DiskKind::Other(kind) => return Err(not_told(name, &disk.target, &format!("of the type {kind:?}"))),
            }
        }
        Ok(files)
    }

    fn written_paths(&self) -> Vec<PathBuf> {
        self.written.iter().map(|(_, path, _)| path.clone()).collect()
    }

    /// The targets of those that only this host has.
    fn to_copy(
        &self,
        own: &[PathBuf],
        request: &MigrateRequest,
        name: &str,
        to: &str,
        notes: &mut Vec<String>,
    ) -> Result<Vec<String>, AgentError> {
        let mut copied = Vec::new();
        for (target, path, can_copy) in self.written.iter().filter(|(_, path, _)| own.contains(path)) {
            if !can_copy || !request.copy_disks {
                let why = if *can_copy { "it may not be copied" } else { "libvirt does not copy what guests share" };
                return Err(AgentError::Unsuitable {
                    host: to.into(),
                    name: name.into(),
                    code: Code::DiskNotShared,
                    reason: format!("{to} does not see the same {} ({target}), and {why}", path.display()),
                    hint: Some(
                        "put it on storage that both hosts see; --disks-are-shared if it is, and vmferry cannot tell"
                            .into(),
                    ),
                });
            }
            notes.push(format!("Its disk {target} ({}) is not shared: libvirt copies it.", path.display()));
            copied.push(target.clone());
        }
        Ok(copied)
    }
}

fn not_told(name: &str, target: &str, what: &str) -> AgentError {
    AgentError::NotMigratable {
        name: name.into(),
        reason: format!("its disk {target} is {what}, and nobody can tell whether both hosts have the same"),
        hint: Some("--disks-are-shared says that they do".into()),
    }
}

/// The version of the QEMU that runs it, as that says.
async fn qemu_version(domain: &str) -> Option<String> {
    let pid = SeenDomain::pid_of(domain)?;
    let said = async {
        let mut command = tokio::process::Command::new(Path::new("/proc").join(pid.to_string()).join("exe"));
        command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        command.output().await.ok()
    };
    let said = tokio::time::timeout(VERSION, said).await.ok().flatten();
    version_in(&String::from_utf8_lossy(&said?.stdout))
}

fn version_in(said: &str) -> Option<String> {
    said.split("version ").nth(1)?.split_whitespace().next().map(str::to_owned)
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_only_one_host_has_are_copied_or_refused_and_those_that_nobody_can_tell_of_are_refused_by_name() {
        let disk = |target: &str, source: &str, more: &str| {
            format!(
                "<disk type='{}'><source {source}/><target dev='{target}'/>{more}</disk>",
                match source {
                    it if it.starts_with("file") => "file",
                    it if it.starts_with("dev") => "block",
                    _ => "network",
                }
            )
        };
        let domain = |disks: &str| {
            let xml = format!(
                "<domain type='kvm'><name>web1</name><uuid>{}</uuid><devices>{disks}</devices></domain>",
                Uuid::nil()
            );
            Description::parse(&xml).unwrap()
        };
        let request = |copy_disks: bool| -> MigrateRequest {
            let asked = serde_json::json!({"to": "beta", "downtime_ms": 300, "max_time_ms": null, "bandwidth": null,
                "post_copy": true, "copy_disks": copy_disks});
            serde_json::from_value(asked).unwrap()
        };
        let three = [
            disk("vda", "file='/own/a'", ""),
            disk("vdb", "file='/shared/b'", ""),
            disk("sda", "file='/iso/c'", "<readonly/>"),
            disk("vdc", "name='pool/d'", ""),
        ];
        let files = Files::of(&domain(&three.concat()), false, "web1").unwrap();
        assert_eq!(files.read, [PathBuf::from("/iso/c")]);
        let own = [PathBuf::from("/own/a")];
        let mut notes = Vec::new();
        assert_eq!(files.to_copy(&own, &request(true), "web1", "beta", &mut notes).unwrap(), ["vda"]);
        assert!(notes[0].contains("libvirt copies it"), "{notes:?}");
        let refused = files.to_copy(&own, &request(false), "web1", "beta", &mut notes).unwrap_err().to_string();
        assert!(refused.contains("/own/a (vda), and it may not be copied"), "{refused}");
        let shared = Files::of(&domain(&disk("vda", "file='/own/a'", "<shareable/>")), false, "web1").unwrap();
        assert!(shared.to_copy(&own, &request(true), "web1", "beta", &mut notes).is_err());
        let block = domain(&disk("vdd", "dev='/dev/vg/e'", ""));
        let refused = Files::of(&block, false, "web1").err().unwrap().to_string();
        assert!(refused.contains("vdd is /dev/vg/e"), "{refused}");
        assert!(Files::of(&block, true, "web1").is_ok());
    }

    #[test]
    fn a_qemus_version_is_read_from_what_it_says() {
        let version = version_in("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\nCopyright");
        assert_eq!(version.as_deref(), Some("10.0.2"));
        assert_eq!((version.as_deref().and_then(major), version_in("something else")), (Some(10), None));
    }
}
