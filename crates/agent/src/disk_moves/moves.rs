//! The moves of this host's disks: begun, looked at, cancelled; one at a time for each VM.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard};

use vmferry_api::{DiskMoveRequest, DiskMoveView, DiskView};
use vmferry_qemu::{CommandLine, disk_images, place_in_words};

use super::note::Note;
use super::places::{Used, is_free};
use super::told::{Told, told};
use super::{running, stopped};
use crate::error::AgentError;
use crate::host::{Claim, Host, Stage, Vm};

/// See the module's text.
pub(crate) struct DiskMoves {
    host: Arc<Host>,
    /// The last of each VM.
    moves: Mutex<BTreeMap<String, Arc<Told>>>,
}

/// A VM whose disk moves until this goes.
struct Moving(Arc<Vm>);

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.set_stage(Stage::Owned);
    }
}

/// The disks of a VM that have something in them, whether it runs or not.
pub(crate) async fn list(host: &Host, name: &str) -> Result<Vec<DiskView>, AgentError> {
    let vm = match host.found(name).await {
        Ok(vm) => vm,
        Err(AgentError::Ended { .. }) => return stopped_disks(host, name),
        Err(error) => return Err(error),
    };
    let view = |it: vmferry_qemu::DiskImage| DiskView {
        name: it.image.disk,
        format: Some(it.image.format),
        size: Some(it.image.size),
        allocated: it.image.allocated,
        file: place_in_words(&it.image.file),
        backing: it.image.backing.map(|(file, _)| file),
        read_only: it.read_only,
    };
    Ok(disk_images(&vm.qmp).await?.into_iter().map(view).collect())
}

fn stopped_disks(host: &Host, name: &str) -> Result<Vec<DiskView>, AgentError> {
    let idle = host.idle(name).ok_or_else(|| AgentError::UnknownVm { name: name.into() })?;
    let view = |it: vmferry_qemu::ImageWords| {
        let known = std::fs::metadata(idle.record.spec.cwd.join(&it.file)).ok().filter(std::fs::Metadata::is_file);
        let is_raw = it.format.as_deref() == Some("raw");
        DiskView {
            name: it.name,
            format: it.format,
            size: known.as_ref().filter(|_| is_raw).map(std::fs::Metadata::len),
            allocated: known.map(|it| it.blocks() * 512),
            file: place_in_words(&it.file),
            backing: None,
            read_only: it.read_only,
        }
    };
    let command = CommandLine::parse(idle.record.next_argv())?;
    Ok(command.images().into_iter().map(view).collect())
}

