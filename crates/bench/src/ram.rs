//! `vmferry bench ram`: the engines side by side, with the same guests over the same link in one run.
//!
//! Two hosts in network namespaces, a guest of 1 GiB. Set-ups alternate, so that a machine that gets slower does so for
//! all of them. What a set-up did is told as the median of its rounds.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use vmferry_api::{EngineName, Step};

use crate::migration::{Measured, measure};
use crate::testbed::{Testbed, TestbedError, TestbedOptions, two_qemus};
use crate::tracking::{Tracked, track};
use crate::{Fill, GuestKind, GuestOptions, Mode, in_words, median};

const RAM_MIB: u64 = 1024;
const WRITTEN: u64 = 512 << 20;
const GIGABIT: u64 = 1_000_000_000;
/// What a guest that converges may write a second.
const LEISURELY: u64 = 48 << 20;
const VM: &str = "bench";
/// What the last figures are called.
const TRACKING: [(&str, Mode); 2] =
    [("writing, tracked and nothing else", Mode::Write), ("reading, tracked and nothing else", Mode::Read)];
const LOOKS: [Duration; 3] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1)];

/// What to measure.
#[derive(Clone, Debug)]
pub struct RamBenchOptions {
    /// The `vmferry` binary.
    pub vmferry: PathBuf,
    /// How often.
    pub rounds: u32,
    /// Only set-ups whose names contain this.
    pub only: String,
    /// What is moved.
    pub kind: GuestKind,
}

/// A guest, a link and an engine.
struct SetUp {
    guest: &'static str,
    mode: Mode,
    rate: Option<u64>,
    link_bits: Option<u64>,
    engine: EngineName,
    how: &'static str,
    arguments: &'static [&'static str],
    plain: bool,
    /// The guest's processors, and threads.
    processors: u32,
}

impl SetUp {
    fn name(&self) -> String {
        let link = if self.link_bits.is_some() { "1 Gbit/s" } else { "unshaped" };
        let plain = if self.plain { ", plain" } else { "" };
        format!("{}, {link}: {}{}{plain}", self.guest, self.engine, self.how)
    }
}

fn set_ups() -> Vec<SetUp> {
    let mut all = Vec::new();
    let engines: [(EngineName, &str, &[&str]); 3] = [
        (EngineName::External, "", &[]),
        (EngineName::Qemu, "", &[]),
        (EngineName::Qemu, " (multifd)", &["--no-post-copy"]),
    ];
    for (engine, how, arguments) in engines {
        for plain in [false, true] {
            let (guest, mode) = ("idle", Mode::Idle);
            all.push(SetUp { guest, mode, rate: None, link_bits: None, engine, how, arguments, plain, processors: 1 });
        }
    }
    for (engine, how, arguments) in &engines[..2] {
        let guests = [("writing", Mode::Write, None), ("hotcold", Mode::HotCold, Some(LEISURELY))];
        for (guest, mode, rate) in guests {
            let (link_bits, engine, plain) = (Some(GIGABIT), *engine, false);
            all.push(SetUp { guest, mode, rate, link_bits, engine, how, arguments, plain, processors: 1 });
        }
    }
    for (engine, how) in [(EngineName::External, " (paced)"), (EngineName::Qemu, " (auto-converge)")] {
        for (guest, mode, processors) in [("writing", Mode::Write, 1), ("writing and reading", Mode::Mixed, 2)] {
            let (rate, link_bits, arguments, plain) = (None, Some(GIGABIT), &["--no-post-copy"][..], false);
            all.push(SetUp { guest, mode, rate, link_bits, engine, how, arguments, plain, processors });
        }
    }
    all
}

/// What a set-up did: medians of what was measured.
#[derive(Clone, Debug, Serialize)]
struct Row {
    set_up: String,
    runs: usize,
    total_ms: Option<f64>,
    downtime_felt_ms: Option<f64>,
    downtime_reported_ms: Option<f64>,
    worst_stall_ms: Option<f64>,
    worst_64_mib_ms: Option<f64>,
    /// How fast the guest rewrote memory until it left, against before.
    speed_while_copied: Option<f64>,
    /// The same for threads that only read.
    reading_while_copied: Option<f64>,
    /// The most that the guest was slowed down, in percent.
    slowed: Option<f64>,
    sent_mib: Option<f64>,
    rounds: Option<f64>,
    post_copy: Option<f64>,
    /// From when the destination heard of a fault until the page was there, in post-copy by the agents.
    fault_median_ms: Option<f64>,
    fault_p99_ms: Option<f64>,
    source_rss_mib: Option<f64>,
    destination_rss_mib: Option<f64>,
    source_cpu_s: Option<f64>,
    destination_cpu_s: Option<f64>,
    /// How fast the RAM was copied, switchover and post-copy included, and processor time for it on each side.
    gib_per_s: Option<f64>,
    source_cpu_s_per_gib: Option<f64>,
    destination_cpu_s_per_gib: Option<f64>,
}

/// What all of them did.
#[derive(Clone, Debug, Serialize)]
pub struct RamReport {
    qemu: String,
    processors: usize,
    /// What runs the guest.
    accelerator: String,
    rows: Vec<Row>,
    /// What tracking alone costs guests, of those that were asked for.
    tracking: Vec<Tracked>,
}

