//! What is seen of libvirt's migration, by its job's figures, and what the policy has done about it, by libvirt's calls.
//!
//! libvirt has QEMU switch over by itself once what is left fits the longest downtime: so that is how the policy says when,
//! as with vmferry's own use of QEMU's engine (`engine/qemu.rs`). libvirt sets it back to what it was when the job is over,
//! if it was set within the job.

use std::time::Instant;

use vmferry_libvirt::{ConnectionError, Domain, Job, JobKind, Libvirt, Params};
use vmferry_policy::{Action, Costs, Limits, Means, Phase};
use vmferry_qemu::qmp::commands::RamInfo;

use crate::engine::meters::{Meters, Standing};
use crate::engine::{Seen, Totals};

/// As good as never: zero would mean without a last look.
const NO_SWITCHOVER_MS: u64 = 1;
/// QEMU's longest.
const LONGEST_PAUSE_MS: u64 = 2_000_000;
/// libvirt counts bandwidth in these.
const MIB: u64 = 1 << 20;
/// As good as no limit, in MiB a second, within what libvirt and QEMU can multiply.
const UNLIMITED_MIB: u64 = 1 << 30;

/// See the module's text.
pub(super) struct Steering {
    libvirt: Libvirt,
    domain: Domain,
    pub(super) limits: Limits,
    runs: bool,
    started: Option<Instant>,
    pub(super) paused_at: Option<Instant>,
    pub(super) post_copy: bool,
    meters: Meters,
    ram: RamInfo,
    disks_sent: u64,
    /// The downtime as QEMU reckons it, once it is told, in ms.
    pub(super) downtime_ms: Option<u64>,
    /// What the domain's limit of bandwidth was, in MiB a second, before it began.
    speed_before: Option<u64>,
}

impl Steering {
    /// Of a migration that is about to begin; a guest that does not run may be switched over whenever it comes to that.
    pub(super) fn new(libvirt: Libvirt, domain: Domain, limits: Limits, costs: Costs, runs: bool) -> Self {
        Self {
            libvirt,
            domain,
            limits,
            runs,
            started: None,
            paused_at: None,
            post_copy: false,
            meters: Meters::new(costs),
            ram: RamInfo::default(),
            disks_sent: 0,
            downtime_ms: None,
            speed_before: None,
        }
    }

    /// Before it begins: libvirt keeps the limit of bandwidth that a migration is begun with.
    pub(super) async fn remember_speed(&mut self) -> Result<(), ConnectionError> {
        self.speed_before = Some(self.libvirt.max_speed(&self.domain).await?);
        Ok(())
    }

    /// Its RAM is being copied.
    pub(super) fn copies_ram(&self) -> bool {
        self.started.is_some()
    }

    /// What its job tells now; none while there is none, or only its disks are copied.
    pub(super) async fn observe(&mut self) -> Result<Option<Seen>, ConnectionError> {
        let job = self.libvirt.job(&self.domain).await?;
        Ok(self.see(&job, Instant::now()))
    }

    fn see(&mut self, job: &Job, at: Instant) -> Option<Seen> {
        if job.kind != JobKind::UnderWay {
            return None;
        }
        self.disks_sent = job.stats.number("disk_processed").unwrap_or(self.disks_sent);
        let ram = ram_of(&job.stats);
        if ram.total == 0 {
            return None;
        }
        let started = *self.started.get_or_insert(at);
        let phase = match (self.post_copy, self.paused_at) {
            (true, _) => Phase::PostCopy,
            (false, Some(_)) => Phase::SwitchOver,
            (false, None) => Phase::PreCopy,
        };
        let throttle = job.stats.number("auto_converge_throttle");
        let standing = Standing { started, phase, throttle, means: Means::default(), limits: self.limits };
        self.meters.count(&ram);
        let observation = self.meters.observe(&ram, &standing, at);
        self.ram = ram;
        let last_pages = observation.remaining.time_at(observation.link_rate);
        Some(Seen {
            observation,
            ready_to_commit: false,
            complete: !self.post_copy,
            let_go: self.post_copy,
            paused_at: self.paused_at,
            last_pages,
            broken: None,
        })
    }

