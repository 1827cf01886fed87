//! A domain's migration from what its user asks for to when it is under way.

use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;
use vmferry_api::trial::{Data, Trial};
use vmferry_api::{Begun, MigrateRequest, PlanView, Security, in_one_line};
use vmferry_link::usual_streams;

use super::plan::{Plan, plan};
use super::run::Carrying;
use super::ways::Ways;
use crate::error::AgentError;
use crate::host::{Host, SeenDomain};
use crate::journal::{CarryEnd, CarryRecord};
use crate::peers::link_trial;
use crate::source::limits::Asked;
use crate::source::migration::Seat;
use crate::source::outgoing::Outgoing;
use crate::source::teller::Teller;
use crate::source::turn::Turn;

/// How long a dry run tries the link, in ms.
const TRIAL_MS: u64 = 250;

/// Plans the migration of a domain and, unless it is a dry run, has it begin.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    seen: SeenDomain,
    request: MigrateRequest,
) -> Result<Begun, AgentError> {
    let (host, begun) = (&outgoing.host, Instant::now());
    let name = host.name_of(&seen);
    let asked = Asked::of(&request);
    let limits = asked.limits()?;
    if request.dry_run {
        if outgoing.carries.of(seen.domain.uuid).is_some() {
            return Err(AgentError::MigrationRuns { name });
        }
        let Plan { view, .. } = plan(host, &name, &seen, Uuid::new_v4(), &request).await?;
        return Ok(Begun { plan: with_the_link(host, &request, view).await, id: None });
    }
    let mut seat = Seat::new(&name);
    let migration = Arc::clone(&seat.migration);
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
                host.journal.end_carry(record.id, CarryEnd::Abandoned, &in_one_line(&error)).await?;
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
    migration.begins(plan.peer.apart(), plan.key, limits.post_copy);
    outgoing.add(Arc::clone(&migration));
    let view = plan.view.clone();
    let id = Some(migration.id);
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
    };
    tokio::spawn(carrying.run());
    Ok(Begun { plan: view, id })
}

/// What the link carries in a short trial goes into the plan of a dry run.
async fn with_the_link(host: &Arc<Host>, request: &MigrateRequest, mut view: PlanView) -> PlanView {
    let trial = Trial {
        security: Security::Tls,
        streams: usual_streams(),
        packing: "none".into(),
        data: Data::Random,
        time_ms: TRIAL_MS,
        rate: request.bandwidth,
    };
    match link_trial::run(host, &request.to, trial).await {
        Ok(tried) if tried.rate() >= 1.0 => {
            view.link_rate = tried.rate() as u64;
            view.first_round_ms = (view.ram_bytes as f64 / tried.rate() * 1e3) as u64;
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(error = in_one_line(&error), "the link could not be tried"),
    }
    view.notes.push("It is libvirt's: what its migration would do is not predicted yet.".into());
    view
}
