//! A migration from its plan to its end: its phases, one after the other.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{MigrateRequest, PlanView};
use vmferry_custody::OutStep;
use vmferry_link::Fingerprint;

use super::custody::Custody;
use super::decider;
use super::expect::Expecting;
use super::forecast::Base;
use super::foresee::{foresee, watch_time};
use super::limits::Asked;
use super::migration::Seat;
use super::outgoing::Outgoing;
use super::plan::{claim, plan};
use super::run::Run;
use super::teller::Teller;
use super::turn::Turn;
use crate::error::AgentError;
use crate::host::Stage;
use crate::journal::{Instance, OutRecord};

/// What a plan is for one that may have to wait: it can go, and where.
pub(crate) struct Checked {
    pub(crate) view: PlanView,
    pub(crate) key: Fingerprint,
    /// The most that may be sent, in bytes a second.
    pub(crate) rate: Option<u64>,
    /// Which VM.
    pub(crate) instance: Instance,
}

/// Plans a migration, and lets go of what that took.
pub(crate) async fn check(
    outgoing: &Arc<Outgoing>,
    name: &str,
    request: &MigrateRequest,
) -> Result<Checked, AgentError> {
    let host = &outgoing.host;
    Asked::of(request).limits()?;
    decider::baseline_of(request, host.config.engine)?;
    let vm = host.vm(name)?;
    let _claim = claim(&vm)?;
    let plan = plan(host, &vm, Uuid::new_v4(), request).await?;
    Ok(Checked { view: plan.view, key: plan.peer_key, rate: request.bandwidth.or(plan.rate), instance: vm.instance() })
}

/// Plans a migration that does not begin, and says what is to be expected of it. Ends when it becomes `unwanted` meanwhile.
pub(crate) async fn dry_run(
    outgoing: &Outgoing,
    name: &str,
    request: &MigrateRequest,
    unwanted: &CancellationToken,
) -> Result<PlanView, AgentError> {
    let host = &outgoing.host;
    watch_time(request)?;
    let limits = Asked::of(request).limits()?;
    let baseline = decider::baseline_of(request, host.config.engine)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(host, &vm, Uuid::new_v4(), request).await?;
    let bandwidth = decider::cap(baseline, request.bandwidth.or(plan.rate));
    let base = Base::of(&vm, &plan, limits, bandwidth, baseline).await;
    foresee(host, &outgoing.foreseen, (&vm, claim), &mut plan, request, base, unwanted).await?;
    Ok(plan.view)
}

/// Plans the migration and starts it. When that fails the seat can be taken again.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    seat: &mut Seat,
    request: MigrateRequest,
) -> Result<PlanView, AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let migration = Arc::clone(&seat.migration);
    let (id, name) = (migration.id, migration.vm.as_str());
    let asked = Asked::of(&request);
    let limits = asked.limits()?;
    let baseline = decider::baseline_of(&request, host.config.engine)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let plan = plan(host, &vm, id, &request).await?;
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
    let bandwidth = decider::cap(baseline, request.bandwidth.or(plan.rate));
    let expecting = if request.script.is_none() {
        let base = Base::of(&vm, &plan, limits, bandwidth, baseline).await;
        let before = outgoing.foreseen.take(&vm, plan.peer_key, &base, plan.mover.name());
        Expecting::of(base, before)
    } else {
        Expecting::nothing()
    };
    migration.begins(plan.peer.apart(), plan.peer_key, limits.post_copy);
    let teller = Arc::new(Teller::new(host, &migration, begun, request.script.is_some()));
    let custody = Custody::begin(host, record, plan.peer.clone());
    custody.open(teller.as_ref()).await?;
    outgoing.is_open(&custody);
    if outgoing.migration(id).is_none() {
        outgoing.add(Arc::clone(&migration));
    }
    claim.keep(Stage::Migrating(id));
    let view = plan.view.clone();
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
        changes: seat.changes.take(),
        post_copy_obstacle: None,
        copies_ram: false,
        turn: Turn::new(Arc::clone(&outgoing.post_copies)),
        siblings: 1,
        script: request.script,
        baseline,
        to: request.to,
        keep: None,
        relay: None,
        mirrors: None,
        expecting,
        foretold: None,
    };
    tokio::spawn(run.run());
    Ok(view)
}
