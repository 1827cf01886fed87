//! A guest by its name, whoever it belongs to: what is asked of the migration of one of the agent's own, or of a domain of
//! libvirt's, before it is under way.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use vmferry_api::{MigrateRequest, PlanView};

use super::checked::Checked;
use super::migration::Seat;
use super::outgoing::Outgoing;
use super::{begin, carry};
use crate::error::AgentError;
use crate::host::Host;
use crate::journal::Instance;

/// What it is called, whatever VMs come and go: a domain may be named in two ways.
pub(crate) fn called(host: &Host, name: &str) -> String {
    host.domain(name).map_or_else(|| name.to_owned(), |domain| domain.full_name())
}

/// Its QEMU. One that the agent, or its libvirt, has only just begun to look for is waited for; `known` is what it was.
pub(crate) async fn instance(host: &Host, name: &str, known: Option<&Instance>) -> Result<Instance, AgentError> {
    if let Some(domain) = host.domain(name) {
        return Ok(domain.instance());
    }
    match host.found(name).await {
        Ok(vm) => Ok(vm.instance()),
        // Its QEMU is there, and nobody has told yet whose it is.
        Err(AgentError::UnknownVm { .. }) if known.is_some_and(Instance::is_alive) => {
            Err(AgentError::Busy { what: format!("the QEMU of {name}, which was not found yet") })
        }
        Err(error) => Err(error),
    }
}

/// How fast it writes, in bytes a second, by QEMU's own sampling of some pages for a second, which costs the guest next to
/// nothing and is good enough to tell a quiet one from a loud one; none where that cannot be told.
pub(crate) async fn dirty_rate(host: &Host, name: &str) -> Option<u64> {
    match host.domain(name) {
        Some(domain) => carry::dirty_rate(host, &domain).await,
        None => begin::dirty_rate(&host.vm(name).ok()?.qmp).await,
    }
}

/// Plans a migration, and lets go of what that took.
pub(crate) async fn check(
    outgoing: &Arc<Outgoing>,
    name: &str,
    request: &MigrateRequest,
) -> Result<Checked, AgentError> {
    match outgoing.host.domain(name) {
        Some(domain) => carry::check(outgoing, &domain, request).await,
        None => begin::check(outgoing, name, request).await,
    }
}

/// Plans a migration that does not begin, and says what is to be expected of it. Ends when it becomes `unwanted` meanwhile.
pub(crate) async fn dry_run(
    outgoing: &Outgoing,
    name: &str,
    request: &MigrateRequest,
    unwanted: &CancellationToken,
) -> Result<PlanView, AgentError> {
    match outgoing.host.domain(name) {
        Some(domain) => carry::dry_run(outgoing, &domain, request, unwanted).await,
        None => begin::dry_run(outgoing, name, request, unwanted).await,
    }
}

/// Plans the migration and starts it. When that fails the seat can be taken again.
pub(crate) async fn begin(
    outgoing: &Arc<Outgoing>,
    seat: &mut Seat,
    request: MigrateRequest,
) -> Result<PlanView, AgentError> {
    match outgoing.host.domain(&seat.migration.vm) {
        Some(domain) => carry::begin(outgoing, seat, domain, request).await,
        None => begin::begin(outgoing, seat, request).await,
    }
}
