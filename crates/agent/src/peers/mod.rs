//! Other agents: whom this one trusts, what they say to each other, and how.

pub(crate) mod callers;
pub(crate) mod carried;
mod client;
mod domains;
pub(crate) mod link_trial;
pub(crate) mod relay;
pub(crate) mod trust;
mod wire;

pub(crate) use client::RELAY_PROTOCOL;
pub use client::{Answer, Met, Peer};
pub use domains::{CarryOffer, CarryReply, Channel, DomainState, DomainThere};
pub use wire::{
    Abandon, BootFile, CheckReply, Commit, CopyAccepted, CopyOffer, DiskThere, Fence, InWord, IncomingState, Join,
    MoveOffer, MoveReply, Offer, OutgoingState, OwnImage, Prepared, Taken, TrialAccepted, TrialOffer,
};

pub use crate::error::{API, PeerError};
pub use crate::host::{Content, Plug};
