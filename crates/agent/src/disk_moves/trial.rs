//! A look at what a server has, before the QEMU of a guest opens it: QEMU waits for a server that does not answer with all of
//! its guest.

use std::time::Duration;

use vmferry_api::in_one_line;
use vmferry_nbd::client::look;
use vmferry_nbd::uri::Uri;
use vmferry_qemu::{ProbeError, QmpError};

use super::target::Target;
use crate::error::AgentError;
use crate::host::{Host, Vm};

/// How long an NBD server may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The size of what is there, in bytes, where that is told; why it cannot be used, in words.
pub(super) async fn size(host: &Host, vm: &Vm, to: &str, target: &Target) -> Result<Option<u64>, String> {
    match (target, to.parse::<Uri>()) {
        // It may have one client in all: its size is told without being that.
        (Target::Remote(_), Ok(uri)) => {
            let looking = tokio::task::spawn_blocking(move || look(&uri.place, None, &uri.export));
            match tokio::time::timeout(PATIENCE, looking).await {
                Ok(looked) => match looked.expect("looking does not panic") {
                    Ok(session) => Ok(Some(session.export.size)),
                    Err(error) => Err(in_one_line(&error)),
                },
                Err(_) => Err(no_answer(PATIENCE)),
            }
        }
        (Target::Remote(options), Err(_)) => match host.qemus.try_node(vm, options).await {
            Ok(size) => Ok(size),
            Err(AgentError::Probe(ProbeError::Qmp { source: QmpError::Command { desc, .. }, .. })) => Err(desc),
            Err(AgentError::Probe(ProbeError::Timeout { after, .. })) => Err(no_answer(after)),
            Err(error) => Err(in_one_line(&error)),
        },
        (Target::File(_), _) => Ok(None),
        (Target::Device(_, size), _) => Ok(Some(*size)),
    }
}

fn no_answer(after: Duration) -> String {
    format!("the server did not answer within {after:?}")
}
