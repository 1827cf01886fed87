//! Reads the reports of guestperf, QEMU's own harness (tests/migration/guestperf in QEMU's sources).
//!
//! Its JSON has no version. Its stamps are by the wall clock, but for the guest's, which are by the guest's: seconds since
//! the epoch, as its harness sets the guest's clock. Its rounds are the first look at each: what was left then. It counts
//! `bandwidth` in MiB/s, 125000 being as good as no bound; `transfer_rate_mbs` is in Mbit/s; processor times add up, in
//! ms, and one list is of the whole QEMU and one of its vCPUs. It knows no heartbeat, so there are no stalls, and no check
//! of pages. Fields that newer ones added (multifd, dirty-limit) may be missing.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::reading::{json, text_of};
use super::{
    CpuSample, GuestRecord, MarkKind, Origin, Outcome, PageCheck, ProgressSample, QemuCpu, ReadError, Round, RunReport,
    Settings,
};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// What guestperf sets when a scenario has no bound, in MiB/s.
const UNBOUNDED: f64 = 125_000.0;
const PAGE: f64 = 4096.0;

#[derive(Deserialize)]
struct Theirs {
    hardware: TheirHardware,
    scenario: TheirScenario,
    progress_history: Vec<TheirProgress>,
    guest_timings: Vec<Timing>,
    qemu_timings: Vec<Timing>,
    vcpu_timings: Vec<Timing>,
    #[serde(default)]
    binary: String,
    #[serde(default)]
    transport: String,
    #[serde(default)]
    sleep: f64,
}

#[derive(Deserialize)]
struct TheirHardware {
    cpus: u32,
    /// GiB
    mem: f64,
}

