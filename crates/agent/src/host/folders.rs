//! Folders and sockets of an agent, which only its user may enter.

use std::io::ErrorKind;
use std::path::Path;

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
