//! TLS 1.3 between two agents. Who somebody is, is decided by the fingerprint alone: names, dates and issuers in
//! certificates mean nothing here, unless an [`Authority`] is to vouch for agents that are not paired. Both sides prove that they have the key of theirs.
//!
//! The client lets itself in only with a host whose fingerprint it expects. The server takes whoever proves to have a
//! key and tells the fingerprint to whoever serves the connection: a stranger must be able to come with a join token,
//! and a peer that was unpaired to be told so.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use tokio::net::TcpStream;

use crate::authority::Authority;
use crate::ciphers::Cipher;
use crate::hello::MAGIC;
use crate::{Fingerprint, Identity, Unattached};

/// What both sides must say in the handshake for a control connection: a TLS server of another kind is told from an
/// agent by it.
const ALPN: &[u8] = b"vmferry";
/// The same for a stream of a link.
const ALPN_STREAM: &[u8] = b"vmferry-stream";
/// Nobody looks at it, but there must be one.
const NO_NAME: &str = "vmferry.invalid";
const VERSIONS: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];

/// A connection whose other end has proved who it is.
#[derive(Debug)]
pub struct Stream {
    /// Encrypted bytes.
    pub io: tokio_rustls::TlsStream<TcpStream>,
    /// Who is at the other end.
    pub peer: Fingerprint,
    /// Our end's address.
    pub local: SocketAddr,
    /// The other end's address.
    pub remote: SocketAddr,
    /// The authority, if there is one, vouches for who is at the other end.
    pub vouched_for: bool,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nothing answers there.
    #[error("cannot reach an agent at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It answers too slowly, or not at all.
    #[error("{address} does not answer within {after:?}")]
    TimedOut {
        /// Where.
        address: String,
        /// How long was waited.
        after: Duration,
    },
    /// Something answers, but not as an agent does.
    #[error("what answers at {address} is not a vmferry agent")]
    NotAnAgent {
        /// Where.
        address: String,
        /// What it did.
        #[source]
        source: std::io::Error,
    },
    /// An agent, but another one than was expected.
    #[error("the agent at {address} is not the one that was paired: it is {found}")]
    WrongIdentity {
        /// Where.
        address: String,
        /// Who it is.
        found: Fingerprint,
    },
}

/// How much later the next address of a name is tried.
const BETWEEN_ADDRESSES: std::time::Duration = std::time::Duration::from_millis(250);

/// Connects to the agent at HOST:PORT and makes sure that it is one of these, or that the authority vouches for it as
/// the agent of that host, before anything is said to it.
pub async fn connect(
    address: &str,
    identity: &Identity,
    expected: &[Fingerprint],
    authority: Option<&Authority>,
    deadline: Duration,
) -> Result<Stream, LinkError> {
    let timed_out = || LinkError::TimedOut { address: address.into(), after: deadline };
    let connecting = async {
        let unreachable = |source| LinkError::Unreachable { address: address.into(), source };
        let tcp = connect_to_any(address).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let (local, remote) = (tcp.local_addr().map_err(unreachable)?, tcp.peer_addr().map_err(unreachable)?);
        let verifier = Arc::new(ExpectedServer {
            crypto: crypto(),
            expected: expected.to_vec(),
            authority: authority.cloned(),
            found: Mutex::new(None),
        });
        let connector =
            tokio_rustls::TlsConnector::from(Arc::new(client_config(identity, Arc::clone(&verifier), crypto(), ALPN)));
        match connector.connect(name_in(address), tcp).await {
            Ok(io) => {
                let io = tokio_rustls::TlsStream::from(io);
                let peer = peer_of(&io).ok_or_else(|| LinkError::NotAnAgent {
                    address: address.into(),
                    source: std::io::ErrorKind::InvalidData.into(),
                })?;
                let vouched_for = !expected.contains(&peer);
                Ok(Stream { io, peer, local, remote, vouched_for })
            }
            Err(source) => Err(match verifier.found() {
                Some(found) if !expected.contains(&found) => {
                    LinkError::WrongIdentity { address: address.into(), found }
                }
                _ => LinkError::NotAnAgent { address: address.into(), source },
            }),
        }
    };
    tokio::time::timeout(deadline, connecting).await.unwrap_or_else(|_| Err(timed_out()))
}

