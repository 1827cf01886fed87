//! From `run` to the end of a VM's QEMU: starting, adopting, watching, stopping.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::{AdoptRequest, RunRequest, Started, StopRequest, VmSpec};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{
    Accel, CommandLine, EventStream, Incoming, LaunchSettings, Qmp, plan_launch, wants_shared_ram, without_ours,
};

use crate::error::AgentError;
use crate::store::VmRecord;
use crate::vm::{Claim, GRACE, Stage, Vm, is_valid_name};
use crate::{Agent, witness};

/// How long a QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(20);
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
pub(crate) async fn run(agent: &Arc<Agent>, request: RunRequest) -> Result<Started, AgentError> {
    check_name(&request.name)?;
    let _name = agent.reserve_name(&request.name)?;
    let command = CommandLine::parse(&request.argv)?;
    let accel = agent.accelerator(&agent.find_qemu(&command)?).await;
    let spec = VmSpec {
        name: request.name,
        argv: request.argv,
        cwd: request.cwd,
        shared_ram: wants_shared_ram(&command),
        adopted: false,
        measuring: request.measuring,
    };
    let (vm, notes) = agent.launch(&spec, &command, accel, None).await?;
    tracing::info!(vm = vm.name(), pid = vm.pid, "runs");
    Ok(Started { vm: vm.view(agent.config.engine).await, notes })
}

