//! Through two real agents on a testbed: vmferry as its users have it, or turning to post-copy when a scenario says so.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::client::{Client, ClientError, vm_path};
use vmferry_api::{
    Begun, Code, EngineName, Means as ScriptMeans, MigrateRequest, MigrationEvent, Prefer, Problem, Report, Script,
    Step, VmView,
};
use vmferry_qemu::Accel;

use super::processors::Sampler;
use super::{Driven, RunError, RunOptions, Transport, VM, conclude, measure_link, new_report};
use crate::GuestKind;
use crate::report::{Lever, MarkKind, Origin, Outcome, Recorder, RunReport, Summary, Versions};
use crate::scenario::Means;
use crate::testbed::{Host, Testbed, TestbedOptions};

/// How often it is looked whether the destination's QEMU is there yet.
const LOOK: Duration = Duration::from_millis(100);

pub(super) async fn run(options: &RunOptions, tell: impl Fn(&str)) -> Result<RunReport, RunError> {
    let scenario = &options.scenario;
    let networks = match options.transport {
        Transport::Link => "192.0.2.0/24",
        _ => "127.0.0.0/8",
    };
    let plain = format!("[[network]]\ncidr = \"{networks}\"\nsecurity = \"plain\"");
    let config = if scenario.tls { String::new() } else { plain };
    let bed_options = TestbedOptions {
        namespaces: options.transport == Transport::Link,
        link_bits: options.link_bits,
        qemu_dirs: [options.qemu_dir.clone(), options.qemu_dir.clone()],
        engine: Some(options.engine),
        config: [config.clone(), config],
        ..TestbedOptions::new(&options.vmferry)
    };
    if options.kind == GuestKind::Bare {
        options.accelerator().await?;
    }
    tell("starting two agents and the guest");
    let bed = Testbed::start(bed_options).await?;
    let mut argv = vec!["qemu-system-x86_64".to_owned()];
    argv.extend(options.qemu_arguments(bed.dir(), &Accel::kvm())?);
    argv.extend(["-serial", "stdio"].map(str::to_owned));
    let (watch, notes) = bed.start_guest_and_hear(VM, argv).await?;
    let client = bed.alpha().client()?;
    let view: VmView = client.get(&vm_path(VM)).await?;
    let mut report = new_report(Origin::Bench, options.settings());
    report.versions = Versions::of_source(&view);
    report.notes.extend(notes);
    report.settings.link_measured = measure_link(bed.network())?;
    let sampler = Sampler::start();
    sampler.watch(|watched| {
        watched.qemus[0] = Some(view.pid);
        watched.agents = [bed.alpha(), bed.beta()].map(Host::agent_pid);
    });
    tell("watching the guest before");
    tokio::time::sleep(options.before).await;
    tell("migrating");
    let journey = Journey {
        client: &client,
        vm: VM,
        to: bed.beta().address.to_string(),
        qemu_appears: Some((bed.beta(), &sampler)),
    };
    let driven = drive(options, &journey, &mut report, &tell, |_| {}).await?;
    tell("watching the guest after");
    Ok(conclude(options, report, driven, &watch, || sampler).await)
}

/// Which guest goes where.
pub(super) struct Journey<'a> {
    /// Of the source's agent.
    pub(super) client: &'a Client,
    /// The guest's name there.
    pub(super) vm: &'a str,
    /// The destination.
    pub(super) to: String,
    /// The destination, if it is on this machine, and who is to look at its QEMU when that is there.
    pub(super) qemu_appears: Option<(&'a Host, &'a Sampler)>,
}

impl Journey<'_> {
    /// Looks whether the destination's QEMU is there, from time to time until it is.
    async fn look_for_qemu(&self) {
        let Some((host, sampler)) = self.qemu_appears else { return std::future::pending().await };
        while !sampler.knows_destination() {
            tokio::time::sleep(LOOK).await;
            if let Ok(Some(view)) = host.show(self.vm).await {
                sampler.watch(|watched| watched.qemus[1] = Some(view.pid));
            }
        }
        std::future::pending::<()>().await;
    }
}

pub(super) fn request(options: &RunOptions, to: &str) -> MigrateRequest {
    let scenario = &options.scenario;
    let means = scenario.qemu.iter().map(|means| ScriptMeans {
        capabilities: means.capabilities.clone(),
        parameters: means.parameters_for(options.ram()),
    });
    MigrateRequest {
        to: to.into(),
        dry_run: false,
        watch_ms: 0,
        downtime_ms: scenario.downtime.as_millis() as u64,
        max_time_ms: None,
        bandwidth: scenario.bandwidth(),
        post_copy: scenario.post_copy,
        prefer: Prefer::default(),
        script: (!scenario.automatic).then(|| Script {
            post_copy_after: scenario.post_copy_after,
            pause_after: scenario.pause_after,
            means: means.collect(),
        }),
        engine: Some(options.engine),
        policy: scenario.policy.clone(),
        disks_are_shared: false,
        copy_disks: true,
        disks: BTreeMap::new(),
    }
}

