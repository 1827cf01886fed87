//! A VM that does not run moves to another host: what is asked for, and how far it is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::Problem;

/// Move a VM that does not run.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmMoveRequest {
    /// To which host: a peer's name, or its address.
    pub to: String,
    /// Check everything and touch nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// The most that may be sent, in bytes a second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// The user vouches for disks that cannot be proven to be the same on both hosts.
    #[serde(default)]
    pub disks_are_shared: bool,
    /// Where disks are to be there, by their names: they are copied.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub disks: BTreeMap<String, PathBuf>,
}

/// How far the move of a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmMoveState {
    /// It could move; nothing was touched.
    Planned,
    /// Its disks are copied; it is this host's.
    Copying,
    /// It was given to the other host, which has not said that it has it: neither starts it.
    HandingOver,
    /// It is the other host's.
    Done,
    /// It is this host's, as it was.
    Failed,
}

/// The move of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmMoveView {
    /// The VM.
    pub vm: String,
    /// To which host, as that calls itself.
    pub to: String,
    /// How far it is.
    pub state: VmMoveState,
    /// The disks that are copied.
    pub disks: Vec<VmMoveDisk>,
    /// What is to be copied, in bytes.
    pub total: u64,
    /// How much of it is there, with what is zero.
    pub done: u64,
    /// How much was sent, in bytes.
    pub sent: u64,
    /// For how long it has been under way, in ms.
    pub elapsed_ms: u64,
    /// Why it failed.
    pub problem: Option<Problem>,
    /// What its user should know of it, one plain sentence each.
    pub notes: Vec<String>,
}

/// A disk that is copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmMoveDisk {
    /// Where it is here, and stays.
    #[schema(value_type = String)]
    pub from: PathBuf,
    /// Where it is to be there.
    #[schema(value_type = String)]
    pub to: PathBuf,
    /// The file's size, in bytes.
    pub size: u64,
}

impl VmMoveState {
    /// Nothing comes after it.
    pub fn is_last(self) -> bool {
        !matches!(self, Self::Copying | Self::HandingOver)
    }
}
