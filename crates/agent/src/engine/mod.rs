//! RAM engines: what copies a guest's RAM, behind one face.
//!
//! The migration (see `source/`) drives an engine without knowing which one it is: start, observe, do what the
//! policy says, and stop observing when the destination can take over. An engine says so in [`Seen`].

pub(crate) mod budget;
mod disk_pacing;
pub(crate) mod disks;
pub mod external;
pub(crate) mod journey;
pub(crate) mod lending;
pub(crate) mod means;
pub(crate) mod meters;
pub(crate) mod movable;
pub mod qemu;

pub use crate::error::EngineError;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmferry_link::{Cipher, SessionId, SessionKey, usual_streams};
use vmferry_policy::{Action, Limits, Observation};
use vmferry_qemu::{Qmp, QmpError, RunState, StreamKey};
use vmferry_ram::FaultTimes;

/// What the destination's QEMU must be set to before it receives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Setup {
    /// QEMU's migration capabilities to switch on.
    pub capabilities: Vec<String>,
    /// How many parallel channels QEMU opens for RAM; 0 without multifd.
    pub channels: u8,
    /// QEMU's migration parameters that a measurement sets, in its words.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub parameters: serde_json::Map<String, serde_json::Value>,
}

impl Setup {
    /// The capability is in use.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|it| it == capability)
    }

    /// Sets one side's QEMU to the parameters of a measurement.
    pub(crate) async fn set_parameters(&self, qmp: &Qmp) -> Result<(), QmpError> {
        if !self.parameters.is_empty() {
            qmp.execute_raw("migrate-set-parameters", self.parameters.clone().into()).await?;
        }
        Ok(())
    }
}

/// What protects a guest on its way from one QEMU to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Protection {
    /// Nothing: both hosts trust the network.
    #[default]
    Plain,
    /// The QEMUs' own TLS, with a key for this one migration.
    Tls {
        /// The key.
        #[schema(value_type = String)]
        key: StreamKey,
        /// What encrypts.
        #[schema(value_type = String)]
        cipher: Cipher,
    },
    /// The agents' TLS: they relay what the QEMUs say.
    Relay,
}

/// What an engine sees at one moment.
#[derive(Clone, Debug)]
pub struct Seen {
    /// For the policy and the user.
    pub observation: Observation,
    /// The source's guest is paused for good and the destination has what it needs to run: commit now.
    pub ready_to_commit: bool,
    /// All RAM is on the destination.
    pub complete: bool,
    /// The source's QEMU would not let the guest run any more.
    pub let_go: bool,
    /// When the source's guest was paused.
    pub paused_at: Option<Instant>,
    /// How long the pages that were left then were to take, where that is known.
    pub last_pages: Option<Duration>,
    /// Post-copy lost its connection; the guest's faults wait until [`RamEngine::reconnect`].
    pub broken: Option<String>,
}

/// What an engine knows when all is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Bytes over the link.
    pub sent: u64,
    /// Pages that went as differences from what was sent before.
    pub deltas: u64,
    /// How many bytes that has saved.
    pub saved_by_deltas: u64,
    /// How often the guest's disks were drained.
    pub drains: u32,
    /// How long that took at most.
    pub longest_drain: Duration,
    /// How long the guest waited for pages in post-copy, where that is known.
    pub fault_times: Option<FaultTimes>,
    /// Pre-copy rounds.
    pub rounds: u32,
    /// The highest dirty rate of a round, in bytes a second; 0 when it is not known.
    pub dirty_rate: u64,
    /// The downtime as the engine reckons it, in ms.
    pub downtime_ms: Option<u64>,
}

/// A link between agents that is about to be made.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewSession {
    /// Its session.
    #[schema(value_type = String)]
    pub session: SessionId,
    /// Its key.
    #[schema(value_type = String)]
    pub key: SessionKey,
    /// How many bulk streams it has.
    pub streams: u8,
}

impl NewSession {
    /// Like no other, with as many streams as this host has use for.
    pub fn random() -> Self {
        Self { session: SessionId::random(), key: SessionKey::random(), streams: usual_streams() }
    }
}

/// Where the destination waits for a new connection.
#[derive(Clone, Debug)]
pub enum NewConnection {
    /// Its QEMU, at this URI.
    Uri(String),
    /// Its agent, for a link with this session.
    Session(NewSession),
}

/// A guest's own disks, which move with it and are in step.
#[async_trait]
pub trait Disks: Send + Sync {
    /// To be asked before the guest is paused: waits until little is left to be done then.
    async fn settle(&self) -> Result<(), EngineError>;

    /// The guest stands: has the destination have all of its disks, and let go of them.
    async fn cut_over(&self) -> Result<(), EngineError>;

    /// So much was sent of them, in bytes.
    fn sent(&self) -> u64;
}

/// What has come to its end is not moved any more: nothing of it would go on, and after QEMU's post-copy it would run again.
fn goes_on(state: &RunState) -> Result<(), EngineError> {
    match state {
        RunState::Shutdown | RunState::GuestPanicked | RunState::InternalError => {
            Err(EngineError::Failed { reason: format!("the guest has come to its end: it is {state}") })
        }
        _ => Ok(()),
    }
}

/// Copies a guest's RAM to a destination that is prepared for it.
#[async_trait]
pub trait RamEngine: Send {
    /// Begins to copy; the guest runs on.
    async fn start(&mut self) -> Result<(), EngineError>;

    /// Waits for news, for some 100 ms at most, and tells what is seen then.
    async fn observe(&mut self) -> Result<Seen, EngineError>;

    /// Does what the policy said. [`Action::GiveUp`] is the migration's to do, by [`RamEngine::stop_copying`].
    async fn apply(&mut self, action: &Action) -> Result<(), EngineError>;

    /// From now on these limits hold, and so much is sent at most, in bytes a second. What the policy has allowed is taken
    /// back where it may exceed them: the policy sees the change, and allows anew. Only before the switchover.
    async fn set_limits(&mut self, limits: Limits, bandwidth: Option<u64>) -> Result<(), EngineError>;

    /// Why it can no longer be made to go on by post-copy, if so.
    fn post_copy_obstacle(&self) -> Option<String> {
        None
    }

    /// Post-copy goes on over a new connection to the destination, which waits for it.
    async fn reconnect(&mut self, to: &NewConnection) -> Result<(), EngineError>;

    /// Stops copying and leaves no trace in the guest, which may be left paused. Only while the destination does not own
    /// it; [`EngineError::TooLate`] when QEMU has let go of the guest.
    async fn stop_copying(&mut self) -> Result<(), EngineError>;

    /// It begins only after a long time: the destination does not wait for ever for a connection that was not made.
    async fn reserve(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// These disks of its guest move with it: they are in step, and the destination must have them before it gets the state
    /// of the devices.
    fn brings_disks(&mut self, disks: Arc<dyn Disks>);

    /// The guest runs, as far as its user is concerned: whatever pauses it for the migration does not count.
    fn guest_runs(&self) -> bool;

    /// The destination has everything: nothing more is said to it.
    async fn close(&mut self) {}

    /// What is known so far.
    fn totals(&self) -> Totals;
}
