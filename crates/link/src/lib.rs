//! The link between two agents: who they are, how they came to trust each other, and what protects what they say.
//!
//! There is no certificate authority. Each agent has an [`Identity`], a key with a certificate that it signed itself,
//! and knows its peers by the [`Fingerprint`] of theirs. Two agents become peers once, by a [`JoinToken`] that a person
//! carries from one to the other. From then on every connection is TLS 1.3 in which both sides prove who they are.
//!
//! The data of a migration goes over a [`Link`]: several streams that resume where they broke. A [`Channel`] is one pipe
//! of bytes, whatever carries it. `docs/PROTOCOL.md` says what is on the wire.

mod address;
mod authority;
pub mod channel;
mod chooser;
mod ciphers;
mod compress;
mod dial;
mod endpoint;
pub mod frame;
pub mod hello;
mod identity;
mod incoming;
mod join;
mod layer;
mod link;
mod pacing;
mod records;
mod sequence;
mod session;
mod sessions;
mod spread;
mod steering;
mod task;
mod tls;
mod token;
mod tuning;
mod websocket;

pub use address::{Address, InvalidAddress};
pub use authority::{Authority, AuthorityError};
pub use channel::Channel;
pub use ciphers::{Cipher, CipherSpeed, fastest_cipher, measure_ciphers};
pub use compress::{Compression, Method};
pub use dial::{Dialer, TcpDialer};
pub use endpoint::{Listener, MOST_DESCRIPTORS};
pub use hello::{MOST_STREAMS, Reason, Refusal};
pub use identity::{Fingerprint, Identity, IdentityError, InvalidFingerprint};
pub use incoming::Incoming;
pub use link::buffers::{Buffer, Pool};
pub use link::{Frame, Link, LinkDown, LinkOptions, LinkStats, StreamStats, usual_streams};
pub use session::{InvalidSession, SessionId, SessionKey};
pub use sessions::{Protection, SessionOptions, Sessions, Unattached};
pub use task::AsyncChannel;
pub use tls::{Acceptor, Arrival, LinkError, Stream, client_by_identity, connect, server_by_identity};
pub use token::{InvalidToken, JoinToken, Secret};

/// The processor time of the calling thread until now.
pub fn thread_cpu() -> std::time::Duration {
    rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// From here on the calling thread goes before others of this machine, where that is allowed: somebody waits for what it
/// does, which is little each time.
pub fn go_first() {
    // Who may not (`CAP_SYS_NICE`) takes its turn.
    let _ = rustix::process::setpriority_process(None, FIRST);
}

/// The nice value of threads that go first.
const FIRST: i32 = -15;

/// So many unpredictable bytes.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel's random numbers are there from boot on");
    bytes
}
