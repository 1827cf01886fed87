//! Images that no guest runs from, copied between two hosts.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Output, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use vmferry_api::{CopyEvent, CopyProgress, CopyReport};
use vmferry_bench::testbed::{Testbed, TestbedOptions};

use crate::bed::text;

const MIB: usize = 1 << 20;
/// So slow that something can happen to it meanwhile.
const SLOW: [&str; 2] = ["--bandwidth", "16MiB/s"];

/// Two hosts, each with a folder of images of its own at the same path, and an image on the first.
struct Hosts {
    testbed: Testbed,
}

impl Hosts {
    async fn start() -> Self {
        Self::with(String::new()).await
    }

    async fn with(config: String) -> Self {
        let options = TestbedOptions {
            own_images: true,
            config: [config.clone(), config],
            ..TestbedOptions::new(env!("CARGO_BIN_EXE_vmferry"))
        };
        Self { testbed: Testbed::start(options).await.expect("the testbed starts") }
    }

    /// The image, as it is found from outside.
    fn on(&self, host: usize) -> PathBuf {
        self.beside(host, "disk.raw")
    }

    fn part(&self) -> PathBuf {
        self.beside(1, "disk.raw.vmferry-part")
    }

    fn beside(&self, host: usize, name: &str) -> PathBuf {
        let host = [self.testbed.alpha(), self.testbed.beta()][host];
        host.own_images.as_ref().expect("it has its own").join(name)
    }

    fn write(&self, host: usize, content: &[u8]) {
        std::fs::write(self.on(host), content).expect("written");
    }

    fn has(&self, host: usize, content: &[u8]) -> bool {
        std::fs::read(self.on(host)).expect("it is there") == content
    }

    fn command(&self, more: &[&str]) -> tokio::process::Command {
        let image = self.testbed.images().join("disk.raw").display().to_string();
        let target = format!("beta:{image}");
        let words: Vec<&str> = ["copy", &image, &target].iter().chain(more).copied().collect();
        self.testbed.alpha().command(&words)
    }

    async fn copy(&self, more: &[&str]) -> Output {
        self.command(more).output().await.expect("vmferry runs")
    }

    /// Copies it, which must be possible.
    async fn copied(&self, more: &[&str]) -> CopyReport {
        let output = self.copy(&[&["--json"], more].concat()).await;
        assert!(output.status.success(), "{}\n{}", text(&output), self.logs());
        match last(&output) {
            CopyEvent::Finished(report) => *report,
            other => panic!("{other:?}"),
        }
    }

    async fn refused(&self, more: &[&str], code: i32, expected: &str) {
        let output = self.copy(more).await;
        let said = text(&output);
        assert!(output.status.code() == Some(code) && said.contains(expected), "{said}\n{}", self.logs());
    }

    /// Begins a copy that takes a while, and waits until it is so far.
    async fn begun(&self, more: &[&str], so_far: impl Fn(&CopyProgress) -> bool) -> Begun {
        let mut command = self.command(&[&["--json"], &SLOW[..], more].concat());
        let mut child = command.stdout(Stdio::piped()).spawn().expect("vmferry runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        loop {
            let line = lines.next_line().await.expect("readable");
            let line = line.unwrap_or_else(|| panic!("it ended before it came so far\n{}", self.logs()));
            match serde_json::from_str(&line).expect("an event") {
                CopyEvent::Progress(progress) if so_far(&progress) => return Begun { child, lines, progress },
                CopyEvent::Progress(_) => {}
                other => panic!("it ended before it came so far: {other:?}\n{}", self.logs()),
            }
        }
    }

    fn logs(&self) -> String {
        format!("alpha:\n{}\nbeta:\n{}", self.testbed.alpha().agent_log(), self.testbed.beta().agent_log())
    }
}

struct Begun {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    progress: CopyProgress,
}

