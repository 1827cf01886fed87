//! What a user does with a VM: run it, have one adopted, pause and resume it, stop it, start it again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmferry_api::{AdoptRequest, RunRequest, Started, StopRequest, VmSpec, in_one_line};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{CommandLine, Inventory, Qmp, RunState, wants_shared_ram, without_ours};

use super::drift::drift_of;
use super::host::Host;
use super::idle::{Idle, IdleVm};
use super::launch::describe;
use super::vm::{Claim, GRACE, Stage, Vm, is_valid_name};
use crate::error::AgentError;
use crate::journal::{Instance, VmRecord};

/// How long somebody else's monitor may take to answer.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a guest that does not react to its power button is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);

pub(crate) fn check_name(name: &str) -> Result<(), AgentError> {
    if is_valid_name(name) {
        return Ok(());
    }
    Err(AgentError::BadRequest {
        message: format!("{name:?} cannot name a VM"),
        hint: Some("use up to 64 letters, digits, dots, dashes and underscores, a letter or digit first".into()),
    })
}

/// Starts a VM.
pub(crate) async fn run(host: &Arc<Host>, request: RunRequest) -> Result<Started, AgentError> {
    check_name(&request.name)?;
    let _name = host.reserve_name(&request.name)?;
    let command = CommandLine::parse(&request.argv)?;
    let accel = host.qemus.accelerator(&host.qemus.find_qemu(&command)?).await;
    let spec = VmSpec {
        name: request.name,
        argv: request.argv,
        cwd: request.cwd,
        shared_ram: wants_shared_ram(&command),
        adopted: false,
        measuring: request.measuring,
        io_limits: None,
    };
    let (vm, notes) = host.launch(&spec, &command, accel, request.autostart, None).await?;
    tracing::info!(vm = vm.name(), pid = vm.pid, "runs");
    Ok(Started { vm: vm.view(host.config.engine).await, notes })
}

/// Takes over a QEMU that somebody else started.
pub(crate) async fn adopt(host: &Arc<Host>, request: AdoptRequest) -> Result<Started, AgentError> {
    check_name(&request.name)?;
    let _name = host.reserve_name(&request.name)?;
    let bad = |message: String, hint: &str| AgentError::BadRequest { message, hint: Some(hint.into()) };
    let socket = request.qmp.display();
    let qmp = Qmp::connect(&request.qmp, ADOPT_TIMEOUT).await.map_err(|error| {
        bad(
            format!("no QEMU answers at {socket}: {error}"),
            "is it a QMP socket, and is no other program connected to it? QEMU serves one at a time; \
             give it a second -qmp for vmferry",
        )
    })?;
    let process = vmferry_qemu::pid_of_socket_peer(&qmp)
        .and_then(|pid| Some((pid, vmferry_qemu::process_start_time(pid)?, vmferry_qemu::process_cwd(pid)?)));
    let (pid, start_time, cwd) = process.ok_or_else(|| {
        bad(format!("the QEMU behind {socket} is not a process of this host"), "adopt it on its host")
    })?;
    // It may be one that an agent has started which forgot it since.
    let (argv, shared_ram) = without_ours(&CommandLine::parse(&vmferry_qemu::process_command_line(pid))?);
    if let Some(known) = host.vms().into_iter().find(|vm| vm.pid == pid && vm.is_alive()) {
        return Err(bad(format!("that QEMU is the VM {} already", known.name()), "nothing needs to be done"));
    }
    let accelerator = match qmp.execute(commands::QueryKvm {}).await? {
        kvm if kvm.enabled => "kvm",
        _ => "tcg",
    };
    let record = VmRecord {
        spec: VmSpec { name: request.name, argv, cwd, shared_ram, adopted: true, measuring: false, io_limits: None },
        instance: Instance::now(pid, start_time),
        qmp: request.qmp.to_string_lossy().into_owned(),
        accelerator: accelerator.into(),
        incoming: None,
        autostart: false,
        ended: None,
        changed: None,
    };
    host.journal.put_vm(&record).await?;
    let vm = match host.take(&record, qmp, Stage::Owned).await {
        Ok(vm) => vm,
        Err(error) => {
            host.journal.remove_vm(&record.spec.name, &record.instance).await?;
            return Err(error);
        }
    };
    let notes = match describe(&vm).await {
        Some(now) => what_is_known(host, &vm, &now)
            .await
            .unwrap_or_else(|error| vec![format!("Whether it was changed is not known: {}.", in_one_line(&error))]),
        None => vec!["Its QEMU does not tell what it is made of: whether it was changed is not known.".into()],
    };
    tracing::info!(vm = vm.name(), pid, "adopted");
    Ok(Started { vm: vm.view(host.config.engine).await, notes })
}

