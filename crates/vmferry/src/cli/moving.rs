//! What can be said of VMs that move while they do not run.

use std::path::PathBuf;

use clap::Args;

use super::{place, rate};

pub(super) const MOVE_HELP: &str = "\
Examples:
  vmferry stop web1 --keep
  vmferry move web1 --to beta --dry-run
  vmferry move web1 --to beta
  beta# vmferry start web1
  vmferry move web1 --to beta --disk virtio0=/srv/fast/web1.raw

Disks that both hosts see stay where they are; the others are copied, thin and verified, to the same paths, which have
to be in folders that image_folders names in the other agent's configuration. When all of it is there the VM is the other
host's: it is known there, and here no more. Its images stay here.

Until then it is this host's, as it was. Whatever ends a move, the same command goes on with it. Ctrl-C cancels; `vmferry
stop NAME` on the other host then removes what was copied. A VM that runs is moved by `vmferry migrate`.";

#[derive(Args)]
pub(crate) struct MoveOptions {
    /// The VM's name
    pub name: String,
    /// The other host: a peer's name, its address, or ssh://[USER@]HOST[:PORT] to pair with it over ssh first
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// Check everything and say what would be copied; touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Send no faster than this [default: as fast as the link carries]
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// I know that the VM's disks are the same on both hosts, also where vmferry cannot tell
    #[arg(long)]
    pub disks_are_shared: bool,
    /// Where a disk is to be there: its name as `vmferry disk list` has it, and an absolute path; may be given for several
    #[arg(long = "disk", value_name = "NAME=PATH", value_parser = place)]
    pub disks: Vec<(String, PathBuf)>,
    /// Print JSON, one line each time it got on; the last one tells how it ended
    #[arg(long)]
    pub json: bool,
}
