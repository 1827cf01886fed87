//! What one measured migration was and did: the report that `vmferry bench run` writes, as a type.
//!
//! docs/REPORT.md describes it for readers, docs/report.schema.json for programs; the latter is made from these types and
//! a test keeps it so. Times are in ms from when the migration was asked for, by the host's monotonic clock: what lies
//! before, the warm-up, is negative. Sizes are in bytes, rates in bytes a second, shares of a processor in percent of
//! one processor. What could not be known is absent, never zero.

pub mod guestperf;
mod reading;
mod recording;
mod words;

pub(crate) use words::size;

pub use reading::{ReadError, read, read_text};
pub use recording::Recorder;
pub(crate) use recording::ms_since;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tells a report from other JSON.
pub const FORMAT: &str = "vmferry-migration";
/// Of the schema. It goes up when an older reader would misunderstand a newer report; fields may be added without.
pub const VERSION: u32 = 1;

/// One measured migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunReport {
    /// Always `vmferry-migration`.
    pub format: String,
    /// Of the schema: 1.
    pub version: u32,
    /// What wrote it, such as `vmferry 0.1.0`.
    pub made_by: String,
    /// What it was taken from.
    pub origin: Origin,
    /// When the migration was asked for, in seconds since 1970.
    pub started: u64,
    /// What it ran on; absent when that is not known. Of two machines, the source's.
    pub hardware: Option<Hardware>,
    /// The destination's, when it is another machine and told.
    pub destination_hardware: Option<Hardware>,
    /// How far both hosts' clocks can be compared, when they are two machines.
    pub clocks: Option<Clocks>,
    /// Of the programs that took part.
    pub versions: Versions,
    /// Everything that was chosen.
    pub settings: Settings,
    /// How it ended.
    pub outcome: Outcome,
    /// What it comes to.
    pub summary: Summary,
    /// Whether the guest's memory arrived as it was.
    pub page_check: PageCheck,
    /// Whether what the scenario is about really acted.
    pub levers: Vec<Lever>,
    /// Pre-copy's rounds, oldest first.
    pub rounds: Vec<Round>,
    /// What happened when.
    pub marks: Vec<Mark>,
    /// What was seen over time.
    pub samples: Samples,
    /// What a reader should know, one plain sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What its policy decided, and why, one line each; nothing where none decided.
    #[serde(default)]
    pub decisions: Vec<String>,
}

/// What a report was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A measurement with the measuring guest.
    Bench,
    /// The migration of a real VM.
    Migrate,
    /// A report of QEMU's guestperf.
    Guestperf,
}

/// What a run stood on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Hardware {
    /// Of the processor.
    pub model: String,
    /// Processors that could be used.
    pub processors: usize,
    /// Memory of the host, in bytes.
    pub ram: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Both hosts were this one machine.
    pub one_machine: bool,
}

/// How far the monotonic clocks of two hosts can be compared, from questions and answers between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Clocks {
    /// A moment on the other host is known to within so much, in ms: half of what the fastest answer took, in the stretch of
    /// 10 s in which that was slowest.
    pub error_ms: f64,
    /// How much one clock went faster than the other in the time of the measurement, in ms.
    pub drift_ms: f64,
    /// Answers that this is from.
    pub answers: u64,
}

/// Of the programs that took part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Versions {
    /// The source's QEMU.
    pub source_qemu: Option<String>,
    /// The destination's.
    pub destination_qemu: Option<String>,
    /// `kvm` or `tcg`.
    pub accelerator: Option<String>,
    /// The exact machine type.
    pub machine: Option<String>,
}

/// Everything that was chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    /// The scenario's name; for a real VM, the VM's.
    pub scenario: String,
    /// What the scenario is about, in a sentence.
    #[serde(default)]
    pub about: String,
    /// `external`: the agents moved the RAM; `qemu`: QEMU did.
    pub engine: String,
    /// Who decided: `scenario` (what it says, step by step) or `vmferry` (its policy).
    pub driver: String,
    /// The guest's processors.
    pub vcpus: u32,
    /// The guest's RAM, in bytes.
    pub ram: u64,
    /// What the guest rewrote of it, in bytes.
    pub written: Option<u64>,
    /// How it did: `idle`, `write`, `random` or `hotcold`.
    pub guest_mode: Option<String>,
    /// How fast at most, in bytes a second; absent: as fast as it goes.
    pub guest_rate: Option<u64>,
    /// What its pages held: `random` or `text`.
    pub guest_fill: Option<String>,
    /// What carried it: `link` (between two hosts), `tcp` or `unix` (within one).
    pub transport: String,
    /// The destination, when it is another machine.
    pub to: Option<String>,
    /// What the link was shaped to, in bits a second.
    pub link_bits: Option<u64>,
    /// What the link really carried before the run, in bytes a second.
    pub link_measured: Option<u64>,
    /// The most that might be sent, in bytes a second.
    pub bandwidth: Option<u64>,
    /// The longest pause at switchover that was aimed at, in ms.
    pub downtime_limit_ms: u64,
    /// Not completed when it took more rounds.
    pub most_rounds: Option<u32>,
    /// Not completed when it took longer, in ms.
    pub most_time_ms: Option<u64>,
    /// The guest was encrypted on its way.
    pub encrypted: Option<bool>,
    /// Turn to post-copy after so many rounds.
    pub post_copy_after: Option<u32>,
    /// Pause the guest after so many rounds.
    pub pause_after: Option<u32>,
    /// QEMU's migration capabilities that were on.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// QEMU's migration parameters that the scenario set.
    #[serde(default)]
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// How long the guest was watched before and after, in ms.
    #[serde(default)]
    pub watched_ms: [u64; 2],
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "end")]
pub enum Outcome {
    /// The guest runs on the destination.
    Completed,
    /// It was stopped, or failed; the guest runs on at the source unless the reason says otherwise.
    NotCompleted {
        /// Why, in plain words.
        reason: String,
    },
}

