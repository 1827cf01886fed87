//! Talking to another agent: the client of the API between agents.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::api::types::{Code, Hello, Problem};
use crate::incoming::{CheckReply, IncomingState, Offer, Prepared};

/// The version of the API between agents. Agents of different versions refuse each other.
pub const API: u32 = 1;
/// The port that agents listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 7420;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A sign of life that is not answered must not keep the next one from being sent.
const KEEP_TIMEOUT: Duration = Duration::from_secs(3);
/// Preparing starts a QEMU there.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// The destination has everything by then and only has to be set running.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// What a trial of the link sends, in bytes.
const TRIAL: usize = 4 << 20;

/// Why another agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Nothing answers there.
    #[error("cannot reach an agent at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Something answers, but not in the way an agent does.
    #[error("what answers at {address} is not a vmferry agent")]
    NotAnAgent {
        /// Where.
        address: String,
    },
    /// An agent that speaks another version.
    #[error(
        "the agent at {address} is vmferry {version}, which speaks version {api} of the protocol; this one speaks {API}"
    )]
    OtherVersion {
        /// Where.
        address: String,
        /// Its program's version.
        version: String,
        /// Its protocol's version.
        api: u32,
    },
    /// It refused.
    #[error("{}", problem.message)]
    Refused {
        /// In its own words.
        problem: Problem,
    },
}

impl PeerError {
    /// For programs.
    pub fn code(&self) -> Code {
        match self {
            Self::Unreachable { .. } => Code::Unreachable,
            Self::NotAnAgent { .. } => Code::NotAnAgent,
            Self::OtherVersion { .. } => Code::OtherVersion,
            Self::Refused { problem, .. } => problem.code,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } | Self::NotAnAgent { .. } => {
                Some("is the host right, and does `vmferry agent --insecure-peers ADDRESS:PORT` run there?".into())
            }
            Self::OtherVersion { .. } => Some("install the same version of vmferry on both hosts".into()),
            Self::Refused { problem, .. } => problem.hint.clone(),
        }
    }
}

/// Another agent. Cheap to clone; connections are kept and reused.
#[derive(Clone)]
pub struct Peer {
    address: String,
    http: reqwest::Client,
}

impl Peer {
    /// An agent at HOST or HOST:PORT; nothing is sent yet.
    pub fn new(to: &str) -> Result<Self, String> {
        let address = with_port(to)?;
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .no_proxy()
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { address, http })
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Who it is; fails when it is no agent, or one of another version.
    pub async fn hello(&self) -> Result<Hello, PeerError> {
        let hello: Hello = self.ask(Method::GET, "/v1/hello", None::<&()>, ANSWER_TIMEOUT).await?;
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
        Ok(hello)
    }

    /// Whether it could take this VM; touches nothing there.
    pub async fn check(&self, offer: &Offer) -> Result<CheckReply, PeerError> {
        self.ask(Method::POST, "/v1/incoming/check", Some(offer), PREPARE_TIMEOUT).await
    }

    /// Has it start a QEMU that waits for this VM.
    pub async fn prepare(&self, offer: &Offer) -> Result<Prepared, PeerError> {
        self.ask(Method::POST, "/v1/incoming", Some(offer), PREPARE_TIMEOUT).await
    }

    /// Tells it that the source is still there.
    pub async fn keep(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/keep"), None::<&()>, KEEP_TIMEOUT).await
    }

    /// Makes it the owner of the guest and sets it running.
    pub async fn commit(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/commit"), None::<&()>, COMMIT_TIMEOUT).await
    }

    /// Makes it forget the incoming migration, now and for ever.
    pub async fn abandon(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::DELETE, &format!("/v1/incoming/{id}"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// Has its QEMU listen again after post-copy lost its connection.
    pub async fn recover(&self, id: Uuid) -> Result<IncomingState, PeerError> {
        self.ask(Method::POST, &format!("/v1/incoming/{id}/recover"), None::<&()>, ANSWER_TIMEOUT).await
    }

    /// What the link carries in a short trial, in bytes a second.
    pub async fn try_link(&self) -> Result<u64, PeerError> {
        let begun = std::time::Instant::now();
        let url = format!("http://{}/v1/link-trial", self.address);
        let reply = self.http.post(url).body(vec![0; TRIAL]).timeout(ANSWER_TIMEOUT).send().await;
        reply.map_err(|source| self.unreachable(source))?;
        Ok((TRIAL as f64 / begun.elapsed().as_secs_f64()) as u64)
    }

    async fn ask<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        timeout: Duration,
    ) -> Result<R, PeerError> {
        let mut request = self.http.request(method, format!("http://{}{path}", self.address)).timeout(timeout);
        if let Some(body) = body {
            request = request.json(body);
        }
        // A peer that talks but not HTTP fails in decoding, not in connecting.
        let reply = request.send().await.map_err(|source| match source.is_connect() || source.is_timeout() {
            false if is_not_http(&source) => self.not_an_agent(),
            _ => self.unreachable(source),
        })?;
        let status = reply.status();
        let text = reply.bytes().await.map_err(|source| self.unreachable(source))?;
        if status == StatusCode::OK {
            return serde_json::from_slice(&text).map_err(|_| self.not_an_agent());
        }
        match serde_json::from_slice(&text) {
            Ok(problem) => Err(PeerError::Refused { problem }),
            Err(_) => Err(self.not_an_agent()),
        }
    }

    fn unreachable(&self, source: reqwest::Error) -> PeerError {
        PeerError::Unreachable { address: self.address.clone(), source: source.without_url() }
    }

    fn not_an_agent(&self) -> PeerError {
        PeerError::NotAnAgent { address: self.address.clone() }
    }
}

/// Something answered, but what it said was not HTTP.
fn is_not_http(error: &reqwest::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(inner) = cause {
        if inner.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// HOST, HOST:PORT, ADDRESS or [IPV6]:PORT with the default port filled in.
fn with_port(to: &str) -> Result<String, String> {
    let bad = || format!("{to:?} names no host: use HOST, HOST:PORT, or [IPV6]:PORT");
    if to.parse::<SocketAddr>().is_ok() {
        return Ok(to.into());
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
