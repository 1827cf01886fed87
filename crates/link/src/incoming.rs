//! What comes to an agent's port: control connections, as they prove who they are, and streams, which join their
//! sessions on the way.
//!
//! Anybody can open connections and then say nothing. So handshakes run side by side, in bounded number and time; when
//! there are too many, the oldest makes room: a peer's handshake takes milliseconds and is over long before. A stream of
//! somebody whom no session expects is refused in a few places of its own, and a plain one is dropped.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;

use crate::tls::Arrival;
use crate::{Acceptor, Sessions, Stream, Unattached};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How many connections may be about to prove who they are.
const MOST_HANDSHAKES: usize = 64;
/// How many that have done so may wait to be taken.
const MOST_WAITING: usize = 16;
/// How many streams may be about to join a session. Each takes a thread meanwhile.
const MOST_JOINING: usize = 64;
/// How many streams that no session expects may be about to be told so.
const MOST_REFUSED: usize = 8;
/// When the system has no descriptors left, so much later it may.
const AGAIN: Duration = Duration::from_millis(100);

/// See the module's text. Stops listening when dropped.
pub struct Incoming {
    ready: mpsc::Receiver<Stream>,
    local: SocketAddr,
    accepting: AbortHandle,
}

impl Incoming {
    /// Takes connections from this listener; streams are given to these sessions. Must be called within a runtime.
    pub fn new(listener: TcpListener, acceptor: Acceptor, sessions: Sessions) -> std::io::Result<Self> {
        let local = listener.local_addr()?;
        let (sender, ready) = mpsc::channel(MOST_WAITING);
        let [joining, refused] = [MOST_JOINING, MOST_REFUSED].map(|most| Arc::new(Semaphore::new(most)));
        let arrivals = Arrivals { acceptor, ready: sender, sessions, joining, refused };
        let accepting = tokio::spawn(accept(listener, arrivals)).abort_handle();
        Ok(Self { ready, local, accepting })
    }

    /// The next control connection whose other end has proved who it is. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Stream {
        match self.ready.recv().await {
            Some(stream) => stream,
            None => std::future::pending().await,
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Where what arrives goes.
#[derive(Clone)]
struct Arrivals {
    acceptor: Acceptor,
    ready: mpsc::Sender<Stream>,
    sessions: Sessions,
    joining: Arc<Semaphore>,
    refused: Arc<Semaphore>,
}

async fn accept(listener: TcpListener, arrivals: Arrivals) {
    let mut handshakes: VecDeque<AbortHandle> = VecDeque::with_capacity(MOST_HANDSHAKES);
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        handshakes.retain(|handshake| !handshake.is_finished());
        if handshakes.len() >= MOST_HANDSHAKES
            && let Some(oldest) = handshakes.pop_front()
        {
            oldest.abort();
        }
        let arrivals = arrivals.clone();
        handshakes.push_back(tokio::spawn(async move { arrivals.handshake(tcp).await }).abort_handle());
    }
}

impl Arrivals {
    async fn handshake(self, tcp: TcpStream) {
        match self.acceptor.accept_any(tcp, HANDSHAKE).await {
            // An error means that nobody listens any more.
            Ok(Arrival::Control(stream)) => drop(self.ready.send(*stream).await),
            Ok(Arrival::Stream(stream)) => self.join(*stream),
            // Why somebody did not get in is theirs to find out; to us it is noise that anybody can make.
            Err(_) => {}
        }
    }

