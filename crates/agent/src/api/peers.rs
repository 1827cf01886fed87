//! The routes for other agents. See `incoming.rs` for what they mean.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::Answer;
use super::types::{Hello, Problem};
use crate::incoming::{CheckReply, IncomingState, Offer, Prepared};
use crate::peer::API;
use crate::server::LocalAddress;
use crate::{Agent, incoming};

type Shared = State<Arc<Agent>>;

pub(crate) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(hello))
        .routes(routes!(link_trial))
        .layer(DefaultBodyLimit::max(16 << 20))
        .routes(routes!(check))
        .routes(routes!(prepare))
        .routes(routes!(state, abandon))
        .routes(routes!(keep))
        .routes(routes!(commit))
        .routes(routes!(recover))
}

pub(super) fn introduce(agent: &Agent) -> Hello {
    Hello {
        product: "vmferry".into(),
        api: API,
        version: env!("CARGO_PKG_VERSION").into(),
        name: agent.config.name.clone(),
    }
}

/// Who this agent is.
#[utoipa::path(get, path = "/v1/hello", responses((status = 200, body = Hello)))]
async fn hello(State(agent): Shared) -> Json<Hello> {
    Json(introduce(&agent))
}

/// Takes some MiB and forgets them: how long that takes tells the other side what the link carries.
#[utoipa::path(post, path = "/v1/link-trial", request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204)))]
async fn link_trial(_bytes: Bytes) -> StatusCode {
    StatusCode::NO_CONTENT
}

/// Whether this host could take the VM; touches nothing.
#[utoipa::path(post, path = "/v1/incoming/check", request_body = Offer,
    responses((status = 200, body = CheckReply), (status = "default", body = Problem)))]
async fn check(State(agent): Shared, Json(offer): Json<Offer>) -> Answer<CheckReply> {
    Ok(Json(incoming::check(&agent, &offer).await?))
}

/// Starts a QEMU that waits for the VM.
#[utoipa::path(post, path = "/v1/incoming", request_body = Offer,
    responses((status = 200, body = Prepared), (status = "default", body = Problem)))]
async fn prepare(
    State(agent): Shared,
    ConnectInfo(address): ConnectInfo<LocalAddress>,
    Json(offer): Json<Offer>,
) -> Answer<Prepared> {
    // In a task of its own: a source that goes away meanwhile must not leave a half-started QEMU.
    let prepared = tokio::spawn(async move { incoming::prepare(&agent, offer, address.0).await });
    Ok(Json(prepared.await.expect("preparing does not panic")?))
}

/// How an incoming migration stands.
#[utoipa::path(get, path = "/v1/incoming/{id}", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn state(State(agent): Shared, Path(id): Path<Uuid>) -> Answer<IncomingState> {
    Ok(Json(incoming::state(&agent, id)?))
}

/// The source is still there.
#[utoipa::path(post, path = "/v1/incoming/{id}/keep", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn keep(State(agent): Shared, Path(id): Path<Uuid>) -> Answer<IncomingState> {
    Ok(Json(incoming::keep(&agent, id)?))
}

/// This host becomes the owner of the guest and sets it running. The answer is final and may be asked for again.
#[utoipa::path(post, path = "/v1/incoming/{id}/commit", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn commit(State(agent): Shared, Path(id): Path<Uuid>) -> Answer<IncomingState> {
    let committed = tokio::spawn(async move { incoming::commit(&agent, id).await });
    Ok(Json(committed.await.expect("committing does not panic")?))
}

/// This host forgets what it prepared, unless it was committed. The answer is final.
#[utoipa::path(delete, path = "/v1/incoming/{id}", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn abandon(State(agent): Shared, Path(id): Path<Uuid>) -> Answer<IncomingState> {
    let abandoned = tokio::spawn(async move { incoming::abandon(&agent, id, "the source asked for it").await });
    Ok(Json(abandoned.await.expect("abandoning does not panic")?))
}

/// Post-copy lost its connection: listens again.
#[utoipa::path(post, path = "/v1/incoming/{id}/recover", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn recover(
    State(agent): Shared,
    ConnectInfo(address): ConnectInfo<LocalAddress>,
    Path(id): Path<Uuid>,
) -> Answer<IncomingState> {
    Ok(Json(incoming::recover(&agent, id, address.0).await?))
}