/// The server's half of TLS in another protocol than ours: an agent proves who it is, and whoever comes does too. Who that
/// is, the [`Fingerprint`] of its certificate tells; it is the caller's to look.
pub fn server_by_identity(identity: &Identity) -> Arc<ServerConfig> {
    Arc::new(server_config(identity))
}

/// Proves this identity, and has whoever connects prove one.
fn server_config(identity: &Identity) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&VERSIONS)
        .expect("the provider knows TLS 1.3")
        .with_client_cert_verifier(Arc::new(AnyClient { crypto: crypto() }))
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .expect("an identity's key fits its certificate");
    // Connections are few and long; a ticket would only be one more thing to protect.
    config.send_tls13_tickets = 0;
    config
}

/// The client's half, with the agent of this fingerprint and no other.
pub fn client_by_identity(identity: &Identity, expected: Fingerprint) -> Arc<ClientConfig> {
    let verifier =
        ExpectedServer { crypto: crypto(), expected: vec![expected], authority: None, found: Mutex::new(None) };
    let mut config = client_config(identity, Arc::new(verifier), crypto(), ALPN);
    config.alpn_protocols.clear();
    Arc::new(config)
}

/// Tries the addresses that a name has one after the other, each a little later than the one before, or at once when that
/// fails: one that does not answer must not take the time of the others (RFC 8305, "Happy Eyeballs").
async fn connect_to_any(address: &str) -> std::io::Result<TcpStream> {
    let mut addresses = tokio::net::lookup_host(address).await?;
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    let mut tries = tokio::task::JoinSet::new();
    let mut next = addresses.next();
    loop {
        if let Some(address) = next.take() {
            tries.spawn(TcpStream::connect(address));
            next = addresses.next();
        }
        tokio::select! {
            Some(ended) = tries.join_next() => match ended.expect("connecting does not panic") {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            },
            () = tokio::time::sleep(BETWEEN_ADDRESSES), if next.is_some() => {}
            else => return Err(last),
        }
    }
}

/// The host's name, for an authority's certificate; pinned ones may say what they like.
fn name_in(address: &str) -> ServerName<'static> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::try_from(NO_NAME).expect("it is a name"))
}

/// Makes the handshake of a stream over what is connected already, as the connecting side.
pub(crate) fn connect_stream<S: Read + Write>(
    io: &mut S,
    address: &str,
    identity: &Identity,
    expected: Fingerprint,
    cipher: Option<Cipher>,
) -> Result<ClientConnection, LinkError> {
    let not_an_agent = |source| LinkError::NotAnAgent { address: address.into(), source };
    let mut crypto = aws_lc_rs::default_provider();
    if let Some(cipher) = cipher {
        crypto.cipher_suites.retain(|suite| suite.suite() == cipher.suite());
    }
    let crypto = Arc::new(crypto);
    let verifier = Arc::new(ExpectedServer {
        crypto: Arc::clone(&crypto),
        expected: vec![expected],
        authority: None,
        found: Mutex::new(None),
    });
    let mut config = client_config(identity, Arc::clone(&verifier), crypto, ALPN_STREAM);
    config.enable_secret_extraction = true;
    let name = ServerName::try_from(NO_NAME).expect("it is a name");
    let mut tls = ClientConnection::new(Arc::new(config), name)
        .map_err(|error| not_an_agent(std::io::Error::new(ErrorKind::InvalidInput, error)))?;
    while tls.is_handshaking() {
        if let Err(source) = tls.complete_io(io) {
            return Err(match verifier.found() {
                Some(found) if found != expected => LinkError::WrongIdentity { address: address.into(), found },
                _ => not_an_agent(source),
            });
        }
    }
    match tls.alpn_protocol() {
        Some(ALPN_STREAM) => Ok(tls),
        _ => Err(not_an_agent(std::io::Error::other("it takes no streams"))),
    }
}

/// What came to an agent's port.
pub enum Arrival {
    /// The control connection of a peer.
    Control(Box<Stream>),
    /// A stream, for [`Sessions::attach`](crate::Sessions::attach).
    Stream(Box<Unattached>),
}

/// The server's side. Cheap to clone.
#[derive(Clone)]
pub struct Acceptor {
    tls: tokio_rustls::TlsAcceptor,
    authority: Option<Authority>,
}