/// Measures; needs root, for the namespaces. `tell` hears what is under way.
pub async fn bench_ram(options: &RamBenchOptions, tell: impl Fn(&str)) -> Result<RamReport, TestbedError> {
    let newer = two_qemus().ok().and_then(|[_, newer]| newer);
    let accelerator = accelerator(options, newer.clone()).await?;
    let set_ups = set_ups().into_iter().filter(|it| options.kind == GuestKind::Linux || it.processors == 1);
    let set_ups: Vec<SetUp> = set_ups.filter(|it| it.name().contains(&options.only)).collect();
    let mut measured: Vec<Vec<Measured>> = set_ups.iter().map(|_| Vec::new()).collect();
    for round in 1..=options.rounds {
        for (set_up, runs) in set_ups.iter().zip(&mut measured) {
            tell(&format!("round {round}: {}", set_up.name()));
            runs.push(run(options, set_up, newer.clone()).await?);
        }
    }
    let rows =
        set_ups.iter().zip(&measured).filter(|(_, runs)| !runs.is_empty()).map(|(set_up, runs)| row(set_up, runs));
    let qemu = newer.as_ref().map_or_else(|| "the system's".into(), |dir| dir.display().to_string());
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = rows.collect();
    let mut tracking = Vec::new();
    for (what, mode) in TRACKING.into_iter().filter(|(what, _)| what.contains(&options.only)) {
        tell(what);
        tracking.push(track_one(options, newer.clone(), what, mode).await?);
    }
    Ok(RamReport { qemu, processors, accelerator, rows, tracking })
}

/// What the guest will get.
async fn accelerator(options: &RamBenchOptions, qemu: Option<PathBuf>) -> Result<String, TestbedError> {
    let accel = options.kind.accelerator(&qemu.unwrap_or_default().join("qemu-system-x86_64")).await;
    accel.map(|accel| accel.name().into()).map_err(|why| TestbedError::Missing {
        what: format!("KVM ({why})"),
        hint: "measure under TCG, without --accel kvm",
    })
}

fn command_line(
    options: &RamBenchOptions,
    bed: &Testbed,
    guest: &GuestOptions,
    processors: u32,
) -> Result<Vec<String>, TestbedError> {
    match options.kind {
        GuestKind::Linux => bed.guest_command_line(guest, RAM_MIB, processors),
        GuestKind::Bare => Ok(bed.bare_guest_command_line(guest, RAM_MIB)),
    }
}

async fn track_one(
    options: &RamBenchOptions,
    qemu: Option<PathBuf>,
    what: &'static str,
    mode: Mode,
) -> Result<Tracked, TestbedError> {
    let bed =
        Testbed::start(TestbedOptions { qemu_dirs: [qemu.clone(), qemu], ..TestbedOptions::new(&options.vmferry) })
            .await?;
    let guest = GuestOptions { mem: WRITTEN, threads: 1, mode, rate: None, fill: Fill::Random };
    let watch = bed.start_guest(VM, command_line(options, &bed, &guest, 1)?).await?;
    let pid = bed.alpha().show(VM).await?.map_or(0, |vm| vm.pid);
    track(&watch, pid, RAM_MIB << 20, what, &LOOKS).await
}

async fn run(options: &RamBenchOptions, set_up: &SetUp, qemu: Option<PathBuf>) -> Result<Measured, TestbedError> {
    let trusted = "[[network]]\ncidr = \"192.0.2.0/24\"\nsecurity = \"plain\"".to_owned();
    let config = if set_up.plain { trusted } else { String::new() };
    let bed = Testbed::start(TestbedOptions {
        namespaces: true,
        link_bits: set_up.link_bits,
        qemu_dirs: [qemu.clone(), qemu],
        engine: Some(set_up.engine),
        config: [config.clone(), config],
        ..TestbedOptions::new(&options.vmferry)
    })
    .await?;
    let guest = GuestOptions {
        mem: WRITTEN,
        threads: set_up.processors,
        mode: set_up.mode,
        rate: set_up.rate,
        fill: Fill::Random,
    };
    let watch = bed.start_guest(VM, command_line(options, &bed, &guest, set_up.processors)?).await?;
    measure(&bed, &watch, VM, set_up.arguments).await
}

