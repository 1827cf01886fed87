//! Changes of a migration's limits, on their way from whoever wants them to the migration.

use tokio::sync::{mpsc, oneshot};
use vmferry_api::{TuneRequest, Tuned};

use crate::error::AgentError;

/// So many may wait at a time.
const WAITING: usize = 4;

/// A change, and who waits for what comes of it.
pub(super) struct Change {
    pub(super) wanted: TuneRequest,
    pub(super) answer: oneshot::Sender<Result<Tuned, AgentError>>,
}

/// From those who want them to the one migration that they concern.
pub(super) fn changes() -> (mpsc::Sender<Change>, mpsc::Receiver<Change>) {
    mpsc::channel(WAITING)
}
