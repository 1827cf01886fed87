//! The files that measuring guests boot from: a kernel and a first root file system, some MiB.
//!
//! A guest's files have to be on both hosts. Those of a measuring guest need nobody to put them there: the source's agent
//! does. They are named after what is in them, so that a file that is there is the right one, and a command line with
//! such names, relative to the folder that has them, means the same on every host.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use axum::body::Bytes;
use vmferry_api::VmSpec;
use vmferry_link::Fingerprint;
use vmferry_qemu::CommandLine;

use crate::error::AgentError;
use crate::host::Host;
use crate::peers::{BootFile, Peer};

/// The largest that is taken, in bytes.
pub(crate) const LARGEST: usize = 64 << 20;
/// How many are kept: those that came, or were asked for, last.
const KEPT: usize = 8;

fn folder(host: &Host) -> PathBuf {
    host.config.state_dir.join("boot-files")
}

fn parse(digest: &str) -> Result<Fingerprint, AgentError> {
    digest.parse().map_err(|_| AgentError::BadRequest {
        message: format!("{digest:?} is no fingerprint of a file"),
        hint: Some("it is its SHA-256, in base 32: 52 letters and digits".into()),
    })
}

/// A measuring guest that comes here finds its files in this host's folder.
pub(crate) fn settle(host: &Host, spec: &mut VmSpec) {
    if spec.measuring {
        spec.cwd = folder(host);
    }
}

/// Whether this host has it. One that is asked for is kept for a while.
pub(crate) fn look(host: &Host, digest: &str) -> Result<BootFile, AgentError> {
    let path = folder(host).join(parse(digest)?.to_string());
    let touched = File::options().write(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
    Ok(BootFile { is_there: touched.is_ok() })
}

/// Takes one.
pub(crate) async fn put(host: &Host, digest: &str, content: Bytes) -> Result<BootFile, AgentError> {
    let (expected, folder) = (parse(digest)?, folder(host));
    let putting = move || {
        if Fingerprint::of(&content) != expected {
            let message = format!("what came is not the file {expected}");
            return Err(AgentError::BadRequest { message, hint: None });
        }
        let failed = AgentError::io(&folder);
        let path = folder.join(expected.to_string());
        // Nobody sees half of it, whoever else brings the same.
        let part = folder.join(format!("{expected}.{}", uuid::Uuid::new_v4()));
        let written = || {
            std::fs::create_dir_all(&folder)?;
            let mut file = File::create(&part)?;
            file.write_all(&content)?;
            file.sync_all()?;
            std::fs::rename(&part, &path)
        };
        written().map_err(failed)?;
        forget_the_oldest(&folder);
        Ok(BootFile { is_there: true })
    };
    tokio::task::spawn_blocking(putting).await.expect("writing a file does not panic")
}

/// A guest that runs has read its own.
fn forget_the_oldest(folder: &std::path::Path) {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut known: Vec<(SystemTime, PathBuf)> =
        files.filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path()))).collect();
    known.sort();
    for (_, path) in known.iter().rev().skip(KEPT) {
        // What somebody else has just removed need not go.
        let _ = std::fs::remove_file(path);
    }
}

/// Gives a destination those of this guest that it has not.
pub(crate) async fn send(spec: &VmSpec, peer: &Peer) -> Result<(), AgentError> {
    for file in CommandLine::parse(&spec.argv)?.files() {
        let digest = parse(&file.path.to_string_lossy())?.to_string();
        if peer.has_boot_file(&digest).await? {
            continue;
        }
        let path = spec.cwd.join(&digest);
        let content = tokio::fs::read(&path).await.map_err(AgentError::io(&path))?;
        peer.put_boot_file(&digest, content).await?;
    }
    Ok(())
}
