//! What a migration is expected to do: said before it begins, and beside what it did.

use std::process::Stdio;

use vmferry_api::{Expected, Made, PlanView, PredictionView, Report, Watcher};
use vmferry_bench::{GuestOptions, Mode};

use crate::bed::{self, Bed, RAM_MIB, VM, assert_success, external, guest, options, text};
use crate::external::traces_in_qemu;
use crate::migrate::report;

/// A second by the clock costs a test as much as it needs.
const SHORT: [&str; 2] = ["--watch", "1"];

async fn predicted(bed: &Bed, more: &[&str]) -> (PlanView, PredictionView) {
    let to = bed.to();
    let arguments = [&["predict", VM, "--to", &to, "--json"], more].concat();
    let output = bed.alpha().vmferry(&arguments).await.expect("vmferry runs");
    assert_success(&output, bed);
    let plan: PlanView = serde_json::from_slice(&output.stdout).expect("a plan");
    let prediction = plan.prediction.clone().expect("it predicts");
    (plan, prediction)
}

/// What came of it is no further outside of the range than a test's machine can be held to.
fn holds(expected: &Expected, outcome: f64, slack: f64) -> bool {
    expected.low / slack <= outcome && outcome <= expected.high * slack
}

fn said(report: &Report) -> String {
    format!("{report:#?}")
}

