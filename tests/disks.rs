//! Guests with disks of their own: the disks move with them.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use vmferry_api::{MigrationEvent, Report, Step};
use vmferry_bench::testbed::{Testbed, TestbedOptions};
use vmferry_bench::{Fill, GuestOptions, Mode};

use crate::bed::{Bed, VM, assert_success, external, guest, text, with_qemus};

const MIB: u64 = 1 << 20;
/// What the guest uses of its disk, and what is there besides.
const USED: u64 = 16 * MIB;
const SIZE: u64 = 64 * MIB;

fn own(alpha: usize, beta: usize) -> TestbedOptions {
    TestbedOptions { own_images: true, ..external(alpha, beta) }
}

/// Its memory is packed well, and takes little time.
fn packed() -> GuestOptions {
    GuestOptions { fill: Fill::Text, ..guest(Mode::Idle) }
}

/// With a disk that the guest writes and reads all the time, and something else behind what it uses.
async fn start(options: TestbedOptions, guest: GuestOptions, drive: &str) -> Bed {
    start_beside(options, guest, drive, None).await
}

/// The same, with a second disk that it does not touch, in this format and with this in it.
async fn start_beside(options: TestbedOptions, guest: GuestOptions, drive: &str, second: Option<(&str, &[u8])>) -> Bed {
    let testbed = Testbed::start(options).await.expect("the testbed starts");
    let mut argv = crate::bed::command_line_with_disk(&testbed, &guest, USED);
    let disk = testbed.alpha().own_images.as_ref().expect("it has its own").join("disk.raw");
    let mut content = vec![0; SIZE as usize];
    content[(40 * MIB) as usize..(44 * MIB) as usize].fill(0xa5);
    std::fs::write(&disk, content).expect("written");
    let drive = format!("file={},format=raw,{drive}", testbed.images().join("disk.raw").display());
    if let Some((format, content)) = second {
        let (plain, name) = (disk.with_file_name("plain"), format!("second.{format}"));
        std::fs::write(&plain, content).expect("written");
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-q", "-f", "raw", "-O", format]).arg(&plain).arg(disk.with_file_name(&name));
        assert!(convert.status().expect("qemu-img is there").success());
        std::fs::remove_file(&plain).expect("removed");
        let file = testbed.images().join(name);
        // It writes to the last one.
        argv.extend(["-drive".into(), format!("file={},format={format},if=virtio", file.display())]);
    }
    argv.extend(["-smp", "2", "-drive", &drive].map(str::to_owned));
    let bed = Bed::of(testbed, argv).await;
    bed.assert_disk_works_on(0).await;
    bed
}

impl Bed {
    fn disk_of(&self, host: usize) -> PathBuf {
        let host = [self.alpha(), self.beta()][host];
        host.own_images.as_ref().expect("it has its own").join("disk.raw")
    }

    /// It has gone to beta with its disk.
    async fn assert_moved_with_its_disk(&self) {
        self.assert_runs_only_on(1).await;
        for _ in 0..2 {
            self.assert_disk_works_on(1).await;
        }
        self.assert_intact(1).await;
        let [here, there] = [0, 1].map(|host| std::fs::read(self.disk_of(host)).expect("it is there"));
        assert_eq!(there.len() as u64, SIZE);
        assert!(here[USED as usize..] == there[USED as usize..], "what the guest does not touch is the same");
        let allocated = std::fs::metadata(self.disk_of(1)).expect("it is there").blocks() * 512;
        assert!(allocated <= USED + 5 * MIB, "{allocated}: what is zero takes no room");
        let lists = self.beta().state_dir.join("disks-in");
        assert_eq!(std::fs::read_dir(lists).into_iter().flatten().count(), 0, "nobody takes its disk away any more");
        assert!(self.kept().is_empty(), "{:?}", self.kept());
    }

    /// What is kept there of its disks, from a migration that failed.
    fn kept(&self) -> Vec<PathBuf> {
        let folder = self.beta().own_images.as_ref().expect("it has its own");
        let entries = std::fs::read_dir(folder).expect("it is there").map(|entry| entry.expect("it is there").path());
        entries.filter(|path| path.extension().is_some_and(|it| it == "vmferry-arrived")).collect()
    }

