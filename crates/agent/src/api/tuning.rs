//! The route for limits that are changed while a migration runs.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmferry_api::{Problem, TuneRequest, Tuned};

use super::Answer;
use super::local::migration_of;
use crate::agent::Agent;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(tune))
}

/// Changes the limits of the migration of a VM, and answers when they hold.
#[utoipa::path(post, path = "/v1/vms/{name}/migration/limits", params(("name" = String, Path)),
    request_body = TuneRequest,
    responses((status = 200, body = Tuned), (status = "default", body = Problem)))]
async fn tune(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<String>,
    Json(wanted): Json<TuneRequest>,
) -> Answer<Tuned> {
    if agent.host.domain(&name).is_none() {
        agent.host.found(&name).await?;
    }
    let migration = migration_of(&agent, &name)?;
    Ok(Json(migration.tune(wanted).await?))
}
