//! Two hosts on one machine, each with an agent: what the demo, the tests and the benchmarks run on.
//!
//! As root, each host is a network namespace and a veth pair joins them, shaped by `tc tbf` when a rate is given;
//! otherwise both live on the loopback address with a port each. Everything that a testbed starts or makes ends with
//! it: agents, QEMUs, namespaces, mounts, files.

pub(crate) mod network;
mod small_folder;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use network::Network;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::{Child, Command};
use vmferry_api::client::{Client, ClientError, vm_path};
use vmferry_api::{
    EngineName, PairRequest, PeerView, RunRequest, Started, StopRequest, TokenRequest, TokenView, VmView,
};

use crate::{BARE_GUEST, GuestKind, GuestLog, GuestOptions, Hardware, INITRD};
use small_folder::SmallFolder;

/// What QEMU 10.0 says when it ends in a race of its own: under TCG, with several processors, while its guest places its
/// devices in memory. It says nothing about vmferry; the guest is started again.
const QEMUS_OWN_RACE: &str = "iotlb_to_section: Assertion";
/// How often a guest is started until that counts, too.
const BOOTS: usize = 4;
/// How long an agent may take to be ready.
const AGENT_START: Duration = Duration::from_secs(20);
/// How long a guest may take to boot and fill its memory.
pub(crate) const GUEST_START: Duration = Duration::from_secs(60);

