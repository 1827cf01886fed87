//! Guests with a real file system on their disk, which fio writes and verifies all the time: it moves with them, on each
//! pair of QEMUs, and is whole and clean afterwards.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use vmferry_api::{RunRequest, Started};
use vmferry_bench::testbed::{Host, Testbed, TestbedOptions};

use crate::bed::{VM, external, text};
use crate::machines::MACHINE;

/// How long fio may take for a few rounds, beside everything else.
const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: u64 = 400 << 20;

/// What the guest says on this host from now on.
struct Console {
    said: String,
    stream: Box<dyn AsyncRead + Unpin + Send>,
}

impl Console {
    async fn of(host: &Host, types: &str) -> Self {
        let console = host.client().expect("the agent is there").console(VM).await.expect("it has a console");
        let (stream, mut input) = tokio::io::split(console);
        input.write_all(types.as_bytes()).await.expect("it can be typed into");
        Self { said: String::new(), stream: Box::new(stream) }
    }

    /// Waits until it has said this so often, and nothing bad.
    async fn says(&mut self, words: &str, times: usize, logs: impl Fn() -> String) {
        let heard = async {
            let mut bytes = [0; 4096];
            while self.said.matches(words).count() < times {
                let count = self.stream.read(&mut bytes).await.expect("it can be read");
                assert!(count > 0, "it has ended: {}\n{}", self.said, logs());
                self.said.push_str(&String::from_utf8_lossy(&bytes[..count]));
                assert!(!self.said.contains("FAILED"), "{}\n{}", self.said, logs());
            }
        };
        let heard = tokio::time::timeout(PATIENCE, heard).await;
        assert!(heard.is_ok(), "not {times} times {words:?}: {}\n{}", self.said, logs());
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
}

async fn moves(file_system: &str, qemus: (usize, usize), drive: &str) {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    assert!(guest.join("fio.gz").exists(), "scripts/setup.sh --for-tests makes it");
    let testbed = TestbedOptions { own_images: true, ..external(qemus.0, qemus.1) };
    let testbed = Testbed::start(testbed).await.expect("the testbed starts");
    let logs = || format!("alpha:\n{}\nbeta:\n{}", testbed.alpha().agent_log(), testbed.beta().agent_log());
    let here = testbed.alpha().own_images.as_ref().expect("it has its own").join("disk.raw");
    std::fs::File::create(&here).and_then(|file| file.set_len(SIZE)).expect("written");
    succeeds(Command::new(format!("mkfs.{file_system}")).arg("-q").arg(&here));
    let words = format!(
        "qemu-system-x86_64 {2} -m 512 -nic none -vga none -serial stdio -kernel {0}/vmlinuz -initrd \
         {0}/fio.gz -drive file={1},format=raw,if=virtio,{drive} -append",
        guest.display(),
        testbed.images().join("disk.raw").display(),
        MACHINE.join(" "),
    );
    let kernels = format!(
        "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check mitigations=off cryptomgr.notests \
         clearcpuid=erms,rep_good,fsrm fs={file_system}"
    );
    let argv = words.split(' ').map(str::to_owned).chain([kernels]).collect();
    let cwd = testbed.images();
    let request = RunRequest { name: VM.into(), argv, cwd, measuring: false, autostart: false };
    let client = testbed.alpha().client().expect("the agent is there");
    client.post::<_, Started>("/v1/vms", &request).await.expect("it starts");
    Console::of(testbed.alpha(), "").await.says("verified", 2, logs).await;
    let route = [(testbed.alpha(), testbed.beta()), (testbed.beta(), testbed.alpha())];
    for (from, to) in route {
        let moved = from.vmferry(&["migrate", VM, "--to", &to.address.to_string()]).await.expect("vmferry runs");
        assert!(moved.status.success(), "{}\n{}", text(&moved), logs());
        Console::of(to, "").await.says("verified", 2, logs).await;
    }
    Console::of(testbed.alpha(), "stop\n").await.says("unmounted", 1, logs).await;
    let ended = testbed.alpha().vmferry(&["stop", VM, "--force"]).await.expect("vmferry runs");
    assert!(ended.status.success(), "{}", text(&ended));
    match file_system {
        "ext4" => succeeds(Command::new("e2fsck").arg("-fn").arg(&here)),
        _ => succeeds(Command::new("xfs_repair").args(["-n", "-f"]).arg(&here)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ext4_moves_with_its_guest_and_is_clean() {
    moves("ext4", (1, 1), "cache=none").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn xfs_moves_with_its_guest_and_is_clean() {
    moves("xfs", (0, 0), "discard=unmap").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak"]
async fn file_systems_move_with_their_guests_on_each_pair_of_qemus() {
    for file_system in ["ext4", "xfs"] {
        for qemus in [(0, 0), (0, 1), (1, 1)] {
            for drive in ["cache=none,discard=unmap", "cache=writeback"] {
                moves(file_system, qemus, drive).await;
            }
        }
    }
}
