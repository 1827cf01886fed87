//! Images that lie here and that no VM has: what guests have left when they moved elsewhere with a copy of it, and what had
//! arrived of a disk when its migration failed. When the guest comes, or comes back, it need not be sent again.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// One of them, as it was when it was noted.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    vm: String,
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Noted {
    fn of(vm: &str, path: &Path, it: &Metadata) -> Self {
        let modified = (it.mtime(), it.mtime_nsec());
        Self { vm: vm.into(), path: path.into(), device: it.dev(), inode: it.ino(), size: it.len(), modified }
    }
}

/// Those of one kind.
#[derive(Clone)]
pub(crate) struct DiskNotes {
    notes: PathBuf,
}

impl DiskNotes {
    /// What guests have left: it stays, as nobody asked for it to go.
    pub(crate) fn left(state_dir: &Path) -> Self {
        Self { notes: state_dir.join("disks-left") }
    }

    /// What had arrived and is this agent's to remove.
    pub(crate) fn arrived(state_dir: &Path) -> Self {
        Self { notes: state_dir.join("disks-arrived") }
    }

    fn note_of(&self, path: &Path) -> PathBuf {
        let name = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
        self.notes.join(format!("{}.json", &name[..32]))
    }

    /// What is there is this guest's.
    pub(crate) fn note(&self, vm: &str, path: &Path) -> io::Result<()> {
        self.note_before(vm, path, &fs::symlink_metadata(path)?)
    }

    /// This file is this guest's, and is about to be there.
    pub(crate) fn note_before(&self, vm: &str, path: &Path, file: &Metadata) -> io::Result<()> {
        fs::create_dir_all(&self.notes)?;
        let noted = Noted::of(vm, path, file);
        fs::write(self.note_of(path), serde_json::to_vec(&noted).expect("it is plain data"))
    }

    /// What is there is this guest's and as it was when it was noted; the answer is which file that is, by device and inode.
    pub(crate) fn find(&self, vm: &str, path: &Path) -> Option<(u64, u64)> {
        let noted: Noted = serde_json::from_slice(&fs::read(self.note_of(path)).ok()?).ok()?;
        let now = Noted::of(vm, path, &fs::symlink_metadata(path).ok()?);
        (noted == now).then_some((now.device, now.inode))
    }

    /// Those that were noted so long ago: where they were, and which files they were.
    pub(crate) fn older_than(&self, age: Duration) -> Vec<(PathBuf, (u64, u64))> {
        let is_old = |note: &Path| {
            let noted = fs::metadata(note).and_then(|it| it.modified()).ok()?;
            SystemTime::now().duration_since(noted).ok().filter(|since| *since >= age)
        };
        let entries = fs::read_dir(&self.notes).into_iter().flatten().flatten().map(|entry| entry.path());
        let read = |note: PathBuf| serde_json::from_slice::<Noted>(&fs::read(note).ok()?).ok();
        let old = entries.filter(|note| is_old(note).is_some()).filter_map(read);
        old.map(|it| (it.path, (it.device, it.inode))).collect()
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
        let (left, disk) = (DiskNotes::left(&dir.path().join("state")), dir.path().join("disk.raw"));
        let note = |vm| left.note(vm, &disk).unwrap();
        fs::write(&disk, "guest").unwrap();
        assert_eq!(left.find("web1", &disk), None);
        note("web1");
        assert!(left.find("web1", &disk).is_some());
        assert_eq!(left.find("web2", &disk), None, "another guest's");
        let before = fs::metadata(&disk).unwrap().modified().unwrap();
        fs::write(&disk, "other").unwrap();
        let later = before + std::time::Duration::from_millis(1);
        fs::File::options().write(true).open(&disk).unwrap().set_modified(later).unwrap();
        assert_eq!(left.find("web1", &disk), None, "it was written since");
        note("web1");
        let it = left.find("web1", &disk).unwrap();
        assert_eq!(left.older_than(Duration::ZERO), [(disk.clone(), it)]);
        assert!(left.older_than(Duration::from_secs(60)).is_empty());
        assert_eq!(DiskNotes::arrived(&dir.path().join("state")).find("web1", &disk), None, "of another kind");
        fs::remove_file(&disk).unwrap();
        assert_eq!(left.find("web1", &disk), None, "it is gone");
        left.forget(&disk);
        fs::write(&disk, "guest").unwrap();
        assert_eq!(left.find("web1", &disk), None);
    }
}
