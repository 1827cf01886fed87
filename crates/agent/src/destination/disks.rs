//! Disks that come with a guest: made here, written by what its source sends, and gone again if nothing comes of it.
//!
//! What was made is on a list on this host's disk before it is made, so that another agent removes it, too. The list goes
//! when the guest was set running: from then on the disks are its own, whatever becomes of it.
//!
//! Where the guest has left its disk when it was here before, that is put aside, has what need not be sent again, and goes when
//! the guest was set running. If nothing comes of the migration it is put back: so the next try has it, too.
//!
//! What has arrived of a migration that failed is kept for a day under another name, for the next try; of one that its user
//! has cancelled nothing is kept.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_custody::InStep;
use vmferry_link::{Link, Protection, SessionOptions};
use vmferry_nbd::backend::{Access, Backend, File};
use vmferry_nbd::carry::{Landing, land};
use vmferry_nbd::known::{Base, Bases};

use super::arrival::{Arrivals, Expected};
use super::formatted::Formatted;
use super::parts::Parts;
use crate::engine::external::link_options;
use crate::error::{AgentError, ImageError};
use crate::host::{DiskNotes, Host, Images, beside, write_durably};
use crate::known;
use crate::peers::OwnImage;

#[derive(Default, Serialize, Deserialize)]
struct List {
    vm: String,
    made: Vec<MadeImage>,
}

/// One of the list: about to be made, or made as this file.
#[derive(Serialize, Deserialize)]
struct MadeImage {
    path: PathBuf,
    device_and_inode: Option<(u64, u64)>,
    /// What the guest had left there, by device and inode, and is aside.
    #[serde(default)]
    left: Option<(u64, u64)>,
    /// So much room it takes when all of it is there, in bytes.
    #[serde(default)]
    room: u64,
}

/// What follows the name of a disk that is aside.
const ASIDE: &str = ".vmferry-left";

fn folder(host: &Host) -> PathBuf {
    host.config.state_dir.join("disks-in")
}

fn list_of(host: &Host, id: Uuid) -> PathBuf {
    folder(host).join(format!("{id}.json"))
}

impl List {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }
}

/// Makes these disks, empty, other than block devices that are there, and opens them to be written, other than raw ones by
/// this QEMU; with what need not be sent for them. To be undone when that fails.
pub(super) async fn make(
    host: &Arc<Host>,
    id: Uuid,
    vm: &str,
    images: Vec<OwnImage>,
    qemu: &Path,
) -> Result<Vec<Landing>, AgentError> {
    let (here, vm, wanted) = (Arc::clone(host), vm.to_owned(), images.clone());
    let made = tokio::task::spawn_blocking(move || {
        let files = make_files(&here, id, vm, &wanted)?;
        Ok::<_, AgentError>((files, known::bases(&here)))
    });
    let (made, others) = made.await.expect("making files does not panic")?;
    let mut targets = Vec::new();
    for (Made { file, older }, image) in made.into_iter().zip(images) {
        let mut own = Vec::new();
        for older in older {
            own.extend(base(host, &older, &image.format, qemu).await);
        }
        let disk: Box<dyn Backend> = match image.format.as_str() {
            "raw" => {
                // A device is as large as it is.
                if file.metadata().is_ok_and(|it| it.is_file()) {
                    file.set_len(image.size).map_err(AgentError::io(&image.path))?;
                }
                let opened = File::over(file, &image.path, Access::Write);
                Box::new(opened.map_err(|error| AgentError::Conflict { message: in_one_line(&error), hint: None })?)
            }
            _ => Box::new(Formatted::make(qemu, &host.config.run_dir, image).await?),
        };
        targets.push(Landing { disk, bases: Bases::new(own, Arc::clone(&others)) });
    }
    Ok(targets)
}

/// An older image of the same disk: what is in the same place is likely to be the same.
async fn base(host: &Host, path: &Path, format: &str, qemu: &Path) -> Option<Base> {
    let images = Images::new(&host.config.name, &host.config.image_folders);
    let file = images.open_to_read(path).ok()?;
    if format == "raw" {
        return known::base_of(host, file, path).map(Base::alike);
    }
    match Formatted::read(qemu, &host.config.run_dir, path, format).await {
        Ok(image) => Some(Base::new(Box::new(image), None).alike()),
        Err(error) => {
            tracing::info!(path = %path.display(), error = in_one_line(&error), "what is in it is sent again");
            None
        }
    }
}

