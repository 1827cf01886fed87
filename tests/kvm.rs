//! Under real KVM, wherever that runs the guest that needs no kernel: what KVM does to a migration software emulation does
//! not show.

use vmferry_api::{EngineName, Report};
use vmferry_bench::Mode;
use vmferry_bench::testbed::{Testbed, TestbedOptions, two_qemus};
use vmferry_qemu::try_kvm;

use crate::bed::{Bed, VM, assert_success, external, guest, text, with_qemus};
use crate::external::traces_in_qemu;

const RAM_MIB: u64 = 256;
const GUEST: Mode = Mode::Write;

/// KVM runs it here, with these QEMUs; else it is said that the test was not run.
async fn kvm_runs() -> bool {
    for dir in two_qemus().expect("two QEMUs") {
        let qemu = dir.map_or("/usr/bin/qemu-system-x86_64".into(), |dir| dir.join("qemu-system-x86_64"));
        let accel = try_kvm(&qemu).await;
        if !accel.is_kvm() {
            eprintln!("not run: {accel}");
            return false;
        }
    }
    true
}

async fn start(options: TestbedOptions, mode: Mode) -> Bed {
    let testbed = Testbed::start(options).await.expect("the testbed starts");
    let mut argv = testbed.bare_guest_command_line(&guest(mode), RAM_MIB);
    // One that both QEMUs have.
    argv.extend(["-machine", "pc-q35-7.2"].map(str::to_owned));
    Bed::of(testbed, argv).await
}

/// Moves there, under KVM on both hosts; the report of it.
async fn moves_whole(options: TestbedOptions, mode: Mode, arguments: &[&str]) -> Report {
    let by_agents = options.engine == Some(EngineName::External);
    let bed = start(options, mode).await;
    let report = crate::migrate::report(&bed, arguments).await;
    let views = bed.view(1).await;
    assert_eq!(views.accelerator.as_deref(), Some("kvm"), "{views:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
    if by_agents {
        assert_eq!(traces_in_qemu(&bed, 1).await, (0, 0));
    }
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_under_kvm_moves_whole_whatever_it_does_and_whatever_qemu_it_has() {
    if !kvm_runs().await {
        return;
    }
    for (alpha, beta) in [(0, 0), (1, 1), (0, 1), (1, 0)] {
        let mode = if alpha == beta { Mode::Random } else { GUEST };
        moves_whole(external(alpha, beta), mode, &[]).await;
    }
    for mode in [Mode::Idle, Mode::Read] {
        let report = moves_whole(external(1, 1), mode, &[]).await;
        assert!(!report.post_copy, "nothing keeps it from converging: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_kvm_qemu_moves_the_ram_too() {
    if kvm_runs().await {
        moves_whole(with_qemus(1, 1), Mode::Random, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_kvm_a_guest_that_writes_fast_is_paced_or_leaves_by_post_copy() {
    if !kvm_runs().await {
        return;
    }
    // Less than the guest writes even where each fault by which its writes are seen costs it tens of microseconds.
    let slow = ["--bandwidth", "20MiB/s"];
    let report = moves_whole(external(1, 1), GUEST, &slow).await;
    assert!(report.post_copy, "{report:?}");
    let report = moves_whole(external(1, 1), GUEST, &[&slow[..], &["--no-post-copy"]].concat()).await;
    assert!(!report.post_copy && report.throttle > 0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_kvm_a_cancelled_migration_leaves_the_guest_as_it_was() {
    if !kvm_runs().await {
        return;
    }
    let bed = start(external(1, 1), GUEST).await;
    let mut migrate = bed.begin_slow_migration().await;
    assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), &bed);
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_away_from_a_cpu_model_is_not_missed_at_the_destination() {
    if !kvm_runs().await {
        return;
    }
    for cpu in ["qemu64,-pni", "qemu64", "EPYC"] {
        let testbed = Testbed::start(external(1, 1)).await.expect("the testbed starts");
        let mut argv = testbed.bare_guest_command_line(&guest(Mode::Idle), RAM_MIB);
        argv.extend(["-cpu".to_owned(), cpu.to_owned()]);
        let bed = Bed::of(testbed, argv).await;
        let output = bed.migrate(&["--dry-run"]).await;
        assert_success(&output, &bed);
        assert_success(&bed.migrate(&[]).await, &bed);
        bed.assert_runs_only_on(1).await;
    }
}

/// What a guest wants that has a kernel, where KVM emulates those, is told in one line.
#[tokio::test(flavor = "multi_thread")]
async fn where_kvm_emulates_kernels_it_is_for_who_asks_for_nothing_else() {
    let testbed = Testbed::start(external(1, 1)).await.expect("the testbed starts");
    let run = ["run", VM, "--", "qemu-system-x86_64", "-machine", "q35,accel=kvm:tcg", "-m", "64", "-S"];
    let output = testbed.alpha().vmferry(&run).await.expect("vmferry runs");
    assert!(output.status.success(), "{}", text(&output));
    let qemu = two_qemus().expect("two QEMUs")[1].clone().unwrap_or_default().join("qemu-system-x86_64");
    let wanted = try_kvm(&qemu).await.for_ordinary_guests();
    let view = testbed.alpha().show(VM).await.expect("answers").expect("is there");
    assert_eq!(view.accelerator.as_deref(), Some(wanted.name()));
    let lines = text(&output).lines().filter(|line| line.contains("TCG")).count();
    assert_eq!(lines, usize::from(!wanted.is_kvm()), "{}", text(&output));
}
