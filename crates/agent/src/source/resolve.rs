//! What a user decides about a guest of which the agents cannot know where it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_api::Resolve;
use vmferry_custody::source::{Event, OutStep, Phase, Refused};

use super::custody::Custody;
use super::outgoing::Outgoing;
use crate::error::AgentError;
use crate::host::{GRACE, Host, Idle, IdleVm, Stage, Vm};

/// How long it may take until what was decided is written.
const WRITTEN: Duration = Duration::from_secs(5);
/// How long it may take until nothing is left of it.
const GONE: Duration = Duration::from_secs(15);

/// Does as the user has decided about this VM.
pub(crate) async fn resolve(outgoing: &Arc<Outgoing>, name: &str, how: Resolve) -> Result<(), AgentError> {
    if let Some(custody) = outgoing.custody_of(name) {
        return decide(&custody, name, how).await;
    }
    if let Some(idle) = outgoing.host.idle(name).filter(|idle| idle.why == Idle::Unclear) {
        return silent(&outgoing.host, idle, how).await;
    }
    let vm = outgoing.host.vm(name)?;
    match vm.stage() {
        Stage::Unclear => found(&outgoing.host, &vm, how).await,
        _ => Err(no_doubt(name)),
    }
}

async fn decide(custody: &Custody, name: &str, how: Resolve) -> Result<(), AgentError> {
    let event = match how {
        Resolve::KeepHere => Event::KeepHere,
        Resolve::ItRunsThere => Event::RunsThere,
    };
    custody.apply(event).map_err(|refused| match refused {
        Refused::CannotRun => AgentError::Conflict {
            message: format!("the QEMU of {name} here has let go of its guest for post-copy, and cannot run it"),
            hint: Some(format!(
                "only its destination can; `vmferry resolve {name} --it-runs-there` ends the QEMU here"
            )),
        },
        Refused::Silent => AgentError::Busy { what: format!("the QEMU of {name}, which does not answer") },
        _ => no_doubt(name),
    })?;
    tracing::warn!(vm = name, ?how, "its user has decided");
    // A decision that is not written is none.
    let deadline = Instant::now() + WRITTEN;
    while how == Resolve::KeepHere && Instant::now() < deadline {
        let machine = custody.machine();
        match (machine.phase(), machine.row()) {
            (Phase::Owned, _) | (Phase::Undoing { .. }, Some(OutStep::KeptHere)) => return Ok(()),
            (Phase::Undoing { .. }, _) => tokio::time::sleep(Duration::from_millis(5)).await,
            _ => break,
        }
    }
    match how {
        Resolve::ItRunsThere => Ok(()),
        Resolve::KeepHere => Err(AgentError::Conflict {
            message: format!("it could not be written that {name} is kept here, so that it is not"),
            hint: Some("is the agent's disk full?".into()),
        }),
    }
}

/// One that was found running after the journal was lost.
async fn found(host: &Host, vm: &Vm, how: Resolve) -> Result<(), AgentError> {
    tracing::warn!(vm = vm.name(), ?how, "its user has decided");
    match how {
        Resolve::KeepHere => {
            host.journal.put_vm(&vm.record()).await?;
            vm.set_stage(Stage::Owned);
            Ok(())
        }
        Resolve::ItRunsThere => {
            // Nobody else says how it ended.
            vm.set_stage(Stage::Stopping);
            vm.quit().await;
            host.forget_vm(vm).await
        }
    }
}

/// The same, of one that does not answer.
async fn silent(host: &Host, idle: IdleVm, how: Resolve) -> Result<(), AgentError> {
    match how {
        Resolve::KeepHere => {
            Err(AgentError::Busy { what: format!("the QEMU of {}, which does not answer", idle.record.spec.name) })
        }
        Resolve::ItRunsThere => {
            idle.record.instance.end(GRACE).await;
            host.forget_idle(&idle).await
        }
    }
}

/// What is left of a guest that is stranded goes. False when this VM is not.
pub(crate) async fn discard(outgoing: &Outgoing, name: &str) -> bool {
    let Some(custody) = outgoing.custody_of(name) else { return false };
    if !matches!(custody.phase(), Phase::Stranded { .. }) || custody.apply(Event::Discard).is_err() {
        return false;
    }
    let deadline = Instant::now() + GONE;
    while outgoing.is_driven(&custody) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

fn no_doubt(name: &str) -> AgentError {
    AgentError::Conflict {
        message: format!("nothing is in doubt about {name}"),
        hint: Some(format!("`vmferry show {name}` tells how it stands")),
    }
}
