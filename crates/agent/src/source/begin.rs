//! A migration from its plan to its end: its phases, one after the other.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{MigrateRequest, PlanView};
use vmferry_custody::OutStep;

use super::custody::Custody;
use super::expect::Expecting;
use super::forecast::Base;
use super::foresee::{foresee, watch_time};
use super::migration::Migration;
use super::outgoing::Outgoing;
use super::plan::{claim, limits, plan};
use super::run::Run;
use super::teller::Teller;
use crate::error::AgentError;
use crate::host::Stage;
use crate::journal::OutRecord;

/// Plans the migration and, unless it is a dry run, starts it. A dry run that becomes `unwanted` meanwhile ends.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    name: &str,
    request: MigrateRequest,
    unwanted: CancellationToken,
) -> Result<(PlanView, Option<Arc<Migration>>), AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let id = Uuid::new_v4();
    let limits = limits(&request)?;
    watch_time(&request)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(host, &vm, id, &request).await?;
    if request.dry_run {
        foresee(host, &outgoing.foreseen, &vm, &mut plan, &request, limits, &unwanted).await?;
        return Ok((plan.view, None));
    }
    // That it can be committed or undone must not depend on what happens to the disk meanwhile.
    host.journal.reserve().await?;
    let record = OutRecord {
        id,
        vm: name.into(),
        instance: vm.instance(),
        peer: plan.view.to.clone(),
        address: plan.peer.address().into(),
        peer_key: plan.peer_key,
        running: plan.offer.running,
        step: OutStep::CopyRam,
    };
    let migration = Migration::new(id, name, plan.peer.apart(), limits.post_copy);
    let teller = Arc::new(Teller::new(host, &migration, begun, request.script.is_some()));
    let custody = Custody::begin(host, record, plan.peer.clone());
    custody.open(teller.as_ref()).await?;
    outgoing.is_open(&custody);
    outgoing.add(Arc::clone(&migration));
    claim.keep(Stage::Migrating(id));
    let view = plan.view.clone();
    let bandwidth = request.bandwidth.or(plan.rate);
    let expecting = if request.script.is_none() {
        let base = Base::of(&vm, &plan, limits, bandwidth).await;
        let before = outgoing.foreseen.take(name, plan.peer_key, base.limits, plan.mover.name());
        Expecting::of(base, before)
    } else {
        Expecting::nothing()
    };
    let run = Run {
        host: Arc::clone(host),
        outgoing: Arc::clone(outgoing),
        migration: Arc::clone(&migration),
        custody,
        teller,
        vm: Arc::clone(&vm),
        plan,
        limits,
        bandwidth,
        script: request.script,
        to: request.to,
        keep: None,
        relay: None,
        mirrors: None,
        expecting,
        foretold: None,
    };
    tokio::spawn(run.run());
    Ok((view, Some(migration)))
}