impl Acceptor {
    /// Proves this identity to whoever connects.
    pub fn new(identity: &Identity, authority: Option<&Authority>) -> Self {
        let mut config = server_config(identity);
        config.alpn_protocols = vec![ALPN.to_vec(), ALPN_STREAM.to_vec()];
        // Streams take the keys from rustls once the handshake is over: see `records`.
        config.enable_secret_extraction = true;
        Self { tls: tokio_rustls::TlsAcceptor::from(Arc::new(config)), authority: authority.cloned() }
    }

    /// Takes a connection; whoever made it has proved who it is, within this time.
    pub async fn accept(&self, tcp: TcpStream, deadline: Duration) -> std::io::Result<Stream> {
        match tokio::time::timeout(deadline, self.take_tls(tcp)).await?? {
            Arrival::Control(stream) => Ok(*stream),
            Arrival::Stream(_) => Err(std::io::Error::other("it is a stream, not a control connection")),
        }
    }

    /// Takes a connection and finds out what it is, within this time: a control connection, or a stream, plain or not.
    pub async fn accept_any(&self, tcp: TcpStream, deadline: Duration) -> std::io::Result<Arrival> {
        let arriving = async {
            let mut first = [0];
            if tcp.peek(&mut first).await? == 1 && first[0] == MAGIC[0] {
                return Ok(Arrival::Stream(Box::new(Unattached::plain(blocking(tcp)?))));
            }
            self.take_tls(tcp).await
        };
        tokio::time::timeout(deadline, arriving).await?
    }

    /// What its side of a handshake goes by.
    #[cfg(test)]
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(self.tls.config())
    }

    async fn take_tls(&self, tcp: TcpStream) -> std::io::Result<Arrival> {
        tcp.set_nodelay(true)?;
        let (local, remote) = (tcp.local_addr()?, tcp.peer_addr()?);
        let io = self.tls.accept(tcp).await?;
        let alpn = io.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        let io = tokio_rustls::TlsStream::from(io);
        let peer = peer_of(&io).ok_or_else(|| std::io::Error::other("it has no certificate"))?;
        match (alpn.as_deref(), io) {
            (Some(ALPN), io) => {
                let chain = io.get_ref().1.peer_certificates().unwrap_or_default();
                let vouched_for = self.authority.as_ref().is_some_and(|it| it.vouches_for_client(chain));
                Ok(Arrival::Control(Box::new(Stream { io, peer, local, remote, vouched_for })))
            }
            (Some(ALPN_STREAM), tokio_rustls::TlsStream::Server(io)) => {
                let (tcp, tls) = io.into_inner();
                Ok(Arrival::Stream(Box::new(Unattached::protected(blocking(tcp)?, tls, peer))))
            }
            _ => Err(std::io::Error::other("it speaks TLS, but not as an agent does")),
        }
    }
}

/// The same connection for threads that wait in the kernel.
fn blocking(tcp: TcpStream) -> std::io::Result<std::net::TcpStream> {
    let tcp = tcp.into_std()?;
    tcp.set_nonblocking(false)?;
    Ok(tcp)
}

fn peer_of(io: &tokio_rustls::TlsStream<TcpStream>) -> Option<Fingerprint> {
    Fingerprint::of_certificate(io.get_ref().1.peer_certificates()?.first()?)
}

pub(crate) fn crypto() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn client_config(
    identity: &Identity,
    verifier: Arc<ExpectedServer>,
    crypto: Arc<CryptoProvider>,
    alpn: &[u8],
) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(crypto)
        .with_protocol_versions(&VERSIONS)
        .expect("the provider knows TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .expect("an identity's key fits its certificate");
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    config
}

/// What both verifiers say of signatures: TLS 1.3 only, by the key of the certificate that was shown.
macro_rules! key_is_proved {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::PeerIncompatible::Tls12NotOffered.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.crypto.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.crypto.signature_verification_algorithms.supported_schemes()
        }
    };
}

/// Takes a server with one of these fingerprints and no other; remembers who it was.
#[derive(Debug)]
struct ExpectedServer {
    crypto: Arc<CryptoProvider>,
    expected: Vec<Fingerprint>,
    authority: Option<Authority>,
    found: Mutex<Option<Fingerprint>>,
}

