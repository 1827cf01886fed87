//! A link: all streams between two agents for one migration. Some are for bulk, one is for what is urgent.
//!
//! Each stream has a thread that writes and, while it is connected, one that reads ([`stream`]). What they share, the
//! queues and windows and who waits for what, is in [`state`], behind one lock that is never held across a call that
//! can wait. The rules that need neither threads nor sockets are elsewhere: [`sequence`](crate::sequence) (nothing
//! lost, nothing twice), [`pacing`](crate::pacing), [`chooser`](crate::chooser) (compression).
//!
//! Nobody ever stops reading a socket: a frame is only sent when there is room for it at the other end. So a user that
//! stops taking frames stops the users that send them, and pings, acks and urgent frames still pass.

pub(crate) mod buffers;
mod reading;
pub(crate) mod state;
pub(crate) mod stream;
mod writing;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::compress::{Compression, Method};
use crate::dial::Dialer;
use crate::frame::MAX_PAYLOAD;
use crate::hello::{MOST_STREAMS, Refusal};
use crate::session::{SessionId, SessionKey};
use state::Shared;

/// What a link is made with. Both sides give the same session, key and number of streams.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// The session, as agreed over the control connection.
    pub session: SessionId,
    /// Its key.
    pub key: SessionKey,
    /// Bulk streams, 1 to 8. Of more than four, as many are used as pay ([`usual_streams`]).
    pub streams: u8,
    /// How long a broken stream may take to be connected again before the link is given up.
    pub patience: Duration,
    /// How many bytes of a stream may be on their way or wait to be taken, on each side; the smaller one counts.
    pub window: usize,
    /// What to do to what is sent.
    pub compression: Compression,
    /// The most that all bulk streams together send, in bytes a second.
    pub rate: Option<u64>,
}

impl LinkOptions {
    /// The usual: four streams, a minute of patience, 8 MiB a stream, adaptive compression, no cap.
    pub fn new(session: SessionId, key: SessionKey) -> Self {
        Self {
            session,
            key,
            streams: 4,
            patience: Duration::from_secs(60),
            window: 8 << 20,
            compression: Compression::Adaptive,
            rate: None,
        }
    }

    fn check(&self) {
        assert!((1..=MOST_STREAMS).contains(&self.streams), "a link has 1 to {MOST_STREAMS} bulk streams");
        let windows = MAX_PAYLOAD + 1024..=1 << 30;
        assert!(windows.contains(&self.window), "a window has room for one frame and at most 1 GiB");
    }
}

/// How many bulk streams are worth connecting from this host: four, and more where there are cores for them.
pub fn usual_streams() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.clamp(4, MOST_STREAMS.into()) as u8
}

/// What was sent over there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The number that the sender gave it.
    pub kind: u16,
    /// Its bytes.
    pub payload: Bytes,
    /// The stream that it came on: 0 is the urgent one.
    pub stream: u8,
}

