//! How fast a guest writes, before its migration: by QEMU's own sampling of some pages (`calc-dirty-rate`, since 5.2), which
//! costs the guest next to nothing and is good enough to tell a quiet one from a loud one.

use std::time::Duration;

use serde_json::json;
use vmferry_qemu::Qmp;

/// For how long QEMU samples, in seconds.
const SAMPLED: u64 = 1;
/// How often it is asked whether it is done, and between that.
const LOOKS: u32 = 30;
const LOOK: Duration = Duration::from_millis(100);

/// In bytes a second; none where QEMU cannot tell.
pub(super) async fn dirty_rate(qmp: &Qmp) -> Option<u64> {
    qmp.execute_raw("calc-dirty-rate", json!({ "calc-time": SAMPLED })).await.ok()?;
    for _ in 0..LOOKS {
        tokio::time::sleep(LOOK).await;
        let told = qmp.execute_raw("query-dirty-rate", json!({})).await.ok()?;
        if told["status"] == "measured" {
            return told["dirty-rate"].as_u64().map(|mib| mib << 20);
        }
    }
    None
}
