//! The copy of an image that no QEMU uses: raw ones by us, others by `qemu-img`.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use vmferry_api::in_one_line;
use vmferry_nbd::backend::{Access, Backend, File, Zeroing};
use vmferry_nbd::copy::{CopyError, How, Progress, copy};
use vmferry_nbd::transmission::Extent;

use super::told::Told;

/// How many requests are under way.
const REQUESTS: usize = 4;
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// What is copied, as fast as it may be, until its user has enough.
struct Source {
    file: File,
    cancelled: CancellationToken,
    rate: Option<u64>,
    begun: Instant,
    progress: Arc<Progress>,
}

impl Backend for Source {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.cancelled.is_cancelled() {
            return Err(io::Error::from(io::ErrorKind::Interrupted));
        }
        if let Some(rate) = self.rate {
            let due = Duration::from_secs_f64(self.progress.data.load(Ordering::Relaxed) as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(self.begun.elapsed()).min(LOOK * 5));
        }
        self.file.read(offset, into)
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _how: Zeroing) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn trim(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        self.file.status(offset, length, most)
    }
}

/// Copies a raw image onto one that is as large and, where it was made, zero. Errors are in words.
pub(super) async fn raw(from: &Path, to: &Path, made: bool, rate: Option<u64>, told: &Told) -> Result<(), String> {
    let progress = Arc::new(Progress::default());
    let open = |path: &Path, access| File::open(path, access).map_err(|error| in_one_line(&error));
    let (file, target) = (open(from, Access::Read)?, open(to, Access::Write)?);
    let size = file.size();
    let (cancelled, begun) = (told.cancelled.clone(), Instant::now());
    let source = Source { file, cancelled, rate, begun, progress: Arc::clone(&progress) };
    let shown = Arc::clone(&progress);
    let how = How { requests: REQUESTS, target_is_zero: made };
    let mut copying = tokio::task::spawn_blocking(move || copy(&source, &target, how, &progress));
    loop {
        tokio::select! {
            copied = &mut copying => {
                let copied: Result<(), CopyError> = copied.expect("copying does not panic");
                return copied.map_err(|error| in_one_line(&error));
            }
            () = tokio::time::sleep(LOOK) => told.progress(shown.done.load(Ordering::Relaxed), size),
        }
    }
}

/// An image of a format that is not ours, or to one.
pub(super) struct Conversion<'a> {
    pub(super) from: &'a Path,
    /// None where it is found out, as QEMU would.
    pub(super) from_format: Option<&'a str>,
    pub(super) to: &'a Path,
    pub(super) to_format: &'a str,
    pub(super) to_device: bool,
    pub(super) rate: Option<u64>,
    /// For what is told of it, in bytes.
    pub(super) size: u64,
}

impl Conversion<'_> {
    /// `qemu-img` is there.
    pub(super) fn is_possible() -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join("qemu-img").is_file())
    }

    /// Has it done. Errors are in words.
    pub(super) async fn run(&self, told: &Told) -> Result<(), String> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-p", "-O", self.to_format]);
        if let Some(format) = self.from_format {
            command.args(["-f", format]);
        }
        if let Some(rate) = self.rate {
            command.args(["-r", &rate.to_string()]);
        }
        if self.to_device {
            command.arg("-n");
        }
        command.arg(self.from).arg(self.to).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let failed = |error: io::Error| format!("qemu-img cannot be used: {error}");
        let mut child = command.kill_on_drop(true).spawn().map_err(failed)?;
        let (mut said, mut errors) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let complaint = tokio::spawn(async move {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text).await;
            text
        });
        let mut buffer = [0; 256];
        loop {
            tokio::select! {
                read = said.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => break,
                    Ok(count) => {
                        if let Some(percent) = percent(&String::from_utf8_lossy(&buffer[..count])) {
                            told.progress((self.size as f64 * percent / 100.0) as u64, self.size);
                        }
                    }
                },
                () = told.cancelled.cancelled() => {
                    child.kill().await.map_err(failed)?;
                    return Err("cancelled".into());
                }
            }
        }
        if !child.wait().await.map_err(failed)?.success() {
            return Err(complaint.await.unwrap_or_default().trim().to_owned());
        }
        let to = self.to.to_owned();
        let synced = tokio::task::spawn_blocking(move || std::fs::File::open(to)?.sync_all());
        synced.await.expect("syncing does not panic").map_err(|error| format!("it cannot be put on its disk: {error}"))
    }
}

/// Of `    (12.34/100%)`, the last of them.
fn percent(text: &str) -> Option<f64> {
    let (before, _) = text.rsplit_once("/100%")?;
    before.rsplit_once('(')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_qemu_img_says_of_its_progress_is_read() {
        assert_eq!(super::percent("    (1.00/100%)\r    (12.34/100%)\r"), Some(12.34));
        assert_eq!(super::percent("qemu-img: warning"), None);
    }
}
