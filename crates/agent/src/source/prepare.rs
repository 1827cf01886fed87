//! Prepare: the destination's QEMU waits, and ours is set to the same.

use std::sync::Arc;

use vmferry_api::{EngineName, Step, in_one_line};
use vmferry_qemu::migration::{self, set_capabilities};
use vmferry_qemu::{Endpoint, StreamKey, protect_streams, tls_priority};

use super::plan::{Engine, Plan, Protect, only_by_post_copy};
use super::run::Run;
use crate::engine::external::{self, ExternalEngine, WayThere};
use crate::engine::qemu::{QemuEngine, Wishes, tcp_uri};
use crate::engine::{NewSession, Protection, RamEngine, journey, means};
use crate::error::AgentError;
use crate::host::Vm;
use crate::peers::relay::Relay;

impl Run {
    /// The destination's QEMU waits, and ours is set to the same.
    pub(super) async fn prepare(&mut self) -> Result<Box<dyn RamEngine>, AgentError> {
        for note in self.plan.view.notes.clone() {
            self.migration.note(note);
        }
        self.teller.step(Step::Prepare);
        let plan = &mut self.plan;
        let has = |name: &str| plan.there.capabilities.contains(name);
        let stops_first = migration::loses_writes(&plan.features, &self.vm.accelerator);
        if plan.engine.name() == EngineName::External {
            vmferry_qemu::unprotect_streams(&self.vm.qmp).await?;
            let wanted = external::capabilities(stops_first);
            set_capabilities(&self.vm.qmp, plan.features.capabilities(), wanted).await?;
            let trusted = plan.protect == Protect::Not;
            journey::make_folder(&journey::sending_dir(&self.vm), trusted)?;
            plan.offer.protection = if trusted { Protection::Plain } else { Protection::Relay };
            plan.offer.external = Some(NewSession::random());
        } else {
            journey::forget(&self.vm);
            plan.offer.setup = match plan.scripted.take() {
                Some(setup) => {
                    let wanted: Vec<&str> = setup.capabilities.iter().map(String::as_str).collect();
                    set_capabilities(&self.vm.qmp, plan.features.capabilities(), &wanted).await?;
                    setup
                }
                None => means::choose(&self.vm.qmp, &plan.features, has, self.limits.post_copy).await?,
            };
            plan.offer.protection = protect(&self.vm, plan).await?;
        }
        let prepared = tokio::select! {
            prepared = plan.peer.prepare(&plan.offer) => prepared?,
            () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
        };
        plan.markers = None;
        for note in &prepared.notes {
            self.migration.note(note.clone());
        }
        if let Some(why) = prepared.post_copy_obstacle.as_ref().filter(|_| self.limits.post_copy) {
            self.migration.note(format!("Post-copy is not possible: at {}: {why}.", plan.view.to));
            self.limits.post_copy = false;
        }
        if let (Engine::External(backends), Some(session)) = (&plan.engine, &plan.offer.external) {
            let way = WayThere {
                address: plan.peer.address().into(),
                identity: Arc::clone(&self.host.trusts.identity),
                peer: plan.peer_key,
                protection: match plan.protect {
                    Protect::Not => None,
                    Protect::Link(cipher) => Some(Some(cipher)),
                    _ => Some(None),
                },
            };
            let wishes = external::Wishes {
                pid: self.vm.pid,
                backends: backends.clone(),
                dir: journey::sending_dir(&self.vm),
                way,
                limits: self.limits,
                besides: self.host.switchover_time(self.vm.name(), false),
                bandwidth: self.bandwidth,
                delta_cache: self.host.config.delta_cache.as_u64(),
                runs: plan.offer.running,
                stops_first,
            };
            return Ok(Box::new(ExternalEngine::new(self.vm.qmp.clone(), wishes, session.clone())));
        }
        // The destination may take less than was offered, and say no more about our QEMU than that.
        let mut setup = plan.offer.setup.clone();
        setup.capabilities.retain(|it| prepared.setup.has(it));
        if setup != plan.offer.setup {
            let names: Vec<&str> = setup.capabilities.iter().map(String::as_str).collect();
            set_capabilities(&self.vm.qmp, plan.features.capabilities(), &names).await?;
        }
        self.limits.post_copy &= setup.has("postcopy-ram");
        if plan.post_copy_first && !self.limits.post_copy {
            return Err(only_by_post_copy(&self.vm));
        }
        let uri = if plan.offer.protection == Protection::Relay {
            let relay = Relay::open(&self.vm, plan.peer.clone(), self.migration.id)?;
            self.relay.insert(relay).uri().to_owned()
        } else {
            let port = prepared.port.ok_or_else(|| no_port(&plan.view.to))?;
            tcp_uri(plan.remote, port)
        };
        let wishes = Wishes {
            uri,
            limits: self.limits,
            bandwidth: self.bandwidth,
            setup,
            post_copy_first: plan.post_copy_first,
            scripted: self.script.is_some(),
        };
        let engine = QemuEngine::new(self.vm.qmp.clone(), plan.features.clone(), plan.offer.running, wishes);
        Ok(Box::new(engine))
    }
}

fn no_port(host: &str) -> AgentError {
    AgentError::Conflict { message: format!("{host} does not tell where its QEMU listens"), hint: None }
}

/// Has our QEMU protect what it sends; one that cannot is relayed.
async fn protect(vm: &Vm, plan: &mut Plan) -> Result<Protection, AgentError> {
    Relay::forget(vm);
    if let Protect::Tls(cipher) = plan.protect {
        let key = StreamKey::new(&vmferry_link::random_bytes());
        let priority = tls_priority(cipher);
        match protect_streams(&vm.qmp, &vm.dir.join("tls"), &key, Endpoint::Client, priority).await {
            Ok(()) => return Ok(Protection::Tls { key, cipher }),
            Err(error) => {
                tracing::warn!(vm = vm.name(), error = in_one_line(&error), "its connections are relayed");
                plan.protect = Protect::Relay;
            }
        }
    }
    vmferry_qemu::unprotect_streams(&vm.qmp).await?;
    Ok(if plan.protect == Protect::Not { Protection::Plain } else { Protection::Relay })
}
