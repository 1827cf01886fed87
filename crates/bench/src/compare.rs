//! Runs side by side: medians, spread, and whether a difference is more than noise.
//!
//! A ratio of medians has a confidence interval from the bootstrap (Efron and Tibshirani, An Introduction to the
//! Bootstrap, 1993, chapter 13: percentiles): both sides are drawn anew from themselves, many times. When 1 lies inside,
//! the difference is noise. Runs that did not complete have no times; they are counted, never left out in silence.

use std::fmt::Write;

use crate::report::{PageCheck, RunReport};
use crate::{in_words, median};

/// How often both sides are drawn anew.
const DRAWS: usize = 4000;
/// The interval leaves out so much at each end.
const TAIL: f64 = 0.025;
/// Fewer runs than this tell nothing about their spread.
const FEWEST: usize = 3;
/// The same runs give the same interval.
const SEED: u64 = 0x766d_6665_7272_7935;

/// What is looked at of each run.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Of a run that has it.
    of: fn(&RunReport) -> Option<f64>,
}

const MIB: f64 = 1_048_576.0;

/// All that are looked at.
pub const FIGURES: &[Figure] = &[
    Figure { name: "total", unit: "s", of: |it| Some(it.summary.total_ms? / 1e3) },
    Figure { name: "RAM and switchover", unit: "s", of: |it| Some(it.summary.ram_ms? / 1e3) },
    Figure { name: "downtime", unit: "ms", of: RunReport::downtime_ms },
    Figure { name: "worst stall", unit: "ms", of: |it| it.summary.worst_stall_ms },
    Figure { name: "worst 64 MiB", unit: "ms", of: |it| it.summary.worst_64_mib_ms },
    Figure {
        name: "guest's speed kept",
        unit: "%",
        of: |it| Some(it.summary.speed_during? / it.summary.speed_before.filter(|before| *before > 0.0)? * 100.0),
    },
    Figure { name: "sent", unit: "MiB", of: |it| Some(it.summary.sent? as f64 / MIB) },
    Figure {
        name: "CPU beside the guest",
        unit: "s",
        of: |it| {
            let s = &it.summary;
            let parts =
                [s.source_qemu_cpu_s, s.destination_qemu_cpu_s, s.source_agent_cpu_s, s.destination_agent_cpu_s];
            parts.iter().any(Option::is_some).then(|| parts.iter().flatten().sum())
        },
    },
];

/// Runs of one kind.
#[derive(Clone, Debug)]
pub struct Group {
    /// What they are called.
    pub name: String,
    /// They.
    pub runs: Vec<RunReport>,
}

/// What the runs of a group come to in one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle.
    pub median: f64,
    /// The lowest.
    pub least: f64,
    /// The highest.
    pub most: f64,
    /// Runs that have it.
    pub runs: usize,
}

/// One group against another in one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Of the medians.
    pub ratio: f64,
    /// Where it lies with a confidence of 95 %; absent when there are too few runs to tell.
    pub interval: Option<(f64, f64)>,
}

impl Ratio {
    /// Whether there is a difference at all; absent when that cannot be told.
    pub fn is_noise(&self) -> Option<bool> {
        self.interval.map(|(low, high)| low <= 1.0 && high >= 1.0)
    }
}

