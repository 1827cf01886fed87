//! Two bare QEMUs, driven over QMP as a scenario says: what the study's harness did.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::process::{Child, Command};
use vmferry_link::Cipher;
use vmferry_qemu::migration::loses_writes;
use vmferry_qemu::qmp::commands::{
    CapabilityState, Cont, Migrate, MigrateCancel, MigrateIncoming, MigrateSetCapabilities, MigrateStartPostcopy,
    MigrationInfo, QueryKvm, QueryMigrate, QueryVersion, Stop,
};
use vmferry_qemu::{
    Accel, Endpoint, Features, MigrationStatus, Qmp, QmpError, StreamKey, end_with_us, protect_streams, tls_priority,
};

use super::processors::Sampler;
use super::{Driven, RunError, RunOptions, Transport, conclude, measure_link, new_report};
use crate::report::{Lever, MarkKind, Origin, Outcome, ProgressSample, Recorder, RunReport};
use crate::scenario::Means;
use crate::testbed::GuestWatch;
use crate::testbed::network::Network;

const SOON: Duration = Duration::from_secs(10);
/// How often QEMU is asked how far it is, as the study did.
const LOOK: Duration = Duration::from_millis(50);
/// A migration that is cancelled gets this long to be so.
const CANCEL: Duration = Duration::from_secs(20);
/// As good as no cap for QEMU, in bytes a second.
const UNLIMITED: u64 = 1 << 50;

/// What carries a run. Its parts end in this order: the QEMUs, then what they stand on.
struct Pair {
    source: Qemu,
    destination: Qemu,
    watch: GuestWatch,
    network: Network,
    dir: tempfile::TempDir,
}

struct Qemu {
    /// It ends with this.
    _process: Child,
    pid: u32,
    qmp: Qmp,
    features: Features,
}

pub(super) async fn run(options: &RunOptions, tell: impl Fn(&str)) -> Result<RunReport, RunError> {
    tell("starting the guest");
    let accel = options.accelerator().await?;
    let pair = Pair::start(options, &accel).await?;
    let mut report = new_report(Origin::Bench, options.settings());
    if !accel.is_kvm() {
        report.notes.push(accel.in_place_of_kvm());
    }
    report.versions.source_qemu = Some(pair.source.qmp.execute(QueryVersion {}).await?.to_string());
    report.versions.destination_qemu = Some(pair.destination.qmp.execute(QueryVersion {}).await?.to_string());
    let kvm = pair.source.qmp.execute(QueryKvm {}).await?.enabled;
    let accelerator = if kvm { "kvm" } else { "tcg" };
    report.versions.accelerator = Some(accelerator.into());
    report.versions.machine = Some("q35".into());
    if loses_writes(&pair.source.features, accelerator) {
        report.notes.push(
            "This QEMU loses writes of an emulated guest that runs while its RAM is copied: expect damaged pages."
                .into(),
        );
    }
    let means = pair.choose_means(options)?;
    pair.set_up(options, means, &mut report).await?;
    report.settings.link_measured = measure_link(&pair.network)?;
    let sampler = Sampler::start();
    sampler.watch(|watched| watched.qemus = [Some(pair.source.pid), Some(pair.destination.pid)]);
    tell("watching the guest before");
    tokio::time::sleep(options.before).await;
    tell("migrating");
    let driven = pair.drive(options, means, &mut report, &tell).await?;
    tell("watching the guest after");
    Ok(conclude(options, report, driven, &pair.watch, || sampler).await)
}

impl Qemu {
    async fn start(
        options: &RunOptions,
        accel: &Accel,
        network: &Network,
        dir: &Path,
        index: usize,
    ) -> Result<Self, RunError> {
        let name = ["source", "destination"][index];
        let binary = options.qemu();
        let socket = |what: &str| {
            format!("socket,id={what},path={},server=on,wait=off", dir.join(format!("{name}.{what}")).display())
        };
        let errors = dir.join(format!("{name}.log"));
        let words = network.enter(index);
        let mut all = words.iter().map(std::ffi::OsStr::new).chain([binary.as_os_str()]);
        let mut command = Command::new(all.next().unwrap_or(binary.as_os_str()));
        command
            .args(all)
            .args(options.qemu_arguments(dir, accel)?)
            .args(["-chardev", &socket("console"), "-serial", "chardev:console"])
            .args(["-chardev", &socket("qmp"), "-mon", "chardev=qmp,mode=control"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&errors)?)
            .kill_on_drop(true);
        if index == 1 {
            command.args(["-incoming", "defer"]);
        }
        end_with_us(&mut command);
        let mut process = command.spawn()?;
        // What enters a namespace, and what wraps a QEMU, becomes what it starts.
        let pid = process.id().unwrap_or(0);
        let qmp = match Qmp::connect(&dir.join(format!("{name}.qmp")), SOON).await {
            Ok(qmp) => qmp,
            Err(error) => {
                let ended = matches!(process.try_wait(), Ok(Some(_)));
                let said = std::fs::read_to_string(&errors).unwrap_or_default().trim().to_owned();
                return Err(if ended { RunError::Ended { said } } else { error.into() });
            }
        };
        let features = Features::probe(&qmp).await?;
        Ok(Self { _process: process, pid, qmp, features })
    }

