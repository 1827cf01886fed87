//! Migrations that end with the guest on the other host, or cancelled.

use std::time::{Duration, Instant};

use vmferry_api::{MigrationEvent, Report};
use vmferry_bench::testbed::TestbedOptions;
use vmferry_bench::{GuestOptions, Mode};

use crate::bed::{self, Bed, VM, assert_success, guest, options, text};

/// Migrates with `--json` and returns the report.
pub(crate) async fn report(bed: &Bed, more: &[&str]) -> Report {
    let arguments: Vec<&str> = ["--json"].iter().chain(more).copied().collect();
    let output = bed.migrate(&arguments).await;
    assert_success(&output, bed);
    let events = String::from_utf8(output.stdout).expect("UTF-8");
    let last = events.lines().last().expect("there are events");
    match serde_json::from_str(last).expect("an event") {
        MigrationEvent::Finished(report) => *report,
        other => panic!("the last event is {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_guest_moves_and_its_memory_stays_whole() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let report = report(&bed, &[]).await;
    assert!(!report.post_copy);
    assert!(report.sent > 128 << 20, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_faster_than_the_link_moves_by_post_copy_without_being_told() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let report = report(&bed, &["--bandwidth", "60MiB/s"]).await;
    assert!(report.post_copy, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_to_random_pages_moves_whole() {
    let bed = bed::start(options(), guest(Mode::Random)).await;
    report(&bed, &["--bandwidth", "80MiB/s"]).await;
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_from_an_older_qemu_to_a_newer_one() {
    let bed = bed::start(bed::with_qemus(0, 1), guest(Mode::Write)).await;
    report(&bed, &["--bandwidth", "60MiB/s"]).await;
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_not_move_to_an_older_qemu_that_lacks_its_machine_type() {
    let bed = bed::start(bed::with_qemus(1, 0), guest(Mode::Write)).await;
    let output = bed.migrate(&[]).await;
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("lacks the machine type"), "{}", text(&output));
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_whole_between_two_older_qemus_that_lose_writes_under_tcg() {
    let bed = bed::start(bed::with_qemus(0, 0), guest(Mode::Write)).await;
    if bed.view(0).await.accelerator.as_deref() == Some("tcg") {
        let output = bed.migrate(&["--no-post-copy"]).await;
        assert_eq!(output.status.code(), Some(3), "{}", text(&output));
        assert!(text(&output).contains("loses track of what a guest writes"), "{}", text(&output));
        bed.assert_never_stopped().await;
    }
    let report = report(&bed, &["--bandwidth", "60MiB/s"]).await;
    assert!(report.post_copy, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_there_and_back_and_there_again() {
    let bed = bed::start(options(), guest(Mode::Random)).await;
    let hosts = [bed.alpha(), bed.beta()];
    for round in 0..6 {
        let (from, to) = (round % 2, 1 - round % 2);
        let address = hosts[to].address.to_string();
        let arguments = ["migrate", VM, "--to", &address, "--bandwidth", "250MiB/s"];
        let output = hosts[from].vmferry(&arguments).await.expect("vmferry runs");
        assert!(output.status.success(), "round {round}: {}\n{}", text(&output), bed.logs());
        bed.assert_runs_only_on(to).await;
    }
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_post_copy_a_guest_that_does_not_converge_is_throttled_until_it_does() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let report = report(&bed, &["--bandwidth", "100MiB/s", "--no-post-copy", "--downtime", "500ms"]).await;
    assert!(!report.post_copy && report.throttle >= 20, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_post_copy_the_time_allowed_is_kept_and_the_guest_stays() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let begun = Instant::now();
    let output =
        bed.migrate(&["--bandwidth", "10MiB/s", "--no-post-copy", "--max-time", "3s", "--downtime", "10ms"]).await;
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    assert!(begun.elapsed() < Duration::from_secs(8));
    assert!(text(&output).contains("gave up"), "{}", text(&output));
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_allowed_makes_post_copy_start_early() {
    let bed = bed::start(options(), guest(Mode::Random)).await;
    let report = report(&bed, &["--bandwidth", "20MiB/s", "--max-time", "2s"]).await;
    assert!(report.post_copy && report.rounds <= 2, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_arrives_paused() {
    let bed = bed::start_with(options(), guest(Mode::Write), &["-qmp", "unix:user.sock,server=on,wait=off"]).await;
    let user =
        vmferry_qemu::Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects");
    user.execute(vmferry_qemu::qmp::commands::Stop {}).await.expect("stops");
    let output = bed.migrate(&[]).await;
    assert_success(&output, &bed);
    assert_eq!(bed.view(1).await.state, "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_would_be_done_and_touches_nothing() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let output = bed.migrate(&["--dry-run"]).await;
    assert_success(&output, &bed);
    let said = text(&output);
    for word in ["nothing was touched", "beta", "first round", "machine", "RAM engine"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    let json = bed.migrate(&["--dry-run", "--json"]).await;
    let plan: vmferry_api::PlanView = serde_json::from_slice(&json.stdout).expect("a plan");
    assert_eq!((plan.vm.as_str(), plan.to.as_str(), plan.ram_bytes), (VM, "beta", bed::RAM_MIB << 20));
    assert!(plan.link_rate > 1 << 20 && plan.ram_used_bytes > 128 << 20, "{plan:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_and_the_guest_runs_on_at_the_source() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let mut migrate = bed.begin_slow_migration().await;
    let pid = rustix::process::Pid::from_raw(migrate.id().expect("it runs") as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it can be interrupted");
    let status = migrate.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(130), "{}", bed.logs());
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
    // And nothing is left that would stand in the way of the next one.
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_gets_a_plain_line_a_second_and_the_report_at_the_end() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let output = bed.migrate(&["--bandwidth", "40MiB/s"]).await;
    assert_success(&output, &bed);
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let progress: Vec<&str> = lines.lines().filter(|line| line.contains("GiB")).collect();
    assert!((2..=8).contains(&progress.len()), "{lines}");
    assert!(progress.iter().all(|line| line.contains("link") && line.contains("dirty") && line.contains("ETA")));
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(report.contains("web1 runs on beta now") && report.contains("downtime"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn multifd_carries_the_pages_when_post_copy_does_not_stand_in_its_way() {
    let bed = bed::start_with(options(), guest(Mode::Idle), &["-qmp", "unix:user.sock,server=on,wait=off"]).await;
    let user =
        vmferry_qemu::Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects");
    let by_multifd = async {
        let mut most = 0;
        while let Ok(info) = user.execute_raw("query-migrate", serde_json::json!({})).await {
            most = most.max(info["ram"]["multifd-bytes"].as_u64().unwrap_or(0));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        most
    };
    let (output, by_multifd) = tokio::join!(bed.migrate(&["--bandwidth", "60MiB/s", "--no-post-copy"]), by_multifd);
    assert_success(&output, &bed);
    assert!(by_multifd > 64 << 20, "{by_multifd} bytes");
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_with_link_local_addresses_in_namespaces_reach_each_other() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make network namespaces");
        return;
    }
    for options in [bed::external(1, 1), options()] {
        let bed =
            bed::start(TestbedOptions { namespaces: true, link_local: true, ..options }, guest(Mode::Random)).await;
        for (from, to) in [(bed.alpha(), "fe80::2%link0"), (bed.beta(), "fe80::1%link0")] {
            assert_success(&from.vmferry(&["migrate", VM, "--to", to]).await.expect("vmferry runs"), &bed);
        }
        bed.assert_runs_only_on(0).await;
        bed.assert_intact(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_adopted_moves_too() {
    let testbed = vmferry_bench::testbed::Testbed::start(options()).await.expect("starts");
    let guest = GuestOptions { mem: 64 << 20, ..guest(Mode::Write) };
    let mut argv = testbed.guest_command_line(&guest, 256, 1).expect("kernel");
    argv.extend(["-accel", "tcg", "-display", "none", "-qmp", "unix:theirs.sock,server=on,wait=off"].map(String::from));
    let ours = ["-qmp", "unix:user.sock,server=on,wait=off", "-device", "pcie-root-port,id=rp1,chassis=1"];
    argv.extend(ours.map(String::from));
    let serial = argv.iter().position(|word| word == "stdio").expect("serial");
    argv[serial] = "file:serial.log".into();
    let mut qemu =
        std::process::Command::new(&argv[0]).args(&argv[1..]).current_dir(testbed.dir()).spawn().expect("QEMU starts");
    let socket = testbed.dir().join("theirs.sock").display().to_string();
    let user = vmferry_qemu::Qmp::connect(&testbed.dir().join("user.sock"), Duration::from_secs(5)).await;
    let rng = serde_json::json!({ "driver": "virtio-rng-pci", "id": "rng1", "bus": "rp1" });
    user.expect("connects").execute_raw("device_add", rng).await.expect("plugged in");
    let mut adopted = None;
    for _ in 0..50 {
        let output = testbed.alpha().vmferry(&["adopt", VM, "--qmp", &socket]).await.expect("runs");
        let done = output.status.success();
        adopted = Some(output);
        if done {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let adopted = adopted.expect("tried");
    let said = text(&adopted);
    assert!(adopted.status.success() && said.contains("virtio-rng-pci rng1 was plugged in"), "{said}");
    assert!(said.contains("Not known: properties of its devices"), "{said}");
    let to = testbed.beta().address.to_string();
    let output = testbed.alpha().vmferry(&["migrate", VM, "--to", &to]).await.expect("runs");
    assert!(output.status.success(), "{}\n{}", text(&output), testbed.beta().agent_log());
    let there = testbed.beta().show(VM).await.expect("answers").expect("is there");
    assert_eq!((there.state.as_str(), there.adopted), ("running", true));
    assert!(there.argv.join(" ").contains("virtio-rng-pci,id=rng1"), "{:?}", there.argv);
    assert!(qemu.wait().expect("it ended").success(), "the source's QEMU was told to quit");
}
