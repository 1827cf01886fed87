//! The routes for the host's own users.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;
use vmferry_api::client::CONSOLE_PROTOCOL;
use vmferry_api::trial::TrialResult;
use vmferry_api::{
    AdoptRequest, Autostart, Begun, EngineName, Hello, ManyBegun, MigrateManyRequest, MigrateRequest, MigrationEvent,
    MigrationView, PairRequest, PeerView, PeersView, Problem, Resolve, RunRequest, StartRequest, Started, StopRequest,
    TokenRequest, TokenView, TrialRequest, VmView, in_one_line,
};

use super::{Answer, ApiError, upgraded};
use crate::agent::Agent;
use crate::engine::movable::movable;
use crate::error::AgentError;
use crate::host::{self, Console, GLANCE, IdleVm, SeenDomain, Viewer};
use crate::measuring::witness;
use crate::peers::{link_trial, trust};
use crate::recovery::came_whole;
use crate::source::carry::Carry;
use crate::source::{self, Migration};
use crate::vm_moves;

/// How many ended migrations are listed.
const LISTED: u32 = 50;

type Shared = State<Arc<Agent>>;

pub(crate) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(host))
        .routes(routes!(list, run))
        .routes(routes!(adopt))
        .routes(routes!(show))
        .routes(routes!(stop))
        .routes(routes!(console))
        .routes(routes!(start))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(autostart))
        .routes(routes!(migrate, cancel))
        .routes(routes!(resolve))
        .routes(routes!(post_copy))
        .routes(routes!(migrations, migrate_many))
        .routes(routes!(events))
        .routes(routes!(witness))
        .routes(routes!(witness_there))
        .routes(routes!(make_token))
        .routes(routes!(peers, pair))
        .routes(routes!(unpair))
        .routes(routes!(try_link))
}

/// Who this agent is.
#[utoipa::path(get, path = "/v1/host", responses((status = 200, body = Hello)))]
async fn host(State(agent): Shared) -> Json<Hello> {
    Json(super::peers::introduce(&agent))
}

/// The VMs of this host.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<VmView>)))]
async fn list(State(agent): Shared) -> Json<Vec<VmView>> {
    let vms = agent.host.vms();
    let mut views = futures_util::future::join_all(vms.iter().map(|vm| vm.view(agent.host.config.engine))).await;
    views.extend(agent.host.idle_vms().iter().map(IdleVm::view));
    views.extend(agent.host.domains.all().iter().map(|domain| domain_view(&agent, domain)));
    views.sort_by(|a, b| a.name.cmp(&b.name));
    Json(views)
}

/// A domain of libvirt's, as others see it.
fn domain_view(agent: &Agent, domain: &SeenDomain) -> VmView {
    let carry = agent.outgoing.carries.of(domain.domain.uuid);
    domain.view(agent.host.name_of(domain), carry.map(|it| it.migration.id))
}

/// Starts a VM.
#[utoipa::path(post, path = "/v1/vms", request_body = RunRequest,
    responses((status = 200, body = Started), (status = "default", body = Problem)))]
async fn run(State(agent): Shared, Json(request): Json<RunRequest>) -> Answer<Started> {
    // In a task of its own: a user who goes away meanwhile must not leave a QEMU that nobody knows.
    let started = tokio::spawn(async move { host::run(&agent.host, request).await });
    Ok(Json(started.await.expect("starting does not panic")?))
}

/// Takes over a QEMU that somebody else started.
#[utoipa::path(post, path = "/v1/adopt", request_body = AdoptRequest,
    responses((status = 200, body = Started), (status = "default", body = Problem)))]
async fn adopt(State(agent): Shared, Json(request): Json<AdoptRequest>) -> Answer<Started> {
    Ok(Json(host::adopt(&agent.host, request).await?))
}

/// One VM.
#[utoipa::path(get, path = "/v1/vms/{name}", params(("name" = String, Path)),
    responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn show(State(agent): Shared, Path(name): Path<String>) -> Answer<VmView> {
    let vm = match agent.host.found(&name).await {
        Ok(vm) => vm,
        Err(error) => {
            let idle = agent.host.idle(&name).map(|idle| idle.view());
            let domain = || agent.host.domain(&name).map(|domain| domain_view(&agent, &domain));
            return idle.or_else(domain).map(Json).ok_or_else(|| error.into());
        }
    };
    let mut view = vm.view(agent.host.config.engine).await;
    if view.migration.is_none() && vm.is_alive() {
        // A QEMU that does not answer keeps nobody from being shown. It is asked a dozen things; one that did not answer
        // the first is asked no more.
        let told = match view.state.as_str() {
            "unknown" => None,
            _ => tokio::time::timeout(GLANCE, movable(&agent.host, &vm)).await.ok(),
        };
        let told = told.map(|told| told.unwrap_or_else(|error| Err(in_one_line(&error))));
        view.external_obstacle = told.unwrap_or_else(|| Err("its QEMU does not answer".into())).err();
        if view.external_obstacle.is_some() {
            view.engine = EngineName::Qemu.to_string();
        }
        if view.state != "unknown"
            && let Ok(Ok(now)) = tokio::time::timeout(GLANCE, vm.inventory()).await
        {
            // What was seen last; of what was changed just now the description tells.
            view.changes = match vm.drift() {
                Some(drift) => drift.sentences().map(str::to_owned).collect(),
                None => vm.changes(&now),
            };
        }
    }
    Ok(Json(view))
}

