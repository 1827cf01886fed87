//! What can go wrong, as the API tells it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of error it is; programs match on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Code {
    /// No VM of that name.
    UnknownVm,
    /// No migration of that id.
    UnknownMigration,
    /// The name is taken.
    VmExists,
    /// Something given cannot be used.
    BadRequest,
    /// The VM is in a state in which that cannot be done.
    Conflict,
    /// Not now; later it may be different.
    Busy,
    /// A migration of this VM is under way.
    MigrationRuns,
    /// A limit makes no sense.
    BadLimit,
    /// This VM cannot be migrated.
    NotMigratable,
    /// The destination has too little memory free.
    NoMemory,
    /// No such QEMU on that host.
    NoQemu,
    /// The QEMU there lacks the machine type.
    NoMachine,
    /// The QEMU or the host there lacks the CPU model.
    NoCpu,
    /// The accelerator of the VM does not work there.
    NoAccelerator,
    /// A file is missing there.
    NoFile,
    /// A network of the VM is missing there.
    NoNetwork,
    /// A writable disk is not the same file on both hosts.
    DiskNotShared,
    /// The two hosts are not paired, or what is asked for is another peer's.
    NotPaired,
    /// The join token is not valid, or not any more.
    BadToken,
    /// No peer of that name.
    UnknownPeer,
    /// Guests do not travel unencrypted to or from this host.
    PlainRefused,
    /// The other host cannot be reached.
    Unreachable,
    /// What answers there is not a vmferry agent.
    NotAnAgent,
    /// The other agent speaks another version.
    OtherVersion,
    /// QEMU failed.
    QemuFailed,
    /// The migration failed; the guest runs on at the source.
    MigrationFailed,
    /// A copy of an image failed; nothing new has its name.
    CopyFailed,
    /// The limits did not allow it; the guest runs on at the source.
    GaveUp,
    /// The user cancelled; the guest runs on at the source.
    Cancelled,
    /// The guest was handed over, but not all of its memory could follow; or it is not known to run anywhere.
    GuestAtRisk,
    /// A migration cannot be cancelled any more.
    TooLate,
    /// An error of the agent or its host.
    Internal,
    /// A code of a newer agent.
    #[serde(other)]
    Other,
}

/// An error as the API tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// For programs.
    pub code: Code,
    /// What is wrong, in plain words.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// An error and the chain of what caused it, in one line.
pub fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
