//! VMs of this host whose QEMU is not at hand: it has ended, or does not answer yet.

use vmferry_api::VmView;
use vmferry_qemu::Drift;

use crate::journal::VmRecord;

/// Why a VM is idle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Its QEMU is gone, in words.
    Ended(String),
    /// Its QEMU lives, and does not answer; or was not asked yet.
    Silent,
    /// The same, of one that is not on record: nobody knows whose its guest is.
    Unclear,
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
            Idle::Unclear => {
                ("unclear", "not on record, and its QEMU does not answer: is its guest this host's?".to_owned())
            }
        };
        VmView {
            name: self.record.spec.name.clone(),
            state: state.into(),
            detail: Some(detail),
            pid: self.record.instance.pid,
            ram_bytes: 0,
            argv: self.record.changed.as_ref().map_or(&self.record.spec.argv, |it| &it.argv).clone(),
            qemu_version: None,
            machine: None,
            accelerator: Some(self.record.accelerator.clone()),
            adopted: self.record.spec.adopted,
            autostart: self.record.autostart,
            console: false,
            engine: String::new(),
            external_obstacle: None,
            changes: self.record.changed.iter().flat_map(Drift::sentences).map(str::to_owned).collect(),
            migration: None,
        }
    }
}
