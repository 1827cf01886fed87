//! Guests that are not just running when they are moved: asleep, in their firmware, rebooting, shutting down; in each phase.

use std::time::{Duration, Instant};

use serde_json::json;
use vmferry_bench::Mode;
use vmferry_bench::testbed::TestbedOptions;
use vmferry_qemu::Qmp;

use crate::bed::{self, Bed, VM, assert_success, external, guest, text, with_qemus};
use crate::crashes::in_post_copy;
use crate::machines::{MACHINE, MONITOR, monitor, monitor_there, order, with_monitor_there};

async fn falls_asleep(bed: &Bed) {
    bed.watch.say(0, "suspend\n").await;
}

async fn is_asleep(bed: &Bed, host: usize) {
    bed.eventually("it sleeps", async || bed.view(host).await.state == "suspended").await;
}

async fn wakes_up(bed: &Bed, host: usize, user: &Qmp) {
    order(user, "system_wakeup", json!({})).await;
    bed.assert_runs_only_on(host).await;
    bed.assert_intact(host).await;
}

/// The guest's heart beats anew, on this host, and the VM is nowhere else.
async fn has_rebooted_on(bed: &Bed, host: usize) {
    let began_anew = |log: &vmferry_bench::GuestLog| log.restarted();
    bed.watch.wait("the guest that reboots", Duration::from_secs(60), began_anew).await.expect("it boots");
    let from = Instant::now();
    let beats_here = |log: &vmferry_bench::GuestLog| {
        log.beats().iter().filter(|beat| beat.at > from && beat.host == host).count() > 20
    };
    let beats = bed.watch.wait("the guest's heart", Duration::from_secs(20), beats_here).await;
    beats.unwrap_or_else(|error| panic!("{error}\n{}", bed.logs()));
    let other = [bed.alpha(), bed.beta()][1 - host];
    assert!(other.show(VM).await.expect("answers").is_none(), "{}", bed.logs());
    bed.assert_intact(host).await;
}

async fn is_nowhere(bed: &Bed) {
    for host in [bed.alpha(), bed.beta()] {
        bed.eventually("it is gone", async || host.show(VM).await.expect("answers").is_none()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_suspended_to_ram_arrives_so_and_wakes_up_there() {
    for options in [external(1, 1), with_qemus(1, 1)] {
        let dir = tempfile::tempdir().expect("a folder");
        let options = with_monitor_there(options, 1, dir.path());
        let bed = bed::start(options, guest(Mode::Idle)).await;
        falls_asleep(&bed).await;
        is_asleep(&bed, 0).await;
        let output = bed.migrate(&[]).await;
        assert_success(&output, &bed);
        assert!(text(&output).contains("suspended to RAM, and will be there"), "{}", text(&output));
        is_asleep(&bed, 1).await;
        wakes_up(&bed, 1, &monitor_there(dir.path()).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_falls_asleep_while_it_is_moved_wakes_up_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let bed = bed::start(with_monitor_there(external(1, 1), 1, dir.path()), guest(Mode::Random)).await;
    let migrate = bed.begin_slow_migration().await;
    falls_asleep(&bed).await;
    let output = migrate.wait_with_output().await.expect("it ends");
    assert!(output.status.success(), "{}", bed.logs());
    is_asleep(&bed, 1).await;
    wakes_up(&bed, 1, &monitor_there(dir.path()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_would_not_wake_up_there_stays() {
    for (alpha, beta) in [(0, 1), (1, 0)] {
        let bed = bed::start_with(external(alpha, beta), guest(Mode::Idle), &[&MONITOR[..], &MACHINE].concat()).await;
        let user = monitor(&bed).await;
        let migrate = bed.begin_slow_migration().await;
        falls_asleep(&bed).await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert_eq!(output.status.code(), Some(4), "{}", bed.logs());
        assert!(bed.alpha().agent_log().contains("it was suspended to RAM"), "{}", bed.logs());
        is_asleep(&bed, 0).await;
        let said = bed.migrate(&[]).await;
        assert_eq!(said.status.code(), Some(3), "{}", text(&said));
        assert!(text(&said).contains("it is suspended to RAM, and would not wake up there"), "{}", text(&said));
        wakes_up(&bed, 0, &user).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reboots_while_it_is_moved_arrives_in_its_firmware_or_later() {
    for options in [external(1, 1), with_qemus(1, 1)] {
        let bed = bed::start_with(options, guest(Mode::Random), &MONITOR).await;
        let user = monitor(&bed).await;
        let migrate = bed.begin_slow_migration().await;
        order(&user, "system_reset", json!({})).await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert!(output.status.success(), "{}", bed.logs());
        has_rebooted_on(&bed, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_its_firmware_is_moved() {
    for options in [external(0, 0), external(1, 1)] {
        let bed = bed::start_with(options, guest(Mode::Random), &MONITOR).await;
        let user = monitor(&bed).await;
        order(&user, "system_reset", json!({})).await;
        assert_success(&bed.migrate(&[]).await, &bed);
        has_rebooted_on(&bed, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reboots_in_post_copy_goes_on_there() {
    for options in [external(1, 1), with_qemus(1, 1)] {
        let dir = tempfile::tempdir().expect("a folder");
        let bed = bed::start(with_monitor_there(options, 1, dir.path()), guest(Mode::Write)).await;
        let migrate = in_post_copy(&bed).await;
        order(&monitor_there(dir.path()).await, "system_reset", json!({})).await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert!(output.status.success(), "{}", bed.logs());
        has_rebooted_on(&bed, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_shuts_down_while_it_is_moved_is_gone_from_both_hosts() {
    for options in [external(1, 1), with_qemus(1, 1)] {
        let bed = bed::start(options, guest(Mode::Random)).await;
        let migrate = bed.begin_slow_migration().await;
        bed.watch.say(0, "poweroff\n").await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert!(!output.status.success(), "{}", bed.logs());
        is_nowhere(&bed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_shuts_down_in_post_copy_is_gone_from_both_hosts() {
    for options in [external(1, 1), with_qemus(1, 1)] {
        let bed = bed::start(options, guest(Mode::Write)).await;
        let migrate = in_post_copy(&bed).await;
        bed.watch.say(1, "poweroff\n").await;
        migrate.wait_with_output().await.expect("it ends");
        is_nowhere(&bed).await;
    }
}

/// What has shut down, and whose QEMU is to stay, is not moved any more: nothing of it would go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_has_shut_down_and_whose_qemu_stays_is_refused() {
    let options: [TestbedOptions; 2] = [external(1, 1), with_qemus(1, 1)];
    for options in options {
        let bed = bed::start_with(options, guest(Mode::Random), &["-no-shutdown"]).await;
        let migrate = bed.begin_slow_migration().await;
        bed.watch.say(0, "poweroff\n").await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert!(!output.status.success(), "{}", bed.logs());
        let left = bed.alpha().show(VM).await.expect("answers").map(|it| it.state);
        assert_eq!(left.as_deref(), Some("shutdown"), "{}", bed.logs());
        assert!(bed.beta().show(VM).await.expect("answers").is_none(), "{}", bed.logs());
    }
}
