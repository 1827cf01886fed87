//! One run: two hosts, a guest, a migration and the plan's faults, each at its moment; then everybody is let go, and it is
//! seen what it came to.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use vmferry_bench::testbed::{TestbedOptions, processes_naming};
use vmferry_bench::{Fill, GuestOptions, Mode};

use super::aftermath;
use super::monitors::{Monitors, Paused, WORDS, qemu_of_host};
use super::plan::{Engine, Fault, Moment, Plan, Qemus, Strike, ms};
use super::strikes::{Order, Undo};
use super::verdict::{Kill, Outcome, Sight, Story, Told, When, may_wait_for_ever};
use crate::bed::{self, Bed, VM};

/// A moment that does not come is not waited for any longer than this, from the command on.
const MOMENT: Duration = Duration::from_secs(20);
/// How long an agent may take to answer when it is looked at.
const ANSWER: Duration = Duration::from_secs(2);

/// What became of a run.
pub(super) struct Ended {
    pub outcome: Result<Outcome, String>,
    /// From the end of the last fault on.
    pub settled: Option<Duration>,
    /// What was not as planned, in words.
    pub notes: Vec<String>,
    /// What the command line and the agents said, of a run that failed.
    pub logs: String,
}

/// A run under way.
pub(super) struct Run {
    pub plan: Plan,
    pub bed: Bed,
    pub monitors: Monitors,
    pub notes: Vec<String>,
    heard: Arc<Mutex<Heard>>,
    strikes: Vec<Strike>,
    pub undo: Vec<(Instant, Undo)>,
    pub orders: Vec<Order>,
    pub cuts: u32,
    pub full: [bool; 2],
    /// It was killed, and is to come back later.
    pub away: [bool; 2],
    pub kills: Vec<(usize, Instant)>,
    pub told_to_power_off: bool,
    pub paused: Option<Paused>,
    first_strike: Option<Instant>,
    /// When an agent that ended by itself is started again.
    pub again: [Option<Instant>; 2],
    pub wrong: Vec<String>,
}

/// What was heard of the migration by `vmferry migrate --json`.
#[derive(Default)]
pub(super) struct Heard {
    moments: Vec<(Moment, Instant)>,
    /// It was said that it goes on by post-copy: QEMU lets go of the guest then, some milliseconds before the commit.
    lets_go: bool,
    pub ended: Option<(Instant, Option<i32>)>,
    complaint: String,
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The QEMUs that an agent with this run folder has started for VMs.
pub(super) fn qemus_of(run_dir: &Path) -> Vec<i32> {
    let pids = processes_naming(&run_dir.join("vms").display().to_string());
    let is_qemu = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
    };
    pids.into_iter().filter(is_qemu).collect()
}

impl Run {
    /// The guest runs at the source, and the command is given.
    pub(super) async fn begin(plan: &Plan, dir: &Path) -> Self {
        let qemus = match plan.qemus {
            Qemus::Newer => (1, 1),
            Qemus::Older => (0, 0),
            Qemus::OlderToNewer => (0, 1),
        };
        let mut options = match plan.engine {
            Engine::External => bed::external(qemus.0, qemus.1),
            Engine::Qemu => bed::with_qemus(qemus.0, qemus.1),
        };
        for (host, folder) in ["alpha", "beta"].into_iter().zip(&mut options.qemu_dirs) {
            *folder = Some(qemu_of_host(dir, host, folder.as_deref()));
        }
        let options = TestbedOptions { namespaces: is_root(), small_state: is_root(), ..options };
        let rate = plan.writes.map(|mib| mib << 20);
        let guest = GuestOptions { mem: 128 << 20, threads: 1, mode: Mode::Random, rate, fill: Fill::Random };
        let (bed, notes) = boot(options, guest, &dir.join("disk.raw")).await;
        let monitors = Monitors::follow(bed.dir());
        Self {
            plan: plan.clone(),
            bed,
            monitors,
            notes,
            heard: Arc::default(),
            strikes: plan.strikes.clone(),
            undo: Vec::new(),
            orders: Vec::new(),
            cuts: 0,
            full: [false; 2],
            away: [false; 2],
            kills: Vec::new(),
            told_to_power_off: false,
            paused: None,
            first_strike: None,
            again: [None; 2],
            wrong: Vec::new(),
        }
    }

