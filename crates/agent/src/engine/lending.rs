//! What QEMU is lent for a moment.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vmferry_api::in_one_line;
use vmferry_qemu::Qmp;
use vmferry_qemu::qmp::QmpError;
use vmferry_qemu::qmp::commands::{Closefd, Getfd};
use vmferry_ram::{USERFAULTFD_DEVICE, has_cap_sys_ptrace};

/// What QEMU calls it.
const NAME: &str = "vmferry-userfaultfd";

/// What QEMU calls its end of the socket for the device state.
const STATE: &str = "vmferry-state";

/// Gives QEMU its end of a socket for the device state. Gives back where QEMU is told to send that, or to take it from.
/// By a descriptor: whoever QEMU's user is, it need not reach a folder of ours.
pub(crate) async fn give_state_socket(qmp: &Qmp, theirs: UnixStream) -> Result<String, QmpError> {
    qmp.execute_with_fds(Getfd { fdname: STATE.into() }, &[theirs.as_fd()]).await?;
    Ok(format!("fd:{STATE}"))
}

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
    // It makes one by itself.
    if has_cap_sys_ptrace(pid) {
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
