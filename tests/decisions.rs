//! What a user decides about a guest: pause it, have it go on, start it again; and where it is, when the agents cannot
//! know.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vmferry_api::MigrationEvent;
use vmferry_bench::Mode;

use crate::bed::{self, Bed, VM, assert_success, external, guest, options, text};

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).expect("a pid"), signal).expect("it lives");
}

/// Runs `vmferry` on this host; its exit code and what it said.
async fn vmferry(bed: &Bed, host: usize, arguments: &[&str]) -> (Option<i32>, String) {
    let output = [bed.alpha(), bed.beta()][host].vmferry(arguments).await.expect("vmferry runs");
    (output.status.code(), text(&output))
}

/// A guest that was handed over while the agent of its destination stands still: paused, and nobody knows whose it is.
async fn in_doubt(bed: &Bed) -> (tokio::process::Child, u32) {
    let migrate = bed.begin_slow_migration().await;
    let beta = bed.beta().agent_pid().expect("it runs");
    signal(beta, Signal::STOP);
    bed.eventually("it is in doubt", async || bed.view(0).await.state == "in-doubt").await;
    (migrate, beta)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_doubt_that_is_kept_goes_on_here_and_the_other_host_lets_go_when_it_comes_back() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let (mut migrate, beta) = in_doubt(&bed).await;
    let (code, said) = vmferry(&bed, 0, &["cancel", VM]).await;
    assert_eq!(code, Some(8), "{said}");
    assert!(said.contains("too late to cancel") && said.contains("vmferry resolve"), "{said}");
    let (code, said) = vmferry(&bed, 0, &["stop", VM, "--force"]).await;
    assert!(code == Some(3) && said.contains("vmferry resolve"), "{said}");
    let (code, said) = vmferry(&bed, 0, &["resume", VM]).await;
    assert!(code == Some(3) && said.contains("may run at its destination"), "{said}");
    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--keep-here"]).await;
    assert!(code == Some(3) && said.contains("will run twice") && said.contains("--yes"), "it warns: {said}");
    assert_eq!(bed.view(0).await.state, "in-doubt");

    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--keep-here", "--yes"]).await;
    assert_eq!(code, Some(0), "{said}\n{}", bed.logs());
    bed.eventually("it goes on here", async || bed.view(0).await.state == "running").await;
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(4), "{}", bed.logs());
    let before = bed.watch.log().beats().len();
    let beats = bed.watch.wait("the guest's heart", Duration::from_secs(5), |log| log.beats().len() > before + 20);
    beats.await.expect("it beats");
    signal(beta, Signal::CONT);
    bed.eventually("beta lets go", async || bed.beta().show(VM).await.expect("answers").is_none()).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
    bed.eventually("alpha heard of that", async || bed.alpha().agent_log().contains("has let go")).await;
    // And all is as if nothing had happened.
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_kept_while_it_ran_there_ends_there_when_that_host_hears_of_it() {
    let mut bed = bed::start(options(), guest(Mode::Idle)).await;
    let (_migrate, _) = in_doubt(&bed).await;
    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--keep-here", "--yes"]).await;
    assert_eq!(code, Some(0), "{said}");
    // Not even an agent that is started anew, and has only its journal, keeps it.
    bed.testbed.host_mut(1).kill_agent().await.expect("killed");
    bed.testbed.host_mut(1).start_agent().await.expect("starts");
    bed.eventually("beta lets go", async || bed.beta().show(VM).await.expect("answers").is_none()).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_guest_that_runs_there_by_its_users_word_nothing_is_left_here() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let (mut migrate, beta) = in_doubt(&bed).await;
    signal(beta, Signal::CONT);
    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--it-runs-there", "--yes"]).await;
    // It may have been told in the meantime.
    assert!(code == Some(0) || said.contains("nothing is in doubt") || said.contains("no VM named"), "{said}");
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(0), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
    let (code, said) = vmferry(&bed, 1, &["resolve", VM, "--keep-here", "--yes"]).await;
    assert!(code == Some(3) && said.contains("nothing is in doubt"), "{said}");
}

