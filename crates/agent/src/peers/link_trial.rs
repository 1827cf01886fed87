//! A trial of the link between two agents: offering one, taking one, and running one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use vmferry_api::trial::{Data, Load, Trial, TrialResult, send, take};
use vmferry_api::{Security, in_one_line};
use vmferry_link::{CipherSpeed, Link, Protection, SessionId, SessionKey, SessionOptions, TcpDialer, fastest_cipher};

use super::client::Met;
use super::trust::{self, Caller};
use super::wire::{TrialAccepted, TrialOffer};
use crate::error::AgentError;
use crate::host::{Host, MOST_TRIALS};

/// How long a short trial takes, in ms.
const SHORT_MS: u64 = 250;

/// A place for one trial, for as long as it is kept.
fn take_place(host: &Host) -> Result<OwnedSemaphorePermit, AgentError> {
    Arc::clone(&host.trials).try_acquire_owned().map_err(|_| AgentError::Conflict {
        message: format!("{MOST_TRIALS} trials of the link are under way here already"),
        hint: Some("try again later".into()),
    })
}

/// Another agent wants to try the link to this one.
pub(crate) fn accept(host: &Host, offer: TrialOffer, caller: &Caller) -> Result<TrialAccepted, AgentError> {
    let link = offer.trial.link_options(offer.session, offer.key)?;
    let protection = match offer.trial.security {
        Security::Tls => Protection::Tls(caller.key),
        Security::Plain if host.config.security_of(caller.remote) == Security::Plain => Protection::Plain,
        Security::Plain => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused streams that are not encrypted");
            return Err(AgentError::PlainRefused { host: host.config.name.clone() });
        }
    };
    let place = take_place(host)?;
    let link = host.sessions.expect(SessionOptions { link, protection })?;
    std::thread::spawn(move || {
        let _place = place;
        if let Err(error) = take(&link) {
            tracing::debug!(%error, "a trial of the link ended early");
        }
    });
    Ok(TrialAccepted { ciphers: host.ciphers_for(caller.remote) })
}

/// Tries the link to another agent.
pub(crate) async fn run(host: &Arc<Host>, to: &str, trial: Trial) -> Result<TrialResult, AgentError> {
    let found = trust::find_peer(host, to).await?;
    let met = found.hello().await?;
    let peer = found.pinned_to(&met);
    if trial.security == Security::Plain && host.config.security_of(met.ip()) != Security::Plain {
        return Err(AgentError::PlainRefused { host: host.config.name.clone() });
    }
    let place = take_place(host)?;
    let (session, key) = (SessionId::random(), SessionKey::random());
    let options = trial.link_options(session, key.clone())?;
    let accepted = peer.try_streams(&TrialOffer { trial: trial.clone(), session, key }).await?;
    let (dialer, security) = dialer(host, peer.address(), &met, trial.security, &accepted.ciphers);
    let running = tokio::task::spawn_blocking(move || {
        let _place = place;
        let link = Link::connect(dialer, options)?;
        send(&link, &Load::new(trial.data), Duration::from_millis(trial.time_ms), &security)
    });
    Ok(running.await.expect("a trial does not panic")?)
}

/// About how many bytes a second the link to another agent carries with so many streams, within a limit of its user's; none
/// where that could not be tried.
pub(crate) async fn rate(host: &Arc<Host>, to: &str, streams: u8, limit: Option<u64>) -> Option<u64> {
    let trial = Trial {
        security: Security::Tls,
        streams,
        packing: "none".into(),
        data: Data::Random,
        time_ms: SHORT_MS,
        rate: limit,
    };
    match run(host, to, trial).await {
        Ok(tried) => Some(tried.rate() as u64).filter(|rate| *rate > 0),
        Err(error) => {
            tracing::debug!(error = in_one_line(&error), "the link could not be tried");
            None
        }
    }
}

/// What makes the streams of a link, and what protects them, in a word.
fn dialer(
    host: &Host,
    address: &str,
    met: &Met,
    security: Security,
    their_ciphers: &[CipherSpeed],
) -> (TcpDialer, String) {
    if security == Security::Plain {
        return (TcpDialer::plain(address), "plain".into());
    }
    let cipher = fastest_cipher(&host.ciphers_for(met.ip()), their_ciphers);
    let word = cipher.map_or_else(|| "tls".into(), |cipher| cipher.to_string());
    (TcpDialer::tls(address, &host.trusts.identity, met.key, cipher), word)
}