/// Stops a VM.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", params(("name" = String, Path)), request_body = StopRequest,
    responses((status = 204), (status = "default", body = Problem)))]
async fn stop(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<StopRequest>,
) -> Result<StatusCode, ApiError> {
    // What is left of a guest that is stranded has nothing to shut down.
    let stopping = tokio::spawn(async move {
        let is_gone = vm_moves::give_up(&agent.host, &name).await?
            || request.force && source::discard(&agent.outgoing, &name).await;
        match is_gone {
            true => Ok(()),
            false => host::stop(&agent.host, &name, &request).await,
        }
    });
    stopping.await.expect("stopping does not panic")?;
    Ok(StatusCode::NO_CONTENT)
}

/// The serial console: the connection is upgraded to raw bytes both ways, the last output first.
#[utoipa::path(get, path = "/v1/vms/{name}/console", params(("name" = String, Path)),
    responses((status = 101, description = "upgraded to vmferry-console"), (status = "default", body = Problem)))]
async fn console(State(agent): Shared, Path(name): Path<String>, request: Request) -> Result<Response, ApiError> {
    let vm = agent.host.vm(&name)?;
    let viewer = vm.console().map(Console::view).ok_or_else(|| AgentError::Conflict {
        message: format!("{name} has no serial console that the agent could show"),
        hint: Some("start it with -serial stdio, or without -serial and -nodefaults".into()),
    })?;
    upgraded(request, CONSOLE_PROTOCOL, move |connection| show_console(connection, viewer))
}

async fn show_console(mut connection: TokioIo<hyper::upgrade::Upgraded>, mut viewer: Viewer) {
    if connection.write_all(&viewer.past).await.is_err() {
        return;
    }
    let mut typed = [0; 1024];
    loop {
        tokio::select! {
            output = viewer.output.recv() => match output {
                Ok(printed) => if connection.write_all(&printed.bytes).await.is_err() { return },
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => break,
            },
            read = connection.read(&mut typed) => match read {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    // The console is gone: its output says so.
                    let _ = viewer.input.send(axum::body::Bytes::copy_from_slice(&typed[..count])).await;
                }
            },
        }
    }
    // The viewer sees the end of the stream either way.
    let _ = connection.shutdown().await;
}

/// What is heard of a measuring guest: upgraded to lines of JSON both ways. The guest ends with this.
#[utoipa::path(get, path = "/v1/vms/{name}/witness", params(("name" = String, Path)),
    responses((status = 101, description = "upgraded to vmferry-witness"), (status = "default", body = Problem)))]
async fn witness(State(agent): Shared, Path(name): Path<String>, request: Request) -> Result<Response, ApiError> {
    let vm = witness::only_measuring(agent.host.vm(&name)?)?;
    upgraded(request, vmferry_api::witness::PROTOCOL, move |connection| {
        witness::serve(Arc::clone(&agent.host), vm, connection)
    })
}

/// The same at the destination of a migration, once something waits for the guest there.
#[utoipa::path(get, path = "/v1/migrations/{id}/witness", params(("id" = Uuid, Path)),
    responses((status = 101, description = "upgraded to vmferry-witness"), (status = "default", body = Problem)))]
async fn witness_there(State(agent): Shared, Path(id): Path<Uuid>, request: Request) -> Result<Response, ApiError> {
    let migration = agent.outgoing.migration(id).ok_or_else(|| not_followed(id))?;
    let peer = migration.peer().ok_or_else(|| not_followed(id))?;
    let mut there = peer.witness(id).await?;
    upgraded(request, vmferry_api::witness::PROTOCOL, |mut here| async move {
        // Whoever closes it, or breaks, ends it.
        let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
    })
}

/// Plans a migration and, unless it is a dry run, has it begin: at once, or when the link is free for it.
#[utoipa::path(post, path = "/v1/vms/{name}/migration", params(("name" = String, Path)), request_body = MigrateRequest,
    responses((status = 200, body = Begun), (status = "default", body = Problem)))]
