//! The file that a guest's RAM is in, which QEMU and the agent share.
//!
//! It has huge pages where QEMU's own RAM would have them: QEMU asks for them (`madvise`), and only
//! `transparent_hugepage/enabled` has a say in that. Shared memory has a setting besides, `shmem_enabled`, which is `never`
//! unless somebody has changed it; but a tmpfs may be mounted with one of its own (`huge=`,
//! Documentation/admin-guide/mm/transhuge.rst). So the file lies in a tmpfs that is mounted for it and attached to no
//! folder: it goes when the last descriptor and mapping of the file do. With huge pages RAM arrives at half the cost.
//!
//! But for a host that is a virtual machine and gives its free memory back to its own host (free page reporting, virtio's
//! specification, 5.5.6.7): what it gives back is huge pages, and having one again costs more than all that they save.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

/// Tells whether QEMU's own RAM has huge pages.
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// The features that this host's balloons have agreed on with their host are in a file of this folder's folders.
const BALLOONS: &str = "/sys/bus/virtio/drivers/virtio_balloon";

/// Which of them is free page reporting.
const REPORTING: usize = 5;

/// What the file is called among QEMU's mappings.
const NAME: &str = "vmferry-ram";

/// An empty file in memory, for [`LaunchSettings::shared_ram`](super::LaunchSettings) and [`launch`](super::launch).
///
/// Without the rights to mount anything, on a kernel without huge pages, or where free memory is given back, it has small
/// pages.
pub fn guest_ram() -> io::Result<OwnedFd> {
    let wanted = wants_huge_pages(&std::fs::read_to_string(ENABLED).unwrap_or_default());
    if wanted && !gives_free_memory_back(Path::new(BALLOONS)) {
        match in_huge_pages() {
            Ok(file) => return Ok(file),
            Err(error) => tracing::debug!(%error, "no tmpfs with huge pages for a guest's RAM"),
        }
    }
    Ok(rustix::fs::memfd_create(NAME, rustix::fs::MemfdFlags::CLOEXEC)?)
}

/// By the kernel's words: its choices, with brackets around the one that holds.
fn wants_huge_pages(enabled: &str) -> bool {
    enabled.contains("[always]") || enabled.contains("[madvise]")
}

/// `balloons` is [`BALLOONS`], which is absent where there is none.
fn gives_free_memory_back(balloons: &Path) -> bool {
    let Ok(balloons) = balloons.read_dir() else { return false };
    let features = balloons.flatten().filter_map(|balloon| std::fs::read(balloon.path().join("features")).ok());
    // A digit for each, the first one first.
    features.into_iter().any(|features| features.get(REPORTING) == Some(&b'1'))
}

fn in_huge_pages() -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Where a page fits into the file; in whichever size, as guests have what RAM they have.
    fsconfig_set_string(&tmpfs, "huge", "within_size")?;
    // No limit, as for other memory. Half of the host's is the default.
    fsconfig_set_string(&tmpfs, "size", "0")?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(openat(&mount, NAME, flags, Mode::RUSR | Mode::WUSR)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn huge_pages_are_wanted_where_qemu_would_get_them() {
        assert!(wants_huge_pages("[always] madvise never\n"));
        assert!(wants_huge_pages("always [madvise] never\n"));
        assert!(!wants_huge_pages("always madvise [never]\n"));
        assert!(!wants_huge_pages(""), "a kernel without them");
    }

    #[test]
    fn a_host_that_gives_its_free_memory_back_is_known_by_its_balloon() {
        let driver = tempfile::tempdir().unwrap();
        assert!(!gives_free_memory_back(&driver.path().join("no such driver")));
        std::fs::write(driver.path().join("uevent"), "").unwrap();
        assert!(!gives_free_memory_back(driver.path()), "no device");
        for (device, features, gives) in
            [("virtio3", "01100\n", false), ("virtio4", "0110100\n", false), ("virtio5", "0110010\n", true)]
        {
            std::fs::create_dir(driver.path().join(device)).unwrap();
            std::fs::write(driver.path().join(device).join("features"), features).unwrap();
            assert_eq!(gives_free_memory_back(driver.path()), gives, "{device}");
        }
    }

    #[test]
    fn a_page_of_a_guests_ram_is_a_huge_one_where_that_may_be_and_is_given_back_alone() {
        let Ok(file) = in_huge_pages() else {
            eprintln!("not run: nothing may be mounted here");
            return;
        };
        let file = File::from(file);
        // More than half of the memory of most hosts, which a tmpfs is held to unless it is told otherwise.
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"x", 1 << 39).unwrap();
        let bytes = file.metadata().unwrap().blocks() * 512;
        assert!(bytes == 2 << 20 || std::fs::read_to_string(SHMEM).unwrap().contains("[deny]"), "{bytes}");
        let how = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, how, 1 << 39, 4096).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, bytes - 4096);
    }

    /// Where huge pages of shared memory can be forbidden altogether.
    const SHMEM: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
}
