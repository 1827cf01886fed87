//! What is known of a migration that may have to wait for its turn.

use vmferry_api::PlanView;
use vmferry_link::Fingerprint;

use crate::journal::Instance;

/// What a plan is for one that may have to wait: it can go, and where.
pub(crate) struct Checked {
    pub(crate) view: PlanView,
    pub(crate) key: Fingerprint,
    /// The most that may be sent, in bytes a second.
    pub(crate) rate: Option<u64>,
    /// Its QEMU.
    pub(crate) instance: Instance,
}
