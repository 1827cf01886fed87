//! What QEMU is lent for a moment.

use std::fs::File;
use std::os::fd::AsFd;

use vmferry_api::in_one_line;
use vmferry_qemu::Qmp;
use vmferry_qemu::qmp::commands::{Closefd, Getfd};
use vmferry_ram::USERFAULTFD_DEVICE;

/// What QEMU calls it.
const NAME: &str = "vmferry-userfaultfd";
/// `CAP_SYS_PTRACE`, which may make one without it.
const MAY_TRACE: u64 = 1 << 19;

/// Does this while the QEMU of this process has what it takes to have the kernel wait for pages, which its user may not be
/// allowed to make by itself (`vm.unprivileged_userfaultfd`); if this host `lends` that.
pub(crate) async fn with_userfaultfd_device<T>(lends: bool, qmp: &Qmp, pid: u32, work: impl Future<Output = T>) -> T {
    let lent = lends && lend(qmp, pid).await;
    let done = work.await;
    if lent && let Err(error) = qmp.execute(Closefd { fdname: NAME.into() }).await {
        tracing::warn!(pid, error = in_one_line(&error), "what QEMU was lent it cannot give back");
    }
    done
}

async fn lend(qmp: &Qmp, pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = field.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    if capabilities & MAY_TRACE != 0 {
        return false;
    }
    let lent = async {
        let device =
            File::options().read(true).write(true).open(USERFAULTFD_DEVICE).map_err(|error| error.to_string())?;
        let keep = Getfd { fdname: NAME.into() };
        qmp.execute_with_fds(keep, &[device.as_fd()]).await.map_err(|error| in_one_line(&error))
    };
    lent.await.inspect_err(|why| tracing::debug!(pid, why, "cannot lend {USERFAULTFD_DEVICE}")).is_ok()
}
