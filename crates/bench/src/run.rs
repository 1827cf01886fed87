//! `vmferry bench run`: one migration of the measuring guest, set up, driven and measured as a scenario says.
//!
//! A scenario that names QEMU's means is done `by_hand`: two bare QEMUs driven over QMP, as the study did, so that each
//! means has exactly its tunables and nothing of ours is in between. One that is left to vmferry, and all where the
//! agents move the RAM, go through two real agents. `between_hosts` has the agents do all of it. All end in the same
//! report.

mod agents;
mod between_hosts;
mod by_hand;
mod link_rate;
mod obstacles;
pub(crate) mod processors;
mod witnesses;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use processors::Sampler;
use vmferry_api::EngineName;
use vmferry_api::client::Client;
use vmferry_api::witness::HostFacts;
use vmferry_qemu::Accel;

use crate::report::{
    GuestRecord, Hardware, Lever, MarkKind, Origin, Outcome, PageCheck, Recorder, RunReport, Settings, Stall, ms_since,
};
use crate::scenario::{Means, Scenario};
use crate::testbed::network::Network;
use crate::testbed::{GUEST_START, GuestWatch, TestbedError, kernel};
use crate::{BARE_GUEST, Fill, GuestKind, GuestOptions, INITRD, Mode, PERIOD};

/// What the guest's kernel needs beside what is rewritten, in bytes and in parts of a hundred.
const KERNEL: u64 = 192 << 20;
const KERNEL_PERCENT: u64 = 2;
/// Beats that come no later than this are not worth a line in a report.
const STALL: Duration = Duration::from_millis(20);
/// A guest that does not beat for so long, long after it was moved, is dead.
const DEAD: Duration = Duration::from_secs(8);
const VM: &str = "bench";

/// What carries the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A link between two hosts: network namespaces of this one, joined by a pair of cards.
    #[default]
    Link,
    /// The loopback address of this host.
    Tcp,
    /// A Unix socket of this host.
    Unix,
    /// Remote direct memory access.
    Rdma,
}

impl Transport {
    /// As it is said.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Rdma => "rdma",
        }
    }
}

impl std::str::FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Link, Self::Tcp, Self::Unix, Self::Rdma]
            .into_iter()
            .find(|it| it.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no transport: there are link, tcp, unix and rdma"))
    }
}

/// Where the guest is to go.
#[derive(Clone, Debug)]
pub struct OtherHost {
    /// This host's agent.
    pub agent: Client,
    /// The other one: a peer's name, or its address.
    pub name: String,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The `vmferry` binary.
    pub vmferry: PathBuf,
    /// How.
    pub scenario: Scenario,
    /// Who moves the RAM.
    pub engine: EngineName,
    /// What it is measured with.
    pub kind: GuestKind,
    /// The guest's processors; each has a thread that rewrites memory.
    pub vcpus: u32,
    /// What the guest rewrites, in bytes; its RAM is larger by what its kernel needs.
    pub mem: u64,
    /// How it does.
    pub mode: Mode,
    /// How fast at most, in bytes a second.
    pub rate: Option<u64>,
    /// What its pages hold.
    pub fill: Fill,
    /// What carries it.
    pub transport: Transport,
    /// What the link is shaped to, in bits a second; as fast as it can when absent.
    pub link_bits: Option<u64>,
    /// A folder that is searched for QEMU before `PATH`.
    pub qemu_dir: Option<PathBuf>,
    /// The guest's kernel; the one that `scripts/setup.sh` fetches, when absent.
    pub kernel: Option<PathBuf>,
    /// Another host, instead of two on this one.
    pub to: Option<OtherHost>,
    /// How long the guest is watched before.
    pub before: Duration,
    /// How long it is watched after.
    pub after: Duration,
}

impl RunOptions {
    /// The guest's RAM, in bytes.
    pub fn ram(&self) -> u64 {
        // In whole MiB, as `-m` takes it.
        (self.mem + self.mem * KERNEL_PERCENT / 100 + KERNEL).next_multiple_of(1 << 20)
    }

