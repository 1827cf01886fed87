//! Copy disks: those that are not shared, until what the guest writes goes along.

use std::sync::Arc;

use bytesize::ByteSize;
use vmferry_api::{DiskMoved, MigrationEvent, Progress, Step};
use vmferry_qemu::qmp::commands::MirrorSync;
use vmferry_qemu::written_images;

use super::run::Run;
use crate::engine::RamEngine;
use crate::engine::disks::{Disk, Guest, Mirrors};
use crate::error::AgentError;
use crate::host::DiskNotes;

impl Run {
    /// Copies the guest's own disks, where it has any that move with it.
    pub(super) async fn copy_disks(&mut self, engine: &mut dyn RamEngine) -> Result<(), AgentError> {
        let Some(session) = self.plan.offer.disks_session.clone() else { return Ok(()) };
        self.teller.step(Step::CopyDisks);
        let way = self.plan.protect.way_there(&self.host, &self.plan.peer, self.plan.peer_key);
        let disks = self.own_disks().await?;
        let begun = Mirrors::begin(
            Guest { qmp: &self.vm.qmp, pid: self.vm.pid, dir: &self.vm.dir },
            disks,
            way,
            session,
            self.bandwidth,
            Arc::clone(&self.plan.planned.slowed),
        );
        let mirrors = Arc::new(begun.await?);
        self.mirrors = Some(Arc::clone(&mirrors));
        let begun = std::time::Instant::now();
        loop {
            let seen = tokio::select! {
                seen = mirrors.wait() => seen?,
                () = self.migration.cancel.cancelled() => return Err(self.cancelled()),
            };
            if self.take_changes(engine, begun.elapsed()).await {
                self.expecting.is_disturbed();
            }
            if let Some(limit) = seen.slowed {
                self.migration.note(format!(
                    "The guest writes to its disks faster than they are copied: it may write {}/s until it has moved.",
                    ByteSize(limit)
                ));
            }
            self.migration.told.tell(MigrationEvent::Progress(Progress {
                step: Step::CopyDisks,
                elapsed_ms: begun.elapsed().as_millis() as u64,
                round: 0,
                total: seen.total,
                remaining: seen.remaining,
                sent: seen.sent,
                dirty_rate: 0,
                link_rate: (seen.sent as f64 / begun.elapsed().as_secs_f64().max(1e-3)) as u64,
                throttle: 0,
            }));
            if let Some(allowed) = self.limits.max_time.filter(|allowed| begun.elapsed() > *allowed) {
                let reason = format!("its disks were not copied within {} s", allowed.as_secs());
                return Err(AgentError::GaveUp { name: self.vm.name().into(), reason });
            }
            if seen.ready {
                return tokio::select! {
                    settled = mirrors.settle() => Ok(settled?),
                    () = self.migration.cancel.cancelled() => Err(self.cancelled()),
                };
            }
        }
    }

    /// As they are now.
    async fn own_disks(&self) -> Result<Vec<Disk>, AgentError> {
        let images = written_images(&self.vm.qmp).await?;
        let own = self.plan.offer.own_disks.iter().map(|there| {
            let path = self.plan.places.here(there);
            let image = images.iter().find(|image| self.vm.spec.cwd.join(&image.file) == path);
            let gone = || AgentError::NotMigratable {
                name: self.vm.name().into(),
                reason: format!("its disk {} is another one than when it was planned", path.display()),
                hint: Some("plan it again".into()),
            };
            let image = image.ok_or_else(gone)?;
            Ok(Disk {
                name: image.disk.clone(),
                node: image.node.clone(),
                size: image.size,
                sync: if image.backing.is_some() { MirrorSync::Top } else { MirrorSync::Full },
                // A device there has something on it.
                is_new: !self.plan.there.devices.contains(there),
            })
        });
        own.collect()
    }

    /// It runs elsewhere with a copy of them: should it come back, these may go.
    pub(super) fn leaves_its_disks(&self) {
        let left = DiskNotes::left(&self.host.config.state_dir);
        for there in &self.plan.offer.own_disks {
            let path = self.plan.places.here(there);
            if let Err(error) = left.note(self.vm.name(), &path) {
                tracing::warn!(vm = self.vm.name(), path = %path.display(), %error, "cannot note that it has left its disk");
            }
        }
    }

    /// What became of them, for the report.
    pub(super) fn disks_moved(&self) -> Vec<DiskMoved> {
        let moved = |(disk, size, sent)| DiskMoved { disk, size, sent };
        self.mirrors.as_ref().map(|mirrors| mirrors.sent_of_each().into_iter().map(moved).collect()).unwrap_or_default()
    }
}
