//! What can be asked before a migration.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use vmferry_api::{EngineName, Prefer};

use super::{duration, place, rate};

pub(super) const PREDICT_HELP: &str = "\
Examples:
  vmferry predict web1 --to beta
  vmferry predict web1 --to beta --watch 30 --downtime 50ms --no-post-copy

Everything is checked as before a migration. Then the link is tried for a second, and the running guest is watched: the
agent tracks which of its pages are written. That costs it a short wait for the kernel for each page that it writes, once;
how many those were is told. With what was seen the migration is played, by what would decide about it. Nothing is touched
on the other host, no memory is sent, and nothing remains.

Each figure is what is likeliest, and from what to what it may turn out: for a guest that goes on as it was seen. What came
of earlier migrations to that host is taken into account.";

#[derive(Args)]
pub(crate) struct PredictOptions {
    /// The VM's name
    pub name: String,
    /// The destination: a peer's name, its address, or ssh://[USER@]HOST[:PORT] to pair with it over ssh first
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// How long the guest is watched, in seconds or as a time such as 500ms; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value = "3", allow_hyphen_values = true, value_parser = seconds)]
    pub watch: Duration,
    /// For how long nobody may run the guest at switchover
    #[arg(long, value_name = "TIME", default_value = "300ms", allow_hyphen_values = true, value_parser = duration)]
    pub downtime: Duration,
    /// It is to be done by then
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = duration)]
    pub max_time: Option<Duration>,
    /// It is to send no faster than this [default: as fast as the link carries]
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// Without post-copy
    #[arg(long)]
    pub no_post_copy: bool,
    /// What matters more: that it is soon over (short), or that the guest feels little of it (gentle)
    #[arg(long, value_name = "WHAT", default_value = "short")]
    pub prefer: Prefer,
    /// Who would move the memory: external (the agents) or qemu (QEMU itself) [default: as this host's agent is configured]
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<EngineName>,
    /// I know that the VM's disks are the same on both hosts, also where vmferry cannot tell
    #[arg(long)]
    pub disks_are_shared: bool,
    /// Where a disk is to be there, as of `vmferry migrate`
    #[arg(long = "disk", value_name = "NAME=PATH", value_parser = place)]
    pub disks: Vec<(String, PathBuf)>,
    /// Say each decision that is to be expected
    #[arg(long, short)]
    pub verbose: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A number of seconds, or a time with its unit.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| "give some seconds, such as 3".into()),
        Err(_) => duration(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_so_many_seconds_or_a_time_and_nothing_negative() {
        assert_eq!(seconds("3"), Ok(Duration::from_secs(3)));
        assert_eq!(seconds("0.5"), seconds("500ms"));
        for bad in ["-1", "nan", "inf", "", "soon"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
