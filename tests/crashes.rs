//! Agents and QEMUs that die in the middle: the guest is never lost, and never runs twice.

use std::time::Duration;

use vmferry_bench::testbed::TestbedOptions;
use vmferry_bench::{GuestOptions, Mode};

use crate::bed::{self, Bed, VM, guest, options, text};

async fn busy_guest() -> Bed {
    bed::start(options(), guest(Mode::Write)).await
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it can be killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_destinations_qemu_is_killed_mid_copy_the_guest_runs_on() {
    let bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    kill(bed.view(1).await.pid);
    let status = migrate.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(4), "{}", bed.logs());
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
    let (_, list) = migrations(&bed).await;
    assert!(list.contains("abandoned") && list.contains("copying the RAM failed"), "{list}");
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

/// The destination's QEMU ends when the commit is being written there, so before anything was executed in it.
async fn is_given_back(bed: Bed, arguments: &[&str]) {
    let mut migrate = bed.begin_slow_migration_with(arguments).await;
    let journal = rusqlite::Connection::open(bed.beta().state_dir.join("agent.db")).expect("opens");
    journal.execute_batch("BEGIN IMMEDIATE").expect("it can be kept from writing");
    bed.eventually("it is asked to commit", async || bed.view(0).await.state == "in-doubt").await;
    // For QEMU to load what it has been sent.
    tokio::time::sleep(Duration::from_millis(700)).await;
    kill(bed.view(1).await.pid);
    journal.execute_batch("ROLLBACK").expect("it may write");
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(4), "{}", bed.logs());
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
    let there = bed.beta().agent_log();
    assert!(there.contains("owns the guest now") && there.contains("abandoned"), "{there}");
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_qemu_moved_and_that_never_ran_there_is_given_back() {
    // One that converges, however fast its processor is.
    let guest = GuestOptions { rate: Some(10 << 20), ..guest(Mode::Random) };
    is_given_back(bed::start(options(), guest).await, &["--no-post-copy"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_agents_moved_by_post_copy_and_that_never_ran_there_is_given_back() {
    is_given_back(bed::start(bed::external(1, 1), guest(Mode::Random)).await, &["--max-time", "1s"]).await;
}

/// The source's agent, started again, is done with what its predecessor left behind.
async fn settled(bed: &Bed) {
    bed.eventually("the migration is settled", async || bed.view(0).await.state != "migrating").await;
}

async fn migrations(bed: &Bed) -> (Option<i32>, String) {
    let output = bed.alpha().vmferry(&["migrations"]).await.expect("vmferry runs");
    (output.status.code(), text(&output))
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_sources_agent_is_killed_mid_copy_the_guest_runs_on_and_the_next_agent_cleans_up() {
    let mut bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    let status = migrate.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(6), "the command line lost sight of it");
    assert_eq!(bed.view(1).await.state, "incoming");
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.eventually("the other side is cleaned up", async || bed.beta().show(VM).await.expect("answers").is_none())
        .await;
    settled(&bed).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
    let (_, list) = migrations(&bed).await;
    assert!(list.contains("abandoned") && list.contains("the agent ended while it was under way"), "{list}");
    assert!(bed.alpha().agent_log().contains("the guest runs on here"), "{}", bed.logs());
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_told_to_end_undoes_what_it_has_under_way() {
    let mut bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    bed.testbed.host_mut(0).stop_agent().await.expect("ends");
    let status = migrate.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(130), "{}", bed.logs());
    assert!(bed.beta().show(VM).await.expect("answers").is_none(), "what was prepared is gone");
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_post_copy_is_cancelled_the_guest_ends_up_running_once() {
    // Between two older QEMUs under TCG post-copy begins with the first byte, and cancelling meets every moment of it.
    let bed = bed::start(bed::with_qemus(0, 0), guest(Mode::Write)).await;
    let mut host = 0;
    let mut moved = 0;
    for delay_ms in [60, 120, 160, 200, 240, 280, 330, 400, 600] {
        let hosts = [bed.alpha(), bed.beta()];
        let to = hosts[1 - host].address.to_string();
        let mut migrate = hosts[host].command(&["migrate", VM, "--to", &to]).spawn().expect("vmferry runs");
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        // It may have ended by itself.
        let _ = hosts[host].vmferry(&["cancel", VM]).await.expect("vmferry runs");
        let code = migrate.wait().await.expect("it ends").code();
        assert!(matches!(code, Some(0 | 130)), "{code:?} after {delay_ms} ms\n{}", bed.logs());
        if code == Some(0) {
            host = 1 - host;
            moved += 1;
        }
        bed.assert_runs_only_on(host).await;
    }
    eprintln!("{moved} of 9 were too far to be cancelled");
    bed.assert_intact(host).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_cancelled_while_the_destination_prepares_leaves_nothing_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = options();
    options.qemu_dirs[1] = Some(bed::qemu_that_first(dir.path(), "sleep 2"));
    let bed = bed::start(options, guest(Mode::Write)).await;
    let to = bed.to();
    let mut migrate = bed.alpha().command(&["migrate", VM, "--to", &to]).spawn().expect("vmferry runs");
    bed.eventually("it prepares", async || {
        bed.alpha().show(VM).await.expect("answers").is_some_and(|view| view.state == "migrating")
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs");
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
    let vms = bed.beta().run_dir.join("vms").display().to_string();
    let left = vmferry_bench::testbed::processes_naming(&vms);
    assert!(left.is_empty(), "its QEMU is gone, so that the VM can be offered again: {left:?}");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_sources_agent_stays_away_the_destination_drops_what_it_prepared() {
    let mut bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    migrate.wait().await.expect("it ends");
    bed.eventually("the lease ran out", async || bed.beta().show(VM).await.expect("answers").is_none()).await;
    assert!(bed.beta().agent_log().contains("was not heard of for 15 s"), "{}", bed.logs());
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    settled(&bed).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_destinations_agent_is_killed_mid_copy_and_comes_back_the_migration_goes_on() {
    let mut bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    bed.testbed.host_mut(1).kill_agent().await.expect("killed");
    tokio::time::sleep(Duration::from_millis(300)).await;
    bed.testbed.host_mut(1).start_agent().await.expect("starts");
    let status = migrate.wait().await.expect("it ends");
    assert!(status.success(), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_an_agent_is_killed_the_guest_ends_up_running_once() {
    agents_are_killed(bed::start(options(), guest(Mode::Random)).await).await;
}

/// In ten migrations, each at another moment.
pub(crate) async fn agents_are_killed(mut bed: Bed) {
    let mut host = 0;
    // From the first step to after the last one; which agent dies alternates.
    for (round, delay_ms) in [20, 120, 250, 350, 450, 600, 800, 1000, 1300, 1700].into_iter().enumerate() {
        let to = [bed.alpha(), bed.beta()][1 - host].address.to_string();
        let arguments = ["migrate", VM, "--to", &to, "--bandwidth", "150MiB/s"];
        let mut migrate = [bed.alpha(), bed.beta()][host]
            .command(&arguments)
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("vmferry runs");
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        let victim = if round % 2 == 0 { host } else { 1 - host };
        bed.testbed.host_mut(victim).kill_agent().await.expect("killed");
        tokio::time::sleep(Duration::from_millis(100)).await;
        bed.testbed.host_mut(victim).start_agent().await.expect("starts");
        migrate.wait().await.expect("it ends");
        bed.eventually("one host has the guest, running", async || {
            let views = [bed.alpha().show(VM).await.expect("answers"), bed.beta().show(VM).await.expect("answers")];
            let running = views.iter().flatten().filter(|view| view.state == "running").count();
            running == 1 && views.iter().flatten().count() == 1
        })
        .await;
        host = usize::from(bed.beta().show(VM).await.expect("answers").is_some());
        bed.assert_runs_only_on(host).await;
    }
    bed.assert_intact(host).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_guest_powers_off_mid_copy_both_hosts_forget_it() {
    let bed = busy_guest().await;
    let mut migrate = bed.begin_slow_migration().await;
    bed.watch.say(0, "poweroff\n").await;
    let status = migrate.wait().await.expect("it ends");
    assert!(!status.success());
    bed.eventually("both forgot it", async || {
        bed.beta().show(VM).await.expect("answers").is_none() && {
            let here = bed.alpha().show(VM).await.expect("answers");
            here.is_none_or(|view| view.state == "ended" || view.state == "shutdown")
        }
    })
    .await;
}

/// The guest writes, runs on the destination already, and most of its memory is still to come.
pub(crate) async fn in_post_copy(bed: &Bed) -> tokio::process::Child {
    let to = bed.to();
    let mut command = bed.alpha().command(&["migrate", VM, "--to", &to, "--bandwidth", "20MiB/s", "--max-time", "1s"]);
    let mut migrate = command.stderr(std::process::Stdio::piped()).spawn().expect("vmferry runs");
    let is_leaving = async || bed.alpha().show(VM).await.expect("answers").is_some_and(|it| it.state == "leaving");
    while !is_leaving().await {
        if migrate.try_wait().expect("it is ours").is_some() {
            let said = migrate.wait_with_output().await.expect("it ended");
            panic!("it ended before post-copy: {}\n{}", text(&said), bed.logs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    migrate
}

#[tokio::test(flavor = "multi_thread")]
async fn when_post_copy_loses_its_connection_the_guest_waits_and_goes_on_over_a_new_one() {
    let bed = bed::start_with(options(), guest(Mode::Write), &["-qmp", "unix:user.sock,server=on,wait=off"]).await;
    let user =
        vmferry_qemu::Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects");
    let migrate = in_post_copy(&bed).await;
    user.execute(vmferry_qemu::qmp::commands::MigratePause {}).await.expect("the connection is cut");
    let output = migrate.wait_with_output().await.expect("it ends");
    crate::bed::assert_success(&output, &bed);
    let said = text(&output);
    assert!(said.contains("broke") && said.contains("The connection is back"), "{said}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_qemu_can_do_nothing_but_wait_for_a_page_gets_its_pages_over_a_new_connection() {
    // Both QEMUs make this socket, one after the other.
    let bed = bed::start_with(options(), guest(Mode::Write), &["-qmp", "unix:user.sock,server=on,wait=off"]).await;
    let user = async || {
        let socket = bed.dir().join("user.sock");
        vmferry_qemu::Qmp::connect(&socket, Duration::from_secs(5)).await.expect("connects")
    };
    let source = user().await;
    let migrate = in_post_copy(&bed).await;
    let destination = user().await;
    // Reading the guest's memory from the main loop: it gets one missing page after the other, until it gets none.
    let dump = bed.dir().join("dump");
    let read_all = serde_json::json!({ "val": 0, "size": bed::RAM_MIB << 20, "filename": dump });
    let reading = tokio::spawn(async move { destination.execute_raw("pmemsave", read_all).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    source.execute(vmferry_qemu::qmp::commands::MigratePause {}).await.expect("the connection is cut");
    assert!(!reading.is_finished(), "the main loop has all it wants");
    let output = migrate.wait_with_output().await.expect("it ends");
    crate::bed::assert_success(&output, &bed);
    let said = text(&output);
    assert!(said.contains("broke") && said.contains("The connection is back"), "{said}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_link_is_cut_for_three_seconds_in_post_copy_in_namespaces_the_guest_goes_on() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make network namespaces");
        return;
    }
    let bed = bed::start(TestbedOptions { namespaces: true, ..options() }, guest(Mode::Write)).await;
    let migrate = in_post_copy(&bed).await;
    bed.set_link(false).expect("cut");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(bed.alpha().show(VM).await.expect("answers").is_some(), "the source keeps what the guest still needs");
    bed.set_link(true).expect("mended");
    let output = migrate.wait_with_output().await.expect("it ends");
    crate::bed::assert_success(&output, &bed);
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}
