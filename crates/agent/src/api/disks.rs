//! The routes for the disks of this host's VMs.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmferry_api::{DiskMoveRequest, DiskMoveView, DiskView, Problem};

use super::{Answer, ApiError};
use crate::agent::Agent;
use crate::disk_moves;

type Shared = State<Arc<Agent>>;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(disks)).routes(routes!(move_disk, disk_move, cancel_disk_move))
}

/// The disks and drives of a VM that have something in them.
#[utoipa::path(get, path = "/v1/vms/{name}/disks", params(("name" = String, Path)),
    responses((status = 200, body = Vec<DiskView>), (status = "default", body = Problem)))]
async fn disks(State(agent): Shared, Path(name): Path<String>) -> Answer<Vec<DiskView>> {
    Ok(Json(disk_moves::list(&agent.host, &name).await?))
}

/// Begins to move a disk, named as it is listed or by where it is, to another place; the VM stays here.
#[utoipa::path(post, path = "/v1/vms/{name}/disks/{disk}/move", request_body = DiskMoveRequest,
    params(("name" = String, Path), ("disk" = String, Path)),
    responses((status = 200, body = DiskMoveView), (status = "default", body = Problem)))]
async fn move_disk(
    State(agent): Shared,
    Path((name, disk)): Path<(String, String)>,
    Json(request): Json<DiskMoveRequest>,
) -> Answer<DiskMoveView> {
    // In a task of its own: a user who goes away meanwhile must not leave a VM that nobody drives.
    let begun = tokio::spawn(async move { agent.disk_moves.begin(&name, &disk, request).await });
    Ok(Json(begun.await.expect("beginning does not panic")?))
}

/// How far the last move of a disk is: to be asked again and again while it is `copying` or `switching`.
#[utoipa::path(get, path = "/v1/vms/{name}/disks/{disk}/move",
    params(("name" = String, Path), ("disk" = String, Path)),
    responses((status = 200, body = DiskMoveView), (status = "default", body = Problem)))]
async fn disk_move(State(agent): Shared, Path((name, disk)): Path<(String, String)>) -> Answer<DiskMoveView> {
    Ok(Json(agent.disk_moves.view(&name, &disk)?))
}

/// Cancels the move of a disk, which stays where it is; its view tells how it ends.
#[utoipa::path(delete, path = "/v1/vms/{name}/disks/{disk}/move",
    params(("name" = String, Path), ("disk" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn cancel_disk_move(
    State(agent): Shared,
    Path((name, disk)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    agent.disk_moves.cancel(&name, &disk)?;
    Ok(StatusCode::NO_CONTENT)
}
