//! What has arrived of a guest's disks when their migration failed: kept for a day beside the name that it was to have, so that
//! another try need not have it sent again. It is compared when it is used, so it does not matter what became of it.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmferry_api::in_one_line;

use crate::error::ImageError;
use crate::host::{DiskNotes, Host, Images, beside};

/// What follows the name of a disk of which some has arrived.
const ARRIVED: &str = ".vmferry-arrived";
/// For how long it is kept.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// How often it is looked for what was kept for long enough.
const LOOK: Duration = Duration::from_secs(10 * 60);

/// Those of one VM.
pub(super) struct Parts<'a> {
    images: Images<'a>,
    notes: DiskNotes,
    vm: &'a str,
}

impl<'a> Parts<'a> {
    pub(super) fn new(host: &'a Host, vm: &'a str) -> Self {
        let images = Images::new(&host.config.name, &host.config.image_folders);
        Self { images, notes: DiskNotes::arrived(&host.config.state_dir), vm }
    }

    /// Where the one of this disk is, if there is one.
    pub(super) fn of(&self, disk: &Path) -> Option<PathBuf> {
        let part = beside(disk, ARRIVED);
        self.notes.find(self.vm, &part).map(|_| part)
    }

    /// What room it takes, in bytes.
    pub(super) fn room(&self, disk: &Path) -> u64 {
        let part = self.of(disk).and_then(|part| fs::symlink_metadata(part).ok());
        part.map_or(0, |it| room_of(&it))
    }

    pub(super) fn remove(&self, disk: &Path) -> Result<(), ImageError> {
        let part = beside(disk, ARRIVED);
        match self.notes.find(self.vm, &part) {
            Some(it) => remove(&self.images, &self.notes, &part, it),
            None => Ok(()),
        }
    }

    /// Gives what has arrived of this disk its other name; false when there is nothing in it, an earlier try has brought
    /// more, or another one would not have this much room beside it.
    pub(super) fn keep(&self, disk: &Path, file: &Metadata, room: u64) -> Result<bool, ImageError> {
        if room_of(file) <= self.room(disk) {
            return Ok(false);
        }
        self.remove(disk)?;
        let part = beside(disk, ARRIVED);
        if self.images.may_make(&part).map_or(true, |free| free < room) {
            return Ok(false);
        }
        if let Err(error) = self.notes.note_before(self.vm, &part, file) {
            tracing::warn!(vm = self.vm, %error, "cannot note what has arrived of its disk: it goes");
            return Ok(false);
        }
        self.images.put_in_place(disk, &part, None).map(|()| true)
    }
}

fn room_of(file: &Metadata) -> u64 {
    file.blocks() * 512
}

fn remove(images: &Images<'_>, notes: &DiskNotes, part: &Path, it: (u64, u64)) -> Result<(), ImageError> {
    images.remove(part, it)?;
    notes.forget(part);
    Ok(())
}

/// What was kept for long enough goes, for as long as the agent is there.
pub(crate) async fn remove_old_parts(host: Arc<Host>) {
    loop {
        let here = Arc::clone(&host);
        let removed = tokio::task::spawn_blocking(move || remove_old(&here));
        removed.await.expect("removing does not panic");
        tokio::time::sleep(LOOK).await;
    }
}

fn remove_old(host: &Host) {
    let images = Images::new(&host.config.name, &host.config.image_folders);
    let notes = DiskNotes::arrived(&host.config.state_dir);
    for (part, it) in notes.older_than(KEPT) {
        match remove(&images, &notes, &part, it) {
            Ok(()) => tracing::info!(path = %part.display(), "removed what has arrived of a disk: nobody came for it"),
            Err(error) => tracing::warn!(path = %part.display(), error = in_one_line(&error), "an old disk stays"),
        }
    }
}
