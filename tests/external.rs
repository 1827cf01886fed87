//! Migrations in which the agents move the guest's RAM.

use std::time::Duration;

use vmferry_api::{Report, Step};
use vmferry_bench::testbed::TestbedOptions;
use vmferry_bench::{GuestOptions, Mode};

use crate::bed::{self, Bed, RAM_MIB, VM, assert_success, external, guest, text};
use crate::crashes::{agents_are_killed, in_post_copy};
use crate::migrate::report;

/// Migrates such a guest between two hosts with this QEMU (0 is the older one).
async fn moves_whole(qemu: usize, mode: Mode, arguments: &[&str]) -> Report {
    let bed = bed::start(bed::external(qemu, qemu), guest(mode)).await;
    let report = report(&bed, arguments).await;
    assert_eq!(report.engine, "external", "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_guest_moves_without_post_copy_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        let report = moves_whole(qemu, Mode::Idle, &[]).await;
        assert!(!report.post_copy);
        assert!(report.sent < 256 << 20, "its RAM was sent once, by the agents alone: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_faster_than_the_link_moves_by_post_copy_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        assert!(moves_whole(qemu, Mode::Write, &["--bandwidth", "60MiB/s"]).await.post_copy);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_post_copy_the_writes_of_a_guest_are_paced_until_it_converges_whatever_qemu_it_has() {
    for (qemu, mode) in [(0, Mode::Write), (1, Mode::Random)] {
        let report = moves_whole(qemu, mode, &["--bandwidth", "60MiB/s", "--no-post-copy"]).await;
        assert!(!report.post_copy && report.throttle > 0, "{report:?}");
        assert!(report.total_ms < 20_000.0, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_to_random_pages_moves_whole() {
    moves_whole(1, Mode::Random, &["--bandwidth", "80MiB/s"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn post_copy_begins_when_it_is_asked_for_unless_it_was_forbidden() {
    let bed = bed::start(external(0, 0), guest(Mode::Idle)).await;
    let refused = bed.alpha().vmferry(&["post-copy", VM]).await.expect("vmferry runs");
    assert!(!refused.status.success() && text(&refused).contains("is not being migrated"), "{}", text(&refused));
    let mut forbidden = bed.begin_slow_migration_with(&["--no-post-copy"]).await;
    let refused = bed.alpha().vmferry(&["post-copy", VM]).await.expect("vmferry runs");
    assert!(!refused.status.success() && text(&refused).contains("was forbidden"), "{}", text(&refused));
    assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), &bed);
    assert_eq!(forbidden.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
    let mut migrate = bed.begin_slow_migration().await;
    assert_success(&bed.alpha().vmferry(&["post-copy", VM]).await.expect("vmferry runs"), &bed);
    bed.eventually("the guest is there before its memory", async || bed.view(0).await.state == "leaving").await;
    assert!(migrate.wait().await.expect("it ends").success(), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

/// Of 128 MiB, with two virtual CPUs that write at this rate.
fn busy_pair(mode: Mode, rate: Option<u64>) -> GuestOptions {
    GuestOptions { threads: 2, rate, ..guest(mode) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_hot_pages_fit_the_downtime_moves_without_post_copy_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        let bed = bed::start_sized(external(qemu, qemu), busy_pair(Mode::HotCold, Some(16 << 20)), RAM_MIB).await;
        let report = report(&bed, &["--bandwidth", "80MiB/s"]).await;
        assert!(!report.post_copy && report.rounds > 1 && report.dirty_rate > 1 << 20, "{report:?}");
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_cpus_all_write_moves_whole_whatever_qemu_it_has() {
    for (qemu, mode) in [(0, Mode::Random), (1, Mode::Write)] {
        let bed = bed::start_sized(external(qemu, qemu), busy_pair(mode, None), RAM_MIB).await;
        assert!(report(&bed, &["--bandwidth", "60MiB/s"]).await.post_copy);
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_whole_when_post_copy_begins_within_the_first_second_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        // Its memory would take 4 s.
        let report = moves_whole(qemu, Mode::Random, &["--bandwidth", "40MiB/s", "--max-time", "1s"]).await;
        let copied = report.steps.iter().find(|it| it.step == Step::CopyRam).expect("it copied");
        assert!(report.post_copy && report.rounds == 1 && copied.ms < 1000.0, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_disk_brings_into_ram_arrives_whatever_qemu_it_has() {
    for (qemu, mode) in [(0, Mode::Idle), (1, Mode::Write)] {
        let dir = tempfile::tempdir().expect("a folder");
        let bed = bed::start_with_disk(external(qemu, qemu), guest(mode), &dir.path().join("disk.raw")).await;
        bed.assert_disk_works_on(0).await;
        // Once nothing but the disk writes, which has requests in flight also while the guest is paused; once in post-copy.
        let report = report(&bed, &["--bandwidth", "100MiB/s"]).await;
        assert_eq!(report.post_copy, mode == Mode::Write, "{report:?}");
        bed.assert_runs_only_on(1).await;
        bed.assert_disk_works_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_its_agent_forgot_is_found_by_its_process_and_moves_with_its_ram() {
    let mut bed = bed::start(external(1, 1), guest(Mode::Random)).await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    for file in std::fs::read_dir(&bed.alpha().state_dir).expect("readable").flatten() {
        // All but who it is.
        if file.file_name() != "identity.pem" {
            std::fs::remove_file(file.path()).expect("removed");
        }
    }
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.pair().await.expect("paired again");
    bed.eventually("it is found", async || bed.view(0).await.state == "unclear").await;
    let resolve = ["resolve", VM, "--keep-here", "--yes"];
    assert_success(&bed.alpha().vmferry(&resolve).await.expect("vmferry runs"), &bed);
    assert_eq!(report(&bed, &[]).await.engine, "external");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

/// The RAM of a PC with more than about 3 GiB lies in two pieces, with a hole for devices between them.
async fn moves_across_the_hole(qemu: usize) {
    let guest = GuestOptions { mem: 5 << 30, ..busy_pair(Mode::Random, Some(64 << 20)) };
    let bed = bed::start_sized(external(qemu, qemu), guest, 6144).await;
    let report = report(&bed, &[]).await;
    eprintln!("{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs 13 GiB of memory and a minute"]
async fn a_guest_of_six_gib_moves_whole_between_older_qemus() {
    moves_across_the_hole(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs 13 GiB of memory and a minute"]
async fn a_guest_of_six_gib_moves_whole_between_newer_qemus() {
    moves_across_the_hole(1).await;
}

/// What the source's QEMU has of ours: descriptors that are userfaultfds, and memory that they track or serve.
pub(crate) async fn traces_in_qemu(bed: &Bed, host: usize) -> (usize, usize) {
    let pid = bed.view(host).await.pid;
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives");
    let links = descriptors.filter_map(|it| std::fs::read_link(it.ok()?.path()).ok());
    let userfaultfds = links.filter(|it| it.to_string_lossy().contains("userfaultfd")).count();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
    let flags = maps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    (userfaultfds, flags.filter(|flags| flags.split(' ').any(|flag| flag == "uw" || flag == "um")).count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_cancelled_leaves_the_guest_as_it_was_and_untracked() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    let mut migrate = bed.begin_slow_migration().await;
    assert_eq!(traces_in_qemu(&bed, 0).await.1, 1, "its RAM is tracked");
    assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), &bed);
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
    assert_eq!(traces_in_qemu(&bed, 1).await, (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_an_agent_is_killed_the_guest_ends_up_running_once_when_agents_move_its_ram() {
    agents_are_killed(bed::start(external(1, 1), guest(Mode::Random)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_post_copy_either_agent_may_be_killed_and_the_guest_goes_on_whole() {
    for victim in [0, 1] {
        let mut bed = bed::start(external(1, 1), guest(Mode::Write)).await;
        let migrate = in_post_copy(&bed).await;
        bed.testbed.host_mut(victim).kill_agent().await.expect("killed");
        tokio::time::sleep(Duration::from_millis(500)).await;
        bed.testbed.host_mut(victim).start_agent().await.expect("starts");
        bed.eventually("the source has forgotten it", async || bed.alpha().show(VM).await.expect("answers").is_none())
            .await;
        drop(migrate);
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
        assert_eq!(traces_in_qemu(&bed, 1).await, (0, 0), "nothing is left in QEMU");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_for_five_seconds_in_namespaces_only_delays_a_migration() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make network namespaces");
        return;
    }
    for post_copy in [false, true] {
        let bed = bed::start(TestbedOptions { namespaces: true, ..external(1, 1) }, guest(Mode::Write)).await;
        let migrate = match post_copy {
            true => in_post_copy(&bed).await,
            false => bed.begin_slow_migration().await,
        };
        bed.set_link(false).expect("cut");
        tokio::time::sleep(Duration::from_secs(5)).await;
        bed.set_link(true).expect("mended");
        let output = migrate.wait_with_output().await.expect("it ends");
        assert!(output.status.success(), "{}\n{}", text(&output), bed.logs());
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_back_and_forth_many_times_and_nothing_is_left_behind() {
    // More when asked: `VMFERRY_TEST_MIGRATIONS=50`.
    let asked = std::env::var("VMFERRY_TEST_MIGRATIONS").ok();
    let migrations = asked.map_or(20, |asked| asked.parse().expect("a number"));
    let bed = bed::start(external(1, 1), guest(Mode::Random)).await;
    let descriptors = |bed: &Bed| {
        let agents = [bed.alpha(), bed.beta()].map(|host| host.agent_pid().expect("it runs"));
        agents.map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count())
    };
    let before = descriptors(&bed);
    for round in 0..migrations {
        let hosts = [bed.alpha(), bed.beta()];
        let (here, there) = (hosts[round % 2], hosts[1 - round % 2]);
        let output = here.vmferry(&["migrate", VM, "--to", &there.address.to_string()]).await.expect("vmferry runs");
        assert_success(&output, &bed);
    }
    let home = migrations % 2;
    bed.assert_runs_only_on(home).await;
    bed.assert_intact(home).await;
    assert_eq!(traces_in_qemu(&bed, home).await, (0, 0));
    bed.eventually("no descriptor is left", async || {
        descriptors(&bed).iter().zip(&before).all(|(now, before)| *now <= before + 2)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_qemu_is_in_a_sandbox_is_moved_by_agents_too() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: a sandbox is suspended by root only");
        return;
    }
    let all = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    for (qemu, mode, more) in [(0, Mode::Write, &[][..]), (1, Mode::Write, &["--no-post-copy"])] {
        let bed = bed::start_with(external(qemu, qemu), guest(mode), &["-sandbox", all]).await;
        let report = report(&bed, &[&["--bandwidth", "60MiB/s"], more].concat()).await;
        assert_eq!((report.engine.as_str(), report.post_copy), ("external", more.is_empty()), "{report:?}");
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_of_a_user_without_rights_is_moved_by_agents_too() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can start one");
        return;
    }
    for (mode, more) in [(Mode::Idle, &[][..]), (Mode::Write, &[]), (Mode::Write, &["--no-post-copy"])] {
        // Newer QEMUs say it otherwise.
        let bed = bed::start_with(external(0, 0), guest(mode), &["-runas", "nobody"]).await;
        let report = report(&bed, &[&["--bandwidth", "60MiB/s"], more].concat()).await;
        let post_copy = mode == Mode::Write && more.is_empty();
        assert_eq!((report.engine.as_str(), report.post_copy), ("external", post_copy), "{report:?}");
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
        assert_eq!(traces_in_qemu(&bed, 1).await, (0, 0));
    }
}
