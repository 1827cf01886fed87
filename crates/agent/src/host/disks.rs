//! Proof that both hosts see the same disks.
//!
//! A guest whose disk is not the same file on both hosts would be destroyed by a migration that moves only its RAM. So
//! the source puts a small file beside each writable disk, and only a host that finds it there sees the same storage.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmferry_api::VmSpec;
use vmferry_qemu::{CommandLine, FileKind};

use crate::error::AgentError;

/// What the names of markers begin with.
const MARKER: &str = ".vmferry-";

/// What an agent writes into its markers, so that the next one on its host knows those that it left.
#[derive(Clone)]
pub(crate) struct Signature {
    /// Whose they are.
    agent: String,
    /// The one that puts them now.
    run: String,
}

impl Signature {
    pub(crate) fn of(fingerprint: impl std::fmt::Display) -> Self {
        Self { agent: format!("for agent {fingerprint}"), run: format!("run {}", Uuid::new_v4()) }
    }
}

/// The writable disks of a VM and the files behind them, each with a marker beside it; the markers go when this is
/// dropped.
pub(crate) struct Markers {
    disks: Vec<PathBuf>,
    read_only: Vec<PathBuf>,
    made: Vec<PathBuf>,
}

impl Markers {
    /// Puts a marker beside each writable disk of this VM, and each file that is `behind` one. Where that is not possible
    /// there will be none to find.
    pub(crate) fn put(spec: &VmSpec, behind: &[PathBuf], id: Uuid, signature: &Signature) -> Result<Self, AgentError> {
        let disks = disks_of(spec)?;
        let behind: Vec<PathBuf> = behind.iter().map(|file| spec.cwd.join(file)).collect();
        let made = put_beside(disks.iter().chain(&behind), id, signature);
        // What a measuring guest boots from is called by its content.
        let mut read_only = if spec.measuring { Vec::new() } else { read_only_of(spec)? };
        read_only.extend(behind);
        read_only.sort();
        read_only.dedup();
        Ok(Self { disks, read_only, made })
    }

    /// Puts one beside each of these disks, of a guest that only reads those others.
    pub(crate) fn beside(disks: Vec<PathBuf>, read_only: Vec<PathBuf>, id: Uuid, signature: &Signature) -> Self {
        let made = put_beside(disks.iter(), id, signature);
        Self { disks, read_only, made }
    }

    /// What the guest only reads: where it is not the same file on both hosts, the same must be in it.
    pub(crate) fn read_only(&self) -> Vec<PathBuf> {
        self.read_only.clone()
    }

    pub(crate) fn disks(&self) -> Vec<PathBuf> {
        self.disks.clone()
    }
}

fn put_beside<'a>(disks: impl Iterator<Item = &'a PathBuf>, id: Uuid, signature: &Signature) -> Vec<PathBuf> {
    let Signature { agent, run } = signature;
    let text = format!("vmferry checks that both hosts see this folder\n{agent}\n{run}\n");
    let markers = disks.filter_map(|disk| marker_beside(disk, id));
    markers.filter(|marker| fs::write(marker, &text).is_ok()).collect()
}

fn disks_of(spec: &VmSpec) -> Result<Vec<PathBuf>, AgentError> {
    files_of(spec, |kind| matches!(kind, FileKind::Disk { .. }))
}

fn read_only_of(spec: &VmSpec) -> Result<Vec<PathBuf>, AgentError> {
    files_of(spec, |kind| *kind == FileKind::ReadOnly)
}

fn files_of(spec: &VmSpec, are_meant: impl Fn(&FileKind) -> bool) -> Result<Vec<PathBuf>, AgentError> {
    let files = CommandLine::parse(&spec.argv)?.files().into_iter();
    Ok(files.filter(|file| are_meant(&file.kind)).map(|file| spec.cwd.join(file.path)).collect())
}

/// Removes the markers that an earlier agent of this host has left beside the disks of these VMs.
pub(crate) fn sweep<'a>(specs: impl Iterator<Item = &'a VmSpec>, signature: &Signature) {
    sweep_beside(specs.flat_map(|spec| disks_of(spec).unwrap_or_default()), signature);
}

/// The same beside these disks.
pub(crate) fn sweep_beside(disks: impl Iterator<Item = PathBuf>, signature: &Signature) {
    let folders: BTreeSet<PathBuf> =
        disks.filter_map(|disk| Some(fs::canonicalize(disk).ok()?.parent()?.to_owned())).collect();
    for file in folders.into_iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten() {
        let path = file.path();
        let is_marker = file.file_name().to_string_lossy().starts_with(MARKER);
        let is_left = |text: &str| text.lines().any(|it| it == signature.agent) && !text.contains(&signature.run);
        if is_marker && fs::read_to_string(&path).is_ok_and(|text| is_left(&text)) {
            match fs::remove_file(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed a marker that an earlier agent left"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove a marker"),
            }
        }
    }
}

/// Where the marker of this migration is looked for: beside the real file, since a link may lead to shared storage
/// from a folder that is not.
pub(crate) fn marker_beside(disk: &Path, id: Uuid) -> Option<PathBuf> {
    Some(fs::canonicalize(disk).ok()?.parent()?.join(format!("{MARKER}{id}")))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_behind_a_disk_are_marked_and_only_markers_that_an_earlier_agent_of_this_host_left_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        fs::write(&disk, "").unwrap();
        let words = ["qemu-system-x86_64", "-drive", &format!("file={},format=raw", disk.display())];
        let spec = VmSpec {
            name: "web1".into(),
            argv: words.map(str::to_owned).into(),
            cwd: "/".into(),
            shared_ram: false,
            adopted: false,
            measuring: false,
            io_limits: None,
        };
        let behind = ["base/b.raw".into()];
        fs::create_dir(dir.path().join("base")).unwrap();
        fs::write(dir.path().join("base/b.raw"), "").unwrap();
        let relative = VmSpec { cwd: dir.path().into(), ..spec.clone() };
        let both = Markers::put(&relative, &behind, Uuid::new_v4(), &Signature::of("aa")).unwrap();
        assert_eq!(both.disks(), std::slice::from_ref(&disk));
        assert_eq!(both.read_only(), [dir.path().join("base/b.raw")]);
        assert!(both.made.len() == 2 && both.made.iter().all(|marker| marker.exists()));
        let (before, now, elsewhere) = (Signature::of("aa"), Signature::of("aa"), Signature::of("bb"));
        let [left, used, other] =
            [&before, &now, &elsewhere].map(|it| Markers::put(&spec, &[], Uuid::new_v4(), it).unwrap());
        fs::write(dir.path().join(".vmferry-of-the-user"), "a note").unwrap();
        sweep([&spec].into_iter(), &now);
        assert!(!left.made[0].exists());
        assert!(used.made[0].exists() && other.made[0].exists());
        assert!(dir.path().join(".vmferry-of-the-user").exists());
    }
}
