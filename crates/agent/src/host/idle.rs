//! VMs of this host whose QEMU is not at hand: it has ended, or does not answer yet.

use std::sync::Arc;

use vmferry_api::VmView;

use super::host::Host;
use super::vm::Vm;
use crate::error::AgentError;
use crate::journal::VmRecord;

/// Why a VM is idle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Its QEMU is gone, in words.
    Ended(String),
    /// Its QEMU lives, and does not answer; or was not asked yet.
    Silent,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(crate) struct IdleVm {
    /// As it is in the journal.
    pub(crate) record: VmRecord,
    /// Why.
    pub(crate) why: Idle,
}

impl IdleVm {
    /// The VM as a user sees it.
    pub(crate) fn view(&self) -> VmView {
        let (state, detail) = match &self.why {
            Idle::Ended(why) => ("ended", why.clone()),
            Idle::Silent => ("silent", "its QEMU runs, and does not answer".to_owned()),
        };
        VmView {
            name: self.record.spec.name.clone(),
            state: state.into(),
            detail: Some(detail),
            pid: self.record.instance.pid,
            ram_bytes: 0,
            argv: self.record.spec.argv.clone(),
            qemu_version: None,
            machine: None,
            accelerator: Some(self.record.accelerator.clone()),
            adopted: self.record.spec.adopted,
            autostart: self.record.autostart,
            console: false,
            engine: String::new(),
            external_obstacle: None,
            migration: None,
        }
    }
}

impl Host {
    /// A VM that is idle.
    pub(crate) fn idle(&self, name: &str) -> Option<IdleVm> {
        self.state().idle.get(name).cloned()
    }

    /// All of them.
    pub(crate) fn idle_vms(&self) -> Vec<IdleVm> {
        self.state().idle.values().cloned().collect()
    }

    /// This VM is idle from now on. One that runs under that name by now is another.
    pub(crate) fn rest(&self, record: VmRecord, why: Idle) {
        let mut state = self.state();
        let name = record.spec.name.clone();
        if !state.vms.contains_key(&name) {
            state.idle.insert(name, IdleVm { record, why });
        }
    }

    /// This VM's QEMU is gone, and nobody asked for that: it can be started again.
    pub(crate) async fn ended(&self, vm: &Arc<Vm>, why: &str) {
        let record = VmRecord { ended: Some(why.into()), ..vm.record() };
        {
            let mut state = self.state();
            if !state.vms.get(vm.name()).is_some_and(|it| Arc::ptr_eq(it, vm)) {
                return;
            }
            state.vms.remove(vm.name());
            state.idle.insert(vm.name().into(), IdleVm { record: record.clone(), why: Idle::Ended(why.into()) });
        }
        if let Some(follower) = self.follower() {
            follower.forgotten(vm);
        }
        // Without it the next agent finds out by itself.
        if let Err(error) = self.journal.put_vm(&record).await {
            tracing::error!(vm = vm.name(), %error, "cannot record that it ended");
        }
    }

    /// Forgets a VM that is idle, and its folder with it.
    pub(crate) async fn forget_idle(&self, idle: &IdleVm) -> Result<(), AgentError> {
        let name = &idle.record.spec.name;
        self.journal.remove_vm(name, &idle.record.instance).await?;
        let is_it = self.state().idle.get(name).is_some_and(|it| it.record.instance == idle.record.instance);
        if is_it {
            self.state().idle.remove(name);
            super::folders::remove_dir(self.config.vm_dir(name)).await;
        }
        Ok(())
    }
}