/// Takes over a QEMU that somebody else started.
pub(crate) async fn adopt(agent: &Arc<Agent>, request: AdoptRequest) -> Result<Started, AgentError> {
    check_name(&request.name)?;
    let _name = agent.reserve_name(&request.name)?;
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
    if let Some(known) = agent.vms().into_iter().find(|vm| vm.pid == pid && vm.is_alive()) {
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
    let vm = agent.take(&record, qmp).await?;
    agent.store.put_vm(&record)?;
    tracing::info!(vm = vm.name(), pid, "adopted");
    Ok(Started { vm: vm.view(agent.config.engine).await, notes: Vec::new() })
}

/// Stops a VM: asks the guest to shut down, or ends its QEMU.
pub(crate) async fn stop(agent: &Arc<Agent>, name: &str, request: &StopRequest) -> Result<(), AgentError> {
    let vm = agent.vm(name)?;
    let conflict = |message: String, hint: String| AgentError::Conflict { message, hint: Some(hint) };
    let _claim = match Claim::take(&vm, Stage::Stopping) {
        Ok(claim) => Some(claim),
        Err(Stage::Ended(_)) => return agent.forget_vm(&vm),
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
    agent.forget_vm(&vm)?;
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

/// A guest that this host may not own any more was set running: QEMU does so by itself when a migration fails at its
/// very end. It must not run on two hosts.
async fn mind_the_owner(vm: &Vm) {
    match vm.stage() {
        Stage::Left(_) | Stage::Stranded => {
            tracing::error!(
                vm = vm.name(),
                pid = vm.pid,
                "its QEMU set it running although it was handed over: killed"
            );
            vmferry_qemu::kill_process(vm.pid, vm.start_time, Duration::ZERO).await;
        }
        Stage::InDoubt(_) => {
            tracing::error!(vm = vm.name(), "its QEMU set it running although it may be on the destination: paused");
            if vm.qmp.execute(commands::Stop {}).await.is_err() {
                vmferry_qemu::kill_process(vm.pid, vm.start_time, Duration::ZERO).await;
            }
        }
        _ => {}
    }
}

impl Agent {
    /// Starts a QEMU for this VM, to run it or to wait for it, and records it.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        spec: &VmSpec,
        command: &CommandLine,
        accel: Accel,
        incoming: Option<(Uuid, Incoming)>,
    ) -> Result<(Arc<Vm>, Vec<String>), AgentError> {
        let binary = self.find_qemu(command)?;
        let dir = self.config.vm_dir(&spec.name);
        make_private_dir(&dir)?;
        let accelerator = if matches!(accel, Accel::Kvm) { "kvm" } else { "tcg" };
        let (id, incoming) = incoming.unzip();
        let ram = match spec.shared_ram {
            true => Some(vmferry_qemu::ram_memfd().map_err(AgentError::io("memfd"))?),
            false => None,
        };
        let shared_ram = ram.as_ref().map(AsRawFd::as_raw_fd);
        let settings = LaunchSettings { name: &spec.name, run_dir: &dir, accel, shared_ram, incoming };
        let plan = plan_launch(command, &settings)?;
        // Recorded before it is started: an agent that dies in between is not followed by a QEMU that nobody knows.
        let mut record = VmRecord {
            spec: spec.clone(),
            pid: 0,
            start_time: 0,
            qmp: dir.join("qmp.sock").to_string_lossy().into_owned(),
            accelerator: accelerator.into(),
            incoming: id,
            must_run: false,
            stranded: false,
        };
        self.store.put_vm(&record)?;
        let started = async {
            let launched = vmferry_qemu::launch(&binary, &plan, ram, &spec.cwd, &dir, START_TIMEOUT).await?;
            (record.pid, record.start_time) = (launched.pid, launched.start_time);
            self.store.put_vm(&record)?;
            self.take(&record, launched.qmp).await
        };
        match started.await {
            Ok(vm) => Ok((vm, plan.notes)),
            Err(error) => {
                if record.pid != 0 {
                    vmferry_qemu::kill_process(record.pid, record.start_time, GRACE).await;
                }
                self.store.remove_vm(&spec.name)?;
                Err(error)
            }
        }
    }

    /// Takes hold of a QEMU that runs, and of what becomes of it.
    pub(crate) async fn take(self: &Arc<Self>, record: &VmRecord, qmp: Qmp) -> Result<Arc<Vm>, AgentError> {
        let events = qmp.events();
        let vm = Arc::new(Vm::attach(record, qmp, self.config.vm_dir(&record.spec.name)).await?);
        self.state().vms.insert(vm.name().into(), Arc::clone(&vm));
        tokio::spawn(Arc::clone(self).watch(Arc::clone(&vm), events));
        if vm.spec.measuring {
            tokio::spawn(witness::guard(Arc::clone(self), Arc::clone(&vm)));
        }
        Ok(vm)
    }

    /// Waits for the end of a VM's QEMU and records how it came.
    async fn watch(self: Arc<Self>, vm: Arc<Vm>, mut events: EventStream) {
        let mut asked_for = None;
        while let Some(event) = events.next().await {
            match event.name.as_str() {
                "SHUTDOWN" => asked_for = event.data["reason"].as_str().map(str::to_owned),
                "RESUME" => mind_the_owner(&vm).await,
                _ => {}
            }
        }
        // The monitor closes a little before the process is gone.
        let gone = tokio::time::timeout(GRACE, async {
            while vm.is_alive() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let gone = gone.await.is_ok();
        // A migration under way has the first word: it may be what ended QEMU, or must undo what it did elsewhere.
        while vm.stage().is_migration() {
            if !self.state().vms.get(vm.name()).is_some_and(|it| Arc::ptr_eq(it, &vm)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match asked_for {
            Some(reason) if gone => {
                tracing::info!(vm = vm.name(), reason, "ended");
                if let Err(error) = self.forget_vm(&vm) {
                    tracing::error!(vm = vm.name(), %error, "cannot forget it");
                }
            }
            _ if gone => {
                let words = vm.last_words().unwrap_or_else(|| "killed, or crashed without a word".into());
                tracing::error!(vm = vm.name(), pid = vm.pid, words, "its QEMU ended unexpectedly");
                vm.set_stage(Stage::Ended(format!("its QEMU ended unexpectedly: {words}")));
            }
            _ => tracing::error!(
                vm = vm.name(),
                pid = vm.pid,
                "its monitor closed, but its QEMU runs on; restart the agent"
            ),
        }
    }

    /// Forgets a VM whose QEMU is gone, and its folder with it.
    pub(crate) fn forget_vm(&self, vm: &Vm) -> Result<(), AgentError> {
        let mut state = self.state();
        if state.vms.get(vm.name()).is_some_and(|it| it.pid == vm.pid && it.start_time == vm.start_time) {
            state.vms.remove(vm.name());
            state.incoming.retain(|_, incoming| !incoming.brought(vm));
            self.store.remove_vm(vm.name())?;
            if let Err(error) = std::fs::remove_dir_all(&vm.dir)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %vm.dir.display(), %error, "cannot remove the VM's folder");
            }
        }
        Ok(())
    }
}

/// A new, empty folder that only we may enter.
/// Makes a folder that only we can enter, in place of what was there.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), AgentError> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(AgentError::io(dir)(error)),
        _ => {}
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(AgentError::io(dir))
}
