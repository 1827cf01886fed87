//! Disks that get other places where their guest goes: another path, a block device, a file again.

use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vmferry_bench::Mode;
use vmferry_bench::testbed::{Testbed, TestbedOptions};

use crate::bed::{Bed, VM, assert_success, external, guest, text};

const MIB: u64 = 1 << 20;
/// What the guest uses of its disk.
const USED: u64 = 16 * MIB;
const SIZE: u64 = 64 * MIB;

/// A loop device over a file of this size, full of ones, under a name in a host's folder of images.
struct Device {
    device: PathBuf,
    file: PathBuf,
}

impl Device {
    /// None where that cannot be made.
    fn make(folder: &Path, name: &str, size: u64) -> Option<Self> {
        let file = folder.join(format!(".{name}"));
        std::fs::write(&file, vec![0xff; size as usize]).expect("written");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().ok()?;
        let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
        if !made.status.success() {
            return None;
        }
        let this = Self { device, file };
        let number = std::fs::metadata(&this.device).expect("it is there").rdev();
        let [major, minor] = [rustix::fs::major(number), rustix::fs::minor(number)].map(|it| it.to_string());
        let named = Command::new("mknod").arg(folder.join(name)).args(["b", &major, &minor]).status();
        named.is_ok_and(|it| it.success()).then_some(this)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.device).expect("readable")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(detached.is_ok_and(|it| it.success()), "cannot detach {}", self.device.display());
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A guest that writes and reads the beginning of its disk all the time; there is something else behind that.
async fn start() -> Bed {
    let options = TestbedOptions { own_images: true, ..external(1, 1) };
    let testbed = Testbed::start(options).await.expect("the testbed starts");
    let mut argv = crate::bed::command_line_with_disk(&testbed, &guest(Mode::Idle), USED);
    let disk = testbed.alpha().own_images.as_ref().expect("it has its own").join("disk.raw");
    std::fs::write(disk, content()).expect("written");
    let file = testbed.images().join("disk.raw");
    let nodes = format!("driver=raw,node-name=n0,file.driver=file,file.filename={}", file.display());
    argv.extend(["-smp", "2", "-blockdev", &nodes, "-device", "virtio-blk-pci,drive=n0,id=vda"].map(str::to_owned));
    let bed = Bed::of(testbed, argv).await;
    bed.assert_disk_works_on(0).await;
    bed
}

fn content() -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    content[(40 * MIB) as usize..(44 * MIB) as usize].fill(0xa5);
    content
}

impl Bed {
    fn image(&self, host: usize, name: &str) -> PathBuf {
        [self.alpha(), self.beta()][host].own_images.as_ref().expect("it has its own").join(name)
    }

    /// As its user says that the disk is to be there.
    fn placed(&self, name: &str) -> String {
        format!("vda={}", self.images().join(name).display())
    }

    async fn back(&self, more: &[&str]) -> Output {
        let alpha = self.alpha().address.to_string();
        let words = [&["migrate", VM, "--to", &alpha][..], more].concat();
        self.beta().vmferry(&words).await.expect("vmferry runs")
    }

    async fn refuses(&self, more: &[&str], code: i32, expected: &str) {
        let output = self.migrate(more).await;
        let said = text(&output);
        assert!(output.status.code() == Some(code) && said.contains(expected), "{more:?}: {said}\n{}", self.logs());
    }

