//! VMs that do not run and move to another host with their disks: wherever an agent dies, exactly one host can start them.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_agent::journal::{Journal, MoveOut};
use vmferry_api::{VmMoveState, VmMoveView, VmView};
use vmferry_bench::testbed::{Host, Testbed, TestbedOptions};

use crate::bed::{VM, text};

const MIB: usize = 1 << 20;

/// Two hosts, each with images of its own at the same paths, and a VM on the first that does not run.
struct Hosts {
    testbed: Testbed,
}

fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

impl Hosts {
    /// With a disk of random bytes of this size, and more words on the VM's command line.
    async fn start(size: usize, more: &[&str]) -> Self {
        let options = TestbedOptions { own_images: true, ..TestbedOptions::new(env!("CARGO_BIN_EXE_vmferry")) };
        let hosts = Self { testbed: Testbed::start(options).await.expect("the testbed starts") };
        std::fs::write(hosts.disk(0), random(1, size)).expect("written");
        hosts.run(more).await;
        hosts.stop(0).await;
        hosts
    }

    async fn run(&self, more: &[&str]) {
        let drive = format!("file={},format=raw,if=virtio", self.path("disk.raw"));
        let words = ["run", VM, "--", "qemu-system-x86_64", "-m", "64", "-S", "-nodefaults", "-drive", &drive];
        self.done(0, &[&words[..], more].concat()).await;
    }

    async fn stop(&self, host: usize) {
        self.done(host, &["stop", VM, "--force", "--keep"]).await;
    }

    fn host(&self, host: usize) -> &Host {
        [self.testbed.alpha(), self.testbed.beta()][host]
    }

    /// An image as the hosts call it.
    fn path(&self, name: &str) -> String {
        self.testbed.images().join(name).display().to_string()
    }

    /// The same as it is found from outside.
    fn beside(&self, host: usize, name: &str) -> PathBuf {
        self.host(host).own_images.as_ref().expect("it has its own").join(name)
    }

    fn disk(&self, host: usize) -> PathBuf {
        self.beside(host, "disk.raw")
    }

    fn has(&self, host: usize) -> Option<Vec<u8>> {
        std::fs::read(self.disk(host)).ok()
    }

    async fn vmferry(&self, host: usize, words: &[&str]) -> Output {
        self.host(host).vmferry(words).await.expect("vmferry runs")
    }

    async fn done(&self, host: usize, words: &[&str]) -> String {
        let output = self.vmferry(host, words).await;
        assert!(output.status.success(), "{words:?}: {}\n{}", text(&output), self.logs());
        text(&output)
    }

    async fn refused(&self, host: usize, words: &[&str], code: i32, expected: &str) {
        let output = self.vmferry(host, words).await;
        let said = text(&output);
        assert!(output.status.code() == Some(code) && said.contains(expected), "{words:?}: {said}\n{}", self.logs());
    }

    /// Moves it away from this host.
    async fn moves(&self, host: usize, more: &[&str]) -> VmMoveView {
        let to = ["beta", "alpha"][host];
        let said = self.done(host, &[&["move", VM, "--to", to, "--json"], more].concat()).await;
        serde_json::from_str(said.lines().last().expect("it says something")).expect("a view")
    }

    async fn show(&self, host: usize) -> Option<VmView> {
        self.host(host).show(VM).await.expect("the agent answers")
    }

    async fn state(&self, host: usize) -> String {
        self.show(host).await.map_or_else(|| "absent".into(), |it| it.state)
    }

    async fn states(&self) -> [String; 2] {
        [self.state(0).await, self.state(1).await]
    }

