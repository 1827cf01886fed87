//! What agents say to each other of libvirt's domains: one is carried from a host's libvirt to another's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use vmferry_libvirt::{PausedWhy, RunState, State};

/// A domain that its host's libvirt would like to migrate to that of another.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CarryOffer {
    /// The migration.
    pub id: Uuid,
    /// The domain's name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its RAM, in bytes.
    pub ram_bytes: u64,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The files that it writes to. Beside each, the source has put a marker named after the migration.
    #[schema(value_type = Vec<String>)]
    pub disks: Vec<PathBuf>,
    /// Those that it only reads.
    #[schema(value_type = Vec<String>)]
    pub read_only: Vec<PathBuf>,
}

/// This host's libvirt could take it, as far as that can be told before.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CarryReply {
    /// What this host calls itself.
    pub host: String,
    /// libvirt's version here.
    pub libvirt: String,
    /// Those of the files that it writes to that are not shared: they would have to be copied.
    #[schema(value_type = Vec<String>)]
    pub own_disks: Vec<PathBuf>,
    /// Why it cannot arrive by post-copy; none when it can.
    pub post_copy_obstacle: Option<String>,
    /// Its RAM may come over several connections.
    #[serde(default)]
    pub several_connections: bool,
}

/// Which of libvirt's connections is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// From libvirt to libvirt.
    Control,
    /// From QEMU to QEMU: the RAM.
    Ram,
    /// The same: the disks.
    Disks,
}

impl Channel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Control, Self::Ram, Self::Disks];

    /// In a word, as in paths.
    pub fn word(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Ram => "ram",
            Self::Disks => "disks",
        }
    }
}

/// How a domain stands with a host's libvirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DomainThere {
    /// It has no such domain that has a process.
    No,
    /// It waits for its RAM.
    Waits,
    /// It runs.
    Runs,
    /// It is there, and does not run: paused, or crashed.
    Stands,
    /// It is there, and cannot have all of its RAM before its post-copy is resumed.
    LacksRam,
}

impl DomainThere {
    /// As libvirt tells it.
    pub fn of(state: Option<State>) -> Self {
        match state {
            None => Self::No,
            Some(state) if state.runs_without_its_ram() => Self::LacksRam,
            Some(state) => match state.run {
                RunState::ShutOff => Self::No,
                RunState::Running => Self::Runs,
                RunState::Paused(PausedWhy::PostCopyFailed) => Self::LacksRam,
                RunState::Paused(PausedWhy::Migration | PausedWhy::PostCopy) => Self::Waits,
                RunState::Paused(PausedWhy::Other) | RunState::Other(_) => Self::Stands,
            },
        }
    }
}

/// The same, as an answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct DomainState {
    /// How.
    pub there: DomainThere,
}
