//! Guests that were kept here by their user's word: their destinations are asked to let go until they have, also when
//! they come back later, at another address, or set up anew.

use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;

use crate::host::Host;
use crate::journal::Fence;
use crate::peers::trust::pinned;
use crate::peers::{InWord, Peer};

/// How often they are asked.
const AGAIN: Duration = Duration::from_secs(5);

/// Asks for as long as the agent lives.
pub(crate) async fn keep(host: Arc<Host>) {
    loop {
        match host.journal.fences().await {
            Ok(fences) => {
                for fence in fences {
                    if let Err(error) = ask(&host, &fence).await {
                        tracing::debug!(vm = fence.vm, migration = %fence.id, error, "has not let go yet");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "cannot tell which guests were kept here"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn ask(host: &Host, fence: &Fence) -> Result<(), String> {
    let mut last = "nobody answers".to_owned();
    for peer in candidates(host, fence).await? {
        match peer.fence(fence.id, &fence.vm).await {
            Ok(state) if state.step == InWord::Abandoned => {
                tracing::info!(vm = fence.vm, migration = %fence.id, peer = fence.peer, "has let go of the guest that was kept here");
                return host.journal.drop_fence(fence.id).await.map_err(|error| in_one_line(&error));
            }
            Ok(_) => last = "it has not let go".into(),
            Err(error) => last = in_one_line(&error),
        }
    }
    Err(last)
}

/// Where it may be: where the host with its key is by now, or the host of its name, if that has another key since it was
/// set up anew; or where it was.
async fn candidates(host: &Host, fence: &Fence) -> Result<Vec<Peer>, String> {
    let peers = host.journal.peers().await.map_err(|error| in_one_line(&error))?;
    let mut found: Vec<Peer> = peers
        .iter()
        .filter(|peer| peer.fingerprint == fence.peer_key || peer.name == fence.peer)
        .filter(|peer| !peer.address.is_empty())
        .map(|peer| pinned(host, &peer.address, peer.fingerprint))
        .collect();
    found.push(pinned(host, &fence.address, fence.peer_key));
    Ok(found)
}
