//! A folder with little space: a tmpfs of its own, so that a test can fill a host's disk and nobody else's.

use std::path::{Path, PathBuf};

use super::Result;
use super::network::run;

/// Room for an agent's journal with its write-ahead log, several times over.
const SIZE: &str = "16m";

/// Mounted until it is dropped; nobody may use it then.
pub(super) struct SmallFolder {
    path: PathBuf,
}

impl SmallFolder {
    pub(super) fn mount(path: &Path) -> Result<Self> {
        unmount_orphans();
        std::fs::create_dir_all(path)?;
        let source = format!("vmferry-{}", std::process::id());
        run("mount", &format!("-t tmpfs -o size={SIZE},mode=700 {source} {}", path.display()))?;
        Ok(Self { path: path.into() })
    }
}

impl Drop for SmallFolder {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &format!("--lazy {}", self.path.display())) {
            eprintln!("{error}");
        }
    }
}

/// Unmounts what testbeds left whose process was killed.
fn unmount_orphans() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for path in mounts.lines().filter_map(orphan) {
        if let Err(error) = run("umount", &format!("--lazy {path}")) {
            eprintln!("{error}");
        }
    }
}

/// Where a line of /proc/mounts tells of such a folder whose process is gone.
fn orphan(line: &str) -> Option<&str> {
    let mut words = line.split(' ');
    let owner: u32 = words.next()?.strip_prefix("vmferry-")?.parse().ok()?;
    let path = words.next()?;
    (words.next() == Some("tmpfs") && !Path::new(&format!("/proc/{owner}")).exists()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::orphan;

    #[test]
    fn only_what_a_killed_testbed_mounted_is_unmounted() {
        // Pids end at 4194304.
        let left = "vmferry-4999999 /tmp/vmferry-x/alpha-state tmpfs rw,size=16384k 0 0";
        assert_eq!(orphan(left), Some("/tmp/vmferry-x/alpha-state"));
        let ours = left.replace("4999999", &std::process::id().to_string());
        for other in [ours.as_str(), "tmpfs /tmp tmpfs rw 0 0", "vmferry-4999999 /srv ext4 rw 0 0", ""] {
            assert_eq!(orphan(other), None, "{other}");
        }
    }
}