    /// In a thread of its own, for at most some seconds. Streams come back by themselves when there was no room.
    fn join(self, stream: Unattached) {
        let rooms = match (self.sessions.expect_from(stream.peer()), stream.peer()) {
            (true, _) => self.joining,
            (false, Some(_)) => self.refused,
            // Nobody proved anything, and nobody is waited for.
            (false, None) => return,
        };
        let Ok(room) = rooms.try_acquire_owned() else { return };
        tokio::task::spawn_blocking(move || {
            let _room = room;
            // A refusal is logged, and told to whoever was refused.
            let _ = self.sessions.attach(stream);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::Dialer;
    use crate::{Identity, Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, TcpDialer, connect};
    use std::io::Write;
    use tokio::io::AsyncReadExt;

    const SOON: Duration = Duration::from_secs(5);

    async fn incoming() -> (tempfile::TempDir, Identity, Incoming) {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_make(&dir.path().join("identity.pem"), "beta").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = Incoming::new(listener, Acceptor::new(&identity, None), Sessions::new()).unwrap();
        (dir, identity, incoming)
    }

    #[tokio::test]
    async fn somebody_who_says_nothing_keeps_nobody_waiting() {
        let (dir, beta, mut incoming) = incoming().await;
        let alpha = Identity::load_or_make(&dir.path().join("alpha.pem"), "alpha").unwrap();
        let _silent = TcpStream::connect(incoming.local_addr()).await.unwrap();
        let address = incoming.local_addr().to_string();
        let begun = std::time::Instant::now();
        let expected = [beta.fingerprint()];
        let (stream, taken) = tokio::join!(connect(&address, &alpha, &expected, None, SOON), incoming.next());
        assert!(stream.is_ok() && begun.elapsed() < HANDSHAKE / 2);
        assert_eq!(taken.peer, alpha.fingerprint());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn strangers_who_hold_on_to_streams_keep_none_from_joining() {
        let dir = tempfile::tempdir().unwrap();
        let identity = |name: &str| Identity::load_or_make(&dir.path().join(format!("{name}.pem")), name).unwrap();
        let [alpha, beta, stranger] = ["alpha", "beta", "stranger"].map(identity);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let sessions = Sessions::new();
        let incoming = Incoming::new(listener, Acceptor::new(&beta, None), sessions.clone()).unwrap();
        let (address, expected) = (incoming.local_addr().to_string(), beta.fingerprint());
        let link = LinkOptions::new(SessionId::random(), SessionKey::random());
        let options = SessionOptions { link: link.clone(), protection: Protection::Tls(alpha.fingerprint()) };
        let waiting = sessions.expect(options).unwrap();
        let joined = tokio::task::spawn_blocking(move || {
            let (mut plain, mut protected) = (Vec::new(), Vec::new());
            for _ in 0..2 * MOST_JOINING {
                let mut tcp = std::net::TcpStream::connect(&address).unwrap();
                tcp.write_all(b"V").unwrap();
                plain.push(tcp);
                let dialer = TcpDialer::tls(&address, &stranger, expected, None);
                protected.push(dialer.dial(SOON).unwrap());
            }
            let begun = std::time::Instant::now();
            let link = Link::connect(TcpDialer::tls(&address, &alpha, expected, None), link).unwrap();
            link.send_urgent(1, b"hello".to_vec()).unwrap();
            let taken = waiting.recv_urgent().unwrap();
            drop((plain, protected));
            (begun.elapsed(), taken.is_some())
        });
        let (took, taken) = joined.await.unwrap();
        assert!(taken && took < HANDSHAKE / 2, "{took:?}");
    }

    #[tokio::test]
    async fn a_flood_of_half_open_connections_is_bounded_and_a_peer_still_gets_in() {
        let (dir, beta, mut incoming) = incoming().await;
        let alpha = Identity::load_or_make(&dir.path().join("alpha.pem"), "alpha").unwrap();
        let mut flood = Vec::new();
        for _ in 0..300 {
            flood.push(TcpStream::connect(incoming.local_addr()).await.unwrap());
        }
        let address = incoming.local_addr().to_string();
        let expected = [beta.fingerprint()];
        let (stream, taken) = tokio::join!(connect(&address, &alpha, &expected, None, SOON), incoming.next());
        assert!(stream.is_ok(), "{:?}", stream.err());
        assert_eq!(taken.peer, alpha.fingerprint());
        let mut closed = 0;
        for stream in &mut flood {
            let end = tokio::time::timeout(Duration::from_millis(5), stream.read(&mut [0; 1])).await;
            closed += usize::from(end.is_ok());
        }
        assert!(closed >= 300 - MOST_HANDSHAKES, "only {closed} of 300 were closed");
    }
}
