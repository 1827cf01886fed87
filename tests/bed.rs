//! What the tests stand on: two hosts with a guest on the first, and what can be said of both afterwards.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use vmferry_api::{EngineName, MigrationEvent, VmView};
use vmferry_bench::testbed::{GuestWatch, Testbed, TestbedOptions, two_qemus};
use vmferry_bench::{Fill, GuestOptions, Mode};

/// The VM of every test.
pub(crate) const VM: &str = "web1";
/// A pause that a guest which was never stopped does not show, even on a busy machine.
const NO_STOP: Duration = Duration::from_millis(700);
/// RAM of the test guest, in MiB: its kernel and what it writes.
pub(crate) const RAM_MIB: u64 = 384;

/// Hosts on the loopback address with the newer of the two QEMUs: the older one, without KVM, can do only post-copy when
/// it moves the RAM itself, as it does here.
pub(crate) fn options() -> TestbedOptions {
    with_qemus(1, 1)
}

/// With one of the two QEMUs (0 is the older one) on each host, moving the RAM itself.
pub(crate) fn with_qemus(alpha: usize, beta: usize) -> TestbedOptions {
    TestbedOptions { engine: Some(EngineName::Qemu), ..external(alpha, beta) }
}

/// The same, where the agents move the RAM.
pub(crate) fn external(alpha: usize, beta: usize) -> TestbedOptions {
    let qemus = two_qemus().expect("two QEMUs");
    let qemu_dirs = [qemus[alpha].clone(), qemus[beta].clone()];
    let engine = Some(EngineName::External);
    TestbedOptions { qemu_dirs, engine, ..TestbedOptions::new(env!("CARGO_BIN_EXE_vmferry")) }
}

/// A guest that does this with 128 MiB.
pub(crate) fn guest(mode: Mode) -> GuestOptions {
    GuestOptions { mem: 128 << 20, threads: 1, mode, rate: None, fill: Fill::Random }
}

/// Two hosts and a running guest.
pub(crate) struct Bed {
    pub testbed: Testbed,
    pub watch: GuestWatch,
    begun: Instant,
}

impl Deref for Bed {
    type Target = Testbed;
    fn deref(&self) -> &Testbed {
        &self.testbed
    }
}

pub(crate) async fn start(options: TestbedOptions, guest: GuestOptions) -> Bed {
    start_with(options, guest, &[]).await
}

/// With more words at the end of QEMU's command line.
pub(crate) async fn start_with(options: TestbedOptions, guest: GuestOptions, more: &[&str]) -> Bed {
    start_changed(options, guest, RAM_MIB, |argv| argv.extend(more.iter().map(ToString::to_string))).await
}

/// With another name for QEMU.
pub(crate) async fn start_as(options: TestbedOptions, guest: GuestOptions, binary: &str) -> Bed {
    start_changed(options, guest, RAM_MIB, |argv| argv[0] = binary.into()).await
}

/// With so much RAM, in MiB, and a virtual CPU for each of the guest's threads.
pub(crate) async fn start_sized(options: TestbedOptions, guest: GuestOptions, ram_mib: u64) -> Bed {
    let vcpus = guest.threads.to_string();
    start_changed(options, guest, ram_mib, |argv| argv.extend(["-smp".into(), vcpus])).await
}

/// With two virtual CPUs, a virtio disk in this file, and a guest that writes and reads it all the time beside what else
/// it does.
pub(crate) async fn start_with_disk(options: TestbedOptions, guest: GuestOptions, disk: &Path) -> Bed {
    start_with_disk_and(options, guest, disk, &[]).await
}

/// With more words at the end of QEMU's command line.
pub(crate) async fn start_with_disk_and(
    options: TestbedOptions,
    guest: GuestOptions,
    disk: &Path,
    more: &[&str],
) -> Bed {
    const BYTES: u64 = 16 << 20;
    std::fs::File::create(disk).and_then(|file| file.set_len(BYTES)).expect("written");
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let more: Vec<&str> = ["-smp", "2", "-drive", &drive].iter().chain(more).copied().collect();
    start_with_kernel_words(options, guest, &format!("vmferry.disk={BYTES}"), &more).await
}

