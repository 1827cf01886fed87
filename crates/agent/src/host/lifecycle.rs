//! What a user does with a VM: run it, have one adopted, stop it.

use std::sync::Arc;
use std::time::Duration;

use vmferry_api::{AdoptRequest, RunRequest, Started, StopRequest, VmSpec};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{CommandLine, Qmp, wants_shared_ram, without_ours};

use super::host::Host;
use super::vm::{Claim, Stage, Vm, is_valid_name};
use crate::error::AgentError;
use crate::journal::VmRecord;

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
    };
    let (vm, notes) = host.launch(&spec, &command, accel, None).await?;
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
        spec: VmSpec { name: request.name, argv, cwd, shared_ram, adopted: true, measuring: false },
        pid,
        start_time,
        qmp: request.qmp.to_string_lossy().into_owned(),
        accelerator: accelerator.into(),
        incoming: None,
        must_run: false,
        stranded: false,
    };
    let vm = host.take(&record, qmp).await?;
    host.store.put_vm(&record)?;
    tracing::info!(vm = vm.name(), pid, "adopted");
    Ok(Started { vm: vm.view(host.config.engine).await, notes: Vec::new() })
}

/// Stops a VM: asks the guest to shut down, or ends its QEMU.
pub(crate) async fn stop(host: &Arc<Host>, name: &str, request: &StopRequest) -> Result<(), AgentError> {
    let vm = host.vm(name)?;
    let conflict = |message: String, hint: String| AgentError::Conflict { message, hint: Some(hint) };
    let _claim = match Claim::take(&vm, Stage::Stopping) {
        Ok(claim) => Some(claim),
        Err(Stage::Ended(_)) => return host.forget_vm(&vm),
        Err(Stage::Stopping) => {
            return Err(conflict(format!("{name} is being stopped already"), "wait for it".into()));
        }
        Err(Stage::Stranded) if request.force => None,
        Err(Stage::Stranded) => {
            return Err(conflict(
                format!("{name} runs on the destination, and only the QEMU here has the rest of its memory"),
                format!("`vmferry stop {name} --force` ends the QEMU here"),
            ));
        }
        Err(_) => return Err(AgentError::MigrationRuns { name: name.into() }),
    };
    if !request.force && !shut_down(&vm, Duration::from_millis(request.timeout_ms)).await? {
        return Err(AgentError::Conflict {
            message: format!("{name} did not shut down within {} s", request.timeout_ms / 1000),
            hint: Some(format!("`vmferry stop {name} --force` ends it like a power cut")),
        });
    }
    vm.quit().await;
    host.forget_vm(&vm)?;
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