/// What its user should know of one that was adopted: how it was changed before, and what nobody tells of it.
async fn what_is_known(host: &Host, vm: &Vm, now: &Inventory) -> Result<Vec<String>, AgentError> {
    let mut drift = drift_of(host, vm, now).await?.unwrap_or_default();
    for display in CommandLine::parse(&vm.spec.argv)?.passwords_set_later() {
        drift.untold.push(format!("its {display} password, to be set again where it goes"));
    }
    drift
        .untold
        .push("properties of its devices that were set by its monitor, in place of what its command line says".into());
    Ok(drift.notes().collect())
}

/// Starts a VM again whose QEMU has ended, or whose host was restarted.
pub(crate) async fn start(host: &Arc<Host>, name: &str) -> Result<Started, AgentError> {
    let idle = host.idle(name);
    if let Some(between) = idle.as_ref().and_then(IdleVm::between_hosts) {
        return Err(between);
    }
    let Some(IdleVm { record, why: Idle::Ended(_) }) = idle else {
        // One that runs, or does not answer, or is not known.
        let vm = host.vm(name)?;
        return Err(AgentError::VmExists { name: vm.name().into(), host: host.config.name.clone() });
    };
    if record.spec.adopted {
        return Err(AgentError::Conflict {
            message: format!("{name} was started by somebody else, who alone can start it as it was"),
            hint: Some("start it there, and `vmferry adopt` it".into()),
        });
    }
    let mut spec = record.spec.clone();
    if let Some(changed) = &record.changed {
        if !changed.obstacles.is_empty() {
            return Err(AgentError::Changed { name: name.into(), changes: changed.obstacles.clone() });
        }
        spec.argv.clone_from(&changed.argv);
        spec.io_limits.clone_from(&changed.io_limits);
    }
    let _name = host.hold(name)?;
    let command = CommandLine::parse(&spec.argv)?;
    let accel = host.qemus.accelerator(&host.qemus.find_qemu(&command)?).await;
    let launched = host.launch(&spec, &command, accel, record.autostart, None).await;
    let (vm, notes) = match launched {
        Ok(launched) => launched,
        Err(error) => {
            // It stays on record, to be tried again.
            host.journal.put_vm(&record).await?;
            return Err(error);
        }
    };
    tracing::info!(vm = name, pid = vm.pid, "started again");
    Ok(Started { vm: vm.view(host.config.engine).await, notes })
}

/// Has a VM started whenever its host is, or not any more.
pub(crate) async fn set_autostart(host: &Host, name: &str, autostart: bool) -> Result<(), AgentError> {
    if let Some(idle) = host.idle(name) {
        if let Some(between) = idle.between_hosts() {
            return Err(between);
        }
        let _name = match &idle.why {
            Idle::Ended(_) => Some(host.hold(name)?),
            _ => None,
        };
        let IdleVm { record, why } = idle;
        let record = VmRecord { autostart, ..record };
        host.journal.put_vm(&record).await?;
        host.rest(record, why);
        return Ok(());
    }
    let vm = host.vm(name)?;
    // That alone: the rest may be being recorded at this moment.
    host.journal.vm_autostarts(name, &vm.instance(), autostart).await?;
    vm.autostart.store(autostart, Ordering::Relaxed);
    Ok(())
}

/// Pauses a guest. One that is being migrated arrives paused.
pub(crate) async fn pause(host: &Host, name: &str) -> Result<(), AgentError> {
    let vm = ours(host, name)?;
    is_not_on_its_way(&vm).await?;
    vm.qmp.execute(commands::Stop {}).await?;
    tracing::info!(vm = name, "paused");
    Ok(())
}

/// Has a paused guest go on.
pub(crate) async fn resume(host: &Host, name: &str) -> Result<(), AgentError> {
    let vm = ours(host, name)?;
    is_not_on_its_way(&vm).await?;
    vm.qmp.execute(commands::Cont {}).await?;
    tracing::info!(vm = name, "resumed");
    Ok(())
}

/// Neither of these does anything to a guest that stands for its switch-over.
async fn is_not_on_its_way(vm: &Vm) -> Result<(), AgentError> {
    match vm.run_state().await? {
        RunState::FinishMigrate | RunState::PostMigrate | RunState::InMigrate => Err(AgentError::Conflict {
            message: format!("{} is on its way to its destination at this moment", vm.name()),
            hint: Some("try again in a second".into()),
        }),
        _ => Ok(()),
    }
}