/// Migrates the guest as the scenario says; whoever wants to know is told the migration's id.
pub(super) async fn drive(
    options: &RunOptions,
    journey: &Journey<'_>,
    report: &mut RunReport,
    tell: &impl Fn(&str),
    has_begun: impl FnOnce(Uuid),
) -> Result<Driven, RunError> {
    let (scenario, client) = (&options.scenario, journey.client);
    let mut recorder = Recorder::begin();
    let path = format!("{}/migration", vm_path(journey.vm));
    let begun: Begun = client.post(&path, &request(options, &journey.to)).await.map_err(refused)?;
    let Some(id) = begun.id else { return Err(RunError::CannotHere { reason: "nothing was begun".into() }) };
    has_begun(id);
    report.settings.encrypted = Some(!begun.plan.protection.starts_with("none"));
    report.versions.destination_qemu = Some(begun.plan.destination_qemu.clone());
    report.settings.capabilities = begun.plan.capabilities;
    report.notes.extend(begun.plan.notes);
    let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
    let events_path = format!("/v1/migrations/{id}/events");
    let follow = client.follow(&events_path, |event| {
        let last = matches!(event, MigrationEvent::Finished(_) | MigrationEvent::Failed(_));
        // An error means that nobody listens any more.
        let _ = sender.send(event);
        last.then_some(())
    });
    tokio::pin!(follow);
    let looking = journey.look_for_qemu();
    tokio::pin!(looking);
    let deadline = recorder.begun() + scenario.most_time;
    let mut stopped: Option<String> = None;
    let (mut post_copy, mut paused, mut following) = (false, false, true);
    let end: Result<Box<Report>, Problem> = loop {
        let event = tokio::select! {
            event = events.recv() => event,
            ended = &mut follow, if following => {
                ended?;
                // What it took is still to be read.
                following = false;
                continue;
            }
            () = tokio::time::sleep_until(deadline.into()), if stopped.is_none() => {
                stopped = Some(format!("not done after {} s", scenario.most_time.as_secs()));
                recorder.mark(MarkKind::Cancelled);
                // An error means that it has ended already; its last event says how.
                let _ = client.delete(&path).await;
                continue;
            }
            () = &mut looking => continue,
        };
        let Some(event) = event else { return Err(ClientError::LostSight.into()) };
        recorder.event(&event);
        match event {
            MigrationEvent::Finished(report) => break Ok(report),
            MigrationEvent::Failed(problem) => break Err(problem),
            MigrationEvent::Step { step: Step::PostCopy } => {
                tell("post-copy");
                post_copy = true;
            }
            // As the scenario wants it, and before the rest is sent.
            MigrationEvent::Step { step: Step::SwitchOver } => {
                tell("pausing the guest");
                recorder.mark(MarkKind::Paused);
                paused = true;
            }
            MigrationEvent::Note { text } => report.notes.push(text),
            _ => {}
        }
        let done = recorder.round().saturating_sub(1);
        if !scenario.automatic && done >= scenario.most_rounds && !post_copy && !paused && stopped.is_none() {
            stopped = Some(format!("not done after {done} rounds"));
            recorder.mark(MarkKind::Cancelled);
            // As above.
            let _ = client.delete(&path).await;
        }
    };
    let ended = Instant::now();
    let outcome = match &end {
        Ok(_) => Outcome::Completed,
        Err(problem) => Outcome::NotCompleted { reason: stopped.unwrap_or_else(|| problem.message.clone()) },
    };
    (report.summary.rounds, report.summary.sent) = (Some(recorder.round()), recorder.sent());
    if let Ok(theirs) = &end {
        report.summary = Summary::of(theirs);
        report.summary.total_ms = Some(recorder.ms_at(ended));
    }
    let levers = levers(options, end.as_deref().ok(), paused);
    Ok(Driven { outcome, recorder, ended, levers })
}

/// As far as the agents tell. Of QEMU's packing they do not.
fn levers(options: &RunOptions, report: Option<&Report>, paused: bool) -> Vec<Lever> {
    let scenario = &options.scenario;
    let mut levers = Vec::new();
    let mut add = |name: &str, acted: bool, evidence: String| levers.push(Lever { name: name.into(), acted, evidence });
    if scenario.post_copy_after.is_some() {
        let acted = report.is_some_and(|it| it.post_copy);
        let evidence = match acted {
            true => "the guest was handed over before its RAM was there",
            false => "the RAM was there before post-copy was to begin",
        };
        add("post-copy", acted, evidence.into());
    }
    if scenario.pause_after.is_some() {
        let evidence = if paused { "the guest was paused" } else { "it ended before the guest was to be paused" };
        add("pause", paused, evidence.into());
    }
    let slowed = report.map_or(0, |it| it.throttle);
    let may_throttle = |means: &Means| means.capabilities.iter().any(|it| it == "auto-converge");
    if scenario.automatic && !scenario.post_copy {
        let name = if options.engine == EngineName::External { "pacing" } else { "throttle" };
        add(name, slowed > 0, format!("the guest's writes were slowed by up to {slowed} %"));
    } else if scenario.qemu.iter().any(may_throttle) && options.engine == EngineName::Qemu {
        add("auto-converge", slowed > 0, format!("the guest was slowed by up to {slowed} %"));
    }
    levers
}

/// An agent that refuses what a scenario needs: a reason to skip it. What may go by itself is none.
pub(super) fn refused(error: ClientError) -> RunError {
    const LASTING: [Code; 5] = [Code::NotMigratable, Code::NoQemu, Code::NoMachine, Code::NoCpu, Code::NoAccelerator];
    match error {
        ClientError::Problem(problem) if LASTING.contains(&problem.code) => {
            RunError::CannotHere { reason: problem.message }
        }
        other => other.into(),
    }
}
