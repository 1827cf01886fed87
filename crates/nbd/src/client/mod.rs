//! Uses disks that others serve.

mod connection;
mod remote;

pub use connection::{Client, list, look};
pub use remote::Remote;

use std::io;
use std::sync::Arc;

use crate::handshake::BadServer;
use crate::tls::TlsError;
use crate::transmission::{BadReply, Failed};

/// What goes wrong with a server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("cannot connect to {at}")]
    Connect {
        /// Where.
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The handshake went wrong.
    #[error("no agreement with {at}")]
    Handshake {
        /// Where.
        at: String,
        /// Why.
        #[source]
        source: BadServer,
    },
    /// TLS went wrong.
    #[error("no TLS with {at}")]
    Tls {
        /// Where.
        at: String,
        /// Why.
        #[source]
        source: TlsError,
    },
    /// The connection is at its end.
    #[error("lost the connection to the NBD server")]
    Lost(#[source] Arc<Lost>),
    /// The server could not do it.
    #[error("the NBD server cannot {what}")]
    Failed {
        /// What it was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: Failed,
    },
}

/// Why a connection is at its end.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// What the server says cannot be believed.
    #[error(transparent)]
    Reply(#[from] BadReply),
    /// It broke.
    #[error("it broke")]
    Broken(#[from] io::Error),
    /// The server closed it.
    #[error("the server closed it")]
    Closed,
}
