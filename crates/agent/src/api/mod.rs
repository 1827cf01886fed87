//! The API: HTTP with JSON, described by the OpenAPI document that it serves.
//!
//! `local` is what the command line uses, over a Unix socket that only the agent's user can open. `peers` is what other
//! agents use, over TLS in which both sides have proved who they are. Both are made of the same parts, and every route
//! is in the document because the router is built from it.

mod copies;
mod disks;
mod domains;
mod libvirts;
mod local;
mod moves;
mod peers;
mod tuning;

use std::sync::Arc;

use axum::Json;
use axum::extract::Request;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use vmferry_api::{Code, Problem};

use crate::agent::Agent;
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
        Code::UnknownVm | Code::UnknownMigration | Code::UnknownPeer => StatusCode::NOT_FOUND,
        Code::NotPaired | Code::BadToken | Code::PlainRefused => StatusCode::FORBIDDEN,
        Code::BadRequest | Code::BadLimit => StatusCode::UNPROCESSABLE_ENTITY,
        Code::Unreachable | Code::NotAnAgent | Code::OtherVersion => StatusCode::BAD_GATEWAY,
        Code::Internal | Code::QemuFailed | Code::Other => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::CONFLICT,
    }
}

/// Serves a request that asks to be upgraded to raw bytes both ways.
pub(crate) fn upgraded<F>(
    mut request: Request,
    protocol: &'static str,
    serve: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = ()> + Send,
{
    if request.headers().get(UPGRADE).is_none_or(|asked| asked != protocol) {
        let message = format!("this is served as an upgrade to {protocol}");
        return Err(AgentError::BadRequest { message, hint: None }.into());
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => serve(TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, protocol, "a connection was not upgraded"),
        }
    });
    let headers = [(CONNECTION, HeaderValue::from_static("upgrade")), (UPGRADE, HeaderValue::from_static(protocol))];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmferry agent",
        description = "Live migration for QEMU/KVM guests. The routes under /v1/vms, /v1/migrations and /v1/copies are for the \
                   host's own users, over the agent's Unix socket; /v1/hello, /v1/join, /v1/incoming, \
                   /v1/incoming-copies, /v1/incoming-vms, /v1/incoming-domains, /v1/domains, /v1/boot-files and \
                   /v1/link-trials are for other agents, over TLS."
    ),
    components(schemas(crate::peers::Channel))
)]
struct Document;

/// The routes for the command line.
pub(crate) fn local_router(agent: &Arc<Agent>) -> axum::Router {
    let document = openapi();
    let all = OpenApiRouter::new()
        .merge(local::routes())
        .merge(copies::routes())
        .merge(disks::routes())
        .merge(moves::routes())
        .merge(tuning::routes());
    let (router, _) = all.split_for_parts();
    router
        .layer(axum::middleware::from_fn_with_state(Arc::clone(agent), libvirts::refuse))
        .route("/openapi.json", axum::routing::get(move || std::future::ready(Json(document.clone()))))
        .fallback(no_such_route)
        .with_state(Arc::clone(agent))
}

/// The routes for other agents.
pub(crate) fn peer_router(agent: &Arc<Agent>) -> axum::Router {
    let (router, _) = OpenApiRouter::new().merge(peers::routes()).merge(domains::routes()).split_for_parts();
    router.fallback(no_such_route).with_state(Arc::clone(agent))
}

/// The document, of all routes.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(local::routes())
        .merge(copies::routes())
        .merge(disks::routes())
        .merge(moves::routes())
        .merge(tuning::routes())
        .merge(peers::routes())
        .merge(domains::routes())
        .split_for_parts();
    document
}

async fn no_such_route(uri: axum::http::Uri) -> ApiError {
    let message = format!("this agent serves nothing at {}", uri.path());
    ApiError(AgentError::BadRequest { message, hint: Some("GET /openapi.json lists what it serves".into()) })
}
