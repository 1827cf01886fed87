//! TLS over a connection, once STARTTLS was agreed upon.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use vmferry_link::{Channel, Fingerprint, Identity, client_by_identity, server_by_identity};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is no certificate or key.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// The files do not make a whole.
    #[error("cannot use {path}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// No server can have this name.
    #[error("{0:?} is no name that a certificate could have: give the host's name or address")]
    NoName(String),
    /// The two sides do not trust each other, or have nothing in common.
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    /// A client proved to be somebody who was not awaited.
    #[error("the client is not among those that were named: it is {0}")]
    Stranger(Fingerprint),
}

/// How a server protects its connections.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    /// Only these, by their keys; otherwise as the certificates say.
    clients: Option<Vec<Fingerprint>>,
}

/// How a client does.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// A certificate, with those between it and its authority's after it, and its key, both in PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificates.
    pub chain: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl Certificate {
    fn load(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|source| TlsError::Read { path: self.key.clone(), source })?;
        Ok((certificates(&self.chain)?, key))
    }

    fn unusable(&self, source: rustls::Error) -> TlsError {
        TlsError::Unusable { path: self.chain.clone(), source }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Read { path: path.into(), source };
    CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)
}

fn authority(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| TlsError::Unusable { path: path.into(), source })?;
    }
    Ok(Arc::new(roots))
}

fn crypto() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl ServerTls {
    /// With this certificate; and if there is an authority, only for clients that it vouches for.
    pub fn with_certificate(certificate: &Certificate, clients: Option<&Path>) -> Result<Self, TlsError> {
        let (chain, key) = certificate.load()?;
        let builder = ServerConfig::builder_with_provider(crypto())
            .with_safe_default_protocol_versions()
            .map_err(|error| certificate.unusable(error))?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(authority(path)?, crypto()).build();
                let general = |error: rustls::server::VerifierBuilderError| rustls::Error::General(error.to_string());
                let failed = |error| TlsError::Unusable { path: path.into(), source: general(error) };
                builder.with_client_cert_verifier(verifier.map_err(failed)?)
            }
        };
        let config = builder.with_single_cert(chain, key).map_err(|error| certificate.unusable(error))?;
        Ok(Self { config: Arc::new(config), clients: None })
    }

    /// As the agent with this identity, for those with these fingerprints and nobody else.
    pub fn with_identity(identity: &Identity, clients: Vec<Fingerprint>) -> Self {
        Self { config: server_by_identity(identity), clients: Some(clients) }
    }

    pub(crate) fn accept(&self, mut channel: Channel) -> Result<Channel, TlsError> {
        let failed = |error| TlsError::Handshake(io::Error::new(io::ErrorKind::InvalidData, error));
        let mut tls = ServerConnection::new(Arc::clone(&self.config)).map_err(failed)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut channel).map_err(TlsError::Handshake)?;
        }
        if let Some(clients) = &self.clients {
            let certificate = tls.peer_certificates().and_then(<[_]>::first);
            let client = certificate.and_then(Fingerprint::of_certificate);
            let client = client.ok_or_else(|| TlsError::Handshake(io::ErrorKind::InvalidData.into()))?;
            if !clients.contains(&client) {
                return Err(TlsError::Stranger(client));
            }
        }
        Ok(channel.with_tls(tls))
    }
}

impl ClientTls {
    /// With servers of this name that the authority vouches for; and if there is a certificate, showing it.
    pub fn with_authority(path: &Path, name: &str, certificate: Option<&Certificate>) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { path: path.into(), source };
        let builder = ClientConfig::builder_with_provider(crypto())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(authority(path)?);
        let config = match certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                let (chain, key) = certificate.load()?;
                builder.with_client_auth_cert(chain, key).map_err(|error| certificate.unusable(error))?
            }
        };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::NoName(name.to_owned()))?;
        Ok(Self { config: Arc::new(config), name })
    }

    /// As the agent with this identity, with the one of this fingerprint and no other.
    pub fn with_identity(identity: &Identity, server: Fingerprint) -> Self {
        let name = ServerName::try_from("vmferry.invalid").expect("it is a name, at which nobody looks");
        Self { config: client_by_identity(identity, server), name }
    }

    pub(crate) fn connect(&self, mut channel: Channel) -> Result<Channel, TlsError> {
        let failed = |error| TlsError::Handshake(io::Error::new(io::ErrorKind::InvalidData, error));
        let mut tls = ClientConnection::new(Arc::clone(&self.config), self.name.clone()).map_err(failed)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut channel).map_err(TlsError::Handshake)?;
        }
        Ok(channel.with_tls(tls))
    }
}
