//! Connections of other agents, as axum takes them. Each has proved who it is; but anybody can make a key, and hold on
//! to connections. So strangers get few places, and little time in them: enough to use a join token.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use vmferry_link::Incoming;

use super::trust::{Caller, is_peer};
use crate::host::Host;

/// How many strangers may be connected.
const MOST_STRANGERS: usize = 64;
/// How long each of them.
const STRANGERS_TIME: Duration = Duration::from_secs(30);

/// See the module's text.
pub(crate) struct Callers {
    incoming: Incoming,
    host: Arc<Host>,
    strangers: Arc<Semaphore>,
}

impl Callers {
    pub(crate) fn new(incoming: Incoming, host: &Arc<Host>) -> Self {
        Self { incoming, host: Arc::clone(host), strangers: Arc::new(Semaphore::new(MOST_STRANGERS)) }
    }
}

impl Listener for Callers {
    type Io = Connection;
    type Addr = Caller;

    async fn accept(&mut self) -> (Connection, Caller) {
        loop {
            let stream = self.incoming.next().await;
            let caller = Caller {
                key: stream.peer,
                vouched_for: stream.vouched_for,
                local: stream.local.ip().to_canonical(),
                remote: stream.remote.ip().to_canonical(),
                scope: match stream.remote {
                    SocketAddr::V6(remote) => remote.scope_id(),
                    SocketAddr::V4(_) => 0,
                },
            };
            if is_peer(&self.host, &caller).await {
                return (Connection { io: stream.io, stranger: None }, caller);
            }
            // Whoever finds no place may come again.
            if let Ok(place) = Arc::clone(&self.strangers).try_acquire_owned() {
                let stranger = Stranger { _place: place, end: Box::pin(tokio::time::sleep(STRANGERS_TIME)) };
                return (Connection { io: stream.io, stranger: Some(stranger) }, caller);
            }
        }
    }

    fn local_addr(&self) -> Result<Caller> {
        Err(ErrorKind::Unsupported.into())
    }
}

impl Connected<IncomingStream<'_, Callers>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Callers>) -> Self {
        *stream.remote_addr()
    }
}

/// One connection; a stranger's breaks when its time is up.
pub(crate) struct Connection {
    io: tokio_rustls::TlsStream<TcpStream>,
    stranger: Option<Stranger>,
}

struct Stranger {
    _place: OwnedSemaphorePermit,
    end: Pin<Box<Sleep>>,
}

impl Connection {
    /// An error when a stranger's time is up; else whoever waits is woken when it is.
    fn check_time(&mut self, cx: &mut Context<'_>) -> Result<()> {
        if let Some(stranger) = &mut self.stranger
            && stranger.end.as_mut().poll(cx).is_ready()
        {
            return Err(Error::from(ErrorKind::TimedOut));
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.check_time(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.check_time(cx)?;
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        self.check_time(cx)?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
