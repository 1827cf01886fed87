//! The agent: one per host. It starts and keeps VMs, takes and hands over guests, and serves the API.
//!
//! Where to find what, from the bottom up: `host` the VMs of this host, `journal` what must not be forgotten; `engine`
//! what copies RAM; `peers` other agents; `measuring` what only measurements need; `known` what need not be sent here; `copying` images that no guest runs
//! from; `disk_moves` disks that get another place on this host; `source` the source's side of a migration, `queue` those that wait
//! for their turn, `destination` the destination's; `vm_moves` VMs that move while they do not run; `recovery` what an agent does with what its predecessor left; `api` the routes. No module imports one
//! that imports it.

mod agent;
mod api;
pub mod config;
mod copying;
mod destination;
mod disk_moves;
pub mod engine;
pub mod error;
mod host;
pub mod journal;
mod known;
mod measuring;
pub mod peers;
mod queue;
mod recovery;
mod server;
mod shown;
mod source;
mod vm_moves;

pub use api::openapi;
pub use server::{ServeError, serve};
