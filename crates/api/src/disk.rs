//! A VM's disks: what they are, and moving one to another place.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::Problem;

/// A disk or drive of a VM that has something in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// What it is called.
    pub name: String,
    /// Such as `qcow2`; none where QEMU finds out when the VM starts.
    pub format: Option<String>,
    /// In bytes, as the guest sees it; none where that is not known.
    pub size: Option<u64>,
    /// How much of it takes room, in bytes, where that is known.
    pub allocated: Option<u64>,
    /// Where it is: a path, a URL, or a description in JSON.
    pub file: String,
    /// The file that has what this one does not.
    pub backing: Option<String>,
    /// The guest only reads it.
    pub read_only: bool,
}

/// Move a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskMoveRequest {
    /// To where: an absolute path, `nbd://`, `nbd+unix://`, `iscsi://`, `nfs://` or `rbd:`.
    pub to: String,
    /// `raw` or `qcow2`; as it is now, when absent, and raw where a file system is not what it moves to.
    #[serde(default)]
    pub format: Option<String>,
    /// The most that is copied, in bytes a second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// The file where it was goes when the guest uses the new place.
    #[serde(default)]
    pub delete_source: bool,
}

/// How far the move of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMoveState {
    /// It is copied; the guest uses the old place.
    Copying,
    /// All of it is there; the guest is about to use the new place.
    Switching,
    /// The guest uses the new place.
    Done,
    /// It stays where it was.
    Failed,
}

/// The move of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskMoveView {
    /// The VM.
    pub vm: String,
    /// What the disk is called.
    pub disk: String,
    /// Where it was.
    pub from: String,
    /// Where it goes.
    pub to: String,
    /// In which format it is there.
    pub format: String,
    /// How far it is.
    pub state: DiskMoveState,
    /// What is to be copied, in bytes; grows while the guest writes.
    pub total: u64,
    /// What is copied of it.
    pub done: u64,
    /// For how long it has been copied, in ms.
    pub elapsed_ms: u64,
    /// Why it failed.
    pub problem: Option<Problem>,
    /// What its user should know of it, one plain sentence each.
    pub notes: Vec<String>,
}