async fn migrate(State(agent): Shared, Path(name): Path<String>, Json(request): Json<MigrateRequest>) -> Answer<Begun> {
    // In a task of its own: a user who goes away meanwhile must not leave a migration that nobody drives. A dry run ends
    // when nobody waits for it any more.
    let unwanted = CancellationToken::new();
    let _waits = unwanted.clone().drop_guard();
    let begun = tokio::spawn(async move { agent.queue.ask(&name, request, &unwanted).await });
    Ok(Json(begun.await.expect("beginning does not panic")?))
}

/// Plans the migrations of several VMs and, unless it is a dry run, has those that can go begin, each when the link is free
/// for it: quiet guests first.
#[utoipa::path(post, path = "/v1/migrations", request_body = MigrateManyRequest,
    responses((status = 200, body = ManyBegun), (status = "default", body = Problem)))]
async fn migrate_many(State(agent): Shared, Json(wanted): Json<MigrateManyRequest>) -> Answer<ManyBegun> {
    let unwanted = CancellationToken::new();
    let _waits = unwanted.clone().drop_guard();
    let begun = tokio::spawn(async move { agent.queue.ask_for_many(wanted, &unwanted).await });
    Ok(Json(begun.await.expect("beginning does not panic")?))
}

/// Cancels the migration or the move of a VM; the events of a migration tell how it ends.
#[utoipa::path(delete, path = "/v1/vms/{name}/migration", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn cancel(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    let name = source::guest::called(&agent.host, &name);
    if agent.vm_moves.cancel(&name)? || agent.queue.cancel(&name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    if let Some(domain) = agent.host.domain(&name) {
        carry_of(&agent, &name, &domain)?.cancel()?;
        return Ok(StatusCode::NO_CONTENT);
    }
    agent.host.found(&name).await?;
    agent.outgoing.cancel(&name)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Decides about a guest of which the agents do not know where it is.
#[utoipa::path(post, path = "/v1/vms/{name}/resolve", params(("name" = String, Path)), request_body = Resolve,
    responses((status = 204), (status = "default", body = Problem)))]
async fn resolve(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(how): Json<Resolve>,
) -> Result<StatusCode, ApiError> {
    if !agent.vm_moves.resolve(&name, how).await? {
        source::resolve(&agent.outgoing, &name, how).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Starts a VM again whose QEMU has ended, or whose host was restarted.
#[utoipa::path(post, path = "/v1/vms/{name}/start", params(("name" = String, Path)), request_body = StartRequest,
    responses((status = 200, body = Started), (status = "default", body = Problem)))]
async fn start(State(agent): Shared, Path(name): Path<String>, Json(request): Json<StartRequest>) -> Answer<Started> {
    let started = async move {
        if let Some(idle) = agent.host.idle(&name)
            && !request.undisputed
            && !came_whole(&agent, &idle.record).await?
        {
            agent.host.forget_idle(&idle).await?;
            return Err(AgentError::UnknownVm { name });
        }
        host::start(&agent.host, &name).await
    };
    Ok(Json(tokio::spawn(started).await.expect("starting does not panic")?))
}

/// Pauses a guest. One that is being migrated arrives paused.
#[utoipa::path(post, path = "/v1/vms/{name}/pause", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn pause(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    agent.host.found(&name).await?;
    host::pause(&agent.host, &name).await?;
    if let Some(custody) = agent.outgoing.custody_of(&name) {
        custody.wants(false).await;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Has a paused guest go on.
#[utoipa::path(post, path = "/v1/vms/{name}/resume", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn resume(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    agent.host.found(&name).await?;
    // Before it runs, or a migration that is being undone at this moment may leave it paused.
    if let Some(custody) = agent.outgoing.custody_of(&name) {
        custody.wants(true).await;
    }
    host::resume(&agent.host, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has a VM started whenever its host is, or not any more.
#[utoipa::path(put, path = "/v1/vms/{name}/autostart", params(("name" = String, Path)), request_body = Autostart,
    responses((status = 204), (status = "default", body = Problem)))]
async fn autostart(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(autostart): Json<Autostart>,
) -> Result<StatusCode, ApiError> {
    host::set_autostart(&agent.host, &name, autostart.on).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has the destination run the guest at once; its memory follows.
#[utoipa::path(post, path = "/v1/vms/{name}/migration/post-copy", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn post_copy(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    if migration_of(&agent, &name)?.post_copy() {
        return Ok(StatusCode::NO_CONTENT);
    }
    let message = format!("post-copy was forbidden when the migration of {name} began");
    Err(AgentError::Conflict { message, hint: Some("cancel it, and begin again without --no-post-copy".into()) }.into())
}

/// It does not only wait for its turn.
fn under_way(migration: &Migration) -> Result<(), AgentError> {
    match migration.peer() {
        Some(_) => Ok(()),
        None => Err(AgentError::Conflict {
            message: format!("the migration of {} waits for its turn, and has not begun", migration.vm),
            hint: Some(format!(
                "`vmferry cancel {}` takes it out of the queue, to be asked for otherwise",
                migration.vm
            )),
        }),
    }
}

