//! The face of whoever moves the RAM, and what it is asked with.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;
use vmferry_api::EngineName;
use vmferry_link::{Cipher, Fingerprint};
use vmferry_policy::Limits;
use vmferry_qemu::Features;

use crate::engine::RamEngine;
use crate::engine::external::WayThere;
use crate::engine::movable::Planned;
use crate::error::AgentError;
use crate::host::{Host, Vm};
use crate::peers::relay::Relay;
use crate::peers::{CheckReply, Offer, Peer, Prepared};
use crate::source::post_copy::Way;

/// How the guest is to be protected on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protect {
    Not,
    /// With the fastest cipher that both hosts allow.
    Tls(Cipher),
    Relay,
    /// The agents' link, with that cipher; with whichever the link finds when none is said.
    Link(Option<Cipher>),
}

impl Protect {
    /// How a link of ours gets there, protected so.
    pub(crate) fn way_there(self, host: &Host, peer: &Peer, key: Fingerprint) -> WayThere {
        let protection = match self {
            Self::Not => None,
            Self::Link(cipher) => Some(cipher),
            Self::Tls(_) | Self::Relay => Some(None),
        };
        WayThere { address: peer.address().into(), identity: Arc::clone(&host.trusts.identity), peer: key, protection }
    }

    pub(crate) fn in_words(self) -> String {
        match self {
            Self::Not => "none: both hosts trust the network".into(),
            Self::Tls(cipher) => format!("TLS between the QEMUs ({cipher})"),
            Self::Link(Some(cipher)) => format!("TLS between the agents ({cipher})"),
            Self::Link(None) => "TLS between the agents".into(),
            Self::Relay => "TLS between the agents, which relay what the QEMUs say".into(),
        }
    }
}

/// What is to be moved, to where, and within which limits.
pub(crate) struct Task<'a> {
    pub(crate) id: Uuid,
    pub(crate) host: &'a Arc<Host>,
    pub(crate) vm: &'a Arc<Vm>,
    pub(crate) features: &'a Features,
    pub(crate) peer: &'a Peer,
    pub(crate) peer_key: Fingerprint,
    /// Where its QEMU will be.
    pub(crate) remote: IpAddr,
    pub(crate) planned: &'a Planned,
    pub(crate) there: &'a CheckReply,
    /// What the destination is asked to get ready for.
    pub(crate) offer: &'a mut Offer,
    pub(crate) protect: &'a mut Protect,
    pub(crate) limits: &'a mut Limits,
    pub(crate) bandwidth: Option<u64>,
    /// What carries the connections of a QEMU that is relayed.
    pub(crate) relay: &'a mut Option<Relay>,
}

/// See the module's text.
#[async_trait]
pub(crate) trait Mover: Send + Sync {
    fn name(&self) -> EngineName;

    /// The capabilities that QEMU will be set to.
    fn means(&self) -> Vec<String>;

    /// What its user is to know before it begins.
    fn notes(&self) -> Vec<String>;

    /// The guest is paused before anything is copied.
    fn pauses_first(&self) -> bool {
        false
    }

    /// The guest's writes can be held to a share of what the link carries.
    fn paces(&self) -> bool {
        false
    }

    /// How it gets to this address, where it was to be protected so.
    fn reaches(&self, _: IpAddr, protect: Protect) -> Protect {
        protect
    }

    /// How it can be protected on its way; this is the fastest cipher that both hosts allow.
    fn protection(&self, cipher: Option<Cipher>) -> Protect;

    /// Sets our QEMU up, and completes the offer.
    async fn set_up(&self, task: &mut Task<'_>) -> Result<(), AgentError>;

    /// What copies, once the destination is prepared.
    async fn engine(&self, task: &mut Task<'_>, prepared: &Prepared) -> Result<Box<dyn RamEngine>, AgentError>;

    /// Where a connection that is lost is made anew.
    fn way(&self, remote: IpAddr, relay: Option<&Relay>) -> Way;
}