    /// The agents drive it, rather than we by hand.
    fn by_agents(&self) -> bool {
        self.engine == EngineName::External || self.scenario.automatic
    }

    fn guest(&self) -> GuestOptions {
        GuestOptions { mem: self.mem, threads: self.vcpus, mode: self.mode, rate: self.rate, fill: self.fill }
    }

    /// What is chosen, as far as it is known before anything runs.
    pub fn settings(&self) -> Settings {
        let scenario = &self.scenario;
        Settings {
            scenario: scenario.name.clone(),
            about: scenario.about.clone(),
            engine: self.engine.to_string(),
            driver: if scenario.automatic { "vmferry" } else { "scenario" }.into(),
            vcpus: self.vcpus,
            ram: self.ram(),
            written: Some(self.mem),
            guest_mode: Some(self.mode.to_string()),
            guest_rate: self.rate,
            guest_fill: Some(self.fill.to_string()),
            transport: self.transport.as_str().into(),
            to: self.to.as_ref().map(|to| to.name.clone()),
            link_bits: self.link_bits,
            bandwidth: scenario.bandwidth(),
            downtime_limit_ms: scenario.downtime.as_millis() as u64,
            most_rounds: (!scenario.automatic).then_some(scenario.most_rounds),
            most_time_ms: Some(scenario.most_time.as_millis() as u64),
            encrypted: Some(scenario.tls),
            post_copy_after: scenario.post_copy_after,
            pause_after: scenario.pause_after,
            watched_ms: [self.before, self.after].map(|time| time.as_millis() as u64),
            ..Settings::default()
        }
    }

    /// As it is started: by its place, or to be found in `PATH`.
    fn qemu(&self) -> PathBuf {
        self.qemu_dir.clone().unwrap_or_default().join("qemu-system-x86_64")
    }

    /// What the guest gets here; none for one that is for KVM alone where that does not work.
    async fn accelerator(&self) -> Result<Accel, RunError> {
        let accel = self.kind.accelerator(&self.qemu()).await;
        accel.map_err(|why| RunError::CannotHere { reason: format!("KVM does not work here: {why}") })
    }

    fn kernel(&self) -> Result<PathBuf, TestbedError> {
        self.kernel.clone().map_or_else(kernel, Ok)
    }

    /// The words after QEMU's own name that make the guest, but for its console; with what it boots from in this folder.
    /// Agents are asked for KVM: they try it themselves, and tell when it must be TCG.
    fn qemu_arguments(&self, dir: &Path, accel: &Accel) -> Result<Vec<String>, TestbedError> {
        let (kernel, name, content) = match self.kind {
            GuestKind::Linux => (self.kernel()?.display().to_string(), "initrd.gz", INITRD),
            GuestKind::Bare => (String::new(), "bare.elf", BARE_GUEST),
        };
        let file = dir.join(name);
        std::fs::write(&file, content)?;
        Ok(self.guest_arguments(&kernel, &file.display().to_string(), accel))
    }

    fn guest_arguments(&self, kernel: &str, initrd: &str, accel: &Accel) -> Vec<String> {
        let dirty_limit = |means: &Means| means.capabilities.iter().any(|it| it == "dirty-limit");
        let kvm = match self.scenario.qemu.iter().any(dirty_limit) {
            true => "kvm,dirty-ring-size=4096",
            false => "kvm",
        };
        let accelerators = match (accel, self.kind) {
            (Accel::Kvm(_), GuestKind::Bare) => vec![kvm],
            (Accel::Kvm(_), GuestKind::Linux) => vec![kvm, "tcg"],
            (Accel::Tcg { .. }, _) => vec!["tcg"],
        };
        let cpu: &[&str] = match self.kind {
            GuestKind::Linux => &["-cpu", "max"],
            GuestKind::Bare => &[],
        };
        let words = format!(
            "-machine q35 -smp {} -m {} -nodefaults -vga none -display none -name {VM},debug-threads=on",
            self.vcpus,
            self.ram() >> 20
        );
        let accelerators = accelerators.into_iter().flat_map(|name| ["-accel", name]);
        let words = words.split(' ').chain(accelerators).chain(cpu.iter().copied()).map(str::to_owned);
        words.chain(self.guest().boot_words(self.kind, kernel, initrd)).collect()
    }
}

