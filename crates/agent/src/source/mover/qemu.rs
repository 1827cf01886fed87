//! QEMU moves the RAM, by its own migration.

use std::net::IpAddr;

use async_trait::async_trait;
use vmferry_api::{EngineName, MigrateRequest, in_one_line};
use vmferry_link::Cipher;
use vmferry_policy::baselines::Baseline;
use vmferry_qemu::migration::{self, set_capabilities};
use vmferry_qemu::{Endpoint, Features, StreamKey, protect_streams, tls_carries, tls_priority};

use super::face::{Mover, Protect, Task};
use crate::engine::qemu::{QemuEngine, Wishes, tcp_uri};
use crate::engine::{Protection, RamEngine, Setup, journey, means};
use crate::error::AgentError;
use crate::host::Vm;
use crate::measuring::scripts::setup_for;
use crate::peers::relay::Relay;
use crate::peers::{CheckReply, Prepared};
use crate::source::decider;
use crate::source::post_copy::Way;

/// A guest as it is now.
pub(crate) struct Guest {
    pub(crate) running: bool,
    pub(crate) ram_bytes: u64,
    /// The blocks that its RAM lies in, in bytes each.
    pub(crate) blocks: Vec<u64>,
}

/// See the module's text.
pub(crate) struct ByQemu {
    /// What a measurement sets it to.
    scripted: Option<Setup>,
    /// Another manager that decides.
    baseline: Option<&'static Baseline>,
    means: Vec<String>,
    notes: Vec<String>,
    pauses_first: bool,
    /// Both QEMUs can protect what they say, and so much of it.
    can_tls: bool,
}

impl ByQemu {
    /// As it would do it; or why it cannot.
    pub(crate) fn plan(
        vm: &Vm,
        (features, can_tls): (&Features, bool),
        guest: &Guest,
        there: &CheckReply,
        request: &MigrateRequest,
    ) -> Result<Self, AgentError> {
        let has = |name: &str| there.capabilities.contains(name);
        if migration::crashes_copying(features, &vm.accelerator, &guest.blocks) {
            return Err(crashes(vm));
        }
        let baseline = decider::baseline_of(request, EngineName::Qemu)?;
        let mut notes = Vec::new();
        if baseline.is_none() && request.post_copy && !has("postcopy-ram") {
            let lacks =
                "Post-copy is not possible: the destination's QEMU lacks it; the guest is throttled if it must be.";
            notes.push(lacks.into());
        }
        let scripted = request.script.as_ref().map(|script| setup_for(vm, features, has, script)).transpose()?;
        let loses_writes = guest.running && migration::loses_writes(features, &vm.accelerator);
        let means: Vec<String> = if let Some(setup) = &scripted {
            setup.capabilities.clone()
        } else {
            let uses = decider::uses(baseline, request.post_copy);
            let means = means::means(features, has, uses, !there.own_disks.is_empty());
            means.into_iter().map(str::to_owned).collect()
        };
        if let Some(baseline) = baseline {
            if let Some(reason) = decider::lacks(baseline, request.post_copy, &means) {
                return Err(not_by(vm, baseline, reason));
            }
            if loses_writes {
                let reason = format!("{}, so that nothing is left to decide", loses_writes_in_words(vm));
                return Err(not_by(vm, baseline, reason));
            }
            notes.push(format!(
                "{} decides, by limits of its own: a downtime that is given is none of them.",
                baseline.name
            ));
        }
        match &scripted {
            Some(_) if loses_writes => notes.push(format!("{}: expect damaged pages.", loses_writes_in_words(vm))),
            None if loses_writes && !means.iter().any(|it| it == "postcopy-ram") => return Err(only_by_post_copy(vm)),
            None if loses_writes => {
                notes.push(format!(
                    "{}: it goes first, and its memory follows by post-copy.",
                    loses_writes_in_words(vm)
                ));
            }
            _ => {}
        }
        let pauses_first = loses_writes && scripted.is_none();
        let can_tls = can_tls && there.tls && tls_carries(guest.ram_bytes);
        Ok(Self { scripted, baseline, means, notes, pauses_first, can_tls })
    }
}

#[async_trait]
impl Mover for ByQemu {
    fn name(&self) -> EngineName {
        EngineName::Qemu
    }