/// The migration of a domain of libvirt's.
fn carry_of(agent: &Agent, name: &str, domain: &SeenDomain) -> Result<Arc<Carry>, AgentError> {
    let none = || AgentError::Conflict { message: format!("vmferry does not migrate {name} just now"), hint: None };
    agent.outgoing.carries.of(domain.domain.uuid).ok_or_else(none)
}

pub(super) fn migration_of(agent: &Agent, name: &str) -> Result<Arc<Migration>, AgentError> {
    let name = &source::guest::called(&agent.host, name);
    if agent.host.domain(name).is_none() {
        agent.host.vm(name)?;
    }
    let none = || AgentError::Conflict { message: format!("{name} is not being migrated"), hint: None };
    let migration = agent.outgoing.migration_of(name).ok_or_else(none)?;
    under_way(&migration)?;
    Ok(migration)
}

/// The migrations away from this host: those that wait for their turn, in their order, and the last that have begun, newest
/// first.
#[utoipa::path(get, path = "/v1/migrations", responses((status = 200, body = Vec<MigrationView>)))]
async fn migrations(State(agent): Shared) -> Answer<Vec<MigrationView>> {
    let mut all = agent.queue.views();
    all.extend(agent.host.journal.last_out(LISTED).await?);
    Ok(Json(all))
}

/// What a migration tells: server-sent events, each a `MigrationEvent`; the stream ends with the migration.
#[utoipa::path(get, path = "/v1/migrations/{id}/events", params(("id" = Uuid, Path)),
    responses((status = 200, body = MigrationEvent, content_type = "text/event-stream"), (status = "default", body = Problem)))]
async fn events(
    State(agent): Shared,
    Path(id): Path<Uuid>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let migration = agent.outgoing.migration(id).ok_or_else(|| not_followed(id))?;
    let (past, live) = migration.told.watch();
    let live = tokio_stream::wrappers::BroadcastStream::new(live).filter_map(|event| std::future::ready(event.ok()));
    let events = until_the_last(futures_util::stream::iter(past).chain(live))
        .map(|event| Ok(Event::default().json_data(&event).expect("an event is plain data")));
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

fn not_followed(id: Uuid) -> AgentError {
    AgentError::Conflict {
        message: format!("this agent follows no migration {id}"),
        hint: Some("`vmferry migrations` tells how earlier ones ended".into()),
    }
}

/// Ends the stream with the migration's last event.
fn until_the_last(events: impl Stream<Item = MigrationEvent>) -> impl Stream<Item = MigrationEvent> {
    futures_util::stream::unfold(Some(Box::pin(events)), |events| async {
        let mut events = events?;
        let event = events.next().await?;
        let rest = (!event.is_last()).then_some(events);
        Some((event, rest))
    })
}

/// Makes a join token.
#[utoipa::path(post, path = "/v1/tokens", request_body = TokenRequest,
    responses((status = 200, body = TokenView), (status = "default", body = Problem)))]
async fn make_token(State(agent): Shared, Json(request): Json<TokenRequest>) -> Answer<TokenView> {
    Ok(Json(trust::make_token(&agent.host, request.seconds).await?))
}

/// This host and its peers.
#[utoipa::path(get, path = "/v1/peers",
    responses((status = 200, body = PeersView), (status = "default", body = Problem)))]
async fn peers(State(agent): Shared) -> Answer<PeersView> {
    Ok(Json(trust::peers(&agent.host).await?))
}

/// Pairs with the agent that made a token.
#[utoipa::path(post, path = "/v1/peers", request_body = PairRequest,
    responses((status = 200, body = PeerView), (status = "default", body = Problem)))]
async fn pair(State(agent): Shared, Json(request): Json<PairRequest>) -> Answer<PeerView> {
    Ok(Json(trust::pair(&agent.host, &request.token, request.host.as_deref()).await?))
}

/// Trusts a peer, by its name or fingerprint, no more.
#[utoipa::path(delete, path = "/v1/peers/{peer}", params(("peer" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn unpair(State(agent): Shared, Path(peer): Path<String>) -> Result<StatusCode, ApiError> {
    trust::unpair(&agent.host, &peer).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tries the link to another agent, and tells what it carried and cost.
#[utoipa::path(post, path = "/v1/link-benchmark", request_body = TrialRequest,
    responses((status = 200, body = TrialResult), (status = "default", body = Problem)))]
async fn try_link(State(agent): Shared, Json(request): Json<TrialRequest>) -> Answer<TrialResult> {
    Ok(Json(link_trial::run(&agent.host, &request.to, request.trial).await?))
}
