//! The routes for other agents. See `destination/` for what they mean.
//!
//! Everybody who gets here has proved to have a key. `hello` and `join` answer strangers; everything else wants a
//! [`Paired`] caller, and what concerns one migration the one that [`Began`] it.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;
use vmferry_api::{Hello, Problem};

use super::{Answer, ApiError, upgraded};
use crate::agent::Agent;
use crate::copying;
use crate::destination;
use crate::error::AgentError;
use crate::measuring::{boot_files, witness};
use crate::peers::trust::{self, Caller};
use crate::peers::{
    API, Abandon, BootFile, CheckReply, Commit, CopyAccepted, CopyOffer, Fence, IncomingState, Join, MoveOffer,
    MoveReply, Offer, OutgoingState, Prepared, RELAY_PROTOCOL, Taken, TrialAccepted, TrialOffer, link_trial, relay,
};
use crate::vm_moves;

type Shared = State<Arc<Agent>>;

pub(crate) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(has_boot_file, put_boot_file))
        .layer(DefaultBodyLimit::max(boot_files::LARGEST))
        .layer(DefaultBodyLimit::max(16 << 20))
        .routes(routes!(hello))
        .routes(routes!(join))
        // Strangers say little. What is nearer to its handler counts, so that the trial keeps its own.
        .layer(DefaultBodyLimit::max(4 << 10))
        .routes(routes!(check))
        .routes(routes!(prepare))
        .routes(routes!(state, abandon))
        .routes(routes!(keep))
        .routes(routes!(commit))
        .routes(routes!(recover))
        .routes(routes!(fence))
        .routes(routes!(settled))
        .routes(routes!(outgoing))
        .routes(routes!(relay))
        .routes(routes!(try_streams))
        .routes(routes!(witness))
        .routes(routes!(take_copy))
        .routes(routes!(check_vm))
        .routes(routes!(begin_vm))
        .routes(routes!(take_vm))
}

/// A peer that asks.
pub(super) struct Paired(pub(super) Caller);

impl FromRequestParts<Arc<Agent>> for Paired {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, agent: &Arc<Agent>) -> Result<Self, ApiError> {
        let ConnectInfo(caller) = ConnectInfo::<Caller>::from_request_parts(parts, agent).await.map_err(unrouted)?;
        trust::require_peer(&agent.host, &caller).await?;
        Ok(Self(caller))
    }
}

/// The source of the migration that the path names. It is heard to the end also when it is unpaired meanwhile. Of one
/// that this host never heard of, any peer may be the source.
struct Began {
    id: Uuid,
    caller: Caller,
}

impl FromRequestParts<Arc<Agent>> for Began {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, agent: &Arc<Agent>) -> Result<Self, ApiError> {
        let ConnectInfo(caller) = ConnectInfo::<Caller>::from_request_parts(parts, agent).await.map_err(unrouted)?;
        let Path(id) = Path::<Uuid>::from_request_parts(parts, agent).await.map_err(unrouted)?;
        match agent.host.journal.row_in(id).await?.map(|row| row.source) {
            Some(source) if source.key == caller.key => {}
            Some(_) => {
                tracing::warn!(from = %caller.remote, fingerprint = %caller.key, migration = %id, "is not its migration");
                return Err(AgentError::NotYours.into());
            }
            None => drop(trust::require_peer(&agent.host, &caller).await?),
        }
        Ok(Self { id, caller })
    }
}

fn unrouted(error: impl std::fmt::Display) -> ApiError {
    AgentError::BadRequest { message: error.to_string(), hint: None }.into()
}

pub(super) fn introduce(agent: &Agent) -> Hello {
    Hello {
        product: "vmferry".into(),
        api: API,
        version: env!("CARGO_PKG_VERSION").into(),
        name: agent.host.config.name.clone(),
    }
}

/// Who this agent is.
#[utoipa::path(get, path = "/v1/hello", responses((status = 200, body = Hello)))]
async fn hello(State(agent): Shared) -> Json<Hello> {
    Json(introduce(&agent))
}

/// Makes the caller a peer, by the secret of a token that this host made.
#[utoipa::path(post, path = "/v1/join", request_body = Join,
    responses((status = 200, body = Hello), (status = "default", body = Problem)))]
async fn join(State(agent): Shared, ConnectInfo(caller): ConnectInfo<Caller>, Json(join): Json<Join>) -> Answer<Hello> {
    trust::join(&agent.host, &caller, &join).await?;
    Ok(Json(introduce(&agent)))
}

