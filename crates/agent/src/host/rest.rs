//! VMs that come to rest, because their QEMU ended or does not answer, and what becomes of them then.

use std::sync::Arc;

use super::host::Host;
use super::idle::{Idle, IdleVm};
use super::vm::Vm;
use crate::error::AgentError;
use crate::journal::VmRecord;

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
        if let Err(error) = self.journal.vm_ended(vm.name(), &record.instance, why).await {
            tracing::error!(vm = vm.name(), %error, "cannot record that it ended");
        }
    }

    /// Forgets a VM that is idle, and its folder with it.
    pub(crate) async fn forget_idle(&self, idle: &IdleVm) -> Result<(), AgentError> {
        let name = &idle.record.spec.name;
        {
            let mut state = self.state();
            if !state.idle.get(name).is_some_and(|it| it.record.instance == idle.record.instance) {
                return Ok(());
            }
            // Whoever starts another of that name has its folder.
            if !state.reserved.insert(name.clone()) {
                return Err(AgentError::Busy { what: format!("{name}, which is being started") });
            }
            state.idle.remove(name);
        }
        let removed = self.journal.remove_vm(name, &idle.record.instance).await;
        super::folders::remove_dir(self.config.vm_dir(name)).await;
        self.state().reserved.remove(name);
        Ok(removed?)
    }
}
