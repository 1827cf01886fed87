//! Why another agent did not do what it was asked.

use std::time::Duration;

use vmferry_api::{Code, Problem};
use vmferry_link::LinkError;

/// The version of the API between agents. Agents of different versions refuse each other.
pub const API: u32 = 6;

/// Why another agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// There is no connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// There was one.
    #[error("the connection to the agent at {address} broke")]
    Broken {
        /// Where it is.
        address: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// It does not answer.
    #[error("the agent at {address} does not answer within {after:?}")]
    NoAnswer {
        /// Where it is.
        address: String,
        /// How long was waited.
        after: Duration,
    },
    /// Something answers, but not in the way an agent does.
    #[error("what answers at {address} does not speak as a vmferry agent does")]
    NotAnAgent {
        /// Where.
        address: String,
    },
    /// An agent that speaks another version.
    #[error(
        "the agent at {address} is vmferry {version}, which speaks version {api} of the protocol; this one speaks {API}"
    )]
    OtherVersion {
        /// Where.
        address: String,
        /// Its program's version.
        version: String,
        /// Its protocol's version.
        api: u32,
    },
    /// It refused.
    #[error("{}", problem.message)]
    Refused {
        /// In its own words.
        problem: Problem,
    },
}

impl PeerError {
    /// For programs.
    pub fn code(&self) -> Code {
        match self {
            Self::Link(LinkError::WrongIdentity { .. }) => Code::NotPaired,
            Self::Link(LinkError::NotAnAgent { .. }) | Self::NotAnAgent { .. } => Code::NotAnAgent,
            Self::Link(_) | Self::Broken { .. } | Self::NoAnswer { .. } => Code::Unreachable,
            Self::OtherVersion { .. } => Code::OtherVersion,
            Self::Refused { problem, .. } => problem.code,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Refused { problem, .. } => problem.hint.clone(),
            Self::Link(LinkError::WrongIdentity { .. }) => Some(
                "pair the two: `vmferry pair` there makes a token for `vmferry pair TOKEN` here; if that host was set \
                 up anew, `vmferry unpair` it here first"
                    .into(),
            ),
            Self::OtherVersion { .. } => Some("install the same version of vmferry on both hosts".into()),
            Self::Broken { .. } | Self::NoAnswer { .. } => None,
            Self::Link(_) | Self::NotAnAgent { .. } => Some(
                "is the host right, does `vmferry agent` run there, and does a firewall let its port through?".into(),
            ),
        }
    }
}