/// Whether this host could take the VM; touches nothing.
#[utoipa::path(post, path = "/v1/incoming/check", request_body = Offer,
    responses((status = 200, body = CheckReply), (status = "default", body = Problem)))]
async fn check(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<Offer>) -> Answer<CheckReply> {
    Ok(Json(destination::check(&agent.incoming, offer, &caller).await?))
}

/// Starts a QEMU that waits for the VM.
#[utoipa::path(post, path = "/v1/incoming", request_body = Offer,
    responses((status = 200, body = Prepared), (status = "default", body = Problem)))]
async fn prepare(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<Offer>) -> Answer<Prepared> {
    // In a task of its own: a source that goes away meanwhile must not leave a half-started QEMU.
    let prepared = tokio::spawn(async move { destination::prepare(&agent.incoming, offer, caller).await });
    Ok(Json(prepared.await.expect("preparing does not panic")?))
}

/// How an incoming migration stands.
#[utoipa::path(get, path = "/v1/incoming/{id}", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn state(State(agent): Shared, Began { id, .. }: Began) -> Answer<IncomingState> {
    Ok(Json(destination::state(&agent.incoming, id).await?))
}

/// The source is still there.
#[utoipa::path(post, path = "/v1/incoming/{id}/keep", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn keep(State(agent): Shared, Began { id, .. }: Began) -> Answer<IncomingState> {
    Ok(Json(destination::keep(&agent.incoming, id).await?))
}

/// This host becomes the owner of the guest and sets it running. What it decides is final and may be asked for again.
#[utoipa::path(post, path = "/v1/incoming/{id}/commit", params(("id" = Uuid, Path)), request_body = Commit,
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn commit(
    State(agent): Shared,
    Began { id, caller }: Began,
    Json(commit): Json<Commit>,
) -> Answer<IncomingState> {
    let committed = async move { destination::commit(&agent.incoming, id, commit, &caller).await };
    let committed = tokio::spawn(committed);
    Ok(Json(committed.await.expect("committing does not panic")?))
}

/// This host forgets what it prepared, unless it was committed. The answer is final.
#[utoipa::path(delete, path = "/v1/incoming/{id}", params(("id" = Uuid, Path), Abandon),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn abandon(
    State(agent): Shared,
    Began { id, caller }: Began,
    Query(asked): Query<Abandon>,
) -> Answer<IncomingState> {
    let abandoned = tokio::spawn(async move { destination::abandon(&agent.incoming, id, asked, &caller).await });
    Ok(Json(abandoned.await.expect("abandoning does not panic")?))
}

/// The guest goes on at its source, by its user's word: whatever this host has of it ends.
#[utoipa::path(post, path = "/v1/incoming/{id}/fence", params(("id" = Uuid, Path)), request_body = Fence,
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn fence(State(agent): Shared, Began { id, caller }: Began, Json(fence): Json<Fence>) -> Answer<IncomingState> {
    let fenced = async move { destination::fence(&agent.incoming, id, &fence.vm, &caller).await };
    Ok(Json(tokio::spawn(fenced).await.expect("fencing does not panic")?))
}

/// Nothing is left of the guest at its source, which has nothing more to say of it.
#[utoipa::path(post, path = "/v1/incoming/{id}/settled", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn settled(State(agent): Shared, Began { id, .. }: Began) -> Answer<IncomingState> {
    Ok(Json(destination::settled(&agent.incoming, id).await?))
}

/// How a migration from this host to the one that asks stands here.
#[utoipa::path(get, path = "/v1/outgoing/{id}", params(("id" = Uuid, Path)),
    responses((status = 200, body = OutgoingState), (status = "default", body = Problem)))]
async fn outgoing(State(agent): Shared, Paired(caller): Paired, Path(id): Path<Uuid>) -> Answer<OutgoingState> {
    Ok(Json(OutgoingState { step: agent.host.journal.word_of_out(id, caller.key).await? }))
}

/// Post-copy lost its connection: listens again.
#[utoipa::path(post, path = "/v1/incoming/{id}/recover", params(("id" = Uuid, Path)),
    responses((status = 200, body = IncomingState), (status = "default", body = Problem)))]
async fn recover(State(agent): Shared, Began { id, caller }: Began) -> Answer<IncomingState> {
    let recovered = tokio::spawn(async move { destination::recover(&agent.incoming, id, &caller).await });
    Ok(Json(recovered.await.expect("recovering does not panic")?))
}

/// One of the connections of the two QEMUs: upgraded to its bytes, both ways.
#[utoipa::path(post, path = "/v1/incoming/{id}/relay", params(("id" = Uuid, Path)),
    responses((status = 101, description = "upgraded to vmferry-relay"), (status = "default", body = Problem)))]
