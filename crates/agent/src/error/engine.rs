//! Why copying the RAM failed.

use vmferry_qemu::QmpError;
use vmferry_ram::RamError;

/// Why copying the RAM failed. The guest runs on at the source unless the destination was committed to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine said so.
    #[error("copying the RAM failed: {reason}")]
    Failed {
        /// In its words.
        reason: String,
    },
    /// Its disks were not copied.
    #[error("copying the disks failed: {reason}")]
    Disks {
        /// In its words.
        reason: String,
    },
    /// The source's QEMU has let go of the guest for post-copy: only the destination can have it now.
    #[error("QEMU has let go of the guest for post-copy already")]
    TooLate,
    /// The guest's QEMU does not answer.
    #[error("the guest's QEMU does not do as told")]
    Qmp(#[from] QmpError),
    /// The agents cannot move it.
    #[error("copying the RAM failed")]
    Ram(#[from] RamError),
}
