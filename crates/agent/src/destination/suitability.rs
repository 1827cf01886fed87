//! Whether this host can take a VM: everything that can be refused is refused here, before anything is touched.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use vmferry_api::{Code, in_one_line};
use vmferry_nbd::backend::{Access, Backend, File};
use vmferry_qemu::{Accel, CommandLine, FileKind, Inventory, QemuInfo, chosen_accelerator};

use super::parts::Parts;
use crate::error::{AgentError, ImageError};
use crate::host::{Contents, DiskNotes, Images, Short, device_id, marker_beside, obstacle};
use crate::peers::{Offer, OwnImage};

/// A refusal, before it knows the host's and the VM's name.
struct Refusal {
    code: Code,
    reason: String,
    hint: Option<String>,
}

fn refuse<T>(code: Code, reason: impl Into<String>, hint: &str) -> Result<T, Refusal> {
    Err(Refusal { code, reason: reason.into(), hint: (!hint.is_empty()).then(|| hint.into()) })
}

/// This host, as far as it matters here.
pub(super) struct Host<'a> {
    pub name: &'a str,
    pub qemu: &'a QemuInfo,
    pub accel: &'a Accel,
    pub contents: &'a Contents,
    pub images: Images<'a>,
    pub left: DiskNotes,
    pub parts: Parts<'a>,
    /// Those of the VM's disks that are here since an earlier try to bring it.
    pub copied: Vec<PathBuf>,
}

/// What was found out, where nothing is to be refused.
pub(super) struct Judged {
    /// What cannot be judged yet: the files of which it is to be known what is in them.
    pub unproven: Vec<PathBuf>,
    /// The disks that are not here, and can be made here.
    pub own_disks: Vec<PathBuf>,
    /// Those of them that are block devices here.
    pub devices: Vec<PathBuf>,
}

