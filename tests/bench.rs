//! `vmferry bench`: scenarios really do what they say, batches go on where they were, and nothing is left behind.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use tokio::process::Command;
use vmferry_api::VmView;
use vmferry_bench::Mode;
use vmferry_bench::batch::read_all;
use vmferry_bench::report::{MarkKind, Origin, Outcome, PageCheck, RunReport, read};
use vmferry_bench::testbed::{Testbed, two_qemus};

use crate::bed::{VM, assert_success, guest, options, start, text};

fn vmferry(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmferry"));
    command.args(arguments).kill_on_drop(true);
    command
}

async fn say(arguments: &[&str]) -> Output {
    vmferry(arguments).output().await.expect("vmferry runs")
}

/// A run of a small guest, within this host; the report and what was printed.
async fn run(dir: &Path, more: &[&str]) -> (RunReport, Output) {
    let report = dir.join("report.json");
    let file = report.display().to_string();
    let common = ["bench", "run", "-o", &file, "--mem", "32M", "--before", "500ms", "--after", "500ms"];
    let arguments: Vec<&str> = common.iter().chain(more).copied().collect();
    let output = say(&arguments).await;
    assert!(output.status.success(), "{}", text(&output));
    (read(&report).expect("a report"), output)
}

/// The folder of the newer QEMU, for `--qemu` and matrices; empty when it is the system's.
fn newer_qemu() -> String {
    let [_, newer] = two_qemus().expect("two QEMUs");
    newer.map_or_else(String::new, |dir| dir.canonicalize().expect("it is there").display().to_string())
}

fn assert_lever(report: &RunReport, name: &str) {
    let lever = report.levers.iter().find(|it| it.name == name).unwrap_or_else(|| panic!("no {name}: {report:?}"));
    assert!(lever.acted, "{}: {lever:?}, {:?}", report.settings.scenario, report.summary);
}

/// In one line, and only where TCG had to take KVM's place.
fn assert_tells_why_it_has_no_kvm(report: &RunReport) {
    let told = report.notes.iter().filter(|note| note.starts_with("KVM does not work")).count();
    let lines = usize::from(report.versions.accelerator.as_deref() == Some("tcg"));
    assert_eq!(told, lines, "{:?}, {:?}", report.versions, report.notes);
}

