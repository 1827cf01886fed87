//! Machines that were changed since their start, and destinations that make another one of the same words: what cannot
//! arrive as it left is refused by name, while nothing has moved.

use std::time::Duration;

use serde_json::{Value, json};
use vmferry_bench::Mode;
use vmferry_qemu::Qmp;

use crate::bed::{self, Bed, VM, assert_success, external, guest, qemu_that_first, text, with_qemus};

const MONITOR: [&str; 2] = ["-qmp", "unix:user.sock,server=on,wait=off"];

async fn monitor(bed: &Bed) -> Qmp {
    Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects")
}

async fn order(user: &Qmp, command: &str, arguments: Value) {
    user.execute_raw(command, arguments).await.unwrap_or_else(|error| panic!("{command}: {error}"));
}

/// Neither a dry run nor a migration gets anywhere, and both say this; the guest has not noticed.
async fn is_refused(bed: &Bed, words: &[&str]) {
    for arguments in [&["--dry-run"][..], &[]] {
        let output = bed.migrate(arguments).await;
        let said = text(&output);
        assert_eq!(output.status.code(), Some(3), "{said}\n{}", bed.logs());
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_snapshotted_since_the_start_does_not_arrive_as_it_was_before() {
    let disks = tempfile::tempdir().expect("a folder");
    let [before, now] = ["before.raw", "now.qcow2"].map(|name| disks.path().join(name));
    std::fs::File::create(&before).and_then(|file| file.set_len(8 << 20)).expect("written");
    let drive = format!("file={},format=raw,if=none,id=d0", before.display());
    let more = [&MONITOR[..], &["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]].concat();
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &more).await;
    let user = monitor(&bed).await;
    order(&user, "blockdev-snapshot-sync", json!({ "device": "d0", "snapshot-file": now, "format": "qcow2" })).await;
    is_refused(&bed, &["changed since its start", "now.qcow2", "before.raw"]).await;
    let shown = text(&bed.alpha().vmferry(&["show", VM]).await.expect("vmferry runs"));
    assert!(shown.contains("changed") && shown.contains("now.qcow2"), "{shown}");
    // When it is undone it can go.
    order(&user, "block-commit", json!({ "device": "d0", "job-id": "j" })).await;
    bed.eventually("it is merged", async || {
        let jobs = user.execute_raw("query-block-jobs", json!({})).await.expect("answers");
        if jobs[0]["ready"] == true {
            order(&user, "block-job-complete", json!({ "device": "j" })).await;
        }
        jobs.as_array().is_some_and(Vec::is_empty)
    })
    .await;
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_were_plugged_in_and_out_are_named() {
    let more = [
        &MONITOR[..],
        &[
            "-device",
            "pcie-root-port,id=rp1,chassis=1",
            "-device",
            "pcie-root-port,id=rp2,chassis=2",
            "-device",
            "virtio-rng-pci,id=rng0,bus=rp1",
        ],
    ]
    .concat();
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &more).await;
    let user = monitor(&bed).await;
    order(&user, "netdev_add", json!({ "type": "user", "id": "n2" })).await;
    order(&user, "device_add", json!({ "driver": "virtio-net-pci", "id": "net2", "bus": "rp2", "netdev": "n2" })).await;
    is_refused(&bed, &["a device only now: virtio-net-pci net2 on rp2"]).await;
    order(&user, "device_del", json!({ "id": "rng0" })).await;
    bed.eventually("it is gone", async || {
        let shown = text(&bed.alpha().vmferry(&["show", VM]).await.expect("vmferry runs"));
        shown.contains("a device only at its start: virtio-rng-pci rng0 on rp1")
    })
    .await;
    is_refused(&bed, &["virtio-rng-pci rng0"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_has_logged_to_a_file_is_there_when_it_has_moved() {
    let dir = tempfile::tempdir().expect("a folder");
    let [serial, other] = ["serial.log", "other.log"].map(|name| dir.path().join(name));
    let words = [format!("file:{}", serial.display()), format!("file,id=o,path={}", other.display())];
    let more = ["-serial", &words[0], "-chardev", &words[1], "-device", "isa-debugcon,chardev=o"];
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &more).await;
    for log in [&serial, &other] {
        std::fs::write(log, "what it said before\n").expect("written");
    }
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
    for log in [&serial, &other] {
        assert!(std::fs::read_to_string(log).expect("readable").starts_with("what it said before"), "{log:?}");
    }
}

/// Of a destination that makes another machine: refused when that is there, which a dry run does not have made.
async fn is_refused_there(bed: Bed, words: &[&str]) {
    let output = bed.migrate(&[]).await;
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}\n{}", bed.logs());
    assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rom_of_another_size_at_the_destination_is_named_before_a_byte_is_copied() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = with_qemus(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), "set -- \"$@\" -global virtio-net-pci.romfile="));
    let bed = bed::start_with(options, guest(Mode::Idle), &["-device", "virtio-net-pci,addr=0x10"]).await;
    is_refused_there(bed, &["memory only at alpha: 0000:00:10.0/virtio-net-pci.rom"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_processor_that_lacks_a_feature_at_the_destination_is_named_before_a_byte_is_copied() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = external(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), "set -- \"$@\" -global max-x86_64-cpu.avx2=off"));
    let bed = bed::start_with(options, guest(Mode::Idle), &[]).await;
    is_refused_there(bed, &["the processor at beta lacks features", "0x7.0 EBX: 0x20"]).await;
}
