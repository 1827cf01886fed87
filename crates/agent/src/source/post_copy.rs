//! Post-copy: the guest runs at the destination, and what it misses follows, over new connections when one is lost.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::{Code, in_one_line};
use vmferry_policy::{Costs, Limits};
use vmferry_qemu::QmpError;

use super::teller::Audience;
use crate::engine::external::{self, ExternalEngine, WayThere};
use crate::engine::movable::backends_of;
use crate::engine::qemu::{self, QemuEngine, tcp_uri};
use crate::engine::{EngineError, NewConnection, RamEngine, Setup, journey};
use crate::error::AgentError;
use crate::host::{Host, Vm};
use crate::journal::OutRecord;
use crate::peers::relay::Relay;
use crate::peers::{IncomingState, Peer, PeerError};

/// How long to wait between two tries of something that must not be given up.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// When nothing was sent for so long, the destination is asked whether it is still there to be sent to.
const QUIET: Duration = Duration::from_secs(3);

/// Where QEMU connects to.
pub(super) enum Way {
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

/// How post-copy is followed, and goes on when its connection is lost.
pub(super) struct Serving {
    way: Way,
    /// Kept open as long as it is needed.
    _relay: Option<Relay>,
}

impl Serving {
    pub(super) fn new(way: Way, relay: Option<Relay>) -> Self {
        Self { way, _relay: relay }
    }

    /// Of a migration that another agent began, or that was interrupted: with an engine, if there is none.
    pub(super) async fn again(
        host: &Host,
        vm: &Vm,
        (peer, record): (&Peer, &OutRecord),
        engine: &mut Option<Box<dyn RamEngine>>,
    ) -> Result<Self, AgentError> {
        let relay = match Relay::was_open(vm) {
            true => Some(Relay::open(vm, peer.clone(), record.id)?),
            false => None,
        };
        let is_external = journey::is_sending(vm).is_some();
        let way = match &relay {
            _ if is_external => Way::Link,
            Some(relay) => Way::Relayed(relay.uri().into()),
            None => Way::Direct(peer.hello().await?.ip()),
        };
        if engine.is_none() {
            *engine = Some(match is_external {
                true => resumed_external(host, vm, record).await?,
                false => resumed_qemu(host, vm, record).await?,
            });
        }
        Ok(Self::new(way, relay))
    }

    /// To its end, over new connections when one is lost: `Err` says why it has no end.
    pub(super) async fn follow(
        self,
        (peer, id): (&Peer, Uuid),
        engine: &mut dyn RamEngine,
        audience: &dyn Audience,
    ) -> Result<(), String> {
        let mut is_broken = false;
        let (mut sent, mut moved) = (None, Instant::now());
        loop {
            let mut seen = match engine.observe().await {
                // QEMU may be busy, or stand still with its connection.
                Err(EngineError::Qmp(QmpError::Timeout { .. })) => Ok(None),
                Ok(seen) => Ok(Some(seen)),
                Err(error) => Err(in_one_line(&error)),
            };
            if let Ok(Some(seen)) = &seen
                && sent.replace(seen.observation.sent) != Some(seen.observation.sent)
            {
                moved = Instant::now();
            }
            // A QEMU does not always notice that the one it sends to is gone.
            if moved.elapsed() >= QUIET {
                moved = Instant::now();
                if peer.keep(id).await.is_ok_and(|state| state.ended) {
                    seen = Err("the QEMU there is gone".into());
                }
            }
            let seen = match seen {
                Ok(Some(seen)) => seen,
                Ok(None) => continue,
                // The last words between the two can get lost when all memory is there. Whether it is, only the
                // destination knows.
                Err(reason) => match peer.recover(id).await {
                    Ok(state) if state.complete => return Ok(()),
                    Ok(_) => return Err(reason),
                    Err(refused) if is_final(&refused) => return Err(in_one_line(&refused)),
                    Err(unknown) => {
                        tracing::debug!(error = in_one_line(&unknown), "whether all memory is there is not known");
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                },
            };
            audience.progress(&seen);
            if seen.complete {
                return Ok(());
            }
            match seen.broken {
                Some(why) => {
                    if !std::mem::replace(&mut is_broken, true) {
                        audience.note(format!(
                            "The connection to {} broke ({why}); the guest waits for pages until it is back.",
                            peer.address()
                        ));
                    }
                    if reconnect(engine, peer, id, &self.way).await? {
                        return Ok(());
                    }
                    tokio::time::sleep(RETRY).await;
                }
                None if std::mem::replace(&mut is_broken, false) => {
                    audience.note("The connection is back; post-copy goes on.".into());
                }
                None => {}
            }
        }
    }
}

/// The destination has spoken, and will not say otherwise.
fn is_final(error: &PeerError) -> bool {
    matches!(error, PeerError::Refused { problem } if problem.code == Code::Conflict)
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
        Err(error) if is_final(&error) => return Err(in_one_line(&error)),
        Err(error) => tracing::debug!(error = in_one_line(&error), "cannot recover yet"),
    }
    Ok(false)
}

async fn resumed_qemu(host: &Host, vm: &Vm, record: &OutRecord) -> Result<Box<dyn RamEngine>, AgentError> {
    let (features, _) = host.qemus.features_of(vm).await?;
    let (uri, setup) = (String::new(), Setup::default());
    let wishes = qemu::Wishes {
        uri,
        // Nothing is left to decide in post-copy.
        limits: Limits::default(),
        costs: Costs::default(),
        bandwidth: None,
        setup,
        post_copy_first: false,
        scripted: false,
        zeroes_by_multifd: false,
    };
    Ok(Box::new(QemuEngine::new(vm.qmp.clone(), features, record.running, wishes)))
}

async fn resumed_external(host: &Host, vm: &Vm, record: &OutRecord) -> Result<Box<dyn RamEngine>, AgentError> {
    let plain = journey::is_sending(vm) == Some(true);
    let wishes = external::Wishes {
        pid: vm.pid,
        backends: backends_of(vm).await?,
        dir: journey::sending_dir(vm),
        way: WayThere {
            address: record.address.clone(),
            identity: Arc::clone(&host.trusts.identity),
            peer: record.peer_key,
            protection: (!plain).then_some(None),
        },
        limits: Limits::default(),
        costs: Costs::default(),
        paces: false,
        bandwidth: None,
        delta_cache: 0,
        runs: record.running,
        stops_first: true,
        drains: false,
        lends: false,
        planned: None,
    };
    Ok(Box::new(ExternalEngine::in_post_copy(vm.qmp.clone(), wishes)))
}