fn namespaces_of_ours() -> Vec<PathBuf> {
    let Ok(all) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = all.flatten().map(|entry| entry.path());
    names.filter(|path| path.to_string_lossy().contains("vmferry-")).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak"]
async fn every_means_of_a_batch_really_acts_and_a_batch_goes_on_where_it_was_in_namespaces() {
    let dir = tempfile::tempdir().expect("a folder");
    let (matrix, folder) = (dir.path().join("matrix.toml"), dir.path().join("runs"));
    // A slow link for so small a guest; few rounds, as more show nothing new.
    for (name, rounds, means) in [
        (
            "packed",
            3,
            "capabilities = [\"multifd\"]\nparameters = { multifd-channels = 2, multifd-compression = \"zstd\" }",
        ),
        // QEMU looks at the guest's pace once a second, and slows it down when it was too fast twice.
        ("slowed", 12, "capabilities = [\"auto-converge\"]\nparameters = { cpu-throttle-increment = 50 }"),
        ("changes", 6, "capabilities = [\"xbzrle\"]\npercent-of-ram = { xbzrle-cache-size = 50 }"),
        ("impossible", 3, "capabilities = [\"teleport\"]"),
    ] {
        let scenario = format!("about = \"{name}\"\nengines = [\"qemu\"]\nmost-rounds = {rounds}\n[[qemu]]\n{means}\n");
        std::fs::write(dir.path().join(format!("{name}.toml")), scenario).expect("written");
    }
    // On a faster link it may be done before it is seen how fast this guest writes: its changes are small.
    let paced = "about = \"paced\"\nengines = [\"external\"]\nautomatic = true\npost-copy = false\ndowntime = \"50ms\"\n\
                 bandwidth = \"100mbit\"\n";
    std::fs::write(dir.path().join("paced.toml"), paced).expect("written");
    let text_of_matrix = format!(
        "scenarios = [\"pause-1-iters\", \"post-copy-1-iters\", \"post-copy-preempt\", \"packed.toml\", \"slowed.toml\", \"changes.toml\", \"paced.toml\", \"impossible.toml\"]\n\
         engines = [\"qemu\", \"external\"]\nlinks = [\"300mbit\"]\nguests = [{{ vcpus = 1, mem-mib = 32 }}]\n\
         fill = \"text\"\nwatched-ms = 500\nqemus = [{:?}]\n",
        newer_qemu()
    );
    std::fs::write(&matrix, text_of_matrix).expect("written");
    let (matrix, folder) = (matrix.display().to_string(), folder.display().to_string());
    let arguments = ["bench", "batch", &matrix, "-o", &folder];
    // It is interrupted in its first run, and taken up again.
    let mut first = vmferry(&arguments).spawn().expect("vmferry runs");
    tokio::time::sleep(Duration::from_secs(4)).await;
    let pid = rustix::process::Pid::from_raw(first.id().expect("it runs") as i32).expect("a pid");
    let ours = format!("vmferry-{}-", pid.as_raw_nonzero());
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    assert_eq!(first.wait().await.expect("it ends").code(), Some(130));
    assert!(namespaces_of_ours().iter().all(|it| !it.to_string_lossy().contains(&ours)), "namespaces are left");
    let output = say(&arguments).await;
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("9 runs measured, 1 skipped, 0 failed"), "{}", text(&output));
    // By chance it may have been the first.
    let skipped = std::fs::read_dir(&folder).expect("a folder").flatten().map(|entry| entry.path());
    let skipped: Vec<_> = skipped.filter(|path| path.extension().is_some_and(|it| it == "skipped")).collect();
    let why = std::fs::read_to_string(&skipped[0]).expect("readable");
    assert!(why.contains("this QEMU has no migration capability teleport"), "{why}");
    let again = say(&arguments).await;
    assert!(text(&again).contains("10 of 10 runs are done already"), "{}", text(&again));

    let reports = read_all(&[folder.clone().into()]).expect("reports");
    for report in &reports {
        assert_tells_why_it_has_no_kvm(report);
        assert!(matches!(report.page_check, PageCheck::Intact { pages: 8192 }), "{:?}", report.page_check);
        assert!(report.samples.records.len() > 2 && report.samples.progress.len() > 2 && !report.rounds.is_empty());
        assert!(report.samples.cpu.iter().any(|it| it.source_qemu.is_some_and(|it| it.vcpu > 5.0)), "{report:?}");
        let carried = report.settings.link_measured.expect("it was measured") as f64 * 8.0;
        assert!((0.5..1.15).contains(&(carried / 300e6)), "the link is shaped: {carried}");
        match report.settings.scenario.as_str() {
            "pause-1-iters" => assert_lever(report, "pause"),
            "post-copy-1-iters" | "post-copy-preempt" => assert_lever(report, "post-copy"),
            "packed" => assert_lever(report, "zstd"),
            "slowed" => assert_lever(report, "auto-converge"),
            "changes" => assert_lever(report, "xbzrle"),
            "paced" => assert_lever(report, "pacing"),
            other => panic!("{other}"),
        }
        if report.outcome.is_completed() {
            let [left, arrived] = [MarkKind::Left, MarkKind::Arrived].map(|it| report.mark(it).expect("it moved"));
            assert!(left < arrived && report.summary.downtime_ms.is_some_and(|ms| ms <= arrived - left));
        }
    }
    let page = dir.path().join("page.html").display().to_string();
    assert!(say(&["bench", "page", &folder, "-o", &page]).await.status.success());
    assert!(std::fs::read_to_string(&page).expect("a page").contains("pause-1-iters"));
    let compared = say(&["bench", "compare", &folder]).await;
    assert!(text(&compared).contains("too few runs to tell"), "{}", text(&compared));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_older_qemu_compresses_with_threads_of_its_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let [older, _] = two_qemus().expect("two QEMUs");
    let (report, qemu) = (dir.path().join("report.json"), older.map(|dir| dir.display().to_string()));
    let (file, scenario) = (report.display().to_string(), dir.path().join("compress.toml"));
    let words = "about = \"x\"\nengines = [\"qemu\"]\nmost-rounds = 3\n[[qemu]]\ncapabilities = [\"compress\"]\n\
                 parameters = { compress-threads = 2, decompress-threads = 2, compress-level = 1 }\n";
    std::fs::write(&scenario, words).expect("written");
    let scenario = scenario.display().to_string();
    let mut arguments = vec!["bench", "run", "-o", &file, "--mem", "32M", "--before", "500ms", "--after", "500ms"];
    arguments.extend(["--scenario", &scenario, "--fill", "text", "--transport", "unix"]);
    if let Some(qemu) = &qemu {
        arguments.extend(["--qemu", qemu]);
    }
    // Its code is 1 when the guest's memory was damaged, as this QEMU does under emulation.
    let output = say(&arguments).await;
    let report = read(&report).unwrap_or_else(|error| panic!("{error}: {}", text(&output)));
    assert_lever(&report, "compress");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_needs_no_rights_within_one_host_and_one_that_does_not_complete_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let scenario = dir.path().join("hasty.toml");
    let hasty = "about = \"Gives up soon\"\nengines = [\"qemu\"]\nbandwidth = \"100mbit\"\nmost-time = \"2s\"\n";
    std::fs::write(&scenario, hasty).expect("written");
    let (scenario, qemu) = (scenario.display().to_string(), newer_qemu());
    let mut more = vec!["--scenario", &scenario, "--transport", "unix"];
    if !qemu.is_empty() {
        more.extend(["--qemu", &qemu]);
    }
    let (report, output) = run(dir.path(), &more).await;
    assert_eq!(report.outcome, Outcome::NotCompleted { reason: "not done after 2 s".into() });
    assert!(matches!(report.page_check, PageCheck::Intact { .. }), "the guest runs on: {:?}", report.page_check);
    assert_eq!(report.summary.total_ms, None);
    assert_tells_why_it_has_no_kvm(&report);
    assert!(text(&output).contains("did not complete: not done after 2 s"));
}

