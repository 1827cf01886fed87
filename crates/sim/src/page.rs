//! A table as a page: one HTML file without a script that needs nothing else.

use std::fmt::Write;

use crate::guest::GIB;
use crate::{Row, Table};

const STYLE: &str = include_str!("page.css");
/// Of a chart, in units of its own: where the names end, where the lines end, and how high a line is.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 880.0;
const HEIGHT: f64 = 22.0;

type Pair = fn(&Row) -> (f64, f64);
/// What is drawn: in words, its unit, how many of that are one of the row's, and which.
const CHARTS: [(&str, &str, f64, Pair); 4] = [
    ("Total", "s", 1.0, |it| it.total),
    ("Downtime", "ms", 1e3, |it| it.downtime),
    ("Lost work", "s", 1.0, |it| it.lost),
    ("At risk", "s", 1.0, |it| it.at_risk),
];

impl Table {
    /// The page of this table. `asked` is what it was made by, such as a command line.
    pub fn page(&self, asked: &str) -> String {
        let mut body = String::new();
        let cases = self.rows.first().map_or(0, |row| row.cases);
        let _ = write!(
            body,
            "<h1>Policies beside each other</h1>\n<p>{cases} migrations that were only reckoned, by <code>{}</code>. Guests, links \
             and engines are models. Pairs are the median and the 95th percentile of the migrations that were completed: who \
             completes only the easy ones has good ones.</p>\n",
            escaped(asked)
        );
        body.push_str(&self.table());
        body.push_str("<h2>Completed</h2>\n");
        body.push_str(&self.chart(
            "Share completed",
            &[0.0, 0.25, 0.5, 0.75, 1.0],
            |it| it * 100.0,
            "%",
            |row| (0.0, row.completed),
        ));
        for (what, unit, scale, pair) in CHARTS {
            let most = self.rows.iter().map(|row| pair(row).1 * scale).fold(1.0, f64::max).log10().ceil() as i32;
            // From a ten-thousandth of the most on, each line ten times the one before.
            let ticks: Vec<f64> = (most - 4..=most).map(f64::from).collect();
            let _ = writeln!(
                body,
                "<h2>{what}, {unit}</h2>\n<p>From the median to the 95th percentile; the scale is logarithmic.</p>"
            );
            body.push_str(&self.chart(
                what,
                &ticks,
                |it| 10f64.powf(it),
                unit,
                |row| {
                    let of = |figure: f64| (figure * scale).max(1e-9).log10();
                    (of(pair(row).0), of(pair(row).1))
                },
            ));
        }
        body.push_str(&self.worst());
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<title>vmferry sim: policies beside each \
             other</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
        )
    }

    fn table(&self) -> String {
        let heads = [
            "policy",
            "completed",
            "within the downtime",
            "total s",
            "downtime ms",
            "stall ms",
            "lost work s",
            "GiB sent",
            "at risk s",
            "times the best",
        ];
        let mut text = String::from("<div class=\"wide\"><table>\n<thead><tr>");
        for head in heads {
            let _ = write!(text, "<th scope=\"col\">{head}</th>");
        }
        text.push_str("</tr></thead>\n<tbody>\n");
        for row in &self.rows {
            let pair = |(a, b): (f64, f64), scale: f64, digits: usize| {
                format!("{:.digits$} / {:.digits$}", a * scale, b * scale)
            };
            let cells = [
                format!("{:.2} %", row.completed * 100.0),
                format!("{:.1} %", row.within * 100.0),
                pair(row.total, 1.0, 1),
                pair(row.downtime, 1e3, 0),
                pair(row.stall, 1e3, 0),
                pair(row.lost, 1.0, 2),
                pair(row.bytes, 1.0 / GIB, 1),
                pair(row.at_risk, 1.0, 1),
                row.beside_the_best(),
            ];
            let _ = write!(text, "<tr class=\"{}\"><th scope=\"row\">{}</th>", class(row), escaped(&row.policy));
            for cell in cells {
                let _ = write!(text, "<td>{cell}</td>");
            }
            text.push_str("</tr>\n");
        }
        text + "</tbody>\n</table></div>\n"
    }

    /// A line for each policy, from one value to another, on a scale with these ticks, which stand for `told`.
    fn chart(
        &self,
        what: &str,
        ticks: &[f64],
        told: impl Fn(f64) -> f64,
        unit: &str,
        of: impl Fn(&Row) -> (f64, f64),
    ) -> String {
        let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
        let at = |value: f64| LEFT + (value.clamp(first, last) - first) / (last - first) * (RIGHT - LEFT);
        let bottom = self.rows.len() as f64 * HEIGHT + 4.0;
        let mut text = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{what}, as in the table\">\n",
            RIGHT + 20.0,
            bottom + 20.0
        );
        for tick in ticks {
            let x = at(*tick);
            let _ = writeln!(
                text,
                "<line class=\"axis\" x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{bottom}\"/><text class=\"tick\" \
                 text-anchor=\"middle\" x=\"{x:.1}\" y=\"{}\">{} {unit}</text>",
                bottom + 14.0,
                told(*tick)
            );
        }
        for (index, row) in self.rows.iter().enumerate() {
            let (middle, (from, to)) = ((index as f64 + 0.5) * HEIGHT, of(row));
            let (from, to) = (at(from), at(to));
            let _ = writeln!(
                text,
                "<g class=\"{}\"><text text-anchor=\"end\" x=\"{}\" y=\"{}\">{}</text><line class=\"bar\" \
                 stroke-width=\"6\" x1=\"{from:.1}\" y1=\"{middle}\" x2=\"{to:.1}\" y2=\"{middle}\"/><circle class=\"bar\" r=\"5\" \
                 cx=\"{from:.1}\" cy=\"{middle}\"/></g>",
                class(row),
                LEFT - 10.0,
                middle + 4.0,
                escaped(&row.policy)
            );
        }
        text + "</svg>\n"
    }

    fn worst(&self) -> String {
        let mut text = String::from(
            "<h2>The worst of each</h2>\n<p>Played again, decision by decision, by <code>vmferry sim --seed NUMBER --replay \
             --policy NAME</code>.</p>\n<div class=\"wide\"><table>\n<thead><tr><th scope=\"col\">policy</th><th \
             scope=\"col\">cases: number, guest, link, and how bad</th></tr></thead>\n<tbody>\n",
        );
        for row in &self.rows {
            let worst: Vec<String> = row.worst.iter().map(|(name, how)| format!("{name} ({how:.1})")).collect();
            let _ = writeln!(
                text,
                "<tr class=\"{}\"><th scope=\"row\">{}</th><td class=\"text\">{}</td></tr>",
                class(row),
                escaped(&row.policy),
                escaped(&worst.join("; "))
            );
        }
        text + "</tbody>\n</table></div>\n"
    }
}

