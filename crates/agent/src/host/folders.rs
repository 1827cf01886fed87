//! Folders, sockets and notes of an agent.

use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;
use tokio::net::UnixListener;

use crate::error::AgentError;

/// Makes a folder that only we can enter, in place of what was there.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), AgentError> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(AgentError::io(dir)(error)),
        _ => {}
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(AgentError::io(dir))
}

/// Listens on a Unix socket, also where an earlier agent left one.
pub(crate) fn bind_anew(socket: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(socket)
}

/// Removes a folder and what is in it, if it is there.
pub(crate) async fn remove_dir(dir: std::path::PathBuf) {
    let removing = tokio::task::spawn_blocking(move || {
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(dir = %dir.display(), %error, "cannot remove a VM's folder");
        }
    });
    removing.await.expect("removing a folder does not panic");
}

/// Writes this as JSON to a file in a folder that is made if need be; it is whole or not there, after a power failure, too.
pub(crate) fn write_durably(path: &Path, what: &impl Serialize) -> Result<(), AgentError> {
    let parent = path.parent().expect("what is written is in a folder");
    std::fs::create_dir_all(parent).map_err(AgentError::io(parent))?;
    let text = serde_json::to_vec(what).expect("it is plain data");
    let new = path.with_extension("new");
    let written = std::fs::write(&new, text)
        .and_then(|()| std::fs::File::open(&new)?.sync_all())
        .and_then(|()| std::fs::rename(&new, path))
        .and_then(|()| std::fs::File::open(parent)?.sync_all());
    written.map_err(AgentError::io(path))
}