impl DiskMoves {
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, moves: Mutex::default() })
    }

    fn moves(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Told>>> {
        self.moves.lock().expect("no holder of this lock panics")
    }

    fn is_moving(&self, name: &str) -> bool {
        self.moves().get(name).is_some_and(|told| told.is_open())
    }

    /// From now on it is under way, unless another disk is on its way to the same place.
    fn begins(&self, name: &str, told: &Arc<Told>) -> Result<(), AgentError> {
        let mut moves = self.moves();
        let under_way = moves.values().filter(|it| it.is_open()).map(|it| it.view());
        let taken: Vec<Used> = under_way.map(|it| Used { vm: it.vm, disk: it.disk, at: it.to }).collect();
        is_free(&told.view().to, &taken)?;
        moves.insert(name.into(), Arc::clone(told));
        Ok(())
    }

    /// Plans it and begins; it goes on by itself.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        name: &str,
        disk: &str,
        request: DiskMoveRequest,
    ) -> Result<DiskMoveView, AgentError> {
        if request.bandwidth == Some(0) {
            return Err(AgentError::BadLimit {
                message: "a bandwidth of 0 moves nothing: leave it out for none".into(),
            });
        }
        let told = match self.host.found(name).await {
            Ok(vm) => self.begin_running(vm, disk, request).await?,
            Err(AgentError::Ended { .. }) => self.begin_stopped(name, disk, request).await?,
            Err(error) => return Err(error),
        };
        Ok(told.view())
    }

    async fn begin_running(
        self: &Arc<Self>,
        vm: Arc<Vm>,
        disk: &str,
        request: DiskMoveRequest,
    ) -> Result<Arc<Told>, AgentError> {
        let name = vm.name().to_owned();
        let claim = Claim::take(&vm, Stage::MovingDisk).map_err(|doing| refused(&name, &doing))?;
        let to = request.to.clone();
        let planned = running::plan(&self.host, &vm, disk, request).await?;
        let told =
            Arc::new(told(&name, &planned.image.disk, &place_in_words(&planned.image.file), &to, &planned.format));
        self.begins(&name, &told)?;
        claim.keep(Stage::MovingDisk);
        let (host, moving, theirs) = (Arc::clone(&self.host), Moving(vm), Arc::clone(&told));
        tokio::spawn(async move {
            let ended = running::run(&host, planned, &theirs).await;
            if Note::of(&host, moving.0.name()).is_some() {
                theirs.ends(&ended);
                return running::take_up(&host, &moving.0).await;
            }
            // Whoever hears of its end may go on with the VM.
            drop(moving);
            theirs.ends(&ended);
        });
        Ok(told)
    }

    async fn begin_stopped(
        self: &Arc<Self>,
        name: &str,
        disk: &str,
        request: DiskMoveRequest,
    ) -> Result<Arc<Told>, AgentError> {
        let to = request.to.clone();
        // Nobody starts it, or moves another of its disks, meanwhile.
        let held = match self.host.hold(name) {
            Ok(held) => held,
            Err(_) if self.is_moving(name) => return Err(refused(name, &Stage::MovingDisk)),
            Err(error) => return Err(error),
        };
        if self.is_moving(name) {
            return Err(refused(name, &Stage::MovingDisk));
        }
        stopped::sweep_of(&self.host, name).await?;
        let planned = stopped::plan(&self.host, name, disk, request).await?;
        let told = Arc::new(told(name, &planned.image.name, &planned.image.file, &to, &planned.format));
        self.begins(name, &told)?;
        drop(held);
        let (host, theirs, name) = (Arc::clone(&self.host), Arc::clone(&told), name.to_owned());
        tokio::spawn(async move {
            let ended = match host.hold(&name) {
                Ok(_name) => stopped::run(&host, planned, &theirs).await,
                Err(error) => Err(error),
            };
            theirs.ends(&ended);
        });
        Ok(told)
    }

    /// How far the last move of a disk is.
    pub(crate) fn view(&self, name: &str, disk: &str) -> Result<DiskMoveView, AgentError> {
        self.told(name, disk).map(|told| told.view())
    }

    /// Has it end; how, its view tells.
    pub(crate) fn cancel(&self, name: &str, disk: &str) -> Result<(), AgentError> {
        let told = self.told(name, disk)?;
        if !told.is_open() {
            return Err(none(name));
        }
        told.cancelled.cancel();
        Ok(())
    }

    fn told(&self, name: &str, disk: &str) -> Result<Arc<Told>, AgentError> {
        let is_it = |told: &Arc<Told>| {
            let view = told.view();
            view.disk == disk || view.from == disk
        };
        self.moves().get(name).filter(|told| is_it(told)).cloned().ok_or_else(|| none(name))
    }

    /// A VM was found, or started: what an earlier agent had begun with it is ended.
    pub(crate) fn taken(&self, vm: &Arc<Vm>) {
        if Note::of(&self.host, vm.name()).is_none_or(|it| it.instance != vm.instance()) {
            return;
        }
        match Claim::take(vm, Stage::MovingDisk) {
            Ok(claim) => claim.keep(Stage::MovingDisk),
            Err(stage) => {
                tracing::error!(vm = vm.name(), ?stage, "a move of its disk waits for the next agent");
                return;
            }
        }
        let (host, moving) = (Arc::clone(&self.host), Moving(Arc::clone(vm)));
        tokio::spawn(async move { running::take_up(&host, &moving.0).await });
    }
}

fn none(name: &str) -> AgentError {
    AgentError::Conflict {
        message: format!("no such disk of {name} is being moved by this agent"),
        hint: Some(format!("`vmferry disk list {name}` tells where its disks are")),
    }
}

fn refused(name: &str, doing: &Stage) -> AgentError {
    let conflict = |message: String, hint: String| AgentError::Conflict { message, hint: Some(hint) };
    match doing {
        Stage::MovingDisk => conflict(
            format!("a disk of {name} is being moved already"),
            format!("wait for it, or `vmferry disk cancel {name} DISK`"),
        ),
        Stage::Stopping => conflict(format!("{name} is being stopped"), "wait for it".into()),
        Stage::Unclear => conflict(
            format!("the guest of {name} may be another host's"),
            format!("`vmferry resolve {name}` says whose it is"),
        ),
        _ => AgentError::MigrationRuns { name: name.into() },
    }
}
