//! What a move has made and how far it is, on this host's disk: so that the next agent ends it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::AgentError;
use crate::host::{Host, write_durably};
use crate::journal::Instance;

/// One file, told from every other that there may be at its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) path: PathBuf,
    /// None while it is about to be made.
    device_and_inode: Option<(u64, u64)>,
}

/// What is left to do when the guest uses the new place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct After {
    /// That of its job and its node.
    pub(super) number: u64,
    /// The node's options from then on.
    pub(super) reopen: Option<Value>,
    /// Those that the disk consisted of, the topmost first.
    pub(super) old_nodes: Vec<String>,
    /// The file that its user wants to be gone.
    pub(super) delete: Option<Known>,
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) vm: String,
    pub(super) instance: Instance,
    pub(super) disk: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) made: Option<Known>,
    /// QEMU was told to use the new place.
    pub(super) switching: bool,
    /// None where the VM does not run.
    pub(super) after: Option<After>,
}

impl Known {
    /// The file that is there.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let it = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?;
        Some(Self { path: path.into(), device_and_inode: Some((it.dev(), it.ino())) })
    }

    /// Removes it, if it is still that file; the answer is whether it is gone.
    pub(super) fn remove(&self) -> bool {
        let Ok(it) = fs::symlink_metadata(&self.path) else { return true };
        // When it is not known which it was, it was made a moment ago, or is another's.
        let is_it = match self.device_and_inode {
            Some(known) => known == (it.dev(), it.ino()),
            None => it.is_file() && it.len() == 0,
        };
        is_it && fs::remove_file(&self.path).is_ok()
    }
}

fn folder(host: &Host) -> PathBuf {
    host.config.state_dir.join("disk-moves")
}

impl Note {
    fn at(&self, host: &Host) -> PathBuf {
        folder(host).join(format!("{}.json", self.vm))
    }

    /// That of this VM, if there is one.
    pub(super) fn of(host: &Host, vm: &str) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder(host).join(format!("{vm}.json"))).ok()?).ok()
    }

    /// All of them. What an agent was killed over writing goes.
    pub(super) fn all(host: &Host) -> Vec<Self> {
        for entry in fs::read_dir(folder(host)).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|it| it == "new") {
                // It is in nobody's way.
                let _ = fs::remove_file(entry.path());
            }
        }
        let entries = fs::read_dir(folder(host)).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "json"));
        paths.filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok()).collect()
    }

    /// It is there after a power failure, too.
    pub(super) fn write(&self, host: &Host) -> Result<(), AgentError> {
        write_durably(&self.at(host), self)
    }

    /// Nothing is left to do.
    pub(super) fn remove(&self, host: &Host) {
        if let Err(error) = fs::remove_file(self.at(host))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(vm = self.vm, %error, "the note of a move of its disk cannot be removed");
        }
    }

    /// Makes the file that the disk moves to, which is not there, and notes it.
    pub(super) fn make(&mut self, host: &Host, path: &Path) -> Result<File, AgentError> {
        self.made = Some(Known { path: path.into(), device_and_inode: None });
        self.write(host)?;
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = made.map_err(AgentError::io(path))?;
        self.made = Known::of(path);
        self.write(host)?;
        Ok(file)
    }

    /// Removes what was made for it, and then itself.
    pub(super) fn undo(&self, host: &Host) {
        if let Some(made) = &self.made
            && !made.remove()
        {
            tracing::error!(vm = self.vm, path = %made.path.display(), "what was made for a move of its disk stays");
        }
        self.remove(host);
    }
}
