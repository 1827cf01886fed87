//! All disks of a guest that is about to be paused, its own and shared ones: what this host has of them in its cache is put
//! on them before. QEMU does that when it pauses a guest, and the guest would wait for it.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;
use vmferry_qemu::written_images;

use crate::engine::disks::Mirrors;
use crate::engine::{Disks, EngineError};
use crate::host::Vm;

/// How often it is done while RAM is copied, so that little is left for the last time.
const EVERY: Duration = Duration::from_secs(1);
/// A disk that does not answer for so long is QEMU's to wait for.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module's text.
pub(super) struct AllDisks {
    /// Those that move with it.
    mirrors: Option<Arc<Mirrors>>,
    files: Arc<Vec<File>>,
    _again: AbortOnDropHandle<()>,
}

impl AllDisks {
    /// Flushes, until it is dropped, what this VM writes to, as far as it is files or block devices that this agent may
    /// open: QEMU flushes the rest alone.
    pub(super) async fn flush(vm: &Vm, mirrors: Option<Arc<Mirrors>>) -> Self {
        let images = written_images(&vm.qmp).await.unwrap_or_default();
        let paths: Vec<_> = images.into_iter().map(|image| vm.spec.cwd.join(image.file)).collect();
        let open = move || paths.iter().filter_map(|path| File::open(path).ok()).collect();
        let files = Arc::new(tokio::task::spawn_blocking(open).await.expect("opening does not panic"));
        let again = Arc::clone(&files);
        let again = tokio::spawn(async move {
            loop {
                flush(&again).await;
                tokio::time::sleep(EVERY).await;
            }
        });
        Self { mirrors, files, _again: AbortOnDropHandle::new(again) }
    }
}

#[async_trait]
impl Disks for AllDisks {
    async fn settle(&self) -> Result<(), EngineError> {
        if let Some(mirrors) = &self.mirrors {
            mirrors.settle().await?;
        }
        let _ = tokio::time::timeout(PATIENCE, flush(&self.files)).await;
        Ok(())
    }

    fn sent(&self) -> u64 {
        self.mirrors.as_ref().map_or(0, |mirrors| mirrors.sent())
    }

    async fn cut_over(&self) -> Result<(), EngineError> {
        match &self.mirrors {
            Some(mirrors) => mirrors.cut_over().await,
            None => Ok(()),
        }
    }
}

async fn flush(files: &Arc<Vec<File>>) {
    let files = Arc::clone(files);
    // What cannot be written QEMU tells the guest of.
    let sync = move || files.iter().for_each(|file| drop(file.sync_data()));
    tokio::task::spawn_blocking(sync).await.expect("flushing does not panic");
}
