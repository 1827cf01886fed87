//! Post-copy: the guest runs at the destination, and what it misses follows, over new connections when one is lost.

use std::net::IpAddr;
use std::sync::Arc;

use uuid::Uuid;
use vmferry_api::{Code, Step, in_one_line};
use vmferry_qemu::QmpError;

use super::plan::Engine;
use super::run::{Halt, RETRY, Run};
use crate::engine::qemu::tcp_uri;
use crate::engine::{EngineError, NewConnection, RamEngine, Seen};
use crate::peers::{IncomingState, Peer, PeerError};

impl Run {
    /// The guest runs there; what it misses follows. A lost connection is made anew, for as long as it takes.
    pub(super) async fn post_copy(&mut self, engine: &mut dyn RamEngine) -> Result<(), Halt> {
        self.step(Step::PostCopy);
        let (told, peer) = (Arc::clone(&self.migration), self.plan.peer.clone());
        let note = |text| told.note(text);
        let way = match (&self.relay, &self.plan.engine) {
            (_, Engine::External(_)) => Way::Link,
            (Some(relay), _) => Way::Relayed(relay.uri().to_owned()),
            (None, _) => Way::Direct(self.plan.remote),
        };
        match follow_post_copy(engine, &peer, told.id, &way, note, |seen| self.tell_progress(seen)).await {
            Ok(()) => Ok(()),
            Err(reason) => Err(self.stranded(reason)),
        }
    }
}

/// Where QEMU connects to.
pub(crate) enum Way {
    /// To the destination's QEMU, which is at this address.
    Direct(IpAddr),
    /// To this agent, at this URI.
    Relayed(String),
    /// It does not: the agents do, over their link.
    Link,
}

impl Way {
    /// To where the destination waits now.
    fn again(&self, state: &IncomingState) -> Option<NewConnection> {
        match self {
            Self::Direct(address) => Some(NewConnection::Uri(tcp_uri(*address, state.port?))),
            Self::Relayed(uri) => Some(NewConnection::Uri(uri.clone())),
            Self::Link => state.session.clone().map(NewConnection::Session),
        }
    }
}

/// Follows post-copy to its end, over new connections when one is lost: `Err` says why it has no end.
pub(crate) async fn follow_post_copy(
    engine: &mut dyn RamEngine,
    peer: &Peer,
    id: Uuid,
    way: &Way,
    note: impl Fn(String),
    mut progress: impl FnMut(&Seen),
) -> Result<(), String> {
    let mut is_broken = false;
    loop {
        let seen = match engine.observe().await {
            Ok(seen) => seen,
            // QEMU may be busy, or stand still with its connection.
            Err(EngineError::Qmp(QmpError::Timeout { .. })) => continue,
            // The last words between the two can get lost when all memory is there.
            Err(error) => match peer.recover(id).await {
                Ok(state) if state.complete => return Ok(()),
                _ => return Err(in_one_line(&error)),
            },
        };
        progress(&seen);
        if seen.complete {
            return Ok(());
        }
        match seen.broken {
            Some(why) => {
                if !std::mem::replace(&mut is_broken, true) {
                    note(format!(
                        "The connection to {} broke ({why}); the guest waits for pages until it is back.",
                        peer.address()
                    ));
                }
                if reconnect(engine, peer, id, way).await? {
                    return Ok(());
                }
                tokio::time::sleep(RETRY).await;
            }
            None if std::mem::replace(&mut is_broken, false) => {
                note("The connection is back; post-copy goes on.".into());
            }
            None => {}
        }
    }
}

/// Tries once to make the connection anew. True when that is not needed: the destination has all memory.
async fn reconnect(engine: &mut dyn RamEngine, peer: &Peer, id: Uuid, way: &Way) -> Result<bool, String> {
    match peer.recover(id).await {
        Ok(state) if state.complete => return Ok(true),
        Ok(state) => {
            if state.listens
                && let Some(to) = way.again(&state)
                && let Err(error) = engine.reconnect(&to).await
            {
                tracing::debug!(error = in_one_line(&error), "cannot reconnect yet");
            }
        }
        Err(PeerError::Refused { problem }) if problem.code == Code::Conflict => return Err(problem.message),
        Err(error) => tracing::debug!(error = in_one_line(&error), "cannot recover yet"),
    }
    Ok(false)
}
