//! Whether this host can take a VM: everything that can be refused is refused here, before anything is touched.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use vmferry_api::Code;
use vmferry_qemu::{Accel, CommandLine, FileKind, Inventory, QemuInfo, chosen_accelerator};

use crate::error::AgentError;
use crate::host::{Contents, Short, marker_beside, obstacle};
use crate::peers::Offer;

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
}

/// Refuses what this host cannot take, naming what is missing. The answer is what cannot be judged yet: the files of which
/// it is to be known what is in them.
pub(super) fn judge(offer: &Offer, command: &CommandLine, host: &Host<'_>) -> Result<Vec<PathBuf>, AgentError> {
    machine(offer, host)
        .and_then(|()| accelerator(offer, command, host))
        .and_then(|()| cpu(offer, command, host))
        .and_then(|()| files(offer, command))
        .and_then(|()| networks(offer))
        .and_then(|()| disks(offer, command))
        .and_then(|()| read_only(offer, host.contents))
        .map_err(|refusal| AgentError::Unsuitable {
            host: host.name.into(),
            name: offer.spec.name.clone(),
            code: refusal.code,
            reason: refusal.reason,
            hint: refusal.hint,
        })
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
    if host.qemu.machines.iter().any(known) {
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
    if host.accel.is_kvm() && !lacks.is_empty() {
        return refuse(
            Code::NoCpu,
            format!("its processor lacks features of the CPU model {model} that the guest has: {}", lacks.join(", ")),
            "start the VM with a CPU model that all hosts have",
        );
    }
    Ok(())
}

fn files(offer: &Offer, command: &CommandLine) -> Result<(), Refusal> {
    for file in command.files() {
        let path = offer.spec.cwd.join(&file.path);
        if matches!(file.kind, FileKind::Ram) {
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

fn disks(offer: &Offer, command: &CommandLine) -> Result<(), Refusal> {
    if offer.disks_are_shared {
        return Ok(());
    }
    if let Some(disk) = command.remote_disks().into_iter().find(|disk| is_of_this_host(disk)) {
        return refuse(
            Code::DiskNotShared,
            format!("the disk {disk} is served by the source itself"),
            "serve it under an address that means the same on both hosts; if it does, say --disks-are-shared",
        );
    }
    for disk in &offer.disks {
        if is_block_device(disk) {
            return refuse(
                Code::DiskNotShared,
                format!("nothing tells that {} is the same disk on both hosts", disk.display()),
                "if you know that it is, say --disks-are-shared",
            );
        }
        if !marker_beside(disk, offer.id).is_some_and(|marker| marker.exists()) {
            return refuse(
                Code::DiskNotShared,
                format!("the disk {} is not the same file on both hosts", disk.display()),
                "put it on storage that both hosts mount; if it is there and the source may not write beside it, \
                 say --disks-are-shared",
            );
        }
    }
    Ok(())
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
