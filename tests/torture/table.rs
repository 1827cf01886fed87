//! What many runs came to: a line for each fault, moment and engine.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::plan::{Engine, Moment, Plan};
use super::run::Ended;
use super::verdict::Outcome;

#[derive(Default)]
pub(super) struct Table {
    rows: BTreeMap<(&'static str, Moment, Engine), Row>,
    pub runs: usize,
    pub failed: Vec<u64>,
    settled: Vec<Duration>,
}

#[derive(Default)]
struct Row {
    outcomes: BTreeMap<Option<Outcome>, usize>,
    settled: Vec<Duration>,
}

impl Table {
    pub(super) fn add(&mut self, plan: &Plan, ended: &Ended) {
        self.runs += 1;
        if ended.outcome.is_err() {
            self.failed.push(plan.seed);
        }
        self.settled.extend(ended.settled);
        for strike in &plan.strikes {
            let row = self.rows.entry((strike.fault.name(), strike.moment, plan.engine)).or_default();
            *row.outcomes.entry(ended.outcome.as_ref().ok().copied()).or_default() += 1;
            row.settled.extend(ended.settled);
        }
    }

    /// A run with two faults counts in two lines.
    pub(super) fn in_words(&self) -> String {
        let (mut text, moment) = (String::new(), "at or after");
        let columns = "moved stayed ended  lost FAILED  settled: median   worst";
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{:26} {moment:11} {:8} {columns}", "fault", "engine");
        for ((fault, moment, engine), row) in &self.rows {
            let count = |outcome| row.outcomes.get(&outcome).copied().unwrap_or_default();
            let (median, worst) = median_and_worst(&row.settled);
            let _ = writeln!(
                text,
                "{fault:26} {moment:11} {engine:8} {:5} {:6} {:5} {:5} {:6} {median:>16} {worst:>7}",
                count(Some(Outcome::Moved)),
                count(Some(Outcome::Stayed)),
                count(Some(Outcome::EndedByItsUser)),
                count(Some(Outcome::LostByItsQemusDeath)),
                count(None),
            );
        }
        let (median, worst) = median_and_worst(&self.settled);
        let failed = match self.failed.as_slice() {
            [] => "none failed".into(),
            seeds => format!("{} failed: seeds {seeds:?}", seeds.len()),
        };
        let _ = writeln!(text, "{} runs, settled after {median} (worst {worst}); {failed}", self.runs);
        text
    }
}

fn median_and_worst(times: &[Duration]) -> (String, String) {
    let mut times = times.to_vec();
    times.sort_unstable();
    let say = |time: Option<&Duration>| time.map_or("-".into(), |time| format!("{:.1} s", time.as_secs_f64()));
    (say(times.get(times.len() / 2)), say(times.last()))
}

#[test]
fn a_run_with_two_faults_counts_in_both_lines_and_a_failure_names_its_seed() {
    let plan = (0..100).map(Plan::draw).find(|plan| plan.strikes.len() == 2).expect("there is one");
    let ended = |outcome| Ended { outcome, settled: Some(Duration::from_secs(2)), notes: vec![], logs: String::new() };
    let mut table = Table::default();
    table.add(&plan, &ended(Ok(Outcome::Moved)));
    table.add(&plan, &ended(Err("the guest is gone".into())));
    let text = table.in_words();
    let name = plan.strikes[1].fault.name();
    assert!(text.lines().any(|line| line.starts_with(name) && line.contains("2.0 s")), "{text}");
    let last = format!("2 runs, settled after 2.0 s (worst 2.0 s); 1 failed: seeds [{}]\n", plan.seed);
    assert!(text.ends_with(&last), "{text}");
}
