//! VMs of this host whose QEMU is not at hand: it has ended, or does not answer yet.

use vmferry_api::VmView;
use vmferry_qemu::Drift;

use crate::error::AgentError;
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
    /// It does not run and is on its way from this host, which has it until all of it is here.
    Arriving(String),
    /// It does not run and was given to this host, which has not said that it has it.
    Leaving(String),
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
    /// Why nothing can be done with one that is between two hosts.
    pub(crate) fn between_hosts(&self) -> Option<AgentError> {
        let name = &self.record.spec.name;
        let (message, hint) = match &self.why {
            Idle::Arriving(from) => (
                format!("{name} has not come here from {from} yet"),
                format!("`vmferry move` on {from} goes on with it; `vmferry stop {name}` here gives it up"),
            ),
            Idle::Leaving(to) => (
                format!("{name} was given to {to}, which has not said that it has it"),
                format!("wait for {to}; if it never comes back: `vmferry resolve {name} --help`"),
            ),
            Idle::Ended(_) | Idle::Silent | Idle::Unclear => return None,
        };
        Some(AgentError::Conflict { message, hint: Some(hint) })
    }

    /// The VM as a user sees it.
    pub(crate) fn view(&self) -> VmView {
        let (state, detail) = match &self.why {
            Idle::Ended(why) => ("ended", why.clone()),
            Idle::Silent => ("silent", "its QEMU runs, and does not answer".to_owned()),
            Idle::Unclear => {
                ("unclear", "not on record, and its QEMU does not answer: is its guest this host's?".to_owned())
            }
            Idle::Arriving(from) => ("arriving", format!("it does not run, and is on its way from {from}")),
            Idle::Leaving(to) => ("leaving", format!("it does not run, and {to} has not said that it has it")),
        };
        VmView {
            name: self.record.spec.name.clone(),
            state: state.into(),
            detail: Some(detail),
            pid: self.record.instance.pid,
            ram_bytes: 0,
            argv: self.record.next_argv().to_vec(),
            qemu_version: None,
            machine: None,
            accelerator: Some(self.record.accelerator.clone()),
            adopted: self.record.spec.adopted,
            manager: None,
            autostart: self.record.autostart,
            console: false,
            engine: String::new(),
            external_obstacle: None,
            changes: self.record.changed.iter().flat_map(Drift::sentences).map(str::to_owned).collect(),
            migration: None,
        }
    }
}