/// The kernel notes writes to some of this process's memory.
fn is_tracked(pid: u32) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
    maps.lines().filter_map(|line| line.strip_prefix("VmFlags:")).any(|flags| flags.contains(" uw"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_watched_and_nothing_remains_of_that_and_what_is_predicted_comes_about() {
    let busy = GuestOptions { rate: Some(40 << 20), ..guest(Mode::Random) };
    let bed = bed::start(external(1, 1), busy).await;
    let (plan, it) = predicted(&bed, &["--watch", "3", "--bandwidth", "100MiB/s"]).await;
    assert_eq!(
        (plan.engine.as_str(), it.watched.by, it.watched.scans, it.migrations),
        ("external", Watcher::Agent, 12, 0)
    );
    let last = it.watched.written.last().expect("it was looked");
    assert!(last.bytes > 20 << 20 && last.bytes < 140 << 20, "{it:#?}");
    assert!(it.watched.written.windows(2).all(|pair| pair[0].bytes <= pair[1].bytes && pair[0].ms < pair[1].ms));
    assert!(it.watched.in_use > 128 << 20 && it.watched.faults == last.bytes / 4096, "{it:#?}");
    assert!(it.link_rate <= 100 << 20 && it.link_rate > 60 << 20 && it.round_trip_ms > 0.0, "{it:#?}");
    for expected in [it.total_ms, it.downtime_ms, it.sent] {
        assert!(0.0 < expected.low && expected.low <= expected.likely && expected.likely <= expected.high, "{it:#?}");
    }
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
    assert!(!is_tracked(bed.view(0).await.pid));
    assert!(bed.beta().show(VM).await.expect("answers").is_none(), "nothing is at the destination");
    bed.assert_never_stopped().await;

    let report = report(&bed, &["--bandwidth", "100MiB/s"]).await;
    let foretold = report.foretold.clone().expect("it was predicted");
    assert_eq!((foretold.made, foretold.total_ms), (Made::Before, it.total_ms));
    assert!(holds(&foretold.total_ms, report.total_ms, 1.5), "{}", said(&report));
    assert!(holds(&foretold.sent, report.sent as f64, 1.3), "{}", said(&report));
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_outruns_the_link_is_foretold_its_post_copy_or_what_is_done_without() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    let rate = ["--bandwidth", "60MiB/s"];
    let (_, it) = predicted(&bed, &[&SHORT[..], &rate].concat()).await;
    assert!(it.method.contains("post-copy") && it.at_risk_ms.likely > 100.0, "{it:#?}");
    let (_, it) = predicted(&bed, &[&SHORT[..], &rate, &["--no-post-copy"]].concat()).await;
    assert!(it.method.contains("held to") && it.at_risk_ms.high == 0.0, "{it:#?}");
    let given_up = ["--no-post-copy", "--max-time", "1s"];
    let (_, it) = predicted(&bed, &[&SHORT[..], &rate, &given_up].concat()).await;
    assert_eq!(it.method, "given up", "{it:#?}");
    let to = bed.to();
    let plain = bed.alpha().vmferry(&["predict", VM, "--to", &to, "--watch", "500ms", "-v"]).await.expect("runs");
    assert_success(&plain, &bed);
    for word in [
        "nothing was touched",
        "how ",
        "total ",
        "downtime ",
        "at risk",
        "watched",
        "it wrote",
        "no migration to beta yet",
    ] {
        assert!(text(&plain).contains(word), "{word:?} is not in: {}", text(&plain));
    }
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    for (bad, words) in [(&["--watch", "61"][..], "0 to 60 s"), (&["--downtime", "90s"], "makes no sense")] {
        let arguments = [&["predict", VM, "--to", &to], bad].concat();
        let refused = bed.alpha().vmferry(&arguments).await.expect("vmferry runs");
        assert!(refused.status.code() == Some(3) && text(&refused).contains(words), "{}", text(&refused));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_migration_is_predicted_when_its_copy_has_begun_and_the_next_one_to_that_host_learns_from_it() {
    let busy = GuestOptions { rate: Some(30 << 20), ..guest(Mode::Random) };
    let bed = bed::start(external(1, 1), busy).await;
    let (alpha, beta) = (bed.alpha().address.to_string(), bed.to());
    for round in 0..2 {
        let report = report(&bed, &["--bandwidth", "80MiB/s"]).await;
        let foretold = report.foretold.clone().expect("it was predicted");
        assert_eq!((foretold.made, foretold.migrations), (Made::AtStart, round));
        assert!(holds(&foretold.total_ms, report.total_ms, 1.5), "{}", said(&report));
        let back = ["migrate", VM, "--to", &alpha, "--bandwidth", "200MiB/s"];
        let back = bed.beta().vmferry(&back).await.expect("vmferry runs");
        assert_success(&back, &bed);
        assert!(text(&back).contains("  expected     total "), "{}", text(&back));
    }
    let (_, it) = predicted(&bed, &[&SHORT[..], &["--bandwidth", "80MiB/s"]].concat()).await;
    assert_eq!(it.migrations, 2);
    let said = bed.alpha().vmferry(&["predict", VM, "--to", &beta, "--watch", "0.2"]).await.expect("vmferry runs");
    assert!(text(&said).contains("2 migrations to beta"), "{}", text(&said));
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_agent_cannot_track_a_guest_qemu_tells_what_it_wrote_and_the_plan_says_so() {
    let mib = RAM_MIB.to_string();
    let ram = format!("memory-backend-ram,id=own,size={mib}M");
    let more = ["-object", &ram, "-machine", "memory-backend=own"];
    let bed = bed::start_with(external(1, 1), guest(Mode::Write), &more).await;
    let (plan, it) = predicted(&bed, &["--watch", "2", "--bandwidth", "60MiB/s"]).await;
    assert_eq!((plan.engine.as_str(), it.watched.by), ("qemu", Watcher::Qemu), "{plan:#?}");
    assert!(plan.notes.iter().any(|note| note.contains("sample") && note.contains("not shared")), "{plan:#?}");
    let last = it.watched.written.last().expect("it told");
    assert!(last.bytes > 60 << 20 && last.bytes < 384 << 20, "{it:#?}");
    let (plan, it) = predicted(&bed, &["--watch", "0", "--bandwidth", "60MiB/s"]).await;
    assert_eq!(it.watched.by, Watcher::Nobody);
    assert!(plan.notes.iter().any(|note| note.contains("ranges are wide")), "{plan:#?}");
    assert!(it.total_ms.high > it.total_ms.low * 1.5, "{it:#?}");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
}

/// Begins to watch the guest for long; gives back whoever waits for it.
async fn watching(bed: &Bed) -> (tokio::process::Child, u32) {
    let (to, pid) = (bed.to(), bed.view(0).await.pid);
    assert!(!is_tracked(pid));
    let mut command = bed.alpha().command(&["predict", VM, "--to", &to, "--watch", "60"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("vmferry runs");
    bed.eventually("it is watched", async || is_tracked(pid)).await;
    (child, pid)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_watched_no_more_when_whoever_asked_is_gone() {
    let bed = bed::start(external(0, 0), guest(Mode::Random)).await;
    let (mut child, pid) = watching(&bed).await;
    let refused = bed.migrate(&[]).await;
    assert!(refused.status.code() == Some(3), "one at a time: {}", text(&refused));
    child.kill().await.expect("killed");
    bed.eventually("it is not watched any more", async || !is_tracked(pid)).await;
    let (_, it) = predicted(&bed, &SHORT).await;
    assert_eq!(it.watched.by, Watcher::Agent);
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_as_it_was_when_the_agent_that_watched_it_is_killed() {
    let mut bed = bed::start(external(1, 1), guest(Mode::Random)).await;
    let (mut child, pid) = watching(&bed).await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    child.wait().await.expect("it ends");
    bed.eventually("it is not watched any more", async || !is_tracked(pid)).await;
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.eventually("it is found", async || bed.alpha().show(VM).await.expect("answers").is_some()).await;
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
    let (_, it) = predicted(&bed, &SHORT).await;
    assert_eq!(it.watched.by, Watcher::Agent);
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_paused_and_one_that_goes_first_are_foretold_what_becomes_of_them() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    assert_success(&bed.alpha().vmferry(&["pause", VM]).await.expect("vmferry runs"), &bed);
    let (_, it) = predicted(&bed, &["--bandwidth", "100MiB/s"]).await;
    assert_eq!((it.method.as_str(), it.watched.by), ("pre-copy", Watcher::Nobody), "{it:#?}");
    assert_eq!(bed.view(0).await.state, "paused");
    assert_success(&bed.alpha().vmferry(&["resume", VM]).await.expect("vmferry runs"), &bed);
    let (_, it) = predicted(&bed, &[&SHORT[..], &["--engine", "qemu"]].concat()).await;
    assert_eq!(it.watched.by, Watcher::Agent, "the agent watches whoever moves it");
    drop(bed);
    let bed = bed::start(bed::with_qemus(0, 0), guest(Mode::Write)).await;
    if bed.view(0).await.accelerator.as_deref() == Some("tcg") {
        let (_, it) = predicted(&bed, &[&SHORT[..], &["--bandwidth", "100MiB/s"]].concat()).await;
        assert_eq!(it.method, "post-copy from the first byte");
        let report = report(&bed, &["--bandwidth", "100MiB/s"]).await;
        let foretold = report.foretold.clone().expect("it was predicted");
        assert!(foretold.made == Made::Before && foretold.method == it.method, "{foretold:#?}");
        assert!(holds(&foretold.total_ms, report.total_ms, 2.0), "{}", said(&report));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_qemu_moves_is_predicted_too_when_its_first_round_is_over() {
    let bed = bed::start(options(), guest(Mode::Random)).await;
    let report = report(&bed, &["--bandwidth", "80MiB/s", "--downtime", "60s", "--max-time", "60s"]).await;
    let foretold = report.foretold.clone().expect("it was predicted");
    assert_eq!(foretold.made, Made::AtStart);
    assert!(holds(&foretold.total_ms, report.total_ms, 2.0), "{}", said(&report));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_recorded_or_watched_is_played_by_the_simulator() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let busy = GuestOptions { rate: Some(30 << 20), ..guest(Mode::Random) };
    let bed = bed::start(external(1, 1), busy).await;
    let (plan, _) = predicted(&bed, &[&SHORT[..], &["--bandwidth", "60MiB/s"]].concat()).await;
    std::fs::write(path("watched"), serde_json::to_string(&plan).expect("plain data")).expect("written");
    let report = report(&bed, &["--bandwidth", "60MiB/s", "--no-post-copy", "--record", &path("recorded")]).await;
    let recorded = std::fs::read_to_string(path("recorded")).expect("it was written");
    let recorded: serde_json::Value = serde_json::from_str(&recorded).expect("a report");
    assert!(recorded["decisions"].as_array().is_some_and(|it| !it.is_empty()), "{recorded:#}");
    for of in ["watched", "recorded"] {
        let file = path(of);
        let simulated = ["sim", "--trace", &file, "--cases", "3", "--policy", "vmferry", "--no-post-copy", "--json"];
        let output = bed.alpha().vmferry(&simulated).await.expect("vmferry runs");
        assert_success(&output, &bed);
        let table: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a table");
        let total = table["rows"][0]["total"][0].as_f64().expect("a time");
        let copied = report.steps.iter().find(|it| it.step == vmferry_api::Step::CopyRam).expect("it copied").ms / 1e3;
        assert!(total > copied / 2.0 && total < copied * 2.0, "{of}: {total} and {copied}");
    }
    let file = path("none");
    let refused = bed.alpha().vmferry(&["sim", "--trace", &file]).await.expect("vmferry runs");
    assert!(refused.status.code() == Some(3) && text(&refused).contains("none"), "{}", text(&refused));
}

/// Guests of all kinds over links of several rates, there and back; prints how far each prediction was off.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes some minutes: make predictions"]
async fn predictions_of_all_kinds_of_guests_are_about_right() {
    let mut off = [Vec::new(), Vec::new(), Vec::new()];
    for (mode, mib) in [(Mode::Idle, None), (Mode::Random, Some(30)), (Mode::HotCold, Some(60)), (Mode::Write, None)] {
        let bed = bed::start(external(1, 1), GuestOptions { rate: mib.map(|it| it << 20), ..guest(mode) }).await;
        for (round, rate) in ["60MiB/s", "120MiB/s", "250MiB/s", "80MiB/s"].iter().enumerate() {
            for watched in [true, false] {
                let hosts = [bed.alpha(), bed.beta()];
                let here = usize::from(!watched);
                let to = hosts[1 - here].address.to_string();
                let wishes = ["--to", &to, "--bandwidth", rate];
                if watched {
                    assert_success(
                        &hosts[here].vmferry(&[&["predict", VM], &wishes[..]].concat()).await.expect("runs"),
                        &bed,
                    );
                }
                let output =
                    hosts[here].vmferry(&[&["migrate", VM, "--json"], &wishes[..]].concat()).await.expect("runs");
                assert_success(&output, &bed);
                let last = String::from_utf8_lossy(&output.stdout).lines().last().expect("a report").to_owned();
                let event = serde_json::from_str(&last).expect("an event");
                let vmferry_api::MigrationEvent::Finished(report) = event else { panic!("{last}") };
                let Some(foretold) = &report.foretold else { panic!("nothing was foretold: {}", said(&report)) };
                let pairs = [
                    (foretold.total_ms, report.total_ms, 1.0),
                    (foretold.downtime_ms, report.downtime_ms, 1.0),
                    (foretold.sent, report.sent as f64, 1_048_576.0),
                ];
                let mut line = format!("{mode:?} {rate} {:?} {round}:", foretold.made);
                for (off, (it, outcome, unit)) in off.iter_mut().zip(pairs) {
                    let error = it.likely / outcome - 1.0;
                    let [outcome, likely, low, high] = [outcome, it.likely, it.low, it.high].map(|of| of / unit);
                    line.extend([format!(
                        " {outcome:.0} ({likely:.0}: {low:.0} to {high:.0}; {:+.0} %) ",
                        error * 100.0
                    )]);
                    off.push(error.abs());
                }
                println!("{line}{} / {}", foretold.method, report.method());
            }
        }
    }
    let of = |which: usize, share: f64| {
        let mut all = off[which].clone();
        all.sort_by(f64::total_cmp);
        all[(all.len() as f64 * share) as usize] * 100.0
    };
    for (which, what) in ["total", "downtime", "sent"].into_iter().enumerate() {
        println!("{what}: off by {:.0} % (median), {:.0} % (p90)", of(which, 0.5), of(which, 0.9));
    }
    assert!(of(0, 0.5) < 20.0 && of(2, 0.5) < 20.0);
}
