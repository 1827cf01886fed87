//! Other limits for a migration that is under way.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::migration::Prefer;

/// Change these limits of a migration that is under way; what is not named stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TuneRequest {
    /// For how long nobody may run the guest at switchover, in ms.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// When the migration should be over, in ms since its copy began; 0: whenever.
    #[serde(default)]
    pub max_time_ms: Option<u64>,
    /// The most that may be sent, in bytes a second; 0: as fast as the link carries.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Post-copy may be used.
    #[serde(default)]
    pub post_copy: Option<bool>,
    /// What matters more.
    #[serde(default)]
    pub prefer: Option<Prefer>,
}
