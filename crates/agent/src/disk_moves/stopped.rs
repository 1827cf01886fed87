//! The move of a disk of a VM that does not run: its image is copied, and the words of its command line follow.

use std::path::{Path, PathBuf};

use vmferry_api::{DiskMoveRequest, in_one_line};
use vmferry_qemu::{CommandLine, Drift, ImageWords, is_same_place};

use super::copy::{Conversion, raw};
use super::note::{Known, Note};
use super::places::used;
use super::running::undecided;
use super::target::{Target, Wanted};
use super::told::Told;
use crate::error::AgentError;
use crate::host::{Host, Idle, IdleVm, no_such_disk};
use crate::journal::VmRecord;

/// A move that can be.
pub(super) struct Planned {
    pub(super) image: ImageWords,
    pub(super) format: String,
    idle: IdleVm,
    source: PathBuf,
    target: Target,
    request: DiskMoveRequest,
    /// In bytes; that of its file where the format is not known here.
    size: u64,
    argv: Vec<String>,
}

/// Looks at everything and touches nothing.
pub(super) async fn plan(host: &Host, name: &str, disk: &str, request: DiskMoveRequest) -> Result<Planned, AgentError> {
    let conflict = |message: String, hint: &str| AgentError::Conflict { message, hint: Some(hint.into()) };
    let idle = host.idle(name).filter(|it| matches!(it.why, Idle::Ended(_)));
    let idle = idle.ok_or_else(|| AgentError::UnknownVm { name: name.into() })?;
    if let Some(changed) = idle.record.changed.as_ref().filter(|it| !it.obstacles.is_empty()) {
        return Err(AgentError::Changed { name: name.into(), changes: changed.obstacles.clone() });
    }
    if idle.record.spec.adopted {
        let message = format!("{name} was started by somebody else, who alone can start it with another disk");
        return Err(conflict(message, "move its disk while it runs, or by hand"));
    }
    let command = CommandLine::parse(idle.record.next_argv())?;
    let images = command.images();
    let names: Vec<String> = images.iter().map(|it| it.name.clone()).collect();
    let is_it = |it: &ImageWords| it.names.iter().any(|it| it == disk) || is_same_place(&it.file, disk);
    let image = images.into_iter().find(is_it).ok_or_else(|| no_such_disk(name, disk, &names))?;
    if image.read_only {
        return Err(conflict(format!("{disk} is read-only"), "copy the file, and name the copy when you run the VM"));
    }
    let place = image.file.parse::<vmferry_qemu::DiskPlace>().ok();
    let source = place.as_ref().and_then(|it| it.path()).map(|path| idle.record.spec.cwd.join(path));
    let start_it = "start the VM, and move its disk then";
    let source =
        source.ok_or_else(|| conflict(format!("{disk} is at no path of this host ({})", image.file), start_it))?;
    let (to, at, is_raw) = (request.to.clone(), source.clone(), image.format.as_deref() == Some("raw"));
    let used = used(host);
    let look = move || {
        let file = vmferry_nbd::backend::File::open(&at, vmferry_nbd::backend::Access::Read);
        let size = vmferry_nbd::backend::Backend::size(
            &file.map_err(|error| AgentError::Conflict { message: in_one_line(&error), hint: None })?,
        );
        let allocated = std::fs::metadata(&at).map_err(AgentError::io(&at))?;
        let room = std::os::unix::fs::MetadataExt::blocks(&allocated).saturating_mul(512).min(size);
        let wanted = Wanted { size: is_raw.then_some(size), room, used: &used };
        Ok::<_, AgentError>((Target::check(&to, &wanted)?, size))
    };
    let (target, size) = tokio::task::spawn_blocking(look).await.expect("looking does not panic")?;
    let (path, is_device) = match &target {
        Target::File(path) => (path, false),
        Target::Device(path, _) => (path, true),
        Target::Remote(_) => {
            return Err(conflict(format!("{name} does not run, and {} is at a server", request.to), start_it));
        }
    };
    let format = target.format(request.format.as_deref(), image.format.as_deref())?;
    if (!is_raw || format != "raw") && !Conversion::is_possible() {
        let message = format!("only qemu-img copies this disk to {format}, and it is not installed");
        return Err(conflict(message, "install it (qemu-utils), or start the VM and move its disk then"));
    }
    let argv = command.with_image_at(&image, &path.display().to_string(), &format, is_device);
    let argv =
        argv.map_err(|why| conflict(format!("the words of {name} cannot follow: {why}"), "give --format raw"))?;
    Ok(Planned { image, format, idle, source, target, request, size, argv })
}