/// Why a link cannot be used any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkDown {
    /// It was ended in order, by this side or by the other.
    #[error("the link was closed")]
    Closed,
    /// This side gave it up.
    #[error("the link was given up")]
    GivenUp,
    /// The other side gave it up.
    #[error("the other agent gave the link up")]
    PeerGaveUp,
    /// The other side does not want a stream (back).
    #[error("the other agent refused stream {stream}: {refusal}")]
    Refused {
        /// Which.
        stream: u8,
        /// Why.
        #[source]
        refusal: Refusal,
    },
    /// A stream broke and could not be connected again in time.
    #[error("stream {stream} broke and was not connected again within {patience:?}")]
    Lost {
        /// Which.
        stream: u8,
        /// How long was tried.
        patience: Duration,
        /// What happened last.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A payload is longer than a frame may be.
    #[error("a payload of {0} bytes: at most {MAX_PAYLOAD} fit into a frame")]
    TooLong(usize),
    /// No thread could be started.
    #[error("cannot start a thread for a stream")]
    Thread(#[source] Arc<io::Error>),
}

/// What a link did until now.
#[derive(Clone, Debug, Default)]
pub struct LinkStats {
    /// Bytes that users sent, each counted once.
    pub raw_sent: u64,
    /// Bytes that were written for that, with headers and repetitions, before TLS.
    pub wire_sent: u64,
    /// Bytes that arrived for users.
    pub raw_received: u64,
    /// Bytes that were read for that.
    pub wire_received: u64,
    /// How often a stream was connected again.
    pub reconnects: u32,
    /// The processor time of all threads of the link.
    pub cpu: Duration,
    /// The last round trip of a ping on the urgent stream.
    pub round_trip: Option<Duration>,
    /// Each stream; the urgent one is the first.
    pub streams: Vec<StreamStats>,
}

/// What a stream is like.
#[derive(Clone, Debug)]
pub struct StreamStats {
    /// Whether it is connected right now.
    pub connected: bool,
    /// Whether it is encrypted; known once it was connected.
    pub protected: Option<bool>,
    /// How what it sends is packed.
    pub method: Method,
    /// Bytes that are on their way or wait to be taken at the other end.
    pub held: usize,
    /// The last round trip of a ping, with what waited before it.
    pub round_trip: Option<Duration>,
    /// How often it was connected again.
    pub reconnects: u32,
}

/// See the module's text. Its methods wait; they can be called from several threads. Dropping a link gives it up.
pub struct Link(pub(crate) Arc<Shared>);

impl Link {
    /// Connects all streams to a side that expects them.
    pub fn connect(dialer: impl Dialer, options: LinkOptions) -> Result<Self, LinkDown> {
        options.check();
        let link = Self(Arc::new(Shared::new(options)));
        stream::start(&link.0, Some(&(Arc::new(dialer) as Arc<dyn Dialer>)))?;
        link.0.wait_until_connected()?;
        Ok(link)
    }

    /// Waits for streams that somebody attaches.
    pub(crate) fn expect(options: LinkOptions) -> Result<Self, LinkDown> {
        options.check();
        let link = Self(Arc::new(Shared::new(options)));
        stream::start(&link.0, None)?;
        Ok(link)
    }

    /// Queues a frame on the bulk stream with the least to do; waits while there is no room. Frames of different
    /// streams come in any order.
    pub fn send(&self, kind: u16, payload: impl Into<Bytes>) -> Result<(), LinkDown> {
        self.0.send(kind, payload.into(), false)
    }

    /// Queues a frame on the urgent stream, where it overtakes bulk; waits while there is no room. Urgent frames come
    /// in order.
    pub fn send_urgent(&self, kind: u16, payload: impl Into<Bytes>) -> Result<(), LinkDown> {
        self.0.send(kind, payload.into(), true)
    }

    /// The next bulk frame; `None` after the other side closed the link.
    pub fn recv(&self) -> Result<Option<Frame>, LinkDown> {
        self.0.recv(false)
    }

    /// The next urgent frame; `None` after the other side closed the link.
    pub fn recv_urgent(&self) -> Result<Option<Frame>, LinkDown> {
        self.0.recv(true)
    }

    /// Waits until everything that was sent before was taken by the user at the other end.
    pub fn flush(&self) -> Result<(), LinkDown> {
        self.0.flush()
    }

    /// Caps what all bulk streams together send, in bytes a second (256 KiB at least). Urgent frames are
    /// not held up.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.0.set_rate(rate);
    }

    /// Changes how frames that are sent from now on are packed.
    pub fn set_compression(&self, compression: Compression) {
        self.0.set_compression(compression);
    }

    /// What it did until now.
    pub fn stats(&self) -> LinkStats {
        self.0.stats()
    }

    /// Ends the link in order: waits until everything that was sent was taken, or until the other side closes too, for
    /// as long as its patience. What the other side still sends is dropped. Fails when something was not taken.
    pub fn close(&self) -> Result<(), LinkDown> {
        self.0.close()
    }

    /// Gives the link up at once; whoever waits in it is told, and so is the other side.
    pub fn give_up(&self) {
        self.0.fail(LinkDown::GivenUp);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Link").field(&self.0.options.session).finish()
    }
}