/// The VM, if its guest is this host's to pause and to resume.
fn ours(host: &Host, name: &str) -> Result<Arc<Vm>, AgentError> {
    let vm = host.vm(name)?;
    match vm.stage() {
        Stage::Owned | Stage::Planning | Stage::Stopping | Stage::MovingDisk | Stage::Migrating(_) => Ok(vm),
        Stage::Incoming(_) => Err(not_ours(name, "has not arrived yet", "its source's agent has the say over it")),
        Stage::Unclear => Err(not_ours(name, "may be another host's", "`vmferry resolve` says whose it is")),
        Stage::InDoubt(_) => Err(not_ours(name, "may run at its destination", "wait, or see `vmferry resolve --help`")),
        Stage::Left(_) | Stage::Stranded(_) => {
            Err(not_ours(name, "was handed over", "its destination's agent has the say over it"))
        }
    }
}

fn not_ours(name: &str, what: &str, hint: &str) -> AgentError {
    AgentError::Conflict { message: format!("the guest of {name} {what}"), hint: Some(hint.into()) }
}

/// Stops a VM: asks the guest to shut down, or ends its QEMU.
pub(crate) async fn stop(host: &Arc<Host>, name: &str, request: &StopRequest) -> Result<(), AgentError> {
    let conflict = |message: String, hint: String| AgentError::Conflict { message, hint: Some(hint) };
    if let Some(idle) = host.idle(name) {
        if let Some(between) = idle.between_hosts() {
            return Err(between);
        }
        if matches!(idle.why, Idle::Silent | Idle::Unclear) {
            if !request.force {
                let hint = format!("`vmferry stop {name} --force` ends its QEMU like a power cut");
                return Err(conflict(format!("the QEMU of {name} does not answer"), hint));
            }
            idle.record.instance.end(GRACE).await;
        }
        if request.keep {
            host.rest(idle.record, Idle::Ended("it was stopped".into()));
            return Ok(());
        }
        return host.forget_idle(&idle).await;
    }
    let vm = host.vm(name)?;
    let _claim = match Claim::take(&vm, Stage::Stopping) {
        Ok(claim) => Some(claim),
        Err(Stage::Stopping) => {
            return Err(conflict(format!("{name} is being stopped already"), "wait for it".into()));
        }
        Err(Stage::Unclear | Stage::MovingDisk) if request.force => None,
        Err(Stage::MovingDisk) => {
            let hint = format!("wait for it, or `vmferry disk cancel {name} DISK`");
            return Err(conflict(format!("a disk of {name} is being moved"), hint));
        }
        Err(Stage::Unclear) => {
            let hint = format!("`vmferry resolve {name}` first, or `vmferry stop {name} --force` to end the QEMU here");
            return Err(conflict(format!("the guest of {name} may be another host's"), hint));
        }
        Err(Stage::InDoubt(_)) => {
            let hint = format!("wait for that host, or decide: `vmferry resolve {name} --help`");
            return Err(conflict(format!("{name} may run at its destination, which does not answer"), hint));
        }
        Err(_) => return Err(AgentError::MigrationRuns { name: name.into() }),
    };
    if !request.force && vm.run_state().await.is_ok_and(|it| matches!(it, RunState::Paused | RunState::Prelaunch)) {
        let hint = format!("`vmferry resume {name}` first, or `vmferry stop {name} --force` ends it like a power cut");
        return Err(conflict(format!("{name} is paused, and cannot shut down"), hint));
    }
    if !request.force && !shut_down(&vm, Duration::from_millis(request.timeout_ms)).await? {
        return Err(AgentError::Conflict {
            message: format!("{name} did not shut down within {} s", request.timeout_ms / 1000),
            hint: Some(format!("`vmferry stop {name} --force` ends it like a power cut")),
        });
    }
    vm.quit().await;
    match request.keep {
        true => host.ended(&vm, "it was stopped").await,
        false => host.forget_vm(&vm).await?,
    }
    tracing::info!(vm = name, force = request.force, "stopped");
    Ok(())
}

/// Presses the power button and waits; true when the guest has shut down.
async fn shut_down(vm: &Vm, timeout: Duration) -> Result<bool, AgentError> {
    let mut events = vm.qmp.events();
    let deadline = tokio::time::Instant::now() + timeout;
    loop {
        if vm.qmp.execute(commands::SystemPowerdown {}).await.is_err() && vm.qmp.is_closed() {
            return Ok(true);
        }
        let until = deadline.min(tokio::time::Instant::now() + ASK_AGAIN);
        let shut = tokio::time::timeout_at(until, async {
            loop {
                match events.next().await {
                    Some(event) if event.name != "SHUTDOWN" => {}
                    _ => return,
                }
            }
        });
        if shut.await.is_ok() {
            return Ok(true);
        }
        if tokio::time::Instant::now() >= deadline {
            return Ok(false);
        }
    }
}
