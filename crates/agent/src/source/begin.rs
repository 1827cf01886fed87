//! A migration from its plan to its end: its phases, one after the other.

use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;
use vmferry_api::{MigrateRequest, PlanView};
use vmferry_custody::OutStep;

use super::custody::Custody;
use super::decider;
use super::limits::Asked;
use super::migration::Migration;
use super::outgoing::Outgoing;
use super::plan::{claim, plan, predict};
use super::run::Run;
use super::teller::Teller;
use crate::error::AgentError;
use crate::host::Stage;
use crate::journal::OutRecord;

/// Plans the migration and, unless it is a dry run, starts it.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    name: &str,
    request: MigrateRequest,
) -> Result<(PlanView, Option<Arc<Migration>>), AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let id = Uuid::new_v4();
    let asked = Asked::of(&request);
    let limits = asked.limits()?;
    let baseline = decider::baseline_of(&request, host.config.engine)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(host, &vm, id, &request).await?;
    if request.dry_run {
        predict(&mut plan, limits.post_copy).await?;
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
    let (migration, changes) = Migration::new(id, name, plan.peer.apart(), limits.post_copy);
    let teller = Arc::new(Teller::new(host, &migration, begun, request.script.is_some()));
    let custody = Custody::begin(host, record, plan.peer.clone());
    custody.open(teller.as_ref()).await?;
    outgoing.is_open(&custody);
    outgoing.add(Arc::clone(&migration));
    claim.keep(Stage::Migrating(id));
    let view = plan.view.clone();
    let bandwidth = decider::cap(baseline, request.bandwidth.or(plan.rate));
    let run = Run {
        host: Arc::clone(host),
        outgoing: Arc::clone(outgoing),
        migration: Arc::clone(&migration),
        custody,
        teller,
        vm: Arc::clone(&vm),
        plan,
        asked,
        limits,
        bandwidth,
        changes: Some(changes),
        post_copy_obstacle: None,
        copies_ram: false,
        script: request.script,
        baseline,
        to: request.to,
        keep: None,
        relay: None,
        mirrors: None,
    };
    tokio::spawn(run.run());
    Ok((view, Some(migration)))
}
