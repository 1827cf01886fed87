//! What a domain's migration did, for its user.

use std::time::Duration;

use vmferry_api::{DiskMoved, Report};

use super::plan::{ENGINE, Plan};
use super::steering::Steering;
use crate::host::Host;
use crate::source::migration::Migration;
use crate::source::teller::Teller;

/// The report of one that has ended at its destination.
pub(super) fn report(host: &Host, migration: &Migration, teller: &Teller, plan: &Plan, steering: &Steering) -> Report {
    let (book, totals) = (teller.book(), steering.totals());
    // Where the destination's agent did not say when the guest ran there, what QEMU reckons is all there is.
    let downtime_ms = match book.downtime {
        Duration::ZERO => totals.downtime_ms.unwrap_or(0) as f64,
        downtime => downtime.as_secs_f64() * 1e3,
    };
    // libvirt tells how much it has copied of all disks together.
    let disks = plan.disks.join(", ");
    let copied = (!disks.is_empty()).then(|| steering.disks_sent());
    Report {
        id: migration.id,
        vm: migration.vm.clone(),
        from: host.config.name.clone(),
        to: plan.view.to.clone(),
        engine: ENGINE.into(),
        policy: plan.view.policy.clone(),
        post_copy: book.post_copy(),
        paused_first: false,
        total_ms: book.request.elapsed().as_secs_f64() * 1e3,
        downtime_ms,
        predicted_downtime_ms: book.predicted.map(|it| it.as_secs_f64() * 1e3),
        foretold: None,
        qemu_downtime_ms: totals.downtime_ms,
        sent: totals.sent,
        deltas: 0,
        saved_by_deltas: 0,
        drains: 0,
        longest_drain_ms: 0.0,
        faults: None,
        rounds: totals.rounds,
        dirty_rate: totals.dirty_rate,
        throttle: book.throttle,
        decisions: book.decisions.clone(),
        tuned: book.tuned.clone(),
        steps: book.times(),
        disks: copied.map(|sent| DiskMoved { disk: disks, size: sent, sent }).into_iter().collect(),
    }
}
