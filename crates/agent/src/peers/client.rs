//! Talking to another agent: the client of the API between agents, HTTP over a connection that both have proved who
//! they are on.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use axum::http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use uuid::Uuid;
use vmferry_api::{DEFAULT_PORT, Hello, witness};
use vmferry_link::{Authority, Fingerprint, Identity, Secret};

use super::domains::{CarryOffer, CarryReply, Channel, DomainState, DomainThere};
use super::wire::{
    Abandon, BootFile, CheckReply, Commit, CopyAccepted, CopyOffer, Fence, IncomingState, Join, MoveOffer, MoveReply,
    Offer, OutgoingState, Prepared, Taken, TrialAccepted, TrialOffer,
};
use crate::error::{API, PeerError};

/// What the API's route upgrades to: the bytes of one of QEMU's connections.
pub(crate) const RELAY_PROTOCOL: &str = "vmferry-relay";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// How fast a QEMU that is to have all of its guest's RAM at its start gets it at least, in bytes a second.
const SLOW_ALLOCATION: u64 = 256 << 20;
/// How fast a disk is at least, in bytes a second.
const SLOW_DISK: u64 = 50 << 20;
/// A sign of life that is not answered must not keep the next one from being sent.
const KEEP_TIMEOUT: Duration = Duration::from_secs(3);
/// Preparing starts a QEMU there.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(90);
/// The destination has everything by then and only has to be set running.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(13);
/// How long it is waited for that a domain runs.
const RUNS_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// Another agent, which proves to be one of those that are expected. Cheap to clone; a connection is kept and reused.
#[derive(Clone)]
pub struct Peer {
    address: String,
    identity: Arc<Identity>,
    expected: Vec<Fingerprint>,
    authority: Option<Authority>,
    idle: Arc<Mutex<Option<Connection>>>,
}

struct Connection {
    requests: SendRequest<Body>,
    peer: Fingerprint,
    remote: SocketAddr,
}

/// What an agent answered.
pub struct Answer {
    /// Who it proved to be.
    pub peer: Fingerprint,
    /// Where it is.
    pub remote: SocketAddr,
    /// The status of HTTP.
    pub status: StatusCode,
    /// The body.
    pub body: Vec<u8>,
}

/// An agent that introduced itself.
pub struct Met {
    /// What it says of itself.
    pub hello: Hello,
    /// What it proved to be.
    pub key: Fingerprint,
    /// Where it is.
    pub remote: SocketAddr,
}

impl Met {
    /// Where it is, without the port, and IPv4 as such.
    pub fn ip(&self) -> IpAddr {
        self.remote.ip().to_canonical()
    }
}

impl Peer {
    /// The agent at HOST:PORT, if it is one of these or the authority vouches for it; nothing is sent yet.
    pub fn new(
        address: &str,
        identity: Arc<Identity>,
        expected: Vec<Fingerprint>,
        authority: Option<Authority>,
    ) -> Self {
        Self { address: address.into(), identity, expected, authority, idle: Arc::default() }
    }

    /// The one that was met, and no other from now on, whatever names and addresses come to mean. The connection is kept.
    #[must_use]
    pub fn pinned_to(&self, met: &Met) -> Self {
        Self { address: met.remote.to_string(), expected: vec![met.key], authority: None, ..self.clone() }
    }

    /// The same, over connections of its own: what is kept of it keeps none open.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self { idle: Arc::default(), ..self.clone() }
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Who it is; fails when it is another version.
    pub async fn hello(&self) -> Result<Met, PeerError> {
        let answer = self.request(Method::GET, "/v1/hello", Vec::new(), ANSWER_TIMEOUT).await?;
        let hello: Hello = self.decode(answer.status, &answer.body)?;
        if hello.product != "vmferry" {
            return Err(self.not_an_agent());
        }
        if hello.api != API {
            return Err(PeerError::OtherVersion {
                address: self.address.clone(),
                version: hello.version,
                api: hello.api,
            });
        }
        Ok(Met { hello, key: answer.peer, remote: answer.remote })
    }

    /// Makes the two of us peers, by the secret of a token of its; `name` is what this host calls itself, and `port`
    /// where its agent listens.
    pub async fn join(&self, secret: &Secret, name: &str, port: Option<u16>) -> Result<Hello, PeerError> {
        // Over a new connection: a secret is used once, so that it must not be said again over the next.
        self.take_idle();
        let join = Join { secret: secret.to_string(), name: name.into(), port };
        self.ask(Method::POST, "/v1/join", Some(&join), ANSWER_TIMEOUT).await
    }

