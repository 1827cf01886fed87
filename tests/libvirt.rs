//! Domains of real libvirts, carried between two hosts by their agents. As root, with Debian's libvirt
//! (`scripts/setup.sh --for-tests`).

use std::process::Stdio;
use std::time::Duration;

use vmferry_api::{Made, MigrationEvent, MigrationView, Report};
use vmferry_bench::{Fill, GuestOptions, Mode};

use crate::bed::text;
use crate::docs::commands;
use crate::libvirt_bed::{DOMAIN, Lab, LabHost, LabOptions, own};

/// A guest that does this with 64 MiB.
fn guest(mode: Mode) -> GuestOptions {
    GuestOptions { mem: 64 << 20, threads: 1, mode, rate: Some(10 << 20), fill: Fill::Random }
}

/// Slow enough that something can be done in its middle.
const SLOW: [&str; 2] = ["--bandwidth", "8MiB/s"];

/// Its RAM is being copied.
fn copies(event: &MigrationEvent) -> bool {
    matches!(event, MigrationEvent::Progress(it) if it.sent > 4 << 20)
}

fn report(said: &str) -> Report {
    let mut finished = said.lines().filter_map(|line| match serde_json::from_str(line) {
        Ok(MigrationEvent::Finished(report)) => Some(*report),
        _ => None,
    });
    finished.next_back().unwrap_or_else(|| panic!("no report: {said}"))
}