    /// As the copy begins: QEMU switches over only when the policy has allowed it.
    pub(super) async fn hold(&self) -> Result<(), ConnectionError> {
        match self.runs {
            true => self.libvirt.set_max_downtime(&self.domain, NO_SWITCHOVER_MS).await,
            false => Ok(()),
        }
    }

    /// Does what the policy said. To give up is its caller's.
    pub(super) async fn apply(&self, action: &Action) -> Result<(), ConnectionError> {
        let downtime = match action {
            Action::Allow(pause) => (pause.as_millis() as u64).max(NO_SWITCHOVER_MS),
            // Whatever is left fits: QEMU pauses the guest itself, and nothing of that stays when it is undone.
            Action::Pause => LONGEST_PAUSE_MS,
            Action::PostCopy => return self.libvirt.start_post_copy(&self.domain).await,
            Action::Continue | Action::Throttle(_) | Action::Pace(_) | Action::GiveUp(_) => return Ok(()),
        };
        self.libvirt.set_max_downtime(&self.domain, downtime).await
    }

    /// From now on these limits hold, and so much is sent at most, in bytes a second. What was allowed is taken back: the
    /// policy sees the change, and allows anew.
    pub(super) async fn set_limits(&mut self, limits: Limits, bandwidth: Option<u64>) -> Result<(), ConnectionError> {
        if limits.bandwidth != self.limits.bandwidth {
            let speed = bandwidth.map_or(UNLIMITED_MIB, mib);
            self.libvirt.set_max_speed(&self.domain, speed).await?;
        }
        // Before, it would be set outside of what libvirt sets back.
        if limits.downtime != self.limits.downtime && self.copies_ram() {
            self.hold().await?;
        }
        self.limits = limits;
        Ok(())
    }

    /// The domain stays here: its limit of bandwidth is as it was.
    pub(super) async fn set_back(&mut self) {
        if let Some(speed) = self.speed_before.take()
            && let Err(error) = self.libvirt.set_max_speed(&self.domain, speed).await
        {
            tracing::warn!(domain = self.domain.name, %error, "its limit of bandwidth could not be set back");
        }
    }

    /// What is known so far.
    pub(super) fn totals(&self) -> Totals {
        Totals {
            sent: self.ram.transferred + self.disks_sent,
            rounds: self.meters.rounds(),
            dirty_rate: self.meters.dirty_rate(),
            downtime_ms: self.downtime_ms,
            ..Totals::default()
        }
    }

    /// So much was sent of its RAM, in bytes.
    pub(super) fn ram_sent(&self) -> u64 {
        self.ram.transferred
    }

    /// So much was copied of its disks, in bytes.
    pub(super) fn disks_sent(&self) -> u64 {
        self.disks_sent
    }
}

/// In libvirt's unit, and never nothing, which would mean without limit.
pub(super) fn mib(bytes_a_second: u64) -> u64 {
    (bytes_a_second / MIB).max(1)
}

/// QEMU's figures, by the names that libvirt gives them.
fn ram_of(stats: &Params) -> RamInfo {
    let of = |name: &str| stats.number(name).unwrap_or(0);
    RamInfo {
        transferred: of("memory_processed"),
        remaining: of("memory_remaining"),
        total: of("memory_total"),
        duplicate: of("memory_constant"),
        normal: of("memory_normal"),
        normal_bytes: of("memory_normal_bytes"),
        dirty_pages_rate: of("memory_dirty_rate"),
        dirty_sync_count: of("memory_iteration"),
        postcopy_requests: of("memory_postcopy_requests"),
        page_size: stats.number("memory_page_size").filter(|it| *it > 0),
        ..RamInfo::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_libvirt::Param;

    #[test]
    fn a_jobs_figures_are_qemus_and_a_limit_is_never_nothing() {
        let params =
            [("memory_total", 1000), ("memory_remaining", 400), ("memory_processed", 700), ("memory_iteration", 3)];
        let ram = ram_of(&Params(params.map(|(name, value)| Param::number(name, value)).into()));
        assert_eq!((ram.total, ram.remaining, ram.transferred, ram.dirty_sync_count), (1000, 400, 700, 3));
        assert_eq!(ram.page_size, None);
        assert_eq!([mib(40 << 20), mib(1), mib((2 << 20) - 1)], [40, 1, 1]);
    }
}