async fn relay(State(agent): Shared, Began { id, .. }: Began, request: Request) -> Result<Response, ApiError> {
    let vm = destination::relayed_vm(&agent.incoming, id).await?;
    upgraded(request, RELAY_PROTOCOL, move |connection| async move {
        relay::receive(&vm, connection).await;
    })
}

/// What is heard of the migration's guest, if it is a measuring one: upgraded to lines of JSON both ways. The guest ends
/// with this.
#[utoipa::path(post, path = "/v1/incoming/{id}/witness", params(("id" = Uuid, Path)),
    responses((status = 101, description = "upgraded to vmferry-witness"), (status = "default", body = Problem)))]
async fn witness(State(agent): Shared, Began { id, .. }: Began, request: Request) -> Result<Response, ApiError> {
    let vm = destination::measuring_vm(&agent.incoming, id)?;
    upgraded(request, vmferry_api::witness::PROTOCOL, move |connection| {
        witness::serve(Arc::clone(&agent.host), vm, connection)
    })
}

/// Whether this host has a file for a measuring guest to boot from.
#[utoipa::path(get, path = "/v1/boot-files/{digest}", params(("digest" = String, Path)),
    responses((status = 200, body = BootFile), (status = "default", body = Problem)))]
async fn has_boot_file(State(agent): Shared, _peer: Paired, Path(digest): Path<String>) -> Answer<BootFile> {
    Ok(Json(boot_files::look(&agent.host, &digest)?))
}

/// A file for a measuring guest to boot from, under its fingerprint: its SHA-256 in base 32.
#[utoipa::path(put, path = "/v1/boot-files/{digest}", params(("digest" = String, Path)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = BootFile), (status = "default", body = Problem)))]
async fn put_boot_file(
    State(agent): Shared,
    _peer: Paired,
    Path(digest): Path<String>,
    content: Bytes,
) -> Answer<BootFile> {
    Ok(Json(boot_files::put(&agent.host, &digest, content).await?))
}

/// Waits for the streams of a trial of the link, and takes what comes over them.
#[utoipa::path(post, path = "/v1/link-trials", request_body = TrialOffer,
    responses((status = 200, body = TrialAccepted), (status = "default", body = Problem)))]
async fn try_streams(
    State(agent): Shared,
    Paired(caller): Paired,
    Json(offer): Json<TrialOffer>,
) -> Answer<TrialAccepted> {
    Ok(Json(link_trial::accept(&agent.host, offer, &caller)?))
}

/// Waits for the streams of a copy of an image, and writes what comes over them.
#[utoipa::path(post, path = "/v1/incoming-copies", request_body = CopyOffer,
    responses((status = 200, body = CopyAccepted), (status = "default", body = Problem)))]
async fn take_copy(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<CopyOffer>) -> Answer<CopyAccepted> {
    Ok(Json(copying::accept(&agent.copies, offer, caller).await?))
}

/// Whether this host could take a VM that does not run; touches nothing.
#[utoipa::path(post, path = "/v1/incoming-vms/check", request_body = MoveOffer,
    responses((status = 200, body = MoveReply), (status = "default", body = Problem)))]
async fn check_vm(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<MoveOffer>) -> Answer<MoveReply> {
    Ok(Json(vm_moves::check_arrival(&agent.host, &offer, &caller).await?))
}

/// Waits for the disks of a VM that does not run, and tells what is there of them. It cannot be started here yet.
#[utoipa::path(post, path = "/v1/incoming-vms", request_body = MoveOffer,
    responses((status = 200, body = MoveReply), (status = "default", body = Problem)))]
async fn begin_vm(State(agent): Shared, Paired(caller): Paired, Json(offer): Json<MoveOffer>) -> Answer<MoveReply> {
    let begun = tokio::spawn(async move { vm_moves::begin_arrival(&agent.host, offer, &caller).await });
    Ok(Json(begun.await.expect("beginning does not panic")?))
}

/// The VM was given to this host, which can start it from now on, if all of it is here. The answer is final, and may be
/// asked for again.
#[utoipa::path(post, path = "/v1/incoming-vms/{id}/take", params(("id" = Uuid, Path)),
    responses((status = 200, body = Taken), (status = "default", body = Problem)))]
async fn take_vm(
    State(agent): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(id): Path<Uuid>,
) -> Answer<Taken> {
    // Also of one that was unpaired meanwhile, which is told what is its own.
    let taken = tokio::spawn(async move { vm_moves::take(&agent.host, id, caller.key).await });
    Ok(Json(taken.await.expect("taking does not panic")?))
}