#[derive(Deserialize)]
struct TheirScenario {
    name: String,
    downtime: f64,
    bandwidth: f64,
    max_iters: u32,
    max_time: f64,
    #[serde(default)]
    pause: bool,
    #[serde(default)]
    pause_iters: u32,
    #[serde(default)]
    post_copy: bool,
    #[serde(default)]
    post_copy_iters: u32,
    #[serde(default)]
    auto_converge: bool,
    /// All others, and those of auto-converge and of what compresses.
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct TheirProgress {
    status: String,
    ram: TheirRam,
    now: f64,
    #[serde(default)]
    duration: f64,
    #[serde(default)]
    downtime: f64,
    #[serde(default)]
    throttle_pcent: f64,
}

#[derive(Deserialize)]
struct TheirRam {
    transferred_bytes: u64,
    remaining_bytes: u64,
    #[serde(default)]
    total_bytes: u64,
    #[serde(default)]
    dirty_rate_pps: f64,
    #[serde(default)]
    transfer_rate_mbs: f64,
    iterations: u32,
}

#[derive(Clone, Copy, Deserialize)]
struct Timing {
    tid: u32,
    timestamp: f64,
    value: f64,
}

/// Reads a file of guestperf's and makes a report of it.
pub fn import(path: &Path) -> Result<RunReport, ReadError> {
    let of = |source| ReadError::Of { path: path.into(), source: Box::new(source) };
    import_text(&text_of(path)?).map_err(of)
}

/// The same from its text.
pub fn import_text(text: &str) -> Result<RunReport, ReadError> {
    let value = json(text)?;
    if value.get("progress_history").is_none() || value.get("guest_timings").is_none() {
        return Err(ReadError::NotAReport { guestperf: false });
    }
    serde_json::from_value(value).map(|theirs| convert(&theirs)).map_err(ReadError::Malformed)
}

fn convert(theirs: &Theirs) -> RunReport {
    let mut report = RunReport::new(Origin::Guestperf, settings(theirs));
    let history = &theirs.progress_history;
    if !theirs.binary.is_empty() {
        report
            .notes
            .push(format!("The source's QEMU was {}; of which version, guestperf does not tell.", theirs.binary));
    }
    report.versions.accelerator = Some("kvm".into());
    // The migration began as long before its first look as that says.
    let begun = history.first().map_or(0.0, |first| first.now - first.duration / 1e3);
    report.started = begun.max(0.0) as u64;
    let at_ms = |stamp: f64| (stamp - begun) * 1e3;
    let throttle = |it: &TheirProgress| it.throttle_pcent.clamp(0.0, 100.0) as u8;
    let rate = |megabits: f64| (megabits.max(0.0) * 1e6 / 8.0) as u64;
    report.samples.progress = history
        .iter()
        .map(|it| ProgressSample {
            at_ms: at_ms(it.now),
            round: it.ram.iterations,
            remaining: it.ram.remaining_bytes,
            sent: it.ram.transferred_bytes,
            dirty_rate: (it.ram.dirty_rate_pps.max(0.0) * PAGE) as u64,
            link_rate: rate(it.ram.transfer_rate_mbs),
            throttle: throttle(it),
        })
        .collect();
    report.rounds = history
        .windows(2)
        .filter(|pair| pair[1].ram.iterations > pair[0].ram.iterations)
        .map(|pair| {
            let ms = (pair[1].now - pair[0].now) * 1e3;
            let sent = pair[1].ram.transferred_bytes.saturating_sub(pair[0].ram.transferred_bytes);
            Round {
                round: pair[0].ram.iterations,
                at_ms: at_ms(pair[0].now),
                ms,
                remaining: pair[0].ram.remaining_bytes,
                dirty_rate: (pair[0].ram.dirty_rate_pps.max(0.0) * PAGE) as u64,
                link_rate: if ms > 0.0 { (sent as f64 / ms * 1e3) as u64 } else { 0 },
                throttle: throttle(&pair[0]),
            }
        })
        .collect();
    let guest =
        |it: &Timing| GuestRecord { at_ms: at_ms(it.timestamp), ms: it.value, bytes: GIB, thread: it.tid, host: None };
    report.samples.records = theirs.guest_timings.iter().map(guest).collect();
    report.samples.records.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    report.samples.cpu = cpu(theirs, at_ms);
    report.page_check = PageCheck::NotChecked { reason: "guestperf's guest does not check its pages".into() };
    report.add_mark(MarkKind::Copy, 0.0);
    end(&mut report, theirs, at_ms);
    report
}

fn end(report: &mut RunReport, theirs: &Theirs, at_ms: impl Fn(f64) -> f64) {
    let Some(last) = theirs.progress_history.last() else {
        report.outcome = Outcome::NotCompleted { reason: "it has no history".into() };
        return;
    };
    report.add_mark(MarkKind::End, at_ms(last.now));
    let during = |from: f64, to: f64| {
        let times = report.samples.records.iter().filter(|it| (from..to).contains(&it.at_ms)).map(|it| it.ms);
        let (count, sum) = times.fold((0.0, 0.0), |(count, sum), ms| (count + 1.0, sum + ms));
        let threads = f64::from(theirs.hardware.cpus.max(1));
        (count > 0.0).then(|| GIB as f64 / (sum / count / 1e3) * threads)
    };
    let (before, meanwhile, after) =
        (during(f64::MIN, 0.0), during(0.0, at_ms(last.now)), during(at_ms(last.now), f64::MAX));
    let s = &mut report.summary;
    (s.speed_before, s.speed_during, s.speed_after) = (before, meanwhile, after);
    s.sent = Some(last.ram.transferred_bytes);
    s.rounds = Some(last.ram.iterations);
    s.throttle = theirs.progress_history.iter().map(|it| it.throttle_pcent.clamp(0.0, 100.0) as u8).max();
    s.post_copy = Some(theirs.progress_history.iter().any(|it| it.status.starts_with("postcopy")));
    if last.status != "completed" {
        report.outcome = Outcome::NotCompleted { reason: format!("QEMU's migration ended as {}", last.status) };
        return;
    }
    report.outcome = Outcome::Completed;
    s.total_ms = Some(last.duration);
    s.ram_ms = Some(last.duration);
    s.downtime_told_ms = Some(last.downtime);
}

fn settings(theirs: &Theirs) -> Settings {
    let (scenario, hardware) = (&theirs.scenario, &theirs.hardware);
    let mut parameters = scenario.rest.clone();
    parameters.retain(|_, value| !value.is_null() && *value != Value::Bool(false));
    let ram = theirs.progress_history.iter().map(|it| it.ram.total_bytes).max().unwrap_or(0);
    let written = (hardware.mem * GIB as f64) as u64;
    Settings {
        scenario: scenario.name.clone(),
        about: "A run of QEMU's guestperf; its scenarios' rounds are counted from their beginning.".into(),
        engine: "qemu".into(),
        driver: "scenario".into(),
        vcpus: hardware.cpus,
        ram: ram.max(written),
        written: Some(written),
        guest_mode: Some("write".into()),
        guest_fill: Some("random".into()),
        transport: theirs.transport.clone(),
        bandwidth: (scenario.bandwidth < UNBOUNDED).then_some((scenario.bandwidth * MIB as f64) as u64),
        downtime_limit_ms: scenario.downtime as u64,
        most_rounds: Some(scenario.max_iters),
        most_time_ms: Some((scenario.max_time * 1e3) as u64),
        post_copy_after: scenario.post_copy.then_some(scenario.post_copy_iters),
        pause_after: scenario.pause.then_some(scenario.pause_iters),
        capabilities: scenario.auto_converge.then(|| "auto-converge".to_owned()).into_iter().collect(),
        parameters,
        watched_ms: [(theirs.sleep * 1e3) as u64; 2],
        ..Settings::default()
    }
}

/// What adds up, as what was used between two looks. The looks at a QEMU and at its vCPUs come in pairs.
fn cpu(theirs: &Theirs, at_ms: impl Fn(f64) -> f64) -> Vec<CpuSample> {
    let vcpus_until = |stamp: f64| -> f64 {
        let mut last = std::collections::BTreeMap::new();
        for it in theirs.vcpu_timings.iter().filter(|it| it.timestamp <= stamp + 0.25) {
            last.insert(it.tid, it.value);
        }
        last.values().sum()
    };
    let between = |pair: &[Timing]| {
        let ms = (pair[1].timestamp - pair[0].timestamp) * 1e3;
        if ms <= 0.0 {
            return None;
        }
        let all = (pair[1].value - pair[0].value) / ms * 100.0;
        let vcpu = (vcpus_until(pair[1].timestamp) - vcpus_until(pair[0].timestamp)) / ms * 100.0;
        // Which of the rest migrates, it does not tell.
        let source_qemu = Some(QemuCpu { vcpu, migration: 0.0, other: (all - vcpu).max(0.0) });
        Some(CpuSample { at_ms: at_ms(pair[1].timestamp), ms, source_qemu, ..CpuSample::default() })
    };
    theirs.qemu_timings.windows(2).filter_map(between).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As guestperf writes them, made up for this test.
    fn theirs() -> Value {
        let progress = |status: &str, now: f64, duration: u64, round: u32, remaining: u64, sent: u64| {
            serde_json::json!({
                "status": status, "now": now, "duration": duration, "downtime": 210, "downtime_expected": 300,
                "setup_time": 4, "throttle_pcent": if round > 1 { 30 } else { 0 },
                "ram": { "transferred_bytes": sent, "remaining_bytes": remaining, "total_bytes": 1_610_612_736u64,
                    "duplicate_pages": 9, "skipped_pages": 0, "normal_pages": 8, "normal_bytes": 32768,
                    "dirty_rate_pps": 1000, "transfer_rate_mbs": 800.0, "iterations": round }
            })
        };
        serde_json::json!({
            "hardware": { "cpus": 1, "mem": 1, "src_cpu_bind": null, "src_mem_bind": null, "dst_cpu_bind": null,
                "dst_mem_bind": null, "prealloc_pages": false, "huge_pages": false, "locked_pages": false },
            "scenario": { "name": "post-copy-iters-5", "downtime": 500, "bandwidth": 125, "max_iters": 30,
                "max_time": 300, "pause": false, "pause_iters": 5, "post_copy": true, "post_copy_iters": 5,
                "auto_converge": false, "auto_converge_step": 10, "compression_mt": false,
                "compression_mt_threads": 1, "compression_xbzrle": false, "compression_xbzrle_cache": 10,
                "dirty_limit": false },
            "progress_history": [progress("active", 1000.1, 100, 1, 1 << 30, 0),
                progress("active", 1010.1, 10_100, 2, 1 << 29, 1 << 30),
                progress("completed", 1015.1, 15_000, 2, 0, 3 << 29)],
            "guest_timings": [{ "tid": 7, "timestamp": 999.0, "value": 500 }, { "tid": 7, "timestamp": 1005.0, "value": 2000 }],
            "qemu_timings": [{ "tid": 9, "timestamp": 998.0, "value": 1000.0 }, { "tid": 9, "timestamp": 999.0, "value": 2500.0 }],
            "vcpu_timings": [{ "tid": 7, "timestamp": 998.001, "value": 0.0 }, { "tid": 7, "timestamp": 999.001, "value": 990.0 }],
            "binary": "/usr/bin/qemu-system-x86_64", "dst_host": "localhost", "kernel": "k", "initrd": "i",
            "transport": "unix", "sleep": 15
        })
    }

    #[test]
    fn a_report_of_guestperf_says_the_same_as_ours() {
        let report = import_text(&theirs().to_string()).unwrap();
        assert_eq!(report.outcome, Outcome::Completed);
        assert_eq!(report.settings.post_copy_after, Some(5));
        assert_eq!(report.settings.pause_after, None);
        assert_eq!(report.settings.bandwidth, Some(125 << 20));
        assert_eq!(report.summary.total_ms, Some(15_000.0));
        assert_eq!(report.summary.throttle, Some(30));
        assert_eq!(report.summary.speed_before, Some(2.0 * GIB as f64));
        assert_eq!(report.summary.speed_during, Some(0.5 * GIB as f64));
        let round = report.rounds[0];
        assert_eq!((round.round, round.remaining), (1, GIB));
        assert!((round.ms - 10_000.0).abs() < 1.0 && round.link_rate.abs_diff(GIB / 10) < 1000, "{round:?}");
        assert_eq!(report.samples.progress[0].dirty_rate, 1000 * 4096);
        let cpu = report.samples.cpu[0].source_qemu.unwrap();
        assert!((cpu.vcpu - 99.0).abs() < 0.1 && (cpu.other - 51.0).abs() < 0.1, "{cpu:?}");
        assert!(report.samples.records[0].at_ms < 0.0, "the first is of the warm-up");
        assert_eq!(super::super::read_text(&report.to_json()).unwrap(), report);
    }

    #[test]
    fn a_migration_that_guestperf_cancelled_did_not_complete() {
        let mut theirs = theirs();
        theirs["progress_history"][2]["status"] = "cancelled".into();
        let report = import_text(&theirs.to_string()).unwrap();
        assert!(!report.outcome.is_completed());
        assert_eq!(report.summary.total_ms, None);
    }

    #[test]
    fn what_is_none_of_guestperfs_is_refused() {
        assert!(import_text("{}").unwrap_err().to_string().contains("no report"));
        assert!(import_text("{\"progress").unwrap_err().to_string().contains("ends in the middle"));
        let mut broken = theirs();
        broken["hardware"] = 5.into();
        assert!(matches!(import_text(&broken.to_string()), Err(ReadError::Malformed(_))));
        let mut empty = theirs();
        empty["progress_history"] = serde_json::json!([]);
        assert!(!import_text(&empty.to_string()).unwrap().outcome.is_completed());
    }
}
