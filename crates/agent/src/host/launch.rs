//! Starting a VM's QEMU, and taking hold of one: from then on it is watched to its end.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::VmSpec;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{Accel, CommandLine, EventStream, Incoming, LaunchSettings, Qmp, plan_launch};

use super::folders::make_private_dir;
use super::host::Host;
use super::vm::{GRACE, Stage, Vm};
use crate::error::AgentError;
use crate::journal::VmRecord;

/// How long a QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(20);

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

impl Host {
    /// Starts a QEMU for this VM, to run it or to wait for it, and records it.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        spec: &VmSpec,
        command: &CommandLine,
        accel: Accel,
        incoming: Option<(Uuid, Incoming)>,
    ) -> Result<(Arc<Vm>, Vec<String>), AgentError> {
        let binary = self.qemus.find_qemu(command)?;
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
        if let Some(follower) = self.follower() {
            follower.taken(self, &vm);
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
            if let Some(follower) = self.follower() {
                follower.forgotten(vm);
            }
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