/// With more words for its kernel, and at the end of QEMU's command line.
pub(crate) async fn start_with_kernel_words(
    options: TestbedOptions,
    guest: GuestOptions,
    words: &str,
    more: &[&str],
) -> Bed {
    start_changed(options, guest, RAM_MIB, |argv| {
        add_kernel_words(argv, words);
        argv.extend(more.iter().map(ToString::to_string));
    })
    .await
}

async fn start_changed(
    options: TestbedOptions,
    guest: GuestOptions,
    ram_mib: u64,
    change: impl FnOnce(&mut Vec<String>),
) -> Bed {
    let testbed = Testbed::start(options).await.expect("the testbed starts");
    let mut argv = testbed.guest_command_line(&guest, ram_mib, 1).expect("the guest's kernel is there");
    change(&mut argv);
    Bed::of(testbed, argv).await
}

/// A command line of this guest, which writes so many bytes of its disk, and reads them, all the time.
pub(crate) fn command_line_with_disk(testbed: &Testbed, guest: &GuestOptions, bytes: u64) -> Vec<String> {
    let mut argv = testbed.guest_command_line(guest, RAM_MIB, 1).expect("the kernel is there");
    add_kernel_words(&mut argv, &format!("vmferry.disk={bytes}"));
    argv
}

fn add_kernel_words(argv: &mut [String], words: &str) {
    let kernels = argv.iter_mut().find(|word| word.starts_with("console=")).expect("the kernel has a command line");
    *kernels = format!("{kernels} {words}");
}

impl Bed {
    /// With a guest of this command line.
    pub(crate) async fn of(testbed: Testbed, argv: Vec<String>) -> Self {
        let watch = match testbed.start_guest(VM, argv).await {
            Ok(watch) => watch,
            Err(error) => panic!("{error}\nthe agent's log:\n{}", testbed.alpha().agent_log()),
        };
        Self { testbed, watch, begun: Instant::now() }
    }

    pub(crate) fn to(&self) -> String {
        self.beta().address.to_string()
    }

    /// `vmferry migrate web1 --to beta` with more arguments, on alpha.
    pub(crate) async fn migrate(&self, more: &[&str]) -> Output {
        let to = self.to();
        let arguments: Vec<&str> = ["migrate", VM, "--to", &to].iter().chain(more).copied().collect();
        self.alpha().vmferry(&arguments).await.expect("vmferry runs")
    }

    /// The guest runs on this host, and only there.
    pub(crate) async fn assert_runs_only_on(&self, host: usize) {
        let hosts = [self.alpha(), self.beta()];
        let view = self.view(host).await;
        assert_eq!(view.state, "running", "{view:?}\n{}", self.logs());
        let other = hosts[1 - host].show(VM).await.expect("the agent answers");
        assert!(other.is_none(), "it is on both hosts: {other:?}\n{}", self.logs());
        let from = Instant::now();
        self.beats_on().await;
        let log = self.watch.log();
        assert!(!log.restarted(), "the guest's kernel crashed and rebooted");
        assert!(log.beats().iter().filter(|beat| beat.at > from).all(|beat| beat.host == host), "it beats elsewhere");
    }

    pub(crate) async fn view(&self, host: usize) -> VmView {
        let host = [self.alpha(), self.beta()][host];
        let view = host.show(VM).await.expect("the agent answers");
        view.unwrap_or_else(|| panic!("{} has no {VM}\n{}", host.name, self.logs()))
    }

    /// The guest's heart beats from now on.
    async fn beats_on(&self) {
        let from = Instant::now();
        let beats = |log: &vmferry_bench::GuestLog| log.beats().iter().filter(|beat| beat.at > from).count();
        self.watch.wait("the guest's heart", Duration::from_secs(10), |log| beats(log) > 20).await.expect("it beats");
    }

    /// No heartbeat was missed since the guest started, and it still beats.
    pub(crate) async fn assert_never_stopped(&self) {
        self.beats_on().await;
        let gap = self.watch.log().longest_gap(self.begun, Instant::now()).expect("it beats");
        assert!(gap.length < NO_STOP, "the guest stood still for {:?}", gap.length);
    }