    fn can(&self, means: &Means) -> Result<(), String> {
        if let Some(missing) = means.capabilities.iter().find(|it| !self.features.has_capability(it)) {
            return Err(format!("this QEMU has no migration capability {missing}"));
        }
        let mut parameters = means.parameters.keys().chain(means.percent_of_ram.keys());
        match parameters.find(|it| !self.features.has_parameter(it)) {
            Some(missing) => Err(format!("this QEMU has no migration parameter {missing}")),
            None => Ok(()),
        }
    }
}

impl Pair {
    async fn start(options: &RunOptions, accel: &Accel) -> Result<Self, RunError> {
        let dir = tempfile::Builder::new().prefix("vmferry-bench-").tempdir()?;
        let network = Network::set_up(options.transport == Transport::Link, false, options.link_bits)?;
        let source = Qemu::start(options, accel, &network, dir.path(), 0).await?;
        let mut watch = GuestWatch::new();
        watch.follow_socket(0, &dir.path().join("source.console")).await?;
        let destination = Qemu::start(options, accel, &network, dir.path(), 1).await?;
        watch.follow_socket(1, &dir.path().join("destination.console")).await?;
        watch.wait_for_start().await?;
        Ok(Self { source, destination, watch, network, dir })
    }

    fn both(&self) -> [&Qemu; 2] {
        [&self.source, &self.destination]
    }