impl ExpectedServer {
    fn found(&self) -> Option<Fingerprint> {
        *self.found.lock().expect("no holder of this lock panics")
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = Fingerprint::of_certificate(end_entity).ok_or(CertificateError::BadEncoding)?;
        *self.found.lock().expect("no holder of this lock panics") = Some(found);
        if !self.expected.contains(&found) {
            match &self.authority {
                Some(authority) => authority.vouch_for_server(end_entity, intermediates, server_name, now)?,
                None => return Err(CertificateError::ApplicationVerificationFailure.into()),
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    key_is_proved!();
}

/// Takes any client that proves to have the key of its certificate.
#[derive(Debug)]
struct AnyClient {
    crypto: Arc<CryptoProvider>,
}

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    key_is_proved!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    const SOON: Duration = Duration::from_secs(5);

    fn identity(dir: &tempfile::TempDir, name: &str) -> Identity {
        Identity::load_or_make(&dir.path().join(name), name).unwrap()
    }

    async fn listener() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    #[tokio::test]
    async fn both_ends_know_who_the_other_is() {
        let dir = tempfile::tempdir().unwrap();
        let (alpha, beta) = (identity(&dir, "alpha"), identity(&dir, "beta"));
        let (listener, address) = listener().await;
        let acceptor = Acceptor::new(&beta, None);
        let server = tokio::spawn(async move {
            let mut stream = acceptor.accept(listener.accept().await.unwrap().0, SOON).await.unwrap();
            stream.io.write_all(b"welcome").await.unwrap();
            stream.io.shutdown().await.unwrap();
            stream.peer
        });
        let mut stream = connect(&address, &alpha, &[beta.fingerprint()], None, SOON).await.unwrap();
        let mut said = String::new();
        stream.io.read_to_string(&mut said).await.unwrap();
        assert_eq!((said.as_str(), stream.peer), ("welcome", beta.fingerprint()));
        assert_eq!(server.await.unwrap(), alpha.fingerprint());
    }

    #[tokio::test]
    async fn another_agent_than_expected_is_not_spoken_to() {
        let dir = tempfile::tempdir().unwrap();
        let (alpha, beta, mallory) = (identity(&dir, "alpha"), identity(&dir, "beta"), identity(&dir, "mallory"));
        let (listener, address) = listener().await;
        let acceptor = Acceptor::new(&mallory, None);
        let server = tokio::spawn(async move { acceptor.accept(listener.accept().await.unwrap().0, SOON).await.err() });
        let error = connect(&address, &alpha, &[beta.fingerprint()], None, SOON).await.unwrap_err();
        let LinkError::WrongIdentity { found, .. } = error else { panic!("{error}") };
        assert_eq!(found, mallory.fingerprint());
        assert!(server.await.unwrap().is_some(), "the server gets no connection either");
    }

    #[tokio::test]
    async fn a_certificate_without_its_key_is_worth_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (alpha, beta, mallory) = (identity(&dir, "alpha"), identity(&dir, "beta"), identity(&dir, "mallory"));
        // Certificates are no secret: mallory shows beta's, with its own key.
        let mut config = ServerConfig::builder_with_provider(crypto())
            .with_protocol_versions(&VERSIONS)
            .unwrap()
            .with_client_cert_verifier(Arc::new(AnyClient { crypto: crypto() }))
            .with_cert_resolver(Arc::new(Swapped { certificate: beta.chain[0].clone(), key: mallory.key.clone_key() }));
        config.alpn_protocols = vec![ALPN.to_vec()];
        let (listener, address) = listener().await;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let server = tokio::spawn(async move { acceptor.accept(listener.accept().await.unwrap().0).await.is_err() });
        let error = connect(&address, &alpha, &[beta.fingerprint()], None, SOON).await.unwrap_err();
        assert!(matches!(error, LinkError::NotAnAgent { .. }), "{error}");
        assert!(server.await.unwrap());
    }

    /// Somebody's certificate with somebody else's key.
    #[derive(Debug)]
    struct Swapped {
        certificate: CertificateDer<'static>,
        key: rustls::pki_types::PrivateKeyDer<'static>,
    }

    impl rustls::server::ResolvesServerCert for Swapped {
        fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
            let key = aws_lc_rs::sign::any_supported_type(&self.key).unwrap();
            Some(Arc::new(rustls::sign::CertifiedKey::new(vec![self.certificate.clone()], key)))
        }
    }

