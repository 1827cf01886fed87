//! A domain's migration from what its user asks for to when it is under way.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{MigrateRequest, PlanView, Security, WatchedView, in_one_line};
use vmferry_policy::{BytesPerSec, Limits};

use super::foretell::watch;
use super::plan::{Plan, plan};
use super::run::Carrying;
use super::ways::Ways;
use crate::error::AgentError;
use crate::host::SeenDomain;
use crate::journal::CarryRecord;
use crate::peers::link_trial;
use crate::source::checked::Checked;
use crate::source::expect::Expecting;
use crate::source::foresee::{foresee, trial, watch_time};
use crate::source::limits::Asked;
use crate::source::migration::Seat;
use crate::source::outgoing::Outgoing;
use crate::source::teller::Teller;
use crate::source::turn::Turn;

/// See [`crate::source::guest::check`].
pub(crate) async fn check(
    outgoing: &Outgoing,
    seen: &SeenDomain,
    request: &MigrateRequest,
) -> Result<Checked, AgentError> {
    Asked::of(request).limits()?;
    let plan = planned(outgoing, seen, Uuid::new_v4(), request).await?;
    Ok(Checked { key: plan.key, rate: request.bandwidth.or(plan.rate), instance: plan.instance, view: plan.view })
}

/// See [`crate::source::guest::dry_run`].
pub(crate) async fn dry_run(
    outgoing: &Outgoing,
    seen: &SeenDomain,
    request: &MigrateRequest,
    unwanted: &CancellationToken,
) -> Result<PlanView, AgentError> {
    let (host, time) = (&outgoing.host, watch_time(request)?);
    let limits = Asked::of(request).limits()?;
    let plan = planned(outgoing, seen, Uuid::new_v4(), request).await?;
    let bandwidth = request.bandwidth.or(plan.rate);
    let streams = plan.connections.unwrap_or(1);
    if !plan.live {
        let mut view = plan.view;
        if let Some(rate) = link_trial::rate(host, &request.to, streams, bandwidth).await {
            view.link_rate = rate;
            view.first_round_ms = (view.ram_used_bytes as f64 / rate as f64 * 1e3) as u64;
        }
        view.notes.push("More is not predicted of it: it stands for about as long as its memory takes.".into());
        return Ok(view);
    }
    let base = plan.base(limits, bandwidth);
    let of = plan.subject(&base);
    let trial = trial(Security::Tls, streams, "none", bandwidth);
    let Plan { mut view, libvirt, domain, runs, .. } = plan;
    let ram = view.ram_bytes;
    let watching = async {
        match runs {
            true => watch(&libvirt, (&domain, ram), time, unwanted).await,
            false => Ok(Some((WatchedView::default(), Vec::new()))),
        }
    };
    foresee(host, &outgoing.foreseen, (of, base), (&request.to, trial), watching, &mut view).await?;
    Ok(view)
}

/// Its plan, unless it is on its way already.
async fn planned(
    outgoing: &Outgoing,
    seen: &SeenDomain,
    id: Uuid,
    request: &MigrateRequest,
) -> Result<Plan, AgentError> {
    let name = outgoing.host.name_of(seen);
    if outgoing.carries.of(seen.domain.uuid).is_some() {
        return Err(AgentError::MigrationRuns { name });
    }
    plan(&outgoing.host, &name, seen, id, request).await
}

/// See [`crate::source::guest::begin`].
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    seat: &mut Seat,
    seen: SeenDomain,
    request: MigrateRequest,
) -> Result<PlanView, AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let asked = Asked::of(&request);
    let limits = asked.limits()?;
    let migration = Arc::clone(&seat.migration);
    let name = host.name_of(&seen);
    let carry = outgoing.carries.begin(seen.domain.uuid, &migration)?;
    let prepared = async {
        let plan = plan(host, &name, &seen, migration.id, &request).await?;
        let record = CarryRecord {
            id: migration.id,
            vm: name.clone(),
            uuid: plan.domain.uuid,
            peer: plan.view.to.clone(),
            address: plan.peer.address().into(),
            peer_key: plan.key,
        };
        host.journal.begin_carry(&record).await?;
        let open = async {
            let ways = Ways::open(migration.id, &plan.domain.name, &plan.peer, host.domains.qemu_user().await?)?;
            plan.peer.announce_domain(&plan.offer).await?;
            Ok::<_, AgentError>(ways)
        };
        match open.await {
            Ok(ways) => Ok((plan, record, ways)),
            Err(error) => {
                // Its announcement may have come through, and only the answer not.
                if let Err(error) = plan.peer.withdraw_domain(record.id).await {
                    tracing::debug!(
                        error = in_one_line(&error),
                        "the destination does not hear that it does not begin"
                    );
                }
                host.journal.forget_carry(record.id).await?;
                Err(error)
            }
        }
    };
    let (plan, record, ways) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => {
            outgoing.carries.end(seen.domain.uuid);
            return Err(error);
        }
    };
    let can_post_copy = plan.post_copy_obstacle.is_none();
    let limits = if can_post_copy { limits } else { limits.without_post_copy() };
    let siblings = migration.siblings();
    let bandwidth = plan.bandwidth(&asked, siblings);
    let limits = Limits { bandwidth: bandwidth.map(BytesPerSec), ..limits };
    let expecting = if plan.live {
        let base = plan.base(limits, bandwidth);
        let before = outgoing.foreseen.take(&plan.subject(&base));
        Expecting::of(base, before)
    } else {
        Expecting::nothing()
    };
    migration.begins(plan.peer.apart(), plan.key, limits.post_copy);
    if outgoing.migration(migration.id).is_none() {
        outgoing.add(Arc::clone(&migration));
    }
    let view = plan.view.clone();
    let carrying = Carrying {
        host: Arc::clone(host),
        outgoing: Arc::clone(outgoing),
        carry,
        teller: Arc::new(Teller::new(host, &migration, begun, false)),
        migration,
        plan,
        record,
        ways,
        asked,
        limits,
        changes: seat.changes.take(),
        turn: Turn::new(Arc::clone(&outgoing.post_copies)),
        siblings,
        expecting,
    };
    tokio::spawn(carrying.run());
    Ok(view)
}