/// A file for a disk, and where older images of the same disk are.
struct Made {
    file: fs::File,
    older: Vec<PathBuf>,
}

/// Each of them, empty.
fn make_files(host: &Host, id: Uuid, vm: String, images: &[OwnImage]) -> Result<Vec<Made>, AgentError> {
    let (mut list, at) = (List { vm, made: Vec::new() }, list_of(host, id));
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    let left = DiskNotes::left(&host.config.state_dir);
    let mut files = Vec::new();
    for image in images {
        if image.placed && fs::metadata(&image.path).is_ok_and(|it| it.file_type().is_block_device()) {
            // It was there before, and stays, whatever becomes of the guest.
            files.push(Made { file: allowed.open_device(&image.path)?, older: Vec::new() });
            continue;
        }
        let (aside, parts) = (beside(&image.path, ASIDE), Parts::new(host, &list.vm));
        // Where there is not room for all of them they make room.
        let has_room = || allowed.may_make(&aside).is_ok_and(|room| room >= image.allocated);
        let mut older = Vec::new();
        if let Some(part) = parts.of(&image.path) {
            match has_room() {
                true => older.push(part),
                false => parts.remove(&image.path)?,
            }
        }
        let was_left = left.find(&list.vm, &image.path);
        let kept = was_left.filter(|_| has_room());
        list.made.push(MadeImage {
            path: image.path.clone(),
            device_and_inode: None,
            left: kept,
            room: image.allocated,
        });
        write_durably(&at, &list)?;
        match (was_left, kept) {
            (_, Some(it)) => {
                allowed.put_in_place(&image.path, &aside, None)?;
                if !allowed.is_at(&aside, it) {
                    allowed.put_in_place(&aside, &image.path, None)?;
                    return Err(AgentError::Conflict {
                        message: format!("somebody has replaced {}", image.path.display()),
                        hint: None,
                    });
                }
                older.push(aside);
            }
            (Some(it), None) => {
                allowed.remove(&image.path, it)?;
                left.forget(&image.path);
            }
            (None, None) => {}
        }
        let file = allowed.make(&image.path)?;
        let known = file.metadata().map_err(AgentError::io(&image.path))?;
        list.made.last_mut().expect("it was just put there").device_and_inode = Some((known.dev(), known.ino()));
        write_durably(&at, &list)?;
        is_whose_it_was(&file, image).map_err(AgentError::io(&image.path))?;
        files.push(Made { file, older });
    }
    Ok(files)
}

/// Its QEMU here is the same user's as there, and may do the same with it.
fn is_whose_it_was(file: &fs::File, image: &OwnImage) -> io::Result<()> {
    if let Some((user, group)) = image.owner {
        fchown(file, Some(user), Some(group))?;
    }
    match image.mode {
        Some(mode) => file.set_permissions(fs::Permissions::from_mode(mode & 0o666)),
        None => Ok(()),
    }
}

/// Takes what the source sends of them, in a thread of its own.
pub(super) fn begin(
    host: &Host,
    arrivals: &Arc<Arrivals>,
    id: Uuid,
    targets: Vec<Landing>,
    expected: Expected,
) -> Result<(), AgentError> {
    let protection = match expected.plain {
        true => Protection::Plain,
        false => Protection::Tls(expected.source),
    };
    let options = SessionOptions { link: link_options(expected.session, None), protection };
    let link: Arc<Link> = Arc::new(host.sessions.expect(options).map_err(AgentError::Link)?);
    arrivals.brings_disks(id, Arc::clone(&link));
    let there = Arc::clone(arrivals);
    let take = move || {
        match land(&link, targets) {
            Ok(()) => tracing::debug!(migration = %id, "its disks have arrived"),
            Err(error) => tracing::debug!(migration = %id, error = in_one_line(&error), "no more comes for its disks"),
        }
        there.has_disks(id);
    };
    let thread = std::thread::Builder::new().name("disks".into()).spawn(take);
    thread.map(drop).map_err(AgentError::io("a thread"))
}

