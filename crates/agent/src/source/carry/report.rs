//! What a domain's migration did, for its user.

use vmferry_api::{DiskMoved, Foretold, Report};

use super::plan::{ENGINE, Plan};
use super::steering::Steering;
use crate::host::Host;
use crate::source::teller::{Reported, Teller};

/// The report of one that has ended at its destination.
pub(super) fn report(
    host: &Host,
    teller: &Teller,
    plan: &Plan,
    steering: &Steering,
    foretold: Option<Foretold>,
) -> Report {
    // libvirt tells how much it has copied of all disks together.
    let disks = plan.disks.join(", ");
    let copied = (!disks.is_empty()).then(|| steering.disks_sent());
    let mut report = teller.report(Reported {
        from: &host.config.name,
        to: &plan.view.to,
        engine: ENGINE.into(),
        policy: &plan.view.policy,
        paused_first: false,
        foretold,
        totals: steering.totals(),
        disks: copied.map(|sent| DiskMoved { disk: disks, size: sent, sent }).into_iter().collect(),
    });
    report.vm.clone_from(&plan.view.vm);
    // Where the destination's agent did not say when the guest ran there, what QEMU reckons is all there is.
    if report.downtime_ms == 0.0 {
        report.downtime_ms = report.qemu_downtime_ms.unwrap_or(0) as f64;
    }
    report
}
