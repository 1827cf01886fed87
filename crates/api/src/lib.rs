//! The agent's local API, from the side of whoever uses it: what is said over its Unix socket, in JSON, and the
//! [`client`] that says it. The routes that answer are the agent's.
//!
//! Also what whoever measures needs on both ends of a connection: the words of a [`witness`], and a [`trial`] of a link.

pub mod client;
mod copy;
mod disk;
mod migration;
mod peers;
mod prediction;
mod problem;
mod queue;
mod settings;
pub mod trial;
mod tune;
mod vm;
mod vm_move;
pub mod witness;

pub use copy::{CopyBegun, CopyEvent, CopyProgress, CopyReport, CopyRequest};
pub use disk::{DiskMoveRequest, DiskMoveState, DiskMoveView, DiskView};
pub use migration::{
    Begun, DiskMoved, EngineName, Faults, Means, MigrateRequest, MigrationEvent, MigrationView, PlanView, Prefer,
    Progress, Report, Script, Step, StepTime, Tuned,
};
pub use peers::{Hello, PairRequest, PeerView, PeersView, TokenRequest, TokenView};
pub use prediction::{
    Expected, Foretold, Made, PredictionView, USUAL_WATCH_MS, WATCH_MS, WatchedView, Watcher, WrittenWithin,
};
pub use problem::{Code, Problem, in_one_line};
pub use queue::{ManyBegun, MigrateManyRequest, RefusedVm};
pub use settings::{DEFAULT_PORT, Listen, Rate, Security};
pub use trial::TrialRequest;
pub use tune::TuneRequest;
pub use vm::{AdoptRequest, Autostart, Resolve, RunRequest, StartRequest, Started, StopRequest, VmSpec, VmView};
pub use vm_move::{VmMoveDisk, VmMoveRequest, VmMoveState, VmMoveView};
