//! A host with five hundred VMs: its agent, started again, finds them at once, whether or not all of them answer.
//!
//! The QEMUs are no real ones, but processes that serve a monitor and a console (`examples/fake_qemu.rs`): what is measured
//! is the agent. Each test prints its figures in one line, also those that miss their goal.

use std::io::PipeWriter;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::UnixDatagram;
use vmferry_api::client::Client;
use vmferry_api::{AdoptRequest, Started, VmView};

const VMS: usize = 500;
/// How many of them hang in the second test: more than an agent could wait for in turn.
const HANGING: usize = 18;
/// When what is waited for does not come at all; every goal is shorter.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether all were found: a look costs the agent something, too.
const LOOK: Duration = Duration::from_millis(50);
/// How many lists are timed.
const LISTS: usize = 20;

/// The goals. They hold for a debug build on two processors.
const FOUND_WITHIN: Duration = Duration::from_secs(2);
const LISTED_WITHIN: Duration = Duration::from_millis(200);
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// A QEMU that answers again is asked within this time.
const FOUND_LATER_WITHIN: Duration = Duration::from_secs(8);

/// VMs whose processes end with this.
struct Fakes {
    processes: Vec<Child>,
    /// They end when it is closed: if we are killed, too.
    _alive: PipeWriter,
}

impl Fakes {
    /// Starts them, with their sockets where the agent's own VMs have theirs.
    fn start(run_dir: &Path) -> Self {
        let binary = Path::new(env!("CARGO_BIN_EXE_vmferry")).with_file_name("examples").join("fake_qemu");
        assert!(binary.exists(), "{} is not built: cargo build --example fake_qemu", binary.display());
        let (until, alive) = std::io::pipe().expect("a pipe");
        let mut fakes = Self { processes: Vec::with_capacity(VMS), _alive: alive };
        for index in 0..VMS {
            let dir = dir_of(run_dir, index);
            std::fs::create_dir_all(&dir).expect("made");
            let socket = |file: &str| format!("unix:{},server=on,wait=off", dir.join(file).display());
            let fake = Command::new(&binary)
                .args(["-name", &name(index), "-machine", "pc-q35-7.2,accel=kvm", "-m", "64"])
                .args(["-nodefaults", "-display", "none"])
                .args(["-serial", &socket("console.sock"), "-qmp", &socket("qmp.sock")])
                .stdin(until.try_clone().expect("a descriptor is left"))
                .spawn();
            fakes.processes.push(fake.expect("it starts"));
        }
        fakes
    }

    fn signal(&self, indices: std::ops::Range<usize>, signal: Signal) {
        for fake in &self.processes[indices] {
            kill_process(Pid::from_raw(fake.id() as i32).expect("a pid"), signal).expect("it is there");
        }
    }
}

impl Drop for Fakes {
    fn drop(&mut self) {
        for fake in &mut self.processes {
            // An error means that it has ended already.
            let _ = fake.kill();
        }
        for fake in &mut self.processes {
            let _ = fake.wait();
        }
    }
}

fn name(index: usize) -> String {
    format!("vm{index:03}")
}

fn dir_of(run_dir: &Path, index: usize) -> PathBuf {
    run_dir.join("vms").join(name(index))
}

/// An agent, which ends with this.
struct Agent {
    process: Child,
    /// Where it tells that it is ready.
    systemd: UnixDatagram,
    started: Instant,
    client: Client,
}