/// Why a testbed could not be set up, or something on it did not work.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// A command of the host failed.
    #[error("`{command}` failed: {stderr}")]
    Command {
        /// What was run.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// Something that the testbed needs is missing.
    #[error("{what} is missing: {hint}")]
    Missing {
        /// What.
        what: String,
        /// Where it comes from.
        hint: &'static str,
    },
    /// An agent or guest was not ready in time.
    #[error("{what} was not ready within {} s: {detail}", after.as_secs())]
    Late {
        /// What.
        what: String,
        /// The time it had.
        after: Duration,
        /// What is known about it.
        detail: String,
    },
    /// A guest ended instead of starting.
    #[error("{vm} ended while it was starting: {detail}")]
    Ended {
        /// The VM.
        vm: String,
        /// Its QEMU's last words.
        detail: String,
    },
    /// An agent refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An input or output error.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

type Result<T> = std::result::Result<T, TestbedError>;

/// How to set a testbed up.
#[derive(Clone, Debug)]
pub struct TestbedOptions {
    /// The `vmferry` binary.
    pub vmferry: PathBuf,
    /// Hosts in namespaces; needs root.
    pub namespaces: bool,
    /// Hosts in namespaces with no other addresses than link-local ones of IPv6.
    pub link_local: bool,
    /// What the link between the namespaces carries, in bits a second; as fast as it can when absent.
    pub link_bits: Option<u64>,
    /// A folder searched for QEMU before `PATH`, for each host.
    pub qemu_dirs: [Option<PathBuf>; 2],
    /// The RAM engine that is used; the usual one, when absent.
    pub engine: Option<EngineName>,
    /// More lines for each host's configuration.
    pub config: [String; 2],
    /// The hosts trust each other from the start.
    pub paired: bool,
    /// Each agent's state folder is a file system of its own with little space, which can be filled; needs root.
    pub small_state: bool,
    /// Each host has images of its own in [`Testbed::images`]; needs root.
    pub own_images: bool,
}

impl TestbedOptions {
    /// Hosts on the loopback address, with the system's QEMU.
    pub fn new(vmferry: impl Into<PathBuf>) -> Self {
        Self {
            vmferry: vmferry.into(),
            namespaces: false,
            link_local: false,
            link_bits: None,
            qemu_dirs: [None, None],
            engine: None,
            config: [String::new(), String::new()],
            paired: true,
            small_state: false,
            own_images: false,
        }
    }
}

/// See the module's text.
pub struct Testbed {
    // In the order in which they must end: agents, then QEMUs, then what they stand on.
    hosts: [Host; 2],
    network: Network,
    /// Held for their `Drop`.
    _small_folders: Vec<SmallFolder>,
    dir: tempfile::TempDir,
}

/// One host.
pub struct Host {
    /// What it calls itself: `alpha` or `beta`.
    pub name: &'static str,
    /// Where its agent serves others.
    pub address: std::net::SocketAddr,
    /// Its agent's socket.
    pub socket: PathBuf,
    /// Its agent's run folder.
    pub run_dir: PathBuf,
    /// Its agent's state folder.
    pub state_dir: PathBuf,
    config: PathBuf,
    log: PathBuf,
    vmferry: PathBuf,
    /// What a command on this host starts with.
    enter: Vec<String>,
    /// Where its images are, seen from outside, if it has its own.
    pub own_images: Option<PathBuf>,
    agent: Option<Child>,
}

impl Testbed {
    /// Sets both hosts up and starts their agents.
    pub async fn start(options: TestbedOptions) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vmferry-").tempdir()?;
        std::fs::write(dir.path().join("initrd.gz"), INITRD)?;
        std::fs::write(dir.path().join("bare.elf"), BARE_GUEST)?;
        let network = Network::set_up(options.namespaces, options.link_local, options.link_bits)?;
        let host = |index: usize, name: &'static str| Host::new(index, name, dir.path(), &options, &network);
        let hosts = [host(0, "alpha")?, host(1, "beta")?];
        let small = hosts.iter().filter(|_| options.small_state);
        let small_folders = small.map(|host| SmallFolder::mount(&host.state_dir)).collect::<Result<_>>()?;
        let mut testbed = Self { hosts, network, _small_folders: small_folders, dir };
        for host in &mut testbed.hosts {
            host.start_agent().await?;
        }
        if options.paired {
            testbed.pair().await?;
        }
        Ok(testbed)
    }

    /// Makes the hosts trust each other.
    pub async fn pair(&self) -> Result<()> {
        let token: TokenView = self.beta().client()?.post("/v1/tokens", &TokenRequest { seconds: 60 }).await?;
        let request = PairRequest { token: token.token, host: None };
        let _: PeerView = self.alpha().client()?.post("/v1/peers", &request).await?;
        Ok(())
    }

    /// The host that VMs start on.
    pub fn alpha(&self) -> &Host {
        &self.hosts[0]
    }

    /// The other one.
    pub fn beta(&self) -> &Host {
        &self.hosts[1]
    }

    /// A host, to start or kill its agent.
    pub fn host_mut(&mut self, index: usize) -> &mut Host {
        &mut self.hosts[index]
    }

    /// A folder that goes with the testbed.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the hosts' agents and QEMUs find images, if each has its own: the same path on both.
    pub fn images(&self) -> PathBuf {
        images(self.dir.path())
    }

    /// What the hosts are joined by.
    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    /// The link between the hosts stops carrying anything, or carries again. Only with namespaces.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.network.set_link(up)
    }

    /// A QEMU command line for the measuring guest, with RAM to spare for its kernel.
    pub fn guest_command_line(&self, guest: &GuestOptions, ram_mib: u64, vcpus: u32) -> Result<Vec<String>> {
        let kernel = kernel()?;
        let initrd = self.dir.path().join("initrd.gz");
        let words = format!(
            "qemu-system-x86_64 -machine q35 -cpu max -smp {vcpus} -m {ram_mib} -serial stdio -kernel {} -initrd {} -append",
            kernel.display(),
            initrd.display()
        );
        Ok(words.split(' ').map(str::to_owned).chain([guest.kernel_command_line()]).collect())
    }

    /// A QEMU command line for the measuring guest that needs no kernel, under KVM.
    pub fn bare_guest_command_line(&self, guest: &GuestOptions, ram_mib: u64) -> Vec<String> {
        let words =
            format!("qemu-system-x86_64 -machine q35 -accel kvm -m {ram_mib} -vga none -nic none -serial stdio");
        let elf = self.dir.path().join("bare.elf").display().to_string();
        words.split(' ').map(str::to_owned).chain(guest.boot_words(GuestKind::Bare, "", &elf)).collect()
    }

    /// Starts a measuring guest on the first host and waits until it writes.
    pub async fn start_guest(&self, name: &str, argv: Vec<String>) -> Result<GuestWatch> {
        Ok(self.start_guest_and_hear(name, argv).await?.0)
    }

    /// The same, and what the agent has to say about it, such as that there is no KVM.
    pub async fn start_guest_and_hear(&self, name: &str, argv: Vec<String>) -> Result<(GuestWatch, Vec<String>)> {
        let cwd = self.dir.path().to_owned();
        let request = RunRequest { name: name.into(), argv, cwd, measuring: false, autostart: false };
        for _ in 1..BOOTS {
            match self.boot(&request).await {
                Err(TestbedError::Ended { detail, .. }) if detail.contains(QEMUS_OWN_RACE) => {
                    let force = StopRequest { force: true, keep: false, timeout_ms: 0 };
                    self.alpha().client()?.tell(&format!("{}/stop", vm_path(name)), &force).await?;
                }
                booted => return booted,
            }
        }
        self.boot(&request).await
    }

    async fn boot(&self, request: &RunRequest) -> Result<(GuestWatch, Vec<String>)> {
        let started: Started = self.alpha().client()?.post("/v1/vms", request).await?;
        let watch = self.watch(&request.name)?;
        tokio::select! {
            started = watch.wait_for_start() => started?,
            error = self.end_of(&request.name) => return Err(error),
        }
        Ok((watch, started.notes))
    }

    /// Waits until the QEMU of a VM on the first host has ended, or the VM is gone.
    async fn end_of(&self, name: &str) -> TestbedError {
        loop {
            let detail = match self.alpha().show(name).await {
                Ok(Some(view)) if view.state != "ended" => None,
                Ok(view) => Some(view.and_then(|view| view.detail).unwrap_or_else(|| "it is gone".into())),
                Err(error) => return error,
            };
            if let Some(detail) = detail {
                return TestbedError::Ended { vm: name.into(), detail };
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Follows a guest's console on whichever host it is.
    pub fn watch(&self, name: &str) -> Result<GuestWatch> {
        let log = Arc::new(Mutex::new(GuestLog::new()));
        let mut input = Vec::new();
        let mut followers = Vec::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let (sender, typed) = tokio::sync::mpsc::channel(4);
            input.push(sender);
            followers.push(tokio::spawn(follow(host.client()?, name.into(), index, Arc::clone(&log), typed)));
        }
        Ok(GuestWatch { log, input, followers, delay: Duration::ZERO })
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            host.end_agent_now();
        }
        end_processes_of(self.dir.path());
    }
}