fn row(set_up: &SetUp, runs: &[Measured]) -> Row {
    let median = |figure: &dyn Fn(&Measured) -> Option<f64>| median(runs.iter().filter_map(figure));
    Row {
        set_up: set_up.name(),
        runs: runs.len(),
        total_ms: median(&|it| Some(it.total_ms)),
        downtime_felt_ms: median(&|it| it.felt.downtime_ms),
        downtime_reported_ms: median(&|it| Some(it.report.downtime_ms)),
        worst_stall_ms: median(&|it| it.felt.worst_stall_ms),
        worst_64_mib_ms: median(&|it| it.felt.worst_64_mib_ms),
        speed_while_copied: median(&|it| Some(it.median_64_mib_ms.0? / it.median_64_mib_ms.1?)),
        reading_while_copied: median(&|it| Some(it.read_per_second.1 / it.read_per_second.0)),
        slowed: median(&|it| Some(f64::from(it.report.throttle))),
        sent_mib: median(&|it| Some(it.report.sent as f64 / f64::from(1 << 20))),
        rounds: median(&|it| Some(f64::from(it.report.rounds))),
        post_copy: Some(runs.iter().filter(|it| it.report.post_copy).count() as f64 / runs.len() as f64),
        fault_median_ms: median(&|it| it.report.faults.as_ref().map(|faults| faults.median_ms)),
        fault_p99_ms: median(&|it| it.report.faults.as_ref().map(|faults| faults.p99_ms)),
        source_rss_mib: median(&|it| it.most_rss_mib[0]),
        destination_rss_mib: median(&|it| it.most_rss_mib[1]),
        source_cpu_s: median(&|it| it.cpu_s[0]),
        destination_cpu_s: median(&|it| it.cpu_s[1]),
        gib_per_s: median(&|it| Some(gib(it) / copied_s(it))),
        source_cpu_s_per_gib: median(&|it| Some(it.cpu_s[0]? / gib(it))),
        destination_cpu_s_per_gib: median(&|it| Some(it.cpu_s[1]? / gib(it))),
    }
}

fn gib(measured: &Measured) -> f64 {
    measured.report.sent as f64 / f64::from(1 << 30)
}

/// From the first byte to the last.
fn copied_s(measured: &Measured) -> f64 {
    let copies = |step: &Step| !matches!(step, Step::Plan | Step::Prepare | Step::Retire);
    measured.report.steps.iter().filter(|it| copies(&it.step)).map(|it| it.ms).sum::<f64>() / 1e3
}

impl RamReport {
    /// A table to be read.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "guest of {RAM_MIB} MiB, {} MiB of it in use, {} processors, QEMU in {}, {}; medians\n\n",
            WRITTEN >> 20,
            self.processors,
            self.qemu,
            self.accelerator
        );
        let head = [
            "total s",
            "downtime",
            "stall",
            "64 MiB",
            "speed",
            "reading",
            "slowed",
            "MiB sent",
            "rounds",
            "post-copy",
            "fault ms",
            "RSS MiB",
            "agents' CPU s",
            "GiB/s",
            "CPU s/GiB",
        ];
        let _ = write!(text, "{:40}", "");
        for word in head {
            let _ = write!(text, "{word:>14}");
        }
        text.push('\n');
        let number = |figure, digits: usize| in_words(figure, |it| format!("{it:.digits$}"));
        let with_unit = |figure, unit: &str| in_words(figure, |it| format!("{it:.0} {unit}"));
        let both = |here, there, digits| format!("{} / {}", number(here, digits), number(there, digits));
        for row in &self.rows {
            let cells = [
                number(row.total_ms.map(|ms| ms / 1e3), 2),
                with_unit(row.downtime_felt_ms, "ms"),
                with_unit(row.worst_stall_ms, "ms"),
                with_unit(row.worst_64_mib_ms, "ms"),
                number(row.speed_while_copied, 2),
                number(row.reading_while_copied, 2),
                with_unit(row.slowed, "%"),
                number(row.sent_mib, 0),
                number(row.rounds, 0),
                with_unit(row.post_copy.map(|share| share * 100.0), "%"),
                both(row.fault_median_ms, row.fault_p99_ms, 1),
                both(row.source_rss_mib, row.destination_rss_mib, 0),
                both(row.source_cpu_s, row.destination_cpu_s, 1),
                number(row.gib_per_s, 2),
                both(row.source_cpu_s_per_gib, row.destination_cpu_s_per_gib, 2),
            ];
            let _ = write!(text, "{:40}", row.set_up);
            for cell in cells {
                let _ = write!(text, "{cell:>14}");
            }
            text.push('\n');
        }
        for Tracked { what, before, looks, after } in &self.tracking {
            let told = |speed: f64| format!("{speed:.0} MiB/s, {}", number(Some(speed / before), 2));
            let _ = writeln!(text, "\n{what}: {before:.0} MiB/s before");
            for (every, speed) in looks {
                let _ = writeln!(text, "  a look each {every} ms: {}", told(*speed));
            }
            let _ = writeln!(text, "  afterwards: {}", told(*after));
        }
        text
    }

    /// The same for programs.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_nothing_measured_has_dashes_and_no_numbers_that_are_none() {
        let report = RamReport {
            qemu: "nowhere".into(),
            processors: 2,
            accelerator: "tcg".into(),
            rows: vec![row(&set_ups()[0], &[])],
            tracking: vec![Tracked { what: "writing", before: 0.0, looks: vec![(250, 0.0)], after: 0.0 }],
        };
        let text = report.to_text();
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        let line = text.lines().find(|line| line.starts_with("idle")).unwrap();
        let dashes = line.split_whitespace().filter(|word| *word == "-").count();
        assert_eq!(dashes, 15 + 4, "each of 15 columns, four of which have two sides: {line}");
        assert!(text.contains("a look each 250 ms: 0 MiB/s, -"), "{text}");
    }
}
