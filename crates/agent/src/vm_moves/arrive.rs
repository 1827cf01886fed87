//! A VM that does not run comes to this host.
//!
//! Before anything is copied it is written down what comes, and which files are made for it: nothing else is ever taken
//! for what it has brought, replaced, or removed.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_link::Fingerprint;

use crate::copying::part_of;
use crate::destination::could_start;
use crate::error::{AgentError, ImageError};
use crate::host::{DiskNotes, Host, Idle, Images, check_name};
use crate::journal::{Coming, ComingDisk, FileId, MoveIn, Source, Written};
use crate::peers::trust::{self, Caller};
use crate::peers::{DiskThere, MoveOffer, MoveReply, Taken};

/// Whether this host could take the VM; touches nothing.
pub(crate) async fn check(host: &Arc<Host>, offer: &MoveOffer, caller: &Caller) -> Result<MoveReply, AgentError> {
    let before = before(host, offer, caller).await?;
    is_free(host, &offer.vm.spec.name, before.is_some())?;
    let copied = before.iter().flat_map(|it| &it.coming.disks).filter(|it| is_copied(it)).map(|it| it.path.clone());
    let (unproven, own_disks) = could_start(host, &offer.vm, copied.collect()).await?;
    Ok(MoveReply { host: host.config.name.clone(), unproven, own_disks, there: Vec::new() })
}

/// What the same host had begun to bring under this name.
async fn before(host: &Host, offer: &MoveOffer, caller: &Caller) -> Result<Option<MoveIn>, AgentError> {
    check_name(&offer.vm.spec.name)?;
    let spec = &offer.vm.spec;
    if !offer.vm.stopped || spec.adopted || spec.measuring || offer.written.len() != offer.vm.own_disks.len() {
        return Err(AgentError::BadRequest { message: "this is no VM that could be moved".into(), hint: None });
    }
    let all = host.journal.moves_in().await?;
    Ok(all.into_iter().find(|it| it.coming.spec.name == spec.name && it.source.key == caller.key))
}

fn is_free(host: &Host, name: &str, is_expected: bool) -> Result<(), AgentError> {
    let is_arriving = |why: &Idle| matches!(why, Idle::Arriving(_)) && is_expected;
    let taken = host.vm(name).is_ok() || host.idle(name).is_some_and(|idle| !is_arriving(&idle.why));
    match taken {
        true => Err(AgentError::VmExists { name: name.into(), host: host.config.name.clone() }),
        false => Ok(()),
    }
}

/// Makes what its disks are copied to, and tells what is there. May be asked again, at any time before it is taken.
pub(crate) async fn begin(host: &Arc<Host>, offer: MoveOffer, caller: &Caller) -> Result<MoveReply, AgentError> {
    let name = offer.vm.spec.name.clone();
    let reply = check(host, &offer, caller).await?;
    let changed = |message: String| AgentError::Conflict { message, hint: Some("plan the move again".into()) };
    if let Some(file) = reply.unproven.first() {
        return Err(changed(format!("nothing tells that {} is the same on both hosts", file.display())));
    }
    if reply.own_disks != offer.vm.own_disks {
        return Err(changed("its disks are not where they were when it was planned".into()));
    }
    let before = before(host, &offer, caller).await?;
    // Nobody else takes the name; one that is expected has it.
    let _name = match &before {
        None => Some(host.reserve_name(&name)?),
        Some(_) => None,
    };
    is_free(host, &name, before.is_some())?;
    let source = Source { name: trust::require_peer(host, caller).await?, key: caller.key };
    let mut spec = offer.vm.spec;
    if spec.cwd.metadata().is_err() {
        // Nothing on the command line is relative to it, or it would have been missed above.
        spec.cwd = "/".into();
    }
    let here = Arc::clone(host);
    let wanted: Vec<(PathBuf, Written)> = offer.vm.own_disks.into_iter().zip(offer.written).collect();
    let known: Vec<ComingDisk> = before.map(|it| it.coming.disks).unwrap_or_default();
    let vm = name.clone();
    let make = move || {
        let one = |(path, of): (PathBuf, Written)| {
            let known = known.iter().find(|it| it.path == path);
            begin_disk(&here, &vm, path, of, known)
        };
        wanted.into_iter().map(one).collect::<Result<Vec<_>, _>>()
    };
    let begun = tokio::task::spawn_blocking(make).await.expect("making files does not panic")?;
    let (disks, there) = begun.into_iter().unzip();
    let coming = Coming { spec, autostart: offer.autostart, accelerator: offer.vm.accelerator, disks };
    let it = MoveIn { id: offer.vm.id, source, coming, taken: false };
    if !host.journal.vm_arrives(&it).await? {
        return Err(AgentError::VmExists { name, host: host.config.name.clone() });
    }
    host.rest(it.record(&host.config.vm_dir(&name)), Idle::Arriving(it.source.name));
    Ok(MoveReply { there, ..reply })
}

