//! A migration: what is asked for, what it would do, what it tells while it runs, and what it did.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::prediction::{Foretold, PredictionView, USUAL_WATCH_MS};
use crate::problem::Problem;

/// Migrate a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MigrateRequest {
    /// The destination: HOST or HOST:PORT.
    pub to: String,
    /// Only plan: check everything, touch nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// How long a dry run watches the guest, in ms; with 0 it does not, and predicts from what else is known.
    #[serde(default = "usual_watch")]
    pub watch_ms: u64,
    /// For how long nobody may run the guest at switchover, in ms.
    pub downtime_ms: u64,
    /// When the migration should be over, in ms.
    pub max_time_ms: Option<u64>,
    /// The most that may be sent, in bytes a second.
    pub bandwidth: Option<u64>,
    /// Post-copy may be used.
    pub post_copy: bool,
    /// What matters more.
    #[serde(default)]
    pub prefer: Prefer,
    /// For measurements: this is done, and nothing is decided.
    #[serde(default)]
    pub script: Option<Script>,
    /// The RAM engine; without it the host's configuration decides.
    #[serde(default)]
    pub engine: Option<EngineName>,
    /// Whose policy decides: `vmferry`, or a baseline's name, which takes the engine `qemu`.
    #[serde(default)]
    pub policy: Option<String>,
    /// The user vouches that block devices of this VM are the same on both hosts.
    #[serde(default)]
    pub disks_are_shared: bool,
    /// Disks that are not shared move with the guest; otherwise it is refused.
    #[serde(default = "yes")]
    pub copy_disks: bool,
    /// Where disks are to be there, by their names: they are copied. What they have here is theirs there unless they are named.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub disks: BTreeMap<String, PathBuf>,
}

fn yes() -> bool {
    true
}

fn usual_watch() -> u64 {
    USUAL_WATCH_MS
}

/// What matters more in a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Prefer {
    /// That it is soon over.
    #[default]
    Short,
    /// That the guest feels little of it.
    Gentle,
}

impl std::str::FromStr for Prefer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "short" => Ok(Self::Short),
            "gentle" => Ok(Self::Gentle),
            other => Err(format!("{other:?} is nothing to prefer: there are short and gentle")),
        }
    }
}

/// What is done in a migration that is measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Script {
    /// Turn to post-copy when so many rounds are done.
    pub post_copy_after: Option<u32>,
    /// Pause the guest when so many rounds are done, and send the rest while it stands still.
    pub pause_after: Option<u32>,
    /// What QEMU is to use, where it moves the RAM: the first of these that both QEMUs have. Only for a measuring guest.
    #[serde(default)]
    pub means: Vec<Means>,
}

/// Means of QEMU's own migration, in its words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Means {
    /// Capabilities to switch on, on both sides.
    pub capabilities: Vec<String>,
    /// Parameters to set, on both sides.
    #[schema(value_type = Object)]
    pub parameters: serde_json::Map<String, serde_json::Value>,
}

/// Who moves a guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EngineName {
    /// The agents.
    #[default]
    External,
    /// QEMU itself.
    Qemu,
}

impl std::fmt::Display for EngineName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::External => "external",
            Self::Qemu => "qemu",
        })
    }
}

impl std::str::FromStr for EngineName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "external" => Ok(Self::External),
            "qemu" => Ok(Self::Qemu),
            other => Err(format!("{other:?} is no RAM engine: there are external and qemu")),
        }
    }
}

/// What a migration would do, found out without touching anything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanView {
    /// The VM.
    pub vm: String,
    /// The destination, as it calls itself.
    pub to: String,
    /// The RAM engine.
    pub engine: String,
    /// Whose policy decides: `vmferry`, a baseline's name, or `script`.
    #[serde(default)]
    pub policy: String,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// How much of it the host has given to the guest so far, in bytes: what the first round sends at most.
    pub ram_used_bytes: u64,
    /// What the link to the destination carried in a short trial, in bytes a second.
    pub link_rate: u64,
    /// How long the first round takes at that rate, in ms.
    pub first_round_ms: u64,
    /// QEMU's version here.
    pub source_qemu: String,
    /// QEMU's version there.
    pub destination_qemu: String,
    /// The exact machine type.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// QEMU's migration capabilities that will be used.
    pub capabilities: Vec<String>,
    /// What protects the guest's memory on its way, in words.
    pub protection: String,
    /// What the user should know, one plain sentence each.
    pub notes: Vec<String>,
    /// What it is expected to do; only of a dry run.
    #[serde(default)]
    pub prediction: Option<PredictionView>,
}

/// A migration was planned and, unless it was a dry run, started.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Begun {
    /// What it does.
    pub plan: PlanView,
    /// Its id, under which its events are found.
    pub id: Option<Uuid>,
}

/// The steps of a migration, in order; post-copy turns `commit` and `copy-ram` around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Refuse early; nothing is touched yet.
    Plan,
    /// The destination's QEMU waits.
    Prepare,
    /// The guest's own disks are copied, and what it writes meanwhile.
    CopyDisks,
    /// Rounds until the policy is content.
    CopyRam,
    /// The source is paused; the last pages and the device state move.
    SwitchOver,
    /// The destination owns the guest.
    Commit,
    /// The guest runs on the destination, the rest of its RAM follows.
    PostCopy,
    /// The source's QEMU goes.
    Retire,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// Since the copy began, in ms.
    pub elapsed_ms: u64,
    /// The pre-copy round.
    pub round: u32,
    /// Guest RAM, in bytes.
    pub total: u64,
    /// Still to be sent in this round, in bytes.
    pub remaining: u64,
    /// Sent over the link, in bytes.
    pub sent: u64,
    /// How fast the guest makes pages stale, in bytes a second.
    pub dirty_rate: u64,
    /// What the link carries, in bytes a second.
    pub link_rate: u64,
    /// How much the guest is slowed down, in percent.
    pub throttle: u8,
}

