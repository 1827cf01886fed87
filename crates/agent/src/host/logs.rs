//! QEMUs' logs, which lie in memory: none may grow without bounds.

use std::sync::Arc;
use std::time::Duration;

use vmferry_qemu::log::cut;

use super::host::Host;

/// The most that is kept of one, in bytes.
const MOST: u64 = 1 << 20;
/// How often they are looked at.
const EVERY: Duration = Duration::from_secs(60);

/// Cuts them for as long as the agent lives.
pub(crate) async fn bound_logs(host: Arc<Host>) {
    loop {
        let vms = host.vms();
        let cutting = tokio::task::spawn_blocking(move || {
            for vm in vms {
                match cut(&vm.dir.join("qemu.log"), MOST) {
                    Ok(0) => {}
                    Ok(bytes) => tracing::info!(vm = vm.name(), bytes, "its QEMU's log was cut"),
                    Err(error) => tracing::warn!(vm = vm.name(), %error, "its QEMU's log cannot be cut"),
                }
            }
        });
        cutting.await.expect("cutting logs does not panic");
        tokio::time::sleep(EVERY).await;
    }
}