    /// The first of the scenario's that both QEMUs have.
    fn choose_means<'a>(&self, options: &'a RunOptions) -> Result<&'a Means, RunError> {
        let mut reason = "the scenario names no means".to_owned();
        for means in &options.scenario.qemu {
            match self.both().iter().try_for_each(|qemu| qemu.can(means)) {
                Ok(()) => return Ok(means),
                Err(why) => reason = why,
            }
        }
        Err(RunError::CannotHere { reason })
    }

    /// Sets both QEMUs to what the scenario says.
    async fn set_up(&self, options: &RunOptions, means: &Means, report: &mut RunReport) -> Result<(), RunError> {
        let mut capabilities = vec!["events".to_owned(), "return-path".to_owned()];
        capabilities.retain(|it| self.both().iter().all(|qemu| qemu.features.has_capability(it)));
        capabilities.extend(means.capabilities.clone());
        let parameters = means.parameters_for(options.ram());
        let bandwidth = options.scenario.bandwidth();
        for qemu in self.both() {
            let states =
                capabilities.iter().map(|it| CapabilityState { capability: it.clone(), state: true }).collect();
            qemu.qmp.execute(MigrateSetCapabilities { capabilities: states }).await.map_err(refused)?;
            let mut all = parameters.clone();
            all.insert("max-bandwidth".into(), bandwidth.unwrap_or(UNLIMITED).into());
            all.insert("downtime-limit".into(), (options.scenario.downtime.as_millis() as u64).into());
            if qemu.features.has_parameter("max-postcopy-bandwidth") {
                all.insert("max-postcopy-bandwidth".into(), bandwidth.unwrap_or(0).into());
            }
            qemu.qmp.execute_raw("migrate-set-parameters", Value::Object(all)).await.map_err(refused)?;
        }
        if options.scenario.tls {
            let key = StreamKey::new(&vmferry_link::random_bytes());
            let priority = tls_priority(Cipher::Aes128Gcm);
            for (qemu, end, name) in
                [(&self.source, Endpoint::Client, "key"), (&self.destination, Endpoint::Server, "their-key")]
            {
                protect_streams(&qemu.qmp, &self.dir.path().join(name), &key, end, priority).await?;
            }
        }
        report.settings.capabilities = capabilities;
        report.settings.parameters = parameters;
        Ok(())
    }

    /// Where the destination listens, from now on.
    async fn listen(&self, options: &RunOptions) -> Result<String, RunError> {
        if options.transport == Transport::Unix {
            let uri = format!("unix:{}", self.dir.path().join("migration").display());
            self.destination.qmp.execute(MigrateIncoming { uri: uri.clone() }).await?;
            return Ok(uri);
        }
        let ip = self.network.address(1)?.ip();
        self.destination.qmp.execute(MigrateIncoming { uri: format!("tcp:{ip}:0") }).await?;
        let mut addresses = self.destination.qmp.execute(QueryMigrate {}).await?.socket_address.into_iter().flatten();
        let port = addresses.find_map(|address| address.tcp_port());
        let port = port.ok_or_else(|| RunError::CannotHere { reason: "QEMU does not tell where it listens".into() })?;
        Ok(format!("tcp:{ip}:{port}"))
    }

    async fn drive(
        &self,
        options: &RunOptions,
        means: &Means,
        report: &mut RunReport,
        tell: &impl Fn(&str),
    ) -> Result<Driven, RunError> {
        let (scenario, source) = (&options.scenario, &self.source.qmp);
        let uri = self.listen(options).await?;
        let mut recorder = Recorder::begin();
        recorder.mark(MarkKind::Copy);
        let (mut paused, mut post_copy) = (false, false);
        let mut rate = Rate::default();
        let mut pause = scenario.pause_after;
        if pause == Some(0) {
            source.execute(Stop {}).await?;
            recorder.mark(MarkKind::Paused);
            (paused, pause) = (true, None);
        }
        source.execute(Migrate { uri, resume: None }).await?;
        let mut last;
        let (reason, seen) = loop {
            last = source.execute_raw("query-migrate", json!({})).await?;
            let info = info_of(&last)?;
            let ram = info.ram.clone().unwrap_or_default();
            let round = ram.dirty_sync_count as u32;
            // Before QEMU has counted the guest's RAM there is nothing to tell.
            if ram.total > 0 {
                recorder.progress(ProgressSample {
                    at_ms: 0.0,
                    round,
                    remaining: ram.remaining,
                    sent: ram.transferred,
                    dirty_rate: ram.dirty_pages_rate * ram.page_size.unwrap_or(4096),
                    link_rate: rate.update(ram.transferred),
                    throttle: info.cpu_throttle_percentage.unwrap_or(0).min(100) as u8,
                });
            }
            let under_way = match &info.status {
                Some(MigrationStatus::Completed) => break (None, info),
                Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                    let why = info.error_desc.clone().unwrap_or_else(|| "QEMU does not say why".into());
                    break (Some(format!("QEMU's migration failed: {why}")), info);
                }
                Some(MigrationStatus::PostcopyPaused) => break (Some("post-copy lost its connection".into()), info),
                Some(MigrationStatus::Active) => true,
                _ => false,
            };
            // A round is done when the next one has begun.
            let done = round.saturating_sub(1);
            if under_way && !post_copy && scenario.post_copy_after.is_some_and(|after| done >= after) {
                tell("turning to post-copy");
                source.execute(MigrateStartPostcopy {}).await?;
                recorder.mark(MarkKind::PostCopy);
                post_copy = true;
            }
            if under_way && !paused && pause.is_some_and(|after| done >= after) {
                tell("pausing the guest");
                source.execute(Stop {}).await?;
                recorder.mark(MarkKind::Paused);
                paused = true;
            }
            let late = recorder.begun().elapsed() > scenario.most_time;
            // A guest that is paused, or elsewhere, needs no more rounds.
            if late || (done >= scenario.most_rounds && !paused && !post_copy) {
                let why = match late {
                    true if post_copy => format!(
                        "post-copy was not done after {} s, and there is no way back from it",
                        scenario.most_time.as_secs()
                    ),
                    true => format!("not done after {} s", scenario.most_time.as_secs()),
                    false => format!("not done after {done} rounds"),
                };
                recorder.mark(MarkKind::Cancelled);
                self.cancel(info.status.as_ref()).await?;
                break (Some(why), info);
            }
            tokio::time::sleep(LOOK).await;
        };
        let ended = Instant::now();
        let completed = reason.is_none();
        if paused {
            let runs_at = if completed { &self.destination } else { &self.source };
            runs_at.qmp.execute(Cont {}).await?;
        }
        let ram = seen.ram.clone().unwrap_or_default();
        let summary = &mut report.summary;
        summary.sent = Some(ram.transferred);
        summary.rounds = Some(ram.dirty_sync_count as u32);
        summary.post_copy = Some(post_copy);
        summary.post_copy_faults = post_copy.then_some(ram.postcopy_requests);
        if completed {
            let ms = recorder.ms_at(ended);
            (summary.total_ms, summary.ram_ms) = (Some(ms), Some(ms));
            summary.downtime_told_ms = seen.downtime.map(|ms| ms as f64);
        }
        let levers = levers(options, means, &last, &seen, &recorder, paused);
        let outcome = reason.map_or(Outcome::Completed, |reason| Outcome::NotCompleted { reason });
        Ok(Driven { outcome, recorder, ended, levers })
    }

    async fn cancel(&self, status: Option<&MigrationStatus>) -> Result<(), RunError> {
        if status.is_some_and(MigrationStatus::is_post_copy) {
            return Ok(()); // There is no way back; both QEMUs end with the run.
        }
        self.source.qmp.execute(MigrateCancel {}).await?;
        let deadline = Instant::now() + CANCEL;
        while Instant::now() < deadline {
            let info = self.source.qmp.execute(QueryMigrate {}).await?;
            if info.status == Some(MigrationStatus::Cancelled) {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}

fn info_of(answer: &Value) -> Result<MigrationInfo, QmpError> {
    serde_json::from_value(answer.clone()).map_err(|source| QmpError::Reply { command: "query-migrate".into(), source })
}

/// A QEMU that refuses what a scenario needs: a reason to skip it.
fn refused(error: QmpError) -> RunError {
    match error {
        QmpError::Command { .. } => RunError::CannotHere { reason: vmferry_api::in_one_line(&error) },
        other => other.into(),
    }
}

/// What tells that the scenario's means really acted.
fn levers(
    options: &RunOptions,
    means: &Means,
    last: &Value,
    seen: &MigrationInfo,
    recorder: &Recorder,
    paused: bool,
) -> Vec<Lever> {
    let ram = seen.ram.clone().unwrap_or_default();
    let number = |path: &str| last.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
    let has = |capability: &str| means.capabilities.iter().any(|it| it == capability);
    let mut levers = Vec::new();
    let mut add = |name: &str, acted: bool, evidence: String| levers.push(Lever { name: name.into(), acted, evidence });
    if options.scenario.pause_after.is_some() {
        add(
            "pause",
            paused,
            if paused { "the guest was paused" } else { "it ended before the guest was to be paused" }.into(),
        );
    }
    if has("postcopy-ram") {
        let requests = ram.postcopy_requests;
        add("post-copy", requests > 0, format!("the destination asked for {requests} pages"));
    }
    if has("auto-converge") {
        let most = recorder.throttle();
        add("auto-converge", most > 0, format!("the guest was slowed by up to {most} %"));
    }
    if has("xbzrle") {
        let (pages, bytes) = (number("/xbzrle-cache/pages"), number("/xbzrle-cache/bytes"));
        let (missed, whole) = (number("/xbzrle-cache/cache-miss"), number("/xbzrle-cache/overflow"));
        let evidence = format!(
            "{pages} pages were sent as {bytes} bytes of changes, {whole} had changed too much for that, {missed} were \
             not in the cache"
        );
        add("xbzrle", pages + whole > 0.0, evidence);
    }
    if has("compress") {
        let (pages, bytes) = (number("/compression/pages"), number("/compression/compressed-size"));
        let ratio = pages * 4096.0 / bytes.max(1.0);
        add("compress", pages > 0.0 && ratio > 1.0, format!("{pages} pages became {bytes} bytes, {ratio:.2} to 1"));
    }
    if has("multifd") {
        let by_name = |name: &str| means.parameters.get(name).cloned().unwrap_or_default();
        let sent = ram.multifd_bytes;
        add("multifd", sent > 0, format!("{sent} bytes went over {} connections", by_name("multifd-channels")));
        let packer = by_name("multifd-compression");
        if let Some(packer) = packer.as_str().filter(|it| *it != "none") {
            let raw = ram.normal_bytes;
            let ratio = raw as f64 / sent.max(1) as f64;
            add(packer, ratio > 1.02, format!("{raw} bytes of pages became {sent}, {ratio:.2} to 1"));
        }
    }
    if has("dirty-limit") {
        let time = number("/dirty-limit-throttle-time-per-round");
        add("dirty-limit", time > 0.0, format!("the guest was held back for {time} µs a round"));
    }
    if options.scenario.tls {
        add("tls", true, "both QEMUs had a key, without which neither takes a connection".into());
    }
    levers
}

/// How fast a growing count grows, smoothed a little.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    rate: f64,
}

impl Rate {
    /// Weight of the newest sample, at twenty a second.
    const WEIGHT: f64 = 0.25;

    fn update(&mut self, count: u64) -> u64 {
        let now = Instant::now();
        if let Some((at, before)) = self.last {
            let newest = count.saturating_sub(before) as f64 / (now - at).as_secs_f64().max(1e-3);
            self.rate += (newest - self.rate) * if self.rate == 0.0 { 1.0 } else { Self::WEIGHT };
        }
        self.last = Some((now, count));
        self.rate as u64
    }
}
