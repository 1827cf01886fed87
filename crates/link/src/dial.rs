//! How the connecting side of a link makes connections: the first ones, and each time one broke.

use std::io;
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::ciphers::Cipher;
use crate::endpoint::connect_tcp;
use crate::tls::{LinkError, connect_stream};
use crate::{Fingerprint, Identity, tuning};

/// Makes a connection to the side that accepts: connected, and with TLS over it if the session is encrypted.
pub trait Dialer: Send + Sync + 'static {
    /// Makes one within this time.
    fn dial(&self, within: Duration) -> Result<Channel, LinkError>;
}

impl<F> Dialer for F
where
    F: Fn(Duration) -> Result<Channel, LinkError> + Send + Sync + 'static,
{
    fn dial(&self, within: Duration) -> Result<Channel, LinkError> {
        self(within)
    }
}

/// Dials a TCP port, with or without TLS.
pub struct TcpDialer {
    address: String,
    tls: Option<ByTls>,
}

struct ByTls {
    identity: Identity,
    expected: Fingerprint,
    cipher: Option<Cipher>,
}

impl TcpDialer {
    /// To the agent at HOST:PORT that has this fingerprint, over TLS with this cipher or whichever TLS prefers.
    pub fn tls(address: &str, identity: &Identity, expected: Fingerprint, cipher: Option<Cipher>) -> Self {
        let tls = ByTls { identity: identity.clone(), expected, cipher };
        Self { address: address.into(), tls: Some(tls) }
    }

    /// To whoever is at HOST:PORT, in the clear: for networks that are declared to be trusted. The session's key is
    /// the only thing that keeps others out, and it keeps nobody from reading.
    pub fn plain(address: &str) -> Self {
        Self { address: address.into(), tls: None }
    }
}

impl Dialer for TcpDialer {
    fn dial(&self, within: Duration) -> Result<Channel, LinkError> {
        let begun = Instant::now();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::TimedOut => LinkError::TimedOut { address: self.address.clone(), after: within },
            _ => LinkError::Unreachable { address: self.address.clone(), source },
        };
        let mut tcp = connect_tcp(&self.address, within).map_err(failed)?;
        tuning::tune(&tcp).map_err(failed)?;
        let Some(tls) = &self.tls else { return Ok(Channel::over(tcp)) };
        // Each message of the handshake has as long as the whole: it is few messages.
        let left = within.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
        tcp.set_read_timeout(Some(left)).map_err(failed)?;
        let connection = connect_stream(&mut tcp, &self.address, &tls.identity, tls.expected, tls.cipher)?;
        tcp.set_read_timeout(None).map_err(failed)?;
        Ok(Channel::over(tcp).with_tls(connection))
    }
}
