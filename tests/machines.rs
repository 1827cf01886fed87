//! Machines that were changed since their start, and destinations that make another one of the same words: what cannot
//! arrive as it left is refused by name, while nothing has moved.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_bench::Mode;
use vmferry_bench::testbed::TestbedOptions;
use vmferry_qemu::Qmp;

use crate::bed::{self, Bed, VM, assert_success, external, guest, qemu_that_first, text, that_first, with_qemus};

pub(crate) const MONITOR: [&str; 2] = ["-qmp", "unix:user.sock,server=on,wait=off"];
/// One that both QEMUs have.
pub(crate) const MACHINE: [&str; 4] = ["-machine", "pc-q35-7.2", "-cpu", "qemu64"];

pub(crate) async fn monitor(bed: &Bed) -> Qmp {
    Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects")
}

/// Hosts of which the second, with this QEMU, has a monitor of its own: the one that the first one's user has goes with
/// the first one's QEMU, as both are in one folder here.
pub(crate) fn with_monitor_there(options: TestbedOptions, beta: usize, dir: &Path) -> TestbedOptions {
    let monitor = format!("set -- \"$@\" -qmp unix:{}/there.sock,server=on,wait=off", dir.display());
    let qemu_there = Some(that_first(beta, dir, &monitor));
    TestbedOptions { qemu_dirs: [options.qemu_dirs[0].clone(), qemu_there], ..options }
}

pub(crate) async fn monitor_there(dir: &Path) -> Qmp {
    Qmp::connect(&dir.join("there.sock"), Duration::from_secs(5)).await.expect("connects")
}