impl Outcome {
    /// The guest runs on the destination.
    pub fn is_completed(&self) -> bool {
        *self == Self::Completed
    }
}

/// What a run comes to. Of a migration that did not complete there are no times.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// From the wish to the end of it all, in ms.
    pub total_ms: Option<f64>,
    /// Of that, copying the RAM and switching over, in ms.
    pub ram_ms: Option<f64>,
    /// How long nobody ran the guest, by its heartbeat, in ms.
    pub downtime_ms: Option<f64>,
    /// The same as QEMU or the agents reckon it, in ms.
    pub downtime_told_ms: Option<f64>,
    /// The longest that the guest's heart stood still besides, in ms.
    pub worst_stall_ms: Option<f64>,
    /// The longest that a thread of the guest took to rewrite 64 MiB since the beginning, in ms.
    pub worst_64_mib_ms: Option<f64>,
    /// What the guest rewrote before the migration, in bytes a second.
    pub speed_before: Option<f64>,
    /// What it rewrote from the beginning to the end of it.
    pub speed_during: Option<f64>,
    /// What it rewrote after it.
    pub speed_after: Option<f64>,
    /// Sent, in bytes.
    pub sent: Option<u64>,
    /// Pre-copy's rounds.
    pub rounds: Option<u32>,
    /// Post-copy was used.
    pub post_copy: Option<bool>,
    /// Pages that post-copy had to fetch at once, where that is counted.
    pub post_copy_faults: Option<u64>,
    /// The most that the guest was slowed down on purpose, in percent.
    pub throttle: Option<u8>,
    /// Processor time while it lasted, in seconds, of the source's QEMU but for its vCPUs.
    pub source_qemu_cpu_s: Option<f64>,
    /// Of the destination's.
    pub destination_qemu_cpu_s: Option<f64>,
    /// Of the source's agent.
    pub source_agent_cpu_s: Option<f64>,
    /// Of the destination's.
    pub destination_agent_cpu_s: Option<f64>,
    /// Other programs used more of the host than a fair measurement allows.
    #[serde(default)]
    pub host_was_busy: bool,
}

/// Whether the guest's memory is what it last wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum PageCheck {
    /// Each page was looked at and right.
    Intact {
        /// How many.
        pages: u64,
    },
    /// Some were stale or torn, or the guest's kernel crashed.
    Damaged {
        /// What is known of it, in plain words.
        detail: String,
    },
    /// It was not looked at.
    NotChecked {
        /// Why, in plain words.
        reason: String,
    },
}

/// Whether something that the scenario is about really acted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Lever {
    /// What, such as `post-copy`.
    pub name: String,
    /// It did.
    pub acted: bool,
    /// What tells so, in plain words.
    pub evidence: String,
}

/// One round of pre-copy, as it stood when it began; and when it ended, how long it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Round {
    /// From 1.
    pub round: u32,
    /// When it began, in ms.
    pub at_ms: f64,
    /// How long it took, in ms.
    pub ms: f64,
    /// What it had to send, in bytes.
    pub remaining: u64,
    /// How fast the guest wrote, as of the round before, in bytes a second.
    pub dirty_rate: u64,
    /// What was sent in it, in bytes a second.
    pub link_rate: u64,
    /// The most that the guest was slowed down in it, in percent.
    pub throttle: u8,
}

/// What happened at a moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Mark {
    /// When, in ms.
    pub at_ms: f64,
    /// What.
    pub what: MarkKind,
}

/// See [`Mark`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MarkKind {
    /// Copying the RAM began.
    Copy,
    /// A scenario paused the guest.
    Paused,
    /// Post-copy was turned to.
    PostCopy,
    /// The guest was last heard of on the source.
    Left,
    /// It was first heard of on the destination.
    Arrived,
    /// The migration was stopped.
    Cancelled,
    /// It was over.
    End,
}

/// What was seen over time, each list oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Samples {
    /// How far the migration was.
    pub progress: Vec<ProgressSample>,
    /// Each 64 MiB that a thread of the guest rewrote.
    pub records: Vec<GuestRecord>,
    /// When the guest's heart stood still: waits for the next beat of 20 ms and more beyond the usual 5.
    pub stalls: Vec<Stall>,
    /// What processors did.
    pub cpu: Vec<CpuSample>,
}