    /// Whether it could take this VM; touches nothing there.
    pub async fn check(&self, offer: &Offer) -> Result<CheckReply, PeerError> {
        // Files of which it is said what is in them are read there.
        let bytes: u64 = offer.contents.values().map(|it| it.size).sum();
        let reading = Duration::from_secs(bytes / SLOW_DISK);
        self.ask(Method::POST, "/v1/incoming/check", Some(offer), PREPARE_TIMEOUT + reading).await
    }

    /// Has it start a QEMU that waits for this VM.
    pub async fn prepare(&self, offer: &Offer) -> Result<Prepared, PeerError> {
        // Over a new connection: were an old one broken, nobody could tell whether it was heard.
        self.take_idle();
        let allocating = Duration::from_secs(offer.ram_bytes / SLOW_ALLOCATION);
        self.ask(Method::POST, "/v1/incoming", Some(offer), PREPARE_TIMEOUT + allocating).await
    }

    /// Tells it that the source is still there.
    pub async fn keep(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/keep"), None::<&()>, KEEP_TIMEOUT).await
    }

    /// Makes it the owner of the guest, which is to run there, or to stay paused.
    pub async fn commit(&self, id: Uuid, commit: &Commit) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/commit"), Some(commit), COMMIT_TIMEOUT).await
    }

    /// Has it let go of a guest, even if it owns it, that its source's user has kept.
    pub async fn fence(&self, id: Uuid, vm: &str) -> Result<IncomingState, PeerError> {
        let fence = Fence { vm: vm.into() };
        self.ask(Method::POST, &format!("/v1/incoming/{id}/fence"), Some(&fence), ANSWER_TIMEOUT).await
    }

    /// Tells it that nothing is left of the guest here, and that nothing more will be said of it.
    pub async fn settled(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/settled"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// How a migration from there to here stands there.
    pub async fn outgoing(&self, id: Uuid) -> Result<OutgoingState, PeerError> {
        self.ask(Method::GET, &format!("/v1/outgoing/{id}"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// Makes it forget the incoming migration, now and for ever.
    pub async fn abandon(&self, id: Uuid, Abandon { drop_disks }: Abandon) -> Result<IncomingState, PeerError> {
        let path = format!("/v1/incoming/{id}?drop_disks={drop_disks}");
        self.ask(Method::DELETE, &path, None::<&()>, ANSWER_TIMEOUT).await
    }

    /// Has its QEMU listen again after post-copy lost its connection.
    pub async fn recover(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/recover"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// Has it wait for the streams of a trial.
    pub async fn try_streams(&self, offer: &TrialOffer) -> Result<TrialAccepted, PeerError> {
        self.ask(Method::POST, "/v1/link-trials", Some(offer), ANSWER_TIMEOUT).await
    }

    /// Has it wait for the streams of a copy.
    pub async fn take_copy(&self, offer: &CopyOffer) -> Result<CopyAccepted, PeerError> {
        // Over a new connection: one that was heard and not answered would keep the next from the same place.
        self.take_idle();
        self.ask(Method::POST, "/v1/incoming-copies", Some(offer), ANSWER_TIMEOUT).await
    }

    /// Whether it could take this VM, which does not run; touches nothing there.
    pub async fn check_move(&self, offer: &MoveOffer) -> Result<MoveReply, PeerError> {
        let bytes: u64 = offer.vm.contents.values().map(|it| it.size).sum();
        let reading = Duration::from_secs(bytes / SLOW_DISK);
        self.ask(Method::POST, "/v1/incoming-vms/check", Some(offer), PREPARE_TIMEOUT + reading).await
    }

    /// Has it wait for this VM's disks, and tell what is there of them.
    pub async fn begin_move(&self, offer: &MoveOffer) -> Result<MoveReply, PeerError> {
        self.ask(Method::POST, "/v1/incoming-vms", Some(offer), PREPARE_TIMEOUT).await
    }

    /// Makes a VM its own that was given to it.
    pub async fn take_vm(&self, id: Uuid) -> Result<Taken, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming-vms/{id}/take"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// Whether it has this file for a measuring guest to boot from.
    pub(crate) async fn has_boot_file(&self, digest: &str) -> Result<bool, PeerError> {
        let path = format!("/v1/boot-files/{digest}");
        let BootFile { is_there } = self.ask(Method::GET, &path, None::<&()>, ANSWER_TIMEOUT).await?;
        Ok(is_there)
    }

    /// Gives it one.
    pub(crate) async fn put_boot_file(&self, digest: &str, content: Vec<u8>) -> Result<(), PeerError> {
        let path = format!("/v1/boot-files/{digest}");
        let answer = self.request(Method::PUT, &path, content, PREPARE_TIMEOUT).await?;
        self.decode::<BootFile>(answer.status, &answer.body).map(drop)
    }

    /// One more connection for the QEMUs of this migration, to be relayed.
    pub(crate) async fn relay(&self, id: Uuid) -> Result<impl AsyncRead + AsyncWrite + Unpin + use<>, PeerError> {
        self.upgrade(&format!("/v1/incoming/{id}/relay"), RELAY_PROTOCOL).await
    }

    /// Whether its libvirt could take this domain; touches nothing there.
    pub async fn check_domain(&self, offer: &CarryOffer) -> Result<CarryReply, PeerError> {
        self.ask(Method::POST, "/v1/incoming-domains/check", Some(offer), ANSWER_TIMEOUT).await
    }

    /// Has it let this domain, and nothing else, through to its libvirt.
    pub async fn announce_domain(&self, offer: &CarryOffer) -> Result<CarryReply, PeerError> {
        // Over a new connection: one that was heard and not answered would keep the next from the same place.
        self.take_idle();
        self.ask(Method::POST, "/v1/incoming-domains", Some(offer), ANSWER_TIMEOUT).await
    }

    /// Nothing of it is to be let through any more.
    pub async fn withdraw_domain(&self, id: Uuid) -> Result<(), PeerError> {
        self.ask(Method::DELETE, &format!("/v1/incoming-domains/{id}"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// How a domain stands with its libvirt.
    pub async fn domain(&self, uuid: Uuid) -> Result<DomainThere, PeerError> {
        let path = format!("/v1/domains/{uuid}");
        let state: DomainState = self.ask(Method::GET, &path, None::<&()>, ANSWER_TIMEOUT).await?;
        Ok(state.there)
    }

    /// The same, as soon as it runs there.
    pub async fn domain_runs(&self, uuid: Uuid) -> Result<DomainThere, PeerError> {
        let path = format!("/v1/domains/{uuid}?wait=true");
        let state: DomainState = self.ask(Method::GET, &path, None::<&()>, RUNS_TIMEOUT).await?;
        Ok(state.there)
    }

    /// One more connection of the two libvirts, or of their QEMUs, of this migration.
    pub(crate) async fn carry(
        &self,
        id: Uuid,
        channel: Channel,
    ) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, PeerError> {
        let path = format!("/v1/incoming-domains/{id}/{}", channel.word());
        self.upgrade(&path, RELAY_PROTOCOL).await
    }

    /// What it hears of the measuring guest of this migration.
    pub(crate) async fn witness(&self, id: Uuid) -> Result<impl AsyncRead + AsyncWrite + Unpin + use<>, PeerError> {
        self.upgrade(&format!("/v1/incoming/{id}/witness"), witness::PROTOCOL).await
    }

    async fn upgrade(
        &self,
        path: &str,
        protocol: &'static str,
    ) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, PeerError> {
        let mut connection = self.connect().await?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(HOST, &self.address)
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, protocol)
            .body(Body::empty())
            .expect("our own requests are well-formed");
        let reply = connection.requests.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = reply.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            let body = axum::body::to_bytes(Body::new(reply.into_body()), MAX_ANSWER).await.unwrap_or_default();
            return Err(self.decode::<()>(status, &body).err().unwrap_or_else(|| self.not_an_agent()));
        }
        Ok(TokioIo::new(hyper::upgrade::on(reply).await.map_err(|error| self.broken(error))?))
    }

    async fn ask<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        timeout: Duration,
    ) -> Result<R, PeerError> {
        let body = body.map(|body| serde_json::to_vec(body).expect("the API's types are plain data"));
        let answer = self.request(method, path, body.unwrap_or_default(), timeout).await?;
        self.decode(answer.status, &answer.body)
    }

    fn decode<R: DeserializeOwned>(&self, status: StatusCode, text: &[u8]) -> Result<R, PeerError> {
        if status == StatusCode::OK {
            return serde_json::from_slice(text).map_err(|_| self.not_an_agent());
        }
        match serde_json::from_slice(text) {
            Ok(problem) => Err(PeerError::Refused { problem }),
            Err(_) => Err(self.not_an_agent()),
        }
    }

    /// Asks for anything, with a body of JSON or none, and gives the answer as it comes.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        let asking = async {
            // The other side may have closed a connection that was kept. All but `prepare` can be asked twice.
            if let Some(kept) = self.take_idle()
                && let Ok(answer) = self.ask_over(kept, method.clone(), path, body.clone()).await
            {
                return Ok(answer);
            }
            let fresh = self.connect().await?;
            self.ask_over(fresh, method, path, body).await
        };
        let no_answer = || PeerError::NoAnswer { address: self.address.clone(), after: timeout };
        tokio::time::timeout(timeout, asking).await.unwrap_or_else(|_| Err(no_answer()))
    }

    async fn connect(&self) -> Result<Connection, PeerError> {
        let authority = self.authority.as_ref();
        let stream =
            vmferry_link::connect(&self.address, &self.identity, &self.expected, authority, CONNECT_TIMEOUT).await?;
        let (requests, connection) = handshake(TokioIo::new(stream.io)).await.map_err(|error| self.broken(error))?;
        // It ends when the last request is dropped; an error is told to whoever waits for an answer.
        tokio::spawn(connection.with_upgrades());
        Ok(Connection { requests, peer: stream.peer, remote: stream.remote })
    }

    async fn ask_over(
        &self,
        mut connection: Connection,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Answer, PeerError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.address)
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .expect("our own requests are well-formed");
        connection.requests.ready().await.map_err(|error| self.broken(error))?;
        let reply: Response<Incoming> =
            connection.requests.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = reply.status();
        let body = axum::body::to_bytes(Body::new(reply.into_body()), MAX_ANSWER).await;
        let body = body.map_err(|_| self.not_an_agent())?;
        let answer = Answer { peer: connection.peer, remote: connection.remote, status, body: body.into() };
        *self.lock_idle() = Some(connection);
        Ok(answer)
    }

    fn take_idle(&self) -> Option<Connection> {
        self.lock_idle().take().filter(|connection| !connection.requests.is_closed())
    }

    fn lock_idle(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.idle.lock().expect("no holder of this lock panics")
    }

    /// A peer that speaks TLS as an agent does and then no HTTP is none.
    fn broken(&self, source: hyper::Error) -> PeerError {
        if source.is_parse() {
            return self.not_an_agent();
        }
        PeerError::Broken { address: self.address.clone(), source }
    }

    fn not_an_agent(&self) -> PeerError {
        PeerError::NotAnAgent { address: self.address.clone() }
    }
}

/// HOST, HOST:PORT, ADDRESS or [IPV6]:PORT with the default port filled in; a link-local address with its interface, such
/// as `fe80::1%eth0`.
pub(crate) fn with_port(to: &str) -> Result<String, String> {
    let bad = || format!("{to:?} names no host: use the name of a peer, HOST, HOST:PORT, or [IPV6]:PORT");
    if to.parse::<SocketAddr>().is_ok() {
        return Ok(to.into());
    }
    if let Some((address, rest)) = to.split_once('%') {
        return link_local(address, rest).ok_or_else(|| {
            format!("{to:?} names no link-local address of an interface of this host: write it as fe80::1%eth0")
        });
    }
    if let Ok(address) = to.trim_matches(['[', ']']).parse::<std::net::IpAddr>() {
        return Ok(SocketAddr::new(address, DEFAULT_PORT).to_string());
    }
    let (host, port) = to.split_once(':').unwrap_or((to, ""));
    let is_host = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if host.is_empty() || !host.chars().all(is_host) {
        return Err(bad());
    }
    match port {
        "" if !to.ends_with(':') => Ok(format!("{host}:{DEFAULT_PORT}")),
        port => port.parse::<u16>().map(|port| format!("{host}:{port}")).map_err(|_| bad()),
    }
}

/// An address that is said with an interface, by its name or its number, and perhaps a port.
fn link_local(address: &str, rest: &str) -> Option<String> {
    let address: Ipv6Addr = address.trim_start_matches('[').parse().ok()?;
    let (interface, port) = match rest.split_once("]:") {
        Some((interface, port)) => (interface, port.parse().ok()?),
        None => (rest.trim_end_matches(']'), DEFAULT_PORT),
    };
    let number = interface.parse().or_else(|_| nix::net::if_::if_nametoindex(interface)).ok()?;
    Some(SocketAddrV6::new(address, port, 0, number).to_string())
}

#[cfg(test)]
mod tests {
    use super::with_port;

    #[test]
    fn a_destination_may_leave_out_the_port() {
        for (given, meant) in [
            ("beta", "beta:7420"),
            ("beta.example.org:99", "beta.example.org:99"),
            ("192.0.2.2", "192.0.2.2:7420"),
            ("192.0.2.2:1", "192.0.2.2:1"),
            ("::1", "[::1]:7420"),
            ("[::1]:5", "[::1]:5"),
            // The first interface of every host is its loopback.
            ("fe80::2%lo", "[fe80::2%1]:7420"),
            ("[fe80::2%1]:5", "[fe80::2%1]:5"),
            ("[fe80::2%lo]:5", "[fe80::2%1]:5"),
            ("[fe80::2%lo]", "[fe80::2%1]:7420"),
        ] {
            assert_eq!(with_port(given).as_deref(), Ok(meant));
        }
    }

    #[test]
    fn what_names_no_host_is_refused() {
        for bad in ["", ":7420", "beta:", "beta:x", "beta:70000", "http://beta", "a b", "user@host"] {
            assert!(with_port(bad).is_err(), "{bad}");
        }
    }
}