/// The guest has run here: its disks stay, whatever becomes of it, and what there was of them before goes.
pub(super) fn keep(host: &Host, id: Uuid) {
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    let left = DiskNotes::left(&host.config.state_dir);
    let list = List::read(&list_of(host, id)).unwrap_or_default();
    let parts = Parts::new(host, &list.vm);
    for MadeImage { path, left: it, .. } in list.made {
        let aside = beside(&path, ASIDE);
        if it.is_some() {
            left.forget(&path);
        }
        let had_left = it.map_or(Ok(()), |it| allowed.remove(&aside, it).map(drop));
        if let Err(error) = had_left.and(parts.remove(&path)) {
            tracing::warn!(migration = %id, error = in_one_line(&error), "an old disk stays");
        }
    }
    forget(host, id);
}

fn forget(host: &Host, id: Uuid) {
    if let Err(error) = fs::remove_file(list_of(host, id))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::error!(migration = %id, %error, "the list of its new disks cannot be removed");
    }
}

/// Nothing comes of it, and nothing uses them: they go, or are `kept` for another try. What is not as it was made stays.
/// Tells how much is kept, in bytes.
pub(super) fn undo(host: &Host, id: Uuid, kept: bool) -> u64 {
    let at = list_of(host, id);
    let Some(list) = List::read(&at) else { return 0 };
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    let parts = Parts::new(host, &list.vm);
    let mut stays = 0;
    for made in &list.made {
        match undo_one(&allowed, &parts, made, kept) {
            Ok(Undone::Removed) => {
                tracing::info!(vm = list.vm, migration = %id, path = %made.path.display(), "removed a disk that was made for it");
            }
            Ok(Undone::Kept(bytes)) => {
                tracing::info!(vm = list.vm, migration = %id, path = %made.path.display(), bytes, "what has arrived of its disk is kept for a day");
                stays += bytes;
            }
            Ok(Undone::WasGone) => {}
            Err(error) => {
                tracing::error!(vm = list.vm, migration = %id, error = in_one_line(&error), "a disk that was made for it stays");
                return stays;
            }
        }
        let aside = beside(&made.path, ASIDE);
        if made.left.is_some_and(|it| allowed.is_at(&aside, it))
            && let Err(error) = allowed.put_in_place(&aside, &made.path, None)
        {
            tracing::error!(vm = list.vm, migration = %id, path = %aside.display(), error = in_one_line(&error), "what it had left stays aside");
            return stays;
        }
    }
    forget(host, id);
    stays
}

/// What there was of a disk that was made.
enum Undone {
    WasGone,
    Removed,
    /// So many bytes.
    Kept(u64),
}

fn undo_one(images: &Images<'_>, parts: &Parts<'_>, made: &MadeImage, kept: bool) -> Result<Undone, ImageError> {
    let path = &made.path;
    if !kept {
        parts.remove(path)?;
    }
    let Ok(file) = fs::symlink_metadata(path) else { return Ok(Undone::WasGone) };
    let id = (file.dev(), file.ino());
    // When it is not known which it was it is empty, or another's.
    if made.device_and_inode.map_or(!(file.is_file() && file.len() == 0), |it| it != id) {
        return Ok(Undone::WasGone);
    }
    if kept && parts.keep(path, &file, made.room)? {
        return Ok(Undone::Kept(file.blocks() * 512));
    }
    images.remove(path, id).map(|_| Undone::Removed)
}

/// Undoes what an earlier agent could not any more. What the journal does not know stays.
pub(crate) async fn sweep(host: &Host) -> Result<(), AgentError> {
    for entry in fs::read_dir(folder(host)).into_iter().flatten().flatten() {
        let path = entry.path();
        let id = path.file_stem().and_then(|it| Uuid::parse_str(it.to_str()?).ok());
        let Some(id) = id.filter(|_| path.extension().is_some_and(|it| it == "json")) else { continue };
        match host.journal.row_in(id).await? {
            Some(row) if row.step == InStep::Abandoned => drop(undo(host, id, true)),
            Some(_) => {}
            None => {
                tracing::warn!(list = %path.display(), "disks were made for a migration that is not in the journal: they stay");
            }
        }
    }
    Ok(())
}
