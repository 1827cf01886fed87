//! One or many reports as a page: a single HTML file that needs nothing else, in a browser without a network too.
//!
//! `page/page.html` is the frame, `page/page.css` and `page/page.js` are ours; charts are drawn by uPlot (MIT, version
//! 1.6.32, `page/uplot/`, as it comes), which is in the page with its licence. Reports are in it as JSON, so that a page
//! can be given away instead of its reports.

use serde_json::{Value, json};

use crate::compare::{FIGURES, group_by_set_up};
use crate::report::{CpuSample, GuestRecord, ProgressSample, RunReport};

const FRAME: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");
const UPLOT: &str = include_str!("page/uplot/uPlot.iife.min.js");
const UPLOT_STYLE: &str = include_str!("page/uplot/uPlot.min.css");
const UPLOT_LICENCE: &str = include_str!("page/uplot/LICENSE");

/// A page needs no more points of a line than a screen has columns: longer ones are thinned to this.
const MOST_POINTS: usize = 2000;
/// Of many runs, each has fewer, but no less than can be read.
const POINTS_IN_ALL: usize = 60_000;
const FEWEST_POINTS: usize = 200;

/// The page of these reports.
pub fn page(title: &str, reports: &[RunReport]) -> String {
    let points = (POINTS_IN_ALL / reports.len().max(1)).clamp(FEWEST_POINTS, MOST_POINTS);
    let runs: Vec<Value> = reports.iter().map(|report| thinned(report, points)).collect();
    let figures: Vec<[&str; 2]> = FIGURES.iter().map(|figure| [figure.name, figure.unit]).collect();
    let data = json!({ "title": title, "runs": runs, "groups": groups(reports), "figures": figures });
    FRAME
        .replace("/*UPLOT_STYLE*/", UPLOT_STYLE)
        .replace("/*STYLE*/", STYLE)
        .replace("<!--LICENCE-->", &escaped(UPLOT_LICENCE))
        .replace("<!--TITLE-->", &escaped(title))
        .replace("/*UPLOT*/", UPLOT)
        .replace("/*SCRIPT*/", SCRIPT)
        // Last, as it may hold any words.
        .replace("/*DATA*/", &in_script(&data))
}

/// Medians of runs of the same set-up, for the table, when there is more than one of any.
fn groups(reports: &[RunReport]) -> Vec<Value> {
    let groups = group_by_set_up(reports.to_vec());
    if groups.len() == reports.len() {
        return Vec::new();
    }
    let row = |group: &crate::compare::Group| {
        let figures: serde_json::Map<String, Value> = FIGURES
            .iter()
            .filter_map(|figure| {
                let spread = group.spread(figure)?;
                let spread = json!([spread.median, spread.least, spread.most]);
                Some((figure.name.to_owned(), spread))
            })
            .collect();
        json!({ "name": group.name, "runs": group.runs.len(), "completed": group.completed(), "figures": figures })
    };
    groups.iter().map(row).collect()
}

fn thinned(report: &RunReport, points: usize) -> Value {
    let mut report = report.clone();
    let samples = &mut report.samples;
    samples.progress = every_nth::<ProgressSample>(&samples.progress, points);
    samples.records = every_nth::<GuestRecord>(&samples.records, points);
    samples.cpu = every_nth::<CpuSample>(&samples.cpu, points);
    // The worst ones are what a reader looks for.
    samples.stalls.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    samples.stalls.truncate(points);
    samples.stalls.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    let name = report.set_up();
    let mut value = serde_json::to_value(&report).expect("a report is plain data");
    value["name"] = name.into();
    round(&mut value);
    without_nulls(&mut value["samples"]);
    value
}

/// What a sample does not know takes no room.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(without_nulls),
        Value::Object(all) => {
            all.retain(|_, it| !it.is_null());
            all.values_mut().for_each(without_nulls);
        }
        _ => {}
    }
}

/// No figure of a page needs more than two digits behind the point.
fn round(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => {
            *value = number.as_f64().map_or(Value::Null, |it| json!((it * 100.0).round() / 100.0));
        }
        Value::Array(all) => all.iter_mut().for_each(round),
        Value::Object(all) => all.values_mut().for_each(round),
        _ => {}
    }
}

fn every_nth<T: Copy>(all: &[T], points: usize) -> Vec<T> {
    let step = all.len().div_ceil(points).max(1);
    all.iter().step_by(step).copied().collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// JSON that nothing in it can end: a script element ends at the first `</script`, whatever that is part of.
fn in_script(data: &Value) -> String {
    data.to_string().replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Origin, Settings};

    fn report(scenario: &str) -> RunReport {
        RunReport::new(Origin::Bench, Settings { scenario: scenario.into(), ..Settings::default() })
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere() {
        let page = page("A title", &[report("pause-1-iters")]);
        for from_elsewhere in ["src=", "href=\"http", "@import", "url(", "fetch("] {
            assert!(!page.contains(from_elsewhere), "{from_elsewhere}");
        }
        assert!(page.contains("Permission is hereby granted"), "uPlot's licence is in it");
        assert!(!page.contains("/*DATA*/") && !page.contains("<!--TITLE-->"));
    }

    #[test]
    fn nothing_that_a_report_says_is_run_by_the_browser() {
        let page = page("<b>", &[report("</script><script>alert(1)</script><!--")]);
        assert!(!page.contains("<script>alert(1)") && !page.contains("<b>"));
    }

    #[test]
    fn long_lines_are_thinned() {
        assert_eq!(every_nth(&vec![1; 10 * MOST_POINTS + 1], MOST_POINTS).len(), 1819);
        let mut value = json!({ "a": [1.23456, 7], "b": null });
        round(&mut value);
        assert_eq!(value, json!({ "a": [1.23, 7], "b": null }));
        assert_eq!(every_nth(&[1, 2, 3], MOST_POINTS), [1, 2, 3]);
    }
}
