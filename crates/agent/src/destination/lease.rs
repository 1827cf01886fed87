//! A source that falls silent loses its claim.

use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;
use vmferry_qemu::QmpError;
use vmferry_qemu::qmp::commands;

use super::abandon::give_up;
use super::arrival;
use super::incoming::{Awaited, Incoming, STATUS_TIMEOUT};
use crate::host::Vm;
use crate::journal::InStep;

/// A source that is not heard of for this long has lost its claim: what was prepared for it goes.
const LEASE: Duration = Duration::from_secs(15);
/// How often it is looked whether the lease has run out.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Abandons what was prepared when its source falls silent, or its QEMU ends.
///
/// Not in post-copy: there the source's QEMU has let go of the guest and could not take it back, so only the source
/// may say that it is over.
pub(crate) async fn watch_lease(here: Arc<Incoming>, incoming: Arc<Awaited>) {
    loop {
        let why = tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {
                format!("the source's agent ({}) was not heard of for {} s", incoming.from, LEASE.as_secs())
            }
            () = incoming.vm.qmp.closed() => "its QEMU ended".into(),
        };
        if !matches!(here.host.store.step_in(incoming.id), Ok(Some((InStep::Prepared, _)))) {
            return;
        }
        let is_closed = incoming.vm.qmp.is_closed();
        // Agents that move the RAM have the guest at the source until the commit.
        let may_be_left = !arrival::is_expected(&incoming.vm.dir);
        let silent = incoming.silent_for() >= LEASE;
        if !is_closed && (!silent || may_be_left && in_post_copy(&incoming.vm).await) {
            continue;
        }
        tracing::warn!(vm = incoming.vm.name(), migration = %incoming.id, why, "abandons an incoming migration");
        match give_up(&here, incoming.id, &why).await {
            Ok(()) => return,
            Err(error) => tracing::error!(error = in_one_line(&error), "cannot abandon it"),
        }
    }
}

async fn in_post_copy(vm: &Vm) -> bool {
    match vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await {
        Ok(info) => info.status.is_some_and(|status| status.is_post_copy()),
        // It may wait for a page.
        Err(error) => matches!(error, QmpError::Timeout { .. }),
    }
}
