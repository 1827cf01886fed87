//! Does an empty `transaction` drain the I/O of all disks? It does in the versions known, without pausing the guest, as
//! QEMU drains before it begins any action; but nothing promises it. So it is tried, with reads that take their time.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Accel, ProbeError, with_probe};
use crate::qmp::commands::Transaction;

/// How long each read takes.
const LATENCY: Duration = Duration::from_millis(400);
/// After this some are under way.
const BEGUN: Duration = Duration::from_millis(20);

/// Whether it does, of disks that QEMU's main loop serves. (Those of I/O threads are counted alike; the trial of these is
/// a job in an I/O thread, over which 10.0.2 aborts.)
pub async fn transaction_drains(binary: &Path, within: &Path) -> Result<bool, ProbeError> {
    let accel = Accel::Tcg { why: "no guest runs".into() };
    with_probe(binary, &accel, within, async |qmp, _| {
        for (node, latency) in [("from", LATENCY), ("to", Duration::ZERO)] {
            let latency = latency.as_nanos() as u64;
            let about = json!({ "driver": "null-co", "node-name": node, "size": 8 << 20, "latency-ns": latency });
            qmp.execute_raw("blockdev-add", about).await?;
        }
        let backup = json!({ "job-id": "backup", "device": "from", "target": "to", "sync": "full" });
        qmp.execute_raw("blockdev-backup", backup).await?;
        tokio::time::sleep(BEGUN).await;
        let begun = Instant::now();
        qmp.execute(Transaction { actions: Vec::new() }).await?;
        Ok(begun.elapsed() >= LATENCY / 2)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_trial_tells_what_the_known_versions_do() {
        for qemu in crate::host::kvm_trial::tests::qemus() {
            assert!(transaction_drains(&qemu, &std::env::temp_dir()).await.unwrap(), "{}", qemu.display());
        }
    }
}
