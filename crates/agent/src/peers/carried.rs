//! The sockets of a libvirt migration that agents carry: the same paths on both hosts, since libvirt gives the source's
//! QEMU the path at which the destination's listens.
//!
//! They lie below libvirt's own run folder and are called as its own sockets for migrations, so that its `AppArmor` profile
//! lets QEMU reach them. Each migration has a folder, which only the user of libvirt's QEMUs and root can enter.

use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

use super::domains::Channel;
use crate::error::AgentError;

/// Below this all folders lie.
const FOLDER: &str = "/run/libvirt/vmferry";
/// What the agent holds that has made a folder, for as long as it uses it.
const LOCK: &str = "lock";
/// The longest path of a Unix socket, in bytes.
const LONGEST: usize = 107;

/// The folder of one migration; it goes when this does.
pub(crate) struct Folder {
    path: PathBuf,
    _lock: std::fs::File,
}

impl Folder {
    /// Makes it, for QEMUs that run as this user.
    pub(crate) fn make(id: Uuid, qemu_user: Option<(u32, u32)>) -> Result<Self, AgentError> {
        let path = folder(id);
        let made = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o711).create(FOLDER)?;
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            let lock = std::fs::File::create(path.join(LOCK))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            if let Some((user, group)) = qemu_user {
                chown(&path, Some(user), Some(group))?;
            }
            Ok(lock)
        };
        let lock = made().map_err(AgentError::io(&path))?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the sockets of a migration");
        }
    }
}

fn folder(id: Uuid) -> PathBuf {
    Path::new(FOLDER).join(&id.simple().to_string()[..12])
}

/// The socket of one of its channels.
pub(crate) fn socket(id: Uuid, channel: Channel, domain: &str) -> PathBuf {
    let plain = folder(id).join(channel.word());
    // libvirt's profile has this for the domain of that name.
    let confined = PathBuf::from(format!("{}.tunnelmigrate.dest.{domain}", plain.display()));
    let fits = confined.as_os_str().len() <= LONGEST && !domain.contains('/');
    if fits && channel != Channel::Control { confined } else { plain }
}

/// Removes the folders whose agents have ended.
pub(crate) fn sweep() {
    for folder in std::fs::read_dir(FOLDER).into_iter().flatten().flatten() {
        let path = folder.path();
        let lock = std::fs::File::open(path.join(LOCK));
        let is_used = lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err());
        if !is_used && let Err(error) = std::fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove the sockets that an earlier agent left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_qemu_are_called_as_libvirts_profile_has_them_unless_the_name_is_too_long() {
        let id: Uuid = "9d7a4c1e-0000-4000-8000-000000000001".parse().unwrap();
        let of = |channel, domain: &str| socket(id, channel, domain).display().to_string();
        let folder = "/run/libvirt/vmferry/9d7a4c1e0000";
        assert_eq!(of(Channel::Ram, "web1"), format!("{folder}/ram.tunnelmigrate.dest.web1"));
        assert_eq!(of(Channel::Control, "web1"), format!("{folder}/control"));
        assert_eq!(of(Channel::Disks, &"w".repeat(60)), format!("{folder}/disks"));
        assert_eq!(of(Channel::Ram, "a/../b"), format!("{folder}/ram"));
    }
}