/// QEMU's longest pause at a switchover, as libvirt leaves it.
fn downtime_limit(lab: &Lab) -> String {
    let said = lab.alpha().virsh_says(&["qemu-monitor-command", DOMAIN, "--hmp", "info migrate_parameters"]);
    said.lines().find(|line| line.starts_with("downtime-limit")).expect("it is told").trim().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_of_libvirts_is_shown_beside_others_left_to_libvirt_and_moves_while_it_runs() {
    let lab = Lab::start(LabOptions::default()).await;
    let mut watch = lab.start_domain(&guest(Mode::Random), "", "").await;

    lab.eventually("the agent sees it run", async || {
        lab.alpha().show(DOMAIN).await.is_some_and(|it| it.state == "running")
    })
    .await;
    let listed = text(&lab.alpha().vmferry(&["list"]));
    let line = listed.lines().find(|line| line.starts_with("web1 ")).unwrap_or_else(|| panic!("{listed}"));
    assert!(line.contains("running") && line.contains("320.0 MiB") && line.ends_with("libvirt"), "{listed}");
    let shown = text(&lab.alpha().vmferry(&["show", "libvirt:web1"]));
    assert!(shown.contains("manager       libvirt") && shown.contains("libvirt moves it itself"), "{shown}");
    lab.alpha().virsh_says(&["suspend", DOMAIN]);
    lab.eventually("it is seen to be paused", async || {
        lab.alpha().show(DOMAIN).await.is_some_and(|it| it.state == "paused")
    })
    .await;
    lab.alpha().virsh_says(&["resume", DOMAIN]);

    for (command, instead) in [
        (&["stop", DOMAIN, "--force"][..], "virsh shutdown web1"),
        (&["pause", DOMAIN], "virsh suspend web1"),
        (&["console", DOMAIN], "virsh console web1"),
        (&["autostart", DOMAIN, "on"], "virsh autostart web1"),
        (&["disk", "list", DOMAIN], "virsh domblklist web1"),
    ] {
        let refused = lab.alpha().vmferry(command);
        assert_eq!(refused.status.code(), Some(3), "{command:?}: {}", text(&refused));
        assert!(text(&refused).contains(instead), "{command:?}: {}", text(&refused));
    }
    let dry = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta", "--dry-run"]);
    assert!(dry.status.success(), "{}\n{}", text(&dry), lab.logs());
    assert!(text(&dry).contains("web1 can move to beta; nothing was touched."), "{}", text(&dry));
    assert!(text(&dry).contains("downtime") && text(&dry).contains("QEMU"), "{}", text(&dry));
    let bad = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta", "--engine", "qemu"]);
    assert!(bad.status.code() == Some(3) && text(&bad).contains("leave --engine out"), "{}", text(&bad));
    // What another keeps a record of is that one's to move, as long as it says so.
    let nova = "http://openstack.org/xmlns/libvirt/nova/1.1";
    let metadata = ["metadata", DOMAIN, "--uri", nova, "--live"];
    lab.alpha().virsh_says(&[&metadata[..], &["--key", "nova", "--set", "<instance/>"]].concat());
    let refused = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta"]);
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert!(text(&refused).contains("Nova manages it") && text(&refused).contains("--remove"), "{}", text(&refused));
    let dry = lab.alpha().vmferry(&["predict", DOMAIN, "--to", "beta"]);
    assert!(dry.status.success() && text(&dry).contains("vmferry does not move it"), "{}", text(&dry));
    lab.alpha().virsh_says(&[&metadata[..], &["--remove"]].concat());
    lab.assert_runs_only_on(0, &watch).await;

    let migration = lab.begin(&[], |event| matches!(event, MigrationEvent::Step { .. }));
    lab.listen(&mut watch, 1).await;
    let (code, said) = migration.wait();
    assert_eq!(code, Some(0), "{said}\n{}", lab.logs());
    let report = report(&said);
    assert_eq!((report.engine.as_str(), report.vm.as_str(), report.to.as_str()), ("libvirt", DOMAIN, "beta"));
    assert!(report.downtime_ms > 0.0 && report.downtime_ms < 5000.0 && report.sent > 64 << 20, "{report:?}");
    let foretold = report.foretold.as_ref().expect("it was watched before");
    assert_eq!(foretold.made, Made::Before);
    let ratio = foretold.sent.likely / report.sent as f64;
    assert!(ratio > 0.3 && ratio < 5.0, "{report:?}");
    lab.assert_runs_only_on(1, &watch).await;
    lab.assert_intact(1, &watch, 16_000).await;
    // Its definition has moved with it, and nothing of the way is left.
    assert!(!lab.alpha().virsh(&["dominfo", DOMAIN]).status.success());
    assert!(lab.beta().virsh_says(&["dominfo", DOMAIN]).contains("Persistent:     yes"));
    lab.eventually("beta's agent shows it, and alpha's does not", async || {
        lab.beta().show(DOMAIN).await.is_some_and(|it| it.state == "running")
            && lab.alpha().show(DOMAIN).await.is_none()
    })
    .await;
    assert_eq!(lab.alpha().last_migration().await.step, "done");
    lab.assert_no_sockets().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_only_one_host_has_is_copied_by_libvirt_over_the_agents_and_one_that_both_see_is_not() {
    let lab = Lab::start(LabOptions::default()).await;
    let bytes: u64 = 16 << 20;
    let image = "/var/lib/libvirt/images/web1.raw";
    std::fs::File::create(lab.alpha().inside(image)).and_then(|file| file.set_len(bytes)).expect("written");
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>
         <target dev='vda' bus='virtio'/></disk>"
    );
    let mut watch = lab.start_domain(&guest(Mode::Random), &format!("vmferry.disk={bytes}"), &disk).await;
    let refused = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta", "--no-copy-disks"]);
    assert_eq!(refused.status.code(), Some(3), "{}\n{}", text(&refused), lab.logs());
    assert!(text(&refused).contains("does not see the same") && text(&refused).contains("vda"), "{}", text(&refused));

    let migration = lab.begin(&[], |event| matches!(event, MigrationEvent::Step { .. }));
    lab.listen(&mut watch, 1).await;
    let (code, said) = migration.wait();
    assert_eq!(code, Some(0), "{said}\n{}", lab.logs());
    assert_eq!(report(&said).disks.len(), 1, "{said}");
    lab.assert_runs_only_on(1, &watch).await;
    lab.assert_intact(1, &watch, 16_000).await;
    let works = |log: &vmferry_bench::GuestLog| log.disk().is_some_and(|(on, blocks)| on == 1 && blocks > 0);
    watch.wait("the guest's disk", Duration::from_secs(20), works).await.expect("it works there");
    assert!(watch.log().corrupt().is_empty(), "{:?}", watch.log().corrupt());
    assert!(lab.beta().inside(image).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_disk_is_not_copied() {
    let lab = Lab::start(LabOptions::default()).await;
    let bytes: u64 = 16 << 20;
    let image = lab.shared_folder().join("web1.raw");
    std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("written");
    own(&image);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='{}'/>
         <target dev='vda' bus='virtio'/></disk>",
        image.display()
    );
    let mut watch = lab.start_domain(&guest(Mode::Random), &format!("vmferry.disk={bytes}"), &disk).await;
    let migration = lab.begin(&["--no-copy-disks"], |event| matches!(event, MigrationEvent::Step { .. }));
    lab.listen(&mut watch, 1).await;
    let (code, said) = migration.wait();
    assert_eq!(code, Some(0), "{said}\n{}", lab.logs());
    assert!(report(&said).disks.is_empty(), "{said}");
    lab.assert_runs_only_on(1, &watch).await;
    let works = |log: &vmferry_bench::GuestLog| log.disk().is_some_and(|(on, blocks)| on == 1 && blocks > 0);
    watch.wait("the guest's disk", Duration::from_secs(20), works).await.expect("it works there");
    assert!(watch.log().corrupt().is_empty(), "{:?}", watch.log().corrupt());
    let beside = std::fs::read_dir(lab.shared_folder()).expect("readable").count();
    assert_eq!(beside, 1, "no marker is left beside it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_tuned_cancelled_and_aborted_by_virsh_and_leaves_the_guest_as_it_was() {
    let lab = Lab::start(LabOptions::default()).await;
    let watch = lab.start_domain(&guest(Mode::Random), "", "").await;
    let (limit, speed) = (downtime_limit(&lab), lab.alpha().virsh_says(&["migrate-getspeed", DOMAIN]));

    let migration = lab.begin(&SLOW, copies);
    let tuned = lab.alpha().vmferry(&["tune", DOMAIN, "--bandwidth", "12MiB/s", "--downtime", "100ms"]);
    assert!(tuned.status.success(), "{}\n{}", text(&tuned), lab.logs());
    assert_eq!(lab.alpha().virsh_says(&["migrate-getspeed", DOMAIN]), "12");
    let again = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta"]);
    assert!(again.status.code() == Some(3) && text(&again).contains("is being migrated"), "{}", text(&again));
    assert_eq!(lab.alpha().show(DOMAIN).await.expect("it is there").state, "migrating");
    let cancelled = lab.alpha().vmferry(&["cancel", DOMAIN]);
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    let (code, said) = migration.wait();
    assert_eq!(code, Some(130), "{said}\n{}", lab.logs());
    lab.assert_runs_only_on(0, &watch).await;
    assert_eq!((downtime_limit(&lab), lab.alpha().virsh_says(&["migrate-getspeed", DOMAIN])), (limit.clone(), speed));

    let migration = lab.begin(&SLOW, copies);
    lab.alpha().virsh_says(&["domjobabort", DOMAIN]);
    let (code, said) = migration.wait();
    assert_eq!(code, Some(4), "{said}\n{}", lab.logs());
    assert!(said.contains("libvirt's job was aborted"), "{said}");
    lab.assert_runs_only_on(0, &watch).await;
    lab.assert_intact(0, &watch, 16_000).await;
    assert_eq!(downtime_limit(&lab), limit);
    assert_eq!(lab.alpha().last_migration().await.step, "abandoned");
    lab.assert_no_sockets().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirt_that_is_killed_at_the_source_and_comes_back_leaves_one_guest_and_vmferry_knows_where() {
    let mut lab = Lab::start(LabOptions::default()).await;
    let watch = lab.start_domain(&guest(Mode::Random), "", "").await;
    let migration = lab.begin(&SLOW, copies);
    lab.hosts[0].kill_libvirtd();
    lab.hosts[0].start_libvirtd();
    let (code, said) = migration.wait();
    assert_eq!(code, Some(4), "{said}\n{}", lab.logs());
    assert!(said.contains("runs on at the source"), "{said}");
    lab.assert_runs_only_on(0, &watch).await;
    lab.assert_intact(0, &watch, 16_000).await;
    assert_eq!(lab.alpha().last_migration().await.step, "abandoned");
    // And the agent follows the new one.
    lab.eventually("the agent sees it again", async || {
        lab.alpha().show(DOMAIN).await.is_some_and(|it| it.state == "running")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_are_killed_take_the_migration_along_and_the_next_one_finds_out_what_came_of_it() {
    let mut lab = Lab::start(LabOptions::default()).await;
    let watch = lab.start_domain(&guest(Mode::Random), "", "").await;
    let migration = lab.begin(&SLOW, copies);
    lab.hosts[1].kill_agent();
    let (code, said) = migration.wait();
    assert_eq!(code, Some(4), "{said}\n{}", lab.logs());
    lab.assert_runs_only_on(0, &watch).await;
    lab.hosts[1].start_agent().await;

    let migration = lab.begin(&SLOW, copies);
    lab.hosts[0].kill_agent();
    let (code, said) = migration.wait();
    assert!(code.is_some_and(|code| code != 0), "{said}");
    lab.hosts[0].start_agent().await;
    lab.eventually("it is known what came of it", async || lab.alpha().last_migration().await.outcome.is_some()).await;
    let last = lab.alpha().last_migration().await;
    assert_eq!((last.step.as_str(), last.outcome.as_deref()), ("abandoned", Some("did not complete; it runs here")));
    lab.assert_runs_only_on(0, &watch).await;
    lab.assert_intact(0, &watch, 16_000).await;
    lab.assert_no_sockets().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_takes_no_domains_refuses_before_anything_is_touched() {
    let closed = LabOptions { config: ["", "[libvirt]\narrivals = false\n"], ..LabOptions::default() };
    let lab = Lab::start(closed).await;
    let watch = lab.start_domain(&guest(Mode::Idle), "", "").await;
    let refused = lab.alpha().vmferry(&["migrate", DOMAIN, "--to", "beta"]);
    assert_eq!(refused.status.code(), Some(3), "{}\n{}", text(&refused), lab.logs());
    assert!(text(&refused).contains("does not let domains through to its libvirt"), "{}", text(&refused));
    assert!(text(&refused).contains("arrivals = true"), "{}", text(&refused));
    lab.assert_runs_only_on(0, &watch).await;
    lab.assert_no_sockets().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_faster_than_the_link_carries_goes_by_post_copy() {
    let slow = LabOptions { link_bits: Some(200_000_000), as_root: true, ..LabOptions::default() };
    let lab = Lab::start(slow).await;
    let writer = GuestOptions { rate: None, ..guest(Mode::Random) };
    let mut watch = lab.start_domain(&writer, "", "").await;
    let migration = lab.begin(&[], |event| matches!(event, MigrationEvent::Step { .. }));
    lab.listen(&mut watch, 1).await;
    let (code, said) = migration.wait();
    assert_eq!(code, Some(0), "{said}\n{}", lab.logs());
    assert!(report(&said).post_copy, "{said}");
    lab.assert_runs_only_on(1, &watch).await;
    lab.assert_intact(1, &watch, 16_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_post_copy_cannot_be_a_guest_that_writes_faster_than_the_link_stands_while_the_rest_is_sent() {
    let slow = LabOptions { link_bits: Some(200_000_000), ..LabOptions::default() };
    let lab = Lab::start(slow).await;
    let writer = GuestOptions { rate: None, ..guest(Mode::Random) };
    let mut watch = lab.start_domain(&writer, "", "").await;
    let migration = lab.begin(&["--no-post-copy"], |event| matches!(event, MigrationEvent::Step { .. }));
    lab.listen(&mut watch, 1).await;
    let (code, said) = migration.wait();
    assert_eq!(code, Some(0), "{said}\n{}", lab.logs());
    assert!(!report(&said).post_copy, "{said}");
    lab.assert_runs_only_on(1, &watch).await;
    lab.assert_intact(1, &watch, 16_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn domains_that_are_asked_for_together_go_in_turn_also_by_the_next_agent() {
    let mut lab = Lab::start(LabOptions::default()).await;
    let watch = lab.start_domain(&guest(Mode::Random), "", "").await;
    lab.start_without_guest("web2");
    lab.start_without_guest("web3");
    lab.eventually("the agent sees them", async || lab.alpha().show("web3").await.is_some()).await;
    let first = lab.begin(&SLOW, copies);
    let mut others = lab.alpha().command(&["migrate", "web2", "libvirt:web3", "--to", "beta"]);
    let others = others.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmferry runs");
    let waiting = async || {
        let all: Vec<MigrationView> = lab.alpha().client().get("/v1/migrations").await.expect("the agent answers");
        all.into_iter().filter(|it| it.step == "queued").map(|it| it.vm).collect::<Vec<_>>()
    };
    lab.eventually("they wait", async || waiting().await.len() == 2).await;
    let refused = lab.alpha().vmferry(&["tune", "web2", "--downtime", "100ms"]);
    assert!(text(&refused).contains("waits for its turn"), "{}", text(&refused));
    let taken_out = lab.alpha().vmferry(&["cancel", "libvirt:web3"]);
    assert!(taken_out.status.success(), "{}", text(&taken_out));
    assert_eq!(waiting().await, ["libvirt:web2"]);

    lab.hosts[0].kill_agent();
    assert_ne!(first.wait().0, Some(0));
    others.wait_with_output().expect("it ends");
    lab.hosts[0].start_agent().await;
    let runs = |host: &LabHost, name: &str| host.virsh(&["domstate", name]).status.success();
    lab.eventually("web2 has moved", async || runs(lab.beta(), "web2") && !runs(lab.alpha(), "web2")).await;
    assert_eq!([runs(lab.alpha(), "web3"), runs(lab.beta(), "web3")], [true, false]);
    lab.assert_runs_only_on(0, &watch).await;
    lab.assert_intact(0, &watch, 16_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_page_for_libvirts_admins_work_as_they_are_written() {
    let lab = Lab::start(LabOptions::default()).await;
    let watch = lab.start_domain(&guest(Mode::Idle), "", "").await;
    lab.eventually("the agent sees it", async || lab.alpha().show(DOMAIN).await.is_some()).await;
    let commands = commands(include_str!("../docs/LIBVIRT.md"));
    assert!(commands.iter().filter(|(_, line)| line.starts_with("vmferry migrate ")).count() >= 2, "{commands:?}");
    let mut said = String::new();
    for (host, line) in commands {
        let words: Vec<&str> = line.split(' ').collect();
        let output = match words[0] {
            "virsh" => lab.hosts[host].virsh(&words[1..]),
            "vmferry" => lab.hosts[host].vmferry(&words[1..]),
            other => panic!("{other} is not known to this test"),
        };
        assert!(output.status.success(), "{line}: {}\n{}", text(&output), lab.logs());
        said.push_str(&text(&output));
    }
    for words in
        ["web1 to beta, as it would be now", "web1 runs on beta now", "Persistent:     yes", "web1 runs on alpha now"]
    {
        assert!(said.contains(words), "{words:?} is not in {said}");
    }
    drop(watch);
    assert_eq!((lab.alpha().state().as_deref(), lab.beta().state()), (Some("running"), None));
}
