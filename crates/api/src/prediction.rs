//! What a migration is expected to do, and what it was made from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How long a guest may be watched, in ms; 0 is not at all.
pub const WATCH_MS: std::ops::RangeInclusive<u64> = 0..=60_000;
/// How long it is when nothing is said, in ms.
pub const USUAL_WATCH_MS: u64 = 3000;

/// From what to what something is expected, and what is likeliest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Expected {
    /// Hardly less.
    pub low: f64,
    /// The likeliest.
    pub likely: f64,
    /// Hardly more.
    pub high: f64,
}

/// What a migration of a VM would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PredictionView {
    /// How it would be done, in the field's words.
    pub method: String,
    /// How else, if the guest or the link turn out otherwise.
    pub or: Vec<String>,
    /// From the request to the source's end, in ms.
    pub total_ms: Expected,
    /// Nobody runs the guest, in ms.
    pub downtime_ms: Expected,
    /// The longest that the running guest waits, in ms.
    pub stall_ms: Expected,
    /// Work that the guest does not do while it runs, in ms.
    pub lost_ms: Expected,
    /// The guest needs both hosts, in ms.
    pub at_risk_ms: Expected,
    /// Sent of its memory over the link, in bytes.
    pub sent: Expected,
    /// Pre-copy rounds in the likeliest case.
    pub rounds: u32,
    /// What its policy would decide then, one line each.
    #[serde(default)]
    pub decisions: Vec<String>,
    /// What the link carried in a short trial, in bytes a second; no more than may be sent.
    pub link_rate: u64,
    /// How long a byte took there and an answer back, in ms.
    pub round_trip_ms: f64,
    /// How the guest was watched.
    pub watched: WatchedView,
    /// How many migrations to this host have taught how far predictions are off.
    pub migrations: u32,
}

/// Who saw what a guest writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Watcher {
    /// Nobody.
    #[default]
    Nobody,
    /// The agent, by tracking its memory.
    Agent,
    /// QEMU, by looking at a sample of its pages twice.
    Qemu,
}

/// What was seen of a guest before its migration, and what that cost it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WatchedView {
    /// Who watched it.
    pub by: Watcher,
    /// How long, in ms.
    pub ms: f64,
    /// How often all of its memory was looked at.
    pub scans: u32,
    /// How long that took at most, in ms; the guest ran on.
    pub longest_scan_ms: f64,
    /// How often the guest had to wait for the kernel to note a write: once for each page that it wrote.
    pub faults: u64,
    /// How long one thread of QEMU stood still for the beginning, in ms.
    pub stood_still_ms: f64,
    /// What of the guest's memory is more than zeroes, in bytes.
    pub in_use: u64,
    /// How much it had written after which time; each page counts once.
    pub written: Vec<WrittenWithin>,
}

/// What a guest had written after some time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WrittenWithin {
    /// After so many ms.
    pub ms: f64,
    /// So many bytes of pages.
    pub bytes: u64,
}

/// When a prediction was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Made {
    /// Some minutes before, by `vmferry predict` or a dry run.
    Before,
    /// When the copy had begun, from its first round.
    AtStart,
}

/// What a migration was expected to do, for whoever knows what it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Foretold {
    /// When.
    pub made: Made,
    /// How it was to be done, in the field's words.
    pub method: String,
    /// From the request to the source's end, in ms.
    pub total_ms: Expected,
    /// Nobody runs the guest, in ms.
    pub downtime_ms: Expected,
    /// Sent of its memory over the link, in bytes.
    pub sent: Expected,
    /// How many migrations to this host had taught how far predictions are off.
    pub migrations: u32,
}
