//! The routes for copies of images, for the host's own users.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;
use vmferry_api::{CopyBegun, CopyEvent, CopyRequest, Problem};

use super::{Answer, ApiError};
use crate::agent::Agent;
use crate::copying;

type Shared = State<Arc<Agent>>;

pub(crate) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(copy)).routes(routes!(cancel)).routes(routes!(events))
}

/// Begins to copy an image to another host.
#[utoipa::path(post, path = "/v1/copies", request_body = CopyRequest,
    responses((status = 200, body = CopyBegun), (status = "default", body = Problem)))]
async fn copy(State(agent): Shared, Json(request): Json<CopyRequest>) -> Answer<CopyBegun> {
    // In a task of its own: a user who goes away meanwhile must not leave a copy that nobody knows.
    let begun = tokio::spawn(async move { copying::begin(&agent.copies, request).await });
    Ok(Json(CopyBegun { id: begun.await.expect("beginning does not panic")? }))
}

/// Cancels a copy; its events tell how it ends.
#[utoipa::path(delete, path = "/v1/copies/{id}", params(("id" = Uuid, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn cancel(State(agent): Shared, Path(id): Path<Uuid>) -> Result<StatusCode, ApiError> {
    agent.copies.leaving(id)?.cancel();
    Ok(StatusCode::NO_CONTENT)
}

/// What a copy tells: server-sent events, each a `CopyEvent`; the stream ends with the copy.
#[utoipa::path(get, path = "/v1/copies/{id}/events", params(("id" = Uuid, Path)),
    responses((status = 200, body = CopyEvent, content_type = "text/event-stream"), (status = "default", body = Problem)))]
async fn events(
    State(agent): Shared,
    Path(id): Path<Uuid>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let told = agent.copies.leaving(id)?.watch();
    let events = futures_util::stream::unfold(Some(told), |told| async {
        let mut told = told?;
        // The first is what was told last; whoever looks sees no less than the end.
        told.changed().await.ok()?;
        let event = told.borrow_and_update().clone();
        let rest = (!event.is_last()).then_some(told);
        Some((Ok(Event::default().json_data(&event).expect("an event is plain data")), rest))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}
