//! A conversation with a daemon, over its socket. One task reads and writes; whoever calls waits for its answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::call::Call;
use crate::conversation::{Conversation, Heard, Nonsense, RemoteError};
use crate::event::Event;
use crate::frame::{BadFrame, Frame, LARGEST};
use crate::xdr::Malformed;

/// How many events wait for somebody who does not look, and calls to be sent.
const WAITING: usize = 1024;
/// What is read at once, in bytes.
const READ: usize = 64 << 10;

/// Why a call has no answer, or none of use.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectionError {
    /// There is no daemon, or it does not let us in.
    #[error("cannot connect to libvirt at {path}: {why}")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It has gone away, or was given up.
    #[error("the connection to libvirt has ended: {0}")]
    Ended(Arc<str>),
    /// It does not answer.
    #[error("libvirt has not answered within {} s", .0.as_secs())]
    Silent(Duration),
    /// It refused, or failed.
    #[error(transparent)]
    Refused(#[from] RemoteError),
    /// Its answer is none.
    #[error("libvirt's answer cannot be read: {0}")]
    Malformed(#[from] Malformed),
    /// It wants us to sign in by a way that is not spoken here.
    #[error("libvirt at {path} asks for a sign-in that is not spoken here (SASL)")]
    SignIn {
        /// Its socket.
        path: PathBuf,
    },
}

impl ConnectionError {
    /// What libvirt has refused, if it has.
    pub fn refused(&self) -> Option<&RemoteError> {
        match self {
            Self::Refused(error) => Some(error),
            _ => None,
        }
    }
}

type Answer = Result<Vec<u8>, ConnectionError>;

struct Asked {
    call: Call,
    answer: oneshot::Sender<Answer>,
}

/// A connection; cheap to clone. It ends with the last clone.
#[derive(Clone)]
pub struct Connection {
    calls: mpsc::Sender<Asked>,
    events: broadcast::Sender<(Instant, Event)>,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl Connection {
    /// Connects; nothing is said yet.
    pub async fn connect(path: &Path) -> Result<Self, ConnectionError> {
        let failed = |error: std::io::Error| ConnectionError::Connect { path: path.into(), why: error.to_string() };
        let stream = UnixStream::connect(path).await.map_err(failed)?;
        let (calls, asked) = mpsc::channel(WAITING);
        let events = broadcast::channel(WAITING).0;
        let talk =
            Talk { stream, asked, events: events.clone(), conversation: Conversation::new(), open: HashMap::new() };
        let talking = Arc::new(AbortOnDropHandle::new(tokio::spawn(talk.run())));
        Ok(Self { calls, events, _task: talking })
    }

    /// Calls, and waits for the answer, however long that takes.
    pub async fn call(&self, call: Call) -> Answer {
        let ended = || ConnectionError::Ended("it was given up".into());
        let (answer, answered) = oneshot::channel();
        self.calls.send(Asked { call, answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// Events, from now on, with when they came. One who does not look misses some; the connection's end ends them.
    pub fn events(&self) -> broadcast::Receiver<(Instant, Event)> {
        self.events.subscribe()
    }

    /// It can be used no more.
    pub fn has_ended(&self) -> bool {
        self.calls.is_closed()
    }

    /// Waits until that is so.
    pub async fn ended(&self) {
        self.calls.closed().await;
    }
}

/// The one who reads and writes.
struct Talk {
    stream: UnixStream,
    asked: mpsc::Receiver<Asked>,
    events: broadcast::Sender<(Instant, Event)>,
    conversation: Conversation,
    open: HashMap<u32, oneshot::Sender<Answer>>,
}

#[derive(Debug, thiserror::Error)]
enum End {
    #[error("libvirt closed it")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Frame(#[from] BadFrame),
    #[error("{0}")]
    Nonsense(#[from] Nonsense),
}

impl Talk {
    async fn run(mut self) {
        let Err(end) = self.talk().await else { return };
        let why: Arc<str> = end.to_string().into();
        tracing::debug!(%why, "a connection to libvirt has ended");
        // From here on nobody's call is taken.
        self.asked.close();
        for (_, answer) in self.open.drain() {
            // Whoever asked may have gone.
            let _ = answer.send(Err(ConnectionError::Ended(Arc::clone(&why))));
        }
        while let Some(asked) = self.asked.recv().await {
            let _ = asked.answer.send(Err(ConnectionError::Ended(Arc::clone(&why))));
        }
    }

    /// Until it breaks, or nobody can call any more.
    async fn talk(&mut self) -> Result<(), End> {
        let (mut read, mut unsent) = (BytesMut::new(), BytesMut::new());
        loop {
            read.reserve(READ);
            let (mut from, mut to) = self.stream.split();
            tokio::select! {
                asked = self.asked.recv() => {
                    let Some(Asked { call, answer }) = asked else { return Ok(()) };
                    let frame = self.conversation.ask(call);
                    self.open.insert(frame.serial, answer);
                    unsent.extend_from_slice(&frame.encode());
                }
                count = from.read_buf(&mut read) => {
                    if count? == 0 {
                        return Err(End::Closed);
                    }
                    while let Some(frame) = Frame::take(&mut read, LARGEST)? {
                        match self.conversation.hear(frame)? {
                            Heard::Answer { serial, answer } => {
                                if let Some(asker) = self.open.remove(&serial) {
                                    // It may have gone.
                                    let _ = asker.send(answer.map_err(ConnectionError::from));
                                }
                            }
                            Heard::Event(event) => {
                                // An error means that nobody looks.
                                let _ = self.events.send((Instant::now(), event));
                            }
                            Heard::Send(frame) => unsent.extend_from_slice(&frame.encode()),
                            Heard::Nothing => {}
                        }
                    }
                }
                count = to.write_buf(&mut unsent), if !unsent.is_empty() => {
                    count?;
                }
            }
        }
    }
}
