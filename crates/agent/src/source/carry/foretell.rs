//! What a domain's migration would do: as with vmferry's own VMs, but that libvirt is asked what the guest writes.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use vmferry_api::{WatchedView, Watcher, WrittenWithin};
use vmferry_libvirt::{ConnectionError, DirtyRate, Domain, Libvirt};
use vmferry_policy::queue::share;
use vmferry_policy::{BytesPerSec, Limits, Percent};
use vmferry_sim::Engine;

use super::plan::{ENGINE, Plan};
use super::run::SWITCHOVER;
use crate::error::AgentError;
use crate::host::{Host, SeenDomain};
use crate::source::forecast::Base;
use crate::source::foresee::{Seen, Subject};
use crate::source::limits::Asked;
use crate::source::watch::LEAST_BLOCK;

/// Between two questions whether QEMU has seen enough. libvirt takes seconds, and no parts of them.
const LOOK: Duration = Duration::from_millis(100);
/// How much longer than was asked for its answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

impl Plan {
    /// The most that is sent, in bytes a second, of what so many have one limit for together.
    pub(super) fn bandwidth(&self, asked: &Asked, siblings: u32) -> Option<u64> {
        let own = asked.bandwidth.map(|budget| share(BytesPerSec(budget), siblings).0);
        own.or(self.rate)
    }

    /// What is known of it, whatever the guest does.
    pub(super) fn base(&self, limits: Limits, bandwidth: Option<u64>) -> Base {
        let can_post_copy = self.post_copy_obstacle.is_none();
        let limits = if can_post_copy { limits } else { limits.without_post_copy() };
        let usual = Engine::qemu();
        let switchover = SWITCHOVER.as_secs_f64();
        Base {
            engine: Engine { switchover, post_copy: usual.post_copy.max(switchover), ..usual },
            // Slowing the guest down is not used.
            limits: Limits { bandwidth: bandwidth.map(BytesPerSec), slow: Percent(0), ..limits },
            processors: self.vcpus.into(),
            ram: self.view.ram_bytes as f64,
            resident: self.view.ram_used_bytes as f64,
            pauses_first: false,
            disks: self.disk_bytes as f64,
            running: self.runs,
            baseline: None,
        }
    }

    /// What a prediction of it is of.
    pub(super) fn subject(&self, base: &Base) -> Subject {
        Subject {
            vm: self.view.vm.clone(),
            instance: self.instance.clone(),
            peer: self.key,
            engine: ENGINE.into(),
            limits: base.limits,
            policy: None,
        }
    }
}

/// See [`crate::source::guest::dirty_rate`].
pub(crate) async fn dirty_rate(host: &Host, seen: &SeenDomain) -> Option<u64> {
    let libvirt = host.domains.libvirt()?;
    let ram = libvirt.info(&seen.domain).await.ok()?.max_memory;
    let (time, to_the_end) = (Duration::from_secs(1), CancellationToken::new());
    let seen = watch(&libvirt, (&seen.domain, ram), time, &to_the_end).await.ok()??;
    seen.0.written.first().map(|it| (it.bytes as f64 / it.ms * 1e3) as u64)
}

/// Has QEMU look for so long at a sample of the pages of a domain that has so much RAM, in bytes. Where it cannot, why is what
/// is said.
pub(super) async fn watch(
    libvirt: &Libvirt,
    (domain, ram): (&Domain, u64),
    time: Duration,
    unwanted: &CancellationToken,
) -> Result<Seen, AgentError> {
    let unknown = |why: &str| {
        let note = format!("How the guest writes is not known, and the ranges are wide: {why}.");
        Ok(Some((WatchedView::default(), vec![note])))
    };
    if time.is_zero() {
        return unknown("it was not watched");
    }
    if ram < LEAST_BLOCK {
        return unknown("QEMU looks at no RAM of less than 128 MiB");
    }
    let (begun, seconds) = (Instant::now(), time.as_secs_f64().ceil() as u32);
    let mut told = libvirt.start_dirty_rate(domain, seconds).await.map(|()| DirtyRate::NotYet);
    loop {
        match told {
            Ok(DirtyRate::Measured { rate, seconds }) => {
                let seconds = seconds.max(1);
                let written = WrittenWithin { ms: seconds as f64 * 1e3, bytes: rate.saturating_mul(seconds) };
                let ms = begun.elapsed().as_secs_f64() * 1e3;
                let view =
                    WatchedView { by: Watcher::Qemu, ms, scans: 2, written: vec![written], ..WatchedView::default() };
                return Ok(Some((view, Vec::new())));
            }
            Ok(DirtyRate::NotYet) if begun.elapsed() > time + PATIENCE => {
                return unknown(&format!("QEMU has not told for {} s", begun.elapsed().as_secs()));
            }
            Ok(DirtyRate::NotYet) => {}
            Err(ConnectionError::Refused(error)) => return unknown(&format!("libvirt: {error}")),
            Err(error) => return Err(error.into()),
        }
        if unwanted.is_cancelled() {
            return Ok(None);
        }
        tokio::time::sleep(LOOK).await;
        told = libvirt.dirty_rate(domain).await;
    }
}