    /// Begins the migration, has everything strike, and comes back when the last fault is over.
    pub(super) async fn strike_all(&mut self) {
        self.migrate();
        let begun = Instant::now();
        self.heard().moments.push((Moment::Command, begun));
        while !(self.strikes.is_empty() && self.undo.is_empty() && self.orders_ended()) {
            let now = Instant::now();
            if let Some(at) = self.strikes.iter().position(|strike| self.is_due(strike, begun, now)) {
                let strike = self.strikes.remove(at);
                self.first_strike.get_or_insert(now);
                self.strike(strike.fault).await;
            }
            if let Some(at) = self.undo.iter().position(|(due, _)| *due <= now) {
                let (_, undo) = self.undo.remove(at);
                self.undo(undo);
            }
            self.keep_agents_alive();
            tokio::time::sleep(ms(1)).await;
        }
    }

    /// `vmferry migrate` on the source, in the background.
    fn migrate(&self) {
        let to = self.bed.to();
        let arguments = self.plan.arguments();
        let words: Vec<&str> =
            ["migrate", VM, "--to", &to, "--json"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let mut command = self.bed.alpha().command(&words);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("vmferry runs");
        let heard = Arc::clone(&self.heard);
        tokio::spawn(async move {
            let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                let says = |words: &str| event["text"].as_str().is_some_and(|text| text.contains(words));
                if event["event"] == "note" && (says("post-copy.") || says("Post-copy, as asked for")) {
                    heard.lock().expect("no holder panics").lets_go = true;
                }
                if let Some(moment) = moment_of(&event) {
                    heard.lock().expect("no holder panics").moments.push((moment, Instant::now()));
                }
            }
            let mut complaint = String::new();
            // What cannot be read is not shown.
            let _ = child.stderr.take().expect("piped").read_to_string(&mut complaint).await;
            let code = child.wait().await.ok().and_then(|status| status.code());
            let mut heard = heard.lock().expect("no holder panics");
            (heard.ended, heard.complaint) = (Some((Instant::now(), code)), complaint);
        });
    }

