//! Disks that come with a guest: made here, written by what its source sends, and gone again if nothing comes of it.
//!
//! What was made is on a list on this host's disk before it is made, so that another agent removes it, too. The list goes
//! when the guest was set running: from then on the disks are its own, whatever becomes of it.
//!
//! Where the guest has left its disk when it was here before, that is put aside, has what need not be sent again, and goes when
//! the guest was set running. If nothing comes of the migration it is put back: so the next try has it, too.

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
use vmferry_nbd::backend::{Access, Backend, File, Zeroing};
use vmferry_nbd::carry::{Landing, land};
use vmferry_nbd::client::Remote;
use vmferry_nbd::known::{Base, Bases};
use vmferry_nbd::transmission::Extent;
use vmferry_nbd::uri::Place;
use vmferry_qemu::{EXPORT, ImageWriter, NewImage};

use super::arrival::{Arrivals, Expected};
use crate::engine::external::link_options;
use crate::error::AgentError;
use crate::host::{Host, Images, LeftDisks, write_durably};
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
}

/// What follows the name of a disk that is aside.
const ASIDE: &str = ".vmferry-left";

fn aside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ASIDE);
    path.with_file_name(name)
}

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
    for ((file, left), image) in made.into_iter().zip(images) {
        let disk: Box<dyn Backend> = match image.format.as_str() {
            "raw" => {
                // A device is as large as it is.
                if file.metadata().is_ok_and(|it| it.is_file()) {
                    file.set_len(image.size).map_err(AgentError::io(&image.path))?;
                }
                let opened = File::over(file, &image.path, Access::Write);
                Box::new(opened.map_err(|error| AgentError::Conflict { message: in_one_line(&error), hint: None })?)
            }
            _ => Box::new(Formatted::start(qemu, &host.config.run_dir, image).await?),
        };
        targets.push(Landing { disk, bases: Bases::new(left.into_iter().collect(), Arc::clone(&others)) });
    }
    Ok(targets)
}

/// Each of them, empty, and what the guest had left there.
fn make_files(
    host: &Host,
    id: Uuid,
    vm: String,
    images: &[OwnImage],
) -> Result<Vec<(fs::File, Option<Base>)>, AgentError> {
    let (mut list, at) = (List { vm, made: Vec::new() }, list_of(host, id));
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    let left = LeftDisks::new(&host.config.state_dir);
    let mut files = Vec::new();
    for image in images {
        if image.placed && fs::metadata(&image.path).is_ok_and(|it| it.file_type().is_block_device()) {
            // It was there before, and stays, whatever becomes of the guest.
            files.push((allowed.open_device(&image.path)?, None));
            continue;
        }
        let was_left = left.was_left(&list.vm, &image.path);
        let aside = aside(&image.path);
        // Where there is not room for both of them it makes room.
        let has_room = allowed.may_make(&aside).is_ok_and(|room| room >= image.allocated);
        let kept = was_left.filter(|_| has_room);
        list.made.push(MadeImage { path: image.path.clone(), device_and_inode: None, left: kept });
        write_durably(&at, &list)?;
        let mut base = None;
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
                let left = allowed.open_to_read(&aside).ok().and_then(|file| known::base_of(host, file, &aside));
                // What is where in a file of another format is for its index to tell.
                base = left.map(|it| if image.format == "raw" { it.alike() } else { it });
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
        files.push((file, base));
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

/// An image of a format that only QEMU writes, by a QEMU of its own; closed when this is dropped.
struct Formatted {
    // In the order in which they must end.
    image: Remote,
    _writer: ImageWriter,
}

impl Formatted {
    async fn start(qemu: &Path, within: &Path, image: OwnImage) -> Result<Self, AgentError> {
        let OwnImage { path, format, size, backing, .. } = image;
        let writer = ImageWriter::start(qemu, within, &NewImage { path, format, size, backing }).await?;
        let place = Place::Unix(writer.socket().into());
        let connect = move || Remote::connect(&place, None, EXPORT, 1);
        let connected = tokio::task::spawn_blocking(connect).await.expect("connecting does not panic");
        let image = connected.map_err(|error| AgentError::Conflict {
            message: format!("its disk: {}", in_one_line(&error)),
            hint: None,
        })?;
        Ok(Self { image, _writer: writer })
    }
}

impl Backend for Formatted {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.image.write(offset, bytes)
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        self.image.write_zeroes(offset, length, how)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.image.trim(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        self.image.status(offset, length, most)
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

/// The guest has run here: its disks stay, whatever becomes of it, and what it had left goes.
pub(super) fn keep(host: &Host, id: Uuid) {
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    let left = LeftDisks::new(&host.config.state_dir);
    for MadeImage { path, left: it, .. } in List::read(&list_of(host, id)).into_iter().flat_map(|list| list.made) {
        let Some(it) = it else { continue };
        left.forget(&path);
        if let Err(error) = allowed.remove(&aside(&path), it) {
            tracing::warn!(migration = %id, path = %aside(&path).display(), error = in_one_line(&error), "the old disk stays");
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

/// Nothing comes of it, and nothing uses them: they go. What is not as it was made stays.
pub(super) fn undo(host: &Host, id: Uuid) {
    let at = list_of(host, id);
    let Some(list) = List::read(&at) else { return };
    let allowed = Images::new(&host.config.name, &host.config.image_folders);
    for MadeImage { path, device_and_inode, left } in &list.made {
        // When it is not known which it was it is empty, or another's.
        let is_empty = |it: &fs::Metadata| it.is_file() && it.len() == 0;
        let known = fs::symlink_metadata(path).ok();
        let it = device_and_inode.or_else(|| known.filter(is_empty).map(|it| (it.dev(), it.ino())));
        match it.map_or(Ok(false), |it| allowed.remove(path, it)) {
            Ok(true) => {
                tracing::info!(vm = list.vm, migration = %id, path = %path.display(), "removed a disk that was made for it");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(vm = list.vm, migration = %id, error = in_one_line(&error), "a disk that was made for it stays");
                return;
            }
        }
        let aside = aside(path);
        if left.is_some_and(|it| allowed.is_at(&aside, it))
            && let Err(error) = allowed.put_in_place(&aside, path, None)
        {
            tracing::error!(vm = list.vm, migration = %id, path = %aside.display(), error = in_one_line(&error), "what it had left stays aside");
            return;
        }
    }
    forget(host, id);
}

/// Undoes what an earlier agent could not any more. What the journal does not know stays.
pub(crate) async fn sweep(host: &Host) -> Result<(), AgentError> {
    for entry in fs::read_dir(folder(host)).into_iter().flatten().flatten() {
        let path = entry.path();
        let id = path.file_stem().and_then(|it| Uuid::parse_str(it.to_str()?).ok());
        let Some(id) = id.filter(|_| path.extension().is_some_and(|it| it == "json")) else { continue };
        match host.journal.row_in(id).await? {
            Some(row) if row.step == InStep::Abandoned => undo(host, id),
            Some(_) => {}
            None => {
                tracing::warn!(list = %path.display(), "disks were made for a migration that is not in the journal: they stay");
            }
        }
    }
    Ok(())
}
