//! Other agents: who they are, and pairing with them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An agent, as it introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Hello {
    /// Always `vmferry`: tells an agent from whatever else listens there.
    pub product: String,
    /// The version of the API between agents.
    pub api: u32,
    /// The version of the program.
    pub version: String,
    /// What the host calls itself.
    pub name: String,
}

/// Make a join token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenRequest {
    /// How long it is good for, in seconds.
    pub seconds: u64,
}

/// A join token.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// What is carried to the other host, like a password.
    pub token: String,
    /// How long it is good for, in seconds.
    pub seconds: u64,
}

/// Pair with the agent that made a token.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct PairRequest {
    /// The token.
    pub token: String,
    /// A host that may be its address, tried before those in the token.
    pub host: Option<String>,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerView {
    /// What it calls itself.
    pub name: String,
    /// HOST:PORT; empty when it listens nowhere.
    pub address: String,
    /// Its certificate's fingerprint.
    pub fingerprint: String,
    /// When it was paired, in seconds since 1970; 0 just now.
    pub paired: u64,
}

/// This host and its peers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PeersView {
    /// What this host calls itself.
    pub name: String,
    /// Its certificate's fingerprint.
    pub fingerprint: String,
    /// Where its agent listens.
    pub listens: Option<String>,
    /// Those that it is paired with.
    pub peers: Vec<PeerView>,
}
