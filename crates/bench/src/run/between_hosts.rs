//! To another machine, through its agent and this one's: whatever a scenario says is done by the agents.
//!
//! The agents bring what the guest boots from, hear it on both machines, and end it when this ends, however it does: see
//! the agent's `witness` and `boot_files`.

use vmferry_api::client::vm_path;
use vmferry_api::trial::{Data, Trial, TrialResult};
use vmferry_api::{Begun, MigrateRequest, RunRequest, Security, Started, TrialRequest};
use vmferry_link::Fingerprint;
use vmferry_qemu::Accel;

use super::agents::{Journey, drive, refused, request};
use super::processors::Sampler;
use super::witnesses::Witnesses;
use super::{OtherHost, RunError, RunOptions, conclude, new_report};
use crate::INITRD;
use crate::report::{Hardware, Origin, RunReport, Versions};

/// How long the link is tried.
const LINK_TRIAL_MS: u64 = 700;

pub(super) async fn run(options: &RunOptions, to: &OtherHost, tell: impl Fn(&str)) -> Result<RunReport, RunError> {
    tell("measuring the link");
    let carried = measure_link(to).await?;
    tell("starting the guest");
    // Its files are named after what is in them: the agents bring them along.
    let dir = tempfile::Builder::new().prefix("vmferry-bench-").tempdir()?;
    let kernel = std::fs::read(options.kernel()?)?;
    let [kernel, initrd] = [&kernel[..], INITRD].map(|content| (Fingerprint::of(content).to_string(), content));
    for (name, content) in [&kernel, &initrd] {
        std::fs::write(dir.path().join(name), content)?;
    }
    let mut argv = vec![options.qemu().display().to_string()];
    argv.extend(options.guest_arguments(&kernel.0, &initrd.0, &Accel::kvm()));
    argv.extend(["-serial", "stdio"].map(str::to_owned));
    let name = format!("bench-{:08x}", fastrand::u32(..));
    let guest = RunRequest { name: name.clone(), argv, cwd: dir.path().into(), measuring: true, autostart: false };
    let (mut witnesses, watch) = Witnesses::new();
    let started: Started = to.agent.post("/v1/vms", &guest).await?;
    witnesses.listen(0, &to.agent, format!("{}/witness", vm_path(&name)));
    watch.wait_for_start().await?;
    // Planned once before it counts: this is when the boot files go there.
    let plan = MigrateRequest { dry_run: true, ..request(options, &to.name) };
    let planned: Begun = to.agent.post(&format!("{}/migration", vm_path(&name)), &plan).await.map_err(refused)?;
    if options.scenario.tls && planned.plan.protection.starts_with("none") {
        let reason =
            format!("both hosts are configured to send guests unencrypted, and {} is not", options.scenario.name);
        return Err(RunError::CannotHere { reason });
    }
    let mut report = new_report(Origin::Bench, options.settings());
    report.versions = Versions::of_source(&started.vm);
    report.notes.extend(started.notes);
    report.settings.link_measured = Some(carried);
    tell("watching the guest before");
    tokio::time::sleep(options.before).await;
    tell("migrating");
    let journey = Journey { client: &to.agent, vm: &name, to: to.name.clone(), qemu_appears: None };
    let hear_it_there = |id| witnesses.listen(1, &to.agent, format!("/v1/migrations/{id}/witness"));
    let driven = drive(options, &journey, &mut report, &tell, hear_it_there).await?;
    tell("watching the guest after");
    let processors = |host| witnesses.facts(host).map_or(1, |facts| facts.processors);
    let sampler = || Sampler::of_two_hosts(&witnesses.processors(), [processors(0), processors(1)]);
    let mut report = conclude(options, report, driven, &watch, sampler).await;
    let machine = |host| witnesses.facts(host).map(|facts| Hardware::of(facts, false));
    report.hardware = machine(0).or(report.hardware);
    report.destination_hardware = machine(1);
    report.clocks = witnesses.clocks();
    match witnesses.lost() {
        0 => {}
        pieces => report.notes.push(format!("{pieces} pieces of what the guest said were lost on the way here.")),
    }
    if witnesses.missed_its_arrival() {
        report
            .notes
            .push("The guest was heard on the other host only after it had arrived: its downtime is a guess.".into());
    }
    Ok(report)
}

/// What the link carries for one stream, protected as the hosts' configuration says, in bytes a second.
async fn measure_link(to: &OtherHost) -> Result<u64, RunError> {
    let trial = |security| Trial {
        security,
        streams: 1,
        packing: "none".into(),
        data: Data::Random,
        time_ms: LINK_TRIAL_MS,
        rate: None,
    };
    let ask = |security| {
        let request = TrialRequest { to: to.name.clone(), trial: trial(security) };
        async move { to.agent.post::<_, TrialResult>("/v1/link-benchmark", &request).await }
    };
    let result = match ask(Security::Plain).await {
        Ok(result) => result,
        Err(_) => ask(Security::Tls).await?,
    };
    Ok((result.bytes as f64 / (result.time_ms / 1e3)) as u64)
}
