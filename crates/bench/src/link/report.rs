//! What was measured, as a table, as JSON, and as a page.

use std::fmt::Write;

use serde::Serialize;

use crate::in_words;

/// Who moved the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// The link of vmferry.
    Vmferry,
    /// What people use today.
    Today,
    /// The ways that the libvirt mailing list compared.
    Study,
}

/// How long urgent questions took beside the bulk.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Urgent {
    /// Half of the answers came within this, in ms.
    pub p50_ms: f64,
    /// All but one in a hundred came within this, in ms.
    pub p99_ms: f64,
    /// How many were asked.
    pub asked: usize,
}

/// One way to move bytes, as it was measured; medians when it was measured more than once.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What moved the bytes, in words.
    pub name: String,
    /// Whose it is.
    pub group: Group,
    /// The cipher, `tls` when it is the other side's choice, or `plain`.
    pub security: String,
    /// Parallel connections.
    pub streams: u8,
    /// What packed them.
    pub compression: String,
    /// What was sent: `random`, `text` or `zero`.
    pub data: String,
    /// Of what was to be moved.
    pub mib_per_s: f64,
    /// On the wire.
    pub wire_mib_per_s: Option<f64>,
    /// Processor seconds a GiB at the source.
    pub source_cpu: Option<f64>,
    /// Processor seconds a GiB at the destination.
    pub destination_cpu: Option<f64>,
    /// How much of the host's processors was left, 0 to 1.
    pub idle: f64,
    /// How long urgent questions took.
    pub urgent: Option<Urgent>,
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct LinkReport {
    /// Between what: `loopback`, or the names of two hosts.
    pub between: String,
    /// How long each way was measured, in seconds, and how often.
    pub seconds: f64,
    /// How often.
    pub rounds: u32,
    /// Processors of this host.
    pub processors: usize,
    /// What this host's processor encrypts with each cipher, in MiB/s.
    pub ciphers: Vec<(String, f64)>,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What could not be measured, and why.
    pub missing: Vec<String>,
}

const HEAD: [&str; 10] =
    ["", "security", "streams", "packing", "data", "MiB/s", "CPU s/GiB here", "there", "idle", "urgent p50/p99 ms"];

impl Row {
    fn cells(&self) -> [String; 10] {
        let cost = |cpu: Option<f64>| in_words(cpu, |cpu| format!("{cpu:.2}"));
        [
            self.name.clone(),
            self.security.clone(),
            self.streams.to_string(),
            self.compression.clone(),
            self.data.clone(),
            in_words(Some(self.mib_per_s), |speed| format!("{speed:.0}")),
            cost(self.source_cpu),
            cost(self.destination_cpu),
            in_words(Some(self.idle), |idle| format!("{:.0} %", idle * 100.0)),
            self.urgent.map_or_else(|| "-".into(), |it| format!("{:.2} / {:.2}", it.p50_ms, it.p99_ms)),
        ]
    }

    /// Both sides' processor seconds a GiB.
    fn cpu(&self) -> Option<f64> {
        Some(self.source_cpu? + self.destination_cpu?)
    }
}

