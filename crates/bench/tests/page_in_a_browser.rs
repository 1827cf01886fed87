//! The page of reports in a real browser, headless: charts are drawn, nothing is complained of, in light and dark and at
//! the width of a phone. Skipped, with a line that says so, where there is no Chromium.
//!
//! With `VMFERRY_SCREENSHOTS=FOLDER` it leaves pictures to be looked at, one of each look.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmferry_bench::page::page;
use vmferry_bench::report::{
    CpuSample, GuestRecord, Lever, MarkKind, Origin, Outcome, PageCheck, ProgressSample, QemuCpu, Round, RunReport,
    Settings, Stall, guestperf,
};

const LOOKS: [(&str, &str, u32); 4] =
    [("light", "#light", 1200), ("dark", "#dark", 1200), ("phone", "#light", 390), ("phone-dark", "#dark", 390)];

fn browser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    names.iter().flat_map(|name| folders.iter().map(move |dir| dir.join(name))).find(|file| file.exists())
}

/// A run as the benchmark would report it: `strength` makes one unlike another.
fn report(scenario: &str, strength: u32) -> RunReport {
    let settings = Settings {
        scenario: scenario.into(),
        engine: "qemu".into(),
        vcpus: 1,
        ram: 1 << 30,
        written: Some(512 << 20),
        guest_mode: Some("write".into()),
        transport: "link".into(),
        link_bits: Some(1_000_000_000),
        ..Settings::default()
    };
    let mut report = RunReport::new(Origin::Bench, settings);
    let end = 1000.0 * f64::from(4 + strength);
    report.outcome = Outcome::Completed;
    report.page_check = PageCheck::Intact { pages: 131_072 };
    report.levers = vec![Lever { name: "post-copy".into(), acted: true, evidence: "<b>17</b> pages".into() }];
    report.add_mark(MarkKind::Copy, 0.0);
    report.add_mark(MarkKind::Left, end - 300.0);
    report.add_mark(MarkKind::Arrived, end);
    report.summary.total_ms = Some(end);
    report.summary.downtime_ms = Some(300.0);
    report.summary.throttle = Some(20);
    for step in 0..40 + 10 * strength {
        let at_ms = f64::from(step) * 100.0;
        let round = step / 15 + 1;
        if step % 15 == 0 {
            report.rounds.push(Round { round, at_ms, ms: 1500.0, remaining: 1 << 29, ..Round::default() });
        }
        let remaining = (15 - u64::from(step % 15)) << 25;
        let (dirty_rate, link_rate) = (150 << 20, 110 << 20);
        report.samples.progress.push(ProgressSample {
            at_ms,
            round,
            remaining,
            sent: u64::from(step) << 23,
            dirty_rate,
            link_rate,
            throttle: 20,
        });
        let ms = 50.0 + f64::from(step % 7) * 10.0;
        report.samples.records.push(GuestRecord { at_ms, ms, bytes: 64 << 20, thread: 0, host: Some(0) });
        report.samples.stalls.push(Stall { at_ms, ms: 20.0 + f64::from(step), switchover: false });
        if step % 5 == 0 {
            let source_qemu = Some(QemuCpu { vcpu: 95.0, migration: f64::from(strength) * 10.0, other: 3.0 });
            report.samples.cpu.push(CpuSample {
                at_ms,
                ms: 500.0,
                host: Some(150.0),
                others: Some(2.0),
                source_qemu,
                ..CpuSample::default()
            });
        }
    }
    report
}

/// One that did not complete, and has next to nothing.
fn empty() -> RunReport {
    RunReport::new(Origin::Migrate, Settings { scenario: "</script>".into(), ..Settings::default() })
}

struct Shown {
    charts: u32,
    errors: u32,
    console: Vec<String>,
}

fn show(browser: &Path, dir: &Path, address: &str, width: u32, screenshot: Option<&Path>) -> Shown {
    let mut command = Command::new(browser);
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-extensions"])
        .args(["--enable-logging=stderr", "--virtual-time-budget=4000", "--allow-file-access-from-files"])
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .arg(format!("--window-size={},3200", width.max(500)))
        .stdin(Stdio::null());
    match screenshot {
        Some(path) => command.arg(format!("--screenshot={}", path.display())),
        None => command.arg("--dump-dom"),
    };
    let output = command.arg(address).output().expect("the browser starts");
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |name: &str| {
        let value = dom.split_once(&format!("{name}=\"")).and_then(|(_, rest)| rest.split('"').next());
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let log = String::from_utf8_lossy(&output.stderr);
    let console = log.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned).collect();
    Shown { charts: count("data-charts"), errors: count("data-errors"), console }
}

#[test]
fn every_chart_is_drawn_and_nothing_is_complained_of() {
    let Some(browser) = browser() else {
        eprintln!("skipped: there is no Chromium to show the page in");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let old = guestperf::import_text(include_str!("guestperf.json")).unwrap();
    let runs = [report("post-copy-5-iters", 1), report("post-copy-5-iters", 2), old, empty()];
    // Speed, stalls, what is left, rates, throttle, and the processors of those that are drawn and have any: of two runs
    // of one kind, the first is.
    for (name, runs, charts) in [("one", &runs[..1], 6), ("many", &runs[..], 7), ("nothing", &runs[3..], 0)] {
        let file = dir.path().join(format!("{name}.html"));
        std::fs::write(&file, page("A title & more", runs)).unwrap();
        // What a look changes shows where there is most.
        for (_, look, width) in &LOOKS[..if name == "many" { 2 } else { 1 }] {
            let shown = show(&browser, dir.path(), &format!("file://{}{look}", file.display()), *width, None);
            assert_eq!((shown.charts, shown.errors), (charts, 0), "{name} {look}: {:?}", shown.console);
            assert!(shown.console.is_empty(), "{:?}", shown.console);
        }
    }
    let Some(folder) = std::env::var_os("VMFERRY_SCREENSHOTS").map(PathBuf::from) else { return };
    std::fs::create_dir_all(&folder).unwrap();
    for (name, look, width) in LOOKS {
        // No window is as narrow as a phone, but a frame is.
        let frame = dir.path().join("frame.html");
        let style = format!("width:{width}px;height:3200px;border:0");
        std::fs::write(&frame, format!("<body style=\"margin:0\"><iframe src=\"many.html{look}\" style=\"{style}\">"))
            .unwrap();
        let picture = folder.join(format!("{name}.png"));
        show(&browser, dir.path(), &format!("file://{}", frame.display()), width, Some(&picture));
        assert!(std::fs::metadata(&picture).unwrap().len() > 20_000, "{} is a picture of something", picture.display());
    }
}