pub(crate) async fn order(user: &Qmp, command: &str, arguments: Value) {
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

/// A dry run says that this goes along, and the migration takes it there.
async fn goes_along(bed: &Bed, words: &[&str]) {
    let said = text(&bed.migrate(&["--dry-run"]).await);
    assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}\n{}", bed.logs());
    assert_success(&bed.migrate(&[]).await, bed);
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

/// The layers of the VM's disks that its QEMU has now, by the monitor that moved along.
async fn files_of(user: &Qmp) -> String {
    let drives = user.execute_raw("query-block", json!({})).await.expect("answers");
    drives.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_snapshotted_since_the_start_goes_along_as_it_is_now() {
    for (alpha, beta) in [(0, 1), (1, 0)] {
        let disks = tempfile::tempdir().expect("a folder");
        let [before, now, named] = ["before.raw", "now.qcow2", "named.qcow2"].map(|name| disks.path().join(name));
        let base = disks.path().join("n0.raw");
        std::fs::File::create(&base).and_then(|file| file.set_len(8 << 20)).expect("written");
        let nodes = [
            format!("driver=file,filename={},node-name=f0", base.display()),
            "driver=raw,file=f0,node-name=n0,discard=unmap".to_owned(),
        ];
        let more = ["-blockdev", &nodes[0], "-blockdev", &nodes[1], "-device", "virtio-scsi-pci,id=sc"];
        let more = [&more[..], &["-device", "scsi-hd,drive=n0,id=d0,bus=sc.0"], &MACHINE, &MONITOR].concat();
        let bed = bed::start_with_disk_and(
            with_monitor_there(with_qemus(alpha, beta), beta, disks.path()),
            guest(Mode::Idle),
            &before,
            &more,
        )
        .await;
        let user = monitor(&bed).await;
        // What the guest writes is in the new layer from now on; read from the old one it would be found corrupt.
        let snapshot = json!({ "device": "virtio0", "snapshot-file": now, "format": "qcow2" });
        order(&user, "blockdev-snapshot-sync", snapshot).await;
        let snapshot = json!({
            "node-name": "n0", "snapshot-node-name": "n1", "snapshot-file": named, "format": "qcow2"
        });
        order(&user, "blockdev-snapshot-sync", snapshot).await;
        bed.assert_disk_works_on(0).await;
        goes_along(&bed, &["now.qcow2", "named.qcow2"]).await;
        bed.assert_disk_works_on(1).await;
        let there = monitor_there(disks.path()).await;
        let files = files_of(&there).await;
        assert!(files.contains("now.qcow2") && files.contains("named.qcow2") && files.contains("n1"), "{files}");
        // Merged again, it goes along as well: to where it came from.
        order(&there, "block-commit", json!({ "device": "virtio0", "job-id": "j" })).await;
        let jobs = async || there.execute_raw("query-block-jobs", json!({})).await.expect("answers");
        bed.eventually("it can be merged", async || jobs().await[0]["ready"] == true).await;
        order(&there, "block-job-complete", json!({ "device": "j" })).await;
        bed.eventually("it is merged", async || jobs().await.as_array().is_some_and(Vec::is_empty)).await;
        let to = bed.alpha().address.to_string();
        let output = bed.beta().vmferry(&["migrate", VM, "--to", &to]).await.expect("vmferry runs");
        assert_success(&output, &bed);
        bed.assert_runs_only_on(0).await;
        bed.assert_disk_works_on(0).await;
        let words = bed.view(0).await.argv.join(" ");
        assert!(!words.contains("now.qcow2") && words.contains("named.qcow2"), "{words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_processors_and_memory_that_were_plugged_in_and_out_go_along() {
    for (alpha, beta) in [(0, 1), (1, 0), (1, 1)] {
        let disks = tempfile::tempdir().expect("a folder");
        let [first, hot] = ["first.raw", "hot.raw"].map(|name| disks.path().join(name));
        std::fs::File::create(&hot).and_then(|file| file.set_len(8 << 20)).expect("written");
        let ports = ["rp1", "rp2", "rp3"].map(|id| format!("pcie-root-port,id={id},chassis={}", &id[2..]));
        let more = ["-device", &ports[0], "-device", &ports[1], "-device", &ports[2]];
        let more = [&more[..], &["-device", "virtio-rng-pci,id=rng0,bus=rp1", "-device", "virtio-rng-pci"]].concat();
        let more =
            [&more[..], &["-smp", "2,maxcpus=4", "-m", "size=384M,slots=4,maxmem=1G"], &MACHINE, &MONITOR].concat();
        // QEMU 7.2 does not take the state of the network that 10.0 has in a hub, as that of the default card is.
        let card: &[&str] = if alpha == beta { &[] } else { &["-nic", "none"] };
        let more = [&more[..], card].concat();
        let bed = bed::start_with_disk_and(external(alpha, beta), guest(Mode::Idle), &first, &more).await;
        let user = monitor(&bed).await;
        let before = bed.watch.hardware(0).await.expect("it says");
        order(&user, "netdev_add", json!({ "type": "user", "id": "n2", "restrict": true })).await;
        let nic = json!({ "driver": "virtio-net-pci", "id": "net2", "bus": "rp2", "netdev": "n2", "mac": "52:54:00:aa:bb:cc" });
        order(&user, "device_add", nic).await;
        order(&user, "object-add", json!({ "qom-type": "iothread", "id": "io1" })).await;
        let node = json!({
            "driver": "raw", "node-name": "hot", "file": { "driver": "file", "filename": hot }, "discard": "unmap"
        });
        order(&user, "blockdev-add", node).await;
        let disk = json!({
            "driver": "virtio-blk-pci", "id": "d2", "bus": "rp3", "drive": "hot", "iothread": "io1", "serial": "a,b"
        });
        order(&user, "device_add", disk).await;
        order(
            &user,
            "object-add",
            json!({ "qom-type": "memory-backend-file", "id": "m1", "size": 128 << 20, "share": true, "mem-path": "/dev/shm" }),
        )
        .await;
        order(&user, "device_add", json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "m1" })).await;
        let places = user.execute_raw("query-hotpluggable-cpus", json!({})).await.expect("answers");
        let mut free = places.as_array().expect("a list").iter().filter(|place| place.get("qom-path").is_none());
        // The one that it would get next.
        let place = free.next_back().expect("there is room for one");
        let mut cpu = json!({ "driver": place["type"], "id": "cpu2" });
        cpu.as_object_mut().expect("it is one").extend(place["props"].as_object().expect("it has a place").clone());
        order(&user, "device_add", cpu).await;
        order(&user, "device_del", json!({ "id": "rng0" })).await;
        bed.eventually("it is as it is to be", async || {
            let shown = text(&bed.alpha().vmferry(&["show", VM]).await.expect("vmferry runs"));
            shown.contains("rng0 was taken out") && shown.contains("virtio-net-pci net2 was plugged in")
        })
        .await;
        // It takes a while until the guest has seen all of it.
        bed.eventually("the guest sees it", async || {
            let now = bed.watch.hardware(0).await.expect("it says");
            now.cpus == 3 && now.memory_kib > before.memory_kib + (100 << 10) && now.pci.len() == before.pci.len() + 1
        })
        .await;
        let here = bed.watch.hardware(0).await.expect("it says");
        let words = ["net2 was plugged in", "d2 was plugged in", "dimm1 was plugged in", "cpu2 was plugged in", "rng0"];
        goes_along(&bed, &words).await;
        assert_eq!(bed.watch.hardware(1).await.expect("it says"), here);
        bed.assert_disk_works_on(1).await;
        // There it is what it was started with, and goes on as it is.
        let shown = text(&bed.beta().vmferry(&["show", VM]).await.expect("vmferry runs"));
        assert!(!shown.contains("was plugged in"), "{shown}");
        let to = bed.alpha().address.to_string();
        let output = bed.beta().vmferry(&["migrate", VM, "--to", &to]).await.expect("vmferry runs");
        assert_success(&output, &bed);
        bed.assert_runs_only_on(0).await;
        assert_eq!(bed.watch.hardware(0).await.expect("it says"), here);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn media_that_were_changed_and_ejected_go_along() {
    let disks = tempfile::tempdir().expect("a folder");
    let [one, other] = ["one.iso", "other.iso"].map(|name| disks.path().join(name));
    for (iso, size) in [(&one, 1 << 20), (&other, 2 << 20)] {
        std::fs::File::create(iso).and_then(|file| file.set_len(size)).expect("written");
    }
    let one_node = format!("driver=raw,node-name=iso,read-only=on,file.driver=file,file.filename={}", one.display());
    let drive = format!("file={},if=none,id=cd2,media=cdrom", one.display());
    let more = ["-cdrom", one.to_str().expect("plain"), "-device", "virtio-scsi-pci,id=sc", "-blockdev", &one_node];
    let more = [&more[..], &["-device", "scsi-cd,id=cd1,bus=sc.0,drive=iso", "-drive", &drive], &MONITOR].concat();
    let more =
        [&more[..], &["-device", "scsi-cd,id=cd3,bus=sc.0,drive=cd2", "-device", "scsi-cd,id=cd4,bus=sc.0"]].concat();
    let bed = bed::start_with(
        with_monitor_there(with_qemus(1, 0), 0, disks.path()),
        guest(Mode::Idle),
        &[&more[..], &MACHINE].concat(),
    )
    .await;
    let user = monitor(&bed).await;
    let change = |id: &str| json!({ "id": id, "filename": other, "format": "raw", "force": true });
    order(&user, "eject", json!({ "device": "ide2-cd0", "force": true })).await;
    order(&user, "blockdev-change-medium", change("cd1")).await;
    order(&user, "blockdev-change-medium", change("cd3")).await;
    order(&user, "blockdev-change-medium", change("cd4")).await;
    goes_along(&bed, &["ide2-cd0 is empty", "cd1 is", "cd2 is", "cd4 is"]).await;
    let drives = monitor_there(disks.path()).await.execute_raw("query-block", json!({})).await.expect("answers");
    let file_of = |name: &str| {
        let drives = drives.as_array().expect("a list");
        let drive = drives.iter().find(|it| it["device"] == name || it["qdev"] == name).expect("it is there");
        drive["inserted"]["image"]["filename"].as_str().map(str::to_owned)
    };
    let other = Some(other.display().to_string());
    assert_eq!(["ide2-cd0", "cd1", "cd2", "cd4"].map(file_of), [None, other.clone(), other.clone(), other]);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_that_were_set_while_it_runs_go_along_and_hold_after_a_new_start() {
    let disks = tempfile::tempdir().expect("a folder");
    let [first, other, third] = ["first.raw", "other.raw", "third.raw"].map(|name| disks.path().join(name));
    for disk in [&other, &third] {
        std::fs::File::create(disk).and_then(|file| file.set_len(8 << 20)).expect("written");
    }
    let node = format!("driver=raw,node-name=n,file.driver=file,file.filename={}", other.display());
    let limited = format!("file={},if=none,id=l,format=raw,throttling.iops-total=500", third.display());
    let more = ["-device", "virtio-scsi-pci,id=sc", "-blockdev", &node, "-device", "scsi-hd,drive=n,id=d0,bus=sc.0"];
    let more =
        [&more[..], &["-drive", &limited, "-device", "scsi-hd,drive=l,id=d1,bus=sc.0"], &MACHINE, &MONITOR].concat();
    let options = with_monitor_there(external(1, 0), 0, disks.path());
    let bed = bed::start_with_disk_and(options, guest(Mode::Idle), &first, &more).await;
    let user = monitor(&bed).await;
    let limit = |of: Value, bps: u64| {
        let mut all = json!({ "bps": bps, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0 });
        all.as_object_mut().expect("it is one").extend(of.as_object().expect("it is one").clone());
        all
    };
    order(&user, "block_set_io_throttle", limit(json!({ "device": "virtio0", "group": "g" }), 4 << 20)).await;
    order(&user, "block_set_io_throttle", limit(json!({ "id": "d0", "bps_max": 8 << 20 }), 2 << 20)).await;
    order(&user, "block_set_io_throttle", limit(json!({ "device": "l" }), 0)).await;
    let all = ["virtio0 is limited to bps 4194304 in the group g", "d0 is limited to bps 2097152, bps_max 8388608"];
    goes_along(&bed, &[&all[..], &["l is not limited any more"]].concat()).await;
    bed.assert_disk_works_on(1).await;
    let are_there = async |monitor: Qmp| {
        let drives = monitor.execute_raw("query-block", json!({})).await.expect("answers");
        let of = |name: &str| {
            let drive = drives.as_array()?.iter().find(|it| it["device"] == name || it["qdev"] == name)?;
            Some(["bps", "bps_max", "iops"].map(|key| drive["inserted"][key].as_u64().unwrap_or(0)))
        };
        let limits = ["virtio0", "d0", "l"].map(of);
        assert_eq!(limits, [[4 << 20, 0, 0], [2 << 20, 8 << 20, 0], [0, 0, 0]].map(Some), "{drives}");
    };
    are_there(monitor_there(disks.path()).await).await;
    kill_qemu(&bed, 1).await;
    assert_success(&bed.beta().vmferry(&["start", VM]).await.expect("vmferry runs"), &bed);
    are_there(monitor(&bed).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_told_from_outside_is_named_and_stays() {
    let more = [&MONITOR[..], &["-device", "pcie-root-port,id=rp1,chassis=1"]].concat();
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &more).await;
    let user = monitor(&bed).await;
    let address = json!({ "type": "inet", "host": "127.0.0.1", "port": "1" });
    let here = json!({ "type": "inet", "host": "127.0.0.1", "port": "0" });
    order(&user, "netdev_add", json!({ "type": "dgram", "id": "n2", "remote": address, "local": here })).await;
    order(&user, "device_add", json!({ "driver": "virtio-net-pci", "id": "net2", "bus": "rp1", "netdev": "n2" })).await;
    is_refused(&bed, &["virtio-net-pci net2 was plugged in, and", "network n2 cannot be told from outside"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_being_worked_on_stays() {
    let disks = tempfile::tempdir().expect("a folder");
    let [disk, copy] = ["disk.raw", "copy.raw"].map(|name| disks.path().join(name));
    let bed = bed::start_with_disk_and(external(1, 1), guest(Mode::Idle), &disk, &MONITOR).await;
    let user = monitor(&bed).await;
    let mirror = json!({ "device": "virtio0", "target": copy, "sync": "full", "format": "raw", "job-id": "m1" });
    order(&user, "drive-mirror", mirror).await;
    is_refused(&bed, &["is being worked on (mirror, the job \"m1\")", "block-job-cancel"]).await;
    order(&user, "block-job-cancel", json!({ "device": "m1", "force": true })).await;
    bed.eventually("it is over", async || {
        let jobs = user.execute_raw("query-block-jobs", json!({})).await.expect("answers");
        jobs.as_array().is_some_and(Vec::is_empty)
    })
    .await;
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
    bed.assert_disk_works_on(1).await;
}

async fn kill_qemu(bed: &Bed, host: usize) {
    let pid = bed.view(host).await.pid;
    let process = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    rustix::process::kill_process(process, rustix::process::Signal::KILL).expect("it runs");
    bed.eventually("it has ended", async || bed.view(host).await.state == "ended").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_was_changed_starts_again_as_it_was_last() {
    let disks = tempfile::tempdir().expect("a folder");
    let [before, now] = ["before.raw", "now.qcow2"].map(|name| disks.path().join(name));
    let more = [&["-device", "pcie-root-port,id=rp1,chassis=1"], &MONITOR[..]].concat();
    let bed = bed::start_with_disk_and(external(1, 1), guest(Mode::Idle), &before, &more).await;
    let user = monitor(&bed).await;
    order(&user, "device_add", json!({ "driver": "virtio-rng-pci", "id": "rng1", "bus": "rp1" })).await;
    let snapshot = json!({ "device": "virtio0", "snapshot-file": now, "format": "qcow2" });
    order(&user, "blockdev-snapshot-sync", snapshot).await;
    bed.eventually("it is on record", async || bed.alpha().agent_log().contains("now.qcow2")).await;
    drop(user);
    kill_qemu(&bed, 0).await;
    assert_success(&bed.alpha().vmferry(&["start", VM]).await.expect("vmferry runs"), &bed);
    let there = monitor(&bed).await;
    assert!(files_of(&there).await.contains("now.qcow2"));
    let devices = there.execute_raw("qom-list", json!({ "path": "/machine/peripheral" })).await.expect("answers");
    assert!(devices.to_string().contains("rng1"), "{devices}");
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
    is_refused_there(bed, &["the processor at beta lacks what the one at alpha has: avx2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_while_a_guest_is_moved_undoes_that_before_it_is_paused() {
    // While QEMU copies the RAM itself, it takes no devices.
    for options in [external(1, 1), external(0, 1)] {
        let more = [&["-device", "pcie-root-port,id=rp1,chassis=1"], &MONITOR[..], &MACHINE].concat();
        let bed = bed::start_with(options, guest(Mode::Idle), &more).await;
        let user = monitor(&bed).await;
        let migrate = bed.begin_slow_migration_with(&["--no-post-copy"]).await;
        order(&user, "device_add", json!({ "driver": "virtio-rng-pci", "id": "rng1", "bus": "rp1" })).await;
        let output = migrate.wait_with_output().await.expect("it ends");
        assert_eq!(output.status.code(), Some(4), "{}\n{}", text(&output), bed.logs());
        assert!(bed.alpha().agent_log().contains("were changed while it was moved"), "{}", bed.logs());
        bed.assert_runs_only_on(0).await;
        bed.assert_never_stopped().await;
        // Planned anew, it goes along.
        goes_along(&bed, &["virtio-rng-pci rng1 was plugged in"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_waits_for_a_full_disk_goes_on_where_there_is_room() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can mount a small file system");
        return;
    }
    for options in [external(1, 1), with_qemus(0, 1)] {
        let disks = tempfile::tempdir().expect("a folder");
        let [before, small] = ["before.raw", "small"].map(|name| disks.path().join(name));
        std::fs::create_dir(&small).expect("made");
        let mount = |words: &str| {
            let status = std::process::Command::new("mount").args(words.split(' ')).arg(&small).status();
            assert!(status.expect("mount runs").success(), "{words}");
        };
        mount("-t tmpfs -o size=4m vmferry-test");
        let _mounted = Mounted(small.clone());
        let bed = bed::start_with_disk_and(options, guest(Mode::Idle), &before, &MONITOR).await;
        let snapshot = json!({ "device": "virtio0", "snapshot-file": small.join("now.qcow2"), "format": "qcow2" });
        order(&monitor(&bed).await, "blockdev-snapshot-sync", snapshot).await;
        bed.eventually("its disk is full", async || bed.view(0).await.state == "io-error").await;
        let said = text(&bed.migrate(&[]).await);
        assert!(said.contains("waits since its disk failed"), "{said}\n{}", bed.logs());
        let view = bed.view(1).await;
        assert!(matches!(view.state.as_str(), "io-error" | "paused"), "{view:?}");
        mount("-o remount,size=64m");
        assert_success(&bed.beta().vmferry(&["resume", VM]).await.expect("vmferry runs"), &bed);
        bed.assert_runs_only_on(1).await;
        bed.assert_disk_works_on(1).await;
    }
}

/// A file system that is unmounted when this goes.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|it| it.success()), "cannot unmount {}", self.0.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_display_whose_port_is_taken_gets_another_and_that_is_said() {
    // Both hosts are on one machine: the source's own display has the port.
    let display = format!("127.0.0.1:{},password=on", 1000 + std::process::id() % 1000);
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &["-vnc", &display]).await;
    let output = bed.migrate(&[]).await;
    assert_success(&output, &bed);
    let said = text(&output);
    assert!(said.contains("Its VNC display is at port") && said.contains("password cannot be asked for"), "{said}");
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spice_display_whose_port_is_taken_gets_another_and_that_is_said() {
    // Of the two QEMUs here only the older one has its SPICE modules beside it.
    let port = 6900 + std::process::id() % 1000;
    let display = format!("port={port},addr=127.0.0.1");
    let bed = bed::start_with(external(0, 0), guest(Mode::Idle), &["-spice", &display]).await;
    let output = bed.migrate(&[]).await;
    assert_success(&output, &bed);
    let said = text(&output);
    let words =
        [&format!("The port of its SPICE display is {} there", port + 1), "Its SPICE password cannot be asked for"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    bed.assert_runs_only_on(1).await;
    std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port + 1).expect("a port"))).expect("it is there");
}

/// A TPM of its own, in this folder; ended with this.
struct Tpm(std::process::Child);

impl Tpm {
    fn start(dir: &Path) -> Self {
        std::fs::create_dir(dir).expect("made");
        let of = |what: &str| format!("{what}{}", dir.display());
        let arguments =
            ["socket", "--tpm2", "--tpmstate", &of("dir="), "--ctrl", &format!("{}/socket", of("type=unixio,path="))];
        let started = std::process::Command::new("swtpm").args(arguments).spawn();
        Self(started.expect("scripts/setup.sh has installed swtpm"))
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_a_tpm_goes_along() {
    for (options, beta) in [(external(0, 1), 1), (with_qemus(1, 1), 1), (external(1, 0), 0)] {
        let dir = tempfile::tempdir().expect("a folder");
        let [here, there] = ["here", "there"].map(|name| dir.path().join(name));
        let (_here, _there) = (Tpm::start(&here), Tpm::start(&there));
        // Both hosts are on one machine: the second one's TPM is said otherwise.
        let other = format!(
            "for word; do shift; set -- \"$@\" \"$(printf %s \"$word\" | sed s,{}/socket,{}/socket,)\"; done",
            here.display(),
            there.display()
        );
        let mut options = options;
        options.qemu_dirs[1] = Some(that_first(beta, dir.path(), &other));
        let socket = format!("socket,id=tpm,path={}/socket", here.display());
        let more = ["-chardev", &socket, "-tpmdev", "emulator,id=t0,chardev=tpm", "-device", "tpm-crb,tpmdev=t0"];
        let bed = bed::start_with(options, guest(Mode::Idle), &[&more[..], &MACHINE].concat()).await;
        assert_success(&bed.migrate(&[]).await, &bed);
        bed.assert_runs_only_on(1).await;
        let states = [&here, &there].map(|dir| std::fs::read(dir.join("tpm2-00.permall")));
        let [before, after] = states.map(|state| state.expect("it has a state"));
        assert!(before == after && !before.is_empty(), "another TPM: {} and {} bytes", before.len(), after.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_its_qemu_cannot_move_is_refused_by_its_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk.raw");
    std::fs::File::create(&disk).and_then(|file| file.set_len(8 << 20)).expect("written");
    let node = format!("driver=raw,node-name=n,file.driver=file,file.filename={}", disk.display());
    let more = ["-device", "pcie-root-port,id=rp1,chassis=1", "-blockdev", &node];
    let bed = bed::start_with(external(1, 1), guest(Mode::Idle), &[&more[..], &MONITOR].concat()).await;
    let user = monitor(&bed).await;
    // Plugged in while it is moved, too.
    let migrate = bed.begin_slow_migration_with(&["--no-post-copy"]).await;
    order(&user, "device_add", json!({ "driver": "nvme", "id": "nvme0", "bus": "rp1", "drive": "n", "serial": "s" }))
        .await;
    let output = migrate.wait_with_output().await.expect("it ends");
    assert_eq!(output.status.code(), Some(4), "{}\n{}", text(&output), bed.logs());
    is_refused(&bed, &["non-migratable device", "nvme"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak"]
async fn a_qemu_that_takes_its_time_to_start_is_waited_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = external(1, 1);
    options.qemu_dirs[1] = Some(qemu_that_first(dir.path(), "sleep 22"));
    let bed = bed::start_with(options, guest(Mode::Idle), &[]).await;
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}
