//! What can go wrong while RAM moves.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmferry_link::LinkDown;

use crate::arrival::ArrivalError;
use crate::memory::{MemoryError, PunchError};
use crate::tracking::TrackingError;
use crate::wire::Malformed;

/// Why RAM does not move (any further). Whoever owned the guest still does.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RamError {
    /// The link is over.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// The other side does not speak as it should.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The destination cannot go on.
    #[error("the destination cannot go on: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// Both sides have different RAM.
    #[error("the RAM is not the same on both sides: {there} at the source, {here} at the destination")]
    Layout {
        /// Blocks and their sizes in bytes.
        here: String,
        /// The same.
        there: String,
    },
    /// The destination is silent.
    #[error("the destination does not answer within {after:?}")]
    NoAnswer {
        /// How long was waited.
        after: Duration,
    },
    /// The guest's RAM cannot be found.
    #[error("cannot get at the guest's RAM")]
    Memory(#[source] Arc<MemoryError>),
    /// The guest's RAM cannot be read or written.
    #[error("cannot read or write the guest's RAM")]
    Io(#[source] Arc<io::Error>),
    /// What writes into the guest's RAM by itself does not come to rest.
    #[error("cannot drain the I/O of the guest's disks")]
    Drain(#[source] Arc<io::Error>),
    /// What is stale cannot be taken away.
    #[error("cannot make room for the guest's RAM")]
    Punch(#[source] Arc<PunchError>),
    /// Writes of the guest cannot be seen.
    #[error("cannot track what the guest writes")]
    Tracking(#[source] Arc<TrackingError>),
    /// Faults of the guest cannot be served.
    #[error("cannot serve the guest's faults")]
    Arrival(#[source] Arc<ArrivalError>),
    /// Between an agent and its QEMU.
    #[error("cannot pass on the device state")]
    DeviceState(#[source] Arc<io::Error>),
    /// What a new agent would need.
    #[error("cannot use the record of the post-copy")]
    Record(#[source] Arc<io::Error>),
    /// No thread could be started.
    #[error("cannot start a thread")]
    Thread(#[source] Arc<io::Error>),
}

impl From<MemoryError> for RamError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(Arc::new(error))
    }
}

impl From<PunchError> for RamError {
    fn from(error: PunchError) -> Self {
        Self::Punch(Arc::new(error))
    }
}

impl From<TrackingError> for RamError {
    fn from(error: TrackingError) -> Self {
        Self::Tracking(Arc::new(error))
    }
}

impl From<ArrivalError> for RamError {
    fn from(error: ArrivalError) -> Self {
        Self::Arrival(Arc::new(error))
    }
}

impl RamError {
    pub(crate) fn io(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }

    pub(crate) fn device_state(error: io::Error) -> Self {
        Self::DeviceState(Arc::new(error))
    }

    pub(crate) fn record(error: io::Error) -> Self {
        Self::Record(Arc::new(error))
    }

    pub(crate) fn thread(error: io::Error) -> Self {
        Self::Thread(Arc::new(error))
    }
}

/// An error with its causes.
pub(crate) fn in_one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
