//! The client of QMP, QEMU's monitor protocol: JSON lines over a Unix socket.
//!
//! One task per connection reads and writes; everybody else hands it commands and gets replies by their id, so that
//! several commands can be in flight and a caller that loses interest never leaves half a line on the wire.
//! The protocol: QEMU's docs/interop/qmp-spec.rst.

pub mod commands;
mod connection;
mod events;
mod features;
mod states;

pub use events::{Event, EventStream};
pub use features::Features;
pub(crate) use states::open_enum;
pub use states::{MigrationStatus, RunState};

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::Instant;

use connection::{Connection, Turn};

/// How long QEMU may take to answer a command unless the caller says otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How many descriptors may go with one command; QEMU's own bound.
pub const MAX_DESCRIPTORS: usize = 16;
/// What the greeting calls the capability to do some commands out of their turn.
const OUT_OF_BAND: &str = "oob";
/// How often a socket that is not there yet is tried.
const RETRY: Duration = Duration::from_millis(5);

/// A command of QMP: what it is called, its arguments (the fields), and what QEMU answers.
pub trait Command: Serialize {
    /// What QMP calls it.
    const NAME: &'static str;
    /// QEMU does it at once, even while it can do nothing else because its guest waits for a page; on a connection that
    /// cannot (a shared character device) it waits its turn like any other.
    const OUT_OF_BAND: bool = false;
    /// What comes back. Fields that it does not name are ignored.
    type Reply: DeserializeOwned;
}

/// Why a command was not done, or whether it was is not known.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection.
    #[error("cannot connect to QEMU at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Connected, but QEMU does not greet: it serves one client at a time.
    #[error("QEMU does not greet at {path} within {after:?}: it hangs, or another program is connected to that socket")]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended: QEMU is gone.
    #[error("QEMU closed the connection")]
    Closed,
    /// No answer in time; the command may be done all the same, then or later.
    #[error("QEMU did not answer {command} within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// QEMU says no.
    #[error("QEMU refused {command}: {desc}")]
    Command {
        /// The command.
        command: String,
        /// QEMU's class of the error, almost always `GenericError`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// What came is not QMP; the connection is over.
    #[error("QEMU broke the QMP protocol: {what}")]
    Protocol {
        /// What came.
        what: String,
    },
    /// The answer lacks something that this command's answer must have.
    #[error("QEMU's answer to {command} is not understood")]
    Reply {
        /// The command.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The command cannot be sent as given.
    #[error("the command {command} cannot be sent")]
    Unsendable {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A connection to a QEMU's monitor. Cheap to clone; ends when the last clone is dropped or QEMU is gone.
#[derive(Clone)]
pub struct Qmp {
    connection: Arc<Connection>,
    peer: Option<u32>,
    out_of_band: bool,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("peer", &self.peer).field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects to this Unix socket and gets QEMU ready for commands. While the socket does not exist or refuses, it is
    /// tried again; all of it may take as long as the deadline says.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let until = Instant::now() + deadline;
        let no_greeting = || QmpError::NoGreeting { path: path.into(), after: deadline };
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(error) if may_come(&error) && Instant::now() + RETRY < until => tokio::time::sleep(RETRY).await,
                Err(source) => return Err(QmpError::Connect { path: path.into(), source }),
            }
        };
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
        let (connection, greeted) = Connection::open(stream);
        let enable = match tokio::time::timeout_at(until, greeted).await {
            Ok(Ok(offered)) => offered.into_iter().filter(|capability| capability == OUT_OF_BAND).collect::<Vec<_>>(),
            Ok(Err(_)) => return Err(connection.why_closed()),
            Err(_) => return Err(no_greeting()),
        };
        let mut qmp = Self { connection: Arc::new(connection), peer, out_of_band: false };
        let out_of_band = !enable.is_empty();
        match tokio::time::timeout_at(until, qmp.execute(commands::QmpCapabilities { enable })).await {
            Ok(ready) => ready?,
            Err(_) => return Err(no_greeting()),
        };
        qmp.out_of_band = out_of_band;
        Ok(qmp)
    }

    /// Executes a command and waits for the answer, at most [`COMMAND_TIMEOUT`].
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Reply, QmpError> {
        self.execute_within(command, COMMAND_TIMEOUT).await
    }

    /// Executes a command and waits for the answer, at most this long.
    pub async fn execute_within<C: Command>(&self, command: C, timeout: Duration) -> Result<C::Reply, QmpError> {
        let turn = if C::OUT_OF_BAND && self.out_of_band { Turn::Now } else { Turn::InOrder };
        decode::<C>(self.exchange(C::NAME, arguments_of(&command)?, Vec::new(), turn, timeout).await?)
    }

    /// Executes a command that takes descriptors along, such as `getfd` and `add-fd`. They are duplicated, the caller's
    /// stay his; at most [`MAX_DESCRIPTORS`].
    pub async fn execute_with_fds<C: Command>(&self, command: C, fds: &[BorrowedFd<'_>]) -> Result<C::Reply, QmpError> {
        let unsendable = |source| QmpError::Unsendable { command: C::NAME.into(), source };
        if fds.len() > MAX_DESCRIPTORS {
            return Err(unsendable(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("it has {} descriptors and QEMU takes {MAX_DESCRIPTORS}", fds.len()),
            )));
        }
        let owned: std::io::Result<Vec<OwnedFd>> = fds.iter().map(BorrowedFd::try_clone_to_owned).collect();
        let (arguments, owned) = (arguments_of(&command)?, owned.map_err(unsendable)?);
        // QEMU keeps one command's descriptors only until it reads those of the next.
        let _one_at_a_time = self.connection.descriptors().await;
        decode::<C>(self.exchange(C::NAME, arguments, owned, Turn::InOrder, COMMAND_TIMEOUT).await?)
    }

    /// Executes a command that has no type here, and gives QEMU's answer as it came.
    pub async fn execute_raw(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange(name, arguments, Vec::new(), Turn::InOrder, COMMAND_TIMEOUT).await
    }

    /// The events from now on.
    pub fn events(&self) -> EventStream {
        self.connection.events()
    }

    /// Waits until the connection ends, which it does when QEMU ends.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }

    /// The connection has ended.
    pub fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    async fn exchange(
        &self,
        name: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
        turn: Turn,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        tokio::time::timeout(timeout, self.connection.exchange(name, arguments, fds, turn))
            .await
            .unwrap_or_else(|_| Err(QmpError::Timeout { command: name.into(), after: timeout }))
    }
}

/// The process that made the socket this connection leads to: QEMU, unless somebody made the socket for it.
pub fn pid_of_socket_peer(qmp: &Qmp) -> Option<u32> {
    qmp.peer
}

/// A socket that a starting QEMU has not made yet, or made and does not listen on yet.
fn may_come(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused)
}

fn arguments_of<C: Command>(command: &C) -> Result<Value, QmpError> {
    serde_json::to_value(command)
        .map_err(|error| QmpError::Unsendable { command: C::NAME.into(), source: error.into() })
}

fn decode<C: Command>(reply: Value) -> Result<C::Reply, QmpError> {
    serde_json::from_value(reply).map_err(|source| QmpError::Reply { command: C::NAME.into(), source })
}
