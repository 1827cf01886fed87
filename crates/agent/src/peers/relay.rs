//! For a QEMU that cannot encrypt: its migration connections go over Unix sockets to the agents, and between the agents
//! as upgraded requests of their API, which is TLS in which both sides have proved who they are.
//!
//! A relay costs copies that QEMU's own TLS does not, so it is only used where that is missing. Which of the two was
//! chosen can be told from the folders below, also by the next agent.

use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use vmferry_api::in_one_line;

use super::client::Peer;
use crate::error::AgentError;
use crate::host::{Vm, bind_anew};

/// What is read at once, in bytes.
const BUFFER: usize = 256 << 10;

fn receiving_dir(vm: &Vm) -> PathBuf {
    vm.dir.join("relay-in")
}

fn sending_dir(vm: &Vm) -> PathBuf {
    vm.dir.join("relay-out")
}

/// Where the destination's QEMU listens. Its connections are relayed from now on.
pub(crate) fn begin_receiving(vm: &Vm) -> Result<String, AgentError> {
    let dir = receiving_dir(vm);
    make_dir(&dir).map_err(AgentError::io(&dir))?;
    Ok(uri_at_destination(vm))
}

/// Where the destination's QEMU listens, for `migrate-incoming` and `migrate-recover`.
pub(crate) fn uri_at_destination(vm: &Vm) -> String {
    format!("unix:{}", receiving_dir(vm).join("qemu.sock").display())
}

/// This QEMU's incoming connections are relayed.
pub(crate) fn is_receiving(vm: &Vm) -> bool {
    receiving_dir(vm).exists()
}

/// Joins a connection from the source's agent with one to the destination's QEMU until both are over.
pub(crate) async fn receive(vm: &Vm, mut from_source: impl AsyncRead + AsyncWrite + Unpin) {
    let joined = async {
        let mut to_qemu = UnixStream::connect(receiving_dir(vm).join("qemu.sock")).await?;
        copy_bidirectional_with_sizes(&mut from_source, &mut to_qemu, BUFFER, BUFFER).await
    };
    if let Err(error) = joined.await {
        tracing::debug!(vm = vm.name(), %error, "a relayed connection broke");
    }
}

/// The source's side: relays what its QEMU connects, until dropped.
pub(crate) struct Relay {
    uri: String,
    _accepting: AbortOnDropHandle<()>,
}

impl Relay {
    /// Listens for this VM's QEMU.
    pub(crate) fn open(vm: &Vm, peer: Peer, id: Uuid) -> Result<Self, AgentError> {
        let dir = sending_dir(vm);
        let socket = dir.join("agent.sock");
        let listen = || {
            make_dir(&dir)?;
            bind_anew(&socket)
        };
        let listener = listen().map_err(AgentError::io(&socket))?;
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, peer, id)));
        Ok(Self { uri: format!("unix:{}", socket.display()), _accepting: accepting })
    }

    /// Where QEMU connects to.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// This VM's connections were relayed by an earlier agent.
    pub(crate) fn was_open(vm: &Vm) -> bool {
        sending_dir(vm).exists()
    }

    /// They are not any more.
    pub(crate) fn forget(vm: &Vm) {
        // What is not there need not go.
        let _ = std::fs::remove_dir_all(sending_dir(vm));
    }
}

async fn accept(listener: UnixListener, peer: Peer, id: Uuid) {
    // They end with the listener.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((mut from_qemu, _)) = listener.accept().await {
        let peer = peer.clone();
        connections.spawn(async move {
            let mut to_destination = match peer.relay(id).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(migration = %id, error = in_one_line(&error), "cannot relay a connection");
                    return;
                }
            };
            let joined = copy_bidirectional_with_sizes(&mut from_qemu, &mut to_destination, BUFFER, BUFFER).await;
            if let Err(error) = joined {
                tracing::debug!(migration = %id, %error, "a relayed connection broke");
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

fn make_dir(dir: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}
