//! The source's end of what is carried: sockets to which this host's libvirt and its QEMU connect.

use std::os::unix::fs::chown;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::UnixListener;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use vmferry_api::in_one_line;

use crate::error::AgentError;
use crate::host::bind_anew;
use crate::peers::carried::{Folder, socket};
use crate::peers::{Channel, Peer};

/// What is read at once, in bytes.
const BUFFER: usize = 256 << 10;

/// They are served until this is dropped.
pub(super) struct Ways {
    id: Uuid,
    domain: String,
    _serving: Vec<AbortOnDropHandle<()>>,
    /// Goes after those.
    _folder: Folder,
}

impl Ways {
    /// Listens for libvirt, and for QEMUs that run as this user.
    pub(super) fn open(id: Uuid, domain: &str, peer: &Peer, qemu_user: Option<(u32, u32)>) -> Result<Self, AgentError> {
        let folder = Folder::make(id, qemu_user)?;
        let mut serving = Vec::new();
        for channel in Channel::ALL {
            let path = socket(id, channel, domain);
            let listen = || {
                let listener = bind_anew(&path)?;
                // The other one is libvirt's, which is root.
                if let Some((user, group)) = qemu_user.filter(|_| channel != Channel::Control) {
                    chown(&path, Some(user), Some(group))?;
                }
                Ok(listener)
            };
            let listener = listen().map_err(AgentError::io(&path))?;
            serving.push(AbortOnDropHandle::new(tokio::spawn(serve(listener, peer.apart(), id, channel))));
        }
        Ok(Self { id, domain: domain.into(), _serving: serving, _folder: folder })
    }

    /// The destination's libvirt, as this one reaches it.
    pub(super) fn libvirt_uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", socket(self.id, Channel::Control, &self.domain).display())
    }

    /// Where QEMU sends to, as libvirt is told.
    pub(super) fn uri(&self, channel: Channel) -> String {
        format!("unix://{}", socket(self.id, channel, &self.domain).display())
    }
}

async fn serve(listener: UnixListener, peer: Peer, id: Uuid, channel: Channel) {
    // They end with the listener.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((mut here, _)) = listener.accept().await {
        let peer = peer.clone();
        connections.spawn(async move {
            let mut there = match peer.carry(id, channel).await {
                Ok(there) => there,
                Err(error) => {
                    let error = in_one_line(&error);
                    tracing::warn!(migration = %id, channel = channel.word(), error, "cannot carry a connection");
                    return;
                }
            };
            if let Err(error) = copy_bidirectional_with_sizes(&mut here, &mut there, BUFFER, BUFFER).await {
                tracing::debug!(migration = %id, channel = channel.word(), %error, "a carried connection broke");
            }
        });
        while connections.try_join_next().is_some() {}
    }
}
