//! What was under way when an agent ended: the same machine goes on from what the journal holds.

use std::sync::Arc;

use vmferry_custody::source::Phase;

use super::custody::{Custody, Hands};
use super::outgoing::Outgoing;
use super::teller::Log;
use crate::journal::OutRecord;
use crate::peers::trust::pinned;

/// Takes up what the journal holds; what is due is done from now on.
pub(crate) fn take_up(outgoing: &Arc<Outgoing>, record: OutRecord) {
    tracing::warn!(vm = record.vm, migration = %record.id, step = ?record.step, "was under way when the agent ended");
    let peer = pinned(&outgoing.host, &record.address, record.peer_key);
    let custody = Custody::found(&outgoing.host, record, peer);
    outgoing.is_open(&custody);
    tokio::spawn(settle(Arc::clone(outgoing), custody));
}

async fn settle(outgoing: Arc<Outgoing>, custody: Arc<Custody>) {
    let log = Log(custody.record.vm.clone());
    let mut hands = Hands { engine: None, serving: None, audience: &log };
    custody.look().await;
    custody.drive(&mut hands).await;
    if let Phase::Stranded { .. } = custody.phase() {
        custody.drive(&mut hands).await;
    }
    tracing::warn!(
        vm = custody.record.vm,
        migration = %custody.record.id,
        "{}",
        match custody.phase() {
            Phase::Owned => format!("{}; undone: the guest runs on here", custody.why()),
            _ => "was handed over; what was left here is gone".into(),
        }
    );
    outgoing.is_over(&custody).await;
}