impl Begun {
    /// What it says last, and its exit code.
    async fn end(mut self) -> (Option<CopyEvent>, Option<i32>) {
        let mut last = None;
        while let Some(line) = self.lines.next_line().await.expect("readable") {
            last = serde_json::from_str(&line).ok();
        }
        (last, self.child.wait().await.expect("it ends").code())
    }
}

fn last(output: &Output) -> CopyEvent {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(said.lines().last().expect("it says something")).expect("an event")
}

fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

fn allocated(path: &std::path::Path) -> u64 {
    std::fs::metadata(path).expect("it is there").blocks() * 512
}

/// What is half full, with holes and written zeroes, and ends in the middle of a sector.
fn half_full() -> Vec<u8> {
    let mut content = vec![0; 64 * MIB + 100];
    content[3 * MIB + 5..23 * MIB].copy_from_slice(&random(1, 20 * MIB - 5));
    content[64 * MIB..].fill(7);
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_arrives_whole_and_thin_encrypted_or_plain() {
    let trusted = "[[network]]\ncidr = \"127.0.0.0/8\"\nsecurity = \"plain\"";
    for (config, plain) in [("", false), (trusted, true)] {
        let hosts = Hosts::with(config.into()).await;
        let content = half_full();
        hosts.write(0, &content);
        let report = hosts.copied(if plain { &["--no-verify"] } else { &[] }).await;
        assert!(hosts.has(1, &content));
        let (size, sent) = (content.len() as u64, report.sent);
        assert!(report.size == size && sent > 19 * MIB as u64 && sent < 21 * MIB as u64, "{report:?}");
        assert!(report.wire_sent < 22 * MIB as u64 && report.same == 0, "{report:?}");
        assert_eq!((report.protection == "plain", report.verified), (plain, !plain), "{report:?}");
        assert!(allocated(&hosts.on(1)) < 21 * MIB as u64, "{}", allocated(&hosts.on(1)));
        assert!(!hosts.part().exists());
        assert_eq!(std::fs::metadata(hosts.on(1)).expect("it is there").mode() & 0o777, 0o600);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_file_is_copied_as_the_file_that_it_is() {
    let hosts = Hosts::start().await;
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(hosts.on(0)).arg("1G");
    assert!(create.status().expect("qemu-img is there").success());
    let said = text(&hosts.copy(&[]).await);
    assert!(said.contains("disk.raw on beta now") && said.contains("verified     yes"), "{said}");
    assert!(hosts.has(1, &std::fs::read(hosts.on(0)).expect("it is there")));
    // And nothing at all is one, too.
    for host in [0, 1] {
        std::fs::remove_file(hosts.on(host)).expect("removed");
    }
    hosts.write(0, b"");
    hosts.copied(&[]).await;
    assert!(hosts.has(1, b""));
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_agent_is_killed_the_same_command_goes_on_and_a_source_that_has_changed_is_copied_right() {
    let size = 96 * MIB;
    for (killed, changed) in [(0, false), (1, false), (1, true)] {
        let mut hosts = Hosts::start().await;
        let mut content = random(2, size);
        hosts.write(0, &content);
        let begun = hosts.begun(&[], |it| it.wire_sent > size as u64 / 2).await;
        hosts.testbed.host_mut(killed).kill_agent().await.expect("killed");
        let sent = begun.progress.wire_sent;
        // The new one knows nothing of the copy, and says so.
        hosts.testbed.host_mut(killed).start_agent().await.expect("it starts");
        let (last, code) = begun.end().await;
        match killed {
            0 => assert!(code == Some(6), "{last:?}"),
            _ => assert!(matches!(&last, Some(CopyEvent::Failed(_))) && code == Some(4), "{last:?}"),
        }
        assert!(!hosts.on(1).exists(), "what is not whole has not its name");
        if changed {
            content[MIB + 77] ^= 1;
            std::fs::File::options()
                .write(true)
                .open(hosts.on(0))
                .and_then(|file| file.write_all_at(&content, 0))
                .expect("written");
        }
        let there = allocated(&hosts.part());
        let report = hosts.copied(&[]).await;
        assert!(hosts.has(1, &content) && !hosts.part().exists());
        // A block is not sent again unless it was cut in the middle; what was on its way is lost.
        let more = (4 + usize::from(changed)) * MIB;
        assert!(there + 4 * MIB as u64 > sent, "{there} of {sent}");
        assert!(report.wire_sent <= size as u64 - there + more as u64, "{report:?} {there}");
        assert!(report.same >= there - more as u64, "{report:?} {there}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_older_copy_only_what_has_changed_is_sent_and_its_name_has_all_of_the_old_or_all_of_the_new() {
    let mut hosts = Hosts::start().await;
    let old = random(3, 48 * MIB);
    hosts.write(1, &old);
    std::fs::set_permissions(hosts.on(1), PermissionsExt::from_mode(0o640)).expect("set");
    let mut new = old.clone();
    new.truncate(46 * MIB);
    for at in [0, 17 * MIB + 5, 18 * MIB] {
        new[at] ^= 1;
    }
    new[30 * MIB..32 * MIB].fill(0);
    hosts.write(0, &new);
    hosts.refused(&[], 3, "there is something at").await;
    assert!(hosts.has(1, &old));
    let report = hosts.copied(&["--update"]).await;
    assert!(hosts.has(1, &new) && !hosts.part().exists());
    // Three pieces of 4 KiB are others.
    assert_eq!((report.sent, report.same), (3 * 4096, 44 * MIB as u64 - 3 * 4096), "{report:?}");
    assert!(report.wire_sent < MIB as u64 / 4, "{report:?}");
    let known = std::fs::metadata(hosts.on(1)).expect("it is there");
    assert!(known.mode() & 0o777 == 0o640 && allocated(&hosts.on(1)) <= 45 * MIB as u64);

    // All of it is another now, and it is broken off in the middle.
    let third = random(4, 46 * MIB);
    hosts.write(0, &third);
    let begun = hosts.begun(&["--update"], |it| it.wire_sent > 20 * MIB as u64).await;
    hosts.testbed.host_mut(1).kill_agent().await.expect("killed");
    assert!(hosts.has(1, &new));
    hosts.testbed.host_mut(1).start_agent().await.expect("it starts");
    begun.end().await;
    assert!(hosts.has(1, &new));
    let report = hosts.copied(&["--update"]).await;
    assert!(hosts.has(1, &third) && report.same > 15 * MIB as u64, "{report:?}");
    // Where nothing is, there is nothing to update.
    std::fs::remove_file(hosts.on(1)).expect("removed");
    hosts.copied(&["--update"]).await;
    assert!(hosts.has(1, &third));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_copied_is_refused_and_nothing_is_made() {
    let hosts = Hosts::start().await;
    hosts.refused(&[], 3, "cannot open").await;
    hosts.write(0, &random(5, MIB));
    let image = hosts.testbed.images().join("disk.raw").display().to_string();
    let inside = hosts.testbed.images().display().to_string();
    symlink("/etc", hosts.beside(1, "out")).expect("made");
    symlink("nothing", hosts.beside(1, "link")).expect("made");
    for (target, code, expected) in [
        ("beta".to_owned(), 2, "is no place for a copy"),
        ("beta:disk.raw".into(), 2, "is no place for a copy"),
        ("nobody:/a".into(), 3, "nobody"),
        ("beta:/etc/vmferry-test.raw".into(), 3, "in none of the folders where beta keeps images"),
        (format!("beta:{inside}/../vmferry-test.raw"), 3, "in none of the folders"),
        (format!("beta:{inside}/out/vmferry-test.raw"), 3, "in none of the folders"),
        (format!("beta:{inside}/link"), 3, "there is something at"),
        (format!("beta:{inside}/absent/disk.raw"), 3, "cannot open"),
    ] {
        for update in [&[][..], &["--update"]] {
            let words = [&["copy", &image, &target][..], update].concat();
            let output = hosts.testbed.alpha().vmferry(&words).await.expect("vmferry runs");
            let is_link = target.ends_with("/link") && !update.is_empty();
            let expected = if is_link { "in none of the folders" } else { expected };
            let said = text(&output);
            assert!(output.status.code() == Some(code) && said.contains(expected), "{target}: {said}");
        }
    }
    let output = hosts.testbed.alpha().vmferry(&["copy", "/dev/null", "beta:/a"]).await.expect("vmferry runs");
    assert!(text(&output).contains("neither a file nor a block device"), "{}", text(&output));
    let left: Vec<_> = std::fs::read_dir(hosts.beside(1, "")).expect("it is there").flatten().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(!std::path::Path::new("/etc/vmferry-test.raw").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_guest_has_is_neither_copied_nor_replaced() {
    let hosts = Hosts::start().await;
    for host in [0, 1] {
        hosts.write(host, &random(6 + host as u64, MIB));
    }
    for (host, expected) in [(0, "another process writes it"), (1, "another process")] {
        let drive = format!("file={},format=raw,if=virtio", hosts.on(host).display());
        let mut qemu = tokio::process::Command::new("qemu-system-x86_64");
        qemu.args(["-S", "-display", "none", "-serial", "none", "-qmp", "stdio", "-drive", &drive]);
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut qemu = qemu.spawn().expect("QEMU is there");
        // It answers when it has its disk.
        let mut monitor = qemu.stdin.take().expect("piped");
        monitor.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").await.expect("written");
        let mut said = BufReader::new(qemu.stdout.take().expect("piped")).lines();
        while !said.next_line().await.expect("readable").expect("it has not ended").contains("return") {}
        hosts.refused(&["--update"], 3, expected).await;
        assert!(hosts.has(1, &random(7, MIB)) && !hosts.part().exists());
        qemu.kill().await.expect("killed");
    }
    hosts.copied(&["--update"]).await;
    assert!(hosts.has(1, &random(6, MIB)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_written_or_cut_meanwhile_does_not_get_its_name() {
    type Change = fn(&std::fs::File);
    let changes: [(Change, &str); 3] = [
        (|file| file.set_len(MIB as u64).expect("cut"), "has changed while it was copied: it had"),
        (|file| file.set_len(96 * MIB as u64).expect("grown"), "has changed while it was copied: it had"),
        (|file| file.write_all_at(&[1], 0).expect("written"), "has changed while it was copied: somebody writes it"),
    ];
    for (change, expected) in changes {
        let hosts = Hosts::start().await;
        hosts.write(0, &random(8, 80 * MIB));
        let begun = hosts.begun(&[], |it| it.wire_sent > 2 * MIB as u64).await;
        change(&std::fs::File::options().write(true).open(hosts.on(0)).expect("it is there"));
        let (last, code) = begun.end().await;
        let Some(CopyEvent::Failed(problem)) = last else { panic!("{last:?}") };
        assert!(code == Some(4) && problem.message.contains(expected), "{problem:?}");
        assert!(problem.hint.is_some_and(|it| it.contains("goes on")) && !hosts.on(1).exists());
        let content = std::fs::read(hosts.on(0)).expect("it is there");
        hosts.copied(&[]).await;
        assert!(hosts.has(1, &content));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_cancelled_goes_on_where_it_was_and_a_second_one_to_there_is_refused() {
    let hosts = Hosts::start().await;
    let content = random(9, 48 * MIB);
    hosts.write(0, &content);
    let begun = hosts.begun(&[], |it| it.wire_sent > 16 * MIB as u64).await;
    hosts.refused(&[], 3, "another copy to").await;
    let pid = rustix::process::Pid::from_raw(begun.child.id().expect("it runs") as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let (last, code) = begun.end().await;
    assert!(
        code == Some(130) && matches!(&last, Some(CopyEvent::Failed(it)) if it.message.contains("cancelled")),
        "{last:?}"
    );
    assert!(!hosts.on(1).exists() && hosts.part().exists());
    let report = hosts.copied(&[]).await;
    assert!(hosts.has(1, &content) && report.same > 10 * MIB as u64, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_room_is_told_of_and_what_has_arrived_is_kept() {
    let mut hosts = Hosts::start().await;
    let folder = Mounted(hosts.beside(1, ""));
    hosts.testbed.host_mut(1).kill_agent().await.expect("killed");
    folder.mount(&["-t", "tmpfs", "-o", "size=24m", "tmpfs"]);
    hosts.testbed.host_mut(1).start_agent().await.expect("it starts");
    let content = random(10, 32 * MIB);
    hosts.write(0, &content);
    hosts.refused(&[], 4, "No space left on device").await;
    hosts.refused(&[], 4, "what has arrived is kept").await;
    assert!(!hosts.on(1).exists() && allocated(&hosts.part()) > 16 * MIB as u64);
    folder.mount(&["-o", "remount,size=40m"]);
    let report = hosts.copied(&[]).await;
    assert!(hosts.has(1, &content) && report.same > 16 * MIB as u64, "{report:?}");
}

/// Changes a byte in one of so many pieces of 4 KiB; tells how many those were.
fn scattered(content: &mut [u8], one_in: usize) -> u64 {
    let (mut random, mut changed) = (fastrand::Rng::with_seed(12), 0);
    for piece in content.chunks_mut(4096) {
        if random.usize(..one_in) == 0 {
            piece[random.usize(..piece.len())] ^= 1;
            changed += 1;
        }
    }
    changed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_of_a_template_costs_its_difference_and_an_index_that_lies_damages_nothing() {
    let mut hosts = Hosts::start().await;
    let template = random(11, 32 * MIB);
    let at = hosts.beside(1, "template.raw");
    let rests = |file: &std::fs::File| {
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        file.set_modified(long_ago).expect("set");
    };
    std::fs::write(&at, &template).expect("written");
    rests(&std::fs::File::options().write(true).open(&at).expect("it is there"));
    // It looks for what it has when it starts, and then once a minute.
    hosts.testbed.host_mut(1).kill_agent().await.expect("killed");
    hosts.testbed.host_mut(1).start_agent().await.expect("it starts");
    let indexes = hosts.testbed.beta().state_dir.join("known");
    let is_made = |entry: std::fs::DirEntry| entry.path().extension().is_some_and(|it| it == "known");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !std::fs::read_dir(&indexes).into_iter().flatten().flatten().any(is_made) {
        assert!(std::time::Instant::now() < deadline, "no index\n{}", hosts.logs());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(allocated(&indexes) < 100_000);

    // It lies elsewhere in the clone, and 3 % of it are scattered changes.
    let mut clone = template.clone();
    let changed = scattered(&mut clone, 33) * 4096;
    clone.splice(0..0, vec![0; 3 * MIB + 8192]);
    hosts.write(0, &clone);
    let report = hosts.copied(&[]).await;
    assert!(hosts.has(1, &clone));
    assert!(report.sent >= changed && report.sent < changed + MIB as u64 / 2, "{report:?} {changed}");
    assert_eq!(report.sent + report.same, template.len() as u64, "{report:?}");
    assert!(report.wire_sent < report.sent + MIB as u64 / 2, "{report:?}");

    // Half of it is something else now, and nobody has noticed.
    std::fs::remove_file(hosts.on(1)).expect("removed");
    let file = std::fs::File::options().write(true).open(&at).expect("it is there");
    file.write_all_at(&random(13, 16 * MIB), 16 * MIB as u64).expect("written");
    rests(&file);
    let report = hosts.copied(&[]).await;
    assert!(hosts.has(1, &clone));
    assert!(report.sent > 16 * MIB as u64 && report.same > 14 * MIB as u64, "{report:?}");
}

/// A folder that something is mounted on; not any more when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn mount(&self, words: &[&str]) {
        let status = std::process::Command::new("mount").args(words).arg(&self.0).status();
        assert!(status.expect("mount is there").success(), "{words:?}");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // An agent may still have it.
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
