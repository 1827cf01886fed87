//! Disks that go around the host's cache: what they bring into RAM arrives, however long each request takes.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmferry_bench::{GuestOptions, Mode};

use crate::bed::{self, Bed, VM, assert_success, external, guest, text};
use crate::migrate::report;

/// A block device over a file, which takes its time for what these processes read: each request is under way for some
/// tenths of a second, with the guest's pages in its hands.
struct SlowDevice {
    device: PathBuf,
    /// Where the processes are slowed down.
    group: PathBuf,
}

/// Requests a second.
const READS: u32 = 60;
const CONTROLLER: &str = "/sys/fs/cgroup/blkio";

impl SlowDevice {
    /// None where that cannot be made.
    fn over(file: &Path) -> Option<Self> {
        std::fs::File::create(file).and_then(|file| file.set_len(16 << 20)).expect("written");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
        let name = device.file_name().filter(|_| made.status.success())?;
        let group = Path::new(CONTROLLER).join(format!("vmferry-test-{}-{}", std::process::id(), name.display()));
        let slow = Self { device: device.clone(), group };
        std::fs::create_dir(&slow.group).ok()?;
        let number = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("dev")).ok()?;
        let limit = format!("{} {READS}", number.trim());
        std::fs::write(slow.group.join("blkio.throttle.read_iops_device"), limit).ok()?;
        Some(slow)
    }

    /// What this process reads from now on.
    fn slow_down(&self, pid: u32) {
        std::fs::write(self.group.join("cgroup.procs"), pid.to_string()).expect("it is there");
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        for pid in std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = std::fs::write(Path::new(CONTROLLER).join("cgroup.procs"), pid);
        }
        let _ = std::fs::remove_dir(&self.group);
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(detached.is_ok_and(|it| it.success()), "cannot detach {}", self.device.display());
    }
}

async fn start(qemu: usize, guest: GuestOptions, drive: &str) -> Bed {
    let words = ["-smp", "2", "-drive", drive];
    let bed = bed::start_with_kernel_words(external(qemu, qemu), guest, "vmferry.disk=16777216", &words).await;
    bed.assert_disk_works_on(0).await;
    bed
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_slow_disk_around_the_hosts_cache_brings_into_ram_arrives() {
    // More when asked: `VMFERRY_TEST_MIGRATIONS=50`.
    let asked = std::env::var("VMFERRY_TEST_MIGRATIONS").ok();
    let migrations: usize = asked.map_or(2, |asked| asked.parse().expect("a number"));
    for (qemu, aio) in [(0, "native"), (1, "io_uring"), (1, "threads")] {
        let dir = tempfile::tempdir().expect("a folder");
        let Some(slow) = SlowDevice::over(&dir.path().join("disk.raw")) else {
            eprintln!("not run: no loop device, or no blkio control group of version 1");
            return;
        };
        let disk = format!("file={},format=raw,if=virtio,cache=none,aio={aio}", slow.device.display());
        // Many rounds: what was under way at one of them must not be taken to be as it was read then.
        let busy = GuestOptions { rate: Some(60 << 20), ..guest(Mode::Random) };
        let bed = start(qemu, busy, &disk).await;
        for round in 0..migrations {
            let hosts = [bed.alpha(), bed.beta()];
            let (here, there) = (round % 2, 1 - round % 2);
            slow.slow_down(bed.view(here).await.pid);
            let to = hosts[there].address.to_string();
            let words = ["migrate", VM, "--to", &to, "--disks-are-shared", "--no-post-copy"];
            let words = [&words[..], &["--bandwidth", "100MiB/s", "--downtime", "30ms"]].concat();
            let output = hosts[here].vmferry(&words).await.expect("vmferry runs");
            assert_success(&output, &bed);
            assert!(text(&output).contains("drained"), "{}", text(&output));
        }
        let home = migrations % 2;
        bed.assert_runs_only_on(home).await;
        // All that was kept is looked at again.
        for _ in 0..3 {
            bed.assert_disk_works_on(home).await;
        }
        bed.assert_intact(home).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_move_the_ram_of_a_guest_whose_disk_goes_around_the_hosts_cache() {
    for (qemu, mode, more) in
        [(0, Mode::Idle, &[][..]), (1, Mode::Write, &["--no-post-copy", "--bandwidth", "60MiB/s"])]
    {
        let dir = tempfile::tempdir().expect("a folder");
        let disk = dir.path().join("disk.raw");
        std::fs::File::create(&disk).and_then(|file| file.set_len(16 << 20)).expect("written");
        let bed = start(qemu, guest(mode), &format!("file={},format=raw,if=virtio,cache=none", disk.display())).await;
        let report = report(&bed, more).await;
        assert!(report.engine == "external" && report.drains >= 2, "{report:?}");
        bed.assert_runs_only_on(1).await;
        bed.assert_disk_works_on(1).await;
        bed.assert_intact(1).await;
    }
}
