//! What is taken back or goes wrong while agents move a guest's RAM: the guest goes on where it was, or arrives whole.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vmferry_api::{MigrationEvent, Step};
use vmferry_bench::testbed::TestbedOptions;
use vmferry_bench::{GuestOptions, Mode};
use vmferry_qemu::qmp::commands::QueryStatus;
use vmferry_qemu::{Qmp, RunState};

use crate::bed::{self, Bed, VM, assert_success, external, guest, qemu_that_first, text};
use crate::crashes::in_post_copy;
use crate::external::traces_in_qemu;
use crate::proxy::DamagingProxy;

async fn cancel(bed: &Bed) {
    assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), bed);
}

/// The migration was cancelled, and the guest is as if there had been none.
async fn assert_undone(bed: &Bed, mut migrate: tokio::process::Child, phase: &str) {
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{phase}\n{}", bed.logs());
    bed.assert_runs_only_on(0).await;
    assert_eq!(traces_in_qemu(bed, 0).await, (0, 0), "{phase}");
    bed.assert_intact(0).await;
}

/// Stops a process, or lets it go on.
fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).expect("a pid"), signal).expect("it lives");
}

/// Begins a migration and comes back when the guest is paused for the switchover, which goes no further: the
/// destination's agent, whose pid this gives back, stands still.
async fn stuck_at_the_switchover(bed: &Bed, user: &Qmp) -> (tokio::process::Child, u32) {
    // The last round leaves about half a second's worth.
    let has_begun = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.round >= 2);
    let rounds = ["--bandwidth", "40MiB/s", "--downtime", "3s", "--no-post-copy"];
    let migrate = bed.begin_migration(&rounds, has_begun).await;
    let beta = bed.beta().agent_pid().expect("it runs");
    let is_paused = async || user.execute(QueryStatus {}).await.expect("QEMU answers").status != RunState::Running;
    bed.eventually("the guest is paused with its agent there stopped", async || {
        if !is_paused().await {
            return false;
        }
        signal(beta, Signal::STOP);
        // Had it been over, it would run there, and QEMU here be told to quit.
        is_paused().await
    })
    .await;
    (migrate, beta)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_can_be_cancelled_in_every_phase_up_to_post_copy_which_goes_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = external(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), "sleep 1"));
    let writing = GuestOptions { rate: Some(32 << 20), ..guest(Mode::Random) };
    let bed = bed::start_with(options, writing, &["-qmp", "unix:user.sock,server=on,wait=off"]).await;

    // The QEMU at the destination takes the socket's name.
    let user = Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects");

    let prepares = |event: &MigrationEvent| matches!(event, MigrationEvent::Step { step: Step::Prepare });
    let migrate = bed.begin_migration(&[], prepares).await;
    cancel(&bed).await;
    assert_undone(&bed, migrate, "while the destination prepares").await;

    let second_round = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.round >= 2);
    let rounds = ["--bandwidth", "40MiB/s", "--downtime", "1ms", "--no-post-copy"];
    let migrate = bed.begin_migration(&rounds, second_round).await;
    cancel(&bed).await;
    assert_undone(&bed, migrate, "in a later round").await;
    bed.assert_never_stopped().await;

    let (migrate, beta) = stuck_at_the_switchover(&bed, &user).await;
    cancel(&bed).await;
    // The guest comes first: what the destination has prepared goes when its agent answers again.
    let before = bed.watch.log().beats().len();
    let beats_on = bed.watch.wait("the guest's heart", Duration::from_secs(5), |log| log.beats().len() > before + 20);
    beats_on.await.expect("it runs on here");
    signal(beta, Signal::CONT);
    assert_undone(&bed, migrate, "at the switchover").await;

    let migrate = in_post_copy(&bed).await;
    let refused = bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs");
    assert!(!refused.status.success() && text(&refused).contains("can only go on there"), "{}", text(&refused));
    let output = migrate.wait_with_output().await.expect("it ends");
    assert!(output.status.success(), "the guest has gone already: {}\n{}", text(&output), bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

/// Has QEMU run without the right to have the kernel wait for a guest's missing pages.
const WITHOUT_RIGHTS: &str = "exec setpriv --bounding-set=-sys_ptrace $qemu \"$@\"";

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_cannot_do_post_copy_says_so_before_anything_moves() {
    let anybody_may = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").expect("the kernel has it");
    if !rustix::process::geteuid().is_root() || anybody_may.trim() != "0" {
        eprintln!("not run: only root can take the right away from a QEMU, and where it takes one");
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = external(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), WITHOUT_RIGHTS));
    options.config[1] = "lend_userfaultfd = false".into();
    let writing = GuestOptions { rate: Some(32 << 20), ..guest(Mode::Random) };
    let bed = bed::start(options, writing).await;
    // Post-copy would make this end.
    let output = bed.migrate(&["--bandwidth", "20MiB/s", "--max-time", "2s"]).await;
    let said = text(&output);
    assert_eq!(output.status.code(), Some(5), "{said}\n{}", bed.logs());
    let reason = "Post-copy is not possible: at beta: cannot serve the guest's faults: cannot reach into QEMU";
    for word in [reason, "vm.unprivileged_userfaultfd", "post-copy may not be used"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
    // And this needs none.
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

const TRUSTED: &str = "[[network]]\ncidr = \"127.0.0.0/8\"\nsecurity = \"plain\"";

#[tokio::test(flavor = "multi_thread")]
async fn a_network_without_encryption_that_flips_bits_damages_no_page() {
    let config = [TRUSTED.to_owned(), TRUSTED.to_owned()];
    let bed = bed::start(TestbedOptions { config, ..external(1, 1) }, guest(Mode::Write)).await;
    let migrate = async |proxy: &DamagingProxy| {
        let arguments = ["migrate", VM, "--to", &proxy.address, "--bandwidth", "60MiB/s"];
        bed.alpha().vmferry(&arguments).await.expect("vmferry runs")
    };
    // What a stream begins with, by which the agents know each other.
    let proxy = DamagingProxy::to(bed.beta().address, Duration::from_millis(1), 0).await;
    let output = migrate(&proxy).await;
    assert_eq!(output.status.code(), Some(4), "{}\n{}", text(&output), bed.logs());
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;

    let proxy = DamagingProxy::to(bed.beta().address, Duration::from_millis(150), 4096).await;
    let output = migrate(&proxy).await;
    assert!(proxy.flipped() > 5, "{} bits were flipped: {}\n{}", proxy.flipped(), text(&output), bed.logs());
    // Either is right; anything in between is not.
    let there = match output.status.code() {
        Some(0) => 1,
        Some(4) => 0,
        _ => panic!("{}\n{}", text(&output), bed.logs()),
    };
    eprintln!("{} bits were flipped; the guest is on host {there}", proxy.flipped());
    bed.assert_runs_only_on(there).await;
    bed.assert_intact(there).await;
}

/// Has QEMU make a smaller machine than it was told to.
const SMALLER: &str = "for word do shift; \
    set -- \"$@\" \"$(printf %s \"$word\" | sed -e s/^384$/320/ -e s/size=402653184/size=335544320/)\"; done";

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_ram_has_another_size_is_refused_before_anything_moves() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = external(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), SMALLER));
    let bed = bed::start(options, guest(Mode::Write)).await;
    let output = bed.migrate(&["--json"]).await;
    assert_eq!(output.status.code(), Some(3), "{}\n{}", text(&output), bed.logs());
    let said = text(&output);
    for word in ["the machine that beta has made", "vmferry-ram has 393216 KiB at alpha and 327680 KiB at beta"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert!(!said.contains("\"event\":\"progress\""), "nothing moved: {said}");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    assert_eq!(traces_in_qemu(&bed, 0).await, (0, 0));
}