/// A guest that its user pauses in the middle of its migration arrives paused; one that goes on again arrives running.
async fn a_pause_is_kept(options: vmferry_bench::testbed::TestbedOptions) {
    let bed = bed::start(options, guest(Mode::Write)).await;
    let copies = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.sent > 4 << 20);
    let mut migrate = bed.begin_migration(&["--bandwidth", "40MiB/s", "--no-post-copy"], copies).await;
    let (code, said) = vmferry(&bed, 0, &["pause", VM]).await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(0), "{}", bed.logs());
    assert_eq!(bed.view(1).await.state, "paused", "{}", bed.logs());
    assert!(bed.alpha().show(VM).await.expect("answers").is_none());
    let beats = bed.watch.log().beats().len();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(bed.watch.log().beats().len(), beats, "it is paused");
    let (code, said) = vmferry(&bed, 1, &["resume", VM]).await;
    assert_eq!(code, Some(0), "{said}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_paused_while_agents_move_it_arrives_paused() {
    a_pause_is_kept(external(1, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_paused_while_qemu_moves_it_arrives_paused() {
    a_pause_is_kept(options()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_paused_and_whose_migration_is_cancelled_stays_paused() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    let mut migrate = bed.begin_slow_migration().await;
    for (command, state) in [("pause", "paused"), ("cancel", "paused")] {
        let (code, said) = vmferry(&bed, 0, &[command, VM]).await;
        assert_eq!(code, Some(0), "{said}");
        if command == "cancel" {
            assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
            assert_eq!(bed.view(0).await.state, state);
        }
    }
    let (code, said) = vmferry(&bed, 0, &["stop", VM]).await;
    assert!(code == Some(3) && said.contains("cannot shut down") && said.contains("vmferry resume"), "{said}");
    let (code, said) = vmferry(&bed, 0, &["resume", VM]).await;
    assert_eq!(code, Some(0), "{said}");
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}

/// What the host's journal says of a VM changes, as if the host had been restarted since.
fn restart_host(bed: &Bed, host: usize) {
    let dir = [bed.alpha(), bed.beta()][host].state_dir.join("agent.db");
    let db = rusqlite::Connection::open(dir).expect("opens");
    db.execute("UPDATE vms SET boot = 'an earlier one'", []).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_not_forgotten_when_its_host_is_restarted_and_can_be_started_again() {
    let mut bed = bed::start(options(), guest(Mode::Idle)).await;
    let qemu = ["qemu-system-x86_64", "-machine", "q35", "-m", "64", "-S"];
    let (code, said) = vmferry(&bed, 0, &[&["run", "always", "--autostart", "--"], &qemu[..]].concat()).await;
    assert_eq!(code, Some(0), "{said}");
    let pids = [bed.view(0).await.pid, bed.alpha().show("always").await.expect("answers").expect("is there").pid];
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    for pid in pids {
        signal(pid, Signal::KILL);
    }
    restart_host(&bed, 0);
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.eventually("what is to be started is", async || {
        bed.alpha().show("always").await.expect("answers").is_some_and(|view| view.state == "prelaunch")
    })
    .await;
    let view = bed.view(0).await;
    assert_eq!((view.state.as_str(), view.detail.as_deref()), ("ended", Some("its host was restarted")));
    let (code, said) = vmferry(&bed, 0, &["migrate", VM, "--to", &bed.to()]).await;
    assert!(code == Some(3) && said.contains("vmferry start web1"), "{said}");
    let (code, said) = vmferry(&bed, 0, &["start", VM]).await;
    assert_eq!(code, Some(0), "{said}\n{}", bed.logs());
    bed.eventually("it runs again", async || bed.view(0).await.state == "running").await;
    let (code, said) = vmferry(&bed, 0, &["start", VM]).await;
    assert_eq!(code, Some(3), "{said}");
    for (word, shown) in [("off", false), ("on", true)] {
        let (code, said) = vmferry(&bed, 0, &["autostart", VM, word]).await;
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(bed.view(0).await.autostart, shown);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_its_journal_was_lost_an_agent_finds_its_vms_and_asks_whose_they_are() {
    let mut bed = bed::start(options(), guest(Mode::Write)).await;
    let pid = bed.view(0).await.pid;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    let journal = bed.alpha().state_dir.join("agent.db");
    for end in ["-wal", "-shm"] {
        // Not every moment has them.
        let _ = std::fs::remove_file(format!("{}{end}", journal.display()));
    }
    std::fs::write(&journal, [0x5a; 8192]).expect("written");
    bed.testbed.host_mut(0).start_agent().await.expect("it starts all the same");
    let log = bed.alpha().agent_log();
    assert!(log.contains("THE JOURNAL COULD NOT BE READ") && log.contains("agent.db.damaged-"), "{log}");
    bed.eventually("it is found", async || bed.alpha().show(VM).await.expect("answers").is_some()).await;
    let view = bed.view(0).await;
    assert_eq!((view.state.as_str(), view.pid), ("unclear", pid), "{view:?}");
    for (arguments, words) in [
        (&["migrate", VM, "--to", "192.0.2.1"][..], "may be another host's"),
        (&["stop", VM], "may be another host's"),
        (&["run", VM, "--", "qemu-system-x86_64"], "exists on alpha"),
    ] {
        let (code, said) = vmferry(&bed, 0, arguments).await;
        assert!(code == Some(3) && said.contains(words), "{arguments:?}: {code:?} {said}");
    }
    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--keep-here", "--yes"]).await;
    assert_eq!(code, Some(0), "{said}");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
    // It is on record again.
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    assert_eq!(bed.view(0).await.state, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_set_up_anew_lets_go_of_a_guest_that_was_kept_elsewhere() {
    let mut bed = bed::start(options(), guest(Mode::Idle)).await;
    let (_migrate, _) = in_doubt(&bed).await;
    let (code, said) = vmferry(&bed, 0, &["resolve", VM, "--keep-here", "--yes"]).await;
    assert_eq!(code, Some(0), "{said}");
    // Its agent forgets all, who it was too; but its QEMU is still there.
    bed.testbed.host_mut(1).kill_agent().await.expect("killed");
    std::fs::remove_dir_all(&bed.beta().state_dir).expect("removed");
    bed.testbed.host_mut(1).start_agent().await.expect("starts");
    bed.eventually("it is found there", async || bed.beta().show(VM).await.expect("answers").is_some()).await;
    assert_eq!(bed.view(1).await.state, "unclear", "{}", bed.logs());
    let (code, said) = vmferry(&bed, 0, &["unpair", "beta"]).await;
    assert_eq!(code, Some(0), "{said}");
    bed.testbed.pair().await.expect("paired again");
    bed.eventually("beta lets go", async || bed.beta().show(VM).await.expect("answers").is_none()).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}