    pub(super) fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().expect("no holder of this lock panics")
    }

    /// When this moment came, or, if it was not heard of, one after it.
    pub(super) fn came(&self, moment: Moment) -> Option<Instant> {
        let by_qemu = match moment {
            Moment::SwitchOver => self.monitors.paused_here(),
            Moment::Commit => self.monitors.ran_there(),
            _ => None,
        };
        let heard = self.heard();
        let later = heard.moments.iter().filter(|(it, _)| *it >= moment).map(|(_, at)| *at);
        later.chain(by_qemu).min()
    }

    fn is_due(&self, strike: &Strike, begun: Instant, now: Instant) -> bool {
        let ended = self.heard().ended.is_some();
        match self.came(strike.moment) {
            Some(came) => came + ms(strike.delay_ms) <= now,
            None => ended || begun + MOMENT <= now,
        }
    }

    pub(super) fn host(&self, host: usize) -> &vmferry_bench::testbed::Host {
        [self.bed.alpha(), self.bed.beta()][host]
    }

    pub(super) fn command_ended(&self) -> bool {
        self.heard().ended.is_some()
    }

    /// Looks at both hosts.
    pub(super) async fn look(&self) -> [Sight; 2] {
        let look = async |host: usize| {
            let host = self.host(host);
            let told = match tokio::time::timeout(ANSWER, host.show(VM)).await {
                Ok(Ok(Some(view))) => Told::Vm { state: view.state, detail: view.detail.unwrap_or_default() },
                Ok(Ok(None)) => Told::NoVm,
                Ok(Err(_)) | Err(_) => Told::NoAnswer,
            };
            Sight { told, qemus: qemus_of(&host.run_dir).len(), folder: host.run_dir.join("vms").join(VM).exists() }
        };
        [look(0).await, look(1).await]
    }

    /// What was done to the guest, for the judge.
    pub(super) async fn story(&self) -> Story {
        let exit_code = self.heard().ended.and_then(|(_, code)| code);
        let stops = self.orders.iter().filter_map(|order| Some((order.stop?, order.ended?)));
        // 3 is a refusal, which touches nothing; or a guest that does not shut down in time, but may do so yet.
        let may_have_stopped = |(force, (took, code)): (bool, (Duration, Option<i32>))| {
            code != Some(3) || (!force && took > Duration::from_secs(5))
        };
        Story {
            engine: self.plan.engine,
            kills: self.kills(),
            committed: aftermath::was_handed_over(self.bed.alpha()).await,
            may_have_ended: self.told_to_power_off || stops.clone().any(may_have_stopped),
            was_stopped: stops.clone().any(|(_, (_, code))| code == Some(0)),
            paused: self.paused,
            exit_code,
        }
    }

    fn kills(&self) -> Vec<Kill> {
        self.kills.iter().map(|(host, at)| self.kill(*host, *at)).collect()
    }

    fn kill(&self, host: usize, at: Instant) -> Kill {
        let before = |moment| self.came(moment).is_some_and(|came| came <= at);
        let when = if before(Moment::Commit) {
            When::After
        } else if self.monitors.paused_around(at) {
            When::Around
        } else {
            When::Before
        };
        let heard = self.heard();
        let began = heard.lets_go || heard.moments.iter().any(|(it, _)| *it == Moment::PostCopy);
        drop(heard);
        Kill { host, when, in_post_copy: began && !before(Moment::Retire) }
    }

    /// The migration ended without success before anything struck: then it is not the faults that ended it. (5 is a
    /// migration that the limits did not allow.)
    pub(super) fn failed_unharmed(&self) -> Option<String> {
        let (ended, code) = self.heard().ended?;
        let harmed = self.first_strike.is_some_and(|strike| strike < ended);
        (!harmed && !matches!(code, Some(0 | 5))).then(|| format!("it failed before anything struck: {code:?}"))
    }

    pub(super) fn logs(&self) -> String {
        format!("`vmferry migrate` said: {}\n{}", self.heard().complaint.trim(), self.bed.logs())
    }

    pub(super) fn may_wait_for_ever(&self) -> bool {
        may_wait_for_ever(&self.kills(), self.plan.engine)
    }

    pub(super) fn may_reboot(&self) -> bool {
        self.plan.has(|fault| fault == Fault::Reboot)
    }

    pub(super) fn told_to_power_off(&self) -> bool {
        self.told_to_power_off
    }
}

/// A guest that runs. QEMU 10.0.2 crashes now and then while a guest boots, with no migration in sight
/// (`msix_table_mmio_write: Assertion failed`): then it is tried anew.
async fn boot(options: TestbedOptions, guest: GuestOptions, disk: &Path) -> (Bed, Vec<String>) {
    let mut notes = Vec::new();
    loop {
        let (options, guest, disk) = (options.clone(), guest.clone(), disk.to_owned());
        let start = tokio::spawn(async move { bed::start_with_disk_and(options, guest, &disk, &WORDS).await });
        match start.await {
            Ok(bed) => return (bed, notes),
            Err(panic) if notes.len() == 2 => std::panic::resume_unwind(panic.into_panic()),
            Err(_) => notes.push("the guest did not boot, and was started anew".into()),
        }
    }
}

/// What a line of `vmferry migrate --json` tells of how far it is.
fn moment_of(event: &Value) -> Option<Moment> {
    match (event["event"].as_str()?, event["step"].as_str()) {
        ("step" | "progress", Some("prepare")) => Some(Moment::Prepare),
        ("step" | "progress", Some("copy-ram")) => Some(Moment::Copy),
        ("step" | "progress", Some("switch-over")) => Some(Moment::SwitchOver),
        ("step" | "progress", Some("commit")) => Some(Moment::Commit),
        ("step" | "progress", Some("post-copy")) => Some(Moment::PostCopy),
        ("step" | "progress", Some("retire")) | ("finished", _) => Some(Moment::Retire),
        _ => None,
    }
}
