//! Disks that move to storage that QEMU speaks to itself, while their guest writes and reads them all the time.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmferry_bench::testbed::TestbedOptions;

use crate::bed::{VM, assert_success, external};
use crate::disk_move::{SIZE, as_drive, as_nodes, start};

/// Longer than any server takes to start.
const PATIENCE: Duration = Duration::from_secs(15);

/// The disk moves to this place, as QEMU shows it; the guest goes on, and starts again from there.
pub(crate) async fn assert_moves_and_starts_again_from(hosts: impl Fn() -> TestbedOptions, url: &str, shown: &str) {
    for words in [as_drive as fn(&Path) -> Vec<String>, as_nodes] {
        let moving = start(hosts(), words).await;
        let moved = moving.move_to(url, &[]).await;
        assert_success(&moved, &moving);
        moving.assert_disk_works_on(0).await;
        let disk = moving.disk(0).await;
        assert!(disk.file.contains(shown) && disk.size == Some(SIZE), "{disk:?}");
        moving.kill_qemu(0).await;
        assert!(moving.disk(0).await.file.contains(shown));
        assert_success(&moving.alpha().vmferry(&["start", VM]).await.expect("vmferry runs"), &moving);
        assert_eq!(moving.disk(0).await.file, disk.file);
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn image(path: &Path) {
    std::fs::File::create(path).and_then(|file| file.set_len(SIZE)).expect("written");
}

/// An iSCSI server with one LUN.
struct Lun {
    server: Child,
    socket: PathBuf,
    url: String,
}

impl Lun {
    const TARGET: &str = "iqn.2026-11.org.example:web1";

    fn serve(folder: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
        let socket = folder.join("tgt");
        let mut command = Command::new("tgtd");
        command.args(["-f", "--iscsi", &format!("portal={free}")]).env("TGT_IPC_SOCKET", &socket);
        let server =
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("scripts/setup.sh has installed tgtd");
        let lun = Self { server, socket, url: format!("iscsi://{free}/{}/1", Self::TARGET) };
        let file = folder.join("lun.raw");
        image(&file);
        until("tgtd does not answer", || {
            lun.admin(&["--op", "new", "--mode", "target", "--tid", "1", "-T", Self::TARGET])
        });
        let file = file.display().to_string();
        assert!(lun.admin(&["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", &file]));
        assert!(lun.admin(&["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"]));
        lun
    }

    fn admin(&self, words: &[&str]) -> bool {
        let mut command = Command::new("tgtadm");
        command.args(["--lld", "iscsi"]).args(words).env("TGT_IPC_SOCKET", &self.socket);
        command.stderr(Stdio::null()).status().is_ok_and(|it| it.success())
    }
}

impl Drop for Lun {
    fn drop(&mut self) {
        // It waits for its initiators otherwise.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_iscsi_and_its_guest_starts_again_from_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let lun = Lun::serve(folder.path());
    assert_moves_and_starts_again_from(|| external(0, 0), &lun.url, Lun::TARGET).await;
}

/// An NFS server on a host of its own, a network namespace, since its ports are those that it has everywhere.
struct Export {
    server: Child,
    namespace: String,
    url: String,
}

/// The server and the portmapper that it needs, with folders of their own for what they keep.
const SERVER: &str = "mount -t tmpfs none /run && mkdir -p /run/ganesha /run/rpcbind && ip link set lo up && \
    { rpcbind -f & exec ganesha.nfsd -F -f \"$0/ganesha.conf\" -L \"$0/log\" -p /run/ganesha/pid; }";

impl Export {
    fn serve(folder: &Path) -> Self {
        let exported = folder.join("exported");
        std::fs::create_dir(&exported).expect("made");
        image(&exported.join("web1.raw"));
        let configuration = format!(
            "NFS_CORE_PARAM {{ Enable_NLM = false; Enable_RQUOTA = false; }}\n\
             EXPORT {{ Export_Id = 1; Path = {0}; Pseudo = /vms; Access_Type = RW; Squash = No_Root_Squash; \
             SecType = sys; FSAL {{ Name = VFS; }} }}\n",
            exported.display()
        );
        std::fs::write(folder.join("ganesha.conf"), configuration).expect("written");
        let number = std::process::id();
        let (namespace, link) = (format!("vmferry-nfs-{number}"), format!("nfs{number}"));
        ip(&format!("netns add {namespace}"));
        ip(&format!("link add {link} type veth peer name link0 netns {namespace}"));
        ip(&format!("address add 198.51.100.1/30 dev {link}"));
        ip(&format!("link set {link} up"));
        ip(&format!("-n {namespace} address add 198.51.100.2/30 dev link0"));
        ip(&format!("-n {namespace} link set link0 up"));
        let mut command = Command::new("ip");
        // All of them end when this does.
        let apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SERVER];
        command.args(["netns", "exec", &namespace]).args(apart).arg(folder);
        let server = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("ip is there");
        let url = format!("nfs://198.51.100.2{}/web1.raw", exported.display());
        let export = Self { server, namespace, url };
        until("the NFS server (scripts/setup.sh has installed it) does not answer", || {
            Command::new("qemu-img").args(["info", &export.url]).output().is_ok_and(|output| output.status.success())
        });
        export
    }
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status();
    assert!(status.is_ok_and(|it| it.success()), "ip {words}");
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        // The link goes with it.
        let _ = Command::new("ip").args(["netns", "delete", &self.namespace]).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_to_nfs_and_its_guest_starts_again_from_there() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make a host for the server");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let export = Export::serve(folder.path());
    assert_moves_and_starts_again_from(|| external(0, 0), &export.url, "exported/web1.raw").await;
}
