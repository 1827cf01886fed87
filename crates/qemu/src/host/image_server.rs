//! A QEMU without a guest that makes or reads an image of a format which only QEMU knows, and serves it by NBD until it is
//! dropped.
//!
//! The same binary as the guest's, so that it writes what that one reads.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::process::{Child, Command};

use super::{PROBE, ProbeError};
use crate::process::end_with_us;
use crate::qmp::commands::{BlockdevAdd, BlockdevCreate, JobDismiss, QueryJobs};
use crate::qmp::{Qmp, QmpError};

/// What the image is called where it is served.
pub const EXPORT: &str = "image";
/// How long it may take to start, and to make the image.
const START: Duration = Duration::from_secs(20);
/// How long it may take to close the image.
const END: Duration = Duration::from_secs(20);

/// An image that is to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The file, which is there and empty.
    pub path: PathBuf,
    /// Such as `qcow2`.
    pub format: String,
    /// In bytes, as a guest sees it.
    pub size: u64,
    /// The file behind it, as it is to be named in it, and that one's format.
    pub backing: Option<(String, String)>,
}

/// See the module's text.
pub struct ImageServer {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl ImageServer {
    /// Makes the image and serves it on a Unix socket in a new folder within this one.
    pub async fn make(binary: &Path, within: &Path, image: &NewImage) -> Result<Self, ProbeError> {
        Self::start(binary, within, async |qmp, socket| {
            make(qmp, image).await?;
            let (path, format) = (&image.path, &image.format);
            serve(qmp, Opened { path, format, writable: true }, socket).await
        })
        .await
    }

    /// Serves, in the same way, what is in an image of this format that is there, to be read; without what is behind it.
    pub async fn read(binary: &Path, within: &Path, path: &Path, format: &str) -> Result<Self, ProbeError> {
        let opened = Opened { path, format, writable: false };
        Self::start(binary, within, async |qmp, socket| serve(qmp, opened, socket).await).await
    }

    async fn start(
        binary: &Path,
        within: &Path,
        open: impl AsyncFnOnce(&Qmp, &Path) -> Result<(), QmpError>,
    ) -> Result<Self, ProbeError> {
        let start_error = |source| ProbeError::Start { binary: binary.into(), source };
        let dir = tempfile::Builder::new().prefix(PROBE).tempdir_in(within).map_err(start_error)?;
        let (monitor, socket) = (dir.path().join("qmp.sock"), dir.path().join("nbd.sock"));
        let mut command = Command::new(binary);
        end_with_us(&mut command);
        let child = command
            .args(["-machine", "none,accel=tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(start_error)?;
        let server = Self { child, socket, _dir: dir };
        let begun = async {
            let qmp = Qmp::connect(&monitor, START).await?;
            open(&qmp, &server.socket).await
        };
        match tokio::time::timeout(START, begun).await {
            Ok(Ok(())) => Ok(server),
            Ok(Err(source)) => Err(ProbeError::Qmp { binary: binary.into(), source }),
            Err(_) => Err(ProbeError::Timeout { binary: binary.into(), after: START }),
        }
    }

    /// Where it serves the image, as [`EXPORT`].
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for ImageServer {
    /// Waits until the image is closed.
    fn drop(&mut self) {
        let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) else { return };
        // It fails only when it has ended.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < END {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        tracing::error!(pid = pid.as_raw_nonzero(), "a QEMU that had an image does not end, and is killed");
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

async fn make(qmp: &Qmp, image: &NewImage) -> Result<(), QmpError> {
    let NewImage { path, format, size, backing } = image;
    let file = json!({ "driver": "file", "node-name": "empty", "filename": path });
    qmp.execute(BlockdevAdd { options: object(file) }).await?;
    let mut options = json!({ "driver": format, "file": "empty", "size": size });
    if let Some((file, format)) = backing {
        options["backing-file"] = json!(file);
        options["backing-fmt"] = json!(format);
    }
    qmp.execute(BlockdevCreate { job_id: "create".into(), options }).await?;
    loop {
        let jobs = qmp.execute(QueryJobs {}).await?;
        if let Some(job) = jobs.into_iter().find(|job| job.id == "create" && job.status == "concluded") {
            qmp.execute(JobDismiss { id: job.id }).await?;
            match job.error {
                None => return qmp.execute_raw("blockdev-del", json!({ "node-name": "empty" })).await.map(drop),
                Some(desc) => {
                    let (command, class) = ("blockdev-create".into(), "GenericError".into());
                    return Err(QmpError::Command { command, class, desc });
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// An image that is to be served.
struct Opened<'a> {
    path: &'a Path,
    format: &'a str,
    writable: bool,
}

async fn serve(qmp: &Qmp, image: Opened<'_>, socket: &Path) -> Result<(), QmpError> {
    let Opened { path, format, writable } = image;
    let file =
        json!({ "driver": "file", "node-name": "file", "filename": path, "discard": "unmap", "read-only": !writable });
    qmp.execute(BlockdevAdd { options: object(file) }).await?;
    let mut node = json!({
        "driver": format, "node-name": "image", "file": "file", "discard": "unmap", "read-only": !writable
    });
    if !writable {
        node["backing"] = Value::Null;
    }
    qmp.execute(BlockdevAdd { options: object(node) }).await?;
    let at = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
    qmp.execute_raw("nbd-server-start", at).await?;
    let export = json!({ "type": "nbd", "id": "export", "node-name": "image", "name": EXPORT, "writable": writable });
    qmp.execute_raw("block-export-add", export).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_is_made_with_its_backing_file_and_closed_at_the_end() {
        for qemu in crate::host::kvm_trial::tests::qemus() {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base.raw");
            std::fs::write(&base, vec![7; 1 << 20]).unwrap();
            let path = dir.path().join("top.qcow2");
            std::fs::write(&path, "").unwrap();
            let backing = Some((base.display().to_string(), "raw".to_owned()));
            let image = NewImage { path: path.clone(), format: "qcow2".into(), size: 1 << 20, backing };
            let writer = ImageServer::make(&qemu, dir.path(), &image).await.unwrap();
            assert!(writer.socket().exists());
            drop(writer);
            let header = std::fs::read(&path).unwrap();
            assert_eq!(header[..4], *b"QFI\xfb", "{}", qemu.display());
            let again = NewImage { format: "no-such".into(), ..image };
            assert!(ImageServer::make(&qemu, dir.path(), &again).await.is_err());
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no folder is left");
        }
    }
}