    #[tokio::test]
    async fn what_does_not_speak_tls_is_no_agent() {
        let dir = tempfile::tempdir().unwrap();
        let alpha = identity(&dir, "alpha");
        for reply in ["HTTP/1.1 400 Bad Request\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n", ""] {
            let (listener, address) = listener().await;
            let server = tokio::spawn(async move {
                let mut tcp = listener.accept().await.unwrap().0;
                let _ = tcp.read(&mut [0; 64]).await;
                let _ = tcp.write_all(reply.as_bytes()).await;
            });
            let error = connect(&address, &alpha, &[alpha.fingerprint()], None, SOON).await.unwrap_err();
            assert!(matches!(error, LinkError::NotAnAgent { .. }), "{reply}: {error}");
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn clients_without_a_key_with_nonsense_or_with_nothing_to_say_are_turned_away() {
        let dir = tempfile::tempdir().unwrap();
        let beta = identity(&dir, "beta");
        let (listener, address) = listener().await;
        let acceptor = Acceptor::new(&beta, None);
        for said in ["GET / HTTP/1.1\r\n\r\n", "\u{16}\u{3}\u{1}", ""] {
            let mut client = TcpStream::connect(&address).await.unwrap();
            client.write_all(said.as_bytes()).await.unwrap();
            let begun = std::time::Instant::now();
            let accepted = acceptor.accept(listener.accept().await.unwrap().0, Duration::from_millis(200)).await;
            assert!(accepted.is_err() && begun.elapsed() < SOON, "{said}");
        }
        // TLS, but without a certificate.
        let verifier = Arc::new(ExpectedServer {
            crypto: crypto(),
            expected: vec![beta.fingerprint()],
            authority: None,
            found: Mutex::new(None),
        });
        let mut config = ClientConfig::builder_with_provider(crypto())
            .with_protocol_versions(&VERSIONS)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let client = tokio::spawn(async move {
            let tcp = TcpStream::connect(&address).await.unwrap();
            if let Ok(mut io) = connector.connect(ServerName::try_from(NO_NAME).unwrap(), tcp).await {
                let _ = io.read(&mut [0; 1]).await;
            }
        });
        assert!(acceptor.accept(listener.accept().await.unwrap().0, SOON).await.is_err());
        client.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_of_an_older_tls_is_turned_away() {
        let dir = tempfile::tempdir().unwrap();
        let acceptor = Acceptor::new(&identity(&dir, "beta"), None);
        let (listener, address) = listener().await;
        // A client hello of TLS 1.2: no supported_versions, an AEAD suite, curves and signatures of the time.
        let mut hello = vec![3, 3];
        hello.extend([7; 32]);
        hello.extend([0, 0, 4, 0xc0, 0x2f, 0xc0, 0x2b, 1, 0]);
        let extensions = [[0, 10, 0, 4, 0, 2, 0, 29], [0, 13, 0, 4, 0, 2, 4, 3]].concat();
        hello.extend((extensions.len() as u16).to_be_bytes());
        hello.extend(extensions);
        let mut record = vec![0x16, 3, 1];
        record.extend((hello.len() as u16 + 4).to_be_bytes());
        record.extend([1, 0, 0, hello.len() as u8]);
        record.extend(hello);
        let mut client = TcpStream::connect(&address).await.unwrap();
        client.write_all(&record).await.unwrap();
        let error = acceptor.accept_any(listener.accept().await.unwrap().0, SOON).await.err().unwrap();
        assert!(error.to_string().contains("SupportedVersions"), "{error}");
        let mut alert = Vec::new();
        client.read_to_end(&mut alert).await.unwrap();
        assert_eq!(alert[..1], [21], "an alert, and nothing else");
        assert_eq!(alert.last(), Some(&70), "protocol_version");
    }

    #[tokio::test]
    async fn nobody_there_and_nobody_who_answers_are_told_apart_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let alpha = identity(&dir, "alpha");
        let (listener, address) = listener().await;
        let error = connect(&address, &alpha, &[], None, Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
        drop(listener);
        let error = connect(&address, &alpha, &[], None, SOON).await.unwrap_err();
        assert!(matches!(error, LinkError::Unreachable { .. }), "{error}");
    }
}