    fn means(&self) -> Vec<String> {
        self.means.clone()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn pauses_first(&self) -> bool {
        self.pauses_first
    }

    /// QEMU cannot be told the interface that a link-local address needs.
    fn reaches(&self, remote: IpAddr, protect: Protect) -> Protect {
        match (remote, protect) {
            (IpAddr::V6(address), Protect::Not | Protect::Tls(_)) if address.is_unicast_link_local() => Protect::Relay,
            _ => protect,
        }
    }

    fn protection(&self, cipher: Option<Cipher>) -> Protect {
        cipher.filter(|_| self.can_tls).map_or(Protect::Relay, Protect::Tls)
    }

    async fn set_up(&self, task: &mut Task<'_>) -> Result<(), AgentError> {
        journey::forget(task.vm);
        task.offer.setup = if let Some(setup) = &self.scripted {
            set_to(task, setup).await?;
            setup.clone()
        } else {
            let has = |name: &str| task.there.capabilities.contains(name);
            let has_disks = !task.offer.own_disks.is_empty();
            let uses = decider::uses(self.baseline, task.limits.post_copy);
            means::choose(&task.vm.qmp, task.features, has, uses, has_disks).await?
        };
        task.offer.protection = protect(task).await?;
        Ok(())
    }

    async fn engine(&self, task: &mut Task<'_>, prepared: &Prepared) -> Result<Box<dyn RamEngine>, AgentError> {
        // The destination may take less than was offered, and say no more about our QEMU than that.
        let mut setup = task.offer.setup.clone();
        setup.capabilities.retain(|it| prepared.setup.has(it));
        if setup != task.offer.setup {
            set_to(task, &setup).await?;
        }
        if !setup.has("postcopy-ram") {
            *task.limits = task.limits.without_post_copy();
        }
        if self.pauses_first && !task.limits.post_copy {
            return Err(only_by_post_copy(task.vm));
        }
        let uri = if task.offer.protection == Protection::Relay {
            let relay = Relay::open(task.vm, task.peer.clone(), task.id)?;
            task.relay.insert(relay).uri().to_owned()
        } else {
            let port = prepared.port.ok_or_else(|| no_port(&task.there.host))?;
            tcp_uri(task.remote, port)
        };
        let wishes = Wishes {
            uri,
            limits: *task.limits,
            costs: task.host.costs_of(task.vm.name()),
            bandwidth: task.bandwidth,
            setup,
            post_copy_first: self.pauses_first,
            scripted: self.scripted.is_some(),
            zeroes_by_multifd: migration::finds_zeroes_by_multifd(task.features, |name| {
                task.there.capabilities.contains(name)
            }),
        };
        let features = task.features.clone();
        Ok(Box::new(QemuEngine::new(task.vm.qmp.clone(), features, task.offer.running, wishes)))
    }

    fn way(&self, remote: IpAddr, relay: Option<&Relay>) -> Way {
        relay.map_or(Way::Direct(remote), |relay| Way::Relayed(relay.uri().to_owned()))
    }
}

async fn set_to(task: &Task<'_>, setup: &Setup) -> Result<(), AgentError> {
    let wanted: Vec<&str> = setup.capabilities.iter().map(String::as_str).collect();
    Ok(set_capabilities(&task.vm.qmp, task.features.capabilities(), &wanted).await?)
}

/// Has our QEMU protect what it sends; one that cannot is relayed.
async fn protect(task: &mut Task<'_>) -> Result<Protection, AgentError> {
    let vm = task.vm;
    Relay::forget(vm);
    if let Protect::Tls(cipher) = *task.protect {
        let key = StreamKey::new(&vmferry_link::random_bytes());
        let priority = tls_priority(cipher);
        match protect_streams(&vm.qmp, &vm.dir.join("tls"), &key, Endpoint::Client, priority).await {
            Ok(()) => return Ok(Protection::Tls { key, cipher }),
            Err(error) => {
                tracing::warn!(vm = vm.name(), error = in_one_line(&error), "its connections are relayed");
                *task.protect = Protect::Relay;
            }
        }
    }
    vmferry_qemu::unprotect_streams(&vm.qmp).await?;
    Ok(if *task.protect == Protect::Not { Protection::Plain } else { Protection::Relay })
}

fn not_by(vm: &Vm, baseline: &Baseline, reason: String) -> AgentError {
    let hint = Some(format!("without --policy {} vmferry decides", baseline.name));
    AgentError::NotMigratable { name: vm.name().into(), reason, hint }
}

fn no_port(host: &str) -> AgentError {
    AgentError::Conflict { message: format!("{host} does not tell where its QEMU listens"), hint: None }
}

fn loses_writes_in_words(vm: &Vm) -> String {
    format!("QEMU {} loses track of what a guest writes under TCG while its RAM is copied", vm.facts.qemu_version)
}

fn crashes(vm: &Vm) -> AgentError {
    let version = &vm.facts.qemu_version;
    AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!("QEMU {version} would crash under TCG while it copies RAM that lies in several such blocks"),
        hint: Some("give all of its memory backends share=on, so that the agents move it; or use KVM".into()),
    }
}

fn only_by_post_copy(vm: &Vm) -> AgentError {
    AgentError::NotMigratable {
        name: vm.name().into(),
        reason: format!("{}, so that a running guest could only move by post-copy", loses_writes_in_words(vm)),
        hint: Some("allow post-copy on both hosts, pause the guest first, or use QEMU 9.0 or newer".into()),
    }
}
