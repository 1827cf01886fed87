//! Two hosts, each with a libvirt of its own and an agent: mount, network, UTS and process namespaces with what libvirt
//! keeps below /run, /etc and /var in folders of the test's. The first process of each host reaps, and takes everything in
//! it along when it ends. Needs root, and Debian's libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients, whose
//! services need not run.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmferry_api::client::{Client, vm_path};
use vmferry_api::{MigrationEvent, MigrationView, PairRequest, PeerView, TokenRequest, TokenView, VmView};
use vmferry_bench::testbed::{GuestWatch, two_qemus};
use vmferry_bench::{GuestOptions, INITRD};

use crate::bed::text;

/// The domain of every test, and its UUID.
pub(crate) const DOMAIN: &str = "web1";
const UUID: &str = "9d7a4c1e-0000-4000-8000-000000000001";
/// Its RAM, in MiB.
const RAM_MIB: u64 = 320;
/// How long a daemon may take to serve.
const READY: Duration = Duration::from_secs(20);
/// Where guests boot from, and QEMU is, in each host.
const GUEST: &str = "/run/guest";
const ADDRESSES: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// The user of libvirt's QEMUs: known to the hosts, and nowhere else.
const QEMU_USER: u32 = 64055;

/// Arguments: the host's name, its number, its folder, QEMU's folder, the guest's files, the user of QEMUs.
const HOST: &str = r#"set -e
name=$1 number=$2 dir=$3 qemu=$4 guest=$5 user=$6
mount --make-rprivate /
hostname "$name"
ip link set lo up
mkdir -p "$dir/etc" "$dir/lib" "$dir/log" "$dir/cache"
# All of it: a file that is mounted over goes when somebody outside replaces it.
cp -a /etc/. "$dir/etc"
mount --bind "$dir/etc" /etc
mount -t tmpfs run /run
mount -t tmpfs shm /dev/shm
mkdir -p /run/lock /run/libvirt /run/qemu /run/guest /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
mount --bind "$qemu" /run/qemu
mount --bind "$dir/lib" /var/lib/libvirt
mount --bind "$dir/log" /var/log/libvirt
mount --bind "$dir/cache" /var/cache/libvirt
cp "$guest"/* /run/guest
mkdir -p /var/lib/libvirt/images
chown -R 64055:64055 /run/guest
echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin' >>/etc/passwd
echo 'libvirt-qemu:x:64055:' >>/etc/group
echo 'libvirt:x:64056:' >>/etc/group
mkdir -p /etc/libvirt/storage/autostart
cat >/etc/libvirt/storage/default.xml <<POOL
<pool type='dir'><name>default</name><uuid>0000000$number-1111-2222-3333-555555555555</uuid>
<target><path>/var/lib/libvirt/images</path></target></pool>
POOL
ln -sf /etc/libvirt/storage/default.xml /etc/libvirt/storage/autostart/default.xml
cat >/etc/libvirt/libvirtd.conf <<CONF
auth_unix_rw = "none"
host_uuid = "0000000$number-1111-2222-3333-444444444444"
log_filters = "4:util.netdev"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
CONF
cat >/etc/libvirt/qemu.conf <<CONF
user = "$user"
group = "$user"
cgroup_controllers = [ ]
stdio_handler = "file"
CONF
touch "$dir/ready"
while :; do
    sleep 3600 &
    wait $!
done
"#;

/// What differs between tests.
#[derive(Clone, Default)]
pub(crate) struct LabOptions {
    /// More lines of each agent's configuration.
    pub(crate) config: [&'static str; 2],
    /// What the link carries, in bits a second.
    pub(crate) link_bits: Option<u64>,
    /// QEMUs run as root.
    pub(crate) as_root: bool,
}

/// See the module's text.
pub(crate) struct Lab {
    pub(crate) hosts: [LabHost; 2],
    dir: tempfile::TempDir,
}

/// One host.
pub(crate) struct LabHost {
    name: &'static str,
    dir: PathBuf,
    first: Child,
    /// Its first process, as seen from outside.
    pid: u32,
    agent: Option<Child>,
    libvirtd: Option<Child>,
    others: Vec<Child>,
}

impl Drop for LabHost {
    fn drop(&mut self) {
        for child in [&mut self.agent, &mut self.libvirtd].into_iter().flatten().chain(&mut self.others) {
            // An error means that it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
        // Its first process goes with it, and takes along what is left: QEMUs.
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

impl LabHost {
    fn start(index: usize, dir: &Path, guest: &Path, qemu: &Path, as_root: bool) -> Self {
        let name = ["alpha", "beta"][index];
        let dir = dir.join(name);
        std::fs::create_dir(&dir).expect("created");
        let log = std::fs::File::create(dir.join("host.log")).expect("created");
        let mut first = Command::new("unshare");
        first.args([
            "--mount",
            "--net",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            HOST,
            "sh",
        ]);
        first.args([name, &(index + 1).to_string()]).args([dir.as_path(), qemu, guest]);
        first.arg(if as_root { "root" } else { "libvirt-qemu" });
        let first = first.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("unshare is there");
        let ready = dir.join("ready");
        let deadline = Instant::now() + READY;
        while !ready.exists() {
            let log = || std::fs::read_to_string(dir.join("host.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "{name} does not come up: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
        let children = format!("/proc/{0}/task/{0}/children", first.id());
        let pid = std::fs::read_to_string(children).expect("it has one");
        let pid = pid.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a pid");
        Self { name, dir, first, pid, agent: None, libvirtd: None, others: Vec::new() }
    }

    /// A program on this host.
    pub(crate) fn process(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--mount", "--net", "--uts", "--pid"]).arg(program);
        command.stdin(Stdio::null());
        command
    }

    fn daemon(&self, program: &str) -> Child {
        let log =
            std::fs::File::create(self.dir.join(format!("{}.out", program.rsplit('/').next().unwrap_or(program))));
        let log = log.expect("created");
        let mut command = self.process(program);
        command.stdout(Stdio::null()).stderr(log).spawn().expect("it is installed: scripts/setup.sh --for-tests")
    }

    /// Starts libvirt's daemon, and waits until it serves.
    pub(crate) fn start_libvirtd(&mut self) {
        self.libvirtd = Some(self.daemon("/usr/sbin/libvirtd"));
        let deadline = Instant::now() + READY;
        while !self.virsh(&["version"]).status.success() {
            assert!(Instant::now() < deadline, "libvirt of {} does not serve\n{}", self.name, self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it as a crash would. nsenter stands before it: what it has started is what is meant.
    pub(crate) fn kill_libvirtd(&mut self) {
        let mut killed = self.libvirtd.take().expect("it was started");
        let daemon = std::fs::read_to_string(self.inside("/run/libvirtd.pid")).expect("it has written it down");
        let ended = self.process("kill").args(["-KILL", daemon.trim()]).status().expect("kill is there");
        assert!(ended.success());
        let _ = killed.wait();
    }

    /// `virsh` with these arguments.
    pub(crate) fn virsh(&self, arguments: &[&str]) -> Output {
        self.process("virsh").args(["-c", "qemu:///system"]).args(arguments).output().expect("virsh is installed")
    }

    /// What it says, when it succeeds.
    pub(crate) fn virsh_says(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        assert!(output.status.success(), "virsh {arguments:?} on {}: {}\n{}", self.name, text(&output), self.logs());
        String::from_utf8_lossy(&output.stdout).trim().into()
    }

    /// How libvirt says that the domain stands; none when it has none that is active.
    pub(crate) fn state(&self) -> Option<String> {
        let output = self.virsh(&["domstate", DOMAIN]);
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success() && said != "shut off").then_some(said)
    }

    /// A path of this host, from outside.
    pub(crate) fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("run/agent.sock")
    }

    /// Starts its agent, and waits until it follows libvirt.
    pub(crate) async fn start_agent(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log"));
        let mut command = self.process(env!("CARGO_BIN_EXE_vmferry"));
        command.args(["agent", "--config"]).arg(self.dir.join("agent.toml"));
        let agent = command.stdout(Stdio::null()).stderr(log.expect("opened")).spawn().expect("vmferry runs");
        self.agent = Some(agent);
        let deadline = Instant::now() + READY;
        while self.client().get::<serde_json::Value>("/v1/host").await.is_err() {
            assert!(Instant::now() < deadline, "the agent of {} does not serve\n{}", self.name, self.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it as a crash would.
    pub(crate) fn kill_agent(&mut self) {
        let mut killed = self.agent.take().expect("it was started");
        // nsenter has become its parent, and ends when it has: a new agent finds nothing of it held any more.
        let children = format!("/proc/{0}/task/{0}/children", killed.id());
        let children = std::fs::read_to_string(children).unwrap_or_default();
        for child in children.split_whitespace() {
            let pid = child.parse().ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it lives");
        }
        if children.is_empty() {
            let _ = killed.kill();
        }
        let _ = killed.wait();
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.socket()).expect("a client")
    }

    /// `vmferry` with these arguments, on this host.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.process(env!("CARGO_BIN_EXE_vmferry"));
        command.env("VMFERRY_SOCKET", self.socket()).args(arguments);
        command
    }

    /// The same to its end.
    pub(crate) fn vmferry(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("vmferry runs")
    }

    /// A VM as its agent sees it.
    pub(crate) async fn show(&self, vm: &str) -> Option<VmView> {
        self.client().get(&vm_path(vm)).await.ok()
    }

    /// The last migration away from it, as its agent lists it.
    pub(crate) async fn last_migration(&self) -> MigrationView {
        let all: Vec<MigrationView> = self.client().get("/v1/migrations").await.expect("it answers");
        all.into_iter().next().expect("there is one")
    }

    pub(crate) fn logs(&self) -> String {
        let read = |file: &str| std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        let qemu = std::fs::read_to_string(self.dir.join(format!("log/qemu/{DOMAIN}.log"))).unwrap_or_default();
        let last = |text: String| {
            text.lines().rev().take(30).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        format!(
            "{}: agent\n{}\nlibvirtd\n{}\nQEMU\n{}\n",
            self.name,
            last(read("agent.log")),
            last(read("log/libvirtd.log")),
            last(qemu)
        )
    }
}

impl Lab {
    /// Both hosts, their libvirts and their agents, which are paired.
    pub(crate) async fn start(options: LabOptions) -> Self {
        let dir = tempfile::Builder::new().prefix("vmferry-libvirt-").tempdir().expect("a folder");
        // libvirt's QEMUs are nobody in particular.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).expect("changed");
        let guest = dir.path().join("guest");
        std::fs::create_dir(&guest).expect("created");
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
        std::fs::copy(target.join("guest/vmlinuz"), guest.join("vmlinuz")).expect("scripts/setup.sh has put it there");
        std::fs::write(guest.join("initrd.gz"), INITRD).expect("written");
        // Under TCG only the newer QEMU sees all that a guest writes.
        let qemu = two_qemus().expect("two QEMUs")[1].clone().map_or_else(
            || "/usr".into(),
            |bin| bin.parent().expect("it is in a folder").canonicalize().expect("it is there"),
        );
        let hosts = [0, 1].map(|index| LabHost::start(index, dir.path(), &guest, &qemu, options.as_root));
        let mut lab = Self { hosts, dir };
        lab.join(options.link_bits);
        for (index, host) in lab.hosts.iter_mut().enumerate() {
            let here = host.dir.display();
            let config = format!(
                "name = '{}'\nrun_dir = '{here}/run'\nstate_dir = '{here}/state'\nlisten = '{}:7420'\n{}\n",
                host.name, ADDRESSES[index], options.config[index]
            );
            std::fs::write(host.dir.join("agent.toml"), config).expect("written");
            host.others.push(host.daemon("/usr/sbin/virtlogd"));
            host.start_libvirtd();
            host.start_agent().await;
        }
        let token: TokenView =
            lab.beta().client().post("/v1/tokens", &TokenRequest { seconds: 60 }).await.expect("a token");
        let request = PairRequest { token: token.token, host: None };
        let _: PeerView = lab.alpha().client().post("/v1/peers", &request).await.expect("paired");
        lab
    }

    fn join(&self, bits: Option<u64>) {
        let [alpha, beta] = [&self.hosts[0], &self.hosts[1]];
        let run = |host: &LabHost, line: &str| {
            let mut words = line.split(' ');
            let output = host.process(words.next().expect("a program")).args(words).output().expect("it runs");
            assert!(output.status.success(), "{line}: {}", text(&output));
        };
        // Made from outside the hosts' processes: there the other host's pid means nothing.
        let veth = format!("link add link0 type veth peer name link0 netns {}", beta.pid);
        let mut command = Command::new("nsenter");
        command.args(["--target", &alpha.pid.to_string(), "--net", "ip"]).args(veth.split(' '));
        let output = command.output().expect("ip is there");
        assert!(output.status.success(), "{veth}: {}", text(&output));
        for (host, address) in self.hosts.iter().zip(ADDRESSES) {
            run(host, &format!("ip address add {address}/24 dev link0"));
            run(host, "ip link set link0 up");
            if let Some(bits) = bits {
                run(host, &format!("tc qdisc add dev link0 root tbf rate {bits}bit burst 256kb latency 50ms"));
            }
        }
    }

    pub(crate) fn alpha(&self) -> &LabHost {
        &self.hosts[0]
    }

    pub(crate) fn beta(&self) -> &LabHost {
        &self.hosts[1]
    }

    /// A folder that both hosts see.
    pub(crate) fn shared_folder(&self) -> PathBuf {
        let folder = self.dir.path().join("shared");
        std::fs::create_dir_all(&folder).expect("created");
        own(&folder);
        folder
    }

    pub(crate) fn logs(&self) -> String {
        self.hosts.iter().map(LabHost::logs).collect()
    }

    /// Defines and starts the domain on alpha, with these devices more, and waits until its guest writes.
    pub(crate) async fn start_domain(&self, guest: &GuestOptions, kernel_words: &str, devices: &str) -> GuestWatch {
        let words = format!("{} {kernel_words}", guest.kernel_command_line());
        let xml = format!(
            "<domain type='qemu'><name>{DOMAIN}</name><uuid>{UUID}</uuid><memory unit='MiB'>{RAM_MIB}</memory>
             <vcpu>2</vcpu><os><type arch='x86_64' machine='pc'>hvm</type><kernel>{GUEST}/vmlinuz</kernel>
             <initrd>{GUEST}/initrd.gz</initrd><cmdline>{words}</cmdline></os><features><acpi/><apic/></features>
             <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
             <devices><emulator>/run/qemu/bin/qemu-system-x86_64</emulator>{devices}
             <serial type='unix'><source mode='bind' path='{GUEST}/serial'/><target port='0'/></serial>
             <memballoon model='none'/></devices></domain>"
        );
        let path = self.dir.path().join("web1.xml");
        std::fs::write(&path, xml).expect("written");
        self.alpha().virsh_says(&["define", &path.display().to_string()]);
        self.alpha().virsh_says(&["start", DOMAIN]);
        let mut watch = GuestWatch::new();
        self.listen(&mut watch, 0).await;
        let ready =
            watch.wait("the guest", Duration::from_secs(60), |log| log.ready().is_some() && log.beats().len() > 20);
        ready.await.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
        watch
    }

    /// Defines and starts a domain of this name on alpha that gets no further than its firmware.
    pub(crate) fn start_without_guest(&self, name: &str) {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
             <devices><emulator>/run/qemu/bin/qemu-system-x86_64</emulator><memballoon model='none'/></devices></domain>"
        );
        let path = self.dir.path().join(format!("{name}.xml"));
        std::fs::write(&path, xml).expect("written");
        self.alpha().virsh_says(&["define", &path.display().to_string()]);
        self.alpha().virsh_says(&["start", name]);
    }

    /// Hears what the guest says on this host, as soon as its QEMU is there.
    pub(crate) async fn listen(&self, watch: &mut GuestWatch, host: usize) {
        let socket = self.hosts[host].inside(&format!("{GUEST}/serial"));
        let deadline = Instant::now() + Duration::from_secs(30);
        while watch.follow_socket(host, &socket).await.is_err() {
            assert!(Instant::now() < deadline, "the guest is not on {}\n{}", self.hosts[host].name, self.logs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// `vmferry migrate web1 --to beta --json` with more arguments, on alpha, as soon as it says this.
    pub(crate) fn begin(&self, more: &[&str], so_far: impl Fn(&MigrationEvent) -> bool) -> Carried {
        let arguments: Vec<&str> = ["migrate", DOMAIN, "--to", "beta", "--json"].iter().chain(more).copied().collect();
        let mut command = self.alpha().command(&arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmferry runs");
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
        loop {
            let Some(line) = lines.next() else {
                let output = child.wait_with_output().expect("it ends");
                panic!("it ended before it came so far: {}\n{}", text(&output), self.logs());
            };
            let line = line.expect("readable");
            if so_far(&serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))) {
                break;
            }
        }
        let rest = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>().join("\n"));
        Carried { child, rest }
    }

    /// By libvirt's own word it runs on this host and is not on the other, and the guest's heart beats there.
    pub(crate) async fn assert_runs_only_on(&self, host: usize, watch: &GuestWatch) {
        let [state, other] = [&self.hosts[host], &self.hosts[1 - host]].map(LabHost::state);
        assert_eq!((state.as_deref(), other), (Some("running"), None), "{}", self.logs());
        let from = Instant::now();
        let beats = |log: &vmferry_bench::GuestLog| log.beats().iter().filter(|beat| beat.at > from).count();
        let beating = watch.wait("the guest's heart", Duration::from_secs(10), |log| beats(log) > 20);
        beating.await.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
        let log = watch.log();
        assert!(!log.restarted(), "the guest's kernel crashed and rebooted");
        assert!(log.beats().iter().filter(|beat| beat.at > from).all(|beat| beat.host == host), "it beats elsewhere");
    }

    /// Every page is as the guest wrote it.
    pub(crate) async fn assert_intact(&self, host: usize, watch: &GuestWatch, at_least: u64) {
        let (pages, corrupt) = watch.verify(host).await.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
        let log = watch.log();
        assert!(corrupt == 0 && log.corrupt().is_empty(), "{corrupt} of {pages} pages: {:?}", log.corrupt());
        assert!(pages >= at_least, "only {pages} pages were verified");
    }

    /// Waits until this is so.
    pub(crate) async fn eventually<F: Future<Output = bool>>(&self, what: &str, mut is_so: impl FnMut() -> F) {
        let deadline = Instant::now() + Duration::from_secs(40);
        while !is_so().await {
            assert!(Instant::now() < deadline, "not within 40 s: {what}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Nothing is left of a migration's sockets on either host, or will be in a moment.
    pub(crate) async fn assert_no_sockets(&self) {
        let left = |host: &LabHost| std::fs::read_dir(host.inside("/run/libvirt/vmferry")).map_or(0, Iterator::count);
        self.eventually("no sockets are left", async || self.hosts.iter().all(|host| left(host) == 0)).await;
    }
}

/// A migration that somebody looks at.
pub(crate) struct Carried {
    child: Child,
    rest: std::thread::JoinHandle<String>,
}

impl Carried {
    /// How it ends, and what it said since it came so far.
    pub(crate) fn wait(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().expect("it ends");
        let said = self.rest.join().expect("it reads to the end");
        (output.status.code(), format!("{said}\n{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// For a folder of images that only QEMU's user may write to.
pub(crate) fn own(path: &Path) {
    std::os::unix::fs::chown(path, Some(QEMU_USER), Some(QEMU_USER)).expect("root may");
}