fn class(row: &Row) -> &'static str {
    if row.policy.starts_with("vmferry") { "ours" } else { "theirs" }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use vmferry_policy::Limits;

    use crate::{Table, cases, contestants};

    #[test]
    fn a_page_has_each_policy_and_its_figures_and_nothing_that_a_browser_would_fetch_or_run() {
        let cases: Vec<_> = cases(1, 5, Limits::default()).collect();
        let table = Table::of(&cases, &contestants(), false);
        let page = table.page("vmferry sim --cases 5 --policy '<a&b>'");
        assert!(page.contains("--policy '&lt;a&amp;b&gt;'"), "what was asked for is text");
        for row in &table.rows {
            let cell = format!("<th scope=\"row\">{}</th><td>{:.2} %</td>", row.policy, row.completed * 100.0);
            assert!(page.contains(&cell), "{cell}");
            assert_eq!(page.matches(&format!(">{}</text>", row.policy)).count(), 5, "{} is in each chart", row.policy);
        }
        assert!(!page.contains("NaN") && !page.contains("inf"), "each figure is one");
        assert!(["<script", "http", "url("].iter().all(|it| !page.contains(it)));
        let nothing = Table { rows: Vec::new() }.page("");
        assert!(!nothing.contains("NaN"));
    }
}
