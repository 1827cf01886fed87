//! Proof that both hosts see the same disks.
//!
//! A guest whose disk is not the same file on both hosts would be destroyed by a migration that moves only its RAM. So
//! the source puts a small file beside each writable disk, and only a host that finds it there sees the same storage.

use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmferry_api::VmSpec;
use vmferry_qemu::{CommandLine, FileKind, FileUse};

use crate::error::AgentError;

/// The writable disks of a VM, each with a marker beside it; the markers go when this is dropped.
pub(crate) struct Markers {
    disks: Vec<PathBuf>,
    made: Vec<PathBuf>,
}

impl Markers {
    /// Puts a marker beside each writable disk of this VM. Where that is not possible there will be none to find.
    pub(crate) fn put(spec: &VmSpec, id: Uuid) -> Result<Self, AgentError> {
        let command = CommandLine::parse(&spec.argv)?;
        let is_disk = |file: &FileUse| matches!(file.kind, FileKind::Disk { .. });
        let disks: Vec<PathBuf> =
            command.files().into_iter().filter(is_disk).map(|file| spec.cwd.join(file.path)).collect();
        let made = disks
            .iter()
            .filter_map(|disk| marker_beside(disk, id))
            .filter(|marker| fs::write(marker, "vmferry checks that both hosts see this folder\n").is_ok())
            .collect();
        Ok(Self { disks, made })
    }

    pub(crate) fn disks(&self) -> Vec<PathBuf> {
        self.disks.clone()
    }
}

/// Where the marker of this migration is looked for: beside the real file, since a link may lead to shared storage
/// from a folder that is not.
pub(crate) fn marker_beside(disk: &Path, id: Uuid) -> Option<PathBuf> {
    Some(fs::canonicalize(disk).ok()?.parent()?.join(format!(".vmferry-{id}")))
}

impl Drop for Markers {
    fn drop(&mut self) {
        for marker in &self.made {
            if let Err(error) = fs::remove_file(marker)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %marker.display(), %error, "cannot remove a marker");
            }
        }
    }
}
