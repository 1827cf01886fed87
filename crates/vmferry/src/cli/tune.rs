//! What can be changed of a migration that is under way.

use clap::{ArgGroup, Args};
use vmferry_api::Prefer;

use super::{duration, rate};

pub(super) const TUNE_HELP: &str = "\
Examples:
  vmferry tune web1 --bandwidth none --downtime 1s      it is night, and nobody waits for web1
  vmferry tune web1 --max-time 10m                      since its copy began; post-copy starts early enough
  vmferry tune web1 --no-post-copy

What is not named stays. It answers when the limits hold; the next decision is made within them, and `vmferry migrate`
and its report tell when they were changed. From the switchover on, and once post-copy has begun, nothing can be changed.
Post-copy can be allowed later only where the migration was set up for it: the agents always are, QEMU is unless it began
with --no-post-copy.";

#[derive(Args)]
#[command(group = ArgGroup::new("limits").required(true).multiple(true))]
pub(crate) struct TuneOptions {
    /// The VM's name
    pub name: String,
    /// For how long nobody may run the guest at switchover
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = duration, group = "limits")]
    pub downtime: Option<std::time::Duration>,
    /// Be done by then, counted from when the copy began; none: whenever
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = time_or_none, group = "limits")]
    pub max_time: Option<std::time::Duration>,
    /// Send no faster than this; none: as fast as the link carries
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate_or_none, group = "limits")]
    pub bandwidth: Option<u64>,
    /// Running the guest on the destination before all of its memory is there is allowed
    #[arg(long, conflicts_with = "no_post_copy", group = "limits")]
    pub post_copy: bool,
    /// It is not
    #[arg(long, group = "limits")]
    pub no_post_copy: bool,
    /// What matters more: that it is soon over (short), or that the guest feels little of it (gentle)
    #[arg(long, value_name = "WHAT", group = "limits")]
    pub prefer: Option<Prefer>,
}

/// Zero is none to the agent, and so is nothing that a user means.
fn time_or_none(text: &str) -> Result<std::time::Duration, String> {
    match text {
        "none" => Ok(std::time::Duration::ZERO),
        _ => duration(text).and_then(|time| match time.as_millis() {
            0 => Err("that is no time at all; give one such as 10m, or none".into()),
            _ => Ok(time),
        }),
    }
}

fn rate_or_none(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        _ => rate(text).and_then(|rate| match rate {
            0 => Err("nothing would be sent; give a rate such as 100MiB/s, or none".into()),
            _ => Ok(rate),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_lifts_a_limit_and_zero_is_refused() {
        assert_eq!(time_or_none("none"), Ok(std::time::Duration::ZERO));
        assert_eq!(rate_or_none("none"), Ok(0));
        assert_eq!(rate_or_none("1MiB/s"), Ok(1 << 20));
        for refused in [time_or_none("0s").map(drop), rate_or_none("0").map(drop), rate_or_none("soon").map(drop)] {
            assert!(refused.is_err());
        }
    }
}