impl Host {
    fn new(index: usize, name: &'static str, dir: &Path, options: &TestbedOptions, network: &Network) -> Result<Self> {
        let run_dir = dir.join(name);
        let state_dir = dir.join(format!("{name}-state"));
        let config = dir.join(format!("{name}.toml"));
        let qemu_dirs: Vec<String> =
            options.qemu_dirs[index].iter().map(|dir| format!("{:?}", dir.display().to_string())).collect();
        let text = format!(
            "name = {name:?}\nlibvirt.enabled = false\nimage_folders = [{:?}]\nrun_dir = {:?}\nstate_dir = {:?}\nqemu_dirs = [{}]\n{}{}\n",
            images(dir).display().to_string(),
            run_dir.display().to_string(),
            state_dir.display().to_string(),
            qemu_dirs.join(", "),
            options.engine.map_or_else(String::new, |engine| format!("engine = \"{engine}\"\n")),
            options.config[index]
        );
        std::fs::write(&config, text)?;
        let own_images = options.own_images.then(|| dir.join(format!("{name}-images")));
        for folder in own_images.iter().chain([&images(dir)]) {
            std::fs::create_dir_all(folder)?;
        }
        Ok(Self {
            own_images,
            name,
            address: network.address(index)?,
            socket: run_dir.join("agent.sock"),
            run_dir,
            state_dir,
            config,
            log: dir.join(format!("{name}.log")),
            vmferry: options.vmferry.clone(),
            enter: network.enter(index),
            agent: None,
        })
    }

