//! The client of an agent's local API: what the command line is made of.

use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::problem::{Code, Problem};

/// What the console route upgrades to: raw bytes both ways.
pub const CONSOLE_PROTOCOL: &str = "vmferry-console";
/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error("no agent answers at {}", socket.display())]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It refused, or failed.
    #[error("{}", .0.message)]
    Problem(Problem),
    /// The connection broke, or what came over it made no sense.
    #[error("the connection to the agent broke")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The events ended before what they are about did.
    #[error("lost sight of it: the agent went away")]
    LostSight,
}

/// The agent behind a Unix socket. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

impl Client {
    /// The agent at this socket; nothing is sent yet.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder()
            .unix_socket(socket.to_owned())
            .build()
            .map_err(|error| ClientError::Lost(error.into()))?;
        Ok(Self { http, socket: socket.into() })
    }

    /// Asks for something.
    pub async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R, ClientError> {
        decode(self.send(Method::GET, path, None::<&()>).await?).await
    }

    /// Has something done that answers with more than success.
    pub async fn post<B: Serialize, R: DeserializeOwned>(&self, path: &str, body: &B) -> Result<R, ClientError> {
        decode(self.send(Method::POST, path, Some(body)).await?).await
    }

    /// Has something done that answers with success or a problem.
    pub async fn tell<B: Serialize>(&self, path: &str, body: &B) -> Result<(), ClientError> {
        check(self.send(Method::POST, path, Some(body)).await?).await.map(drop)
    }

    /// Has something set; it answers with success or a problem.
    pub async fn put<B: Serialize>(&self, path: &str, body: &B) -> Result<(), ClientError> {
        check(self.send(Method::PUT, path, Some(body)).await?).await.map(drop)
    }

    /// Has something ended.
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        check(self.send(Method::DELETE, path, None::<&()>).await?).await.map(drop)
    }

    /// A VM's serial console: raw bytes both ways, the last output first.
    pub async fn console(&self, vm: &str) -> Result<reqwest::Upgraded, ClientError> {
        self.upgrade(&format!("{}/console", vm_path(vm)), CONSOLE_PROTOCOL).await
    }

    /// What is heard of a measuring guest, at this path of the API; see [`crate::witness`].
    pub async fn witness(&self, path: &str) -> Result<reqwest::Upgraded, ClientError> {
        self.upgrade(path, crate::witness::PROTOCOL).await
    }

    async fn upgrade(&self, path: &str, protocol: &str) -> Result<reqwest::Upgraded, ClientError> {
        let request = self.http.get(url(path)).header("connection", "upgrade").header("upgrade", protocol);
        let reply = request.send().await.map_err(|error| self.failure(error))?;
        check(reply).await?.upgrade().await.map_err(|error| ClientError::Lost(error.into()))
    }

    /// Follows a migration, or a copy: hands each event to `take` until that returns something.
    pub async fn follow<E: DeserializeOwned, T>(
        &self,
        path: &str,
        mut take: impl FnMut(E) -> Option<T>,
    ) -> Result<T, ClientError> {
        let mut stream = check(self.send(Method::GET, path, None::<&()>).await?).await?.bytes_stream();
        let mut buffer = Vec::new();
        while let Some(Ok(bytes)) = stream.next().await {
            buffer.extend_from_slice(&bytes);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                // Server-sent events as the agent writes them: `data:` and one line of JSON; the rest keeps alive.
                let Some(json) = line.strip_prefix(b"data:") else { continue };
                let event = serde_json::from_slice(json).map_err(|error| ClientError::Lost(error.into()))?;
                if let Some(done) = take(event) {
                    return Ok(done);
                }
            }
        }
        Err(ClientError::LostSight)
    }

    async fn send<B: Serialize>(&self, method: Method, path: &str, body: Option<&B>) -> Result<Response, ClientError> {
        let mut request = self.http.request(method, url(path));
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await.map_err(|error| self.failure(error))
    }

    fn failure(&self, error: reqwest::Error) -> ClientError {
        let source = error.without_url();
        match source.is_connect() {
            true => ClientError::NoAgent { socket: self.socket.clone(), source },
            false => ClientError::Lost(source.into()),
        }
    }
}

/// The host part means nothing on a Unix socket.
fn url(path: &str) -> String {
    format!("http://agent{path}")
}

async fn check(reply: Response) -> Result<Response, ClientError> {
    if reply.status().is_success() || reply.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(reply);
    }
    let status = reply.status();
    let text = reply.text().await.unwrap_or_default();
    Err(ClientError::Problem(serde_json::from_str(&text).unwrap_or_else(|_| Problem {
        code: Code::Other,
        message: format!("the agent answers {status}: {}", text.trim()),
        hint: None,
    })))
}

async fn decode<R: DeserializeOwned>(reply: Response) -> Result<R, ClientError> {
    check(reply).await?.json().await.map_err(|error| ClientError::Lost(error.without_url().into()))
}

/// The path of the move of a disk: a disk's name may have any character.
pub fn disk_move_path(vm: &str, disk: &str) -> String {
    let encode = |byte: u8| match byte {
        plain if plain.is_ascii_alphanumeric() || b"._-".contains(&plain) => char::from(plain).to_string(),
        other => format!("%{other:02X}"),
    };
    format!("{}/disks/{}/move", vm_path(vm), disk.bytes().map(encode).collect::<String>())
}

/// A VM's name as a part of a path.
pub fn vm_path(name: &str) -> String {
    use std::fmt::Write as _;
    // libvirt's domains may be called anything.
    let mut path = "/v1/vms/".to_owned();
    for byte in name.bytes() {
        match byte {
            b'.' | b'_' | b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => path.push(byte.into()),
            other => write!(path, "%{other:02X}").expect("a text takes what is written to it"),
        }
    }
    path
}
