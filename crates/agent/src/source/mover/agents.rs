//! The agents move the RAM: QEMU sends nothing but the state of its devices.

use std::net::IpAddr;

use async_trait::async_trait;
use vmferry_api::EngineName;
use vmferry_link::Cipher;
use vmferry_qemu::migration::{self, set_capabilities};
use vmferry_ram::Backend;

use super::face::{Mover, Protect, Task};
use crate::engine::external::{self, ExternalEngine};
use crate::engine::{NewSession, Protection, RamEngine, journey};
use crate::error::AgentError;
use crate::peers::Prepared;
use crate::peers::relay::Relay;
use crate::source::post_copy::Way;

/// See the module's text.
pub(crate) struct ByAgents {
    /// What there is to move.
    pub(crate) backends: Vec<Backend>,
    /// Its disks' I/O is drained at each scan.
    pub(crate) drains: bool,
    /// The guest's writes can be paced.
    pub(crate) paces: bool,
}

#[async_trait]
impl Mover for ByAgents {
    fn name(&self) -> EngineName {
        EngineName::External
    }

    fn means(&self) -> Vec<String> {
        vec![migration::IGNORE_SHARED.into()]
    }

    fn notes(&self) -> Vec<String> {
        let drains = "A disk goes around the host's cache (cache=none): the guest's disks are drained at each scan.";
        self.drains.then(|| drains.into()).into_iter().collect()
    }

    fn paces(&self) -> bool {
        self.paces
    }

    fn protection(&self, cipher: Option<Cipher>) -> Protect {
        Protect::Link(cipher)
    }

    async fn set_up(&self, task: &mut Task<'_>) -> Result<(), AgentError> {
        vmferry_qemu::unprotect_streams(&task.vm.qmp).await?;
        let wanted = external::capabilities(stops_first(task));
        set_capabilities(&task.vm.qmp, task.features.capabilities(), wanted).await?;
        let trusted = *task.protect == Protect::Not;
        journey::make_folder(&journey::sending_dir(task.vm), trusted)?;
        task.offer.protection = if trusted { Protection::Plain } else { Protection::Relay };
        task.offer.external = Some(NewSession::random());
        Ok(())
    }

    async fn engine(&self, task: &mut Task<'_>, prepared: &Prepared) -> Result<Box<dyn RamEngine>, AgentError> {
        if let Some(why) = prepared.post_copy_obstacle.as_ref().filter(|_| !self.paces) {
            return Err(AgentError::NotMigratable {
                name: task.vm.name().into(),
                reason: format!(
                    "its writes can neither be paced here, nor can it run there before its RAM is there: {why}"
                ),
                hint: Some("let QEMU move its RAM: --engine qemu".into()),
            });
        }
        let session = task.offer.external.clone().expect("it was offered");
        let way = task.protect.way_there(task.host, task.peer, task.peer_key);
        let wishes = external::Wishes {
            pid: task.vm.pid,
            backends: self.backends.clone(),
            dir: journey::sending_dir(task.vm),
            way,
            limits: *task.limits,
            costs: task.host.costs_of(task.vm.name()),
            paces: self.paces,
            bandwidth: task.bandwidth,
            delta_cache: task.host.config.delta_cache.as_u64(),
            runs: task.offer.running,
            stops_first: stops_first(task),
            drains: self.drains,
            lends: task.host.config.lend_userfaultfd,
            planned: Some(task.planned.clone()),
        };
        Ok(Box::new(ExternalEngine::new(task.vm.qmp.clone(), wishes, session)))
    }

    fn way(&self, _: IpAddr, _: Option<&Relay>) -> Way {
        Way::Link
    }
}

/// Its QEMU would lose what the guest writes meanwhile.
fn stops_first(task: &Task<'_>) -> bool {
    migration::loses_writes(task.features, &task.vm.accelerator)
}