/// A run from the first host to the second, both with agents of their own.
fn run_between(bed: &Testbed, report: &Path, mem: &str, more: &[&str]) -> Command {
    let (to, file) = (bed.beta().address.to_string(), report.display().to_string());
    let common = ["bench", "run", "-o", &file, "--to", &to, "--mem", mem, "--before", "500ms", "--after", "500ms"];
    bed.alpha().command(&common.iter().chain(more).copied().collect::<Vec<_>>())
}

/// Neither host has a VM, nor gets one, after a while.
async fn assert_no_guests(bed: &Testbed) {
    let deadline = Instant::now() + Duration::from_secs(40);
    for host in [bed.alpha(), bed.beta()] {
        loop {
            let vms: Vec<VmView> = host.client().expect("a client").get("/v1/vms").await.expect("an agent answers");
            if vms.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{} has {vms:?}; its log:\n{}", host.name, host.agent_log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_measured_between_two_agents_and_ends_with_the_measurement() {
    let bed = Testbed::start(options()).await.expect("a testbed");
    let file = bed.dir().join("report.json");
    // The agents' engine, and QEMU's with means that the agents are told. Post-copy begins at once: after a round,
    // a guest that a busy host keeps from writing has nothing left to fetch.
    for (scenario, engine, lever) in
        [("post-copy-0-iters", "external", Some("post-copy")), ("multifd-2-zstd", "qemu", None)]
    {
        let more = ["--scenario", scenario, "--engine", engine, "--rate", "200MiB/s"];
        let output = run_between(&bed, &file, "32M", &more).output().await.expect("vmferry runs");
        assert!(output.status.success(), "{}\n{}", text(&output), bed.alpha().agent_log());
        let report = read(&file).expect("a report");
        assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
        assert!(matches!(report.page_check, PageCheck::Intact { pages: 8192 }), "{:?}", report.page_check);
        if let Some(lever) = lever {
            assert_lever(&report, lever);
        }
        assert_tells_why_it_has_no_kvm(&report);
        let felt = report.summary.downtime_ms.expect("its beats were heard on both hosts");
        assert!((0.1..5000.0).contains(&felt), "{felt}");
        assert!(report.samples.records.iter().any(|it| it.host == Some(1)), "it was heard there");
        assert!(!report.notes.iter().any(|note| note.contains("a guess")), "{:?}", report.notes);
        // On one machine both clocks are one.
        let clocks = report.clocks.expect("they were compared");
        assert!(clocks.answers > 20 && clocks.error_ms < 5.0 && clocks.drift_ms.abs() < 10.0, "{clocks:?}");
        assert!(report.destination_hardware.is_some_and(|it| !it.one_machine && it.processors > 0));
        assert!(report.settings.link_measured.is_some_and(|it| it > 1 << 20));
        assert!(report.samples.cpu.iter().any(|it| it.destination_qemu.is_some() && it.destination_host.is_some()));
        assert!(report.samples.cpu.iter().any(|it| it.source_qemu.is_some_and(|it| it.vcpu > 5.0)));
        assert_no_guests(&bed).await;
    }
    // QEMU lacks what is wanted: known before anything is moved, and no reason to stop a batch.
    let impossible = bed.dir().join("impossible.toml");
    let words = "about = \"x\"\nengines = [\"qemu\"]\n[[qemu]]\ncapabilities = [\"teleport\"]\n";
    std::fs::write(&impossible, words).expect("written");
    let impossible = impossible.display().to_string();
    let output = run_between(&bed, &file, "32M", &["--scenario", &impossible]).output().await.expect("vmferry runs");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("no migration capability teleport"), "{}", text(&output));
    assert_no_guests(&bed).await;
    // Killed while the guest is under way, it leaves none either.
    for wait in [100, 1500] {
        let slow = ["--scenario", "post-copy-1-iters", "--engine", "external"];
        let mut killed = run_between(&bed, &file, "256M", &slow).spawn().expect("vmferry runs");
        wait_for_migration(&bed).await;
        tokio::time::sleep(Duration::from_millis(wait)).await;
        killed.kill().await.expect("it was started");
        assert_no_guests(&bed).await;
    }
}

async fn wait_for_migration(bed: &Testbed) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let vms: Vec<VmView> = bed.alpha().client().expect("a client").get("/v1/vms").await.expect("an agent answers");
        if vms.iter().any(|vm| vm.migration.is_some()) {
            return;
        }
        assert!(Instant::now() < deadline, "no migration began: {vms:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_measuring_guest_is_witnessed_or_moved_as_a_script_says() {
    let bed = start(options(), guest(Mode::Idle)).await;
    let client = bed.alpha().client().expect("a client");
    let refused = client.witness(&format!("/v1/vms/{VM}/witness")).await.expect_err("it is no measuring guest");
    assert!(refused.to_string().contains("no measuring guest"), "{refused}");
    let script = serde_json::json!({ "post_copy_after": null, "pause_after": 1, "means": [{ "capabilities": ["xbzrle"], "parameters": {} }] });
    let request = serde_json::json!({ "to": bed.beta().address.to_string(), "downtime_ms": 300, "post_copy": true, "script": script });
    let refused = client.post::<_, serde_json::Value>(&format!("/v1/vms/{VM}/migration"), &request).await;
    let refused = refused.expect_err("QEMU would be left with what a measurement has set").to_string();
    assert!(refused.contains("only a measuring guest"), "{refused}");
    let vm = bed.alpha().show(VM).await.expect("an agent answers").expect("it is there");
    assert!(vm.migration.is_none(), "{vm:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_measurement_left_is_removed_by_the_next_in_namespaces() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("report.json").display().to_string();
    let arguments = ["bench", "run", "-o", &file, "--mem", "32M", "--engine", "external", "--scenario", "vmferry"];
    let mut killed = vmferry(&arguments).spawn().expect("vmferry runs");
    let ours = format!("vmferry-{}-", killed.id().expect("it runs"));
    let left = || namespaces_of_ours().iter().filter(|it| it.to_string_lossy().contains(&ours)).count();
    let deadline = Instant::now() + Duration::from_secs(30);
    while left() < 2 {
        assert!(Instant::now() < deadline, "no namespaces were made");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    killed.kill().await.expect("it runs");
    assert_eq!(left(), 2, "nobody has removed them yet");
    let next =
        ["bench", "run", "-o", &file, "--mem", "32M", "--scenario", "pre-copy", "--before", "0s", "--after", "0s"];
    let output = say(&next).await;
    assert!(text(&output).contains("which was killed"), "{}", text(&output));
    assert_eq!(left(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_migration_leaves_a_report() {
    let bed = start(options(), guest(Mode::Write)).await;
    let file = bed.dir().join("report.json");
    let path = file.display().to_string();
    assert_success(&bed.migrate(&["--bandwidth", "100MiB/s", "--record", &path]).await, &bed);
    let report = read(&file).expect("a report");
    assert_eq!((report.origin, &report.outcome), (Origin::Migrate, &Outcome::Completed));
    assert!(report.summary.downtime_told_ms.is_some() && report.summary.downtime_ms.is_none());
    assert!(!report.rounds.is_empty() && report.samples.progress.len() > 2, "{report:?}");
    assert_eq!(report.settings.bandwidth, Some(100 << 20));
    assert!(matches!(report.page_check, PageCheck::NotChecked { .. }));
    // One that is refused leaves none; nothing was migrated.
    let none = bed.dir().join("none.json");
    let refused = bed.migrate(&["--record", &none.display().to_string()]).await;
    assert!(!refused.status.success() && !none.exists());
}

#[tokio::test]
async fn what_cannot_be_measured_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str, words: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, words).expect("written");
        path.display().to_string()
    };
    let out = dir.path().join("out").display().to_string();
    let whole = RunReport::new(Origin::Bench, vmferry_bench::report::Settings::default()).to_json();
    let truncated = file("truncated.json", &whole[..200]);
    let newer = file("newer.json", &whole.replace("\"version\": 1", "\"version\": 99"));
    let run = ["bench", "run", "-o", &out, "--scenario"];
    for (arguments, code, words) in [
        ([&run[..], &["post-copy-5"]].concat(), 2, "did you mean post-copy-5-iters"),
        ([&run[..], &["pre-copy", "--mem", "4096G"]].concat(), 3, "free"),
        ([&run[..], &["pre-copy", "--mem", "much"]].concat(), 2, "64M or 1G"),
        ([&run[..], &["pre-copy", "--transport", "rdma"]].concat(), 3, "RDMA"),
        ([&run[..], &["compress-1", "--engine", "external"]].concat(), 3, "engine qemu"),
        ([&run[..], &["pre-copy", "--transport", "unix", "--link", "1gbit"]].concat(), 2, "shaped"),
        (vec!["bench", "page", &truncated, "-o", &out], 3, "cut off"),
        (vec!["bench", "compare", &newer], 3, "schema version 99"),
        (vec!["bench", "import-guestperf", &newer, "-o", &out], 3, "no report"),
    ] {
        let output = say(&arguments).await;
        let told = text(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
        assert!(told.contains(words), "{arguments:?}: {told}");
        assert!(!Path::new(&out).exists());
    }
}
