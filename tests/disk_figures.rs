//! `make bench-disks`: a guest moves with a disk of its own over 1 Gbit/s, by vmferry, and by QEMU's mirror and NBD server
//! in the way libvirt drives them (not encrypted), in one run. Prints medians.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_api::MigrationEvent;
use vmferry_bench::testbed::{GuestWatch, Host, Testbed, TestbedOptions, two_qemus};
use vmferry_bench::{GuestOptions, Mode};
use vmferry_qemu::Qmp;

use crate::bed::{Bed, external, guest};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4096 * MIB;
/// So much of it does not compress.
const DATA: u64 = 2048 * MIB;
/// What the guest writes and reads all the time.
const USED: u64 = 64 * MIB;
/// More than the link carries, and QEMU's mirror would never be in step.
const WRITES: u64 = 20 * MIB;
const LINK_BITS: u64 = 1_000_000_000;
const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);

struct Figures {
    seconds: f64,
    downtime_ms: f64,
    allocated: u64,
}

fn writing() -> GuestOptions {
    GuestOptions { rate: Some(20 << 20), ..guest(Mode::Random) }
}

fn options() -> TestbedOptions {
    TestbedOptions { own_images: true, namespaces: true, link_bits: Some(LINK_BITS), ..external(1, 1) }
}

/// Its disk, at the source.
fn write_disk(disk: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(disk).expect("made");
    file.set_len(SIZE).expect("it is so large");
    let mut random = fastrand::Rng::with_seed(7);
    let mut block = vec![0; MIB as usize];
    for at in 0..DATA / MIB {
        random.fill(&mut block);
        // In four pieces.
        let offset = (at % 4) * (SIZE / 4) + (at / 4) * MIB;
        file.write_all_at(&block, offset).expect("written");
    }
}

