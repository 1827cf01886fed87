//! The routes for other agents that carry a libvirt's domain to this host's. See `destination/carried.rs`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, Path, Query, Request, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;
use vmferry_api::Problem;

use super::peers::Paired;
use super::{Answer, ApiError, upgraded};
use crate::agent::Agent;
use crate::destination::carried;
use crate::peers::trust::Caller;
use crate::peers::{CarryOffer, CarryReply, Channel, DomainState, RELAY_PROTOCOL};

type Shared = State<Arc<Agent>>;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(check))
        .routes(routes!(announce))
        .routes(routes!(withdraw))
        .routes(routes!(carry))
        .routes(routes!(domain))
}

/// Whether this host's libvirt could take a domain; touches nothing.
#[utoipa::path(post, path = "/v1/incoming-domains/check", request_body = CarryOffer,
    responses((status = 200, body = CarryReply), (status = "default", body = Problem)))]
async fn check(State(agent): Shared, _peer: Paired, Json(offer): Json<CarryOffer>) -> Answer<CarryReply> {
    Ok(Json(carried::check(&agent.host, &offer).await?))
}

/// A domain comes: from now on it is let through to this host's libvirt, for the agent that says so.
#[utoipa::path(post, path = "/v1/incoming-domains", request_body = CarryOffer,
    responses((status = 200, body = CarryReply), (status = "default", body = Problem)))]
async fn announce(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<CarryOffer>) -> Answer<CarryReply> {
    Ok(Json(carried::announce(&agent.host, &agent.carried, &offer, &caller).await?))
}

/// It is over: nothing of it is let through any more. Also of an agent that was unpaired meanwhile.
#[utoipa::path(delete, path = "/v1/incoming-domains/{id}", params(("id" = Uuid, Path)),
    responses((status = 200), (status = "default", body = Problem)))]
async fn withdraw(State(agent): Shared, ConnectInfo(caller): ConnectInfo<Caller>, Path(id): Path<Uuid>) -> Answer<()> {
    carried::withdraw(&agent.carried, id, caller.key)?;
    Ok(Json(()))
}

/// One connection of the two libvirts (`control`), or of their QEMUs (`ram`, `disks`): upgraded to its bytes, both ways.
#[utoipa::path(post, path = "/v1/incoming-domains/{id}/{channel}",
    params(("id" = Uuid, Path), ("channel" = Channel, Path)),
    responses((status = 101, description = "upgraded to vmferry-relay"), (status = "default", body = Problem)))]
async fn carry(
    State(agent): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path((id, channel)): Path<(Uuid, Channel)>,
    request: Request,
) -> Result<Response, ApiError> {
    let way = carried::way(&agent.host, &agent.carried, id, caller.key, channel)?;
    upgraded(request, RELAY_PROTOCOL, move |connection| way.carry(connection))
}

/// How somebody wants to hear of a domain.
#[derive(Deserialize, IntoParams)]
struct Asked {
    /// As soon as it runs.
    #[serde(default)]
    wait: bool,
}

/// How a domain stands with this host's libvirt.
#[utoipa::path(get, path = "/v1/domains/{uuid}", params(("uuid" = Uuid, Path), Asked),
    responses((status = 200, body = DomainState), (status = "default", body = Problem)))]
async fn domain(
    State(agent): Shared,
    _peer: Paired,
    Path(uuid): Path<Uuid>,
    Query(Asked { wait }): Query<Asked>,
) -> Answer<DomainState> {
    Ok(Json(DomainState { there: carried::domain(&agent.host, uuid, wait).await? }))
}
