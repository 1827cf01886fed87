//! The images that a running guest writes: what would have to move with it where they are not shared.

use crate::inventory::name_of;
use crate::qmp::commands::QueryBlock;
use crate::qmp::{Qmp, QmpError};

/// One image that the guest writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenImage {
    /// The disk, as its user calls it.
    pub disk: String,
    /// The node that the guest reads and writes.
    pub node: String,
    /// Where it is: a path, a URL, or a description in JSON.
    pub file: String,
    /// Such as `qcow2`.
    pub format: String,
    /// In bytes, as the guest sees it.
    pub size: u64,
    /// It is opened with `O_DIRECT`.
    pub is_direct: bool,
    /// How much of it is allocated, in bytes, where that is known.
    pub allocated: Option<u64>,
    /// The file that has what this one does not, and its format.
    pub backing: Option<(String, String)>,
}

/// A disk or drive that has something in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    /// What is in it.
    pub image: WrittenImage,
    /// The guest only reads it.
    pub read_only: bool,
    /// The device has an id, or the drive a name: words of a command line can be found by it.
    pub is_named: bool,
    /// The drive's name, if words gave it one or QEMU did.
    pub drive: String,
}

/// Asks a QEMU; disks that are only read are not among them.
pub async fn written_images(qmp: &Qmp) -> Result<Vec<WrittenImage>, QmpError> {
    let all = disk_images(qmp).await?.into_iter();
    Ok(all.filter(|it| !it.read_only).map(|it| it.image).collect())
}

/// Asks a QEMU for all that has something in it.
pub async fn disk_images(qmp: &Qmp) -> Result<Vec<DiskImage>, QmpError> {
    let drives = qmp.execute(QueryBlock {}).await?;
    let of = |drive: crate::qmp::commands::Drive| {
        let disk = name_of(&drive).unwrap_or_default();
        let is_anonymous = drive.qdev.as_deref().is_some_and(|it| it.starts_with("/machine/peripheral-anon/"));
        let inserted = drive.inserted?;
        let read_only = inserted.more.get("ro").and_then(serde_json::Value::as_bool).unwrap_or(false);
        let is_direct = inserted.more.get("cache").and_then(|it| it["direct"].as_bool()).unwrap_or(false);
        let image = inserted.image;
        Some(DiskImage {
            image: WrittenImage {
                disk,
                node: inserted.node_name,
                file: image.filename,
                format: image.format,
                size: image.virtual_size,
                is_direct,
                allocated: image.actual_size,
                backing: image.backing_image.map(|backing| (backing.filename, backing.format)),
            },
            read_only,
            is_named: !drive.device.is_empty() || !is_anonymous,
            drive: drive.device,
        })
    };
    Ok(drives.into_iter().filter_map(of).collect())
}
