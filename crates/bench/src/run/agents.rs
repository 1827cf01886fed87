//! Through two real agents on a testbed: vmferry as its users have it, or turning to post-copy when a scenario says so.

use std::time::{Duration, Instant};

use vmferry_agent::api::local::Begun;
use vmferry_agent::api::types::{MigrateRequest, MigrationEvent, Problem, Report, Step, VmView};
use vmferry_agent::client::{Client, ClientError, vm_path};

use super::processors::Sampler;
use super::{Driven, RunError, RunOptions, Transport, VM, conclude, measure_link, new_report};
use crate::report::{Lever, MarkKind, Origin, Outcome, Recorder, RunReport, Summary};
use crate::testbed::{Host, Testbed, TestbedOptions};

/// How often it is looked whether the destination's QEMU is there yet.
const LOOK: Duration = Duration::from_millis(100);
/// Never, for a scenario that is pre-copy to the end.
const NEVER: u32 = u32::MAX;

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
    tell("starting two agents and the guest");
    let bed = Testbed::start(bed_options).await?;
    let mut argv = vec!["qemu-system-x86_64".to_owned()];
    argv.extend(options.qemu_arguments(bed.dir())?);
    argv.extend(["-serial", "stdio"].map(str::to_owned));
    let watch = bed.start_guest(VM, argv).await?;
    let client = bed.alpha().client()?;
    let view: VmView = client.get(&vm_path(VM)).await?;
    let mut report = new_report(Origin::Bench, options.settings());
    report.versions.source_qemu.clone_from(&view.qemu_version);
    report.versions.accelerator.clone_from(&view.accelerator);
    report.versions.machine.clone_from(&view.machine);
    report.settings.link_measured = measure_link(bed.network())?;
    let sampler = Sampler::start();
    sampler.watch(|watched| {
        watched.qemus[0] = Some(view.pid);
        watched.agents = [bed.alpha(), bed.beta()].map(Host::agent_pid);
    });
    tell("watching the guest before");
    tokio::time::sleep(options.before).await;
    tell("migrating");
    let driven = drive(options, &bed, &client, &sampler, &mut report, &tell).await?;
    tell("watching the guest after");
    Ok(conclude(options, report, driven, &watch, sampler).await)
}

fn request(options: &RunOptions, bed: &Testbed) -> MigrateRequest {
    let scenario = &options.scenario;
    MigrateRequest {
        to: bed.beta().address.to_string(),
        dry_run: false,
        downtime_ms: scenario.downtime.as_millis() as u64,
        max_time_ms: None,
        bandwidth: scenario.bandwidth(),
        post_copy: true,
        post_copy_after: (!scenario.automatic).then(|| scenario.post_copy_after.unwrap_or(NEVER)),
        engine: Some(options.engine),
        disks_are_shared: false,
    }
}

async fn drive(
    options: &RunOptions,
    bed: &Testbed,
    client: &Client,
    sampler: &Sampler,
    report: &mut RunReport,
    tell: &impl Fn(&str),
) -> Result<Driven, RunError> {
    let scenario = &options.scenario;
    let mut recorder = Recorder::begin();
    let path = format!("{}/migration", vm_path(VM));
    let begun: Begun = client.post(&path, &request(options, bed)).await.map_err(refused)?;
    let Some(id) = begun.id else { return Err(RunError::CannotHere { reason: "nothing was begun".into() }) };
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
    let mut look = tokio::time::interval(LOOK);
    let deadline = recorder.begun() + scenario.most_time;
    let mut stopped: Option<String> = None;
    let (mut post_copy, mut following) = (false, true);
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
            _ = look.tick(), if !sampler.knows_destination() => {
                if let Ok(Some(view)) = bed.beta().show(VM).await {
                    sampler.watch(|watched| watched.qemus[1] = Some(view.pid));
                }
                continue;
            }
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
            MigrationEvent::Note { text } => report.notes.push(text),
            _ => {}
        }
        let done = recorder.round().saturating_sub(1);
        if !scenario.automatic && done >= scenario.most_rounds && !post_copy && stopped.is_none() {
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
    report.summary.rounds = Some(recorder.round());
    if let Ok(theirs) = &end {
        report.summary = Summary::of(theirs);
        report.summary.total_ms = Some(recorder.ms_at(ended));
    }
    let levers = levers(options, end.as_deref().ok());
    Ok(Driven { outcome, recorder, ended, levers })
}

fn levers(options: &RunOptions, report: Option<&Report>) -> Vec<Lever> {
    let mut levers = Vec::new();
    if options.scenario.post_copy_after.is_some() {
        let acted = report.is_some_and(|it| it.post_copy);
        let evidence = match acted {
            true => "the agents handed the guest over before its RAM was there",
            false => "the RAM was there before post-copy was to begin",
        };
        levers.push(Lever { name: "post-copy".into(), acted, evidence: evidence.into() });
    }
    levers
}

/// An agent that refuses what a scenario needs: a reason to skip it.
fn refused(error: ClientError) -> RunError {
    match error {
        ClientError::Problem(problem) => RunError::CannotHere { reason: problem.message },
        other => other.into(),
    }
}