impl LinkReport {
    /// For programs.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data")
    }

    /// What engineers ask first, each with its ratio.
    pub fn ratios(&self) -> Vec<(String, f64)> {
        let ours = |security: &str| {
            let of_kind = |row: &&Row| {
                row.group == Group::Vmferry
                    && row.compression == "none"
                    && row.data == "random"
                    && (row.security == "plain") == (security == "plain")
            };
            self.rows.iter().filter(of_kind).max_by(|a, b| a.mib_per_s.total_cmp(&b.mib_per_s))
        };
        let named = |name: &str| self.rows.iter().find(|row| row.name.starts_with(name));
        let mut ratios = Vec::new();
        let mut add = |what: &str, ratio: Option<f64>| {
            if let Some(ratio) = ratio.filter(|it| it.is_finite()) {
                ratios.push((what.to_owned(), ratio));
            }
        };
        let tls = ours("tls");
        let speed = |row: Option<&Row>| row.map(|row| row.mib_per_s);
        let over = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
        add("throughput, TLS / plain over the link", over(speed(tls), speed(ours("plain"))));
        add("throughput, TLS over the link / ssh", over(speed(tls), speed(named("ssh"))));
        add("throughput, TLS over the link / ssh aes128-gcm", over(speed(tls), speed(named("ssh aes128"))));
        add("throughput, TLS over the link / QEMU's TLS", over(speed(tls), speed(named("QEMU TLS"))));
        add(
            "CPU per GiB, TLS over the link / QEMU's TLS",
            over(tls.and_then(Row::cpu), named("QEMU TLS").and_then(Row::cpu)),
        );
        ratios
    }

    /// For people at a terminal.
    pub fn to_text(&self) -> String {
        let rows: Vec<[String; 10]> = self.rows.iter().map(Row::cells).collect();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([HEAD[column].chars().count()]).max().unwrap_or(0)
        };
        let mut text = format!(
            "{}, {} processors here, {} s each, medians of {}\n\n",
            self.between, self.processors, self.seconds, self.rounds
        );
        let mut line = |cells: &[String; 10]| {
            let padded: Vec<String> = cells
                .iter()
                .enumerate()
                .map(|(column, cell)| match column {
                    0 | 1 | 3 | 4 => format!("{cell:<w$}", w = width(column)),
                    _ => format!("{cell:>w$}", w = width(column)),
                })
                .collect();
            writeln!(text, "{}", padded.join("  ").trim_end()).expect("a String takes everything");
        };
        line(&HEAD.map(str::to_owned));
        for row in &rows {
            line(row);
        }
        text.push('\n');
        for (what, ratio) in self.ratios() {
            writeln!(text, "{ratio:>6.2}  {what}").expect("a String takes everything");
        }
        for missing in &self.missing {
            writeln!(text, "not measured: {missing}").expect("a String takes everything");
        }
        text
    }

    /// For people who look later: one file, with nothing that it would have to fetch.
    pub fn to_html(&self) -> String {
        let fastest = self.rows.iter().map(|row| row.mib_per_s).fold(1.0, f64::max);
        let mut body = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row.cells().iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
            let bar = format!(
                "<td class=\"bar\"><div class=\"{:?}\" style=\"width:{:.1}%\"></div></td>",
                row.group,
                row.mib_per_s / fastest * 100.0
            );
            writeln!(body, "<tr>{}{bar}</tr>", cells.concat()).expect("a String takes everything");
        }
        let head: Vec<String> = HEAD.iter().map(|cell| format!("<th>{}</th>", escape(cell))).collect();
        let list =
            |items: Vec<String>| items.iter().map(|it| format!("<li>{}</li>", escape(it))).collect::<Vec<_>>().concat();
        let ratios = list(self.ratios().iter().map(|(what, ratio)| format!("{ratio:.2}: {what}")).collect());
        let missing = list(self.missing.iter().map(|it| format!("not measured: {it}")).collect());
        let ciphers = list(self.ciphers.iter().map(|(name, speed)| format!("{name}: {speed:.0} MiB/s")).collect());
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>vmferry: the link</title><style>{STYLE}</style>\
             <h1>What moves bytes, and what it costs</h1><p>{}, {} processors, {} s each, medians of {}.</p>\
             <table><tr>{}<th></th></tr>{body}</table><h2>Ratios</h2><ul>{ratios}{missing}</ul>\
             <h2>One core, 16 KiB records</h2><ul>{ciphers}</ul></html>\n",
            escape(&self.between),
            self.processors,
            self.seconds,
            self.rounds,
            head.concat()
        )
    }
}

const STYLE: &str = "body{font:15px system-ui,sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse}\
    td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
    .bar{width:14em}.bar div{height:.9em}.Vmferry{background:#0a7d5a}.Today{background:#8a8f98}.Study{background:#c9ced6}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, group: Group, security: &str, mib_per_s: f64, cpu: f64) -> Row {
        Row {
            name: name.into(),
            group,
            security: security.into(),
            streams: 4,
            compression: "none".into(),
            data: "random".into(),
            mib_per_s,
            wire_mib_per_s: None,
            source_cpu: Some(cpu),
            destination_cpu: Some(cpu),
            idle: 0.5,
            urgent: Some(Urgent { p50_ms: 0.1, p99_ms: 2.0, asked: 9 }),
        }
    }

    fn report() -> LinkReport {
        LinkReport {
            between: "loopback".into(),
            seconds: 1.0,
            rounds: 1,
            processors: 2,
            ciphers: vec![("aes-128-gcm".into(), 5000.0)],
            rows: vec![
                row("vmferry", Group::Vmferry, "plain", 4000.0, 0.2),
                row("vmferry", Group::Vmferry, "aes-128-gcm", 3000.0, 0.3),
                row("ssh", Group::Today, "chacha20", 300.0, 3.0),
                row("QEMU TLS <x>", Group::Today, "tls", 1000.0, 0.6),
            ],
            missing: vec!["tea".into()],
        }
    }

    #[test]
    fn ratios_compare_like_with_like() {
        let ratios = report().ratios();
        let of = |what: &str| ratios.iter().find(|(name, _)| name.contains(what)).map(|(_, ratio)| *ratio);
        assert_eq!(of("TLS / plain"), Some(0.75));
        assert_eq!(of("/ ssh"), Some(10.0));
        assert_eq!(of("CPU per GiB"), Some(0.5));
        assert_eq!(of("ssh aes128"), None, "what was not measured has no ratio");
    }

    #[test]
    fn every_form_has_every_row() {
        let report = report();
        for text in [report.to_text(), report.to_json(), report.to_html()] {
            for word in ["aes-128-gcm", "ssh", "3000", "tea"] {
                assert!(text.contains(word), "{word} is not in {text}");
            }
        }
        assert!(report.to_html().contains("QEMU TLS &lt;x&gt;"));
    }
}
