//! QEMU's own migration: its commands, parameters and figures. QEMU describes them in qapi/migration.json.

use super::{Command, Deserialize, Nothing, Serialize, Value, commands};
use crate::qmp::MigrationStatus;

commands! {
    /// How the migration stands, on either side.
    QueryMigrate {} = "query-migrate" -> MigrationInfo;
    /// Which means of migration this QEMU knows, and which are switched on.
    QueryMigrateCapabilities {} = "query-migrate-capabilities" -> Vec<CapabilityState>;
    /// Switches means on and off. QEMU checks them together and takes all or none.
    MigrateSetCapabilities {
        /// Those to change.
        capabilities: Vec<CapabilityState>,
    } = "migrate-set-capabilities" -> Nothing;
    /// What [`MigrationParameters`] are set to.
    QueryMigrateParameters {} = "query-migrate-parameters" -> MigrationParameters;
    /// Starts migrating; returns at once.
    Migrate {
        /// Where the destination waits, such as `tcp:192.0.2.1:4444`.
        uri: String,
        /// True to go on with a post-copy that lost its connection.
        #[serde(skip_serializing_if = "Option::is_none")]
        resume: Option<bool>,
    } = "migrate" -> Nothing;
    /// Goes on with the device state; only in the state that is named, such as `pre-switchover`.
    MigrateContinue {
        /// That state.
        state: String,
    } = "migrate-continue" -> Nothing;
    /// Listens for a guest; only for a QEMU started with `-incoming defer`.
    MigrateIncoming {
        /// Where to listen.
        uri: String,
    } = "migrate-incoming" -> Nothing;
    /// Cancels; the status tells when that is done.
    MigrateCancel {} = "migrate_cancel" -> Nothing;
    /// Turns to post-copy.
    MigrateStartPostcopy {} = "migrate-start-postcopy" -> Nothing;
    /// Listens again on the destination, for a post-copy that lost its connection.
    MigrateRecover {
        /// Where to listen.
        uri: String,
    } = "migrate-recover" -> Nothing, out_of_band = true;
    /// Breaks a post-copy's connection, so that it can be recovered.
    MigratePause {} = "migrate-pause" -> Nothing, out_of_band = true;
    /// Has the guest's network cards tell the switches where they are now. Times are in ms.
    AnnounceSelf {
        /// Before the second round.
        initial: u64,
        /// The longest between two rounds.
        max: u64,
        /// How many.
        rounds: u64,
        /// How much longer each wait is than the one before.
        step: u64,
    } = "announce-self" -> Nothing;
}

/// One means of migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityState {
    /// Its name, such as `postcopy-ram`.
    pub capability: String,
    /// Switched on.
    pub state: bool,
}

/// Settings of QEMU's migration; as a command (`migrate-set-parameters`) it changes those that are given. A parameter
/// that this QEMU lacks is refused, so ask [`Features`](crate::Features) first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationParameters {
    /// The most to send in pre-copy, in bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// The longest pause at switchover that is aimed at, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// The most to send ahead in post-copy, in bytes a second; 0 for no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<u64>,
    /// How fast the link is, for predicting the switchover, in bytes a second; 0 to measure (8.2 and newer).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<u64>,
    /// Connections of multifd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u8>,
    /// How multifd compresses: `none`, `zlib`, `zstd` and what newer QEMUs add.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<String>,
    /// Who looks for pages of zeroes: `none`, `legacy` (the one thread of old) or `multifd` (9.0 and newer).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_page_detection: Option<String>,
    /// What auto-converge first takes from the guest's CPUs, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<u8>,
    /// What it adds in each step, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<u8>,
    /// The most that it takes, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<u8>,
    /// It throttles when the guest writes more than this share of what a round sends, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_trigger_threshold: Option<u8>,
    /// The id of the TLS credentials for the streams; empty for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_creds: Option<String>,
    /// Before the second round of announcing, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_initial: Option<u64>,
    /// The longest between two rounds, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_max: Option<u64>,
    /// How many rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_rounds: Option<u64>,
    /// How much longer each wait is than the one before, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_step: Option<u64>,
}

impl Command for MigrationParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Nothing;
}

/// Answer to [`QueryMigrate`]. Everything is absent before the first migration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// Where it stands; absent when none was started.
    pub status: Option<MigrationStatus>,
    /// Why it failed, or why post-copy paused.
    pub error_desc: Option<String>,
    /// Since it began, in ms.
    pub total_time: Option<u64>,
    /// How long the guest was paused, in ms, once it is over.
    pub downtime: Option<u64>,
    /// How long the pause is expected to be, in ms, before it is.
    pub expected_downtime: Option<u64>,
    /// How long making ready took, in ms.
    pub setup_time: Option<u64>,
    /// What happens to the guest's RAM; on the source only.
    pub ram: Option<RamInfo>,
    /// What auto-converge takes from the guest's CPUs, in percent.
    pub cpu_throttle_percentage: Option<u64>,
    /// Why this guest cannot be migrated at all.
    pub blocked_reasons: Option<Vec<String>>,
    /// How long post-copy kept any of the guest's CPUs waiting, in ms, with the capability `postcopy-blocktime`.
    pub postcopy_blocktime: Option<u64>,
    /// The same for each CPU, in ms.
    pub postcopy_vcpu_blocktime: Option<Vec<u64>>,
    /// Where the destination listens.
    pub socket_address: Option<Vec<SocketAddress>>,
}

/// What happened to the guest's RAM so far.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// Sent, in bytes.
    pub transferred: u64,
    /// Not sent yet, or written since, in bytes.
    pub remaining: u64,
    /// Of the guest, in bytes.
    pub total: u64,
    /// Pages that held one repeated byte.
    pub duplicate: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// Pages sent whole, in bytes.
    pub normal_bytes: u64,
    /// Pages that the guest writes each second, as of the last round.
    pub dirty_pages_rate: u64,
    /// What is being sent, in Mbit/s.
    pub mbps: f64,
    /// How often the dirty pages were collected: rounds begun.
    pub dirty_sync_count: u64,
    /// Pages that the destination asked for in post-copy.
    pub postcopy_requests: u64,
    /// In bytes.
    pub page_size: Option<u64>,
    /// Sent over multifd's connections, in bytes.
    pub multifd_bytes: u64,
    /// Pages sent each second.
    pub pages_per_second: u64,
    /// Sent in pre-copy, in bytes (7.0 and newer).
    pub precopy_bytes: Option<u64>,
    /// Sent while the guest was paused, in bytes (7.0 and newer).
    pub downtime_bytes: Option<u64>,
    /// Sent in post-copy, in bytes (7.0 and newer).
    pub postcopy_bytes: Option<u64>,
}

/// Where QEMU listens. Open: what it is tells `kind`, and a new kind brings fields that we do not know.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SocketAddress {
    /// `inet`, `unix`, `vsock` or `fd`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of `inet`.
    pub host: Option<String>,
    /// Of `inet` and `vsock`.
    pub port: Option<String>,
    /// Of `unix`.
    pub path: Option<String>,
    /// Anything else.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

impl SocketAddress {
    /// The port, when it is a TCP one.
    pub fn tcp_port(&self) -> Option<u16> {
        (self.kind == "inet").then_some(self.port.as_deref()?)?.parse().ok()
    }
}
