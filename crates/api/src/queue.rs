//! Several migrations that are asked for at once.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::migration::{Begun, MigrateRequest};
use crate::problem::Problem;

/// Migrate these VMs, each as soon as the link is free for it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MigrateManyRequest {
    /// Their names.
    pub vms: Vec<String>,
    /// How and to where. The bandwidth is for all of them together.
    pub how: MigrateRequest,
}

/// All were planned, and those that can go were queued in this order, unless it was a dry run.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ManyBegun {
    /// Those that can go.
    pub begun: Vec<Begun>,
    /// The others, and why.
    pub refused: Vec<RefusedVm>,
}

/// A VM that cannot go.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RefusedVm {
    /// Its name.
    pub vm: String,
    /// Why.
    pub problem: Problem,
}
