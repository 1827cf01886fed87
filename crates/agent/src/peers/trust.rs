//! Whom this host trusts: pairing, and finding a peer by its name or address.
//!
//! Two agents are paired once, by a join token that a person carries from one to the other; from then on each knows the
//! other by the fingerprint of its certificate. Nothing else counts, neither names nor addresses.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::select_ok;
use vmferry_api::{PeerView, PeersView, TokenView};
use vmferry_link::{Fingerprint, JoinToken, Secret};

use super::client::{Met, Peer, with_port};
use super::wire::Join;
use crate::error::{AgentError, PeerError};
use crate::host::Host;
use crate::journal::{Joined, PeerRecord};

/// How long a join token may be valid, in seconds.
const TOKEN_SECONDS: std::ops::RangeInclusive<u64> = 1..=24 * 3600;
/// How many addresses a token names.
const MOST_ADDRESSES: usize = 8;
/// The longest name of a host.
const MAX_NAME: usize = 253;

/// At the other end of a connection: who, and over which addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// What it proved to be.
    pub(crate) key: Fingerprint,
    /// At which of our addresses it reached us: where its guests can reach us too.
    pub(crate) local: IpAddr,
    /// Where it is.
    pub(crate) remote: IpAddr,
    /// The number of our interface that a link-local address of it is on; 0 for other addresses.
    pub(crate) scope: u32,
    /// The authority vouches for it.
    pub(crate) vouched_for: bool,
}

/// Makes a token that lets one other agent become a peer.
pub(crate) async fn make_token(host: &Host, seconds: u64) -> Result<TokenView, AgentError> {
    if !TOKEN_SECONDS.contains(&seconds) {
        let message = format!("a token for {seconds} s makes no sense: give 1 s to 24 h");
        return Err(AgentError::BadLimit { message });
    }
    let addresses = advertised(host)?;
    let secret = Secret::random();
    host.journal.add_token(&secret.hash(), seconds).await?;
    let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() + seconds;
    let token = JoinToken { addresses, fingerprint: host.trusts.identity.fingerprint(), secret, expires };
    Ok(TokenView { token: token.to_string(), seconds })
}

/// Where others reach this agent, the likeliest first.
fn advertised(host: &Host) -> Result<Vec<String>, AgentError> {
    if !host.config.advertise.is_empty() {
        return Ok(host.config.advertise.iter().take(MOST_ADDRESSES).cloned().collect());
    }
    let listen = host.listens.ok_or_else(|| AgentError::Conflict {
        message: "this agent listens to no others, so that nobody could use a token".into(),
        hint: Some("make the token on the other host and use it here".into()),
    })?;
    if !listen.ip().is_unspecified() {
        return Ok(vec![listen.to_string()]);
    }
    let mut found = interface_addresses(listen.is_ipv6())
        .into_iter()
        .map(|address| SocketAddr::new(address, listen.port()).to_string())
        .collect::<Vec<_>>();
    found.truncate(MOST_ADDRESSES);
    match found.is_empty() {
        false => Ok(found),
        true => Err(AgentError::Conflict {
            message: "this host has no address but its loopback, so that nobody could use a token".into(),
            hint: Some("set `advertise` in the agent's configuration".into()),
        }),
    }
}

/// What other hosts may reach, IPv4 first: neither loopback nor link-local.
fn interface_addresses(with_ipv6: bool) -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let mut found: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
            v4.or_else(|| address.as_sockaddr_in6().filter(|_| with_ipv6).map(|it| IpAddr::from(it.ip())))
        })
        .filter(|address| {
            let is_link_local = match address {
                IpAddr::V4(v4) => v4.is_link_local(),
                IpAddr::V6(v6) => v6.is_unicast_link_local(),
            };
            !address.is_loopback() && !is_link_local
        })
        .collect();
    found.sort_by_key(IpAddr::is_ipv6);
    found
}

/// Uses a token of another agent: it becomes a peer of this host, and this host one of its. `also_at` is tried first.
pub(crate) async fn pair(host: &Host, token: &str, also_at: Option<&str>) -> Result<PeerView, AgentError> {
    let bad = |error: vmferry_link::InvalidToken| AgentError::BadRequest { message: error.to_string(), hint: None };
    let token: JoinToken = token.parse().map_err(bad)?;
    if token.is_expired(SystemTime::now()) {
        return Err(bad(vmferry_link::InvalidToken::Expired));
    }
    if token.fingerprint == host.trusts.identity.fingerprint() {
        let message = "that token is this host's own: use it on the other one".into();
        return Err(AgentError::BadRequest { message, hint: None });
    }
    let candidates = also_at.map(|host| at_port_of(host, &token)).into_iter().chain(token.addresses.clone());
    let (peer, met) = reach(host, candidates, token.fingerprint).await?;
    let record =
        PeerRecord { name: met.hello.name, fingerprint: token.fingerprint, address: peer.address().into(), paired: 0 };
    // Before the token is used up.
    check_name(&record.name)?;
    if host.journal.peers().await?.iter().any(|it| it.name == record.name && it.fingerprint != record.fingerprint) {
        return Err(name_taken(&record.name));
    }
    peer.join(&token.secret, &host.config.name, host.listens.map(|listen| listen.port())).await?;
    if !host.journal.put_peer(&record).await? {
        return Err(name_taken(&record.name));
    }
    tracing::info!(peer = record.name, address = record.address, fingerprint = %record.fingerprint, "paired");
    Ok(view(record))
}

