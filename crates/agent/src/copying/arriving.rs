//! Taking a copy of an image from another host.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::{Security, in_one_line};
use vmferry_link::{Link, LinkOptions, Protection, SessionOptions};
use vmferry_nbd::backend::{Access, File, OpenError, Taken};
use vmferry_nbd::known::Bases;
use vmferry_nbd::transfer::{Before, LARGEST, receive};

use super::copies::{Arrival, Copies};
use crate::engine::external::link_options;
use crate::error::{AgentError, ImageError};
use crate::host::{Host, Images, beside};
use crate::known;
use crate::peers::trust::Caller;
use crate::peers::{CopyAccepted, CopyOffer};

/// What follows the name of a copy while it is not whole.
const PART: &str = ".vmferry-part";
/// How much may be on its way on each of the link's streams, in bytes: what the source has read, and nobody has yet.
const WINDOW: usize = 8 << 20;
/// How long the end of a copy that its source has forgotten may take.
const FORGOTTEN: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(50);

/// What a copy that is to have this path is called while it is not whole.
pub(crate) fn part_of(path: &Path) -> PathBuf {
    beside(path, PART)
}

/// Another host would like to copy an image to here.
pub(crate) async fn accept(copies: &Arc<Copies>, offer: CopyOffer, caller: Caller) -> Result<CopyAccepted, AgentError> {
    let host = &copies.host;
    copies.may_arrive()?;
    if offer.size > LARGEST {
        return Err(refused(format!("a copy of {} bytes is larger than what {} takes", offer.size, host.config.name)));
    }
    let begun = Instant::now();
    let target = loop {
        let (here, path, size, update) = (Arc::clone(host), offer.path.clone(), offer.size, offer.update);
        let open = move || Target::open(&here, &path, size, update);
        match tokio::task::spawn_blocking(open).await.expect("opening does not panic")? {
            Opened::Free(target) => break target,
            Opened::Taken(part) => {
                let is_another = copies.arriving().iter().find(|it| it.part == part).is_some_and(|it| {
                    let is_forgotten = it.from == caller.key && !offer.under_way.contains(&it.id);
                    if is_forgotten {
                        it.link.give_up();
                    }
                    !is_forgotten
                });
                if is_another || begun.elapsed() > FORGOTTEN {
                    let message =
                        format!("another copy to {} is under way on {}", offer.path.display(), host.config.name);
                    return Err(AgentError::Conflict { message, hint: Some("wait for it, or cancel it".into()) });
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    let plain = offer.plain && host.config.security_of(caller.remote) == Security::Plain;
    let protection = if plain { Protection::Plain } else { Protection::Tls(caller.key) };
    let link = LinkOptions { window: WINDOW, ..link_options(offer.session, None) };
    let options = SessionOptions { link, protection };
    let link = Arc::new(host.sessions.expect(options).map_err(AgentError::Link)?);
    let arrival = Arrival { id: offer.id, from: caller.key, part: target.part_id, link: Arc::clone(&link) };
    copies.arriving().push(arrival);
    let (here, id, known) = (Arc::clone(copies), offer.id, !target.bases.is_empty());
    let take = move || {
        target.take(&link, id);
        here.arriving().retain(|it| it.id != id);
    };
    if let Err(error) = std::thread::Builder::new().name("copy".into()).spawn(take) {
        copies.arriving().retain(|it| it.id != id);
        return Err(AgentError::io("a thread")(error));
    }
    Ok(CopyAccepted { plain, known, ciphers: host.ciphers_for(caller.remote) })
}

fn refused(message: String) -> AgentError {
    AgentError::Conflict { message, hint: None }
}

enum Opened {
    Free(Box<Target>),
    /// Somebody writes to it, whose device and inode these are.
    Taken((u64, u64)),
}

/// Where a copy goes.
struct Target {
    host: Arc<Host>,
    path: PathBuf,
    part: PathBuf,
    part_id: (u64, u64),
    file: std::fs::File,
    disk: File,
    before: Before,
    /// What need not be sent.
    bases: Bases,
    /// What it replaces.
    old: Option<std::fs::Metadata>,
}

impl Target {
    fn open(host: &Arc<Host>, path: &Path, size: u64, update: bool) -> Result<Opened, AgentError> {
        let images = Images::new(&host.config.name, &host.config.image_folders);
        let older = if update { older(&images, path)? } else { none(&images, path)? };
        let part = part_of(path);
        let (file, is_new) = images.open_or_make(&part)?;
        let known = file.metadata().map_err(AgentError::io(&part))?;
        let part_id = (known.dev(), known.ino());
        // The lock first: another copy may be writing it.
        let again = file.try_clone().map_err(AgentError::io(&part))?;
        match File::over(again, &part, Access::Write) {
            Ok(locked) => drop(locked),
            Err(OpenError::Taken { source: Taken::InUse(_) | Taken::Forbidden(_), .. }) => {
                return Ok(Opened::Taken(part_id));
            }
            Err(error) => return Err(refused(in_one_line(&error))),
        }
        // Whoever had the lock before may have given it its name, or removed it.
        if !images.is_at(&part, part_id) {
            return Ok(Opened::Taken(part_id));
        }
        let cloned = is_new && older.as_ref().is_some_and(|(_, old)| rustix::fs::ioctl_ficlone(&file, old).is_ok());
        file.set_len(size).map_err(AgentError::io(&part))?;
        let again = file.try_clone().map_err(AgentError::io(&part))?;
        let disk = File::over(again, &part, Access::Write).map_err(|error| refused(in_one_line(&error)))?;
        let old = older.as_ref().map(|(_, old)| old.metadata()).transpose().map_err(AgentError::io(path))?;
        let before = match older {
            // What was cloned and is zero now is to be zero.
            Some((older, _)) if !cloned => Before::AndOlder(Box::new(older)),
            None if is_new => Before::Nothing,
            _ => Before::Something,
        };
        let bases = Bases::new(Vec::new(), known::bases(host));
        let (host, path) = (Arc::clone(host), path.to_owned());
        Ok(Opened::Free(Box::new(Self { host, path, part, part_id, file, disk, before, bases, old })))
    }

    /// Takes what comes over the link. Blocks.
    fn take(self, link: &Link, id: Uuid) {
        let path = self.path.display();
        match receive(link, &self.disk, &self.before, &self.bases, &|| self.finish()) {
            Ok(_) => tracing::info!(copy = %id, %path, "an image has arrived"),
            Err(error) => {
                tracing::warn!(copy = %id, %path, error = in_one_line(&error), "an image has not arrived");
                // What has nothing in it is of no use to the next one.
                if self.file.metadata().is_ok_and(|it| it.blocks() == 0) {
                    let _ = self.images().remove(&self.part, self.part_id);
                }
            }
        }
    }

    fn images(&self) -> Images<'_> {
        Images::new(&self.host.config.name, &self.host.config.image_folders)
    }

    /// It is whole, and takes its name.
    fn finish(&self) -> io::Result<()> {
        if let Some(old) = &self.old {
            // An agent that may not give files away leaves that to its user.
            if let Err(error) = std::os::unix::fs::fchown(&self.file, Some(old.uid()), Some(old.gid())) {
                tracing::warn!(path = %self.path.display(), %error, "the copy cannot be given to who had the old one");
            }
            self.file.set_permissions(std::fs::Permissions::from_mode(old.mode() & 0o7777))?;
        }
        self.file.sync_all()?;
        let of = self.old.as_ref().map(|old| (old.dev(), old.ino()));
        self.images().put_in_place(&self.part, &self.path, of).map_err(|error| io::Error::other(in_one_line(&error)))
    }
}

/// What is there already, if anything is, locked against guests; and its file.
fn older(images: &Images<'_>, path: &Path) -> Result<Option<(File, std::fs::File)>, AgentError> {
    let file = match images.open_file(path) {
        Ok(file) => file,
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            // So it is the folder that may be missing.
            images.may_make(path)?;
            return Ok(None);
        }
        Err(ImageError::OfAnotherKind { host, path }) => {
            let message = format!("{} on {host} is no file: nothing else becomes a copy all at once", path.display());
            return Err(AgentError::Conflict { message, hint: Some("name a file".into()) });
        }
        Err(error) => return Err(error.into()),
    };
    let again = file.try_clone().map_err(AgentError::io(path))?;
    let disk = File::over(again, path, Access::Write).map_err(|error| refused(in_one_line(&error)))?;
    Ok(Some((disk, file)))
}

/// Nothing may be there.
fn none(images: &Images<'_>, path: &Path) -> Result<Option<(File, std::fs::File)>, AgentError> {
    match images.may_make(path) {
        Ok(_) => Ok(None),
        Err(error @ ImageError::Exists { .. }) => Err(AgentError::Conflict {
            message: error.to_string(),
            hint: Some("name another place, or give --update to have it become what the source is".into()),
        }),
        Err(error) => Err(error.into()),
    }
}
