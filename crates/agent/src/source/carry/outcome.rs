//! Where a guest is, by the word of both libvirts: asked for when a migration did not end by their word, or nobody was
//! there to hear it.

use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_libvirt::{Domain, Libvirt, PausedWhy, RunState, State};

use crate::error::AgentError;
use crate::host::Domains;
use crate::peers::{DomainThere, Peer};

/// Between two times of asking.
const AGAIN: Duration = Duration::from_millis(500);

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// Here, as it was before; whether it runs.
    Here {
        /// It does.
        runs: bool,
    },
    /// At the destination, with all of its RAM.
    There,
    /// It runs at the destination, and its broken post-copy waits to be resumed.
    Broken,
    /// Neither libvirt has it running, or standing.
    Nowhere,
    /// Not known yet, and why.
    Unknown(String),
}

/// What is known now.
pub(super) async fn look(domains: &Domains, peer: &Peer, uuid: Uuid) -> Whereabouts {
    let here = match domains.at_hand().await {
        Ok(libvirt) => here(&libvirt, uuid).await,
        Err(error) => Err(error),
    };
    let there = peer.domain(uuid).await;
    let there_in_words = || match &there {
        Ok(DomainThere::Runs) => "at the destination it runs".to_owned(),
        Ok(DomainThere::No) => "at the destination it is not".to_owned(),
        Ok(other) => format!("at the destination it is there, but does not run ({other:?})"),
        Err(error) => format!("the destination cannot be asked: {}", in_one_line(error)),
    };
    let found = match here {
        Ok(found) => found,
        Err(error) => return Whereabouts::Unknown(format!("{}; {}", in_one_line(&error), there_in_words())),
    };
    judge(found, there.as_ref().ok().copied())
        .unwrap_or_else(|| Whereabouts::Unknown(format!("here it is {}; {}", in_words(found), there_in_words())))
}

/// How it stands here, and whether a job of it is under way; none when it has no process here.
type Here = Option<(State, bool)>;

async fn here(libvirt: &Libvirt, uuid: Uuid) -> Result<Here, AgentError> {
    let Some(domain) = libvirt.find(uuid).await? else { return Ok(None) };
    let Some(state) = libvirt.state(&domain).await?.filter(|it| it.is_active()) else { return Ok(None) };
    Ok(Some((state, has_job(libvirt, &domain).await?)))
}

async fn has_job(libvirt: &Libvirt, domain: &Domain) -> Result<bool, AgentError> {
    Ok(libvirt.job(domain).await?.is_migration_out())
}

fn in_words(here: Here) -> String {
    match here {
        None => "gone".into(),
        Some((state, true)) => format!("{}, and its migration is under way", state.in_words()),
        Some((state, false)) => state.in_words().into(),
    }
}

/// What both together mean; none when that is not told yet.
fn judge(here: Here, there: Option<DomainThere>) -> Option<Whereabouts> {
    match (here, there) {
        (Some((state, has_job)), there) => match state.run {
            RunState::Paused(PausedWhy::PostCopyFailed) => Some(Whereabouts::Broken),
            // Its libvirt ended when all but its end was done, and leaves it to others to see.
            RunState::Paused(PausedWhy::Migration) if !has_job => match there {
                Some(DomainThere::Runs | DomainThere::Stands) => Some(Whereabouts::There),
                Some(DomainThere::No) => Some(Whereabouts::Here { runs: false }),
                Some(DomainThere::Waits | DomainThere::LacksRam) | None => None,
            },
            // It is on its way, or on its way back.
            RunState::Paused(PausedWhy::Migration | PausedWhy::PostCopy) | RunState::ShutOff => None,
            _ if has_job => None,
            // Two that run there must not be: whoever says so is asked again.
            _ if there == Some(DomainThere::Runs) => None,
            RunState::Running => Some(Whereabouts::Here { runs: true }),
            RunState::Paused(PausedWhy::Other) | RunState::Other(_) => Some(Whereabouts::Here { runs: false }),
        },
        (None, Some(DomainThere::Runs | DomainThere::Stands)) => Some(Whereabouts::There),
        (None, Some(DomainThere::LacksRam)) => Some(Whereabouts::Broken),
        (None, Some(DomainThere::No)) => Some(Whereabouts::Nowhere),
        (None, Some(DomainThere::Waits) | None) => None,
    }
}

/// The same, as soon as it is known, or as it is known when its time is up.
pub(super) async fn find_out(domains: &Domains, peer: &Peer, uuid: Uuid, patience: Duration) -> Whereabouts {
    let deadline = Instant::now() + patience;
    loop {
        let found = look(domains, peer, uuid).await;
        // A domain that is nowhere may be at its end here, and not yet be running there: it is asked once more.
        let is_final = !matches!(found, Whereabouts::Unknown(_) | Whereabouts::Nowhere);
        if is_final || Instant::now() > deadline {
            return found;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(run: RunState) -> State {
        State { run, reason: 0 }
    }

    #[test]
    fn a_guest_is_where_a_libvirt_says_and_in_between_nobody_says_it_is_anywhere() {
        let runs = state(RunState::Running);
        let paused = |why| state(RunState::Paused(why));
        let here = |it| Some((it, false));
        let both = |here, there| judge(here, there);
        assert_eq!(both(here(runs), Some(DomainThere::No)), Some(Whereabouts::Here { runs: true }));
        assert_eq!(both(here(runs), None), Some(Whereabouts::Here { runs: true }), "a host that does not answer");
        assert_eq!(
            both(here(paused(PausedWhy::Other)), Some(DomainThere::No)),
            Some(Whereabouts::Here { runs: false })
        );
        assert_eq!(both(None, Some(DomainThere::Runs)), Some(Whereabouts::There));
        assert_eq!(both(None, Some(DomainThere::No)), Some(Whereabouts::Nowhere));
        assert_eq!(both(here(paused(PausedWhy::PostCopyFailed)), None), Some(Whereabouts::Broken));
        let left = here(paused(PausedWhy::Migration));
        assert_eq!(both(left, Some(DomainThere::Runs)), Some(Whereabouts::There));
        assert_eq!(both(left, Some(DomainThere::No)), Some(Whereabouts::Here { runs: false }));
        for unknown in [
            both(here(runs), Some(DomainThere::Runs)),
            both(Some((runs, true)), Some(DomainThere::Waits)),
            both(here(paused(PausedWhy::Migration)), Some(DomainThere::Waits)),
            both(Some((paused(PausedWhy::Migration), true)), Some(DomainThere::Runs)),
            both(here(paused(PausedWhy::Other)), Some(DomainThere::Runs)),
            both(here(paused(PausedWhy::PostCopy)), Some(DomainThere::Runs)),
            both(None, None),
            both(None, Some(DomainThere::Waits)),
        ] {
            assert_eq!(unknown, None);
        }
    }
}