    async fn assert_is_on_with_disk(&self, host: usize, name: &str) {
        self.assert_runs_only_on(host).await;
        self.assert_disk_works_on(host).await;
        let argv = self.view(host).await.argv.join(" ");
        assert!(argv.contains(&self.images().join(name).display().to_string()), "{argv}");
        self.assert_intact(host).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_gets_another_path_there_which_the_vm_has_from_then_on() {
    let mut bed = start().await;
    std::fs::create_dir(bed.image(1, "fast")).expect("made");
    let there = bed.placed("fast/web1.raw");
    let other = there.replace("vda", "vdb");
    bed.refuses(&["--disk", &other], 3, "web1 has no disk vdb").await;
    bed.refuses(&["--disk", "vda=web1.raw"], 2, "an absolute path").await;
    bed.refuses(&["--disk", &there, "--disk", &there], 2, "two places are given for the disk vda").await;
    bed.refuses(&["--disk", "vda=/etc/web1.raw"], 3, "in none of the folders where beta keeps images").await;
    bed.refuses(&["--disk", &there, "--no-copy-disks"], 3, "has to move").await;
    let plan = bed.migrate(&["--disk", &there, "--dry-run"]).await;
    assert!(text(&plan).contains("moves with it, to "), "{}", text(&plan));
    assert_success(&bed.migrate(&["--disk", &there]).await, &bed);
    bed.assert_is_on_with_disk(1, "fast/web1.raw").await;
    assert!(!bed.image(1, "disk.raw").exists());
    // Another agent knows it, and so does the way back, in place of what was left.
    let beta = bed.testbed.host_mut(1);
    beta.kill_agent().await.expect("killed");
    beta.start_agent().await.expect("it starts");
    bed.eventually("it is found again", async || {
        bed.beta().show(VM).await.is_ok_and(|it| it.is_some_and(|it| it.state == "running"))
    })
    .await;
    bed.assert_is_on_with_disk(1, "fast/web1.raw").await;
    assert_success(&bed.back(&["--disk", &bed.placed("disk.raw")]).await, &bed);
    bed.assert_is_on_with_disk(0, "disk.raw").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_a_block_device_that_is_named_and_from_there_to_a_file() {
    let bed = start().await;
    let made = |name: &str, size| Device::make(&bed.image(1, ""), name, size);
    let (Some(device), Some(_larger)) = (made("vol", SIZE), made("larger", SIZE + MIB)) else {
        eprintln!("this machine makes no loop devices: not tested");
        return;
    };
    let there = bed.placed("vol");
    bed.refuses(&["--disk", &bed.placed("larger")], 3, "make it exactly as large").await;
    let held = std::fs::File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::EXCL.bits() as i32)
        .open(&device.device)
        .expect("opened");
    bed.refuses(&["--disk", &there], 3, "vol").await;
    drop(held);
    let plan = bed.migrate(&["--disk", &there, "--dry-run"]).await;
    assert!(text(&plan).contains("is lost, also when the migration fails"), "{}", text(&plan));
    assert!(device.content().iter().all(|byte| *byte == 0xff), "nothing was touched");
    // One that is cancelled leaves the device, whatever is on it.
    let copies = |event: &vmferry_api::MigrationEvent| matches!(event, vmferry_api::MigrationEvent::Progress(it) if it.sent > MIB);
    let mut migrate = bed.begin_migration(&["--disk", &there, "--bandwidth", "8MiB/s"], copies).await;
    assert_success(&bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs"), &bed);
    assert!(!migrate.wait().await.expect("it ends").success());
    bed.assert_is_on_with_disk(0, "disk.raw").await;
    assert!(bed.image(1, "vol").exists());

    assert_success(&bed.migrate(&["--disk", &there]).await, &bed);
    bed.assert_is_on_with_disk(1, "vol").await;
    assert!(device.content()[USED as usize..] == content()[USED as usize..], "what was zero is zero there");
    let argv = bed.view(1).await.argv.join(" ");
    assert!(argv.contains("host_device"), "{argv}");

    // What a device is to become only its user can say.
    let refused = bed.back(&[]).await;
    assert!(refused.status.code() == Some(3), "{}", text(&refused));
    assert_success(&bed.back(&["--disk", &bed.placed("back.raw")]).await, &bed);
    bed.assert_is_on_with_disk(0, "back.raw").await;
    let back = bed.image(0, "back.raw");
    let mut rest = vec![0; (SIZE - USED) as usize];
    std::fs::File::open(&back).and_then(|file| file.read_exact_at(&mut rest, USED)).expect("readable");
    assert!(rest == content()[USED as usize..]);
    let allocated = std::fs::metadata(&back).expect("it is there").blocks() * 512;
    assert!(allocated <= USED + 5 * MIB, "{allocated}: what is zero takes no room");
}
