//! The API: HTTP with JSON, described by the OpenAPI document that it serves.
//!
//! `local` is what the command line uses, over a Unix socket that only the agent's user can open. `peers` is what other
//! agents use, over TCP. Both are made of the same parts, and every route is in the document because the router is
//! built from it.

pub mod local;
pub mod peers;
pub mod types;

use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::Agent;
use crate::api::types::{Code, Problem};
use crate::error::AgentError;

/// An error on its way out.
pub(crate) struct ApiError(AgentError);

pub(crate) type Answer<T> = Result<Json<T>, ApiError>;

impl<E: Into<AgentError>> From<E> for ApiError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = Problem::from(&self.0);
        if problem.code == Code::Internal {
            tracing::error!("{}", problem.message);
        }
        (status(problem.code), Json(problem)).into_response()
    }
}

fn status(code: Code) -> StatusCode {
    match code {
        Code::UnknownVm | Code::UnknownMigration => StatusCode::NOT_FOUND,
        Code::BadRequest | Code::BadLimit => StatusCode::UNPROCESSABLE_ENTITY,
        Code::Unreachable | Code::NotAnAgent | Code::OtherVersion => StatusCode::BAD_GATEWAY,
        Code::Internal | Code::QemuFailed | Code::Other => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::CONFLICT,
    }
}

#[derive(OpenApi)]
#[openapi(info(
    title = "vmferry agent",
    description = "Live migration for QEMU/KVM guests. The routes under /v1/vms and /v1/migrations are for the host's \
                   own users, over the agent's Unix socket; /v1/hello, /v1/incoming and /v1/link-trial are for other \
                   agents, over TCP."
))]
struct Document;

/// The routes for the command line.
pub(crate) fn local_router(agent: &Arc<Agent>) -> axum::Router {
    let document = openapi();
    let (router, _) = OpenApiRouter::new().merge(local::routes()).split_for_parts();
    router
        .route("/openapi.json", axum::routing::get(move || std::future::ready(Json(document.clone()))))
        .fallback(no_such_route)
        .with_state(Arc::clone(agent))
}

/// The routes for other agents.
pub(crate) fn peer_router(agent: &Arc<Agent>) -> axum::Router {
    let (router, _) = OpenApiRouter::new().merge(peers::routes()).split_for_parts();
    router.fallback(no_such_route).with_state(Arc::clone(agent))
}

/// The document, of all routes.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(local::routes())
        .merge(peers::routes())
        .split_for_parts();
    document
}

async fn no_such_route(uri: axum::http::Uri) -> ApiError {
    let message = format!("this agent serves nothing at {}", uri.path());
    ApiError(AgentError::BadRequest { message, hint: Some("GET /openapi.json lists what it serves".into()) })
}
