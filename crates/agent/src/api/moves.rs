//! The routes for VMs that move while they do not run.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmferry_api::{Problem, VmMoveRequest, VmMoveView};

use super::{Answer, ApiError};
use crate::agent::Agent;
use crate::error::AgentError;
use crate::recovery::came_whole;

type Shared = State<Arc<Agent>>;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(move_vm, vm_move, cancel_vm_move))
}

/// Begins to move a VM that does not run to another host, with its disks; or, of one that was given away, tells how far
/// that is.
#[utoipa::path(post, path = "/v1/vms/{name}/move", params(("name" = String, Path)), request_body = VmMoveRequest,
    responses((status = 200, body = VmMoveView), (status = "default", body = Problem)))]
async fn move_vm(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<VmMoveRequest>,
) -> Answer<VmMoveView> {
    // In a task of its own: a user who goes away meanwhile must not leave a VM that nobody drives.
    let begun = tokio::spawn(async move {
        if let Some(idle) = agent.host.idle(&name)
            && !came_whole(&agent, &idle.record).await?
        {
            agent.host.forget_idle(&idle).await?;
            return Err(AgentError::UnknownVm { name });
        }
        agent.vm_moves.begin(&name, request).await
    });
    Ok(Json(begun.await.expect("beginning does not panic")?))
}

/// How far the last move of a VM is: to be asked again and again while it is `copying` or `handing-over`.
#[utoipa::path(get, path = "/v1/vms/{name}/move", params(("name" = String, Path)),
    responses((status = 200, body = VmMoveView), (status = "default", body = Problem)))]
async fn vm_move(State(agent): Shared, Path(name): Path<String>) -> Answer<VmMoveView> {
    Ok(Json(agent.vm_moves.view(&name)?))
}

/// Cancels the move of a VM, which stays; its view tells how it ends.
#[utoipa::path(delete, path = "/v1/vms/{name}/move", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn cancel_vm_move(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    match agent.vm_moves.cancel(&name)? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(AgentError::Conflict { message: format!("{name} is not being moved"), hint: None }.into()),
    }
}
