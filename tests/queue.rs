//! Several migrations from one host: in turn, in the queue that the agent holds.

use std::process::Output;
use std::time::Duration;

use serde_json::Value;
use vmferry_api::MigrationView;
use vmferry_bench::testbed::{GuestWatch, TestbedOptions};
use vmferry_bench::{Fill, GuestOptions, Mode};

use crate::bed::{self, Bed, VM, external, options, text};

/// RAM of each guest, in MiB, and what it does with 64 of them.
const RAM_MIB: u64 = 256;

fn small(mode: Mode) -> GuestOptions {
    GuestOptions { mem: 64 << 20, threads: 1, mode, rate: None, fill: Fill::Random }
}

/// Two hosts and three guests on the first: web1, which writes, and web2 and web3, which do not.
async fn three(options: TestbedOptions) -> (Bed, [GuestWatch; 2]) {
    let bed = bed::start_sized(options, small(Mode::Write), RAM_MIB).await;
    let mut watches = Vec::new();
    for name in ["web2", "web3"] {
        let argv = bed.guest_command_line(&small(Mode::Idle), RAM_MIB, 1).expect("the kernel is there");
        watches.push(bed.start_guest(name, argv).await.expect("it starts"));
    }
    (bed, watches.try_into().ok().expect("two of them"))
}

async fn vmferry(bed: &Bed, arguments: &[&str]) -> Output {
    bed.alpha().vmferry(arguments).await.expect("vmferry runs")
}

/// The list of migrations, those that wait first.
async fn migrations(bed: &Bed) -> Vec<MigrationView> {
    bed.alpha().client().expect("a client").get("/v1/migrations").await.expect("it answers")
}

async fn is_on(bed: &Bed, host: usize, vm: &str) -> bool {
    let hosts = [bed.alpha(), bed.beta()];
    let there = hosts[host].show(vm).await.expect("answers").is_some_and(|view| view.state == "running");
    there && hosts[1 - host].show(vm).await.expect("answers").is_none()
}

/// Each page of a guest is as it was written.
async fn assert_whole(watch: &GuestWatch, host: usize) {
    let (pages, corrupt) = watch.verify(host).await.expect("the guest verifies its memory");
    assert!(corrupt == 0 && pages >= 16_000, "{corrupt} of {pages}");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_guests_go_one_after_the_other_the_quiet_ones_first_and_one_that_cannot_go_keeps_nobody() {
    let (bed, [web2, web3]) = three(external(1, 1)).await;
    let to = bed.to();
    let output = vmferry(&bed, &["migrate", VM, "nobody", "web2", "web3", "--to", &to, "--json"]).await;
    assert_eq!(output.status.code(), Some(3), "{}\n{}", text(&output), bed.logs());
    assert!(text(&output).contains("1 of 4 VMs were not migrated"), "{}", text(&output));
    let events: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("an event"))
        .collect();
    // Before anything moves.
    assert_eq!((events[0]["vm"].as_str(), events[0]["code"].as_str()), (Some("nobody"), Some("unknown-vm")));
    let turns: Vec<(&str, &str)> = events
        .iter()
        .filter_map(|it| match (it["event"].as_str()?, it["step"].as_str()) {
            ("step", Some("copy-ram")) => Some((it["vm"].as_str()?, "begins")),
            ("finished", _) => Some((it["vm"].as_str()?, "is there")),
            _ => None,
        })
        .collect();
    let names: Vec<&str> = turns.iter().map(|(vm, _)| *vm).collect();
    assert!(names[..4].iter().all(|vm| ["web2", "web3"].contains(vm)), "{turns:?}");
    for turn in turns.chunks(2) {
        assert!(turn[0].0 == turn[1].0 && turn[0].1 == "begins" && turn[1].1 == "is there", "{turns:?}");
    }
    assert_eq!(names[4..], [VM, VM], "what writes goes last");
    for (vm, watch) in [(VM, &bed.watch), ("web2", &web2), ("web3", &web3)] {
        assert!(is_on(&bed, 1, vm).await, "{vm}\n{}", bed.logs());
        assert_whole(watch, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_listed_with_its_place_can_be_cancelled_and_goes_on_without_who_asked_and_without_the_agent() {
    let (mut bed, _watches) = three(options()).await;
    let to = bed.to();
    let arguments = ["migrate", VM, "web2", "web3", "--to", &to, "--bandwidth", "10MiB/s"];
    let mut asked = bed.alpha().command(&arguments).stdout(std::process::Stdio::piped()).spawn().expect("it runs");
    bed.eventually("two wait", async || migrations(&bed).await.iter().filter(|it| it.step == "queued").count() == 2)
        .await;
    bed.eventually("they know their places", async || {
        let all = migrations(&bed).await;
        let words: Vec<&str> = all[..2].iter().filter_map(|it| it.outcome.as_deref()).collect();
        words.len() == 2 && words[0].starts_with("place 1: ") && words[1].starts_with("place 2: behind web")
    })
    .await;
    let all = migrations(&bed).await;
    // Of the two quiet ones one goes, and the other waits before the one that writes.
    let [next, last] = [&all[0], &all[1]].map(|it| it.vm.clone());
    assert!(next.starts_with("web") && last == VM, "{all:?}");
    for command in [&["post-copy", VM][..], &["tune", VM, "--downtime", "1s"], &["migrate", VM, "--to", &to]] {
        let refused = vmferry(&bed, command).await;
        assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    }
    let cancelled = vmferry(&bed, &["cancel", VM]).await;
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    let shown = vmferry(&bed, &["migrations"]).await;
    assert!(text(&shown).contains("not begun: cancelled"), "{}", text(&shown));
    assert!(is_on(&bed, 0, VM).await);

    // Who asked goes; then so does the agent, in the middle of the first.
    let pid = rustix::process::Pid::from_raw(asked.id().expect("it runs") as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it can be interrupted");
    assert_eq!(asked.wait().await.expect("it ends").code(), Some(6), "{}", bed.logs());
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    bed.eventually("the one that waited is there", async || is_on(&bed, 1, &next).await).await;
    bed.eventually("nothing waits", async || migrations(&bed).await.iter().all(|it| it.step != "queued")).await;
    assert!(is_on(&bed, 0, VM).await, "{}", bed.logs());
    assert_whole(&bed.watch, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_its_user_holds_back_leaves_the_link_to_another() {
    let (bed, [web2, _]) = three(options()).await;
    let to = bed.to();
    let held =
        bed.alpha().command(&["migrate", "web2", "--to", &to, "--bandwidth", "6MiB/s"]).spawn().expect("it runs");
    bed.eventually("the first copies", async || !migrations(&bed).await.is_empty()).await;
    let beside = vmferry(&bed, &["migrate", "web3", "--to", &to]).await;
    assert!(beside.status.success(), "{}\n{}", text(&beside), bed.logs());
    assert!(text(&beside).contains("queued, place 1: the link is taken (web2)"), "{}", text(&beside));
    assert!(is_on(&bed, 1, "web3").await, "{}", bed.logs());
    let first = bed.alpha().show("web2").await.expect("answers").expect("it is overtaken");
    assert!(first.migration.is_some(), "{first:?}");
    let held = tokio::time::timeout(Duration::from_secs(60), held.wait_with_output()).await;
    assert!(held.expect("it ends").expect("it runs").status.success(), "{}", bed.logs());
    assert_whole(&web2, 1).await;
}
