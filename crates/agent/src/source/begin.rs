//! A migration from its plan to its end: its phases, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{EngineName, MigrateRequest, PlanView, Security, WatchedView};
use vmferry_custody::OutStep;
use vmferry_link::usual_streams;
use vmferry_qemu::Qmp;

use super::checked::Checked;
use super::custody::Custody;
use super::decider;
use super::expect::Expecting;
use super::forecast::Base;
use super::foresee::{Subject, foresee, trial, watch_time};
use super::limits::Asked;
use super::migration::Seat;
use super::mover::Protect;
use super::outgoing::Outgoing;
use super::plan::{Plan, claim, plan};
use super::run::Run;
use super::teller::Teller;
use super::turn::Turn;
use super::watch::watch;
use crate::error::AgentError;
use crate::host::{Stage, Vm};
use crate::journal::OutRecord;

/// Between two questions whether QEMU has sampled enough, and how many there are.
const LOOK: Duration = Duration::from_millis(100);
const LOOKS: u32 = 30;

/// Plans a migration, and lets go of what that took.
pub(super) async fn check(
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
pub(super) async fn dry_run(
    outgoing: &Outgoing,
    name: &str,
    request: &MigrateRequest,
    unwanted: &CancellationToken,
) -> Result<PlanView, AgentError> {
    let host = &outgoing.host;
    let time = watch_time(request)?;
    let limits = Asked::of(request).limits()?;
    let baseline = decider::baseline_of(request, host.config.engine)?;
    let vm = host.vm(name)?;
    let claim = claim(&vm)?;
    let mut plan = plan(host, &vm, Uuid::new_v4(), request).await?;
    let bandwidth = decider::cap(baseline, request.bandwidth.or(plan.rate));
    let base = Base::of(&vm, &plan, limits, bandwidth, baseline).await;
    let (engine, runs) = (plan.mover.name(), base.running);
    let by_agents = engine == EngineName::External;
    let security = if plan.protect == Protect::Not { Security::Plain } else { Security::Tls };
    let (streams, packing) = if by_agents { (usual_streams(), "adaptive") } else { (1, "none") };
    let trial = trial(security, streams, packing, bandwidth);
    let of = subject(&vm, &plan, &base);
    // The VM is claimed until it was watched: while it is played, which touches nothing, others can do with it what they want.
    let watching = Box::pin(async {
        let _claim = claim;
        match runs {
            true => watch(host, &vm, time, unwanted).await,
            false => Ok(Some((WatchedView::default(), Vec::new()))),
        }
    });
    foresee(host, &outgoing.foreseen, (of, base), (&request.to, trial), watching, &mut plan.view).await?;
    Ok(plan.view)
}

/// What a prediction of this migration is of.
fn subject(vm: &Vm, plan: &Plan, base: &Base) -> Subject {
    Subject {
        vm: vm.name().into(),
        instance: vm.instance(),
        peer: plan.peer_key,
        engine: plan.mover.name().to_string(),
        limits: base.limits,
        policy: base.policy(),
    }
}

/// See [`super::guest::dirty_rate`].
pub(super) async fn dirty_rate(qmp: &Qmp) -> Option<u64> {
    qmp.execute_raw("calc-dirty-rate", json!({ "calc-time": 1 })).await.ok()?;
    for _ in 0..LOOKS {
        tokio::time::sleep(LOOK).await;
        let told = qmp.execute_raw("query-dirty-rate", json!({})).await.ok()?;
        if told["status"] == "measured" {
            return told["dirty-rate"].as_u64().map(|mib| mib << 20);
        }
    }
    None
}

/// Plans the migration and starts it. When that fails the seat can be taken again.
pub(super) async fn begin(
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
        let before = outgoing.foreseen.take(&subject(&vm, &plan, &base));
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