/// Moves it. Nobody starts the VM meanwhile.
pub(super) async fn run(host: &Host, planned: Planned, told: &Told) -> Result<(), AgentError> {
    let record = &planned.idle.record;
    let mut note = Note {
        vm: record.spec.name.clone(),
        instance: record.instance.clone(),
        disk: planned.image.name.clone(),
        from: planned.image.file.clone(),
        to: planned.request.to.clone(),
        made: None,
        switching: false,
        after: None,
    };
    let copied = match planned.copy(host, &mut note, told).await {
        Ok(()) => follow(host, &planned).await,
        Err(_) if told.cancelled.is_cancelled() => {
            Err(AgentError::DiskMoveCancelled { name: note.vm.clone(), disk: note.disk.clone() })
        }
        Err(error) => Err(error),
    };
    if copied.is_err() {
        note.undo(host);
        return copied;
    }
    note.remove(host);
    if planned.request.delete_source && !Known::of(&planned.source).is_some_and(|it| it.remove()) {
        told.note(format!("{} could not be deleted.", planned.source.display()));
    }
    tracing::info!(vm = note.vm, disk = note.disk, to = note.to, "a disk has moved");
    Ok(())
}

impl Planned {
    async fn copy(&self, host: &Host, note: &mut Note, told: &Told) -> Result<(), AgentError> {
        let is_raw = self.image.format.as_deref() == Some("raw") && self.format == "raw";
        let (path, made) = match &self.target {
            Target::File(path) => {
                let file = note.make(host, path)?;
                if is_raw {
                    file.set_len(self.size).map_err(AgentError::io(path))?;
                }
                (path.as_path(), true)
            }
            Target::Device(path, size) => {
                if *size > self.size {
                    told.note(format!("The guest will see a disk of {size} bytes: all of {}.", path.display()));
                }
                (path.as_path(), false)
            }
            Target::Remote(_) => unreachable!("the plan refuses it"),
        };
        let copied = match is_raw {
            true => raw(&self.source, path, made, self.request.bandwidth, told).await,
            false => self.conversion(path, !made).run(told).await,
        };
        copied.map_err(|message| AgentError::DiskMove { name: note.vm.clone(), disk: note.disk.clone(), message })
    }

    fn conversion<'a>(&'a self, to: &'a Path, to_device: bool) -> Conversion<'a> {
        Conversion {
            from: &self.source,
            from_format: self.image.format.as_deref(),
            to,
            to_format: &self.format,
            to_device,
            rate: self.request.bandwidth,
            size: self.size,
        }
    }
}

/// It is started from the new place from now on.
async fn follow(host: &Host, planned: &Planned) -> Result<(), AgentError> {
    let mut record = planned.idle.record.clone();
    match &mut record.changed {
        Some(changed) => {
            changed.argv.clone_from(&planned.argv);
            changed.carried.push(format!("{} is {} now", planned.image.name, planned.request.to));
        }
        None => record.spec.argv.clone_from(&planned.argv),
    }
    host.journal.put_vm(&record).await?;
    host.rest(record, planned.idle.why.clone());
    Ok(())
}

/// Ends what earlier agents had begun with VMs that do not run; of those that do, it is ended when they are found.
pub(crate) async fn sweep(host: &Host) -> Result<(), AgentError> {
    for note in Note::all(host) {
        end(host, &note).await?;
    }
    Ok(())
}

/// The same of the VM of this name.
pub(super) async fn sweep_of(host: &Host, name: &str) -> Result<(), AgentError> {
    match Note::of(host, name) {
        Some(note) => end(host, &note).await,
        None => Ok(()),
    }
}

async fn end(host: &Host, note: &Note) -> Result<(), AgentError> {
    if note.after.is_some() && note.instance.is_alive() {
        return Ok(());
    }
    let vms = host.journal.vms().await?;
    let record = vms.iter().find(|it| it.spec.name == note.vm && it.instance == note.instance);
    match record {
        // Its words follow as soon as all is there.
        Some(record) if note.after.is_none() && uses_what_was_made(record, note) => note.remove(host),
        Some(record) if note.switching => {
            let argv = record.next_argv().to_vec();
            let unknown = Drift { argv, obstacles: vec![undecided(note)], ..Drift::default() };
            host.journal.vm_changed(&note.vm, &note.instance, Some(&unknown)).await?;
            note.remove(host);
        }
        _ => note.undo(host),
    }
    tracing::warn!(vm = note.vm, disk = note.disk, to = note.to, "a move of its disk was under way, and is ended");
    Ok(())
}

fn uses_what_was_made(record: &VmRecord, note: &Note) -> bool {
    let Some(made) = note.made.as_ref().map(|it| it.path.display().to_string()) else { return true };
    CommandLine::parse(record.next_argv()).is_ok_and(|it| it.images().iter().any(|image| image.file == made))
}
