//! `predict`: what a migration would do, in words; also for a dry run, and for a report that tells what was expected.

use vmferry_api::client::{Client, vm_path};
use vmferry_api::{Begun, Expected, Foretold, Made, PlanView, PredictionView, Watcher};

use crate::cli::PredictOptions;
use crate::failure::Failure;
use crate::request;
use crate::vms::{memory, print_json};

pub(crate) async fn run(client: &Client, options: PredictOptions) -> Result<(), Failure> {
    let request = request::prediction(client, options.how, options.watch).await?;
    let begun: Begun = client.post(&format!("{}/migration", vm_path(&options.name)), &request).await?;
    if options.json {
        print_json(&begun.plan);
        return Ok(());
    }
    let PlanView { vm, to, notes, prediction, .. } = &begun.plan;
    println!("{vm} to {to}, as it would be now; nothing was touched.");
    if let Some(prediction) = prediction {
        tell(prediction, to, options.verbose);
    }
    for note in notes {
        println!("  note         {note}");
    }
    Ok(())
}

/// What is expected, and from what.
pub(crate) fn tell(it: &PredictionView, to: &str, decisions: bool) {
    println!("  how          {}{}", it.method, or(&it.or));
    println!("  total        {}", range(&it.total_ms, time));
    println!("  downtime     {}", range(&it.downtime_ms, time));
    println!("  stall        {}", unless_none(&it.stall_ms));
    println!("  lost work    {}", unless_none(&it.lost_ms));
    println!("  at risk      {}", unless_none(&it.at_risk_ms));
    println!("  sent         {}", range(&it.sent, |bytes| memory(bytes as u64)));
    println!(
        "  link         {}/s, {} there and back, in a trial of a second",
        memory(it.link_rate),
        time(it.round_trip_ms)
    );
    let watched = &it.watched;
    match watched.by {
        Watcher::Nobody => {}
        Watcher::Agent => {
            println!(
                "  watched      for {}: {} scans of at most {}; {} of its writes waited for the kernel",
                time(watched.ms),
                watched.scans,
                time(watched.longest_scan_ms),
                watched.faults
            );
            let within = |share: usize| watched.written.get((watched.written.len() * share / 4).saturating_sub(1));
            let written: Vec<String> = [2, 4]
                .iter()
                .filter_map(|share| within(*share))
                .map(|it| format!("{} within {}", memory(it.bytes), time(it.ms)))
                .collect();
            println!("  it wrote     {}", written.join(", "));
        }
        Watcher::Qemu => {
            for it in &watched.written {
                println!("  it wrote     about {} within {}, by QEMU's sample", memory(it.bytes), time(it.ms));
            }
        }
    }
    println!("  learnt from  {}", migrations(it.migrations, to));
    if decisions {
        for decision in &it.decisions {
            println!("  decision     {decision}");
        }
    }
}

/// What was expected, in one line.
pub(crate) fn tell_foretold(it: &Foretold, to: &str) {
    let when = match it.made {
        Made::Before => "before it",
        Made::AtStart => "when the copy had begun",
    };
    println!(
        "  expected     total {}, downtime {}, sent {}, by {}; said {when}, from {}",
        range(&it.total_ms, time),
        range(&it.downtime_ms, time),
        range(&it.sent, |bytes| memory(bytes as u64)),
        it.method,
        migrations(it.migrations, to)
    );
}

fn migrations(count: u32, to: &str) -> String {
    match count {
        0 => format!("no migration to {to} yet"),
        1 => format!("1 migration to {to}"),
        count => format!("{count} migrations to {to}"),
    }
}

fn or(others: &[String]) -> String {
    match others {
        [] => String::new(),
        others => format!("; if it turns out otherwise, {}", others.join(", or ")),
    }
}

fn unless_none(expected: &Expected) -> String {
    if expected.high < 0.5 { "none".into() } else { range(expected, time) }
}

fn range(of: &Expected, say: impl Fn(f64) -> String) -> String {
    format!("{} ({} to {})", say(of.likely), say(of.low), say(of.high))
}

/// So many ms, as people say it.
fn time(ms: f64) -> String {
    match ms {
        ..10.0 => format!("{ms:.1} ms"),
        ..1000.0 => format!("{ms:.0} ms"),
        ..100_000.0 => format!("{:.1} s", ms / 1e3),
        _ => format!("{:.0} s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_said_with_their_ranges_and_what_is_none_is_said_to_be() {
        let some = Expected { low: 900.0, likely: 1500.0, high: 240_000.0 };
        assert_eq!(range(&some, time), "1.5 s (900 ms to 240 s)");
        assert_eq!(unless_none(&Expected { low: 0.0, likely: 0.0, high: 0.2 }), "none");
        assert_eq!(unless_none(&Expected { low: 0.0, likely: 0.0, high: 12.0 }), "0.0 ms (0.0 ms to 12 ms)");
        assert_eq!(
            [0, 1, 3].map(|count| migrations(count, "beta")).join("; "),
            "no migration to beta yet; 1 migration to beta; 3 migrations to beta"
        );
    }
}
