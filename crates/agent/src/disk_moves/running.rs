//! The move of a disk of a VM that runs: its QEMU copies it and goes on with the copy.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_api::{DiskMoveRequest, in_one_line};
use vmferry_qemu::qmp::commands::{
    BlockNode, BlockdevReopen, QueryBlockJobs, QueryNamedBlockNodes, XDebugQueryBlockGraph,
};
use vmferry_qemu::{
    CommandLine, DiskImage, ImageWords, Qmp, QmpError, WrittenImage, disk_images, is_same_place, place_in_words,
};

use super::mirror::{self, node_of};
use super::note::{After, Known, Note};
use super::places::{Used, absolute, used};
use super::target::{Target, Wanted};
use super::told::{Told, told};
use super::trial;
use crate::error::AgentError;
use crate::host::{Host, Vm, keep_from_starting, no_such_disk, record_drift};

/// Drivers of nodes that are an image; others stand in front of one, and would be lost with it.
const IMAGES: [&str; 10] = ["raw", "qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "file", "host_device", "nbd"];

/// Between two tries to end what could not be ended.
const AGAIN: Duration = Duration::from_secs(2);

/// A move that can be.
pub(super) struct Planned {
    pub(super) vm: Arc<Vm>,
    pub(super) image: WrittenImage,
    pub(super) target: Target,
    pub(super) format: String,
    request: DiskMoveRequest,
    number: u64,
    now: BlockNode,
    words: ImageWords,
    old_nodes: Vec<String>,
    delete: Option<Known>,
}

/// Looks at everything and touches nothing.
pub(super) async fn plan(
    host: &Host,
    vm: &Arc<Vm>,
    disk: &str,
    request: DiskMoveRequest,
) -> Result<Planned, AgentError> {
    let conflict = |message: String, hint: &str| AgentError::Conflict { message, hint: Some(hint.into()) };
    let name = vm.name();
    let DiskImage { image, is_named, drive, .. } = find(name, disk, disk_images(&vm.qmp).await?)?;
    if !is_named {
        let message = format!("the device of {disk} has no id, so that the words of {name} could not follow it");
        return Err(conflict(message, "give the device an id=, and start the VM with that"));
    }
    if let Some(job) = vm.qmp.execute(QueryBlockJobs {}).await?.first() {
        let message = format!("a disk of {name} is being worked on ({}, the job {:?})", job.kind, job.device);
        return Err(conflict(message, "wait for its end, or cancel it (`block-job-cancel` in its monitor)"));
    }
    let nodes = vm.qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    let now = nodes.iter().find(|it| it.node_name == image.node).cloned();
    let now = now.ok_or_else(|| conflict(format!("QEMU does not tell of the node of {disk}"), "try again"))?;
    if now.encrypted {
        return Err(conflict(format!("{disk} is encrypted, and its copy would not be"), "move it with the VM stopped"));
    }
    if !IMAGES.contains(&now.drv.as_str()) && !["iscsi", "nfs", "rbd"].contains(&now.drv.as_str()) {
        let message = format!("{disk} is behind a {} node, which would be lost", now.drv);
        return Err(conflict(
            message,
            "have the guest use the image itself; limits can be set with block_set_io_throttle",
        ));
    }
    let argv = vm.next_argv();
    let has_its_name =
        |it: &ImageWords| it.names.iter().any(|it| *it == drive || *it == image.node || *it == image.disk);
    let said = CommandLine::parse(&argv)?.images();
    let at =
        said.iter().position(has_its_name).or_else(|| said.iter().position(|it| is_same_place(&it.file, &image.file)));
    let words = at.and_then(|at| said.into_iter().nth(at));
    let Some(words) = words else {
        let message =
            format!("nobody can tell which words of {name} say what {disk} is, so that they could not follow it");
        return Err(conflict(message, "start the VM with an id= for its -drive, or with a -blockdev and a -device"));
    };
    let source = local(vm, &image.file);
    let room = image.allocated.unwrap_or(image.size).min(image.size);
    let target = {
        let its =
            |it: &BlockNode| Used { vm: name.into(), disk: "a disk".into(), at: absolute(&it.file, &vm.spec.cwd) };
        // Words tell of other VMs, and name their disks; QEMU tells of all of its own.
        let used: Vec<Used> = used(host).into_iter().chain(nodes.iter().map(its)).collect();
        let (to, size) = (request.to.clone(), image.size);
        let check = move || Target::check(&to, &Wanted { size: Some(size), room, used: &used });
        // It may lie on storage that does not answer.
        tokio::task::spawn_blocking(check).await.expect("looking does not panic")?
    };
    let format = target.format(request.format.as_deref(), Some(&image.format))?;
    let delete = match (request.delete_source, source.as_deref().and_then(Known::of)) {
        (false, _) => None,
        (true, Some(file)) => Some(file),
        (true, None) => {
            return Err(conflict(format!("{disk} is in no file, which could be deleted"), "leave out --delete-source"));
        }
    };
    let moved = |message: String| AgentError::DiskMove { name: name.into(), disk: disk.into(), message };
    match trial::size(host, vm, &request.to, &target).await {
        Ok(Some(size)) if size < image.size => {
            return Err(moved(format!("{} has {size} bytes, and {disk} has {}", request.to, image.size)));
        }
        Ok(_) => {}
        Err(why) => return Err(moved(format!("{} cannot be used: {why}", request.to))),
    }
    let number = mirror::free_number(&vm.qmp).await?;
    let old_nodes = named_below(&vm.qmp, &image.node).await?;
    Ok(Planned { vm: Arc::clone(vm), image, target, format, request, number, now, words, old_nodes, delete })
}

/// One that the guest writes, by its name or by where it is.
pub(super) fn find(vm: &str, disk: &str, all: Vec<DiskImage>) -> Result<DiskImage, AgentError> {
    let names: Vec<String> = all.iter().map(|it| it.image.disk.clone()).collect();
    let by_name = all.iter().position(|it| it.image.disk == disk);
    let found = by_name.or_else(|| all.iter().position(|it| is_same_place(&it.image.file, disk)));
    match found.and_then(|at| all.into_iter().nth(at)) {
        Some(it) if it.read_only => Err(AgentError::Conflict {
            message: format!("{disk} is read-only"),
            hint: Some("copy the file, and change the medium in its monitor".into()),
        }),
        Some(it) => Ok(it),
        None => Err(no_such_disk(vm, disk, &names)),
    }
}

fn local(vm: &Vm, file: &str) -> Option<PathBuf> {
    let place = file.parse::<vmferry_qemu::DiskPlace>().ok()?;
    Some(vm.spec.cwd.join(place.path()?))
}

/// This node and all below it that somebody has named: QEMU removes only the others by itself.
async fn named_below(qmp: &Qmp, node: &str) -> Result<Vec<String>, QmpError> {
    let graph = qmp.execute(XDebugQueryBlockGraph {}).await?;
    let of = |name: &str| graph.nodes.iter().find(|it| it.name == name).map(|it| it.id);
    let name = |id: u64| graph.nodes.iter().find(|it| it.id == id).map(|it| it.name.clone());
    let mut waiting: VecDeque<u64> = of(node).into_iter().collect();
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    while let Some(id) = waiting.pop_front() {
        if seen.insert(id) {
            found.extend(name(id).filter(|name| !name.starts_with('#')));
            waiting.extend(graph.edges.iter().filter(|it| it.parent == id).map(|it| it.child));
        }
    }
    Ok(found)
}

impl Planned {
    /// Of the node that the disk moves to, with what was asked of it before, and so while it is copied.
    fn options(&self, size: Option<u64>) -> Value {
        let aio = self.words.aio.as_deref();
        let mut options = json!({
            "driver": self.format,
            "node-name": node_of(self.number),
            "file": self.target.options(aio),
            "cache": { "direct": self.now.cache.direct, "no-flush": self.now.cache.no_flush },
            // What is zero is to be a hole.
            "discard": "unmap",
            "detect-zeroes": "unmap",
        });
        if let Some(size) = size {
            options["size"] = json!(size);
        }
        options
    }

    /// Of it from then on, if they are others: as they were.
    fn reopened(&self, mut options: Value) -> Option<Value> {
        let discard = match self.words.discard.as_deref() {
            Some("unmap" | "on") => "unmap",
            _ => "ignore",
        };
        let zeroes = if self.now.detect_zeroes.is_empty() { "off" } else { &self.now.detect_zeroes };
        options["discard"] = json!(discard);
        options["detect-zeroes"] = json!(zeroes);
        (discard != "unmap" || zeroes != "unmap").then_some(options)
    }

    fn failed(&self, what: &str, error: &QmpError) -> AgentError {
        let why = match error {
            QmpError::Command { desc, .. } => desc.clone(),
            QmpError::Timeout { .. } => {
                format!("{}; while QEMU waits for a server its guest may stand still", in_one_line(error))
            }
            other => in_one_line(other),
        };
        self.not_moved(format!("{what}: {why}"))
    }

    fn not_moved(&self, message: String) -> AgentError {
        AgentError::DiskMove { name: self.vm.name().into(), disk: self.image.disk.clone(), message }
    }

    /// Makes and opens what it moves to.
    async fn open(&self, host: &Host, note: &mut Note) -> Result<(), AgentError> {
        let (qmp, to) = (&self.vm.qmp, &self.request.to);
        let failed = |error: QmpError| self.failed(&format!("QEMU cannot use {to}"), &error);
        if let Target::File(path) = &self.target {
            let file = note.make(host, path)?;
            if self.format == "raw" {
                file.set_len(self.image.size).map_err(AgentError::io(path))?;
            }
            give_to_qemu(&self.vm, &file).map_err(AgentError::io(path))?;
            if self.format == "qcow2" {
                let options = self.target.options(None);
                mirror::make_qcow2(qmp, self.number, &options, self.image.size).await.map_err(failed)?;
            }
        }
        let mut options = self.options(None);
        mirror::add(qmp, &options).await.map_err(failed)?;
        match mirror::size_of(qmp, &node_of(self.number)).await.map_err(failed)? {
            Some(size) if size < self.image.size => {
                let message = format!("{to} has {size} bytes, and {} has {}", self.image.disk, self.image.size);
                return Err(self.not_moved(message));
            }
            // The guest would see its disk grow.
            Some(size) if size > self.image.size => {
                mirror::remove(qmp, &node_of(self.number)).await.map_err(failed)?;
                options = self.options(Some(self.image.size));
                mirror::add(qmp, &options).await.map_err(failed)?;
            }
            _ => {}
        }
        if let Some(after) = &mut note.after {
            after.reopen = self.reopened(options);
        }
        note.write(host)
    }

    async fn copy(&self, host: &Host, note: &mut Note, told: &Told) -> Result<(), AgentError> {
        let qmp = &self.vm.qmp;
        self.open(host, note).await?;
        let failed = |error: QmpError| self.failed("the copy failed", &error);
        mirror::begin(qmp, self.number, &self.image.node, self.request.bandwidth).await.map_err(failed)?;
        let tell = |job: &vmferry_qemu::qmp::commands::JobInfo| told.progress(job.current_progress, job.total_progress);
        mirror::ready(qmp, self.number, &told.cancelled, tell).await.map_err(failed)?;
        if told.cancelled.is_cancelled() {
            return Err(cancelled(note));
        }
        note.switching = true;
        note.write(host)?;
        told.switches();
        mirror::complete(qmp, self.number, &told.cancelled).await.map_err(failed)?;
        match told.cancelled.is_cancelled() {
            true => Err(cancelled(note)),
            false => Ok(()),
        }
    }
}

fn cancelled(note: &Note) -> AgentError {
    AgentError::DiskMoveCancelled { name: note.vm.clone(), disk: note.disk.clone() }
}

/// Its QEMU may run as somebody else.
fn give_to_qemu(vm: &Vm, file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    let (own, its) = (file.metadata()?, std::fs::metadata(format!("/proc/{}", vm.pid))?);
    match (own.uid(), own.gid()) == (its.uid(), its.gid()) {
        true => Ok(()),
        false => fchown(file, Some(its.uid()), Some(its.gid())),
    }
}

/// Moves it. Its VM is claimed for that.
pub(super) async fn run(host: &Host, planned: Planned, told: &Told) -> Result<(), AgentError> {
    let vm = &planned.vm;
    let mut note = Note {
        vm: vm.name().into(),
        instance: vm.instance(),
        disk: planned.image.disk.clone(),
        from: place_in_words(&planned.image.file),
        to: planned.request.to.clone(),
        made: None,
        switching: false,
        after: Some(After {
            number: planned.number,
            reopen: None,
            old_nodes: planned.old_nodes.clone(),
            delete: planned.delete.clone(),
        }),
    };
    note.write(host)?;
    tracing::info!(vm = vm.name(), disk = note.disk, to = note.to, "a disk moves");
    let copied = planned.copy(host, &mut note, told).await;
    end(host, vm, &note, copied, told).await
}

/// Ends what was begun with a VM and is not ended: by an earlier agent, or as its QEMU did not answer. The VM is claimed for
/// that.
pub(super) async fn take_up(host: &Host, vm: &Vm) {
    let left = || Note::of(host, vm.name()).filter(|it| it.instance == vm.instance());
    while let Some(note) = left() {
        take_up_once(host, vm, &note).await;
        if left().is_some() {
            tokio::time::sleep(AGAIN).await;
        }
    }
}

async fn take_up_once(host: &Host, vm: &Vm, note: &Note) {
    let told = told(&note.vm, &note.disk, &note.from, &note.to, "");
    let message = "its agent ended meanwhile".to_owned();
    let begun = AgentError::DiskMove { name: note.vm.clone(), disk: note.disk.clone(), message };
    match end(host, vm, note, Err(begun), &told).await {
        Ok(()) => tracing::info!(vm = note.vm, disk = note.disk, to = note.to, "had moved when its agent ended"),
        Err(error) => tracing::warn!(vm = note.vm, error = in_one_line(&error), "the move of a disk was ended"),
    }
}

/// Wherever the disk is now, that is so from now on.
async fn end(host: &Host, vm: &Vm, note: &Note, copied: Result<(), AgentError>, told: &Told) -> Result<(), AgentError> {
    let Some(after) = &note.after else { return copied };
    let ended = async {
        mirror::end(&vm.qmp, after.number).await?;
        let disks = disk_images(&vm.qmp).await?;
        Ok::<_, QmpError>(disks.iter().any(|it| it.image.disk == note.disk && it.image.node == node_of(after.number)))
    };
    match ended.await {
        Ok(true) => {
            settle(host, vm, note, after, told).await;
            Ok(())
        }
        Ok(false) => {
            for node in [format!("{}-new", node_of(after.number)), node_of(after.number)] {
                if let Err(error) = mirror::remove(&vm.qmp, &node).await {
                    tracing::warn!(vm = vm.name(), %error, "what was opened for a move of its disk stays open");
                }
            }
            note.undo(host);
            Err(copied.err().unwrap_or_else(|| AgentError::DiskMove {
                name: note.vm.clone(),
                disk: note.disk.clone(),
                message: "QEMU did not go on with the copy".into(),
            }))
        }
        Err(error) if vm.qmp.is_closed() || !vm.is_alive() => {
            if note.switching {
                keep_from_starting(host, vm, undecided(note)).await;
                note.remove(host);
            } else {
                note.undo(host);
            }
            Err(copied.err().unwrap_or(AgentError::Qmp(error)))
        }
        // What was made is noted, and it is looked again until that is ended.
        Err(error) => {
            let message =
                format!("{}; what was begun is ended, or taken for done, as soon as it does", in_one_line(&error));
            Err(AgentError::DiskMoveUnclear { name: note.vm.clone(), disk: note.disk.clone(), message })
        }
    }
}

/// Nobody can tell on which of both the guest wrote last.
pub(super) fn undecided(note: &Note) -> String {
    format!(
        "its QEMU ended while {} moved from {} to {}: both are kept, and which of them is newer is for its user to see",
        note.disk, note.from, note.to
    )
}

/// The guest uses the new place: what is left of the old one goes, and the VM's record follows.
async fn settle(host: &Host, vm: &Vm, note: &Note, after: &After, told: &Told) {
    let name = vm.name();
    if let Some(options) = &after.reopen
        && let Err(error) = vm.qmp.execute(BlockdevReopen { options: vec![options.clone()] }).await
    {
        tracing::warn!(vm = name, %error, "the node of its disk keeps the options of its move");
        told.note("What it gives back is given back there (discard=unmap), until it is started again.".into());
    }
    let mut is_closed = true;
    for node in &after.old_nodes {
        match mirror::remove(&vm.qmp, node).await {
            Ok(gone) => is_closed &= gone,
            Err(error) => {
                is_closed = false;
                tracing::warn!(vm = name, node, %error, "a node of its old disk stays");
            }
        }
    }
    match record_drift(host, vm).await {
        // Where another job runs, it is followed when that has ended.
        Ok(_) => {}
        Err(error) => tracing::warn!(vm = name, error = in_one_line(&error), "its new words are not recorded yet"),
    }
    if let Some(obstacle) = vm.drift().and_then(|drift| drift.obstacles.first().cloned()) {
        told.note(format!("It cannot be started again or migrated as it is: {obstacle}."));
    }
    if let Some(old) = &after.delete {
        let path = old.path.display();
        if !is_closed || !is_unused(vm, &old.path).await {
            told.note(format!("{path} is still used, and was not deleted."));
        } else if !old.remove() {
            told.note(format!("{path} could not be deleted."));
        }
    }
    note.remove(host);
    tracing::info!(vm = name, disk = note.disk, to = note.to, "a disk has moved");
}

async fn is_unused(vm: &Vm, path: &Path) -> bool {
    let nodes = vm.qmp.execute(QueryNamedBlockNodes { flat: true }).await;
    nodes.is_ok_and(|nodes| !nodes.iter().any(|it| local(vm, &it.file).as_deref() == Some(path)))
}
