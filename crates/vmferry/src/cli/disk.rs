//! What can be said of disks.

use clap::{Args, Subcommand};

use super::rate;

#[derive(Subcommand)]
pub(crate) enum Disk {
    /// List a VM's disks and where they are
    List {
        /// The VM's name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Move a disk to another place, while its VM runs or not
    #[command(after_long_help = "\
Examples:
  vmferry disk move web1 virtio0 --to /srv/fast/web1.raw
  vmferry disk move web1 virtio0 --to /srv/web1.qcow2 --format qcow2
  vmferry disk move web1 virtio0 --to /dev/vg0/web1
  vmferry disk move web1 virtio0 --to nbd://storage.example/web1
  vmferry disk move web1 virtio0 --to iscsi://storage.example/iqn.2026-11.example:web1/1

A file is made and must not be there; all else must be there and be as large as the disk, and what is on it is lost.
The guest runs on meanwhile, from the old place until all of it is at the new one. Ctrl-C cancels: the disk stays where
it was, and what was made is removed.")]
    Move(DiskMoveOptions),
    /// Cancel the move of a disk; it stays where it was
    Cancel {
        /// The VM's name
        name: String,
        /// The disk, as `vmferry disk list` names it
        disk: String,
    },
}

#[derive(Args)]
pub(crate) struct DiskMoveOptions {
    /// The VM's name
    pub name: String,
    /// The disk, as `vmferry disk list` names it, or where it is
    pub disk: String,
    /// A path that begins with /, nbd://, nbd+unix://, iscsi://, nfs:// or rbd:POOL/IMAGE
    #[arg(long, value_name = "TARGET")]
    pub to: String,
    /// raw or qcow2 [default: as it is now for a file, otherwise raw]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Copy no faster than this
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// Delete the old file when the guest uses the new place
    #[arg(long)]
    pub delete_source: bool,
    /// Print JSON, one line each time it got on; the last one tells how it ended
    #[arg(long)]
    pub json: bool,
}