/// How far a migration was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressSample {
    /// When, in ms.
    pub at_ms: f64,
    /// The round.
    pub round: u32,
    /// Still to be sent in this round, or in post-copy at all, in bytes.
    pub remaining: u64,
    /// Sent so far, in bytes.
    pub sent: u64,
    /// How fast the guest makes pages stale, in bytes a second; 0 while that is not known.
    pub dirty_rate: u64,
    /// What the link carries, in bytes a second.
    pub link_rate: u64,
    /// How much the guest is slowed down, in percent.
    pub throttle: u8,
}

/// So much memory was rewritten by one thread of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GuestRecord {
    /// When it was done, in ms.
    pub at_ms: f64,
    /// How long it took by the host's clock, in ms.
    pub ms: f64,
    /// How much, in bytes: 64 MiB, or 1 GiB in reports of guestperf.
    pub bytes: u64,
    /// The thread.
    pub thread: u32,
    /// 0: it ran on the source when that was done; 1: on the destination. Absent when not known.
    pub host: Option<u8>,
}

/// The guest's heart stood still.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Stall {
    /// Since when, in ms.
    pub at_ms: f64,
    /// How long beyond the time between two beats, in ms.
    pub ms: f64,
    /// It went to the other host meanwhile.
    pub switchover: bool,
}

/// What processors did in one stretch, in percent of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CpuSample {
    /// The stretch's end, in ms.
    pub at_ms: f64,
    /// Its length, in ms.
    pub ms: f64,
    /// The source's host, all processors together.
    pub host: Option<f64>,
    /// Programs there that have no part in the measurement.
    pub others: Option<f64>,
    /// The destination's host, when it is another machine; a sample is of one of the two then.
    pub destination_host: Option<f64>,
    /// Programs there that have no part in the measurement.
    pub destination_others: Option<f64>,
    /// The source's QEMU.
    pub source_qemu: Option<QemuCpu>,
    /// The destination's.
    pub destination_qemu: Option<QemuCpu>,
    /// The source's agent.
    pub source_agent: Option<f64>,
    /// The destination's.
    pub destination_agent: Option<f64>,
}

/// What the threads of a QEMU did, in percent of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct QemuCpu {
    /// Those that run the guest's processors.
    pub vcpu: f64,
    /// Those that migrate. A destination that takes RAM over one connection does so in its main thread, see `other`.
    pub migration: f64,
    /// All others, the main loop first of all.
    pub other: f64,
}

impl QemuCpu {
    /// All but what runs the guest.
    pub fn beside_the_guest(&self) -> f64 {
        self.migration + self.other
    }
}

impl RunReport {
    /// A report of this with nothing in it yet.
    pub fn new(origin: Origin, settings: Settings) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            made_by: concat!("vmferry ", env!("CARGO_PKG_VERSION")).into(),
            origin,
            started: seconds_since_1970(),
            hardware: None,
            destination_hardware: None,
            clocks: None,
            versions: Versions::default(),
            settings,
            outcome: Outcome::NotCompleted { reason: "it was not run".into() },
            summary: Summary::default(),
            page_check: PageCheck::NotChecked { reason: "the migration was not run".into() },
            levers: Vec::new(),
            rounds: Vec::new(),
            marks: Vec::new(),
            samples: Samples::default(),
            notes: Vec::new(),
            decisions: Vec::new(),
        }
    }

    /// For a file.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("a report is plain data");
        text.push('\n');
        text
    }

    /// When something happened, in ms.
    pub fn mark(&self, kind: MarkKind) -> Option<f64> {
        self.marks.iter().find(|mark| mark.what == kind).map(|mark| mark.at_ms)
    }

    /// Adds a mark, keeping them in the order of time.
    pub fn add_mark(&mut self, what: MarkKind, at_ms: f64) {
        let index = self.marks.partition_point(|mark| mark.at_ms <= at_ms);
        self.marks.insert(index, Mark { at_ms, what });
    }
}

/// The document that docs/report.schema.json is.
pub fn schema() -> String {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(RunReport)).expect("a schema is plain data");
    text.push('\n');
    text
}

fn seconds_since_1970() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_in_the_documentation_is_that_of_the_types() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/report.schema.json");
        if std::env::var_os("WRITE_SCHEMA").is_some() {
            std::fs::write(&path, schema()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(written == schema(), "run this test with WRITE_SCHEMA=1, and think of VERSION");
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let settings = Settings { scenario: "pause-after-5".into(), ram: 1 << 30, ..Settings::default() };
        let mut report = RunReport::new(Origin::Bench, settings);
        report.outcome = Outcome::Completed;
        report.page_check = PageCheck::Intact { pages: 5 };
        report.add_mark(MarkKind::End, 20.0);
        report.add_mark(MarkKind::Copy, 0.0);
        report.samples.cpu.push(CpuSample { source_qemu: Some(QemuCpu::default()), ..CpuSample::default() });
        assert_eq!(report.marks[0].what, MarkKind::Copy);
        assert_eq!(read_text(&report.to_json()).unwrap(), report);
    }
}