    async fn eventually(&self, expected: [&str; 2]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let states = self.states().await;
            if states == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{states:?} instead of {expected:?}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// It is on this host, and can be started there and nowhere else, with its disk as it is to be.
    async fn assert_only_on(&self, host: usize, content: &[u8]) {
        let expected = if host == 0 { ["ended", "absent"] } else { ["absent", "ended"] };
        assert_eq!(self.states().await, expected, "{}", self.logs());
        assert!(self.has(host).as_deref() == Some(content), "its disk is as it was\n{}", self.logs());
        self.refused(1 - host, &["start", VM], 3, "there is no VM named").await;
        self.done(host, &["start", VM]).await;
        self.stop(host).await;
    }

    async fn restart(&mut self, host: usize) {
        self.testbed.host_mut(host).start_agent().await.expect("it starts");
    }

    async fn kill(&mut self, host: usize) {
        self.testbed.host_mut(host).kill_agent().await.expect("killed");
    }

    fn journal(&self, host: usize) -> Journal {
        Journal::open(&self.host(host).state_dir).expect("a journal").journal
    }

    fn logs(&self) -> String {
        format!("alpha:\n{}\nbeta:\n{}", self.testbed.alpha().agent_log(), self.testbed.beta().agent_log())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_does_not_run_moves_with_its_disks_and_back_with_what_has_changed() {
    let hosts = Hosts::start(20 * MIB, &[]).await;
    // A second disk, thin, with something behind it that both hosts have.
    let mut second = Vec::new();
    for host in [0, 1] {
        std::fs::write(hosts.beside(host, "base.raw"), random(2, MIB)).expect("written");
    }
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "base.raw"]);
    let created = create.arg(hosts.beside(0, "second.qcow2")).arg("1M").status().expect("qemu-img is there");
    assert!(created.success());
    let drive = format!("file={},if=virtio", hosts.path("second.qcow2"));
    hosts.run(&["-drive", &drive]).await;
    hosts.stop(0).await;
    hosts.done(0, &["autostart", VM, "on"]).await;
    second.extend(std::fs::read(hosts.beside(0, "second.qcow2")).expect("it is there"));
    let content = random(1, 20 * MIB);

    let plan = hosts.done(0, &["move", VM, "--to", "beta", "--dry-run"]).await;
    assert!(plan.contains("can move to beta") && plan.contains("disk.raw (raw, 20.0 MiB of 20.0 MiB"), "{plan}");
    assert_eq!(std::fs::read_dir(hosts.beside(1, "")).expect("a folder").count(), 1, "nothing was made");

    let moved = hosts.moves(0, &[]).await;
    assert!(moved.state == VmMoveState::Done && moved.disks.len() == 2 && moved.sent > 20 << 20, "{moved:?}");
    assert!(hosts.show(1).await.expect("it is there").autostart);
    hosts.assert_only_on(1, &content).await;
    assert!(std::fs::read(hosts.beside(1, "second.qcow2")).is_ok_and(|it| it.len() >= second.len()));
    assert!(hosts.has(0).as_deref() == Some(&content[..]), "its images stay");
    // Whoever asks again hears the same.
    let again = hosts.done(0, &["move", VM, "--to", "beta"]).await;
    assert!(again.contains("is on beta now"), "{again}");

    // Back, in place of what it has left.
    let mut changed = content.clone();
    changed[5 * MIB] ^= 1;
    std::fs::write(hosts.disk(1), &changed).expect("written");
    let back = hosts.moves(1, &[]).await;
    assert!(back.sent < 4 << 20, "{back:?}");
    hosts.assert_only_on(0, &changed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_one_that_does_not_run_gets_another_path_there() {
    let hosts = Hosts::start(2 * MIB, &[]).await;
    let there = format!("virtio0={}", hosts.path("new.raw"));
    hosts.refused(0, &["move", VM, "--to", "beta", "--disk", "vdb=/x"], 3, "web1 has no disk vdb").await;
    hosts.refused(0, &["move", VM, "--to", "beta", "--disk", &there, "--disk", &there], 2, "two places").await;
    hosts.refused(0, &["move", VM, "--to", "beta", "--disk", "virtio0=/etc/x"], 3, "in none of the folders").await;
    let moved = hosts.moves(0, &["--disk", &there]).await;
    assert_eq!(moved.disks[0].to, PathBuf::from(hosts.path("new.raw")));
    hosts.done(1, &["start", VM]).await;
    let argv = hosts.show(1).await.expect("it is there").argv.join(" ");
    assert!(argv.contains("new.raw") && !argv.contains("disk.raw"), "{argv}");
    hosts.stop(1).await;
    assert!(std::fs::read(hosts.beside(1, "new.raw")).is_ok_and(|it| it == random(1, 2 * MIB)));
    assert!(!hosts.disk(1).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_both_hosts_see_stay_where_they_are() {
    let options = TestbedOptions::new(env!("CARGO_BIN_EXE_vmferry"));
    let testbed = Testbed::start(options).await.expect("the testbed starts");
    let disk = testbed.images().join("disk.raw");
    std::fs::write(&disk, [0; 4096]).expect("written");
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let run = ["run", VM, "--", "qemu-system-x86_64", "-m", "64", "-S", "-drive", &drive];
    for words in [&run[..], &["stop", VM, "--force", "--keep"], &["move", VM, "--to", "beta"]] {
        let output = testbed.alpha().vmferry(words).await.expect("vmferry runs");
        assert!(output.status.success(), "{}", text(&output));
        assert!(!text(&output).contains("is copied"), "{}", text(&output));
    }
    assert!(testbed.alpha().show(VM).await.expect("answers").is_none());
    let output = testbed.beta().vmferry(&["start", VM]).await.expect("vmferry runs");
    assert!(output.status.success(), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_move_is_refused_before_anything_is_touched() {
    let hosts = Hosts::start(MIB, &[]).await;
    let to_beta = ["move", VM, "--to", "beta"];
    hosts.refused(0, &["move", "web2", "--to", "beta"], 3, "there is no VM named web2").await;
    hosts.refused(0, &["move", VM, "--to", "nobody"], 3, "nobody").await;
    hosts.done(0, &["start", VM]).await;
    hosts.refused(0, &to_beta, 3, "`vmferry migrate web1 --to HOST`").await;
    hosts.stop(0).await;
    // Its name is taken, by one that runs or does not.
    hosts.done(1, &["run", VM, "--", "qemu-system-x86_64", "-m", "64", "-S"]).await;
    hosts.refused(0, &to_beta, 3, "a VM named web1 exists on beta").await;
    hosts.stop(1).await;
    hosts.refused(0, &to_beta, 3, "a VM named web1 exists on beta").await;
    hosts.done(1, &["stop", VM]).await;
    // And the place of its disk.
    std::fs::write(hosts.disk(1), "another's").expect("written");
    hosts.refused(0, &to_beta, 3, "there is something at").await;
    assert!(hosts.has(1).as_deref() == Some(b"another's"));
    std::fs::remove_file(hosts.disk(1)).expect("removed");
    // A kernel that is not there.
    hosts.run(&["-machine", "pc", "-kernel", &hosts.path("disk.raw")]).await;
    hosts.stop(0).await;
    hosts.refused(0, &to_beta, 3, "there it cannot be read").await;
    assert_eq!(std::fs::read_dir(hosts.beside(1, "")).expect("a folder").count(), 0, "nothing was made");
    assert_eq!(hosts.states().await, ["ended", "absent"]);
}

/// Begins a move that takes a while, and waits until it is so far.
async fn begun(hosts: &Hosts, so_far: impl Fn(&VmMoveView) -> bool) -> tokio::process::Child {
    let words = ["move", VM, "--to", "beta", "--bandwidth", "16MiB/s"];
    let child = hosts.host(0).command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
    let client = hosts.host(0).client().expect("a client");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match client.get::<VmMoveView>(&format!("/v1/vms/{VM}/move")).await {
            Ok(view) if so_far(&view) => return child,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        assert!(Instant::now() < deadline, "{}", hosts.logs());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_holds_its_vm_and_goes_on_after_it_was_cancelled_or_its_agents_have_died() {
    let size = 48 * MIB;
    let mut hosts = Hosts::start(size, &[]).await;
    let content = random(1, size);
    let copying = |view: &VmMoveView| view.sent > 8 << 20;
    let mut child = begun(&hosts, copying).await;
    hosts.refused(0, &["start", VM], 3, "being started, or moved").await;
    hosts.refused(0, &["stop", VM], 3, "being started").await;
    hosts.refused(0, &["autostart", VM, "on"], 3, "being started, or moved").await;
    hosts.refused(0, &["move", VM, "--to", "beta"], 3, "is being moved to beta already").await;
    assert_eq!(hosts.states().await, ["ended", "arriving"]);
    hosts.refused(1, &["start", VM], 3, "has not come here from alpha yet").await;
    hosts.done(0, &["cancel", VM]).await;
    assert_eq!(child.wait().await.expect("it ends").code(), Some(130));
    // Here it is as it was, and can be started; not there.
    hosts.done(0, &["start", VM]).await;
    hosts.stop(0).await;
    for killed in [0, 1] {
        let mut child = begun(&hosts, |view| view.sent > 4 << 20).await;
        hosts.kill(killed).await;
        hosts.restart(killed).await;
        assert!(!child.wait().await.expect("it ends").success());
        hosts.eventually(["ended", "arriving"]).await;
        assert!(hosts.has(1).is_none(), "what is not whole has not its name");
        hosts.refused(1, &["start", VM], 3, "has not come here").await;
    }
    let moved = hosts.moves(0, &[]).await;
    assert!(moved.sent < 42 << 20, "it goes on from what was there: {moved:?}");
    hosts.assert_only_on(1, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_not_come_yet_can_be_given_up_where_it_was_to_go() {
    let hosts = Hosts::start(48 * MIB, &[]).await;
    let mut child = begun(&hosts, |view| view.sent > 4 << 20).await;
    hosts.done(0, &["cancel", VM]).await;
    child.wait().await.expect("it ends");
    hosts.done(1, &["stop", VM]).await;
    assert_eq!(std::fs::read_dir(hosts.beside(1, "")).expect("a folder").count(), 0, "nothing is left of it");
    hosts.assert_only_on(0, &random(1, 48 * MIB)).await;
}

/// A VM whose disk is at beta, which waits to take it, and whose agents are dead: what would be given is the answer.
async fn about_to_be_given() -> (Hosts, MoveOut) {
    let mut hosts = Hosts::start(24 * MIB, &[]).await;
    let mut child = begun(&hosts, |view| view.sent > 2 << 20).await;
    hosts.kill(0).await;
    child.wait().await.expect("it ends");
    hosts.restart(0).await;
    let target = format!("beta:{}", hosts.path("disk.raw"));
    hosts.done(0, &["copy", &hosts.path("disk.raw"), &target]).await;
    hosts.kill(0).await;
    hosts.kill(1).await;
    let [alpha, beta] = [0, 1].map(|host| hosts.journal(host));
    let record = alpha.vms().await.expect("read").remove(0);
    let coming = beta.moves_in().await.expect("read").remove(0);
    let peer = alpha.peers().await.expect("read").remove(0);
    let given = MoveOut {
        id: coming.id,
        vm: VM.into(),
        instance: record.instance,
        peer: peer.name,
        peer_key: peer.fingerprint,
        address: peer.address,
        disks: vec![hosts.path("disk.raw").into()],
        done: false,
    };
    (hosts, given)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_given_away_is_taken_whenever_the_agents_come_back() {
    let content = random(1, 24 * MIB);
    // Both died before it was taken; or afterwards, and nobody has heard of that.
    for is_taken in [false, true] {
        let (mut hosts, given) = about_to_be_given().await;
        hosts.journal(0).give_vm(&given).await.expect("written");
        if is_taken {
            let beta = hosts.journal(1);
            let coming = beta.move_in(given.id).await.expect("read").expect("it is there");
            let record = coming.record(&hosts.host(1).run_dir.join("vms").join(VM));
            assert!(beta.take_vm(given.id, &record).await.expect("written"));
        }
        hosts.restart(0).await;
        assert_eq!(hosts.state(0).await, "leaving");
        hosts.refused(0, &["start", VM], 3, "was given to beta, which has not said").await;
        hosts.refused(0, &["stop", VM, "--force"], 3, "was given to beta").await;
        hosts.restart(1).await;
        // The same command again waits for that.
        let said = hosts.done(0, &["move", VM, "--to", "beta"]).await;
        assert!(said.contains("is on beta now"), "{said}");
        hosts.assert_only_on(1, &content).await;
        // And back, in place of what it left here.
        let back = hosts.moves(1, &[]).await;
        assert!(back.sent < 1 << 20, "{back:?}");
        hosts.assert_only_on(0, &content).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_the_other_host_does_not_expect_or_that_its_user_keeps_is_here_again() {
    let content = random(1, 24 * MIB);
    let (mut hosts, given) = about_to_be_given().await;
    hosts.journal(0).give_vm(&MoveOut { id: Uuid::new_v4(), ..given.clone() }).await.expect("written");
    hosts.restart(1).await;
    hosts.restart(0).await;
    hosts.eventually(["ended", "arriving"]).await;
    hosts.done(1, &["stop", VM]).await;
    hosts.assert_only_on(0, &content).await;

    hosts.kill(1).await;
    hosts.kill(0).await;
    let instance = hosts.journal(0).vms().await.expect("read").remove(0).instance;
    hosts.journal(0).give_vm(&MoveOut { instance, ..given }).await.expect("written");
    hosts.restart(0).await;
    assert_eq!(hosts.state(0).await, "leaving");
    hosts.done(0, &["resolve", VM, "--keep-here", "--yes"]).await;
    hosts.restart(1).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    hosts.assert_only_on(0, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_an_agent_is_killed_one_host_can_start_it_and_the_same_command_goes_on() {
    let mut hosts = Hosts::start(2 * MIB, &[]).await;
    let content = random(1, 2 * MIB);
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..8 {
        let from = round % 2;
        let to = ["beta", "alpha"][from];
        let words = ["move", VM, "--to", to];
        let mut child =
            hosts.host(from).command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
        tokio::time::sleep(Duration::from_millis(random.u64(..400))).await;
        let killed = random.usize(..2);
        hosts.kill(killed).await;
        let other = hosts.state(1 - killed).await;
        hosts.restart(killed).await;
        child.wait().await.expect("it ends");
        let what = format!("seed {seed}, round {round}, killed {killed}, the other said {other}");
        hosts.done(from, &words).await;
        let [here, there] = [hosts.state(from).await, hosts.state(1 - from).await];
        assert_eq!([here.as_str(), there.as_str()], ["absent", "ended"], "{what}\n{}", hosts.logs());
        hosts.assert_only_on(1 - from, &content).await;
    }
}