    /// It runs on, and nothing of what was made for it has its name.
    async fn assert_stayed(&self) {
        self.assert_runs_only_on(0).await;
        assert!(!self.disk_of(1).exists());
        self.assert_disk_works_on(0).await;
        self.assert_intact(0).await;
    }
}

async fn moves(options: TestbedOptions, mode: Mode, drive: &str, arguments: &[&str]) -> Report {
    let bed = start(options, guest(mode), drive).await;
    let report = crate::migrate::report(&bed, arguments).await;
    assert!(report.steps.iter().any(|it| it.step == Step::CopyDisks), "{report:?}");
    assert_eq!(report.disks.len(), 1, "{report:?}");
    bed.assert_moved_with_its_disk().await;
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_its_own_moves_with_a_guest_whatever_qemu_it_has() {
    for (alpha, beta) in [(1, 1), (0, 0), (0, 1)] {
        let mode = if alpha == 0 { Mode::Idle } else { Mode::Random };
        let report = moves(own(alpha, beta), mode, "if=virtio", &[]).await;
        assert!(report.disks[0].sent > 4 * MIB, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_fast_takes_its_disk_along_by_post_copy() {
    let report = moves(own(1, 1), Mode::Write, "if=virtio,cache=none", &["--bandwidth", "60MiB/s"]).await;
    assert!(report.post_copy, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak"]
async fn a_guest_that_writes_fast_takes_its_disk_along_paced() {
    let paced = ["--bandwidth", "60MiB/s", "--no-post-copy"];
    moves(own(1, 1), Mode::Write, "if=virtio", &paced).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_image_moves_and_what_is_behind_it_stays() {
    for (qemu, has_backing) in [(1, false), (0, true), (1, true)] {
        let testbed = Testbed::start(own(qemu, qemu)).await.expect("the testbed starts");
        let folder = testbed.alpha().own_images.clone().expect("it has its own");
        let mut create = std::process::Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if has_backing {
            for host in [testbed.alpha(), testbed.beta()] {
                let base = host.own_images.as_ref().expect("it has its own").join("base.raw");
                std::fs::write(base, vec![0x5a; SIZE as usize]).expect("written");
            }
            // Named as the hosts see it.
            create.args(["-u", "-F", "raw", "-b"]).arg(testbed.images().join("base.raw"));
        }
        let created = create.arg(folder.join("disk.qcow2")).arg("64M").status().expect("qemu-img is there");
        assert!(created.success());
        let mut argv = crate::bed::command_line_with_disk(&testbed, &guest(Mode::Idle), USED);
        let drive = format!("file={},format=qcow2,if=virtio", testbed.images().join("disk.qcow2").display());
        argv.extend(["-smp", "2", "-drive", &drive].map(str::to_owned));
        let bed = Bed::of(testbed, argv).await;
        bed.assert_disk_works_on(0).await;
        assert_success(&bed.migrate(&[]).await, &bed);
        bed.assert_runs_only_on(1).await;
        for _ in 0..2 {
            bed.assert_disk_works_on(1).await;
        }
        bed.assert_intact(1).await;
        let there = bed.beta().own_images.clone().expect("it has its own").join("disk.qcow2");
        assert_success(&bed.beta().vmferry(&["stop", VM, "--force"]).await.expect("vmferry runs"), &bed);
        let backing = if has_backing { "base.raw" } else { "" };
        let told = std::process::Command::new("qemu-img").args(["info", "-U"]).arg(&there).output().expect("it runs");
        assert!(text(&told).contains(backing) && text(&told).contains("64 MiB"), "{}", text(&told));
        assert!(std::fs::metadata(&there).expect("it is there").blocks() * 512 < USED + 8 * MIB);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_made_there_is_named_before_anything_is_touched() {
    let bed = start(own(1, 1), guest(Mode::Idle), "if=virtio").await;
    let refused = async |words: &[&str], expected: &str| {
        let output = bed.migrate(words).await;
        assert!(!output.status.success() && text(&output).contains(expected), "{}", text(&output));
    };
    refused(&["--no-copy-disks"], "not the same file on both hosts").await;
    std::fs::write(bed.disk_of(1), "somebody's").expect("written");
    refused(&[], "there is something at").await;
    assert_eq!(std::fs::read(bed.disk_of(1)).expect("it is there"), b"somebody's");
    std::fs::remove_file(bed.disk_of(1)).expect("removed");
    let plan = bed.migrate(&["--dry-run"]).await;
    assert!(text(&plan).contains("is not shared and moves with it"), "{}", text(&plan));
    bed.assert_stayed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_too_where_qemu_moves_the_ram() {
    let qemu = |which| TestbedOptions { own_images: true, ..with_qemus(which, which) };
    moves(qemu(0), Mode::Idle, "if=virtio", &[]).await;
    moves(qemu(1), Mode::Idle, "if=virtio", &["--no-post-copy"]).await;
    let report = moves(qemu(1), Mode::Write, "if=virtio", &["--bandwidth", "60MiB/s"]).await;
    assert!(report.post_copy, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_there_and_back_with_its_disk_and_nobody_elses_is_taken_for_what_it_left() {
    let mut second = vec![0; (24 * MIB) as usize];
    fastrand::Rng::with_seed(1).fill(&mut second);
    let bed = start_beside(own(1, 1), guest(Mode::Idle), "if=virtio", Some(("raw", &second))).await;
    let first = crate::migrate::report(&bed, &[]).await;
    bed.assert_moved_with_its_disk().await;
    let alpha = bed.alpha().address.to_string();
    let back = ["migrate", VM, "--to", &alpha];
    let touched = std::fs::File::options().write(true).open(bed.disk_of(0)).expect("it was left");
    let (before, now) = (touched.metadata().and_then(|it| it.modified()).expect("told"), std::time::SystemTime::now());
    touched.set_modified(now).expect("set");
    let refused = bed.beta().vmferry(&back).await.expect("vmferry runs");
    assert!(!refused.status.success() && text(&refused).contains("there is something at"), "{}", text(&refused));
    touched.set_modified(before).expect("set");
    drop(touched);
    // Cancelled in the middle, what it had left is where it was.
    let left = std::fs::metadata(bed.disk_of(0)).expect("it was left");
    let aside = bed.disk_of(0).with_file_name("disk.raw.vmferry-left");
    let mut slow = bed.beta().command(&[&back[..], &["--bandwidth", "1MiB/s"]].concat()).spawn().expect("vmferry runs");
    bed.eventually("it is put aside", async || aside.exists()).await;
    assert_success(&bed.beta().vmferry(&["cancel", VM]).await.expect("vmferry runs"), &bed);
    assert!(!slow.wait().await.expect("it ends").success());
    bed.eventually("it is put back", async || !aside.exists() && bed.disk_of(0).exists()).await;
    assert_eq!(std::fs::metadata(bed.disk_of(0)).expect("it is back").ino(), left.ino());
    // Of what it has not changed nothing is sent again.
    let output = bed.beta().vmferry(&[&back[..], &["--json"]].concat()).await.expect("vmferry runs");
    assert_success(&output, &bed);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let Ok(MigrationEvent::Finished(report)) = serde_json::from_str(said.lines().last().expect("it says something"))
    else {
        panic!("{said}")
    };
    let sent = |report: &Report| report.disks.iter().find(|it| it.size == 24 * MIB).expect("it has two").sent;
    assert_eq!((sent(&first), sent(&report)), (24 * MIB, 0), "{report:?}\n{first:?}");
    let there = std::fs::read(bed.disk_of(0).with_file_name("second.raw")).expect("it is there");
    assert!(there == second);
    bed.eventually("what it had left is gone", async || !aside.exists()).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_disk_works_on(0).await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak"]
async fn a_guest_that_writes_to_its_disk_faster_than_it_is_copied_is_slowed_and_has_its_own_limits_afterwards() {
    let bed = start(own(1, 1), packed(), "if=virtio,throttling.iops-total=90000").await;
    let output = bed.migrate(&["--bandwidth", "3MiB/s"]).await;
    assert_success(&output, &bed);
    assert!(text(&output).contains("faster than they are copied"), "{}", text(&output));
    bed.assert_moved_with_its_disk().await;
    let alpha = bed.alpha().address.to_string();
    let plan = bed.beta().vmferry(&["migrate", VM, "--to", &alpha, "--dry-run"]).await.expect("vmferry runs");
    assert_success(&plan, &bed);
    let shown = bed.beta().vmferry(&["show", VM, "--json"]).await.expect("vmferry runs");
    assert!(!text(&shown).contains("bps_wr"), "{}", text(&shown));
}

#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_disks_moves_at_whatever_controller() {
    for qemu in [0, 1] {
        let testbed = Testbed::start(own(qemu, qemu)).await.expect("the testbed starts");
        let [here, there] =
            [testbed.alpha(), testbed.beta()].map(|host| host.own_images.clone().expect("it has its own"));
        let mut argv = testbed.guest_command_line(&guest(Mode::Idle), crate::bed::RAM_MIB, 1).expect("a kernel");
        let mut words =
            vec!["-object".to_owned(), "iothread,id=io0".into(), "-device".into(), "virtio-scsi-pci".into()];
        let devices = ["virtio-blk-pci,iothread=io0", "scsi-hd", "ide-hd"];
        let contents = [0x11_u8, 0x22, 0x33].map(|byte| vec![byte; (3 * MIB) as usize]);
        for (number, (device, content)) in devices.iter().zip(&contents).enumerate() {
            std::fs::write(here.join(format!("disk{number}.raw")), content).expect("written");
            let file = testbed.images().join(format!("disk{number}.raw"));
            let cache = if number == 1 { ",cache=none" } else { "" };
            let drive = format!("file={},format=raw,if=none,id=d{number}{cache}", file.display());
            words.extend(["-drive".into(), drive, "-device".into(), format!("{device},drive=d{number}")]);
        }
        argv.extend(words);
        let bed = Bed::of(testbed, argv).await;
        let report = crate::migrate::report(&bed, &[]).await;
        assert_eq!(report.disks.len(), 3, "{report:?}");
        bed.assert_runs_only_on(1).await;
        for (number, content) in contents.iter().enumerate() {
            let moved = std::fs::read(there.join(format!("disk{number}.raw"))).expect("it is there");
            assert!(moved == *content, "disk {number} differs");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_for_a_while_is_waited_for_and_the_guest_goes_on() {
    let bed = start(TestbedOptions { namespaces: true, ..own(1, 1) }, packed(), "if=virtio").await;
    let copies = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.step == Step::CopyDisks && it.sent > MIB);
    let mut migrate = bed.begin_migration(&["--bandwidth", "4MiB/s"], copies).await;
    bed.set_link(false).expect("down");
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    bed.set_link(true).expect("up");
    bed.assert_disk_works_on(0).await;
    assert!(migrate.wait().await.expect("it ends").success(), "{}", bed.logs());
    bed.assert_moved_with_its_disk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_fills_up_is_named_and_the_guest_keeps_its_disk() {
    let bed = start(own(1, 1), guest(Mode::Idle), "if=virtio").await;
    let inside = |words: &[&str]| {
        let pid = bed.beta().agent_pid().expect("it runs").to_string();
        let done = std::process::Command::new("nsenter").args(["--target", &pid, "--mount"]).args(words).output();
        done.expect("nsenter is there")
    };
    let images = bed.images().display().to_string();
    let mounted = inside(&["mount", "-t", "tmpfs", "-o", "size=80M", "tmpfs", &images]);
    assert!(mounted.status.success(), "{}", text(&mounted));
    let to = bed.to();
    let migrate = bed.alpha().command(&["migrate", VM, "--to", &to, "--bandwidth", "2MiB/s"]).output();
    let migrate = tokio::spawn(migrate);
    let made = format!("{images}/disk.raw");
    bed.eventually("its disk is made", async || inside(&["test", "-e", &made]).status.success()).await;
    inside(&["dd", "if=/dev/zero", &format!("of={images}/filler"), "bs=64k"]);
    let output = migrate.await.expect("it does not panic").expect("vmferry runs");
    assert!(!output.status.success() && text(&output).contains("No space left"), "{}", text(&output));
    bed.eventually("nothing of it is left", async || !inside(&["test", "-e", &made]).status.success()).await;
    bed.assert_stayed().await;
}

/// How far a migration is when something happens to it, and at which rate it got there.
const MOMENTS: [(Step, &str); 2] = [(Step::CopyDisks, "4MiB/s"), (Step::CopyRam, "60MiB/s")];

/// Ends migrations at these moments by this; the guest keeps its own disk, and nothing is left but, if that is so, what had
/// arrived.
async fn ends(qemu: usize, kept: bool, end: impl AsyncFn(&mut Bed)) {
    for (step, rate) in MOMENTS {
        let mut bed = start(own(qemu, qemu), guest(Mode::Idle), "if=virtio").await;
        let is_there =
            |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.step == step && it.sent > MIB);
        let mut migrate = bed.begin_migration(&["--bandwidth", rate], is_there).await;
        assert!(bed.disk_of(1).exists());
        end(&mut bed).await;
        assert!(!migrate.wait().await.expect("it ends").success(), "{step:?}");
        let disk = bed.disk_of(1);
        bed.eventually("its disk there is gone", async || !disk.exists()).await;
        bed.eventually("it is undone", async || bed.view(0).await.state == "running").await;
        bed.assert_stayed().await;
        bed.eventually("what had arrived is kept or gone", async || bed.kept().len() == usize::from(kept)).await;
        // The next one is not hindered.
        assert_success(&bed.migrate(&[]).await, &bed);
        bed.assert_moved_with_its_disk().await;
    }
}

async fn restarts(bed: &mut Bed, host: usize) {
    let host = bed.testbed.host_mut(host);
    host.kill_agent().await.expect("killed");
    host.start_agent().await.expect("it starts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_with_disks_that_is_cancelled_leaves_nothing() {
    let cancel = async |bed: &mut Bed| {
        assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), bed);
    };
    ends(1, false, cancel).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_sources_agent_is_killed_the_guest_keeps_its_disk() {
    ends(0, true, async |bed: &mut Bed| restarts(bed, 0).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_destinations_agent_is_killed_the_guest_keeps_its_disk() {
    ends(1, true, async |bed: &mut Bed| restarts(bed, 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_arrived_of_a_migration_that_failed_is_not_sent_again() {
    let mut second = vec![0; (24 * MIB) as usize];
    fastrand::Rng::with_seed(2).fill(&mut second);
    for format in ["raw", "qcow2"] {
        let mut bed = start_beside(own(1, 1), guest(Mode::Idle), "if=virtio", Some((format, &second))).await;
        let much = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.step == Step::CopyDisks && it.sent > 24 * MIB);
        let mut migrate = bed.begin_migration(&["--bandwidth", "12MiB/s"], much).await;
        restarts(&mut bed, 0).await;
        assert!(!migrate.wait().await.expect("it ends").success());
        let part = format!("second.{format}.vmferry-arrived");
        bed.eventually("what had arrived is kept", async || bed.kept().iter().any(|it| it.ends_with(&part))).await;
        bed.eventually("it is undone", async || bed.view(0).await.state == "running").await;
        let report = crate::migrate::report(&bed, &[]).await;
        let sent = report.disks.iter().find(|it| it.size == 24 * MIB).expect("it has two").sent;
        assert!(sent < 20 * MIB, "{format}: {report:?}");
        bed.assert_moved_with_its_disk().await;
        let there = bed.beta().own_images.clone().expect("it has its own").join(format!("second.{format}"));
        assert_success(&bed.beta().vmferry(&["stop", VM, "--force"]).await.expect("vmferry runs"), &bed);
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-f", format, "-O", "raw"]).arg(&there).arg(there.with_file_name("plain"));
        assert!(convert.status().expect("qemu-img is there").success());
        assert!(std::fs::read(there.with_file_name("plain")).expect("it is there") == second, "{format}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_a_size_with_which_qemu_would_not_set_it_running_again_is_refused() {
    let testbed = Testbed::start(own(1, 1)).await.expect("the testbed starts");
    let mut argv = testbed.guest_command_line(&guest(Mode::Idle), crate::bed::RAM_MIB, 1).expect("a kernel");
    let here = testbed.alpha().own_images.clone().expect("it has its own");
    std::fs::write(here.join("odd.raw"), vec![1; 4096 + 512]).expect("written");
    let drive = format!("file={},format=raw,if=virtio,cache=none", testbed.images().join("odd.raw").display());
    argv.extend(["-drive".into(), drive]);
    let bed = Bed::of(testbed, argv).await;
    let refused = bed.migrate(&[]).await;
    assert!(!refused.status.success() && text(&refused).contains("4608 bytes"), "{}", text(&refused));
    bed.assert_runs_only_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_of_a_user_without_rights_takes_its_disk_along() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can start one");
        return;
    }
    let testbed = Testbed::start(own(0, 0)).await.expect("the testbed starts");
    let mut argv = crate::bed::command_line_with_disk(&testbed, &packed(), USED);
    let disk = testbed.alpha().own_images.as_ref().expect("it has its own").join("disk.raw");
    std::fs::File::create(&disk).and_then(|file| file.set_len(SIZE)).expect("written");
    std::os::unix::fs::chown(&disk, Some(65534), Some(65534)).expect("root may");
    let drive = format!("file={},format=raw,if=virtio", testbed.images().join("disk.raw").display());
    argv.extend(["-drive", &drive, "-runas", "nobody"].map(str::to_owned));
    let bed = Bed::of(testbed, argv).await;
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_moved_with_its_disk().await;
    let there = std::fs::metadata(bed.disk_of(1)).expect("it is there");
    assert_eq!((there.uid(), there.gid()), (65534, 65534), "it is whose it was");
}

/// Says to QEMUs that nobody may write to this image: byte 201, as block/file-posix.c has it.
fn forbid_writing(image: &std::path::Path) -> std::fs::File {
    use nix::fcntl::{FcntlArg, fcntl};
    let file = std::fs::File::open(image).expect("it is there");
    let (l_type, l_whence) = (nix::libc::F_RDLCK as i16, nix::libc::SEEK_SET as i16);
    let byte = nix::libc::flock { l_type, l_whence, l_start: 201, l_len: 1, l_pid: 0 };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&byte)).expect("anybody may");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_the_qemu_there_refuses_to_set_running_is_given_back() {
    let bed = start(own(1, 1), packed(), "if=virtio").await;
    let copies = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.step == Step::CopyDisks);
    let mut migrate = bed.begin_migration(&["--bandwidth", "20MiB/s"], copies).await;
    let forbidden = forbid_writing(&bed.disk_of(1));
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(4), "{}", bed.logs());
    let why = bed.alpha().vmferry(&["migrations"]).await.expect("vmferry runs");
    assert!(text(&why).contains("does not set it running") && text(&why).contains("lock"), "{}", text(&why));
    assert!(bed.beta().agent_log().contains("owns the guest now"), "{}", bed.logs());
    bed.assert_stayed().await;
    drop(forbidden);
    assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_moved_with_its_disk().await;
}

/// Thirty migrations with each pair of QEMUs, there and back, and three disks: `make soak`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes half an hour"]
async fn whatever_was_written_is_there_after_thirty_migrations_with_each_pair_of_qemus() {
    for (alpha, beta) in [(0, 0), (0, 1), (1, 1)] {
        let testbed = Testbed::start(own(alpha, beta)).await.expect("the testbed starts");
        let mut argv = crate::bed::command_line_with_disk(&testbed, &guest(Mode::Random), USED);
        argv.extend(["-smp", "2", "-nic", "none", "-device", "virtio-scsi-pci"].map(str::to_owned));
        // What both have.
        argv.extend(crate::machines::MACHINE.map(str::to_owned));
        let here = testbed.alpha().own_images.clone().expect("it has its own");
        let others = [0x11_u8, 0x22].map(|byte| vec![byte; (5 * MIB) as usize]);
        std::fs::File::create(here.join("disk.raw")).and_then(|file| file.set_len(SIZE)).expect("written");
        let drive = format!("file={},format=raw,if=virtio,cache=none", testbed.images().join("disk.raw").display());
        argv.extend(["-drive".to_owned(), drive]);
        for (number, content) in others.iter().enumerate() {
            std::fs::write(here.join(format!("other{number}.raw")), content).expect("written");
            let file = testbed.images().join(format!("other{number}.raw"));
            let drive = format!("file={},format=raw,if=none,id=o{number}", file.display());
            argv.extend(["-drive".into(), drive, "-device".into(), format!("scsi-hd,drive=o{number}")]);
        }
        let bed = Bed::of(testbed, argv).await;
        let back = bed.alpha().address.to_string();
        for _ in 0..15 {
            assert_success(&bed.migrate(&[]).await, &bed);
            bed.assert_disk_works_on(1).await;
            let returned = bed.beta().vmferry(&["migrate", VM, "--to", &back]).await.expect("vmferry runs");
            assert_success(&returned, &bed);
            bed.assert_disk_works_on(0).await;
        }
        bed.assert_runs_only_on(0).await;
        bed.assert_intact(0).await;
        for (number, content) in others.iter().enumerate() {
            assert!(std::fs::read(here.join(format!("other{number}.raw"))).expect("it is there") == *content);
        }
    }
}