impl Agent {
    fn start(dir: &Path) -> Self {
        let notify = dir.join("notify.sock");
        let _ = std::fs::remove_file(&notify);
        let systemd = UnixDatagram::bind(&notify).expect("bound");
        let run_dir = dir.join("run");
        let folders = [("run_dir", run_dir.clone()), ("state_dir", dir.join("state"))];
        let folders = folders.map(|(key, path)| format!("{key} = \"{}\"\n", path.display())).concat();
        let config = format!("name = \"alpha\"\nlisten = \"none\"\n{folders}");
        let path = dir.join("agent.toml");
        std::fs::write(&path, config).expect("written");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("agent.log")).expect("a log");
        let started = Instant::now();
        // Less than half of what 500 VMs take: the agent must see to that itself.
        let mut command = tokio::process::Command::new("sh");
        command
            .args(["-c", "ulimit -S -n 400 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vmferry"), "agent", "--config"])
            .arg(&path)
            .env("NOTIFY_SOCKET", &notify)
            .env("TMPDIR", dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        vmferry_qemu::end_with_us(&mut command);
        let process = command.as_std_mut().spawn().expect("it starts");
        Self { process, systemd, started, client: Client::new(&run_dir.join("agent.sock")).expect("a client") }
    }

    /// When it told systemd that it is ready, from its start; none if it has not in time.
    async fn ready(&self) -> Option<Duration> {
        let told = async {
            let mut message = [0; 256];
            loop {
                let length = self.systemd.recv(&mut message).await.expect("it stays open");
                if String::from_utf8_lossy(&message[..length]).contains("READY=1") {
                    return self.started.elapsed();
                }
            }
        };
        tokio::time::timeout(PATIENCE, told).await.ok()
    }

    /// Its VMs; none if it does not tell within this time.
    async fn list(&self, within: Duration) -> Option<Vec<VmView>> {
        tokio::time::timeout(within, self.client.get("/v1/vms")).await.ok()?.ok()
    }

    /// When it first answered, from its start; none if it has not in time.
    async fn first_answer(&self) -> Option<Duration> {
        let answered = async {
            while self.client.get::<serde_json::Value>("/v1/host").await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            self.started.elapsed()
        };
        tokio::time::timeout(PATIENCE, answered).await.ok()
    }

    /// How long it took since then until so many VMs run, as it says; none if they do not in time.
    async fn found(&self, wanted: usize, since: Instant) -> Option<Duration> {
        let found = async {
            loop {
                let vms = self.list(PATIENCE).await.unwrap_or_default();
                if vms.iter().filter(|vm| vm.state == "running").count() == wanted {
                    return since.elapsed();
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(PATIENCE, found).await.ok()
    }

    /// How long a list takes: the median and the longest; none when one is not answered at all.
    async fn list_times(&self) -> Option<(Duration, Duration)> {
        let mut times = Vec::new();
        for _ in 0..LISTS {
            let begun = Instant::now();
            self.list(Duration::from_secs(3)).await?;
            times.push(begun.elapsed());
        }
        times.sort_unstable();
        Some((times[LISTS / 2], times[LISTS - 1]))
    }

    fn memory_and_files(&self) -> (u64, usize) {
        let process = PathBuf::from(format!("/proc/{}", self.process.id()));
        let status = std::fs::read_to_string(process.join("status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory is told");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        (kib >> 10, std::fs::read_dir(process.join("fd")).expect("it runs").count())
    }

    /// As a crash does.
    fn kill(&mut self) {
        // An error means that it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What was measured and wanted, until all of it can be told.
#[derive(Default)]
struct Figures {
    line: Vec<String>,
    missed: Vec<String>,
}

impl Figures {
    fn within(&mut self, what: &str, took: Option<Duration>, goal: Duration) {
        let figure = took.map_or_else(|| "never".into(), |took| format!("{} ms", took.as_millis()));
        self.line.push(format!("{what} {figure}"));
        if took.is_none_or(|took| took >= goal) {
            self.missed.push(format!("{what}: {figure}, not within {} ms", goal.as_millis()));
        }
    }

    /// Half of the lists must keep to the goal: what the longest took is also the host's doing, when it has more to do.
    fn list(&mut self, times: Option<(Duration, Duration)>, goal: Duration) {
        let (median, longest) = times.unzip();
        self.within("list median", median, goal);
        self.within("list longest", longest, ANSWERS_WITHIN);
    }

    fn must(&mut self, so: bool, otherwise: impl FnOnce() -> String) {
        if !so {
            self.missed.push(otherwise());
        }
    }

    /// Prints them, and fails if a goal was missed.
    fn tell(self, what: &str) {
        println!("{what}: {}", self.line.join(", "));
        assert!(self.missed.is_empty(), "{}", self.missed.join("\n"));
    }
}

/// The VMs, and the agent that has adopted them. In the order in which they must end.
struct Host {
    agent: Agent,
    fakes: Fakes,
    dir: TempDir,
}

impl Host {
    async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("vmferry-").tempdir().expect("a folder");
        let fakes = Fakes::start(&dir.path().join("run"));
        let agent = Agent::start(dir.path());
        assert!(
            agent.ready().await.is_some(),
            "{}",
            std::fs::read_to_string(dir.path().join("agent.log")).unwrap_or_default()
        );
        let host = Self { agent, fakes, dir };
        let adopted = stream::iter(0..VMS).map(async |index| {
            let qmp = dir_of(&host.dir.path().join("run"), index).join("qmp.sock");
            let request = AdoptRequest { name: name(index), qmp };
            let started: Started = host.agent.client.post("/v1/adopt", &request).await.expect("it is adopted");
            (started.vm.state, started.vm.pid)
        });
        let adopted: Vec<_> = adopted.buffered(8).collect().await;
        let wanted = host.fakes.processes.iter().map(|fake| ("running".to_owned(), fake.id()));
        assert!(adopted.iter().cloned().eq(wanted), "{adopted:?}");
        host
    }

    /// The agent dies, and the next one starts.
    fn restart_agent(&mut self) {
        self.agent.kill();
        self.agent = Agent::start(self.dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_vms_are_found_again_at_once() {
    let mut host = Host::start().await;
    host.restart_agent();
    let agent = &host.agent;
    let mut figures = Figures::default();
    let (answers, ready, found) = tokio::join!(agent.first_answer(), agent.ready(), agent.found(VMS, agent.started));
    figures.within("API answers after", answers, FOUND_WITHIN);
    figures.within("ready after", ready, FOUND_WITHIN);
    figures.within("all found after", found, FOUND_WITHIN);
    figures.list(agent.list_times().await, LISTED_WITHIN);
    let vms = agent.list(ANSWERS_WITHIN).await.unwrap_or_default();
    let same = vms.iter().map(|vm| vm.pid).eq(host.fakes.processes.iter().map(Child::id));
    figures.must(same, || format!("they are not the same processes: {vms:?}"));
    let (memory, files) = agent.memory_and_files();
    figures.line.push(format!("{memory} MiB, {files} open files"));
    figures.must(files > 2 * VMS, || format!("{files} open files: it does not hold each VM's monitor and console"));
    figures.tell("500 VMs");
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_that_hang_keep_no_agent_from_its_start_and_are_found_when_they_answer() {
    let mut host = Host::start().await;
    let mut figures = Figures::default();
    host.fakes.signal(0..HANGING, Signal::STOP);
    host.restart_agent();
    let agent = &host.agent;
    let (answers, ready, found) =
        tokio::join!(agent.first_answer(), agent.ready(), agent.found(VMS - HANGING, agent.started));
    figures.within("API answers after", answers, ANSWERS_WITHIN);
    figures.within("ready after", ready, ANSWERS_WITHIN);
    figures.within("the others found after", found, FOUND_WITHIN);
    figures.list(agent.list_times().await, ANSWERS_WITHIN);
    let vms = agent.list(ANSWERS_WITHIN).await.unwrap_or_default();
    let shown = |index: usize| vms.iter().find(|vm| vm.name == name(index)).map(|vm| (&vm.state, &vm.detail));
    let said = |(state, detail): (&String, &Option<String>)| {
        state != "running" && format!("{state} {}", detail.as_deref().unwrap_or_default()).contains("answer")
    };
    let unsaid: Vec<_> = (0..HANGING).map(shown).filter(|shown| !shown.is_some_and(said)).collect();
    figures.must(unsaid.is_empty(), || format!("{} that do not answer are shown as {:?}", unsaid.len(), unsaid[0]));
    // They answer again, those that the agent may be trying just now included.
    host.fakes.signal(0..HANGING, Signal::CONT);
    figures.within("all found later after", agent.found(VMS, Instant::now()).await, FOUND_LATER_WITHIN);
    figures.tell("500 VMs of which 18 hang");
}
