//! The agent: one per host. It starts and keeps VMs, takes and hands over guests, and serves the API.
//!
//! Where to find what, from the bottom up: `host` the VMs of this host, `journal` what must not be forgotten; `engine`
//! what copies RAM; `peers` other agents; `measuring` what only measurements need; `source` the source's side of a
//! migration, `destination` the destination's; `recovery` what an agent does with what its predecessor left; `api` the
//! routes. No module imports one that imports it.

mod agent;
mod api;
pub mod config;
mod destination;
pub mod engine;
pub mod error;
mod host;
pub mod journal;
mod measuring;
pub mod peers;
mod recovery;
mod server;
mod source;

pub use api::openapi;
pub use server::{ServeError, serve};
