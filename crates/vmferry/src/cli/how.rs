//! How a running VM is to get to another host: what a migration and its prediction are asked with.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use vmferry_api::{EngineName, Prefer};

use super::{duration, place, rate};

#[derive(Args)]
pub(crate) struct How {
    /// The destination: a peer's name, its address, or ssh://[USER@]HOST[:PORT] to pair with it over ssh first
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// For how long nobody may run the guest at switchover
    #[arg(long, value_name = "TIME", default_value = "300ms", allow_hyphen_values = true, value_parser = duration)]
    pub downtime: Duration,
    /// Be done by then: post-copy starts early enough; without post-copy, give up
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = duration)]
    pub max_time: Option<Duration>,
    /// Send no faster than this, all together [default: as fast as the link carries]
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// Never run the guest on the destination before all of its memory is there
    #[arg(long)]
    pub no_post_copy: bool,
    /// What matters more: that it is soon over (short), or that the guest feels little of it (gentle)
    #[arg(long, value_name = "WHAT", default_value = "short")]
    pub prefer: Prefer,
    /// Who moves the memory: external (the agents) or qemu (QEMU itself) [default: as this host's agent is configured]
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<EngineName>,
    /// I know that the VM's disks are the same on both hosts, also where vmferry cannot tell
    #[arg(long)]
    pub disks_are_shared: bool,
    /// Where a disk is to be there: its name as `vmferry disk list` has it, and an absolute path; may be given for several.
    /// It is copied, into a new file, or to a block device of its size, which is overwritten
    #[arg(long = "disk", value_name = "NAME=PATH", value_parser = place)]
    pub disks: Vec<(String, PathBuf)>,
}
