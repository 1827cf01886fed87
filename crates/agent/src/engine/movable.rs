//! What the agents would move of a VM; or why they cannot.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vmferry_api::in_one_line;
use vmferry_qemu::inventory::Glimpse;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{IoLimits, Qmp, QmpError, RamBackend, RamLayout, RunState};
use vmferry_ram::{Backend, TrackingError};

use super::lending::with_userfaultfd_device;
use crate::error::AgentError;
use crate::host::{Host, Vm};

/// What the agents would move of a VM.
pub(crate) struct Movable {
    /// Its RAM.
    pub(crate) backends: Vec<Backend>,
    /// Its disks' I/O is to be drained at each scan.
    pub(crate) drains: bool,
}

/// What the agents would move of this VM; or why they cannot.
pub(crate) async fn movable(host: &Host, vm: &Vm) -> Result<Result<Movable, String>, AgentError> {
    if let Some(why) = host.external_obstacle() {
        return Ok(Err(why));
    }
    let (layout, drains) = match obstacle(&vm.qmp).await? {
        Ok(found) => found,
        Err(why) => return Ok(Err(why)),
    };
    if drains && !host.qemus.drains(vm).await {
        return Ok(Err(DIRECT_IO.into()));
    }
    Ok(Ok(Movable { backends: backends(layout), drains }))
}

/// What of a VM a migration was planned for, and may be otherwise meanwhile.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What users change while it runs.
    pub seen: Glimpse,
    /// A guest that is suspended to RAM arrives so.
    pub carries_sleep: bool,
    /// Its disks' I/O is drained at each scan.
    pub drains: bool,
    /// Limits of its disks that are ours, for as long as it is moved.
    pub(crate) slowed: Slowed,
}

/// See [`Planned::slowed`].
pub(crate) type Slowed = Arc<Mutex<BTreeMap<String, IoLimits>>>;

/// What has come up since the plan that keeps a guest from being moved, as somebody who may do so plugs something in, or
/// its guest mounts a folder that is passed through; to be asked before it is paused. In words.
pub(crate) async fn came_up(qmp: &Qmp, planned: &Planned, by_agents: bool) -> Result<Option<String>, QmpError> {
    let info = qmp.execute(commands::QueryMigrate {}).await?;
    if let Some(reasons) = info.blocked_reasons.filter(|reasons| !reasons.is_empty()) {
        return Ok(Some(format!("since it was planned, QEMU says: {}", reasons.join("; "))));
    }
    let slowed = planned.slowed.lock().expect("no holder of this lock panics").clone();
    if Glimpse::of(qmp).await? != planned.seen.clone().with_io_limits(&slowed) {
        return Ok(Some("its disks or devices were changed while it was moved".into()));
    }
    if !planned.carries_sleep && qmp.execute(commands::QueryStatus {}).await?.status == RunState::Suspended {
        return Ok(Some(FALLEN_ASLEEP.into()));
    }
    let why = match by_agents {
        true => match obstacle(qmp).await? {
            Ok((_, drains)) => (drains && !planned.drains).then(|| DIRECT_IO.to_owned()),
            Err(why) => Some(why),
        },
        false => None,
    };
    Ok(why.map(|why| format!("the agents cannot move its RAM any more: {why}")))
}

const FALLEN_ASLEEP: &str = "since it was planned, it was suspended to RAM, and would not wake up there";

/// What there is to move of its RAM from outside, and whether that takes to drain its disks' I/O; or why it cannot be.
async fn obstacle(qmp: &Qmp) -> Result<Result<(RamLayout, bool), String>, QmpError> {
    let layout = vmferry_qemu::ram_backends(qmp).await?;
    if let Some(first) = vmferry_qemu::external_obstacles(qmp, &layout).await?.into_iter().next() {
        return Ok(Err(first.to_string()));
    }
    let drains = vmferry_qemu::uses_direct_io(qmp).await?;
    Ok(Ok((layout, drains)))
}

/// What moving this RAM takes, tried out and undone. Tells whether the guest's writes can be paced, without which a
/// migration that may not use post-copy does not end whatever the guest writes; or why it cannot be moved.
pub(crate) async fn try_out(host: &Host, vm: &Vm, movable: &Movable, post_copy: bool) -> Result<bool, String> {
    let lends = host.config.lend_userfaultfd;
    let (pid, backends) = (vm.pid, movable.backends.clone());
    let trial = move || {
        vmferry_ram::can_track(pid, &backends)?;
        Ok::<_, TrackingError>(vmferry_ram::can_pace(pid))
    };
    let tried = async { tokio::task::spawn_blocking(trial).await };
    match with_userfaultfd_device(lends, &vm.qmp, pid, tried).await.expect("trying does not panic") {
        Ok(Ok(())) => Ok(true),
        Ok(Err(_)) if post_copy => Ok(false),
        Ok(Err(error)) => Err(format!("without post-copy its writes must be paced: {}", in_one_line(&error))),
        Err(error) => Err(in_one_line(&error)),
    }
}

/// A disk's controller writes into RAM when it is done, and only the beginning is noticed.
const DIRECT_IO: &str = "a disk goes around the host's cache (cache=none), and its I/O cannot be drained";

/// What there is to move.
pub(crate) async fn backends_of(vm: &Vm) -> Result<Vec<Backend>, QmpError> {
    Ok(backends(vmferry_qemu::ram_backends(&vm.qmp).await?))
}

fn backends(layout: RamLayout) -> Vec<Backend> {
    let backend = |it: RamBackend| Backend { id: it.id, size: it.size, address: it.address };
    layout.backends.into_iter().map(backend).collect()
}
