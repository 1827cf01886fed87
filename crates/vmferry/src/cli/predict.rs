//! What can be asked before a migration.

use std::time::Duration;

use clap::Args;

use super::duration;
use super::how::How;

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
    #[command(flatten)]
    pub how: How,
    /// How long the guest is watched, in seconds or as a time such as 500ms; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value = "3", allow_hyphen_values = true, value_parser = seconds)]
    pub watch: Duration,
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
