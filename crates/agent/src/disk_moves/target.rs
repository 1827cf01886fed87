//! Where a disk is to go: looked at before anything is touched.

use std::fs;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmferry_qemu::DiskPlace;

use super::places::{Used, is_free};
use crate::error::AgentError;

/// See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Target {
    /// A file that is to be made.
    File(PathBuf),
    /// A block device of so many bytes.
    Device(PathBuf, u64),
    /// What a server has: the options of a node.
    Remote(Value),
}

/// The disk that is to go there.
pub(super) struct Wanted<'a> {
    /// In bytes, as the guest sees it.
    pub(super) size: Option<u64>,
    /// What it takes, in bytes, at least.
    pub(super) room: u64,
    /// Where disks are already.
    pub(super) used: &'a [Used],
}

fn refused(message: String, hint: &str) -> AgentError {
    AgentError::BadRequest { message, hint: Some(hint.into()) }
}

impl Target {
    /// It is there, or can be made, and has room.
    pub(super) fn check(to: &str, wanted: &Wanted<'_>) -> Result<Self, AgentError> {
        let place: DiskPlace = to.parse().map_err(|error: vmferry_qemu::BadPlace| AgentError::BadRequest {
            message: error.to_string(),
            hint: Some("`vmferry disk move --help` has examples".into()),
        })?;
        is_free(to, wanted.used)?;
        let Some(path) = place.path() else { return Ok(Self::Remote(place.options())) };
        if !path.is_absolute() {
            return Err(refused(format!("{} is a relative path", path.display()), "give one that begins with /"));
        }
        match fs::metadata(path) {
            Ok(it) if it.file_type().is_block_device() => Self::device(path, wanted),
            Ok(it) if it.is_dir() => {
                Err(refused(format!("{} is a folder", path.display()), "name the file that is to be made in it"))
            }
            _ if fs::symlink_metadata(path).is_ok() => Err(refused(
                format!("there is something at {} already", path.display()),
                "remove it, or name another place",
            )),
            _ => Self::file(path, wanted),
        }
    }

    fn device(path: &Path, wanted: &Wanted<'_>) -> Result<Self, AgentError> {
        let size = fs::File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0)));
        let size = size.map_err(AgentError::io(path))?;
        match wanted.size.filter(|wanted| *wanted > size) {
            Some(wanted) => Err(refused(
                format!("{} has {size} bytes, and the disk {wanted}", path.display()),
                "name a larger device",
            )),
            None => Ok(Self::Device(path.into(), size)),
        }
    }

    fn file(path: &Path, wanted: &Wanted<'_>) -> Result<Self, AgentError> {
        let folder = path.parent().filter(|_| path.file_name().is_some()).unwrap_or(path);
        let room = rustix::fs::statvfs(folder).map_err(|_| {
            refused(format!("there is no folder {}", folder.display()), "make it first, or mount what is to be there")
        })?;
        let room = room.f_bavail.saturating_mul(room.f_frsize);
        if room < wanted.room {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            return Err(AgentError::Conflict {
                message: format!(
                    "there is too little room in {}: {} MiB are free, and the disk takes {} MiB",
                    folder.display(),
                    mib(room),
                    mib(wanted.room)
                ),
                hint: Some("make room, or name another place".into()),
            });
        }
        Ok(Self::File(path.into()))
    }

    /// In which format it is there: as its user says, or as it is now where that can be.
    pub(super) fn format(&self, asked: Option<&str>, now: Option<&str>) -> Result<String, AgentError> {
        let usual = match (self, now) {
            (Self::File(_), Some("qcow2")) => "qcow2",
            _ => "raw",
        };
        match (asked.unwrap_or(usual), self) {
            ("raw", _) => Ok("raw".into()),
            ("qcow2", Self::File(_)) => Ok("qcow2".into()),
            ("qcow2", _) => Err(refused("only a file is made as qcow2, for what can grow".into(), "give --format raw")),
            (other, _) => Err(refused(format!("no image of the format {other:?} is made"), "give raw or qcow2")),
        }
    }

    /// The options of the node that has it, without a format, which reads and writes like this.
    pub(super) fn options(&self, aio: Option<&str>) -> Value {
        let mut options = match self {
            Self::Remote(options) => return options.clone(),
            Self::File(path) => json!({ "driver": "file", "filename": path }),
            Self::Device(path, _) => json!({ "driver": "host_device", "filename": path }),
        };
        if let Some(aio) = aio {
            options["aio"] = json!(aio);
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(to: &str, room: u64) -> Result<Target, AgentError> {
        Target::check(to, &Wanted { size: Some(1 << 20), room, used: &[] })
    }

    #[test]
    fn a_place_that_cannot_be_is_refused_with_what_is_wrong_about_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::write(dir.path().join("there"), "x").unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("link")).unwrap();
        for (to, room, expected) in [
            ("a/b".to_owned(), 0, "relative"),
            (at("there"), 0, "something at"),
            (at("link"), 0, "something at"),
            (at(""), 0, "is a folder"),
            (at("absent/a"), 0, "no folder"),
            (at("new"), u64::MAX, "too little room"),
            ("http://h/a".to_owned(), 0, "no place for a disk"),
        ] {
            let refused = check(&to, room).unwrap_err().to_string();
            assert!(refused.contains(expected), "{to}: {refused}");
        }
        assert_eq!(check(&at("new"), 1).unwrap(), Target::File(dir.path().join("new")));
        assert!(matches!(check("nbd://h/e", u64::MAX).unwrap(), Target::Remote(_)));
    }

    #[test]
    fn a_format_stays_where_it_can_and_is_raw_elsewhere() {
        let (file, remote) = (Target::File("/a".into()), Target::Remote(json!({})));
        let of = |target: &Target, asked, now| target.format(asked, now).map_err(|error| error.to_string());
        assert_eq!(of(&file, None, Some("qcow2")).unwrap(), "qcow2");
        assert_eq!(of(&file, None, Some("vmdk")).unwrap(), "raw");
        assert_eq!(of(&file, Some("raw"), Some("qcow2")).unwrap(), "raw");
        assert_eq!(of(&remote, None, Some("qcow2")).unwrap(), "raw");
        assert!(of(&remote, Some("qcow2"), None).unwrap_err().contains("only a file"));
        assert!(of(&file, Some("vmdk"), None).unwrap_err().contains("vmdk"));
    }
}
