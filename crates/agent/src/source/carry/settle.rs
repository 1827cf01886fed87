//! What came of migrations whose end nobody has heard: both libvirts are asked until it is known, and it is written down.

use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;

use super::outcome::{Whereabouts, look};
use crate::error::AgentError;
use crate::journal::{CarryEnd, CarryRecord};
use crate::peers::trust::pinned;
use crate::source::outgoing::Outgoing;

/// Between two times of asking.
const AGAIN: Duration = Duration::from_secs(3);
/// A domain that is nowhere is asked for so many times more.
const NOWHERE: u32 = 10;

/// Takes up what the last agent has left. Its end has ended the connections, so that libvirt ends the migrations.
pub(crate) async fn take_up(outgoing: &Arc<Outgoing>) -> Result<(), AgentError> {
    for record in outgoing.host.journal.open_carries().await? {
        tracing::warn!(vm = record.vm, migration = %record.id, "libvirt was migrating it when the agent ended");
        tokio::spawn(settle(Arc::clone(outgoing), record));
    }
    Ok(())
}

/// Until it is known what came of it, or its domain is migrated anew.
pub(super) async fn settle(outgoing: Arc<Outgoing>, record: CarryRecord) {
    let host = &outgoing.host;
    let peer = pinned(host, &record.address, record.peer_key);
    let mut nowhere = 0;
    let (end, outcome) = loop {
        if outgoing.carries.of(record.uuid).is_some_and(|it| it.migration.id != record.id) {
            break (CarryEnd::Abandoned, "not finished; it was begun anew");
        }
        match look(&host.domains, &peer, record.uuid).await {
            Whereabouts::Here { runs: true } => break (CarryEnd::Abandoned, "did not complete; it runs here"),
            Whereabouts::Here { runs: false } => break (CarryEnd::Abandoned, "did not complete; it stands here"),
            Whereabouts::There => break (CarryEnd::Done, "it is there, by libvirt's word"),
            Whereabouts::Nowhere if nowhere == NOWHERE => {
                break (CarryEnd::Abandoned, "neither libvirt has it running (any more)");
            }
            Whereabouts::Nowhere => nowhere += 1,
            // A resumed post-copy ends it.
            Whereabouts::Broken | Whereabouts::Unknown(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    };
    tracing::info!(vm = record.vm, migration = %record.id, outcome, "what came of libvirt's migration");
    if let Err(error) = host.journal.end_carry(record.id, end, outcome).await {
        tracing::error!(vm = record.vm, %error, "cannot note what came of its migration");
    }
    // The agent that announced it may have ended before it could.
    if let Err(error) = peer.withdraw_domain(record.id).await {
        tracing::debug!(migration = %record.id, error = in_one_line(&error), "the destination does not hear that it is over");
    }
}
