//! The accepting side's sessions: which links wait for streams, and from whom.

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, Weak};

use crate::channel::Channel;
use crate::hello::Refusal;
use crate::link::state::Shared;
use crate::link::{Link, LinkDown, LinkOptions};
use crate::session::SessionId;
use crate::{Fingerprint, join, tuning};

/// How a session's streams are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// TLS; only this agent may join.
    Tls(Fingerprint),
    /// None: both agents' configuration says that the network is trusted. Whoever has the session's key may join.
    Plain,
}

/// A session that streams may join.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// What both sides agreed on.
    pub link: LinkOptions,
    /// Who may join, and how.
    pub protection: Protection,
}

/// A connection that says it is a stream; nothing has been read from it.
pub struct Unattached {
    tcp: TcpStream,
    tls: Option<(rustls::ServerConnection, Fingerprint)>,
}

impl Unattached {
    /// Plain: what was peeked at is still there to be read. In blocking mode.
    pub fn plain(tcp: TcpStream) -> Self {
        Self { tcp, tls: None }
    }

    /// After the handshake of TLS, in which the other side proved to be this agent. In blocking mode.
    pub fn protected(tcp: TcpStream, tls: rustls::ServerConnection, peer: Fingerprint) -> Self {
        Self { tcp, tls: Some((tls, peer)) }
    }

    /// Who the other side proved to be; nobody, of a plain one.
    pub(crate) fn peer(&self) -> Option<Fingerprint> {
        self.tls.as_ref().map(|(_, peer)| *peer)
    }
}

/// See the module's text. Cheap to clone.
#[derive(Clone, Default)]
pub struct Sessions(Arc<Mutex<HashMap<SessionId, Registered>>>);

struct Registered {
    link: Weak<Shared>,
    peer: Option<Fingerprint>,
}

/// A session as the handshake finds it.
pub(crate) struct Expected {
    pub(crate) link: Arc<Shared>,
    /// Who may join; none when the session is plain.
    pub(crate) peer: Option<Fingerprint>,
}

impl Sessions {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Expects the streams of a session from now on, until the link is dropped. The link's patience runs from here:
    /// when the streams have not come by then, it fails.
    pub fn expect(&self, options: SessionOptions) -> Result<Link, LinkDown> {
        let (id, peer) = match options.protection {
            Protection::Tls(peer) => (options.link.session, Some(peer)),
            Protection::Plain => (options.link.session, None),
        };
        let link = Link::expect(options.link)?;
        let mut sessions = self.0.lock().expect("no holder of this lock panics");
        sessions.retain(|_, session| session.link.strong_count() > 0);
        sessions.insert(id, Registered { link: Arc::downgrade(&link.0), peer });
        Ok(link)
    }

    /// Some session expects streams of this agent, or plain ones.
    pub(crate) fn expect_from(&self, peer: Option<Fingerprint>) -> bool {
        let sessions = self.0.lock().expect("no holder of this lock panics");
        sessions.values().any(|session| session.peer == peer && session.link.strong_count() > 0)
    }

    /// Finds out to which session a stream belongs and gives it to its link; takes at most a few seconds, and blocks.
    /// Whoever is refused is told why.
    pub fn attach(&self, stream: Unattached) -> Result<(SessionId, u8), Refusal> {
        let from = stream.tcp.peer_addr().map_or_else(|_| "somebody".into(), |address| address.to_string());
        // A socket that cannot be tuned is about to break, and its thread will tell.
        let _ = tuning::tune(&stream.tcp);
        let (channel, peer) = match stream.tls {
            Some((tls, peer)) => (Channel::over(stream.tcp).with_tls(tls), Some(peer)),
            None => (Channel::over(stream.tcp), None),
        };
        let attached = join::answer(channel, peer, |id| self.find(id));
        match &attached {
            Ok((session, stream)) => tracing::debug!(%session, stream, %from, "stream attached"),
            Err(refusal) => tracing::warn!(%from, ?peer, reason = ?refusal.reason, "stream refused: {refusal}"),
        }
        attached
    }

    fn find(&self, id: SessionId) -> Option<Expected> {
        let sessions = self.0.lock().expect("no holder of this lock panics");
        let session = sessions.get(&id)?;
        let link = session.link.upgrade()?;
        // A link that is over takes no streams, though some thread may still hold it.
        if link.lock().down.is_some() {
            return None;
        }
        Some(Expected { link, peer: session.peer })
    }
}
