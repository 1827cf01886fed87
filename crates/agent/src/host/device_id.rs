//! Which block device it is, whatever host sees it: a disk that both see must not be copied onto itself under its guest.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Where the kernel tells of devices by their numbers.
const SYSFS: &str = "/sys/dev/block";
/// What of a device is told to all hosts alike: of a logical volume or a multipath, of `NVMe`, and of SCSI.
const TOLD: [&str; 3] = ["dm/uuid", "wwid", "device/wwid"];

/// What tells this block device from every other; none of what is no device, and where nothing tells.
pub(crate) fn device_id(path: &Path) -> Option<String> {
    let number = fs::metadata(path).ok().filter(|it| it.file_type().is_block_device())?.rdev();
    id_of(&Path::new(SYSFS).join(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number))))
}

fn id_of(device: &Path) -> Option<String> {
    let told = |file: &str| fs::read_to_string(device.join(file)).ok().map(|it| it.trim().to_owned());
    if let Some(number) = told("partition") {
        // The name is a link to where the disk's own folder is above.
        let disk = fs::canonicalize(device).ok()?.parent().and_then(id_of)?;
        return Some(format!("{disk} partition {number}"));
    }
    TOLD.iter().find_map(|file| told(file).filter(|it| !it.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_what_all_hosts_are_told_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let make = |device: &str, file: &str, text: &str| {
            let path = dir.path().join(device).join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        make("dm", "dm/uuid", "LVM-abc\n");
        make("sda", "device/wwid", "naa.5000\n");
        make("sda/sda1", "partition", "1\n");
        make("dm-no-uuid", "dm/uuid", "\n");
        std::os::unix::fs::symlink(dir.path().join("sda/sda1"), dir.path().join("8:1")).unwrap();
        for (device, expected) in [
            ("dm", Some("LVM-abc")),
            ("sda", Some("naa.5000")),
            ("8:1", Some("naa.5000 partition 1")),
            ("dm-no-uuid", None),
            ("absent", None),
        ] {
            assert_eq!(id_of(&dir.path().join(device)).as_deref(), expected, "{device}");
        }
        assert_eq!(device_id(dir.path()), None);
    }
}
