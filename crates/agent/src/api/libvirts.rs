//! What is libvirt's to do with its domains is refused, by the name of the command that does it.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::ApiError;
use crate::agent::Agent;
use crate::error::AgentError;

/// What `virsh` calls what a route does; none of those that work for libvirt's domains, too.
fn in_virsh(method: &Method, route: &str) -> Option<&'static str> {
    let end = route.strip_prefix("/v1/vms/{name}")?;
    Some(match end {
        "" | "/migration" | "/migration/limits" | "/migration/post-copy" => return None,
        "/stop" => "shutdown",
        "/start" => "start",
        "/pause" => "suspend",
        "/resume" => "resume",
        "/autostart" => "autostart",
        "/console" => "console",
        "/move" if *method == Method::POST => "migrate --offline --persistent",
        "/move" => "dominfo",
        "/disks" => "domblklist",
        disks if disks.starts_with("/disks/") => "blockcopy",
        "/resolve" => "domstate --reason",
        _ => "dominfo",
    })
}

/// Refuses it.
pub(super) async fn refuse(
    State(agent): State<Arc<Agent>>,
    route: Option<MatchedPath>,
    names: Option<Path<HashMap<String, String>>>,
    request: Request,
    next: Next,
) -> Response {
    let command = route.and_then(|route| in_virsh(request.method(), route.as_str()));
    let domain = names.as_ref().and_then(|names| names.get("name")).and_then(|name| agent.host.domain(name));
    let Some((command, domain)) = command.zip(domain) else { return next.run(request).await };
    let (name, virsh) = (agent.host.name_of(&domain), &domain.domain.name);
    let (first, rest) = command.split_once(' ').unwrap_or((command, ""));
    let command = format!("virsh {first} {virsh} {rest}");
    let error = AgentError::Conflict {
        message: format!("{name} is libvirt's: vmferry shows and migrates it, and leaves the rest to libvirt"),
        hint: Some(format!("`{}`", command.trim_end())),
    };
    ApiError::from(error).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_shown_or_migrated_is_virshs() {
        let of = |route: &str| in_virsh(&Method::POST, route);
        assert_eq!(of("/v1/vms/{name}/stop"), Some("shutdown"));
        assert_eq!(of("/v1/vms/{name}/something-new"), Some("dominfo"));
        for ours in ["/v1/vms", "/v1/vms/{name}", "/v1/vms/{name}/migration", "/v1/peers/{peer}"] {
            assert_eq!(of(ours), None, "{ours}");
        }
    }
}