/// Why nothing was measured. A migration that does not complete is no error but a result.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// What the scenario needs is not here; others can be measured.
    #[error("skipped: {reason}")]
    CannotHere {
        /// Why.
        reason: String,
    },
    /// The guest would not fit.
    #[error("the guest needs {needed} of memory on this host, and {free} are free")]
    NoMemory {
        /// What it takes.
        needed: String,
        /// What there is.
        free: String,
    },
    /// Two hosts cannot be made.
    #[error("two hosts on this one need rights that are missing: {missing}")]
    NoRights {
        /// Which.
        missing: String,
    },
    /// What was asked for does not go together.
    #[error("{why}")]
    Senseless {
        /// Why.
        why: String,
    },
    /// A QEMU did not do as told.
    #[error("QEMU does not do as told")]
    Qmp(#[from] vmferry_qemu::QmpError),
    /// A QEMU ended.
    #[error("QEMU ended before the migration began: {said}")]
    Ended {
        /// What it said last.
        said: String,
    },
    /// QEMU cannot encrypt.
    #[error(transparent)]
    Tls(#[from] vmferry_qemu::StreamTlsError),
    /// The testbed, a guest or an agent.
    #[error(transparent)]
    Testbed(#[from] TestbedError),
    /// An agent refused.
    #[error(transparent)]
    Client(#[from] vmferry_api::client::ClientError),
    /// An input or output error.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Measures; needs the rights to make network namespaces when the transport is a link. `tell` hears what is under way.
/// Dropping the future ends all that was started.
pub async fn run(options: &RunOptions, tell: impl Fn(&str)) -> Result<RunReport, RunError> {
    obstacles::look_for_obstacles(options)?;
    match &options.to {
        Some(to) => between_hosts::run(options, to, tell).await,
        None if options.by_agents() => agents::run(options, tell).await,
        None => by_hand::run(options, tell).await,
    }
}

/// What the link carries now, in bytes a second; none without one.
fn measure_link(network: &Network) -> Result<Option<u64>, RunError> {
    let (Some(from), Some(to)) = (network.namespace(0), network.namespace(1)) else { return Ok(None) };
    Ok(Some(link_rate::measure([&from, &to], network.address(1)?)?))
}

impl Hardware {
    fn of(host: HostFacts, one_machine: bool) -> Self {
        let HostFacts { model, processors, ram, kernel, .. } = host;
        Self { model, processors, ram, kernel, one_machine }
    }
}

/// A report of this host that was not measured by the measuring guest: as much as is known of the host itself.
pub fn new_report(origin: Origin, settings: Settings) -> RunReport {
    let hardware = Hardware::of(HostFacts::read(""), true);
    RunReport { hardware: Some(hardware), ..RunReport::new(origin, settings) }
}

/// How a migration ended, for whoever puts the report together.
struct Driven {
    outcome: Outcome,
    recorder: Recorder,
    /// The moment it was over.
    ended: Instant,
    levers: Vec<Lever>,
}

/// Watches the guest for a while longer, has it look at its pages, and puts the report together.
async fn conclude(
    options: &RunOptions,
    mut report: RunReport,
    driven: Driven,
    watch: &GuestWatch,
    sampler: impl FnOnce() -> Sampler,
) -> RunReport {
    let Driven { outcome, mut recorder, ended, levers } = driven;
    if outcome.is_completed() {
        // Nothing else moves on a host that is done: this is the end by any clock.
        recorder.mark(MarkKind::End);
    }
    tokio::time::sleep(options.after).await;
    let watched_until = Instant::now();
    watch.catch_up().await;
    // One that is stuck in post-copy has left all the same.
    let host = watch.log().beats().last().map_or(0, |beat| beat.host);
    report.page_check = check_pages(watch, host).await;
    let begun = recorder.begun();
    let summary = &mut report.summary;
    summary.throttle = summary.throttle.max(Some(recorder.throttle()));
    {
        let log = watch.log();
        let at = |moment: Instant| recorder.ms_at(moment);
        if let Some(switchover) = log.switchovers().next_back().filter(|_| outcome.is_completed()) {
            report.add_mark(MarkKind::Left, at(switchover.last.at));
            report.add_mark(MarkKind::Arrived, at(switchover.first.at));
        }
        let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
        let summary = &mut report.summary;
        // A guest that crashed beats again when it has rebooted, which is no arrival.
        let arrived = outcome.is_completed() && !log.restarted();
        summary.downtime_ms = arrived.then(|| ms(log.downtime_felt())).flatten();
        summary.worst_stall_ms = ms(log.worst_stall(begun, watched_until));
        summary.worst_64_mib_ms = ms(log.worst_64_mib(begun, watched_until));
        if options.mode != Mode::Idle {
            let speed = |from: Instant, to: Instant| (to > from).then(|| log.rewritten_per_second(from, to));
            summary.speed_before = begun.checked_sub(options.before).and_then(|from| speed(from, begun));
            summary.speed_during = speed(begun, ended);
            summary.speed_after = speed(ended, watched_until);
        }
        report.samples.stalls = log
            .beats()
            .windows(2)
            .filter_map(|pair| {
                let late = (pair[1].at - pair[0].at).saturating_sub(PERIOD);
                let switchover = pair[0].host != pair[1].host;
                (late >= STALL && pair[1].at < watched_until).then(|| Stall {
                    at_ms: at(pair[0].at),
                    ms: late.as_secs_f64() * 1e3,
                    switchover,
                })
            })
            .collect();
        report.samples.records = log
            .timed_records()
            .filter(|(record, _)| record.at < watched_until)
            .map(|(record, took)| GuestRecord {
                at_ms: at(record.at),
                ms: took.as_secs_f64() * 1e3,
                bytes: 64 << 20,
                thread: record.thread,
                host: Some(record.host as u8),
            })
            .collect();
    }
    let ended_ms = recorder.ms_at(ended);
    sampler().finish(&mut report, |moment| ms_since(begun, moment), 0.0, ended_ms);
    recorder.finish(&mut report);
    if let Some(carried) = report.settings.link_measured.zip(report.settings.link_bits) {
        let share = carried.0 as f64 * 8.0 / carried.1 as f64;
        if !(0.8..1.1).contains(&share) {
            report.notes.push(format!("The link carried {:.0} % of what it is shaped to.", share * 100.0));
        }
    }
    report.outcome = outcome;
    report.levers = levers;
    report
}

/// Has the guest look at all of its pages. A guest whose memory is damaged may crash before it can answer.
async fn check_pages(watch: &GuestWatch, host: usize) -> PageCheck {
    let crashed = async {
        loop {
            {
                let log = watch.log();
                if log.restarted() {
                    return "the guest's kernel crashed and rebooted".to_owned();
                }
                if let Some(silent) = log.silent_for(Instant::now()).filter(|silent| *silent > DEAD) {
                    return format!("the guest has not been heard of for {:.0} s", silent.as_secs_f64());
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let verified = tokio::time::timeout(GUEST_START, watch.verify(host));
    tokio::select! {
        biased;
        detail = crashed => PageCheck::Damaged { detail },
        verified = verified => match verified {
            Ok(Ok((pages, 0))) if watch.log().corrupt().is_empty() => PageCheck::Intact { pages },
            Ok(Ok((pages, corrupt))) => {
                let found = corrupt.max(watch.log().corrupt().len() as u64);
                PageCheck::Damaged { detail: format!("{found} of {pages} pages are stale or torn") }
            }
            Ok(Err(error)) => PageCheck::Damaged { detail: format!("the guest does not look at its pages: {error}") },
            Err(_) => PageCheck::Damaged { detail: "the guest does not look at its pages".into() },
        },
    }
}
