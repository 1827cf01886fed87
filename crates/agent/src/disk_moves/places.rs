//! Where the disks of this host's VMs are, by their words: no disk moves to where one is.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use vmferry_libvirt::DiskKind;
use vmferry_qemu::{CommandLine, is_same_place};

use crate::error::AgentError;
use crate::host::Host;

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) vm: String,
    pub(super) disk: String,
    /// In QEMU's words; a path is absolute.
    pub(super) at: String,
}

/// Of all disks whose words are plain, also of VMs that do not run, and of libvirt's domains.
pub(super) fn used(host: &Host) -> Vec<Used> {
    let running = host.vms().into_iter().map(|vm| (vm.spec.name.clone(), vm.next_argv(), vm.spec.cwd.clone()));
    let idle = host.idle_vms().into_iter().map(|idle| {
        let argv = idle.record.next_argv().to_vec();
        (idle.record.spec.name, argv, idle.record.spec.cwd)
    });
    let disks = running.chain(idle).flat_map(|(vm, argv, cwd)| {
        let images = CommandLine::parse(&argv).map(|it| it.images()).unwrap_or_default();
        images.into_iter().map(move |it| Used { vm: vm.clone(), disk: it.name, at: absolute(&it.file, &cwd) })
    });
    disks.chain(of_libvirt(host)).collect()
}

/// Of libvirt's domains, as it tells.
fn of_libvirt(host: &Host) -> Vec<Used> {
    let domains = host.domains.all().into_iter().flat_map(|seen| {
        let vm = seen.domain.name.clone();
        let disks = seen.description.map(|it| it.disks).unwrap_or_default();
        disks.into_iter().filter_map(move |it| match it.kind {
            DiskKind::File(path) | DiskKind::Block(path) => {
                Some(Used { vm: vm.clone(), disk: it.target, at: path.display().to_string() })
            }
            DiskKind::Network | DiskKind::Other(_) => None,
        })
    });
    domains.collect()
}

/// What QEMU calls a file may be relative to where it was started.
pub(super) fn absolute(file: &str, cwd: &Path) -> String {
    let place = file.parse::<vmferry_qemu::DiskPlace>();
    let path = place.as_ref().ok().and_then(|it| it.path());
    path.map_or_else(|| file.to_owned(), |path| cwd.join(path).display().to_string())
}

/// Refuses a place where a disk is already.
pub(super) fn is_free(to: &str, used: &[Used]) -> Result<(), AgentError> {
    let Some(there) = used.iter().find(|it| is_same_place(&it.at, to) || is_same_device(&it.at, to)) else {
        return Ok(());
    };
    Err(AgentError::BadRequest {
        message: format!("{} of {} is at {to} already", there.disk, there.vm),
        hint: Some("name another place".into()),
    })
}

/// Two paths of one block device.
fn is_same_device(one: &str, other: &str) -> bool {
    let device = |path: &str| fs::metadata(path).ok().filter(|it| it.file_type().is_block_device()).map(|it| it.rdev());
    device(one).is_some_and(|known| device(other) == Some(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_where_a_disk_is_in_whatever_words_is_refused_by_the_disks_name() {
        let at = |at: &str| [Used { vm: "web1".into(), disk: "vda".into(), at: at.into() }];
        for (to, there) in [
            ("rbd:p/i", r#"json:{"driver":"raw","file":{"driver":"rbd","pool":"p","image":"i"}}"#),
            ("nbd://h/e", "nbd://h:10809/e"),
            ("/srv/a", "/srv/a"),
        ] {
            let refused = is_free(to, &at(there)).unwrap_err().to_string();
            assert_eq!(refused, format!("vda of web1 is at {to} already"));
        }
        is_free("rbd:p/j", &at("rbd:p/i")).unwrap();
        // What is no device is told apart by its path alone.
        is_free("/dev/null", &at("/dev/zero")).unwrap();
        assert_eq!(absolute("a.raw", Path::new("/srv")), "/srv/a.raw");
        assert_eq!(absolute("nbd://h/e", Path::new("/srv")), "nbd://h/e");
    }
}