/// A host that the user named, at the port that the token names.
fn at_port_of(host: &str, token: &JoinToken) -> String {
    let port = token.addresses.iter().find_map(|address| address.rsplit_once(':')).map_or("7420", |(_, port)| port);
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

/// The first of these addresses at which that agent answers.
async fn reach(
    host: &Host,
    addresses: impl Iterator<Item = String>,
    expected: Fingerprint,
) -> Result<(Peer, Met), AgentError> {
    let tries = addresses.map(|address| {
        let peer = pinned(host, &address, expected);
        Box::pin(async move {
            let met = peer.hello().await?;
            Ok::<_, PeerError>((peer, met))
        })
    });
    Ok(select_ok(tries).await?.0)
}

/// Somebody came with a token.
pub(crate) async fn join(host: &Host, caller: &Caller, join: &Join) -> Result<(), AgentError> {
    check_name(&join.name)?;
    let unknown = || AgentError::BadToken;
    let secret: Secret = join.secret.parse().map_err(|_| unknown())?;
    let at = |port: u16| match caller.remote {
        IpAddr::V6(address) => SocketAddrV6::new(address, port, 0, caller.scope).to_string(),
        IpAddr::V4(_) => SocketAddr::new(caller.remote, port).to_string(),
    };
    let address = join.port.map_or_else(String::new, at);
    let record = PeerRecord { name: join.name.clone(), fingerprint: caller.key, address, paired: 0 };
    match host.journal.join(&secret.hash(), &record).await? {
        Joined::Yes => {
            tracing::info!(peer = record.name, address = record.address, fingerprint = %record.fingerprint, "paired");
            Ok(())
        }
        Joined::NoToken => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "came with a join token that is not valid");
            Err(unknown())
        }
        Joined::NameTaken => Err(name_taken(&record.name)),
    }
}

fn check_name(name: &str) -> Result<(), AgentError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fits) {
        let message = format!("a host cannot be called {name:?}: letters, digits, '.', '-' and '_' only");
        return Err(AgentError::BadRequest { message, hint: Some("set `name` in its agent's configuration".into()) });
    }
    Ok(())
}

fn name_taken(name: &str) -> AgentError {
    AgentError::Conflict {
        message: format!("a peer named {name} is paired already, with another key"),
        hint: Some(format!(
            "if that host was set up anew, `vmferry unpair {name}` first; else give one another `name`"
        )),
    }
}

/// This host and its peers.
pub(crate) async fn peers(host: &Host) -> Result<PeersView, AgentError> {
    Ok(PeersView {
        name: host.config.name.clone(),
        fingerprint: host.trusts.identity.fingerprint().to_string(),
        listens: host.listens.map(|listen| listen.to_string()),
        peers: host.journal.peers().await?.into_iter().map(view).collect(),
    })
}

fn view(record: PeerRecord) -> PeerView {
    PeerView {
        name: record.name,
        address: record.address,
        fingerprint: record.fingerprint.to_string(),
        paired: record.paired,
    }
}

/// Trusts a peer, by its name or fingerprint, no more. What it has under way is finished.
pub(crate) async fn unpair(host: &Host, which: &str) -> Result<(), AgentError> {
    let peers = host.journal.peers().await?;
    let found = peers.iter().find(|peer| peer.name == which || peer.fingerprint.to_string() == which);
    let peer = found.ok_or_else(|| AgentError::UnknownPeer { name: which.into() })?;
    host.journal.remove_peer(peer.fingerprint).await?;
    tracing::info!(peer = peer.name, fingerprint = %peer.fingerprint, "unpaired");
    Ok(())
}

/// Whether this is a peer, or as good as one.
pub(crate) async fn is_peer(host: &Host, caller: &Caller) -> bool {
    if caller.vouched_for || host.journal.peer(caller.key).await.is_ok_and(|peer| peer.is_some()) {
        return true;
    }
    // What began while it was one is finished.
    host.journal.is_recent_source(caller.key).await.unwrap_or(false)
}

/// Nobody but a peer; what it is called.
pub(crate) async fn require_peer(host: &Host, caller: &Caller) -> Result<String, AgentError> {
    match host.journal.peer(caller.key).await? {
        Some(peer) => Ok(peer.name),
        None if caller.vouched_for => Ok(caller.remote.to_string()),
        None => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused an agent that is not paired");
            Err(AgentError::NotPaired { host: host.config.name.clone() })
        }
    }
}

/// The agent with this key, at this address, whatever became of its pairing.
pub(crate) fn pinned(host: &Host, address: &str, key: Fingerprint) -> Peer {
    Peer::new(address, Arc::clone(&host.trusts.identity), vec![key], None)
}

/// The destination that a user names: a peer by its name, or any peer at that address.
pub(crate) async fn find_peer(host: &Host, to: &str) -> Result<Peer, AgentError> {
    let bad = |message| AgentError::BadRequest { message, hint: None };
    let peers = host.journal.peers().await?;
    if let Some(known) = peers.iter().find(|peer| peer.name == to) {
        if known.address.is_empty() {
            return Err(bad(format!("the agent of {to} listens nowhere, so that it can take no VM")));
        }
        return Ok(pinned(host, &known.address, known.fingerprint));
    }
    let address = with_port(to).map_err(bad)?;
    // Whoever was paired at this address must be there. At another one any peer may be, as hosts have several, or
    // somebody that the authority vouches for.
    if let Some(known) = peers.iter().find(|peer| peer.address == address) {
        return Ok(pinned(host, &address, known.fingerprint));
    }
    let all = peers.iter().map(|peer| peer.fingerprint).collect();
    Ok(Peer::new(&address, Arc::clone(&host.trusts.identity), all, host.trusts.authority.clone()))
}