impl Group {
    fn values(&self, figure: &Figure) -> Vec<f64> {
        let mut values: Vec<f64> = self.runs.iter().filter_map(figure.of).filter(|it| it.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// What they come to; none when no run has it.
    pub fn spread(&self, figure: &Figure) -> Option<Spread> {
        let values = self.values(figure);
        let (least, most) = (*values.first()?, *values.last()?);
        Some(Spread { median: median(values.iter().copied())?, least, most, runs: values.len() })
    }

    /// How many completed.
    pub fn completed(&self) -> usize {
        self.runs.iter().filter(|it| it.outcome.is_completed()).count()
    }
}

/// One group against another; none when one of them has no such figure, or nothing but zeroes.
pub fn ratio(of: &Group, to: &Group, figure: &Figure) -> Option<Ratio> {
    let (of, to) = (of.values(figure), to.values(figure));
    let middle = |values: &[f64]| median(values.iter().copied());
    let (middle_of, middle_to) = (middle(&of)?, middle(&to).filter(|it| *it != 0.0)?);
    let enough = of.len() >= FEWEST && to.len() >= FEWEST;
    Some(Ratio { ratio: middle_of / middle_to, interval: enough.then(|| interval(&of, &to)) })
}

fn interval(of: &[f64], to: &[f64]) -> (f64, f64) {
    let mut chance = fastrand::Rng::with_seed(SEED);
    let mut draw = |from: &[f64]| {
        let drawn = (0..from.len()).map(|_| from[chance.usize(..from.len())]);
        median(drawn).expect("as many are drawn as there are")
    };
    let mut ratios: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let (of, to) = (draw(of), draw(to));
            if to == 0.0 { f64::INFINITY } else { of / to }
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[((DRAWS - 1) as f64 * share) as usize];
    (at(TAIL), at(1.0 - TAIL))
}

/// Puts runs of the same set-up together, in the order in which set-ups first come.
pub fn group_by_set_up(runs: Vec<RunReport>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for run in runs {
        let name = run.set_up();
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.runs.push(run),
            None => groups.push(Group { name, runs: vec![run] }),
        }
    }
    groups
}

/// Every group, and each against the first, for people at a terminal.
pub fn to_text(groups: &[Group]) -> String {
    let mut text = String::new();
    let mut line = |words: String| writeln!(text, "{}", words.trim_end()).expect("a String takes everything");
    let Some(first) = groups.first() else { return "nothing to compare\n".into() };
    for (index, group) in groups.iter().enumerate() {
        let (completed, all) = (group.completed(), group.runs.len());
        line(format!(
            "{}{}",
            group.name,
            if index == 0 && groups.len() > 1 { "   (the others against this)" } else { "" }
        ));
        let busy = group.runs.iter().filter(|it| it.summary.host_was_busy).count();
        let mut about = format!("  {completed} of {all} runs completed");
        if completed < all {
            about.push_str("; those that did not have no times");
        }
        if busy > 0 {
            write!(about, "; the host was busy with other things in {busy}").expect("as above");
        }
        line(about);
        for figure in FIGURES {
            let Some(spread) = group.spread(figure) else { continue };
            let mut words = format!(
                "  {:<22}{:>10} {:<4} {:<24}",
                figure.name,
                number(spread.median),
                figure.unit,
                match spread.runs {
                    1 => "(one run)".into(),
                    _ => format!("({} to {})", number(spread.least), number(spread.most)),
                }
            );
            if let Some(ratio) = (index > 0).then(|| ratio(group, first, figure)).flatten() {
                words.push_str(&verdict(&ratio));
            }
            line(words);
        }
        line(String::new());
    }
    text
}

/// A line a group, with its medians: a table in Markdown.
pub fn to_table(groups: &[Group]) -> String {
    let names: Vec<String> = FIGURES.iter().map(|figure| format!("{}, {}", figure.name, figure.unit)).collect();
    let mut text = format!("| set-up | completed | {} | slowed, % | memory |\n", names.join(" | "));
    writeln!(text, "| --- | --- |{} --- |", " ---: |".repeat(FIGURES.len() + 1)).expect("a String takes everything");
    for group in groups {
        let figure = |it: &Figure| in_words(group.spread(it).map(|spread| spread.median), number);
        let figures: Vec<String> = FIGURES.iter().map(figure).collect();
        let slowed = group.runs.iter().filter_map(|run| run.summary.throttle).max().filter(|slowed| *slowed > 0);
        let slowed = in_words(slowed.map(f64::from), |slowed| format!("{slowed:.0}"));
        let is_damaged = |run: &RunReport| matches!(run.page_check, PageCheck::Damaged { .. });
        let memory = if group.runs.iter().any(is_damaged) { "damaged" } else { "intact" };
        let busy = if group.runs.iter().any(|run| run.summary.host_was_busy) { " (host busy)" } else { "" };
        let (completed, all) = (group.completed(), group.runs.len());
        let (name, figures) = (&group.name, figures.join(" | "));
        writeln!(text, "| {name}{busy} | {completed} of {all} | {figures} | {slowed} | {memory} |").expect("as above");
    }
    text
}

fn verdict(ratio: &Ratio) -> String {
    // Drawn from figures of which some are zero, it may have no end.
    let end = |it: f64| in_words(Some(it), |it| format!("{it:.2}"));
    match ratio.interval {
        None => format!("× {:.2}, too few runs to tell", ratio.ratio),
        Some((low, high)) => {
            let noise = if ratio.is_noise() == Some(true) { ": noise" } else { "" };
            format!("× {:.2} (95 %: {} to {}){noise}", ratio.ratio, end(low), end(high))
        }
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Origin, Outcome, Settings};

    fn group(name: &str, totals: &[f64]) -> Group {
        let run = |total: &f64| {
            let settings = Settings { scenario: name.into(), ..Settings::default() };
            let mut report = RunReport::new(Origin::Bench, settings);
            report.summary.total_ms = Some(total * 1e3);
            report.outcome = Outcome::Completed;
            report
        };
        Group { name: name.into(), runs: totals.iter().map(run).collect() }
    }

    #[test]
    fn a_difference_larger_than_the_spread_is_told_and_a_smaller_one_is_noise() {
        let slow = group("slow", &[10.0, 10.2, 10.1, 9.9, 10.0]);
        let fast = group("fast", &[5.0, 5.1, 4.9, 5.0, 5.2]);
        let same = group("same", &[10.3, 9.8, 10.1, 10.0, 9.9]);
        let clear = ratio(&fast, &slow, &FIGURES[0]).unwrap();
        assert!((clear.ratio - 0.5).abs() < 0.01 && clear.is_noise() == Some(false), "{clear:?}");
        let (low, high) = clear.interval.unwrap();
        assert!(low <= clear.ratio && clear.ratio <= high);
        assert_eq!(ratio(&same, &slow, &FIGURES[0]).unwrap().is_noise(), Some(true));
        assert!(to_text(&[slow, same]).contains(": noise"));
    }

    #[test]
    fn of_two_runs_nothing_is_claimed() {
        let told = to_text(&[group("a", &[1.0, 1.0]), group("b", &[2.0, 2.0])]);
        assert!(told.contains("× 2.00, too few runs to tell"), "{told}");
    }

    #[test]
    fn a_ratio_to_what_is_often_nothing_has_no_end_and_says_so() {
        let told = to_text(&[group("a", &[0.0, 0.0, 1.0, 1.0, 1.0]), group("b", &[1.0, 1.0, 1.0])]);
        assert!(told.contains("to -)") && !told.contains("inf") && !told.contains("NaN"), "{told}");
    }

    #[test]
    fn runs_that_did_not_complete_are_counted() {
        let mut some = group("some", &[1.0, 1.0, 1.0]);
        some.runs[2].outcome = Outcome::NotCompleted { reason: "time".into() };
        some.runs[2].summary.total_ms = None;
        assert_eq!(some.spread(&FIGURES[0]).unwrap().runs, 2);
        assert!(to_text(&[some]).contains("2 of 3 runs completed; those that did not have no times"));
    }

    #[test]
    fn a_table_has_a_line_for_each_group_and_as_many_cells_in_each() {
        let table = to_table(&[group("one", &[4.0, 1.0]), group("two", &[3.0])]);
        let cells: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(cells, [FIGURES.len() + 5; 4], "{table}");
        assert!(table.contains("| one | 2 of 2 | 2.50 |"), "{table}");
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        let median = group("x", &[4.0, 1.0, 3.0, 2.0]).spread(&FIGURES[0]).unwrap().median;
        assert!((median - 2.5).abs() < 1e-9);
        assert_eq!(group("x", &[]).spread(&FIGURES[0]), None);
        assert!(ratio(&group("x", &[1.0]), &group("y", &[0.0]), &FIGURES[0]).is_none());
    }

    #[test]
    fn runs_of_the_same_set_up_are_put_together() {
        let runs: Vec<RunReport> = [group("a", &[1.0, 2.0]), group("b", &[1.0]), group("a", &[3.0])]
            .into_iter()
            .flat_map(|it| it.runs)
            .collect();
        let groups = group_by_set_up(runs);
        assert_eq!(groups.iter().map(|it| it.runs.len()).collect::<Vec<_>>(), [3, 1]);
    }
}