/// Refuses what this host cannot take, naming what is missing.
pub(super) fn judge(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<Judged, AgentError> {
    find_out(offer, command, host).map_err(|refusal| AgentError::Unsuitable {
        host: host.name.into(),
        name: offer.spec.name.clone(),
        code: refusal.code,
        reason: refusal.reason,
        hint: refusal.hint,
    })
}

fn find_out(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<Judged, Refusal> {
    machine(offer, host)?;
    accelerator(offer, command, host)?;
    cpu(offer, command, host)?;
    let own_disks = disks(offer, command, host)?;
    files(offer, command, &own_disks)?;
    networks(offer)?;
    let unproven = read_only(offer, host.contents)?;
    let is_device = |disk: &&PathBuf| is_block_device(disk);
    let devices = own_disks.iter().filter(is_device).cloned().collect();
    Ok(Judged { unproven, own_disks, devices })
}

/// This host has too little memory for the VM.
pub(super) fn no_memory(host: &str, name: &str, short: Short) -> AgentError {
    let mib = |bytes: u64| bytes >> 20;
    let (kind, hint) = match short.huge_page {
        None => (String::new(), "free memory there, or lower reserved_memory in that agent's configuration"),
        Some(size) => (format!(" in pages of {} KiB", size >> 10), "set more huge pages aside there"),
    };
    AgentError::Unsuitable {
        host: host.into(),
        name: name.into(),
        code: Code::NoMemory,
        reason: format!("it needs {} MiB{kind} and only {} MiB may be used there", mib(short.needed), mib(short.free)),
        hint: Some(hint.into()),
    }
}

/// The size of the huge pages that the VM's RAM is made of, in bytes; none when it is ordinary memory.
pub(super) fn huge_page(command: &CommandLine, cwd: &Path) -> Option<u64> {
    const HUGETLBFS: u64 = 0x9584_58f6;
    let from_file = command.files().into_iter().filter(|file| matches!(file.kind, FileKind::Ram)).find_map(|file| {
        let found = rustix::fs::statfs(cwd.join(file.path)).ok()?;
        (found.f_type as u64 == HUGETLBFS).then_some(found.f_bsize as u64)
    });
    from_file.or_else(|| command.huge_page())
}

fn machine(offer: &Offer, host: &Host<'_>) -> Result<(), Refusal> {
    let known = |machine: &vmferry_qemu::Machine| {
        machine.name == offer.machine || machine.alias.as_deref() == Some(offer.machine.as_str())
    };
    // Without one it is the binary's usual one.
    if offer.machine.is_empty() || host.qemu.machines.iter().any(known) {
        return Ok(());
    }
    refuse(
        Code::NoMachine,
        format!("its QEMU {} lacks the machine type {}", host.qemu.version, offer.machine),
        "install a QEMU there that is at least as new as the one the VM was started with",
    )
}

fn accelerator(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<(), Refusal> {
    match (offer.accelerator.as_str(), host.accel) {
        ("kvm", Accel::Tcg { why }) => refuse(
            Code::NoAccelerator,
            format!("the guest runs under KVM, which does not work there ({why})"),
            "a running guest cannot change its accelerator",
        ),
        ("kvm", Accel::Kvm(_)) if chosen_accelerator(command, host.accel) != "kvm" => refuse(
            Code::NoAccelerator,
            "the guest runs under KVM, which emulates guests' kernels there, and its command line does not ask for that",
            "a running guest cannot change its accelerator",
        ),
        _ => Ok(()),
    }
}

fn cpu(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<(), Refusal> {
    let Some(model) = command.cpu_model() else { return Ok(()) };
    if offer.stopped && model == "host" {
        return Ok(());
    }
    let Some(known) = host.qemu.cpus.iter().find(|cpu| cpu.name == model) else {
        return refuse(
            Code::NoCpu,
            format!("its QEMU {} lacks the CPU model {model}", host.qemu.version),
            "use a QEMU there that is at least as new, or a CPU model that both have",
        );
    };
    // What the guest does not have either, as it is taken away from the model or was lacking at the source, it does not
    // miss.
    let may_have = |feature: &&String| !Inventory::lacks_for_sure(&offer.cpu_features, feature);
    let lacks: Vec<&str> = known.unavailable.iter().filter(may_have).map(String::as_str).collect();
    if host.accel.is_kvm() && !offer.stopped && !lacks.is_empty() {
        return refuse(
            Code::NoCpu,
            format!("its processor lacks features of the CPU model {model} that the guest has: {}", lacks.join(", ")),
            "start the VM with a CPU model that all hosts have",
        );
    }
    Ok(())
}

fn files(offer: &Offer, command: &CommandLine, own_disks: &[PathBuf]) -> Result<(), Refusal> {
    for file in command.files() {
        let path = offer.spec.cwd.join(&file.path);
        if matches!(file.kind, FileKind::Ram) || own_disks.contains(&path) {
            continue;
        }
        if let Err(error) = std::fs::metadata(&path) {
            return refuse(
                Code::NoFile,
                format!("{} ({}) cannot be used there: {error}", path.display(), file.option),
                "put the file there, at the same path",
            );
        }
    }
    Ok(())
}

fn networks(offer: &Offer) -> Result<(), Refusal> {
    match obstacle(&offer.networks) {
        None => Ok(()),
        Some(why) => refuse(Code::NoNetwork, why, "make the same network there, under the same name"),
    }
}

/// Each disk must be the same file on both hosts, or one that can move with the guest. The answer is which those are.
fn disks(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<Vec<PathBuf>, Refusal> {
    let mut own = Vec::new();
    let is_local = |disk: &String| is_of_this_host(disk) && !offer.disks_are_shared;
    if let Some(disk) = command.remote_disks().into_iter().find(is_local) {
        return refuse(
            Code::DiskNotShared,
            format!("the disk {disk} is served by the source itself"),
            "serve it under an address that means the same on both hosts; if it does, say --disks-are-shared",
        );
    }
    for disk in &offer.disks {
        if let Some(image) = offer.image(disk).filter(|image| image.placed) {
            match is_block_device(disk) {
                true => takes(image, offer.stopped, host)?,
                false => can_be_made(image, &offer.spec.name, host)?,
            }
            own.push(disk.clone());
            continue;
        }
        if offer.disks_are_shared {
            continue;
        }
        if is_block_device(disk) {
            return refuse(
                Code::DiskNotShared,
                format!("nothing tells that {} is the same disk on both hosts", disk.display()),
                "if you know that it is, say --disks-are-shared; to have it copied, say where to: --disk NAME=PATH",
            );
        }
        if marker_beside(disk, offer.id).is_some_and(|marker| marker.exists()) {
            continue;
        }
        if let Some(image) = offer.image(disk) {
            can_be_made(image, &offer.spec.name, host)?;
            own.push(disk.clone());
        } else {
            return refuse(
                Code::DiskNotShared,
                format!("the disk {} is not the same file on both hosts", disk.display()),
                "put it on storage that both hosts mount; if it is there and the source may not write beside it, \
                 say --disks-are-shared",
            );
        }
    }
    Ok(own)
}

fn can_be_made(image: &OwnImage, vm: &str, host: &Host<'_>) -> Result<(), Refusal> {
    let refused = |error: &ImageError| Refusal {
        code: Code::DiskNotShared,
        reason: format!("its disk cannot be made there: {}", in_one_line(error)),
        hint: error.hint().map(str::to_owned),
    };
    if !matches!(image.format.as_str(), "raw" | "qcow2") {
        return refuse(
            Code::DiskNotShared,
            format!("{} is not shared, and disks of the format {} cannot move yet", image.path.display(), image.format),
            "put it on storage that both hosts mount",
        );
    }
    let is_ours = || host.copied.contains(&image.path) || host.left.find(vm, &image.path).is_some();
    let room = match host.images.may_make(&image.path) {
        // It makes room for itself.
        Err(ImageError::Exists { .. }) if is_ours() => return Ok(()),
        // Some of it is there.
        Ok(_) if host.copied.contains(&image.path) => return Ok(()),
        // What an earlier try has left makes room.
        room => room.map_err(|error| refused(&error))? + host.parts.room(&image.path),
    };
    if room < image.allocated {
        return refuse(
            Code::DiskNotShared,
            format!(
                "there is no room for {}: {} MiB of it are in use, and {} MiB are free there",
                image.path.display(),
                image.allocated >> 20,
                room >> 20
            ),
            "make room there",
        );
    }
    Ok(())
}

/// Whether a block device can become this disk: what is on it is lost.
fn takes(image: &OwnImage, stopped: bool, host: &Host<'_>) -> Result<(), Refusal> {
    let path = image.path.display();
    if stopped {
        return refuse(
            Code::DiskNotShared,
            format!("{path} is a block device there, and a VM that does not run is copied to files only"),
            "start it, and migrate it",
        );
    }
    if image.format != "raw" {
        return refuse(
            Code::DiskNotShared,
            format!("{path} is a block device there, and the disk is {}: only raw disks are on devices", image.format),
            "name a file, or convert it first: `vmferry disk move --format raw`",
        );
    }
    if image.device_id.is_some() && device_id(&image.path) == image.device_id {
        return refuse(
            Code::DiskNotShared,
            format!("{path} is the same device on both hosts, and would be copied onto itself"),
            "name no place for it, and say --disks-are-shared",
        );
    }
    let refused = |reason: String, hint: Option<&str>| Refusal {
        code: Code::DiskNotShared,
        reason: format!("its disk cannot be on {path} there: {reason}"),
        hint: hint.map(str::to_owned),
    };
    let device = host.images.open_device(&image.path).map_err(|error| refused(in_one_line(&error), error.hint()))?;
    let device = File::over(device, &image.path, Access::Write).map_err(|error| refused(in_one_line(&error), None))?;
    match device.size() {
        size if size == image.size => Ok(()),
        size => Err(refused(
            format!("it has {size} bytes, and the guest's disk {}", image.size),
            Some("make it exactly as large: a guest's disk does not change its size while it runs"),
        )),
    }
}

/// What the guest only reads must be the same file, or have the same in it. The answer is of which that is to be said.
fn read_only(offer: &Offer, contents: &Contents) -> Result<Vec<PathBuf>, Refusal> {
    let mut unproven = Vec::new();
    if offer.disks_are_shared {
        return Ok(unproven);
    }
    for file in &offer.read_only {
        if marker_beside(file, offer.id).is_some_and(|marker| marker.exists()) {
            continue;
        }
        let Some(theirs) = offer.contents.get(file) else {
            unproven.push(file.clone());
            continue;
        };
        let path = file.display();
        match contents.of(file) {
            Ok(ours) if ours == *theirs => {}
            Ok(_) => {
                return refuse(
                    Code::DiskNotShared,
                    format!("{path} is another file there: what is in it differs"),
                    "put the same file there; if the difference does not matter to the guest, say --disks-are-shared",
                );
            }
            Err(error) => {
                return refuse(
                    Code::DiskNotShared,
                    format!("nothing tells that {path} is the same on both hosts: there it cannot be read ({error})"),
                    "if you know that it is, say --disks-are-shared",
                );
            }
        }
    }
    Ok(unproven)
}

/// The address of a disk server means another one on every host.
fn is_of_this_host(disk: &str) -> bool {
    ["localhost", "127.", "[::1]", "unix:", "+unix", "path="].iter().any(|own| disk.contains(own))
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|it| it.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_server_of_this_host_is_told_from_one_for_all() {
        for own in ["nbd://localhost/disk", "nbd:127.0.0.1:10809", "nbd:unix:/run/nbd.sock", "nbd+unix:///d?socket=/s"]
        {
            assert!(is_of_this_host(own), "{own}");
        }
        for shared in ["nbd://storage.example.org/disk", "iscsi://192.0.2.9/iqn/0", "rbd:pool/web1"] {
            assert!(!is_of_this_host(shared), "{shared}");
        }
    }
}
