//! Whether this host could take a VM.

use std::path::PathBuf;
use std::sync::Arc;

use vmferry_qemu::{Accel, CommandLine, QemuInfo};

use super::incoming::Incoming;
use super::parts::Parts;
use super::suitability::{self, Judged};
use crate::error::AgentError;
use crate::host::{DiskNotes, Host, Images, Need, check_name};
use crate::measuring::boot_files;
use crate::peers::trust::Caller;
use crate::peers::{CheckReply, Offer};

/// Whether this host could take the VM; touches nothing.
pub(crate) async fn check(here: &Incoming, mut offer: Offer, caller: &Caller) -> Result<CheckReply, AgentError> {
    boot_files::settle(&here.host, &mut offer.spec);
    let Suitable { info, unproven, own_disks, devices, .. } = suitable(here, &offer).await?;
    Ok(CheckReply {
        host: here.host.config.name.clone(),
        qemu_version: info.version,
        capabilities: info.features.capabilities().clone(),
        security: here.host.config.security_of(caller.remote),
        tls: info.tls,
        ciphers: here.host.ciphers_for(caller.remote),
        external_obstacle: here.host.external_obstacle(),
        unproven,
        own_disks,
        devices,
    })
}

/// What was found out about a VM that this host can take.
pub(super) struct Suitable {
    pub(super) command: CommandLine,
    pub(super) accel: Accel,
    pub(super) info: QemuInfo,
    pub(super) need: Need,
    /// See [`CheckReply::unproven`].
    pub(super) unproven: Vec<PathBuf>,
    /// See [`CheckReply::own_disks`].
    pub(super) own_disks: Vec<PathBuf>,
    /// See [`CheckReply::devices`].
    pub(super) devices: Vec<PathBuf>,
}

pub(super) async fn suitable(here: &Incoming, offer: &Offer) -> Result<Suitable, AgentError> {
    let name = &offer.spec.name;
    check_name(name)?;
    if here.host.has_vm(name) {
        return Err(AgentError::VmExists { name: name.clone(), host: here.host.config.name.clone() });
    }
    suits(&here.host, offer, Vec::new()).await
}

/// Whether this host could start a VM that does not run, of whose disks these are here already: of which files it is to
/// be known what is in them, and which disks are not here.
pub(crate) async fn could_start(
    host: &Arc<Host>,
    offer: &Offer,
    copied: Vec<PathBuf>,
) -> Result<(Vec<PathBuf>, Vec<PathBuf>), AgentError> {
    let Suitable { unproven, own_disks, .. } = suits(host, offer, copied).await?;
    Ok((unproven, own_disks))
}

async fn suits(host: &Arc<Host>, offer: &Offer, copied: Vec<PathBuf>) -> Result<Suitable, AgentError> {
    let command = CommandLine::parse(&offer.spec.argv)?;
    if !is_qemu(command.binary()) {
        let message = format!("{:?} is no QEMU: nothing else is started for another host", command.binary());
        return Err(AgentError::BadRequest { message, hint: None });
    }
    let binary = host.qemus.find_qemu(&command)?;
    let accel = match offer.accelerator.as_str() {
        "kvm" => host.qemus.accelerator(&binary).await,
        _ if offer.stopped => host.qemus.accelerator(&binary).await,
        _ => Accel::Tcg { why: "the guest runs under TCG at the source".into() },
    };
    let info = host.qemus.qemu_info(&binary, &accel).await?;
    let (offer, host) = (offer.clone(), Arc::clone(host));
    // Files may lie on storage that does not answer, which must not keep others waiting.
    let judged = tokio::task::spawn_blocking(move || {
        let name = &host.config.name;
        let this = suitability::Host {
            name,
            qemu: &info,
            accel: &accel,
            contents: &host.contents,
            images: Images::new(name, &host.config.image_folders),
            left: DiskNotes::left(&host.config.state_dir),
            parts: Parts::new(&host, &offer.spec.name),
            copied,
        };
        let Judged { unproven, own_disks, devices } = suitability::judge(&offer, &command, &this)?;
        let need = Need { ram: offer.ram_bytes, huge_page: suitability::huge_page(&command, &offer.spec.cwd) };
        host.admission
            .look(need, host.config.reserved_memory.as_u64())
            .map_err(|short| suitability::no_memory(name, &offer.spec.name, short))?;
        Ok(Suitable { command, accel, info, need, unproven, own_disks, devices })
    });
    judged.await.expect("judging does not panic")
}

/// By its name, as distributions call it.
fn is_qemu(binary: &str) -> bool {
    let name = binary.rsplit('/').next().unwrap_or_default();
    name.starts_with("qemu-") || name == "kvm"
}