    /// The guest goes on to read back from its disk, here, what it has written there.
    pub(crate) async fn assert_disk_works_on(&self, host: usize) {
        let works = |log: &vmferry_bench::GuestLog, since: u64| {
            log.disk().is_some_and(|(on, blocks)| on == host && blocks > since)
        };
        let mut since = 0;
        for _ in 0..2 {
            let worked = self.watch.wait("the guest's disk", Duration::from_secs(20), |log| works(log, since)).await;
            worked.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
            since = self.watch.log().disk().map_or(0, |(_, blocks)| blocks);
        }
        assert!(self.watch.log().corrupt().is_empty(), "{:?}", self.watch.log().corrupt());
    }

    /// Every page is as the guest wrote it.
    pub(crate) async fn assert_intact(&self, host: usize) {
        let (pages, corrupt) = self.watch.verify(host).await.expect("the guest verifies its memory");
        let log = self.watch.log();
        assert!(corrupt == 0 && log.corrupt().is_empty(), "{corrupt} of {pages} pages: {:?}", log.corrupt());
        assert!(pages >= 32_000, "only {pages} pages were verified");
    }

    pub(crate) fn logs(&self) -> String {
        format!("alpha:\n{}\nbeta:\n{}", self.alpha().agent_log(), self.beta().agent_log())
    }

    /// Waits until this is so.
    pub(crate) async fn eventually<F: Future<Output = bool>>(&self, what: &str, mut is_so: impl FnMut() -> F) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_so().await {
            assert!(Instant::now() < deadline, "not within 30 s: {what}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Begins a migration that takes some seconds and waits until its copy is under way.
    pub(crate) async fn begin_slow_migration(&self) -> tokio::process::Child {
        self.begin_slow_migration_with(&[]).await
    }

    /// With more arguments.
    pub(crate) async fn begin_slow_migration_with(&self, more: &[&str]) -> tokio::process::Child {
        let is_under_way = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.sent > 4 << 20);
        self.begin_migration(&[&["--bandwidth", "40MiB/s"], more].concat(), is_under_way).await
    }

    /// Begins a migration with more arguments and waits until it says this.
    pub(crate) async fn begin_migration(
        &self,
        more: &[&str],
        so_far: impl Fn(&MigrationEvent) -> bool,
    ) -> tokio::process::Child {
        let to = self.to();
        let arguments: Vec<&str> = ["migrate", VM, "--to", &to, "--json"].iter().chain(more).copied().collect();
        let mut command = self.alpha().command(&arguments);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("vmferry runs");
        let mut lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().expect("piped")));
        loop {
            let line = lines.next_line().await.expect("readable");
            let line = line.unwrap_or_else(|| panic!("it ended before it came so far\n{}", self.logs()));
            if so_far(&serde_json::from_str(&line).expect("an event")) {
                break;
            }
        }
        // Whoever wants the rest asks the agent.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        child
    }
}

/// A folder with a QEMU that does this first, in words of a shell, when it is to wait for a guest: `$qemu` is the newer
/// one of the two, and its arguments are the script's.
pub(crate) fn qemu_that_first(dir: &Path, does: &str) -> PathBuf {
    that_first(1, dir, does)
}

/// The same with either of the two.
pub(crate) fn that_first(which: usize, dir: &Path, does: &str) -> PathBuf {
    let real = two_qemus().expect("two QEMUs")[which].clone();
    let real = real.map_or("/usr/bin/qemu-system-x86_64".into(), |dir| dir.join("qemu-system-x86_64"));
    let script =
        format!("#!/bin/sh\nqemu={}\ncase \"$*\" in *-incoming*) {does};; esac\nexec $qemu \"$@\"\n", real.display());
    let path = dir.join("qemu-system-x86_64");
    std::fs::write(&path, script).expect("written");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("executable");
    dir.into()
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn assert_success(output: &Output, bed: &Bed) {
    assert!(output.status.success(), "{}\n{}", text(output), bed.logs());
}
