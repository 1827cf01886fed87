//! Disks that move to another place while their guest writes and reads them all the time, and stays where it is.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::process::{Child, ChildStdout, Command};
use vmferry_api::{DiskMoveView, DiskView};
use vmferry_bench::Mode;
use vmferry_bench::testbed::TestbedOptions;

use crate::bed::{self, Bed, VM, assert_success, external, guest, text};
use crate::machines::{MONITOR, monitor, order};

const MIB: u64 = 1 << 20;
/// What the guest uses of its disk, and all of it.
const USED: u64 = 16 * MIB;
pub(crate) const SIZE: u64 = 64 * MIB;

/// A guest and the folder that its disk is in.
pub(crate) struct Moving {
    bed: Bed,
    folder: tempfile::TempDir,
}

impl std::ops::Deref for Moving {
    type Target = Bed;
    fn deref(&self) -> &Bed {
        &self.bed
    }
}

/// With a disk in `a.raw`, of which some MiB are zeroes that take room.
pub(crate) async fn start(options: TestbedOptions, words: impl FnOnce(&Path) -> Vec<String>) -> Moving {
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("a.raw");
    std::fs::write(&disk, vec![0; (USED + 8 * MIB) as usize]).expect("written");
    std::fs::OpenOptions::new().write(true).open(&disk).and_then(|it| it.set_len(SIZE)).expect("made larger");
    let words = words(&disk);
    let more: Vec<&str> = ["-smp", "2"].into_iter().chain(words.iter().map(String::as_str)).chain(MONITOR).collect();
    let bed = bed::start_with_kernel_words(options, guest(Mode::Idle), &format!("vmferry.disk={USED}"), &more).await;
    bed.assert_disk_works_on(0).await;
    Moving { bed, folder }
}

pub(crate) fn as_drive(disk: &Path) -> Vec<String> {
    vec!["-drive".into(), format!("file={},format=raw,if=virtio,cache=none,aio=native", disk.display())]
}

/// Nodes of their own, and a thread of its own.
pub(crate) fn as_nodes(disk: &Path) -> Vec<String> {
    [
        "-object",
        "iothread,id=io0",
        "-blockdev",
        &format!("driver=file,filename={},node-name=f0,aio=threads", disk.display()),
        "-blockdev",
        "driver=raw,file=f0,node-name=n0,discard=unmap",
        "-device",
        "virtio-blk-pci,drive=n0,id=virtio0,iothread=io0",
    ]
    .map(str::to_owned)
    .to_vec()
}

impl Moving {
    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// `vmferry disk move` of its disk, with more arguments.
    pub(crate) async fn move_to(&self, to: &str, more: &[&str]) -> Output {
        let arguments: Vec<&str> = ["disk", "move", VM, "virtio0", "--to", to].iter().chain(more).copied().collect();
        self.alpha().vmferry(&arguments).await.expect("vmferry runs")
    }

    /// It has moved there, and the guest has not noticed.
    async fn moves_to(&self, to: &str, more: &[&str]) {
        assert_success(&self.move_to(to, more).await, self);
        self.assert_disk_works_on(0).await;
        let disk = self.disk(0).await;
        assert!(disk.file.contains(to.split('/').next_back().unwrap_or(to)), "{disk:?}\n{}", self.logs());
        assert_eq!(disk.size, Some(SIZE), "the guest's disk does not grow");
        let argv = self.view(0).await.changes.join("; ");
        assert!(to.ends_with("a.raw") || argv.contains(&disk.file), "{argv}");
    }

    pub(crate) async fn disk(&self, host: usize) -> DiskView {
        let host = [self.alpha(), self.beta()][host];
        let listed = host.vmferry(&["disk", "list", VM, "--json"]).await.expect("vmferry runs");
        let all: Vec<DiskView> = serde_json::from_slice(&listed.stdout).unwrap_or_else(|_| panic!("{}", text(&listed)));
        all.into_iter().find(|disk| disk.name == "virtio0").expect("it is listed")
    }

