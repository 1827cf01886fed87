//! `vmferry sim --trace`: a guest that was recorded, by `vmferry migrate --record` or `vmferry predict --json`, as a case of
//! the simulator.

mod numbers;

use std::path::Path;

use serde_json::Value;
use vmferry_api::{PlanView, Watcher};
use vmferry_bench::report::{ReadError, RunReport, read_text};
use vmferry_policy::Limits;
use vmferry_sim::{Case, Link, Luck, Observed, Since, Written};

use crate::failure::Failure;

/// The largest file that is read, in bytes; a report of an hour has some 10 MiB.
const LARGEST: u64 = 256 << 20;
/// What takes longer only to be sent once, in seconds, is not played.
const LONGEST: f64 = 86_400.0;
const MIB: f64 = 1_048_576.0;
/// Of a link that was recorded.
const ROUND_TRIP: f64 = 0.0005;

/// So many migrations of the guest in this file, over the link that it was seen on: what is not the guest's and not the
/// link's comes from the seed.
pub(crate) fn cases(path: &Path, first: u64, count: u64, limits: Limits) -> Result<Vec<Case>, Failure> {
    let of = |source| Failure::ReadReport(ReadError::Of { path: path.into(), source: Box::new(source) });
    let text = std::fs::metadata(path).and_then(|file| match file.len() {
        ..=LARGEST => std::fs::read_to_string(path),
        _ => Err(std::io::Error::other("it is too large")),
    });
    let text = text.map_err(|source| of(ReadError::Io { path: path.into(), source }))?;
    let bad = |why: String| nothing(path, why);
    let (name, observed, link) = match serde_json::from_str::<Value>(&text) {
        Ok(value) if value.get("ram_bytes").is_some() => {
            numbers::of_a_plan(&value).map_err(bad)?;
            let plan: PlanView = serde_json::from_value(value).map_err(|error| bad(error.to_string()))?;
            of_plan(&plan).ok_or_else(|| bad("the guest was not watched".into()))?
        }
        Ok(value) if value.get("rounds").is_some() => {
            numbers::of_a_report(&value).map_err(bad)?;
            of_report(&read_text(&text).map_err(of)?)
                .ok_or_else(|| bad("no round of it had ended when it was over".into()))?
        }
        // It says itself what it is not.
        _ => return Err(read_text(&text).map_err(of).map_or_else(|error| error, |_| bad("it has no rounds".into()))),
    };
    let once = observed.used / link.rate;
    if once.is_nan() || once > LONGEST {
        let (used, rate) = (observed.used / MIB, link.rate / MIB);
        return Err(bad(format!("{used:.0} MiB over a link of {rate:.3} MiB/s take more than a day: nothing to play")));
    }
    let guest = vmferry_sim::Guest { name: name.clone(), ..observed.guest(Luck::Usual) };
    let case = |seed| Case { name: format!("{seed}: {name}"), seed, guest: guest.clone(), link: link.clone(), limits };
    Ok((first..first.saturating_add(count)).map(case).collect())
}

fn nothing(path: &Path, why: String) -> Failure {
    Failure::NoTrace { path: path.into(), why }
}

fn of_plan(plan: &PlanView) -> Option<(String, Observed, Link)> {
    let prediction = plan.prediction.as_ref().filter(|it| it.watched.by != Watcher::Nobody)?;
    let watched = &prediction.watched;
    let used = if watched.in_use > 0 { watched.in_use } else { plan.ram_used_bytes };
    let written = watched.written.iter().map(|it| Written {
        after: it.ms / 1e3,
        bytes: it.bytes as f64,
        since: Since::Beginning,
    });
    let observed =
        Observed { ram: plan.ram_bytes as f64, used: used as f64, written: written.collect(), processors: 1.0 };
    let link =
        Link { rate: prediction.link_rate as f64, round_trip: prediction.round_trip_ms / 1e3, changes: Vec::new() };
    Some((plan.vm.clone(), observed, link))
}