    /// Starts the host's agent and waits until it serves.
    pub async fn start_agent(&mut self) -> Result<()> {
        self.spawn_agent()?;
        let client = self.client()?;
        let deadline = Instant::now() + AGENT_START;
        while client.get::<serde_json::Value>("/v1/host").await.is_err() {
            if Instant::now() > deadline || !self.agent_lives() {
                let what = format!("the agent of {}", self.name);
                return Err(TestbedError::Late { what, after: AGENT_START, detail: self.agent_log() });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Starts the host's agent and does not wait for it.
    pub fn spawn_agent(&mut self) -> Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let address = self.address.to_string();
        let mut command = match &self.own_images {
            None => self.process(&self.vmferry),
            Some(own) => {
                let mut command = self.process(Path::new("unshare"));
                let script = "mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"";
                command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
                command.arg(own).arg(images(self.config.parent().unwrap_or(own))).arg(&self.vmferry);
                command
            }
        };
        command.arg("agent").arg("--config").arg(&self.config).args(["--listen", &address]);
        self.agent = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    /// The agent's process has been started and has not ended.
    pub fn agent_lives(&mut self) -> bool {
        self.agent.as_mut().is_some_and(|agent| matches!(agent.try_wait(), Ok(None)))
    }

    /// Ends the agent as a crash would.
    pub async fn kill_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().await?;
        }
        Ok(())
    }

    /// Has the agent end in its own time, as a service manager does.
    pub async fn stop_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            if let Some(pid) = agent.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).map_err(std::io::Error::from)?;
            }
            agent.wait().await?;
        }
        Ok(())
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().and_then(Child::id)
    }

    /// What the agent has logged.
    pub fn agent_log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The agent's client.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::new(&self.socket)?)
    }

    /// `vmferry` with these arguments, on this host.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.process(&self.vmferry);
        command.env("VMFERRY_SOCKET", &self.socket).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Runs `vmferry` with these arguments to its end.
    pub async fn vmferry(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output().await?)
    }

    /// A VM as this host's agent sees it; `None` when it has none of that name.
    pub async fn show(&self, vm: &str) -> Result<Option<VmView>> {
        match self.client()?.get(&vm_path(vm)).await {
            Ok(view) => Ok(Some(view)),
            Err(ClientError::Problem(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A program on this host.
    pub fn process(&self, program: &Path) -> Command {
        let mut words = self.enter.iter().map(std::ffi::OsStr::new).chain([program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or(program.as_os_str()));
        command.args(words);
        command
    }

    fn end_agent_now(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            // An error means that it has ended already.
            let _ = agent.start_kill();
            for _ in 0..200 {
                if !matches!(agent.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn images(dir: &Path) -> PathBuf {
    dir.join("images")
}

/// Ends QEMUs that outlived their agents: those whose command line names the testbed's own folder.
fn end_processes_of(dir: &Path) {
    let Some(dir) = dir.to_str() else { return };
    for _ in 0..100 {
        let pids = processes_naming(dir);
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                // An error means that it has ended already.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes, by pid, on whose command line this stands.
pub fn processes_naming(dir: &str) -> Vec<i32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(dir)
        })
        .collect()
}

/// The measuring guest's kernel, which `scripts/setup.sh` puts under target/.
pub(crate) fn kernel() -> Result<PathBuf> {
    let path = workspace().join("target/guest/vmlinuz");
    match path.exists() {
        true => Ok(path),
        false => Err(TestbedError::Missing { what: path.display().to_string(), hint: "run scripts/setup.sh first" }),
    }
}

/// The folders of the two QEMUs that tests run on, the older one first; `None` stands for the system's, wherever that
/// is. The other one is put under target/ by `scripts/setup.sh --for-tests`.
pub fn two_qemus() -> Result<[Option<PathBuf>; 2]> {
    let binary = "qemu-system-x86_64";
    let second = workspace().join("target/qemu-second/bin");
    if !second.join(binary).exists() {
        let what = second.display().to_string();
        return Err(TestbedError::Missing { what, hint: "run scripts/setup.sh --for-tests first" });
    }
    let system_is_older = qemu_major(Path::new(binary))? < qemu_major(&second.join(binary))?;
    Ok(if system_is_older { [None, Some(second)] } else { [Some(second), None] })
}

fn qemu_major(binary: &Path) -> Result<u32> {
    let output = std::process::Command::new(binary).arg("--version").output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = said.split("version ").nth(1).and_then(|rest| rest.split('.').next());
    version.and_then(|major| major.parse().ok()).ok_or_else(|| TestbedError::Command {
        command: format!("{} --version", binary.display()),
        stderr: format!("no version is in {said:?}"),
    })
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A guest as it is heard on its consoles.
pub struct GuestWatch {
    log: Arc<Mutex<GuestLog>>,
    input: Vec<tokio::sync::mpsc::Sender<&'static str>>,
    followers: Vec<tokio::task::JoinHandle<()>>,
    /// What the guest says is in the log no later than this.
    delay: Duration,
}

impl GuestWatch {
    /// Of a guest that no agent knows; see [`follow_socket`](Self::follow_socket).
    pub fn new() -> Self {
        let input = (0..2).map(|_| tokio::sync::mpsc::channel(1).0).collect();
        Self { log: Arc::default(), input, followers: Vec::new(), delay: Duration::ZERO }
    }

    /// What was heard so far.
    pub fn log(&self) -> MutexGuard<'_, GuestLog> {
        self.log.lock().expect("no holder of this lock panics")
    }

    /// Waits until the guest has filled its memory, and beats.
    pub(crate) async fn wait_for_start(&self) -> Result<()> {
        self.wait("the guest", GUEST_START, |log| log.ready().is_some() && log.beats().len() > 20).await
    }

    /// Waits until something was heard.
    pub async fn wait(&self, what: &str, after: Duration, heard: impl Fn(&GuestLog) -> bool) -> Result<()> {
        let deadline = Instant::now() + after;
        while !heard(&self.log()) {
            if Instant::now() > deadline {
                let log = self.log();
                let detail = format!(
                    "{} beats, last {:?} ago, error {:?}, corrupt {:?}",
                    log.beats().len(),
                    log.silent_for(Instant::now()),
                    log.error(),
                    log.corrupt()
                );
                return Err(TestbedError::Late { what: what.into(), after, detail });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Has the guest verify all of its memory where it is now; the number of pages verified and of those corrupt.
    pub async fn verify(&self, host: usize) -> Result<(u64, u64)> {
        let before = self.log().verified().len();
        self.say(host, "verify\n").await;
        self.wait("the guest's verification", GUEST_START, |log| log.verified().len() > before).await?;
        let log = self.log();
        let verified = log.verified().last().expect("just waited for it");
        Ok((verified.pages, verified.corrupt))
    }

    /// Has the guest say what it is made of, where it is now.
    pub async fn hardware(&self, host: usize) -> Result<Hardware> {
        let before = self.log().hardware().len();
        self.say(host, "hardware\n").await;
        self.wait("what the guest is made of", GUEST_START, |log| log.hardware().len() > before).await?;
        Ok(self.log().hardware().last().expect("just waited for it").clone())
    }

    /// Listens to a console that no agent serves as well, and types there from now on.
    pub async fn follow_socket(&mut self, host: usize, socket: &Path) -> Result<()> {
        let console = tokio::net::UnixStream::connect(socket).await?;
        let (sender, mut typed) = tokio::sync::mpsc::channel(4);
        let log = Arc::clone(&self.log);
        self.input[host] = sender;
        self.followers.push(tokio::spawn(async move { listen(console, host, &log, &mut typed).await }));
        Ok(())
    }

    /// Listens by other means: what is heard goes into this log, so much later, and what is to be typed comes from the
    /// receivers.
    pub(crate) fn heard_otherwise(
        log: Arc<Mutex<GuestLog>>,
        delay: Duration,
    ) -> (Self, [tokio::sync::mpsc::Receiver<&'static str>; 2]) {
        let ((a, from_a), (b, from_b)) = (tokio::sync::mpsc::channel(4), tokio::sync::mpsc::channel(4));
        (Self { log, input: vec![a, b], followers: Vec::new(), delay }, [from_a, from_b])
    }

    /// Waits until all is in the log that the guest has said by now.
    pub(crate) async fn catch_up(&self) {
        tokio::time::sleep(self.delay).await;
    }

    /// Types into the guest's console on this host.
    pub async fn say(&self, host: usize, line: &'static str) {
        // A follower that has ended has no console to type into; whoever waits for the answer notices.
        let _ = self.input[host].send(line).await;
    }
}

impl Default for GuestWatch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for GuestWatch {
    fn drop(&mut self) {
        for follower in &self.followers {
            follower.abort();
        }
    }
}

/// Feeds the log with what one host's console prints, from the moment the VM appears there, again and again.
async fn follow(
    client: Client,
    vm: String,
    host: usize,
    log: Arc<Mutex<GuestLog>>,
    mut typed: tokio::sync::mpsc::Receiver<&'static str>,
) {
    // The QEMU whose console was read to its end: read again, it would show its past again.
    let mut read_to_its_end = None;
    loop {
        let pid = client.get::<VmView>(&vm_path(&vm)).await.map(|view| view.pid);
        if pid.is_err() {
            // No VM, or no agent: the next one has no past to show.
            read_to_its_end = None;
        }
        let console = match pid {
            Ok(pid) if read_to_its_end != Some(pid) => client.console(&vm).await.ok().map(|console| (pid, console)),
            _ => None,
        };
        let Some((pid, console)) = console else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        listen(console, host, &log, &mut typed).await;
        read_to_its_end = Some(pid);
    }
}

/// Feeds the log with what one console prints until it ends.
async fn listen(
    mut console: impl AsyncRead + AsyncWrite + Unpin,
    host: usize,
    log: &Mutex<GuestLog>,
    typed: &mut tokio::sync::mpsc::Receiver<&'static str>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        tokio::select! {
            read = console.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let at = Instant::now();
                    log.lock().expect("no holder of this lock panics").feed(host, at, &buffer[..count]);
                }
            },
            Some(line) = typed.recv() => if console.write_all(line.as_bytes()).await.is_err() { return },
        }
    }
}
