//! What QEMU says unasked.

use std::time::Instant;

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::MigrationStatus;

/// Something happened in QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// QEMU's name of it, such as `STOP`.
    pub name: String,
    /// What comes with it; null when nothing does.
    pub data: Value,
    /// When it was read here.
    pub at: Instant,
}

impl Event {
    /// The migration's new status, if that is what this event tells (they need the capability `events`).
    pub fn as_migration_status(&self) -> Option<MigrationStatus> {
        if self.name != "MIGRATION" {
            return None;
        }
        self.data.get("status")?.as_str().map(MigrationStatus::from)
    }
}

/// The events of one connection, from when it was asked for on.
#[derive(Debug)]
pub struct EventStream(pub(super) broadcast::Receiver<Event>);

impl EventStream {
    /// The next event; none when QEMU is gone. A reader that falls far behind loses the oldest events; the log says so.
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match self.0.recv().await {
                Ok(event) => return Some(event),
                Err(RecvError::Closed) => return None,
                Err(RecvError::Lagged(lost)) => {
                    tracing::warn!(lost, "events of QEMU were not read in time and are lost");
                }
            }
        }
    }
}