/// The limits of a migration were changed while it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tuned {
    /// Since the copy began, in ms.
    pub elapsed_ms: u64,
    /// What is otherwise than before, in one line; empty when nothing is.
    pub text: String,
}

/// What a migration tells while it runs; the last one is `finished` or `failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum MigrationEvent {
    /// It waits for its turn.
    Queued {
        /// The how manyth it is of those that wait to go there, from 1.
        place: u32,
        /// What it waits for.
        text: String,
    },
    /// Which step began.
    Step {
        /// The step.
        step: Step,
    },
    /// Something worth telling the user.
    Note {
        /// One plain sentence.
        text: String,
    },
    /// What the policy has decided, and why.
    Decision {
        /// One line of words and numbers.
        text: String,
    },
    /// Its user has changed its limits.
    Tuned(Tuned),
    /// How far it is, several times a second.
    Progress(Progress),
    /// It is over and the guest runs on the destination.
    Finished(Box<Report>),
    /// It is over and the guest runs at the source, or as the problem says.
    Failed(Problem),
}

impl MigrationEvent {
    /// Nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Failed(_))
    }
}

/// How long one step took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StepTime {
    /// The step.
    pub step: Step,
    /// Its duration, in ms.
    pub ms: f64,
}

/// What a migration did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Its id.
    pub id: Uuid,
    /// The VM.
    pub vm: String,
    /// The source, as it calls itself.
    pub from: String,
    /// The destination, as it calls itself.
    pub to: String,
    /// The RAM engine.
    pub engine: String,
    /// Whose policy decided: `vmferry`, a baseline's name, or `script`.
    #[serde(default)]
    pub policy: String,
    /// Post-copy was used.
    pub post_copy: bool,
    /// The guest was paused before the first byte, since its QEMU loses track of what a running guest writes.
    pub paused_first: bool,
    /// From the request to the source's end, in ms.
    pub total_ms: f64,
    /// Nobody ran the guest, in ms: from the source's pause to the destination's word that it runs.
    pub downtime_ms: f64,
    /// How long that was expected to be when the guest was paused, where that could be told.
    #[serde(default)]
    pub predicted_downtime_ms: Option<f64>,
    /// What it was expected to do before it did, where that could be told.
    #[serde(default)]
    pub foretold: Option<Foretold>,
    /// The same as QEMU reckons it, where it does.
    pub qemu_downtime_ms: Option<u64>,
    /// Sent over the link, in bytes.
    pub sent: u64,
    /// Pages that went as differences from what was sent before.
    pub deltas: u64,
    /// How much that has saved, in bytes.
    pub saved_by_deltas: u64,
    /// How often the guest's disks were drained, where they go around the host's cache.
    #[serde(default)]
    pub drains: u32,
    /// How long that took at most, in ms.
    #[serde(default)]
    pub longest_drain_ms: f64,
    /// The guest's faults in post-copy, where the agents served them.
    #[serde(default)]
    pub faults: Option<Faults>,
    /// Pre-copy rounds.
    pub rounds: u32,
    /// The highest dirty rate of a round, in bytes a second; 0 when it is not known.
    pub dirty_rate: u64,
    /// The most the guest was slowed down, in percent.
    pub throttle: u8,
    /// What the policy decided, one line each; the first 200.
    #[serde(default)]
    pub decisions: Vec<String>,
    /// How its user changed its limits while it ran.
    #[serde(default)]
    pub tuned: Vec<Tuned>,
    /// How long each step took.
    pub steps: Vec<StepTime>,
    /// The disks that moved with the guest.
    #[serde(default)]
    pub disks: Vec<DiskMoved>,
}

/// A disk that moved with its guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskMoved {
    /// The disk, as its user calls it.
    pub disk: String,
    /// Its size, in bytes.
    pub size: u64,
    /// What was sent of it, in bytes; zeroes and holes do not count.
    pub sent: u64,
}

/// How long a guest waited for pages in post-copy, from when the destination's agent heard of a fault until the page was
/// there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Faults {
    /// How often.
    pub count: u64,
    /// Half of them took no longer, in ms.
    pub median_ms: f64,
    /// 99 of 100 took no longer, in ms.
    pub p99_ms: f64,
}

impl Report {
    /// How the RAM was copied, in the field's words.
    pub fn method(&self) -> &'static str {
        match (self.post_copy, self.paused_first) {
            (false, _) => "pre-copy",
            (true, false) => "pre-copy, then post-copy",
            (true, true) => "post-copy from the first byte",
        }
    }
}

/// A migration as the source's agent knows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MigrationView {
    /// Its id.
    pub id: Uuid,
    /// The VM.
    pub vm: String,
    /// The destination as the user gave it.
    pub to: String,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// `queued`, or the step in the journal: `prepare`, `copy-ram`, `commit`, `post-copy`, `retire`, `done`, `abandoned`.
    pub step: String,
    /// How it ended, or what keeps it from ending.
    pub outcome: Option<String>,
}
