//! A VM was given away: the other host is asked to take it until it has said that it has, or that it never will. The next
//! agent goes on with that from its journal.

use std::time::Duration;

use tokio::sync::Mutex;
use vmferry_api::{Resolve, in_one_line};

use super::told::Told;
use crate::error::AgentError;
use crate::host::{DiskNotes, Host, Idle};
use crate::journal::MoveOut;
use crate::peers::{Peer, trust};

/// Between two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// Asks until there is an answer, or its user has decided. Who holds `settling` has the say.
pub(super) async fn hand_over(host: &Host, given: &MoveOut, told: &Told, settling: &Mutex<()>) {
    let mut is_told = false;
    loop {
        {
            let _say = settling.lock().await;
            if told.state().is_last() {
                return;
            }
            let settled = match ask(host, given).await {
                Ok(None) => is_there(host, given).await.map(|()| Ok(())),
                Ok(Some(why)) => is_back(host, given).await.map(|()| Err(why)),
                Err(error) => Err(error),
            };
            match settled {
                Ok(Ok(())) => {
                    tracing::info!(vm = given.vm, to = given.peer, "has moved");
                    return told.ends(&Ok(()));
                }
                Ok(Err(why)) => {
                    let message = format!("{} has not taken {}, which is here as it was: {why}", given.peer, given.vm);
                    tracing::error!("{message}");
                    return told.ends(&Err(AgentError::CopyFailed { message, cancelled: false }));
                }
                Err(error) if !is_told => {
                    is_told = true;
                    let why = in_one_line(&error);
                    tracing::warn!(vm = given.vm, to = given.peer, why, "is asked to take it until it answers");
                    told.note(format!(
                        "{} has not said that it has it ({why}); it is asked until it does.",
                        given.peer
                    ));
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// None when the other host has it; otherwise why it never will.
async fn ask(host: &Host, given: &MoveOut) -> Result<Option<String>, AgentError> {
    let taken = peer_of(host, given).await?.take_vm(given.id).await?;
    Ok((!taken.taken).then(|| taken.why.unwrap_or_default()))
}

/// Where that host is by now.
async fn peer_of(host: &Host, given: &MoveOut) -> Result<Peer, AgentError> {
    let peers = host.journal.peers().await?;
    let known = peers.iter().find(|it| it.fingerprint == given.peer_key && !it.address.is_empty());
    let address = known.map_or(&given.address, |it| &it.address);
    Ok(trust::pinned(host, address, given.peer_key))
}

/// The other host has it: nothing but its disks stays here.
async fn is_there(host: &Host, given: &MoveOut) -> Result<(), AgentError> {
    let left = DiskNotes::left(&host.config.state_dir);
    for path in &given.disks {
        if let Err(error) = left.note(&given.vm, path) {
            tracing::warn!(vm = given.vm, path = %path.display(), %error, "cannot note that it has left its disk");
        }
    }
    host.journal.vm_is_there(given).await?;
    match host.idle(&given.vm).filter(|idle| idle.record.instance == given.instance) {
        Some(idle) => host.forget_idle(&idle).await,
        None => Ok(()),
    }
}

/// The other host never had it.
async fn is_back(host: &Host, given: &MoveOut) -> Result<(), AgentError> {
    host.journal.vm_is_back(given.id).await?;
    if let Some(idle) = host.idle(&given.vm).filter(|idle| matches!(idle.why, Idle::Leaving(_))) {
        let why = idle.record.ended.clone().unwrap_or_else(|| "it does not run".into());
        host.rest(idle.record, Idle::Ended(why));
    }
    Ok(())
}

/// Its user knows where it is, as the other host does not answer.
pub(super) async fn decide(
    host: &Host,
    given: &MoveOut,
    how: Resolve,
    told: &Told,
    settling: &Mutex<()>,
) -> Result<(), AgentError> {
    let _say = settling.lock().await;
    if told.state().is_last() {
        let message = format!("nothing is in doubt about {} any more", given.vm);
        return Err(AgentError::Conflict { message, hint: None });
    }
    tracing::warn!(vm = given.vm, ?how, "its user has decided");
    match how {
        Resolve::KeepHere => {
            is_back(host, given).await?;
            told.ends(&Err(AgentError::Kept { name: given.vm.clone() }));
        }
        Resolve::ItRunsThere => {
            is_there(host, given).await?;
            told.ends(&Ok(()));
        }
    }
    Ok(())
}
