//! Disks that guests have left here when they moved elsewhere with a copy of them. They stay, as nobody asked for them to
//! go; but when the guest comes back they may, if nobody has touched them since.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One of them, as it was when its guest left.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Left {
    vm: String,
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Left {
    fn now(vm: &str, path: &Path) -> io::Result<Self> {
        let it = fs::symlink_metadata(path)?;
        let modified = (it.mtime(), it.mtime_nsec());
        Ok(Self { vm: vm.into(), path: path.into(), device: it.dev(), inode: it.ino(), size: it.len(), modified })
    }
}

/// See the module's text.
#[derive(Clone)]
pub(crate) struct LeftDisks {
    notes: PathBuf,
}

impl LeftDisks {
    /// With notes in this state folder.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { notes: state_dir.join("disks-left") }
    }

    fn note_of(&self, path: &Path) -> PathBuf {
        let name = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
        self.notes.join(format!("{}.json", &name[..32]))
    }

    /// This guest has left its disk here.
    pub(crate) fn note(&self, vm: &str, path: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.notes)?;
        fs::write(self.note_of(path), serde_json::to_vec(&Left::now(vm, path)?).expect("it is plain data"))
    }

    /// What is there was left by this guest and is as it was then; the answer is which file that is, by device and inode.
    pub(crate) fn was_left(&self, vm: &str, path: &Path) -> Option<(u64, u64)> {
        let noted: Left = serde_json::from_slice(&fs::read(self.note_of(path)).ok()?).ok()?;
        let now = Left::now(vm, path).ok()?;
        (noted == now).then_some((now.device, now.inode))
    }

    /// It is not there any more.
    pub(crate) fn forget(&self, path: &Path) {
        let _ = fs::remove_file(self.note_of(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_was_left_by_its_guest_while_nobody_has_touched_it() {
        let dir = tempfile::tempdir().unwrap();
        let (left, disk) = (LeftDisks::new(&dir.path().join("state")), dir.path().join("disk.raw"));
        fs::write(&disk, "guest").unwrap();
        assert_eq!(left.was_left("web1", &disk), None);
        left.note("web1", &disk).unwrap();
        assert!(left.was_left("web1", &disk).is_some());
        assert_eq!(left.was_left("web2", &disk), None, "another guest's");
        let before = fs::metadata(&disk).unwrap().modified().unwrap();
        fs::write(&disk, "other").unwrap();
        let later = before + std::time::Duration::from_millis(1);
        fs::File::options().write(true).open(&disk).unwrap().set_modified(later).unwrap();
        assert_eq!(left.was_left("web1", &disk), None, "it was written since");
        left.note("web1", &disk).unwrap();
        fs::remove_file(&disk).unwrap();
        assert_eq!(left.was_left("web1", &disk), None, "it is gone");
        left.forget(&disk);
        fs::write(&disk, "guest").unwrap();
        assert_eq!(left.was_left("web1", &disk), None);
    }
}