    /// Begins a move that takes long, and waits until it copies.
    async fn begin_slow(&self, to: &str) -> Child {
        let mut command =
            self.alpha().command(&["disk", "move", VM, "virtio0", "--to", to, "--bandwidth", "1MiB/s", "--json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmferry runs");
        let mut lines = lines(&mut child);
        loop {
            let line = lines.next_line().await.expect("readable");
            let line = line.unwrap_or_else(|| panic!("it ended before it copied\n{}", self.logs()));
            if serde_json::from_str::<DiskMoveView>(&line).expect("a view").done > 0 {
                break;
            }
        }
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        child
    }

    /// The guest goes on with the disk that it has, and nothing is left of what was made.
    async fn assert_stays(&self, file: &str, made: &str) {
        self.eventually("what was made is gone", async || !Path::new(made).exists()).await;
        let nodes = async || {
            let user = monitor(self).await;
            let nodes = user.execute_raw("query-named-block-nodes", json!({ "flat": true })).await.expect("answers");
            let jobs = user.execute_raw("query-jobs", json!({})).await.expect("answers");
            (nodes.to_string(), jobs.to_string())
        };
        self.eventually("QEMU has nothing left of it", async || {
            let (nodes, jobs) = nodes().await;
            !nodes.contains(made) && !jobs.contains("vmferry-move")
        })
        .await;
        assert_eq!(self.disk(0).await.file, file);
        self.assert_disk_works_on(0).await;
        let noted = self.alpha().state_dir.join("disk-moves");
        self.eventually("nothing is noted any more", async || {
            std::fs::read_dir(&noted).into_iter().flatten().count() == 0
        })
        .await;
    }

    pub(crate) async fn kill_qemu(&self, host: usize) {
        let pid = rustix::process::Pid::from_raw(self.view(host).await.pid as i32).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
        self.eventually("it is shown as ended", async || self.view(host).await.state == "ended").await;
        let host = [self.alpha(), self.beta()][host];
        // Threads of a process that was killed may hold its files for a moment longer.
        self.eventually("its disk is free", async || {
            let nowhere = ["disk", "move", VM, "virtio0", "--to", "nbd://127.0.0.1:1/x"];
            let said = text(&host.vmferry(&nowhere).await.expect("vmferry runs"));
            said.contains("does not run") || said.contains("at no path")
        })
        .await;
    }
}

fn lines(child: &mut Child) -> tokio::io::Lines<tokio::io::BufReader<ChildStdout>> {
    tokio::io::BufReader::new(child.stdout.take().expect("piped")).lines()
}

fn allocated(path: &str) -> u64 {
    std::fs::metadata(path).expect("it is there").blocks() * 512
}

/// `vmferry nbd serve`, until this is dropped.
async fn serve(image: &Path) -> (Child, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmferry"));
    command.args(["nbd", "serve"]).arg(image).args(["--listen", "127.0.0.1:0", "--plain"]);
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("vmferry runs");
    let uri = lines(&mut child).next_line().await.expect("readable").expect("it says where it serves");
    (child, uri)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_and_its_guest_migrates_and_starts_again_with_it_at_the_new_place() {
    for qemu in [0, 1] {
        let moving = start(external(qemu, qemu), as_drive).await;
        let to = moving.at("b.raw");
        moving.moves_to(&to, &[]).await;
        assert!(Path::new(&moving.at("a.raw")).exists(), "the old file stays");
        assert!(allocated(&to) <= USED + MIB, "{}: zeroes take no room", allocated(&to));
        let listed = text(&moving.alpha().vmferry(&["disk", "list", VM]).await.expect("vmferry runs"));
        assert!(listed.contains("virtio0") && listed.contains(&to) && listed.contains("writable"), "{listed}");
        assert_success(&moving.migrate(&[]).await, &moving);
        moving.assert_runs_only_on(1).await;
        moving.assert_disk_works_on(1).await;
        assert_eq!(moving.disk(1).await.file, to);
        // What it was started with is never opened again.
        std::fs::remove_file(moving.at("a.raw")).expect("removed");
        moving.kill_qemu(1).await;
        assert_success(&moving.beta().vmferry(&["start", VM]).await.expect("vmferry runs"), &moving);
        assert_eq!(moving.disk(1).await.file, to);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_becomes_qcow2_and_raw_again_with_its_limits_and_without_a_pause() {
    for (qemu, words) in [(0, as_drive as fn(&Path) -> Vec<String>), (1, as_drive), (0, as_nodes), (1, as_nodes)] {
        let moving = start(external(qemu, qemu), words).await;
        let user = monitor(&moving).await;
        let is_drive = user.execute_raw("query-block", json!({})).await.expect("answers").to_string();
        let mut limits = json!({ "bps": 0, "bps_rd": 0, "bps_wr": 200 * MIB, "iops": 0, "iops_rd": 0, "iops_wr": 0 });
        match is_drive.contains("\"device\":\"virtio0\"") {
            true => limits["device"] = json!("virtio0"),
            false => limits["id"] = json!("/machine/peripheral/virtio0/virtio-backend"),
        }
        order(&user, "block_set_io_throttle", limits).await;
        drop(user);
        let (qcow2, raw) = (moving.at("b.qcow2"), moving.at("c.raw"));
        moving.moves_to(&qcow2, &["--format", "qcow2"]).await;
        assert_eq!(moving.disk(0).await.format.as_deref(), Some("qcow2"));
        moving.moves_to(&raw, &["--format", "raw", "--delete-source"]).await;
        assert_eq!(moving.disk(0).await.format.as_deref(), Some("raw"));
        assert!(!Path::new(&qcow2).exists() && Path::new(&moving.at("a.raw")).exists());
        assert!(allocated(&raw) <= USED + MIB, "{}: zeroes take no room", allocated(&raw));
        let drives = monitor(&moving).await.execute_raw("query-block", json!({})).await.expect("answers").to_string();
        assert!(drives.contains(&format!("\"bps_wr\":{}", 200 * MIB)), "{drives}");
        moving.assert_never_stopped().await;
        moving.kill_qemu(0).await;
        assert_success(&moving.alpha().vmferry(&["start", VM]).await.expect("vmferry runs"), &moving);
        let words = moving.view(0).await.argv.join(" ");
        assert!(words.contains(&raw) && !words.contains("a.raw") && words.contains("aio="), "{words}");
        assert_eq!(words.contains("discard=unmap"), words.contains("iothread"), "{words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_a_larger_one_behind_nbd_and_back() {
    for (qemu, words) in [(0, as_drive as fn(&Path) -> Vec<String>), (1, as_nodes)] {
        let moving = start(external(qemu, qemu), words).await;
        let served = moving.folder.path().join("served.raw");
        std::fs::File::create(&served).and_then(|file| file.set_len(SIZE + MIB)).expect("written");
        let (larger, place) = serve(&served).await;
        moving.moves_to(&place, &[]).await;
        moving.assert_disk_works_on(0).await;
        let (small, uri) = {
            let small = moving.folder.path().join("small.raw");
            std::fs::File::create(&small).and_then(|file| file.set_len(MIB)).expect("written");
            serve(&small).await
        };
        let refused = moving.move_to(&uri, &[]).await;
        assert!(!refused.status.success() && text(&refused).contains("bytes, and virtio0 has"), "{}", text(&refused));
        drop(small);
        moving.moves_to(&moving.at("back.raw"), &[]).await;
        moving.assert_disk_works_on(0).await;
        // Its next start is from there, too, and of the same size.
        moving.moves_to(&place, &[]).await;
        moving.kill_qemu(0).await;
        assert_success(&moving.alpha().vmferry(&["start", VM]).await.expect("vmferry runs"), &moving);
        let disk = moving.disk(0).await;
        assert!(disk.file.contains("nbd") && disk.size == Some(SIZE), "{disk:?}");
        drop(larger);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_at_a_server_is_not_moved_onto_itself_nor_to_a_server_that_says_nothing() {
    let moving = start(external(1, 1), as_drive).await;
    let served = moving.folder.path().join("served.raw");
    std::fs::File::create(&served).and_then(|file| file.set_len(SIZE)).expect("written");
    let (_server, place) = serve(&served).await;
    moving.moves_to(&place, &[]).await;
    let refused = moving.move_to(&place, &[]).await;
    assert!(refused.status.code() == Some(3) && text(&refused).contains("already"), "{}", text(&refused));
    // Its kernel takes connections, and nobody answers them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let place = format!("nbd://{}/x", silent.local_addr().expect("bound"));
    let refused = moving.move_to(&place, &[]).await;
    assert!(refused.status.code() == Some(4) && text(&refused).contains("did not answer"), "{}", text(&refused));
    moving.assert_never_stopped().await;
    moving.assert_disk_works_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_cancelled_leaves_the_guest_its_disk_and_nothing_else() {
    for qemu in [0, 1] {
        let moving = start(external(qemu, qemu), as_drive).await;
        let (from, to) = (moving.at("a.raw"), moving.at("b.raw"));
        let mut child = moving.begin_slow(&to).await;
        let migrated = moving.migrate(&[]).await;
        assert!(migrated.status.code() == Some(3) && text(&migrated).contains("being moved"), "{}", text(&migrated));
        let again = moving.move_to(&moving.at("c.raw"), &[]).await;
        assert!(again.status.code() == Some(3) && text(&again).contains("being moved already"), "{}", text(&again));
        let stopped = moving.alpha().vmferry(&["stop", VM]).await.expect("vmferry runs");
        assert!(text(&stopped).contains("a disk of web1 is being moved"), "{}", text(&stopped));
        // As Ctrl-C does.
        let pid = rustix::process::Pid::from_raw(child.id().expect("it runs") as i32).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("told to end");
        assert_eq!(child.wait().await.expect("it ends").code(), Some(130));
        moving.assert_stays(&from, &to).await;
        let mut child = moving.begin_slow(&to).await;
        let cancelled = moving.alpha().vmferry(&["disk", "cancel", VM, "virtio0"]).await.expect("vmferry runs");
        assert_success(&cancelled, &moving);
        assert_eq!(child.wait().await.expect("it ends").code(), Some(130));
        moving.assert_stays(&from, &to).await;
        moving.assert_never_stopped().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_in_a_move_leaves_the_guest_its_disk_and_the_next_one_can_move_it() {
    for qemu in [0, 1] {
        let mut moving = start(external(qemu, qemu), as_nodes).await;
        let (from, to) = (moving.at("a.raw"), moving.at("b.raw"));
        let mut child = moving.begin_slow(&to).await;
        moving.bed.testbed.host_mut(0).kill_agent().await.expect("killed");
        assert!(!child.wait().await.expect("it ends").success());
        assert!(Path::new(&to).exists());
        moving.bed.testbed.host_mut(0).start_agent().await.expect("it starts");
        moving.assert_stays(&from, &to).await;
        moving.moves_to(&to, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_an_agent_is_killed_the_disk_is_at_one_place_and_a_file_only_there() {
    let mut moving = start(external(1, 1), as_drive).await;
    let mut places = [moving.at("a.raw"), moving.at("b.raw")];
    // From the begin of a move to its end, which takes some tenths of a second.
    for wait_ms in [20, 60, 100, 150, 200, 300, 450] {
        let [from, to] = places.clone();
        let mut command = moving.alpha().command(&["disk", "move", VM, "virtio0", "--to", &to, "--delete-source"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("vmferry runs");
        tokio::time::sleep(std::time::Duration::from_millis(wait_ms)).await;
        moving.bed.testbed.host_mut(0).kill_agent().await.expect("killed");
        child.wait().await.expect("it ends");
        moving.bed.testbed.host_mut(0).start_agent().await.expect("it starts");
        let notes = moving.alpha().state_dir.join("disk-moves");
        moving
            .eventually("its move is ended", async || std::fs::read_dir(&notes).into_iter().flatten().count() == 0)
            .await;
        let now = moving.disk(0).await.file;
        let other = if now == from { &to } else { &from };
        assert!(now == from || now == to, "{now}");
        assert!(Path::new(&now).exists() && !Path::new(other).exists(), "{now}: {}", moving.logs());
        moving.assert_disk_works_on(0).await;
        if now == to {
            places.reverse();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_is_refused_before_anything_is_made() {
    let moving = start(external(1, 1), |disk| {
        let medium = disk.with_file_name("cd.raw");
        std::fs::write(&medium, vec![1; MIB as usize]).expect("written");
        as_drive(disk).into_iter().chain(["-cdrom".to_owned(), medium.display().to_string()]).collect()
    })
    .await;
    std::fs::write(moving.at("there"), "somebody's").expect("written");
    let (there, own, absent) = (moving.at("there"), moving.at("a.raw"), moving.at("no/b.raw"));
    for (to, more, expected) in [
        (there.as_str(), &[][..], "there is something at"),
        (own.as_str(), &[], "of web1 is at"),
        ("b.raw", &[], "relative path"),
        (absent.as_str(), &[], "there is no folder"),
        ("http://host/b", &[], "no place for a disk"),
        (absent.as_str(), &["--bandwidth", "0"], "bandwidth"),
        ("nbd://127.0.0.1:1/x", &["--format", "qcow2"], "only a file is made as qcow2"),
    ] {
        let refused = moving.move_to(to, more).await;
        assert!(!refused.status.success() && text(&refused).contains(expected), "{to}: {}", text(&refused));
    }
    assert_eq!(std::fs::read(moving.at("there")).expect("it is there"), b"somebody's");
    let nobody = moving.move_to("nbd://127.0.0.1:1/x", &[]).await;
    assert!(!nobody.status.success() && text(&nobody).contains("refused"), "{}", text(&nobody));
    let new = moving.at("new");
    for (disk, expected) in [("ide2-cd0", "is read-only"), ("virtio7", "has no disk virtio7")] {
        let refused = moving.alpha().vmferry(&["disk", "move", VM, disk, "--to", &new]).await.expect("vmferry runs");
        assert!(refused.status.code() == Some(3) && text(&refused).contains(expected), "{}", text(&refused));
    }
    let listed = text(&moving.alpha().vmferry(&["disk", "list", VM]).await.expect("vmferry runs"));
    assert!(listed.lines().any(|line| line.contains("ide2-cd0") && line.contains("read-only")), "{listed}");
    assert!(!Path::new(&new).exists());
    moving.assert_disk_works_on(0).await;
}

/// A file system of this size, until this is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, bytes: u64) -> Self {
        std::fs::create_dir(&path).expect("made");
        let options = format!("size={bytes}");
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &options, "vmferry-small"]).arg(&path).status();
        assert!(mounted.expect("mount is there").success());
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Nothing can be done about it.
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_without_room_is_refused_and_one_that_fills_up_changes_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can mount a small file system");
        return;
    }
    let moving =
        start(external(1, 1), |disk| vec!["-drive".into(), format!("file={},format=raw,if=virtio", disk.display())])
            .await;
    let small = Small::mount(moving.folder.path().join("small"), 8 * MIB);
    let to = small.0.join("b.raw").display().to_string();
    let refused = moving.move_to(&to, &[]).await;
    assert!(refused.status.code() == Some(3) && text(&refused).contains("too little room"), "{}", text(&refused));
    assert!(!Path::new(&to).exists());
    drop(small);
    // Somebody else takes what there was.
    let small = Small::mount(moving.folder.path().join("filling"), 40 * MIB);
    let to = small.0.join("b.raw").display().to_string();
    let mut child = moving.begin_slow(&to).await;
    std::fs::write(small.0.join("other"), vec![1; (36 * MIB) as usize]).expect("written");
    let user = monitor(&moving).await;
    order(&user, "block-job-set-speed", json!({ "device": "vmferry-move-1", "speed": 0 })).await;
    assert_eq!(child.wait().await.expect("it ends").code(), Some(4));
    drop(user);
    moving.assert_stays(&moving.at("a.raw"), &to).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_a_vm_that_does_not_run_is_copied_and_the_next_start_is_from_there() {
    for words in [as_drive as fn(&Path) -> Vec<String>, as_nodes] {
        let moving = start(external(1, 1), words).await;
        moving.kill_qemu(0).await;
        let [a, b, c] = ["a.raw", "b.raw", "c.qcow2"].map(|name| moving.at(name));
        let refused = moving.move_to("nbd://127.0.0.1:1/x", &[]).await;
        assert!(text(&refused).contains("does not run"), "{}", text(&refused));
        // One that is cancelled, and one of which the agent is killed, leave nothing.
        let mut child = moving.begin_slow(&b).await;
        let started = moving.alpha().vmferry(&["start", VM]).await.expect("vmferry runs");
        assert!(!started.status.success(), "{}", text(&started));
        let cancelled = moving.alpha().vmferry(&["disk", "cancel", VM, "virtio0"]).await.expect("vmferry runs");
        assert_success(&cancelled, &moving);
        assert_eq!(child.wait().await.expect("it ends").code(), Some(130));
        assert!(!Path::new(&b).exists());
        assert_success(&moving.move_to(&b, &[]).await, &moving);
        assert_eq!(moving.disk(0).await.file, b);
        assert!(std::fs::read(&a).expect("it is there") == std::fs::read(&b).expect("it is there"));
        assert!(allocated(&b) <= USED + MIB, "{}: zeroes take no room", allocated(&b));
        assert_success(&moving.move_to(&c, &["--format", "qcow2", "--delete-source"]).await, &moving);
        assert!(!Path::new(&b).exists());
        let same = Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2", &a, &c]).status().await;
        assert!(same.expect("qemu-img is there").success());
        assert_success(&moving.alpha().vmferry(&["start", VM]).await.expect("vmferry runs"), &moving);
        let disk = moving.disk(0).await;
        assert_eq!((disk.file.as_str(), disk.format.as_deref()), (c.as_str(), Some("qcow2")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_while_it_copies_leaves_nothing_of_the_copy() {
    let mut moving = start(external(1, 1), as_drive).await;
    moving.kill_qemu(0).await;
    let to = moving.at("b.raw");
    let mut child = moving.begin_slow(&to).await;
    // Whoever asks a second time takes nothing away from the first.
    let again = moving.move_to(&moving.at("c.raw"), &[]).await;
    assert!(again.status.code() == Some(3) && text(&again).contains("being moved"), "{}", text(&again));
    assert!(Path::new(&to).exists());
    moving.bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    assert!(!child.wait().await.expect("it ends").success());
    assert!(Path::new(&to).exists());
    moving.bed.testbed.host_mut(0).start_agent().await.expect("it starts");
    assert!(!Path::new(&to).exists());
    assert_eq!(moving.disk(0).await.file, moving.at("a.raw"));
    assert_success(&moving.move_to(&to, &[]).await, &moving);
}