/// What is there of a disk, and is made for it where that is not all.
fn begin_disk(
    host: &Host,
    vm: &str,
    path: PathBuf,
    of: Written,
    known: Option<&ComingDisk>,
) -> Result<(ComingDisk, DiskThere), AgentError> {
    let images = Images::new(&host.config.name, &host.config.image_folders);
    let mut made = known.map(|it| it.made.clone()).unwrap_or_default();
    let here = file_at(&path);
    let there = match here {
        None => {
            images.may_make(&path)?;
            DiskThere::Nothing
        }
        Some(it) if made.last() == Some(&it) && known.is_some_and(|known| known.of == of) => DiskThere::Whole,
        Some(it) if made.contains(&it) || is_left(host, vm, &path) => DiskThere::Older,
        Some(_) => return Err(ImageError::Exists { host: host.config.name.clone(), path }.into()),
    };
    if there != DiskThere::Whole {
        let (part, _) = images.open_or_make(&part_of(&path))?;
        let part = id_of(&part.metadata().map_err(AgentError::io(&path))?);
        // A number that nobody has any more is given to somebody else some day.
        made.retain(|it| Some(*it) == here && *it != part);
        made.push(part);
    }
    Ok((ComingDisk { path, of, made }, there))
}

fn is_left(host: &Host, vm: &str, path: &Path) -> bool {
    DiskNotes::left(&host.config.state_dir).find(vm, path).is_some()
}

fn id_of(it: &Metadata) -> FileId {
    let born = it.created().ok().and_then(|it| it.duration_since(UNIX_EPOCH).ok());
    FileId { device: it.dev(), inode: it.ino(), born: born.map(|it| it.as_nanos() as u64) }
}

/// The file that has this name.
fn file_at(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|it| id_of(&it))
}

/// All or some of it is here.
fn is_copied(disk: &ComingDisk) -> bool {
    let is_it = |path: &Path| file_at(path).is_some_and(|it| disk.made.contains(&it));
    is_it(&disk.path) || is_it(&part_of(&disk.path))
}

/// It was given to this host: it is this host's now, if all of it is here, and never will be by this move if not. May be
/// asked again.
pub(crate) async fn take(host: &Arc<Host>, id: Uuid, key: Fingerprint) -> Result<Taken, AgentError> {
    let not = |why: String| Ok(Taken { taken: false, why: Some(why) });
    let Some(it) = host.journal.move_in(id).await? else {
        // It may be one of those that nobody knows any more.
        if host.has_unclear() {
            let what = "this host's user, who is to say whose the VMs are that were found here".into();
            return Err(AgentError::Busy { what });
        }
        return not(format!("{} does not expect it any more", host.config.name));
    };
    if it.source.key != key {
        return Err(AgentError::NotYours);
    }
    if it.taken {
        return Ok(Taken { taken: true, why: None });
    }
    let disks = it.coming.disks.clone();
    let missing = move || disks.into_iter().find(|disk| file_at(&disk.path).as_ref() != disk.made.last());
    let missing = tokio::task::spawn_blocking(missing).await.expect("looking does not panic");
    if let Some(disk) = missing {
        return not(format!("{} is not what was copied there", disk.path.display()));
    }
    let name = &it.coming.spec.name;
    let record = it.record(&host.config.vm_dir(name));
    if !host.journal.take_vm(id, &record).await? {
        return not(format!("{} does not expect it any more", host.config.name));
    }
    let left = DiskNotes::left(&host.config.state_dir);
    for disk in &it.coming.disks {
        left.forget(&disk.path);
    }
    tracing::info!(vm = name, from = it.source.name, "has come, and can be started");
    let why = record.ended.clone().unwrap_or_default();
    host.rest(record, Idle::Ended(why));
    Ok(Taken { taken: true, why: None })
}

/// Its user does not want it any more: what was copied goes. False when this VM is not on its way to here.
pub(crate) async fn give_up(host: &Arc<Host>, name: &str) -> Result<bool, AgentError> {
    let Some(idle) = host.idle(name).filter(|idle| matches!(idle.why, Idle::Arriving(_))) else { return Ok(false) };
    let Some(it) = host.journal.moves_in().await?.into_iter().find(|it| it.coming.spec.name == name) else {
        return Ok(false);
    };
    if !host.journal.give_up_vm(it.id).await? {
        return Ok(false);
    }
    let here = Arc::clone(host);
    let remove = move || {
        let images = Images::new(&here.config.name, &here.config.image_folders);
        for disk in &it.coming.disks {
            for path in [part_of(&disk.path), disk.path.clone()] {
                let Some(file) = file_at(&path).filter(|file| disk.made.contains(file)) else { continue };
                if let Err(error) = images.remove(&path, (file.device, file.inode)) {
                    tracing::error!(path = %path.display(), error = in_one_line(&error), "what was copied stays");
                }
            }
        }
    };
    tokio::task::spawn_blocking(remove).await.expect("removing does not panic");
    host.forget_idle(&idle).await.map(|()| true)
}
