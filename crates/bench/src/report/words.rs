//! A report in words: for a terminal, and as the name of what was measured.

use std::fmt::Write;

use super::{Clocks, Origin, Outcome, PageCheck, RunReport, Settings};
use crate::in_words;

const MIB: f64 = 1_048_576.0;

impl Settings {
    /// What was measured, told from other set-ups; runs of the same set-up can be compared.
    pub fn set_up(&self, source_qemu: Option<&str>) -> String {
        let mut name = format!("{} · {}", self.scenario, self.engine);
        if let Some(qemu) = source_qemu {
            // The packager's word is in brackets.
            write!(name, " {}", qemu.split(' ').next().unwrap_or(qemu)).expect("a String takes everything");
        }
        write!(name, " · {} vCPU, {}", self.vcpus, size(self.written.unwrap_or(self.ram))).expect("as above");
        if let Some(mode) = self.guest_mode.as_deref() {
            write!(name, " {mode}").expect("as above");
        }
        if self.guest_fill.as_deref() == Some("text") {
            name.push_str(" text");
        }
        if let Some(rate) = self.guest_rate {
            write!(name, " at {}/s", size(rate)).expect("as above");
        }
        match (&self.to, self.link_bits) {
            (Some(to), _) => write!(name, " · to {to}"),
            (None, Some(bits)) => write!(name, " · {}", bits_in_words(bits)),
            (None, None) => write!(name, " · {}", self.transport),
        }
        .expect("as above");
        name
    }
}

/// Bits a second, as people say them.
fn bits_in_words(bits: u64) -> String {
    match bits {
        1_000_000_000.. => format!("{} Gbit/s", bits as f64 / 1e9),
        _ => format!("{} Mbit/s", bits as f64 / 1e6),
    }
}

/// Bytes, as people say them.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0x4000_0000.. => format!("{} GiB", (bytes as f64 / MIB / 102.4).round() / 10.0),
        _ => format!("{} MiB", (bytes as f64 / MIB).round()),
    }
}

impl RunReport {
    /// See [`Settings::set_up`].
    pub fn set_up(&self) -> String {
        self.settings.set_up(self.versions.source_qemu.as_deref())
    }

    /// The downtime as the guest felt it; as it is told, where nobody could hear the guest. In ms.
    pub fn downtime_ms(&self) -> Option<f64> {
        let told = self.summary.downtime_told_ms.filter(|_| self.origin != Origin::Bench);
        self.summary.downtime_ms.or(told)
    }

    /// For people at a terminal.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n", self.set_up());
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                writeln!(text, "  {name:<14} {value}").expect("a String takes everything");
            }
        };
        let s = &self.summary;
        let ms = |value: Option<f64>| value.map(|ms| format!("{ms:.0} ms"));
        line(
            "outcome",
            Some(match &self.outcome {
                Outcome::Completed => "completed".into(),
                Outcome::NotCompleted { reason } => format!("did not complete: {reason}"),
            }),
        );
        line("total", s.total_ms.map(|ms| format!("{:.2} s", ms / 1e3)));
        line("RAM", s.ram_ms.map(|ms| format!("{:.2} s, {} rounds", ms / 1e3, s.rounds.unwrap_or(0))));
        let felt = if self.origin == Origin::Bench { "downtime felt" } else { "downtime" };
        line(felt, ms(self.downtime_ms()));
        line("worst stall", ms(s.worst_stall_ms));
        line("worst 64 MiB", ms(s.worst_64_mib_ms));
        let speed = |value: Option<f64>| in_words(value, |value| format!("{:.0}", value / MIB));
        line(
            "guest speed",
            s.speed_before.map(|_| {
                let [before, during, after] = [s.speed_before, s.speed_during, s.speed_after].map(speed);
                format!("{before} MiB/s before, {during} during, {after} after")
            }),
        );
        line("sent", s.sent.map(size));
        line("link", self.settings.link_measured.map(|rate| format!("carried {}/s before", size(rate))));
        let clocks =
            |it: Clocks| format!("of both hosts compared to within {:.2} ms, drift {:.2}", it.error_ms, it.drift_ms);
        line("clocks", self.clocks.map(clocks));
        line(
            "memory",
            match &self.page_check {
                PageCheck::Intact { pages } => Some(format!("all {pages} pages are as the guest wrote them")),
                PageCheck::Damaged { detail } => Some(format!("DAMAGED: {detail}")),
                PageCheck::NotChecked { .. } => None,
            },
        );
        for lever in &self.levers {
            let acted = if lever.acted { "acted" } else { "did not act" };
            line("lever", Some(format!("{} {acted}: {}", lever.name, lever.evidence)));
        }
        for note in &self.notes {
            line("note", Some(note.clone()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_are_told_as_people_say_them() {
        assert_eq!([size(64 << 20), size(1 << 30), size(3 << 29)], ["64 MiB", "1 GiB", "1.5 GiB"]);
        assert_eq!([bits_in_words(300_000_000), bits_in_words(10_000_000_000)], ["300 Mbit/s", "10 Gbit/s"]);
    }

    #[test]
    fn set_ups_that_differ_in_what_matters_have_different_names() {
        let one = Settings { scenario: "a".into(), engine: "qemu".into(), vcpus: 1, ..Settings::default() };
        let others = [
            Settings { vcpus: 4, ..one.clone() },
            Settings { engine: "external".into(), ..one.clone() },
            Settings { link_bits: Some(1), ..one.clone() },
            Settings { guest_fill: Some("text".into()), ..one.clone() },
            Settings { written: Some(5 << 30), ..one.clone() },
        ];
        assert!(others.iter().all(|other| other.set_up(None) != one.set_up(None)));
        assert_ne!(one.set_up(Some("7.2.0")), one.set_up(Some("10.0.2")));
    }
}
