//! Disks that move to Ceph, which QEMU speaks to itself, while their guest writes and reads them all the time.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use vmferry_bench::testbed::TestbedOptions;

use crate::bed::{VM, assert_success, external, text};
use crate::disk_move::{SIZE, as_nodes, start};
use crate::storages::assert_moves_and_starts_again_from;

/// A Ceph of one monitor and one OSD, which keeps in memory what is in it.
struct Ceph {
    /// In the order in which they are killed.
    servers: Vec<Child>,
    conf: PathBuf,
    /// A folder with a QEMU that finds this Ceph, as others that tests run find none.
    qemu: PathBuf,
}

impl Ceph {
    const PLACE: &str = "rbd:rbd/moved-web1";

    fn serve(folder: &Path) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
        let (fsid, osd) = ("aae5e6b6-5a3c-4f0c-9a3c-2c6f3c1d9a10", "aae5e6b6-5a3c-4f0c-9a3c-2c6f3c1d9a11");
        let conf = folder.join("ceph.conf");
        let at = folder.display();
        let words = format!(
            "[global]\nfsid = {fsid}\nmon host = v2:{free}\npublic addr = 127.0.0.1\ncluster addr = 127.0.0.1\n\
             ms bind msgr1 = false\nauth cluster required = none\nauth service required = none\n\
             auth client required = none\nrun dir = {at}\nadmin socket =\nlog file = {at}/$name.log\n\
             mon cluster log file = {at}/cluster.log\nrados mon op timeout = 15\n\
             mon data = {at}/mon\nmon data avail crit = 1\npaxos propose interval = 0.05\npaxos min wait = 0.01\n\
             osd data = {at}/osd\nosd objectstore = memstore\nosd pool default size = 1\n\
             osd crush chooseleaf type = 0\nosd mclock skip benchmark = true\n\
             # A guest that was killed holds its image for so long, in seconds.\nosd client watch timeout = 3\n"
        );
        std::fs::write(&conf, words).expect("written");
        for name in ["mon", "osd", "qemu"] {
            std::fs::create_dir(folder.join(name)).expect("made");
        }
        let mut ceph = Self { servers: Vec::new(), conf, qemu: folder.join("qemu") };
        let map = folder.join("monmap").display().to_string();
        let monitor = format!("[v2:{free}]");
        ceph.run(
            "monmaptool",
            &["--create", "--fsid", fsid, "--set-min-mon-release", "pacific", "--addv", "a", &monitor, &map],
        );
        ceph.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map]);
        ceph.start("ceph-mon", &["-f", "-i", "a"]);
        // Each waits for what it needs.
        ceph.run("ceph", &["--connect-timeout", "15", "osd", "new", osd]);
        ceph.run("ceph-osd", &["--mkfs", "-i", "0", "--osd-uuid", osd]);
        ceph.start("ceph-osd", &["-f", "-i", "0"]);
        ceph.run("ceph", &["osd", "pool", "create", "rbd", "1"]);
        ceph.run("rbd", &["create", Self::PLACE.trim_start_matches("rbd:"), "--size", &format!("{SIZE}B")]);
        let script =
            format!("#!/bin/sh\nexport CEPH_CONF={}\nexec /usr/bin/qemu-system-x86_64 \"$@\"\n", ceph.conf.display());
        let qemu = ceph.qemu.join("qemu-system-x86_64");
        std::fs::write(&qemu, script).expect("written");
        std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755)).expect("executable");
        ceph
    }

    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).env("CEPH_CONF", &self.conf).env_remove("CEPH_ARGS");
        command
    }

    fn run(&self, program: &str, words: &[&str]) {
        let output = self.command(program, words).output().expect("scripts/setup.sh has installed it");
        assert!(output.status.success(), "{program} {words:?}: {}", text(&output));
    }

    fn start(&mut self, program: &str, words: &[&str]) {
        let server = self.command(program, words).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.servers.insert(0, server.expect("scripts/setup.sh has installed it"));
    }

    /// Hosts whose QEMU finds it.
    fn hosts(&self) -> TestbedOptions {
        TestbedOptions { qemu_dirs: [Some(self.qemu.clone()), Some(self.qemu.clone())], ..external(0, 0) }
    }

    /// Its monitor answers nobody any more.
    fn falls_silent(&self) {
        let monitor = self.servers.last().expect("it was started first").id();
        let pid = rustix::process::Pid::from_raw(monitor.cast_signed()).expect("it runs");
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("it is ours");
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        // Nothing that it has is to be kept.
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_ceph_and_its_guest_starts_again_from_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let ceph = Ceph::serve(folder.path());
    assert_moves_and_starts_again_from(|| ceph.hosts(), Ceph::PLACE, Ceph::PLACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_ceph_not_onto_itself_its_guest_migrates_and_it_moves_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let ceph = Ceph::serve(folder.path());
    let moving = start(ceph.hosts(), as_nodes).await;
    let moved = moving.move_to(Ceph::PLACE, &[]).await;
    assert_success(&moved, &moving);
    moving.assert_disk_works_on(0).await;
    for again in [Ceph::PLACE, "rbd:rbd/moved-web1:id=admin"] {
        let refused = moving.move_to(again, &[]).await;
        assert!(refused.status.code() == Some(3) && text(&refused).contains("already"), "{}", text(&refused));
    }
    assert_success(&moving.migrate(&[]).await, &moving);
    moving.assert_runs_only_on(1).await;
    moving.assert_disk_works_on(1).await;
    let back = folder.path().join("back.raw").display().to_string();
    // Nothing is written meanwhile, so that both are the same afterwards.
    let on_beta = async |words: &[&str]| moving.beta().vmferry(words).await.expect("vmferry runs");
    assert_success(&on_beta(&["pause", VM]).await, &moving);
    assert_success(&on_beta(&["disk", "move", VM, Ceph::PLACE, "--to", &back]).await, &moving);
    ceph.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", Ceph::PLACE, &back]);
    assert_success(&on_beta(&["resume", VM]).await, &moving);
    moving.assert_disk_works_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ceph_that_does_not_answer_is_found_out_without_the_guest() {
    let folder = tempfile::tempdir().expect("a folder");
    let ceph = Ceph::serve(folder.path());
    let moving = start(ceph.hosts(), as_nodes).await;
    ceph.falls_silent();
    let refused = moving.move_to(Ceph::PLACE, &[]).await;
    assert!(refused.status.code() == Some(4), "{}", text(&refused));
    assert!(text(&refused).contains("did not answer within 10s"), "{}", text(&refused));
    moving.assert_never_stopped().await;
    moving.assert_disk_works_on(0).await;
}