fn command_line(testbed: &Testbed) -> Vec<String> {
    let mut argv = crate::bed::command_line_with_disk(testbed, &writing(), USED);
    let drive = format!(
        "file={},format=raw,if=none,id=d0,discard=unmap,throttling.bps-write={WRITES}",
        testbed.images().join("disk.raw").display()
    );
    argv.extend(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"].map(str::to_owned));
    argv
}

fn disk_of(host: &Host) -> PathBuf {
    host.own_images.as_ref().expect("it has its own").join("disk.raw")
}

fn figures(watch: &GuestWatch, begun: Instant, ended: Instant, there: &Host) -> Figures {
    Figures {
        seconds: (ended - begun).as_secs_f64(),
        downtime_ms: watch.log().downtime_felt().expect("it has moved").as_secs_f64() * 1e3,
        allocated: std::fs::metadata(disk_of(there)).expect("it is there").blocks() * 512,
    }
}

async fn by_vmferry() -> Figures {
    let testbed = Testbed::start(options()).await.expect("the testbed starts");
    write_disk(&disk_of(testbed.alpha()));
    let argv = command_line(&testbed);
    let bed = Bed::of(testbed, argv).await;
    bed.assert_disk_works_on(0).await;
    let begun = Instant::now();
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    let ended = Instant::now();
    bed.assert_runs_only_on(1).await;
    figures(&bed.watch, begun, ended, bed.beta())
}

/// A QEMU on this host that ends with this.
struct Alone {
    process: Child,
    qmp: Qmp,
}

impl Alone {
    async fn start(testbed: &Testbed, host: usize, watch: &mut GuestWatch, more: &[&str]) -> Self {
        let at = [testbed.alpha(), testbed.beta()][host];
        let socket = |name: &str| testbed.dir().join(format!("{name}{host}.sock"));
        let qemu = two_qemus().expect("two QEMUs")[1].clone().expect("it is unpacked").join("qemu-system-x86_64");
        let pid = at.agent_pid().expect("it runs").to_string();
        let argv = command_line(testbed).into_iter().skip(1);
        let argv = argv.map(|word| match word.as_str() {
            "stdio" => format!("unix:{},server=on,wait=off", socket("console").display()),
            _ => word,
        });
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--mount", "--net"]).arg(qemu).args(argv).args(["-accel", "tcg"]);
        command.args(["-display", "none", "-qmp", &format!("unix:{},server=on,wait=off", socket("qmp").display())]);
        let process = command.args(more).stdin(Stdio::null()).spawn().expect("nsenter is there");
        let qmp = Qmp::connect(&socket("qmp"), Duration::from_secs(10)).await.expect("it answers");
        watch.follow_socket(host, &socket("console")).await.expect("it has a console");
        Self { process, qmp }
    }

    async fn order(&self, command: &str, arguments: Value) -> Value {
        self.qmp.execute_raw(command, arguments).await.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Asks until it says so.
    async fn until(&self, command: &str, is_so: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.order(command, json!({})).await;
            if is_so(&said) {
                return;
            }
            assert!(Instant::now() < deadline, "{command}: {said}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn by_qemu() -> Figures {
    let testbed = Testbed::start(options()).await.expect("the testbed starts");
    write_disk(&disk_of(testbed.alpha()));
    let mut watch = GuestWatch::new();
    let here = Alone::start(&testbed, 0, &mut watch, &[]).await;
    let is_ready =
        |log: &vmferry_bench::GuestLog| log.ready().is_some() && log.disk().is_some() && log.beats().len() > 20;
    watch.wait("the guest", PATIENCE, is_ready).await.expect("it starts");
    let (begun, to) = (Instant::now(), testbed.beta().address.ip().to_string());
    std::fs::File::create(disk_of(testbed.beta())).and_then(|file| file.set_len(SIZE)).expect("made");
    let there = Alone::start(&testbed, 1, &mut watch, &["-incoming", "defer"]).await;
    let address = json!({ "type": "inet", "data": { "host": to, "port": "10810" } });
    there.order("nbd-server-start", json!({ "addr": address })).await;
    there.order("nbd-server-add", json!({ "device": "d0", "writable": true })).await;
    there.order("migrate-incoming", json!({ "uri": format!("tcp:{to}:10811") })).await;
    let capability = json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] });
    here.order("migrate-set-capabilities", capability).await;
    let target = json!({
        "driver": "nbd", "node-name": "t", "export": "d0", "discard": "unmap",
        "server": { "type": "inet", "host": to, "port": "10810" }
    });
    here.order("blockdev-add", target).await;
    here.order("blockdev-mirror", json!({ "job-id": "m", "device": "d0", "target": "t", "sync": "full" })).await;
    here.until("query-block-jobs", |jobs| jobs[0]["ready"] == true).await;
    here.order("migrate", json!({ "uri": format!("tcp:{to}:10811") })).await;
    here.until("query-migrate", |info| info["status"] == "pre-switchover").await;
    here.order("block-job-cancel", json!({ "device": "m" })).await;
    here.until("query-block-jobs", |jobs| jobs.as_array().is_some_and(Vec::is_empty)).await;
    here.order("migrate-continue", json!({ "state": "pre-switchover" })).await;
    here.until("query-migrate", |info| info["status"] == "completed").await;
    there.order("nbd-server-stop", json!({})).await;
    there.until("query-status", |status| status["status"] == "running").await;
    let ended = Instant::now();
    let from = ended;
    let beats = |log: &vmferry_bench::GuestLog| log.beats().iter().filter(|beat| beat.at > from).count() > 20;
    watch.wait("the guest's heart", PATIENCE, beats).await.expect("it beats");
    figures(&watch, begun, ended, testbed.beta())
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it measures: make bench-disks"]
async fn a_guest_moves_with_its_disk_beside_qemus_own_means() {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(by_vmferry().await);
        theirs.push(by_qemu().await);
    }
    let wire = (DATA + (128 << 20)) as f64 * 8.0 / LINK_BITS as f64;
    println!("| by | seconds | of the wire's time | downtime felt, ms | allocated there, MiB |");
    println!("| --- | --- | --- | --- | --- |");
    for (by, all) in [("vmferry, encrypted", &ours), ("QEMU's mirror and NBD, plain", &theirs)] {
        let of = |what: fn(&Figures) -> f64| median(all.iter().map(what).collect());
        let seconds = of(|it| it.seconds);
        println!(
            "| {by} | {seconds:.1} | {:.2} | {:.0} | {:.0} |",
            seconds / wire,
            of(|it| it.downtime_ms),
            of(|it| (it.allocated / MIB) as f64),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it measures: make bench-disks"]
async fn a_migration_that_failed_at_half_has_its_other_half_to_send() {
    let testbed = Testbed::start(options()).await.expect("the testbed starts");
    write_disk(&disk_of(testbed.alpha()));
    let argv = command_line(&testbed);
    let mut bed = Bed::of(testbed, argv).await;
    bed.assert_disk_works_on(0).await;
    let half = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.sent > DATA / 2);
    let mut migrate = bed.begin_migration(&[], half).await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    bed.testbed.host_mut(0).start_agent().await.expect("it starts");
    assert!(!migrate.wait().await.expect("it ends").success());
    let part = disk_of(bed.beta()).with_file_name("disk.raw.vmferry-arrived");
    bed.eventually("what had arrived is kept", async || part.exists()).await;
    bed.eventually("it is undone", async || bed.view(0).await.state == "running").await;
    let kept = std::fs::metadata(&part).expect("it is there").blocks() * 512;
    let begun = Instant::now();
    let report = crate::migrate::report(&bed, &[]).await;
    let seconds = begun.elapsed().as_secs_f64();
    bed.assert_runs_only_on(1).await;
    println!("| data, MiB | kept, MiB | sent again, MiB | seconds |");
    println!("| --- | --- | --- | --- |");
    println!("| {} | {} | {} | {seconds:.1} |", DATA / MIB, kept / MIB, report.disks[0].sent / MIB);
}

/// A guest that writes to a disk that both hosts see: what is in the source's cache goes to the disk before the pause.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it measures: make bench-disks"]
async fn what_a_guest_feels_that_writes_through_the_hosts_cache() {
    println!("| cache | downtime felt, ms: median (all) |");
    println!("| --- | --- |");
    for cache in ["writeback", "none"] {
        let mut felt = Vec::new();
        for _ in 0..5 {
            let testbed = Testbed::start(external(1, 1)).await.expect("the testbed starts");
            let disk = testbed.images().join("disk.raw");
            std::fs::File::create(&disk).and_then(|file| file.set_len(SIZE)).expect("made");
            let mut argv = crate::bed::command_line_with_disk(&testbed, &guest(Mode::Idle), USED);
            let drive = format!("file={},format=raw,if=virtio,cache={cache}", disk.display());
            argv.extend(["-drive".to_owned(), format!("{drive},throttling.bps-write={WRITES}")]);
            let bed = Bed::of(testbed, argv).await;
            bed.assert_disk_works_on(0).await;
            crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
            bed.assert_runs_only_on(1).await;
            felt.push(bed.watch.log().downtime_felt().expect("it has moved").as_secs_f64() * 1e3);
        }
        println!("| {cache} | {:.0} ({felt:.0?}) |", median(felt.clone()));
    }
}
