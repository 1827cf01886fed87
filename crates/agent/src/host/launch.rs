//! Starting a VM's QEMU, and taking hold of one: from then on it is watched to its end.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::{VmSpec, in_one_line};
use vmferry_qemu::{Accel, CommandLine, EventStream, Incoming, Inventory, IoLimits, LaunchSettings, Qmp, plan_launch};

use super::drift::follow;
use super::folders::{make_private_dir, remove_dir};
use super::host::Host;
use super::vm::{GRACE, Stage, Vm};
use crate::error::AgentError;
use crate::journal::{Instance, VmRecord};

/// How long a QEMU that starts may do nothing until its monitor answers.
const START_PATIENCE: Duration = Duration::from_secs(60);

impl Host {
    /// Starts a QEMU for this VM, to run it or to wait for it, and records it.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        spec: &VmSpec,
        command: &CommandLine,
        accel: Accel,
        autostart: bool,
        incoming: Option<(Uuid, Incoming)>,
    ) -> Result<(Arc<Vm>, Vec<String>), AgentError> {
        let binary = self.qemus.find_qemu(command)?;
        let dir = self.config.vm_dir(&spec.name);
        make_private_dir(&dir)?;
        let (id, incoming) = incoming.unzip();
        let ram = match spec.shared_ram {
            true => Some(vmferry_qemu::guest_ram().map_err(AgentError::io("the guest's RAM"))?),
            false => None,
        };
        let shared_ram = ram.as_ref().map(AsRawFd::as_raw_fd);
        let settings = LaunchSettings { name: &spec.name, run_dir: &dir, accel, shared_ram, incoming };
        let plan = plan_launch(command, &settings)?;
        // Recorded before it is started: an agent that dies in between is not followed by a QEMU that nobody knows.
        let mut record = VmRecord {
            spec: spec.clone(),
            instance: Instance::now(0, 0),
            qmp: dir.join("qmp.sock").to_string_lossy().into_owned(),
            accelerator: plan.accelerator.clone(),
            incoming: id,
            autostart,
            ended: None,
            changed: None,
        };
        let stage = id.map_or(Stage::Owned, Stage::Incoming);
        self.journal.put_vm(&record).await?;
        let started = async {
            let launched = vmferry_qemu::launch(&binary, &plan, ram, &spec.cwd, &dir, START_PATIENCE).await?;
            record.instance = Instance::now(launched.pid, launched.start_time);
            self.journal.put_vm(&record).await?;
            if let Some(limits) = &spec.io_limits {
                IoLimits::set(&launched.qmp, limits).await?;
            }
            let vm = self.take(&record, launched.qmp, stage).await?;
            // Whoever has one wait for a guest asks for that, too.
            if id.is_none() {
                describe(&vm).await;
            }
            Ok(vm)
        };
        match started.await {
            Ok(vm) => Ok((vm, plan.notes)),
            Err(error) => {
                let Instance { pid, start_time, .. } = record.instance;
                if pid != 0 {
                    vmferry_qemu::kill_process(pid, start_time, GRACE).await;
                }
                // The first error is the one to tell. What stays on record is found to be gone by the next agent.
                for instance in [Instance::now(0, 0), record.instance] {
                    if let Err(error) = self.journal.remove_vm(&spec.name, &instance).await {
                        tracing::error!(vm = spec.name, %error, "cannot forget it");
                    }
                }
                remove_dir(dir).await;
                Err(error)
            }
        }
    }

    /// Takes hold of a QEMU that runs, and of what becomes of it.
    pub(crate) async fn take(
        self: &Arc<Self>,
        record: &VmRecord,
        qmp: Qmp,
        stage: Stage,
    ) -> Result<Arc<Vm>, AgentError> {
        let events = qmp.events();
        let vm = Arc::new(Vm::attach(record, qmp, self.config.vm_dir(&record.spec.name), stage).await?);
        {
            let mut all = self.state();
            all.idle.remove(vm.name());
            all.vms.insert(vm.name().into(), Arc::clone(&vm));
        }
        tokio::spawn(Arc::clone(self).watch(Arc::clone(&vm), events));
        tokio::spawn(follow(Arc::clone(self), Arc::clone(&vm)));
        if let Some(follower) = self.follower() {
            follower.taken(self, &vm);
        }
        Ok(vm)
    }

    /// Waits for the end of a VM's QEMU and records how it came.
    async fn watch(self: Arc<Self>, vm: Arc<Vm>, mut events: EventStream) {
        let mut asked_for = None;
        while let Some(event) = events.next().await {
            if event.name == "SHUTDOWN" {
                asked_for = event.data["reason"].as_str().map(str::to_owned);
            }
        }
        // The monitor closes a little before the process is gone.
        let gone = tokio::time::timeout(GRACE, async {
            while vm.is_alive() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let gone = gone.await.is_ok();
        // What is under way has the first word: it may be what ended QEMU, or must undo what it did elsewhere.
        while vm.stage().is_migration() || matches!(vm.stage(), Stage::Stopping | Stage::MovingDisk) {
            if !self.state().vms.get(vm.name()).is_some_and(|it| Arc::ptr_eq(it, &vm)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match asked_for {
            // Its user wants it to be there when the host is: not to be forgotten when it was shut down.
            Some(reason) if gone && vm.autostart.load(Ordering::Relaxed) => {
                tracing::info!(vm = vm.name(), reason, "ended");
                self.ended(&vm, &format!("it was shut down ({reason})")).await;
            }
            Some(reason) if gone => {
                tracing::info!(vm = vm.name(), reason, "ended");
                if let Err(error) = self.forget_vm(&vm).await {
                    tracing::error!(vm = vm.name(), error = in_one_line(&error), "cannot forget it");
                }
            }
            _ if gone => {
                let words = vm.last_words().unwrap_or_else(|| "killed, or crashed without a word".into());
                tracing::error!(vm = vm.name(), pid = vm.pid, words, "its QEMU ended unexpectedly");
                self.ended(&vm, &format!("its QEMU ended unexpectedly: {words}")).await;
            }
            _ => tracing::error!(
                vm = vm.name(),
                pid = vm.pid,
                "its monitor closed, but its QEMU runs on; restart the agent"
            ),
        }
    }

    /// Forgets a VM whose QEMU is gone, and its folder with it.
    pub(crate) async fn forget_vm(&self, vm: &Vm) -> Result<(), AgentError> {
        {
            let mut state = self.state();
            if !state.vms.get(vm.name()).is_some_and(|it| it.pid == vm.pid && it.start_time == vm.start_time) {
                return Ok(());
            }
            state.vms.remove(vm.name());
            // Nobody takes the name, and the folder, while the rest is done.
            state.reserved.insert(vm.name().into());
        }
        if let Some(follower) = self.follower() {
            follower.forgotten(vm);
        }
        let removed = self.journal.remove_vm(vm.name(), &vm.instance()).await;
        remove_dir(vm.dir.clone()).await;
        self.state().reserved.remove(vm.name());
        Ok(removed?)
    }
}

/// What this VM is made of, which is kept, so that its user can be told how it was changed.
pub(crate) async fn describe(vm: &Vm) -> Option<Inventory> {
    let told = vm.inventory().await.inspect_err(|error| {
        tracing::warn!(vm = vm.name(), %error, "its QEMU does not tell what it is made of");
    });
    told.ok().inspect(|inventory| vm.remember(inventory))
}
