//! A trial of the link between two agents: offering one, taking one, and running one.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;
use vmferry_api::Security;
use vmferry_api::trial::{Load, Trial, TrialResult, send, take};
use vmferry_link::{CipherSpeed, Link, Protection, SessionId, SessionKey, SessionOptions, TcpDialer, fastest_cipher};

use crate::Agent;
use crate::error::AgentError;
use crate::peer::Met;
use crate::trust::{self, Caller};

/// How many trials an agent serves at a time.
pub(crate) const MOST_TRIALS: usize = 4;

/// Asks an agent to take a trial.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialOffer {
    /// What will be tried.
    pub trial: Trial,
    /// The session of its streams.
    #[schema(value_type = String)]
    pub session: SessionId,
    /// Its key.
    #[schema(value_type = String)]
    pub key: SessionKey,
}

/// It waits for the streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialAccepted {
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
}

/// A place for one trial, for as long as it is kept.
fn take_place(agent: &Agent) -> Result<OwnedSemaphorePermit, AgentError> {
    Arc::clone(&agent.trials).try_acquire_owned().map_err(|_| AgentError::Conflict {
        message: format!("{MOST_TRIALS} trials of the link are under way here already"),
        hint: Some("try again later".into()),
    })
}

/// Another agent wants to try the link to this one.
pub(crate) fn accept(agent: &Agent, offer: TrialOffer, caller: &Caller) -> Result<TrialAccepted, AgentError> {
    let link = offer.trial.link_options(offer.session, offer.key)?;
    let protection = match offer.trial.security {
        Security::Tls => Protection::Tls(caller.key),
        Security::Plain if agent.config.security_of(caller.remote) == Security::Plain => Protection::Plain,
        Security::Plain => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused streams that are not encrypted");
            return Err(AgentError::PlainRefused { host: agent.config.name.clone() });
        }
    };
    let place = take_place(agent)?;
    let link = agent.sessions.expect(SessionOptions { link, protection })?;
    std::thread::spawn(move || {
        let _place = place;
        if let Err(error) = take(&link) {
            tracing::debug!(%error, "a trial of the link ended early");
        }
    });
    Ok(TrialAccepted { ciphers: agent.ciphers_for(caller.remote) })
}

/// Tries the link to another agent.
pub(crate) async fn run(agent: &Arc<Agent>, to: &str, trial: Trial) -> Result<TrialResult, AgentError> {
    let found = trust::find_peer(agent, to)?;
    let met = found.hello().await?;
    let peer = found.pinned_to(&met);
    if trial.security == Security::Plain && agent.config.security_of(met.ip()) != Security::Plain {
        return Err(AgentError::PlainRefused { host: agent.config.name.clone() });
    }
    let place = take_place(agent)?;
    let (session, key) = (SessionId::random(), SessionKey::random());
    let options = trial.link_options(session, key.clone())?;
    let accepted = peer.try_streams(&TrialOffer { trial: trial.clone(), session, key }).await?;
    let (dialer, security) = dialer(agent, peer.address(), &met, trial.security, &accepted.ciphers);
    let running = tokio::task::spawn_blocking(move || {
        let _place = place;
        let link = Link::connect(dialer, options)?;
        send(&link, &Load::new(trial.data), Duration::from_millis(trial.time_ms), &security)
    });
    Ok(running.await.expect("a trial does not panic")?)
}

/// What makes the streams of a link, and what protects them, in a word.
fn dialer(
    agent: &Agent,
    address: &str,
    met: &Met,
    security: Security,
    their_ciphers: &[CipherSpeed],
) -> (TcpDialer, String) {
    if security == Security::Plain {
        return (TcpDialer::plain(address), "plain".into());
    }
    let cipher = fastest_cipher(&agent.ciphers_for(met.ip()), their_ciphers);
    let word = cipher.map_or_else(|| "tls".into(), |cipher| cipher.to_string());
    (TcpDialer::tls(address, &agent.trusts.identity, met.key, cipher), word)
}