/// What a round leaves is what the next one has to send; while the guest was slowed that tells nothing of it.
fn of_report(report: &RunReport) -> Option<(String, Observed, Link)> {
    let first = report.rounds.first()?;
    let free = report.rounds.windows(2).filter(|pair| pair[0].throttle <= 1 && pair[0].ms > 0.0);
    let written: Vec<Written> = free
        .map(|pair| Written {
            after: pair[0].ms / 1e3,
            bytes: pair[1].remaining as f64,
            since: if pair[0].round == 1 { Since::Sent } else { Since::Beginning },
        })
        .collect();
    let rates = || report.rounds.iter().filter(|it| it.link_rate > 0 && it.ms > 0.0);
    let seconds: f64 = rates().map(|it| it.ms).sum::<f64>() / 1e3;
    let sent: f64 = rates().map(|it| it.link_rate as f64 * it.ms / 1e3).sum();
    if written.is_empty() || seconds <= 0.0 {
        return None;
    }
    let ram = report.settings.ram.max(first.remaining).max(1) as f64;
    let used = (first.link_rate as f64 * first.ms / 1e3).clamp(1.0, ram);
    let processors = f64::from(report.settings.vcpus.max(1));
    let observed = Observed { ram, used, written, processors };
    let link = Link { rate: sent / seconds, round_trip: ROUND_TRIP, changes: Vec::new() };
    Some((report.settings.scenario.clone(), observed, link))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_bench::report::{Origin, Round, Settings};

    fn round(round: u32, ms: f64, remaining: u64, throttle: u8) -> Round {
        Round { round, ms, remaining: remaining << 20, link_rate: 100 << 20, throttle, ..Round::default() }
    }

    #[test]
    fn a_recorded_migration_is_a_guest_that_left_what_each_of_its_rounds_left() {
        let settings = Settings { scenario: "web1".into(), ram: 2 << 30, ..Settings::default() };
        let mut report = RunReport::new(Origin::Migrate, settings);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web1.json");
        std::fs::write(&path, report.to_json()).unwrap();
        let none = cases(&path, 1, 2, Limits::default()).unwrap_err();
        assert!(none.to_string().contains("no round of it"), "{none}");
        report.rounds = vec![
            round(1, 10_000.0, 2048, 0),
            round(2, 500.0, 50, 0),
            round(3, 200.0, 25, 0),
            round(4, 100.0, 11, 40),
            round(5, 50.0, 1, 40),
        ];
        std::fs::write(&path, report.to_json()).unwrap();
        let (name, observed, link) = of_report(&read_text(&report.to_json()).unwrap()).unwrap();
        assert_eq!((name.as_str(), observed.written.len()), ("web1", 3), "{observed:?}");
        assert!((observed.used / 1_048_576.0 - 1000.0).abs() < 1.0 && (link.rate / 1_048_576.0 - 100.0).abs() < 0.1);
        let cases = cases(&path, 7, 3, Limits::default()).unwrap();
        assert_eq!(cases.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["7: web1", "8: web1", "9: web1"]);
    }

    #[test]
    fn a_recording_with_numbers_that_make_no_sense_is_refused_by_what_they_are_of_and_never_played() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web1.json");
        let settings = Settings { scenario: "web1".into(), ram: 2 << 30, ..Settings::default() };
        let mut report = RunReport::new(Origin::Migrate, settings);
        report.rounds = vec![round(1, 10_000.0, 2048, 0), round(2, 500.0, 50, 0), round(3, 200.0, 25, 0)];
        let good: Value = serde_json::from_str(&report.to_json()).unwrap();
        let refused = |field: &str, value: Value| {
            let mut bad = good.clone();
            bad["rounds"][1][field] = value;
            std::fs::write(&path, bad.to_string()).unwrap();
            cases(&path, 1, 1, Limits::default()).unwrap_err().to_string()
        };
        for (field, value) in
            [("ms", -3.0), ("ms", 1e300), ("remaining", -1.0), ("link_rate", 1e30), ("throttle", 300.0)]
        {
            let refused = refused(field, value.into());
            assert!(refused.contains(&format!("web1.json tells of no guest: rounds[1].{field} is")), "{refused}");
        }
        // Sound each for itself.
        report.rounds.iter_mut().for_each(|it| it.link_rate = 1);
        report.rounds[0].ms = 8e8;
        std::fs::write(&path, report.to_json()).unwrap();
        let slow = cases(&path, 1, 1, Limits::default());
        assert!(slow.as_ref().is_err_and(|it| it.to_string().contains("more than a day")), "{slow:?}");
    }

    #[test]
    fn what_is_no_recording_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other.json");
        for text in ["", "{}", "[1, 2]", "no JSON"] {
            std::fs::write(&path, text).unwrap();
            let refused = cases(&path, 1, 1, Limits::default()).unwrap_err();
            assert!(refused.to_string().contains("other.json"), "{text}: {refused}");
        }
        assert!(cases(&dir.path().join("none.json"), 1, 1, Limits::default()).is_err());
    }
}
