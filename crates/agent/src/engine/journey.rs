//! The folder of a VM whose RAM the agents move: where its QEMU and this agent meet.

use std::path::{Path, PathBuf};

use crate::error::AgentError;
use crate::host::{Vm, make_private_dir};

/// Where the source's QEMU and this agent meet.
pub(crate) fn sending_dir(vm: &Vm) -> PathBuf {
    vm.dir.join("ram-out")
}

/// There when the link is not encrypted.
const PLAIN: &str = "plain";

/// There while the agent has the guest paused, or is about to: else its user has paused it.
const PAUSES: &str = "pauses";

/// Says that the agent pauses the guest of this journey, or does not any more: to an agent that comes after it.
pub(crate) fn say_pauses(dir: &Path, pauses: bool) {
    let mark = dir.join(PAUSES);
    let said = match pauses {
        true => std::fs::write(&mark, ""),
        false => std::fs::remove_file(&mark),
    };
    if let Err(error) = said {
        tracing::debug!(path = %mark.display(), %error, "cannot say whether the agent pauses the guest");
    }
}

/// Whether the agent had this VM's guest paused, when it moved its RAM.
pub(crate) fn pauses(vm: &Vm) -> bool {
    sending_dir(vm).join(PAUSES).exists()
}

/// Makes the folder of one side of a journey, in place of one that another left. A new agent can tell from it that
/// there is a journey, and whether its link is plain.
pub(crate) fn make_folder(dir: &Path, plain: bool) -> Result<(), AgentError> {
    make_private_dir(dir)?;
    match plain {
        true => std::fs::write(dir.join(PLAIN), "").map_err(AgentError::io(dir)),
        false => Ok(()),
    }
}

/// Whether the link of the journey with this folder is plain.
pub(crate) fn is_plain(dir: &Path) -> bool {
    dir.join(PLAIN).exists()
}

/// This VM has no such folder any more.
pub(crate) fn forget(vm: &Vm) {
    // What is not there need not go.
    let _ = std::fs::remove_dir_all(sending_dir(vm));
}

/// Whether an agent was about to move this VM's RAM, and whether the link was plain.
pub(crate) fn is_sending(vm: &Vm) -> Option<bool> {
    let dir = sending_dir(vm);
    dir.exists().then(|| is_plain(&dir))
}
