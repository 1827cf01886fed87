//! `vmferry sim`: what can be asked of the simulator.

use std::path::PathBuf;

use clap::Args;
use vmferry_api::Prefer;

pub(crate) const SIM_HELP: &str = "\
Examples:
  vmferry sim                                       a table of all policies over 1000 cases
  vmferry sim --cases 20000 --hindsight --policy vmferry,vmferry-qemu
  vmferry sim --page policies.html                  the same as a page, too
  vmferry sim --published                           KubeVirt's trial of VEP 291
  vmferry sim --trace web1.json --cases 20          a guest that was recorded by `vmferry migrate --record web1.json`
  vmferry sim --seed 86 --replay --policy vmferry   one case, each decision in a line

Nothing is migrated, and no agent is needed. Guests, links and engines are models: docs/POLICY.md says what of them was
measured. Pairs are the median and the 95th percentile of the migrations that were completed.";

#[derive(Args)]
pub(crate) struct SimOptions {
    /// How many cases
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    pub cases: u64,
    /// The first case; each has a seed of its own, one more than the one before
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// Only these policies, by name
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub policy: Vec<String>,
    /// Compare with the best of all simple plans, known only afterwards; takes some fifty times as long
    #[arg(long)]
    pub hindsight: bool,
    /// KubeVirt's published trial instead: each case is one run of it
    #[arg(long)]
    pub published: bool,
    /// The guest that was recorded in this file by `vmferry migrate --record` or `vmferry predict --json`, over its link
    #[arg(long, value_name = "FILE", conflicts_with = "published")]
    pub trace: Option<PathBuf>,
    /// Show the first case, decision by decision
    #[arg(long)]
    pub replay: bool,
    /// For how long nobody may run the guest at switchover
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = super::duration)]
    pub downtime: std::time::Duration,
    /// Be done by then
    #[arg(long, value_name = "TIME", value_parser = super::duration)]
    pub max_time: Option<std::time::Duration>,
    /// Post-copy is not allowed
    #[arg(long)]
    pub no_post_copy: bool,
    /// The guest may be slowed down by this share at most, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub slow: u8,
    /// What matters more: short or gentle
    #[arg(long, value_name = "WHAT", default_value = "short")]
    pub prefer: Prefer,
    /// Write the table there as a page, with charts: one HTML file that needs nothing else
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    pub page: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
